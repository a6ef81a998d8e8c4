"""Deletion as Mehri et al. 2025 do it: tokens leave the stream behind the position embedding, class tokens stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .families import Inputs, name_of
from .layout import Axes, Layout, first_tokens, layout_of
from .streams import find_streams, in_this_thread, removed, stream_argument


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
    known: dict[tuple[int, ...], tuple[tuple[nn.Module, ...], Layout]] = {}

    def answer(given: tuple[Tensor, Tensor]) -> Tensor:
        pictures, keep = given
        shape = tuple(pictures.shape[1:])
        if shape not in known:
            known[shape] = entrance(model, pictures[:1])
            check_places(model, *known[shape], partial(model_fn, pictures[:1]))
        blocks, layout = known[shape]
        counts = keep.sum(1)
        rows = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
        parts = [without(model, blocks, layout, keep[some], partial(model_fn, pictures[some])) for some in rows]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    return answer


def entrance(model: nn.Module, pictures: Tensor) -> tuple[tuple[nn.Module, ...], Layout]:
    """The blocks, and how the tokens that enter the first lie on the picture."""
    inputs = Inputs(pictures)
    with torch.enable_grad():  # a graph tells which modules are the blocks
        blocks = find_streams(model, inputs).blocks
    layout = layout_of(model, inputs, blocks, first_tokens(model, inputs, blocks))
    if layout.place is not None and layout.place.dim() > 1 or len(layout.axes.tokens) > 1:
        raise ValueError(f"the tokens of {name_of(model)} are no row: paint patches instead, with occlude_patches")
    return blocks, layout


def check_places(model: nn.Module, blocks: tuple[nn.Module, ...], layout: Layout, run: Callable[[], Tensor]) -> None:
    """Raises ValueError where blocks tell the places of tokens by their number (rotary embeddings, convolutions): then
    those behind one that is gone would move up. Where they don't, patches in another order are the same to them."""

    def turn_round(tokens: Tensor) -> Tensor:
        axes = layout.axes
        rows = tokens.movedim((axes.batch, *axes.tokens), (0, 1)).clone()
        place = torch.arange(rows.shape[1]) if layout.place is None else layout.place.cpu()
        rows[:, place] = rows[:, place.flip(0)]
        return rows.movedim((0, 1), (axes.batch, *axes.tokens))

    with torch.no_grad():
        expected, found = run(), run_with(model, blocks, turn_round, run)
    if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"the blocks of {name_of(model)} tell where tokens are by their number, so without some the others would "
            "move: paint patches instead, with occlude_patches"
        )


def without(
    model: nn.Module, blocks: tuple[nn.Module, ...], layout: Layout, keep: Tensor, run: Callable[[], Tensor]
) -> Tensor:
    """What `run` returns when only these patches' tokens, equally many a sample, enter the first block."""
    try:
        return run_with(model, blocks, lambda tokens: rows_kept(tokens, keep, layout), run)
    except (RuntimeError, IndexError) as error:
        if keep.all():
            raise
        raise ValueError(
            f"{name_of(model)} doesn't run on {int(keep[0].sum())} of {keep.shape[1]} patches (positions that are "
            "told between its blocks?): paint them instead, with occlude_patches"
        ) from error


def run_with(
    model: nn.Module, blocks: tuple[nn.Module, ...], change: Callable[[Tensor], Tensor], run: Callable[[], Tensor]
) -> Tensor:
    """What `run` returns when the tokens that enter the first of the blocks that runs are changed."""
    entered: list[bool] = []

    def drop(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        place = stream_argument(args, kwargs)
        if entered or place is None:
            return None
        entered.append(True)
        tokens = args[place] if isinstance(place, int) else kwargs[place]
        kept = change(tokens)
        if isinstance(place, int):
            return (*args[:place], kept, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: kept}

    with removed(block.register_forward_pre_hook(in_this_thread(drop), with_kwargs=True) for block in set(blocks)):
        result = run()
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
