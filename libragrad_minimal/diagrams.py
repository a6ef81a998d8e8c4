"""Block diagrams of a ViT block, a Llama block and a CLIP: what is a stream in them, and what a gate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text

STREAM, GATE = "#0072b2", "#f0b030"  # told apart by colour-blind eyes, and by their shapes as well
LINE, LABEL = "0.35", "0.3"
LOOKS: dict[str, dict[str, Any]] = {
    "stream": {"boxstyle": "round,pad=0.35", "facecolor": STREAM, "edgecolor": STREAM},
    "gate": {"boxstyle": "square,pad=0.35", "facecolor": GATE, "edgecolor": "black"},
    "join": {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": STREAM, "linewidth": 1.5},
}
INKS = {"stream": "white", "gate": "black", "join": STREAM}


@dataclass(frozen=True)
class Box:
    """A step of the forward pass."""

    x: float
    y: float
    text: str
    kind: str = "stream"  # or "gate", or "join": where streams are added or multiplied


@dataclass(frozen=True)
class Diagram:
    """Boxes by name, the ways between them, and what is written beside."""

    boxes: dict[str, Box]
    ways: tuple[str, ...]  # "a b c": from a to b and on to c; "a |x b": by a detour at x
    notes: tuple[tuple[float, float, str], ...] = ()  # x, y, text
    size: tuple[float, float] = (5.0, 5.0)  # inches


def transformer_block(norm: str, mlp: dict[str, Box], mlp_ways: tuple[str, ...], notes: tuple) -> Diagram:
    """Attention, then an MLP, each behind a norm and beside a residual connection."""
    spread = "1 / std" if norm == "LayerNorm" else "1 / rms"
    boxes = {
        "in": Box(0, 0, "tokens"),
        "norm 1": Box(0, 1, norm),
        "spread 1": Box(-1.6, 1, spread, "gate"),
        "values": Box(0, 2.1, "values"),
        "scores": Box(1.7, 2.1, "queries, keys", "gate"),
        "map": Box(1.7, 3.1, "softmax", "gate"),
        "mix": Box(0, 3.1, "×", "join"),
        "sum 1": Box(0, 4.0, "+", "join"),
        "norm 2": Box(0, 5.0, norm),
        "spread 2": Box(-1.6, 5.0, spread, "gate"),
        **mlp,
        "sum 2": Box(0, 8.0, "+", "join"),
        "out": Box(0, 8.9, "tokens of the next block"),
    }
    ways = (
        "in norm_1 values mix sum_1 norm_2",
        "spread_1 norm_1",
        "spread_2 norm_2",
        "norm_1 scores map mix",
        "in |2.95 sum_1",
        "sum_1 |2.95 sum_2",
        "sum_2 out",
        *mlp_ways,
    )
    return Diagram(boxes, ways, notes, (5.2, 6.2))


def vit_block() -> Diagram:
    mlp = {
        "up": Box(0, 6.0, "Linear"),
        "gelu": Box(0, 7.0, "×", "join"),
        "open": Box(1.7, 7.0, "Φ of GELU", "gate"),
    }
    ways = ("norm_2 up gelu sum_2", "up open gelu")
    return transformer_block("LayerNorm", mlp, ways, ())


def llama_block() -> Diagram:
    mlp = {
        "gate": Box(0, 6.0, "gate_proj"),
        "up": Box(-1.6, 6.0, "up_proj"),
        "open": Box(1.7, 6.7, "σ of SiLU", "gate"),
        "silu": Box(0, 6.7, "×", "join"),
        "product": Box(0, 7.35, "⊙", "join"),
    }
    ways = ("norm_2 gate silu product sum_2", "norm_2 up product", "gate open silu")
    notes = ((-0.35, 7.42, "two streams:\nhalf each"),)
    return transformer_block("RMSNorm", mlp, ways, notes)


def clip() -> Diagram:
    boxes = {
        "picture": Box(-1.5, 0, "picture"),
        "patches": Box(-1.5, 1, "patches,\nclass token"),
        "blocks": Box(-1.5, 2.2, "blocks, as\nin a ViT"),
        "e": Box(-1.5, 3.4, "embedding $e$"),
        "unit e": Box(-1.5, 4.4, "×", "join"),
        "length e": Box(-3.3, 4.4, r"1 / $\Vert e\Vert$", "gate"),
        "words": Box(1.5, 0, "prompt"),
        "tokens": Box(1.5, 1, "tokens"),
        "text blocks": Box(1.5, 2.2, "blocks,\nmasked"),
        "t": Box(1.5, 3.4, "embedding $t$"),
        "unit t": Box(1.5, 4.4, "×", "join"),
        "length t": Box(3.3, 4.4, r"1 / $\Vert t\Vert$", "gate"),
        "product": Box(0, 5.2, "·", "join"),
        "f": Box(0, 6.2, "similarity $f$"),
    }
    ways = (
        "picture patches blocks e unit_e product f",
        "words tokens text_blocks t unit_t product",
        "e length_e unit_e",
        "t length_t unit_t",
    )
    return Diagram(
        boxes, ways, ((0.45, 5.28, "asked about the picture alone,\nthe prompt's side is constant"),), (5.2, 5.0)
    )


DIAGRAMS = {"vit": vit_block, "llama": llama_block, "clip": clip}


def block_diagram(kind: str) -> Figure:
    """Where streams flow in a block, and where gates act on them; the forward pass runs upwards.

    Args:
        kind: "vit", "llama" or "clip".
    Raises:
        ValueError: another kind.
    """
    if kind not in DIAGRAMS:
        raise ValueError(f"unknown diagram {kind!r}; there are {', '.join(DIAGRAMS)}")
    diagram = DIAGRAMS[kind]()
    figure, axes = plt.subplots(figsize=diagram.size, layout="constrained")
    texts = {
        name: axes.text(b.x, b.y, b.text, color=INKS[b.kind], size=11, ha="center", va="center", bbox=LOOKS[b.kind])
        for name, b in diagram.boxes.items()
    }
    for way in diagram.ways:
        draw_way(axes, diagram.boxes, texts, way.split())
    for x, y, text in diagram.notes:
        axes.text(x, y, text, color=LABEL, size=9, ha="right" if x < 0 else "left", va="center")
    xs, ys = ([getattr(box, axis) for box in diagram.boxes.values()] for axis in "xy")
    axes.set(xlim=(min(xs) - 1.1, max(xs) + 1.5), ylim=(min(ys) - 0.5, max(ys) + 0.5))
    for name, look in (("stream", "stream"), ("gate: held constant in the backward pass", "gate")):
        axes.plot([], [], "s" if look == "gate" else "o", color=LOOKS[look]["facecolor"], markersize=9, label=name)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    axes.axis("off")
    plt.close(figure)
    return figure


def draw_way(axes: plt.Axes, boxes: dict[str, Box], texts: dict[str, Text], stops: list[str]) -> None:
    """Arrows from stop to stop; a stop such as |2.9 is a detour at that x, past what lies between."""
    names = [stop.replace("_", " ") for stop in stops]
    if names[1].startswith("|"):
        start, end, x = boxes[names[0]], boxes[names[2]], float(names[1][1:])
        leaves = start.y + 0.5  # above the box: what arrives there by another way mustn't seem to go on
        axes.plot([start.x, x, x], [leaves, leaves, end.y], color=STREAM, linewidth=2, zorder=0)
        look = {"arrowstyle": "-|>", "color": STREAM, "linewidth": 2, "patchB": texts[names[2]].get_bbox_patch()}
        axes.annotate("", (end.x, end.y), (x, end.y), arrowprops=look)
        return
    for before, after in pairwise(names):
        a, b = boxes[before], boxes[after]
        patches = {"patchA": texts[before].get_bbox_patch(), "patchB": texts[after].get_bbox_patch()}
        gated = "gate" in (a.kind, b.kind)
        look = {"arrowstyle": "-|>", "color": LINE if gated else STREAM, "linewidth": 1.2 if gated else 2}
        axes.annotate("", (b.x, b.y), (a.x, a.y), arrowprops={**look, **patches, "shrinkA": 0, "shrinkB": 0})
