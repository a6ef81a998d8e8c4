"""Where in a tensor its gradient can lie, followed back through views.

A fused projection makes queries, keys and values in one matrix product. With the attention map held constant only the
values carry gradient, so two thirds of what arrives at that product are zeros, known beforehand: it need not multiply
them. This file says which columns are left; nothing else in the engine depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from torch.autograd.graph import Node

from .nodes import is_native, operand_shape, operation_name, result_shape, saved


class Within(NamedTuple):
    """Gradient lies only at start <= index < stop of dimension `dim`."""

    dim: int
    start: int
    stop: int


Reach = Within | None  # None: anywhere
VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"}
SAME_PLACE = {"Clone", "Alias", "ToCopy", "Contiguous"}
PARTS = {"Unbind", "Split", "SplitWithSizes", "Select", "Slice"}


def widest(a: Reach, b: Reach) -> Reach:
    """Both together, as one range."""
    if a is None or b is None or a.dim != b.dim:
        return None
    return Within(a.dim, min(a.start, b.start), max(a.stop, b.stop))


def reach_of_operand(node: Node, operand: int, results: Sequence[tuple[int, Reach]]) -> Reach:
    """Where gradient can lie in an operand of `node`; results: where it arrives."""
    if not is_native(node) or not results:
        return None
    name = operation_name(node)
    if name in PARTS:
        parts = [part_of(node, name, number) for number, _ in results]
        reach: Reach = parts[0]
        for part in parts[1:]:
            reach = widest(reach, part)
        return reach
    (_, reach), *_ = results
    if reach is None or name in SAME_PLACE:
        return reach
    if name in VIEWS:
        return through_view(reach, result_shape(node), operand_shape(node, operand))
    if name == "Permute":
        return reach._replace(dim=int(signed(saved(node, "dims")[reach.dim])) % len(result_shape(node)))
    if name == "Transpose":
        rank = len(result_shape(node))
        a, b = (signed(saved(node, d)) % rank for d in ("dim0", "dim1"))
        return reach._replace(dim={a: b, b: a}.get(reach.dim, reach.dim))
    if name == "T":
        return reach._replace(dim=1 - reach.dim)
    return None


def signed(number: int) -> int:
    """PyTorch saves negative dimensions as unsigned numbers."""
    return number - 2**64 if number >= 2**63 else number


def part_of(node: Node, name: str, number: int) -> Reach:
    """Which part of its operand a result is."""
    shape = operand_shape(node, 0)
    dim = signed(saved(node, "dim")) % len(shape)
    if name == "Unbind":
        return Within(dim, number, number + 1)
    if name == "Select":
        index = signed(saved(node, "index")) % shape[dim]
        return Within(dim, index, index + 1)
    if name == "Slice":
        start, stop, _ = slice(saved(node, "start"), saved(node, "end"), 1).indices(shape[dim])
        return Within(dim, start, stop)
    if name == "Split":
        size = saved(node, "split_size")
        return Within(dim, number * size, min((number + 1) * size, shape[dim]))
    sizes = saved(node, "split_sizes")
    start = sum(sizes[:number])
    return Within(dim, start, start + sizes[number])


def through_view(reach: Within, seen: Sequence[int], stored: Sequence[int]) -> Reach:
    """From the shape that a view shows to the one it was made of: both number the same elements in the same order."""
    inner = prod(seen[reach.dim + 1 :])
    for dim in range(len(stored)):
        step = prod(stored[dim + 1 :])
        same_outside = step * stored[dim] == inner * seen[reach.dim]
        if same_outside and reach.start * inner % step == 0 and reach.stop * inner % step == 0:
            return Within(dim, reach.start * inner // step, reach.stop * inner // step)
    return None


def live_columns(reach: Reach, columns: int) -> slice | None:
    """The columns of a matrix of gradients that aren't zero, where they are fewer than all."""
    if reach is None or reach.dim != 1 or reach.stop - reach.start >= columns:
        return None
    return slice(reach.start, reach.stop)
