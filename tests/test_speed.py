"""The speed benchmark runs, and counts memory as one does by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import speed

from libragrad_minimal import libra_grad

SCRIPT = Path(speed.__file__)


def test_peak_memory_by_hand():
    x = torch.ones(250_000, requires_grad=True)  # 1 MB

    def run(gradient):
        return gradient((x.exp() + 1).sum(), x)  # exp is kept for backward; exp + 1 is freed after the sum

    peak = speed.peak_bytes(run, torch.autograd.grad, "cpu")
    assert 2e6 <= peak < 2.1e6  # exp and exp + 1 together, then exp and the gradient: never three at once


@pytest.mark.parametrize("build", speed.QUICK_CASES.values(), ids=speed.QUICK_CASES)
def test_libra_grad_needs_hardly_more_memory(build):
    """Exact counts, not timings: a rule that keeps a few extra copies of one layer's activations is found out."""
    run = build("cpu")
    assert speed.peak_bytes(run, libra_grad, "cpu") <= 1.02 * speed.peak_bytes(run, torch.autograd.grad, "cpu")


def test_quick_benchmark_prints_every_case():
    run = subprocess.run([sys.executable, SCRIPT, "--quick", "--pairs", "2"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for label in speed.QUICK_CASES:
        assert any(line.startswith(label) and line.count(" MB") == 2 for line in run.stdout.splitlines()), run.stdout


def test_too_few_pairs_are_refused():
    run = subprocess.run([sys.executable, SCRIPT, "--pairs", "1"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "--pairs must be at least 2" in run.stderr
