"""Every attribution method on one recording of an untouched model, with plain or balanced gradients.

A method is a function of a `Recording` (B samples, N tokens, C channels, L blocks) that returns scores (B, N). One that
promises completeness returns (scores, total) with total (B,), which should equal the explained output. To add a method,
write the function, say with @reads what it needs beside the tokens and their gradients, and name it in METHODS.
"""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .added_constants import ConstantShare
from .engine import LIBRA, Rules
from .families import Inputs, check_inputs, explains_picture_for_texts
from .layout import coarsening
from .readout import check_readout, check_target
from .recording import (
    BETWEEN,
    CONSTANTS,
    LAYERS,
    MAP_GRADIENTS,
    MAPS,
    Gradients,
    Recording,
    Request,
    precise,
    record,
)

Scores = Tensor | tuple[Tensor, Tensor]
Method = Callable[..., Scores]
WARNED = 1e-3  # completeness error, relative to the output, of a method that promises completeness


@dataclass(frozen=True)
class Attribution:
    """What each token contributed to the output."""

    scores: Tensor  # (B, T), signed; patches only for pictures, every token for text (exactly 0 at padding)
    output: Tensor  # (B,) the explained number
    completeness_error: Tensor  # (B,) |output - all attributions|; NaN for methods that don't promise completeness
    grid: tuple[int, ...] | None  # rows and columns of patches, of a video frames before them; None without a picture
    decoder_scores: Tensor | None = None  # (B, T') of a decoder's own tokens, where there is an encoder too
    picture: Tensor | None = None  # (B, patches): which scores are the picture's, where there are words too
    why_no_grid: str = "scores of text have no grid: use .scores"

    @property
    def maps(self) -> Tensor:
        """The scores of pictures as maps (B, rows, columns), of videos (B, frames, rows, columns)."""
        if self.grid is None:
            raise ValueError(self.why_no_grid)
        scores = self.scores if self.picture is None else self.scores.gather(1, self.picture)
        return scores.unflatten(1, self.grid)


def attribute(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    target: Any,
    method: str = "FullGrad+",
    rules: Rules = LIBRA,
    *,
    blocks: Iterable[str | nn.Module] | str | None = None,
    readout: Any = None,
    **options: Any,
) -> Attribution:
    """Explain `target` of an untouched model of timm, transformers, open_clip or your own, in eval mode.

    Tokens are those that enter the first block; what came before it (patch embedding, positions) belongs to the input.

    Args:
        model: any model whose answer passes through a list of blocks.
        inputs: pictures (B, 3, H, W), token ids (B, T), or keyword arguments of the model (a processor's output).
        target: class or token id (an int, or (B,) integers): its logit;
            or floating-point weights (classes,) or (B, classes): that combination of logits, e.g. logit a - logit b;
            for a tower without logits a direction (D,) or (B, D): the similarity of its embedding to it;
            or a function of the model's whole answer that returns (B,): of its logits (B, classes) or
            (B, tokens, classes), or of all that it returns where it has no logits;
            None where the model answers with one number a sample.
        method: a key of METHODS.
        rules: PLAIN, LIBRA, ATTN_LRP, ...: how gradients flow back.
        blocks: the modules whose inputs are the tokens, or their names, or the name of their list. Default: the list
            of blocks that the whole answer passes through.
        readout: which row of an answer (B, rows, classes) is explained: a number, one for each sample, a boolean mask
            to average over, or "last", which is the default for models that generate text. For an answer a pixel,
            (B, classes, H, W): (row, column), or a mask. A function as target is given that row.
        **options: of the method, e.g. discard_ratio=0.9.
    Returns:
        An Attribution. Warns where a method that promises completeness misses the output by more than 0.1 %.
    Raises:
        ValueError: a model, input, target, method or option that doesn't fit; UnsupportedOperation as libra_grad.
    """
    return attribute_many(model, inputs, target, {method: options}, rules, blocks=blocks, readout=readout)[method]


def attribute_many(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    target: Any,
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]],
    rules: Rules = LIBRA,
    *,
    blocks: Iterable[str | nn.Module] | str | None = None,
    readout: Any = None,
) -> dict[str, Attribution]:
    """Several methods on one forward and one backward pass: `methods` are names, or names with options each.

    Those that average gradients need more; Integrated Gradients and all that are combined with them share theirs.

    The other arguments and errors are those of `attribute`.
    """
    methods = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    for name, options in methods.items():
        check_method(name, options)
    check_inputs(model, inputs)
    check_target(target)
    check_readout(readout)
    asked = Inputs(inputs, about_picture=explains_picture_for_texts(model))
    request = Request(model, asked, target, rules, blocks, readout, everything_read(methods))
    run = record(request)
    return {name: attribution(run, name, options) for name, options in methods.items()}


