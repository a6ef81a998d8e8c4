"""A formula of repairs.py at work on a node: where its values come from, their precision, and PyTorch's kernel spared.

The gradient that arrives at a node is replaced by a *stand-in*: the same numbers, as a tensor that is asked before any
operator runs on it. When the node hands it to the kernel with which PyTorch would compute the derivative, the stand-in
answers with the formula's result, so that the kernel never runs; everything the formula needs is among the kernel's
arguments. Any other operator gets the plain gradient, and then the formula is applied to what the node saved instead.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_map_only

from .nodes import ARGUMENT, OPERANDS, Seen, noted, operation_name, precise, saved
from .operations import Gradients, Repair
from .reach import Within

# What formulas call x, y and rstd, in PyTorch's words.
SYNONYMS = {"x": ("self", "input"), "y": ("result", "output"), "rstd": ("save_invstd",)}

Lookup = Callable[[str], Any]  # from a parameter's name to its value


def evaluate(repair: Repair, gradient: Tensor, lookup: Lookup) -> tuple[Tensor, ...]:
    """The formula's result, computed in float32 at least and rounded to the gradient's own precision."""
    values = {name: precise(lookup(name)) for name in parameters(repair.formula)}
    result = repair.formula(precise(gradient), **values)
    several = result if isinstance(result, tuple) else (result,)
    return tuple(tensor.to(gradient.dtype) for tensor in several)


@cache
def parameters(formula: Callable) -> tuple[str, ...]:
    """The names of a formula's parameters after the gradient."""
    return tuple(inspect.signature(formula).parameters)[1:]


def from_node(node: Node, repair: Repair, gradient: Tensor) -> Lookup:
    """Looks among what the node saved, and what was noted on it during the forward pass."""

    def lookup(name: str) -> Any:
        if name == "argument":
            return argument_of(node, gradient)
        if name == "first_row":
            return 0
        if name in ("a", "b"):
            return operand_of_addition(noted(node, OPERANDS)["ab".index(name)])
        names = (repair.saved.get(name, name), *SYNONYMS.get(name, ()))
        return saved(node, next(n for n in names if hasattr(type(node), f"_saved_{n}")))

    return lookup


def from_arguments(arguments: Mapping[str, Any]) -> Lookup:
    """Looks among the arguments of the kernel."""

    def lookup(name: str) -> Any:
        return arguments[next(n for n in (name, *SYNONYMS.get(name, ())) if n in arguments)]

    return lookup


def operand_of_addition(operand: Seen) -> Tensor:
    if not operand.unchanged:
        raise ValueError(
            f"an operand of shape {tuple(operand.tensor.shape)} was changed in place after it had been added, and the "
            "residual rule needs what it was: change it out of place"
        )
    return operand.tensor


# ---- x from y = f(x), where only y was saved -------------------------------------------------------------------------

# f's inverse, and the relative error of x that a relative error of one in y makes: |y / (f'(x) x)|
INVERSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "Tanh": (torch.atanh, lambda y, x: y / ((1 - y * y) * x)),
    "Expm1": (torch.log1p, lambda y, x: y / ((1 + y) * x)),
    # the error of tanh(x/2)/2, beside its constant 1/2
    "Sigmoid": (lambda y: 2 * torch.atanh(2 * (y - 0.5)), lambda y, x: 2 * (y - 0.5) / (x * (1 - y))),
}
KEEPS = {
    "Tanh": "Run the forward pass inside observed(), which remembers the argument unless a fused layer (an LSTM) hides "
    "it or it is overwritten in place; or run it in float32.",
    "Expm1": "Run the forward pass inside observed(), which remembers the argument unless it is overwritten in place.",
    "Sigmoid": "Explain its argument, or write 0.5 + tanh(x / 2) / 2 for it: of a tanh, observed() remembers that.",
}
# How far off x may be. Half precision keeps three digits at best.
LARGEST_ERROR = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def argument_of(node: Node, gradient: Tensor) -> Tensor:
    """x of y = tanh(x): as `observed()` caught it, or recovered from y where y still tells it."""
    caught = noted(node, ARGUMENT)
    if caught is not None and caught.unchanged:
        return caught.tensor
    name, y = operation_name(node), saved(node, "result")
    inverse, amplification = INVERSES[name]
    rounding = torch.finfo(y.dtype).eps / 2
    exact = precise(y)
    x = inverse(exact)
    error = torch.where(x == 0, 0, rounding * amplification(exact, x)).abs_().nan_to_num_(math.inf)
    if ((error > LARGEST_ERROR[y.dtype]) & (gradient != 0)).any():
        raise ArithmeticError(
            f"a {name.lower()} that carries the stream is too near to where it is flat: in {y.dtype} its result no "
            f"longer tells its argument, so that its balanced slope {name.lower()}(x)/x is unknown. {KEEPS[name]}"
        )
    return x


