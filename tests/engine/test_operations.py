"""What is known of an operation: a custom function is no native one, register_rule can say what the table can."""

import pytest
import torch
import torch.nn.functional as F
from models import Twice
from torch import nn

from libragrad_minimal import UnsupportedOperation, audit, libra_grad, register_rule
from libragrad_minimal.engine import operations


def named(name, forward, backward):
    """A custom autograd function of any name."""
    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


NATIVE_NAMES = (
    "Linear Copy Gather Scatter Clone Mul Abs Sort Sum View Div Sqrt Std Relu Threshold Convolution Silu Gelu Tanh Pow "
    "Softmax Sigmoid NativeLayerNorm Addmm Mm Cat Where Norm CopySlices NativeDropout RreluWithNoise MaskedFill Sqrt "
    "CudnnBatchNorm NativeBatchNorm AccumulateGrad GeLUFunction BackwardHookFunction MatMul4Bit"
).split()


@pytest.mark.parametrize("name", NATIVE_NAMES)
def test_a_custom_function_is_never_taken_for_pytorchs_own(name, x, monkeypatch):
    monkeypatch.setattr(operations, "TAUGHT", {})

    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + x**2

    function = named(name, forward, lambda ctx, g: g * (1 + 2 * ctx.saved_tensors[0]))
    output = function.apply(x).sum()
    assert not audit(output, x).complete
    with pytest.raises(UnsupportedOperation, match=rf"{name} \(1x\).*register_rule\('{name}'"):
        libra_grad(output, x, retain_graph=True)
    register_rule(name, "balanced", "activation", lambda node, gi, go: (go[0] * (1 + node.saved_tensors[0]),))
    torch.testing.assert_close((x * libra_grad(output, x)[0]).sum(), output)
    torch.testing.assert_close(libra_grad(F.silu(x).sum(), x)[0], torch.sigmoid(x).detach())  # PyTorch's own as ever


def test_user_teaches_a_rule(x, monkeypatch):
    monkeypatch.setattr(operations, "TAUGHT", {})
    register_rule("Twice", "linear")
    assert (libra_grad(Twice.apply(x).sum(), x)[0] == 2).all()
    with pytest.raises(ValueError, match="'Linear' is no role"):
        register_rule("Other", "Linear")
    with pytest.raises(ValueError, match="needs its complete backward"):
        register_rule("Other", "balanced")
    with pytest.raises(ValueError, match="needs the rule"):
        register_rule("Other", "gate")


def test_a_rule_for_one_class_is_not_one_for_its_namesake(x, monkeypatch):
    monkeypatch.setattr(operations, "TAUGHT", {})
    first, second = (named("Twin", lambda ctx, x: 2 * x, lambda ctx, g: 2 * g) for _ in range(2))
    register_rule(first, "linear")
    assert (libra_grad(first.apply(x).sum(), x)[0] == 2).all()
    with pytest.raises(UnsupportedOperation, match="Twin"):
        libra_grad(second.apply(x).sum(), x)


class Ratio(torch.autograd.Function):
    @staticmethod
    def forward(ctx, below, above):
        ctx.save_for_backward(below, above)
        return above / below

    @staticmethod
    def backward(ctx, g):
        below, above = ctx.saved_tensors
        return -g * above / below**2, g / below


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_register_rule_can_say_what_the_table_can(x, monkeypatch):
    monkeypatch.setattr(operations, "TAUGHT", {})
    register_rule(Ratio, "division", streams=(1,))
    below = (x.square() + 1).detach().requires_grad_()
    gradients = libra_grad(Ratio.apply(below, x).sum(), (below, x))
    torch.testing.assert_close(gradients, (torch.zeros_like(x), 1 / below.detach()))
    register_rule(Cube, "power", degree=3)
    torch.testing.assert_close(libra_grad(Cube.apply(x).sum(), x)[0], x.detach() ** 2)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return b, a  # the saved tensors themselves, for g = 1


def test_a_taught_product_is_halved_out_of_place(x, monkeypatch):
    monkeypatch.setattr(operations, "TAUGHT", {})
    register_rule("Product", "product")
    output = Product.apply(2 * x, 3 * x).sum()
    for _ in range(2):
        torch.testing.assert_close(libra_grad(output, x, retain_graph=True)[0], 6 * x.detach())


def test_a_constant_operand_of_a_function_that_was_taught_has_a_row(monkeypatch):
    class Plus(torch.autograd.Function):
        @staticmethod
        def forward(context, x, constant):
            return x + constant

        @staticmethod
        def backward(context, gradient):
            return gradient, gradient

    monkeypatch.setattr(operations, "TAUGHT", {})
    register_rule(Plus, "linear")
    x = torch.randn(2, 3, requires_grad=True)
    assert "adds a constant without a gradient" in str(audit(Plus.apply(x, torch.ones(3)).sum(1), x))
    assert "adds a constant" not in str(audit(Plus.apply(x, 2 * x).sum(1), x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("Own", "gate", "nonsense"), "'nonsense' is no rule; there are attention, activation, norm, product"),
        (("Own", "shape"), "'shape' is no role; there are linear"),
        (("MulBackward0", "linear"), "'MulBackward0' is no operation.*without 'Backward'"),
        ((nn.ReLU, "linear"), "ReLU.*is no operation"),
        (("Own", "balanced", "norm", 3), "backward is .*got 3"),
    ],
)
def test_register_rule_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        register_rule(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(streams=3), "streams are numbers of operands"),
        (dict(factors=(0, 0)), "a product has two factors"),
        (dict(degree=0), "a number that isn't 0, got 0"),
    ],
)
def test_register_rule_checks_its_options(options, message):
    with pytest.raises(ValueError, match=message):
        register_rule("Own", "product", **options)


@pytest.mark.parametrize(
    "rule, message",
    [
        (dict(role="product", factors=(5, 9)), "told of operand 9 of Twice, which has 1"),
        (dict(role="linear", backward=lambda node, mine, given: None), "must return a tuple of gradients"),
        (dict(role="linear", backward=lambda node, mine, given: (given[0].sum(),)), r"of the shapes \(\(2, 3\),\)"),
    ],
)
def test_a_rule_that_does_not_fit_is_found_when_it_is_used(rule, message, monkeypatch):
    monkeypatch.setattr(operations, "TAUGHT", {})
    register_rule("Twice", **rule)
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        libra_grad(Twice.apply(x).sum(1), x)
