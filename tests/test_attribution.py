"""Every attribution method against something independent: Captum, NumPy, hand-written forward passes, autograd."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from libragrad_minimal import Against, Probability, libra_grad
from libragrad_minimal.attribution import attribute, attribute_many
from libragrad_minimal.engine import ALI_LRP, ATTN_LRP, CP_LRP, DECOMPX, LIBRA, PLAIN
from libragrad_minimal.families import Inputs
from libragrad_minimal.methods import AVERAGED, METHODS, reads_of
from libragrad_minimal.models import load_demo
from libragrad_minimal.recording import MAPS, Request, record
from libragrad_minimal.scores import Scores

RESIDUAL = replace(LIBRA, residual=True)
FEW_STEPS = {name: {"steps": 3} for name in METHODS if name.startswith("IG")}
FEW_STEPS |= {name: {"samples": 3} for name in METHODS if name.startswith("SmoothGrad")}


def perturbed(model: nn.Module) -> nn.Module:
    """Norms and biases that aren't the neutral ones of a fresh model."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_vit(**changes) -> nn.Module:
    config = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=3, num_classes=5) | changes
    return perturbed(timm.models.VisionTransformer(**config))


def tiny_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return perturbed(LlamaForCausalLM(config))


def tiny_gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    return perturbed(GPT2LMHeadModel(config))


def tiny_clip() -> nn.Module:
    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    text = dict(context_length=8, vocab_size=30, width=32, heads=2, layers=1)
    return perturbed(open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))


def tiny_swin() -> nn.Module:
    config = dict(img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 2), num_heads=(1, 2, 2), num_classes=5)
    return perturbed(timm.models.SwinTransformer(**config))


def tiny_mixer() -> nn.Module:
    return perturbed(timm.models.MlpMixer(num_classes=5, img_size=32, patch_size=8, embed_dim=24, num_blocks=2))


def tiny_hf_vit() -> nn.Module:
    config = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return perturbed(ViTForImageClassification(ViTConfig(**config, image_size=32, patch_size=8, num_labels=5)))


def tiny_siglip() -> nn.Module:
    return tiny_vit(class_token=False, global_pool="map")


PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 5, 9, 2, 8, 4], [3, 3, 7, 20, 29, 0]])
MODELS = {
    "vit": (tiny_vit, PICTURES, 3, (4, 4)),
    "registers": (partial(tiny_vit, reg_tokens=4), PICTURES, torch.tensor([0, 4]), (4, 4)),
    "siglip": (tiny_siglip, PICTURES, 3, (4, 4)),
    "mean pooling": (partial(tiny_vit, class_token=False, global_pool="avg"), PICTURES, 3, (4, 4)),
    "hf vit": (tiny_hf_vit, PICTURES, 3, (4, 4)),
    "clip": (tiny_clip, PICTURES, F.normalize(torch.arange(16.0), dim=0), (4, 4)),
    "swin": (tiny_swin, PICTURES.repeat(1, 1, 2, 2), 3, (16, 16)),
    "mixer": (tiny_mixer, PICTURES, 3, (4, 4)),
    "llama": (tiny_llama, IDS, 7, None),
    "gpt2": (tiny_gpt2, IDS, 7, None),
}
WITHOUT_MAPS = {"swin": "windows", "mixer": "no attention maps"}
NEEDS_MAPS = {name for name in METHODS if MAPS in reads_of(name)}
ALONE = [name for name in METHODS if not name.startswith(("IG ", "SmoothGrad "))]


# ---- every method on every kind of model -----------------------------------------------------------------------------


EVERY = [(method, kind) for kind in MODELS for method in ALONE]
EVERY += [(method, kind) for kind in ("registers", "llama") for method in METHODS if method not in ALONE]


@pytest.mark.parametrize("method, kind", EVERY)
def test_batches_equal_single_calls(kind, method):
    build, inputs, target, grid = MODELS[kind]
    model, options = build(), FEW_STEPS.get(method, {})
    if method in NEEDS_MAPS and kind in WITHOUT_MAPS:
        with pytest.raises(ValueError, match=WITHOUT_MAPS[kind]):
            attribute(model, inputs, target, method, **options)
        return
    both = attribute(model, inputs, target, method, **options)
    assert both.grid == grid
    assert both.scores.shape == (2, np.prod(grid) if grid else inputs.shape[1])
    assert both.scores.isfinite().all() and both.scores.abs().max() > 0
    for i in range(2):
        own_target = target[i : i + 1] if isinstance(target, torch.Tensor) and len(target) == 2 else target
        alone = attribute(model, inputs[i : i + 1], own_target, method, **options)
        scale = alone.scores.abs().max()
        torch.testing.assert_close(both.scores[i] / scale, alone.scores[0] / scale, rtol=0, atol=1e-5)
        torch.testing.assert_close(both.output[i], alone.output[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rules", [LIBRA, RESIDUAL], ids=["libra", "residual-aware"])
@pytest.mark.parametrize("kind", MODELS)
def test_fullgrad_is_complete_at_every_layer(kind, rules):
    build, inputs, target, _ = MODELS[kind]
    model = build()
    for layer in (0, 1, -1):
        result = attribute(model, inputs, target, "FullGrad", rules, layer=layer)
        assert (result.completeness_error < 1e-5 * (1 + result.output.abs())).all()
    plain = attribute(model, inputs, target, "FullGrad", PLAIN)
    assert (plain.completeness_error > 1e-3).all(), "a check that can't fail is no check"


def test_plain_fullgrad_total_equals_autograd_on_all_biases():
    """The sum over constants caught in the forward pass is <b, df/db> over all biases, as autograd has it."""
    model = tiny_vit()
    h0 = model._pos_embed(model.patch_embed(PICTURES[:1])).detach().requires_grad_()
    output = model.forward_head(model.norm(model.blocks(h0)))[0, 3]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and "patch_embed" not in name]
    gradients = torch.autograd.grad(output, [h0, *biases])
    total = sum((x * g).sum() for x, g in zip([h0, *biases], gradients, strict=True))
    error = attribute(model, PICTURES[:1], 3, "FullGrad", PLAIN).completeness_error
    torch.testing.assert_close(error[0], (output - total).abs(), rtol=1e-4, atol=1e-5)


def test_text_scores_add_up_to_the_logit():
    for model in (tiny_llama(), tiny_gpt2()):
        result = attribute(model, IDS, 7)
        torch.testing.assert_close(result.output, model(IDS).logits[:, -1, 7].detach())
        assert (result.completeness_error < 1e-5).all()
    llama = attribute(tiny_llama(), IDS, 7)  # adds no constants, so the tokens explain everything
    torch.testing.assert_close(llama.scores.sum(1), llama.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_padding_gets_exactly_nothing(method):
    model, options = tiny_llama(), FEW_STEPS.get(method, {})
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = attribute(model, {"input_ids": IDS, "attention_mask": mask}, 7, method, **options)
    assert (padded.scores[0, :2] == 0).all()
    if method != "Random" and not method.startswith("SmoothGrad"):  # whose noise knows nothing of padding
        alone = attribute(model, IDS[:1, 2:], 7, method, **options)
        torch.testing.assert_close(padded.scores[0, 2:], alone.scores[0], rtol=1e-3, atol=1e-5)


class OwnMask(nn.Module):
    """An encoder that is told of padding in a way of its own; `hides` makes of that what is added to logits."""

    def __init__(self, hides, cut=-torch.inf):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embedding, self.encoder = nn.Embedding(200, 16), nn.TransformerEncoder(layer, 2)
        self.head, self.hides, self.cut = nn.Linear(16, 4), hides, cut

    def forward(self, input_ids, told):
        padding = self.hides(told, input_ids)
        added = torch.zeros(padding.shape).masked_fill(padding, self.cut)
        h = self.encoder(self.embedding(input_ids), src_key_padding_mask=added)
        return self.head((h * ~padding[..., None]).sum(1) / (~padding).sum(1, keepdim=True))


KEPT = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
OWN_MASKS = {
    "1 is padding": (lambda told, ids: told == 1, 1 - KEPT),
    "0 is padding": (lambda told, ids: told == 0, KEPT),
    "booleans": (lambda told, ids: ~told, KEPT.bool()),
    "added to logits": (lambda told, ids: told < 0, -100.0 * (1 - KEPT)),
    "pairs": (lambda told, ids: ~told.any(1), KEPT[:, None].bool() & KEPT[:, :, None].bool()),
    "for all heads": (lambda told, ids: ~told[:, 0, 0], KEPT[:, None, None].bool()),
    "lengths": (lambda told, ids: torch.arange(ids.shape[1]) >= told[:, None], KEPT.sum(1)),
}


@pytest.mark.parametrize("told", OWN_MASKS)
@pytest.mark.parametrize("method", ["GenAtt", "Attention Rollout", "LeGrad", "GradCAM+", "FullGrad+", "IxG"])
def test_padding_by_another_name_gets_nothing_too(method, told):
    hides, mask = OWN_MASKS[told]
    model = perturbed(OwnMask(hides))
    ids = torch.randint(1, 190, (2, 6), generator=torch.Generator().manual_seed(0))
    one = mask[:1] if mask.dim() == 1 else mask[:1, ..., :4][:, : 4 if mask.dim() == 3 else None]
    padded = attribute(model, {"input_ids": ids, "told": mask}, 1, method)
    alone = attribute(model, {"input_ids": ids[:1, :4], "told": one}, 1, method)
    assert (padded.scores[0, 4:] == 0).all()
    torch.testing.assert_close(padded.scores[0, :4], alone.scores[0], rtol=1e-3, atol=1e-5)


def test_padding_whose_logits_are_not_infinite():
    """A logit less 100 leaves padding 1e-44: next to nothing is nothing."""
    ids = torch.randint(1, 190, (2, 6), generator=torch.Generator().manual_seed(0))
    hides, mask = OWN_MASKS["0 is padding"]
    finite, infinite = perturbed(OwnMask(hides, cut=-100.0)), perturbed(OwnMask(hides))
    finite.load_state_dict(infinite.state_dict())
    for method in ("LeGrad", "GradCAM+", "IxG"):
        scores, expected = (
            attribute(one, {"input_ids": ids, "told": mask}, 1, method).scores for one in (finite, infinite)
        )
        assert (scores[0, 4:] == 0).all()
        torch.testing.assert_close(scores, expected)


def test_targets_are_linear():
    model = tiny_vit()
    cat, dog = attribute(model, PICTURES, 1), attribute(model, PICTURES, 4)
    weights = torch.tensor([0.0, 1, 0, 0, -1])
    for target in (weights, weights.expand(2, -1), lambda logits: logits[:, 1] - logits[:, 4]):
        contrast = attribute(model, PICTURES, target)
        torch.testing.assert_close(contrast.scores, cat.scores - dog.scores, rtol=1e-4, atol=1e-5)


def test_clip_explains_the_similarity():
    model, text = tiny_clip(), F.normalize(torch.arange(16.0), dim=0)
    result = attribute(model, PICTURES, text)
    torch.testing.assert_close(result.output, (F.normalize(model.encode_image(PICTURES), dim=-1) @ text).detach())


def test_inputs_by_keyword():
    model = tiny_hf_vit()
    by_keyword = attribute(model, {"pixel_values": PICTURES}, 3)
    torch.testing.assert_close(by_keyword.maps, attribute(model, PICTURES, 3).maps)


def test_a_new_method_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(METHODS, "length", lambda run, power=1: Scores(run.tokens[0].norm(dim=-1) ** power))
    model = tiny_vit()
    lengths = attribute(model, PICTURES, 3, "length", power=2)
    tokens = model._pos_embed(model.patch_embed(PICTURES))[:, 1:]
    torch.testing.assert_close(lengths.scores, tokens.pow(2).sum(-1).detach())


def test_pictures_that_are_not_square():
    model = tiny_vit(img_size=(32, 48))
    result = attribute(model, torch.randn(1, 3, 32, 48), 3)
    assert result.grid == (4, 6) and result.maps.shape == (1, 4, 6)


def test_frozen_models_give_the_same():
    model = tiny_vit()
    free = attribute(model, PICTURES, 3).scores
    torch.testing.assert_close(attribute(model.requires_grad_(False), PICTURES, 3).scores, free)


# ---- the model from its tokens on ------------------------------------------------------------------------------------


def from_tokens(model, h0):
    return model.forward_head(model.norm(model.blocks(h0)))[:, 3]


# ---- NumPy, on a model made by hand with three tokens ----------------------------------------------------------------


class HandMadeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(2, 4, 2)) for _ in range(3))
        self.out, self.mix = nn.Parameter(torch.randn(2, 2, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        q, k, v = (torch.einsum("btc,hcd->bhtd", x, w) for w in (self.query, self.key, self.value))
        self.map = (q @ k.transpose(-1, -2)).softmax(-1)
        if self.map.requires_grad:
            self.map.retain_grad()
        self.middle = x + torch.einsum("bhtd,hdc->btc", self.map @ v, self.out)
        return self.middle + (self.middle @ self.mix).relu()


class HandMadeModel(nn.Module):
    """Three tokens of four channels, two heads, two blocks; the first token is read out. Takes tokens as they are."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([HandMadeBlock(), HandMadeBlock()])
        self.head = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x[:, 0] @ self.head


def as_numpy(model, x):
    """h (tokens), g (their gradients), A (attention maps), dA (their gradients), m (tokens after attention)."""
    h = x.clone().requires_grad_()
    h.retain_grad()
    tokens = [h]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
        tokens[-1].retain_grad()
    (tokens[-1][:, 0] @ model.head)[0, 2].backward()
    return {
        "h": [t.detach()[0].numpy() for t in tokens],
        "g": [t.grad[0].numpy() for t in tokens],
        "A": [b.map.detach()[0].numpy() for b in model.blocks],
        "dA": [b.map.grad[0].numpy() for b in model.blocks],
        "m": [b.middle.detach()[0].numpy() for b in model.blocks],
    }


@pytest.fixture
def three_tokens():
    """The model, its input, and what `as_numpy` says of it."""
    model, x = HandMadeModel().eval(), torch.randn(1, 3, 4)
    return model, x, as_numpy(model, x)


def ours(model, x, method, **options):
    return attribute(model, x, 2, method, PLAIN, **options).scores[0].numpy()


def numpy_rollout(fused, discard=0.0):
    result = np.eye(3)
    for a in fused:
        a = a.copy()
        order = [i for i in np.argsort(a.ravel(), kind="stable")[: int(discard * 9)] if i != 0]
        a.ravel()[order] = 0
        a = (a + np.eye(3)) / 2
        result = (a / a.sum(-1, keepdims=True)) @ result
    return result[0]


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.5, 0.9])
def test_rollout(three_tokens, fusion, discard):
    model, x, n = three_tokens
    expected = numpy_rollout([getattr(np, fusion)(a, 0) for a in n["A"]], discard)
    got = ours(model, x, "Attention Rollout", head_fusion=fusion, discard_ratio=discard)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_raw_attention(three_tokens):
    model, x, n = three_tokens
    np.testing.assert_allclose(ours(model, x, "RawAtt"), n["A"][-1].mean(0)[0], rtol=1e-5)


def positive(n):
    return [np.maximum(a * d, 0).mean(0) for a, d in zip(n["A"], n["dA"], strict=True)]


def positive_mean(n):
    return [np.maximum((a * d).mean(0), 0) for a, d in zip(n["A"], n["dA"], strict=True)]


def numpy_genatt(n):
    r = np.eye(3)
    for product in positive(n):
        r = r + product @ r
    return r[0]


def numpy_tokentm(n):
    def w(e, f):
        length_e, length_f = np.linalg.norm(e, axis=-1), np.linalg.norm(f, axis=-1)
        cosine = np.exp((e * f).sum(-1) / length_e / length_f)
        return length_f / length_e * cosine / cosine.sum()

    c = np.diag(np.linalg.norm(n["h"][0], axis=-1))
    for i in range(2):
        attention = n["A"][i].mean(0) @ np.diag(w(n["h"][i], n["m"][i])) * np.maximum(n["dA"][i], 0).mean(0)
        c = (np.eye(3) + np.diag(w(n["m"][i], n["h"][i + 1]))) @ (np.eye(3) + attention) @ c
    return c[0]


def numpy_cam(n, layers, weight):
    """weight(h, g) of one channel of one layer, numbers for each token."""
    result = np.zeros(3)
    for layer in layers:
        for h, g in zip(n["h"][layer].T, n["g"][layer].T, strict=True):
            result += weight(h, g) * h
    return result


def numpy_gradcam_plus_plus(h, g):
    return sum(d**2 / (2 * d**2 + d**3 * h.sum()) * d for d in g.astype(float) if d > 0)


IN_NUMPY = {  # the hand-made model adds no constants
    "IxG": lambda n: (n["h"][0] * n["g"][0]).sum(-1),
    "FullGrad": lambda n: (n["h"][0] * n["g"][0]).sum(-1),
    "FullGrad+": lambda n: sum((n["h"][i] * n["g"][i]).sum(-1) for i in range(2)) / 2,  # a mean, where not of pictures
    "HiResCAM": lambda n: (n["h"][1] * n["g"][1]).sum(-1),
    "SkipPLUS": lambda n: (n["h"][1] * n["g"][1]).sum(-1),
    "GradCAM": lambda n: numpy_cam(n, [1], lambda h, g: g.mean()),
    "XGradCAM": lambda n: numpy_cam(n, [1], lambda h, g: g @ h / h.sum()),
    "GradCAM++": lambda n: numpy_cam(n, [1], numpy_gradcam_plus_plus),
    "GradCAM+": lambda n: numpy_cam(n, [0, 1], lambda h, g: g.mean()),
    "XGradCAM+": lambda n: numpy_cam(n, [0, 1], lambda h, g: g @ np.abs(h) / np.abs(h).sum()),
    "AttCAT": lambda n: sum(n["A"][i].mean((0, 1)) * (n["h"][i + 1] * n["g"][i + 1]).sum(-1) for i in range(2)),
    "GenAtt": numpy_genatt,
    "TokenTM": numpy_tokentm,
    "Gradient Attention Rollout": lambda n: numpy_rollout(positive_mean(n)),
}


@pytest.mark.parametrize("method", IN_NUMPY)
def test_methods_of_gradients(three_tokens, method):
    model, x, n = three_tokens
    np.testing.assert_allclose(ours(model, x, method), IN_NUMPY[method](n), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", AVERAGED)
def test_methods_combined_with_integrated_gradients(three_tokens, method):
    """The same formulas, with gradients averaged in NumPy over models run on 1/8, 3/8, 5/8 and 7/8 of the input."""
    model, x, n = three_tokens
    path = [as_numpy(model, fraction * x) for fraction in (0.125, 0.375, 0.625, 0.875)]
    averaged = {name: [np.mean(parts, 0) for parts in zip(*(p[name] for p in path), strict=True)] for name in n}
    expected = IN_NUMPY[method](n | {"g": averaged["g"], "dA": averaged["dA"]})
    assert np.abs(expected - IN_NUMPY[method](n)).max() > 1e-3, "a check that can't fail is no check"
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ours(model, x, f"IG {method}", steps=4) / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("discard", [0.5, 0.9])
def test_gradient_rollout_discards(three_tokens, discard):
    model, x, n = three_tokens
    got = ours(model, x, "Gradient Attention Rollout", discard_ratio=discard)
    np.testing.assert_allclose(got, numpy_rollout(positive_mean(n), discard), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method, pool", [("LeGrad", lambda h: h.mean(1)), ("LeGrad class token", lambda h: h[:, 0])])
@pytest.mark.parametrize("layers", [(0, 1), (0,), (-1,)])
def test_legrad(three_tokens, method, pool, layers):
    model, x, _ = three_tokens
    expected = 0
    for layer in layers:
        h = x
        for earlier in model.blocks[: layer % 2 + 1]:
            h = earlier(h)
        (gradient,) = torch.autograd.grad((pool(h) @ model.head)[0, 2], model.blocks[layer].map)
        expected = expected + gradient[0].relu().mean((0, 1)).numpy()
    np.testing.assert_allclose(ours(model, x, method, layers=layers), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours(model, x, method, layers=layers), expected, rtol=1e-5, atol=1e-6)


def test_mean_row_where_no_token_is_the_readout(three_tokens):
    model, x, n = three_tokens
    model.forward = lambda x: model.blocks[1](model.blocks[0](x)).mean(1) @ model.head
    np.testing.assert_allclose(ours(model, x, "RawAtt"), n["A"][-1].mean(0).mean(0), rtol=1e-5)


# ---- definitions, checked by hand ------------------------------------------------------------------------------------


class Sum(nn.Module):
    """Blocks that change nothing, and the sum of all tokens as the only logit: g is 1 everywhere."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x)).sum((1, 2))[:, None]


@pytest.mark.parametrize("method, layers", [("XGradCAM+", 2), ("GradCAM+", 2), ("XGradCAM", 1), ("GradCAM", 1)])
def test_a_negative_channel_speaks_against(method, layers):
    """h = -1 and g = +1 everywhere: each of four channels has weight +1 and gives -1."""
    result = attribute(Sum().eval(), -torch.ones(1, 3, 4), 0, method, blocks="blocks")
    torch.testing.assert_close(result.scores, torch.full((1, 3), -4.0 * layers))


def test_xgradcam_plus_equals_fu_et_al_where_a_channel_keeps_its_sign():
    model = Sum().eval()
    x = torch.tensor([[[1.0, -2], [3, -1], [2, -5]]])
    plus = attribute(model, x, 0, "XGradCAM+", blocks="blocks", layers=[-1])
    torch.testing.assert_close(plus.scores, attribute(model, x, 0, "XGradCAM", blocks="blocks").scores)


def test_saliency_is_the_largest_derivative():
    model = Sum().eval()
    model.forward = lambda x: (model.blocks[1](model.blocks[0](x)) * torch.tensor([1.0, -3, 2])).sum((1, 2))[:, None]
    torch.testing.assert_close(
        attribute(model, torch.randn(1, 2, 3), 0, "Saliency", blocks="blocks").scores, torch.full((1, 2), 3.0)
    )


def one_block():
    model = HandMadeModel().eval()
    model.blocks = model.blocks[:1]
    return model, torch.randn(1, 3, 4)


@pytest.mark.parametrize("method", ["GenAtt", "Gradient Attention Rollout", "TokenTM"])
def test_attnlrp_leaves_the_gradient_of_the_last_map_whole(method):
    """Between the only block's map and the logit lie linear layers and a ReLU, which no rule changes."""
    model, x = one_block()
    plain, halved = (attribute(model, x, 2, method, rules, blocks="blocks") for rules in (PLAIN, ATTN_LRP))
    torch.testing.assert_close(halved.scores, plain.scores)


def test_gradient_rollout_clamps_after_the_mean_over_heads():
    """Where one head speaks for and another as strongly against, nothing is left."""
    model, x = one_block()
    with torch.no_grad():
        for weight in (model.blocks[0].query, model.blocks[0].key, model.blocks[0].value):
            weight[1] = weight[0]
        model.blocks[0].out[1] = -model.blocks[0].out[0]
    scores = attribute(model, x, 2, "Gradient Attention Rollout", blocks="blocks").scores
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0, 0]]), atol=1e-6, rtol=0)


