"""The speed benchmark runs, compares what it says it compares, and counts memory as one does by hand."""

import os
import re
import subprocess
import sys
import types
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import attribute_cost
import cases
import measuring
import peers
import pytest
import speed
import torch

import libragrad_minimal
from libragrad_minimal import libra_grad

LXT_VENV = Path(os.environ.get("LIBRAGRAD_LXT_VENV", peers.LXT_VENV))
QUICK = measuring.Effort(pairs=2, repeat=1, device="cpu")
each_case = pytest.mark.parametrize("build", cases.QUICK_CASES.values(), ids=cases.QUICK_CASES)


def run_script(script, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script.__file__, *arguments], capture_output=True, text=True)


def exp_plus_one(x):
    return (x.exp() + 1).sum()  # exp is kept for backward; exp + 1 is freed after the sum


def test_memory_by_hand():
    x = torch.ones(250_000, requires_grad=True)  # 1 MB
    forward = measuring.memory(lambda: exp_plus_one(x), "cpu")
    assert 2e6 <= forward.peak < 2.1e6  # exp and exp + 1 together
    assert 1e6 <= forward.kept < 1.1e6  # exp
    both = measuring.memory(lambda: torch.autograd.grad(exp_plus_one(x), x), "cpu")
    assert 2e6 <= both.peak < 2.1e6  # exp and exp + 1, then exp and the gradient: never three at once
    assert 1e6 <= both.kept < 1.1e6  # the gradient


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@each_case
def test_libra_grad_needs_hardly_more_memory(build, frozen):
    """Exact counts, not timings: a rule that keeps a few extra copies of one layer's activations is found out."""
    case = build("cpu")
    case.freeze(frozen)
    plain = measuring.memory(lambda: case.explain(torch.autograd.grad), "cpu").peak
    assert measuring.memory(lambda: case.explain(libra_grad), "cpu").peak <= 1.02 * plain


@each_case
def test_frozen_parameters_are_frozen(build):
    case = build("cpu")
    for frozen in (True, False):
        case.freeze(frozen)
        assert {parameter.requires_grad for parameter in case.model.parameters()} == {not frozen}
        assert torch.autograd.grad(case.forward(), case.inputs)[0].abs().max() > 0


def test_pairs_alternate():
    calls = []
    passes = {"plain": lambda: calls.append("A"), "other": lambda: calls.append("B")}
    times = measuring.alternate(passes, measuring.Effort(pairs=3, repeat=1, device="cpu"))
    assert calls == list("ABBAAB")
    assert [len(seconds) for seconds in times.values()] == [3, 3]


def test_ratios_by_hand():
    repetitions = [{"plain": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 4.0]}, {"plain": [1.0], "other": [0.5]}]
    row = measuring.make_row("other", "plain", repetitions, {"plain": 10, "other": 20})
    assert row.time_ratios == [2.0, 0.5]  # the median of 3, 2 and 1; the second repetition's only pair
    assert (row.plain_ms, row.ms) == (1500, 3500)
    assert (row.plain_bytes, row.bytes) == (10, 20)


def test_quick_benchmark_prints_every_case(tmp_path):
    run = run_script(speed, "--quick", "--pairs", "2", "--repeat", "2", "--no-peers")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    for label in cases.QUICK_CASES:
        for parameters in ("trainable", "frozen"):
            row = lines[lines.index(f"{label}, {parameters} parameters") + 1]
            assert row.startswith("  libra_grad") and row.count(" MB") == 2, run.stdout
    observed = [line for line in lines if line.startswith("  observed(), forward pass only")]
    assert len(observed) == 2 * len(cases.QUICK_CASES)
    if not hasattr(libragrad_minimal, "observed"):
        assert all("skipped" in line for line in observed)


