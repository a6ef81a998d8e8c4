"""What the command line explains, for a person: classes, phrases and next words, as pictures and strips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .attribution import Attribution, attribute
from .engine import Rules
from .families import check_inputs
from .methods import NAMED_RULES
from .models import CUT, LoadedModel, seen_picture, token_texts
from .plots import LOOK, Look, Strip, heatmaps
from .prompts import attribute_prompts
from .sentences import check_text


def attribute_classes(
    loaded: LoadedModel, pixels: Tensor, targets: list[int], method: str, rules: Rules | None, **options: Any
) -> Attribution:
    """Each class of one picture (3, H, W), as one sample each."""
    images = pixels.expand(len(targets), -1, -1, -1)
    return attribute(loaded.model, images, torch.tensor(targets), method, rules, **options)


def attribute_phrases(
    loaded: LoadedModel, pixels: Tensor, prompts: Sequence[str], method: str, rules: Rules | None
) -> Attribution:
    """Each prompt on one picture (3, H, W), as one sample each."""
    result = attribute_prompts(loaded, pixels[None], prompts, method, rules, progress=False)
    scores, output, error = (part[0] for part in (result.scores, result.output, result.completeness_error))
    return replace(result, scores=scores, output=output, completeness_error=error)


def attribute_text(
    loaded: LoadedModel,
    prompt: str,
    target: str | None = None,
    against: str | None = None,
    method: str = "FullGrad+",
    rules: Rules | None = None,
) -> tuple[Strip, Attribution, int]:
    """Why this next word (by default the model's own), and not that one? Also the id of the word's first token.

    Raises:
        ValueError: no text, or one that is longer than the model's positions; before the model runs.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    check_text(prompt, "the prompt")
    tokens = loaded.tokenizer(prompt, return_tensors="pt", verbose=False).to(loaded.model.device)
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    check_inputs(loaded.model, inputs)
    if target is None:
        with torch.no_grad():
            chosen = loaded.model(**inputs, logits_to_keep=1).logits[0, -1].argmax().item()
    else:
        chosen = find_token(loaded, target)
    title = f"why {written(loaded, chosen, target)}"
    explained = chosen
    if against is not None:
        other = find_token(loaded, against)
        if other == chosen:
            raise ValueError(f"the target and {against!r}, what it is compared with, begin with the same token")
        title += f" and not {written(loaded, other, against)}"

        def explained(logits):
            return logits[:, chosen] - logits[:, other]

    result = attribute(loaded.model, inputs, explained, method, rules, readout="last")
    number = f"logit {'difference ' if against else ''}{result.output[0]:.2f}"
    title += f" ({method}, {rules_name(result.rules)}; {number})"
    texts = token_texts(loaded.tokenizer, inputs["input_ids"][0])
    return Strip(texts, result.scores[0].tolist(), title), result, chosen


def find_token(loaded: LoadedModel, word: str) -> int:
    """The token that begins `word` within a text."""
    check_text(word, f"the word {word!r}")
    for text in (" " + word.lstrip(), word):
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids and ids[0] != loaded.tokenizer.unk_token_id and loaded.tokenizer.decode([ids[0]]).strip():
            return ids[0]
    raise ValueError(f"{loaded.name} has no token for {word!r}")


def written(loaded: LoadedModel, token: int, word: str | None) -> str:
    """A token in quotation marks; of one that is only part of a character, the word that it begins."""
    if word and CUT in loaded.tokenizer.decode([token]):
        return f"the first bytes of {word!r}"
    return repr(token_texts(loaded.tokenizer, [token])[0])


def rules_name(rules: Rules) -> str:
    return next(name for name, known in NAMED_RULES.items() if known == rules)


def class_name(loaded: LoadedModel, target: int) -> str:
    return loaded.class_names[target].split(",")[0] if loaded.class_names else f"class {target}"


def picture_figure(
    loaded: LoadedModel, pixels: Tensor, result: Attribution, titles: Sequence[str], look: Look = LOOK
) -> Figure:
    """The picture as the model sees it, and one panel a target."""
    maps = {
        f"{title} ({i + 1})" if titles.count(title) > 1 else title: result.maps[i : i + 1].numpy()
        for i, title in enumerate(titles)
    }
    return heatmaps([seen_picture(loaded, pixels)], maps, size=2.4, look=look)


def crop_box(transform: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture that a model sees.

    Args:
        transform: a LoadedModel's: torchvision's steps, or the demo models' own, which cut a square at the middle.
        size: (width, height) of the picture.
    Returns:
        (left, top, right, bottom) in the picture's pixels; NaN behind a step that isn't known.
    """
    steps = getattr(transform, "transforms", None)
    left, top, right, bottom = 0.0, 0.0, float(size[0]), float(size[1])
    if steps is None:
        left, top = (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
        return left, top, left + min(size), top + min(size)
    now = Image.new("L", size)  # what is left of the picture, in the pixels of the moment
    for step in steps:
        name = type(step).__name__
        if name == "CenterCrop":
            kept = step(now)
            x, y = (right - left) / now.width, (bottom - top) / now.height
            cut = round((now.width - kept.width) / 2), round((now.height - kept.height) / 2)
            left, top = left + cut[0] * x, top + cut[1] * y
            right, bottom, now = left + kept.width * x, top + kept.height * y, kept
        elif name == "Resize":
            now = step(now)
        elif "Tensor" in name:
            break
        elif "convert" not in name.lower():
            return (float("nan"),) * 4
    return left, top, right, bottom
