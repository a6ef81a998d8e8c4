"""Where in a tensor its gradient can lie, followed back from the output.

One logit reads one row of the head; a class token, or the last token of a text, is one row among many; and with the
attention map held constant, of a fused projection to queries, keys and values only the last third carries gradient. All
else is zeros, known before anything is computed: matrix products and attention need not work on them. Only these two
look here; without this file the results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .nodes import is_native, operand_shape, operation_name, result_shape, saved, signed


class Within(NamedTuple):
    """Gradient lies only where start <= index % period < stop along dimension `dim`."""

    dim: int
    start: int
    stop: int
    period: int

    def part(self, tensor: Tensor) -> Tensor:
        """What lies there, without the zeros; its dimension `dim` comes in periods first."""
        return tensor.unflatten(self.dim, (-1, self.period)).narrow(self.dim + 1, self.start, self.stop - self.start)

    def holds(self, gradient: Tensor) -> bool:
        """Whether it is so: somebody's hook on a tensor may have added to its gradient. Not asked on a GPU, which the
        question would make wait."""
        if gradient.device.type != "cpu":
            return True
        periods = gradient.unflatten(self.dim, (-1, self.period))
        before = periods.narrow(self.dim + 1, 0, self.start)
        after = periods.narrow(self.dim + 1, self.stop, self.period - self.stop)
        return not before.any() and not after.any()


Reach = Within | None  # None: anywhere
VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"}
PARTS = {"Unbind", "Split", "SplitWithSizes", "Select", "Slice", "Index"}
POINTWISE = set(
    """Add Sub Rsub Neg Mul Div Clone Alias ToCopy Contiguous Gelu Silu Relu Tanh Sigmoid Hardswish Mish Elu LeakyRelu
    Pow Sqrt Where MaskedFill NativeDropout""".split()
)


def widest(a: Reach, b: Reach) -> Reach:
    """Both together, as one range."""
    if a is None or b is None or (a.dim, a.period) != (b.dim, b.period):
        return None
    return a._replace(start=min(a.start, b.start), stop=max(a.stop, b.stop))


def reach_of_operand(node: Node, operand: int, results: Sequence[tuple[int, Reach]]) -> Reach:
    """Where gradient can lie in an operand of `node`; results: which of its results it arrives at, and where there."""
    if not is_native(node) or not results or not hasattr(node, "_input_metadata"):
        return None
    name = operation_name(node)
    if name in PARTS:
        reach: Reach = part_of(node, name, results[0][0])
        for number, _ in results[1:]:
            reach = widest(reach, part_of(node, name, number))
        whole = name == "Slice" and worth_sparing(reach) is None
        return results[0][1] if whole else reach
    (number, reach), *others = results
    if reach is None or others or number > 0:
        return None
    if name in VIEWS:
        return through_view(reach, result_shape(node), operand_shape(node, operand))
    if name in POINTWISE:
        return reach if operand_shape(node, operand) == result_shape(node) else None
    if name in ("NativeLayerNorm", "FusedRmsNorm"):
        outside = len(result_shape(node)) - len(saved(node, "normalized_shape"))
        return reach if operand == 0 and reach.dim < outside else None
    if name in ("Addmm", "Mm"):
        return reach if operand == {"Addmm": 1, "Mm": 0}[name] and reach.dim == 0 else None
    return through_permutation(node, name, reach)


def through_permutation(node: Node, name: str, reach: Within) -> Reach:
    rank = len(result_shape(node))
    if name == "Permute":
        return reach._replace(dim=signed(saved(node, "dims")[reach.dim]) % rank)
    if name in ("Transpose", "T"):
        a, b = (0, 1) if name == "T" else (signed(saved(node, d)) % rank for d in ("dim0", "dim1"))
        return reach._replace(dim={a: b, b: a}.get(reach.dim, reach.dim))
    return None


def part_of(node: Node, name: str, number: int) -> Reach:
    """Which part of its operand a result is."""
    shape = operand_shape(node, 0)
    if name == "Index":
        return rows_by_number(saved(node, "indices"), shape)
    dim = signed(saved(node, "dim")) % len(shape)
    size = shape[dim]
    if name == "Unbind":
        start, stop = number, number + 1
    elif name == "Select":
        start = signed(saved(node, "index")) % size
        stop = start + 1
    elif name == "Slice":
        if saved(node, "step") != 1:
            return None
        start, stop, _ = slice(signed(saved(node, "start")), signed(saved(node, "end")), 1).indices(size)
    elif name == "Split":
        start = number * saved(node, "split_size")
        stop = min(start + saved(node, "split_size"), size)
    else:
        sizes = saved(node, "split_sizes")
        start = sum(sizes[:number])
        stop = start + sizes[number]
    return Within(dim, start, stop, size)


def rows_by_number(indices: Sequence[Tensor | None], shape: Sequence[int]) -> Reach:
    """tokens[:, rows]: from the first of them to the last. On a GPU nobody waits for their numbers."""
    (dim, rows), *others = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if others or rows.dim() != 1 or rows.dtype != torch.long or rows.device.type != "cpu" or not len(rows):
        return None
    rows = rows % shape[dim]
    return Within(dim, int(rows.min()), int(rows.max()) + 1, shape[dim])


def through_view(reach: Within, seen: Sequence[int], stored: Sequence[int]) -> Reach:
    """From the shape that a view shows to the one it was made of: both number the same elements in the same order, and
    gradient lies at the elements first <= number % cycle < last."""
    inner = prod(seen[reach.dim + 1 :])
    first, last, cycle = reach.start * inner, reach.stop * inner, reach.period * inner
    for dim in range(len(stored)):
        step = prod(stored[dim + 1 :])
        if step and all(edge % step == 0 for edge in (first, last, cycle)) and step * stored[dim] % cycle == 0:
            return Within(dim, first // step, last // step, cycle // step)
    return None


def worth_sparing(reach: Reach) -> Reach:
    """None where there is nothing to be left out."""
    return None if reach is None or reach.stop - reach.start >= reach.period else reach
