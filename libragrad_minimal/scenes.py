"""GlyphScenes: small pictures with one to three objects whose pixels are known exactly.

The objects are glyphs of DejaVu Sans, the font that every matplotlib ships, so nothing is downloaded. Everything
follows from the seed. Seeds below `TRAINING_SEED` belong to evaluation; the demo models never saw those scenes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_fill_holes, label

GLYPHS = {
    "mouse": "\U0001f42d",
    "cow": "\U0001f42e",
    "cat": "\U0001f431",
    "monkey": "\U0001f435",
    "snowman": "\u2603",
    "umbrella": "\u2602",
    "sun": "\u2600",
    "star": "\u2605",
    "heart": "\u2665",
    "knight": "\u265e",
    "plane": "\u2708",
    "telephone": "\u260e",
}
CLASSES = tuple(GLYPHS)
COLOURS = {
    "red": (225, 45, 45),
    "yellow": (245, 215, 40),
    "green": (50, 185, 70),
    "blue": (60, 110, 245),
    "purple": (175, 70, 205),
    "white": (245, 245, 245),
}
TRAINING_SEED = 1_000_000

SMALLEST_AND_LARGEST = {
    1: (0.45, 0.75),
    2: (0.42, 0.58),
    3: (0.34, 0.44),
}  # an object's longer side / the picture's side
ANGLES = range(-30, 31, 5)  # degrees; a knight lying on its side would be no knight to most eyes


@dataclass
class Scene:
    """A picture and what is in it; object i is `CLASSES[classes[i]]`, and mask i holds its visible pixels."""

    image: np.ndarray  # (H, W, 3) uint8
    masks: np.ndarray  # (n, H, W) bool
    classes: np.ndarray  # (n,) int, into CLASSES
    colours: np.ndarray  # (n,) int, into tuple(COLOURS)


def draw_scene(
    seed: int,
    objects: int | None = None,
    size: int = 64,
    classes: Sequence[str] | None = None,
    colours: Sequence[str] | None = None,
) -> Scene:
    """Draw the scene of this seed: objects of different classes on a smooth, noisy background.

    Where objects overlap (rare, except with three) the later one lies on top, and the masks say so.

    Args:
        seed: decides everything that is left to chance.
        objects: 1 to 3; default: as many as are named, else 1.
        size: of the square picture, in pixels.
        classes: the objects' names in `CLASSES`; default: drawn.
        colours: the objects' names in `COLOURS`; default: drawn.
    Returns:
        The picture with a mask, a class and a colour for each object.
    Raises:
        ValueError: an unknown class or colour, or a number of objects that doesn't fit.
    """
    named = classes or colours
    objects = objects or (len(named) if named else 1)
    if objects not in SMALLEST_AND_LARGEST:
        raise ValueError(f"a scene holds 1, 2 or 3 objects, not {objects}")
    rng = np.random.default_rng(seed)
    class_indices = _choose(rng.permutation(len(CLASSES))[:objects], classes, CLASSES, "class")
    colour_indices = _choose(rng.integers(len(COLOURS), size=objects), colours, tuple(COLOURS), "colour")

    image = _background(rng, size)
    masks = np.zeros((objects, size, size), dtype=bool)
    smallest, largest = SMALLEST_AND_LARGEST[objects]
    for i in range(objects):
        length = int(rng.integers(round(smallest * size), round(largest * size) + 1))
        ink, silhouette = _glyph(CLASSES[class_indices[i]], length, int(rng.choice(ANGLES)))
        top, left = _free_place(rng, silhouette.shape, np.any(masks[:i], axis=0))
        window = np.s_[top : top + silhouette.shape[0], left : left + silhouette.shape[1]]
        colour = np.array(tuple(COLOURS.values())[colour_indices[i]], dtype=np.float32)
        painted = colour * (
            0.25 + 0.75 * ink[..., None]
        )  # what a glyph leaves open, eyes say, is a dark shade of its colour
        image[window] += silhouette[..., None] * (painted - image[window])
        visible = silhouette >= 0.5
        masks[(slice(i), *window)] &= ~visible
        masks[(i, *window)] = visible
    return Scene(np.clip(image, 0, 255).astype(np.uint8), masks, class_indices, colour_indices)


def caption(scene: Scene) -> str:
    """The scene in words.

    Args:
        scene: one to three objects.
    Returns:
        "a red heart", "a red heart and a blue cat", or "a red heart, a blue cat and a white star".
    """
    pairs = zip(scene.classes, scene.colours, strict=True)
    names = [f"a {tuple(COLOURS)[colour]} {CLASSES[kind]}" for kind, colour in pairs]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _choose(drawn: np.ndarray, wanted: Sequence[str] | None, names: tuple[str, ...], what: str) -> np.ndarray:
    if wanted is None:
        return drawn
    if isinstance(wanted, str) or len(wanted) != len(drawn):
        raise ValueError(f"{len(drawn)} objects need a list of {len(drawn)} {what} names, got {wanted!r}")
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(f"unknown {what} {unknown[0]!r}; there are {', '.join(names)}")
    return np.array([names.index(name) for name in wanted])


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float32: a few large soft patches of low contrast, plus fine grain."""
    spread = _smooth_upsampling(size)
    patches = rng.uniform(50, 130) + rng.normal(0, 16, (3, 4, 4))
    grain = rng.standard_normal((size, size, 1), dtype=np.float32) * 8
    return (spread @ patches @ spread.T).transpose(1, 2, 0).astype(np.float32) + grain