def test_a_class_token_that_is_not_read_has_no_weight():
    model = tiny_vit(global_pool="avg")
    (last,) = record(Request(model, Inputs(PICTURES), 3, reads=frozenset({MAPS}))).attention[-1:]
    expected = last.mean(1)[:, 1:].mean(1)[:, 1:]  # rows and columns of the patches
    torch.testing.assert_close(attribute(model, PICTURES, 3, "RawAtt").scores, expected)


def test_legrad_runs_every_block_once():
    model, passes = tiny_vit(), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: passes.append("forward"))
        block.attn.qkv.register_full_backward_hook(lambda *_: passes.append("backward"))
    attribute(model, PICTURES, 3, "IxG")  # the layout is asked for once
    passes.clear()
    attribute(model, PICTURES, 3, "LeGrad")
    assert passes.count("forward") == 3 and passes.count("backward") <= 3
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_users_hook_on_a_block_acts_once():
    """Hooks take part in what a block returns; when its answer is read off that, they have had their turn."""

    class Doubled(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x) * 2

    hooked = tiny_vit()
    written_out, spoilt = copy.deepcopy(hooked), copy.deepcopy(hooked)
    hooked.blocks[-1].register_forward_hook(lambda module, args, result: result * 2)
    spoilt.blocks[-1].register_forward_hook(lambda module, args, result: result.mul_(2))
    written_out.blocks[-1] = Doubled(written_out.blocks[-1])
    expected = attribute(written_out, PICTURES, 3, "LeGrad").scores
    torch.testing.assert_close(attribute(hooked, PICTURES, 3, "LeGrad").scores, expected)
    torch.testing.assert_close(attribute(spoilt, PICTURES, 3, "LeGrad").scores, expected)


