"""Does FullGrad+ point beside the object because of tokens of outlying norm, or of the class token? On COCO pictures.

python data/outliers.py objects:../shared/pictures/coco   # -> data/benchmark_coco_outliers.csv, for notebook 05

A row for each picture and method, all under Libra. A token is an outlier if, in the block in which the largest norm is
furthest from the median, its norm is more than five times the median. "Largest norm" is in times of the median.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from by_block import masked_batches
from torch import Tensor

from libragrad_minimal import libra_grad
from libragrad_minimal.attribution import attribute
from libragrad_minimal.batches import Batch, Subject
from libragrad_minimal.files import whole_file
from libragrad_minimal.metrics import pointing_game, segmentation_ap
from libragrad_minimal.targets import Against

FILE = Path(__file__).parent / "benchmark_coco_outliers.csv"


def streams_of(of: Subject, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """What enters each block (B, 1 + T, D), the class token first, and the logits (B, classes)."""
    entered: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for block in of.loaded.blocks]
    try:
        logits = of.loaded.model(batch.inputs.clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    return entered, logits


def outlying(entered: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Which patches have an outlying norm (B, T), and how many times the median the largest is in each block (L, B)."""
    norms = torch.stack([tokens[:, 1:].detach().norm(dim=-1) for tokens in entered])  # (blocks, B, T)
    times = norms / norms.median(-1, keepdim=True).values
    furthest = times.amax(-1).argmax(0)  # (B,) which block
    at = times[furthest, torch.arange(len(furthest))]
    return at > 5, times.amax(-1)


def corners(rows: int, columns: int) -> list[int]:
    """Which patches these are."""
    return [0, columns - 1, (rows - 1) * columns, rows * columns - 1]


def class_token_share(entered: list[Tensor], logit: Tensor) -> Tensor:
    """The class token's part of the logit, the mean over blocks (B,): its input x gradient under Libra."""
    gradients = libra_grad(logit.sum(), entered)
    shares = [(h[:, 0] * g[:, 0]).sum(-1) / logit for h, g in zip(entered, gradients, strict=True)]
    return torch.stack(shares).mean(0).detach()


def measured(of: Subject, batch: Batch) -> list[dict]:
    classes = batch.explained("true")
    entered, logits = streams_of(of, batch)
    share = class_token_share(entered, logits.gather(1, classes[:, None])[:, 0])
    outliers, times = outlying(entered)
    asked: dict[str, tuple] = {
        name: (name, classes) for name in ("FullGrad+", "SkipPLUS", "GenAtt", "Gradient Attention Rollout")
    }
    asked["FullGrad+, ahead"] = "FullGrad+", Against(classes, others=None)
    rows = []
    for name, (method, target) in asked.items():
        result = attribute(of.loaded.model, batch.inputs, target, method)
        highest = result.scores.argmax(1, keepdim=True)
        lowest = result.scores.amin(1, keepdim=True).expand_as(result.scores)
        without = torch.where(outliers, lowest, result.scores).unflatten(1, result.grid)
        columns = {
            "points right": pointing_game(result.maps, batch.masks),
            "points right without outliers": pointing_game(without, batch.masks),
            "AP": segmentation_ap(result.maps, batch.masks),
            "AP without outliers": segmentation_ap(without, batch.masks),
            "peak is an outlier": outliers.gather(1, highest)[:, 0].float(),
            "outliers": outliers.sum(1),
            "outliers in corners": outliers[:, corners(*result.grid)].sum(1),
            "largest norm": times.amax(0),
            "largest norm, last block": times[-1],
            "class token's share": share,
        }
        rows += [
            {"example": example, "method": name} | {column: values[i].item() for column, values in columns.items()}
            for i, example in enumerate(batch.names)
        ]
    return rows


def outliers_of(source: str, size: int = 4) -> pd.DataFrame:
    of, batches = masked_batches(source, size)
    return pd.DataFrame([row for batch in batches for row in measured(of, batch)])


if __name__ == "__main__":
    table = outliers_of(sys.argv[1]).round(4)
    with whole_file(FILE) as beside:
        table.to_csv(beside, index=False)
    print(f"wrote {FILE}")
