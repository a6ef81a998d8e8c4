"""Draw the gallery's two figures of measurements, from the stored tables.

python data/gallery_figures.py    # writes data/figure_benchmark.png and data/figure_circuits.png
"""

from pathlib import Path

import circuits
import matplotlib.pyplot as plt
import pandas as pd
import torch

from libragrad_minimal.metrics import mean_and_error
from libragrad_minimal.report import COLOURS, columns

FOLDER = Path(__file__).parent
WRITTEN = {"mlp": "MLPs", "residual": "stream"}
MEASURES = ("SRG, drop tokens", "SRG, occlude patches")


def draw_benchmark() -> None:
    cells = columns(pd.read_parquet(FOLDER / "benchmark_imagenet.parquet"))
    methods = [run.removesuffix(", libra") for run in cells.index if run.endswith(", libra")]
    methods = sorted(
        (name for name in methods if f"{name}, plain" in cells.index),
        key=lambda name: cells[MEASURES[0]][f"{name}, libra"],
    )
    figure, panels = plt.subplots(1, 2, figsize=(5.6, 3.8), sharey=True, layout="constrained")
    for axes, measure in zip(panels, MEASURES, strict=True):
        for rules in ("plain", "libra"):
            means, errors = zip(*(cells[measure][f"{name}, {rules}"] for name in methods), strict=True)
            axes.errorbar(
                means,
                methods,
                xerr=errors,
                fmt="o",
                markersize=5,
                color=COLOURS[rules],
                label=rules.replace("libra", "Libra"),
            )
        axes.axvline(cells[measure]["Random"][0], color="black", linestyle=":", label="random scores")
        axes.set_xlabel(measure.replace(", ", ",\n"))
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(FOLDER / "figure_benchmark.png", dpi=100)


def draw_circuits() -> None:
    found = circuits.correlations()
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    colours = {"plain": COLOURS["plain"], "AttnLRP": "#cc79a7", "Libra": COLOURS["libra"]}
    for place, (how, colour) in enumerate(colours.items()):
        for at, site in enumerate(circuits.SITES):
            values = sum((pairs for (_, where, rules), pairs in found.items() if (where, rules) == (site, how)), [])
            mean, error = mean_and_error(torch.tensor(values))
            axes.bar(at + 0.25 * (place - 1), mean, 0.23, yerr=error, color=colour, label=how if at == 0 else None)
    axes.set_xticks(range(len(circuits.SITES)), [WRITTEN.get(site, site) for site in circuits.SITES])
    axes.set(ylabel="correlation with true patching", ylim=(0, 1))
    figure.legend(ncols=3, loc="outside upper center")
    figure.savefig(FOLDER / "figure_circuits.png", dpi=100)


if __name__ == "__main__":
    draw_benchmark()
    draw_circuits()
