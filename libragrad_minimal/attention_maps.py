"""Where attention maps sit in an autograd graph, what gradients arrive there, and how much memory they take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node

from .engine.nodes import operation_name
from .families import attention_heads
from .room import free_memory
from .streams import removed

RESHAPES = "View UnsafeView ReshapeAlias Expand Clone ToCopy Alias Unsqueeze Squeeze NativeDropout".split()


class AttentionMap(NamedTuple):
    """Where one attention map sits in the graph: the softmax, and the product that applies it to the values."""

    softmax: Any  # a node; what it saved is no part of Node's type
    product: Any
    factor: int  # which operand of the product it is

    def gradient(self, arriving: Tensor) -> Tensor:
        """The map's gradient from the product's, whatever a rule makes of it there."""
        if self.factor == 0:
            return arriving @ self.product._saved_mat2.transpose(-1, -2)
        return self.product._saved_self.transpose(-1, -2) @ arriving


def find_attention(start: Node, stop: set[Node]) -> list[AttentionMap]:
    """The attention maps in the graph from `start` down to the nodes in `stop`."""
    consumers: dict[Node, tuple[Node, int]] = {}
    seen, stack, softmaxes = set(stop), [start], []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if operation_name(node) in ("Softmax", "SafeSoftmax"):
            softmaxes.append(node)
        for i, (child, _) in enumerate(node.next_functions):
            if child is not None:
                consumers[child] = (node, i)
                stack.append(child)
    maps = []
    for softmax in softmaxes:
        node, factor = consumers[softmax]
        while operation_name(node) in RESHAPES and node in consumers:
            node, factor = consumers[node]
        if operation_name(node) == "Bmm":
            maps.append(AttentionMap(softmax, node, factor))
    return maps


@contextlib.contextmanager
def caught_map_gradients(maps: list[AttentionMap]) -> Iterator[dict[int, Tensor]]:
    """Inside, a backward pass notes the gradient of each attention map, by its number, before any rule cuts it off."""
    found: dict[int, Tensor] = {}

    def catch(i: int, place: AttentionMap):
        def hook(arriving):
            if arriving[0] is not None:
                found[i] = place.gradient(arriving[0])

        return place.product.register_prehook(hook)

    with removed(catch(i, place) for i, place in enumerate(maps)):
        yield found


def check_memory(model: nn.Module, tokens: Tensor, blocks: int) -> None:
    """Methods that read attention maps keep one a block and head; better to say so than to be killed."""
    length = tokens.shape[1] if tokens.dim() == 3 else tokens.shape[1] * tokens.shape[2]
    needed = 2 * blocks * attention_heads(model) * tokens.shape[0] * length**2 * tokens.element_size()
    free = free_memory(tokens.device)
    if free is not None and needed > free:
        raise ValueError(
            f"a method that reads attention maps needs {needed / 1e9:.1f} GB for {blocks} blocks of {length} x "
            f"{length} tokens, and {free / 1e9:.1f} GB are free; use FullGrad+ or IxG, which need no maps"
        )
