"""Models of timm, made shallow, and which of them are one network but for their sizes.

timm registers a thousand names: of one file dozens of widths, depths and pictures. Two models of one class that is
given the same switches run the same code, so one of them tells of both.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

MOST_PARAMETERS = 250e6
TOO_LARGE = "million parameters"  # in what is said of those that have more
LARGEST_PICTURE, SMALLER_PICTURE = 512, 336  # 24 patches of 14; where it can be chosen
SHALLOW: list[dict[str, Any]] = [{}, {"depth": 2}, {"num_blocks": 2}, {"depths": (2, 2, 2, 2)}]
OF_WEIGHTS = ("pretrained_filter_fn", "pretrained_strict", "pretrained_cfg", "pretrained_cfg_overlay", "feature_cfg")
NARROW: list[dict[str, Any]] = [  # for those that are too large even so
    {"channel_multiplier": 0.25},
    {"layers": (1, 1, 1, 1, 1), "embed_dims": (32, 64, 128, 256, 512)},
    {"depths": (1, 1, 1, 1), "embed_dim": 128},
]


def smallest(name: str, **given: Any) -> nn.Module:
    """The model with the fewest layers that its function allows.

    Raises:
        ValueError: it is too large all the same.
    """
    import timm

    shapes = SHALLOW
    sizes = [size(name, **shape, **given) for shape in shapes]
    if min(sizes) > MOST_PARAMETERS and sizes[0] < torch.inf:
        shapes = [*SHALLOW, *NARROW]
        sizes += [size(name, **shape, **given) for shape in NARROW]
        if min(sizes) > MOST_PARAMETERS:
            raise ValueError(f"has {min(sizes) / 1e6:.0f} {TOO_LARGE}")
    return timm.create_model(name, **shapes[sizes.index(min(sizes))], **given)


@lru_cache
def size(name: str, **shape: Any) -> float:
    """How many parameters; infinite for what the model's function doesn't take."""
    import timm

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, **shape).parameters())
    except Exception:
        return torch.inf


def picture_of(name: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Channels, height and width of the pictures, and what the model is to be told of them."""
    import timm

    expected = timm.get_pretrained_cfg(name).input_size
    half = max(expected) // 2
    side = half if half % 32 == 0 else SMALLER_PICTURE  # the half of 768 is 24 patches of 16
    chosen = {"img_size": side}
    if max(expected) > LARGEST_PICTURE and size(name, **chosen) < torch.inf:
        return (3, side, side), chosen
    return expected, {}


def twins(names: Iterable[str]) -> dict[str, str]:
    """model -> an earlier one that is the same but for sizes: of the same class, which is given the same switches."""
    first: dict[str, str] = {}
    return {name: other for name in names if (other := first.setdefault(switches(name), name)) != name}


def switches(name: str) -> str:
    """What timm would build, without its sizes."""
    from timm.models._registry import model_entrypoint

    with not_built():
        try:
            model_entrypoint(name)(pretrained=False)
        except Asked as asked:
            given = {key: value for key, value in asked.given.items() if key not in OF_WEIGHTS}
            return f"{asked.model_class.__module__}.{asked.model_class.__qualname__} {without_sizes(given)}"
    return name  # its function builds in a way of its own


class Asked(Exception):
    """Which class was to be built, and what it was to be given."""

    def __init__(self, model_class: type, given: dict[str, Any]) -> None:
        super().__init__(model_class.__name__)
        self.model_class, self.given = model_class, given


@contextmanager
def not_built() -> Iterator[None]:
    """Inside, timm's functions raise what they would build."""

    def build_model_with_cfg(model_class: type, variant: str, pretrained: bool, **given: Any) -> None:
        raise Asked(model_class, given)

    name = build_model_with_cfg.__name__
    files = [
        file for module, file in list(sys.modules.items()) if module.startswith("timm.models.") and hasattr(file, name)
    ]
    theirs = [getattr(file, name) for file in files]
    try:
        for file in files:
            setattr(file, name, build_model_with_cfg)
        yield
    finally:
        for file, function in zip(files, theirs, strict=True):
            setattr(file, name, function)


def without_sizes(value: Any) -> str:
    """A switch or a name, or whether a number is none, one or more; of several, which kinds there are."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return re.sub(r"[0-9.]+", "#", value)
    if isinstance(value, int | float):
        return "none" if value == 0 else "one" if value == 1 else "some"
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__ + without_sizes(vars(value))
    if isinstance(value, dict):
        return str(sorted((str(key), without_sizes(part)) for key, part in value.items()))
    if isinstance(value, list | tuple):
        return str(sorted({without_sizes(part) for part in value}))
    if isinstance(value, partial):
        return value.func.__name__ + without_sizes(value.keywords)
    return getattr(value, "__name__", type(value).__name__)
