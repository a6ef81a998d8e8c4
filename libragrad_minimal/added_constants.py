"""What each added constant contributes, token by token: its attribution before it is summed over what it was added to.

The engine knows the constants and the gradient of each as a whole. A bias is added to every token of every sample, so
its share per token is read where it is added: the gradient that arrives at that node, times the constant. Where a
constant lies in a node's result is found out by trying, as the shares have to add up to the whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from .engine import additive_constants
from .engine.nodes import HALF, Half, noted, operation_name, result_shape
from .layout import Axes
from .streams import removed, topological

VIEWS = ("View", "UnsafeView", "ReshapeAlias")


class Entrance(NamedTuple):
    """Where a constant enters the stream."""

    node: Node
    shape: tuple[int, ...]  # of what the node computes, the rows of a matrix as tokens
    layer: int  # the block that was running; L after the last


@dataclass(frozen=True, eq=False)
class Constant:
    """One added constant: the leaf, and where it enters, more than once if blocks share it."""

    tensor: Tensor
    entrances: tuple[Entrance, ...]
    passed_on: tuple[Tensor, tuple[Entrance, ...]] | None = None  # as what, and where, a layer around it adds it


class ConstantShare(NamedTuple):
    layer: int
    placed: Tensor | None  # (B, N_layer); None where it can't be placed on tokens (a head's bias, one inside a window)
    total: Tensor  # (B,)


def constants_of(
    model: nn.Module, output: Tensor, starts: Sequence[Tensor], stream: Sequence[Tensor]
) -> list[Constant]:
    """Everything that is added between `starts` and the output."""
    order = topological([get_gradient_edge(output).node])
    roots = {get_gradient_edge(start).node for start in starts}
    live: set[Node] = set()
    users: dict[Node, list[Node]] = {}
    for node in order:
        for child, _ in node.next_functions:
            if child is not None:
                users.setdefault(child, []).append(node)
        if node in roots or any(child in live for child, _ in node.next_functions):
            live.add(node)
    layers = layers_of(stream)
    found = []
    for tensor in additive_constants(output, starts):
        if isinstance(tensor, Half):  # the 1/2 of every sigmoid that is the stream
            nodes = [node for node in order if node in live and noted(node, HALF) is tensor]
        else:
            nodes = entered(get_gradient_edge(tensor).node, users, live)
        places = (Entrance(node, unflattened(node, users), layers.get(node, len(stream) - 1)) for node in nodes)
        found.append(Constant(tensor, tuple(places)))
    return passed_on_by_attention(model, found)


def passed_on_by_attention(model: nn.Module, constants: list[Constant]) -> list[Constant]:
    """nn.MultiheadAttention as one layer: the rows of its map sum to 1, so the bias of its values passes whole, and
    is added where the layer's own bias is."""
    by_place = {constant.tensor.data_ptr(): constant for constant in constants}
    for layer in model.modules():
        if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_bias is not None:
            inner, outer = (by_place.get(bias.data_ptr()) for bias in (layer.in_proj_bias, layer.out_proj.bias))
            if inner is not None and outer is not None:
                value = layer.out_proj.weight.detach() @ layer.in_proj_bias.detach().chunk(3)[2]
                constants[constants.index(inner)] = replace(inner, passed_on=(value, outer.entrances))
    return constants


def entered(leaf: Node, users: dict[Node, list[Node]], live: set[Node]) -> list[Node]:
    """The nodes of the stream that the leaf, or what is computed of it, is an operand of."""
    found, stack, seen = [], [leaf], {leaf}
    while stack:
        for user in users.get(stack.pop(), []):
            if user in live:
                found.append(user)
            elif user not in seen:
                seen.add(user)
                stack.append(user)
    return list(dict.fromkeys(found))


def unflattened(node: Node, users: dict[Node, list[Node]]) -> tuple[int, ...]:
    """The shape of what the node computes; of a product of matrices, that of the view which gives the tokens back."""
    shape = result_shape(node)
    if len(shape) == 2 and len(users.get(node, [])) == 1 and operation_name(users[node][0]) in VIEWS:
        view = result_shape(users[node][0])
        if math.prod(view) == math.prod(shape) and view[-1] == shape[-1]:
            return view
    return shape


