"""libra_grad, balanced, audit: autograd with the treatments of a plan on its graph, and nothing left behind."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .added import hides_constant
from .applied import (
    StandIn,
    attention_without_zeros,
    by_hook,
    formula_for_kernel,
    product_without_zeros,
    stand_in,
    without_stand_ins,
)
from .checks import as_tuple, check_outputs, checked_gradient, checked_options, checked_plan, explained_errors
from .nodes import HALF, Half, noted, operation_name
from .operations import Gradients, Repair
from .plan import Plan, Treatment
from .rules import LIBRA, PLAIN, Rules

HIDDEN = ", and adds a constant without a gradient"


@dataclass(frozen=True)
class Audit:
    """What the graph between inputs and output consists of, and how each operation is treated.

    rows: (operation, treatment, count). complete: every treatment keeps attributions complete, so that the sum over
    inputs and additive constants equals the output. A constant that has no gradient (a buffer, a frozen parameter, the
    1 of x + 1) belongs to that sum and can't be asked for, unless the forward pass ran inside `observed()`; where the
    graph shows one, its row says so.
    """

    rows: tuple[tuple[str, str, int], ...]
    complete: bool

    def __str__(self) -> str:
        table = [("operation", "treatment", "count"), *((o, t, str(n)) for o, t, n in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{o:<{widths[0]}}  {t:<{widths[1]}}  {n:>{widths[2]}}" for o, t, n in table]
        return "\n".join([*lines, f"attributions under these rules are {'' if self.complete else 'NOT '}complete"])


def libra_grad(
    output: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    rules: Rules = LIBRA,
    **autograd_grad_options: Any,
) -> tuple[Tensor, ...]:
    """Balanced gradients of `output` with respect to `inputs`: a drop-in for `torch.autograd.grad` (Mehri et al. 2025).

    The model is not touched: the repairs of `rules` are applied to the graph that its forward pass left behind.

    Args:
        output: the logit to explain, of shape () or (B,), one for each sample; samples must not mix in the model.
            Any other shape needs `grad_outputs`, as for torch.autograd.grad. Several outputs are summed.
        inputs: tensors of that forward pass which required grad: images, embeddings, the input of any layer.
        rules: LIBRA, PLAIN, ATTN_LRP, ALI_LRP, DECOMPX or your own `Rules`.
        **autograd_grad_options: grad_outputs, retain_graph, allow_unused, materialize_grads of torch.autograd.grad.
    Returns:
        One gradient for each input, of its shape. <input, gradient> summed over the input and its additive
        constants (biases, position embeddings) is the output.
    Raises:
        UnsupportedOperation: an operation without a rule; nothing was computed.
        ValueError: what was passed in can't be explained; the message says what, where and what to do.
        ArithmeticError: a saturated tanh whose argument is lost; `observed()` remembers it.
    """
    outputs, inputs = as_tuple(output), as_tuple(inputs)
    options = checked_options(outputs, autograd_grad_options)
    check_outputs(outputs)
    allow_unused = options.pop("allow_unused", False) or options.get("materialize_grads", False)
    grad_outputs = options.pop("grad_outputs", None)
    with torch.enable_grad():  # an entrance of this call's own into the graph, so that its pass can be told from others
        roots = [o.sum() if grad_outputs is None else o.view_as(o) for o in outputs]
    others = [tensor for tensor in inputs if not isinstance(tensor, Half)]
    if not inputs:
        raise ValueError("no inputs: name the tensors whose gradients are wanted")
    if not others:
        raise ValueError("the 1/2 of sigmoids is counted beside the inputs: pass (x, *additive_constants(output, x))")
    balancing = Balancing(is_call=True)
    with explained_errors():
        plan = supported_plan(outputs, others, rules, allow_unused)
        with installed(plan, [root.grad_fn for root in roots], balancing):
            found = iter(torch.autograd.grad(roots, others, grad_outputs, allow_unused=True, **options))
    gradients = [balancing.halves.get(id(x)) if isinstance(x, Half) else next(found) for x in inputs]
    return tuple(checked_gradient(g, x, i, plan) for i, (g, x) in enumerate(zip(gradients, inputs, strict=True)))  # type: ignore[misc]


@contextlib.contextmanager
def balanced(
    output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor], rules: Rules = LIBRA
) -> Iterator[None]:
    """Inside this block, backward passes from `output`, or from anything computed from it, are balanced.

        with balanced(logits, images):
            cat, dog = (torch.autograd.grad(logits[:, c].sum(), images, retain_graph=True)[0] for c in (281, 207))

    Passes of other threads are left alone, and of several blocks on one graph the innermost counts.

    Args:
        output: what backward passes start from, of any shape.
        inputs: the tensors that gradients are wanted for. `.backward()` works too.
        rules: as in `libra_grad`, as are the errors.
    """
    outputs = as_tuple(output)
    check_outputs(outputs)
    balancing = Balancing(is_call=False)
    with explained_errors():
        plan = supported_plan(outputs, [x for x in as_tuple(inputs) if not isinstance(x, Half)], rules, False)
        with innermost_of_thread(balancing), installed(plan, [o.grad_fn for o in outputs], balancing):
            yield


def audit(output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor], rules: Rules = LIBRA) -> Audit:
    """Which operations lie between `inputs` and `output`, and how each would be treated. Computes no gradient.

    Operations without a rule are listed as unsupported instead of being refused.

    Args:
        output, inputs, rules: as in `libra_grad`.
    Raises:
        ValueError: as `libra_grad` does.
    """
    outputs = as_tuple(output)
    check_outputs(outputs)
    with explained_errors():
        plan = checked_plan(outputs, [x for x in as_tuple(inputs) if not isinstance(x, Half)], rules)
        rows = Counter(plan.held_rows())
        for node, treatment in plan.treatments.items():
            hidden = HIDDEN if treatment.supported and hides_constant(node, plan) else ""
            rows[operation_name(node), treatment.label + hidden] += 1
    return Audit(tuple(sorted((name, label, count) for (name, label), count in rows.items())), plan.complete)


def supported_plan(outputs: Sequence[Tensor], inputs: Sequence[Tensor], rules: Rules, allow_unused: bool) -> Plan:
    """A plan whose every operation has a rule. Plain rules are torch.autograd: they change and refuse nothing."""
    plan = checked_plan(outputs, inputs, rules, allow_unused)
    if rules == PLAIN:
        plan.treatments.clear()
    plan.raise_refusals()
    return plan


# ---- whose backward pass is it? --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Balancing:
    """One libra_grad call, or one `balanced` block."""

    is_call: bool
    active: bool = True
    halves: dict[int, Tensor] = field(default_factory=dict)  # id of the 1/2 of sigmoids -> its gradient

    def owns_this_pass(self) -> bool:
        """A plain backward pass, another thread's or a nested call on the same graph is somebody else's."""
        if not self.active or _owners.get(torch._C._current_graph_task_id()) is not self:
            return False
        if torch.is_grad_enabled():
            raise ValueError("create_graph=True is not supported: balanced gradients have no graph of their own")
        return True

    def may_enter(self) -> bool:
        """A call has an entrance of its own; a block shares its own with everybody who starts from the same output."""
        if self.is_call:
            return True
        owner = _owners.get(torch._C._current_graph_task_id())
        return innermost() is self and (owner is None or not owner.is_call)


_owners: dict[int, Balancing] = {}  # by autograd's own number for the running backward pass
INNERMOST = "libragrad innermost block"  # kept where autograd's own worker threads inherit it from the calling thread


def innermost() -> Balancing | None:
    return torch._C._get_obj_in_tls(INNERMOST) if torch._C._is_key_in_tls(INNERMOST) else None


@contextlib.contextmanager
def innermost_of_thread(balancing: Balancing) -> Iterator[None]:
    outer = innermost()
    try:
        torch._C._stash_obj_in_tls(INNERMOST, balancing)
        yield
    finally:
        torch._C._stash_obj_in_tls(INNERMOST, outer)


# ---- hooks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def installed(plan: Plan, entrances: Sequence[Node | None], balancing: Balancing) -> Iterator[None]:
    """The plan's treatments on its graph, for backward passes that come in through `entrances`; removed in any case."""
    passes: list[int] = []
    handles: list[Any] = []

    def enter(grad_outputs: Gradients) -> None:
        if balancing.active and balancing.may_enter():
            number = torch._C._current_graph_task_id()
            passes.append(number)
            _owners[number] = balancing

    try:
        handles.extend(node.register_prehook(enter) for node in entrances if node is not None)
        for node, treatment in plan.treatments.items():
            hook_up(node, treatment, balancing, handles)
        yield
    finally:
        balancing.active = False  # whatever hook an interrupt may leave behind does nothing any more
        take_back(handles, passes)


