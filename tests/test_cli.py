"""The command line, run as a user runs it: what it writes, what it says, and its exit status."""

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from torchvision import transforms

import libragrad_minimal.cli as cli
import libragrad_minimal.commands as commands
from libragrad_minimal import LIBRA, PLAIN, attribute, audits, pages, progress
from libragrad_minimal.demo_vits import VITS
from libragrad_minimal.explanations import crop_box
from libragrad_minimal.models import DATA, DEMOS, LoadedModel, Unreachable, load_demo
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
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]  # what takes long
    assert len(lines) == 1, lines
    assert lines[0].startswith("libragrad: error: ") and message in lines[0]


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


DEMO = ("--model", "demo")


def test_image_writes_a_panel_a_class_and_the_scores(scene, tmp_path, capsys):
    needs_demo("vit")
    picture, scores = tmp_path / "out.png", tmp_path / "out.npz"
    arguments = ["image", scene, *DEMO, "--class", "cat", "--class", "7", "-o", picture, "--save-scores", scores]
    assert run(*arguments) == 0
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
    if family == "mixer":
        fails_with(capsys, [*arguments, "--overwrite", "--method", "genatt"], "attention")


def test_image_without_a_class_explains_the_prediction_with_options(scene, tmp_path):
    needs_demo("vit")
    scores = tmp_path / "out.npz"
    rollout = ["--method", "attention-rollout", "--head-fusion", "max", "--discard-ratio", "0.9", "--rules", "plain"]
    arguments = ["image", scene, *DEMO, *rollout, "-o", tmp_path / "out.pdf", "--save-scores", scores]
    assert run(*arguments) == 0
    loaded = load_demo("vit")
    pixels = loaded.transform(Image.open(scene))[None]
    predicted = loaded.model(pixels).argmax(1)
    options = {"head_fusion": "max", "discard_ratio": 0.9}
    assert {name: np.load(scores)[name].item() for name in options} == options
    expected = attribute(loaded.model, pixels, predicted, "Attention Rollout", PLAIN, **options)
    np.testing.assert_allclose(np.load(scores)["scores"], expected.scores, rtol=1e-4, atol=1e-6)


def test_image_with_a_real_model(shared, tmp_path):
    from libragrad_minimal.photographs import draw_collage

    draw_collage(1, ["cat", "coffee"]).image.save(tmp_path / "photo.png")
    model = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    arguments = ["--model", model, "--class", "tabby", "--class", "espresso", "--save-scores", tmp_path / "out.npz"]
    command = ["image", tmp_path / "photo.png", *arguments, "-o", tmp_path / "out.png"]
    assert run(*command) == 0
    tabby, espresso = np.load(tmp_path / "out.npz")["scores"].reshape(2, 14, 14)
    assert tabby[:, :7].sum() > tabby[:, 7:].sum(), "the cat is on the left"
    assert espresso[:, 7:].sum() > espresso[:, :7].sum()


def test_clip_writes_a_panel_a_prompt(scene, tmp_path):
    needs_demo("clip")
    prompts, scores = ["a red cat", "a blue star"], tmp_path / "out.npz"
    asked = ["--prompt", prompts[0], "-p", prompts[1]]
    arguments = ["clip", scene, *DEMO, *asked, "-o", tmp_path / "out.png", "--save-scores", scores]
    assert run(*arguments) == 0
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


def test_a_very_long_prompt_does_not_fill_the_picture(scene, tmp_path, capsys):
    needs_demo("clip")
    prompt, out = "cat " * 5000, tmp_path / "out.npz"
    assert run("clip", scene, *DEMO, "-p", prompt, "-o", tmp_path / "out.png", "--save-scores", out) == 0
    printed = capsys.readouterr()
    assert "is longer than" in printed.err and max(map(len, printed.out.splitlines())) < 300
    assert Image.open(tmp_path / "out.png").height < 1000 and np.load(out)["target"].tolist() == [prompt]


