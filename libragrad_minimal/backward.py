"""Balance the autograd graph, not the model: walk the graph of an ordinary forward pass and apply rules.py to its nodes.

The walk goes twice over the nodes. From the inputs to the output it finds what each node computes of them: a *stream*, whose
attribution is wanted, or only a function of *gates* (a softmax, a sigmoid, a reciprocal norm). From the output back
it decides which nodes carry gradient, and how; a gate that multiplies a stream is held constant there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .residual import OPERANDS, shared_by_sign
from .rules import (
    CURES,
    LIBRA,
    PLAIN,
    Backward,
    Rules,
    exponent_of,
    halved_attention,
    operation_name,
    operation_of,
    saved,
    scaled,
)

Edge = tuple[Node, int]  # a node and which of its results
STREAM = "stream"  # what a consumer wants of a value; the alternative is the name of a switched-off rule it is inside of


class UnsupportedOperation(NotImplementedError):
    """The graph holds operations whose balanced backward pass nobody has defined. Nothing was computed."""


@dataclass(frozen=True)
class Audit:
    """What the graph between inputs and output consists of, and how each operation is treated.

    rows: (operation, treatment, count). complete: every treatment keeps attributions complete, so that the sum over
    inputs and additive constants equals the output.
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

    def __init__(self, roots: Sequence[Node], inputs: set[Edge], rules: Rules):
        self.rules = rules
        self.inputs = inputs
        self.edges = topological(roots)
        self.operations = {}
        self.values: dict[Node, Value] = {}
        self.hooks: list[tuple[Node, Backward]] = []
        self.treatments: Counter[tuple[str, str]] = Counter()
        self.refusals: dict[str, str] = {}  # operation -> where the first one sits
        self.complete = True
        self.gates_held: set[Node] = set()
        self.find_values()
        self.wanted: dict[Node, str] = dict.fromkeys((root for root in roots if root in self.values), STREAM)
        self.consumer: dict[Node, Node] = {}
        for node in reversed(self.edges):
            if node in self.wanted:
                self.visit(node)

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
            gates = [value for value in live if value.gate is not None]
            role = operation.role if operation else "linear"
            if role == "gate":
                self.values[node] = Value(node, operation.rule, operation.backward is not None)
            elif role == "division":
                self.values[node] = operands[0] or Value(node, "norm", False)
            elif role == "balanced" or len(gates) < len(live):
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
            check_forward(node)
            live = getattr(self, operation.role)(node, operation, live)
        self.want(node, live, self.wanted[node])

    def want(self, node: Node, operands: Sequence[int], wanted: str) -> None:
        """These operands of `node` carry gradient. A stream stays one, whatever else it feeds."""
        for i in operands:
            edge = self.edges[node][i]
            child = edge[0]
            if child not in self.values or self.wanted.get(child) == STREAM:
                continue
            self.wanted[child] = wanted
            self.consumer[child] = node
            if wanted == STREAM and self.value(edge).gate is child and self.operations[child].role == "linear":
                self.refuse(child)  # the variance of var_mean

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
        path = [operation_name(node)]
        while node in self.consumer and len(path) < 5:
            node = self.consumer[node]
            path.append(operation_name(node))
        return " -> ".join(path) + (" -> output" if node not in self.consumer else " -> ...")

    # One method a role: treats the node and returns the operands that go on carrying gradient.

    def linear(self, node, operation, live):
        if self.rules.residual and operation_name(node) == "Add" and len(live) == 2 and self.wanted[node] == STREAM:
            if OPERANDS not in node.metadata:
                raise ValueError(
                    "the residual rule needs the operands of every addition, and this graph has not recorded them: "
                    "run the forward pass inside `with record_residuals():`"
                )
            self.treat(node, "relevance shared by sign", shared_by_sign)
        else:
            self.treat(node, "linear")
        return live

    def balanced(self, node, operation, live):
        switch = getattr(self.rules, operation.rule)
        if not switch:
            self.keep_plain(node, operation.rule)
        elif switch == "halve":
            self.treat(node, "products halved, softmax kept", halved_attention)
            self.complete = False
        else:
            if operation.rule == "attention":
                live = [i for i in live if i == 2]  # the values
            if not live:
                self.refuse(node)
            self.treat(node, f"balanced ({operation.rule})", operation.backward)
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
            self.treat(node, "divided by the exponent", lambda n, gi, go: scaled(gi, {0: 1 / exponent}))
        return live

    def division(self, node, operation, live):
        if 1 not in live:
            self.treat(node, "linear")
        elif not self.rules.norm:
            self.keep_plain(node, "norm")
            self.want(node, [1], "norm")
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
            self.treat(node, "product halved", lambda n, gi, go: scaled(gi, dict.fromkeys(factors, 0.5)))
        else:
            self.keep_plain(node, "product" if self.wanted[node] == STREAM else self.wanted[node])
        return others + factors

    def gated(self, node: Node, factors: Sequence[int], gate: int, value: Value) -> list[int]:
        """A product of a stream and a gate. Returns the stream's operand."""
        switch = getattr(self.rules, value.rule)
        if switch is True:
            self.treat(node, f"gate constant ({value.rule})", lambda n, gi, go: scaled(gi, {gate: None}))
            self.hold(value)
        else:
            if switch == "halve":
                self.treat(node, "product halved", lambda n, gi, go: scaled(gi, dict.fromkeys(factors, 0.5)))
                self.complete = False
            else:
                self.keep_plain(node, value.rule)
            self.want(node, [gate], value.rule)
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
            "no balanced backward pass is known for\n" + "\n".join(lines) + "\nNothing was computed. audit(output, inputs) lists the whole graph."
        )


