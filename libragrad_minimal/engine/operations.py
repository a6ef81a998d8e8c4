"""What each operation is to LibraGrad: one table from PyTorch's name for it to its role and its repair.

A layer is *complete* when its output equals <input, gradient> plus its additive constants. Euler's theorem says which
layers are: those homogeneous of degree one. The table names, for every operation that autograd records, the role it
plays in plan.py, and for the offenders the formula (repairs.py) that mends them (Mehri et al. 2025, section 3).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import Node

from . import repairs
from .nodes import (
    HALF,
    full_name,
    function_class,
    is_custom,
    is_native,
    noted,
    operation_name,
    precise,
    result_shape,
    saved,
    short_name,
    signed,
)
from .rules import Rule

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]  # (node, grad_inputs, grad_outputs) -> grad_inputs
Role = Literal["linear", "balanced", "gate", "product", "division", "power"]


@dataclass(frozen=True)
class Repair:
    """A formula of repairs.py at one kind of node: the gradient of operand number `operand`.

    The formula's parameters after the gradient are looked up by name: among the arguments of `kernel`, the ATen
    operator with which PyTorch would compute this gradient, or else among what the node saved, where `saved` gives the
    names that differ.
    """

    formula: Callable[..., Tensor | tuple[Tensor, ...]]
    kernel: str | None = None
    saved: Mapping[str, str] = field(default_factory=dict)
    operand: int = 0
    cuts_others: bool = False  # the other operands get no gradient


@dataclass(frozen=True)
class Operation:
    """The role an operation plays.

    linear:   homogeneous of degree one in its live operands together; its own derivative is complete.
    balanced: one output stream from one input stream; `repair` makes it complete, switched by `rule`.
    gate:     a nonlinearity without a degree. Constant where it multiplies a stream; where it *is* the stream, `repair`
              is its complete form, and without one it is refused.
    product:  bilinear in the operands `factors`, linear in the others.
    division: `streams` over the other operand, which is held constant.
    power:    operand 0 to the constant exponent `degree`.

    repair:   a Repair, or a function (node, grad_inputs, grad_outputs) -> grad_inputs.
    streams:  the operands that may carry a stream; None: all. A live gate among the others is held constant.
    """

    role: Role
    rule: Rule | None = None
    repair: Repair | Backward | None = None
    factors: tuple[int, int] = (0, 1)
    streams: tuple[int, ...] | None = None
    degree: float | Tensor = 1.0
    incoming: Callable[[Node, Tensor], Tensor] | None = None  # changes the gradient before PyTorch's own derivative
    gate_result: int | None = None  # this one of a linear operation's results is a gate: the variance of var_mean
    separable: bool = True  # whether what each operand gets can be scaled on its own


# What the table holds for a name: an operation, or a function of the node where what it saved changes its meaning;
# None is an operation without a rule.
Entry = Operation | Callable[[Node], Operation | None]


# ---- the table -------------------------------------------------------------------------------------------------------

LINEAR = """
Add Sub Rsub Neg Sum Mean Cumsum Trace Clone Alias ToCopy Copy Contiguous View UnsafeView Reshape ReshapeAlias
AsStrided Expand Permute Transpose T Mt Movedim Unsqueeze Squeeze Slice Select Narrow Index IndexSelect Gather
TakeAlongDim MaskedSelect Take Cat Stack Split UnsafeSplit SplitWithSizes UnsafeSplitWithSizes Unbind Chunk Repeat
RepeatInterleave Roll Flip Rot90 Unfold Im2Col Col2Im Diagonal Tril Triu MaskedFill MaskedScatter Where
IndexAdd IndexFill ScatterAdd SliceScatter SelectScatter ConstantPadNd ReflectionPad1D
ReflectionPad2D ReplicationPad1D ReplicationPad2D AvgPool1D AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D
MkldnnAdaptiveAvgPool2D MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D UpsampleNearest1D
UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D
UpsampleLinear1D UpsampleBilinear2D UpsampleTrilinear3D UpsampleBicubic2D UpsampleBilinear2DAa UpsampleBicubic2DAa
DiagEmbed PixelShuffle PixelUnshuffle Abs Max Min Amax Amin Cummax
Cummin Maximum Minimum Fmax Fmin Sort Topk Kthvalue Median NanToNum ViewAsReal ViewAsComplex Real Imag Complex Conj
BlockDiag Hardshrink ResolveConj FftR2C FftC2R FftC2C Fill Zero
""".split()


def activation(formula: Callable[..., Tensor], kernel: str | None = None) -> Operation:
    return Operation("balanced", "activation", Repair(formula, kernel), streams=(0,))


def unless_in_place(operation: Operation) -> Entry:
    """In place these keep their result only."""
    return lambda node: operation if hasattr(type(node), "_saved_self") else None


def norm(formula: Callable[..., Tensor], kernel: str | None, rstd: str) -> Operation:
    return Operation("balanced", "norm", Repair(formula, kernel, {"rstd": rstd}), streams=(0, 2))


def values_only(node: Node, grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients:
    """Fused attention with its map held constant: nothing to queries, keys and mask."""
    return tuple(g if i == 2 else None for i, g in enumerate(grad_inputs))


FLASH_FOR_CPU = Repair(
    repairs.attention_values,
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    operand=2,
    cuts_others=True,
)

BALANCED: dict[str, Entry] = {
    "Gelu": activation(repairs.gelu, "gelu_backward"),
    "Silu": activation(repairs.silu, "silu_backward"),
    "Hardswish": activation(repairs.hardswish, "hardswish_backward"),
    "Mish": activation(repairs.mish, "mish_backward"),
    "Glu": activation(repairs.glu, "glu_backward"),
    "Elu": unless_in_place(activation(repairs.elu)),
    "Celu": unless_in_place(activation(repairs.celu)),
    "Clamp": activation(repairs.clamp),
    "ClampMin": activation(repairs.clamp_min),
    "ClampMax": activation(repairs.clamp_max),
    "Softshrink": activation(repairs.softshrink, "softshrink_backward"),
    "NativeLayerNorm": norm(repairs.layer_norm, "native_layer_norm_backward", "result2"),
    "FusedRmsNorm": norm(repairs.rms_norm, "_fused_rms_norm_backward", "result1"),
    "NativeGroupNorm": norm(repairs.group_norm, "native_group_norm_backward", "result2"),
    "ScaledDotProductFlashAttentionForCpu": Operation("balanced", "attention", FLASH_FOR_CPU, streams=(2,)),
    **dict.fromkeys(
        "ScaledDotProductFlashAttention ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention "
        "ScaledDotProductFusedAttentionOverrideable".split(),
        Operation("balanced", "attention", values_only, streams=(2,)),
    ),
}


def gate(rule: Rule, formula: Callable[..., Tensor] | None = None) -> Operation:
    return Operation("gate", rule, None if formula is None else Repair(formula))


def sigmoid(node: Node) -> Operation:
    """As the stream it is 1/2 + tanh(x/2)/2, complete where `observed()` made the 1/2 a constant to be counted."""
    return gate("activation", repairs.sigmoid if noted(node, HALF) is not None else None)


def kept(node: Node, grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients:
    """Of degree one already: PyTorch's own derivative is complete."""
    return grad_inputs


