"""How good is an attribution? Metrics for pictures and for text, tensors in and tensors out.

Three families (Mehri et al. 2025, section 4; definitions as in the project's notes):

- *where does it point?* segmentation AP, pointing game, mass inside the mask, grid pointing game;
- *is it faithful?* deletion: take tokens away in the order of their scores and watch the model's answer;
- *do two methods agree?* Kendall's rank correlation.

Every metric returns one number per sample, so that `mean_and_error` can say how sure the average is.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over samples and its standard error.

    Args:
        values: one number per sample, any shape.
    Returns:
        The mean, and the sample standard deviation / sqrt(n); NaN for a single sample.
    Raises:
        ValueError: no values.
    """
    values = torch.as_tensor(values).double().flatten()
    if len(values) == 0:
        raise ValueError("mean_and_error needs at least one value, got none")
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(float("nan"))
    return values.mean().item(), error.item()


def completeness_error(output: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """How far the attributions are from adding up to the output.

    Args:
        output: (B,) the explained number f(x).
        total: (B,) the sum of all attributions.
    Returns:
        |f(x) - total|, and the same relative to |f(x)|, both (B,).
    """
    absolute = (output - total).abs()
    return absolute, absolute / output.abs()


# --- where does it point? ---------------------------------------------------------------------------------------------


def upsample(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Score maps at the resolution of the picture, bicubic.

    Args:
        scores: (B, h, w).
        size: (H, W) in pixels.
    Returns:
        (B, H, W).
    """
    height, width = size
    return F.interpolate(scores[:, None].float(), size=(height, width), mode="bicubic", align_corners=False)[:, 0]


def segmentation_ap(scores: Tensor, masks: Tensor) -> Tensor:
    """Average precision of each upsampled score map as a detector of the object's pixels.

    The same number as scikit-learn's `average_precision_score`: pixels with equal scores share one threshold.

    Args:
        scores: (B, h, w).
        masks: (B, H, W) bool, the object's pixels.
    Returns:
        (B,) in [0, 1].
    Raises:
        ValueError: shapes or dtypes that don't fit, scores that aren't finite, an empty mask.
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
    """Whether the highest point of the upsampled score map lies on the object (Zhang et al. 2018).

    Args:
        scores: (B, h, w).
        masks: (B, H, W) bool, the object's pixels.
    Returns:
        (B,) 1 for a hit, else 0.
    Raises:
        ValueError: as `segmentation_ap`.
    """
    _check_maps(scores, masks)
    highest = upsample(scores, masks.shape[-2:]).flatten(1).argmax(1, keepdim=True)
    return masks.flatten(1).gather(1, highest)[:, 0].float()


def iou(scores: Tensor, masks: Tensor, threshold: float | None = None) -> Tensor:
    """Intersection over union of the object and the pixels whose upsampled score exceeds a threshold.

    Args:
        scores: (B, h, w).
        masks: (B, H, W) bool, the object's pixels.
        threshold: a score; default: each upsampled map's own mean (Chefer et al. 2021, segmentation tests).
    Returns:
        (B,) in [0, 1].
    Raises:
        ValueError: as `segmentation_ap`.
    """
    both, found, there = _found(scores, masks, threshold)
    return both / (found + there - both)


def f1(scores: Tensor, masks: Tensor, threshold: float | None = None) -> Tensor:
    """Harmonic mean of precision and recall of the pixels whose upsampled score exceeds a threshold.

    Arguments, result and errors are those of `iou`.
    """
    both, found, there = _found(scores, masks, threshold)
    return 2 * both / (found + there)


def _found(scores: Tensor, masks: Tensor, threshold: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """How many pixels are found on the object, found at all, and the object's, each (B,)."""
    _check_maps(scores, masks)
    fine = upsample(scores, masks.shape[-2:])
    found = fine > (fine.mean((1, 2), keepdim=True) if threshold is None else threshold)
    return tuple(pixels.flatten(1).sum(1).float() for pixels in (found & masks, found, masks))  # type: ignore[return-value]


def mass_inside(scores: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive attribution that falls on the object.

    Each patch counts by the share of its pixels on the object, so no interpolation is involved.

    Args:
        scores: (B, h, w).
        masks: (B, H, W) bool, the object's pixels.
    Returns:
        (B,) in [0, 1]; 0 where a map has no positive attribution at all.
    Raises:
        ValueError: as `segmentation_ap`.
    """
    _check_maps(scores, masks)
    height, width = scores.shape[-2:]
    return _positive_share(scores, F.adaptive_avg_pool2d(masks[:, None].float(), (height, width))[:, 0])


def grid_pointing_game(scores: Tensor, cells: Tensor, grid: tuple[int, int] = (2, 2)) -> Tensor:
    """Share of the positive attribution inside the right cell of a collage (Böhle et al. 2021).

    Args:
        scores: (B, h, w).
        cells: (B,) number of the right cell, counted row by row.
        grid: (rows, columns) of the collage; must divide h and w.
    Returns:
        (B,) in [0, 1]; chance level for a map without knowledge is 1 / (rows * columns).
    Raises:
        ValueError: a grid that doesn't divide the map, or a cell outside of it.
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
        shapes = f"{tuple(scores.shape)} and {tuple(masks.shape)}"
        raise ValueError(f"need scores (B, h, w) and masks (B, H, W) of the same B, got {shapes}")
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {masks.dtype}; compare with a threshold first")
    if not scores.isfinite().all():
        raise ValueError("scores contain NaN or infinity")
    empty = (~masks.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask of sample {empty[0]} is empty: there is no object to point at")


# --- is it faithful? --------------------------------------------------------------------------------------------------

FRACTIONS = tuple(tenth / 10 for tenth in range(1, 11))
# The deletion of Mehri et al. 2025, with `drop_tokens` of dropping.py: deletion(..., **AUTHORS_PROTOCOL).
AUTHORS_PROTOCOL: dict[str, Any] = {"fractions": FRACTIONS[:-1], "floor": True, "ends": False}
COPIES_AT_ONCE, COPIES_ON_A_CPU = 128, 32  # of small inputs: larger batches leave a CPU's cache, and are slower
PIXELS_AT_ONCE = 3 * 2**19  # ten pictures of 224x224


class Curves(NamedTuple):
    """The model's answer while tokens are taken away, each (B, K + 1); column 0 is the untouched input."""

    logit: Tensor  # of the target class
    log_probability: Tensor  # of the target class
    predicts: Tensor  # the class with the highest logit


@dataclass(frozen=True)
class Deletion:
    """Both deletion curves of one attribution method: most (mif) and least (lif) influential tokens first."""

    protocol: str  # how tokens are taken away: "occlude patches", "drop tokens", "mask tokens", ...
    fractions: Tensor  # (K + 1,) share of tokens taken away, beginning with 0
    mif: Curves
    lif: Curves
    labels: Tensor | None = None  # (B,) ground truth
    second: Tensor | None = None  # (B,) the class predicted second, if that is the target
    ends: bool = True  # whether the untouched input counts in the means

    def summary(self) -> dict[str, Tensor]:
        """Every deletion metric, each a mean over the K + 1 points of a curve, or over K without the untouched input.

        - "MIF accuracy" 100 (1 - accuracy), "LIF accuracy" 100 accuracy, "SRG" the area between the two curves in
          percent: higher is better. Accuracy is measured against the label predicted for the untouched input, and with
          " (true label)" against the ground truth if it was given, with " (second label)" against the class that was
          predicted second if that is the target.
        - "SRG (logit)": the same area between the curves of the target's logit.
        - "MIF AOPC", "LIF AOPC": mean drop of the target's probability (Samek et al. 2017).
        - "MIF log-odds", "LIF log-odds": mean of log p(occluded) - log p(untouched), as the text literature has it.
        For MIF a high AOPC and low (very negative) log-odds are good, for LIF the reverse.

        Returns:
            Name -> one number per sample (B,).
        """
        result = self._accuracies(self.mif.predicts[:, 0], "")
        for name, labels in {"true": self.labels, "second": self.second}.items():
            if labels is not None:
                result |= self._accuracies(labels, f" ({name} label)")
        result["SRG (logit)"] = self._mean(self.lif.logit - self.mif.logit)
        for name, curves in {"MIF": self.mif, "LIF": self.lif}.items():
            probability = curves.log_probability.exp()
            result[f"{name} AOPC"] = self._mean(probability[:, :1] - probability)
            result[f"{name} log-odds"] = self._mean(curves.log_probability - curves.log_probability[:, :1])
        return result

    def _mean(self, points: Tensor) -> Tensor:
        """(B, K + 1) -> (B,)."""
        return (points if self.ends else points[:, 1:]).mean(1)

    def _accuracies(self, labels: Tensor, suffix: str) -> dict[str, Tensor]:
        mif, lif = (100 * self._mean((curves.predicts == labels[:, None]).float()) for curves in (self.mif, self.lif))
        return {f"MIF accuracy{suffix}": 100 - mif, f"LIF accuracy{suffix}": lif, f"SRG{suffix}": lif - mif}


@torch.no_grad()
def deletion(
    model_fn: Callable[[Any], Tensor],
    inputs: Tensor,
    scores: dict[str, Tensor],
    occlude: Callable[[Tensor, Tensor], Any],
    *,
    target: Tensor | str = "predicted",
    labels: Tensor | None = None,
    removable: Tensor | None = None,
    attention_mask: Tensor | None = None,
    fractions: tuple[float, ...] = FRACTIONS,
    floor: bool = False,
    ends: bool = True,
    batch_size: int | None = None,
    workers: int = 1,
) -> dict[str, Deletion]:
    """Take tokens away in falling (MIF) and rising (LIF) order of score and record the model's answer.

    The occluded copies of all methods, orders and inputs share batches, and equal copies are computed once.

    Args:
        model_fn: what `occlude` returns for N inputs -> logits (N, classes).
        inputs: (B, ...) pictures, token ids, ...
        scores: method name -> (B, T) or (B, h, w), one score per token.
        occlude: (inputs (N, ...), keep (N, T) bool) -> the inputs with the other tokens taken away:
            `occlude_patches`, `replace_tokens`, `mask_tokens`, `remove_tokens`, `drop_tokens` or your own. Its name is
            the protocol's.
        target: (B,) class whose logit and probability are followed, or "predicted", "second" or "true", as
            `target_class`.
        labels: (B,) ground truth, for the accuracies against it.
        removable: (B, T) bool; False for tokens that always stay, such as the first. Default: all may go.
        attention_mask: (B, T); 0 for padding, which is never there and doesn't count. Default: no padding.
        fractions: shares of the removable tokens to take away; 0 is always measured.
        floor: round the number of tokens to take away down instead of to the nearest.
        ends: count the untouched input in the means of `Deletion.summary`.
        batch_size: how many copies the model sees at once; default: up to 128, on a CPU 32, fewer if they are large
            pictures.
        workers: threads that run `model_fn`, each on copies of its own. On a CPU, with `torch.set_num_threads(1)`, that
            uses cores better than one thread's batches do, and their number changes no digit.
    Returns:
        Method name -> its two curves.
    Raises:
        ValueError: no scores, scores of different shapes or with NaN, fractions outside [0, 1], misshapen logits.
    """
    scores = {name: values.detach().flatten(1).to(inputs.device) for name, values in scores.items()}
    present, removable = _check_deletion(inputs, scores, removable, attention_mask, fractions)
    at_once = COPIES_ON_A_CPU if inputs.device.type == "cpu" else COPIES_AT_ONCE
    batch_size = batch_size or min(at_once, max(8, PIXELS_AT_ONCE // inputs[0].numel()))
    logits = partial(_logits, model_fn, inputs, occlude, batch_size=batch_size, workers=workers)

    sample = torch.arange(len(inputs), device=inputs.device)
    whole = torch.cat([part for _, part in logits(sample, present)])
    followed = target_class(whole, target, labels) if isinstance(target, str) else target.to(inputs.device)
    untouched = _answers(whole, followed)

    cut = partial(_keep, removable=removable, fractions=fractions, floor=floor)
    keep = torch.stack([cut(sign * values) for values in scores.values() for sign in (1, -1)])
    keep &= present[:, None]
    copies = torch.cat([sample[None, :, None, None].expand(*keep.shape[:3], 1), keep.int()], dim=-1)
    distinct, origin = copies.flatten(0, 2).unique(dim=0, return_inverse=True)
    by_length = distinct[:, 1:].sum(1).argsort(stable=True)  # so that texts or streams of one batch are equally long
    distinct, origin = distinct[by_length], by_length.argsort()[origin]
    parts = [
        _answers(part, followed[distinct[some, 0]]) for some, part in logits(distinct[:, 0], distinct[:, 1:].bool())
    ]
    occluded = [torch.cat(column) for column in zip(*parts, strict=True)]

    def curves(run: int) -> Curves:
        points = origin.unflatten(0, keep.shape[:3])[run]
        return Curves(
            *(torch.cat([first[:, None], rest[points]], 1) for first, rest in zip(untouched, occluded, strict=True))
        )

    share, second = (
        torch.tensor([0.0, *fractions]),
        followed if isinstance(target, str) and target == "second" else None,
    )
    return {
        name: Deletion(protocol_name(occlude), share, curves(2 * i), curves(2 * i + 1), labels, second, ends)
        for i, name in enumerate(scores)
    }


def protocol_name(occlude: Callable) -> str:
    """How an `occlude` takes tokens away, in words: "occlude patches"."""
    while isinstance(occlude, partial):
        occlude = occlude.func
    return getattr(occlude, "__name__", type(occlude).__name__).replace("_", " ")


def target_class(logits: Tensor, which: str, labels: Tensor | None = None) -> Tensor:
    """The class that is explained, and followed in deletion.

    Args:
        logits: (B, classes) of the untouched inputs.
        which: "predicted", "second" (predicted second), or "true", which needs the labels (B,).
    Returns:
        (B,).
    Raises:
        ValueError: another word, or no labels.
    """
    if which in ("predicted", "second"):
        return logits.topk(2, dim=1).indices[:, ("predicted", "second").index(which)]
    if which != "true":
        raise ValueError(f"unknown target {which!r}; there are predicted, second and true, or give (B,) classes")
    if labels is None:
        raise ValueError("the true class is asked for: give labels")
    return labels.to(logits.device)


def _keep(scores: Tensor, removable: Tensor, fractions: tuple[float, ...], floor: bool) -> Tensor:
    """Scores (B, T) -> which tokens stay (B, K, T) when each fraction of the highest removable ones is taken away."""
    order = scores.masked_fill(~removable, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    gone = removable.sum(1, keepdim=True) * torch.tensor(fractions, dtype=torch.double, device=scores.device)
    gone = (gone + 1e-9).floor() if floor else gone.round()
    return rank[:, None] >= gone[:, :, None]


def _logits(
    model_fn: Callable, inputs: Tensor, occlude: Callable, sample: Tensor, keep: Tensor, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's logits for occluded copies, sample (N,) of which input, keep (N, T) what stays: which, and theirs."""

    @torch.no_grad()  # each thread has its own
    def answer(chunk: Tensor) -> Tensor:
        return model_fn(occlude(inputs[sample[chunk]], keep[chunk])).float()

    chunks = torch.arange(len(sample), device=sample.device).split(batch_size)
    pool = ThreadPoolExecutor(workers) if workers > 1 and len(chunks) > 1 else None
    try:
        answers = pool.map(answer, chunks) if pool else map(answer, chunks)
        for chunk, logits in zip(chunks, tqdm(answers, "deletion", len(chunks), disable=None), strict=True):
            if logits.shape[:-1] != chunk.shape:
                raise ValueError(f"model_fn must return logits ({len(chunk)}, classes), got {tuple(logits.shape)}")
            yield chunk, logits
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _answers(logits: Tensor, followed: Tensor) -> Curves:
    """Logits (N, classes) -> what is noted of them, each (N,)."""
    column = followed[:, None]
    return Curves(logits.gather(1, column)[:, 0], logits.log_softmax(1).gather(1, column)[:, 0], logits.argmax(1))


def _check_deletion(
    inputs: Tensor,
    scores: dict[str, Tensor],
    removable: Tensor | None,
    attention_mask: Tensor | None,
    fractions: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """Which tokens are there at all, and which of them may go, both (B, T) bool."""
    if not scores:
        raise ValueError("no scores given: need a dict of method name -> scores (B, T)")
    shape = next(iter(scores.values())).shape
    for name, values in scores.items():
        if values.shape != shape or len(values) != len(inputs):
            raise ValueError(f"scores of {name} are {tuple(values.shape)}, expected {(len(inputs), *shape[1:])}")
        if values.isnan().any():
            raise ValueError(f"scores of {name} contain NaN: there is no order to take tokens away in")
    if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must be shares between 0 and 1, got {fractions}")
    everything = torch.ones(shape, dtype=torch.bool, device=inputs.device)
    present, removable = (
        everything if mask is None else mask.to(inputs.device, torch.bool).expand(shape)
        for mask in (attention_mask, removable)
    )
    return present, removable & present


def occlude_patches(images: Tensor, keep: Tensor, grid: tuple[int, int] | None = None, value: float = 0.0) -> Tensor:
    """Paint the patches that don't stay.

    Args:
        images: (N, C, H, W).
        keep: (N, T) bool, the patches that stay, row by row.
        grid: (rows, columns) of patches; default: a square.
        value: what to paint, one number or a tensor that broadcasts to the images. The default 0 is the dataset's mean
            in images normalised with it, as timm's and open_clip's transforms do.
    Returns:
        (N, C, H, W).
    Raises:
        ValueError: a grid that hasn't T patches.
    """
    side = round(keep.shape[1] ** 0.5)
    rows, columns = grid or (side, side)
    if rows * columns != keep.shape[1]:
        raise ValueError(f"{keep.shape[1]} patches don't fill a {rows}x{columns} grid: give the right grid")
    visible = F.interpolate(keep.view(-1, 1, rows, columns).float(), size=images.shape[-2:], mode="nearest").bool()
    return images.where(visible, torch.as_tensor(value, dtype=images.dtype, device=images.device))


def replace_tokens(ids: Tensor, keep: Tensor, token_id: int) -> dict[str, Tensor]:
    """Put another token where a token doesn't stay.

    Args:
        ids: (N, T) token ids.
        keep: (N, T) bool, the tokens that stay.
        token_id: a pad or mask token.
    Returns:
        Keyword arguments of the model.
    """
    return {"input_ids": ids.where(keep, token_id)}


def mask_tokens(ids: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Hide tokens with the attention mask, positions unchanged.

    Args:
        ids: (N, T) token ids.
        keep: (N, T) bool, the tokens that stay.
    Returns:
        Keyword arguments of the model.
    """
    return {"input_ids": ids, "attention_mask": keep.long()}


def remove_tokens(ids: Tensor, keep: Tensor, pad_id: int = 0) -> dict[str, Tensor]:
    """Cut tokens out and close the gaps, padding on the left.

    The last remaining token stays the last one, so `logits[:, -1]` is the prediction for the shortened text.

    Args:
        ids: (N, T) token ids.
        keep: (N, T) bool, the tokens that stay.
        pad_id: what to fill up with, behind the attention mask.
    Returns:
        Keyword arguments of the model.
    Raises:
        ValueError: nothing would be left of a text.
    """
    if not keep.any(1).all():
        raise ValueError("nothing would be left of a text: mark at least one token as not removable")
    order = keep.long().argsort(dim=1, stable=True)
    kept = keep.gather(1, order).long()
    shifted = ids.gather(1, order).where(kept.bool(), pad_id)
    return {"input_ids": shifted, "attention_mask": kept, "position_ids": (kept.cumsum(1) - 1).clamp(min=0)}


# --- do two methods agree? --------------------------------------------------------------------------------------------


def kendall_correlation(scores: dict[str, Tensor]) -> Tensor:
    """Kendall's tau-b between the orders in which methods rank the tokens of a sample.

    Args:
        scores: method name -> (B, T) or (B, h, w).
    Returns:
        (B, M, M) for M methods, in [-1, 1]: share of pairs of tokens in the same order less share in the other, among
        the pairs that neither of the two ties; NaN for a method that ties all.
    Raises:
        ValueError: no scores, or scores of different shapes.
    """
    if not scores or len({values.shape for values in scores.values()}) > 1:
        shapes = {name: tuple(values.shape) for name, values in scores.items()}
        raise ValueError(f"need scores of several methods of one shape (B, T), got {shapes}")
    stacked = torch.stack([values.detach().flatten(1) for values in scores.values()], dim=1)
    first, second = torch.triu_indices(stacked.shape[2], stacked.shape[2], offset=1, device=stacked.device)

    def one_sample(ranked: Tensor) -> Tensor:
        order = (ranked[:, first] - ranked[:, second]).sign().double()
        untied = order.abs().sum(1)
        return order @ order.T / (untied[:, None] * untied).sqrt()

    return torch.stack([one_sample(ranked) for ranked in stacked]).float()
