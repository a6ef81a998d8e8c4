"""What has to be done to balance a graph: two passes over its nodes, as automatic differentiation's activity analysis.

From the inputs to the output (*varied*) it finds what each node computes of them: a *stream*, whose attribution is
wanted, or only a function of *gates* (a softmax, a sigmoid, a reciprocal norm). From the output back (*useful*) it
decides which nodes carry gradient, and how each is treated; a gate that multiplies a stream is held constant there.
Nothing is computed and nothing is hooked: a plan is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from .nodes import OPERANDS, Edge, constant_factors, is_custom, noted, operation_name, topological
from .operations import Backward, Gradients, Operation, Repair, cure, operation_of
from .reach import Reach, reach_of_operand, widest, worth_sparing
from .repairs import shared_by_sign
from .rules import Rule, Rules


class UnsupportedOperation(NotImplementedError):
    """The graph holds operations whose balanced backward pass nobody has defined. Nothing was computed."""


@dataclass(frozen=True)
class Value:
    """What a live node computes of the inputs: a stream or, where `gate` is set, a function of gates only."""

    gate: Node | None = None  # the nonlinearity it comes from
    rule: Rule | None = None  # the repair which that gate belongs to
    can_be_stream: bool = True  # is there a complete form, should it turn out to be the stream?


@dataclass(frozen=True)
class Treatment:
    """What is done at one node.

    incoming changes the gradient that arrives; repair replaces what is sent on by a formula or a function. reach: where
    the incoming gradient can lie, if the node can make use of that. complete: attributions stay complete.
    """

    label: str
    complete: bool = True
    supported: bool = True
    incoming: Callable[[Node, Tensor], Tensor] | None = None
    repair: Repair | Backward | None = None
    reach: Reach = None


class Arrival(NamedTuple):
    """What arrives at one result of a node: the stream's gradient or one inside a switched-off rule; and where."""

    is_stream: bool
    reach: Reach


@dataclass
class Plan:
    """The graph below some outputs, and what both passes found."""

    graph: dict[Node, tuple[Edge, ...]]  # each node after all it sends gradient to
    inputs: set[Edge]
    rules: Rules
    operations: dict[Node, Operation | None] = field(default_factory=dict)  # of live nodes
    values: dict[Node, Value] = field(default_factory=dict)  # of live nodes
    treatments: dict[Node, Treatment] = field(default_factory=dict)  # of nodes that carry gradient
    held: dict[Node, Rule | None] = field(default_factory=dict)  # gates that are constant somewhere
    inside: dict[Node, Rule | None] = field(default_factory=dict)  # the switched-off rule a node is in; None: stream
    consumer: dict[Node, Node | None] = field(default_factory=dict)  # one that sends gradient to a node
    arrivals: dict[Node, dict[int, Arrival]] = field(default_factory=dict)  # the results where gradient arrives

    def value(self, edge: Edge) -> Value | None:
        """What flows along `edge`; None if it doesn't depend on the inputs."""
        node, result = edge
        if edge in self.inputs:
            return Value()
        operation = self.operations.get(node)
        if operation is not None and node in self.values and operation.gate_result == result:
            return Value(node, operation.rule, False)
        return self.values.get(node)

    def held_rows(self) -> list[tuple[str, str]]:
        return [(operation_name(node), f"held constant ({rule})") for node, rule in self.held.items()]

    @property
    def complete(self) -> bool:
        return all(treatment.complete for treatment in self.treatments.values())

    def raise_refusals(self) -> None:
        refused: dict[str, list[Node]] = {}
        for node, treatment in self.treatments.items():
            if not treatment.supported:
                refused.setdefault(operation_name(node), []).append(node)
        if not refused:
            return
        lines = [
            f"  {name} ({len(nodes)}x), at {self.whereabouts(nodes[0])}: {cure(nodes[0], self.near_output(nodes[0]))}"
            for name, nodes in sorted(refused.items())
        ]
        raise UnsupportedOperation(
            "no balanced backward pass is known for\n"
            + "\n".join(lines)
            + "\nNothing was computed. audit(output, inputs) lists the whole graph."
        )

    def consumers(self, node: Node) -> list[Node]:
        """The way from a node up to the output, or as far as one consumer each leads."""
        path = []
        above = self.consumer.get(node)
        while above is not None:
            path.append(above)
            above = self.consumer.get(above)
        return path

    def whereabouts(self, node: Node) -> str:
        path = [operation_name(above) for above in [node, *self.consumers(node)]]
        return " -> ".join([*path, "output"] if len(path) < 5 else [*path[:5], "..."])

    def near_output(self, node: Node) -> bool:
        above = [self.operations[n] for n in self.consumers(node)]
        return all(operation is not None and operation.role == "linear" for operation in above)


