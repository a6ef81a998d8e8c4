"""Collages of real photographs that are installed with scikit-image: objects of several classes at known places."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from skimage import data

PHOTOGRAPHS = ("cat", "coffee", "motorcycle", "cameraman")
_SOURCES = {"cat": "chelsea", "coffee": "coffee", "motorcycle": "stereo_motorcycle", "cameraman": "camera"}


@dataclass
class Collage:
    """Photographs side by side; each fills one cell, so cell and mask say where its class can be."""

    image: Image.Image  # (size, size) RGB
    masks: np.ndarray  # (n, size, size) bool, one cell each
    names: tuple[str, ...]  # into PHOTOGRAPHS, left to right


@cache
def photograph(name: str) -> Image.Image:
    """A photograph that scikit-image ships.

    Args:
        name: one of `PHOTOGRAPHS`.
    Returns:
        The whole picture, RGB.
    Raises:
        ValueError: another name.
    """
    if name not in _SOURCES:
        raise ValueError(f"unknown photograph {name!r}; there are {', '.join(PHOTOGRAPHS)}")
    loaded = getattr(data, _SOURCES[name])()
    left_eye = loaded[0] if isinstance(loaded, tuple) else loaded  # the motorcycle comes as a stereo pair
    return Image.fromarray(left_eye).convert("RGB")


def draw_collage(seed: int, names: Sequence[str] | None = None, size: int = 224) -> Collage:
    """Photographs side by side, each cut a little differently and perhaps mirrored.

    Args:
        seed: decides everything that is left to chance.
        names: of `PHOTOGRAPHS`, left to right; default: two drawn ones.
        size: of the square collage, in pixels.
    Returns:
        The collage with a mask for each photograph.
    Raises:
        ValueError: a name that isn't in `PHOTOGRAPHS`.
    """
    rng = np.random.default_rng(seed)
    chosen = tuple(names or rng.permutation(PHOTOGRAPHS)[:2].tolist())
    edges = np.linspace(0, size, len(chosen) + 1).astype(int)
    image = Image.new("RGB", (size, size))
    masks = np.zeros((len(chosen), size, size), dtype=bool)
    for mask, name, left, right in zip(masks, chosen, edges, edges[1:], strict=False):
        image.paste(_cut(photograph(name), right - left, size, rng), (left, 0))
        mask[:, left:right] = True
    return Collage(image, masks, chosen)


def _cut(picture: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A piece from about the middle of the picture, (width, height) pixels."""
    cut_height = picture.height * rng.uniform(0.85, 1)
    cut_width = cut_height * width / height
    left = (picture.width - cut_width) * rng.uniform(0.35, 0.65)
    top = (picture.height - cut_height) * rng.uniform()
    piece = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + cut_width, top + cut_height))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece
