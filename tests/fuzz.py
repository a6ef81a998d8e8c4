"""judge"""
from __future__ import annotations

import contextlib
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import libragrad_minimal
from libragrad_minimal import UnsupportedOperation, additive_constants, libra_grad

try:
    from libragrad_minimal import observed
except ImportError:
    observed = contextlib.nullcontext

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Verdict:
    kind: Literal["complete", "refused", "wrong"]
    text: str = ""
    parts: tuple[Tensor, ...] = ()
    output: Tensor | None = None


def readout(y):
    weights = torch.linspace(0.3, 2, y.numel(), dtype=y.real.dtype).reshape(y.shape).cos()
    return (y.real * weights).sum()


def share(parts, gradients):
    terms = torch.cat([(t * g.conj()).real.flatten() for t, g in zip(parts, gradients, strict=True)])
    return terms.sum(), terms.abs().sum()


@torch.no_grad()
def error_of(output, parts, gradients):
    total, magnitude = share(parts, gradients)
    return (total - output).abs().item() / (magnitude + output.abs()).item()


def judge(function, *inputs):
    torch.manual_seed(0)
    expected = readout(function(*inputs))
    torch.manual_seed(0)
    with observed():
        output = readout(function(*inputs))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = (*inputs, *additive_constants(output, inputs))
        gradients = libra_grad(output, parts, retain_graph=True)
    except (UnsupportedOperation, ValueError, ArithmeticError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if Path(libragrad_minimal.__file__).parent not in Path(last.filename).parents or not last.line.startswith("raise"):
            raise
        return Verdict("refused", str(error))
    with torch.no_grad():
        error = error_of(output, parts, gradients)
    if not error <= TOLERANCE:
        return Verdict("wrong", f"the sum is off by {error:.1e} of its terms' magnitude", parts, output)
    return Verdict("complete", "", parts, output)
