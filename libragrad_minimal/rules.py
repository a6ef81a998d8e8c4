"""What every autograd operation's balanced backward is: one table, no models.

A layer is *complete* when its output equals <input, gradient> plus its additive constants. Euler's theorem says which
layers are: those homogeneous of degree one. The table below names, for each operation PyTorch records, the role
it plays, and for the offenders the backward pass that repairs them (Mehri et al. 2025, section 3, theorems 4 and 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]  # (node, grad_inputs, grad_outputs) -> grad_inputs


@dataclass(frozen=True)
class Rules:
    """Which repairs are on. A repair that is off leaves PyTorch's own derivative.

    attention:  True holds the attention map constant, so that only the values carry gradient (theorem 5);
                "halve" keeps the softmax's derivative and halves every product around it (AttnLRP: q/4, k/4, v/2).
    activation: GELU, SiLU and relatives get the slope f(x)/x; a sigmoid or tanh that multiplies a stream is constant
                (theorem 5).
    norm:       the denominator of a normalisation or division is constant (theorem 5, corollary 2).
    product:    each factor of a product of two streams gets half the gradient; x**k gets 1/k of it (theorem 4, Euler).
    residual:   share a residual addition's relevance by sign agreement (ResLRP, Berend et al. 2026); the forward pass
                must have run inside `record_residuals()`.
    """

    attention: bool | Literal["halve"] = True
    activation: bool = True
    norm: bool = True
    product: bool = True
    residual: bool = False

    def without(self, *names: str) -> Rules:
        """The same rules with the named repairs switched off, e.g. `LIBRA.without("norm")`."""
        unknown = set(names) - set(self.__dataclass_fields__)
        if unknown:
            raise ValueError(f"no rule is called {sorted(unknown)}; there are {sorted(self.__dataclass_fields__)}")
        return replace(self, **dict.fromkeys(names, False))


LIBRA = Rules()
PLAIN = Rules(attention=False, activation=False, norm=False, product=False)
ATTN_LRP = Rules(attention="halve")  # Achtibat et al. 2024
ALI_LRP = Rules(activation=False, product=False)  # Ali et al. 2022, conservative propagation
DECOMPX = Rules(product=False)  # DecompX-like: Libra without the product rule


@dataclass(frozen=True)
class Operation:
    """The role an autograd operation plays in the walk of backward.py.

    linear:   homogeneous of degree one in its live operands together; its own derivative is complete.
    balanced: computes one output stream from one input stream; `backward` is its repair, switched by `rule`.
    gate:     a nonlinearity without a degree. Constant where it multiplies a stream; where it *is* the stream,
              `backward` is its complete form, and without one it is refused.
    product:  bilinear in the operands `factors`, linear in the others.
    division: operand 0 over operand 1.
    power:    operand 0 to a constant exponent.
    """

    role: Literal["linear", "balanced", "gate", "product", "division", "power"]
    rule: Literal["attention", "activation", "norm", "product"] | None = None
    backward: Backward | None = None
    factors: tuple[int, int] = (0, 1)
    streams: tuple[int, ...] | None = None  # the operands it is linear or balanced in; None: all that can be live
    gate_result: int | None = (
        None  # this one of a linear operation's several results is a gate: the variance of var_mean
    )


def saved(node: Node, name: str):
    """What the forward pass saved on `node`.

    Non-reentrant checkpointing hands each tensor out once per backward pass, and PyTorch's own derivative has had it;
    asked from outside that pass, which another thread is, it recomputes.
    """
    try:
        return getattr(node, f"_saved_{name}")
    except CheckpointError:
        with ThreadPoolExecutor(1) as outside:
            return outside.submit(getattr, node, f"_saved_{name}").result()


def precise(tensor: Tensor) -> Tensor:
    """Half precision loses ratios and sums: work in float32 at least."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def replaced(grad_inputs: Gradients, gradient: Tensor) -> Gradients:
    """`gradient` in the place of the first operand's."""
    return (gradient if grad_inputs[0] is None else gradient.to(grad_inputs[0].dtype), *grad_inputs[1:])


