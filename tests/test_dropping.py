"""Tokens that are taken away: against models that are run by hand on those that are left."""

from functools import partial

import pytest
import timm
import torch
import transformers
from models import perturbed, tiny_clip, tiny_hf_vit, tiny_vit
from torch import nn

from libragrad_minimal import metrics
from libragrad_minimal.dropping import drop_tokens, dropping


def without_patches(model, image, gone):
    """The logits of a timm ViT run by hand on the tokens that are left."""
    tokens = model._pos_embed(model.patch_embed(image[None]))
    kept = [0, *(1 + t for t in range(16) if t not in gone)]
    return model.forward_head(model.norm(model.blocks(tokens[:, kept])))


def test_dropping_tokens_equals_a_naive_loop():
    """The protocol of the paper: 10 ... 90 %, rounded down, without the untouched picture."""
    model, images, scores = tiny_vit(), torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4)
    run = dropping(model, model)
    result = metrics.deletion(run, images, {"x": scores}, drop_tokens, batch_size=5, **metrics.AUTHORS_PROTOCOL)["x"]
    assert result.protocol == "drop tokens"
    torch.testing.assert_close(result.fractions, torch.arange(10) / 10)
    for i in range(2):
        predicted = model(images[i : i + 1]).argmax(1).item()
        for curves, descending in ((result.mif, True), (result.lif, False)):
            order = sorted(range(16), key=lambda t: scores[i].flatten()[t].item(), reverse=descending)
            with torch.no_grad():
                logits = torch.cat([without_patches(model, images[i], order[: 16 * k // 10]) for k in range(10)])
            torch.testing.assert_close(curves.logit[i], logits[:, predicted], rtol=1e-4, atol=1e-5)
            accuracy = (logits[1:].argmax(1) == predicted).float().mean() * 100
            name, value = ("MIF accuracy", 100 - accuracy) if descending else ("LIF accuracy", accuracy)
            torch.testing.assert_close(result.summary()[name][i], value)


CAPTIONS = torch.tensor([[5, 6, 1], [7, 8, 1]])


def hf_clip():
    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text = dict(**small, vocab_size=30, bos_token_id=0, eos_token_id=1)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(**small, image_size=32, patch_size=8))
    return transformers.CLIPModel(config).eval()


@pytest.mark.parametrize(
    "build, tower, answer",
    [
        (tiny_hf_vit, lambda model: model, lambda model, x: model(x).logits),
        (hf_clip, lambda model: model.vision_model, lambda model, x: model(CAPTIONS, x).logits_per_image),
        (tiny_clip, lambda model: model, lambda model, x: model.encode_image(x)),
    ],
    ids=["transformers ViT", "transformers CLIP", "open_clip"],
)
def test_dropped_tokens_never_enter_the_blocks(build, tower, answer):
    """Tokens that are dropped can't matter; those that stay are as many in every MLP."""
    model, images, lengths = build(), torch.randn(2, 3, 32, 32), []
    for module in tower(model).modules():
        if "GELU" in type(module).__name__:
            module.register_forward_hook(lambda module, args, result: lengths.append(max(result.shape[:2])))
    run = dropping(tower(model), partial(answer, model))
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[0, [1, 5]] = keep[1, [0, 15, 7]] = False
    with torch.no_grad():
        whole = run((images, torch.ones_like(keep)))
        torch.testing.assert_close(whole, answer(model, images))
        lengths.clear()
        some = run((images, keep))
        assert lengths == 2 * [14] + 2 * [15]
        painted = images.clone()
        painted[0, :, 8:16, 8:16] = 7  # patch 5, which is gone
        torch.testing.assert_close(run((painted, keep)), some)
        assert (some - whole).abs().max() > 1e-4


def eva(keep=None):
    """timm's EVA02, with position embeddings and rotary ones, or with those of these patches alone."""
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5, swiglu_mlp=True)
    return timm.models.Eva(qkv_fused=False, use_rot_pos_emb=True, **sizes)


def eva_by_hand(model, picture, kept):
    tokens, rotation = model._pos_embed(model.patch_embed(picture))
    tokens = tokens[:, [0, *(1 + patch for patch in kept)]]
    for block in model.blocks:
        tokens = block(tokens, rope=rotation[kept])
    return model.forward_head(model.norm(tokens))


def beit():
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5)
    return timm.models.Beit(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.3, **sizes)


def beit_by_hand(model, picture, kept):
    kept = [0, *(1 + patch for patch in kept)]
    tokens = torch.cat([model.cls_token, model.patch_embed(picture)], 1)[:, kept]
    for block in model.blocks:
        bias = block.attn._get_rel_pos_bias()[:, :, kept][..., kept]
        block.attn._get_rel_pos_bias = lambda bias=bias: bias
        tokens = block(tokens)
        del block.attn._get_rel_pos_bias
    return model.forward_head(model.norm(tokens))


def mixer():
    return timm.models.MlpMixer(img_size=32, patch_size=8, embed_dim=24, num_blocks=3, num_classes=5)


def mixer_by_hand(model, picture, kept):
    """Of the layers over tokens, those summands and those results that are left."""
    tokens = model.stem(picture)[:, kept]
    for block in model.blocks:
        first, second = block.mlp_tokens.fc1, block.mlp_tokens.fc2
        mixed = nn.functional.linear(block.norm1(tokens).mT, first.weight[:, kept], first.bias)
        mixed = nn.functional.linear(block.mlp_tokens.act(mixed), second.weight[kept], second.bias[kept])
        tokens = tokens + mixed.mT
        tokens = tokens + block.mlp_channels(block.norm2(tokens))
    return model.forward_head(model.norm(tokens))


@pytest.mark.parametrize("build, by_hand", [(eva, eva_by_hand), (beit, beit_by_hand), (mixer, mixer_by_hand)])
@pytest.mark.parametrize("fused", [True, False])
def test_blocks_that_number_their_tokens_are_run_without_some(build, by_hand, fused):
    model = perturbed(build())
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    pictures, kept = torch.randn(2, 3, 32, 32), [[0, 3, 4, 9, 15], [1, 2, 3, 7, 8, 9, 10]]
    keep = torch.zeros(2, 16, dtype=torch.bool)
    keep[0, kept[0]] = keep[1, kept[1]] = True
    with torch.no_grad():
        expected = torch.cat(
            [by_hand(model, picture[None], some) for picture, some in zip(pictures, kept, strict=True)]
        )
        run = dropping(model, model)
        torch.testing.assert_close(run((pictures, keep)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run((pictures, torch.ones_like(keep))), model(pictures))
        assert (expected - model(pictures)).abs().max() > 1e-2


class Backwards(nn.Module):
    """Runs its blocks from the last to the first."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2))

    def behind(self, h):
        for block in reversed(self.blocks):
            h = block(h)
        return self.head(h.mean(1))

    def forward(self, pictures):
        return self.behind(self.embed(pictures).flatten(2).mT)


def test_tokens_are_dropped_before_the_block_that_runs_first():
    model, pictures, keep = Backwards().eval(), torch.randn(1, 3, 32, 32), torch.arange(16)[None] % 3 > 0
    expected = model.behind(model.embed(pictures).flatten(2).mT[:, keep[0]])
    torch.testing.assert_close(dropping(model, model)((pictures, keep)), expected)


class Numbered(nn.TransformerEncoderLayer):
    places = torch.linspace(-1, 1, 16)[:, None]

    def forward(self, h):
        return super().forward(h + self.places)


def numbered():
    model = Backwards()
    model.blocks = nn.ModuleList(Numbered(16, 2, 24, batch_first=True) for _ in range(2))
    return model.eval()


def test_tokens_are_hidden_in_pytorchs_own_layers(monkeypatch):
    model, pictures, keep = numbered(), torch.randn(1, 3, 32, 32), torch.arange(16)[None] % 3 > 0
    result = dropping(model, model)((pictures, keep))
    monkeypatch.setattr(Numbered, "places", Numbered.places[keep[0]])
    torch.testing.assert_close(result, model.behind(model.embed(pictures).flatten(2).mT[:, keep[0]]))


def hf_beit():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    model = transformers.BeitForImageClassification(
        transformers.BeitConfig(**sizes, patch_size=8, num_labels=5, use_relative_position_bias=True)
    )
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(parameter)
    return model.eval()


def hf_dinov3():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    return transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**sizes, patch_size=8, num_register_tokens=3)
    ).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [hf_beit, hf_dinov3])
def test_hidden_tokens_never_matter_and_others_stay_where_they_are(build, attention):
    """What is painted over a patch that is gone doesn't matter; what is painted over one that stays does."""
    model = build()
    model.set_attn_implementation(attention)
    pictures, keep = torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.bool)
    keep[:, [1, 5, 15]] = False
    run = dropping(model, lambda x: model(x)[-1] if build is hf_dinov3 else model(x).logits)
    painted, other = pictures.clone(), pictures.clone()
    painted[:, :, 8:16, 8:16] = 7  # patch 5
    other[:, :, 8:16, 16:24] = 7  # patch 6
    with torch.no_grad():
        some = run((pictures, keep))
        torch.testing.assert_close(run((painted, keep)), some)
        assert (run((other, keep)) - some).abs().max() > 1e-4
        assert (run((pictures, torch.ones_like(keep))) - some).abs().max() > 1e-4


class HeadsFirst(nn.Module):
    """Attention by hand with a bias, and rows of weights that are heads first, then samples: (H N, T, T)."""

    def __init__(self, heads_first):
        super().__init__()
        self.project, self.heads_first = nn.Linear(16, 16), heads_first
        self.bias = nn.Parameter(torch.randn(16, 16))

    def forward(self, h):
        heads = self.project(h).unflatten(2, (2, 8)).transpose(1, 2)  # (N, H, T, C)
        heads = heads.transpose(0, 1) if self.heads_first else heads
        rows = heads.flatten(0, 1)
        weights = torch.softmax(input=rows @ rows.mT + self.bias, dim=-1)
        mixed = (weights @ rows).unflatten(0, heads.shape[:2])
        mixed = mixed.transpose(0, 1) if self.heads_first else mixed
        return h + mixed.transpose(1, 2).flatten(2)


def test_rows_of_several_heads_are_told_by_their_sample_or_refused():
    model, pictures, keep = Backwards(), torch.randn(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.bool)
    model.blocks = nn.ModuleList(nn.Sequential(HeadsFirst(False), nn.GELU()) for _ in range(2))
    keep[0, 5] = keep[1, 6] = False
    run, painted = dropping(model, model), pictures.clone()
    painted[0, :, 8:16, 8:16] = painted[1, :, 8:16, 16:24] = 7
    torch.testing.assert_close(run((painted, keep)), run((pictures, keep)))
    for block in model.blocks:
        block[0].heads_first = True
    with pytest.raises(ValueError, match="occlude_patches"):
        dropping(model, model)((pictures, keep))


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, h):
        return h + self.conv(h.mT).mT


def test_models_that_need_all_their_tokens_say_so():
    model, keep = Backwards(), torch.arange(16)[None] > 3
    model.blocks = nn.ModuleList(nn.Sequential(Convolved(), nn.GELU()) for _ in range(2))
    with pytest.raises(ValueError, match="by their number.*more than attention.*occlude_patches"):
        dropping(model.eval(), model)((torch.randn(1, 3, 32, 32), keep))
    swin = timm.models.SwinTransformer(img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 2), num_heads=(1, 2, 2))
    with torch.no_grad(), pytest.raises(ValueError, match="are no row"):
        dropping(swin.eval(), swin)((torch.randn(1, 3, 64, 64), torch.ones(1, 256, dtype=torch.bool)))