# ---- the stand-in ----------------------------------------------------------------------------------------------------

Answer = Callable[[Any, tuple, dict[str, Any]], Any]  # (operator, args, kwargs) -> what the operator returns


class StandIn(Tensor):
    """A gradient that answers for one kernel. Made by `stand_in`; nobody sees it but the node it was made for, and
    hooks that others have put on that node."""

    gradient: Tensor
    kernel: str
    answer: Answer
    answered: bool

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        plain_args, plain_kwargs = tree_map_only(StandIn, lambda t: t.gradient, (args, kwargs))
        if isinstance(first, StandIn) and operator.overloadpacket.__name__ == first.kernel:
            first.answered = True
            return first.answer(operator, plain_args, plain_kwargs)
        return operator(*plain_args, **plain_kwargs)


def stand_in(gradient: Tensor, kernel: str, answer: Answer) -> StandIn:
    result = gradient.as_subclass(StandIn)
    result.gradient, result.kernel, result.answer, result.answered = gradient, kernel, answer, False
    return result


def without_stand_ins(grad_inputs: Gradients) -> Gradients:
    """A node may hand on what it was given: the gradient of x + b to b is the gradient itself."""
    return tuple(g.gradient if isinstance(g, StandIn) else g for g in grad_inputs)


def formula_for_kernel(repair: Repair, first_row: int = 0) -> Answer:
    """Answers with the formula; what it doesn't compute, such as the gradient of a norm's bias, the kernel does."""

    def answer(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        schema = operator._schema
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        extra = {"first_row": first_row}
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        gradient = args[0]
        mine: list[Tensor | None] = [None] * len(schema.returns)
        mask = list(arguments.get("output_mask", ()))
        if any(mask[1:]):
            mine = list(operator(**(arguments | {"output_mask": [False, *mask[1:]]})))
        if not mask or mask[0]:
            (mine[repair.operand],) = evaluate(repair, gradient, from_arguments(arguments | extra))
        return mine[0] if len(mine) == 1 else tuple(mine)

    return answer


def product_without_zeros(reach: Within) -> Answer:
    """gradient @ weight, where all of the gradient outside of `reach` is zero: without those columns, or rows."""

    def answer(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        gradient, weight = args
        if not reach.holds(gradient):
            return operator(gradient, weight)
        if reach.dim == 1:
            return operator(reach.part(gradient).flatten(1), reach.part(weight.T).flatten(1).T)
        rows = operator(reach.part(gradient).flatten(0, 1), weight)
        result = rows.new_zeros(len(gradient), weight.shape[1])
        part = reach.part(result)
        part.copy_(rows.view(part.shape))
        return result

    return answer


def attention_without_zeros(repair: Repair, reach: Within) -> Answer:
    """The formula for those queries only whose gradient isn't zero."""
    all_rows, some_rows = formula_for_kernel(repair), formula_for_kernel(repair, first_row=reach.start)

    def answer(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        gradient, query, key, value, out, logsumexp, *rest = args
        if reach.dim != 2 or reach.period != gradient.shape[2] or not reach.holds(gradient):
            return all_rows(operator, args, kwargs)
        rows = slice(reach.start, reach.stop)
        if (mask := kwargs.get("attn_mask")) is not None and mask.shape[-2] > 1:
            kwargs = kwargs | {"attn_mask": mask[..., rows, :]}
        some = [tensor[:, :, rows] for tensor in (gradient, query)]
        args = (*some, key, value, out, logsumexp[:, :, rows], *rest)
        return some_rows(operator, args, kwargs)

    return answer


def by_hook(repair: Repair, node: Node, grad_inputs: Gradients, gradient: Tensor) -> Gradients:
    """What the formula says, in the place of what PyTorch computed."""
    results = evaluate(repair, gradient, from_node(node, repair, gradient))
    if len(results) > 1:
        return tuple(None if g is None else mine.to(g.dtype) for g, mine in zip(grad_inputs, results, strict=True))
    replaced = [None if repair.cuts_others else g for g in grad_inputs]
    if (mine := grad_inputs[repair.operand]) is not None:
        replaced[repair.operand] = results[0].to(mine.dtype)
    return tuple(replaced)
