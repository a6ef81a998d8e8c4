"""The command line, run as a user runs it: what it writes, what it says, and its exit status."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import libragrad_minimal.__main__ as cli
from libragrad_minimal import LIBRA, PLAIN, attribute
from libragrad_minimal.demo_vits import VITS
from libragrad_minimal.models import DATA, DEMOS, LoadedModel, load_demo
from libragrad_minimal.scenes import draw_scene


@pytest.fixture
def scene(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(draw_scene(1, classes=["cat", "star"]).image).save(path)
    return path


def needs_demo(kind: str) -> None:
    if kind not in DEMOS or not (DATA / f"demo_{kind}.safetensors").exists():
        pytest.skip(f"the demo {kind} is not there yet")


def fails_with(capsys, arguments, message) -> None:
    """Exit status 2 and one line that says what was wrong."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert message in error


def test_image_writes_a_panel_a_class_and_the_scores(scene, tmp_path, capsys):
    needs_demo("vit")
    picture, scores = tmp_path / "out.png", tmp_path / "out.npz"
    arguments = ["image", scene, "--class", "cat", "--class", "7", "-o", picture, "--save-scores", scores]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert "completeness error" in capsys.readouterr().out
    width, height = Image.open(picture).size
    assert width > 2.5 * height, "the picture and two panels beside each other"
    loaded, saved = load_demo("vit"), np.load(scores)
    assert saved["targets"].tolist() == ["cat", "star"]
    pixels = loaded.transform(Image.open(scene)).expand(2, -1, -1, -1)
    expected = attribute(loaded.model, pixels, torch.tensor([2, 7]), "FullGrad+", LIBRA)
    np.testing.assert_allclose(saved["scores"], expected.scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(saved["output"], expected.output, rtol=1e-4)
    assert tuple(saved["grid"]) == expected.grid


@pytest.mark.parametrize("family", ["siglip", "mixer"])
def test_image_takes_another_demo(family, scene, tmp_path, capsys):
    arguments = ["image", scene, "--class", "cat", "--model", family, "-o", tmp_path / "out.png"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    fails_with(capsys, [*arguments, "--method", "genatt"], "attention") if family == "mixer" else None


def test_image_without_a_class_explains_the_prediction_with_options(scene, tmp_path):
    needs_demo("vit")
    scores = tmp_path / "out.npz"
    rollout = ["--method", "attention-rollout", "--head-fusion", "max", "--discard-ratio", "0.9", "--rules", "plain"]
    arguments = ["image", scene, *rollout, "-o", tmp_path / "out.pdf", "--save-scores", scores]
    assert cli.main([str(argument) for argument in arguments]) == 0
    loaded = load_demo("vit")
    pixels = loaded.transform(Image.open(scene))[None]
    predicted = loaded.model(pixels).argmax(1)
    options = {"head_fusion": "max", "discard_ratio": 0.9}
    expected = attribute(loaded.model, pixels, predicted, "Attention Rollout", PLAIN, **options)
    np.testing.assert_allclose(np.load(scores)["scores"], expected.scores, rtol=1e-4, atol=1e-6)


def test_image_with_a_real_model(shared, tmp_path):
    from libragrad_minimal.photographs import draw_collage

    draw_collage(1, ["cat", "coffee"]).image.save(tmp_path / "photo.png")
    model = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    arguments = ["--model", model, "--class", "tabby", "--class", "espresso", "--save-scores", tmp_path / "out.npz"]
    command = ["image", tmp_path / "photo.png", *arguments, "-o", tmp_path / "out.png"]
    assert cli.main([str(argument) for argument in command]) == 0
    tabby, espresso = np.load(tmp_path / "out.npz")["scores"].reshape(2, 14, 14)
    assert tabby[:, :7].sum() > tabby[:, 7:].sum(), "the cat is on the left"
    assert espresso[:, 7:].sum() > espresso[:, :7].sum()


def test_clip_writes_a_panel_a_prompt(scene, tmp_path):
    needs_demo("clip")
    prompts, scores = ["a red cat", "a blue star"], tmp_path / "out.npz"
    arguments = ["clip", scene, *prompts, "-o", tmp_path / "out.png", "--save-scores", scores]
    assert cli.main([str(argument) for argument in arguments]) == 0
    width, height = Image.open(tmp_path / "out.png").size
    assert width > 2.5 * height
    loaded, saved = load_demo("clip"), np.load(scores)
    pixels = loaded.transform(Image.open(scene))[None]
    with torch.no_grad():
        similarity = loaded.model(pixels, loaded.tokenizer(prompts))
        texts = loaded.model.encode_text(loaded.tokenizer(prompts), normalize=True) * loaded.model.logit_scale.exp()
    np.testing.assert_allclose(saved["output"], (similarity[0] @ texts.T)[0], rtol=1e-5)
    expected = attribute(loaded.model, pixels.expand(2, -1, -1, -1), texts, "FullGrad+")
    np.testing.assert_allclose(saved["scores"], expected.scores, rtol=1e-4, atol=1e-4)


def test_text_as_html_escapes_the_prompt(tmp_path):
    needs_demo("llama")
    out = tmp_path / "out.html"
    arguments = [
        "text",
        "Ben has <script>alert(1)</script> a red kite.",
        "--target",
        "Ben",
        "--against",
        "Anna",
        "-o",
        out,
    ]
    assert cli.main([str(argument) for argument in arguments]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<script" not in page
    assert "Ben" in page and "and not" in page


def test_text_as_a_figure(tmp_path):
    needs_demo("llama")
    assert cli.main(["text", "Ben has a red kite.", "-o", str(tmp_path / "out.png")]) == 0
    assert Image.open(tmp_path / "out.png").width > 100


@pytest.mark.parametrize("family", VITS)
def test_audit_prints_the_table(family, capsys):
    assert cli.main(["audit", family]) == 0
    out = capsys.readouterr().out
    assert "NativeLayerNorm" in out and "are complete" in out


def test_audit_of_a_model_with_an_unsupported_operation_exits_with_1(monkeypatch, capsys):
    class Waves(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1).sin()

    loaded = LoadedModel("vit", "waves", Waves(), [], transform=lambda picture: torch.zeros(3, 8, 8))
    monkeypatch.setattr(cli, "load_demo", lambda kind: loaded)
    assert cli.main(["audit", "vit"]) == 1
    assert "unsupported" in capsys.readouterr().out


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["image", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and "--discard-ratio" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["image", "nowhere.png"], "no file nowhere.png"),
        (["image", "{scene}", "--method", "magic"], "unknown method"),
        (["image", "{scene}", "--rules", "magic"], "invalid choice"),
        (["image", "{scene}", "-o", "out.txt"], "out.txt"),
        (["image", "{scene}", "-o", "/nowhere/at/all/out.png"], "doesn't exist"),
        (["image", "{scene}", "--class", "tabby"], "knows no class 'tabby'"),
        (["image", "{scene}", "--class", "99"], "0..11"),
        (["image", "{scene}", "--head-fusion", "max"], "FullGrad+ has no option head_fusion"),
        (["image", "{scene}", "--model", "no_such_vit"], "no_such_vit"),
        (["text", " "], "empty"),
        (["clip", "{scene}", " "], "prompt 1 is empty"),
        (["clip", "http://example.org/a.png", "a cat"], "not an https address"),
        (["text", "Ben has a red kite.", "--target", ""], "no token"),
        (["audit", "/nowhere"], "/nowhere"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_one_line(arguments, message, scene, tmp_path, capsys, monkeypatch):
    needs_demo("vit"), needs_demo("llama"), needs_demo("clip")
    monkeypatch.chdir(tmp_path)
    fails_with(capsys, [argument.format(scene=scene) for argument in arguments], message)


def test_a_broken_picture_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    fails_with(capsys, ["image", tmp_path / "broken.png"], "is not a picture that can be read")


def test_nothing_but_results_when_piped(tmp_path):
    needs_demo("llama")
    command = [
        sys.executable,
        "-m",
        "libragrad_minimal",
        "text",
        "Ben has a red kite.",
        "-o",
        str(tmp_path / "out.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DATA.parent, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("why ")


@pytest.mark.slow
def test_demo_writes_one_page_that_a_browser_shows(tmp_path):
    for kind in ("vit", "clip", "llama"):
        needs_demo(kind)
    page = tmp_path / "demo.html"
    before = os.times()
    command = [sys.executable, "-m", "libragrad_minimal", "demo", "-o", str(page)]
    subprocess.run(command, check=True, cwd=DATA.parent, timeout=300)
    after = os.times()
    processor_time = after.children_user + after.children_system - before.children_user - before.children_system
    assert processor_time < 60, "seconds of one core; wall time would depend on what else runs"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium to look at the page with")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    dump = [chromium, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    document = subprocess.run(dump, capture_output=True, text=True, timeout=120, check=True).stdout
    assert document.count("<img") >= 5 and "where the next word comes from" in document
    screenshot = tmp_path / "page.png"
    shot = [*dump[:-2], f"--screenshot={screenshot}", "--window-size=1000,2400", page.as_uri()]
    subprocess.run(shot, capture_output=True, timeout=120, check=True)
    pixels = np.asarray(Image.open(screenshot).convert("RGB")).astype(int)
    orange = (pixels[..., 0] - pixels[..., 2] > 60).mean()
    assert orange > 0.005, "heatmaps and strips are visible"


def test_integrated_gradients_run_plain_by_default(tmp_path, capsys):
    needs_demo("llama")
    command = ["text", "Ben has a red kite.", "--method", "ig", "-o", str(tmp_path / "out.html")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "(IG, plain; logit" in printed and "completeness error" in printed
