"""Scores under the pointer: a patch map on its picture, and a matrix of tokens by tokens, as HTML for any notebook.

The strips of tokens in plots.py do the same for one text.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .plots import NEGATIVE, POSITIVE, STRONGEST, blended, visible
from .sentences import in_html

TITLE = "line-height:1.3;opacity:.75;font-size:13px"
TOKEN = "font:12px monospace;white-space:pre;padding:0 .3em"


class PatchMap:
    """A picture under its score map, each patch of which tells its score."""

    def __init__(self, picture: Any, scores: Any, title: str = "", width: int = 320):
        """
        Args:
            picture: a PIL image or an array (H, W, 3) in 0..255.
            scores: (rows, columns), one for each patch.
            title: text above it.
            width: in pixels; on a narrower screen it shrinks.
        Raises:
            ValueError: scores of another shape.
        """
        self.picture, self.scores = np.asarray(picture), np.asarray(scores, dtype=float)
        self.title, self.width = title, width
        if self.scores.ndim != 2:
            raise ValueError(f"a patch map needs scores (rows, columns), got shape {self.scores.shape}")

    def __repr__(self) -> str:
        return f"PatchMap of {self.scores.shape[0]} x {self.scores.shape[1]} patches"

    def _repr_html_(self) -> str:
        rows, columns = self.scores.shape
        cells = "".join(f'<i title="{score:+.3g}"></i>' for score in self.scores.flat)
        grid = f"position:absolute;inset:0;display:grid;grid-template:repeat({rows},1fr)/repeat({columns},1fr)"
        frame = f"position:relative;width:{self.width}px;max-width:100%"
        image = f'<img alt="{in_html(self.described())}" src="{self._source()}" style="width:100%;display:block">'
        title = f'<div style="{TITLE}">{in_html(self.title)}</div>'
        return f'{title}<div style="{frame}">{image}<div style="{grid}">{cells}</div></div>'

    def _source(self) -> str:
        """The map over the picture as a PNG that lies in the page itself."""
        height, width = self.picture.shape[:2]
        large = Image.fromarray(self.picture).resize((self.width, round(self.width * height / width)))
        buffer = io.BytesIO()
        Image.fromarray(blended(np.asarray(large), self.scores)).quantize(128).save(buffer, "PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def described(self) -> str:
        row, column = np.unravel_index(np.nanargmax(self.scores), self.scores.shape)
        return f"{self.title or 'a score map'}: highest in row {row + 1} of {len(self.scores)}, column {column + 1}"


class TokenMatrix:
    """Scores of tokens (rows) by tokens (columns), such as what each prompt token did for each generated one."""

    def __init__(self, rows: Sequence[str], columns: Sequence[str], scores: Any, title: str = ""):
        """
        Args:
            rows, columns: tokens as they stand in their texts, with their spaces.
            scores: (rows, columns), signed; each row is coloured by its own largest |score|.
            title: text above it.
        Raises:
            ValueError: scores of another shape.
        """
        self.rows, self.columns, self.title = list(rows), list(columns), title
        self.scores = np.asarray(scores, dtype=float)
        if self.scores.shape != (len(self.rows), len(self.columns)):
            expected = f"({len(self.rows)}, {len(self.columns)})"
            raise ValueError(f"a matrix of these tokens needs scores {expected}, got shape {self.scores.shape}")

    def __repr__(self) -> str:
        return f"TokenMatrix of {len(self.rows)} x {len(self.columns)} tokens"

    def _repr_html_(self) -> str:
        head = "".join(
            f'<th scope="col" style="{TOKEN};writing-mode:vertical-rl;text-align:left">{in_html(visible(token))}</th>'
            for token in self.columns
        )
        body = "".join(self._row(row) for row in range(len(self.rows)))
        return (
            f'<div style="{TITLE}">{in_html(self.title)}</div><div style="overflow-x:auto" tabindex="0">'
            f'<table style="border-collapse:collapse"><tr><td></td>{head}</tr>{body}</table></div>'
        )

    def _row(self, row: int) -> str:
        known = np.nan_to_num(self.scores[row])
        largest = np.abs(known).max(initial=0) or 1
        cells = "".join(
            f'<td title="{in_html(visible(token))}: {told(score)}" style="{colour(strength / largest)}"></td>'
            for token, score, strength in zip(self.columns, self.scores[row], known, strict=True)
        )
        name = in_html(visible(self.rows[row]))
        return f'<tr><th scope="row" style="{TOKEN};text-align:right">{name}</th>{cells}</tr>'


def told(score: float) -> str:
    return "not scored" if np.isnan(score) else f"{score:+.3g}"


def colour(strength: float) -> str:
    """A cell for a signed strength in [-1, 1]."""
    red, green, blue = POSITIVE if strength >= 0 else NEGATIVE
    return f"min-width:1.1em;background:rgba({red},{green},{blue},{STRONGEST * abs(strength):.2f})"