def test_legrad_reads_the_mean_token_by_the_models_own_head():
    model, maps = tiny_vit(), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    h, expected = model._pos_embed(model.patch_embed(PICTURES)), 0
    for block in model.blocks:
        h = block(h)
        answer = model.forward_head(model.norm(h.mean(1, keepdim=True)))[:, 3].sum()
        (gradient,) = torch.autograd.grad(answer, maps[-1], retain_graph=True)
        expected = expected + gradient.relu().mean((1, 2))[:, 1:]
    torch.testing.assert_close(attribute(model, PICTURES, 3, "LeGrad", PLAIN).scores, expected, rtol=1e-4, atol=1e-7)


def test_legrad_of_padded_text():
    """The mean token leaves padding out, and classes of each sample's own are read."""
    model = tiny_llama()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    both = attribute(model, {"input_ids": IDS, "attention_mask": mask}, torch.tensor([7, 9]), "LeGrad").scores
    alone = attribute(model, IDS[:1, 2:], 7, "LeGrad").scores
    torch.testing.assert_close(both[0, 2:], alone[0], rtol=1e-4, atol=1e-6)


# ---- what attributions add up to -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [PLAIN, LIBRA, ALI_LRP, ATTN_LRP, DECOMPX])
def test_the_error_is_stated_for_every_rule_set(rules):
    """As a sum by autograd on the tokens: the class token's score isn't shown, and counts."""
    model = tiny_vit()
    h0 = model._pos_embed(model.patch_embed(PICTURES)).detach().requires_grad_()
    output = from_tokens(model, h0)
    (gradient,) = libra_grad(output, h0, rules)
    result = attribute(model, PICTURES, 3, "IxG", rules)
    expected = (output - (h0 * gradient).sum((1, 2))).abs().detach()
    torch.testing.assert_close(result.completeness_error, expected, rtol=1e-4, atol=1e-5)
    assert not result.promises_completeness and (expected > 1e-3).all()
    full = attribute(model, PICTURES, 3, "FullGrad", rules)
    assert full.promises_completeness == (rules == LIBRA) and full.rules == rules
    assert ((full.completeness_error < 1e-5) == (rules in (LIBRA, DECOMPX))).all()  # a ViT multiplies no two streams


