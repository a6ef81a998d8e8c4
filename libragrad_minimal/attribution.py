"""`attribute`: any attribution method on one recording of an untouched model, with plain or balanced gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .added_constants import precise
from .engine import LIBRA, Rules
from .engine.checks import explained_errors
from .families import Inputs, check_inputs, explains_picture_for_texts, name_of
from .methods import METHODS, check_method, default_rules, reads_of
from .readout import check_target, checked_readout
from .recording import MAPS, Recording, Request, record, without_autocast
from .room import NoRoom, or_else
from .scores import second_scores
from .streams import find_streams, told

CALLER = 6  # the frame of a user of `attribute`, from a function that is called there; two are of torch._disable_dynamo
WARNED = 1e-3  # completeness error, relative to the output, of a method that promises completeness


@dataclass(frozen=True)
class Attribution:
    """What each token contributed to the output. For P prompts B is (B, P) throughout."""

    scores: Tensor  # (B, T), signed; patches only for pictures, every token for text (exactly 0 at padding)
    output: Tensor  # (B,) the explained number
    completeness_error: Tensor  # (B,) |output - all attributions|; NaN for methods whose attributions have no sum
    grid: tuple[int, ...] | None  # rows and columns of patches, of a video frames before them; None without a picture
    decoder_scores: Tensor | None = None  # (B, T') of a decoder's own tokens, where there is an encoder too
    picture: Tensor | None = None  # (B, patches): which scores are the picture's, where there are words too
    why_no_grid: str = "scores of text have no grid: use .scores"
    rules: Rules = LIBRA  # how gradients flowed back
    promises_completeness: bool = False  # is the error 0 but for rounding, by these rules and this method?

    @property
    def maps(self) -> Tensor:
        """The scores of pictures as maps (B, rows, columns), of videos (B, frames, rows, columns)."""
        if self.grid is None:
            raise ValueError(self.why_no_grid)
        scores = self.scores if self.picture is None else self.scores.gather(1, self.picture)
        return scores.unflatten(-1, self.grid)


def attribute(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    target: Any,
    method: str = "FullGrad+",
    rules: Rules | None = None,
    *,
    blocks: Iterable[str | nn.Module] | str | None = None,
    start: str | nn.Module | None = None,
    readout: Any = None,
    **options: Any,
) -> Attribution:
    """Explain `target` of an untouched model of timm, transformers, open_clip or your own, in eval mode.

    Tokens are those that enter the first block; what came before it (patch embedding, positions) belongs to the input.

    Args:
        model: any model whose answer passes through a list of blocks.
        inputs: pictures (B, 3, H, W), token ids (B, T), or keyword arguments of the model (a processor's output).
        target: class or token id (an int, or (B,) integers): its logit;
            or Probability(class), or Against(class, others): its probability, or how far it is ahead of others;
            or floating-point weights (classes,) or (B, classes): that combination of logits, e.g. logit a - logit b;
            for a tower without logits a direction (D,) or (B, D): the similarity of its embedding to it;
            or a function of the model's whole answer that returns (B,): of its logits (B, classes) or
            (B, tokens, classes), or of all that it returns where it has no logits;
            None where the model answers with one number a sample.
        method: a key of METHODS.
        rules: PLAIN, LIBRA, ATTN_LRP, ...: how gradients flow back. Default: LIBRA, but PLAIN for IG alone, whose
            completeness only holds for gradients of a function.
        blocks: the modules whose inputs are the tokens, or their names, or the name of their list. Default: the list
            of blocks that the whole answer passes through.
        start: a module before the first block, or its name, to take its input for the first tokens, such as CLIP's
            "norm_pre" or "visual.ln_pre". Default: the first block.
        readout: which row of an answer (B, rows, classes) is explained: a number, one for each sample, a boolean mask
            to average over, or "last", which is the default for models that generate text. For an answer a pixel,
            (B, classes, H, W): (row, column), or a mask. A function as target is given that row.
        **options: of the method, e.g. discard_ratio=0.9.
    Returns:
        An Attribution. Warns where a method that promises completeness misses the output by more than 0.1 %.
    Raises:
        ValueError: a model, input, target, method or option that doesn't fit; UnsupportedOperation as libra_grad;
            torch.OutOfMemoryError where there isn't enough memory, with what to do.
    """
    check_method(method, options)
    methods = {method: options}
    return attribute_many(model, inputs, target, methods, rules, blocks=blocks, start=start, readout=readout)[method]


@torch._disable_dynamo  # within a function that is compiled it runs as it is
def attribute_many(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    target: Any,
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]],
    rules: Rules | None = None,
    *,
    blocks: Iterable[str | nn.Module] | str | None = None,
    start: str | nn.Module | None = None,
    readout: Any = None,
) -> dict[str, Attribution]:
    """Several methods on one forward and one backward pass: `methods` are names, or names with options each.

    Those that average gradients need more; Integrated Gradients and all that are combined with them share theirs.
    LeGrad needs one more backward pass.

    The other arguments and errors are those of `attribute`.
    """
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise ValueError(f"methods must be names in a list, or a dict of names with options, got {methods!r}")
    named: list[tuple[Any, Any]] = [*methods.items()] if isinstance(methods, Mapping) else [(m, {}) for m in methods]
    for name, options in named:
        check_method(name, options)
    methods = dict(named)
    if rules is not None and not isinstance(rules, Rules):
        raise ValueError(f"rules must be LIBRA, PLAIN, another preset or Rules(...), got {rules!r}")
    check_inputs(model, inputs)
    check_target(target)
    readout = checked_readout(readout)
    asked = Inputs(inputs, about_picture=explains_picture_for_texts(model))
    names_by_rules: dict[Rules, list[str]] = {}
    for name in methods:
        names_by_rules.setdefault(default_rules(name) if rules is None else rules, []).append(name)
    results: dict[str, Attribution] = {}
    what = f"{', '.join(methods)} for {asked.samples} sample{'s' * (asked.samples > 1)} at once"
    fewer = "give fewer at once, shorter texts or smaller pictures, or a smaller model"
    with or_else(NoRoom(f"there isn't enough memory to compute {what}: {fewer}")):
        warn_of_ways_past(model, asked, blocks)
        for chosen, names in names_by_rules.items():
            reads = frozenset().union(*map(reads_of, names))
            run = record(Request(model, asked, target, chosen, blocks, readout, start, reads))
            for name in names:
                results[name] = attribution(run, name, methods[name])
    return {name: results[name] for name in methods}


def attribution(run: Recording, name: str, options: Mapping[str, Any]) -> Attribution:
    """One method's result, as users see it."""
    with torch.enable_grad(), without_autocast(run.output.device.type), explained_errors():
        result = METHODS[name](run, **options)
    output, layout = run.output.detach(), run.layout
    total = torch.full_like(output, torch.nan) if result.total is None else result.total.detach()
    error = (precise(output) - total).abs()
    promised = result.promised and complete(run.rules)
    if promised:
        warn_if_incomplete(name, error, output, result.tokens, run.rounding)
    warn_if_underflown(run)
    warn_if_padding_counts(run)
    scores = layout.pick(result.tokens.detach() * run.valid)
    second = None
    if run.second is not None and not reads_of(name) & {MAPS}:
        second = second_scores(run).detach()
    place = (layout.grid, second, layout.picture, layout.why_no_grid)
    return Attribution(scores, output, error, *place, rules=run.rules, promises_completeness=promised)


def warn_of_ways_past(model: nn.Module, inputs: Inputs, blocks: Any) -> None:
    """What comes to the answer by another way than the first tokens is told: past blocks that a user named, one tower
    of several perhaps, or to later blocks alone."""
    streams = find_streams(model, inputs, blocks)
    constant = "what comes that way counts as a constant that lies on no token"
    if streams.beside:
        where = f"{told(streams.beside)} reaches the answer of {name_of(model)} past the named blocks, too"
        warnings.warn(f"{where}; {constant}", stacklevel=CALLER)
    if streams.anew:
        where = f"{told(streams.anew)} enters later blocks of {name_of(model)} past the first one, too"
        warnings.warn(f"{where}; {constant}", stacklevel=CALLER)


def complete(rules: Rules) -> bool:
    """Whether every rule that completeness needs is on."""
    return rules.attention is True and rules.activation and rules.norm and bool(rules.product)


def warn_if_incomplete(name: str, error: Tensor, output: Tensor, scores: Tensor, rounding: float) -> None:
    """Scores that cancel leave rounding errors beside an output near zero; those aren't meant."""
    extent = torch.maximum(precise(output).abs(), 0.01 * scores.detach().flatten(1).abs().sum(1))
    off = error / extent.clamp(min=1e-30)
    if (off > max(WARNED, 10 * rounding)).any():
        worst = int(off.argmax())
        warnings.warn(
            f"{name} is not complete: the attributions of sample {worst} miss its output {float(output[worst]):.4g} by "
            f"{float(error[worst]):.2g}",
            stacklevel=CALLER + 1,
        )


def warn_if_underflown(run: Recording) -> None:
    """In float16 gradients go in steps of 2^-24; of those that are all smaller than 128 steps little is left."""
    found = vars(run).get("gradients")
    pairs = [] if found is None else zip(run.stream, found.tokens, strict=False)
    halves = [g for h, g in pairs if h.dtype == torch.float16]
    if any(g.abs().amax() < 128 * 2.0**-24 for g in halves):
        warnings.warn(
            "gradients at the tokens are too small for float16, which rounds them coarsely or to zero: "
            "run the model in bfloat16 or float32",
            stacklevel=CALLER + 1,
        )


def warn_if_padding_counts(run: Recording) -> None:
    """Padding is given no score, which is right where the answer doesn't depend on it."""
    found = vars(run).get("gradients")
    if found is None or run.valid.all() or found.tokens[0].shape[:2] != run.valid.shape:
        return
    size = found.tokens[0].abs().amax(-1)
    counts = (size > 1e-4 * size.amax()) & ~run.valid
    if counts.any():
        warnings.warn(
            f"the answer to sample {int(counts.any(1).int().argmax())} depends on its padding, whose share is left "
            "out: is it padded on the side on which the model reads its answer?",
            stacklevel=CALLER + 1,
        )
