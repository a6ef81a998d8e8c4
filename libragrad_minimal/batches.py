"""What a benchmark measures, and one batch of it: examples opened, explained and measured, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from .attribution import Attribution, attribute_many
from .dropping import drop_tokens, dropping
from .engine import PLAIN, UnsupportedOperation
from .examples import PHRASES, Example, classes_of
from .methods import METHODS, NAMED_RULES, default_rules, uses_gradients
from .metrics import (
    AUTHORS_PROTOCOL,
    Deletion,
    deletion,
    f1,
    iou,
    mask_tokens,
    mass_inside,
    occlude_patches,
    pointing_game,
    segmentation_ap,
    target_class,
)
from .models import LoadedModel
from .prompts import encode_prompts
from .sentences import check_text, shown
from .targets import Against, Probability

METRICS = ("completeness", "deletion", "segmentation")
PROTOCOLS = ("drop", "paint")  # of pictures; tokens of a text are hidden by its attention mask
TARGETS = ("predicted", "true", "second")
EXPLAINED = ("logit", "probability", "ahead")  # ahead: the logits with the weights e_c - p
MAPS = {
    "AP": segmentation_ap,
    "pointing game": pointing_game,
    "mass inside": mass_inside,
    "IoU": iou,
    "F1": f1,
}


@dataclass(frozen=True)
class Settings:
    """All that decides what is measured; two runs with equal settings give equal tables."""

    model: str
    data: str
    methods: tuple[str, ...] = ("IxG", "FullGrad+", "AttCAT", "GenAtt", "LeGrad", "Attention Rollout", "Random")
    rules: tuple[str, ...] = ("plain", "libra")
    metrics: tuple[str, ...] = ()  # none: all that the data allow
    protocols: tuple[str, ...] = PROTOCOLS
    target: str = "predicted"
    explain: str = "logit"  # of the class: its logit, its probability, or how far it is ahead of the others
    count: int | None = None  # only so many examples, spread evenly over the data set
    batch: int = 8
    threads: int | None = None  # of a process on a CPU, each on pictures of its own, so that no digit depends on them
    seed: int = 0

    def runs(self) -> dict[str, list[str]]:
        """Rules -> methods. Those that use no gradients, or are meant for plain ones only (IG), run once, plain."""
        once = [name for name in self.methods if not uses_gradients(name) or default_rules(name) == PLAIN]
        runs = {rules: [name for name in self.methods if name not in once] for rules in self.rules}
        runs["plain"] = [name for name in self.methods if name in once or name in runs.get("plain", [])]
        return {rules: methods for rules, methods in runs.items() if methods}

    def for_data(self, examples: Sequence[Example]) -> Settings:
        """These settings with the metrics told: without a mask of each example, no segmentation."""
        if self.metrics:
            return self
        masked = all(example.mask is not None for example in examples)
        return replace(self, metrics=tuple(name for name in METRICS if masked or name != "segmentation"))

    def check(self) -> None:
        for what, chosen, known in (
            ("method", self.methods, METHODS),
            ("set of rules", self.rules, NAMED_RULES),
            ("metric", self.metrics or METRICS, METRICS),
            ("protocol", self.protocols, PROTOCOLS),
            ("target", [self.target], TARGETS),
            ("quantity to explain", [self.explain], EXPLAINED),
        ):
            unknown = [name for name in chosen if name not in known]
            if unknown or not chosen:
                raise ValueError(f"unknown {what} {', '.join(unknown) or '(none given)'}; there are {', '.join(known)}")
        if min(self.batch, *(1 if number is None else number for number in (self.threads, self.count))) < 1:
            raise ValueError("batch, threads and count must be at least 1")
        check_text(self.model, "the model's name")
        check_text(self.data, "the name of the data")


# ---- the model, the examples -----------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model, and what stands for its classes if it is a picture-text pair."""

    loaded: LoadedModel
    texts: Tensor | None  # (classes, D)

    @cached_property
    def answer_without(self) -> Callable[[Any], Tensor]:
        """Logits of pictures some of whose patches' tokens are dropped."""
        return dropping(self.loaded.model, self.answer)

    @property
    def is_text(self) -> bool:
        return self.loaded.kind == "llama"

    def answer(self, inputs: Any) -> Tensor:
        """Logits (B, classes) of pictures, of the ids of texts or of a language model's keyword arguments."""
        model = self.loaded.model
        if self.is_text:
            return model(**(inputs if isinstance(inputs, Mapping) else {"input_ids": inputs})).logits[:, -1]
        if self.texts is not None:
            return model.encode_image(inputs, normalize=True) @ self.texts.T
        return model(inputs)

    def target(self, classes: Tensor, explain: str = "logit") -> Any:
        """What `attribute` is asked to explain for these classes (B,)."""
        if self.texts is not None:
            return self.texts[classes]
        return {"logit": classes, "probability": Probability(classes), "ahead": Against(classes, others=None)}[explain]

    def scores(self, result: Attribution) -> Tensor:
        return result.scores if self.is_text else result.maps


