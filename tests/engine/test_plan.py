"""What a plan makes of a graph: what computes streams and what only gates, and what is refused, with its place."""

import pytest
import torch
import torch.nn.functional as F
from models import Twice
from torch.utils.checkpoint import checkpoint

from libragrad_minimal import UnsupportedOperation, audit, libra_grad

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


def test_reentrant_checkpointing_is_refused_with_its_cure(model, x):
    output = model(x, run=lambda block, x: checkpoint(block, x, use_reentrant=True))[:, 0]
    with pytest.raises(UnsupportedOperation, match=r"CheckpointFunction \(2x\).*use_reentrant=False"):
        libra_grad(output, x)