def test_methods_without_a_sum_state_no_error():
    results = attribute_many(tiny_vit(), PICTURES, 3, ["GradCAM+", "GenAtt", "Saliency"])
    assert all(result.completeness_error.isnan().all() for result in results.values())


@pytest.mark.parametrize("kind", ["vit", "llama", "gpt2"])
def test_fullgrad_plus_as_sum_and_as_mean(kind):
    build, inputs, target, grid = MODELS[kind]
    model, blocks = build(), MODELS[kind][0]().eval()
    count = len(record(Request(blocks, Inputs(inputs), target)).left)
    for rules in (PLAIN, LIBRA):
        ask = partial(attribute, model, inputs, target, rules=rules)
        each = [ask("FullGrad", layer=layer) for layer in range(count)]
        later = [ask("HiResCAM", layer=layer).scores for layer in range(1, count)]
        total, mean = ask("FullGrad+", reduce="sum"), ask("FullGrad+", reduce="mean")
        torch.testing.assert_close(total.scores, each[0].scores + sum(later))
        torch.testing.assert_close(mean.scores, torch.stack([one.scores for one in each]).mean(0))
        torch.testing.assert_close(total.completeness_error, each[0].completeness_error)
        default = ask("FullGrad+")
        torch.testing.assert_close(default.scores, total.scores if grid else mean.scores)
        torch.testing.assert_close(ask("FullGrad+", layers=[-1]).scores, each[-1].scores)
        upper = range(count // 2, count)
        torch.testing.assert_close(ask("SkipPLUS").scores, ask("FullGrad+", layers=upper).scores)
        if grid is None and rules == LIBRA:
            assert (mean.completeness_error < 1e-5).all() and mean.promises_completeness


@pytest.mark.parametrize("method", ["GradCAM+", "XGradCAM+", "AttCAT", "LeGrad"])
def test_sums_over_some_layers_add_up(method):
    model = tiny_vit()
    whole = attribute(model, PICTURES, 3, method).scores
    parts = [attribute(model, PICTURES, 3, method, layers=layers).scores for layers in ([0, -1], [1])]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="layers is empty"):
        attribute(model, PICTURES, 3, method, layers=[])


