"""What is added on the way: the bias-like constants that complete attributions share the output with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from .checks import as_tuple, check_outputs, checked_plan, explained_errors
from .nodes import (
    COUNTED,
    HALF,
    VERSION,
    Half,
    edge_of,
    full_name,
    function_class,
    is_custom,
    is_leaf,
    noted,
    operation_name,
    saved,
)
from .operations import Operation, taught_operation
from .plan import Plan, find_values, make_plan
from .rules import LIBRA


def additive_constants(output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What is *added* between `inputs` and `output`: biases, class token, position embedding.

    With them, libra_grad is complete (Mehri et al. 2025, FullGrad-completeness):
    output = sum of <t, g> over t, g in zip((x, *constants), libra_grad(output, (x, *constants))).
    Constants that don't require grad leave no trace in the graph: buffers, frozen parameters, the running mean of a
    batch norm, the 1 of x + 1. They are found where the forward pass ran inside `observed()`, as leaves that share
    memory with them. Warns where a parameter is added in one place and multiplies the stream in another (tied weights):
    libra_grad with it then gives half of that product to the parameter.

    Args:
        output, inputs: as in `libra_grad`.
    Returns:
        The constants, each once, for use as further inputs of libra_grad.
    Raises:
        ValueError: as libra_grad; or a constant was changed in place after it had been added.
    """
    outputs, inputs = as_tuple(output), as_tuple(inputs)
    check_outputs(outputs)
    with explained_errors():
        plan = checked_plan(outputs, inputs, LIBRA)
        at_first = halved(plan)
        found: dict[Tensor, None] = {}
        while new := [tensor for tensor in added_leaves(plan) if tensor not in found]:
            found |= dict.fromkeys(new)
            roots, leaves = [edge_of(o) for o in outputs], {edge_of(t) for t in found if not isinstance(t, Half)}
            plan = make_plan(roots, plan.inputs | leaves, LIBRA)
    for tensor in found:
        check_unchanged(tensor)
    if halved(plan) > at_first:
        warnings.warn(
            "a parameter that is added here also multiplies the stream (tied weights): libra_grad with it gives half "
            "of that product to the parameter. To keep all of it on the input, untie them with a clone.",
            stacklevel=2,
        )
    return tuple(found)


def added_leaves(plan: Plan) -> list[Tensor]:
    """The leaves that are added to what carries gradient, and the 1/2 of each sigmoid that is the stream."""
    everything = all_live(plan)
    found: dict[Tensor, None] = {}
    stack = []
    for node, treatment in plan.treatments.items():
        stack += added_operands(plan, everything, node)
        if noted(node, HALF) is not None and treatment.repair is not None:
            found[noted(node, HALF)] = None
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or node in plan.operations:  # the latter is a gate on zero: it adds nothing
            continue
        seen.add(node)
        if is_leaf(node):
            found[node.variable] = None  # type: ignore[attr-defined]
        else:
            stack += added_operands(plan, everything, node)
    return list(found)


def all_live(plan: Plan) -> Plan:
    """As if every leaf were an input: tells streams from gates among the constants, too. Values only."""
    leaves = {(node, 0) for node in plan.graph if is_leaf(node)}
    everything = Plan(plan.graph, plan.inputs | leaves, plan.rules)
    find_values(everything)
    return everything


def added_operands(plan: Plan, everything: Plan, node: Node) -> list[Node]:
    """Operands of `node` that don't depend on the inputs and are added, not multiplied: it is linear in them."""
    operation, edges = everything.operations.get(node), plan.graph[node]
    constant = [i for i, edge in enumerate(edges) if edge[0] is not None and plan.value(edge) is None]
    if operation is not None and operation.streams is not None:
        constant = [i for i in constant if i in operation.streams]
    if operation is not None and operation.rule == "attention" and any(plan.value(edge) is not None for edge in edges):
        return []  # values that are constants: a map of the input's that is itself the stream, which is refused
    if operation is not None and operation.role == "product":
        constant = [i for i in constant if i not in operation.factors] + added_factor(plan, everything, node, operation)
    return [edges[i][0] for i in constant]


def added_factor(plan: Plan, everything: Plan, node: Node, operation: Operation) -> list[int]:
    """The factor of a product that is what is added: a constant beside a constant, or beside a gate of the input's."""
    edges = plan.graph[node]
    factors = [i for i in operation.factors if i < len(edges)]  # a plain number leaves no operand behind
    live = [value for i in factors if (value := plan.value(edges[i])) is not None]
    if any(value.gate is None or value.can_be_stream or value.rule == "attention" for value in live):
        return []  # the other factor is the stream; a softmax that is one is refused, whatever it multiplies
    constant = [i for i in factors if edges[i][0] is not None and plan.value(edges[i]) is None]
    values = {i: everything.value(edges[i]) for i in constant}
    streams = [i for i in constant if (value := values[i]) is not None and value.gate is None]
    return (streams or constant)[:1]  # linear in either: follow one, and no gate


def halved(plan: Plan) -> int:
    return sum(treatment.label == "product halved" for treatment in plan.treatments.values())


# ---- constants without a gradient, where the graph shows that there is one -------------------------------------------


