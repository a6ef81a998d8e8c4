"""`attribute`: every method on every kind of model, what scores add up to, rules against forward passes by hand."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from models import PICTURES, TEXT, perturbed, tiny_clip, tiny_gpt2, tiny_hf_vit, tiny_llama, tiny_vit
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPTNeoXConfig, GPTNeoXForCausalLM

from libragrad_minimal import libra_grad
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


def tiny_swin() -> nn.Module:
    config = dict(img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 2), num_heads=(1, 2, 2), num_classes=5)
    return perturbed(timm.models.SwinTransformer(**config))


def tiny_mixer() -> nn.Module:
    return perturbed(timm.models.MlpMixer(num_classes=5, img_size=32, patch_size=8, embed_dim=24, num_blocks=2))


def tiny_siglip() -> nn.Module:
    return tiny_vit(class_token=False, global_pool="map")


IDS = torch.tensor([[1, 5, 9, 2, 8, 4], [3, 3, 7, 20, 29, 0]])
MODELS = {
    "vit": (tiny_vit, PICTURES, 3, (4, 4)),
    "registers": (partial(tiny_vit, reg_tokens=4), PICTURES, torch.tensor([0, 4]), (4, 4)),
    "siglip": (tiny_siglip, PICTURES, 3, (4, 4)),
    "mean pooling": (partial(tiny_vit, class_token=False, global_pool="avg"), PICTURES, 3, (4, 4)),
    "hf vit": (tiny_hf_vit, PICTURES, 3, (4, 4)),
    "clip": (tiny_clip, PICTURES, F.normalize(torch.arange(24.0), dim=0), (4, 4)),
    "swin": (tiny_swin, PICTURES.repeat(1, 1, 2, 2), 3, (16, 16)),
    "mixer": (tiny_mixer, PICTURES, 3, (4, 4)),
    "llama": (tiny_llama, IDS, 7, None),
    "gpt2": (tiny_gpt2, IDS, 7, None),
}
WITHOUT_MAPS = {"swin": "windows", "mixer": "no attention maps"}
NEEDS_MAPS = {name for name in METHODS if MAPS in reads_of(name)}
ALONE = [name for name in METHODS if not name.startswith(("IG ", "SmoothGrad "))]
FOR_TEXTS = [name for name in METHODS if not name.startswith("Occluded ")]


# ---- every method on every kind of model -----------------------------------------------------------------------------


EVERY = [(method, kind) for kind in MODELS for method in ALONE if method in FOR_TEXTS or kind not in ("llama", "gpt2")]
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


@pytest.mark.parametrize("method", FOR_TEXTS)
def test_padding_gets_exactly_nothing(method):
    model, options = tiny_llama(), FEW_STEPS.get(method, {})
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = attribute(model, {"input_ids": IDS, "attention_mask": mask}, 7, method, **options)
    assert (padded.scores[0, :2] == 0).all()
    if method != "Random" and not method.startswith("SmoothGrad"):  # whose noise knows nothing of padding
        alone = attribute(model, IDS[:1, 2:], 7, method, **options)
        torch.testing.assert_close(padded.scores[0, 2:], alone.scores[0], rtol=1e-3, atol=1e-5)


def test_legrad_of_padded_text():
    """The mean token leaves padding out, and classes of each sample's own are read."""
    model = tiny_llama()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    both = attribute(model, {"input_ids": IDS, "attention_mask": mask}, torch.tensor([7, 9]), "LeGrad").scores
    alone = attribute(model, IDS[:1, 2:], 7, "LeGrad").scores
    torch.testing.assert_close(both[0, 2:], alone[0], rtol=1e-4, atol=1e-6)


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


def test_an_answer_that_is_read_off_padding_is_told(recwarn):
    """BERT's class token comes first: texts that are padded on the left hide it."""
    torch.manual_seed(0)
    model = perturbed(BertForSequenceClassification(BertConfig(**TEXT)))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    for method in ("IxG", "FullGrad+", "GenAtt"):
        attribute(model, {"input_ids": IDS, "attention_mask": mask}, 1, method)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="answer to sample 0 depends on its padding.*padded on the side"):
        attribute(model, {"input_ids": IDS, "attention_mask": mask.flip(1)}, 1, "IxG")


def test_targets_are_linear():
    model = tiny_vit()
    cat, dog = attribute(model, PICTURES, 1), attribute(model, PICTURES, 4)
    weights = torch.tensor([0.0, 1, 0, 0, -1])
    for target in (weights, weights.expand(2, -1), lambda logits: logits[:, 1] - logits[:, 4]):
        contrast = attribute(model, PICTURES, target)
        torch.testing.assert_close(contrast.scores, cat.scores - dog.scores, rtol=1e-4, atol=1e-5)


def test_clip_explains_the_similarity():
    model, text = tiny_clip(), F.normalize(torch.arange(24.0), dim=0)
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


# ---- where the tokens begin ------------------------------------------------------------------------------------------


def test_tokens_before_the_first_norm_of_clip():
    model, text = tiny_clip(), F.normalize(torch.arange(24.0), dim=0)
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
