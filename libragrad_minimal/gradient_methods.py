"""Methods of gradients alone: the gradient, input x gradient, its sums over layers, and noise to compare them with."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .recording import CONSTANTS, FIRST, LAYERS, Recording
from .scores import (
    Scores,
    chosen_layers,
    coarser,
    input_times_gradient,
    reads,
    second_scores,
    spread,
    tokens_and_gradients,
    whole_layer,
    whole_number,
)


@reads(FIRST)
def saliency(run: Recording) -> Scores:
    """Saliency (Simonyan et al. 2014, section 3): max_c |g|, the largest of a token's derivatives. Never negative."""
    _, g = tokens_and_gradients(run, 0)
    return Scores(g.abs().amax(-1))


@reads(FIRST)
def ixg(run: Recording) -> Scores:
    """Input x gradient (Shrikumar et al. 2016): sum_c h g at the tokens that enter the first block.

    It promises completeness only where a model adds no constants.
    """
    without_constants = not run.constants
    scores = input_times_gradient(run, 0)
    total = scores.sum(1)
    if run.second is not None:
        total = total + second_scores(run).sum(1)
    return Scores(scores, total, promised=without_constants)


@reads(LAYERS, CONSTANTS)
def fullgrad(run: Recording, layer: int = 0) -> Scores:
    """Input x gradient at one block, plus every constant added from there on (Srinivas & Fleuret 2019).

    With Libra each layer's scores and total explain the whole output (Mehri et al. 2025, section 3). What can't be
    placed on a token (a head's bias, one inside a window) and a decoder's own tokens count in the total.
    """
    layer = whole_layer(run, layer)
    scores = input_times_gradient(run, layer)
    total = scores.sum(1)
    for share in run.gradients.constants:
        if share.layer >= layer:
            total = total + share.total
            if share.placed is not None and coarser(run, share.layer) is not None:
                scores = scores + spread(share.placed, run, share.layer)
    if run.second is not None:
        total = total + second_scores(run).sum(1)
    return Scores(scores, total, promised=True)


REDUCTIONS = ("sum", "mean")


@reads(LAYERS, CONSTANTS)
def fullgrad_plus(run: Recording, reduce: str | None = None, layers: Iterable[int] | None = None) -> Scores:
    """FullGrad+ (Mehri et al. 2025, section 3): input x gradient of every block plus all constants.

    reduce: "sum" is the published form, sum_l sum_c h_l g_l and each constant once; its completeness error is that of
    the FullGrad at the first of its blocks, which it extends. "mean" is the mean over blocks of each block's FullGrad,
    so that the scores themselves, with what can't be placed, add up to the output; its completeness error is the
    mean's. Default: the sum for pictures, the mean for text. layers: the blocks that are summed (default: all).
    """
    if reduce not in (None, *REDUCTIONS):
        raise ValueError(f"unknown reduce {reduce!r}; there are {', '.join(REDUCTIONS)}")
    numbers = chosen_layers(layers, run)
    if reduce == "mean" or reduce is None and run.is_text:
        if layers is None:
            numbers = [layer for layer in numbers if run.whole[layer] and coarser(run, layer) is not None]
        every = [fullgrad(run, layer) for layer in numbers]
        scores = torch.stack([one.tokens for one in every]).mean(0)
        return Scores(scores, sum_of([one.total for one in every]) / len(every), promised=True)
    first = fullgrad(run, numbers[0])
    later = [input_times_gradient(run, layer) for layer in numbers[1:]]
    return first._replace(tokens=sum_of([first.tokens, *later]))


@reads(LAYERS, CONSTANTS)
def skip_plus(run: Recording, reduce: str | None = None) -> Scores:
    """SkipPLUS (Mehri et al. 2024, CVPR workshops): FullGrad+ of the blocks from L/2 on, and the constants from there.

    reduce: as of FullGrad+.
    """
    count = len(run.left)
    return fullgrad_plus(run, reduce, range(count // 2, count))


def sum_of(parts: list) -> Tensor:
    return torch.stack(parts).sum(0)


@reads()
def random_scores(run: Recording, seed: int = 0) -> Scores:
    """Noise, as a floor for every metric. It depends on the sample, not on its place in a batch."""

    seed = whole_number("seed", seed)

    def one_sample(h: Tensor) -> Tensor:
        fingerprint = zlib.crc32(h.detach().float().cpu().numpy().tobytes(), seed)
        return torch.randn(run.valid.shape[1], generator=torch.Generator().manual_seed(fingerprint))

    return Scores(torch.stack([one_sample(h) for h in run.tokens[0]]).to(run.output.device))
