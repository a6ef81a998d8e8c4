"""CLIP: completeness of real architectures, loading, prompts, the demo model, and the functions of notebook 02."""

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from completeness import relative_error
from models import CLIP, CLIP_TEXT, perturbed, tiny_clip
from notebook_functions import NOTEBOOKS, functions_of
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from libragrad_minimal import PLAIN, audit, libra_grad
from libragrad_minimal.attribution import attribute
from libragrad_minimal.checkpoints import read_checkpoint
from libragrad_minimal.models import DATA, LoadedModel, _describe_clip, load_demo, load_pretrained
from libragrad_minimal.prompts import attribute_prompts, encode_prompts, tokenize_prompts, words_kept
from libragrad_minimal.scenes import CLASSES, COLOURS, Scene, caption, draw_scene

NOTEBOOK = NOTEBOOKS / "02_clip_text_prompted_regions.ipynb"


def cosine_with_a_prompt(features: Tensor) -> Tensor:
    """With a vector at about 45 degrees: a cosine near 0 would make any relative error large."""
    other = F.normalize(features.detach(), dim=-1) + F.normalize(torch.randn_like(features), dim=-1)
    return (F.normalize(features, dim=-1) * F.normalize(other, dim=-1)).sum()


# --- completeness of real architectures, random weights ---


