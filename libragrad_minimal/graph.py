"""What a graph is made of and what has to be done to balance it: the walk from an output to its inputs.

The walk goes twice over the nodes. From the inputs to the output it finds what each node computes of them: a *stream*,
whose attribution is wanted, or only a function of *gates* (a softmax, a sigmoid, a reciprocal norm). From the output
back it decides which nodes carry gradient, and how; a gate that multiplies a stream is held constant there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from .residual import OPERANDS, shared_by_sign
from .rules import (
    CURES,
    Backward,
    Operation,
    Rules,
    exponent_of,
    halved_attention,
    operation_name,
    operation_of,
    saved,
    scaled,
)

Edge = tuple[Node, int]  # a node and which of its results
SHARED = "relevance shared by sign"
HIDDEN = "linear, and adds a constant without a gradient"
STREAM = (
    "stream"  # what a consumer wants of a value; the alternative is the name of a switched-off rule it is inside of
)


class UnsupportedOperation(NotImplementedError):
    """The graph holds operations whose balanced backward pass nobody has defined. Nothing was computed."""


@dataclass(frozen=True)
class Audit:
    """What the graph between inputs and output consists of, and how each operation is treated.

    rows: (operation, treatment, count). complete: every treatment keeps attributions complete, so that the sum over
    inputs and additive constants equals the output. A constant that has no gradient (a buffer, a frozen parameter, the
    1 of x + 1) belongs to that sum and can't be asked for; where the graph shows one, its row says so.
    """

    rows: tuple[tuple[str, str, int], ...]
    complete: bool

    def __str__(self) -> str:
        table = [("operation", "treatment", "count"), *((o, t, str(n)) for o, t, n in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{o:<{widths[0]}}  {t:<{widths[1]}}  {n:>{widths[2]}}" for o, t, n in table]
        return "\n".join([*lines, f"attributions under these rules are {'' if self.complete else 'NOT '}complete"])


@dataclass(frozen=True)
class Value:
    """What a live node computes of the inputs: a stream or, where `gate` is set, a function of gates only."""

    gate: Node | None = None  # the nonlinearity it comes from
    rule: str | None = None  # the repair that gate belongs to
    can_be_stream: bool = True  # is there a complete form, should it turn out to be the stream?


def topological(roots: Sequence[Node]) -> dict[Node, tuple]:
    """Every node below `roots` with its edges, each after all it sends gradient to. Iterative: graphs are deep."""
    finished: dict[Node, tuple] = {}
    stack = [(root, None) for root in roots]
    while stack:
        node, edges = stack.pop()
        if edges is not None:
            finished[node] = edges
        elif node not in finished:
            edges = node.next_functions
            stack.append((node, edges))
            stack.extend((child, None) for child, _ in edges if child is not None and child not in finished)
    return finished


class Walk:
    """One walk over one graph: what to do at which node (`hooks`), and what was found (`treatments`, `refusals`)."""

    def __init__(self, roots: Sequence[Edge], inputs: set[Edge], rules: Rules):
        self.rules = rules
        self.inputs = inputs
        self.edges = topological([node for node, _ in roots])
        self.operations: dict[Node, Operation | None] = {}
        self.values: dict[Node, Value] = {}
        self.hooks: list[tuple[Node, Backward]] = []
        self.treatments: Counter[tuple[str, str]] = Counter()
        self.refusals: dict[str, str] = {}  # operation -> where the first one sits
        self.complete = True
        self.gates_held: set[Node] = set()
        self.find_values()
        self.wanted: dict[Node, str] = {}
        self.consumer: dict[Node, Node] = {}
        for root in roots:
            self.want(root, STREAM)
        for node in reversed(self.edges):
            if node in self.wanted:
                self.visit(node)
        if rules.residual and not any(treatment == SHARED for _, treatment in self.treatments):
            raise ValueError(
                "the residual rule needs the operands of every addition, and this graph has not recorded any: "
                "run the forward pass inside `with record_residuals():`"
            )

    # ---- from the inputs to the output: what is a stream, what only a gate? ------------------------------------------

    def value(self, edge) -> Value | None:
        """What flows along `edge`; None if it doesn't depend on the inputs."""
        node, result = edge
        if edge in self.inputs:
            return Value()
        if result == 0 and node in self.values and self.operations[node] and self.operations[node].gate_result == 0:
            return Value(node, self.operations[node].rule, False)
        return self.values.get(node)

    def find_values(self) -> None:
        for node, edges in self.edges.items():
            operands = [self.value(edge) for edge in edges]
            live = [value for value in operands if value is not None]
            if not live:
                continue
            operation = self.operations[node] = operation_of(node)
            check_forward(node)
            gates = [value for value in live if value.gate is not None]
            if len(gates) == len(live) and any(not factor.any() for factor in constant_factors(node)):
                continue  # a gate on a zero that no input reaches, such as an LSTM's first state
            role = operation.role if operation else "linear"
            if role == "gate":
                self.values[node] = Value(node, operation.rule, operation.backward is not None)
            elif role == "division":
                self.values[node] = operands[0] or Value(node, "norm", False)
            elif len(gates) < len(live):
                self.values[node] = Value()
            else:
                able = any if role == "product" else all
                self.values[node] = Value(gates[0].gate, gates[0].rule, able(gate.can_be_stream for gate in gates))

    # ---- from the output to the inputs: which nodes carry gradient, and how? -----------------------------------------

    def visit(self, node: Node) -> None:
        operation = self.operations[node]
        live = [i for i, edge in enumerate(self.edges[node]) if self.value(edge) is not None]
        if operation is None:
            self.refuse(node)
        else:
            live = getattr(self, operation.role)(node, operation, live)
        for i in live:
            self.want(self.edges[node][i], self.wanted[node], node)

    def want(self, edge: Edge, wanted: str, consumer: Node | None = None) -> None:
        """Gradient flows along `edge`. A stream stays one, whatever else it feeds."""
        node = edge[0]
        if node not in self.values:
            return
        if self.wanted.get(node) != STREAM:
            self.wanted[node] = wanted
            self.consumer.setdefault(node, consumer)
        if wanted == STREAM and self.value(edge).gate is node and self.operations[node].role == "linear":
            self.refuse(node)  # the variance of var_mean

    def treat(self, node: Node, treatment: str, backward: Backward | None = None) -> None:
        self.treatments[operation_name(node), treatment] += 1
        if backward is not None:
            self.hooks.append((node, backward))

    def keep_plain(self, node: Node, rule: str) -> None:
        self.treat(node, f"plain derivative ({rule} rule is off)")
        self.complete = False

    def refuse(self, node: Node) -> None:
        self.treat(node, "unsupported")
        self.refusals.setdefault(operation_name(node), self.whereabouts(node))
        self.complete = False

    def hold(self, value: Value) -> None:
        """Count the gate behind a factor or denominator that is held constant."""
        if value.gate is not None and value.gate not in self.gates_held:
            self.gates_held.add(value.gate)
            self.treat(value.gate, f"held constant ({value.rule})")

    def whereabouts(self, node: Node) -> str:
        path = []
        while node is not None and len(path) < 5:
            path.append(operation_name(node))
            node = self.consumer.get(node)
        return " -> ".join([*path, "output" if node is None else "..."])

    # One method a role: treats the node and returns the operands that go on carrying gradient.

    def linear(self, node, operation, live):
        if self.rules.residual and len(live) == 2 and OPERANDS in node.metadata:
            self.treat(node, SHARED, shared_by_sign)
        elif operation.streams is not None and not set(live) <= set(operation.streams):
            self.refuse(node)
        elif adds_hidden_constant(node):
            self.treat(node, HIDDEN, operation.backward)
        else:
            self.treat(node, "linear", operation.backward)
        return live

    def balanced(self, node, operation, live):
        switch = getattr(self.rules, operation.rule)
        if not switch:
            self.keep_plain(node, operation.rule)
        elif switch == "halve":
            self.treat(node, "products halved, softmax kept", halved_attention)
            self.complete = False
        else:
            streams = [i for i in live if operation.streams is None or i in operation.streams]
            if not streams or (
                len(streams) < len(live) and operation.rule != "attention"
            ):  # a live weight, for example
                self.refuse(node)
            else:
                self.treat(node, f"balanced ({operation.rule})", operation.backward)
            live = streams
        return live

    def gate(self, node, operation, live):
        """Reached only as the stream, or because its rule does not hold it constant."""
        if self.wanted[node] != STREAM or not getattr(self.rules, operation.rule):
            self.keep_plain(node, operation.rule)
        elif operation.backward is None:
            self.refuse(node)
        else:
            self.treat(node, f"balanced ({operation.rule})", operation.backward)
        return live

    def power(self, node, operation, live):
        exponent = exponent_of(node)
        if self.wanted[node] != STREAM or not self.rules.product:
            self.keep_plain(node, "product" if self.wanted[node] == STREAM else self.wanted[node])
        else:
            self.treat(node, "divided by the exponent", lambda n, gi, go: scaled(n, gi, {0: 1 / exponent}))
        return live

    def division(self, node, operation, live):
        if 1 not in live:
            self.treat(node, "linear")
        elif not self.rules.norm:
            self.keep_plain(node, "norm")
            self.want(self.edges[node][1], "norm", node)
        else:
            self.treat(node, "denominator constant (norm)", lambda n, gi, go: (gi[0], None))
            self.hold(self.value(self.edges[node][1]))
            if 0 not in live:
                self.refuse(node)
        return [i for i in live if i == 0]

    def product(self, node, operation, live):
        factors = [i for i in operation.factors if i in live]
        others = [i for i in live if i not in factors]
        values = {i: self.value(self.edges[node][i]) for i in factors}
        gates = [i for i in factors if values[i].gate is not None]
        if len(gates) == 2 and self.wanted[node] == STREAM:  # sigmoid * tanh, as in an LSTM: tanh is the stream
            gates = [i for i in gates if not values[i].can_be_stream]
        if len(factors) < 2:
            self.treat(node, "linear")
        elif len(gates) == 1:
            others += self.gated(node, factors, gates[0], values[gates[0]])
            return others
        elif self.wanted[node] == STREAM and self.rules.product or self.halves_attention(self.wanted[node]):
            self.treat(node, "product halved", lambda n, gi, go: scaled(n, gi, dict.fromkeys(factors, 0.5)))
        else:
            self.keep_plain(node, "product" if self.wanted[node] == STREAM else self.wanted[node])
        return others + factors

    def gated(self, node: Node, factors: Sequence[int], gate: int, value: Value) -> list[int]:
        """A product of a stream and a gate. Returns the stream's operand."""
        switch = getattr(self.rules, value.rule)
        if switch is True:
            self.treat(node, f"gate constant ({value.rule})", lambda n, gi, go: scaled(n, gi, {gate: None}))
            self.hold(value)
        else:
            if switch == "halve":
                self.treat(node, "product halved", lambda n, gi, go: scaled(n, gi, dict.fromkeys(factors, 0.5)))
                self.complete = False
            else:
                self.keep_plain(node, value.rule)
            self.want(self.edges[node][gate], value.rule, node)
        return [i for i in factors if i != gate]

    def halves_attention(self, wanted: str) -> bool:
        return wanted == "attention" and self.rules.attention == "halve"

    def audit(self) -> Audit:
        rows = sorted((name, treatment, count) for (name, treatment), count in self.treatments.items())
        return Audit(tuple(rows), self.complete)

    def raise_refusals(self) -> None:
        if not self.refusals:
            return
        counts = {name: self.treatments[name, "unsupported"] for name in self.refusals}
        lines = [
            f"  {name} ({counts[name]}x), at {where}: "
            + CURES.get(name, f"teach it with libragrad_minimal.register_rule({name!r}, ...)")
            for name, where in sorted(self.refusals.items())
        ]
        raise UnsupportedOperation(
            "no balanced backward pass is known for\n"
            + "\n".join(lines)
            + "\nNothing was computed. audit(output, inputs) lists the whole graph."
        )