def vector_norm(order: str) -> Entry:
    """The norm of order 0 counts the entries that aren't 0, and has no derivative."""
    return lambda node: None if saved(node, order) == 0 else Operation("gate", "norm", kept)


GATES: dict[str, Entry] = {
    **dict.fromkeys(["Softmax", "SafeSoftmax", "LogSoftmax", "Logsumexp"], gate("attention")),
    **dict.fromkeys(
        "Hardsigmoid Softplus LogSigmoid Exp Exp2 Log Sin Cos Erfc Sign Round Floor Ceil Trunc".split(),
        gate("activation"),
    ),
    "Sigmoid": sigmoid,
    "Tanh": gate("activation", repairs.tanh),
    "Expm1": gate("activation", repairs.expm1),
    "Log1P": gate("activation", repairs.log1p),
    "Erf": gate("activation", repairs.erf),
    "Atan": gate("activation", repairs.atan),
    "Asinh": gate("activation", repairs.asinh),
    "Hardtanh": gate("activation", repairs.hardtanh),
    **dict.fromkeys(["Rsqrt", "Reciprocal", "Var", "LinalgInvEx"], gate("norm")),
    "Std": Operation("gate", "norm", kept),
    "Norm": vector_norm("p"),
    "LinalgVectorNorm": vector_norm("ord"),
}