def take_back(handles: list[Any], passes: list[int]) -> None:
    """An interrupt in the middle is passed on when all is done."""
    try:
        while handles:
            handles[-1].remove()
            handles.pop()
        while passes:
            _owners.pop(passes[-1], None)
            passes.pop()
    except BaseException:
        take_back(handles, passes)
        raise


def hook_up(node: Node, treatment: Treatment, balancing: Balancing, handles: list[Any]) -> None:
    """Registers what one node's treatment needs, and appends how to remove it to `handles`."""
    repair, incoming = treatment.repair, treatment.incoming
    make_stand_in = stand_in_for(treatment, balancing.is_call)
    running: list[StandIn] = []  # the stand-in that the node is being run with

    def before(grad_outputs: Gradients) -> Gradients | None:
        if not balancing.owns_this_pass() or grad_outputs[0] is None:
            return None
        gradient = grad_outputs[0] if incoming is None else incoming(node, grad_outputs[0])
        if make_stand_in is not None:
            gradient = make_stand_in(gradient)
            running[:] = [gradient]
        return (gradient, *grad_outputs[1:])

    def after(grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients | None:
        if not balancing.owns_this_pass() or all(gradient is None for gradient in grad_outputs):
            return None
        grad_inputs, grad_outputs = without_stand_ins(grad_inputs), without_stand_ins(grad_outputs)
        answered = bool(running) and running.pop().answered
        if repair is None:
            return grad_inputs
        if not isinstance(repair, Repair):
            return checked_gradients(node, repair(node, grad_inputs, grad_outputs), grad_inputs)
        gradient = grad_outputs[0]
        return grad_inputs if answered or gradient is None else by_hook(repair, node, grad_inputs, gradient)

    def count_half(grad_outputs: Gradients) -> None:
        if balancing.owns_this_pass() and grad_outputs[0] is not None:
            key = id(noted(node, HALF))
            balancing.halves[key] = balancing.halves.get(key, 0) + grad_outputs[0].sum().to(noted(node, HALF))

    if noted(node, HALF) is not None:
        handles.append(node.register_prehook(count_half))
    if incoming is not None or make_stand_in is not None:
        handles.append(node.register_prehook(before))
    if repair is not None or make_stand_in is not None:
        handles.append(node.register_hook(after))


def checked_gradients(node: Node, mine: Gradients, plain: Gradients) -> Gradients:
    """What a function taught by register_rule returned, held against what PyTorch's own derivative did."""
    alike = isinstance(mine, tuple) and len(mine) == len(plain)
    pairs = [(a, b) for a, b in zip(mine, plain, strict=True) if a is not None and b is not None] if alike else []
    if not alike or any(a.shape != b.shape for a, b in pairs):
        shapes = tuple(None if gradient is None else tuple(gradient.shape) for gradient in plain)
        raise ValueError(
            f"the backward that register_rule was given for {operation_name(node)} must return a tuple of gradients "
            f"of the shapes {shapes}"
        )
    return mine


def stand_in_for(treatment: Treatment, is_call: bool) -> Callable[[Tensor], StandIn] | None:
    """How to make the tensor that spares PyTorch a kernel, where there is one to be spared.

    A call knows of all gradient that there is; into a block it may come from elsewhere, too.
    """
    repair, reach = treatment.repair, treatment.reach if is_call else None
    if isinstance(repair, Repair) and repair.kernel is not None:
        answer = formula_for_kernel(repair) if reach is None else attention_without_zeros(repair, reach)
        return partial(stand_in, kernel=repair.kernel, answer=answer)
    if reach is not None:
        return partial(stand_in, kernel="mm", answer=product_without_zeros(reach))
    return None
