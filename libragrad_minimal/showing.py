"""What a notebook shows: figures with a description for those who can't see them, and long tables folded."""

from __future__ import annotations

import io
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image

# Line plots: never the orange and blue of maps, which mean for and against.
RULE_COLOURS = {"plain": "#7f7f7f", "Libra": "#009e73", "AttnLRP": "#cc79a7"}


def show(picture: Figure | Image.Image, alt: str) -> None:
    """Shows a figure or a picture in a notebook, in 256 colours, with a description in the output's metadata.

    Args:
        picture: a figure is closed afterwards.
        alt: what is to be seen, in a sentence or two, without line breaks.
    """
    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=plt.rcParams["figure.dpi"], bbox_inches="tight", facecolor="white")
        buffer.seek(0)
        plt.close(picture)
        picture = Image.fromarray((255 * plt.imread(buffer)).round().astype(np.uint8))
    few_colours = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few_colours.save(buffer, format="png", optimize=True)
    data = {"image/png": buffer.getvalue(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def folded(table: pd.DataFrame, shown: int = 10) -> HTML:
    """A table as HTML: the first rows, and the rest behind a click."""
    top = as_html(table.iloc[:shown])
    rest = table.iloc[shown:]
    if rest.empty:
        return HTML(top)
    summary = escape(f"the other {len(rest)} rows")
    return HTML(f"{top}<details><summary>{summary}</summary>{as_html(rest)}</details>")


def as_html(table: pd.DataFrame) -> str:
    return table.to_html(border=0).replace("&nbsp;", " ")  # which pandas 3 writes for each of several spaces
