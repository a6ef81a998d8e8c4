"""What each added constant contributes, token by token: its attribution before it is summed over what it was added to.

The engine knows the constants and the gradient of each as a whole. A bias is added to every token of every sample, so
its share per token is read where it is added: the gradient that arrives at that node, times the constant. Where a
constant lies in a node's result is found out by trying, as the shares have to add up to the whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .engine import additive_constants
from .engine.nodes import Half, operation_name, result_shape
from .layout import Axes
from .streams import removed, topological

VIEWS = ("View", "UnsafeView", "ReshapeAlias")


@dataclass(frozen=True, eq=False)
class Constant:
    """One added constant: the leaf, the nodes of the stream that it enters, the block that was running."""

    tensor: Tensor
    nodes: tuple[tuple[Node, tuple[int, ...]], ...]  # with the shape of what the node computes, rows unflattened
    layer: int  # L after the last block


class ConstantShare(NamedTuple):
    layer: int
    placed: Tensor | None  # (B, N_layer); None where it can't be placed on tokens (a head's bias, one inside a window)
    total: Tensor  # (B,)


def constants_of(output: Tensor, starts: Sequence[Tensor], stream: Sequence[Tensor]) -> list[Constant]:
    """Everything that is added between `starts` and the output."""
    order = topological([output.grad_fn])
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
        nodes = [] if isinstance(tensor, Half) else entered(get_gradient_edge(tensor).node, users, live)
        places = tuple((node, unflattened(node, users)) for node in nodes)
        layer = max((layers.get(node, len(stream) - 1) for node in nodes), default=len(stream) - 1)
        found.append(Constant(tensor, places, layer))
    return found


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


@dataclass
class Shares:
    """What is caught during one backward pass."""

    axes: Sequence[Axes]
    stream: Sequence[Tensor]
    caught: dict[Constant, list[list[Tensor]]] = field(default_factory=dict)  # ways to lie -> (B, N), or (B,) at least
    settled: list[ConstantShare] = field(default_factory=list)
    unclear: list[int] = field(default_factory=list)  # numbers of settled shares whose samples are not known apart

    @property
    def samples(self) -> int:
        return self.stream[0].shape[self.axes[0].batch]

    def catch(self, constant: Constant, shape: tuple[int, ...], arriving: Tensor) -> None:
        gradient = precise(arriving).reshape(shape)
        axes, like = self.axes[constant.layer], self.stream[constant.layer]
        ways = [self.by_token(product, axes, like) for product in products(precise(constant.tensor.detach()), gradient)]
        before = self.caught.get(constant)
        self.caught[constant] = ways if before is None else [add(a, b) for a, b in zip(before, ways, strict=False)]

    def by_token(self, product: Tensor, axes: Axes, like: Tensor) -> Tensor | None:
        """(B, N) where the product's dimensions are those of the layer's tokens, else (B,)."""
        sizes, samples = axes.sizes(like), self.samples
        for dims in (axes, Axes(0, (1, 2)), Axes(0, (2, 3)), Axes(0, (1,)), Axes(1, (0,))):
            if max(dims.batch, *dims.tokens) < product.dim() and product.shape[dims.batch] == samples:
                if dims.sizes(product) in (sizes, (math.prod(sizes),)) and product.dim() <= max(like.dim(), 3):
                    arranged = dims.arrange(product)
                    return arranged.sum(-1) if arranged.dim() == 3 else arranged
        if product.dim() and product.shape[0] % samples == 0:
            return product.reshape(samples, -1).sum(1)
        return None

    def settle(self, constant: Constant, gradient: Tensor | None) -> None:
        """The way to lie whose shares add up to the constant's attribution as a whole."""
        like = self.stream[0]
        whole = torch.zeros((), device=like.device, dtype=precise(like).dtype)
        if gradient is not None:
            whole = (precise(constant.tensor.detach()) * precise(gradient)).sum()
        for way in self.caught.pop(constant, []):
            if way is not None and torch.isclose(way.sum(), whole, rtol=1e-3, atol=1e-5 * float(way.abs().sum())):
                total = way if way.dim() == 1 else way.sum(1)
                self.settled.append(ConstantShare(constant.layer, way if way.dim() == 2 else None, total))
                return
        if self.samples > 1 and whole != 0:
            self.unclear.append(len(self.settled))
        self.settled.append(ConstantShare(constant.layer, None, whole.expand(self.samples) / self.samples))


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return None
    if a.dim() != b.dim():
        a, b = (x if x.dim() == 1 else x.sum(1) for x in (a, b))
    return a + b if a.shape == b.shape else a.sum(1) + b.sum(1) if a.dim() == 2 else None


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
def catch_shares(constants: Sequence[Constant], axes: Sequence[Axes], stream: Sequence[Tensor]) -> Iterator[Shares]:
    """Inside, a backward pass notes what arrives where constants are added."""
    shares = Shares(axes, stream)

    def catch(constant: Constant, shape: tuple[int, ...]):
        def hook(arriving):
            if arriving[0] is not None:
                shares.catch(constant, shape, arriving[0])

        return hook

    with removed([node.register_prehook(catch(one, shape)) for one in constants for node, shape in one.nodes]):
        yield shares


def precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
