"""What is asked of inputs, forward pass and results: a bad call gets one clear error, a good one none."""

import pytest
import torch
import torch.nn.functional as F

from libragrad_minimal import audit, balanced, libra_grad
from libragrad_minimal.engine import backward

BAD_CALLS = {
    "not one scalar a sample": (lambda m, x: libra_grad(m(x), x), "shape \\(2, 3\\).*choose a logit"),
    "no graph": (lambda m, x: libra_grad(m(x).detach()[:, 0], x), "no graph.*no_grad"),
    "input without grad": (
        lambda m, x: libra_grad(m(x)[:, 0], torch.randn(2, 5, 8)),
        "does not require grad.*requires_grad_",
    ),
    "input of another graph": (lambda m, x: libra_grad(m(x)[:, 0], x.clone()), "not in the graph.*very tensor"),
    "audit of another graph": (lambda m, x: audit(m(x), x.clone()), "not in the graph"),
    "second derivative": (
        lambda m, x: libra_grad(m(x)[:, 0], x, create_graph=True),
        "create_graph=True is not supported",
    ),
    "NaN in the forward pass": (lambda m, x: libra_grad(m(x * float("nan"))[:, 0], x), "output 0 is nan.*forward pass"),
    "infinite in the forward pass": (lambda m, x: libra_grad((x.sum((1, 2)) * 1e308) ** 3, x), "output 0 is -?inf"),
    "infinite in the backward pass": (
        lambda m, x: libra_grad(torch.where(x > 9, x.abs().sqrt() * 0, (x * 0).sqrt()).sum(), x),
        "not finite",
    ),
    "batch norm in training": (
        lambda m, x: libra_grad(F.batch_norm(x, None, None, training=True).sum(), x),
        "batch norm.*model.eval",
    ),
    "dropout": (lambda m, x: libra_grad(F.dropout(x, 0.5, training=True).sum(), x), "dropout was active.*model.eval"),
    "saturated tanh": (lambda m, x: libra_grad(torch.tanh(x.float() * 100).sum(), x), r"tanh.*flat.*observed\(\)"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_gets_one_clear_error(name, model, x):
    call, message = BAD_CALLS[name]
    with pytest.raises((ValueError, ArithmeticError), match=f"(?s){message}"):
        call(model, x)
    assert not backward._owners


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: libra_grad({"logits": m(x)}, x), "a dict of str.*output.logits"),
        (lambda m, x: libra_grad(m(x)[:, 0], x, "LIBRA"), "rules must be LIBRA.*got 'LIBRA'"),
    ],
)
def test_wrong_types_get_one_clear_error(call, message, model, x):
    with pytest.raises(TypeError, match=message):
        call(model, x)


def test_complex_outputs_and_no_inputs():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match="output 0 is complex: explain a real number"):
        libra_grad((x * 1j).sum(), x)
    with pytest.raises(ValueError, match="no inputs: name the tensors"):
        libra_grad((x * 2).sum(), ())


def test_inference_mode(model, x):
    output = model(x)[:, 0]
    with torch.inference_mode(), pytest.raises(ValueError, match="inside torch.inference_mode"):
        libra_grad(output, x)


def test_no_second_derivative_inside_a_balanced_block(model, x):
    output = model(x)[:, 0].sum()
    with balanced(output, x), pytest.raises(ValueError, match="create_graph=True"):
        torch.autograd.grad(output, x, create_graph=True)


def test_freed_graph(model, x):
    output = model(x)[:, 0]
    libra_grad(output, x)
    with pytest.raises(RuntimeError, match="has been freed.*retain_graph=True"):
        libra_grad(output, x)


def test_a_saturated_tanh_that_nobody_asked_about(x):
    capped = torch.tanh(torch.cat([x[0, 0], 1000 * x[0, 1]]))
    torch.testing.assert_close((x * libra_grad(capped[0], x)[0]).sum(), capped[0])


def test_dropout_in_attention_is_refused():
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    output = F.scaled_dot_product_attention(x, x, x, dropout_p=0.3).sum()
    with pytest.raises(ValueError, match="dropout was active"):
        libra_grad(output, x)


def test_masks_of_ones_and_zeros_are_not_dropout(x):
    mask = (torch.rand(2, 5, 8) > 0.5).double()
    torch.testing.assert_close(libra_grad((x * mask).sum(), x)[0], mask)


def test_what_the_model_changed_in_place_has_no_derivative_of_any_kind(x):
    h = torch.exp(x)
    output = (h * h).sum((1, 2))
    h.detach().add_(1)
    with pytest.raises(RuntimeError, match="changed in place what its own derivative needs.*change a copy"):
        libra_grad(output, h)
    h = torch.exp(x)
    output = (h * h).sum((1, 2))
    h.clone().detach().add_(1)
    (gradient,) = libra_grad(output, h)
    torch.testing.assert_close((h * gradient).sum((1, 2)), output)