def test_integrated_gradients_run_plain_unless_told_otherwise():
    model = tiny_vit()
    default = attribute(model, PICTURES, 3, "IG", steps=4)
    assert default.rules == PLAIN
    torch.testing.assert_close(default.scores, attribute(model, PICTURES, 3, "IG", PLAIN, steps=4).scores)
    with pytest.warns(UserWarning, match="no function's gradients"):
        balanced = attribute(model, PICTURES, 3, "IG", LIBRA, steps=4)
    assert (balanced.scores - default.scores).abs().max() > 1e-3
    many = attribute_many(model, PICTURES, 3, {"IG": {"steps": 4}, "IxG": {}})
    assert many["IxG"].rules == LIBRA and list(many) == ["IG", "IxG"]
    torch.testing.assert_close(many["IG"].scores, default.scores)


# ---- targets beside a logit ------------------------------------------------------------------------------------------


def test_probability_has_its_own_gradient_under_every_rule_set():
    model = tiny_vit()
    h0 = model._pos_embed(model.patch_embed(PICTURES)).detach().requires_grad_()
    p = model.forward_head(model.norm(model.blocks(h0))).softmax(-1)
    (gradient,) = torch.autograd.grad(p[:, 3].sum(), h0)
    plain = attribute(model, PICTURES, Probability(3), "IxG", PLAIN)
    torch.testing.assert_close(plain.output, p[:, 3].detach())
    torch.testing.assert_close(plain.scores, (h0 * gradient).sum(-1)[:, 1:].detach(), rtol=1e-4, atol=1e-6)
    weights = p[:, 3:4] * (F.one_hot(torch.tensor(3), 5) - p)
    libra = attribute(model, PICTURES, Probability(3))
    torch.testing.assert_close(libra.scores, attribute(model, PICTURES, weights.detach()).scores, rtol=1e-4, atol=1e-6)
    assert (libra.completeness_error < 1e-5).all()


def test_against_the_strongest_others():
    model = tiny_vit()
    logits = model(PICTURES).detach()
    expected = torch.stack([z[3] - np.mean(sorted(z[[0, 1, 2, 4]].tolist())[-2:]) for z in logits])
    result = attribute(model, PICTURES, Against(torch.tensor([3, 3]), others=2))
    torch.testing.assert_close(result.output, expected.float())
    assert (result.completeness_error < 1e-5).all()
    with pytest.raises(ValueError, match=r"1\.\.4"):
        attribute(model, PICTURES, Against(3, others=5))
    text = attribute(tiny_llama(), IDS, Against(7, others=3))
    assert (text.completeness_error < 1e-5).all()


# ---- where the tokens begin ------------------------------------------------------------------------------------------


def test_tokens_before_the_first_norm_of_clip():
    model, text = tiny_clip(), F.normalize(torch.arange(16.0), dim=0)
    before = []
    with model.visual.ln_pre.register_forward_pre_hook(lambda module, args: before.append(args[0].detach())):
        model.encode_image(PICTURES)
    h = before[0].requires_grad_()
    with model.visual.ln_pre.register_forward_pre_hook(lambda module, args: (h,)):
        output = F.normalize(model.encode_image(PICTURES), dim=-1) @ text
    (gradient,) = torch.autograd.grad(output.sum(), h)
    result = attribute(model, PICTURES, text, "IxG", PLAIN, start="visual.ln_pre")
    torch.testing.assert_close(result.scores, (h * gradient).sum(-1)[:, 1:].detach(), rtol=1e-4, atol=1e-5)
    assert (attribute(model, PICTURES, text, start="visual.ln_pre").completeness_error < 1e-5).all()
    for method in ("TokenTM", "LeGrad", "AttCAT"):
        assert attribute(model, PICTURES, text, method, start="visual.ln_pre").scores.isfinite().all()
    with pytest.raises(ValueError, match="doesn't run before the first block"):
        attribute(model, PICTURES, text, "IxG", start="visual.ln_post")