def test_what_is_printed_is_a_line_a_prompt(scene, tmp_path, capsys):
    needs_demo("clip")
    assert run("clip", scene, *DEMO, "-p", "two\nlines", "-p", "a\u202eb", "-o", tmp_path / "out.png") == 0
    two, turned, _ = capsys.readouterr().out.splitlines()
    assert two.startswith("two[U+000A]lines: ") and turned.startswith("a[U+202E]b: ")


def test_text_as_html_escapes_the_prompt(tmp_path):
    needs_demo("llama")
    out = tmp_path / "out.html"
    arguments = [
        "text",
        *DEMO,
        "Ben has <script>alert(1)</script> a red kite.",
        "--target",
        "Ben",
        "--against",
        "Anna",
        "-o",
        out,
    ]
    assert run(*arguments) == 0
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<script" not in page
    assert "Ben" in page and "and not" in page


def test_text_as_a_figure(tmp_path):
    needs_demo("llama")
    assert run("text", "Ben has a red kite.", *DEMO, "-o", tmp_path / "out.png") == 0
    assert Image.open(tmp_path / "out.png").width > 100


def test_a_target_that_begins_with_half_a_character_is_named_by_its_word(tmp_path, capsys):
    """The demo Llama's tokens are bytes where it doesn't know the letters."""
    needs_demo("llama")
    arguments = ("--target", "\u7ea2", "--against", "red", "-o", tmp_path / "out.html")
    assert run("text", "Ben has a kite.", *DEMO, *arguments) == 0
    assert "why the first bytes of '\u7ea2' and not ' red' (" in capsys.readouterr().out


def test_characters_that_are_cut_over_tokens_stay_readable(tmp_path):
    needs_demo("llama")
    text = "Ben has a \u7ea2\u8272 kite \U0001f642"
    arguments = ["text", text, *DEMO, "--save-scores", tmp_path / "out.npz", "-o", tmp_path / "out.html"]
    assert run(*arguments) == 0
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert all(f">{character}</span>" in page for character in "\u7ea2\u8272\U0001f642") and "\ufffd" not in page
    saved = np.load(tmp_path / "out.npz")
    assert "".join(saved["tokens"]).endswith(text) and saved["scores"].shape == (1, len(saved["tokens"]))


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
    monkeypatch.setattr(audits, "load_demo", lambda kind: loaded)
    assert cli.main(["audit", "vit"]) == 1
    assert "unsupported" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_an_example_that_can_be_typed(name, capsys):
    assert run(name, "--help") == 0
    out = capsys.readouterr().out
    examples = [line.strip() for line in out.splitlines() if line.strip().startswith("libragrad ")]
    assert examples and len(out) > 300
    for example in examples:
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("libragrad", name)
        commands.commands[command].make_context(command, arguments)  # which raises if it can't be understood


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name):
    assert commands.commands[name].help.startswith(cli.COMMANDS[name])


def test_every_command_is_listed_without_torch():
    assert list(cli.COMMANDS) == list(commands.commands)
    asked = "import sys; from libragrad_minimal.cli import main; main(['--help'])"
    ask = f"{asked}; print(*{{'torch', 'numpy'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", ask], cwd=DATA.parent, capture_output=True, text=True, check=True)
    *told, imported = done.stdout.splitlines()
    assert imported == "" and all(any(line.split()[:1] == [name] for line in told) for name in cli.COMMANDS)