def image_tower(name: str) -> open_clip.CustomTextCLIP:
    """open_clip's model of this name with its first two blocks and a text tower that hardly exists."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    vision |= {"layers": 2} if "layers" in vision else {}
    quick = config.get("quick_gelu", False)
    model = open_clip.CustomTextCLIP(config["embed_dim"], vision, CLIP_TEXT, quick_gelu=quick)
    if "timm_model_name" in vision:
        model.visual.trunk.blocks = model.visual.trunk.blocks[:2]
    return perturbed(model)


@pytest.mark.parametrize(
    "name",
    ["ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32"],
)
def test_image_towers_are_complete(name):
    model = image_tower(name)
    size = model.visual.image_size
    image = torch.randn(1, 3, *(size if isinstance(size, tuple) else (size, size)), requires_grad=True)
    features = model.encode_image(image)
    f = cosine_with_a_prompt(features[0] if isinstance(features, tuple) else features)
    assert audit(f, image).complete
    assert relative_error(f, image) <= 1e-4
    assert relative_error(f, image, PLAIN) > 1e-2  # so the test can fail


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16"])
def test_prompts_on_towers_of_timm(name):
    model = image_tower(name)
    loaded = _describe_clip(name, model, None, open_clip.SimpleTokenizer(context_length=8))
    result = attribute_prompts(loaded, torch.randn(1, 3, 224, 224), ["a cat", "two dogs"], progress=False)
    assert result.maps.shape == (1, 2, *loaded.grid) and loaded.grid == (14, 14)
    assert loaded.prefix_tokens == (1 if name == "EVA02-B-16" else 0)
    assert result.completeness_error.max() <= 1e-4 * result.output.abs().max()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_text_towers_are_complete(quick_gelu):
    model = tiny_clip(quick_gelu=quick_gelu)
    words = []
    model.token_embedding.register_forward_hook(lambda layer, ids, vectors: words.append(vectors))
    f = cosine_with_a_prompt(model.encode_text(open_clip.tokenize(["a red heart"], 8)))
    assert relative_error(f, words[0]) <= 1e-4


def transformers_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=small, vision_config=vision, projection_dim=24))


def transformers_siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    text = {**small, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("build", [transformers_clip, transformers_siglip])
def test_transformers_models_are_complete(build):
    model = perturbed(build())
    image = torch.randn(1, 3, 32, 32, requires_grad=True)
    ids = torch.tensor([[5, 6, 7, model.config.text_config.eos_token_id]])
    f = model(input_ids=ids, pixel_values=image).logits_per_image[0, 0]
    assert relative_error(f, image) <= 1e-4


# --- many prompts on many pictures ---


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    torch.manual_seed(1)
    model = tiny_clip()
    blocks = list(model.visual.transformer.resblocks)
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    return LoadedModel("clip", "tiny", model, blocks, tokenizer=tokenizer, prefix_tokens=1, grid=(4, 4))


@pytest.mark.parametrize("method", ["FullGrad+", "GradCAM+", "LeGrad", "Attention Rollout", "IG"])
def test_pictures_and_prompts_at_once_equal_one_by_one(tiny, method):
    images, prompts = torch.randn(3, 3, 32, 32), ["a cat", "two dogs"]
    together = attribute_prompts(tiny, images, prompts, method, batch_size=2, progress=False)
    assert together.maps.shape == (3, 2, 4, 4) and together.output.shape == (3, 2)
    for i, image in enumerate(images):
        for p, text in enumerate(encode_prompts(tiny, prompts)):
            alone = attribute(tiny.model, image[None], text[None], method)
            torch.testing.assert_close(together.maps[i, p], alone.maps[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(together.output[i, p], alone.output[0], rtol=1e-5, atol=1e-5)
    if method == "FullGrad+":
        assert together.completeness_error.max() <= 1e-4


def test_prompts_share_one_forward_pass_and_cost_one_backward_pass_each(tiny):
    forward, backward = [], []

    def passed(layer, inputs, output):
        forward.append(1)
        output.register_hook(lambda gradient: backward.append(1))

    handle = tiny.model.visual.ln_post.register_forward_hook(passed)
    attribute_prompts(tiny, torch.randn(2, 3, 32, 32), ["a", "b", "c", "d"], progress=False)
    handle.remove()
    assert len(forward) == 1 and len(backward) == 4


def test_similarity_is_the_models_own(tiny):
    images, prompts = torch.randn(2, 3, 32, 32), ["a cat", "two dogs"]
    result = attribute_prompts(tiny, images, prompts, progress=False)
    logits, _ = tiny.model.get_logits(images, tiny.tokenizer(prompts))
    torch.testing.assert_close(result.output, logits.detach(), rtol=1e-5, atol=1e-5)


def test_progress_goes_to_stderr(tiny, capsys):
    attribute_prompts(tiny, torch.randn(2, 3, 32, 32), ["a", "b"])
    printed = capsys.readouterr()
    assert "4/4" in printed.err and printed.out == ""


# --- prompts ---


@pytest.mark.parametrize(
    ("prompts", "message"),
    [("", "prompt 1 is empty"), (["a cat", " \n"], "prompt 2 is empty"), ([], "no prompts"), ([7], "is a int")],
)
def test_bad_prompts_get_one_clear_error(tiny, prompts, message):
    with pytest.raises(ValueError, match=message):
        tokenize_prompts(tiny.tokenizer, prompts)


def test_a_long_prompt_is_cut_and_the_warning_says_where(tiny):
    with pytest.warns(UserWarning, match="8 tokens this model reads: it is cut after 'one two three four five six'"):
        ids = tokenize_prompts(tiny.tokenizer, "one two three four five six seven eight")
    assert torch.equal(ids, tiny.tokenizer(["one two three four five six"]))


@pytest.mark.parametrize("prompt", ["one two three four five six", "a", "¡olé! 🙂", "Ünïcode", "!!!", "a  b"])
def test_a_prompt_that_fits_is_left_alone(tiny, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_prompts(tiny.tokenizer, prompt)
    assert words_kept(tiny.tokenizer, prompt) == prompt


def test_one_word_too_long_for_the_model(tiny):
    with pytest.warns(UserWarning, match="cut after ''"):
        tokenize_prompts(tiny.tokenizer, "Donaudampfschifffahrtsgesellschaftskapitänsmütze" * 2)


# --- loading ---


def saved_model(folder: Path) -> tuple[nn.Module, dict]:
    torch.manual_seed(3)
    model = tiny_clip()
    return model, {name: weight.contiguous() for name, weight in model.state_dict().items()}


@pytest.fixture
def known(tmp_path, monkeypatch) -> str:
    """A small architecture that open_clip knows by name, as it knows ViT-B-16."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-8", CLIP)
    return "Tiny-8"


