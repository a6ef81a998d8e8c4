"""Functions whose constant is no argument that could require grad: the same values by another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .functions import spellings
from .leaves import is_in_place, is_live, is_number, leaves, nothing_but_gradient, without_row

Arguments = dict[str, Any]


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
    if call.get("mode", "constant") != "constant" or value == 0 or not math.isfinite(value):
        return result
    leaf = leaves(value, live)  # on the border: everywhere, less the inside; no step of this saves anything
    border = leaf.expand(result.shape) - without_row(F.pad(leaf.expand(live.shape), call["pad"], value=0))
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


def pairwise_distance(function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """It adds a number of its own, eps."""
    call = dict(zip(("x1", "x2", "p", "eps", "keepdim"), args, strict=False)) | kwargs
    difference = leaves(call["x1"], live) - leaves(call["x2"], live)
    shifted = difference + leaves(call.get("eps", 1e-6), live)
    return torch.linalg.vector_norm(shifted, call.get("p", 2.0), dim=-1, keepdim=call.get("keepdim", False))


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
    "index_copy": (
        ("input", "dim", "index", "source"),
        lambda x, call, source: x.index_copy_(call["dim"], call["index"], source),
    ),
}


def written(function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Writes by an index, which may name a place twice, so that a constant's gradient there would count twice: it
    becomes a choice between what was there and what is there afterwards."""
    in_place = is_in_place(function)
    parameters, write = WRITES[function.__name__ if function is Tensor.__setitem__ else function.__name__.rstrip("_")]
    call: Arguments = dict(zip(parameters, args, strict=False)) | kwargs
    key = next(name for name in ("src", "values", "value", "source", "fill_value") if name in call)
    whole, source = call["input"], call[key]
    slices_only = function is Tensor.__setitem__ and not names_elements(call["index"])
    if is_live(source) or call.get("accumulate") or "reduce" in call or slices_only:
        call[key] = source if is_number(source) and "reduce" in call else leaves(source, live)
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
    in_place = is_in_place(function) or call.get("inplace", False)
    x, (low, high) = call["input"], DEFAULT_BOUNDS[name]
    low, high = call.get("min", call.get("min_val", low)), call.get("max", call.get("max_val", high))
    if not (excludes_zero(low, 1) or excludes_zero(high, -1)):
        return function(*args, **kwargs)
    result = x.clone() if in_place else leaves(x, live)  # what they compare is saved
    result = result if low is None else torch.maximum(result, as_tensor(leaves(low, live), x))
    result = result if high is None else torch.minimum(result, as_tensor(leaves(high, live), x))
    return x.copy_(result) if in_place else result


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
    **{function: written for name in ("scatter", "index_put", "index_copy") for function in spellings(name)},
    **{function: written for function in spellings("fill_diagonal")},
    **{function: pairwise_distance for function in spellings("pairwise_distance")},
    Tensor.__setitem__: written,
}
