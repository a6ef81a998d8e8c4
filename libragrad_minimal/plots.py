"""Pictures of attributions: token strips for text, heatmaps for pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from textwrap import fill
from typing import Any
from unicodedata import category

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image

# --- token strips -----------------------------------------------------------------------------------------------------

POSITIVE, NEGATIVE = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermilion and blue: told apart by colour-blind eyes
STRONGEST = 0.7  # opacity of the highest score; the text stays readable, dark on light pages and light on dark ones
VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of reading


@dataclass
class Strip:
    """One text with a score for every token: orange speaks for the output, blue against it."""

    tokens: Sequence[str]  # as they stand in the text, with their spaces
    scores: Sequence[float]  # one per token; a tensor (T,) will do
    title: str = ""
    muted: Collection[int] = field(default=())  # positions shown in grey, without a score: role tokens, padding

    def __post_init__(self):
        self.scores = [float(score) for score in self.scores]
        if len(self.tokens) != len(self.scores):
            counts = f"{len(self.tokens)} tokens but {len(self.scores)} scores"
            raise ValueError(f"{counts}: a strip needs one score per token")

    def opacities(self) -> list[float]:
        """Signed strength of every token's colour.

        Returns:
            score / largest |score|, in [-1, 1]; 0 for muted tokens and NaN scores.
        """
        kept = [0.0 if place in self.muted or score != score else score for place, score in enumerate(self.scores)]
        largest = max(map(abs, kept), default=0.0) or 1.0
        return [score / largest for score in kept]


class TokenStrips:
    """Strips one below the other, as HTML that any notebook shows: hover over a token for its score."""

    def __init__(self, *strips: Strip):
        self.strips = strips

    def __repr__(self) -> str:
        return f"TokenStrips of {len(self.strips)} texts"

    def _repr_html_(self) -> str:
        rows = "".join(_strip_html(strip) for strip in self.strips)
        return f'<div style="line-height:2.1;font-size:15px">{rows}</div>'

    def figure(self, width: float = 9.0) -> Figure:
        """The same as a matplotlib figure, for print.

        Args:
            width: in inches; the height follows from the texts.
        """
        return _strips_figure(self.strips, width)


def visible(token: str) -> str:
    """A token with its spaces, tabs and line breaks made visible, and what has no shape but an effect."""
    return shown("".join(VISIBLE.get(character, character) for character in token))


def shown(text: str) -> str:
    """A text with its control characters written out, [U+202E]: some turn what follows around, so that it lies."""
    return "".join(f"[U+{ord(c):04X}]" if c in TURNING or category(c) == "Cc" else c for c in text)


def _strip_html(strip: Strip) -> str:
    title = f'<div style="line-height:1.3;opacity:.75;font-size:13px">{escape(shown(strip.title))}</div>'
    places = zip(strip.tokens, strip.scores, strip.opacities(), range(len(strip.tokens)), strict=True)
    spans = "".join(_token_html(token, score, opacity, place in strip.muted) for token, score, opacity, place in places)
    return f'<div style="margin:.4em 0">{title if strip.title else ""}{spans}</div>'


def _token_html(token: str, score: float, opacity: float, muted: bool) -> str:
    red, green, blue = POSITIVE if opacity >= 0 else NEGATIVE
    shape = (
        "display:inline-block;max-width:100%;overflow-wrap:anywhere;padding:0 .1em;margin:0 1px;"
        "line-height:1.45;border-radius:3px;font-family:monospace;"
    )
    if muted:
        look, hover = "opacity:.4", "not scored"
    else:  # against: dotted line, so that the sign survives a black-and-white printer
        line = ";border-bottom:2px dotted currentColor" if opacity < -0.1 else ""
        look, hover = f"background:rgba({red},{green},{blue},{STRONGEST * abs(opacity):.2f}){line}", f"{score:+.3g}"
    line_break = "<br>" if token.endswith("\n") else ""
    return f'<span title="{hover}" style="{shape}{look}">{escape(visible(token))}</span>{line_break}'


def _strips_figure(strips: Sequence[Strip], width: float) -> Figure:
    size, font = 10, FontProperties(family="DejaVu Sans Mono")  # shipped with matplotlib
    drawable = get_font(findfont(font)).get_charmap()
    column, line = 0.64 * size / 72, 2.0 * size / 72  # inches: DejaVu Sans Mono is 0.602 em wide, rounded up to pixels
    placed: list[tuple[float, float, str, float | None, bool]] = []
    row, columns = 0.0, int((width - 0.2) / column)
    for strip in strips:
        if strip.title:
            placed.append((row, 0, shown(strip.title), None, False))
            row += 1
        at = 0.0
        for place, (token, opacity) in enumerate(zip(strip.tokens, strip.opacities(), strict=True)):
            text = "".join(character if ord(character) in drawable else "□" for character in visible(token))
            if at and at + len(text) > columns:
                row, at = row + 1, 0.0
            placed.append((row, at, text, opacity, place in strip.muted))
            at += len(text) + 0.5
            if token.endswith("\n"):
                row, at = row + 1, 0.0
        row += 1.4 if at else 0.4

    figure = plt.figure(figsize=(width, row * line))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1 / column, width / column - 0.1 / column), ylim=(row - 0.2, -0.2))
    axes.axis("off")
    for y, x, text, strength, muted in placed:
        look: dict[str, Any] = {"fontproperties": font, "fontsize": size, "va": "center", "parse_math": False}
        if strength is None:
            axes.text(x, y + 0.4, text, color="0.35", **{**look, "fontproperties": None, "fontsize": size - 1})
            continue
        red, green, blue = (channel / 255 for channel in (POSITIVE if strength >= 0 else NEGATIVE))
        face = (red, green, blue, 0 if muted else STRONGEST * abs(strength))
        axes.add_patch(plt.Rectangle((x - 0.15, y + 0.02), len(text) + 0.3, 0.76, facecolor=face, linewidth=0))
        if strength < -0.1 and not muted:
            axes.plot([x, x + len(text)], [y + 0.78] * 2, color="0.2", linestyle=":", linewidth=1)
        axes.text(x, y + 0.4, text, color="0.6" if muted else "black", **look)
    plt.close(figure)
    return figure


# --- heatmaps ---------------------------------------------------------------------------------------------------------


def heatmaps(
    pictures: Sequence, columns: Mapping[str, Any], row_titles: Sequence[str] = (), size: float = 1.6
) -> Figure:
    """One row per picture: the picture, then one score map per column over the greyed picture.

    Orange speaks for the output and blue against it; each map has its own scale, full colour from
    its 98th percentile of |score| on.

    Args:
        pictures: n PIL images or arrays (H, W, 3) in 0..255.
        columns: title -> score maps (n, h, w).
        row_titles: at most n.
        size: of each panel, in inches.
    Raises:
        ValueError: a column whose maps aren't as many as the pictures.
    """
    for title, maps in columns.items():
        if len(maps) != len(pictures):
            raise ValueError(f"column {title!r} has {len(maps)} maps for {len(pictures)} pictures: each needs its own")
    shape = (len(pictures), 1 + len(columns))
    figure, grid = plt.subplots(*shape, figsize=(size * shape[1], size * shape[0] + 0.3), squeeze=False)
    for row, picture in enumerate(pictures):
        grid[row, 0].imshow(picture)
        grid[row, 0].set_ylabel(row_titles[row] if row < len(row_titles) else "")
        for axes, maps in zip(grid[row, 1:], columns.values(), strict=True):
            axes.imshow(blended(np.asarray(picture), np.asarray(maps[row], dtype=float)))
    for axes, title in zip(grid[0], ["picture", *columns], strict=True):
        axes.set_title(fill(title, int(14 * size)), fontsize=10)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.4)
    plt.close(figure)
    return figure


def prompt_maps(
    pictures: Sequence,
    prompts: Sequence[Sequence[str]],
    maps: Sequence,
    row_titles: Sequence[str] = (),
    size: float = 1.8,
) -> Figure:
    """One row per picture: the picture, then one score map per prompt of its own, titled with it.

    Orange speaks for the prompt and blue against it. All maps of a row share one scale, so their strengths compare:
    full colour from the 98th percentile of the row's |scores| on.

    Args:
        pictures: n PIL images or arrays (H, W, 3) in 0..255.
        prompts: n lists, the titles of each row.
        maps: n of (prompts, h, w).
        row_titles: at most n.
        size: of each panel, in inches.
    Raises:
        ValueError: pictures, prompts and maps that aren't equally many.
    """
    shape = (len(pictures), 1 + max(map(len, prompts)))
    figure, grid = plt.subplots(*shape, figsize=(size * shape[1], (size + 0.25) * shape[0]), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for row, (picture, titles, scores) in enumerate(zip(pictures, prompts, maps, strict=True)):
        grid[row, 0].imshow(picture)
        grid[row, 0].set_ylabel(row_titles[row] if row < len(row_titles) else "")
        full = np.quantile(np.abs(np.asarray(scores)), 0.98) or 1
        for axes, title, one in zip(grid[row, 1:], titles, scores, strict=False):
            axes.imshow(blended(np.asarray(picture), np.asarray(one, dtype=float), full))
            axes.set_title(fill(title, int(14 * size)), fontsize=10, parse_math=False)
    figure.tight_layout(pad=0.4)
    plt.close(figure)
    return figure


def blended(picture: np.ndarray, scores: np.ndarray, full: float | None = None) -> np.ndarray:
    """A score map over its greyed picture: orange speaks for the output, blue against it.

    Args:
        picture: (H, W, 3) in 0..255.
        scores: (h, w), smoothed to the picture's size.
        full: the |score| of full colour; default: the map's 98th percentile, as one outlying patch would make all
            others pale.
    Returns:
        (H, W, 3), uint8.
    """
    height, width = picture.shape[:2]
    smooth = Image.fromarray(scores.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    strength = np.asarray(smooth)[..., None]
    full = full or np.quantile(np.abs(strength), 0.98) or 1
    opacity = np.minimum(np.abs(strength) / full, 1)
    background = 150 + 0.4 * picture.mean(axis=2, keepdims=True)
    colours = np.where(strength > 0, POSITIVE, NEGATIVE)
    return (background * (1 - opacity) + colours * opacity).astype(np.uint8)
