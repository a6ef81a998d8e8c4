"""The benchmark: its numbers against calls by hand, interruptions, several processes, bad input, comparisons."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import from_depth
import numpy as np
import outliers
import pandas as pd
import pytest
import torch
from by_block import masked_batches
from PIL import Image
from scipy.stats import ttest_rel
from test_cli import fails_with

import libragrad_minimal.cli as cli
from libragrad_minimal import LIBRA, PLAIN, attribute, benchmark, libra_grad, report
from libragrad_minimal.batches import opened, pixels
from libragrad_minimal.benchmark import Settings, compare, read_table, run, summary
from libragrad_minimal.demo_vits import VITS
from libragrad_minimal.files import only_one
from libragrad_minimal.models import DATA, load_demo
from libragrad_minimal.scenes import draw_scene

FEW = Settings("vit", "scenes:6", methods=("IxG", "GenAtt", "RawAtt", "Random"), batch=4)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "few"
    run(FEW, folder)
    return folder


def value(table, example, method, rules, protocol, metric) -> float:
    wanted = {"example": example, "method": method, "rules": rules, "protocol": protocol, "metric": metric}
    (row,) = table[np.logical_and.reduce([table[name] == one for name, one in wanted.items()])].itertuples()
    return row.value


# ---- are the numbers right? ------------------------------------------------------------------------------------------


def shortened(model, pixels, kept):
    """The demo ViT's logits when only some patches' tokens enter its blocks, by its parts."""
    tokens = model._pos_embed(model.patch_embed(pixels[None]))
    tokens = tokens[:, [0, *(1 + patch for patch in kept)]]
    return model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))[0]


def painted(model, pixels, kept):
    """The same when the other patches are painted grey, pixel by pixel."""
    picture = torch.zeros_like(pixels)
    for patch in kept:
        row, column = divmod(patch, 8)
        area = np.s_[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        picture[area] = pixels[area]
    return model(picture[None])[0]


@pytest.mark.parametrize(("protocol", "answer"), [("drop tokens", shortened), ("occlude patches", painted)])
@pytest.mark.parametrize("rules", ["plain", "libra"])
def test_deletion_equals_a_loop_over_one_picture(protocol, answer, rules, measured):
    """MIF, LIF and SRG of input x gradient, from its definition; the gradient by autograd or libra_grad."""
    loaded, seed = load_demo("vit"), 5  # the second picture of the second batch
    pixels = loaded.transform(Image.fromarray(draw_scene(seed, objects=2).image))
    first = []
    with loaded.model.blocks[0].register_forward_pre_hook(lambda block, args: first.append(args[0])):
        logits = loaded.model(pixels[None].requires_grad_())[0]
    predicted = logits.argmax()
    gradient = {"plain": torch.autograd.grad, "libra": libra_grad}[rules](logits[predicted], first[0])[0]
    scores = (first[0] * gradient).sum(-1)[0, 1:]
    kept_right = {}
    with torch.no_grad():
        for name, order in {"MIF": scores.argsort(descending=True), "LIF": scores.argsort()}.items():
            points = [answer(loaded.model, pixels, order[64 * tenth // 10 :].tolist()) for tenth in range(1, 10)]
            kept_right[name] = 100 * np.mean([float(point.argmax() == predicted) for point in points])
    table, where = read_table(measured), (f"scene {seed}", "IxG", rules, protocol)
    assert value(table, *where, "MIF accuracy") == pytest.approx(100 - kept_right["MIF"], abs=1e-3)
    assert value(table, *where, "LIF accuracy") == pytest.approx(kept_right["LIF"], abs=1e-3)
    assert value(table, *where, "SRG") == pytest.approx(kept_right["LIF"] - kept_right["MIF"], abs=1e-3)


def test_maps_are_measured_against_the_object(measured):
    from sklearn.metrics import average_precision_score

    loaded, scene = load_demo("vit"), draw_scene(2, objects=2)
    pixels = loaded.transform(Image.fromarray(scene.image))[None]
    table = read_table(measured)
    result = attribute(loaded.model, pixels, int(loaded.model(pixels).argmax()), "GenAtt", PLAIN)
    fine = torch.nn.functional.interpolate(result.maps[:, None], size=(64, 64), mode="bicubic")
    expected = average_precision_score(scene.masks[0].ravel(), fine.detach().numpy().ravel())
    assert value(table, "scene 2", "GenAtt", "plain", "", "AP") == pytest.approx(expected, abs=1e-5)


def test_masks_are_cut_as_the_picture_is(tmp_path):
    """A wide picture, of which the model sees the middle square."""
    scene = draw_scene(1, objects=1)
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = scene.image
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 32:96] = 255 * scene.masks[0]
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    entry = {"picture": "a.png", "mask": "a_mask.png", "imagenet_class": int(scene.classes[0])}
    (tmp_path / "objects.json").write_text(json.dumps([entry]))
    loaded = load_demo("vit")
    (example,) = benchmark.open_data(f"objects:{tmp_path}", loaded)
    _, seen = pixels(loaded, example, masked=True)
    assert (seen.numpy() == scene.masks[0]).all()


def test_text_and_pairs(tmp_path):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(["Mary has a red ball. What colour is Mary's ball?", "Dora has a blue cup."]))
    few = {"methods": ("FullGrad+",), "metrics": ("completeness", "deletion")}
    run(Settings("llama", f"texts:{texts}", **few), tmp_path / "text")
    table = read_table(tmp_path / "text")
    assert set(table["protocol"]) - {""} == {"mask tokens"} and table["example"].nunique() == 2
    error = table[(table["metric"] == "completeness error") & (table["rules"] == "libra")]["value"]
    assert (error < 1e-4).all() and len(error) == 2
    run(Settings("clip", "scenes:2", methods=("FullGrad+",), target="true"), tmp_path / "pairs")
    table = read_table(tmp_path / "pairs")
    assert {"AP", "SRG", "SRG (true label)", "completeness error"} <= set(table["metric"])
    assert not table["value"].isna().any()


def test_the_table_says_what_was_measured(measured):
    table = read_table(measured)
    assert set(table["model"]) == {"vit"} and set(table["torch"]) == {torch.__version__} and set(table["seed"]) == {"0"}
    assert set(table["protocol"]) == {"", "drop tokens", "occlude patches"}
    runs = set(zip(table["method"], table["rules"], strict=True))
    assert ("RawAtt", "") in runs and ("IxG", "libra") in runs  # without gradients there is one run, not one for each


def test_methods_meant_for_plain_gradients_run_plain():
    settings = Settings("vit", "scenes:1", methods=("IG", "Random", "IxG"), rules=("libra",))
    assert settings.runs() == {"libra": ["IxG"], "plain": ["IG", "Random"]}


# ---- interruptions, several processes --------------------------------------------------------------------------------

COMMAND = ["-m", "libragrad_minimal", "benchmark", "--model", "vit", "--data", "scenes:24", "--batch", "2"]
COMMAND += ["--methods", "IxG,Random", "--metrics", "deletion,completeness"]


def whole(folder) -> pd.DataFrame:
    return read_table(folder).astype({name: str for name in benchmark.KEYS})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("benchmark") / "whole"
    subprocess.run([sys.executable, *COMMAND, "-o", str(folder)], check=True, capture_output=True)
    return whole(folder)


def killed_after(parts: int, command: list[str], folder: Path, find=lambda process: process.pid) -> None:
    """Start a command and kill it, or the process that `find` names, once so many batches are done."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while len(list(folder.glob("parts/*.parquet"))) < parts:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        os.kill(find(process), signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_killed_run_goes_on(uninterrupted, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, *COMMAND, "-o", str(folder)]
    killed_after(3, command, folder)
    before = {file: file.stat().st_mtime_ns for file in folder.glob("parts/*.parquet")}
    assert not (folder / "table.parquet").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())  # nothing is measured twice
    pd.testing.assert_frame_equal(whole(folder), uninterrupted, check_exact=True)


@pytest.mark.slow
def test_two_processes_one_of_them_killed(uninterrupted, tmp_path):
    """accelerate's launcher ends both when one dies; started anew they do what is left, and the table is the same."""
    folder = tmp_path / "shared"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, *COMMAND, "-o", str(folder)]

    def second(process) -> int:
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = file.read_bytes().split(b"\0")
                if b"LOCAL_RANK=1" in environment and str(folder).encode() in (file.parent / "cmdline").read_bytes():
                    return int(file.parent.name)
            except OSError:
                continue
        raise AssertionError("no second process")

    killed_after(2, command, folder, second)
    assert not (folder / "table.parquet").exists()
    subprocess.run(command, check=True, capture_output=True)
    pd.testing.assert_frame_equal(whole(folder), uninterrupted, check_exact=True)


def test_the_number_of_threads_changes_no_digit(measured, tmp_path):
    before = torch.get_num_threads()
    run(replace(FEW, threads=1), tmp_path / "one")
    assert torch.get_num_threads() == before
    (tmp_path / "one" / "parts" / "00001.parquet").unlink()
    run(replace(FEW, threads=3), tmp_path / "one")  # nor is it another run
    pd.testing.assert_frame_equal(read_table(tmp_path / "one"), read_table(measured), check_exact=True)


def test_each_part_keeps_the_versions_that_measured_it(measured, tmp_path):
    """A run that was begun with another PyTorch, or by a version of ours that noted none, and ends with this one."""
    folder = tmp_path / "resumed"
    shutil.copytree(measured, folder)
    first, second = (folder / "parts" / f"0000{i}.parquet" for i in (0, 1))
    pd.read_parquet(first).assign(torch="2.0").drop(columns="timm").to_parquet(first)
    second.unlink()
    run(FEW, folder)
    table = read_table(folder)
    of_first = table["example"].isin(pd.read_parquet(first)["example"])
    assert set(table[of_first]["torch"]) == {"2.0"} and set(table[~of_first]["torch"]) == {torch.__version__}
    assert set(table[of_first]["timm"]) == {""} and "" not in set(table[~of_first]["timm"])


def test_a_second_process_on_the_same_work_is_told_so(tmp_path):
    folder = tmp_path / "taken"
    run(FEW, folder)
    (folder / "parts" / "00001.parquet").unlink()
    with only_one(folder / "process 0"):
        with pytest.raises(BlockingIOError, match="another process is at work"):
            run(FEW, folder)


# ---- odd files, bad input --------------------------------------------------------------------------------------------


@pytest.fixture
def odd_folder(tmp_path) -> Path:
    root = tmp_path / "pictures"
    for name in ("cat", "star"):
        (root / name).mkdir(parents=True)
        Image.fromarray(draw_scene(1, classes=[name]).image).save(root / name / "good.png")
    (root / "cat" / "empty.png").touch()
    whole = (root / "star" / "good.png").read_bytes()
    (root / "star" / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "star" / "page.jpg").write_text("<html>404</html>")
    return root


def test_damaged_files_are_named_counted_and_skipped(odd_folder, tmp_path):
    few = {"methods": ("IxG",), "rules": ("plain",), "metrics": ("completeness",)}
    run(Settings("vit", f"imagenet:{odd_folder}", **few), tmp_path / "out")
    table = read_table(tmp_path / "out")
    told = benchmark.skipped(table)
    assert len(told) == 3 and all(any(name in one for one in told) for name in ("empty.png", "half.png", "page.jpg"))
    assert set(table[table["metric"] == "output"]["example"]) == {"cat/good.png", "star/good.png"}


def test_file_that_is_gone_when_its_turn_comes(odd_folder, tmp_path, monkeypatch):
    found = benchmark.open_data(f"imagenet:{odd_folder}", load_demo("vit"))
    os.remove(odd_folder / "star" / "good.png")
    monkeypatch.setattr(benchmark, "open_data", lambda *_: found)
    few = {"methods": ("IxG",), "rules": ("plain",), "metrics": ("completeness",)}
    run(Settings("vit", f"imagenet:{odd_folder}", **few), tmp_path / "out")
    assert any(
        "star/good.png" in one and "there is no file" in one for one in benchmark.skipped(read_table(tmp_path / "out"))
    )


def test_metrics_that_nobody_named_are_those_the_data_allow(odd_folder, tmp_path):
    """A folder of pictures has no masks, scenes have: segmentation is measured of scenes only."""
    few = {"methods": ("IxG",), "rules": ("plain",), "protocols": ("drop",), "explain": "ahead"}
    run(Settings("vit", f"imagenet:{odd_folder}", **few), tmp_path / "folder")
    run(Settings("vit", "scenes:2", **few), tmp_path / "scenes")
    without, with_masks = (set(read_table(tmp_path / name)["metric"]) for name in ("folder", "scenes"))
    assert "AP" in with_masks and "AP" not in without and "SRG" in without
    with pytest.raises(ValueError, match="has no masks"):
        run(Settings("vit", f"imagenet:{odd_folder}", **few, metrics=("segmentation",)), tmp_path / "asked")
    assert set(read_table(tmp_path / "scenes")["explained"]) == {"ahead"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data", "imagenet:nowhere"], "there is no folder"),
        (["--data", "scenes:4", "--metrics", "segmentation", "--model", "llama"], "write KIND:WHERE"),
        (["--data", "scenes:4", "--count", "0"], "at least 1"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--methods", "Oracle"], "unknown method 'Oracle'"),
        (["--data", ""], "needs --model and --data"),
        (["--model", "clip", "--explain", "probability"], "of which there are no probabilities"),
        (["--device-map", "auto"], "the demo vit is too small for that"),
    ],
)
def test_bad_input_is_told_before_work_starts(changes, message, tmp_path, capsys):
    command = ["benchmark", "--model", "vit", "--data", "scenes:4", *changes, "-o", tmp_path / "out"]
    fails_with(capsys, command, message)
    assert not (tmp_path / "out" / "parts").exists()


def test_method_that_the_model_cannot_have(tmp_path, monkeypatch):
    """An MLP-Mixer has no attention maps."""
    from timm.models.mlp_mixer import MlpMixer

    mixer = MlpMixer(num_classes=12, img_size=64, patch_size=8, num_blocks=2, embed_dim=32).eval()
    loaded = load_demo("vit")
    loaded.model, loaded.name = mixer, "a mixer"
    monkeypatch.setattr(benchmark, "load", lambda *_: loaded)
    with pytest.raises(ValueError, match="a mixer can't have GenAtt"):
        run(FEW, tmp_path / "out")
    assert not (tmp_path / "out" / "parts").exists()


def test_folder_of_another_run(measured, tmp_path):
    with pytest.raises(ValueError, match=r"other settings \(methods"):
        run(Settings("vit", "scenes:6", methods=("IxG",), batch=4), measured)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="isn't empty"):
        run(FEW, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_run_killed_before_its_settings_were_written_goes_on(tmp_path):
    for name in (".process 0.lock", "settings.json.01234567.unfinished"):
        (tmp_path / name).touch()
    few = Settings("vit", "scenes:2", methods=("IxG",), rules=("plain",), metrics=("completeness",))
    assert run(few, tmp_path).is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="only there names of files are any bytes")
def test_names_of_files_that_are_no_text(tmp_path):
    (folder := tmp_path / "pictures" / "cat").mkdir(parents=True)
    Image.fromarray(draw_scene(1, classes=["cat"]).image).save(folder / "good\udcff.png")
    (folder / "bad\udcfe.png").write_bytes(b"no picture")
    few = {"methods": ("IxG",), "rules": ("plain",), "metrics": ("completeness",)}
    table = pd.read_parquet(run(Settings("vit", f"imagenet:{folder.parent}", **few), tmp_path / "out"))
    assert set(table["example"]) == {"cat/good[U+DCFF].png", "cat/bad[U+DCFE].png"}
    assert "bad[U+DCFE].png is not a picture" in benchmark.skipped(table)[0]
    report.page(table, []).encode()
    with pytest.raises(ValueError, match="the name of the data isn't UTF-8: it holds bytes that are no text"):
        run(Settings("vit", "imagenet:pictures\udcff", **few), tmp_path / "another")


# ---- comparisons, report ---------------------------------------------------------------------------------------------


def test_paired_differences_are_those_of_a_paired_t_test(measured):
    table = read_table(measured)
    difference = (
        compare("IxG libra", "IxG plain", measured).set_index(["protocol", "metric"]).loc["drop tokens", "SRG (logit)"]
    )
    chosen = table[
        (table["protocol"] == "drop tokens") & (table["metric"] == "SRG (logit)") & (table["method"] == "IxG")
    ]
    wide = chosen.pivot(index="example", columns="rules", values="value").astype(float)
    assert difference["difference"] == pytest.approx((wide["libra"] - wide["plain"]).mean())
    expected = ttest_rel(wide["libra"], wide["plain"]).statistic
    assert difference["difference"] / difference["error"] == pytest.approx(expected, rel=1e-5)
    assert difference["in standard errors"] == pytest.approx(abs(expected), rel=1e-5)
    with pytest.raises(ValueError, match="has no run 'IxG best'; it has IxG plain"):
        compare("IxG best", "IxG plain", measured)


def test_two_folders_compare(measured, tmp_path):
    shutil.copytree(measured, tmp_path / "same")
    assert (compare(str(measured), str(tmp_path / "same"), measured)["difference"] == 0).all()


def test_command_writes_table_figure_and_page(tmp_path, capsys):
    arguments = ["benchmark", "--model", "vit", "--data", "scenes:3", "--methods", "ixg", "--metrics", "segmentation"]
    assert cli.main([*arguments, "--csv", "-o", str(tmp_path / "out")]) == 0
    assert "3 examples measured, 0 skipped; wrote" in capsys.readouterr().out
    there = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"table.parquet", "table.csv", "figure.png", "report.html", "settings.json"} <= there
    assert cli.main(["benchmark", "--compare", "IxG libra", "IxG plain", "-o", str(tmp_path / "out")]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[-4:] == ["difference", "standard error", "examples", "in standard errors"]
    assert any("AP" in row for row in rows)


def test_report_says_every_mean_and_escapes_names(measured):
    table = read_table(measured)
    skipped = pd.DataFrame({"example": ["<b>"], "metric": ["skipped"], "note": ["<script>alert(1)</script>: damaged"]})
    page = report.page(pd.concat([table, skipped]), [("data", "imagenet:<i>")])
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "imagenet:&lt;i&gt;" in page
    strange = report.page(pd.concat([table, skipped.assign(note="a\u202eb\x1b[2J")]), [("data", "\u2067c")])
    assert "<li>a[U+202E]b[U+001B][2J</li>" in strange and "data: [U+2067]c" in strange
    (mean,) = summary(table).query("method == 'GenAtt' and rules == 'libra' and metric == 'AP'")["mean"]
    assert f"{mean:.3g} ±" in page
    drawn = [axes for axes in report.figure(table).axes if axes.get_title()]
    assert [axes.get_title() for axes in drawn] == report.drawn_of(report.columns(table))
    (ap,) = (axes for axes in drawn if axes.get_title() == "AP")
    best = summary(table).query("metric == 'AP'").sort_values("mean")["method"].iloc[-1]
    assert ap.get_yticklabels()[-1].get_text().startswith(best), "the best on top"


@pytest.mark.parametrize("width, scheme", [(1200, "light"), (390, "dark")])
def test_report_is_readable_on_a_screen_and_on_a_phone(measured, browser, tmp_path, width, scheme):
    (tmp_path / "report.html").write_text(report.page(read_table(measured), [("model", "vit")]), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto((tmp_path / "report.html").as_uri(), wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    drawn = page.evaluate("[...document.images].map(i => [i.clientWidth, i.naturalWidth, i.alt])")
    page.close()
    assert len(drawn) >= 4 and all(told for _, _, told in drawn)
    smallest = min(8 / 72 * 200 * shown / natural for shown, natural, _ in drawn)  # letters of 8 points at 200 an inch
    assert smallest >= 9, "pixels"


def test_rules_differ(measured):
    """A benchmark that gave every run the same scores would be quick and wrong."""
    loaded = load_demo("vit")
    pixels = loaded.transform(Image.fromarray(draw_scene(0, objects=2).image))[None]
    target = int(loaded.model(pixels).argmax())
    plain, libra = (attribute(loaded.model, pixels, target, "IxG", rules) for rules in (PLAIN, LIBRA))
    table = read_table(measured)
    for rules, result in (("plain", plain), ("libra", libra)):
        error = value(table, "scene 0", "IxG", rules, "", "completeness error")
        assert error == pytest.approx(result.completeness_error.item(), rel=1e-3)


# ---- what is stored for notebook 05 ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_stored_table_of_coco_is_what_its_command_measures(shared, tmp_path):
    """Two methods on the first batch of pictures, on another machine perhaps."""
    stored = pd.read_parquet(DATA / "benchmark_coco.parquet")
    name, data = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", f"objects:{shared / 'pictures' / 'coco'}"
    settings = Settings(name, data, ("FullGrad+", "GenAtt"), metrics=("segmentation",), target="true", batch=4)
    of = benchmark.subject(benchmark.load(name, torch.device("cpu")))
    live = benchmark.measured(of, benchmark.open_data(data, of.loaded)[:4], settings)
    keys = ["example", "method", "rules", "metric"]
    both = live.merge(stored.astype({key: str for key in keys}), on=keys, suffixes=("", " stored"))
    assert len(both) == len(live) == 4 * 2 * 2 * 5
    assert np.isclose(both["value"], both["value stored"], atol=2e-3).all()


def test_stored_outliers_are_what_is_measured(shared):
    """On the first pictures; and a token that is made longer than the others is found."""
    of, batches = masked_batches(f"objects:{shared / 'pictures' / 'coco'}")
    live = pd.DataFrame(outliers.measured(of, next(batches)))
    stored = pd.read_csv(outliers.FILE).head(len(live))
    assert live[["example", "method"]].equals(stored[["example", "method"]])
    assert np.allclose(live.drop(columns=["example", "method"]), stored.drop(columns=["example", "method"]), atol=2e-3)

    entered = list(torch.ones(3, 1, 1 + 6, 2))
    entered[1][0, 4] *= 20
    where, times = outliers.outlying(entered)
    assert where.nonzero().tolist() == [[0, 3]]
    assert times[:, 0].tolist() == [1, 20, 1]


def test_stored_deletion_from_a_depth_on_is_what_is_measured(shared):
    """On the first two pictures. From half of the depth on it is SkipPLUS."""
    settings = Settings(from_depth.VIT_TINY, f"imagenet:{shared / 'pictures' / 'imagenet'}", ("SkipPLUS",), count=300)
    of = benchmark.subject(benchmark.load(settings.model, torch.device("cpu")))
    examples = benchmark.spread(benchmark.open_data(settings.data, of.loaded), settings.count)[:2]
    batch, _ = opened(of, examples, settings)
    keys, value = ["example", "rules", "first block", "protocol"], "SRG (logit)"
    live = pd.DataFrame(from_depth.measured(of, batch, settings)).merge(pd.read_csv(from_depth.FILE), on=keys)
    assert len(live) == 2 * 2 * 2 * 2
    assert np.allclose(live[f"{value}_x"], live[f"{value}_y"], atol=2e-2)
    skip_plus = benchmark.measured(of, examples, replace(settings, rules=("libra",), metrics=("deletion",)))
    skip_plus = skip_plus[skip_plus["metric"] == value].set_index(["example", "protocol"])["value"]
    from_half = live[(live["rules"] == "libra") & (live["first block"] == 6)].set_index(["example", "protocol"])
    assert np.allclose(from_half[f"{value}_x"], skip_plus.loc[from_half.index], atol=1e-4)


def test_families_are_measured_under_both_protocols():
    stored = pd.read_parquet(DATA / "benchmark_families.parquet")
    deletion = stored[stored["metric"] == "SRG"]
    counts = deletion.groupby(["model", "method", "rules", "protocol"], observed=True)["example"].nunique().unstack()
    assert set(counts.index.get_level_values("model")) == set(VITS)
    assert (counts[["drop tokens", "occlude patches"]] == 50).all(axis=None)


@pytest.mark.parametrize("family", VITS)
def test_stored_table_of_the_families_is_what_is_measured(family):
    """Two methods on the first scenes, and each family's own claim: under Libra FullGrad+ adds up."""
    stored = pd.read_parquet(DATA / "benchmark_families.parquet")
    stored = stored[(stored["model"] == family) & (stored["explained"] == "logit")].drop(columns="model")
    settings = Settings(
        family, "scenes:4", ("FullGrad+", "XGradCAM+"), metrics=("completeness", "segmentation"), target="true", batch=4
    )
    of = benchmark.subject(benchmark.load(family, torch.device("cpu")))
    live = benchmark.measured(of, benchmark.open_data(settings.data, of.loaded), settings)
    keys = ["example", "method", "rules", "metric"]
    both = live.merge(stored.astype({key: str for key in keys}), on=keys, suffixes=("", " stored"))
    assert set(both["metric"]) == {"completeness error", "AP", "pointing game"} and len(both) == 4 * 2 * (3 + 2)
    assert np.isclose(both["value"], both["value stored"], atol=2e-3).all()
    adds_up = stored[(stored["method"] == "FullGrad+") & (stored["metric"] == "completeness error")]
    errors = adds_up.groupby("rules", observed=True)["value"].max()
    assert errors["libra"] < 1e-3 and errors["plain"] > 0.1


def test_families_say_the_same_of_their_rows():
    """No family, rules or scene is missing; a mixer alone has fewer methods."""
    stored = pd.read_parquet(DATA / "benchmark_families.parquet")
    assert set(stored["model"]) == set(VITS)
    runs = stored.groupby("model", observed=True).apply(
        lambda rows: set(zip(rows["method"], rows["rules"], strict=True))
    )
    assert all(runs[family] == runs["vit"] for family in VITS if family != "mixer")
    assert {method for method, _ in runs["vit"] - runs["mixer"]} >= {"GenAtt", "Attention Rollout"}
    assert (stored.groupby(["model", "method", "rules", "metric"], observed=True)["example"].nunique() == 50).all()
