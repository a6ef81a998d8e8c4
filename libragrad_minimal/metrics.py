"""How good is an attribution? Metrics for pictures and for text, tensors in and tensors out.

Two families (Mehri et al. 2025, section 4; definitions as in the project's notes):

- *where does it point?* segmentation AP, pointing game, mass inside the mask, grid pointing game: need masks or known places;
- *is it faithful?* deletion: take tokens away in the order of their scores and watch the model's answer.

Every metric returns one number per sample, so that `mean_and_error` can say how sure the average is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over samples and its standard error (sample standard deviation / sqrt n; NaN for a single sample)."""
    values = torch.as_tensor(values).double().flatten()
    if len(values) == 0:
        raise ValueError("mean_and_error needs at least one value, got none")
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(float("nan"))
    return values.mean().item(), error.item()


def completeness_error(output: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """|f(x) - sum of all attributions|, absolute and relative to |f|; all shapes (B,)."""
    absolute = (output - total).abs()
    return absolute, absolute / output.abs()


# --- where does it point? ---------------------------------------------------------------------------------------------


def upsample(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Score maps (B, h, w) at the resolution of the picture, bicubic: (B, H, W)."""
    return F.interpolate(scores[:, None].float(), size=tuple(size), mode="bicubic", align_corners=False)[:, 0]


def segmentation_ap(scores: Tensor, masks: Tensor) -> Tensor:
    """Average precision of each upsampled score map as a detector of the object's pixels.

    scores (B, h, w), masks (B, H, W) bool -> (B,) in [0, 1]. The same number as scikit-learn's
    `average_precision_score`: pixels with equal scores share one threshold.
    """
    _check_maps(scores, masks)
    ranked, order = upsample(scores, masks.shape[-2:]).flatten(1).sort(dim=1, descending=True)
    hit = masks.flatten(1).gather(1, order).double()
    position = torch.arange(1, hit.shape[1] + 1, device=hit.device)
    precision = hit.cumsum(1) / position
    precision = precision.gather(1, _last_of_equals(ranked))
    return ((precision * hit).sum(1) / hit.sum(1)).float()


def _last_of_equals(ranked: Tensor) -> Tensor:
    """For every entry of sorted rows (B, N), the index of the last entry with the same value."""
    index = torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    is_last = torch.ones_like(ranked, dtype=torch.bool)
    is_last[:, :-1] = ranked[:, :-1] != ranked[:, 1:]
    return index.where(is_last, ranked.shape[1]).flip(1).cummin(1).values.flip(1)


def pointing_game(scores: Tensor, masks: Tensor) -> Tensor:
    """1 where the highest point of the upsampled score map lies on the object, else 0.

    scores (B, h, w), masks (B, H, W) bool -> (B,).
    """
    _check_maps(scores, masks)
    highest = upsample(scores, masks.shape[-2:]).flatten(1).argmax(1, keepdim=True)
    return masks.flatten(1).gather(1, highest)[:, 0].float()


def mass_inside(scores: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive attribution that falls on the object: scores (B, h, w), masks (B, H, W) -> (B,).

    Each patch counts by the share of its pixels on the object, so no interpolation is involved.
    0 where a map has no positive attribution at all.
    """
    _check_maps(scores, masks)
    return _positive_share(scores, F.adaptive_avg_pool2d(masks[:, None].float(), scores.shape[-2:])[:, 0])


def grid_pointing_game(scores: Tensor, cells: Tensor, grid: tuple[int, int] = (2, 2)) -> Tensor:
    """Share of the positive attribution inside the right cell of a collage (Böhle et al. 2021).

    scores (B, h, w); cells (B,) number of the right cell, row by row; grid (rows, columns) -> (B,).
    Chance level for a map without knowledge is 1 / (rows * columns).
    """
    rows, columns = grid
    height, width = scores.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(f"a {height}x{width} score map can't be cut into {rows}x{columns} equal cells")
    cells = torch.as_tensor(cells, device=scores.device)
    if not 0 <= cells.min() <= cells.max() < rows * columns:
        raise ValueError(f"cells must lie in 0..{rows * columns - 1} for a {rows}x{columns} grid, got {cells.tolist()}")
    row = torch.arange(height, device=scores.device) // (height // rows)
    column = torch.arange(width, device=scores.device) // (width // columns)
    return _positive_share(scores, (row[:, None] * columns + column == cells[:, None, None]).float())


def _positive_share(scores: Tensor, weight: Tensor) -> Tensor:
    positive = scores.double().clamp(min=0)
    total = positive.flatten(1).sum(1)
    inside = (positive * weight).flatten(1).sum(1)
    return (inside / total.where(total > 0, torch.ones_like(total))).float()


def _check_maps(scores: Tensor, masks: Tensor) -> None:
    if scores.ndim != 3 or masks.ndim != 3 or len(scores) != len(masks):
        raise ValueError(
            f"need scores (B, h, w) and masks (B, H, W), got {tuple(scores.shape)} and {tuple(masks.shape)}"
        )
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {masks.dtype}; compare with a threshold first")
    if not scores.isfinite().all():
        raise ValueError("scores contain NaN or infinity")
    empty = (~masks.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask of sample {empty[0]} is empty: there is no object to point at")