PRODUCTS: dict[str, Entry] = {
    name: Operation("product", "product", factors=factors)
    for names, factors in {
        "Mul Mm Bmm Mv Dot GroupedMm Convolution Linear MkldnnLinear LinalgCross": (0, 1),
        "Addmm Baddbmm Addbmm Addmv Addcmul Addr": (1, 2),
    }.items()
    for name in names.split()
}


def division(node: Node) -> Operation | None:
    rounded = getattr(node, "_saved_rounding_mode", None) is not None
    return None if rounded else Operation("division", "norm", streams=(0,))


def power(node: Node) -> Operation | None:
    exponent = saved(node, "exponent")
    if not isinstance(exponent, Tensor):
        return Operation("power", "product", degree=float(exponent)) if exponent > 0 else gate("norm")
    if (exponent > 0).all():
        return Operation("power", "product", degree=exponent, streams=(0,))
    return gate("norm") if (exponent < 0).all() else None


def scatter_reduce(node: Node) -> Operation | None:
    """PyTorch's derivative of a maximum shares with what was there before, excluded or not, where both are equal."""
    if saved(node, "reduce") == "prod":
        return None
    if saved(node, "include_self") or saved(node, "reduce") not in ("amax", "amin"):
        return Operation("linear")
    before, result = saved(node, "self"), saved(node, "result")
    written = torch.zeros_like(result).scatter(signed(saved(node, "dim")), saved(node, "index"), 1.0).bool()
    return None if ((before == result) & written & (result != 0)).any() else Operation("linear")