def scratch(grad_inputs: Gradients, like: Tensor) -> Tensor:
    """Memory for the first operand's gradient: that of PyTorch's own result, which nothing needs any more."""
    mine = grad_inputs[0] is not None and grad_inputs[0].dtype == like.dtype
    return grad_inputs[0] if mine else torch.empty_like(like)


# ---- activations: the slope f(x)/x, written so that it is exact at 0 -------------------------------------------------


def secant(function: Callable[[Tensor, Node, Tensor], Tensor], slope_at_zero: float = 1.0) -> Backward:
    """Backward of an activation f: the slope f(x)/x of the line from the origin to (x, f(x)).

    function(x, node, out) is the activation itself, by its fast forward kernel, if possible in the memory `out`.
    """

    def backward(node, grad_inputs, grad_outputs):
        x = precise(saved(node, "self"))
        ratio = function(x, node, scratch(grad_inputs, x)).div_(x)
        ratio.nan_to_num_(slope_at_zero, math.inf, -math.inf)  # 0/0 is the only NaN
        return replaced(grad_inputs, ratio.mul_(grad_outputs[0]))

    return backward


def silu(node, grad_inputs, grad_outputs):
    x = precise(saved(node, "self"))
    return replaced(grad_inputs, torch.sigmoid(x, out=scratch(grad_inputs, x)).mul_(grad_outputs[0]))


def gelu(x: Tensor, node: Node, out: Tensor) -> Tensor:
    return torch._C._nn.gelu(x, approximate=saved(node, "approximate"), out=out)


def elu(x: Tensor, node: Node, out: Tensor) -> Tensor:
    negative = saved(node, "alpha") * torch.expm1(x.clamp(max=0) * saved(node, "input_scale"))
    return saved(node, "scale") * torch.where(x > 0, x, negative)


def tanh_secant(node, grad_inputs, grad_outputs):
    """tanh saves its result y only, so x = atanh(y): near saturation right to three digits, beyond that refused."""
    y = saved(node, "result")
    if ((1 - precise(y).abs() < 16 * torch.finfo(y.dtype).eps) & (grad_outputs[0] != 0)).any():
        raise ArithmeticError(
            f"a tanh that carries the stream is saturated: in {y.dtype} its result no longer tells its argument, so "
            "that its balanced slope tanh(x)/x is unknown. Run the model in float64: model.double()."
        )
    y = precise(y)
    ratio = torch.where(y == 0, 1, y / torch.atanh(torch.where(y == 0, 0.5, y)))
    return replaced(grad_inputs, ratio * grad_outputs[0])


def glu(node, grad_inputs, grad_outputs):
    """GLU: first half times sigmoid(second half); only the first half is a stream."""
    dim = saved(node, "dim")
    dim -= 2**64 if dim >= 2**63 else 0  # PyTorch hands out negative dimensions as unsigned numbers
    gate = torch.sigmoid(precise(saved(node, "self")).chunk(2, dim)[1])
    stream = gate * grad_outputs[0]
    return replaced(grad_inputs, torch.cat([stream, torch.zeros_like(stream)], dim))


def bloom_gelu(node, grad_inputs, grad_outputs):
    """transformers' BLOOM writes its tanh-GELU as a custom autograd function that saves its input."""
    (x,) = node.saved_tensors
    gate = 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return replaced(grad_inputs, gate * grad_outputs[0])


def unchanged(node, grad_inputs, grad_outputs):
    return grad_inputs


# ---- norms: (x - mean) / [std] * weight; only the mean stays differentiable ------------------------------------------


def layer_norm(node, grad_inputs, grad_outputs):
    weight, rstd = saved(node, "weight"), saved(node, "result2")
    dims = tuple(range(-len(saved(node, "normalized_shape")), 0))
    gradient = precise(grad_outputs[0])
    out = scratch(grad_inputs, gradient)
    gradient = gradient if weight is None else torch.mul(gradient, weight, out=out)
    return replaced(grad_inputs, torch.sub(gradient, gradient.mean(dims, keepdim=True), out=out).mul_(rstd))


def rms_norm(node, grad_inputs, grad_outputs):
    weight, rstd = saved(node, "weight"), saved(node, "result1")
    gradient = precise(grad_outputs[0]) * rstd
    return replaced(grad_inputs, gradient if weight is None else gradient.mul_(weight))