@cache
def _smooth_upsampling(size: int) -> np.ndarray:
    """(size, 4): a matrix that interpolates 4 values linearly to `size`."""
    position = np.linspace(0, 3, size)[:, None]
    return np.maximum(0, 1 - np.abs(position - np.arange(4)))


def _free_place(rng: np.random.Generator, shape: tuple[int, int], taken: np.ndarray) -> tuple[int, int]:
    """The top left corner, of ten drawn, whose window covers the fewest taken pixels."""
    height, width = shape
    room = np.array(taken.shape) - np.array(shape)
    places = rng.integers(0, room + 1, size=(10, 2))
    covered = [taken[top : top + height, left : left + width].sum() for top, left in places]
    top, left = places[int(np.argmin(covered))]
    return top, left


@cache
def _glyph(name: str, length: int, angle: int) -> tuple[np.ndarray, np.ndarray]:
    """Ink and silhouette in [0, 1], cut to the object, longer side `length` pixels, turned by `angle` degrees."""
    layers = _turned_glyph(name, angle)
    scale = length / max(layers[0].size)
    target = [max(1, round(side * scale)) for side in layers[0].size]
    ink, silhouette = (np.asarray(layer.resize(target, Image.Resampling.BOX), np.float32) / 255 for layer in layers)
    return ink, silhouette


@cache
def _turned_glyph(name: str, angle: int) -> tuple[Image.Image, Image.Image]:
    ink, silhouette = (layer.rotate(angle, Image.Resampling.BICUBIC) for layer in _upright_glyph(name))
    box = silhouette.getbbox()
    return ink.crop(box), silhouette.crop(box)


@cache
def _upright_glyph(name: str, side: int = 256) -> tuple[Image.Image, Image.Image]:
    """A large glyph's ink, and its silhouette (holes filled); specks like the snow around the snowman are left out."""
    font_file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    canvas = Image.new("L", (side, side))
    middle, font = (side // 2, side // 2), ImageFont.truetype(str(font_file), side // 2)
    ImageDraw.Draw(canvas).text(middle, GLYPHS[name], fill=255, font=font, anchor="mm")
    part, _ = label(binary_fill_holes(np.asarray(canvas) > 127))
    sizes = np.bincount(part.ravel())[1:]
    inside = np.isin(part, 1 + np.flatnonzero(sizes >= 0.05 * sizes.max()))
    ink = np.where(binary_dilation(inside), np.asarray(canvas), 0)
    silhouette = np.where(inside, 255, ink)
    return Image.fromarray(ink.astype(np.uint8)), Image.fromarray(silhouette.astype(np.uint8))
