"""The demo families, and sizes of the ViT, for notebook 05: does it add up, name what is used, land on the object?

python data/families.py                         # -> data/benchmark_families.parquet
python data/families.py --families eva02 mixer  # measures these alone; the table keeps its rows of the others

An interrupted run goes on where it was. For each family it is what four commands measure,

    python -m libragrad_minimal benchmark --model NAME --data scenes:50 --target true ...

one with the methods under plain gradients and Libra, one with IxG and FullGrad+ under every other set of rules, one
averaged over occlusions, and one that explains how far the class is ahead of the others (--explain ahead).
"""

import argparse
from pathlib import Path

import pandas as pd
import progress

from libragrad_minimal.batches import Settings
from libragrad_minimal.benchmark import run
from libragrad_minimal.demo_vits import VITS
from libragrad_minimal.files import whole_file
from libragrad_minimal.methods import reads_of
from libragrad_minimal.recording import BETWEEN, MAP_GRADIENTS, MAPS

HERE = Path(__file__).resolve().parent
TABLE = HERE / "benchmark_families.parquet"
FOLDER = HERE / ".cache" / "families"
METHODS = (
    "IxG", "FullGrad", "FullGrad+", "HiResCAM", "GradCAM+", "XGradCAM+", "AttCAT", "GenAtt", "TokenTM", "LeGrad",
    "Attention Rollout", "Random",
)  # fmt: skip
RULES = ("attn-lrp", "ali-lrp", "decompx", "residual", "no norm", "no activation", "no attention")
METRICS = ["completeness error", "MIF accuracy", "LIF accuracy", "SRG", "SRG (logit)", "AP", "pointing game"]
COLUMNS = ["model", "example", "method", "rules", "protocol", "explained", "metric", "value"]
COLUMNS += ["data", "target", "seed", "timm", "torch", "libragrad_minimal"]
RUNS = ("methods", "rules", "occlusions", "ahead")


def settings_of(family: str, what: str, count: int) -> Settings:
    common = {"model": family, "data": f"scenes:{count}", "target": "true"}
    maps = {MAPS, MAP_GRADIENTS, BETWEEN}
    methods = tuple(name for name in METHODS if family != "mixer" or not reads_of(name) & maps)
    if what == "methods":
        return Settings(**common, methods=methods)
    if what == "rules":
        return Settings(**common, methods=("IxG", "FullGrad+"), rules=RULES)
    if what == "occlusions":
        return Settings(**common, methods=("Occluded FullGrad+",))
    few = tuple(name for name in ("IxG", "FullGrad+", "GenAtt") if name in methods)
    return Settings(**common, methods=few, rules=("libra",), metrics=("segmentation",), explain="ahead")


def put_together(files: list[Path]) -> None:
    """One table: what was just measured, and all else as it was stored."""
    rows = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    rows = rows[rows["metric"].isin(METRICS)][COLUMNS].astype({"value": "float32"})
    if TABLE.exists():
        stored, anew = pd.read_parquet(TABLE), ["model", "method", "rules", "explained"]
        measured = pd.MultiIndex.from_frame(rows[anew].drop_duplicates().astype(str))
        others = ~pd.MultiIndex.from_frame(stored[anew].astype(str)).isin(measured)
        rows = pd.concat([stored[others], rows], ignore_index=True)
    rows = rows.sort_values("model", key=lambda names: names.map(list(VITS).index), kind="stable")
    rows = rows.astype({name: "category" for name in rows if name != "value"})
    with whole_file(TABLE) as beside:
        rows.to_parquet(beside, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=VITS, default=list(VITS), help="default: all")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--count", type=int, default=50, help="scenes of two objects (default: %(default)s)")
    options = parser.parse_args()
    with progress.alone(TABLE):
        FOLDER.mkdir(parents=True, exist_ok=True)
        files = []
        for family in options.families:
            for what in options.runs:
                print(family, what)
                folder = FOLDER / f"{family} {what}"
                run(settings_of(family, what, options.count), folder)
                files.append(folder / "table.parquet")
        put_together(files)