def group_norm(node, grad_inputs, grad_outputs):
    weight, rstd = saved(node, "weight"), saved(node, "result2")
    samples, channels, groups = (saved(node, name) for name in ("N", "C", "group"))
    gradient = precise(grad_outputs[0]).reshape(samples, channels, -1)
    if weight is not None:
        gradient = gradient * weight[:, None]
    gradient = gradient.reshape(samples, groups, -1)
    gradient = (gradient - gradient.mean(-1, keepdim=True)) * rstd.reshape(samples, groups, 1)
    return replaced(grad_inputs, gradient.reshape(grad_outputs[0].shape))


def batch_norm(node, grad_inputs, grad_outputs):
    """Batch norm with the statistics of its own input is a norm, as instance norm is."""
    weight, rstd = saved(node, "weight"), saved(node, "result2")
    gradient = precise(grad_outputs[0])
    if weight is not None:
        gradient = gradient * per_channel(weight, gradient)
    centred = gradient - gradient.mean([0, *range(2, gradient.dim())], keepdim=True)
    return replaced(grad_inputs, centred * per_channel(rstd, gradient))


def affine_batch_norm(node, grad_inputs, grad_outputs):
    """With running statistics it is affine and needs no repair, but PyTorch's own derivative on the CPU is wrong where
    the gradient arrives in another memory layout than the input had (seen in torch 2.15)."""
    gradient, x = precise(grad_outputs[0]), precise(saved(node, "input"))
    weight, mean, variance = saved(node, "weight"), saved(node, "running_mean"), saved(node, "running_var")
    rstd = torch.rsqrt(variance + saved(node, "eps"))
    to_x = gradient * per_channel(rstd if weight is None else rstd * weight, gradient)
    to_weight = gradient * (x - per_channel(mean, x)) * per_channel(rstd, x)
    channels_apart = [0, *range(2, gradient.dim())]
    results = (to_x, to_weight.sum(channels_apart), gradient.sum(channels_apart))
    return tuple(None if g is None else mine.to(g.dtype) for g, mine in zip(grad_inputs, results, strict=True))


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape([1, -1] + [1] * (like.dim() - 2))


# ---- products, powers, attention -------------------------------------------------------------------------------------


def scaled(node: Node, grad_inputs: Gradients, factors: dict[int, float | None]) -> Gradients:
    """A product's gradients times a number each. None cuts; operands not named keep theirs.

    PyTorch's own products hand out fresh tensors, which can be scaled in place; a custom function's may be others'.
    """
    times = Tensor.mul if isinstance(node, BackwardCFunction) else Tensor.mul_
    return tuple(
        g if g is None or i not in factors else None if factors[i] is None else times(g, factors[i])
        for i, g in enumerate(grad_inputs)
    )


def values_only(node, grad_inputs, grad_outputs):
    """Fused attention with its map held constant: nothing to queries, keys and mask."""
    return tuple(g if i == 2 else None for i, g in enumerate(grad_inputs))


def halved_attention(node, grad_inputs, grad_outputs):
    """AttnLRP: two nested products, each halved."""
    return scaled(node, grad_inputs, {0: 0.25, 1: 0.25, 2: 0.5})


def exponent_of(node) -> float:
    return 0.5 if node.name().startswith("Sqrt") else float(saved(node, "exponent"))


# ---- the table -------------------------------------------------------------------------------------------------------