@torch.no_grad()
def subject(loaded: LoadedModel) -> Subject:
    """A pair's classes are its embeddings of "a photo of a ...", or of the phrases that the demo knows."""
    if loaded.kind != "clip":
        return Subject(loaded, None)
    names = classes_of(loaded).names
    phrases = names if names is PHRASES else [f"a photo of a {name.split(', ')[0]}." for name in names]
    return Subject(loaded, encode_prompts(loaded, list(phrases)))


@dataclass
class Batch:
    """Examples that could be opened, as the model takes them."""

    names: list[str]
    inputs: Tensor  # pictures (B, 3, H, W), or the ids (1, T) of one text
    labels: Tensor | None  # (B,) the right class, of several the one with the highest logit
    masks: Tensor | None  # (B, H, W) bool
    logits: Tensor  # (B, classes)

    def explained(self, target: str) -> Tensor:
        """The classes (B,) that are explained."""
        return target_class(self.logits, target, self.labels)


def opened(of: Subject, examples: Sequence[Example], settings: Settings) -> tuple[Batch | None, dict[str, str]]:
    """The examples that open, and why the others don't: what is missing, damaged or odd is left out and told."""
    masked = "segmentation" in settings.metrics
    found: list[tuple[Example, Tensor, Tensor | None]] = []
    reasons = {}
    for example in examples:
        try:
            opened_one = tokens(of.loaded, example) if of.is_text else pixels(of.loaded, example, masked)
            found.append((example, *opened_one))
        except (OSError, ValueError, SyntaxError) as error:
            reasons[example.name] = " ".join(str(error).split())
    if not found:
        return None, reasons
    device = next(of.loaded.model.parameters()).device
    inputs = torch.stack([given for _, given, _ in found]).to(device)
    masks = [mask for _, _, mask in found if mask is not None]
    with torch.no_grad():
        logits = of.answer(inputs)
    labels = None
    if all(example.labels for example, _, _ in found):
        rows = zip(found, logits, strict=True)
        labels = torch.tensor([max(example.labels, key=row.tolist().__getitem__) for (example, _, _), row in rows])
    names = [example.name for example, _, _ in found]
    return Batch(names, inputs, labels, torch.stack(masks).to(device) if masks else None, logits), reasons


def pixels(loaded: LoadedModel, example: Example, masked: bool) -> tuple[Tensor, Tensor | None]:
    """A picture (3, H, W) as the model sees it, and its object's mask (H, W) cut in the same way."""
    assert example.picture is not None
    picture = example.picture()
    seen = loaded.transform(picture)
    if not masked or example.mask is None:
        return seen, None
    mask = example.mask()
    if mask.shape != (picture.height, picture.width):
        raise ValueError(
            f"its mask has {mask.shape[1]} x {mask.shape[0]} pixels, the picture {picture.width} x {picture.height}"
        )
    black, white, drawn = (
        loaded.transform(Image.fromarray(255 * values.astype(np.uint8)).convert("RGB"))
        for values in (np.zeros_like(mask), np.ones_like(mask), mask)
    )
    inside = (drawn - black)[0] > (white - black)[0] / 2
    if not inside.any():
        raise ValueError("the model's cut leaves nothing of the object")
    return seen, inside


def tokens(loaded: LoadedModel, example: Example) -> tuple[Tensor, None]:
    """The ids (T,) of a text."""
    ids = loaded.tokenizer(example.text, return_tensors="pt")["input_ids"][0]
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if len(ids) < 3:
        raise ValueError(f"{len(ids)} tokens; at least 3 are needed, since the first and the last always stay")
    if longest is not None and len(ids) > longest:
        raise ValueError(f"{len(ids)} tokens, and the model has {longest} positions")
    return ids, None


# ---- what is measured ------------------------------------------------------------------------------------------------

EMPTY = {"method": "", "rules": "", "protocol": "", "value": float("nan"), "explained class": -1, "note": ""}
Run = tuple[str, str]  # method and rules; no rules where a method uses no gradients


def measured(of: Subject, examples: Sequence[Example], settings: Settings) -> pd.DataFrame:
    """A row for each example, method, rules and metric; and one for each example that was skipped.

    Texts are of different lengths, so each is a batch of its own.
    """
    groups = [[example] for example in examples] if of.is_text else [list(examples)]
    rows = [row for group in groups for row in rows_of(of, group, settings)]
    return pd.DataFrame([EMPTY | row for row in rows]).astype({"value": "float32", "explained class": int})


def rows_of_skipped(reasons: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"example": name, "metric": "skipped", "note": shown(f"{name}: {reason}")} for name, reason in reasons.items()
    ]


