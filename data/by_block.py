"""Where do the scores of each block lie, and which block decides where FullGrad+ points? On pictures with masks.

python data/by_block.py objects:../shared/pictures/coco   # -> data/benchmark_coco_by_block.csv, for notebook 05
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from libragrad_minimal.attribution import attribute, attribute_many
from libragrad_minimal.batches import Batch, Settings, Subject, opened, subject
from libragrad_minimal.benchmark import load
from libragrad_minimal.examples import open_data
from libragrad_minimal.files import whole_file
from libragrad_minimal.metrics import mean_and_error, pointing_game, segmentation_ap

VIT_TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
FILE = Path(__file__).parent / "benchmark_coco_by_block.csv"
COLUMNS = ["AP", "pointing game", "size of scores"]


def by_block(source: str, size: int = 4) -> pd.DataFrame:
    """One row a block: AP, pointing game and sum of |scores| in logits of Libra's input x gradient there, each with its
    standard error; and its share in the highest score of FullGrad+, where that lies on the object and where it doesn't.
    """
    of, batches = masked_batches(source, size)
    parts = [measured(of, batch) for batch in batches]
    values, shares, hits = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    rows = []
    for number, (block, share) in enumerate(zip(values, shares, strict=True)):
        row = {"block": number}
        for name, numbers in zip(COLUMNS, block, strict=True):
            row[name], row[f"{name} error"] = mean_and_error(numbers)
        row |= {"share where it hits": share[hits].mean().item(), "share where it misses": share[~hits].mean().item()}
        rows.append(row | {"pictures": len(hits), "hits": int(hits.sum())})
    return pd.DataFrame(rows)


def masked_batches(source: str, size: int = 4) -> tuple[Subject, Iterator[Batch]]:
    """The ViT-Tiny, and pictures with masks, `size` at a time."""
    of = subject(load(VIT_TINY, torch.device("cpu")))
    settings = Settings(VIT_TINY, source, metrics=("segmentation",), target="true")
    examples = open_data(source, of.loaded)
    batches = (opened(of, examples[start : start + size], settings)[0] for start in range(0, len(examples), size))
    return of, (batch for batch in batches if batch is not None)


def measured(of: Subject, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (blocks, columns, B), shares in the highest score of FullGrad+ (blocks, B), whether that hits (B,)."""
    model, classes = of.loaded.model, batch.explained("true")
    assert batch.masks is not None
    summed = attribute(model, batch.inputs, classes)
    highest = summed.scores.argmax(1, keepdim=True)
    numbers, shares = [], []
    for block in range(len(of.loaded.blocks)):  # HiResCAM is input x gradient at one block
        one = attribute_many(model, batch.inputs, classes, {"HiResCAM": {"layer": block}})["HiResCAM"]
        size = one.scores.abs().sum(1)
        numbers.append(
            torch.stack([segmentation_ap(one.maps, batch.masks), pointing_game(one.maps, batch.masks), size])
        )
        shares.append((one.scores / summed.scores).gather(1, highest)[:, 0])
    return torch.stack(numbers), torch.stack(shares), pointing_game(summed.maps, batch.masks).bool()


if __name__ == "__main__":
    table = by_block(sys.argv[1]).round(4)
    with whole_file(FILE) as beside:
        table.to_csv(beside, index=False)
    print(f"wrote {FILE}")
