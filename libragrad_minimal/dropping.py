"""Deletion as Mehri et al. 2025 do it: tokens leave the stream behind the position embedding, class tokens stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .families import Inputs, name_of
from .hiding import hidden_tokens
from .layout import Layout, first_tokens, layout_of
from .streams import find_streams, in_this_thread, is_stream, removed, stream_argument

Change = Callable[[Tensor], Tensor]
Run = Callable[[], Tensor]


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

    Where blocks tell the places of tokens by their number (EVA02, BEiT, MLP-Mixer), those that go stay in their places
    until the last block, but no other token sees them. For texts `mask_tokens` does the same.

    Args:
        model: a vision Transformer of timm, transformers or open_clip, or the picture tower of a pair.
        model_fn: pictures (N, C, H, W) -> logits (N, classes), which runs `model`.
    Returns:
        (pictures, keep (N, T) bool) -> logits (N, classes).
    Raises:
        ValueError: a model whose tokens aren't told apart, or can neither be left out nor hidden from each other.
    """
    known: dict[tuple[int, ...], Entrance] = {}

    def answer(given: tuple[Tensor, Tensor]) -> Tensor:
        pictures, keep = given
        shape = tuple(pictures.shape[1:])
        if shape not in known:
            known[shape] = entrance(model, model_fn, pictures[:1])
        counts = keep.sum(1)
        rows = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
        parts = [known[shape].without(keep[some], partial(model_fn, pictures[some])) for some in rows]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    return answer


