"""Loading CLIP models: files, folders and names, and what the demo model knows."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from models import CLIP, tiny_clip
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from libragrad_minimal.checkpoints import read_checkpoint
from libragrad_minimal.models import DATA, LoadedModel, load_demo, load_pretrained
from libragrad_minimal.prompts import tokenize_prompts
from libragrad_minimal.scenes import CLASSES, COLOURS, Scene, caption, draw_scene

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
        ("ViT-B-16", "needs weights, too; write ViT-B-16/FILE"),
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
    with pytest.raises(ValueError, match="more than tensors"):
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
