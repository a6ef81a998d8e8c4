"""HTML pages of our own: light and dark, readable on a phone, all text escaped, pictures inside."""

from __future__ import annotations

import base64
import io

from matplotlib.figure import Figure

from .sentences import in_html

STYLE = """
:root{color-scheme:light dark}pre{overflow-x:auto}
body{font-family:system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}.wide td{white-space:nowrap}
td,th{padding:.2em .6em;text-align:right;border-bottom:1px solid #8884}td:first-child,th:first-child{text-align:left}
img{max-width:100%;background:white}.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(20em,1fr));gap:1em}
"""


def page(title: str, body: str) -> str:
    """A whole page. `body` is HTML, what comes from elsewhere in it escaped already."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{in_html(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{in_html(title)}</h1>{body}</body></html>\n'


def embedded(figure: Figure, alternative: str, dpi: int = 100) -> str:
    """A figure as a picture that lies in the page itself, with its description."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{in_html(alternative)}" src="data:image/png;base64,{data}">'