def every_row(node: Node, grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients:
    """PyTorch leaves the padding's row out, and may divide by how often a row was read."""
    rows, (gradient,) = saved(node, "weight_sym_argsize_0"), grad_outputs
    return (torch.ops.aten.embedding_dense_backward(gradient, saved(node, "indices"), rows, -1, False),)


def embedding(node: Node) -> Operation:
    padding = signed(saved(node, "padding_idx"))
    usual = padding < 0 and not saved(node, "scale_grad_by_freq")
    return Operation("linear", repair=None if usual else every_row)


def embedding_bag(node: Node) -> Operation | None:
    return None if saved(node, "scale_grad_by_freq") else Operation("product", "product")


OPERATIONS: dict[str, Entry] = {
    **dict.fromkeys(LINEAR, Operation("linear")),
    **dict.fromkeys("Relu LeakyRelu RreluWithNoise Threshold".split(), Operation("linear", "activation")),
    **BALANCED,
    **GATES,
    **PRODUCTS,
    "Trilinear": Operation("product", "product", factors=(0, 2), streams=(0, 2)),
    **dict.fromkeys(["VarMean", "StdMean"], Operation("linear", "norm", gate_result=0)),
    **dict.fromkeys("PreluKernel GridSampler2D GridSampler3D".split(), Operation("linear", streams=(0,))),
    "Lerp": Operation("linear", streams=(0, 1)),
    "ScatterReduce": scatter_reduce,
    "Embedding": embedding,
    "EmbeddingBag": embedding_bag,
    "Div": division,
    "Addcdiv": Operation("division", "norm", streams=(0, 1)),
    **dict.fromkeys(["LinalgSolveTriangular", "LinalgSolveEx"], Operation("division", "norm", streams=(1,))),
    "Pow": power,
    "Sqrt": Operation("power", "product", degree=0.5),
}


# ---- PyTorch's own peculiarities -------------------------------------------------------------------------------------


def in_layout_of_input(node: Node, gradient: Tensor) -> Tensor:
    """PyTorch's eval-mode batch norm derivative on the CPU is wrong where the gradient lies in memory in another order
    than the input did (seen in torch 2.8 to 2.15)."""
    x = saved(node, "input")
    same = gradient.stride() == x.stride() or gradient.device.type != "cpu"
    return gradient if same else torch.empty_like(x, dtype=gradient.dtype).copy_(gradient)


def batch_norm(node: Node) -> Operation:
    """With running statistics it is affine; with those of its own input it is a norm, as instance norm is."""
    if saved(node, "training"):
        return norm(repairs.batch_norm, None, "result2")
    return Operation("linear", incoming=in_layout_of_input, streams=(0, 2))


def written_once(node: Node) -> Operation | None:
    """Of two values written to one place one is lost, but PyTorch's derivative sends gradient to both."""
    live_source = len(node.next_functions) > 1 and node.next_functions[1][0] is not None
    return None if live_source and writes_twice(node) else Operation("linear")


def writes_twice(node: Node) -> bool:
    name, places = operation_name(node), torch.zeros(result_shape(node), dtype=torch.int32)
    if name == "IndexPut":
        if saved(node, "accumulate"):
            return False
        indices = [None if index is None else index.cpu() for index in saved(node, "indices")]
        places = torch.ops.aten.index_put(places, indices, torch.ones((), dtype=torch.int32), True)
    elif name == "Scatter":
        index = saved(node, "index").cpu()
        places.scatter_add_(signed(saved(node, "dim")), index, torch.ones_like(index, dtype=torch.int32))
    else:
        index = saved(node, "index").cpu()
        return len(index.unique()) < index.numel()
    return bool((places > 1).any())


def written_in_place(node: Node) -> Operation | None:
    """An operation in place on a slice of its base: what it did is known by the node it wraps, in its operands' order.

    Nothing can be repaired inside of it; a gate among its factors can be held constant.
    """
    inner = getattr(node, "_wrapped_node", None)
    operation = None if inner is None else operation_of(inner)
    if operation is None or operation.role not in ("linear", "product", "division") or operation.repair is not None:
        return None
    return replace(operation, separable=False)


OPERATIONS |= {
    **dict.fromkeys("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm".split(), batch_norm),
    "CopySlices": written_in_place,
    **dict.fromkeys(["IndexPut", "IndexCopy", "Scatter"], written_once),
    "NativeDropout": Operation("linear"),
}


# ---- other people's autograd functions, by the full name of their class ----------------------------------------------


def bloom_gelu(node: Node, grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients:
    (x,) = node.saved_tensors  # type: ignore[attr-defined]
    (gradient,) = grad_outputs
    assert gradient is not None
    return (repairs.bloom_gelu(gradient, x), *grad_inputs[1:])


def int8_product(node: Any, grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients:
    """q(x) W, where q rounds each row to 8 bits of its largest entry, so that it is of degree one: its slope is q(x)/x.

    Its own derivative takes q for the identity. Columns with outliers aren't rounded (Dettmers et al. 2022).
    """
    quantise = sys.modules[function_class(node).__module__].F.int8_vectorwise_quant
    gradient, x = grad_inputs[0], node.tensors[2]
    assert gradient is not None
    codes, largest, outliers = quantise(x.half(), threshold=node.state.threshold)
    rounded = codes * (largest / 127)[:, None]
    if outliers is not None:
        rounded[:, outliers.long()] = x[:, outliers.long()].to(rounded.dtype)
    mine = repairs.secant(precise(gradient).reshape(x.shape), rounded, precise(x))
    return (mine.view(gradient.shape).to(gradient.dtype), *grad_inputs[1:])


CUSTOM: dict[str, Operation] = {
    "torch.nn.modules._functions.BackwardHookFunction": Operation("linear"),
    "bitsandbytes.autograd._functions.MatMul4Bit": Operation("linear"),
    "bitsandbytes.autograd._functions.MatMul8bitLt": Operation("balanced", "activation", int8_product, streams=(0, 2)),
    "transformers.models.bloom.modeling_bloom.GeLUFunction": Operation("balanced", "activation", bloom_gelu),
}

TAUGHT: dict[str | type, Operation] = {}  # by register_rule


def operation_of(node: Node) -> Operation | None:
    """The operation of one node, None if there is no rule for it."""
    name = operation_name(node)
    if is_custom(node):
        return CUSTOM.get(full_name(function_class(node))) or taught_operation(node)
    entry = OPERATIONS.get(name) if is_native(node) else None
    known = entry(node) if callable(entry) else entry
    return known or taught_operation(node)


def taught_operation(node: Node) -> Operation | None:
    """What register_rule says of it."""
    taught = TAUGHT.get(function_class(node)) if is_custom(node) else None
    taught = taught or TAUGHT.get(operation_name(node))
    count = len(node.next_functions)
    if taught is not None and any(i >= count for i in (*(taught.streams or ()), *factors_of(taught))):
        raise ValueError(
            f"register_rule was told of operand {max((*(taught.streams or ()), *factors_of(taught)))} of "
            f"{operation_name(node)}, which has {count}: count its tensors from 0"
        )
    return taught


def factors_of(operation: Operation) -> tuple[int, ...]:
    return operation.factors if operation.role == "product" else ()


def register_rule(
    operation: str | type[torch.autograd.Function],
    role: Role,
    rule: Rule | None = None,
    backward: Backward | None = None,
    *,
    streams: tuple[int, ...] | None = None,
    factors: tuple[int, int] = (0, 1),
    degree: float = 1.0,
) -> None:
    """Teach the engine an operation that it refuses, such as a custom autograd function of your own.

    Args:
        operation: the `torch.autograd.Function`, or its name as the refusal spelled it. A name stands for everybody's
            function of that name, but never for an operation of PyTorch's that has a rule.
        role: "linear", "balanced", "gate", "product", "division" or "power", as `Operation` in engine/operations.py
            explains them.
        rule: the switch in `Rules` that the repair belongs to; "balanced" and "gate" need one.
        backward: (node, grad_inputs, grad_outputs) -> grad_inputs, the complete derivative; "balanced" needs it, a
            gate has it where it can be the stream.
        streams: the operands that may carry a stream; None means all. The operand of a division that isn't among
            them is the denominator.
        factors: the two operands that a "product" multiplies.
        degree: the exponent of a "power".
    Raises:
        ValueError: the class has a rule already, or what was said of it lacks something or contradicts itself.
    """
    is_function = isinstance(operation, type) and issubclass(operation, torch.autograd.Function)
    if not is_function and not (isinstance(operation, str) and short_name(operation) == operation):
        raise ValueError(
            f"{operation!r} is no operation: give the torch.autograd.Function, or its name as the refusal spells it, "
            "without 'Backward'"
        )
    if rule is not None and rule not in get_args(Rule):
        raise ValueError(f"{rule!r} is no rule; there are {', '.join(get_args(Rule))}")
    if backward is not None and not callable(backward):
        raise ValueError(f"backward is (node, grad_inputs, grad_outputs) -> grad_inputs, got {backward!r}")
    if not isinstance(degree, int | float) or not math.isfinite(degree) or degree == 0:
        raise ValueError(f"degree is the exponent, a number that isn't 0, got {degree!r}")
    for name, operands in {"streams": streams or (), "factors": factors}.items():
        if not isinstance(operands, tuple) or not all(isinstance(i, int) and i >= 0 for i in operands):
            raise ValueError(f"{name} are numbers of operands, such as (0, 1), got {operands!r}")
    if len(set(factors)) != 2:
        raise ValueError(f"a product has two factors, got {factors!r}")
    if role not in get_args(Role):
        raise ValueError(f"{role!r} is no role; there are {', '.join(get_args(Role))}")
    known = CUSTOM.get(full_name(operation)) if isinstance(operation, type) else None
    if known is not None:
        raise ValueError(f"{operation!r} has a rule already ({known.role}); a second one would change every model")
    if role == "balanced" and (backward is None or rule is None):
        raise ValueError(
            f"a balanced operation needs its complete backward and the rule that switches it; {operation!r} has "
            f"{rule=} and {backward=}"
        )
    if role == "gate" and rule is None:
        raise ValueError(
            f"a gate needs the rule that holds it constant: register_rule({operation!r}, 'gate', rule='activation')"
        )
    default: dict[str, Rule] = {"product": "product", "power": "product", "division": "norm"}
    streams = (0,) if streams is None and role == "division" else streams
    TAUGHT[operation] = Operation(role, rule or default.get(role), backward, factors, streams, degree)


# ---- what to do about an operation that is refused: each of these is tried in tests/engine/test_cures.py -------------

CURES = {
    "CopySlices": "an operation in place on a slice hides what it did: write it out of place",
    **dict.fromkeys(
        ["IndexPut", "IndexCopy", "Scatter"],
        "one place is written twice, and PyTorch's derivative counts both values: write each place once",
    ),
    "Elu": "in place it hides its argument: set inplace=False",
    "Celu": "in place it hides its argument: set inplace=False",
    "MkldnnRnnLayer": "a fused LSTM hides its gates: run it inside torch.backends.mkldnn.flags(enabled=False)",
    "WarnNotImplemented": "an operator without a derivative, of a quantised layer perhaps: explain the model as it was "
    "before, or what model.dequantize() of transformers makes of it",
    "CudnnRnn": "a fused LSTM hides its gates: run it inside torch.backends.cudnn.flags(enabled=False)",
}
CURES_OF_CUSTOMS = {
    "CheckpointFunction": "reentrant checkpointing hides the graph: checkpoint with use_reentrant=False",
    "CompiledFunction": "torch.compile hides the graph: run the model without compiling it, or inside "
    "torch.compiler.set_stance('force_eager')",
    "FlashAttnFunc": "load the model with attn_implementation='sdpa'",
}
AT_THE_OUTPUT = {
    "Softmax": "explain a logit, or a difference of logits, never a probability",
    "LogSoftmax": "explain a logit, or a difference of logits, never a log-probability",
    "Logsumexp": "explain a logit, or a difference of logits, never a log-probability",
}


def cure(node: Node, only_linear_above: bool) -> str:
    """What to do about a node that is refused; `only_linear_above`: nothing nonlinear between it and the output."""
    name, operation = operation_name(node), operation_of(node)
    known = CURES_OF_CUSTOMS if is_custom(node) else CURES
    if name in known:
        return known[name]
    if operation is None:
        return (
            f"if it is of degree one (f(2x) = 2 f(x)), teach it with libragrad_minimal.register_rule({name!r}, "
            "'linear'); if not, with its complete backward"
        )
    if operation.role != "gate":
        return "an operand that should be a constant depends on the input: pass detach()ed what is not to be explained"
    if name == "Sigmoid":
        return "run the forward pass inside observed(), which makes its 1/2 a constant; or explain the logit before it"
    if only_linear_above:
        return AT_THE_OUTPUT.get(name, "explain the logit before it")
    return "it has no complete form as the stream: explain from its result on: give libra_grad that tensor as the input"