def check_forward(node: Node) -> None:
    """Refuse a forward pass whose samples mix or whose units were dropped at random."""
    name = operation_name(node)
    where = f"{name} in the graph of the output"
    if name.endswith("BatchNorm") and saved(node, "training") and saved(node, "input").shape[0] > 1:
        raise ValueError(f"{where}: batch norm in training mode mixes the samples of a batch. Call model.eval() before the forward pass.")
    dropped = name == "NativeDropout" or getattr(node, "_saved_dropout_p", 0) > 0
    if name == "Mul" and not dropped:
        dropped = any(child is None and is_dropout_mask(node, other) for (child, _), other in zip(node.next_functions, ("self", "other"), strict=False))
    if dropped:
        raise ValueError(f"{where}: dropout was active, so the output is random. Call model.eval() before the forward pass.")


def is_dropout_mask(node: Node, name: str) -> bool:
    """Dropout on the CPU leaves a product with a constant of zeros and one value above 1."""
    mask = saved(node, name)
    if not isinstance(mask, Tensor) or mask.dim() == 0 or not mask.is_floating_point():
        return False
    largest = mask.max()
    return bool(largest > 1) and bool((mask == 0).any()) and bool(((mask == 0) | (mask == largest)).all())



# ---- running it ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Balancing:
    """One libra_grad call, or one `balanced` block."""

    is_call: bool


# Whose each running backward pass is, by autograd's own number for the pass. A hook acts in its owner's passes only: a plain
# backward pass, another thread or a nested call on the same graph passes it by.
_owners: dict[int, Balancing] = {}


@contextlib.contextmanager
def installed(walk: Walk, entrances: Sequence[Node], balancing: Balancing) -> Iterator[None]:
    """The walk's hooks on its graph, acting in backward passes that come in through `entrances`; removed in any case."""
    passes: list[int] = []
    handles = []

    def enter(grad_outputs) -> None:
        number = torch._C._current_graph_task_id()
        if number not in _owners or not _owners[number].is_call:
            _owners[number] = balancing
            passes.append(number)

    def in_own_passes(node: Node, backward: Backward):
        def hook(grad_inputs, grad_outputs):
            mine = _owners.get(torch._C._current_graph_task_id()) is balancing
            if mine and any(gradient is not None for gradient in grad_outputs):
                return backward(node, grad_inputs, grad_outputs)

        return hook

    try:
        handles.extend(node.register_prehook(enter) for node in entrances)
        handles.extend(node.register_hook(in_own_passes(node, backward)) for node, backward in walk.hooks)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for number in passes:
            _owners.pop(number, None)