def make_plan(roots: Sequence[Edge], inputs: set[Edge], rules: Rules) -> Plan:
    plan = Plan(topological([node for node, _ in roots]), inputs, rules)
    find_values(plan)
    find_treatments(plan, roots)
    return plan


# ---- from the inputs to the output: what is a stream, what only a gate? ----------------------------------------------


def find_values(plan: Plan) -> None:
    for node, edges in plan.graph.items():
        operands = [plan.value(edge) for edge in edges]
        live = [value for value in operands if value is not None]
        if not live:
            continue
        operation = plan.operations[node] = operation_of(node)
        gates = [value for value in live if value.gate is not None]
        if len(gates) == len(live) and any(not factor.any() for factor in constant_factors(node)):
            continue  # a gate on a zero that no input reaches, such as an LSTM's first state
        plan.values[node] = value_of(node, operation, operands, live, gates)


def value_of(
    node: Node,
    operation: Operation | None,
    operands: Sequence[Value | None],
    live: Sequence[Value],
    gates: Sequence[Value],
) -> Value:
    role = operation.role if operation else "linear"
    if role == "gate" and operation is not None:  # made of what can't be a stream, it can't be one either
        of_streams = any(value.can_be_stream for value in live)
        return Value(node, operation.rule, of_streams and operation.repair is not None)
    if role == "division" and operation is not None:
        numerators = [operands[i] for i in operation.streams or () if operands[i] is not None]
        if not numerators:
            return Value(node, "norm", False)
        live = [value for value in numerators if value is not None]
        gates = [value for value in live if value.gate is not None]
    if len(gates) < len(live):
        return Value()
    able = any if role == "product" else all
    return Value(gates[0].gate, gates[0].rule, able(gate.can_be_stream for gate in gates))


# ---- from the output to the inputs: which nodes carry gradient, and how? ---------------------------------------------

# An operand that goes on carrying gradient, and the switched-off rule inside of which it does so (None: the stream).
Flow = tuple[int, Rule | None]
Verdict = tuple[Treatment, list[Flow]]

REFUSED = Treatment("unsupported", complete=False, supported=False)
SHARED = Treatment("relevance shared by sign", repair=Repair(shared_by_sign))


def find_treatments(plan: Plan, roots: Sequence[Edge]) -> None:
    for root in roots:
        arrive(plan, root, Arrival(True, None), None, None)
    for node in reversed(plan.graph):
        if node not in plan.inside:
            continue
        operation = plan.operations[node]
        live = [i for i, edge in enumerate(plan.graph[node]) if plan.value(edge) is not None]
        if operation is None:
            treatment, flows = REFUSED, [(i, plan.inside[node]) for i in live]
        else:
            treatment, flows = ROLES[operation.role](plan, node, operation, live)
        plan.treatments[node] = spare_zeros(plan, node, treatment)
        results = [(number, arrival.reach) for number, arrival in plan.arrivals[node].items()]
        for operand, rule in flows:
            arrival = Arrival(rule is None, reach_of_operand(node, operand, results))
            arrive(plan, plan.graph[node][operand], arrival, rule, node)


def arrive(plan: Plan, edge: Edge, arrival: Arrival, rule: Rule | None, consumer: Node | None) -> None:
    """Gradient flows along `edge`. A stream stays one, whatever else it feeds."""
    node, result = edge
    if node not in plan.values:
        return
    if node not in plan.inside or rule is None:
        plan.inside[node] = rule
    plan.consumer.setdefault(node, consumer)
    before = plan.arrivals.setdefault(node, {}).get(result)
    if before is not None:
        arrival = Arrival(before.is_stream or arrival.is_stream, widest(before.reach, arrival.reach))
    plan.arrivals[node][result] = arrival


SPARES_ZEROS = {"AddmmBackward0", "MmBackward0", "ScaledDotProductFlashAttentionForCpuBackward0"}


def spare_zeros(plan: Plan, node: Node, treatment: Treatment) -> Treatment:
    """Matrix products and attention leave out where the incoming gradient is known to be zero."""
    if node.name() not in SPARES_ZEROS or 0 not in plan.arrivals[node]:
        return treatment
    return replace(treatment, reach=worth_sparing(plan.arrivals[node][0].reach))


