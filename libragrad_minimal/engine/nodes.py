"""What can be read off a node of the autograd graph: what it is, what it saved, what was noted on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

Edge = tuple[Node, int]  # a node and which of its results


def edge_of(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def topological(roots: Sequence[Node]) -> dict[Node, tuple]:
    """Every node below `roots` with its edges, each after all it sends gradient to. Iterative: graphs are deep."""
    finished: dict[Node, tuple] = {}
    stack: list[tuple[Node, tuple | None]] = [(root, None) for root in roots]
    while stack:
        node, edges = stack.pop()
        if edges is not None:
            finished[node] = edges
        elif node not in finished:
            edges = node.next_functions
            stack.append((node, edges))
            stack.extend((child, None) for child, _ in edges if child is not None and child not in finished)
    return finished


# ---- what it is ------------------------------------------------------------------------------------------------------


def is_native(node: Node) -> bool:
    """Whether it is PyTorch's own: its class, not its name, which anybody's function may have."""
    return type(node) is getattr(torch._C._functions, type(node).__name__, None)


def is_custom(node: Node) -> bool:
    """Whether it is somebody's `torch.autograd.Function`, after whose class it is named."""
    return isinstance(node, BackwardCFunction)


@cache
def short_name(full_name: str) -> str:
    """'NativeLayerNormBackward0' -> 'NativeLayerNorm', 'torch::autograd::CopySlices' -> 'CopySlices'."""
    return re.sub(r"Backwards?\d*$", "", full_name.rsplit("::", 1)[-1])


def operation_name(node: Node) -> str:
    """The name that audit and refusals print."""
    return short_name(node.name())


def function_class(node: Node) -> type:
    """The `torch.autograd.Function` behind a custom node."""
    return node._forward_cls  # type: ignore[attr-defined]


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_leaf(node: Node) -> bool:
    return operation_name(node).endswith("AccumulateGrad")


def result_shape(node: Node, result: int = 0) -> tuple[int, ...]:
    """The shape of what the node computed."""
    return tuple(node._input_metadata[result].shape)


def operand_shape(node: Node, operand: int) -> tuple[int, ...]:
    child, result = node.next_functions[operand]
    assert child is not None
    return result_shape(child, result)


# ---- what it saved ---------------------------------------------------------------------------------------------------


def saved(node: Node, name: str) -> Any:
    """What the forward pass saved on `node`; raises AttributeError if it saved no such thing.

    Non-reentrant checkpointing hands each tensor out once per backward pass, and PyTorch's own derivative has had it;
    asked from outside that pass, which another thread is, it recomputes.
    """
    try:
        return getattr(node, f"_saved_{name}")
    except CheckpointError:
        with ThreadPoolExecutor(1) as outside:
            return outside.submit(getattr, node, f"_saved_{name}").result()


def signed(number: int | None) -> Any:
    """PyTorch saves negative numbers as unsigned ones, and a slice's omitted start as None."""
    return number - 2**64 if number is not None and number >= 2**63 else number


def precise(value: Any) -> Any:
    """Half precision loses ratios and sums: work in float32 at least."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def constant_factors(node: Node) -> list[Tensor]:
    """The factors of a pointwise product that have no graph of their own."""
    if is_custom(node) or node.name() != "MulBackward0":
        return []
    names = [name for (child, _), name in zip(node.next_functions, ("self", "other"), strict=True) if child is None]
    return [saved(node, name) for name in names]


# ---- what was noted on it while the model ran (observed.py) ----------------------------------------------------------

ARGUMENT = "libragrad argument"  # x of a tanh, which saves its result only
OPERANDS = "libragrad operands"  # a and b of a + b, which saves nothing
HALF = "libragrad half"  # the constant 1/2 of a sigmoid, as a leaf
VERSION = "libragrad_version"  # of a constant's leaf, when it was added
COUNTED = "libragrad counted"  # the constant that the node seems to hide has a leaf of its own


class Half(Tensor):
    """The constant 1/2 of sigmoids: no edge of the graph leads to it, so libra_grad counts what arrives at them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class Seen(NamedTuple):
    """A tensor as it was during the forward pass: the same memory, which may be written over afterwards."""

    tensor: Tensor
    version: int

    @property
    def unchanged(self) -> bool:
        return self.tensor._version == self.version


def seen(tensor: Tensor) -> Seen:
    return Seen(tensor.detach(), tensor._version)


def note(node: Node, name: str, value: Any) -> None:
    node.metadata[name] = value  # type: ignore[index]


def noted(node: Node, name: str) -> Any:
    return node.metadata.get(name)  # type: ignore[attr-defined]
