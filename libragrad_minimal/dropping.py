"""Deletion as Mehri et al. 2025 do it: tokens leave the stream behind the position embedding, class tokens stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .families import Inputs, name_of
from .layout import Axes, Layout, first_tokens, layout_of
from .streams import find_streams, removed, stream_argument


def drop_tokens(pictures: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The `occlude` of `deletion` that goes with a model_fn from `dropping`.

    Args:
        pictures: (N, C, H, W).
        keep: (N, T) bool, the patches that stay, row by row.
    Returns:
        Both, as that model_fn takes them.
    """
    return pictures, keep


def dropping(model: nn.Module, model_fn: Callable[[Tensor], Tensor]) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """A model_fn for `deletion` that runs the blocks without the patches' tokens that are taken away.

    For texts `mask_tokens` does the same: no token sees those that are hidden, and positions stay as they are.

    Args:
        model: a vision Transformer of timm, transformers or open_clip, or the picture tower of a pair.
        model_fn: pictures (N, C, H, W) -> logits (N, classes), which runs `model`.
    Returns:
        (pictures, keep (N, T) bool) -> logits (N, classes).
    Raises:
        ValueError: a model whose tokens aren't told apart, or whose blocks only work on all of them.
    """
    known: dict[tuple[int, ...], tuple[nn.Module, Layout]] = {}

    def answer(given: tuple[Tensor, Tensor]) -> Tensor:
        pictures, keep = given
        shape = tuple(pictures.shape[1:])
        if shape not in known:
            known[shape] = entrance(model, pictures[:1])
        block, layout = known[shape]
        counts = keep.sum(1)
        rows = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
        parts = [without(model, block, layout, keep[some], partial(model_fn, pictures[some])) for some in rows]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    return answer


def entrance(model: nn.Module, pictures: Tensor) -> tuple[nn.Module, Layout]:
    """The first block, and how the tokens that enter it lie on the picture."""
    inputs = Inputs(pictures)
    with torch.enable_grad():  # a graph tells which modules are the blocks
        blocks = find_streams(model, inputs).blocks
    layout = layout_of(model, inputs, blocks, first_tokens(model, inputs, blocks))
    if layout.place is not None and layout.place.dim() > 1 or len(layout.axes.tokens) > 1:
        raise ValueError(f"the tokens of {name_of(model)} are no row: paint patches instead, with occlude_patches")
    return blocks[0], layout


def without(model: nn.Module, block: nn.Module, layout: Layout, keep: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """What `run` returns when only these patches' tokens, equally many a sample, enter the block."""
    entered: list[bool] = []

    def drop(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        place = stream_argument(args, kwargs)
        if entered or place is None:
            return None
        entered.append(True)
        tokens = args[place] if isinstance(place, int) else kwargs[place]
        kept = rows_kept(tokens, keep, layout)
        if isinstance(place, int):
            return (*args[:place], kept, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: kept}

    with removed([block.register_forward_pre_hook(drop, with_kwargs=True)]):
        try:
            result = run()
        except (RuntimeError, IndexError) as error:
            if keep.all():
                raise
            raise ValueError(
                f"{name_of(model)} doesn't run on {int(keep[0].sum())} of {keep.shape[1]} patches (positions that are "
                "told between its blocks?): paint them instead, with occlude_patches"
            ) from error
    if not entered:
        raise ValueError(f"model_fn doesn't run {name_of(model)}: give the model, or the tower, that it runs")
    return result


def rows_kept(tokens: Tensor, keep: Tensor, layout: Layout) -> Tensor:
    """The tokens, in the model's own order of dimensions, without those of the patches that go."""
    axes: Axes = layout.axes
    dims = (axes.batch, *axes.tokens)
    rows = tokens.movedim(dims, (0, 1))
    stays = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    if layout.place is None:
        stays = keep.to(rows.device)
    else:
        stays[:, layout.place.to(rows.device)] = keep.to(rows.device)
    kept = rows[stays].unflatten(0, (len(rows), -1))
    return kept.movedim((0, 1), dims)
