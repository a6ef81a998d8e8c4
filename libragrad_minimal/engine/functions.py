"""Which functions of PyTorch's add something, and which of their arguments it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .leaves import is_in_place, is_live

NAMES_OF_OVERRIDES = "has_torch_function has_torch_function_unary has_torch_function_variadic".split()


def is_written_in_python(function: Callable) -> bool:
    """A function of nn.functional; one with a closure only chooses between two others."""
    return isinstance(function, FunctionType) and function.__module__ == F.__name__ and not function.__closure__


@cache
def step_by_step(function: FunctionType) -> Callable:
    """The same function of nn.functional, not asking once more whether somebody wants to stand in for it."""
    names = {**function.__globals__, **dict.fromkeys(NAMES_OF_OVERRIDES, lambda *tensors: False)}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def packet(function: Callable) -> Callable:
    return getattr(function, "overloadpacket", function)


@cache
def plain_name(function: Callable) -> str:
    return function.__name__.removeprefix("special_").rstrip("_")


def spellings(name: str) -> list[Callable]:
    """Every function of PyTorch's of this name: of torch, of tensors, in place, as operators, of nn.functional."""
    names = (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")
    found = [getattr(place, n, None) for place in (torch, Tensor, F, torch.special, torch._C._nn) for n in names]
    return [function for function in found if callable(function)]


Place = tuple[int, str]  # position and keyword of an argument
Places = tuple[Place, ...]


def argument(place: Place, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    position, keyword = place
    return args[position] if position < len(args) else kwargs.get(keyword)


def places_that_add(function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Places:
    """Where its arguments are added, what it writes into left out."""
    by_name = isinstance(function, OPERATORS)
    places = ADDED_BY_NAME.get(function.__name__, ()) if by_name else ADDED.get(function, ())
    if function in BINARY_OR_REDUCTION and len(args) > 1 and isinstance(args[1], Tensor):
        places = ((0, "input"), (1, "other"))
    for first, second in PRODUCTS_THAT_ARE_ADDED.get(function, ()):
        if not any(is_live(argument(place, args, kwargs)) for place in (first, second)):
            places = (*places, first)
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
    "index_add": ((0, "input"), (3, "source")),
    **dict.fromkeys(["scatter_add", "scatter_reduce"], ((0, "input"), (3, "src"))),
    **dict.fromkeys(
        "cat concat concatenate stack hstack vstack dstack column_stack row_stack".split(), ((0, "tensors"),)
    ),
    **dict.fromkeys("addmm baddbmm addbmm addmv addr addcmul".split(), ((0, "input"),)),
    **dict.fromkeys("linear conv1d conv2d conv3d".split(), ((2, "bias"),)),
    **dict.fromkeys("conv_transpose1d conv_transpose2d conv_transpose3d".split(), ((2, "bias"),)),
    "bilinear": ((3, "bias"),),
    **dict.fromkeys(["layer_norm", "group_norm"], ((0, "input"), (3, "bias"))),
    "l1_loss": ((0, "input"), (1, "target")),
    "diff": ((0, "input"), (3, "prepend"), (4, "append")),
    **dict.fromkeys("cartesian_prod block_diag".split(), tuple((i, "") for i in range(8))),
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
# Of a product of two constants that is added, the first is the stream.
PRODUCTS_BY_NAME: dict[str, tuple[tuple[Place, Place], ...]] = {
    "addmm": (((1, "mat1"), (2, "mat2")),),
    **dict.fromkeys(["baddbmm", "addbmm"], (((1, "batch1"), (2, "batch2")),)),
    "addmv": (((1, "mat"), (2, "vec")),),
    "addr": (((1, "vec1"), (2, "vec2")),),
    "addcmul": (((1, "tensor1"), (2, "tensor2")),),
    **dict.fromkeys(
        "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(),
        (((0, "input"), (1, "weight")),),
    ),
    "bilinear": (((0, "input1"), (2, "weight")),),
    **dict.fromkeys("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split(), (((0, "input"), (2, "w_ih")),)),
}
PRODUCTS_THAT_ARE_ADDED = {function: pairs for name, pairs in PRODUCTS_BY_NAME.items() for function in spellings(name)}
# Losses in C++ with a margin or an eps.
IN_ONE_GO = {
    function
    for name in "margin_ranking_loss hinge_embedding_loss cosine_embedding_loss triplet_margin_loss".split()
    for function in [getattr(torch, name)]
}
# max and min of two tensors; of one and a dimension they are reductions
BINARY_OR_REDUCTION = {torch.max, torch.min, Tensor.max, Tensor.min}
ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
KEPT_ARGUMENT = ("tanh", "expm1")
SIGMOIDS = ("sigmoid", "expit")
SAVE_THEIR_RESULT = {function for name in (*KEPT_ARGUMENT, *SIGMOIDS) for function in spellings(name)}
IN_PLACE = {
    getattr(Tensor, name)
    for name in dir(Tensor)
    if re.fullmatch(r"[a-z]\w*_|__i(add|sub|mul|truediv|floordiv|mod|pow)__", name)
    and name not in ("requires_grad_", "detach_")
} | {Tensor.__setitem__}
DROPOUTS = {
    getattr(F, name) for name in "dropout alpha_dropout dropout1d dropout2d dropout3d feature_alpha_dropout".split()
}
RANDOM = {
    function
    for name in "bernoulli rand randn rand_like randn_like randint randperm multinomial normal uniform".split()
    for function in spellings(name)
}