LINEAR = """
Add Sub Rsub Neg Sum Mean Cumsum Trace Clone Alias ToCopy Copy Contiguous View UnsafeView Reshape ReshapeAlias
AsStrided Expand Permute Transpose T Mt Movedim Unsqueeze Squeeze Slice Select Narrow Index IndexSelect Gather
TakeAlongDim MaskedSelect Take Cat Stack Split UnsafeSplit SplitWithSizes UnsafeSplitWithSizes Unbind Chunk Repeat
RepeatInterleave Roll Flip Rot90 Unfold Im2Col Col2Im Diagonal Tril Triu MaskedFill MaskedScatter Where IndexPut
IndexAdd IndexCopy IndexFill Scatter ScatterAdd SliceScatter SelectScatter ConstantPadNd ReflectionPad1D
ReflectionPad2D ReplicationPad1D ReplicationPad2D AvgPool1D AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D
MkldnnAdaptiveAvgPool2D MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D UpsampleNearest1D
UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D
UpsampleLinear1D UpsampleBilinear2D UpsampleTrilinear3D UpsampleBicubic2D UpsampleBilinear2DAa UpsampleBicubic2DAa
DiagEmbed PixelShuffle PixelUnshuffle Embedding Relu LeakyRelu RreluWithNoise Threshold Abs Max Min Amax Amin Cummax
Cummin Maximum Minimum Fmax Fmin Sort Topk Kthvalue Median NanToNum ViewAsReal ViewAsComplex Real Imag Complex Conj
ResolveConj FftR2C FftC2R FftC2C NativeDropout BackwardHookFunction MatMul4Bit MatMul8bitLt
""".split()

BALANCED = {
    "Gelu": ("activation", secant(gelu, 0.5)),
    "GeLUFunction": ("activation", bloom_gelu),
    "Silu": ("activation", silu),
    "Hardswish": ("activation", secant(lambda x, node, out: F.hardswish(x), 0.5)),
    "Mish": ("activation", secant(lambda x, node, out: F.mish(x), 0.6)),
    "Glu": ("activation", glu),
    "Elu": ("activation", secant(elu)),
    "Celu": ("activation", secant(lambda x, node, out: F.celu(x, float(saved(node, "alpha"))))),
    "Clamp": ("activation", secant(lambda x, node, out: x.clamp(saved(node, "min"), saved(node, "max")))),
    "ClampMin": ("activation", secant(lambda x, node, out: x.clamp(min=saved(node, "min")))),
    "ClampMax": ("activation", secant(lambda x, node, out: x.clamp(max=saved(node, "max")))),
    "Softshrink": (
        "activation",
        secant(lambda x, node, out: F.softshrink(x, float(saved(node, "lambd")))),
    ),
    "NativeLayerNorm": ("norm", layer_norm),
    "FusedRmsNorm": ("norm", rms_norm),
    "NativeGroupNorm": ("norm", group_norm),
    "NativeBatchNorm": ("norm", batch_norm),
    "CudnnBatchNorm": ("norm", batch_norm),
    **dict.fromkeys(
        "ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu ScaledDotProductEfficientAttention "
        "ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable".split(),
        ("attention", values_only),
    ),
}

BALANCED_STREAMS = {"activation": (0,), "norm": (0, 2), "attention": (2,)}  # a norm's bias, attention's values

GATES = {
    **dict.fromkeys(["Softmax", "SafeSoftmax", "LogSoftmax", "Logsumexp"], ("attention", None)),
    **dict.fromkeys(
        "Sigmoid Hardsigmoid Softplus LogSigmoid Exp Exp2 Expm1 Log Log1P Sin Cos Erfc".split(),
        ("activation", None),
    ),
    "Tanh": ("activation", tanh_secant),
    "Erf": ("activation", secant(lambda x, node, out: torch.erf(x), 2 / math.sqrt(math.pi))),
    "Atan": ("activation", secant(lambda x, node, out: torch.atan(x))),
    "Asinh": ("activation", secant(lambda x, node, out: torch.asinh(x))),
    "Hardtanh": ("activation", secant(lambda x, node, out: x.clamp(saved(node, "min_val"), saved(node, "max_val")))),
    **dict.fromkeys(["Rsqrt", "Reciprocal", "Var"], ("norm", None)),
    **dict.fromkeys(["Std", "Norm", "LinalgVectorNorm"], ("norm", unchanged)),  # of degree one already
}

PRODUCTS = {
    **dict.fromkeys(["Mul", "Mm", "Bmm", "Mv", "Dot", "GroupedMm"], (0, 1)),
    **dict.fromkeys(["Addmm", "Baddbmm", "Addbmm", "Addmv", "Addcmul", "Addr"], (1, 2)),
    **dict.fromkeys(["Convolution", "Linear", "MkldnnLinear"], (0, 1)),
}

OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(LINEAR, Operation("linear")),
    **{
        name: Operation("balanced", rule, backward, streams=BALANCED_STREAMS[rule])
        for name, (rule, backward) in BALANCED.items()
    },
    **{name: Operation("gate", rule, backward) for name, (rule, backward) in GATES.items()},
    **{name: Operation("product", "product", factors=factors) for name, factors in PRODUCTS.items()},
    **dict.fromkeys(["VarMean", "StdMean"], Operation("linear", "norm", gate_result=0)),
    "PreluKernel": Operation("linear", streams=(0,)),
    "Div": Operation("division", "norm", streams=(0,)),
    "Pow": Operation("power", "product"),
    "Sqrt": Operation("power", "product"),
}

AFFINE_BATCH_NORM = Operation("linear", backward=affine_batch_norm, streams=(0, 2))

CURES = {
    "CheckpointFunction": "reentrant checkpointing hides the graph: checkpoint with use_reentrant=False",
    "CompiledFunction": "torch.compile hides the graph: run the model without compiling it",
    "CopySlices": "an operation in place on a slice hides what it did: write it out of place (inplace=False)",
    "Elu": "in place it hides its argument: set inplace=False",
    "FlashAttnFunc": "load the model with attn_implementation='sdpa'",
    "MkldnnRnnLayer": "a fused LSTM hides its gates: run it inside torch.backends.mkldnn.flags(enabled=False)",
    "Softmax": "explain a logit, or a difference of logits, never a probability",
    "LogSoftmax": "explain a logit, or a difference of logits, never a log-probability",
    "Logsumexp": "explain a logit, or a difference of logits, never a log-probability",
}


@cache
def short_name(full_name: str) -> str:
    """'NativeLayerNormBackward0' -> 'NativeLayerNorm', 'torch::autograd::CopySlices' -> 'CopySlices'."""
    return re.sub(r"Backwards?\d*$", "", full_name.rsplit("::", 1)[-1])


def operation_name(node: Node) -> str:
    return short_name(node.name())


def operation_of(node: Node) -> Operation | None:
    """The operation of one node, None if there is no rule for it. What a node saved can change what its name means."""
    name = operation_name(node)
    if name.endswith("BatchNorm") and not saved(node, "training"):
        return AFFINE_BATCH_NORM
    if name == "Elu" and not hasattr(node, "_saved_self"):
        return None
    if name in ("Norm", "LinalgVectorNorm") and saved(node, "p" if name == "Norm" else "ord") == 0:
        return None  # counts the entries that aren't 0
    if name == "Div" and getattr(node, "_saved_rounding_mode", None) is not None:
        return None
    if name == "Pow":
        exponent = saved(node, "exponent")
        if isinstance(exponent, Tensor):
            return None
        return OPERATIONS["Pow"] if exponent > 0 else OPERATIONS["Reciprocal"]
    return OPERATIONS.get(name)


def register_rule(
    name: str,
    role: Literal["linear", "balanced", "gate", "product"],
    rule: Literal["attention", "activation", "norm", "product"] | None = None,
    backward: Backward | None = None,
) -> None:
    """Teach the engine an operation it refuses, such as a custom autograd function of your own.

    name: as the refusal spelled it, e.g. "MyNorm" for `class MyNorm(torch.autograd.Function)`.
    role, rule: see `Operation`. backward(node, grad_inputs, grad_outputs) -> grad_inputs is the complete derivative.
    Raises ValueError for a name that has a rule already, or a role that lacks what it needs.
    """
    if name in OPERATIONS:
        raise ValueError(
            f"{name!r} has a rule already ({OPERATIONS[name].role}); a second one would change every model"
        )
    roles = ("linear", "balanced", "gate", "product")
    if role not in roles:
        raise ValueError(f"{role!r} is no role; there are {', '.join(roles)}")
    if role == "balanced" and (backward is None or rule is None):
        raise ValueError(
            f"a balanced operation needs its complete backward and the rule that switches it; {name!r} has "
            f"{rule=} and {backward=}"
        )
    if role == "gate" and rule is None:
        raise ValueError(
            f"a gate needs the rule that holds it constant: register_rule({name!r}, 'gate', rule='activation')"
        )
    OPERATIONS[name] = Operation(role, "product" if role == "product" else rule, backward)
