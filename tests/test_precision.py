"""Scores of models in half, double and mixed precision, and under autocast, against the same model in double."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import IDS, perturbed
from torch import nn

from libragrad_minimal import attribute
from libragrad_minimal.attribution import attribute_many
from libragrad_minimal.methods import METHODS
from libragrad_minimal.recording import MAPS

OF_MAPS = [name for name in METHODS if MAPS in METHODS[name].reads and not name.startswith(("IG", "SmoothGrad"))]


class Block(nn.Module):
    """It works in the precision of its norms, whatever it is given."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x):
        x = x.to(self.norm1.weight.dtype)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(200, 16), nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(16, 5)

    def forward(self, ids):
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1).to(self.head.weight.dtype))


def encoder(**options):
    torch.manual_seed(0)
    return perturbed(Encoder(**options))


def in_double(model):
    return copy.deepcopy(model).double()


def off(scores, expected):
    return float((scores - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", ["IxG", "FullGrad", "FullGrad+", "SkipPLUS"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_a_constant_has_its_place_in_half_precision_too(dtype, limit, method):
    model = encoder().to(dtype)
    expected = attribute(in_double(model), IDS, 1, method).scores
    assert off(attribute(model, IDS, 1, method).scores, expected) < limit


def test_methods_of_maps_in_double_precision():
    single, double = attribute_many(encoder(), IDS, 1, OF_MAPS), attribute_many(encoder().double(), IDS, 1, OF_MAPS)
    for method in OF_MAPS:
        assert double[method].scores.dtype == torch.float64
        assert off(single[method].scores, double[method].scores) < 1e-5, method


def test_blocks_of_different_precision():
    model = encoder(depth=3)
    for block, dtype in zip(model.blocks, (torch.bfloat16, torch.float64, torch.float16), strict=True):
        block.to(dtype)
    methods = ["FullGrad+", *(method for method in OF_MAPS if method != "TokenTM")]  # it reads what was added to what
    mixed, double = (attribute_many(one, IDS, 1, methods) for one in (model, in_double(model)))
    for method, result in mixed.items():
        assert off(result.scores, double[method].scores) < 0.03, method


def test_methods_work_in_single_precision_under_autocast():
    model, methods = encoder(), ["GenAtt", "TokenTM", "Attention Rollout", "LeGrad", "IG"]
    expected = attribute_many(model, IDS, 1, methods)
    with torch.autocast("cpu", torch.bfloat16):
        results = attribute_many(model, IDS, 1, methods)
        assert torch.equal(results["IG"].output, model(IDS)[:, 1])
    for method, result in results.items():
        assert result.scores.dtype == torch.float32
        assert off(result.scores, expected[method].scores) < (0.01 if method in ("IG", "LeGrad") else 1e-3), method


def test_rounding_on_the_way_is_no_incompleteness(recwarn):
    model = encoder().to(torch.bfloat16)
    model.head.float()  # the output's own precision tells nothing of it
    result = attribute(model, IDS, 1)
    assert (result.completeness_error > 1e-3 * result.output.abs()).any()
    assert not [warning for warning in recwarn if "is not complete" in str(warning.message)]


def test_gradients_that_float16_rounds_away_are_told(recwarn):
    model = encoder().to(torch.float16)
    with torch.no_grad():
        model.head.weight.mul_(1e-5)
    expected = attribute(in_double(model), IDS, 1, "IxG").scores
    assert not recwarn.list
    with pytest.warns(UserWarning, match="too small for float16.*bfloat16 or float32"):
        scores = attribute(model, IDS, 1, "IxG").scores
    assert off(scores, expected) > 0.1
    assert off(attribute(model.to(torch.bfloat16), IDS, 1, "IxG").scores, expected) < 0.03
