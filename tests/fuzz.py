"""Random graphs of up to sixty operations: libra_grad is complete on each of them, or refuses it.

A *program* is drawn step by step from templates of source code: `{y} = F.gelu({a}) + {C}`. Each step is a template and
a number that settles everything else in it: which tensors it reads, which constants it makes. Steps don't know each
other, so that a failing program still runs when most of its steps are taken out; what remains is printed as a script.

test_fuzz.py lets hypothesis draw the steps. For a night:

    python -m tests.fuzz 10000 --seed 3

Numbers are kept tame (every result lies between 1/4 and 4), so that float64 has nine digits to spare everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import libragrad_minimal
from libragrad_minimal import UnsupportedOperation, additive_constants, libra_grad

try:
    from libragrad_minimal import observed
except ImportError:  # an engine that can't see constants without a gradient
    observed = contextlib.nullcontext

TOLERANCE = 1e-9
ROUNDED = 1e-6  # where the program rounds to float32: a stream's rounding is part of the output and of no term

# ---- the verdict -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """complete: the terms <t, gradient> over inputs and constants sum to the output. refused: by a sentence of ours."""

    kind: Literal["complete", "refused", "imprecise", "wrong"]
    text: str = ""


def readout(y: Tensor) -> Tensor:
    """A scalar that sees every element differently."""
    return (y.real * torch.linspace(0.3, 2, y.numel(), dtype=torch.float64).cos().reshape(y.shape)).sum()


@torch.no_grad()
def error_of(output: Tensor, parts: Iterable[Tensor], gradients: Iterable[Tensor]) -> float:
    """|sum of all terms - output|, relative to the sum of what the terms and the output are in magnitude."""
    terms = torch.cat([(t * g.conj()).real.flatten() for t, g in zip(parts, gradients, strict=True)])
    return ((terms.sum() - output).abs() / (terms.abs().sum() + output.abs())).item()


def judge(function: Callable[..., Tensor], *inputs: Tensor, tolerance: float = TOLERANCE) -> Verdict:
    """What libra_grad says of `function`, whose forward pass runs inside observed()."""
    torch.manual_seed(0)
    expected = readout(function(*inputs))
    try:
        output, parts = forward(function, *inputs)
        gradients = libra_grad(output, parts, retain_graph=True)
    except (UnsupportedOperation, ValueError, ArithmeticError) as error:
        if not is_deliberate(error):
            raise
        return Verdict("refused", str(error))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12, msg="observed() changed the output")
    error = error_of(output, parts, gradients)
    if error <= tolerance:
        return Verdict("complete")
    return Verdict("imprecise" if error < 1e-6 else "wrong", f"the sum is off by {error:.1e} of its terms' magnitude")


def forward(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The readout of an observed forward pass; the inputs and all constants that are added to them."""
    torch.manual_seed(0)
    with observed():
        output = readout(function(*inputs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a parameter that is added here also multiplies")
        return output, (*inputs, *additive_constants(output, inputs))


def is_deliberate(error: Exception) -> bool:
    """Raised by a statement of the package, with a sentence: no accident deep inside."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    package = Path(libragrad_minimal.__file__).parent
    return package in Path(last.filename).parents and last.line.startswith("raise") and len(str(error)) > 20


# ---- the templates ---------------------------------------------------------------------------------------------------
# All streams and gates are 4 x 4. {a} {b} {c}: streams; {g} {h}: gates; {C} {D}: 4 x 4 constants; {v} {u}: rows;
# {k}: a column; {w}: a row that nothing else uses; {B} {Z}: a buffer, a complex buffer; {s}: a number; {p}: a number
# between 0 and 1; {i}: four indices, {j}: a permutation; {M}: a mask; {m}: a stream that may be changed in place.
# Nothing divides by what may be all but zero, the spread of equal rows, say: that blows rounding up.

LINEAR = """
{a} + {b} | {a} - {b} | -{a} | {a} * {s} | {a} / {s} | torch.add({a}, {b}, alpha={s}) | {a} + {b}[0] | {a}[1] - {b}
{a}[:, :1] + {b}[2] | {a} + {b}.mean(0) | {a} - {b}.mean(1, keepdim=True) | {a} + {b}.sum() / 4 | {a}.cumsum(1)
{a} + {b}.amax(0) | {a} - {b}.amin(1, keepdim=True) | {a} + {b}.max() | {a}.sort(1)[0] | {a}.topk(4, 0)[0]
{a} + {b}.median(0)[0] | {a}.cummax(0)[0] | {a}.T | {a}.flip(0) | {a}.roll(1, 1) | {a}.reshape(2, 8).T.reshape(4, 4)
{a}[{i}] | {a}[:, {i}] | {a}.index_select(1, torch.tensor({i})) | {a}.gather(1, torch.tensor([{i}] * 4))
torch.cat([{a}[:2], {b}[2:]]) | torch.stack(list({a}.unbind(1))[::-1]) | torch.cat({a}.split([1, 3], 1)[::-1], 1)
torch.stack([{a}, {b}, {c}]).mean(0) | torch.cat([{a}.chunk(2)[1], {b}.chunk(2)[0]]) | {a}.expand(3, 4, 4).sum(0) / 3
{a}.repeat_interleave(2, 0)[::2] | {a}.diagonal().diag_embed() + {b}.tril(-1) | {a}.unfold(1, 2, 2).reshape(4, 4)
F.pad({a}[:, :3], (1, 0)) | F.pad({a}[None, :, :2], (1, 1), mode="reflect")[0] | torch.where({M}, {a}, {b})
F.pad({a}[None, :, :2], (1, 1), mode="circular")[0] | torch.where({a} > {b}, {a}, {c})
{a}.scatter(1, torch.tensor([{j}] * 4), {b}) | {a}.scatter_add(0, torch.tensor([{i}] * 4), {b})
{a}.index_add(1, torch.tensor({i}), {b}) | {a}.masked_scatter({M}, {b}) | {a}.index_copy(0, torch.tensor({j}), {b})
{a}.select_scatter({b}[0], 1, 2) | {a}.slice_scatter({b}[:2], 0, 1, 3)
{a}.index_put((torch.tensor({i}),), {b}, accumulate=True) | {a} * ({b} > 0) | {a} * {M} | {a}.masked_fill({M}, 0)
{a}.contiguous().as_strided((4, 4), (1, 4)) | {a}[None].permute(2, 1, 0).squeeze() | {a}.clone()
torch.lerp({a}, {b}, {p}) | {a} @ {C} | {C} @ {a} | torch.mv({a}, {v}) + {b} | F.conv1d({a}[None], {C}[:, :, None])[0]
{a} * {C} | {a} * {v} | torch.maximum({a}, {b}) | torch.fmin({a}, {b}) | F.relu({a}) + {b} | F.leaky_relu({a}, 0.3)
{a}.abs() - {b} | F.prelu({a}, {w}) | F.max_pool1d({a}, 2, 1, 1)[:, :4] | F.avg_pool2d({a}[None], 3, 1, 1)[0]
F.hardshrink({a}, 0.3) + {b} | F.interpolate({a}[None, None], scale_factor=2, mode="bilinear")[0, 0, 1::2, ::2]
torch.fft.fft2({a}).real / 4 | torch.fft.irfft(torch.fft.rfft({a}) * {Z}[:, :3], n=4) | torch.complex({a}, {b}).abs()
torch.complex({a}, {b}).roll(1, 0).imag
torch.view_as_real(torch.view_as_complex({a}.reshape(4, 2, 2).contiguous()) * {Z}[:, :2]).reshape(4, 4)
({a}[:, 0] + {b}[:, 1]).repeat(4, 1) | torch.vmap(lambda row: row @ {C})({a}) | {a}.to(torch.complex128).mul(1j).imag
F.grid_sample({a}[None, None], {B}.reshape(1, 4, 2, 2).repeat(1, 1, 2, 1), align_corners=False)[0, 0]
{a} + {b}.norm(dim=1, keepdim=True) | {a} + torch.cat([{b}, {B}]).std(0) | {a}.abs().sum(1, keepdim=True) + {b}
torch.einsum("ij,kj->ki", {a}, {C})
"""

ADDED = """
{a} + {s} | {s} - {a} | {a} + {C} | {C} - {a} | {a} - {v} | {a} + {k} | torch.rsub({a}, {B}) | {a} + {B}.float()
{a} + torch.arange(4) | {a} + ({b} > 0) | {a} + {b}.detach() | {a} + ({b}.round() - {b}).detach()
{a}.add({C}, alpha={s}) | F.linear({a}, {C}, {v}) | torch.addmm({v}, {a}, {C}) | torch.addmm({D}, {a}, {C}, beta={s})
torch.addcmul({a}, {C}, {D}) | F.conv1d({a}[None], {C}[:, :, None], {v})[0]
torch.baddbmm({D}[None], {a}[None], {C}[None])[0] | {a} @ {C} + {B} | torch.cat([{a}[:3], torch.ones(1, 4).double()])
torch.cat([{C}[:, :1], {a}[:, 1:]], 1) | torch.stack([{a}[0], {v}, {b}[1], {B}[2]])
F.pad({a}[:3, :3], (1, 0, 0, 1), value={s}) | {a}.masked_fill({M}, {s}) | torch.where({M}, {a}, {s})
torch.where({M}, {C}, {a}) | torch.where({a} > {s}, {a}, {B}) | torch.maximum({a}, {C})
torch.minimum({a}, torch.tensor({s})) | F.threshold({a}, {s}, {p}) | {a}.clamp(-{p}, {p}) + {b} | {a}.clamp(min={s})
{a}.clamp(max={s}) | {a}.index_fill(1, torch.tensor([0, 2]), {s}) | {a}.scatter(1, torch.tensor([{i}] * 4), {s})
{a}.scatter(1, torch.tensor([{j}] * 4), {C}) | {a}.index_copy(0, torch.tensor({j}[:3]), {C}[:3])
{a}.index_add(0, torch.tensor({i}), {C}) | {a}.masked_scatter({M}, {C}) | {a}.select_scatter({v}, 1, 2)
{a}.tril() + {C}.triu(1) | {a}.index_put((torch.tensor({j}[:2]),), {C}[:2])
{C}.index_put((torch.tensor({j}[:2]),), {a}[:2]) | torch.lerp({a}, {C}, {p}) | torch.lerp({C}, {a}, {p})
F.batch_norm({a}, {B}[0], {B}[1].abs() + 0.5, {w}, {v}) | F.batch_norm({a}, {B}[0], {B}[1].square() + 0.5)
torch.view_as_real(torch.view_as_complex({a}.reshape(4, 2, 2).contiguous()) + {Z}[:, :2]).reshape(4, 4)
{a}.masked_fill({M}, -torch.inf).amax() + {a} | {a} + {v}.expand(4, 4).T | {a} + ({C} @ {D})
{a} + {B}.softmax(0) @ {D} | torch.outer({v}, {a}[0]) + {k} | {a} + torch.sigmoid({v}) * {C} | torch.addr({a}, {v}, {u})
{a} + F.layer_norm({C}, (4,), {w}, {u}) | {a} + F.gelu({C}) | ({a}.flatten() + {C}.flatten()).view(4, 4)
{a} + {C}[{i}]
"""

NONLINEAR = """
F.gelu({a}) | F.gelu({a}, approximate="tanh") | F.silu({a}) | F.mish({a}) | F.hardswish({a}) | F.elu({a})
F.celu({a}, 0.7) | F.selu({a}) | F.softsign({a}) | F.softshrink({a}, 0.3) + {b} | torch.tanh({a})
3 * torch.tanh({a} / 3) | torch.erf({a}) | torch.atan({a}) | torch.asinh({a}) | F.hardtanh({a}) | torch.sigmoid({a})
torch.expm1({a} / 4) | torch.log1p({a}.abs()) | {a} * torch.sigmoid({a}) | 0.5 * {a} * (1 + torch.erf({a} / 1.5))
F.glu(torch.cat([{a}, {b}], 1)) | {a}.square() | {a} ** 3 / 4 | (1 + {a}.abs()).sqrt()
({a}.abs() + {B}.abs() + 0.1) ** 1.5 | F.relu({a} + {s}).square() | {a} * {b} | {a} * {b}[0] | {a}[:, :1] * {b}[1]
{a} @ {b} / 2 | {a} @ {b}.T @ {c} / 4 | torch.addcmul({a}, {b}, {c}) | torch.addmm({a}, {b}, {c})
torch.einsum("ij,jk,kl->il", {a}, {C}, {b}) | torch.einsum("ij,ij,ij->ij", {a}, {b}, {c}) / 2
torch.outer({a}[0], {b}[:, 1]) | torch.baddbmm({a}[None], {b}[None], {c}[None], alpha={s})[0]
F.conv1d({a}[None], {b}[:, :, None], {c}[0])[0] | F.linear({a}, {b}, {v})
(torch.complex({a}, {b}) * torch.complex({b}, {c}).conj()).imag | F.silu({a} @ {C}) * ({a} @ {D} + {v})
{a} * {a}.mean() | {a} / (1 + {b}.abs()) | {a} / ({b}.square() + 0.5)
{a} / {b}.norm(dim=1, keepdim=True).clamp(min=0.5) | {a}.div(1 + {b}.amax().abs()) | F.layer_norm({a}, (4,), {w}, {v})
F.layer_norm({a}, (4,)) | F.layer_norm({a}, (4, 4)) | F.rms_norm({a}, (4,), {w}, 0.01) | F.group_norm({a}, 2, {w}, {v})
F.instance_norm({a}[None])[0] | F.normalize({a}, dim=1, eps=0.01) | F.local_response_norm({a}[None], 3)[0]
{a} * torch.rsqrt({a}.square().mean(1, keepdim=True) + 0.01)
({a} - {a}.mean(1, keepdim=True)) / ({a}.std(1, keepdim=True) + 0.1)
{a} * torch.rsqrt({a}.float().square().mean(1, keepdim=True) + 0.01).double() | {a} / (0.1 + {a}.abs().mean())
({a} - {a}.mean(0)) * ({a}.var(0, unbiased=False) + 0.1).rsqrt() * {w} + {v}
{a} / {a}.square().sum(1, keepdim=True).add(0.1).sqrt()
F.scaled_dot_product_attention({a}[None], {b}[None], {c}[None])[0] | ({a} @ {b}.T).softmax(1) @ {c}
F.scaled_dot_product_attention({a}[None], {b}[None], {c}[None], is_causal=True)[0]
torch.sigmoid({a} @ {b}.T) @ {c} / 2
({a} @ {b}.T + {C}).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(1) @ ({c} + {s})
(lambda q, k: q @ (k.T @ {c}) / (q @ k.sum(0)[:, None]))(F.elu({a}) + 1, F.elu({b}) + 1)
F.relu({a} @ {b}.T).square() @ {c} / 4 | (lambda e: e / e.sum(1, keepdim=True))(({a} @ {b}.T / 2).exp()) @ {c}
F.cosine_similarity({a}, {b}[:1], dim=1)[:, None] + {c}
torch.linalg.solve_triangular(torch.eye(4).double() + {a}.tril(-1) / 4, {b}, upper=False)
{a}[torch.topk({b}.mean(1), 4)[1]] | checkpoint(lambda t: F.gelu(t + {s}) @ {C} + {v}, {a}, use_reentrant=False)
torch.vmap(lambda r, t: F.silu(r) * t)({a}, {b})
F.grid_sample({a}[None, None], torch.tanh({b}).reshape(1, 4, 2, 2).repeat(1, 1, 2, 1), align_corners=False)[0, 0]
{g} * {a} | {g} * {a} + (1 - {g}) * {b} | {g} @ {a} / 2 | {a} @ {g} / 2 | {a} * {g}.mean(0) | {a} / ({g}.square() + {p})
{a} * {g}[:, :1] + {b} * {h}[1] | {a} * (1 + {g}) | {a} * {g}.softmax(1) | {a} + {g} * {b} | torch.lerp({a}, {b}, {g})
torch.addcmul({a}, {g}, {b}) | torch.addmm({v}, {g}, {a}) | {a} * torch.where({M}, {g}, {s})
torch.stack([{g} * {a}, {h} * {b}]).sum(0)
"""

SCANS = [
    """
state, rows = {v}, []
for row in {a}:
    state = {p} * state + row
    rows.append(state)
{y} = torch.stack(rows)
""",
    """
state, rows = {u}, []
for row, forget in zip({a}, torch.sigmoid({b} @ {C} + {v})):
    state = forget * state + (1 - forget) * row
    rows.append(state)
{y} = torch.stack(rows, 1)
""",
    """
state, rows = torch.zeros(4).double(), []
for row, step in zip({a} @ {C}, F.softplus({b})):
    state = torch.exp(-step) * state + step * row
    rows.append((state * {c}).sum(1) + {v} * row)
{y} = torch.stack(rows)
""",
    """
state, {y} = {u}, torch.zeros(4, 4).double()
for t in range(4):
    state = torch.tanh({a}[t] + state @ {C} / 2)
    {y}[t] = state
""",
    """
weight, chosen = {b}.softmax(1).topk(2)
{y} = torch.zeros(4, 4).double()
for expert in range(4):
    row, slot = torch.where(chosen == expert)
    {y}.index_add_(0, row, F.gelu({a}[row] + {C}[expert]) * weight[row, slot, None])
""",
]

# Statements that change a stream; nothing that autograd needs is lost, so that another may follow.
IN_PLACE = """
{m}.add_({b}) | {m}.add_({s}) | {m}.sub_({C}, alpha={s}) | {m}.mul_({b}) | {m}.mul_({s}) | {m}.mul_({v})
{m}.div_(1 + {b}.abs()) | {m}.neg_() | {m}.copy_({b}) | {m}[1:3].copy_({B}[:2]) | {m}[0] = {b}[1] | {m}[:, 1:3] = {s}
{m}[1:, 2] = {v}[:3] | {m}[{M}] = {s} | {m}[{j}] = {b} | {m}[:, {j}] = {C} | {m}[::2] += {b}[:2] | {m}[:, 1:] -= {s}
{m}[:2] /= 2 + {b}[2:].abs() | {m}.T[1:].add_({b}[1:]) | {m}.view_as({m})[:, :2].mul_({g}[:, :2])
{m}.flatten()[3:9].sub_({v}[0]) | {m}.zero_() | {m}[1].zero_() | {m}[3].fill_({s}) | {m}.masked_fill_({M}, {s})
{m}.index_add_(0, torch.tensor({i}), {b}) | {m}.index_fill_(1, torch.tensor([1]), {s})
{m}.index_copy_(1, torch.tensor({j}), {C}) | {m}.scatter_(1, torch.tensor([{j}] * 4), {b})
{m}.scatter_add_(0, torch.tensor([{i}] * 4), {C}) | {m}.index_put_((torch.tensor({i}),), {b}, accumulate=True)
{m}.masked_scatter_({M}, {b}) | {m}.addcmul_({b}, {c}) | {m}.lerp_({C}, {p}) | {m}.t_() | {m}.addmm_({b}, {C})
{m}.diagonal().add_({v}) | {m}.diagonal().fill_({s}) | {m}[:2, 1:].unsqueeze(0).mul_({s}) | {m}.mul_({g})
{m}.unbind(0)[1].shape | {m}[1:].T.copy_({b}[:, :3]) | {m}.narrow(0, 1, 2).add_({k}[:2]) | {m}.clamp_(-{p}, {p})
{m}.tril_()
"""

# The last change of a stream: autograd needs what it leaves behind.
IN_PLACE_LAST = """
{m}.relu_() | {m}[1:].relu_() | F.silu({m}, inplace=True) | F.hardswish({m}, inplace=True) | {m}.tanh_()
{m}.abs_() | F.leaky_relu_({m}, 0.2) | {m}.square_()
F.threshold_({m}, {s}, {p})
"""

# Reads a view after what it shows has changed.
VIEWS = """
view = {m}[1:3]; {m}.add_({s}); {y} = torch.cat([view, view])
view = {m}.T; view[0] = {b}[2]; {y} = {m} @ {C}
view = {m}.view_as({m})[:, 1]; {m}.mul_({b}); {y} = {b} + view
first, second = {m}[:2], {m}[2:]; first.add_(second * {s}); second.mul_({v}); {y} = {m} * {s}
"""

GATES = """
torch.sigmoid({a}) | {a}.softmax(1) | ({a} / 2).exp() | F.softplus({a}) | torch.rsqrt(1 + {a}.square())
F.hardsigmoid({a}) | 1 - {g} | {g} * {h} | {g} + {h} | {g} @ {h} / 4 | {g}.clamp(min=0.1) | {g}.T | {g} * {C}
{g} + {s} | torch.sigmoid({g} @ {C} + {v}) | torch.cat([{g}[:2], {h}[2:]]) | torch.log(1 + {g}.abs())
{g}.float().double() | F.layer_norm({g}, (4,)) | torch.sin({a}) | torch.cos({a}) | {g}.square() | 1 / (1 + {g}.square())
{g}.masked_fill({M}, {s}) | {g}.cumsum(1) / 2 | torch.tanh({a}) | {g} / {h}.abs().add(0.5) | F.relu({g})
{g}.mean(0) * {h} | ({a} @ {b}.T / 2).sigmoid() | (-{a}.square()).exp() | {g}[{i}]
"""

# What nobody can balance, once in a while: a refusal, not a wrong number.
REFUSED = """
{a}.softmax(1) | {a}.exp() | torch.sin({a}) | Custom.apply({a}) | 1 / (1 + {a}.abs()) | {a}.prod(0) + {b}
torch.vmap(lambda row: F.relu(row + 1))({a})
"""
REFUSED_IN_PLACE = "{m}[2] *= {b}[0] | {m}[:, :2].tanh_() | {m}[2:].sigmoid_()"


def split(text: str) -> list[str]:
    return [template.strip() for line in text.strip().splitlines() for template in line.split(" | ")]


POOL: dict[str, int] = {  # template -> how often it is drawn
    **dict.fromkeys(["{y} = " + t for t in split(LINEAR)], 8),
    **dict.fromkeys(["{y} = " + t for t in split(ADDED)], 12),
    **dict.fromkeys(["{y} = " + t for t in split(NONLINEAR)], 12),
    **dict.fromkeys(["{gate} = " + t for t in split(GATES)], 8),
    **dict.fromkeys(SCANS, 20),
    **dict.fromkeys(split(IN_PLACE), 16),
    **dict.fromkeys([t + "  # the last" for t in split(IN_PLACE_LAST)], 12),
    **dict.fromkeys(VIEWS.strip().splitlines(), 16),
    **dict.fromkeys(["{y} = " + t for t in split(REFUSED)], 1),
    **dict.fromkeys([t + "  # the last" for t in split(REFUSED_IN_PLACE)], 1),
}
TEMPLATES = sorted(POOL, key=len)  # hypothesis shrinks towards the first
Step = tuple[str, int]


def random_steps(generator: random.Random) -> list[Step]:
    names = generator.choices(TEMPLATES, [POOL[name] for name in TEMPLATES], k=generator.randint(1, 60))
    return [(name, generator.randrange(1000)) for name in names]


# ---- from steps to a program -----------------------------------------------------------------------------------------


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def buffer(seed: int, *shape: int, dtype=torch.float64) -> Tensor:
    """In steps of 1/64, which float32 holds, too."""
    values = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 64
    return torch.view_as_complex(torch.view_as_real(values).round()) / 64 if dtype.is_complex else values.round() / 64


def parameter(seed: int, *shape: int) -> Tensor:
    return buffer(seed, *shape).requires_grad_()


TOOLS = {"torch": torch, "F": F, "Custom": Custom, "checkpoint": checkpoint, "buffer": buffer, "parameter": parameter}


class Program:
    """Source code drawn from steps: lines that make inputs and constants, and lines of a forward pass."""

    def __init__(self, steps: Sequence[Step]):
        self.inputs = ["x0", "x1", "x2"]
        self.streams, self.gates, self.constants = list(self.inputs), [], {}
        self.unread = dict.fromkeys(self.inputs)  # by any later step
        self.mutable: str | None = None
        self.made = [f"{name} = parameter({i}, 4, 4)" for i, name in enumerate(self.inputs)]
        self.lines: list[str] = []
        self.values = dict(TOOLS)
        with torch.no_grad():
            exec("\n".join(self.made), self.values)
            for template, number in steps:
                Drawing(self, template, random.Random(number)).write()
        self.read = list({**self.unread, **dict.fromkeys(self.inputs)})  # what the output is made of

    def write(self, source: str) -> None:
        self.lines.append(source)
        exec(source, self.values)

    def new(self, kind: str) -> str:
        return f"{kind}{len(self.streams) + len(self.gates)}"

    def tame(self, name: str) -> None:
        """Rescales a stream that has grown or shrunk. What is nothing but rounding becomes 0."""
        size = self.values[name].abs().max().item()
        if not 0.25 <= size <= 4 and size > 0:
            factor = 2.0 ** -round(torch.tensor(size).log2().item()) if size > 1e-6 else 0
            self.write(f"{name} = {name} * {factor}")

    @property
    def forward(self) -> str:
        """The forward pass, which leaves what is read out in `result`: streams that it still knows, and all inputs."""
        known = [name for name in self.read if name in self.inputs or any(f"{name} = " in line for line in self.lines)]
        return "\n".join([*self.lines, f"result = torch.stack([{', '.join(known)}])"])

    def judge(self) -> Verdict | None:
        """None if not even plain autograd can go back: something it needed was changed in place."""
        values = dict(TOOLS)
        exec("\n".join(self.made), values)
        code = compile(self.forward, "<program>", "exec")

        def run(*inputs):
            local = values.copy()
            exec(code, local)
            return local["result"]

        inputs = [values[name] for name in self.inputs]
        output = run()
        try:
            torch.autograd.grad(output.sum(), inputs)
        except RuntimeError as error:
            if "inplace" in str(error):
                return None
            raise
        tolerance = ROUNDED if ".float()" in self.forward else TOLERANCE
        return judge(run, *inputs, tolerance=tolerance) if output.isfinite().all() else None

    def __str__(self) -> str:
        """A script that shows what happens."""
        names = ", ".join(self.inputs)
        return "\n".join(
            [
                "import torch, torch.nn.functional as F",
                "from libragrad_minimal import additive_constants, libra_grad, observed",
                "from tests.fuzz import Custom, buffer, checkpoint, error_of, parameter, readout",
                *self.made,
                "with observed():",
                *("    " + line for line in self.forward.strip().splitlines()),
                "    output = readout(result)",
                f"parts = ({names}, *additive_constants(output, ({names})))",
                "print(error_of(output, parts, libra_grad(output, parts)))",
            ]
        )


class Drawing(dict):
    """The fields of one template, each drawn when it is first asked for."""

    def __init__(self, program: Program, template: str, generator: random.Random):
        self.program, self.template, self.random = program, template, generator

    def write(self) -> None:
        program, before = self.program, None
        if "{m}" in self.template:
            before = self["m"]  # its copy is a line of its own
        source = self.template.format_map(self).strip()
        last = source.endswith("# the last")
        program.write(source.removesuffix("  # the last"))
        if "gate" in self:
            program.gates.append(self["gate"])
        for name in filter(None, (self.get("y"), before)):
            if name not in program.streams:
                program.streams.append(name)
            program.unread.setdefault(name)
            program.tame(name)
        if last or "y" in self:
            program.mutable = None

    def __missing__(self, field: str) -> str:
        self[field] = value = self.draw(field)
        return value

    def draw(self, field: str) -> str:
        program, generator = self.program, self.random
        if field in "abc":
            return self.read(program.streams)
        if field in "gh":
            if not program.gates:
                program.write("g = torch.sigmoid(x0)")
                program.gates.append("g")
            return program.gates[-1 - min(int(generator.expovariate(0.5)), len(program.gates) - 1)]
        if field == "gate":
            return program.new("g")
        if field == "y":
            return program.new("t")
        if field == "m":
            return self.changeable()
        if field in "CD":
            matrix = self.constant(4, 4)
            return generator.choice(
                [matrix, matrix, matrix, f"{matrix}.T", f"({matrix} * {generator.choice([0.5, 2])})"]
            )
        if field in "vuwkBZ":
            kind = {"B": "buffer", "Z": "complex"}.get(field)
            shape = {"k": (4, 1), "B": (4, 4), "Z": (4, 4)}.get(field, (4,))
            return self.constant(*shape, kind=kind, shared=field != "w")
        if field == "s":
            return str(generator.choice([0.25, 0.5, 0.75, 1.25, 2, 1]))
        if field == "p":
            return str(generator.choice([0.125, 0.3, 0.5, 0.9]))
        if field == "i":
            return str([generator.randrange(4) for _ in range(4)])
        if field == "j":
            return str(generator.sample(range(4), 4))
        if field == "M":
            return f"(buffer({generator.randrange(100)}, 4, 4) > 0)"
        raise KeyError(field)

    def read(self, streams: Sequence[str]) -> str:
        """A stream, rather a young one: counted from the end, so that it stays the same when early steps go."""
        streams = [name for name in streams if name != self.get("m")]
        name = streams[-1 - min(int(self.random.expovariate(0.4)), len(streams) - 1)]
        self.program.unread.pop(name, None)
        if name == self.program.mutable:
            self.program.mutable = None
        return name

    def changeable(self) -> str:
        """The stream that is being changed, or a fresh one that autograd needs nothing of."""
        program = self.program
        if program.mutable is None:
            old, other = self.read(program.streams), self.read(program.streams)
            name = program.new("t")
            fresh = [
                "{}.clone()",
                "{} * 0.5",
                "{} + {}",
                "torch.zeros(4, 4).double().copy_({})",
                "{} @ buffer(7, 4, 4)",
            ]
            program.write(f"{name} = " + self.random.choice(fresh).format(old, other))
            program.streams.append(name)
            program.mutable = name
        return program.mutable

    def constant(self, *shape: int, kind: str | None = None, shared: bool = True) -> str:
        """A new constant, or one that stands elsewhere, too."""
        generator, constants = self.random, self.program.constants
        kind = kind or generator.choice(["buffer", "parameter"])
        seed, again = generator.randrange(1000), generator.random() < 0.3
        known = [name for name, signature in constants.items() if signature == (kind, shape)]
        if shared and again and known:
            return known[-1]
        name = f"c{len(constants)}"
        constants[name] = (kind, shape) if shared else None
        arguments = ", ".join(map(str, (seed, *shape)))
        make = f"buffer({arguments}, dtype=torch.complex128)" if kind == "complex" else f"{kind}({arguments})"
        self.program.made.append(f"{name} = {make}")
        exec(self.program.made[-1], self.program.values)
        return name


# ---- a night ---------------------------------------------------------------------------------------------------------


GOOD = ("complete", "refused", "invalid")


FFT_FAILS = "MKL FFT error"  # of plain autograd in PyTorch 2.8, too, on some machines


def outcome(program: Program) -> tuple[str, str]:
    """A verdict's kind, "invalid" (for plain autograd, too) or the name of an exception; and its text."""
    try:
        verdict = program.judge()
    except Exception as error:
        if FFT_FAILS in str(error):
            return "invalid", FFT_FAILS
        return type(error).__name__, str(error)
    return (verdict.kind, verdict.text) if verdict else ("invalid", "")


def shrunk(steps: Sequence[Step]) -> Program:
    """A short program with the same failure: steps are taken out, then lines, then what the output reads."""
    failure, steps, size = outcome(Program(steps))[0], list(steps), len(steps)
    while size:
        for start in range(len(steps) - size, -1, -1):
            fewer = steps[:start] + steps[start + size :]
            if outcome(Program(fewer))[0] == failure:
                steps = fewer
        size //= 2
    program = Program(steps)
    for part in ("lines", "read"):
        for i in reversed(range(len(getattr(program, part)))):
            shorter = copy.copy(program)
            setattr(shorter, part, [item for j, item in enumerate(getattr(program, part)) if j != i])
            if outcome(shorter)[0] == failure:
                program = shorter
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("examples", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the first program's; the next one has the next")
    parser.add_argument("--failures", type=int, default=20, help="stop after so many")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tqdm(range(options.seed, options.seed + options.examples), unit="program") as bar:
        for seed in bar:
            steps = random_steps(random.Random(seed))
            kind, _ = outcome(Program(steps))
            counts[kind] += 1
            bar.set_postfix(counts)
            if kind not in GOOD:
                program = shrunk(steps)
                bar.write(f"\nseed {seed}: {kind}: {outcome(program)[1]}\n{program}")
            if sum(counts[k] for k in counts if k not in GOOD) >= options.failures:
                break
    print(", ".join(f"{kind}: {count}" for kind, count in counts.most_common()))
    return int(any(kind not in GOOD for kind in counts))


if __name__ == "__main__":
    sys.exit(main())