def attribution(run: Recording, name: str, options: Mapping[str, Any]) -> Attribution:
    """One method's result, as users see it."""
    with torch.enable_grad():
        result = METHODS[name](run, **options)
    output, layout = run.output.detach(), run.layout
    scores, total = result if isinstance(result, tuple) else (result, torch.full_like(output, torch.nan))
    error = (precise(output) - total.detach()).abs()
    if promises_completeness(run.rules) and not name.startswith("IG"):
        warn_if_incomplete(name, error, output, scores)
    scores = layout.pick(scores.detach() * run.valid)
    second = None
    if run.second is not None and not reads_of(name) & {MAPS}:
        second = second_scores(run).detach()
    return Attribution(scores, output, error, layout.grid, second, layout.picture, layout.why_no_grid)


def promises_completeness(rules: Rules) -> bool:
    return rules.attention is True and rules.activation and rules.norm and rules.product


def warn_if_incomplete(name: str, error: Tensor, output: Tensor, scores: Tensor) -> None:
    """Scores that cancel leave rounding errors beside an output near zero; those aren't meant."""
    extent = torch.maximum(precise(output).abs(), 0.01 * scores.detach().flatten(1).abs().sum(1))
    off = error / extent.clamp(min=1e-30)
    if (off > max(WARNED, 10 * torch.finfo(output.dtype).eps)).any():
        worst = int(off.argmax())
        warnings.warn(
            f"{name} is not complete: the attributions of sample {worst} miss its output {float(output[worst]):.4g} by "
            f"{float(error[worst]):.2g}",
            stacklevel=5,
        )