@dataclass(frozen=True)
class Entrance:
    """Where the patches of a picture enter the blocks of a model, and the way to take some away there."""

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    layout: Layout
    hides_in: int = 0  # runs of blocks, through all of which the tokens that go are hidden; 0: they never enter

    def without(self, keep: Tensor, run: Run) -> Tensor:
        """What `run` returns without the tokens of patches that go, equally many a sample: keep (N, T)."""
        if keep.all():
            return run()
        return self.hiding(keep, run) if self.hides_in else self.leaving_out(keep, run)

    def leaving_out(self, keep: Tensor, run: Run) -> Tensor:
        return self.run_with(run, partial(self.rows_kept, keep))

    def hiding(self, keep: Tensor, run: Run, change: Change = lambda tokens: tokens) -> Tensor:
        """No token sees those that go, and what comes after the last block doesn't get them."""
        with ExitStack() as inside:

            def enter(tokens: Tensor) -> Tensor:
                inside.enter_context(hidden_tokens(~self.stays(tokens, keep)))
                return change(tokens)

            def leave(tokens: Tensor) -> Tensor:
                inside.close()
                return self.rows_kept(keep, tokens)

            return self.run_with(run, enter, leave)

    def run_with(self, run: Run, enter: Change, leave: Change | None = None) -> Tensor:
        """What `run` returns when the tokens are changed that enter the first of the blocks that runs, and those that
        leave the last."""
        entered: list[torch.Size] = []
        left = 0

        def before(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            place = stream_argument(args, kwargs)
            if entered or place is None:
                return None
            tokens = args[place] if isinstance(place, int) else kwargs[place]
            entered.append(tokens.shape)
            changed = enter(tokens)
            if isinstance(place, int):
                return (*args[:place], changed, *args[place + 1 :]), kwargs
            return args, {**kwargs, place: changed}

        def behind(block: nn.Module, args: tuple, result: Any) -> Any:
            nonlocal left
            left += 1
            if leave is None or left < self.hides_in:
                return None
            if isinstance(result, Tensor):
                return leave(result)
            places = [i for i, part in enumerate(result) if is_stream(part) and part.shape == entered[0]]
            return (*result[: places[0]], leave(result[places[0]]), *result[places[0] + 1 :])

        def hooks() -> Iterator[Any]:
            for block in set(self.blocks):
                yield block.register_forward_pre_hook(in_this_thread(before), with_kwargs=True)
                yield block.register_forward_hook(in_this_thread(behind))

        with removed(hooks()):
            result = run()
        if not entered:
            name = name_of(self.model)
            raise ValueError(f"model_fn doesn't run {name}: give the model, or the tower, that it runs")
        return result

    @property
    def dims(self) -> tuple[int, ...]:
        return (self.layout.axes.batch, *self.layout.axes.tokens)

    def stays(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """(N, tokens) bool: all but those of the patches that go."""
        keep = keep.to(tokens.device)
        if self.layout.place is None:
            return keep
        stays = keep.new_ones([tokens.shape[dim] for dim in self.dims])
        stays[:, self.layout.place.to(tokens.device)] = keep
        return stays

    def rows_kept(self, keep: Tensor, tokens: Tensor) -> Tensor:
        """The tokens, in the model's own order of dimensions, without those of the patches that go."""
        rows = tokens.movedim(self.dims, (0, 1))
        kept = rows[self.stays(tokens, keep)].unflatten(0, (len(rows), -1))
        return kept.movedim((0, 1), self.dims)

    def rows_changed(self, change: Callable[[Tensor, Tensor], None], tokens: Tensor) -> Tensor:
        """Tokens (N, T, C) of which `change`, told where the patches are, writes over some."""
        rows = tokens.movedim(self.dims, (0, 1)).clone()
        place = torch.arange(rows.shape[1]) if self.layout.place is None else self.layout.place.cpu()
        change(rows, place)
        return rows.movedim((0, 1), self.dims)


# ---- which way is the right one --------------------------------------------------------------------------------------


@torch.no_grad()
def entrance(model: nn.Module, model_fn: Callable[[Tensor], Tensor], picture: Tensor) -> Entrance:
    """Tried on a picture (1, C, H, W). Raises ValueError where tokens can neither be left out nor be hidden."""
    inputs, run = Inputs(picture), partial(model_fn, picture)
    with torch.enable_grad():  # a graph tells which modules are the blocks
        blocks = find_streams(model, inputs).blocks
    tokens = first_tokens(model, inputs, blocks)
    layout = layout_of(model, inputs, blocks, tokens)
    if layout.place is not None and layout.place.dim() > 1 or len(layout.axes.tokens) > 1:
        raise ValueError(f"the tokens of {name_of(model)} are no row: paint patches instead, with occlude_patches")
    found = Entrance(model, blocks, layout)
    patches = tokens.shape[layout.axes.tokens[0]] if layout.place is None else len(layout.place)
    half = torch.arange(patches)[None] % 2 == 0
    if nobody_counts(found, run) and runs_without(found, half, run):
        return found
    found = replace(found, hides_in=runs_of(blocks, run))
    if nobody_sees(found, torch.cat([half, half.roll(1)]), partial(model_fn, picture.repeat(2, 1, 1, 1))):
        return found
    raise ValueError(
        f"the blocks of {name_of(model)} tell where tokens are by their number, or need all of them, and mix them by "
        "more than attention, so that none can be taken away: paint patches instead, with occlude_patches"
    )


def nobody_counts(found: Entrance, run: Run) -> bool:
    """Are patches in another order the same to the blocks? Where they are told apart by their number (by rotary
    embeddings, convolutions), those behind one that is gone would move up."""

    def turn_round(rows: Tensor, place: Tensor) -> None:
        rows[:, place] = rows[:, place.flip(0)]

    expected = run()
    turned = found.run_with(run, partial(found.rows_changed, turn_round))
    noise = 1e-2 if next(found.model.parameters()).dtype.itemsize < 4 else 1e-4  # of sums in another order
    return torch.allclose(expected, turned, rtol=noise, atol=noise * float(expected.abs().max()))


def runs_without(found: Entrance, keep: Tensor, run: Run) -> bool:
    try:
        found.leaving_out(keep, run)
    except (RuntimeError, IndexError):  # a bias for every two places, or a position told between blocks
        return False
    return True


def nobody_sees(found: Entrance, keep: Tensor, run: Run) -> bool:
    """Does it leave the answers as they are, whatever the hidden tokens of two samples hold?"""

    def negate(rows: Tensor, place: Tensor) -> None:
        for row, stays in zip(rows, keep, strict=True):
            row[place[~stays]] *= -1

    try:
        expected = found.hiding(keep, run)
        negated = found.hiding(keep, run, partial(found.rows_changed, negate))
    except (RuntimeError, IndexError):  # what comes after the blocks needs all tokens
        return False
    return torch.allclose(expected, negated, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def runs_of(blocks: tuple[nn.Module, ...], run: Run) -> int:
    count = 0

    def add(block: nn.Module, args: tuple, result: Any) -> None:
        nonlocal count
        count += 1

    with removed(block.register_forward_hook(in_this_thread(add)) for block in set(blocks)):
        run()
    return count
