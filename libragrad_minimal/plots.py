"""Pictures of attributions: token strips for text, heatmaps for pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from textwrap import fill
from typing import Any
from unicodedata import category, east_asian_width

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .fonts import OWN, OWN_MONO, characters, families_for, file_of
from .sentences import code_point, in_html, shown

POSITIVE, NEGATIVE = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermilion and blue: told apart by colour-blind eyes
# Opacities of the highest score's colour and of a muted token: text keeps a contrast of 4.5 to 1, on light pages and on
# the dark ones of Jupyter, Colab and our site, which write in a light grey.
STRONGEST, MUTED = 0.55, 0.65


@dataclass(frozen=True)
class Look:
    """How scores become colours: the stronger, the less transparent."""

    colormap: str | None = None  # of matplotlib, its middle for zero; default: orange for the output, blue against it
    alpha: float = 1.0  # opacity of the strongest, in (0, 1]
    apart: bool = False  # is each sign scaled by its own strongest, so that the weaker one shows, too?

    def __post_init__(self):
        if self.colormap is not None and self.colormap not in matplotlib.colormaps:
            close = get_close_matches(self.colormap, matplotlib.colormaps) or ["RdBu_r", "PiYG", "coolwarm"]
            raise ValueError(f"matplotlib has no colormap {self.colormap!r}; it has {', '.join(close)}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is an opacity, more than 0 and at most 1, not {self.alpha:g}")

    def strength(self, scores: np.ndarray, quantile: float = 1.0, full: float | None = None) -> np.ndarray:
        """Scores of any shape in [-1, 1]: 1 from `full` on, by default this quantile of |score|."""
        sizes = np.abs(scores)
        signs = (scores > 0, scores < 0) if self.apart and full is None else (np.ones_like(scores, dtype=bool),)
        result = np.zeros_like(sizes)
        for these in signs:
            if these.any():
                result[these] = np.minimum(sizes[these] / (full or np.quantile(sizes[these], quantile) or 1), 1)
        return np.sign(scores) * result

    def colours(self, strength: np.ndarray) -> np.ndarray:
        """(...) in [-1, 1] -> (..., 3) in 0..255."""
        if self.colormap is None:
            return np.where(strength[..., None] >= 0, POSITIVE, NEGATIVE).astype(float)
        return 255 * np.asarray(matplotlib.colormaps[self.colormap]((strength + 1) / 2))[..., :3]


LOOK, STRIP_LOOK = Look(), Look(alpha=STRONGEST)

# --- token strips -----------------------------------------------------------------------------------------------------

VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
CONTINUED = "⋯"  # a token that only continues the character before it, and so has no text of its own


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

    def opacities(self, look: Look = LOOK) -> list[float]:
        """Signed strength of every token's colour.

        Returns:
            score / largest |score|, in [-1, 1]; 0 for muted tokens and NaN scores.
        """
        kept = [0.0 if place in self.muted or score != score else score for place, score in enumerate(self.scores)]
        return look.strength(np.array(kept, dtype=float)).tolist()


class TokenStrips:
    """Strips one below the other, as HTML that any notebook shows: hover over a token for its score."""

    def __init__(self, *strips: Strip, look: Look = STRIP_LOOK):
        self.strips, self.look = strips, look

    def __repr__(self) -> str:
        return f"TokenStrips of {len(self.strips)} texts"

    def _repr_html_(self) -> str:
        rows = "".join(_strip_html(strip, self.look) for strip in self.strips)
        return f'<div style="line-height:2.1;font-size:15px">{rows}</div>'

    def figure(self, width: float = 9.0) -> Figure:
        """The same as a matplotlib figure, for print.

        Args:
            width: in inches; the height follows from the texts.
        """
        return _strips_figure(self.strips, width, self.look)


def visible(token: str) -> str:
    """A token with its spaces, tabs and line breaks made visible, and what has no shape but an effect, or none."""
    if all(category(character) == "Cf" for character in token):
        return "".join(map(code_point, token)) or CONTINUED
    return shown("".join(VISIBLE.get(character, character) for character in token))


def _strip_html(strip: Strip, look: Look) -> str:
    title = f'<div style="line-height:1.3;opacity:.75;font-size:13px">{in_html(strip.title)}</div>'
    places = zip(strip.tokens, strip.scores, strip.opacities(look), range(len(strip.tokens)), strict=True)
    spans = "".join(
        _token_html(token, score, opacity, place in strip.muted, look) for token, score, opacity, place in places
    )
    return f'<div style="margin:.4em 0">{title if strip.title else ""}{spans}</div>'


def _token_html(token: str, score: float, opacity: float, muted: bool, look: Look) -> str:
    red, green, blue = look.colours(np.array(opacity)).round().astype(int)
    shape = (
        "display:inline-block;max-width:100%;overflow-wrap:anywhere;padding:0 .1em;margin:0 1px;"
        "line-height:1.45;border-radius:3px;font-family:monospace;"
    )
    if muted:
        paint, hover = f"opacity:{MUTED}", "not scored"
    else:  # against: dotted line, so that the sign survives a black-and-white printer
        line = ";border-bottom:2px dotted currentColor" if opacity < -0.1 else ""
        paint, hover = f"background:rgba({red},{green},{blue},{look.alpha * abs(opacity):.2f}){line}", f"{score:+.3g}"
        hover += "" if token else ", for a part of the character before"
    line_break = "<br>" if token.endswith("\n") else ""
    return f'<span title="{hover}" style="{shape}{paint}">{in_html(visible(token))}</span>{line_break}'


def _strips_figure(strips: Sequence[Strip], width: float, look: Look) -> Figure:
    size = 10
    texts = [shown(strip.title) + "".join(map(visible, strip.tokens)) for strip in strips]
    families = families_for("".join(texts), OWN_MONO)
    drawable = frozenset().union(*(characters(file_of(family)) for family in families))
    column, line = 0.64 * size / 72, 2.0 * size / 72  # inches: DejaVu Sans Mono is 0.602 em wide, rounded up to pixels
    placed: list[tuple[float, float, str, float | None, bool]] = []
    row, columns = 0.0, int((width - 0.2) / column)
    for strip in strips:
        if strip.title:
            placed.append((row, 0, shown(strip.title), None, False))
            row += 1
        at = 0.0
        for place, (token, opacity) in enumerate(zip(strip.tokens, strip.opacities(look), strict=True)):
            text = "".join(character if character in drawable else "□" for character in visible(token))
            if at and at + columns_of(text) > columns:
                row, at = row + 1, 0.0
            placed.append((row, at, text, opacity, place in strip.muted))
            at += columns_of(text) + 0.5
            if token.endswith("\n"):
                row, at = row + 1, 0.0
        row += 1.4 if at else 0.4

    figure = plt.figure(figsize=(width, row * line))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1 / column, width / column - 0.1 / column), ylim=(row - 0.2, -0.2))
    axes.axis("off")
    for y, x, text, strength, muted in placed:
        style: dict[str, Any] = {"fontfamily": families, "fontsize": size, "va": "center", "parse_math": False}
        if strength is None:
            axes.text(x, y + 0.4, text, color="0.35", **{**style, "fontfamily": [OWN, *families], "fontsize": size - 1})
            continue
        red, green, blue = look.colours(np.array(strength)) / 255
        face = (red, green, blue, 0 if muted else look.alpha * abs(strength))
        wide = columns_of(text)
        axes.add_patch(plt.Rectangle((x - 0.15, y + 0.02), wide + 0.3, 0.76, facecolor=face, linewidth=0))
        if strength < -0.1 and not muted:
            axes.plot([x, x + wide], [y + 0.78] * 2, color="0.2", linestyle=":", linewidth=1)
        axes.text(x, y + 0.4, text, color="0.45" if muted else "black", **style)
    plt.close(figure)
    return figure


def columns_of(text: str) -> int:
    """Columns of a typewriter: Chinese, Japanese and Korean characters take two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


