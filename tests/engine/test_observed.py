"""observed(): every constant that is added is found, and the forward pass does not notice.

tests/modules.py has two hundred small modules whose verdict is told; here is what the context promises beside that.
"""

import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.layers import DropPath, PatchDropout
from torch import nn

from libragrad_minimal import Rules, UnsupportedOperation, additive_constants, audit, libra_grad, observed

BUFFER = torch.linspace(-1, 2, 8, dtype=torch.float64)
with torch.no_grad():
    UNSEEN_VIEW = nn.Parameter(BUFFER.clone()).expand(1, 8)  # requires_grad is True, and no graph will hold it


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def total(output, x):
    parts = (x, *additive_constants(output, x))
    return sum((t * g).double().sum() for t, g in zip(parts, libra_grad(output, parts), strict=True)).item()


def batch_norm():
    norm = nn.BatchNorm1d(8).double().eval().requires_grad_(False)
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    return norm


def at(*places):
    return F.one_hot(torch.tensor(places), 8).sum(0)


HIDDEN = {  # what autograd doesn't follow, and what of it is a constant in the output of an input of ones: by hand
    "number": (lambda x: x + 1.5, 1.5),
    "buffer": (lambda x: x + BUFFER, BUFFER),
    "view of a weight, made without grad": (lambda x: x + UNSEEN_VIEW, BUFFER),
    "one minus": (lambda x: 3 - x, 3),
    "frozen bias": (lambda x: F.linear(x, torch.eye(8, dtype=torch.float64), BUFFER), BUFFER),
    "where": (lambda x: torch.where(BUFFER > 0, x, 0.25), torch.where(BUFFER > 0, 0, 0.25)),
    "masked fill": (lambda x: x.masked_fill(BUFFER > 0, 2.0), torch.where(BUFFER > 0, 2.0, 0)),
    "concatenated": (lambda x: torch.cat([x[:, :3], BUFFER[3:].expand(len(x), 5)], 1), BUFFER * (torch.arange(8) > 2)),
    "written by index": (lambda x: x.index_fill(1, torch.tensor([2, 2, 5]), 4.0), 4.0 * at(2, 5)),
    "scattered twice to a place": (lambda x: x.scatter(1, torch.tensor([[1, 1]] * 3), 0.5), 0.5 * at(1)),
    "larger": (lambda x: torch.maximum(x, BUFFER), torch.where(BUFFER > 1, BUFFER, 0)),
    "operator": (lambda x: torch.ops.aten.add.Scalar(x, 2), 2),
    "sigmoid": (torch.sigmoid, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_the_constants_share_is_the_one_found_by_hand(name):
    function, expected = HIDDEN[name]
    x = torch.ones(3, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(1, 2, 8, dtype=torch.float64)
    with observed():
        output = (function(x) * weights).sum(1)
    constants = additive_constants(output, x)
    _, *gradients = libra_grad(output, (x, *constants))
    found = sum((t * g).sum() for t, g in zip(constants, gradients, strict=True))
    torch.testing.assert_close(found.detach(), 3 * (expected * weights).sum().double())


@pytest.mark.parametrize("name", HIDDEN)
def test_the_audit_has_a_row_outside_and_none_inside(name):
    function, _ = HIDDEN[name]
    x = torch.ones(3, 8, dtype=torch.float64, requires_grad=True)
    if name != "sigmoid":  # refused outside
        assert "adds a constant without a gradient" in str(audit(function(x).sum(1), x))
    with observed():
        output = function(x).sum(1)
    assert "adds a constant" not in str(audit(output, x))


WITHOUT_EFFECT = {
    "nothing is chosen": lambda x: torch.where(BUFFER > 9, BUFFER, x),
    "nothing is filled": lambda x: x.masked_fill(BUFFER > 9, 3.0),
    "nothing is larger": lambda x: torch.maximum(x, BUFFER - 9),
    "running mean of zero": nn.BatchNorm1d(8, affine=False).double().eval(),
    "norm with a bias of zero": lambda x: F.layer_norm(x, (8,), BUFFER, 0 * BUFFER),
    "everything is finite": torch.nan_to_num,
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_no_row_for_a_constant_without_effect(name):
    x = torch.ones(3, 8, dtype=torch.float64, requires_grad=True)
    assert "adds a constant" not in str(audit(WITHOUT_EFFECT[name](x).sum(1), x))


def test_batch_norms_running_mean_and_frozen_bias():
    norm, x = batch_norm(), draw(3, 8)
    with observed():
        output = norm(x)[:, 2]
    assert total(output, x) == pytest.approx(output.sum().item(), rel=1e-12)
    torch.testing.assert_close(output, norm(x)[:, 2], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "resnet18"])
def test_a_frozen_model_of_timm_is_complete(name):
    model = timm.create_model(name, num_classes=5).eval().requires_grad_(False)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand_like(tensor))
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    expected = model(images)
    with observed():
        logits = model(images)
    assert torch.equal(logits, expected)
    assert total(logits[:, 1], images) == pytest.approx(logits[:, 1].sum().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_tanh_far_into_saturation(dtype):
    """tanh(20) is 1 in every precision; the slope is 1/20 all the same."""
    x = torch.tensor([0.0, 1e-3, 0.5, 3.0, 20.0], dtype=dtype, requires_grad=True)
    with observed():
        output = torch.tanh(x)
    (gradient,) = libra_grad(output, x)
    exact = x.detach().double()
    slope = torch.where(exact == 0, 1, torch.tanh(exact) / exact)
    torch.testing.assert_close(gradient.double(), slope, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-6), (torch.float32, 2e-4), (torch.float16, 1e-3)])
def test_outside_a_tanh_is_refused_before_it_is_wrong(dtype, limit):
    refused = False
    for value in torch.linspace(0.1, 19, 400).to(dtype):
        x = value.clone().requires_grad_()
        output = torch.tanh(x)
        try:
            (gradient,) = libra_grad(output, x)
        except ArithmeticError as error:
            refused = True
            assert "observed()" in str(error)
            continue
        assert not refused, f"{value} is explained although a smaller argument was not"
        exact = torch.tanh(value.double()) / value.double()
        assert abs(gradient.double() - exact) <= (limit + torch.finfo(dtype).eps) * exact
    assert refused


def test_bert_in_half_precision_is_complete():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60
    )
    model = transformers.BertForSequenceClassification(config).eval().bfloat16()
    nn.init.normal_(model.bert.pooler.dense.weight, std=0.5)
    embeddings = torch.randn(1, 7, 32, dtype=torch.bfloat16, requires_grad=True)
    with observed():
        output = model(inputs_embeds=embeddings).logits[:, 1]
    assert total(output, embeddings) == pytest.approx(output.item(), abs=0.05 * output.abs().item() + 0.01)


