"""What each method is defined to be: in NumPy on a model made by hand, and on cases worked out by hand."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from models import PICTURES, tiny_vit
from torch import nn

from libragrad_minimal.attribution import attribute
from libragrad_minimal.engine import ATTN_LRP, PLAIN
from libragrad_minimal.families import Inputs
from libragrad_minimal.methods import AVERAGED
from libragrad_minimal.recording import MAPS, Request, record

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
