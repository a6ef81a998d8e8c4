"""The demo families side by side, for notebook 05: does it add up, name what the model uses, land on the object?

python data/families.py                         # -> data/benchmark_families.parquet
python data/families.py --families eva02 mixer  # measures these alone; the table holds all that were measured

An interrupted run goes on where it was. For each family it is what two commands measure,

    python -m libragrad_minimal benchmark --model NAME --data scenes:50 --target true --protocol paint ...

one with the methods under plain gradients and Libra, one with FullGrad+ under every other set of rules. Patches are
painted, not dropped: EVA02, BEiTv2 and MLP-Mixers tell the places of tokens between or inside their blocks.
"""

import argparse
from pathlib import Path

import pandas as pd

from libragrad_minimal.batches import Settings
from libragrad_minimal.benchmark import run
from libragrad_minimal.demo_vits import VITS
from libragrad_minimal.files import only_one, whole_file
from libragrad_minimal.methods import reads_of
from libragrad_minimal.recording import BETWEEN, MAP_GRADIENTS, MAPS

HERE = Path(__file__).resolve().parent
TABLE = HERE / "benchmark_families.parquet"
FOLDER = HERE / ".cache" / "families"
METHODS = (
    "IxG", "FullGrad", "FullGrad+", "HiResCAM", "GradCAM+", "XGradCAM+", "AttCAT", "GenAtt", "TokenTM", "LeGrad",
    "Attention Rollout", "Random",
)  # fmt: skip
RULES = ("attn-lrp", "ali-lrp", "decompx", "no norm", "no activation", "no attention")
METRICS = ["completeness error", "MIF accuracy", "LIF accuracy", "SRG", "SRG (logit)", "AP", "pointing game"]
COLUMNS = ["model", "example", "method", "rules", "protocol", "metric", "value"]


def measure(family: str, count: int) -> None:
    common = {"model": family, "data": f"scenes:{count}", "target": "true", "protocols": ("paint",)}
    maps = {MAPS, MAP_GRADIENTS, BETWEEN}
    methods = tuple(name for name in METHODS if family != "mixer" or not reads_of(name) & maps)
    FOLDER.mkdir(parents=True, exist_ok=True)
    run(Settings(**common, methods=methods), FOLDER / f"{family} methods")
    run(Settings(**common, methods=("FullGrad+",), rules=RULES), FOLDER / f"{family} rules")


def put_together() -> None:
    """One table of all families that were measured."""
    files = [FOLDER / f"{family} {what}" / "table.parquet" for family in VITS for what in ("methods", "rules")]
    rows = pd.concat([pd.read_parquet(file) for file in files if file.exists()], ignore_index=True)
    about = [name for name in rows if name in ("data", "target", "seed", "timm", "torch", "libragrad_minimal")]
    rows = rows[rows["metric"].isin(METRICS)][COLUMNS + about]
    rows = rows.astype({name: "category" for name in rows if name != "value"})
    with whole_file(TABLE) as beside:
        rows.to_parquet(beside, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=VITS, default=list(VITS), help="default: all")
    parser.add_argument("--count", type=int, default=50, help="scenes of two objects (default: %(default)s)")
    options = parser.parse_args()
    with only_one(TABLE):
        for family in options.families:
            print(family)
            measure(family, options.count)
        put_together()
