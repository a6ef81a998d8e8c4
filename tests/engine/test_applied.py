"""A formula at work: wherever its saved values live, whatever their precision; it writes into nobody's gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from libragrad_minimal import libra_grad


def test_non_reentrant_checkpointing(model, x):
    expected = libra_grad(model(x)[:, 0], x)[0]
    output = model(x, run=lambda block, x: checkpoint(block, x, use_reentrant=False))[:, 0]
    torch.testing.assert_close(libra_grad(output, x)[0], expected)


def test_selective_checkpointing(model, x):
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    keep = {"context_fn": lambda: create_selective_checkpoint_contexts([torch.ops.aten.mm.default])}
    expected = libra_grad(model(x)[:, 0], x)[0]
    output = model(x, run=lambda block, x: checkpoint(block, x, use_reentrant=False, **keep))[:, 0]
    try:
        (gradient,) = libra_grad(output, x)
    except RuntimeError as error:
        assert "without context_fn" in str(error)
    else:
        torch.testing.assert_close(gradient, expected)


def test_saved_tensors_offloaded_to_cpu(model, x):
    expected = libra_grad(model(x)[:, 0], x)[0]
    with torch.autograd.graph.save_on_cpu():
        output = model(x)[:, 0]
    torch.testing.assert_close(libra_grad(output, x)[0], expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_precisions(model, x, dtype, tolerance):
    """Gradients keep their dtype, and lose no more than the forward pass in that dtype does."""
    exact = libra_grad(model(x)[:, 0], x)[0]
    rounded = x.detach().to(dtype).requires_grad_()
    gradient = libra_grad(model.to(dtype)(rounded)[:, 0], rounded)[0]
    assert gradient.dtype == dtype
    assert (gradient.double() - exact).norm() / exact.norm() < tolerance


def test_half_precision_slope_at_tiny_arguments():
    """f(x)/x computed in float16 itself is 0 or NaN here; 1/2 is right."""
    x = torch.full((4,), 6e-8, dtype=torch.float16, requires_grad=True)
    for function in (F.gelu, F.silu, F.mish):
        gradient = libra_grad(function(x).float().sum(), x)[0]
        torch.testing.assert_close(
            gradient.float(), torch.full((4,), 0.5 if function is not F.mish else 0.6), rtol=1e-3, atol=0
        )


def test_a_gradient_that_a_hook_keeps_is_not_written_over(x):
    """GELU, a norm, a product: what a hook of the user's got is still what it was when all is done."""
    y = F.layer_norm(F.gelu(x), (8,)) * F.silu(x)
    kept = []
    stack, seen = [y.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        node.register_hook(lambda gi, go: kept.extend((g, g.clone()) for g in (*gi, *go) if g is not None))
        stack += [child for child, _ in node.next_functions]
    libra_grad(y.sum(), x)
    assert len(kept) > 5
    for gradient, copy in kept:
        assert torch.equal(torch.as_tensor(gradient), copy)


def test_no_stand_in_reaches_a_users_hook_registered_afterwards_or_a_result(x):
    bias = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 8, 8, dtype=torch.float64)
    output = torch.baddbmm(bias, x, weight).sum()  # hands its incoming gradient on to the bias as it is
    for gradient in libra_grad(output, (x, bias)):
        assert type(gradient) is torch.Tensor