def plain(rule: Rule | None) -> Treatment:
    return Treatment(f"plain derivative ({rule} rule is off)", complete=False)


def scaled(label: str, factor: float, complete: bool = True) -> Treatment:
    """Everything that the node sends on, times a number."""
    return Treatment(label, complete, incoming=lambda node, gradient: gradient * factor)


def scale_operands(factors: dict[int, float | None]) -> Backward:
    """Each operand's gradient times a number of its own. None cuts; operands not named keep theirs."""

    def backward(node: Node, grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients:
        return tuple(
            g if g is None or i not in factors else None if (factor := factors[i]) is None else g * factor
            for i, g in enumerate(grad_inputs)
        )

    return backward


def hold(plan: Plan, edge: Edge) -> None:
    """The gate behind an operand is held constant."""
    value = plan.value(edge)
    if value is not None and value.gate is not None:
        plan.held[value.gate] = value.rule


def streams_apart(operation: Operation, live: Sequence[int]) -> tuple[list[int], list[int]]:
    """Live operands that may carry a stream, and those that may not."""
    streams = [i for i in live if operation.streams is None or i in operation.streams]
    return streams, [i for i in live if i not in streams]


def constant_gates(plan: Plan, node: Node, operands: Sequence[int]) -> dict[int, float | None] | None:
    """Cuts the gradient to these operands, each of which is a gate; None if one of them isn't, or its rule is off."""
    edges = [plan.graph[node][i] for i in operands]
    values = [plan.value(edge) for edge in edges]
    if any(v is None or v.gate is None or v.rule is None or plan.rules.switch(v.rule) is not True for v in values):
        return None
    for edge in edges:
        hold(plan, edge)
    return dict.fromkeys(operands, None)


# One function a role: how the node is treated, and which operands go on carrying gradient.


def linear(plan: Plan, node: Node, operation: Operation, live: list[int]) -> Verdict:
    inside = plan.inside[node]
    streams, others = streams_apart(operation, live)
    if plan.rules.residual and len(live) == 2 and noted(node, OPERANDS) is not None:
        return SHARED, [(i, inside) for i in live]
    arrived = None if operation.gate_result is None else plan.arrivals[node].get(operation.gate_result)
    if arrived is not None and arrived.is_stream:
        return REFUSED, [(i, inside) for i in live]
    if others:
        cuts = constant_gates(plan, node, others) if streams else None
        if cuts is None or operation.repair is not None:
            return REFUSED, [(i, inside) for i in live]
        return Treatment("gate constant", repair=scale_operands(cuts)), [(i, inside) for i in streams]
    return Treatment("linear", incoming=operation.incoming, repair=operation.repair), [(i, inside) for i in live]


def balanced(plan: Plan, node: Node, operation: Operation, live: list[int]) -> Verdict:
    rule, inside = operation.rule, plan.inside[node]
    assert rule is not None
    switch = plan.rules.switch(rule)
    if not switch:
        return plain(rule), [(i, inside) for i in live]
    if switch == "halve":  # AttnLRP: two nested products, each halved
        repair = scale_operands({0: 0.25, 1: 0.25, 2: 0.5})
        return Treatment("products halved, softmax kept", False, repair=repair), [(i, inside) for i in live]
    streams, others = streams_apart(operation, live)
    if not streams or (others and rule != "attention"):  # a live weight, for example
        return REFUSED, [(i, inside) for i in streams]
    return Treatment(f"balanced ({rule})", repair=operation.repair), [(i, inside) for i in streams]


def gate(plan: Plan, node: Node, operation: Operation, live: list[int]) -> Verdict:
    """Reached only as the stream, or because its rule does not hold it constant."""
    rule, inside = operation.rule, plan.inside[node]
    assert rule is not None
    flows = [(i, inside) for i in live]
    if inside is not None or not plan.rules.switch(rule):
        return plain(rule), flows
    if operation.repair is None:
        return REFUSED, flows
    return Treatment(f"balanced ({rule})", repair=operation.repair), flows


def power(plan: Plan, node: Node, operation: Operation, live: list[int]) -> Verdict:
    inside = plan.inside[node]
    flows = [(i, inside) for i in live]
    if inside is not None or not plan.rules.product:
        return plain(inside or "product"), flows
    if operation.streams is not None and not set(live) <= set(operation.streams):
        return REFUSED, flows
    degree = operation.degree
    return Treatment("divided by the exponent", incoming=lambda node, gradient: gradient / degree), flows


def division(plan: Plan, node: Node, operation: Operation, live: list[int]) -> Verdict:
    inside = plan.inside[node]
    streams, denominators = streams_apart(operation, live)
    flows = [(i, inside) for i in streams]
    if not denominators:
        return Treatment("linear"), flows
    if not plan.rules.norm:
        return plain("norm"), [*flows, *((i, "norm") for i in denominators)]
    for i in denominators:
        hold(plan, plan.graph[node][i])
    if not streams:
        return REFUSED, flows
    return Treatment("denominator constant (norm)", repair=scale_operands(dict.fromkeys(denominators, None))), flows


def product(plan: Plan, node: Node, operation: Operation, live: list[int]) -> Verdict:
    inside = plan.inside[node]
    factors = [i for i in operation.factors if i in live]
    flows: list[Flow] = [(i, inside) for i in live if i not in factors]
    values = {i: value for i in factors if (value := plan.value(plan.graph[node][i])) is not None}
    gates = [i for i in factors if values[i].gate is not None]
    if len(gates) == 2 and inside is None:  # sigmoid * tanh, as in an LSTM: tanh is the stream
        gates = [i for i in gates if not values[i].can_be_stream]
    if operation.streams is not None and not set(live) <= set(operation.streams):
        return REFUSED, [(i, inside) for i in live]
    if len(factors) < 2:
        return Treatment("linear"), [*flows, *((i, inside) for i in factors)]
    if len(gates) == 1:
        return gated(plan, node, operation, gates[0], values[gates[0]], flows)
    flows += [(i, inside) for i in factors]
    halves = plan.rules.product if inside is None else inside == "attention" and plan.rules.attention == "halve"
    if not halves:
        return plain(inside or "product"), flows
    if not operation.separable:
        return REFUSED, flows
    if inside is None and plan.rules.product == "hold":
        held = [i for i in factors if is_activated(plan, plan.graph[node][i])]
        if len(held) == 1:
            flows = [(i, rule) for i, rule in flows if i not in held]
            return Treatment("activated factor constant (product)", repair=scale_operands({held[0]: None})), flows
    return halved(plan, node, factors), flows


def is_activated(plan: Plan, edge: Edge) -> bool:
    """Is this the result of an activation, perhaps reshaped, scaled or written out as x * sigmoid(x)?"""
    node = edge[0]
    while node in plan.values:
        operation = plan.operations[node]
        live = [child for child in plan.graph[node] if plan.value(child) is not None]
        if operation is None or operation.rule == "activation":
            return operation is not None
        gates = [value for child in live if (value := plan.value(child)) is not None and value.gate is not None]
        if gates:
            return operation.role == "product" and gates[0].rule == "activation"
        if len(live) != 1 or not (operation.role == "linear" or operation_name(node) == "Mul"):
            return False
        node = live[0][0]
    return False


def halved(plan: Plan, node: Node, factors: Sequence[int], complete: bool = True) -> Treatment:
    """Each factor of a product of two gets half the gradient, and what is added to it all."""
    only_factors = all(child is None or i in factors for i, (child, _) in enumerate(plan.graph[node]))
    if only_factors and not is_custom(node):
        return scaled("product halved", 0.5, complete)
    return Treatment("product halved", complete, repair=scale_operands(dict.fromkeys(factors, 0.5)))


def gated(plan: Plan, node: Node, operation: Operation, gate: int, value: Value, flows: list[Flow]) -> Verdict:
    """A product of a stream and a gate."""
    inside, rule = plan.inside[node], value.rule
    (stream,) = (i for i in operation.factors if i != gate)
    assert rule is not None
    switch = plan.rules.switch(rule)
    if switch is True:
        if not operation.separable and gate == 0:  # the rest of what the slice was written into is a gate, too
            return REFUSED, [*flows, (stream, inside)]
        hold(plan, plan.graph[node][gate])
        return Treatment(f"gate constant ({rule})", repair=scale_operands({gate: None})), [*flows, (stream, inside)]
    flows = [*flows, (stream, inside), (gate, rule)]
    if switch == "halve" and not operation.separable:
        return REFUSED, flows
    return (halved(plan, node, operation.factors, False) if switch == "halve" else plain(rule)), flows


ROLES: dict[str, Callable[[Plan, Node, Operation, list[int]], Verdict]] = {
    "linear": linear,
    "balanced": balanced,
    "gate": gate,
    "power": power,
    "division": division,
    "product": product,
}