def layers_of(stream: Sequence[Tensor]) -> dict[Node, int]:
    """The block of every node below the last tokens: the number of the tokens that it comes after."""
    layers: dict[Node, int] = {}
    for number, tokens in enumerate(stream):
        stack = [get_gradient_edge(tokens).node]
        while stack:
            node = stack.pop()
            if node not in layers:
                layers[node] = number - 1
                stack.extend(child for child, _ in node.next_functions if child is not None)
    return layers


# ---- shares ----------------------------------------------------------------------------------------------------------


Way = dict[int, Tensor]  # layer -> (B, N_layer), or (B,) where the tokens can't be told


@dataclass
class Shares:
    """What is caught during one backward pass."""

    axes: Sequence[Axes]
    stream: Sequence[Tensor]
    tokens_first: set[Node]  # the nodes whose results are (N, B, C), where N = B leaves that open
    caught: dict[Constant, list[Way | None]] = field(default_factory=dict)  # for each way in which it can lie
    passed_on: dict[Constant, list[Way | None]] = field(default_factory=dict)  # the same where a layer adds it
    precision: dict[Constant, float] = field(default_factory=dict)  # of what arrives there: half, perhaps
    rounding: dict[Constant, float] = field(default_factory=dict)  # how far off its attribution as a whole may be
    settled: list[ConstantShare] = field(default_factory=list)
    assumed: dict[int, Constant] = field(default_factory=dict)  # numbers of shares that take samples to come first
    unclear: dict[int, Constant] = field(default_factory=dict)  # those whose samples aren't told apart

    @property
    def samples(self) -> int:
        return self.stream[0].shape[self.axes[0].batch]

    def catch(self, constant: Constant, value: Tensor, place: Entrance, arriving: Tensor) -> None:
        gradient = precise(arriving).reshape(place.shape)
        self.precision[constant] = max(self.precision.get(constant, 0.0), torch.finfo(arriving.dtype).eps)
        found = [self.by_token(p, place) for p in products(precise(value.detach()), gradient)]
        caught = self.caught if value is constant.tensor else self.passed_on
        ways = caught.setdefault(constant, [{} for _ in found])
        for i, (way, share) in enumerate(zip(ways, found, strict=False)):
            if share is None or way is None:
                ways[i] = None
            elif place.layer in way:
                way[place.layer] = add(way[place.layer], share)
            else:
                way[place.layer] = share

    def needs_check(self, constants: Sequence[Constant]) -> bool:
        places = (place for constant in constants for place in constant.entrances)
        return self.samples > 1 and any(not self.samples_first(place) for place in places)

    def samples_first(self, place: Entrance) -> bool:
        """Is it clear from the shape where the samples are?"""
        first_alone = place.shape[:1] == (self.samples,) and place.shape.count(self.samples) == 1
        return self.dimensions(place) is not None or first_alone

    def dimensions(self, place: Entrance) -> Axes | None:
        """Where samples and tokens are in what is computed there; None if its shape doesn't tell."""
        like, axes = self.stream[place.layer], self.axes[place.layer]
        sizes, shape = axes.sizes(like), place.shape
        options = [axes, Axes(0, (1, 2)), Axes(0, (2, 3)), Axes(0, (1,)), Axes(1, (0,))]
        for dims in options[::-1] if place.node in self.tokens_first else options:
            # with no dimension left for channels it is a head's answer, of as many classes as there are tokens
            fits = 1 + len(dims.tokens) < len(shape) <= max(like.dim(), 3) and max(dims.batch, *dims.tokens) < len(
                shape
            )
            if fits and shape[dims.batch] == self.samples:
                if tuple(shape[dim] for dim in dims.tokens) in (sizes, (math.prod(sizes),)):
                    return dims
        return None

    def by_token(self, product: Tensor, place: Entrance) -> Tensor | None:
        """(B, N) where the dimensions are those of the layer's tokens, else (B,), as if samples came first."""
        dims = self.dimensions(place)
        if dims is not None:
            return dims.arrange(product).sum(-1)
        if product.dim() and product.shape[0] % self.samples == 0:
            return product.reshape(self.samples, -1).sum(1)
        return None

    def settle(self, constant: Constant, gradient: Tensor | None) -> None:
        """The way to lie whose shares add up to the constant's attribution as a whole."""
        if gradient is None:
            return
        parts = precise(constant.tensor.detach()) * precise(gradient)
        whole = parts.sum()
        self.rounding[constant] = self.precision.get(constant, 0.0) * float(parts.abs().sum())
        ways = sorted(filter(None, self.caught.pop(constant, [])), key=lambda way: abs(float(total_of(way) - whole)))
        for way in filter(None, [*self.passed_on.pop(constant, []), *ways]):
            if torch.isclose(total_of(way), whole, 1e-3, 1e-6 * extent(way) + self.rounding[constant]):
                unclear = {place.layer for place in constant.entrances if not self.samples_first(place)}
                for layer, share in way.items():
                    if layer in unclear and self.samples > 1:
                        self.assumed[len(self.settled)] = constant
                    placed, total = (share, share.sum(1)) if share.dim() == 2 else (None, share)
                    self.settled.append(ConstantShare(layer, placed, total))
                return
        if self.samples > 1 and whole != 0:
            self.unclear[len(self.settled)] = constant
        layer = max((place.layer for place in constant.entrances), default=len(self.stream) - 1)
        self.settled.append(ConstantShare(layer, None, whole.expand(self.samples) / self.samples))

    def check_assumed(self, of_first_sample: dict[Constant, Tensor]) -> None:
        """A sort by experts, for one, mixes the samples: shares that differ from the first sample's own are unclear."""
        for constant in dict.fromkeys(self.assumed.values()):
            own = of_first_sample[constant]
            numbers = [number for number, other in self.assumed.items() if other is constant]
            taken = torch.stack([self.settled[number].total for number in numbers]).sum(0)
            if not torch.isclose(taken[0], own, 1e-3, 1e-5 * float(taken.abs().sum()) + self.rounding[constant]):
                layer = self.settled[numbers[-1]].layer
                for number in numbers:
                    self.settled[number] = ConstantShare(layer, None, torch.zeros_like(taken))
                self.unclear[numbers[-1]] = constant

    def clear_up(self, totals: dict[Constant, Tensor]) -> None:
        """Put each sample's own in the place of unclear shares."""
        for number, constant in self.unclear.items():
            self.settled[number] = self.settled[number]._replace(placed=None, total=totals[constant])


