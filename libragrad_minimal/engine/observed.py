"""The one context for a forward pass: it catches what nodes don't save.

    with observed():
        logit = model(images)[:, 281]
    constants = additive_constants(logit, images)
    gradients = libra_grad(logit, (images, *constants))  # sum to the logit, frozen biases and buffers included

Autograd follows what requires grad, so every constant that is added becomes a leaf that does: the same memory under
another name. The forward pass computes what it always does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nodes import ARGUMENT, COUNTED, HALF, OPERANDS, VERSION, Half, note
from .plan import UnsupportedOperation

Arguments = dict[str, Any]


class observed(TorchFunctionMode):
    """Context for a forward pass, after which `additive_constants` finds *every* constant that is added.

    Buffers, frozen parameters, running means, plain numbers: each becomes a leaf tensor, which libra_grad takes as an
    input. It also remembers the arguments of tanh and expm1, whose nodes save only their results, so that these are
    exact in any precision; a tanh then costs the memory of its argument. Nothing else of an activation's size is kept.

    Args:
        residuals: remember both operands of every addition, which the rule `residual` needs.
    Raises:
        ValueError: a module in training mode dropped something at random.
    """

    def __init__(self, residuals: bool = False):
        super().__init__()
        self.residuals = residuals
        self.half: Half | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in NOTICED and not isinstance(function, OPERATORS):
            return function(*args, **kwargs)
        check_eval_mode(function, args, kwargs)
        if function not in HANDLED and not isinstance(function, OPERATORS) or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        live = first_live([*args, *kwargs.values()])
        if live is None:
            return function(*args, **kwargs)
        return self.with_leaves(function, live, list(args), dict(kwargs))

    def with_leaves(self, function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Any:
        function = packet(function)  # torch.ops.aten.add.Scalar wants a number, its packet chooses .Tensor
        held_zeros = is_in_place(function) and make_written_tensor_live(function, args)
        if function in REWRITTEN:
            result = REWRITTEN[function](function, live, args, kwargs)
        else:
            adds_zero = False
            for position, keyword in places_that_add(function, args):
                holder: Any = args if position < len(args) else kwargs
                place = position if holder is args else keyword
                if holder is args or place in kwargs:
                    adds_zero |= is_number(holder[place]) and holder[place] == 0
                    holder[place] = leaves(holder[place], live)
            result = self.run(function, args, kwargs)
            if adds_zero and isinstance(result, Tensor):
                without_row(result)
        if held_zeros:
            without_row(base_of(args[0]))
        return result

    def run(self, function: Callable, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Runs it, and notes on its node what that doesn't save."""
        operands = self.operands(function, args, kwargs)
        argument = args[0].detach() if function in KEPT_ARGUMENT and not is_in_place(function) else None
        result = function(*args, **kwargs)
        node = result.grad_fn if isinstance(result, Tensor) else None
        if node is not None and operands is not None:
            note(node, OPERANDS, operands)
        if node is not None and argument is not None:
            note(node, ARGUMENT, argument)
        if node is not None and function in SIGMOIDS:
            note(node, HALF, self.one_half(result))
        return result

    def operands(self, function: Callable, args: list[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Both operands of an addition of two tensors of one shape."""
        adds_two = self.residuals and function in ADDITIONS and len(args) == 2 and kwargs.get("alpha", 1) == 1
        if not adds_two or not all(isinstance(a, Tensor) for a in args) or args[0].shape != args[1].shape:
            return None
        first = args[0].detach()
        return first.clone() if is_in_place(function) else first, args[1].detach()

    def one_half(self, like: Tensor) -> Half:
        if self.half is None:
            self.half = torch.tensor(0.5, dtype=like.dtype, device=like.device).as_subclass(Half)
            self.half.requires_grad_()
        return self.half


def check_eval_mode(function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuses dropout, and whatever else a module in training mode draws at random, such as patches to leave out."""
    drops = function in DROPOUTS and kwargs.get("training", args[2] if len(args) > 2 else True)
    drops = drops and kwargs.get("p", args[1] if len(args) > 1 else 0.5) > 0
    module = running_module() if drops or function in RANDOM else None
    if drops or module is not None and module.training:
        name = function.__name__ if module is None else type(module).__name__
        raise ValueError(
            f"{name} dropped something at random (dropout was active): call model.eval() before the forward pass"
        )


def running_module() -> nn.Module | None:
    """The module whose method runs, by the name that every method has for it."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            return module
        frame = frame.f_back  # type: ignore[assignment]
    return None


# ---- constants become leaves -----------------------------------------------------------------------------------------


def is_live(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.requires_grad


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | complex)


def first_live(values: Sequence[Any]) -> Tensor | None:
    for value in values:
        if is_live(value):
            return value
        if isinstance(value, list | tuple) and (found := first_live(value)) is not None:
            return found
    return None


def leaves(value: Any, live: Tensor) -> Any:
    """A constant as a leaf that requires grad: the same memory. Lists and tuples of constants one by one."""
    if isinstance(value, list | tuple):
        return type(value)(leaves(v, live) for v in value) if type(value) in (list, tuple) else value
    if is_number(value):
        return number_as_leaf(value, live) if value != 0 and math.isfinite(abs(value)) else value
    if type(value) not in PLAIN_TENSORS or value.requires_grad or not value.numel():
        return value
    value = value.clone() if value.is_inference() else value.detach()
    return versioned(value.to(torch.promote_types(value.dtype, live.dtype)))  # its gradient will be that precise


def number_as_leaf(value: complex, live: Tensor) -> Tensor:
    """A tensor without dimensions, which takes part in an operation as the number would, rounded no more than it."""
    half = live.dtype in (torch.float16, torch.bfloat16) and live.dim() > 0
    return versioned(torch.tensor(value, dtype=torch.float32 if half else live.dtype))


def versioned(leaf: Tensor) -> Tensor:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedOperation(
            "a constant is added inside torch.func.vmap (or another transform of torch.func), where observed() can't "
            "count it: write the batch dimension out, or add the constant outside"
        )
    leaf.requires_grad_()
    setattr(leaf, VERSION, leaf._version)
    return leaf


PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def nothing_but_gradient(constant: Tensor) -> Tensor:
    """Zeros, through which gradient reaches a leaf of the value `constant` that the forward pass has already:
    leaf - leaf is exactly 0."""
    leaf = versioned(constant.detach().nan_to_num(0.0, 0.0, 0.0))  # empty memory holds anything, until written over
    return without_row(leaf - leaf.detach())


def without_row(tensor: Tensor) -> Tensor:
    """What its node seems to hide has a leaf of its own, or is zero: the audit needn't speak of it."""
    if tensor.grad_fn is not None:
        note(tensor.grad_fn, COUNTED, True)
    return tensor


def base_of(tensor: Tensor) -> Tensor:
    return tensor._base if tensor._is_view() and tensor._base is not None else tensor


def make_written_tensor_live(function: Callable, args: list[Any]) -> bool:
    """A tensor without a graph that something live is written into: what it held before is a constant.

    Returns whether there is nothing to count there: it held zeros.
    """
    written = args[0]
    base = base_of(written)
    if base.requires_grad or not base.is_floating_point():
        return False
    if function is Tensor.copy_ and base is written:
        return False  # nothing of it is left
    if not base.any():
        return True
    without_row(base.add_(nothing_but_gradient(base)))
    _ = written.grad_fn  # PyTorch looks anew at what a view is part of only when it is asked
    return False


def is_in_place(function: Callable) -> bool:
    name = getattr(function, "__name__", "")
    return name.startswith("__i") or name == "__setitem__" or name.endswith("_") and not name.endswith("__")


# ---- which functions add, and which of their arguments ---------------------------------------------------------------

OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def packet(function: Callable) -> Callable:
    return getattr(function, "overloadpacket", function)


def spellings(name: str) -> list[Callable]:
    """Every function of PyTorch's of this name: of torch, of tensors, in place, as operators, of nn.functional."""
    names = (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")
    found = [getattr(place, n, None) for place in (torch, Tensor, F, torch.special) for n in names]
    return [function for function in found if callable(function)]


Places = tuple[tuple[int, str], ...]  # position and keyword of each argument that is added


def places_that_add(function: Callable, args: Sequence[Any]) -> Places:
    """Where its arguments are added, what it writes into left out."""
    by_name = isinstance(function, OPERATORS)
    places = ADDED_BY_NAME.get(function.__name__, ()) if by_name else ADDED.get(function, ())
    if function in BINARY_OR_REDUCTION and len(args) > 1 and isinstance(args[1], Tensor):
        places = ((0, "input"), (1, "other"))
    if (factors := FACTORS.get(function)) is not None and not any(is_live(args[i]) for i in factors):
        places = (*places, (factors[0], ""))
    return tuple(place for place in places if place[0] != 0) if is_in_place(function) else places


ADDED_BY_NAME: dict[str, Places] = {
    **dict.fromkeys("add sub subtract rsub maximum minimum fmax fmin".split(), ((0, "input"), (1, "other"))),
    **dict.fromkeys("div divide true_divide prelu grid_sample".split(), ((0, "input"),)),
    **dict.fromkeys("slice_scatter select_scatter diagonal_scatter".split(), ((0, "input"), (1, "src"))),
    "lerp": ((0, "input"), (1, "end")),
    "addcdiv": ((0, "input"), (1, "tensor1")),
    "complex": ((0, "real"), (1, "imag")),
    "masked_fill": ((0, "input"), (2, "value")),
    "masked_scatter": ((0, "input"), (2, "source")),
    "index_fill": ((0, "input"), (3, "value")),
    **dict.fromkeys(["index_copy", "index_add"], ((0, "input"), (3, "source"))),
    **dict.fromkeys(["scatter_add", "scatter_reduce"], ((0, "input"), (3, "src"))),
    **dict.fromkeys(
        "cat concat concatenate stack hstack vstack dstack column_stack row_stack".split(), ((0, "tensors"),)
    ),
    **dict.fromkeys("addmm baddbmm addbmm addmv addr addcmul".split(), ((0, "input"),)),
    **dict.fromkeys("linear conv1d conv2d conv3d".split(), ((2, "bias"),)),
    **dict.fromkeys("conv_transpose1d conv_transpose2d conv_transpose3d".split(), ((2, "bias"),)),
    "bilinear": ((3, "bias"),),
    **dict.fromkeys(["layer_norm", "group_norm"], ((0, "input"), (3, "bias"))),
    "multi_head_attention_forward": (
        (2, "value"), (6, "in_proj_bias"), (7, "bias_k"), (8, "bias_v"), (12, "out_proj_bias")
    ),
    **dict.fromkeys("lstm gru rnn_tanh rnn_relu".split(), ((1, "hx"), (2, "params"))),
    **dict.fromkeys("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split(), ((1, "hx"), (4, "b_ih"), (5, "b_hh"))),
    "copy": ((1, "src"),),
    "fill": ((1, "value"),),
}  # fmt: skip
ADDED: dict[Callable, Places] = {
    function: places for name, places in ADDED_BY_NAME.items() for function in spellings(name)
}
ADDED |= {torch.where: ((1, "input"), (2, "other")), Tensor.where: ((0, "input"), (2, "other"))}
# Of a product of two constants that is added, one is the stream.
FACTORS = {
    function: (1, 2) for name in "addmm baddbmm addbmm addmv addr addcmul".split() for function in spellings(name)
}
# max and min of two tensors; of one and a dimension they are reductions
BINARY_OR_REDUCTION = {torch.max, torch.min, Tensor.max, Tensor.min}
ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
KEPT_ARGUMENT = {function for name in ("tanh", "expm1") for function in spellings(name)}
SIGMOIDS = {torch.sigmoid, Tensor.sigmoid, torch.special.expit}
DROPOUTS = {
    getattr(F, name) for name in "dropout alpha_dropout dropout1d dropout2d dropout3d feature_alpha_dropout".split()
}
RANDOM = {
    function
    for name in "bernoulli rand randn rand_like randn_like randint randperm multinomial normal uniform".split()
    for function in spellings(name)
}


# ---- functions whose constant is no argument that could require grad: the same values by another way -----------------


def batch_norm(function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """With running statistics it subtracts their mean: a constant beside the bias."""
    statistics, affine = ("running_mean", "running_var"), ("weight", "bias")
    order = (*affine, *statistics) if function is torch.batch_norm else (*statistics, *affine)
    own = "use_input_stats" if function is F.instance_norm else "training"
    names = ("input", *order, own, "momentum", "eps", "cudnn_enabled")
    call = dict(zip(names, args, strict=False)) | kwargs
    call["input"] = leaves(call["input"], live)
    mean, variance = call.get("running_mean"), call.get("running_var")
    weight, bias = call.get("weight"), leaves(call.get("bias"), live)
    of_its_input = call.get(own, function is F.instance_norm)
    if of_its_input or mean is None or variance is None or mean.requires_grad:
        return call_with(function, names, call | {"bias": bias})
    shift = -mean * torch.rsqrt(variance + call.get("eps", 1e-5))
    shift = shift if weight is None else shift * weight.detach()
    bias = torch.zeros_like(shift) if bias is None else bias
    return without_row(call_with(function, names, call | {"bias": without_row(bias + nothing_but_gradient(shift))}))


def call_with(function: Callable, names: Sequence[str], call: Arguments) -> Tensor:
    """torch.batch_norm takes its arguments by position only, those of nn.functional have names."""
    return function(*(call[name] for name in names)) if function is torch.batch_norm else function(**call)


def padded(function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    call = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    value = call.get("value") or 0
    result = without_row(function(*args, **kwargs))
    if call.get("mode", "constant") != "constant" or value == 0:
        return result
    leaf = leaves(value, live)  # on the border: everywhere, less the inside; no step of this saves anything
    border = leaf.expand(result.shape) - F.pad(leaf.expand(live.shape), call["pad"], value=0)
    return without_row(result + without_row(border - border.detach()))


def thresholded(function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    call = dict(zip(("input", "threshold", "value", "inplace"), args, strict=False)) | kwargs
    x = call["input"]
    result = torch.where(x > call["threshold"], x, leaves(call["value"], live))
    return x.copy_(result) if is_in_place(function) or call.get("inplace", False) else result


def without_nan(function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    finite = live.isfinite()
    result = function(*args, **kwargs)
    return result if finite.all() else torch.where(finite, live, leaves(result.detach(), live))


WRITES: dict[str, tuple[tuple[str, ...], Callable[[Tensor, Arguments, Any], Any]]] = {  # parameters; how to write
    "fill_diagonal": (
        ("input", "src", "wrap"),
        lambda x, call, source: x.fill_diagonal_(source, call.get("wrap", False)),
    ),
    "__setitem__": (("input", "index", "src"), lambda x, call, source: x.__setitem__(call["index"], source)),
    "index_put": (
        ("input", "indices", "values", "accumulate"),
        lambda x, call, source: x.index_put_(call["indices"], source),
    ),
    "scatter": (
        ("input", "dim", "index", "src"),
        lambda x, call, source: x.scatter_(call["dim"], call["index"], source),
    ),
}


def written(function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Writes by an index, which may name a place twice, so that a constant's gradient there would count twice: it
    becomes a choice between what was there and what is there afterwards."""
    in_place = is_in_place(function)
    parameters, write = WRITES[function.__name__ if function is Tensor.__setitem__ else function.__name__.rstrip("_")]
    call: Arguments = dict(zip(parameters, args, strict=False)) | kwargs
    key = next(name for name in ("src", "values", "value", "fill_value") if name in call)
    whole, source = call["input"], call[key]
    slices_only = function is Tensor.__setitem__ and not names_elements(call["index"])
    if is_live(source) or call.get("accumulate") or "reduce" in call or slices_only:
        call[key] = leaves(source, live)
        call["input"] = whole if in_place else leaves(whole, live)
        by_position = [call[name] for name in parameters[: len(args)]]
        return function(*by_position, **{name: call[name] for name in kwargs})
    afterwards, places = whole.detach().clone(), torch.zeros_like(whole)
    write(afterwards, call, source)
    write(places, call, torch.ones_like(source) if isinstance(source, Tensor) else 1.0)
    result = torch.where(places.bool(), leaves(afterwards, live), whole)
    return whole.copy_(result) if in_place else result


DEFAULT_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    **dict.fromkeys("clamp clip clamp_min clamp_max".split(), (None, None)),
    "hardtanh": (-1.0, 1.0),
}


def clamped(function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """No slope lifts an exact zero to a bound above it: bounds that exclude zero are constants."""
    name = function.__name__.rstrip("_")
    of_one = {"clamp_min": ("input", "min"), "clamp_max": ("input", "max")}
    call = dict(zip(of_one.get(name, ("input", "min", "max", "inplace")), args, strict=False)) | kwargs
    x, (low, high) = call["input"], DEFAULT_BOUNDS[name]
    low, high = call.get("min", call.get("min_val", low)), call.get("max", call.get("max_val", high))
    if not (excludes_zero(low, 1) or excludes_zero(high, -1)):
        return function(*args, **kwargs)
    result = x if low is None else torch.maximum(x, as_tensor(leaves(low, live), x))
    result = result if high is None else torch.minimum(result, as_tensor(leaves(high, live), x))
    return x.copy_(result) if is_in_place(function) or call.get("inplace", False) else result


def excludes_zero(bound: Any, sign: int) -> bool:
    if bound is None or is_live(bound):
        return False
    return bool((sign * bound > 0).any()) if isinstance(bound, Tensor) else sign * bound > 0


def as_tensor(bound: Any, like: Tensor) -> Tensor:
    """torch.maximum takes no numbers; here there are only those that exclude nothing, 0 and infinity."""
    return bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=like.dtype, device=like.device)


def names_elements(index: Any) -> bool:
    """Whether an index goes by numbers of elements, which may repeat, and not by slices alone."""
    several = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | Tensor) or hasattr(part, "__array__") for part in several)


REWRITTEN: dict[Callable, Callable[..., Tensor | None]] = {
    F.batch_norm: batch_norm,
    **{f: clamped for name in ("clamp", "clip", "clamp_min", "clamp_max", "hardtanh") for f in spellings(name)},
    torch.batch_norm: batch_norm,
    F.instance_norm: batch_norm,
    F.pad: padded,
    F._threshold: thresholded,  # type: ignore[attr-defined]
    **{function: thresholded for function in spellings("threshold")},
    torch.nan_to_num: without_nan,
    Tensor.nan_to_num: without_nan,
    **{function: written for name in ("scatter", "index_put", "fill_diagonal") for function in spellings(name)},
    Tensor.__setitem__: written,
}
HANDLED = {*BINARY_OR_REDUCTION, *ADDED, *REWRITTEN, *KEPT_ARGUMENT, *SIGMOIDS}
NOTICED = {*HANDLED, *DROPOUTS, *RANDOM}


def record_residuals() -> observed:
    """The name that `observed(residuals=True)` had first."""
    return observed(residuals=True)
