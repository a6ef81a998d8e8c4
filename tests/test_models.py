"""Loading models: what is said about them holds; their files are test_checkpoints.py's."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm import layers
from timm.models import beit, mlp_mixer, vision_transformer
from torch import nn

from libragrad_minimal.demo_vits import VITS
from libragrad_minimal.models import DATA, load_demo, load_pretrained
from libragrad_minimal.photographs import photograph
from libragrad_minimal.scenes import CLASSES, draw_scene

VIT_TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def tokens_entering_each_block(vit, images):
    shapes = []
    handles = [block.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape)) for block in vit.blocks]
    with torch.no_grad():
        vit.model(images)
    for handle in handles:
        handle.remove()
    return shapes


# the class in timm, prefix tokens, and a module that this family is known by
FAMILIES = {
    "vit": ("VisionTransformer", 1, nn.GELU),
    "eva02": ("Eva", 1, layers.SwiGLU),
    "beitv2": ("Beit", 1, beit.Attention),
    "flexivit": ("VisionTransformer", 1, nn.GELU),
    "siglip": ("VisionTransformer", 0, layers.AttentionPoolLatent),
    "clip_vit": ("VisionTransformer", 1, layers.QuickGELU),
    "deit3": ("VisionTransformer", 1, vision_transformer.LayerScale),
    "mixer": ("MlpMixer", 0, mlp_mixer.MixerBlock),
    "vit_tiny": ("VisionTransformer", 1, nn.GELU),
    "vit_small": ("VisionTransformer", 1, nn.GELU),
    "vit_base": ("VisionTransformer", 1, nn.GELU),
}


def test_every_family_is_tested():
    assert FAMILIES.keys() == VITS.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_demo_vits_are_as_described(family):
    vit = load_demo(family)
    of_class, prefix_tokens, part = FAMILIES[family]
    assert (type(vit.model).__name__, vit.prefix_tokens, vit.kind, vit.name) == (
        of_class, prefix_tokens, "vit", f"demo {family}"
    )  # fmt: skip
    assert any(isinstance(module, part) for module in vit.model.modules())
    assert (DATA / f"demo_{family}.safetensors").stat().st_size < 2.2e6
    assert not vit.model.training
    assert vit.class_names == list(CLASSES)
    expected = (2, vit.prefix_tokens + vit.grid[0] * vit.grid[1], vit.model.embed_dim)
    assert tokens_entering_each_block(vit, torch.zeros(2, 3, 64, 64)) == [expected] * len(vit.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_demo_vits_know_their_glyphs(family):
    """A floor well below the card's 2,000-scene numbers, on 200 scenes that training never saw."""
    vit = load_demo(family)
    for objects, floor in ((1, 0.95), (2, 0.85)) if family == "vit" else ((1, 0.92), (2, 0.7)):
        scenes = [draw_scene(50_000 + i, objects) for i in range(200)]
        with torch.no_grad():
            logits = vit.model(torch.stack([vit.transform(Image.fromarray(scene.image)) for scene in scenes]))
        top = logits.topk(objects).indices.tolist()
        assert np.mean([set(t) == set(scene.classes) for t, scene in zip(top, scenes, strict=True)]) >= floor


def test_the_demo_transform_keeps_pixels_and_cuts_the_middle():
    transform = load_demo("vit").transform
    scene = draw_scene(0)
    pixels = (transform(Image.fromarray(scene.image)).permute(1, 2, 0) + 1) * 127.5
    assert np.allclose(pixels, scene.image, atol=0.01)
    wide = np.zeros((64, 192, 4), np.uint8)
    wide[:, 64:128, 0], wide[..., 3] = 255, 255
    red = transform(Image.fromarray(wide))
    assert red.shape == (3, 64, 64) and (red[0] == 1).all() and (red[1:] == -1).all()


@pytest.mark.parametrize("load", [load_demo, lambda kind: load_pretrained(kind, "name")])
def test_unknown_kinds_are_named(load):
    with pytest.raises(ValueError, match="unknown kind of model 'mlp'; there are vit"):
        load("mlp")


def test_a_real_vit_is_as_described(shared):
    vit = load_pretrained("vit", VIT_TINY)
    assert (vit.prefix_tokens, vit.grid, len(vit.blocks), len(vit.class_names)) == (1, (14, 14), 12, 1000)
    images = torch.stack([vit.transform(photograph(name)) for name in ("cat", "coffee")])
    assert tokens_entering_each_block(vit, images) == [(2, 1 + 14 * 14, 192)] * 12
    with torch.no_grad():
        cat, coffee = (vit.class_names[i] for i in vit.model(images).argmax(1))
    assert "cat" in cat and coffee == "espresso"


def test_a_square_picture_is_seen_whole(shared):
    """Else a map would be laid over pixels that the model never saw."""
    framed = np.zeros((224, 224, 3), np.uint8)
    framed[[0, -1], :] = framed[:, [0, -1]] = 255
    assert (load_pretrained("vit", VIT_TINY).transform(Image.fromarray(framed))[:, 0] > 0.9).all()


def test_a_model_without_blocks_is_refused(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    with pytest.raises(ValueError, match="resnet18 has no blocks"):
        load_pretrained("vit", "resnet18")


def test_a_model_that_the_hub_would_have_is_asked_for_offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r'vit_small\S+ is not on this machine.*load_demo\("vit"\)'):
        load_pretrained("vit", "vit_small_patch16_224.augreg_in21k_ft_in1k")
