"""A constant becomes a leaf that requires grad: the same memory under another name, which autograd follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from .nodes import COUNTED, VERSION, note
from .plan import UnsupportedOperation


def is_live(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.requires_grad and not is_unseen_view(value)


def is_unseen_view(tensor: Tensor) -> bool:
    """A view of a weight that was made under no_grad says that it requires grad, and autograd doesn't follow it."""
    if not tensor.is_leaf or not tensor._is_view():
        return False
    with torch.enable_grad():
        return tensor.view_as(tensor).grad_fn.next_functions[0][0] is None  # type: ignore[union-attr]


def is_number(value: Any) -> bool:
    return isinstance(value, Number)


def is_nothing(value: Any) -> bool:
    """A constant that needs no leaf: the number 0, an empty tensor, or a list with such a one."""
    if isinstance(value, Tensor):
        return not value.numel()
    if isinstance(value, list | tuple):
        return any(is_nothing(v) for v in value)
    return is_number(value) and value == 0


def first_live(values: Sequence[Any]) -> Tensor | None:
    for value in values:
        if is_live(value):
            return value
        if isinstance(value, list | tuple) and (found := first_live(value)) is not None:
            return found
    return None


def leaves(value: Any, live: Tensor) -> Any:
    """A constant as a leaf that requires grad: the same memory. Lists and tuples of constants one by one."""
    if value is None or is_live(value):
        return value
    if isinstance(value, list | tuple):
        return type(value)(leaves(v, live) for v in value) if type(value) in (list, tuple) else value
    if is_number(value):
        return number_as_leaf(value, live) if value != 0 and math.isfinite(abs(value)) else value
    if not is_plain_tensor(value) or not value.numel():
        return value
    value = value.clone() if value.is_inference() else value.detach()
    if type(value) is not Tensor:
        value = value.as_subclass(Tensor)
    if value.dtype != live.dtype:
        value = value.to(torch.promote_types(value.dtype, live.dtype))  # its gradient will be that precise
    return versioned(value)


def number_as_leaf(value: complex, live: Tensor) -> Tensor:
    """A tensor without dimensions, which takes part in an operation as the number would, rounded no more than it."""
    half = live.dtype in (torch.float16, torch.bfloat16) and live.dim() > 0
    dtype = torch.float32 if half else torch.result_type(live, value)
    return versioned(torch.tensor(value, dtype=dtype))


def versioned(leaf: Tensor) -> Tensor:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedOperation(
            "a constant is added inside torch.func.vmap (or another transform of torch.func), where observed() can't "
            "count it: write the batch dimension out, or add the constant outside"
        )
    leaf.requires_grad_()
    setattr(leaf, VERSION, leaf._version)
    return leaf


def is_plain_tensor(value: Any) -> bool:
    """Its memory holds the numbers themselves: not sparse, nor a subclass with a behaviour of its own."""
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        return value.layout == torch.strided
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    function = getattr(type(value).__torch_function__, "__func__", type(value).__torch_function__)
    usual = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    return function in usual and type(value).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


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


@cache
def is_in_place(function: Callable) -> bool:
    name = getattr(function, "__name__", "")
    return name.startswith("__i") or name == "__setitem__" or name.endswith("_") and not name.endswith("__")