def test_nothing_of_an_activations_size_is_kept():
    """The tensors that autograd saves are the same, observed or not, in a model whose parameters are frozen."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval().requires_grad_(False)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)

    def saved_bytes(context):
        kept = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
            ),
            context,
        ):
            output = model(images)
        assert output.grad_fn is not None
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    import contextlib

    plain, with_leaves = saved_bytes(contextlib.nullcontext()), saved_bytes(observed())
    assert plain <= with_leaves <= 1.001 * plain


RANDOM = {
    "dropout": nn.Dropout(0.5),
    "alpha dropout": nn.AlphaDropout(0.5),
    "feature dropout": nn.Dropout1d(0.5),
    "dropped paths": DropPath(0.5),
    "dropped patches": PatchDropout(0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_modules_in_training_mode_are_refused(name):
    module, x = RANDOM[name].train(), torch.randn(4, 6, 8, requires_grad=True)
    with pytest.raises(ValueError, match="at random.*model.eval"), observed():
        module(x)
    with observed():
        output = module.eval()(x)[:, 0].sum(1)
    torch.testing.assert_close(torch.tensor(total(output, x)).float(), output.sum().detach())


def test_dropout_that_is_always_on_has_another_cure():
    class Always(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=True)

    with pytest.raises(ValueError, match="Always dropped something at random.*in eval mode, too: set its p to 0"):
        with observed():
            Always().eval()(torch.randn(2, 3, requires_grad=True))


@pytest.mark.parametrize("name", [name for name in RANDOM if "patches" not in name])
def test_dropout_is_seen_in_the_graph_too(name):
    x = torch.randn(16, 6, 8, requires_grad=True)
    with pytest.raises(ValueError, match="dropout was active.*model.eval"):
        libra_grad(RANDOM[name].train()(x).sum((1, 2)), x)


def test_transformers_drop_path_is_seen_in_the_graph():
    from transformers.models.swin.modeling_swin import SwinDropPath

    x = torch.randn(16, 6, 8, requires_grad=True)
    with pytest.raises(ValueError, match="dropout was active"):
        libra_grad(SwinDropPath(0.5).train()(x).sum((1, 2)), x)


@pytest.mark.parametrize(
    "mask", [[0.0, 2.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0], [3.0, 3.0, 0.0, 3.0], [0.5, 0.5, 0.0, 0.0]]
)
def test_masks_that_somebody_wrote_down_are_no_dropout(mask):
    x, mask = draw(3, 4), torch.tensor(mask, dtype=torch.float64)
    torch.testing.assert_close(libra_grad((x * mask).sum(1), x)[0], mask.expand(3, 4))


def test_a_constant_that_changes_after_it_was_added():
    x, counter = draw(3, 8), BUFFER.clone()
    with observed():
        output = (x + counter).sum(1)
        counter += 1
    with pytest.raises(ValueError, match="changed in place after it had been added"):
        additive_constants(output, x)


def test_the_context_leaves_nothing_behind_when_the_model_fails():
    with pytest.raises(ZeroDivisionError), observed():
        raise ZeroDivisionError
    x = draw(3, 8)
    assert (x + 1).grad_fn.next_functions[1][0] is None  # a number again


C, INDEX, TWICE = torch.randn(2, 6, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.long), torch.tensor([0, 0])
STATE = torch.randn(2, 4, dtype=torch.float64)
SAMPLES = (2, 6)


class OwnParameter(nn.Parameter):
    pass


class OwnTensor(torch.Tensor):
    pass


def cell(kind):
    return kind(6, 4).double().requires_grad_(False)


def overwritten(function, change):
    """What a function read is changed in place behind it; it saves its result, so that PyTorch allows that."""

    def program(x):
        read = x * 1.5
        result = function(read)
        return result + change(read)

    return program


def compiled(layers):
    model = nn.Sequential(*[nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6)] * layers).double().requires_grad_(False)
    return torch.compile(model, backend="eager")


PROGRAMS = {  # each was wrong or raised something of PyTorch's, in front of an attacker
    "padded for a maximum": (lambda x: F.max_pool1d(F.pad(x, (1, 1), value=-torch.inf), 3), SAMPLES),
    "RNN cell of a constant": (lambda x: cell(nn.RNNCell)(C, x), (2, 4)),
    "GRU cell of a constant": (lambda x: cell(nn.GRUCell)(C, x), (2, 4)),
    "LSTM cell of a constant": (lambda x: cell(nn.LSTMCell)(C, (x, STATE))[0], (2, 4)),
    "GRU cell from a constant": (lambda x: cell(nn.GRUCell)(x, STATE), SAMPLES),
    "index_copy twice to a place": (lambda x: x.index_copy(0, TWICE, C), (3, 6)),
    "index_copy_ twice to a place": (lambda x: (x * 1).index_copy_(0, TWICE, C), (3, 6)),
    "linear layer of a constant": (lambda x: F.linear(C, torch.ones(4, 6).double(), x), (4,)),
    "convolution of a constant": (lambda x: F.conv1d(C[None], torch.ones(3, 2, 2).double(), x), (3,)),
    "bilinear layer of constants": (lambda x: F.bilinear(C, STATE, torch.ones(3, 6, 4).double(), x), (3,)),
    "addmm by keyword": (lambda x: torch.addmm(input=C, mat1=x, mat2=torch.ones(6, 6).double()), SAMPLES),
    "a slice from nowhere": (lambda x: torch.ops.aten.slice.Tensor(x, 1, None, 3), SAMPLES),
    "cumulative_trapezoid": (torch.cumulative_trapezoid, SAMPLES),
    "clamp_": (lambda x: (x * 1).clamp_(0.2, 1), SAMPLES),
    "hardtanh in place": (lambda x: F.hardtanh(x * 1, 0.2, 1.0, inplace=True), SAMPLES),
    "clamp of a constant": (lambda x: torch.clamp(C, torch.tensor(0.2).double(), max=x), SAMPLES),
    "clamp to larger bounds": (lambda x: x.clamp(min=-torch.ones(4, 6).double()), (6,)),
    "tanh of what is overwritten": (overwritten(torch.tanh, lambda a: a.mul_(-5)), SAMPLES),
    "expm1 of what is overwritten": (overwritten(torch.expm1, lambda a: a.add_(5)), SAMPLES),
    "NumPy number": (lambda x: x + np.float32(1.5), SAMPLES),
    "parameter of a class of its own": (lambda x: x + OwnParameter(torch.ones(6), requires_grad=False), SAMPLES),
    "tensor of a class of its own": (lambda x: x + torch.ones(6).as_subclass(OwnTensor), SAMPLES),
    "rsub with a factor": (lambda x: torch.rsub(x, 1, 2), SAMPLES),
    "pairwise distance": (lambda x: F.pairwise_distance(x, C), SAMPLES),
    "L1 loss": (lambda x: F.l1_loss(x, C, reduction="none"), SAMPLES),
    "Gaussian loss, written in Python": (lambda x: F.gaussian_nll_loss(x, C, C**2, reduction="none"), SAMPLES),
    "diff": (lambda x: torch.diff(x, prepend=C), SAMPLES),
    "cartesian product": (lambda x: torch.cartesian_prod(x[0], C[0]), SAMPLES),
    "block diagonal": (lambda x: torch.block_diag(x, C), SAMPLES),
    "embedding with padding": (lambda x: F.embedding(torch.tensor([[0, 1]]), x, padding_idx=0), (3, 4)),
    "embedding by frequency": (lambda x: F.embedding(TWICE, x, scale_grad_by_freq=True), (3, 4)),
    "sigmoid_": (lambda x: (x * 3).sigmoid_(), SAMPLES),
    "sigmoid as an operator": (torch.ops.aten.sigmoid, SAMPLES),
    "tanh_ in saturation": (lambda x: (x * 30).tanh_(), SAMPLES),
    "tanh as an operator, in saturation": (lambda x: torch.ops.aten.tanh.default(x * 30), SAMPLES),
    "compiled": (compiled(2), SAMPLES),
    "compiled, larger": (compiled(3), SAMPLES),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_an_attacker(name):
    program, shape = PROGRAMS[name]
    x = draw(*shape)
    with observed():
        result = program(x)
    weights = torch.linspace(1, 2, result.numel(), dtype=torch.float64).view(result.shape)
    assert total((result * weights).sum(), x) == pytest.approx((result * weights).sum().item(), rel=1e-9)


def without_graph(x):
    y = x * 2
    with torch.no_grad():
        y.add_(1)
    return y


REFUSED = {
    "written in place without a graph": (without_graph, "add_ .*no_grad.*out of place"),
    "written twice": (lambda x: torch.zeros(3, 6).double().index_put((TWICE,), x), "IndexPut.*each place once"),
    "scattered twice": (lambda x: torch.zeros(2, 6).double().scatter(0, INDEX[[0, 0]], x), "Scatter.*each place once"),
    "copied twice": (lambda x: torch.zeros(3, 6).double().index_copy(0, TWICE, x), "IndexCopy.*each place once"),
    "equals": (lambda x: x.scatter_reduce(0, INDEX, x[:1].detach(), "amax", include_self=False), "ScatterReduce"),
    "bag by frequency": (lambda x: F.embedding_bag(INDEX, x, scale_grad_by_freq=True), "EmbeddingBag"),
    "loss with a margin": (lambda x: F.margin_ranking_loss(x, C, torch.ones(2, 6), margin=0.5), "write it out"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_can_count_is_refused(name):
    program, message = REFUSED[name]
    x = draw(2, 6)
    with pytest.raises(UnsupportedOperation, match=message), observed():
        libra_grad(program(x).sum(), x)


def test_operands_that_are_overwritten_are_refused_by_the_residual_rule():
    x = draw(2, 6)
    with observed(residuals=True):
        a, b = x * 2, x * 3
        output = (a + b).sum(1)
        a.mul_(2)
    with pytest.raises(ValueError, match="changed in place after it had been added"):
        libra_grad(output, x, Rules(residual=True))


def test_compiled_models_run_eagerly_until_the_end():
    """Also after a function that is watched step by step."""
    model = torch.compile(nn.Linear(6, 6).double().requires_grad_(False), backend="aot_eager")
    x = draw(2, 6)
    with observed():
        output = model(F.normalize(x)).sum(1)
    assert "CompiledFunction" not in str(audit(output, x))
    assert "CompiledFunction" in str(audit(model(x).sum(1), x))


def test_entered_inside_of_torch_compile_it_says_so():
    def explained(x):
        with observed():
            output = (torch.nn.functional.gelu(x) + 1).sum(1)
        return output

    torch._dynamo.reset()
    x = torch.randn(2, 3, requires_grad=True)
    try:
        output = torch.compile(explained, backend="eager")(x)
    except UnsupportedOperation as error:
        assert re.search("entered inside of torch.compile.*compile the model", str(error))
    else:  # PyTorch 2.8 doesn't compile such a context and runs it as it is
        assert torch.__version__ < "2.9"
        (one,) = additive_constants(output, x)
        of_x, of_one = libra_grad(output, (x, one))
        torch.testing.assert_close((x * of_x).sum() + (one * of_one).sum(), output.sum())
