"""Methods whose gradients are means over many inputs: Integrated Gradients, SmoothGrad, and others on such means."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial, reduce

import torch
from torch import Tensor
from tqdm import tqdm

from .added_constants import ConstantShare
from .engine import PLAIN
from .recording import FIRST, Gradients, Recording
from .scores import Method, Scores, input_times_gradient, reads, whole_number


@reads(FIRST, rules=PLAIN)
def integrated_gradients(run: Recording, steps: int = 50) -> Scores:
    """Integrated Gradients from zero tokens (Sundararajan et al. 2017): h times the mean gradient along the straight
    path, midpoint rule; with the output at zero its total is complete up to the error of the steps.

    That holds for the gradients of a function, and balanced ones aren't any's: it runs plain unless told otherwise.
    """
    if run.rules != PLAIN:
        warnings.warn(
            "IG under balanced rules doesn't add up, however many steps it takes: balanced gradients are no function's "
            "gradients. Leave rules= out to run it plain, or use FullGrad, which is complete with one gradient",
            stacklevel=7,
        )
    scores = input_times_gradient(along_path(run, steps), 0)
    return Scores(scores, scores.sum(1) + run.rerun(changed=torch.zeros_like).output)


@reads(FIRST)
def smoothgrad(run: Recording, samples: int = 25, noise: float = 0.1, seed: int = 0) -> Scores:
    """Input x gradient, the gradient averaged over noisy tokens (Smilkov et al. 2017).

    noise is a share of the range of a sample's token values. All samples of a batch meet the same noise.
    """
    scores = input_times_gradient(among_neighbours(run, samples, noise, seed), 0)
    return Scores(scores, scores.sum(1))


def integrated(method: Method) -> Method:
    """The method with the gradients of Integrated Gradients. Several such methods of one recording share them."""

    @reads(*method.reads)  # type: ignore[attr-defined]
    def with_path_gradients(run: Recording, steps: int = 50) -> Scores:
        return method(along_path(run, steps))._replace(promised=False)

    return with_path_gradients


def smoothed(method: Method) -> Method:
    """The method with the gradients of SmoothGrad, which several such methods share."""

    @reads(*method.reads)  # type: ignore[attr-defined]
    def with_smooth_gradients(run: Recording, samples: int = 25, noise: float = 0.1, seed: int = 0) -> Scores:
        return method(among_neighbours(run, samples, noise, seed))._replace(promised=False)

    return with_smooth_gradients


# ---- means of gradients ----------------------------------------------------------------------------------------------


def along_path(run: Recording, steps: int) -> Recording:
    """The same recording, its gradients averaged along the straight path from zero tokens (midpoint rule)."""
    steps = whole_number("steps", steps)
    starts = [partial(torch.mul, other=(step + 0.5) / steps) for step in range(steps)]
    return with_mean(run, ("path", steps), starts)


def among_neighbours(run: Recording, samples: int, noise: float, seed: int) -> Recording:
    """The same recording, its gradients averaged over tokens with noise."""
    samples, generator = whole_number("samples", samples), torch.Generator().manual_seed(whole_number("seed", seed))
    if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise ValueError(f"noise is a share of the tokens' range and can't be {noise!r}")

    def noisy(h: Tensor) -> Tensor:
        extent = (h.flatten(1).amax(1) - h.flatten(1).amin(1)).view(-1, *[1] * (h.dim() - 1))
        return h + noise * extent * torch.randn(h.shape[1:], generator=generator).to(h)

    return with_mean(run, ("noise", samples, noise, seed), [noisy] * samples)


def with_mean(run: Recording, name: tuple, changes: Sequence[Callable[[Tensor], Tensor]]) -> Recording:
    """The same recording, its gradients the mean of those of runs whose first tokens are changed."""
    if not changes:
        raise ValueError("gradients are averaged over at least one step or sample, got 0")
    if name not in run.averages:
        bar = tqdm(changes, "gradients", disable=None, leave=False)
        total = reduce(added, (run.rerun(changed=change).gradients for change in bar))
        run.averages[name] = scaled(total, len(changes))
    other = copy(run)
    other.gradients = run.averages[name]
    return other


def added(first: Gradients, second: Gradients) -> Gradients:
    def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else a + b

    return Gradients(
        [a + b for a, b in zip(first.tokens, second.tokens, strict=True)],
        [
            ConstantShare(a.layer, both(a.placed, b.placed), a.total + b.total)
            for a, b in zip(first.constants, second.constants, strict=True)
        ],
        [a + b for a, b in zip(first.attention, second.attention, strict=True)],
        both(first.second, second.second),
    )


def scaled(gradients: Gradients, count: int) -> Gradients:
    shares = (
        (share.layer, None if share.placed is None else share.placed / count, share.total / count)
        for share in gradients.constants
    )
    return Gradients(
        [g / count for g in gradients.tokens],
        [ConstantShare(*share) for share in shares],
        [g / count for g in gradients.attention],
        None if gradients.second is None else gradients.second / count,
    )