def test_observed_is_measured_around_the_forward_pass(monkeypatch, capfd):
    """A stand-in that keeps 1 MB for every forward pass: more bytes, which the plain pass of the pair doesn't keep."""
    case, kept = cases.QUICK_CASES["ViT, tiny"]("cpu"), []

    @contextmanager
    def observed():
        yield kept.append(torch.empty(250_000))

    monkeypatch.setattr(libragrad_minimal, "observed", observed, raising=False)
    speed.compare_observed(case, QUICK)
    assert len(kept) == 4  # one pass for set-up, two that are timed, one whose bytes are counted
    plain, observed = re.findall(r"([0-9.]+) MB", capfd.readouterr().out)
    assert float(observed) - float(plain) == pytest.approx(1, abs=0.11)


def test_without_peers_the_benchmark_says_what_is_missing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    speed.compare_peers("ViT, tiny", cases.QUICK_CASES["ViT, tiny"]("cpu"), False, tmp_path, QUICK)
    speed.compare_peers("Llama, tiny", None, False, tmp_path, QUICK)
    captum, integrated, grad_cam, lxt = capfd.readouterr().out.splitlines()
    assert captum.endswith("skipped, not installed: pip install captum") and "IntegratedGradients" in integrated
    assert grad_cam.endswith("skipped, not installed: pip install grad-cam")
    assert lxt.endswith(f"skipped, no venv in {tmp_path}: python tests/benchmarks/peers.py --setup {tmp_path}")


def test_captum_times_the_same_gradient():
    case = cases.QUICK_CASES["ViT, tiny"]("cpu")
    (gradient,) = peers.plain(case)()
    torch.testing.assert_close(peers.input_x_gradient(case)(), case.inputs * gradient)


def test_integrated_gradients_run():
    case = cases.vit("cpu", 1, "vit_tiny_patch16_224", depth=1, img_size=32)
    assert peers.integrated_gradients(case)().shape == case.inputs.shape


@pytest.mark.skipif(find_spec("pytorch_grad_cam") is None, reason="pip install grad-cam")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_grad_cam_leaves_nothing_behind(frozen):
    case = cases.QUICK_CASES["ViT, tiny"]("cpu")
    case.freeze(frozen)
    maps = peers.grad_cam(case)()
    assert maps.shape == (2, 96, 96) and maps.max() > 0
    assert not any(module._forward_hooks for module in case.model.modules())
    assert all(tensor.grad is None for tensor in [case.inputs, *case.model.parameters()])


def test_a_patch_is_in_place_only_where_it_should_be():
    norm, module = type("Norm", (), {"forward": lambda self: "plain"}), types.ModuleType("modelling")
    module.attention = lambda: "plain"

    def monkey_patch():
        norm.forward = lambda self: "patched"
        module.attention = lambda: "patched"

    def state():
        return norm().forward(), module.attention()

    patch = peers.Patch([norm, module], monkey_patch)
    assert state() == ("plain", "plain")
    with pytest.raises(KeyboardInterrupt), patch.in_place():
        assert state() == ("patched", "patched")
        raise KeyboardInterrupt
    assert state() == ("plain", "plain")


@pytest.mark.skipif(not LXT_VENV.is_dir(), reason=f"python tests/benchmarks/peers.py --setup {LXT_VENV}")
def test_lxt_runs_in_its_venv(capfd):
    """It also asserts there that lxt and ATTN_LRP give the same gradients."""
    peers.run_lxt(LXT_VENV, "Llama, tiny", True, 1, QUICK)
    rows = capfd.readouterr().out.splitlines()
    names = ["libra_grad, transformers 4.52", "libra_grad, ATTN_LRP", "lxt AttnLRP"]
    assert [row[:38].strip() for row in rows] == names
    assert all(row.count(" MB") == 2 for row in rows)


@pytest.mark.parametrize("arguments", [("--pairs", "1"), ("--repeat", "0")], ids=" ".join)
def test_too_little_is_refused(arguments):
    run = run_script(speed, *arguments)
    assert run.returncode == 2
    assert "--pairs must be at least 2, --repeat at least 1" in run.stderr


def test_cost_of_attribute_runs():
    run = run_script(attribute_cost, "--quick", "--pairs", "2", "--threads", "1")
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines() if " ms" in line] == [
        *("FullGrad+", "IxG", "LeGrad"),
        *("FullGrad+", "IxG", "LeGrad"),
    ]
