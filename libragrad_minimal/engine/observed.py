"""The one context for a forward pass: it catches what nodes don't save.

    with observed():
        logit = model(images)[:, 281]
    constants = additive_constants(logit, images)
    gradients = libra_grad(logit, (images, *constants))  # sum to the logit, frozen biases and buffers included

Autograd follows what requires grad, so every constant that is added becomes a leaf that does: the same memory under
another name. The forward pass computes what it always does.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .functions import (
    ADDED,
    ADDITIONS,
    BINARY_OR_REDUCTION,
    DROPOUTS,
    IN_ONE_GO,
    IN_PLACE,
    KEPT_ARGUMENT,
    OPERATORS,
    RANDOM,
    SAVE_THEIR_RESULT,
    SIGMOIDS,
    is_written_in_python,
    packet,
    places_that_add,
    plain_name,
    step_by_step,
)
from .leaves import base_of, first_live, is_in_place, is_live, is_nothing, leaves, make_written_tensor_live, without_row
from .nodes import ARGUMENT, HALF, OPERANDS, Half, Seen, note, seen
from .plan import UnsupportedOperation
from .rewritten import REWRITTEN


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
        self.eager = contextlib.ExitStack()

    def __enter__(self):
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            self.eager.enter_context(run_eagerly())
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.eager.close()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in NOTICED and not isinstance(function, OPERATORS):
            return (
                self.watched(function)(*args, **kwargs) if is_written_in_python(function) else function(*args, **kwargs)
            )
        check_eval_mode(function, args, kwargs)
        if function in IN_PLACE and not torch.is_grad_enabled() and is_live(args[0]) and not args[0].is_leaf:
            raise UnsupportedOperation(
                f"{function.__name__} changed a tensor that depends on the inputs inside torch.no_grad(), of which no "
                "graph tells: change it out of place"
            )
        if function not in HANDLED and not isinstance(function, OPERATORS) or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        live = first_live([*args, *kwargs.values()])
        if live is None:
            return function(*args, **kwargs)
        return self.with_leaves(function, live, list(args), dict(kwargs))

    def watched(self, function: Callable) -> Callable:
        """A function written in Python, with this context around each of its steps."""

        def watched(*args, **kwargs):
            super(observed, self).__enter__()
            try:
                return step_by_step(function)(*args, **kwargs)
            finally:
                super(observed, self).__exit__(None, None, None)

        return watched

    def with_leaves(self, function: Callable, live: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if function in IN_ONE_GO:
            raise UnsupportedOperation(
                f"{function.__name__} adds a constant of its own where nobody sees it: write it out, step by step"
            )
        alpha_by_name(function, args, kwargs)
        function = packet(function)  # torch.ops.aten.add.Scalar wants a number, its packet chooses .Tensor
        held_zeros = is_in_place(function) and make_written_tensor_live(function, args)
        if function in REWRITTEN:
            result = REWRITTEN[function](function, live, args, kwargs)
        else:
            adds_nothing = False
            for position, keyword in places_that_add(function, args, kwargs):
                holder: Any = args if position < len(args) else kwargs
                place = position if holder is args else keyword
                if holder is args or place in kwargs:
                    adds_nothing |= is_nothing(holder[place])
                    holder[place] = leaves(holder[place], live)
            result = self.run(function, args, kwargs)
            if adds_nothing and isinstance(result, Tensor):
                without_row(result)
        if held_zeros:
            without_row(base_of(args[0]))
        return result

    def run(self, function: Callable, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Runs it, and notes on its node what that doesn't save."""
        if function not in SAVE_THEIR_RESULT and not self.residuals and not isinstance(function, OPERATORS):
            return function(*args, **kwargs)  # there is nothing to note
        operands = self.operands(function, args, kwargs)
        argument = None
        if plain_name(function) in KEPT_ARGUMENT:
            argument = seen(args[0].clone() if is_in_place(function) else args[0])
        result = function(*args, **kwargs)
        node = result.grad_fn if isinstance(result, Tensor) else None
        if node is not None and operands is not None:
            note(node, OPERANDS, operands)
        if node is not None and argument is not None:
            note(node, ARGUMENT, argument)
        if node is not None and plain_name(function) in SIGMOIDS:
            note(node, HALF, self.one_half(result))
        return result

    def operands(self, function: Callable, args: list[Any], kwargs: dict[str, Any]) -> tuple[Seen, Seen] | None:
        """Both operands of an addition of two tensors of one shape."""
        adds_two = self.residuals and function in ADDITIONS and len(args) == 2 and kwargs.get("alpha", 1) == 1
        if not adds_two or not all(isinstance(a, Tensor) for a in args) or args[0].shape != args[1].shape:
            return None
        return seen(args[0].clone() if is_in_place(function) else args[0]), seen(args[1])

    def one_half(self, like: Tensor) -> Half:
        if self.half is None:
            self.half = torch.tensor(0.5, dtype=like.dtype, device=like.device).as_subclass(Half)
            self.half.requires_grad_()
        return self.half


def run_eagerly() -> contextlib.AbstractContextManager[Any]:
    """Inside, compiled code runs as it was written."""
    inside = "observed() was entered inside of torch.compile, where it sees nothing: compile the model, not its caller"
    if torch.compiler.is_compiling():
        raise UnsupportedOperation(inside)
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise UnsupportedOperation(inside) from error


def alpha_by_name(function: Callable, args: list[Any], kwargs: dict[str, Any]) -> None:
    """x.add(2, y), and torch.rsub(x, 1, 2): only of a number, or in older programs, its factor goes by position."""
    if len(args) == 3 and plain_name(function) in ("add", "sub", "rsub", "subtract"):
        kwargs["alpha"] = args.pop(1 if isinstance(args[2], Tensor) else 2)


def check_eval_mode(function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuses dropout, and whatever else a module in training mode draws at random, such as patches to leave out."""
    drops = function in DROPOUTS and kwargs.get("training", args[2] if len(args) > 2 else True)
    drops = drops and kwargs.get("p", args[1] if len(args) > 1 else 0.5) > 0
    module = running_module() if drops or function in RANDOM else None
    if drops or module is not None and module.training:
        name = function.__name__ if module is None else type(module).__name__
        always = module is not None and not module.training
        cure = "in eval mode, too: set its p to 0" if always else "call model.eval() before the forward pass"
        raise ValueError(f"{name} dropped something at random (dropout was active): {cure}")


def running_module() -> nn.Module | None:
    """The module whose method runs, by the name that every method has for it."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            return module
        frame = frame.f_back  # type: ignore[assignment]
    return None


HANDLED = {*BINARY_OR_REDUCTION, *IN_ONE_GO, *ADDED, *REWRITTEN, *SAVE_THEIR_RESULT}
NOTICED = {*HANDLED, *IN_PLACE, *DROPOUTS, *RANDOM}


def record_residuals() -> observed:
    """The name that `observed(residuals=True)` had first."""
    return observed(residuals=True)
