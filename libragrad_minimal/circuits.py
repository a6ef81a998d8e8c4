"""Activation patching, and its estimate by one gradient: which parts of a model carry an answer.

Two prompts of equal length, *clean* and *corrupt*, differ in the words that decide the answer. Patching runs the model
on the clean one while one part, at one position, behaves as on the corrupt one, and notes how much the answer changes:
one forward pass for each part. Attribution patching estimates all of these changes at once, from one backward pass:
(corrupt activation - clean activation) x gradient (Nanda 2023; Syed et al. 2023; Kramar et al. 2024, "AtP*"). Balanced
gradients make better estimates for MLPs and the stream, and hardly better ones for attention (Jafari et al. 2025,
"RelP", who edit the model for it; measured here by data/circuits.py). No estimate sees what a part does to where
attention looks, if that attention is saturated.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .added_constants import precise
from .beginnings import Memory, memory_of
from .block_tokens import standing_in, token_place, with_tokens
from .engine import LIBRA, Rules, libra_grad
from .families import TOKEN_IDS, Inputs, call, check_inputs, explains_picture_for_texts, name_of
from .parts import Found, Place, find_places, visiting
from .readout import chosen_rows, explained, kept_rows
from .recording import Request, record
from .streams import in_this_thread, removed

Metric = Callable[[Tensor], Tensor]
TOKENS_AT_ONCE = 2048  # of all copies of a prompt that run side by side; bounds the memory
WORTH_A_RUN = 256  # tokens: fewer take hardly less time
SAME = 1e-3  # how far the answers to one prompt, alone and beside others, may lie apart; half precision rounds more


@dataclass(frozen=True)
class Effects:
    """How much the answer to the clean prompt changes if one part behaves as on the corrupt prompt."""

    effect: Tensor  # (layers, positions), for heads and neurons (layers, positions, heads | neurons); see `patching`
    clean: float  # the metric on the clean prompt
    corrupt: float  # and on the corrupt one
    sites: str

    def strongest(self, count: int) -> list[tuple[int, ...]]:
        """The parts with the largest effects of either sign, as indices into `effect`; never those not asked for."""
        size = self.effect.abs().nan_to_num(nan=-1)
        order = size.flatten().argsort(descending=True, stable=True)[: min(count, int((size >= 0).sum()))]
        return [tuple(int(i) for i in index) for index in torch.stack(torch.unravel_index(order, size.shape), dim=1)]


def patching(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    sites: str = "mlp",
    only: Tensor | None = None,
) -> Effects:
    """True activation patching: one run of the model for every part and position, many of them side by side.

    Args:
        model: a decoder, or a model of pictures or texts, whose blocks all work on the same tokens, in eval mode.
        clean, corrupt: one prompt each, equally long, as a tokenizer returns them (return_tensors="pt"); or two
            pictures (1, 3, H, W).
        metric: what is asked: a function of the last position's logits (..., vocabulary) -> (...), for example
            lambda logits: logits[..., paris] - logits[..., rome]; of a classifier, of its logits (..., classes).
        sites: which parts. "attention", "mlp": what each block's attention or MLP adds to the stream. "residual": the
            stream that enters each block. "heads": what each attention head hands to the output projection.
            "neurons": what the MLP's last matrix is given, one by one.
        only: a boolean mask of the shape of `effect`: the parts to patch, if not all; such as those that
            `attribution_patching` finds strong.
    Returns:
        Effects, whose `.effect` is the metric with that part patched, minus the metric on the clean prompt, in the
        metric's own unit. NaN where `only` didn't ask; 0 where both prompts' activations are exactly the same.
    Raises:
        ValueError: prompts of unequal length, a model in which the parts can't be found, a metric of another shape.
    """
    pair = Pair(model, clean, corrupt, metric)
    site = pair.site(sites)
    asked = site.differs if only is None else site.differs & checked_mask(only, site)
    effect = torch.zeros(asked.shape)
    if only is not None:
        effect[~only.reshape(asked.shape).cpu()] = torch.nan
    with tqdm(total=int(asked.sum()), desc=f"patching {sites}", leave=False, disable=None) as bar:
        for layer in asked.flatten(1).any(1).nonzero().flatten().tolist():
            for some in in_runs(asked[layer].nonzero(), asked.shape[1], pair.memory is not None):
                mask = torch.zeros(len(some), *asked.shape[1:], dtype=torch.bool)
                mask[torch.arange(len(some)), some[:, 0], some[:, 1]] = True
                change = pair.answers([(site, {layer: mask})], len(some)) - pair.clean
                effect[layer, some[:, 0], some[:, 1]] = change.float()
                bar.update(len(some))
    return effects(effect, pair.clean, pair.corrupt, sites)


def attribution_patching(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    sites: str = "mlp",
    rules: Rules = LIBRA,
) -> Effects:
    """The estimate of `patching` by one backward pass: (corrupt activation - clean activation) x gradient.

    Args:
        model, clean, corrupt, metric, sites: as for `patching`. A metric linear in the logits keeps balanced gradients
            what they are meant to be.
        rules: how the gradient flows back: LIBRA, or PLAIN for attribution patching as Nanda 2023 has it, ATTN_LRP for
            rules as in RelP (Jafari et al. 2025).
    Returns:
        Effects, as `patching` does.
    Raises:
        ValueError: as `patching`; UnsupportedOperation as libra_grad.
    """
    pair = Pair(model, clean, corrupt, metric)
    places = pair.find(sites).places
    tensors: list[Tensor] = []

    def note(layer: int, tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor.clone()  # which the model may change in place

    # the stream that enters the blocks is on record anyway
    with visiting({} if sites == "residual" else dict(enumerate(places)), note):
        run = record(pair.request(rules), copies=True)
    tensors = tensors or run.stream[:-1]
    gradients = libra_grad(run.output, [run.stream[0], *tensors], rules, allow_unused=True)[1:]
    corrupt_answer, others = pair.values(pair.other, places)
    effect = []
    for place, tensor, other, gradient in zip(places, tensors, others, gradients, strict=True):
        slope = torch.zeros_like(tensor) if gradient is None else gradient
        here, slope = (precise(pair.by_group(one, 1, place)[0]) for one in (tensor.detach(), slope))
        effect.append(((precise(other) - here) * slope).sum(-1).cpu())
    return effects(torch.stack(effect).float(), float(run.output.detach()), corrupt_answer, sites)


def patch_together(model: nn.Module, clean: Any, corrupt: Any, metric: Metric, parts: Mapping[str, Tensor]) -> Tensor:
    """The metric on the clean prompt while all marked parts behave as on the corrupt one: is a circuit the whole of it?

    Args:
        model, clean, corrupt, metric: as for `patching`.
        parts: for each of some sites a boolean mask (K, layers, positions) or (K, layers, positions, heads | neurons):
            K sets of parts, such as {"heads": ..., "mlp": ...}. What is marked in several sites is patched in all.
    Returns:
        (K,), one number for each set.
    Raises:
        ValueError: as `patching`, or masks of another shape.
    """
    pair = Pair(model, clean, corrupt, metric)
    sites = {name: pair.site(name) for name in parts}
    masks = {name: torch.stack([checked_mask(one, sites[name]) for one in mask]) for name, mask in parts.items()}
    if len({len(mask) for mask in masks.values()}) != 1:
        raise ValueError(f"the masks of {', '.join(parts) or 'no sites'} must hold equally many sets of parts")
    number = len(next(iter(masks.values())))
    answers = []
    for some in torch.arange(number).split(max(1, TOKENS_AT_ONCE // next(iter(sites.values())).differs.shape[1])):
        chosen = [
            (sites[name], {layer: mask[some, layer] for layer in range(mask.shape[1]) if mask[some, layer].any()})
            for name, mask in masks.items()
        ]
        answers.append(pair.answers(chosen, len(some)))
    return torch.cat(answers).float()


def checked_mask(mask: Tensor, site: Site) -> Tensor:
    """(layers, positions, groups), of a mask of the shape that users see."""
    shape = effect_shape(site.differs, site.name)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"a mask of {site.name} is a boolean tensor {tuple(shape)}, got {found}")
    return mask.cpu().reshape(site.differs.shape)


# ---- two prompts, and what the model makes of them -------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """The same part of every block: where it is, and its values on both prompts, (positions, groups, channels)."""

    name: str
    places: tuple[Place, ...]
    clean: list[Tensor]
    corrupt: list[Tensor]

    @cached_property
    def differs(self) -> Tensor:
        """(layers, positions, groups): where there is anything to patch."""
        pairs = zip(self.clean, self.corrupt, strict=True)
        return torch.stack([(clean != corrupt).any(-1).cpu() for clean, corrupt in pairs])


def effects(by_group: Tensor, clean: float, corrupt: float, sites: str) -> Effects:
    return Effects(by_group.reshape(effect_shape(by_group, sites)), clean, corrupt, sites)


def effect_shape(by_group: Tensor, sites: str) -> torch.Size:
    """What users see of (layers, positions, groups): no groups where there is one by nature."""
    return by_group.shape if sites in ("heads", "neurons") else by_group.shape[:2]


class Pair:
    """A model and two prompts, of which it may run the clean one many times side by side."""

    def __init__(self, model: nn.Module, clean: Any, corrupt: Any, metric: Metric):
        check_inputs(model, clean)
        check_inputs(model, corrupt)
        check_alike(clean, corrupt)
        self.model, self.metric = model, metric
        self.inputs, self.other = Inputs(clean, explains_picture_for_texts(model)), Inputs(corrupt)
        self.returned: list[Any] = []  # by each block, on the clean prompt; empty if blocks can't be left out
        self.memory: Memory | None = None  # of the clean prompt; None if its beginning can't be left out

    def request(self, rules: Rules = LIBRA) -> Request:
        return Request(self.model, self.inputs, self.measured, rules, readout="last")

    def measured(self, logits: Tensor) -> Tensor:
        result = self.metric(logits)
        if not isinstance(result, Tensor) or result.shape != logits.shape[:-1]:
            found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"metric must make one number of each row of logits {tuple(logits.shape)}, and returned {found}: write "
                "for example lambda logits: logits[..., right] - logits[..., wrong]"
            )
        return result

    def find(self, sites: str) -> Found:
        found = find_places(self.request(), sites)
        self.blocks, self.axes = found.blocks, found.axes
        return found

    def site(self, sites: str) -> Site:
        """With its values on both prompts, checked: a run beside others answers as it does alone."""
        found = self.find(sites)
        self.memory = None
        with noted_results(found.blocks) as self.returned:
            self.clean, clean = self.values(self.inputs, found.places)
        self.corrupt, corrupt = self.values(self.other, found.places)
        site = Site(sites, found.places, clean, corrupt)
        if not self.repeats(site):
            self.returned = []
            if not self.repeats(site):
                raise ValueError(
                    f"{name_of(self.model)} answers otherwise to a prompt that runs beside another one: its samples "
                    "mix, and parts can't be patched side by side"
                )
        self.memory = self.checked_memory(site)
        return site

    def values(self, inputs: Inputs, places: Sequence[Place]) -> tuple[float, list[Tensor]]:
        """The metric, and what is at each place."""
        found: list[Tensor] = []

        def note(layer: int, tensor: Tensor) -> Tensor:
            found.append(self.by_group(tensor.clone(), 1, places[layer])[0])
            return tensor

        with visiting(dict(enumerate(places)), note):
            answer = self.run(inputs)
        return float(answer), found

    def run(self, inputs: Inputs) -> Tensor:
        """(rows,) the metric."""
        rows = chosen_rows(self.model, inputs, self.metric, "last")
        kept, rows = kept_rows(self.model, inputs, rows)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            answer = call(self.model, inputs, kept)
            return explained(self.model, answer, self.measured, "last", rows, inputs.samples).cpu().double()

    def answers(self, chosen: Sequence[tuple[Site, Mapping[int, Tensor]]], rows: int) -> Tensor:
        """(rows,) the metric on the clean prompt, patched where masks (rows, positions, groups) of layers say so.
        Blocks before the first of these layers, and tokens before the first of the positions, are left out."""
        layers = [layer for _, masks in chosen for layer in masks]
        unchanged = self.returned[: min(layers, default=0)]
        inputs, start = side_by_side(self.inputs, rows), 0
        if self.memory is not None:
            marked = [mask.any(0).any(-1) for _, masks in chosen for mask in masks.values()]
            start = min((int(mask.int().argmax()) for mask in marked), default=0)
            inputs = self.memory.rest(self.inputs, start, rows)
        with contextlib.ExitStack() as stack:
            for site, masks in chosen:
                places = {layer: site.places[layer] for layer in masks}
                stack.enter_context(visiting(places, partial(self.patched, site, masks)))
            results = [self.repeated(result, rows, start) for result in unchanged]
            stack.enter_context(standing_in(self.blocks[: len(results)], results, graph=False))
            return self.run(inputs)

    def patched(self, site: Site, masks: Mapping[int, Tensor], layer: int, tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        values = self.by_group(changed, len(masks[layer]), site.places[layer])
        rest = values.shape[1]  # of the positions, if a beginning was left out
        mask = masks[layer][:, -rest:, :, None].to(values.device)
        values.copy_(torch.where(mask, site.corrupt[layer][-rest:], values))
        return changed

    def by_group(self, tensor: Tensor, rows: int, place: Place) -> Tensor:
        """(rows, positions, groups, channels), a view."""
        by_row = tensor.unflatten(0, (rows, -1)) if tensor.dim() == 2 else self.axes.arrange(tensor)
        return by_row.unflatten(-1, (place.groups, -1))

    def repeated(self, result: Any, rows: int, start: int) -> Any:
        """What a block returned for the clean prompt from a token on, for many of them."""
        tokens = result if isinstance(result, Tensor) else result[token_place(result)]
        if start:
            tokens = tokens.narrow(self.axes.tokens[0], start, tokens.shape[self.axes.tokens[0]] - start)
        many = tokens.repeat_interleave(rows, dim=self.axes.batch)
        return many if isinstance(result, Tensor) else with_tokens(result, many)

    def repeats(self, site: Site) -> bool:
        """Does an unpatched row answer as the prompt alone, beside a patched one, with most blocks left out?"""
        last = len(site.places) - 1
        mask = torch.zeros(2, *site.differs.shape[1:], dtype=torch.bool)
        mask[1] = True
        try:
            answer = float(self.answers([(site, {last: mask})], 2)[0])
        except ValueError:
            if self.returned:  # blocks that take more from those before them than their tokens
                return False
            raise
        return math.isclose(answer, self.clean, rel_tol=SAME, abs_tol=SAME)

    def checked_memory(self, site: Site) -> Memory | None:
        """Of the clean prompt: if its first half is the same whatever follows, and runs that leave it out answer as
        those that don't, patched or not."""
        half = site.differs.shape[1] // 2
        try:
            memory = memory_of(self.model, self.inputs)
            if memory is None or self.inputs.tensors[TOKEN_IDS].shape[1] != site.differs.shape[1]:
                return None
            _, alone = self.values(Inputs({TOKEN_IDS: self.inputs.tensors[TOKEN_IDS][:, :half]}), site.places)
            if (alone[-1] - site.clean[-1][:half]).norm() > SAME * alone[-1].norm():
                return None
            mask = torch.zeros(2, *site.differs.shape[1:], dtype=torch.bool)
            mask[1, half:] = True
            whole = self.answers([(site, {0: mask})], 2)
            self.memory = memory
            rest = self.answers([(site, {0: mask})], 2)
        except ValueError:  # a model that can't remember, or not half of this text; a memory that can't be cut
            return None
        finally:
            self.memory = None
        return memory if torch.allclose(rest, whole, rtol=SAME, atol=SAME) else None


def in_runs(parts: Tensor, positions: int, beginnings: bool) -> Iterator[Tensor]:
    """Parts of a layer (N, 2), position and group, cut into those that run side by side. What lies before all parts of
    a run is left out where `beginnings` can be: so each has parts that lie near each other."""
    near = max(1, positions // 8, WORTH_A_RUN // positions) if beginnings else positions
    for eighth in (parts[:, 0] // near).unique():
        some = parts[parts[:, 0] // near == eighth]
        length = positions - int(some[0, 0]) if beginnings else positions
        yield from some.split(max(1, TOKENS_AT_ONCE // length))


def check_alike(clean: Any, corrupt: Any) -> None:
    """Raises ValueError unless both are one sample, and every part of one has a counterpart in the other."""
    one, other = Inputs(clean), Inputs(corrupt)
    for name, inputs in (("clean", one), ("corrupt", other)):
        if any(len(tensor) != 1 for tensor in inputs.tensors.values()):
            raise ValueError(
                f"{name} holds {inputs.samples} samples: give one prompt or picture, and call once for each pair"
            )
    if one.words is not None and other.words is not None and one.words.shape[1] != other.words.shape[1]:
        raise ValueError(
            f"clean has {one.words.shape[1]} tokens and corrupt {other.words.shape[1]}, and a part is patched at the "
            "same position of both: rewrite one, for example with a name of as many tokens, until they are equally long"
        )
    if one.shapes() != other.shapes():
        raise ValueError(
            f"clean is {described(one)} and corrupt is {described(other)}: give inputs of the same names and shapes"
        )
    if one.mask is not None and other.mask is not None and not torch.equal(one.mask, other.mask):
        raise ValueError("the attention masks of clean and corrupt differ: pad neither, or both in the same places")


def described(inputs: Inputs) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}".strip() for name, tensor in inputs.tensors.items())


def side_by_side(inputs: Inputs, rows: int) -> Inputs:
    for name, tensor in inputs.tensors.items():
        inputs = inputs.replaced(name, tensor.expand(rows, *tensor.shape[1:]))
    return inputs


@contextlib.contextmanager
def noted_results(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Inside, what each block returns is noted; nothing where that isn't tokens alone, or a block runs twice."""
    results: list[Any] = []

    def note(block, args, result):
        results.append(result)

    with removed(block.register_forward_hook(in_this_thread(note)) for block in set(blocks)):
        yield results
    if len(set(blocks)) < len(blocks) or not all(map(is_tokens_alone, results)):
        results.clear()


def is_tokens_alone(result: Any) -> bool:
    if isinstance(result, Tensor):
        return True
    return type(result) is tuple and sum(part is not None for part in result) == 1 and token_place(result) is not None