def without_graph(*operands: int) -> Callable[[Node], bool]:
    return lambda node: any(node.next_functions[i][0] is None for i in operands)


def any_without_graph(node: Node, fewest: int = 2) -> bool:
    """One of the operands, or a number that leaves no operand behind, so that there are fewer than `fewest`."""
    return len(node.next_functions) < fewest or any(child is None for child, _ in node.next_functions)


def added_product(node: Node) -> bool:
    added, *factors = (child is None for child, _ in node.next_functions)
    return added or all(factors)


def constant_but_bias(node: Node) -> bool:
    return node.next_functions[0][0] is None and node.next_functions[1][0] is None


def frozen_bias(node: Node) -> bool:
    sizes = saved(node, "bias_sym_sizes_opt")
    return constant_but_bias(node) or node.next_functions[2][0] is None and bool(sizes) and sum(sizes) > 0


def frozen_norm_bias(node: Node) -> bool:
    """Some norms save their bias, of the others it is only known whether they have a weight."""
    frozen = node.next_functions[2][0] is None
    value = saved(node, "bias" if hasattr(type(node), "_saved_bias") else "weight")
    return constant_but_bias(node) or frozen and value is not None and bool(value.any())


def batch_norm_mean(node: Node) -> bool:
    mean = saved(node, "running_mean")
    return mean is not None and bool(mean.any()) and not saved(node, "training") or frozen_norm_bias(node)


def chosen(node: Node) -> bool:
    condition = saved(node, "condition")
    first, second = (child is None for child, _ in node.next_functions)
    return first and bool(condition.any()) or second and not bool(condition.all())


def filled(node: Node) -> bool:
    return any_without_graph(node) and bool(saved(node, "mask").any())


def larger_constant(sign: int) -> Callable[[Node], bool]:
    def shows(node: Node) -> bool:
        pair = [saved(node, name) for name in ("self", "other")]
        for constant, other, (child, _) in zip(pair, reversed(pair), node.next_functions, strict=True):
            if child is None and bool(((sign * constant > sign * other) & (constant != 0)).any()):
                return True
        return False

    return shows


def written_slice(node: Node) -> bool:
    inner = getattr(node, "_wrapped_node", None)
    return node.next_functions[0][0] is None or inner is not None and hides(inner)


def frozen_last(node: Any) -> bool:
    """The bias of bitsandbytes' layers is their last operand."""
    return node.dtype_bias is not None and node.next_functions[-1][0] is None


def linear_of_a_constant(node: Node) -> bool:
    """A custom function that was taught as linear in all its operands."""
    taught = taught_operation(node)
    return taught is not None and taught.role == "linear" and taught.streams is None and any_without_graph(node, 0)


HIDES: dict[str, Callable[[Node], bool]] = {
    **dict.fromkeys("Add Sub Rsub Cat Stack Complex Lerp".split(), any_without_graph),
    **dict.fromkeys(
        "IndexFill IndexCopy IndexPut IndexAdd Scatter ScatterAdd ScatterReduce SliceScatter SelectScatter "
        "MaskedScatter BlockDiag Fill".split(),
        any_without_graph,
    ),
    **dict.fromkeys("Addmm Baddbmm Addbmm Addmv Addr Addcmul Addcdiv".split(), added_product),
    "Convolution": frozen_bias,
    "NativeLayerNorm": frozen_norm_bias,
    "NativeGroupNorm": frozen_norm_bias,
    **dict.fromkeys("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm".split(), batch_norm_mean),
    "Where": chosen,
    "MaskedFill": filled,
    "ConstantPadNd": lambda node: any(0 < size < 2**63 for size in saved(node, "pad")),
    "Threshold": lambda node: bool((saved(node, "self") <= saved(node, "threshold")).any()),
    "NanToNum": lambda node: not bool(saved(node, "self").isfinite().all()),
    "Maximum": larger_constant(1),
    "Fmax": larger_constant(1),
    "Minimum": larger_constant(-1),
    "Fmin": larger_constant(-1),
    "Copy": without_graph(1),  # operand 0 is overwritten
    "CopySlices": written_slice,
}


HIDES_OF_CUSTOMS: dict[str, Callable[[Node], bool]] = {
    "bitsandbytes.autograd._functions.MatMul4Bit": frozen_last,
    "bitsandbytes.autograd._functions.MatMul8bitLt": frozen_last,
}


def hides(node: Node) -> bool:
    """Whether the node adds a constant that has no gradient, as far as its graph tells."""
    if noted(node, COUNTED):
        return False
    if is_custom(node):
        return HIDES_OF_CUSTOMS.get(full_name(function_class(node)), linear_of_a_constant)(node)
    shows = HIDES.get(operation_name(node))
    return shows is not None and shows(node)


def hides_constant(node: Node, plan: Plan) -> bool:
    """The same for a node that is treated: constants inside of gates add nothing to the stream."""
    return plan.inside[node] is None and hides(node)


def check_unchanged(constant: Tensor) -> None:
    version = getattr(constant, VERSION, None)
    if version is not None and version != constant._version:
        raise ValueError(
            f"a constant of shape {tuple(constant.shape)} was changed in place after it had been added, so that what "
            "was added is lost: change it out of place, or clone it before the change"
        )
