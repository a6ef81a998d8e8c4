"""What a benchmark found, for people: a figure and a page beside its table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from . import pages
from .benchmark import skipped, summary
from .sentences import in_html
from .showing import RULE_COLOURS

SHOWN = ["MIF accuracy", "LIF accuracy", "SRG", "SRG (logit)", "AP", "pointing game"]
LOWER_IS_BETTER = {"completeness error"}
NO_ORDER = {"output", "MIF AOPC", "LIF AOPC", "MIF log-odds", "LIF log-odds"}  # better means different things in them
COLOURS = {"plain": RULE_COLOURS["plain"], "libra": RULE_COLOURS["Libra"], "": "black"}
OTHERS = RULE_COLOURS["AttnLRP"]


def columns(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run ("FullGrad+, libra"), one column a metric ("SRG, drop tokens"), in each (mean, standard error)."""
    found = summary(table)
    found["run"] = [", ".join(filter(None, names)) for names in zip(found["method"], found["rules"], strict=True)]
    found["column"] = [", ".join(filter(None, n)) for n in zip(found["metric"], found["protocol"], strict=True)]
    found["cell"] = list(zip(found["mean"], found["error"], strict=True))
    order = list(dict.fromkeys(found["run"])), list(dict.fromkeys(found["column"]))
    return found.pivot(index="run", columns="column", values="cell").reindex(index=order[0], columns=order[1])


def drawn_of(cells: pd.DataFrame) -> list[str]:
    """The columns that are drawn."""
    return [column for column in cells if column.split(", ")[0] in SHOWN] or list(cells)[:2]


def figure(table: pd.DataFrame) -> Figure:
    """A panel a metric, two beside each other: each run's mean with one standard error, the best on top."""
    cells = columns(table)
    drawn = drawn_of(cells)
    rows = -(-len(drawn) // 2)
    result, grid = plt.subplots(rows, 2, figsize=(8, height(cells) * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(drawn) :]:
        axes.axis("off")
    for axes, column in zip(grid.flat, drawn, strict=False):
        draw(axes, cells[column], column)
    plt.close(result)
    return result


def panel(cells: pd.DataFrame, column: str) -> Figure:
    """One of these by itself, as narrow as a phone."""
    result, axes = plt.subplots(figsize=(4, height(cells)), layout="constrained")
    draw(axes, cells[column], column)
    plt.close(result)
    return result


def height(cells: pd.DataFrame) -> float:
    return 0.24 * len(cells) + 0.7


def draw(axes: plt.Axes, means: pd.Series, title: str) -> None:
    known = means.dropna()
    known = known.loc[sorted(known.index, key=lambda run: known[run][0])]
    for place, (run, (mean, error)) in enumerate(known.items()):
        rules = str(run).rpartition(", ")[2] if ", " in str(run) else ""
        axes.errorbar(mean, place, xerr=error, fmt="o", color=COLOURS.get(rules, OTHERS), markersize=4)
    axes.set_yticks(range(len(known)), list(known.index), fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def measured(table: pd.DataFrame) -> int:
    """How many examples have numbers."""
    return table.loc[table["metric"] != "skipped", "example"].nunique()


def page(table: pd.DataFrame, settings: Sequence[tuple[str, str]]) -> str:
    """An HTML page with a figure a metric, every mean with its standard error, what was skipped and the settings."""
    cells, left_out = columns(table), skipped(table)
    panels = [pages.embedded(panel(cells, name), alternative(cells[name], name), dpi=200) for name in drawn_of(cells)]
    body = [
        f"<p>{measured(table)} examples. Mean ± standard error; the best of a column in bold, where there is one. "
        "Green: by Libra's gradients; grey: by plain ones; pink: by other rules; black: by none.</p>",
        f'<div class="panels">{"".join(panels)}</div>',
        f'<div class="wide" tabindex="0">{html_table(cells)}</div>',
        f"<h2>Skipped: {len(left_out)}</h2>{html_list(left_out)}",
        f"<h2>Settings</h2>{html_list(f'{name}: {value}' for name, value in settings)}",
    ]
    return pages.page("Benchmark", "".join(body))


def html_list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{in_html(item)}</li>' for item in items)}</ul>"


def html_table(cells: pd.DataFrame, shown: int | None = None) -> str:
    """Mean ± standard error of every run and metric, the best of a column in bold; rows after `shown` are folded.

    Args:
        cells: from `columns`, or some of its rows and columns.
        shown: how many rows are there at first; default: all.
    """
    best = {column: best_of(cells[column].dropna(), column) for column in cells}
    head = f"<tr><th>run</th>{''.join(f'<th>{in_html(column)}</th>' for column in cells)}</tr>"
    rows = []
    for run, values in cells.iterrows():
        told = "".join(f"<td>{cell(values[column], values[column] == best[column])}</td>" for column in cells)
        rows.append(f"<tr><td>{in_html(run)}</td>{told}</tr>")
    top, rest = rows[:shown], rows[shown:] if shown else []
    folded = f"<details><summary>the other {len(rest)} rows</summary><table>{head}{''.join(rest)}</table></details>"
    return f"<table>{head}{''.join(top)}</table>{folded if rest else ''}"


def best_of(known: pd.Series, column: str) -> tuple[float, float] | None:
    metric = column.split(", ")[0]
    if metric in NO_ORDER or known.empty:
        return None
    return (min if metric in LOWER_IS_BETTER else max)(known)


def cell(value: tuple[float, float] | float, best: bool) -> str:
    if not isinstance(value, tuple):
        return ""
    mean, error = value
    told = f"{mean:.3g} ± {error:.2g}" if error == error else f"{mean:.3g}"
    return f"<b>{told}</b>" if best else told


def alternative(means: pd.Series, column: str) -> str:
    """A panel in words."""
    known = means.dropna()
    best, worst = (pick(known.index, key=lambda run: known[run][0]) for pick in (max, min))
    told = f"highest {best} with {known[best][0]:.3g}, lowest {worst} with {known[worst][0]:.3g}"
    return f"{column}, means with standard errors of every run: {told}"
