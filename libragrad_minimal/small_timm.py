"""Models of timm, made shallow, and which of them are one network but for their sizes.

timm registers a thousand names: of one file dozens of widths, depths and pictures. Two models of which the same modules
stand in the same places with the same switches run the same code, so one of them tells of both.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Any

import torch
from torch import nn

MOST_PARAMETERS = 250e6
LARGEST_PICTURE, SMALLER_PICTURE = 512, 336  # of patches of 14, 16 and what is made of them; where it can be chosen
SHALLOW: list[dict[str, Any]] = [{}, {"depth": 2}, {"num_blocks": 2}, {"depths": (2, 2, 2, 2)}]
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
            raise ValueError(f"has {min(sizes) / 1e6:.0f} million parameters")
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
    chosen = {"img_size": SMALLER_PICTURE}
    if max(expected) > LARGEST_PICTURE and size(name, **chosen) < torch.inf:
        return (3, SMALLER_PICTURE, SMALLER_PICTURE), chosen
    return expected, {}


def structure(model: nn.Module) -> str:
    """A name for which modules stand where, with which switches and parameters: all but sizes and repetitions."""
    parts = set()
    for name, module in model.named_modules():
        switches = {key: sign(value) for key, value in vars(module).items() if key[0] != "_"}
        named = (*module._parameters.items(), *module._buffers.items())
        own = sorted(key for key, tensor in named if tensor is not None)
        parts.add(f"{re.sub(r'[0-9]+', '#', name)} {type(module).__qualname__} {sorted(switches.items())} {own}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]


def sign(value: Any) -> str:
    """What is left of a setting without its size: a switch, a name, or whether a number is none, one or more."""
    if value is None or isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        return "none" if value == 0 else "one" if value == 1 else "some"
    return getattr(value, "__name__", type(value).__name__)
