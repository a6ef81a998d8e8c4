"""What is added on the way: the bias-like constants that complete attributions share the output with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node

from .backward import as_tuple, edge_of, walk_graph
from .graph import Walk
from .rules import LIBRA, operation_name


def additive_constants(output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parameters that are *added* between `inputs` and `output`: biases, class token, position embedding.

    With them, libra_grad is complete (Mehri et al. 2025, FullGrad-completeness):
    output = sum of <t, g> over t, g in zip((x, *constants), libra_grad(output, (x, *constants))).
    Constants that don't require grad leave no trace in the graph and are missing here: buffers, frozen parameters, the
    running mean of a batch norm, the 1 of x + 1. Warns where a parameter is added in one place and multiplies the
    stream in another (tied weights): libra_grad with it then gives half of that product to the parameter.
    """
    outputs, inputs = as_tuple(output), as_tuple(inputs)
    walk = walk_graph(outputs, inputs, LIBRA, allow_unused=False)
    leaves = {(node, 0) for node in walk.edges if is_leaf(node)}
    # as if every parameter were an input: tells gates among the constants, too
    everything = Walk([edge_of(o) for o in outputs], walk.inputs | leaves, LIBRA)
    found: dict[Tensor, None] = {}
    seen: set[Node] = set()
    stack = [child for node in walk.wanted for child in added_operands(walk, everything, node)]
    while stack:
        node = stack.pop()
        if node in seen or node in walk.operations:  # the latter is a gate on zero: it adds nothing
            continue
        seen.add(node)
        if is_leaf(node):
            found[node.variable] = None
        else:
            stack.extend(added_operands(walk, everything, node))
    together = walk_graph(outputs, (*inputs, *found), LIBRA, allow_unused=False)
    if halved(together) > halved(walk):
        warnings.warn(
            "a parameter that is added here also multiplies the stream (tied weights): libra_grad with it gives half "
            "of that product to the parameter. To keep all of it on the input, untie them with a clone.",
            stacklevel=2,
        )
    return tuple(found)


def is_leaf(node: Node) -> bool:
    return operation_name(node).endswith("AccumulateGrad")


def added_operands(walk: Walk, everything: Walk, node: Node) -> list[Node]:
    """Operands of `node` that don't depend on the inputs and are added, not multiplied: it is linear in them."""
    operation, edges = everything.operations.get(node), walk.edges[node]
    live = [i for i, edge in enumerate(edges) if walk.value(edge) is not None]
    constant = [i for i, (child, _) in enumerate(edges) if child is not None and i not in live]
    if operation is not None and operation.role == "product":
        factors = [i for i in constant if i in operation.factors]
        constant = [i for i in constant if i not in factors]
        if not any(i in operation.factors for i in live):  # linear in either factor: follow one, and no gate
            values = {i: everything.value(edges[i]) for i in factors}
            streams = [i for i in factors if values[i] is not None and values[i].gate is None]
            constant += (streams or factors)[:1]
    elif operation is not None and operation.streams is not None:
        constant = [i for i in constant if i in operation.streams]
    return [edges[i][0] for i in constant]


def halved(walk: Walk) -> int:
    return sum(count for (_, treatment), count in walk.treatments.items() if treatment == "product halved")
