"""How libra_grad behaves: as torch.autograd.grad does, leaving nothing behind, refusing what it doesn't understand."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import Transformer, Twice
from torch import nn
from torch.utils.checkpoint import checkpoint

from libragrad_minimal import (
    ATTN_LRP,
    LIBRA,
    PLAIN,
    Rules,
    UnsupportedOperation,
    additive_constants,
    audit,
    balanced,
    libra_grad,
    record_residuals,
    register_rule,
)
from libragrad_minimal.engine import backward, operations


@pytest.fixture
def model():
    return Transformer().double().eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)


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


# ---- where saved values live -----------------------------------------------------------------------------------------


def test_non_reentrant_checkpointing(model, x):
    expected = libra_grad(model(x)[:, 0], x)[0]
    output = model(x, run=lambda block, x: checkpoint(block, x, use_reentrant=False))[:, 0]
    torch.testing.assert_close(libra_grad(output, x)[0], expected)


def test_reentrant_checkpointing_is_refused_with_its_cure(model, x):
    output = model(x, run=lambda block, x: checkpoint(block, x, use_reentrant=True))[:, 0]
    with pytest.raises(UnsupportedOperation, match=r"CheckpointFunction \(2x\).*use_reentrant=False"):
        libra_grad(output, x)


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


# ---- refusals and bad input ------------------------------------------------------------------------------------------


REFUSED = {
    "softmax head": (lambda x: x.softmax(-1)[:, 0], r"Softmax \(1x\).*logit.*never a probability"),
    "log-softmax head": (lambda x: x.log_softmax(-1)[:, 0], r"LogSoftmax.*logit"),
    "sigmoid as the stream": (lambda x: torch.sigmoid(x)[:, 0], r"Sigmoid \(1x\)"),
    "gate joins the stream": (lambda x: (lambda s: s * x + s)(torch.sigmoid(x))[:, 0], "Sigmoid"),
    "exponential": (lambda x: x.exp()[:, 0], "Exp"),
    "variance as the stream": (lambda x: torch.var_mean(x, -1)[0], "VarMean"),
    "constant over stream": (lambda x: (1 / x)[:, 0], "Reciprocal|Div"),
    "exponent that depends on the input": (lambda x: (2**x)[:, 0], "Pow"),
    "rounded division": (lambda x: (torch.div(x, 3.0, rounding_mode="floor") + x)[:, 0], "Div"),
    "custom function": (lambda x: Twice.apply(x)[:, 0], r"Twice \(1x\).*register_rule\('Twice'"),
    "norm with a live weight": (lambda x: F.layer_norm(x, (4,), x.mean(0))[:, 0], "NativeLayerNorm"),
    "group norm with a live weight": (lambda x: F.group_norm(x, 2, x.mean(0))[:, 0], "NativeGroupNorm"),
    "batch norm with a live weight": (
        lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), x.mean(0))[:, 0],
        "BatchNorm",
    ),
    "PReLU with a live weight": (lambda x: F.prelu(x, x.mean(0))[:, 0], "PreluKernel"),
    "clamp with a live bound": (lambda x: torch.clamp(x, max=x.mean(0))[:, 0], "Clamp"),
    "number of entries": (lambda x: torch.linalg.vector_norm(x, 0, -1), "LinalgVectorNorm"),
    "ELU in place": (lambda x: F.elu(x * 1, inplace=True)[:, 0], "Elu.*inplace=False"),
    "an activation in place on a slice": (
        lambda x: (lambda y: (torch.sigmoid_(y[:, :1]), y)[1])(x * 1)[:, 0],
        "CopySlices.*out of place",
    ),
    "attention to constants": (
        lambda x: F.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 2, 4))[0, :, 0] + x[:, 0],
        "Attention|Softmax",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_does_not_understand(name):
    function, message = REFUSED[name]
    x = torch.randn(2, 4, requires_grad=True)
    output = function(x)
    with pytest.raises(UnsupportedOperation, match=f"(?s){message}.*Nothing was computed"):
        libra_grad(output, x)
    table = audit(output, x)
    assert not table.complete and any(treatment == "unsupported" for _, treatment, _ in table.rows)


def test_refusal_says_where(x):
    with pytest.raises(UnsupportedOperation, match="at Twice -> Mul -> Sum -> output"):
        libra_grad((Twice.apply(x) * 3).sum(), x)


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: torch.sigmoid(x).clamp(min=1e-4),
        lambda x: F.softplus(x).clamp(1e-3, 5),
        lambda x: F.layer_norm(x.softmax(-1), (4,)),
    ],
)
def test_a_gate_stays_one_through_clamps_and_norms(gate):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(libra_grad((x * gate(x)).sum(1), x)[0], gate(x).detach())


def test_compiled_graph_is_refused():
    compiled = torch.compile(lambda x: F.gelu(x), backend="aot_eager")
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(UnsupportedOperation, match="torch.compile hides the graph"):
        libra_grad(compiled(x).sum(), x)


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


def test_inference_mode(model, x):
    output = model(x)[:, 0]
    with torch.inference_mode(), pytest.raises(ValueError, match="inside torch.inference_mode"):
        libra_grad(output, x)


def test_no_second_derivative_inside_a_balanced_block(model, x):
    output = model(x)[:, 0].sum()
    with balanced(output, x), pytest.raises(ValueError, match="create_graph=True"):
        torch.autograd.grad(output, x, create_graph=True)


def test_module_hooks_are_no_obstacle(model, x):
    expected = libra_grad(model(x)[:, 0], x)[0]
    handle = model.blocks[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    torch.testing.assert_close(libra_grad(model(x)[:, 0], x)[0], expected, rtol=0, atol=0)
    handle.remove()


def test_a_saturated_tanh_that_nobody_asked_about(x):
    capped = torch.tanh(torch.cat([x[0, 0], 1000 * x[0, 1]]))
    torch.testing.assert_close((x * libra_grad(capped[0], x)[0]).sum(), capped[0])


def test_dropout_in_attention_is_refused():
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    output = F.scaled_dot_product_attention(x, x, x, dropout_p=0.3).sum()
    with pytest.raises(ValueError, match="dropout was active"):
        libra_grad(output, x)


def test_freed_graph(model, x):
    output = model(x)[:, 0]
    libra_grad(output, x)
    with pytest.raises(RuntimeError, match="has been freed.*retain_graph=True"):
        libra_grad(output, x)


def test_masks_of_ones_and_zeros_are_not_dropout(x):
    mask = (torch.rand(2, 5, 8) > 0.5).double()
    torch.testing.assert_close(libra_grad((x * mask).sum(), x)[0], mask)


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


def test_additive_constants_of_a_freed_graph(model, x):
    output = model(x)[:, 0]
    libra_grad(output, x)
    parts = (x, *additive_constants(output, x))  # what is added is known without what was saved
    with pytest.raises(RuntimeError, match="has been freed.*retain_graph=True"):
        libra_grad(output, parts)


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


def test_rules_are_switches():
    with pytest.raises(ValueError, match="the rule attention is True, False or \"halve\", got 'nonsense'"):
        Rules(attention="nonsense")
    with pytest.raises(ValueError, match="the rule norm is True or False, got 'halve'"):
        Rules(norm="halve")


def test_complex_outputs_and_no_inputs():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match="output 0 is complex: explain a real number"):
        libra_grad((x * 1j).sum(), x)
    with pytest.raises(ValueError, match="no inputs: name the tensors"):
        libra_grad((x * 2).sum(), ())