def check_forward(node: Node) -> None:
    """Refuse a forward pass whose samples mix or whose units were dropped at random."""
    name = operation_name(node)
    where = f"{name} in the graph of the output"
    if name.endswith("BatchNorm") and saved(node, "training") and saved(node, "input").shape[0] > 1:
        raise ValueError(
            f"{where}: batch norm in training mode mixes the samples. Call model.eval() before the forward pass."
        )
    dropped = name == "NativeDropout" or getattr(node, "_saved_dropout_p", 0) > 0
    if dropped or any(map(is_dropout_mask, constant_factors(node))):
        raise ValueError(
            f"{where}: it looks as if dropout was active, so that the output is random. Call model.eval() before the "
            "forward pass."
        )


def adds_hidden_constant(node: Node) -> bool:
    """A sum one of whose terms has no graph; a batch norm with running statistics, which subtracts their mean."""
    name = operation_name(node)
    if name in ("Add", "Sub", "Rsub", "Cat", "Stack"):
        return name == "Rsub" or any(child is None for child, _ in node.next_functions)
    return name.endswith("BatchNorm")


def constant_factors(node: Node) -> list[Tensor]:
    """The factors of a pointwise product that have no graph of their own."""
    if operation_name(node) != "Mul" or len(node.next_functions) < 2:
        return []
    names = [name for (child, _), name in zip(node.next_functions, ("self", "other"), strict=True) if child is None]
    return [saved(node, name) for name in names]


def is_dropout_mask(factor: Tensor) -> bool:
    """Dropout on the CPU leaves a product with a constant of zeros and one value above 1."""
    if factor.numel() < 2 or not factor.is_floating_point():
        return False
    largest = factor.max()
    return bool(largest > 1) and bool((factor == 0).any()) and bool(((factor == 0) | (factor == largest)).all())
