"""How libra_grad behaves: as torch.autograd.grad does, leaving nothing behind, whatever else runs."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from libragrad_minimal import (
    ATTN_LRP,
    LIBRA,
    PLAIN,
    additive_constants,
    balanced,
    libra_grad,
    record_residuals,
)
from libragrad_minimal.engine import backward, operations


def dot(tensors, gradients):
    return sum((t * g).sum() for t, g in zip(tensors, gradients, strict=True)).detach()


def test_complete_with_inputs_and_constants(model, x):
    output = model(x)[:, 1]
    parts = (x, *additive_constants(output, x))
    biases = {p for name, p in model.named_parameters() if name.endswith("bias") or name == "position"}
    biases -= {block.norm2.weight for block in model.blocks}
    assert set(parts[1:]) == biases
    torch.testing.assert_close(dot(parts, libra_grad(output, parts)), output.sum().detach(), rtol=1e-12, atol=0)


def test_same_call_as_autograd(model, x):
    output = model(x)
    weights = torch.randn(2, 3, dtype=torch.float64)
    mine = libra_grad(output, [x], PLAIN, grad_outputs=weights, retain_graph=True)
    torch.testing.assert_close(mine, torch.autograd.grad(output, [x], weights, retain_graph=True), rtol=0, atol=0)
    unused = torch.zeros(1, requires_grad=True)
    assert libra_grad(output.sum(), (x, unused), allow_unused=True, retain_graph=True)[1] is None
    assert libra_grad(output.sum(), (x, unused), materialize_grads=True, retain_graph=True)[1] == 0
    both = libra_grad((output[:, 0], output[:, 1]), x, retain_graph=True)[0]
    torch.testing.assert_close(both, libra_grad(output[:, :2].sum(1), x)[0])


def test_lstm_from_a_zero_state(x):
    lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True).double()
    with torch.backends.mkldnn.flags(enabled=False):
        output = lstm(x)[0][:, -1, 2]
    parts = (x, *additive_constants(output, x))
    torch.testing.assert_close(dot(parts, libra_grad(output, parts)), output.sum().detach(), rtol=1e-9, atol=0)


def test_several_inputs_at_different_depths(model, x):
    hidden = []
    hook = model.blocks[1].register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    output = model(x)[:, 0]
    hook.remove()
    together = libra_grad(output, (x, hidden[0]), retain_graph=True)
    torch.testing.assert_close(together[0], libra_grad(output, x, retain_graph=True)[0])
    torch.testing.assert_close(together[1], libra_grad(output, hidden[0])[0])


def test_batch_equals_single_calls(model, x):
    together = libra_grad(model(x)[:, 2], x)[0]
    for i in range(2):
        alone = x[i : i + 1].detach().requires_grad_()
        torch.testing.assert_close(libra_grad(model(alone)[:, 2], alone)[0][0], together[i], rtol=1e-10, atol=1e-14)


def test_input_that_only_feeds_a_gate_gets_zero():
    gate, stream = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    gradients = libra_grad((torch.sigmoid(gate) * stream).sum(), (gate, stream))
    assert (gradients[0] == 0).all() and (gradients[1] == torch.sigmoid(gate)).all()


def test_weights_receive_the_plain_rule_of_their_layer(model, x):
    """Inside `balanced`, .backward() fills parameters too; biases get the sum of what arrives at their layer."""
    output = model(x)[:, 0]
    with balanced(output, x):
        output.sum().backward(retain_graph=True)
    bias = model.blocks[1].down.bias
    torch.testing.assert_close(bias.grad, libra_grad(output, (x, bias))[1])


# ---- nothing is left behind ------------------------------------------------------------------------------------------


def plain(output, x):
    return torch.autograd.grad(output.sum(), x, retain_graph=True)[0]


def test_balanced_block_serves_several_targets_and_ends(model, x):
    logits = model(x)
    before = plain(logits[:, 0], x)
    one_by_one = [libra_grad(logits[:, c], x, retain_graph=True)[0] for c in range(3)]
    with balanced(logits, x):
        inside = [plain(logits[:, c], x) for c in range(3)]
    torch.testing.assert_close(inside, one_by_one)
    torch.testing.assert_close(plain(logits[:, 0], x), before, rtol=0, atol=0)


def test_calls_nest_on_one_graph(model, x):
    logits = model(x)
    expected = libra_grad(logits[:, 0], x, retain_graph=True)[0]
    halved = libra_grad(logits[:, 0], x, ATTN_LRP, retain_graph=True)[0]
    assert not torch.allclose(expected, halved)
    with balanced(logits, x, ATTN_LRP):
        torch.testing.assert_close(libra_grad(logits[:, 0], x, retain_graph=True)[0], expected)
        with balanced(logits, x):
            torch.testing.assert_close(plain(logits[:, 0], x), expected)
        torch.testing.assert_close(plain(logits[:, 0], x), halved)
    assert not backward._owners


def test_threads_share_one_graph(model, x):
    """Balanced, differently balanced and plain backward passes at once on the same graph, each with its own result."""
    logits = model(x)
    tasks = {
        "libra": lambda: libra_grad(logits[:, 0], x, retain_graph=True)[0],
        "attn_lrp": lambda: libra_grad(logits[:, 0], x, ATTN_LRP, retain_graph=True)[0],
        "plain": lambda: plain(logits[:, 0], x),
    }
    expected = {name: task() for name, task in tasks.items()}
    failures = []

    def repeat(name):
        for _ in range(30):
            if not torch.allclose(tasks[name](), expected[name], rtol=1e-10, atol=1e-14):
                failures.append(name)

    threads = [threading.Thread(target=repeat, args=(name,)) for name in [*tasks, *tasks]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not backward._owners


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupt_leaves_everything_as_it_was(model, x, error, monkeypatch):
    logits = model(x)
    before = plain(logits[:, 0], x)
    state = {name: p.clone() for name, p in model.state_dict().items()}

    def interrupted(node, grad_inputs, grad_outputs):
        raise error("stopped")

    monkeypatch.setitem(operations.OPERATIONS, "NativeLayerNorm", operations.Operation("balanced", "norm", interrupted))
    with pytest.raises(error):
        libra_grad(logits[:, 0], x, retain_graph=True)
    monkeypatch.undo()
    torch.testing.assert_close(plain(logits[:, 0], x), before, rtol=0, atol=0)
    assert not backward._owners
    assert all(p.grad is None for p in model.parameters()) and x.grad is None
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())


def test_graph_is_freed_afterwards(model):
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    output = model(x)[:, 0]
    libra_grad(output, x)
    watch = weakref.ref(output)
    del output
    gc.collect()
    assert watch() is None


def test_forward_is_bit_identical(model, x):
    before = model(x)
    libra_grad(before[:, 0], x)
    assert torch.equal(model(x), before)


def test_module_hooks_are_no_obstacle(model, x):
    expected = libra_grad(model(x)[:, 0], x)[0]
    handle = model.blocks[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    torch.testing.assert_close(libra_grad(model(x)[:, 0], x)[0], expected, rtol=0, atol=0)
    handle.remove()


# ---- properties ------------------------------------------------------------------------------------------------------

MATRIX = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2
LAYERS = {
    "linear": lambda x: x @ MATRIX,
    "relu": lambda x: F.relu(x) + 0.1 * x,
    "gelu": F.gelu,
    "silu": F.silu,
    "norm": lambda x: F.layer_norm(x, (4,)),
    "rms": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
    "unit": lambda x: F.normalize(x, dim=-1),
    "swiglu": lambda x: F.silu(x @ MATRIX) * (x @ MATRIX.T),
    "square": lambda x: x**2,
    "cube": lambda x: (x / 2) ** 3,
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None] @ MATRIX, x[None])[0],
    "eager attention": lambda x: torch.softmax(x @ x.T, -1) @ x,
    "squeeze": lambda x: x * torch.sigmoid(x.mean(0) @ MATRIX),
    "cap": lambda x: 5 * torch.tanh(x / 5),
    "residual": lambda x: x + F.gelu(x @ MATRIX),
    "divide": lambda x: x / (1 + x.abs()),
    "pool": lambda x: torch.cat([x[:2], x.amax(0, keepdim=True), x.mean(0, keepdim=True)]),
}
# large numbers cost a tanh or a softmax its digits, in float64, too
SATURATING = {"cap", "attention", "eager attention"}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6), st.integers(0, 10_000))
def test_euler_any_composition_is_of_degree_one(names, seed):
    """<x, Libra gradient> = f(x): after the repairs every composition behaves as if it were of degree one."""
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y = x
    for name in names:
        if name in SATURATING:
            assume(y.abs().max() < 30)
        y = LAYERS[name](y)
    output = (y * torch.arange(16.0, dtype=torch.float64).reshape(4, 4).cos()).sum()
    if not output.isfinite() or output.abs() > 1e12:
        return
    magnitude = (y.abs().sum() + output.abs()).item()
    total = dot([x], libra_grad(output, x))
    assert abs(total - output).item() <= 1e-9 * max(magnitude, 1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["linear", "relu", "pool"]), min_size=1, max_size=5), st.integers(0, 10_000))
def test_balanced_gradients_of_complete_layers_are_plain(names, seed):
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y = x
    for name in names:
        y = LAYERS[name](y)
    assert torch.equal(libra_grad(y.sum(), x, retain_graph=True)[0], torch.autograd.grad(y.sum(), x)[0])


def test_residual_rule_is_conservative_and_shares_by_sign(model, x):
    from dataclasses import replace

    residual = replace(LIBRA, residual=True)
    with record_residuals():
        output = model(x)[:, 0]
    parts = (x, *additive_constants(output, x))
    total = dot(parts, libra_grad(output, parts, residual))
    torch.testing.assert_close(total, output.sum().detach(), rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="observed.residuals=True"):
        libra_grad(model(x)[:, 0], x, residual)
    # c = 3 + (-1) = 2: shares 2*3 and 1*(-1) of 2*3 - 1 = 5, so a's relevance is 2*6/5 and b's 2*(-1)/5
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))
    with record_residuals():
        c = a + b
    gradients = libra_grad(c, (a, b), residual)
    torch.testing.assert_close(
        torch.stack([a * gradients[0], b * gradients[1]]).detach(), torch.tensor([2.4, -0.4], dtype=torch.float64)
    )


# ---- promises to the rest of the process -----------------------------------------------------------------------------


def test_a_block_balances_the_passes_of_its_own_thread_only():
    x = torch.arange(1.0, 5.0, dtype=torch.float64, requires_grad=True)
    output = (F.gelu(x) * torch.tanh(x)).sum()
    expected = {rules: libra_grad(output, x, rules, retain_graph=True)[0] for rules in (PLAIN, ATTN_LRP, LIBRA)}
    wrong = []

    def repeat(rules):
        for _ in range(100):
            with balanced(output, x, rules):
                if not torch.equal(plain(output, x), expected[rules]):
                    wrong.append(rules)

    with balanced(output, x, ATTN_LRP):
        threads = [threading.Thread(target=repeat, args=(rules,)) for rules in [*expected, *expected]]
        seen = []
        threads.append(threading.Thread(target=lambda: seen.append(plain(output, x))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.testing.assert_close(plain(output, x), expected[ATTN_LRP])
    assert not wrong and torch.equal(seen[0], expected[PLAIN])
    assert not backward._owners


@pytest.mark.parametrize("moment", range(1, 40, 3))
def test_an_interrupt_while_entering_or_leaving_leaves_nothing(model, x, moment, monkeypatch):
    """A KeyboardInterrupt at the n-th line that runs in backward.py while a block is entered and left."""
    import sys

    logits = model(x)
    before = plain(logits[:, 0], x)
    lines = 0

    def interrupt(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != backward.__file__ or frame.f_code.co_name not in ("installed", "take_back"):
            return interrupt if frame.f_code.co_filename == backward.__file__ else None
        if event == "line":
            lines += 1
            if lines == moment:
                raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        with balanced(logits, x):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    torch.testing.assert_close(plain(logits[:, 0], x), before, rtol=0, atol=0)
    assert not backward._owners and backward.innermost() is None
