"""Is FullGrad+ better when it begins deeper in the model? Deletion on ImageNet pictures, under Libra and AttnLRP.

python data/from_depth.py imagenet:../shared/pictures/imagenet  # -> data/benchmark_imagenet_from_depth.csv, notebook 05

A row for each picture, set of rules and first block: the SRG of the logit, tokens dropped and patches painted. The rows
from block 0 on are those of data/benchmark_imagenet_300.parquet. An interrupted run goes on where it was.
"""

import sys
from pathlib import Path

import pandas as pd
import progress
import torch
from tqdm import tqdm

from libragrad_minimal.attribution import attribute
from libragrad_minimal.batches import Batch, Settings, Subject, deletions, opened, subject
from libragrad_minimal.benchmark import load, spread
from libragrad_minimal.examples import open_data
from libragrad_minimal.files import whole_file
from libragrad_minimal.methods import NAMED_RULES

VIT_TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
FILE = Path(__file__).parent / "benchmark_imagenet_from_depth.csv"
RULES = ("libra", "attn-lrp")
COLUMNS = ["example", "rules", "first block", "protocol", "SRG (logit)"]


def measured(of: Subject, batch: Batch, settings: Settings) -> list[dict]:
    model, classes, depth = of.loaded.model, batch.explained(settings.target), len(of.loaded.blocks)
    scores = {
        (rules, first): attribute(
            model, batch.inputs, classes, method="FullGrad+", rules=NAMED_RULES[rules], layers=range(first, depth)
        ).maps
        for rules in RULES
        for first in (depth // 3, depth // 2)
    }
    return [
        dict(zip(COLUMNS, (name, rules, first, curves.protocol, value), strict=True))
        for deleted in deletions(of, batch, classes, scores, settings)
        for (rules, first), curves in deleted.items()
        for name, value in zip(batch.names, curves.summary()["SRG (logit)"].tolist(), strict=True)
    ]


def from_depth(source: str, count: int = 300) -> None:
    torch.set_num_threads(1)
    settings = Settings(VIT_TINY, source, count=count)
    of = subject(load(VIT_TINY, torch.device("cpu")))
    examples = spread(open_data(source, of.loaded), count)
    table = pd.read_csv(FILE) if FILE.exists() else pd.DataFrame(columns=COLUMNS)
    examples = [example for example in examples if example.name not in set(table["example"])]
    for start in tqdm(range(0, len(examples), settings.batch), disable=None):
        batch, _ = opened(of, examples[start : start + settings.batch], settings)
        if batch is None:
            continue
        rows = pd.DataFrame(measured(of, batch, settings)).round(4)
        table = rows if table.empty else pd.concat([table, rows], ignore_index=True)
        with whole_file(FILE) as beside:
            table.to_csv(beside, index=False)


if __name__ == "__main__":
    with progress.alone(FILE):
        from_depth(sys.argv[1])
    print(f"wrote {FILE}")