def rows_of(of: Subject, examples: Sequence[Example], settings: Settings) -> list[dict[str, Any]]:
    batch, reasons = opened(of, examples, settings)
    rows = rows_of_skipped(reasons)
    if batch is None:
        return rows
    classes = batch.explained(settings.target)
    results = explained(of, batch, classes, settings)
    odd = not_finite(batch, results)
    if odd:
        rest = [example for example in examples if example.name not in odd | reasons]
        return rows + rows_of_skipped(odd) + (rows_of(of, rest, settings) if rest else [])
    return rows + [
        {"example": name, "method": method, "rules": rules, "protocol": protocol, "metric": metric}
        | {"value": value, "explained class": chosen}
        for (method, rules), protocol, metric, values in values_of(of, batch, classes, results, settings)
        for name, value, chosen in zip(batch.names, values.tolist(), classes.tolist(), strict=True)
        if value == value  # methods without a sum have no completeness error
    ]


def explained(of: Subject, batch: Batch, classes: Tensor, settings: Settings) -> dict[Run, Attribution]:
    """Every method's attribution, on one forward and one backward pass for each set of rules."""
    results: dict[Run, Attribution] = {}
    for rules, methods in settings.runs().items():
        asked = of.loaded.model, batch.inputs, of.target(classes, settings.explain), methods, NAMED_RULES[rules]
        for method, result in attribute_many(*asked).items():
            results[method, rules if uses_gradients(method) else ""] = result
    return results


def not_finite(batch: Batch, results: Mapping[Run, Attribution]) -> dict[str, str]:
    """Examples for which a method's scores aren't finite, and which method's."""
    return {
        name: f"the scores of {method} aren't finite"
        for (method, _), result in results.items()
        for name, scores in zip(batch.names, result.scores, strict=True)
        if not scores.isfinite().all()
    }


def values_of(
    of: Subject, batch: Batch, classes: Tensor, results: Mapping[Run, Attribution], settings: Settings
) -> Iterator[tuple[Run, str, str, Tensor]]:
    """Run, protocol, metric, and one number for each example (B,)."""
    for run, result in results.items():
        if "completeness" in settings.metrics:
            yield run, "", "output", result.output
            yield run, "", "completeness error", result.completeness_error
        if "segmentation" in settings.metrics and batch.masks is not None:
            for metric, measure in MAPS.items():
                yield run, "", metric, measure(result.maps, batch.masks)
    if "deletion" in settings.metrics:
        scores = {run: of.scores(result) for run, result in results.items()}
        for deleted in deletions(of, batch, classes, scores, settings):
            for run, curves in deleted.items():
                for metric, values in curves.summary().items():
                    yield run, curves.protocol, metric, values


def deletions(
    of: Subject, batch: Batch, classes: Tensor, scores: dict[Any, Tensor], settings: Settings
) -> Iterator[dict[Any, Deletion]]:
    """Both protocols take 10, 20 ... 90 % of the tokens away (Mehri et al. 2025, section 4)."""
    target = "second" if settings.target == "second" else classes
    options = {"target": target, "labels": batch.labels, "workers": settings.threads or 1} | AUTHORS_PROTOCOL
    if of.is_text:
        removable = torch.ones_like(batch.inputs, dtype=torch.bool)
        removable[:, [0, -1]] = False
        yield deletion(of.answer, batch.inputs, scores, mask_tokens, removable=removable, **options)
    elif "drop" in settings.protocols:
        yield deletion(of.answer_without, batch.inputs, scores, drop_tokens, **options)
    if not of.is_text and "paint" in settings.protocols:
        yield deletion(of.answer, batch.inputs, scores, occlude_patches, **options)


def check_methods(of: Subject, examples: Sequence[Example], settings: Settings) -> None:
    """Try every method on the first example that opens, so that what this model can't have is known before work.

    Raises:
        ValueError: it can't have a method, or the data lack what a metric or the target needs.
    """
    name = of.loaded.name
    if "segmentation" in settings.metrics and any(example.mask is None for example in examples):
        raise ValueError(f"{settings.data} has no masks: leave the metric segmentation out, --metrics deletion")
    if settings.target == "true" and not all(example.labels for example in examples):
        raise ValueError(f"{settings.data} has no labels of {name}'s classes: take --target predicted")
    if settings.explain != "logit" and of.texts is not None:
        raise ValueError(
            f"{name} answers with similarities, of which there are no probabilities: take --explain logit, the default"
        )
    for example in examples:
        batch, reasons = opened(of, [example], settings)
        if batch is not None:
            break
    else:
        raise ValueError(f"none of the {len(examples)} examples of {settings.data} can be opened; {reasons}")
    target = of.target(batch.explained(settings.target), settings.explain)
    for rules, methods in settings.runs().items():
        for method in methods:
            try:
                result = attribute_many(of.loaded.model, batch.inputs, target, [method], NAMED_RULES[rules])[method]
                of.scores(result)
            except (ValueError, UnsupportedOperation) as error:
                raise ValueError(f"{name} can't have {method}: {error}") from error