# ---- the four defects of the well-known gradient rollout script ------------------------------------------------------
# Each check passes on our method and fails on a version of it that has the defect.


def script(model, x, defect, state=None):
    """Gradient rollout as a recorder of maps and gradients would do it, with one of the script's defects."""
    maps, gradients = state if defect == "state" else ([], [])
    logit = model(x)[0, 2]
    fresh = [block.map for block in model.blocks]
    maps += [m.detach()[0].numpy() for m in fresh]
    found = [g[0].numpy() for g in torch.autograd.grad(logit, fresh)]
    gradients += found[::-1] if defect == "order" else found
    result = np.eye(3)
    for a, d in zip(maps, gradients, strict=True):
        a = (np.maximum((a * d).mean(0), 0) + np.eye(3)) / 2
        a = a / (a.sum(-1) if defect == "keepdim" else a.sum(-1, keepdims=True))
        result = a @ result
    return result[0]


def check_order(rollout, model, x, n):
    np.testing.assert_allclose(rollout(model, x), numpy_rollout(positive_mean(n)), rtol=1e-5, atol=1e-6)


def check_state(rollout, model, x, n):
    first = rollout(model, x)
    rollout(model, torch.randn(1, 3, 4))
    np.testing.assert_allclose(rollout(model, x), first, rtol=1e-6)


def check_rows_sum_to_one(rollout, model, x, n):
    assert rollout(model, x).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "defect, check", [("order", check_order), ("state", check_state), ("keepdim", check_rows_sum_to_one)]
)
def test_gradient_rollout_lacks_the_scripts_defect(three_tokens, defect, check):
    model, x, n = three_tokens
    check(partial(ours, method="Gradient Attention Rollout"), model, x, n)
    check(partial(script, defect=None), model, x, n)
    with pytest.raises(AssertionError):
        check(partial(script, defect=defect, state=([], [])), model, x, n)


def test_fused_attention_is_seen_too():
    """The script hooks `attn_drop`, which never runs when attention is fused: it records nothing at all."""
    model = tiny_vit()
    maps = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, args, result: maps.append(result.detach()))
    model(PICTURES)
    assert not maps, "fused attention hides from the script"
    fused = attribute(model, PICTURES, 3, "Gradient Attention Rollout").scores
    for block in model.blocks:
        block.attn.fused_attn = False
    model(PICTURES)
    assert len(maps) == 3
    torch.testing.assert_close(attribute(model, PICTURES, 3, "Gradient Attention Rollout").scores, fused)
    run = record(Request(model, Inputs(PICTURES), 3, reads=frozenset({MAPS})))
    for seen, expected in zip(run.attention, maps[:3], strict=True):
        torch.testing.assert_close(seen, expected)


# ---- rules re-derived ------------------------------------------------------------------------------------------------