def assert_same_model(loaded: LoadedModel, model: nn.Module) -> None:
    image = loaded.transform(Image.new("RGB", (50, 40), "red"))[None]
    assert image.shape == (1, 3, 32, 32)
    assert torch.equal(loaded.model.encode_image(image), model.encode_image(image))
    ids = loaded.tokenizer(["a cat"])
    assert ids.shape == (1, 8) and torch.equal(loaded.model.encode_text(ids), model.encode_text(ids))
    assert loaded.kind == "clip" and loaded.grid == (4, 4) and loaded.prefix_tokens == 1 and len(loaded.blocks) == 2
    assert not loaded.model.training


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_in_open_clips_own_format(known, tmp_path, suffix):
    model, weights = saved_model(tmp_path)
    path = tmp_path / f"epoch_1.{suffix}"
    if suffix == "pt":  # as open_clip's training script writes it
        state = {f"module.{name}": weight for name, weight in weights.items()}
        torch.save({"epoch": 1, "name": "run", "state_dict": state}, path)
    else:
        save_file(weights, path)
    assert_same_model(load_pretrained("clip", f"{known}/{path}"), model)


def write_repository(folder: Path, weights: dict) -> None:
    folder.mkdir(parents=True)
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": preprocessing}))
    save_file(weights, folder / "open_clip_model.safetensors")


def test_a_folder(tmp_path):
    model, weights = saved_model(tmp_path)
    write_repository(tmp_path / "mine", weights)
    assert_same_model(load_pretrained("clip", f"local-dir:{tmp_path / 'mine'}"), model)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> nn.Module:
    """A model "someone/tiny" in the hub's cache, and no network."""
    model, weights = saved_model(tmp_path)
    repository = tmp_path / "hub" / "models--someone--tiny"
    write_repository(repository / "snapshots" / "0", weights)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return model


def test_a_name_on_the_hub(hub):
    assert_same_model(load_pretrained("clip", "hf-hub:someone/tiny"), hub)


def test_open_clips_own_name_and_tag(known, hub, monkeypatch):
    tag = {"hf_hub": "someone/tiny/", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, known, {"someones_data": tag})
    assert_same_model(load_pretrained("clip", f"{known}/someones_data"), hub)


