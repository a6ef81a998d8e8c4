"""What is added on the way: the bias-like constants that complete attributions share the output with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node

from .backward import as_tuple, walk_graph
from .graph import Walk
from .rules import LIBRA, operation_name, operation_of


def additive_constants(output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parameters that are *added* between `inputs` and `output`: biases, class token, position embedding.

    With them, libra_grad is complete (Mehri et al. 2025, FullGrad-completeness):
    output = sum of <t, g> over t, g in zip((x, *constants), libra_grad(output, (x, *constants))).
    Constants that don't require grad (buffers, frozen parameters) leave no trace in the graph and are missing here.
    """
    outputs = as_tuple(output)
    walk = walk_graph(outputs, as_tuple(inputs), LIBRA, allow_unused=False)
    found: dict[Tensor, None] = {}
    below: set[Node] = set()
    stack = [child for node in walk.wanted for child in constant_operands(walk, node)]
    while stack:
        node = stack.pop()
        if node in below or node in walk.operations:  # the latter is a gate on zero: it adds nothing
            continue
        below.add(node)
        if operation_name(node).endswith("AccumulateGrad"):
            found[node.variable] = None
            continue
        operation, children = operation_of(node), [child for child, _ in node.next_functions]
        if operation is not None and operation.role == "product":  # linear in either factor: follow one
            first, second = operation.factors
            children[second if children[first] is not None else first] = None
        elif operation is not None and operation.rule == "norm":
            children[1:2] = [None]
        stack.extend(child for child in children if child is not None)
    return tuple(found)


def constant_operands(walk: Walk, node: Node) -> list[Node]:
    """Operands of a live node that don't depend on the inputs and are added, not multiplied."""
    operation = walk.operations[node]
    constant = [
        i
        for i, (child, _) in enumerate(walk.edges[node])
        if child is not None and walk.value(walk.edges[node][i]) is None
    ]
    if operation is None or operation.role in ("gate", "division", "power"):
        return []
    if operation.role == "product":
        constant = [i for i in constant if i not in operation.factors]
    if operation.role == "balanced" or operation_name(node).endswith("BatchNorm"):
        constant = [i for i in constant if i == 2 and operation.rule != "attention"]  # the bias, after input and weight
    return [walk.edges[node][i][0] for i in constant]
