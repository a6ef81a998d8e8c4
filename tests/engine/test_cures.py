"""Every cure that a refusal names is tried: the refused forward pass, then the same one cured, which is complete."""

import pytest
import torch
import torch.nn.functional as F
from completeness import assert_complete
from models import Twice
from torch import nn
from torch.utils.checkpoint import checkpoint

from libragrad_minimal import UnsupportedOperation, audit, libra_grad, observed, register_rule
from libragrad_minimal.engine import operations


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def elu_in_place(x):
    return F.elu(x * 1, inplace=True)


def celu_in_place(x):
    return F.celu(x * 1, inplace=True)


def slice_in_place(x):
    y = x * 1
    y[:, :2].sigmoid_()
    return y


def slice_out_of_place(x):
    return torch.cat([x[:, :2] * torch.sigmoid(x[:, :2]), x[:, 2:]], 1)


CURED = {  # the refused operation: what was refused, what the refusal says, and the same with the cure followed
    "CheckpointFunction": (
        lambda x: checkpoint(F.gelu, x, use_reentrant=True),
        "use_reentrant=False",
        lambda x: checkpoint(F.gelu, x, use_reentrant=False),
    ),
    "CopySlices": (slice_in_place, "write it out of place", slice_out_of_place),
    "Elu": (elu_in_place, "set inplace=False", lambda x: F.elu(x * 1)),
    "Celu": (celu_in_place, "set inplace=False", lambda x: F.celu(x * 1)),
    "Softmax": (lambda x: x.softmax(-1), "explain a logit", lambda x: x * 1),
    "LogSoftmax": (lambda x: x.log_softmax(-1), "difference of logits", lambda x: x - x.mean(1, keepdim=True)),
    "Logsumexp": (lambda x: x.logsumexp(-1, keepdim=True), "explain a logit", lambda x: x * 1),
    "Softplus": (F.softplus, "explain the logit before it", lambda x: x * 1),
    "Exp": (torch.exp, "explain the logit before it", lambda x: x * 1),
    "Sin": (torch.sin, "explain the logit before it", lambda x: x * 1),
    "IndexPut": (
        lambda x: (x * 1).index_put((torch.tensor([0, 0]),), x[1:]),
        "write each place once",
        lambda x: (x * 1).index_put((torch.tensor([0]),), x[2:]),
    ),
    "IndexCopy": (
        lambda x: x.index_copy(0, torch.tensor([0, 0]), x[1:]),
        "write each place once",
        lambda x: x.index_copy(0, torch.tensor([0]), x[2:]),
    ),
    "Scatter": (
        lambda x: x.scatter(0, torch.zeros(2, 4, dtype=torch.long), x[1:]),
        "write each place once",
        lambda x: x.scatter(0, torch.zeros(1, 4, dtype=torch.long), x[2:]),
    ),
    "NativeLayerNorm": (
        lambda x: F.layer_norm(x, (4,), x.mean(0)),
        "detach",
        lambda x: F.layer_norm(x, (4,), x.mean(0).detach()),
    ),
}


@pytest.mark.parametrize("name", CURED)
def test_the_cure_that_is_named_works(name):
    refused, advice, cured = CURED[name]
    x = draw(3, 4)
    with pytest.raises(UnsupportedOperation, match=rf"{name} \(1x\).*{advice}"):
        libra_grad(refused(x)[:, 0], x)
    assert_complete(cured(x)[:, 0], x)


def test_a_sigmoid_at_the_output_is_complete_inside_observed():
    x = draw(3, 4)
    with pytest.raises(UnsupportedOperation, match=r"Sigmoid \(1x\).*observed\(\)"):
        libra_grad(torch.sigmoid(x)[:, 0], x)
    with observed():
        output = torch.sigmoid(x)[:, 0]
    assert_complete(output, x)


def test_a_fused_lstm_is_complete_without_its_fused_kernel():
    x = torch.randn(1, 3, 4, requires_grad=True)
    module = nn.LSTM(4, 3, batch_first=True)
    fused = module(x)[0][0, :, 0]
    if "MkldnnRnnLayer" in str(audit(fused, x)):
        with pytest.raises(UnsupportedOperation, match=r"torch.backends.mkldnn.flags\(enabled=False\)"):
            libra_grad(fused, x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_complete(module(x)[0][0, :, 0], x)


def test_compiled_models_run_eagerly():
    x = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(lambda x: F.gelu(x) + x, backend="aot_eager")
    with pytest.raises(UnsupportedOperation, match=r"set_stance\('force_eager'\)"):
        libra_grad(compiled(x)[:, 0], x)
    with torch.compiler.set_stance("force_eager"):
        output = compiled(x)[:, 0]
    (gradient,) = libra_grad(output, x)
    torch.testing.assert_close((x * gradient).sum(), output.sum())


def test_a_gate_in_the_middle_is_explained_from_its_result_on():
    x = draw(3, 4)
    with pytest.raises(UnsupportedOperation, match="explain from its result on"):
        libra_grad(F.gelu(torch.exp(x)).sum(1), x)
    middle = torch.exp(x)
    assert_complete(F.gelu(middle).sum(1), middle)


def test_a_function_of_ones_own_is_taught_by_the_name_in_the_refusal(monkeypatch):
    monkeypatch.setattr(operations, "TAUGHT", {})
    x = draw(3, 4)
    with pytest.raises(UnsupportedOperation, match=r"register_rule\('Twice', 'linear'\)"):
        libra_grad(Twice.apply(x).sum(1), x)
    register_rule("Twice", "linear")
    assert_complete(Twice.apply(x).sum(1), x)


def test_an_operation_of_pytorchs_without_a_rule_is_taught(monkeypatch):
    monkeypatch.setattr(operations, "TAUGHT", {})
    x = draw(3, 4)
    with pytest.raises(UnsupportedOperation, match=r"register_rule\('Pow', 'linear'\)"):
        libra_grad((2**x).sum(1), x)
    register_rule("Pow", "gate", "activation", lambda node, grad_inputs, grad_outputs: (grad_outputs[0] * 2**x / x,))
    assert_complete((2**x).sum(1), x)


def test_a_saturated_sigmoid_is_written_as_a_tanh():
    x = draw(3, 4)
    with observed():
        output, cured = torch.sigmoid(60 * x).sum(1), (0.5 + torch.tanh(60 * x / 2) / 2).sum(1)
    torch.testing.assert_close(output, cured)
    with pytest.raises(ArithmeticError, match=r"write 0.5 \+ tanh\(x / 2\) / 2 for it"):
        libra_grad(output, x)
    assert_complete(cured, x)


def test_a_mask_that_looks_like_dropout_is_cloned():
    mask = torch.empty(3, 4, dtype=torch.float64).bernoulli_(0.5).div_(0.5)
    x = draw(3, 4)
    with pytest.raises(ValueError, match=r"dropout was active.*looks like one, clone\(\)"):
        libra_grad((x * mask).sum(1), x)
    assert_complete((x * mask.clone()).sum(1), x)


def test_every_cure_in_the_table_is_tried():
    elsewhere = {"CompiledFunction", "MkldnnRnnLayer", "CudnnRnn", "FlashAttnFunc"}  # above, or only on a GPU
    elsewhere |= {"WarnNotImplemented"}  # in test_quantised.py
    assert {*operations.CURES, *operations.CURES_OF_CUSTOMS, *operations.AT_THE_OUTPUT} <= {*CURED, *elsewhere}