def libra_grad(
    output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor], rules: Rules = LIBRA, **autograd_grad_options
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
    """
    outputs, inputs = as_tuple(output), as_tuple(inputs)
    options = checked_options(outputs, autograd_grad_options)
    check_outputs(outputs)
    allow_unused = options.pop("allow_unused", False) or options.get("materialize_grads", False)
    grad_outputs = options.pop("grad_outputs", None)
    with torch.enable_grad():  # an entrance of this call's own into the graph, so that its pass can be told from others
        roots = [o.sum() if grad_outputs is None else o.view_as(o) for o in outputs]
    with explained_errors():
        walk = balanced_walk(outputs, inputs, rules, allow_unused)
        with installed(walk, [root.grad_fn for root in roots], Balancing(is_call=True)):
            gradients = torch.autograd.grad(roots, inputs, grad_outputs, allow_unused=True, **options)
    return tuple(checked_gradient(g, x, i, walk) for i, (g, x) in enumerate(zip(gradients, inputs, strict=True)))


@contextlib.contextmanager
def balanced(output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor], rules: Rules = LIBRA) -> Iterator[None]:
    """Inside this block, backward passes from `output`, or from anything computed from it, are balanced.

        with balanced(logits, images):
            cat, dog = (torch.autograd.grad(logits[:, c].sum(), images, retain_graph=True)[0] for c in (281, 207))

    output: any shape. inputs: the tensors that gradients are wanted for; `.backward()` works too. Raises as libra_grad does.
    """
    outputs = as_tuple(output)
    check_outputs(outputs)
    with explained_errors():
        walk = balanced_walk(outputs, as_tuple(inputs), rules, allow_unused=False)
        with installed(walk, [o.grad_fn for o in outputs], Balancing(is_call=False)):
            yield


def audit(output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor], rules: Rules = LIBRA) -> Audit:
    """Which operations lie between `inputs` and `output`, and how each would be treated. Computes no gradient.

    Operations without a rule are listed as unsupported instead of being refused. Raises ValueError as libra_grad does.
    """
    outputs = as_tuple(output)
    check_outputs(outputs)
    with explained_errors():
        return walk_graph(outputs, as_tuple(inputs), rules, allow_unused=False).audit()


def additive_constants(output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parameters that are *added* to the streams between `inputs` and `output`: biases, class token, position embedding.

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
        if node in below:
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
    constant = [i for i, (child, _) in enumerate(walk.edges[node]) if child is not None and walk.value(walk.edges[node][i]) is None]
    if operation is None or operation.role in ("gate", "division", "power"):
        return []
    if operation.role == "product":
        constant = [i for i in constant if i not in operation.factors]
    if operation.role == "balanced" or operation_name(node).endswith("BatchNorm"):
        constant = [i for i in constant if i == 2 and operation.rule != "attention"]  # the bias, after input and weight
    return [walk.edges[node][i][0] for i in constant]


# ---- what goes in and comes out ----------------------------------------------------------------------------------------


def as_tuple(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def checked_options(outputs: Sequence[Tensor], options: dict) -> dict:
    """The options for torch.autograd.grad, without those that mean nothing for balanced gradients."""
    for name in ("create_graph", "is_grads_batched"):
        if options.pop(name, False):
            raise ValueError(f"{name}=True is not supported: balanced gradients are repaired node by node, outside of any graph of their own")
    for i, output in enumerate(outputs):
        if output.dim() > 1 and options.get("grad_outputs") is None:
            raise ValueError(
                f"output {i} has shape {tuple(output.shape)}, which is not one scalar per sample: choose a logit, for example "
                "logits[:, target], or pass grad_outputs"
            )
    return options


def check_outputs(outputs: Sequence[Tensor]) -> None:
    for i, output in enumerate(outputs):
        if output.grad_fn is None:
            raise ValueError(
                f"output {i} has no graph: compute it outside torch.no_grad() and torch.inference_mode(), without .detach(), from "
                "inputs that require grad"
            )
        if not torch.isfinite(output).all():
            worst = torch.nonzero(~torch.isfinite(output.detach()).reshape(-1))[0].item()
            raise ValueError(
                f"output {i} is {output.detach().reshape(-1)[worst].item()} at flat index {worst}: the forward pass overflowed or divided by "
                "zero. Look at its inputs, or run the model in a wider dtype."
            )


def walk_graph(outputs: Sequence[Tensor], inputs: Sequence[Tensor], rules: Rules, allow_unused: bool) -> Walk:
    """The walk from `outputs` to `inputs`, once it is clear that they are connected."""
    edges = []
    for i, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            raise ValueError(f"input {i} of shape {tuple(tensor.shape)} does not require grad: call .requires_grad_() on it before the forward pass")
        edge = get_gradient_edge(tensor)
        edges.append((edge.node, edge.output_nr))
    walk = Walk([output.grad_fn for output in outputs], set(edges), rules)
    for i, (node, _) in enumerate(edges):
        if node not in walk.edges and not allow_unused:
            raise ValueError(
                f"input {i} of shape {tuple(inputs[i].shape)} is not in the graph of the output: pass the very tensor that the model was "
                "given (a copy made afterwards is another tensor), or allow_unused=True"
            )
    return walk


def balanced_walk(outputs: Sequence[Tensor], inputs: Sequence[Tensor], rules: Rules, allow_unused: bool) -> Walk:
    """A walk whose every operation has a rule. Plain rules change nothing, so they refuse nothing."""
    walk = walk_graph(outputs, inputs, rules, allow_unused)
    if rules != PLAIN:
        walk.raise_refusals()
    return walk


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "the graph of this output has been freed by an earlier backward pass: pass retain_graph=True to that one, or run the model again"
        ) from error


def checked_gradient(gradient: Tensor | None, tensor: Tensor, index: int, walk: Walk) -> Tensor | None:
    if gradient is None:
        edge = get_gradient_edge(tensor)
        return torch.zeros_like(tensor) if edge.node in walk.edges else None  # reached through constants only
    if not torch.isfinite(gradient).all():
        raise ValueError(
            f"the gradient of input {index} is not finite although the output is: the backward pass overflowed. Run the model in a "
            "wider dtype (float32 for float16)."
        )
    return gradient