def test_the_names_that_the_notebook_offers_exist():
    for name in ("ViT-B-16/laion2b_s34b_b88k", "ViT-L-14/laion2b_s32b_b82k", "ViT-B-16-SigLIP/webli"):
        assert tuple(name.split("/")) in open_clip.list_pretrained()
    for name in ("EVA02-B-16/merged2b_s8b_b131k", "EVA02-L-14-336/merged2b_s6b_b61k"):
        assert tuple(name.split("/")) in open_clip.list_pretrained()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B16/laion2b_s34b_b88k", "no model 'ViT-B16'; similar ones are ViT-B-16"),
        ("ViT-B-16/laion3b", "'laion3b' is neither a file nor weights.*laion2b_s34b_b88k"),
        ("ViT-B-16", "neither a file"),
    ],
)
def test_unknown_names_get_one_clear_error(name, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained("clip", name)


class Burglar:
    """A pickle that would write a file while it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_checkpoint_runs_no_code(known, tmp_path):
    torch.save({"state_dict": Burglar(tmp_path / "broken_in")}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_pretrained("clip", f"{known}/{tmp_path / 'evil.pt'}")
    assert not (tmp_path / "broken_in").exists()


# --- the demo model ---

needs_demo = pytest.mark.skipif(not (DATA / "demo_clip.safetensors").exists(), reason="demo_clip.safetensors is absent")


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_demo("clip")


@torch.no_grad()
def similarities(demo: LoadedModel, scenes: list[Scene], captions: list[str]) -> Tensor:
    images = torch.stack([demo.transform(Image.fromarray(scene.image)) for scene in scenes])
    logits, _ = demo.model.get_logits(images, demo.tokenizer(captions))
    return logits


@needs_demo
def test_demo_retrieves_captions(demo):
    right = []
    for draw in range(4):
        scenes = [draw_scene(700_000 + 64 * draw + i, 1 + i % 3) for i in range(64)]
        captions = [caption(scene) for scene in scenes]
        best = similarities(demo, scenes, captions).argmax(1)
        right += [captions[b] == own for b, own in zip(best, captions, strict=True)]
    assert np.mean(right) >= 0.9


@needs_demo
def test_demo_binds_colours_to_objects(demo):
    rng = np.random.default_rng(0)
    scenes, right, wrong = [], [], []
    for seed in range(200):
        (heart, star), (red, blue) = rng.permutation(CLASSES)[:2], rng.permutation(list(COLOURS))[:2]
        scenes.append(draw_scene(710_000 + seed, classes=[heart, heart, star], colours=[red, blue, red]))
        right.append(f"a {red} {heart}")
        wrong.append(f"a {blue} {star}")
    above = similarities(demo, scenes, right).diagonal() > similarities(demo, scenes, wrong).diagonal()
    assert above.float().mean() >= 0.85


@needs_demo
def test_demo_accepts_any_text(demo):
    features = demo.model.encode_text(tokenize_prompts(demo.tokenizer, ["quantum soup 🍜", "a red heart"]))
    assert features.isfinite().all()
    unknown = demo.model.token_embedding.weight[demo.tokenizer.encode("quantum soup")]
    assert torch.equal(unknown[0], unknown[1])  # words that training didn't know share one vector


@needs_demo
def test_demo_file_is_small_and_safe(demo, tmp_path):
    path = DATA / "demo_clip.safetensors"
    assert path.stat().st_size <= 12_000_000
    cut = tmp_path / "demo_clip.safetensors"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged.*train_clip.py"):
        read_checkpoint(cut)


@needs_demo
def test_demo_ignores_words_it_does_not_know(demo):
    scene = draw_scene(720_000, classes=["heart", "cat"], colours=["red", "blue"])
    (logits,) = similarities(demo, [scene], ["a photo of a red heart", "a photo of a green sun"])
    assert logits[0] > logits[1] + 3


# --- suggested prompts ---


def test_suggested_prompts_fit_and_belong_to_photographs(demo):
    from libragrad_minimal.photographs import PHOTOGRAPHS

    suggested = json.loads((DATA / "prompts.json").read_text())["clip"]
    assert suggested.keys() == {*PHOTOGRAPHS, "demo"}
    prompts = [prompt for group in suggested.values() for prompt in group]
    assert len(prompts) == len(set(prompts)) >= 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_prompts(demo.tokenizer, prompts)


# --- the notebook's own functions ---

needs_notebook = pytest.mark.skipif(not NOTEBOOK.exists(), reason="the notebook is absent")


@pytest.fixture(scope="module")
def notebook():
    module = functions_of(NOTEBOOK)
    module.REPAIRS = {
        nn.LayerNorm: ("norm", module.balanced_norm),
        nn.GELU: ("activation", module.balanced_gelu),
        QuickGELU: ("activation", module.balanced_quick_gelu),
        nn.MultiheadAttention: ("attention", module.balanced_attention),
    }
    return module


@needs_notebook
def test_unit_length_against_its_gradient_by_hand(notebook):
    e, t = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, dtype=torch.float64)
    f = notebook.balanced_unit(e) @ t
    assert torch.equal(f, F.normalize(e, dim=-1) @ t)
    (gradient,) = torch.autograd.grad(f.sum(), e)
    torch.testing.assert_close(gradient, t / e.detach().norm(dim=-1, keepdim=True))


@needs_notebook
@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.GELU(), QuickGELU()], ids=lambda layer: type(layer).__name__)
def test_repairs_of_layers_against_libra_grad(notebook, layer):
    _, hook = next(value for kind, value in notebook.REPAIRS.items() if isinstance(layer, kind))
    layer = perturbed(layer.double())
    x, weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    ours = hook(layer, (x,), layer(x))
    assert torch.equal(ours, layer(x))
    (expected,) = libra_grad((layer(x) * weight).sum(), x)
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), x)[0], expected)


@needs_notebook
@pytest.mark.parametrize("masked", [False, True])
def test_repair_of_attention_against_a_loop(notebook, masked):
    layer = perturbed(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1) if masked else None
    output = layer(x, x, x, need_weights=False, attn_mask=mask)
    ours, _ = notebook.balanced_attention(layer, (x, x, x), {"attn_mask": mask}, output)
    assert torch.equal(ours, output[0])

    maps = layer(x, x, x, attn_mask=mask, average_attn_weights=False)[1].detach()
    weight = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = torch.zeros_like(x)
    values, out = layer.in_proj_weight.chunk(3)[2].detach(), layer.out_proj.weight.detach()
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        through = out[:, rows] @ values[rows]  # (8, 8): from a token, through this head, to the output
        for b in range(2):
            for query in range(5):
                for key in range(5):
                    expected[b, key] += maps[b, head, query, key] * through.T @ weight[b, query]
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), x)[0], expected)


@needs_notebook
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_notebooks_bills_add_up_and_equal_libra_grad(notebook, quick_gelu):
    model = tiny_clip(quick_gelu=quick_gelu)
    vision, text = list(model.visual.modules()), [*model.transformer.modules(), model.ln_final]
    towers = {
        "picture": (
            notebook.Tower(model.encode_image, list(model.visual.transformer.resblocks), vision),
            torch.randn(2, 3, 32, 32),
        ),
        "words": (
            notebook.Tower(model.encode_text, list(model.transformer.resblocks), text),
            open_clip.tokenize(["a b", "c"], 8),
        ),
    }
    directions = 10 * F.normalize(torch.randn(3, 24), dim=-1)
    for tower, inputs in towers.values():
        with notebook.libra(notebook.repairs_of_tower(tower)):
            bill = notebook.explain_similarity(tower, inputs, directions, notebook.balanced_unit)
        for block in range(2):
            torch.testing.assert_close(notebook.total(bill, block), bill.output, rtol=1e-4, atol=1e-4)
        one_line = notebook.explain_similarity(tower, inputs, directions, gradient=libra_grad)
        for ours, theirs in zip(bill, one_line, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(notebook.word_scores(bill).sum(-1), bill.output, rtol=1e-4, atol=1e-4)
        plain = notebook.explain_similarity(tower, inputs, directions)
        assert (notebook.total(plain) - plain.output).abs().max() > 0.1  # the hooks are off again


@needs_notebook
def test_contrast_leaves_nothing_of_what_all_share(notebook):
    own = torch.randn(4, 3, 3)
    assert torch.allclose(notebook.contrast(own + 5), notebook.contrast(own), atol=1e-5)
    others = own[[1, 2, 3]].mean(0)
    torch.testing.assert_close(notebook.contrast(own)[0], own[0] - others)


@needs_notebook
def test_a_product_of_two_streams_gives_half_to_each(notebook):
    a, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    f = notebook.libra_product(a, b).sum()
    for ours, other in zip(torch.autograd.grad(f, (a, b)), (b, a), strict=True):
        torch.testing.assert_close(ours, other.detach() / 2)


# --- the training script ---


def test_what_training_calls_true():
    """Against a reading of the captions, word by word."""
    spec = importlib.util.spec_from_file_location("train_clip", DATA / "train_clip.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    scenes = [draw_scene(1, 1), draw_scene(2, 2), draw_scene(3, 3), script.draw_confusable(4)]
    shown = [{(list(COLOURS)[c], CLASSES[k]) for c, k in zip(s.colours, s.classes, strict=True)} for s in scenes]
    for group, (captions, true) in script.truths(scenes).items():
        for i, content in enumerate(shown):
            for j, text in enumerate(captions):
                words = text.replace(",", "").split()
                named = {(a, b) for a, b in zip(words, words[1:], strict=False) if a in COLOURS and b in CLASSES}
                fits = {
                    "phrases": named <= content,
                    "objects": any(words[-1] == kind for _, kind in content),
                    "colours": any(words[-1] == colour for colour, _ in content),
                    "complete": named == content and j < len(scenes),
                }[group]
                assert bool(true[i, j]) == fits, (group, text, content)
    unlike = [script.swapped(scene) != caption(scene) for scene in scenes]
    assert unlike[3] and not unlike[0]
