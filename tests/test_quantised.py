"""Layers of 8 bits: what bitsandbytes does to activations is rounded, and completeness counts the rounding.

Beside the package, where it is installed, a function of its name does what its paper says (Dettmers et al. 2022).
"""

import copy
import sys
from types import ModuleType

import pytest
import torch
from models import IDS, perturbed
from test_precision import Encoder, off
from torch import nn

from libragrad_minimal import UnsupportedOperation, additive_constants, attribute, audit, libra_grad, observed


def vectorwise_quant(x, threshold=0.0):
    """Rows in 127 steps of their largest entry; columns that hold an outlier are left out."""
    outliers = (x.abs() >= threshold).any(0).nonzero()[:, 0] if threshold else None
    kept = x.float() if outliers is None else x.float().index_fill(1, outliers, 0.0)
    largest = kept.abs().amax(1)
    return (kept * 127 / largest[:, None]).round().to(torch.int8), largest, outliers


class State:
    def __init__(self, weight, threshold):
        self.CB, self.SCB, _ = vectorwise_quant(weight)
        self.threshold = threshold


class MatMul8bitLt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state):
        ctx.shape, x = x.shape, x.flatten(0, -2)
        codes, largest, outliers = vectorwise_quant(x.half(), state.threshold)
        rounded = codes * (largest / 127)[:, None]
        if outliers is not None:
            rounded[:, outliers] = x[:, outliers].float()
        ctx.dequantised = state.CB * (state.SCB / 127)[:, None]
        ctx.state, ctx.tensors, ctx.dtype_bias = state, (None, None, x), bias.dtype
        return (rounded @ ctx.dequantised.T + bias).to(x.dtype).unflatten(0, ctx.shape[:-1])

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.dequantised.to(gradient.dtype), None, gradient.flatten(0, -2).sum(0), None


class Linear8bit(nn.Module):
    def __init__(self, layer, threshold):
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach(), requires_grad=False), layer.bias
        self.state = State(self.weight, threshold)

    def forward(self, x):
        return MatMul8bitLt.apply(x, self.weight, self.bias, self.state)


def by_the_paper(layer, threshold):
    return Linear8bit(layer, threshold)


def by_the_package(layer, threshold):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    new = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, has_fp16_weights=False, threshold=threshold
    )
    new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new


@pytest.fixture(params=[by_the_paper, by_the_package])
def layer_of_8_bits(request, monkeypatch):
    if request.param is by_the_paper:
        module = ModuleType("bitsandbytes.autograd._functions")
        module.F = ModuleType("functional")
        module.F.int8_vectorwise_quant = vectorwise_quant
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(MatMul8bitLt, "__module__", module.__name__)
        monkeypatch.setattr(Linear8bit, "__module__", "bitsandbytes.nn.modules")
    return request.param


def quantised(layer_of_8_bits, threshold=0.0):
    torch.manual_seed(0)
    model = perturbed(Encoder())
    exact = copy.deepcopy(model)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, layer_of_8_bits(getattr(block, name), threshold))
    return model.to("cpu").eval(), exact


@pytest.mark.parametrize("threshold", [0.0, 2.5], ids=["all rounded", "outliers"])
def test_rounded_activations_are_complete(layer_of_8_bits, threshold):
    layer = layer_of_8_bits(nn.Linear(16, 5), threshold).to("cpu").eval()
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = layer(x).sum((1, 2))
    parts = (x, *additive_constants(output, x))
    gradients = libra_grad(output, parts, retain_graph=True)
    total = sum((t * g).sum() for t, g in zip(parts, gradients, strict=True))
    torch.testing.assert_close(total, output.sum(), rtol=1e-4, atol=0)  # the package writes 1/127^2 with five digits
    (plain,) = torch.autograd.grad(output.sum(), x)
    assert 1e-3 < off(gradients[0], plain) < 0.1


def test_a_model_of_8_bits_is_complete_and_near_the_exact_one(layer_of_8_bits):
    model, exact = quantised(layer_of_8_bits)
    result, expected = attribute(model, IDS, 1), attribute(exact, IDS, 1)
    assert (result.completeness_error < 1e-4 * result.output.abs()).all()
    assert off(result.scores, expected.scores) < 0.1


def test_frozen_biases_count_too(layer_of_8_bits):
    model, _ = quantised(layer_of_8_bits)
    expected = attribute(model, IDS, 1).scores
    model.requires_grad_(False)
    biases = [block.up.bias for block in model.blocks]
    torch.testing.assert_close(attribute(model, IDS, 1).scores, expected)
    assert all(block.up.bias is bias for block, bias in zip(model.blocks, biases, strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(2, 16, requires_grad=True)
    with observed():  # which can't look into other people's functions
        output = model.blocks[0].up(x).sum(1)
    assert ("MatMul8bitLt", "balanced (activation), and adds a constant without a gradient", 1) in audit(output, x).rows


def test_an_operator_without_a_derivative_is_refused_with_its_cure():
    library = torch.library.Library("libragrad_tests", "DEF")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: 2 * x.detach(), "CPU")
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(UnsupportedOperation, match="WarnNotImplemented.*explain the model as it was before"):
        libra_grad(torch.ops.libragrad_tests.doubled(x)[:, 0], x)
    (gradient,) = libra_grad((2 * x)[:, 0], x)
    assert torch.equal(gradient[:, 0], torch.full((2,), 2.0))
