"""Every rule against a gradient derived by hand, in float64.

The reference of each case writes the repaired layer out, with what is constant detached, and lets plain autograd
differentiate that; a few are derived to the last formula. None of it goes through the engine.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from libragrad_minimal import ATTN_LRP, CP_LRP, LIBRA, PLAIN, audit, libra_grad


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def balanced(function, *tensors, rules=LIBRA):
    inputs = [t.clone().requires_grad_() for t in tensors]
    return libra_grad(weighted(function(*inputs)), inputs, rules)


def reference(function, *tensors):
    inputs = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(weighted(function(*inputs)), inputs, allow_unused=True, materialize_grads=True)


def weighted(result):
    """A scalar that sees every element of the result differently."""
    return (result * torch.linspace(-1, 2, result.numel(), dtype=result.dtype).reshape(result.shape)).sum()


def constant(tensor):
    return tensor.detach()


def phi(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gate(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def elu_ratio(x):
    return torch.where(x > 0, 1, torch.expm1(x) / x)


ACTIVATIONS = {
    "gelu": (F.gelu, phi),
    "gelu by hand": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), phi),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), tanh_gate),
    "gelu tanh by hand": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
        tanh_gate,
    ),
    "silu": (F.silu, torch.sigmoid),
    "silu by hand": (lambda x: x * torch.sigmoid(x), torch.sigmoid),
    "quick-gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: torch.sigmoid(1.702 * x)),
    "hard-swish": (F.hardswish, lambda x: (x + 3).clamp(0, 6) / 6),
    "hard-swish by hand": (lambda x: x * F.relu6(x + 3) / 6, lambda x: (x + 3).clamp(0, 6) / 6),
    "hard-swish by module": (lambda x: x * F.hardsigmoid(x), lambda x: (x + 3).clamp(0, 6) / 6),
    "mish": (F.mish, lambda x: torch.tanh(F.softplus(x))),
    "mish by hand": (lambda x: x * torch.tanh(F.softplus(x)), lambda x: torch.tanh(F.softplus(x))),
    "elu": (F.elu, elu_ratio),
    "relu": (F.relu, lambda x: (x > 0).to(x.dtype)),
    "relu6": (lambda x: F.relu6(5 * x), lambda x: torch.where(x < 0, 0, torch.where(5 * x > 6, 6 / x, 5))),
    "tanh as the stream": (torch.tanh, lambda x: torch.tanh(x) / x),
    "erf as the stream": (torch.erf, lambda x: torch.erf(x) / x),
    "soft cap": (lambda x: 30 * torch.tanh(x / 30), lambda x: 30 * torch.tanh(x / 30) / x),
    "clamp": (lambda x: x.clamp(-1, 0.5), lambda x: x.clamp(-1, 0.5) / x),
    "softshrink": (F.softshrink, lambda x: F.softshrink(x) / x),
    "square": (lambda x: x**2, lambda x: x),
    "cube": (lambda x: x**3, lambda x: x**2),
    "relu squared": (lambda x: F.relu(x).square(), lambda x: F.relu(x)),
    "root": (lambda x: (x.abs() + 0).sqrt(), lambda x: x.sign() / x.abs().sqrt()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_has_the_slope_f_over_x(name):
    function, ratio = ACTIVATIONS[name]
    x = draw(4, 5)
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    (gradient,) = balanced(function, x)
    torch.testing.assert_close(gradient, ratio(x) * weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x * gradient, function(x) * weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, slope", [("gelu", 0.5), ("silu", 0.5), ("mish", math.tanh(math.log(2))), ("elu", 1.0), ("hard-swish", 0.5)]
)
def test_slope_at_zero_is_the_limit_not_nan(name, slope):
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = libra_grad(ACTIVATIONS[name][0](x).sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, slope))


def rms(x, eps=1e-6):
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def std(x, eps=1e-5):
    return (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def grouped_std(x, groups, eps=1e-5):
    grouped = x.reshape(len(x), groups, -1)
    return std(grouped, eps).expand_as(grouped).reshape(x.shape)


def grouped_mean(x, groups):
    grouped = x.reshape(len(x), groups, -1)
    return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(x.shape)


WEIGHT, BIAS = draw(6), draw(6)
NORMS = {
    "layer norm": (
        lambda x: F.layer_norm(x, (6,), WEIGHT, BIAS),
        lambda x: (x - x.mean(-1, keepdim=True)) / constant(std(x)) * WEIGHT + BIAS,
    ),
    "layer norm, no weight": (
        lambda x: F.layer_norm(x, (6,)),
        lambda x: (x - x.mean(-1, keepdim=True)) / constant(std(x)),
    ),
    "layer norm, weight only": (
        lambda x: F.layer_norm(x, (6,), WEIGHT),
        lambda x: (x - x.mean(-1, keepdim=True)) / constant(std(x)) * WEIGHT,
    ),
    "layer norm by hand": (
        lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * WEIGHT,
        lambda x: (x - x.mean(-1, keepdim=True)) / constant(std(x)) * WEIGHT,
    ),
    "layer norm by var_mean": (
        lambda x: (lambda v, m: (x - m) * torch.rsqrt(v + 1e-5))(*torch.var_mean(x, -1, unbiased=False, keepdim=True)),
        lambda x: (x - x.mean(-1, keepdim=True)) / constant(std(x)),
    ),
    "rms norm": (lambda x: F.rms_norm(x, (6,), WEIGHT, 1e-6), lambda x: x / constant(rms(x)) * WEIGHT),
    "rms norm by hand": (
        lambda x: WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda x: x / constant(rms(x)) * WEIGHT,
    ),
    "rms norm by pow(-0.5)": (
        lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5),
        lambda x: x / constant(rms(x)),
    ),
    "group norm": (
        lambda x: F.group_norm(x, 2, WEIGHT, BIAS),
        lambda x: (x - grouped_mean(x, 2)) / constant(grouped_std(x, 2)) * WEIGHT + BIAS,
    ),
    "group norm, no weight": (
        lambda x: F.group_norm(x, 3),
        lambda x: (x - grouped_mean(x, 3)) / constant(grouped_std(x, 3)),
    ),
    "instance norm": (
        lambda x: F.instance_norm(x.reshape(2, 3, 2, 2), weight=WEIGHT[:3]),
        lambda x: (
            ((x - grouped_mean(x, 3)) / constant(grouped_std(x, 3))).reshape(2, 3, 2, 2) * WEIGHT[:3].reshape(3, 1, 1)
        ),
    ),
    "L2-normalise": (lambda x: F.normalize(x, dim=-1), lambda x: x / constant(x.norm(dim=-1, keepdim=True))),
    "L2-normalise by hand": (
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: x / constant(x.norm(dim=-1, keepdim=True)),
    ),
    "standard deviation": (lambda x: x / x.std(-1, keepdim=True), lambda x: x / constant(x.std(-1, keepdim=True))),
    "batch norm in eval mode": (
        lambda x: F.batch_norm(x, BIAS, WEIGHT.abs(), WEIGHT, BIAS, eps=1e-5),
        lambda x: (x - BIAS) / (WEIGHT.abs() + 1e-5).sqrt() * WEIGHT + BIAS,
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_holds_its_denominator_constant(name):
    function, repaired = NORMS[name]
    x = draw(2, 6) if "instance" not in name else draw(2, 12)
    torch.testing.assert_close(function(x), repaired(x))  # the reference really is the same layer
    torch.testing.assert_close(balanced(function, x), reference(repaired, x), rtol=1e-9, atol=1e-12)


def test_batch_norm_whatever_the_memory_layout_of_the_gradient():
    norm = nn.BatchNorm2d(8).double().eval()
    x, g = draw(1, 8, 7, 7).requires_grad_(), draw(1, 49, 8)
    output = (norm(x).flatten(2).transpose(1, 2) * g).sum()
    expected = g.transpose(1, 2).reshape(1, 8, 7, 7) / math.sqrt(1 + norm.eps)
    torch.testing.assert_close(libra_grad(output, x)[0], expected)


def test_layer_norm_gradient_by_hand():
    # x = (0, 2), mean 1, std 1, output (-1, 1); gradient (3, 5) minus its mean 4 over the std
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    output = (F.layer_norm(x, (2,), eps=0) * torch.tensor([3.0, 5.0])).sum()
    torch.testing.assert_close(
        libra_grad(output, x, retain_graph=True)[0], torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    )
    plain = torch.autograd.grad(output, x)[0]
    torch.testing.assert_close(plain, torch.zeros_like(plain))  # all of it lies along x and is projected out


GATE = draw(3, 4)
PRODUCTS = {
    "mul": (lambda a, b: a * b, lambda a, b: 0.5 * (a * constant(b) + constant(a) * b)),
    "mul, broadcast": (lambda a, b: a * b[:, :1], lambda a, b: 0.5 * (a * constant(b[:, :1]) + constant(a) * b[:, :1])),
    "matmul": (lambda a, b: a @ b.T, lambda a, b: 0.5 * (a @ constant(b).T + constant(a) @ b.T)),
    "bmm": (lambda a, b: a[None] @ b.T[None], lambda a, b: 0.5 * (a @ constant(b).T + constant(a) @ b.T)[None]),
    "einsum": (
        lambda a, b: torch.einsum("ij,kj->ik", a, b),
        lambda a, b: 0.5 * (a @ constant(b).T + constant(a) @ b.T),
    ),
    "addmm": (
        lambda a, b: torch.addmm(b[:, :3], a, b.T),
        lambda a, b: b[:, :3] + 0.5 * (a @ constant(b).T + constant(a) @ b.T),
    ),
    "addcmul": (lambda a, b: torch.addcmul(a, a, b), lambda a, b: a + 0.5 * (a * constant(b) + constant(a) * b)),
    "swiglu": (
        lambda a, b: F.silu(a) * b,
        lambda a, b: 0.5 * (a * constant(torch.sigmoid(a) * b) + constant(F.silu(a)) * b),
    ),
    "product with itself": (lambda a, b: a * a + b, lambda a, b: a * constant(a) + b),
    "three factors": (lambda a, b: (a * b) * b, lambda a, b: a * constant(b * b) / 4 + b * constant(a * b) * 0.75),
    "division": (lambda a, b: a / b, lambda a, b: a / constant(b)),
    "sigmoid gates": (lambda a, b: torch.sigmoid(a) * b, lambda a, b: constant(torch.sigmoid(a)) * b),
    "gate behind a linear layer": (
        lambda a, b: (torch.sigmoid(a) @ GATE.T @ GATE + 1) * b,
        lambda a, b: constant(torch.sigmoid(a) @ GATE.T @ GATE + 1) * b,
    ),
    "glu": (lambda a, b: F.glu(torch.cat([a, b], -1)), lambda a, b: a * constant(torch.sigmoid(b))),
    "sigmoid times tanh, as in an LSTM": (
        lambda a, b: torch.sigmoid(a) * torch.tanh(b),
        lambda a, b: constant(torch.sigmoid(a) * torch.tanh(b) / b) * b,
    ),
    "tanh both gate and stream": (
        lambda a, b: torch.tanh(a) * b + torch.tanh(b),
        lambda a, b: constant(torch.tanh(a)) * b + b * constant(torch.tanh(b) / b),
    ),
    "one tanh, gate and stream": (
        lambda a, b: (lambda t: t * b + t)(torch.tanh(a)),
        lambda a, b: constant(torch.tanh(a)) * b + a * constant(torch.tanh(a) / a),
    ),
    "squeeze and excite": (
        lambda a, b: a * torch.sigmoid(a.mean(0) @ GATE.T @ GATE) + b,
        lambda a, b: a * constant(torch.sigmoid(a.mean(0) @ GATE.T @ GATE)) + b,
    ),
    "softmax weights": (lambda a, b: a.softmax(-1) * b, lambda a, b: constant(a.softmax(-1)) * b),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_shares_the_gradient_and_gates_are_constant(name):
    function, repaired = PRODUCTS[name]
    a, b = draw(3, 4), draw(3, 4) + 0.1
    torch.testing.assert_close(balanced(function, a, b), reference(repaired, a, b), rtol=1e-9, atol=1e-12)


GATED = {  # what CP-LRP holds constant where two streams are multiplied: an activation's result
    "silu": (lambda a, b: F.silu(a) * b, lambda a, b: constant(F.silu(a)) * b),
    "silu comes second": (lambda a, b: b * F.silu(a), lambda a, b: constant(F.silu(a)) * b),
    "silu by hand": (lambda a, b: (a * torch.sigmoid(a)) * b, lambda a, b: constant(F.silu(a)) * b),
    "gelu by hand": (
        lambda a, b: 0.5 * a * (1 + torch.erf(a / math.sqrt(2))) * b,
        lambda a, b: constant(F.gelu(a)) * b,
    ),
    "scaled and reshaped": (
        lambda a, b: (2 * F.gelu(a)).flatten() * b.flatten(),
        lambda a, b: (constant(2 * F.gelu(a)) * b).flatten(),
    ),
    "relu": (lambda a, b: F.relu(a) * b, lambda a, b: constant(F.relu(a)) * b),
    "behind a linear layer it is a stream": (
        lambda a, b: (F.relu(a) @ GATE.T) * (b @ GATE.T),
        lambda a, b: 0.5 * (constant(F.relu(a) @ GATE.T) * (b @ GATE.T) + (F.relu(a) @ GATE.T) * constant(b @ GATE.T)),
    ),
    "two streams": (lambda a, b: a * b, lambda a, b: 0.5 * (a * constant(b) + constant(a) * b)),
    "two activations": (
        lambda a, b: F.relu(a) * F.relu(b),
        lambda a, b: 0.5 * (F.relu(a) * constant(F.relu(b)) + constant(F.relu(a)) * F.relu(b)),
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_cp_lrp_holds_activated_factors_constant(name):
    function, repaired = GATED[name]
    a, b = draw(3, 4), draw(3, 4)
    torch.testing.assert_close(balanced(function, a, b, rules=CP_LRP), reference(repaired, a, b), rtol=1e-9, atol=1e-12)


def test_grouped_matrix_product_of_experts():
    x, experts = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(2, 8, 8).bfloat16()
    ends = torch.tensor([1, 4], dtype=torch.int32)
    try:
        output = F.grouped_mm(x, experts, offs=ends)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no grouped matrix product here: {error}")
    (gradient,) = libra_grad(output.float().sum(), x)
    expected = torch.stack([experts[0].float().sum(-1)] + [experts[1].float().sum(-1)] * 3)
    torch.testing.assert_close(gradient.float(), expected, rtol=2e-2, atol=2e-2)


def attention_by_hand(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


def math_attention(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def multi_head_module(need_weights):
    module = nn.MultiheadAttention(4, 2, bias=False, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(4, dtype=torch.float64).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(4, dtype=torch.float64))

    def function(q, k, v):
        flat = [t.transpose(1, 2).reshape(2, 3, 4) for t in (q, k, v)]
        return module(*flat, need_weights=need_weights)[0].reshape(2, 3, 2, 2).transpose(1, 2)

    return function


ATTENTIONS = {
    "by hand": attention_by_hand,
    "fused": F.scaled_dot_product_attention,
    "math": math_attention,
    "module": multi_head_module(False),
    "module with weights": multi_head_module(True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_passes_gradient_to_values_only(name):
    qkv = [draw(2, 2, 3, 2) for _ in range(3)]
    expected = reference(lambda q, k, v: attention_by_hand(constant(q), constant(k), v), *qkv)
    torch.testing.assert_close(balanced(ATTENTIONS[name], *qkv), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attn_lrp_quarters_queries_and_keys(name):
    qkv = [draw(2, 2, 3, 2) for _ in range(3)]
    gq, gk, gv = reference(attention_by_hand, *qkv)
    torch.testing.assert_close(
        balanced(ATTENTIONS[name], *qkv, rules=ATTN_LRP), (gq / 4, gk / 4, gv / 2), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_without_its_rule_is_plain_although_products_are_halved(name):
    qkv = [draw(2, 2, 3, 2) for _ in range(3)]
    torch.testing.assert_close(
        balanced(ATTENTIONS[name], *qkv, rules=LIBRA.without("attention")),
        reference(attention_by_hand, *qkv),
        rtol=1e-9,
        atol=1e-12,
    )


SWITCHED_OFF = [
    *(
        ("activation", name, lambda x, f=function: f(x))
        for name, (function, _) in ACTIVATIONS.items()
        if "gelu" in name or "silu" in name or "mish" in name
    ),
    *(("norm", name, function) for name, (function, _) in NORMS.items() if "instance" not in name),
    *(("product", name, ACTIVATIONS[name][0]) for name in ("square", "cube", "root")),
]


@pytest.mark.parametrize(
    "rule, name, function", SWITCHED_OFF, ids=lambda value: value if isinstance(value, str) else ""
)
def test_rule_switched_off_is_the_plain_derivative(rule, name, function):
    x = draw(2, 6)
    torch.testing.assert_close(
        balanced(function, x, rules=LIBRA.without(rule)), reference(function, x), rtol=1e-9, atol=1e-12
    )


def test_plain_rules_are_torch_autograd():
    x = draw(3, 6)
    for function, _ in [*ACTIVATIONS.values(), *(NORMS[n] for n in NORMS if "instance" not in n)]:
        torch.testing.assert_close(balanced(function, x, rules=PLAIN), reference(function, x), rtol=0, atol=0)


def test_audit_names_every_treatment():
    x = draw(2, 3).requires_grad_()
    table = audit((F.layer_norm(x, (3,)) * torch.sigmoid(x)).sum(1), x)
    assert table.rows == (
        ("Mul", "gate constant (activation)", 1),
        ("NativeLayerNorm", "balanced (norm)", 1),
        ("Sigmoid", "held constant (activation)", 1),
        ("Sum", "linear", 1),
    )
    assert table.complete
    assert "are complete" in str(table)
    assert not audit((F.layer_norm(x, (3,)) * 2).sum(1), x, LIBRA.without("norm")).complete