def extent(way: Way) -> float:
    return float(torch.stack([share.abs().sum() for share in way.values()]).sum())


def total_of(way: Way) -> Tensor:
    return torch.stack([share.sum() for share in way.values()]).sum()


def add(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == b.dim():
        return a + b
    return (a if a.dim() == 1 else a.sum(1)) + (b if b.dim() == 1 else b.sum(1))


def products(value: Tensor, gradient: Tensor) -> list[Tensor]:
    """The constant times the gradient, for every way in which it can lie in the node's result."""
    if value.dim() == 1 and len(value) > 1:
        found = [gradient * value] if gradient.shape[-1] == len(value) else []
        if gradient.dim() > 2 and gradient.shape[1] == len(value):
            found.append(gradient * value.view(1, -1, *[1] * (gradient.dim() - 2)))
        return found
    try:
        fits = torch.broadcast_shapes(value.shape, gradient.shape) == gradient.shape
    except RuntimeError:
        fits = False
    return [gradient * value] if fits else []


@contextlib.contextmanager
def catch_shares(
    constants: Sequence[Constant], axes: Sequence[Axes], stream: Sequence[Tensor], tokens_first: set[Node]
) -> Iterator[Shares]:
    """Inside, a backward pass notes what arrives where constants are added."""
    shares = Shares(axes, stream, tokens_first)

    def catch(constant: Constant, value: Tensor, place: Entrance):
        def hook(arriving):
            if arriving[0] is not None:
                shares.catch(constant, value, place, arriving[0])

        return hook

    places = [(one, one.tensor, place) for one in constants for place in one.entrances]
    places += [(one, one.passed_on[0], place) for one in constants if one.passed_on for place in one.passed_on[1]]
    with removed(place.node.register_prehook(catch(one, value, place)) for one, value, place in places):
        yield shares


@contextlib.contextmanager
def catch_tokens_first(constants: Sequence[Constant]) -> Iterator[set[Node]]:
    """Inside, a backward pass from the first sample's output alone notes the nodes whose first dimension isn't the
    samples', as more than its first entry gets gradient."""
    found: set[Node] = set()

    def catch(place: Entrance):
        def hook(arriving):
            if arriving[0] is not None and arriving[0].reshape(place.shape)[1:].any():
                found.add(place.node)

        return hook

    with removed(place.node.register_prehook(catch(place)) for one in constants for place in one.entrances):
        yield found


def precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