# --- heatmaps ---------------------------------------------------------------------------------------------------------


def heatmaps(
    pictures: Sequence,
    columns: Mapping[str, Any],
    row_titles: Sequence[str] = (),
    size: float = 1.6,
    look: Look = LOOK,
) -> Figure:
    """One row per picture: the picture, then one score map per column over the greyed picture.

    Orange speaks for the output and blue against it, or what `look` says; each map has its own scale, full colour from
    its 98th percentile of |score| on.

    Args:
        pictures: n PIL images or arrays (H, W, 3) in 0..255.
        columns: title -> score maps (n, h, w).
        row_titles: at most n.
        size: of each panel, in inches.
        look: how scores become colours.
    Raises:
        ValueError: a column whose maps aren't as many as the pictures.
    """
    for title, maps in columns.items():
        if len(maps) != len(pictures):
            raise ValueError(f"column {title!r} has {len(maps)} maps for {len(pictures)} pictures: each needs its own")
    shape = (len(pictures), 1 + len(columns))
    titles = ["picture", *columns]
    fonts = families_for("".join([*titles, *row_titles]))
    lines = max(_wrapped(title, size).count("\n") + 1 for title in titles)
    height = size * shape[0] + 0.13 + 0.17 * lines
    figure, grid = plt.subplots(*shape, figsize=(size * shape[1], height), squeeze=False)
    for row, picture in enumerate(pictures):
        grid[row, 0].imshow(picture)
        _name_row(grid[row, 0], row, row_titles, size, fonts)
        for axes, maps in zip(grid[row, 1:], columns.values(), strict=True):
            axes.imshow(blended(np.asarray(picture), np.asarray(maps[row], dtype=float), look))
    for axes, title in zip(grid[0], titles, strict=True):
        _entitle(axes, title, size, fonts)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], anchor="S")  # what room there is lies above, for titles
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
    fonts = families_for("".join([*chain(*prompts), *row_titles]))
    figure, grid = plt.subplots(*shape, figsize=(size * shape[1], (size + 0.25) * shape[0]), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for row, (picture, titles, scores) in enumerate(zip(pictures, prompts, maps, strict=True)):
        grid[row, 0].imshow(picture)
        _name_row(grid[row, 0], row, row_titles, size, fonts)
        full = np.quantile(np.abs(np.asarray(scores)), 0.98) or 1
        for axes, title, one in zip(grid[row, 1:], titles, scores, strict=False):
            axes.imshow(blended(np.asarray(picture), np.asarray(one, dtype=float), LOOK, full))
            _entitle(axes, title, size, fonts)
    figure.tight_layout(pad=0.4)
    plt.close(figure)
    return figure


def _entitle(axes: plt.Axes, title: str, size: float, fonts: list[str]) -> None:
    """As it is written: a dollar sign begins no formula."""
    axes.set_title(_wrapped(title, size), fontsize=10, parse_math=False, fontfamily=fonts)


def _wrapped(title: str, size: float) -> str:
    """In lines that are no wider than a panel of `size` inches; a line break in the title begins a new one."""
    lines = map(shown, title.split("\n"))
    return "\n".join(fill(line, int(14 * size) // max(map(columns_of, line), default=1)) for line in lines)


def _name_row(axes: plt.Axes, row: int, titles: Sequence[str], size: float, fonts: list[str]) -> None:
    name = _wrapped(titles[row], size) if row < len(titles) else ""
    axes.set_ylabel(name, parse_math=False, fontfamily=fonts)


def blended(picture: np.ndarray, scores: np.ndarray, look: Look = LOOK, full: float | None = None) -> np.ndarray:
    """A score map over its greyed picture.

    Args:
        picture: (H, W, 3) in 0..255.
        scores: (h, w), smoothed to the picture's size.
        look: the colours of both signs; by default orange speaks for the output, blue against it.
        full: the |score| of full colour; default: the map's 98th percentile, as one outlying patch would make all
            others pale.
    Returns:
        (H, W, 3), uint8.
    """
    height, width = picture.shape[:2]
    smooth = Image.fromarray(scores.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    strength = look.strength(np.asarray(smooth), 0.98, full)
    opacity = look.alpha * np.abs(strength)[..., None]
    background = 150 + 0.4 * picture.mean(axis=2, keepdims=True)
    return (background * (1 - opacity) + look.colours(strength) * opacity).astype(np.uint8)