def test_what_takes_long_before_a_command_begins_is_said_too():
    quick = "from libragrad_minimal import cli, progress; progress.PATIENCE = 0.01; cli.main(['audit', '--help'])"
    done = subprocess.run([sys.executable, "-c", quick], cwd=DATA.parent, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["loading PyTorch ..."] and "libragrad audit" in done.stdout


def test_without_a_command_there_is_help(capsys):
    assert run() == 0
    assert "libragrad demo" in capsys.readouterr().out


def test_help_names_the_default_model_and_what_the_demo_knows(capsys):
    assert run("image", "-h") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert commands.REAL["vit"] in words and "which knows twelve drawn glyphs and no photograph" in words


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["image", "nowhere.png"], "no file nowhere.png"),
        (["image", "{scene}", "--method", "magic"], "SmoothGrad, Random; or IG or SmoothGrad and the name of one"),
        (["image", "{scene}", "--method", "fulgrad+"], "there are FullGrad+"),
        (["image", "{scene}", "--rules", "magic"], "unknown rules 'magic'; there are libra, plain"),
        (["image", "{scene}", "--rules", "atnlrp"], "unknown rules 'atnlrp'; there are attn-lrp"),
        (["image", "{scene}", "-o", "out.txt"], "choose a name that ends in .png"),
        (["image", "{scene}", "-o", "/proc/at/all/out.png"], "can't write /proc/at/all/out.png: No such"),
        (["image", "{scene}", "-o", "{scene}/out.png"], "out.png: Not a directory"),
        (["image", "{scene}", "-o", f"{'a' * 300}/out.png"], "name too long"),
        (["image", "{scene}", "-o", f"{'a' * 240}.png"], "name too long"),
        (["image", "{scene}", "-o", ""], "'' is no name to write to"),
        (["image", "{scene}", "-o", "-"], "'-' is no name to write to"),
        (["image", "{scene}", "-o", ".PNG"], "'.PNG' is no name to write to"),
        (["image", "{scene}", "{scene}", *DEMO, "--save-scores", "all.npz"], "name a folder, all"),
        (["image", "{scene}", "--save-scores", "out.npy"], "ends in .npz"),
        (["image", "{scene}", "--alpha", "1.5"], "at most 1, not 1.5"),
        (["image", "{scene}", "--colormap", "RdBu_rr"], "'RdBu_rr'; it has RdBu_r"),
        (["image", "{scene}", *DEMO, "--class", "tabby"], "knows no class 'tabby': it knows "),
        (["image", "{scene}", *DEMO, "--class", "99"], "0..11"),
        (["image", "{scene}", "--head-fusion", "max"], "--head-fusion is for Attention Rollout, not for FullGrad+"),
        (
            ["image", "{scene}", "--discard-ratio", ".5"],
            "Rollout and Gradient Attention Rollout, not for FullGrad+: name",
        ),
        (["image", "{scene}", "--discard-ratio", "1"], "0<=x<1"),
        (["image", "{scene}", "{scene}", *DEMO, "-o", "out.png"], "name a folder"),
        (["image", "empty"], "holds no picture"),
        (["image", "{scene}", "--model", "no_such_vit"], "timm has no model 'no_such_vit'"),
        (["image", "{scene}", "--model", "resnt18"], "similar ones are resnet18"),
        (["image", ""], "the name of a picture is empty"),
        (["clip", "{scene}", "-p", "a cat", "--model", "ViT-B-16"], "it needs weights, too; write ViT-B-16/FILE"),
        (["clip", "{scene}", "-p", "a cat", "--model", "ViT-B-16/no"], "'no' is neither a file nor weights"),
        (["audit", "resnt18"], "similar ones are resnet18"),
        (["sweep", "timm", "--processes", "0"], "x>=1"),
        (["sweep", "timm", "-o", "{scene}"], "ends in .csv"),
        (["sweep", "timm", "--seconds", "-1"], "x>0"),
        (["text", " ", *DEMO], "empty"),
        (["text", "Ben \udcff", *DEMO], "isn't UTF-8"),
        (["text", "Ben", "--target", "\udcff", *DEMO], "isn't UTF-8"),
        (["clip", "{scene}", "--prompt", " "], "prompt 1 is empty"),
        (["clip", "{scene}"], "Missing option '-p' / '--prompt'"),
        (["clip", "http://example.org/a.png", "-p", "a cat"], "not an https address"),
        (["text", "Ben has a red kite.", *DEMO, "--target", ""], "no token"),
        (["text", "Ben", *DEMO, "--target", "kite", "--against", " kite"], "begin with the same token"),
        (["audit", "/nowhere"], "/nowhere"),
        (["imge", "{scene}"], "Did you mean 'image'?"),
    ],
)
def test_bad_input_is_one_line(arguments, message, scene, tmp_path, capsys, monkeypatch):
    needs_demo("vit"), needs_demo("llama"), needs_demo("clip")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
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
        *DEMO,
        "-o",
        str(tmp_path / "out.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DATA.parent, check=True)
    assert all(line.endswith(" ...") for line in done.stderr.splitlines()), "what takes more than two seconds"
    assert done.stdout.startswith("why ")


def test_letters_that_a_pipe_cannot_write_end_nothing(scene, tmp_path):
    """Windows' pipes are of cp1252 or another of few letters."""
    needs_demo("clip")
    command = [sys.executable, "-m", "libragrad_minimal", "clip", str(scene), *DEMO, "-p", "\u732b"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    place = ["-o", str(tmp_path / "out.png")]
    done = subprocess.run([*command, *place], capture_output=True, text=True, cwd=DATA.parent, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("\\u732b: output "), done.stderr


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


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_names_of_files_do_not_rule_the_terminal(scene, tmp_path, capsys):
    """A folder that a stranger packed: one name clears the screen, one turns what follows it around."""
    folder = tmp_path / "strange"
    folder.mkdir()
    shutil.copy(scene, folder / "cat\x1b[2J.png")
    (folder / "cat\u202egnp.png").write_bytes(b"no picture")
    assert run("image", folder, *DEMO, "-o", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert (tmp_path / "out" / "cat\x1b[2J.png").exists()
    assert "cat[U+001B][2J.png" in said.out and "cat[U+202E]gnp.png is not a picture" in said.err
    assert all(line.isprintable() for line in (said.out + said.err).splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("scheme, sign", [("light", 1), ("dark", -1)])
def test_our_pages_are_light_and_dark_and_never_scroll_sideways(scheme, sign, browser, tmp_path):
    told = f'<pre tabindex="0">{"wide " * 40}</pre><p>{"words " * 40}</p>'
    (tmp_path / "page.html").write_text(pages.page("A page", told), encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 600}, color_scheme=scheme)
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shades = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).astype(float)
    serious = [v["id"] for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
    page.close()
    background, text = np.median(shades), shades.min() if scheme == "light" else shades.max()
    assert sign * (background - text) > 150 and serious == []


def test_integrated_gradients_run_plain_by_default(tmp_path, capsys):
    needs_demo("llama")
    command = ["text", "Ben has a red kite.", *DEMO, "--method", "ig", "-o", str(tmp_path / "out.html")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "(IG, plain; logit" in printed and "completeness error" in printed


# ---- the default model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("vit", ["image", "{scene}"]),
        ("clip", ["clip", "{scene}", "-p", "a cat"]),
        ("llama", ["text", "Ben has"]),
    ],
)
def test_the_default_is_a_real_model_and_never_the_demo(kind, arguments, scene, tmp_path, capsys, monkeypatch):
    def nothing_there(asked_kind, name):
        assert (asked_kind, name) == (kind, commands.REAL[kind])
        raise Unreachable("no hub")

    monkeypatch.setattr(commands, "load_pretrained", nothing_there)
    arguments = [argument.format(scene=scene) for argument in arguments]
    fails_with(capsys, [*arguments, "-o", tmp_path / "out.png"], f"{commands.REAL[kind]} is not on this machine")
    monkeypatch.setattr(commands, "load_pretrained", None)
    assert run(*arguments, *DEMO, "-o", tmp_path / "out.png") == 0, "the cure that is named"


@pytest.mark.parametrize("kind", commands.REAL)
def test_a_default_that_cannot_be_loaded_is_known_as_such(kind, tmp_path, monkeypatch):
    """The libraries say it in three ways."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unreachable, match="the hub can't be reached"):
        commands.load_pretrained(kind, commands.REAL[kind])


# ---- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.PNG", "b.Jpeg", "c.JPG", "d.Pdf", "e.SVG", "new/folder/f.png", "g.tiff", "h.webp"])
def test_any_spelling_of_an_extension_and_a_missing_folder(name, scene, tmp_path):
    assert run("image", scene, *DEMO, "-o", tmp_path / name) == 0
    content = (tmp_path / name).read_bytes()
    if name.endswith(("Pdf", "SVG")):
        assert content.startswith(b"%PDF") or b"<svg" in content[:600]
    else:
        assert Image.open(tmp_path / name).width > 600
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize("name", ["maps", "holiday.2026/", "a/b.c/", ".", "~/maps", "~/holiday.2026/"])
def test_one_picture_into_a_folder(name, scene, tmp_path, monkeypatch):
    """That is there, ends in a slash, or has no extension; ~ is the home."""
    monkeypatch.chdir(tmp_path / ".." / tmp_path.name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert run("image", scene, *DEMO, "-o", name, "--format", "pdf", "--save-scores", name) == 0
    folder = (tmp_path / name.replace("~", "home")).resolve()
    assert (folder / "scene.pdf").is_file() and (folder / "scene.npz").is_file()


def test_html_may_be_htm(tmp_path):
    needs_demo("llama")
    assert run("text", "Ben has", *DEMO, "-o", tmp_path / "a.HTM") == 0
    assert (tmp_path / "a.HTM").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("typed", ["AttnLRP", "ATTN_LRP", "attn-lrp"])
def test_rules_are_known_however_they_are_written(typed, scene, tmp_path):
    out = tmp_path / "out.npz"
    assert run("image", scene, *DEMO, "--rules", typed, "-o", tmp_path / "out.png", "--save-scores", out) == 0
    assert np.load(out)["rules"] == "attn-lrp"


def test_checking_where_to_write_leaves_nothing_behind(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails_with(capsys, ["image", scene, "-o", "a/b/c.png", "--model", "no_such_vit"], "no_such_vit")
    assert [path.name for path in tmp_path.iterdir()] == [scene.name]


def test_nothing_is_overwritten_unasked_and_nothing_loaded_before_that_is_known(scene, tmp_path, capsys, monkeypatch):
    before = scene.read_bytes()
    kept = tmp_path / "kept.png"
    kept.write_text("mine")
    (tmp_path / "scores.npz").write_text("mine")
    monkeypatch.setattr(commands, "load", lambda *_: pytest.fail("work has begun"))
    fails_with(capsys, ["image", scene, "-o", scene], "is the input itself")
    fails_with(capsys, ["image", scene, "-o", tmp_path / "x" / ".." / scene.name], "is the input itself")
    fails_with(capsys, ["image", scene, "-o", kept], "kept.png is there already")
    asked = ["image", scene, "-o", tmp_path / "a.png", "--save-scores", tmp_path / "scores.npz"]
    fails_with(capsys, asked, "scores.npz is there already")
    fails_with(capsys, ["demo", "-o", scene.with_suffix(".txt")], "ends in .html")
    monkeypatch.undo()
    assert scene.read_bytes() == before and kept.read_text() == "mine"
    assert run("image", scene, *DEMO, "-o", kept, "--overwrite") == 0
    assert Image.open(kept).width > 600


def test_scores_say_what_they_are(tmp_path):
    picture = Image.fromarray(draw_scene(1, classes=["cat", "star"]).image).resize((90, 60))
    picture.save(tmp_path / "wide.png")
    asked = ["--method", "attcat", "--rules", "plain", "--class", "star", "--save-scores", tmp_path / "out.npz"]
    assert run("image", tmp_path / "wide.png", *DEMO, *asked, "-o", tmp_path / "out.png") == 0
    saved = {name: value.tolist() for name, value in np.load(tmp_path / "out.npz").items() if value.size < 9}
    assert saved["model"] == "demo vit" and saved["method"] == "AttCAT" and saved["rules"] == "plain"
    assert saved["target"] == [7] and saved["targets"] == ["star"] and saved["size"] == [90, 60]
    assert saved["crop_box"] == [15, 0, 75, 60] and saved["photograph"].endswith("wide.png")
    arguments = ["text", "Ben has a red kite.", *DEMO, "--target", "Ben", "--save-scores", tmp_path / "text.npz"]
    assert run(*arguments, "-o", tmp_path / "text.html") == 0
    saved = np.load(tmp_path / "text.npz")
    assert "".join(saved["tokens"]).endswith("Ben has a red kite.")
    assert saved["scores"].shape == (1, len(saved["tokens"]))
    tokenizer = load_demo("llama").tokenizer
    assert tokenizer.decode(saved["target"]).strip() == "Ben" and saved["rules"] == "libra"


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (224, 224), (1000, 90)])
def test_the_crop_box_holds_just_what_the_model_sees(size):
    """Paint all outside of it white: the model sees none of that, but for what the resizing blends at its edge."""
    for transform in (
        transforms.Compose([transforms.Resize(224), transforms.CenterCrop(224), transforms.ToTensor()]),
        transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()]),
        load_demo("vit").transform,
    ):
        left, top, right, bottom = crop_box(transform, size)
        inside = np.full((size[1], size[0], 3), 255, np.uint8)
        inside[max(round(top), 0) : round(bottom), max(round(left), 0) : round(right)] = 0
        seen = transform(Image.fromarray(inside))[0].numpy()
        assert (seen[3:-3, 3:-3] <= 0.02).all()
        larger = transform(Image.fromarray(255 - inside))[0].numpy()
        assert larger[3:-3, 3:-3].min() > 0.98
        squashed = (right - left) * (bottom - top) / (size[0] * size[1])
        assert 0 < squashed <= 1


def test_steps_that_are_not_known_have_no_crop_box():
    steps = transforms.Compose([transforms.RandomCrop(8), transforms.ToTensor()])
    assert np.isnan(crop_box(steps, (10, 10))).all()


# ---- several photographs ---------------------------------------------------------------------------------------------


def test_a_folder_and_a_file_in_one_call_and_a_damaged_one_stops_no_other(scene, tmp_path, capsys):
    folder = tmp_path / "holiday"
    folder.mkdir()
    for name in ("b.PNG", "scene.png"):
        (folder / name).write_bytes(scene.read_bytes())
    (folder / "a.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    (folder / "._b.png").write_bytes(b"what macOS keeps beside a picture")
    (folder / "a folder.png").mkdir()
    out = tmp_path / "maps"
    asked = ["image", folder, scene, *DEMO, "-o", out, "--format", "svg", "--save-scores", tmp_path / "numbers"]
    assert run(*asked) == 2, "not all went well"
    printed = capsys.readouterr()
    assert "a.jpg is not a picture" in printed.err
    assert {file.name for file in out.iterdir()} == {"b.svg", "scene.svg", "scene-2.svg"}
    assert {file.name for file in (tmp_path / "numbers").iterdir()} == {"b.npz", "scene.npz", "scene-2.npz"}
    assert printed.out.count("wrote ") == 3 and printed.out.count(".npz") == 3
    (folder / "a.jpg").unlink()
    assert run(*asked) == 2 and "is there already" in capsys.readouterr().err
    assert run(*asked, "--overwrite") == 0


# ---- looks -----------------------------------------------------------------------------------------------------------


def test_looks_change_the_picture(scene, tmp_path):
    pictures = {}
    for name, look in {
        "default": [],
        "apart": ["--signs", "apart"],
        "pale": ["--alpha", "0.2"],
        "green": ["--colormap", "PiYG"],
    }.items():
        assert run("image", scene, *DEMO, "--class", "star", *look, "-o", tmp_path / f"{name}.png") == 0
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
    width = pictures["default"].shape[1] // 2
    colourful = {name: np.ptp(p[40:-20, width + 10 : -20], axis=2).mean() for name, p in pictures.items()}
    assert colourful["pale"] < 0.5 * colourful["default"] < colourful["apart"]
    assert np.abs(pictures["green"] - pictures["default"]).max() > 100
    asked = ["text", "Ben has a red kite.", *DEMO, "--colormap", "PiYG", "--alpha", "0.4", "-o", tmp_path / "t.html"]
    assert run(*asked) == 0
    green = "rgba({},{},{},0.40)".format(*(round(255 * c) for c in matplotlib.colormaps["PiYG"](1.0)[:3]))
    pink = "rgba({},{},{},0.40)".format(*(round(255 * c) for c in matplotlib.colormaps["PiYG"](0.0)[:3]))
    assert (green in (tmp_path / "t.html").read_text()) or (pink in (tmp_path / "t.html").read_text())


# ---- long work -------------------------------------------------------------------------------------------------------


def test_a_long_text_is_refused_before_the_model_runs(capsys, monkeypatch, tmp_path):
    loaded = load_demo("llama")
    monkeypatch.setattr(loaded.model, "forward", lambda *_, **__: pytest.fail("the model runs"))
    monkeypatch.setattr(commands, "load_demo", lambda kind: loaded)
    positions = loaded.model.config.max_position_embeddings
    long = "Ben has a red kite. " * positions
    fails_with(capsys, ["text", long, *DEMO, "-o", tmp_path / "a.html"], f"knows {positions} positions: shorten it")


def test_what_takes_longer_than_two_seconds_is_told_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with progress.telling("counting sheep"):
        time.sleep(0.3)
    with progress.telling("blinking"):
        pass
    printed = capsys.readouterr()
    assert printed.err == "counting sheep ...\n" and printed.out == ""


def test_a_terminal_shows_how_long_it_has_taken(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.telling("counting sheep"):
        time.sleep(1.3)
    assert capsys.readouterr().err == "\rcounting sheep ... 1 s\r\033[K"


def test_control_c_ends_in_one_line(scene, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "load_demo", interrupted)
    assert run("image", scene, *DEMO, "-o", tmp_path / "out.png") == 130
    assert capsys.readouterr().err.strip() == "libragrad: stopped"
    assert not (tmp_path / "out.png").exists()


BEGUN = "import sys; print('begun', flush=True); from libragrad_minimal.__main__ import main; sys.exit(main())"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 0.4, 0.7, 1, 1.4, 2])
def test_control_c_ends_in_one_line_from_the_beginning(seconds, tmp_path):
    """Counted from where Python itself has started, which prints a traceback of its own before that."""
    command = [sys.executable, "-c", BEGUN, "demo", "-o", str(tmp_path / "demo.html")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=DATA.parent, **pipes)
    assert process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    told = [line for line in error.splitlines() if not line.endswith(" ...")]
    assert (process.returncode, out, told) == (130, "", ["libragrad: stopped"])
    assert not list(tmp_path.iterdir())


def test_control_c_stays_ignored_where_it_was():
    command = f"trap '' INT; {shlex.join([sys.executable, '-c', BEGUN, '--help'])}"
    process = subprocess.Popen(["sh", "-c", command], cwd=DATA.parent, stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert b"Usage" in process.communicate(timeout=60)[0] and process.returncode == 0


@pytest.mark.slow
def test_control_c_in_a_terminal_ends_a_sweep_and_its_processes_in_one_line(tmp_path):
    """All processes of a terminal's job get the signal at once."""
    command = [
        sys.executable,
        "-m",
        "libragrad_minimal",
        "sweep",
        "timm",
        "--pattern",
        "vit_*",
        "-o",
        tmp_path / "t.csv",
    ]
    process = subprocess.Popen(
        [*command, "--processes", "2"], cwd=DATA.parent, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "t.csv").exists() or (tmp_path / "t.csv").read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in error.splitlines() if line and not line.endswith(" ...")] == ["libragrad: stopped"]
