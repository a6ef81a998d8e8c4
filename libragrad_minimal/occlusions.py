"""FullGrad+ averaged over pictures some of whose patches are painted: a patch counts where it can be seen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from .gradient_methods import fullgrad_plus
from .metrics import occlude_patches
from .recording import CONSTANTS, LAYERS, Recording
from .scores import Scores, reads, whole_number

READS = (LAYERS, CONSTANTS)
MOST = 0.9  # the largest share of patches that is painted


@reads(*READS)
def occluded_fullgrad_plus(run: Recording, passes: int = 12, seed: int = 0) -> Scores:
    """FullGrad+ averaged over random occlusions (our own variant; no paper has it).

    In the first pass the picture is whole; in the last, nine patches of ten are painted in the grey that stands for
    nothing (`occlude_patches`); a patch's score is its mean over the passes in which it stood. It takes `passes` times
    as long as FullGrad+ and has no sum. All samples of a batch meet the same occlusions.

    passes: how many, 1 or more. seed: of the choice of patches. Raises ValueError where no picture is explained.
    """
    passes, generator = whole_number("passes", passes), torch.Generator().manual_seed(whole_number("seed", seed))
    if passes < 1:
        raise ValueError(f"scores are averaged over at least one pass, got {passes}")
    inputs, grid = run.request.inputs, run.layout.grid
    if inputs.picture is None or inputs.text is not None or grid is None or len(grid) != 2:
        raise ValueError("occlusions paint patches of a picture, and something else is explained here: use FullGrad+")
    patches = grid[0] * grid[1]
    total, count = torch.zeros_like(run.valid, dtype=run.dtype), torch.zeros_like(run.valid, dtype=torch.long)
    for share in tqdm(torch.linspace(0, MOST, passes).tolist(), "occlusions", disable=None, leave=False):
        keep = torch.rand(patches, generator=generator).argsort() >= round(share * patches)
        stood = on_tokens(run, keep)
        total = total + fullgrad_plus(run if keep.all() else painted(run, keep)).tokens * stood
        count = count + stood
    return Scores(total / count)


def painted(run: Recording, keep: Tensor) -> Recording:
    """A recording of the same pictures with the patches that don't stay, keep (patches,), painted."""
    inputs = run.request.inputs
    assert inputs.picture is not None and run.layout.grid is not None
    pictures, (rows, columns) = inputs.tensors[inputs.picture], run.layout.grid
    grey = occlude_patches(pictures, keep.to(pictures.device).expand(len(pictures), -1), (rows, columns))
    asked = replace(run.request, inputs=inputs.replaced(inputs.picture, grey), reads=frozenset(READS))
    return run.recorded(asked)


def on_tokens(run: Recording, keep: Tensor) -> Tensor:
    """Patches that stay, (patches,), as tokens (B, N); class tokens and registers always do."""
    samples = len(run.valid)
    keep = keep.to(run.valid.device).expand(samples, -1)
    if run.layout.place is None:
        return keep
    place = run.layout.place.to(run.valid.device)
    return torch.ones_like(run.valid).scatter(1, place.expand(samples, -1), keep)