def llama_by_hand(model, h, target, gate_constant=False):
    """A Llama written out with the rules as detachments: RMSNorm's denominator, the gate's slope, queries and keys.
    gate_constant: SwiGLU's gate gets no gradient, and the other factor all of it."""
    config, base = model.config, model.model
    cos, sin = base.rotary_emb(h, torch.arange(h.shape[1])[None])

    def norm(layer, x):
        return layer.weight * x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt().detach()

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    for layer in base.layers:
        x, attention = norm(layer.input_layernorm, h), layer.self_attn
        projections = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        q, k, v = (p.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
        k, v = (y.repeat_interleave(2, 1) for y in (rotate(k), v))
        logits = rotate(q) @ k.transpose(-1, -2) / attention.head_dim**0.5
        future = torch.ones_like(logits, dtype=torch.bool).triu(1)
        h = h + attention.o_proj(
            (logits.masked_fill(future, -torch.inf).softmax(-1).detach() @ v).transpose(1, 2).flatten(2)
        )
        x, mlp = norm(layer.post_attention_layernorm, h), layer.mlp
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if gate_constant:
            product = F.silu(gate).detach() * up
        else:
            product = (gate * gate.sigmoid().detach()) * up / 2
            product = product + product.detach()
        h = h + mlp.down_proj(product)
    return model.lm_head(norm(base.norm, h))[:, -1, target]


@pytest.mark.parametrize("rules, gate_constant", [(LIBRA, False), (CP_LRP, True)], ids=["Libra", "CP-LRP"])
def test_rules_on_llama_equal_detachments_by_hand(rules, gate_constant):
    model = tiny_llama()
    h = model.model.embed_tokens(IDS).detach().requires_grad_()
    output = llama_by_hand(model, h, 7, gate_constant)
    expected = (h * torch.autograd.grad(output.sum(), h)[0]).sum(-1)
    result = attribute(model, IDS, 7, "IxG", rules)
    assert result.promises_completeness and (result.completeness_error < 1e-5).all()
    torch.testing.assert_close(result.output, output.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.scores, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rules", [ATTN_LRP, ALI_LRP, CP_LRP, DECOMPX, LIBRA.without("norm"), RESIDUAL])
def test_every_rule_set_says_something_of_its_own(rules):
    model = tiny_llama()
    scores = attribute(model, IDS, 7, "IxG", rules).scores
    for other in (PLAIN, LIBRA):
        assert (scores - attribute(model, IDS, 7, "IxG", other).scores).abs().max() > 1e-4 * scores.abs().max()


def test_decompx_is_the_propagation_of_a_vector_for_each_token():
    """DecompX forwards: every token's own part of the stream goes through layers whose gates are constant."""
    model = tiny_vit()
    h = model._pos_embed(model.patch_embed(PICTURES[:1])).detach()[0]
    parts = torch.diag_embed(torch.ones(len(h)))[..., None] * h  # (token it comes from, token it lies at, channels)

    def norm(layer, x, parts):
        scale = layer.weight / (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt()
        return layer(x), (parts - parts.mean(-1, keepdim=True)) * scale

    for block in model.blocks:
        x, p = norm(block.norm1, h, parts)
        heads, size = block.attn.num_heads, h.shape[1] // block.attn.num_heads
        q, k, v = block.attn.qkv(x).unflatten(-1, (3, heads, size)).permute(1, 2, 0, 3)
        values = (p @ block.attn.qkv.weight.T).unflatten(-1, (3, heads, size))[:, :, 2]
        maps = (q @ k.mT / size**0.5).softmax(-1)
        attended = torch.einsum("hqk,skhc->sqhc", maps, values).flatten(-2)
        h = h + block.attn.proj((maps @ v).transpose(0, 1).flatten(-2))
        parts = parts + attended @ block.attn.proj.weight.T
        x, p = norm(block.norm2, h, parts)
        hidden = block.mlp.fc1(x)
        slope = F.gelu(hidden) / hidden
        h = h + block.mlp.fc2(F.gelu(hidden))
        parts = parts + (slope * (p @ block.mlp.fc1.weight.T)) @ block.mlp.fc2.weight.T
    _, parts = norm(model.norm, h, parts)
    expected = (parts[:, 0] @ model.head.weight.T)[1:, 3]
    result = attribute(model, PICTURES[:1], 3, "IxG", DECOMPX)
    torch.testing.assert_close(result.scores[0], expected.detach(), rtol=1e-3, atol=1e-5)


# ---- one clear error -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(method="FullGrad++"), "unknown method"),
        (dict(method="IxG", head_fusion="max"), "no option head_fusion"),
        (dict(method="Attention Rollout", head_fusion="median"), "unknown head_fusion"),
        (dict(method="Attention Rollout", discard_ratio=1), r"\[0, 1\)"),
        (dict(method="IG", steps=0), "at least one step"),
        (dict(method="SmoothGrad", samples=0), "at least one step or sample"),
        (dict(target=5), "0..4"),
        (dict(target=torch.tensor([1, 2, 3])), "one for each of 2"),
        (dict(target=torch.ones(7)), "must end in 5"),
        (dict(target=lambda logits: logits), r"one number per sample"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        attribute(tiny_vit(), PICTURES, **{"target": 3, **arguments})


def test_models_that_do_not_fit():
    side_by_side = GPTNeoXConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(ValueError, match="side by side"):
        attribute(GPTNeoXForCausalLM(side_by_side).eval(), IDS, 0, "TokenTM")
    with pytest.raises(ValueError, match="no grid"):
        _ = attribute(tiny_llama(), IDS, 0).maps
    with pytest.raises(ValueError, match="training mode"):
        attribute(tiny_vit().train(), PICTURES, 3)
    with pytest.raises(ValueError, match="no list of blocks"):
        attribute(nn.Linear(2, 2).eval(), torch.randn(1, 2), 0)


def test_many_methods_on_one_recording_equal_one_by_one():
    model, methods = tiny_vit(), {"IxG": {}, "GenAtt": {}, "LeGrad": {}, "Attention Rollout": {"discard_ratio": 0.5}}
    together = attribute_many(model, PICTURES, 3, methods)
    for name, options in methods.items():
        alone = attribute(model, PICTURES, 3, name, **options)
        torch.testing.assert_close(together[name].scores, alone.scores)
        torch.testing.assert_close(together[name].maps.flatten(1), alone.scores)


def test_methods_combined_with_integrated_gradients_share_its_forward_passes():
    model, passes = tiny_vit(), []
    attribute(model, PICTURES, 3, "IxG", PLAIN)  # a model is looked round once
    model.register_forward_hook(lambda *_: passes.append(1))
    methods = {"IG": {"steps": 4}} | {f"IG {name}": {"steps": 4} for name in AVERAGED}
    together = attribute_many(model, PICTURES, 3, methods, PLAIN)
    assert len(passes) == 1 + 4 + 1, "one to record, four along the path, one at its beginning"
    for name, options in methods.items():
        torch.testing.assert_close(together[name].scores, attribute(model, PICTURES, 3, name, PLAIN, **options).scores)
    again = attribute_many(model, PICTURES, 3, {"IG": {"steps": 4}, "IG GenAtt": {"steps": 7}}, PLAIN)
    alone = attribute(model, PICTURES, 3, "IG GenAtt", PLAIN, steps=7)
    torch.testing.assert_close(again["IG GenAtt"].scores, alone.scores)


@pytest.mark.parametrize("first", ["IxG", "HiResCAM", "FullGrad+"])
def test_methods_share_a_pass_in_any_order(first):
    """The backward pass of the first frees the graph that holds the maps which the second reads."""
    model = load_demo("vit").model
    pixels = torch.rand(1, 3, 64, 64)
    for second in ("AttCAT", "RawAtt", "Attention Rollout"):
        together = attribute_many(model, pixels, 1, [first, second])
        for method, result in together.items():
            torch.testing.assert_close(result.scores, attribute(model, pixels, 1, method).scores)