def check_method(method: str, options: Iterable[str]) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    known = list(inspect.signature(METHODS[method]).parameters)[1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")


# ---- what methods read -----------------------------------------------------------------------------------------------


def reads(*what: str) -> Callable[[Method], Method]:
    """Decorator of a method: what it needs of a recording beside the tokens and the first ones' gradient."""

    def mark(method: Method) -> Method:
        method.reads = frozenset(what)  # type: ignore[attr-defined]
        return method

    return mark


def reads_of(name: str) -> frozenset[str]:
    return getattr(METHODS[name], "reads", frozenset({LAYERS}))


def everything_read(methods: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*map(reads_of, methods))


# ---- input times gradient, and its sums over layers ------------------------------------------------------------------


def tokens_and_gradients(run: Recording, layer: int) -> tuple[Tensor, Tensor]:
    """Tokens entering a block and their gradients, both (B, N_layer, C) in at least single precision."""
    h, g = precise(run.tokens[layer]), run.gradients.tokens[layer]
    return (h * run.valid[..., None], g) if run.valid.shape == h.shape[:2] else (h, g)


def coarser(run: Recording, layer: int) -> int | None:
    """The k for which k x k cells of the picture are one token of this layer; None if no relation is known."""
    if run.tokens[layer].shape[:2] == run.valid.shape:
        return 1
    here, prefix = run.axes[layer].sizes(run.stream[layer]), run.prefixes[layer]
    if prefix is None or run.layout.grid is None:
        return None
    return coarsening(run.layout.grid, here if prefix == 0 else (here[0] - prefix,))


def spread(scores: Tensor, run: Recording, layer: int) -> Tensor:
    """Scores of one layer's tokens (B, N_layer) on the tokens of the first, (B, N): a coarse one shares evenly."""
    if scores.shape == run.valid.shape:
        return scores
    k = coarser(run, layer)
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


def input_times_gradient(run: Recording, layer: int) -> Tensor:
    h, g = tokens_and_gradients(run, layer)
    return spread((h * g).sum(-1), run, layer)


def second_scores(run: Recording) -> Tensor:
    """Input x gradient at the tokens of a second stream, a decoder's: (B, N')."""
    assert run.second is not None and run.gradients.second is not None
    return (precise(run.second_axes.arrange(run.second.detach())) * run.gradients.second).sum(-1)


def checked_layer(layer: int, count: int) -> int:
    """The number of a layer that may be counted from the end."""
    if not -count <= layer < count:
        raise ValueError(f"there is no layer {layer}: they are numbered 0..{count - 1}, or -{count}..-1 from the end")
    return layer % count


def whole_layer(run: Recording, layer: int) -> int:
    number = checked_layer(layer, len(run.stream))
    if not run.whole[number]:
        raise ValueError(
            f"the tokens at block {number} aren't all of the stream, something leads past them: use layer=0"
        )
    return number


@reads()
def ixg(run: Recording) -> Scores:
    """Input x gradient at the tokens; complete on its own only where a model adds no constants."""
    alone = not run.constants and run.second is None
    scores = input_times_gradient(run, 0)
    return (scores, scores.sum(1)) if alone else scores


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
    return scores, total


@reads(LAYERS, CONSTANTS)
def fullgrad_plus(run: Recording) -> Scores:
    """FullGrad+ (Mehri et al. 2025): input x gradient of every block plus all constants.

    For pictures the completeness error is that of the FullGrad it extends. For text it is the mean over blocks of each
    block's FullGrad, so that the scores themselves, with what can't be placed, add up to the logit.
    """
    layers = range(len(run.stream) - 1)
    if run.is_text:
        every = [fullgrad(run, layer) for layer in layers if run.whole[layer] and coarser(run, layer) is not None]
        scores, total = (torch.stack(part).mean(0) for part in zip(*every, strict=True))
        return scores, total
    first, total = fullgrad(run)
    return first + sum(input_times_gradient(run, layer) for layer in layers[1:]), total


# ---- class activation maps -------------------------------------------------------------------------------------------


@reads(LAYERS)
def hirescam(run: Recording, layer: int = -1) -> Scores:
    """Input x gradient at one late block, the last by default (Draelos & Carin 2020)."""
    return input_times_gradient(run, checked_layer(layer, len(run.stream) - 1))


@reads(LAYERS)
def gradcam_plus(run: Recording) -> Scores:
    """GradCAM summed over blocks: channels weighted by their mean gradient."""

    def one_block(layer):
        h, g = tokens_and_gradients(run, layer)
        return spread((h * mean_over_tokens(run, g)).sum(-1), run, layer)

    return sum(map(one_block, range(len(run.stream) - 1)))


@reads(LAYERS)
def xgradcam_plus(run: Recording) -> Scores:
    """XGradCAM summed over blocks: channels weighted by their share of the attribution."""

    def one_block(layer):
        h, g = tokens_and_gradients(run, layer)
        weight = (h * g).sum(1, keepdim=True) / h.abs().sum(1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
        return spread((h * weight).sum(-1), run, layer)

    return sum(map(one_block, range(len(run.stream) - 1)))


def mean_over_tokens(run: Recording, values: Tensor) -> Tensor:
    """(B, N, C) -> (B, 1, C), padding left out."""
    if run.valid.shape != values.shape[:2]:
        return values.mean(1, keepdim=True)
    return (values * run.valid[..., None]).sum(1, keepdim=True) / run.valid.sum(1)[:, None, None]


# ---- attention -------------------------------------------------------------------------------------------------------


def received(run: Recording, maps: Tensor) -> Tensor:
    """Maps (B, H, N, N) -> (B, N): mean over heads and queries, what each key received."""
    return mean_over_tokens(run, maps.mean(1))[:, 0]


def read_row(run: Recording, matrix: Tensor) -> Tensor:
    """The row of (B, N, N) that the output is read from: class or last token's, or the mean row."""
    return torch.einsum("bq,bqk->bk", run.reading, matrix)


def identity(run: Recording) -> Tensor:
    return torch.eye(run.valid.shape[1], device=run.output.device).expand(len(run.output), -1, -1)


@reads(MAPS)
def raw_attention(run: Recording) -> Scores:
    """The last block's attention map, mean over heads, read where the output is read."""
    return read_row(run, run.attention[-1].mean(1))


FUSIONS = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}


def roll_out(run: Recording, fused: Iterable[Tensor], discard_ratio: float) -> Tensor:
    """Product over blocks of (A + I)/2 with rows that sum to 1, lowest entries of A (B, N, N) dropped."""
    if not 0 <= discard_ratio < 1:
        raise ValueError(f"discard_ratio must lie in [0, 1), got {discard_ratio}")
    result = identity(run)
    for maps in fused:
        mixed = (discard_lowest(run, maps, discard_ratio) + identity(run)) / 2
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return read_row(run, result)


def discard_lowest(run: Recording, maps: Tensor, share: float) -> Tensor:
    """Zero the lowest share of the entries of each map (B, N, N), never the class token's own."""
    lowest = maps.flatten(1).topk(int(share * maps[0].numel()), dim=1, largest=False).indices
    kept = torch.ones_like(maps, dtype=torch.bool).flatten(1).scatter(1, lowest, False).view_as(maps)
    own = torch.diag_embed(run.reading == 1)
    return maps.where(kept | own, torch.zeros_like(maps))


@reads(MAPS)
def rollout(run: Recording, head_fusion: str = "mean", discard_ratio: float = 0.0) -> Scores:
    """Attention Rollout (Abnar & Zuidema 2020), with vit-explain's head_fusion (mean, max, min) and discard_ratio."""
    if head_fusion not in FUSIONS:
        raise ValueError(f"unknown head_fusion {head_fusion!r}; there are {', '.join(FUSIONS)}")
    return roll_out(run, map(FUSIONS[head_fusion], run.attention), discard_ratio)


@reads(MAPS, MAP_GRADIENTS)
def gradient_rollout(run: Recording, discard_ratio: float = 0.0) -> Scores:
    """Rollout of attention times its gradient, positive parts only (as vit-explain, without its defects)."""
    return roll_out(run, positive_products(run), discard_ratio)


def positive_products(run: Recording) -> list[Tensor]:
    """L maps (B, N, N): attention times its gradient, negative parts cut, mean over heads."""
    maps = run.attention
    return [(a * g).relu().mean(1) for a, g in zip(maps, run.gradients.attention, strict=True)]


@reads(MAPS, MAP_GRADIENTS)
def genatt(run: Recording) -> Scores:
    """Generic attention explainability (Chefer et al. 2021)."""
    relevance = identity(run)
    for product in positive_products(run):
        relevance = relevance + product @ relevance
    return read_row(run, relevance)


@reads(LAYERS, MAPS)
def attcat(run: Recording) -> Scores:
    """AttCAT (Qiang et al. 2022): attention received in a block times input x gradient of the next."""

    def one_block(layer):
        return received(run, run.attention[layer]) * input_times_gradient(run, layer + 1)

    return sum(map(one_block, range(len(run.attention))))


@reads(MAPS, MAP_GRADIENTS, BETWEEN)
def tokentm(run: Recording) -> Scores:
    """Token transformation matters (Wu et al. 2024)."""
    attention, middle = run.attention, [h for h in run.after_attention if h is not None]
    if len(middle) < len(attention):
        raise ValueError(
            "TokenTM needs a residual stream between attention and MLP, and these blocks run them side by side"
        )
    relevance = torch.diag_embed(precise(run.tokens[0]).norm(dim=-1))
    for layer, (a, g) in enumerate(zip(attention, run.gradients.attention, strict=True)):
        before, after = change(run, run.tokens[layer], middle[layer]), change(run, middle[layer], run.tokens[layer + 1])
        relevance = relevance + a.mean(1) * before[:, None] * g.relu().mean(1) @ relevance
        relevance = relevance + after[..., None] * relevance
    return read_row(run, relevance)


def change(run: Recording, old: Tensor, new: Tensor) -> Tensor:
    """How much each token changed, (B, N): ratio of lengths times softmax over tokens of the cosine."""
    old, new = precise(old.detach()), precise(new.detach())
    cosine = torch.cosine_similarity(old, new, dim=-1).masked_fill(~run.valid, -torch.inf)
    return new.norm(dim=-1) / old.norm(dim=-1) * cosine.softmax(1)


@reads(MAPS, MAP_GRADIENTS)
def legrad(run: Recording) -> Scores:
    """LeGrad (Bousselham et al. 2024): each block's output, read by the model's head, explained by its attention.

    All blocks' outputs go through the head at once, in one more forward pass in which every block begins a graph of its
    own: one backward pass then stops at each block's own map.
    """
    blocks = len(run.attention)  # a model without maps, or with windows, is refused here
    apart = run.rerun(apart=blocks)
    return torch.stack([received(run, gradient.relu()) for gradient in apart.gradients.attention]).sum(0)


# ---- gradients averaged over many inputs -----------------------------------------------------------------------------


def mean_gradients(run: Recording, starts: Sequence[Callable[[Tensor], Tensor]]) -> Gradients:
    """The mean of the gradients of runs that start from other tokens."""
    if not starts:
        raise ValueError("gradients are averaged over at least one step or sample, got 0")
    each = (run.rerun(start=start).gradients for start in tqdm(starts, "gradients", disable=None, leave=False))
    return scaled(reduce(added, each), 1 / len(starts))


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


def scaled(gradients: Gradients, weight: float) -> Gradients:
    shares = (
        (share.layer, None if share.placed is None else weight * share.placed, weight * share.total)
        for share in gradients.constants
    )
    return Gradients(
        [weight * g for g in gradients.tokens],
        [ConstantShare(*share) for share in shares],
        [weight * g for g in gradients.attention],
        None if gradients.second is None else weight * gradients.second,
    )


def with_gradients(run: Recording, gradients: Gradients) -> Recording:
    """The same recording, its gradients replaced."""
    other = copy(run)
    other.gradients = gradients
    return other


def along_path(run: Recording, steps: int) -> Recording:
    """The same recording, its gradients averaged along the straight path from zero tokens (midpoint rule)."""
    if steps not in run.path_gradients:
        starts = [partial(torch.mul, other=(step + 0.5) / steps) for step in range(steps)]
        run.path_gradients[steps] = mean_gradients(run, starts)
    return with_gradients(run, run.path_gradients[steps])


def integrated(method: Callable[..., Scores]) -> Callable[..., Scores]:
    """The method with the gradients of Integrated Gradients. Several such methods of one recording share them."""

    def with_path_gradients(run: Recording, steps: int = 50) -> Scores:
        result = method(along_path(run, steps))
        return result[0] if isinstance(result, tuple) else result

    with_path_gradients.reads = method.reads  # type: ignore[attr-defined]
    return with_path_gradients


@reads()
def integrated_gradients(run: Recording, steps: int = 50) -> Scores:
    """Integrated Gradients from zero tokens (Sundararajan et al. 2017); complete up to the output at zero."""
    scores = input_times_gradient(along_path(run, steps), 0)
    return scores, scores.sum(1) + run.rerun(start=torch.zeros_like).output


@reads()
def smoothgrad(run: Recording, samples: int = 25, noise: float = 0.1, seed: int = 0) -> Scores:
    """Input x gradient, the gradient averaged over noisy tokens (Smilkov et al. 2017).

    noise is a share of the range of a sample's token values. All samples of a batch meet the same noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noisy(h: Tensor) -> Tensor:
        extent = (h.flatten(1).amax(1) - h.flatten(1).amin(1)).view(-1, *[1] * (h.dim() - 1))
        return h + noise * extent * torch.randn(h.shape[1:], generator=generator).to(h)

    return input_times_gradient(with_gradients(run, mean_gradients(run, [noisy] * samples)), 0)


@reads()
def random_scores(run: Recording, seed: int = 0) -> Scores:
    """Noise, as a floor for every metric. It depends on the sample, not on its place in a batch."""

    def one_sample(h: Tensor) -> Tensor:
        fingerprint = zlib.crc32(h.detach().float().cpu().numpy().tobytes(), seed)
        return torch.randn(run.valid.shape[1], generator=torch.Generator().manual_seed(fingerprint))

    return torch.stack([one_sample(h) for h in run.tokens[0]]).to(run.output.device)


METHODS: dict[str, Callable[..., Scores]] = {
    "IxG": ixg,
    "FullGrad": fullgrad,
    "FullGrad+": fullgrad_plus,
    "HiResCAM": hirescam,
    "GradCAM+": gradcam_plus,
    "XGradCAM+": xgradcam_plus,
    "AttCAT": attcat,
    "GenAtt": genatt,
    "TokenTM": tokentm,
    "RawAtt": raw_attention,
    "Attention Rollout": rollout,
    "Gradient Attention Rollout": gradient_rollout,
    "LeGrad": legrad,
    "IG": integrated_gradients,
    "SmoothGrad": smoothgrad,
    "Random": random_scores,
}
COMPOSED_WITH_IG = [
    *"FullGrad FullGrad+ HiResCAM GradCAM+ XGradCAM+ AttCAT GenAtt TokenTM".split(),
    "Gradient Attention Rollout",
]
METHODS |= {f"IG {name}": integrated(METHODS[name]) for name in COMPOSED_WITH_IG}
