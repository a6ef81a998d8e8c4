"""Pictures of attributions: token strips for text, heatmaps and curves for the rest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from html import escape

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

# --- token strips -----------------------------------------------------------------------------------------------------

POSITIVE, NEGATIVE = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermilion and blue: told apart by colour-blind eyes
STRONGEST = 0.7  # opacity of the highest score; the text stays readable, dark on light pages and light on dark ones
VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


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
        """Signed strength of every token's colour: score / largest |score|; 0 for muted tokens and NaN scores."""
        kept = [0.0 if place in self.muted or score != score else score for place, score in enumerate(self.scores)]
        largest = max(map(abs, kept), default=0.0) or 1.0
        return [score / largest for score in kept]


class TokenStrips:
    """Strips one below the other, as HTML that any notebook shows: hover over a token for its score."""

    def __init__(self, *strips: Strip):
        self.strips = strips

    def _repr_html_(self) -> str:
        rows = "".join(_strip_html(strip) for strip in self.strips)
        return f'<div style="line-height:2.1;font-size:15px">{rows}</div>'

    def figure(self, width: float = 9.0) -> Figure:
        """The same as a matplotlib figure, `width` inches wide, for print."""
        return _strips_figure(self.strips, width)


def visible(token: str) -> str:
    """A token with its spaces, tabs and line breaks made visible."""
    return "".join(VISIBLE.get(character, character) for character in token)


def _strip_html(strip: Strip) -> str:
    title = f'<div style="line-height:1.3;opacity:.75;font-size:13px">{escape(strip.title)}</div>'
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
    placed, row, columns = [], 0, int((width - 0.2) / column)
    for strip in strips:
        if strip.title:
            placed.append((row, 0, strip.title, None, False))
            row += 1
        at = 0
        for place, (token, opacity) in enumerate(zip(strip.tokens, strip.opacities(), strict=True)):
            text = "".join(character if ord(character) in drawable else "□" for character in visible(token))
            if at and at + len(text) > columns:
                row, at = row + 1, 0
            placed.append((row, at, text, opacity, place in strip.muted))
            at += len(text) + 0.5
            if token.endswith("\n"):
                row, at = row + 1, 0
        row += 1.4 if at else 0.4

    figure = plt.figure(figsize=(width, row * line))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1 / column, width / column - 0.1 / column), ylim=(row - 0.2, -0.2))
    axes.axis("off")
    for y, x, text, opacity, muted in placed:
        look = {"fontproperties": font, "fontsize": size, "va": "center", "parse_math": False}
        if opacity is None:
            axes.text(x, y + 0.4, text, color="0.35", **{**look, "fontproperties": None, "fontsize": size - 1})
            continue
        red, green, blue = (channel / 255 for channel in (POSITIVE if opacity >= 0 else NEGATIVE))
        face = (red, green, blue, 0 if muted else STRONGEST * abs(opacity))
        axes.add_patch(plt.Rectangle((x - 0.15, y + 0.02), len(text) + 0.3, 0.76, facecolor=face, linewidth=0))
        if opacity < -0.1 and not muted:
            axes.plot([x, x + len(text)], [y + 0.78] * 2, color="0.2", linestyle=":", linewidth=1)
        axes.text(x, y + 0.4, text, color="0.6" if muted else "black", **look)
    plt.close(figure)
    return figure
