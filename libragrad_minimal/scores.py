"""What attribution methods share: their result, how they say what they read, tokens with their gradients, layers.

A method is a function of a `Recording` (B samples, N tokens, C channels, L blocks) that returns `Scores`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .added_constants import precise
from .engine import LIBRA, Rules
from .layout import coarsening
from .recording import Recording


class Scores(NamedTuple):
    """What a method returns."""

    tokens: Tensor  # (B, N) signed
    total: Tensor | None = None  # (B,) all attributions, those on no token included; None where they have no sum
    promised: bool = False  # does total equal the output wherever the rules are complete?


Method = Callable[..., Scores]


def reads(*what: str, rules: Rules = LIBRA) -> Callable[[Method], Method]:
    """Decorator of a method: what it needs of a recording beside the tokens, and the rules it runs under by default."""

    def mark(method: Method) -> Method:
        method.reads = frozenset(what)  # type: ignore[attr-defined]
        method.rules = rules  # type: ignore[attr-defined]
        return method

    return mark


# ---- tokens and their gradients --------------------------------------------------------------------------------------


def tokens_and_gradients(run: Recording, layer: int) -> tuple[Tensor, Tensor]:
    """Tokens entering a block and their gradients, both (B, N_layer, C) in at least single precision."""
    h, g = precise(run.tokens[layer]), run.gradients.tokens[layer]
    return (h * run.valid[..., None], g) if run.valid.shape == h.shape[:2] else (h, g)


def input_times_gradient(run: Recording, layer: int) -> Tensor:
    h, g = tokens_and_gradients(run, layer)
    return spread((h * g).sum(-1), run, layer)


def second_scores(run: Recording) -> Tensor:
    """Input x gradient at the tokens of a second stream, a decoder's: (B, N')."""
    assert run.second is not None and run.gradients.second is not None
    return (precise(run.second_axes.arrange(run.second.detach())) * run.gradients.second).sum(-1)


def mean_over_tokens(run: Recording, values: Tensor) -> Tensor:
    """(B, N, C) -> (B, 1, C), padding left out."""
    if run.valid.shape != values.shape[:2]:
        return values.mean(1, keepdim=True)
    return (values * run.valid[..., None]).sum(1, keepdim=True) / run.valid.sum(1)[:, None, None]


def shown(run: Recording, layer: int) -> Tensor:
    """(B, N_layer): True for tokens that show a part of the picture or text; class tokens, registers, padding don't."""
    samples, count = run.tokens[layer].shape[:2]
    if run.valid.shape != (samples, count):
        here = torch.arange(count, device=run.valid.device) >= (run.prefixes[layer] or 0)
        return here.expand(samples, -1)
    if run.layout.place is None:
        return run.valid
    place = run.layout.place.to(run.valid.device)
    place = place.expand(samples, -1) if place.dim() == 1 else place
    return torch.zeros_like(run.valid).scatter(1, place, True) & run.valid


# ---- layers ----------------------------------------------------------------------------------------------------------


def whole_number(option: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{option} must be a whole number, got {value!r}") from error


def checked_layer(layer: int, count: int) -> int:
    """The number of a layer that may be counted from the end."""
    layer = whole_number("layer", layer)
    if not -count <= layer < count:
        raise ValueError(f"there is no layer {layer}: they are numbered 0..{count - 1}, or -{count}..-1 from the end")
    return layer % count


def chosen_layers(layers: Iterable[int] | int | None, run: Recording) -> list[int]:
    """The numbers of the blocks that a sum goes over, in order; all where none are named."""
    count = len(run.left)
    if layers is None:
        return list(range(count))
    several = layers if isinstance(layers, Iterable) else [layers]
    numbers = sorted({checked_layer(layer, count) for layer in several})
    if not numbers:
        raise ValueError(f"layers is empty: name some of the blocks 0..{count - 1}, or leave it out to sum over all")
    return numbers


def whole_layer(run: Recording, layer: int) -> int:
    number = checked_layer(layer, len(run.stream))
    if not run.whole[number]:
        raise ValueError(
            f"the tokens at block {number} aren't all of the stream, something leads past them: use layer=0"
        )
    return number


def coarser(run: Recording, layer: int) -> int | None:
    """The k for which k x k cells of the picture are one token of this layer; None if no relation is known."""
    if not run.in_place[layer]:
        return None
    if run.tokens[layer].shape[:2] == run.valid.shape:
        return 1
    here, prefix = run.axes[layer].sizes(run.stream[layer]), run.prefixes[layer]
    if prefix is None or run.layout.grid is None:
        return None
    return coarsening(run.layout.grid, here if prefix == 0 else (here[0] - prefix,))


def spread(scores: Tensor, run: Recording, layer: int) -> Tensor:
    """Scores of one layer's tokens (B, N_layer) on the tokens of the first, (B, N): a coarse one shares evenly."""
    k = coarser(run, layer)
    if k == 1 and scores.shape == run.valid.shape:
        return scores
    if not run.in_place[layer]:
        raise ValueError(
            f"before block {layer} tokens are dropped or put into another order, so scores of its tokens have no place"
            ": use IxG or FullGrad, which read the first block's"
        )
    if k is None or run.layout.grid is None:
        here, there = (" x ".join(map(str, run.axes[i].sizes(run.stream[i]))) for i in (layer, 0))
        raise ValueError(
            f"block {layer} works on {here} tokens, the first block on {there}: no known relation between them; use "
            "IxG or FullGrad, which read the first block's, or name the blocks of one stage, blocks=[...]"
        )
    cell = torch.zeros((), dtype=torch.long)
    for length in run.layout.grid:  # the number of the coarse cell that each fine one lies in, row by row
        cell = cell[..., None] * -(-length // k) + torch.arange(length) // k
    cell = cell.flatten().to(scores.device)
    first, prefix = run.layout.prefix or 0, run.prefixes[layer] or 0
    fine = scores[:, prefix:][:, cell] / cell.bincount()[cell]
    before = scores[:, :prefix] if first == prefix else scores.new_zeros(len(scores), first)
    return torch.cat([before, fine], dim=1)
