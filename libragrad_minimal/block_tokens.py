"""Which part of what a block is given and returns are its tokens; blocks that return something without running."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .streams import is_stream, removed, stream_argument


def argument(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    place = stream_argument(args, kwargs)
    if place is None:
        raise ValueError(
            f"{type(block).__name__} is given no tokens, no floating-point tensor of three dimensions: name other "
            "blocks, blocks=[...]"
        )
    return args[place] if isinstance(place, int) else kwargs[place]


def with_argument(given: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    place = stream_argument(args, kwargs)
    if isinstance(place, int):
        return (*args[:place], given, *args[place + 1 :]), kwargs
    assert place is not None
    return args, {**kwargs, place: given}


def token_place(result: Any, shape: torch.Size | None = None) -> int | None:
    """Which part of what a block returned are its tokens: the first of the shape that it was given, else the first."""
    parts = result if isinstance(result, tuple | list) else [result]
    places = [i for i, part in enumerate(parts) if is_stream(part)]
    return next((i for i in places if parts[i].shape == shape), places[0] if places else None)


def with_tokens(result: Any, tokens: Tensor) -> Any:
    """What a block returned, its tokens replaced."""
    if isinstance(result, Tensor):
        return tokens
    place = token_place(result, tokens.shape)
    return type(result)(tokens if i == place else part for i, part in enumerate(result))


@contextlib.contextmanager
def standing_in(blocks: Sequence[nn.Module], results: Sequence[Any], graph: bool = True) -> Iterator[None]:
    """Inside, the blocks don't run: one after another they return these results, and after the last a graph begins."""
    waiting = list(reversed(results))

    def stand_in(block, *args, **kwargs):
        if len(block._forward_hooks) == 1:
            return waiting[-1]
        return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), waiting[-1])

    def hand_over(block, args, result):
        if len(waiting) == 1 and graph:
            torch.set_grad_enabled(True)
        return waiting.pop()  # whatever a user's hooks made of the copy: they had their turn when the block ran

    before = {block: vars(block).get("forward") for block in blocks}
    try:
        for block in before:
            block.forward = partial(stand_in, block)
        with removed(block.register_forward_hook(hand_over) for block in before):
            yield
    finally:
        for block, own in before.items():
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own
