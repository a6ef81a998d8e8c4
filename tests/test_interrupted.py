"""Long runs that are killed: what is started again ends with the very values of a run that nobody disturbed."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from libragrad_minimal.models import load_demo
from libragrad_minimal.sweep import read

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"


class Script:
    """A script of data/ in a folder of its own, made to save often and to measure little."""

    def __init__(
        self, folder: Path, name: str, options: list[str], shorter: dict[str, str], outputs: list[str], saved: str = ""
    ):
        """`saved` is the file from which an interrupted run goes on, if that isn't the first of its outputs."""
        self.folder, self.name, self.options, self.outputs = folder / "data", name, options, outputs
        self.saved = self.folder / (saved or outputs[0])
        self.folder.mkdir(parents=True)
        for file in [*DATA.glob("*.py"), DATA / "demo_vit.safetensors", DATA / "evidence_questions.json"]:
            shutil.copy(file, self.folder)
        for file, content in INPUTS.items():
            (self.folder / file).write_text(json.dumps(content))
        text = (self.folder / name).read_text()
        for long, short in shorter.items():
            assert text.count(long) == 1, long
            text = text.replace(long, short)
        (self.folder / name).write_text(text)
        for output in outputs:
            (self.folder / output).unlink(missing_ok=True)

    def start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", self.name, *self.options]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)

    def finish(self) -> None:
        process = self.start()
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]

    def kill_after_saving(self, times: int, moment: float) -> None:
        """kill -9, some time after the file from which it goes on was written so many times in this run."""

        def version():
            return self.saved.stat().st_mtime_ns if self.saved.exists() else 0

        process, seen, written = self.start(), version(), 0
        while written < times:
            assert process.poll() is None, process.stderr.read()[-2000:]
            if (now := version()) != seen:
                seen, written = now, written + 1
            time.sleep(0.001)
        time.sleep(moment)
        process.kill()
        process.communicate(timeout=60)  # which waits for whoever else may write to its pipe: no worker is left behind

    def results(self) -> dict:
        return {output: values(self.folder / output) for output in self.outputs}


def values(file: Path):
    if file.suffix == ".parquet":
        return pd.read_parquet(file).to_csv()  # by their bytes tables of equal values differ in how pandas kept them
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, "pt") as opened:  # which orders its header by chance
        header = opened.metadata()
    return header, {name: tensor.view(torch.int16).tolist() for name, tensor in load_file(file).items()}


STORY, ASK = "Anna has a {} ball. Ben has a {} kite.", " What colour is Ben's kite?"
COLOURS = ("red blue", "green white")
INPUTS = {  # for the scripts that measure a language model
    "prompts.json": {
        "llama": {
            "facts": [
                {"prompt": STORY.format(*pair.split()) + ASK, "expected": f" {pair.split()[1]}"} for pair in COLOURS
            ]
        }
    },
    "circuit_pairs.json": [
        {
            "task": "colour",
            "clean": STORY.format(first, second) + ASK,
            "corrupt": STORY.format(second, first) + ASK,
            "answer": f" {second}",
            "wrong": f" {first}",
        }
        for first, second in map(str.split, COLOURS)
    ],
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """The demo Llama in a folder, as transformers saves it."""
    folder, demo = tmp_path_factory.mktemp("llama"), load_demo("llama")
    demo.model.save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)
    return str(folder)


SCRIPTS = {
    "train_vits.py": (
        ["flexivit", "--steps", "4"],
        {"SAVE_EVERY = 250": "SAVE_EVERY = 1", "BATCH = 64": "BATCH = 2",
         "refinement: int = 100": "refinement: int = 2",
         "evaluate(options.name, count=2000)": "evaluate(options.name, count=4)"},
        ["demo_flexivit.safetensors"],
        ".cache/train_vits_flexivit.pt",
    ),
    "train_clip.py": (
        ["--steps", "4"],
        {"done % 250": "done % 1", "LEARNING_RATE, BATCH = 1e-3, 64": "LEARNING_RATE, BATCH = 1e-3, 2",
         "evaluate(count=1984)": "evaluate(count=64)"},
        ["demo_clip.safetensors"],
        ".cache/train_clip.pt",
    ),
    "train_llama.py": (
        ["--steps", "4", "--rows", "2", "--questions", "6"],
        {"% 500": "% 1", "range(30_000)": "range(1_000)", "held_out_questions(300)": "held_out_questions(6)"},
        ["demo_llama.safetensors", "evidence_questions.json"],
        ".cache/train_llama.pt",
    ),
    "gallery.py": (
        ["scenes", "--count", "3", "--chunk", "1"],
        {"MEASURED = [method for method in METHODS if not": 'MEASURED = [method for method in ("IxG", "Random") if not',
         'FEW = ["IxG", "FullGrad", "FullGrad+"]': 'FEW = ["IxG"]',
         "partial(measure_pictures, sweep=True)": "measure_pictures"},
        ["gallery_scenes.npz"],
    ),
    "families.py": (
        ["--families", "flexivit", "--runs", "ahead", "--count", "10"],
        {'common = {"model": family,': 'common = {"batch": 2, "model": family,'},
        ["benchmark_families.parquet"],
        ".cache/families/flexivit ahead/parts/00000.parquet",
    ),
    "from_depth.py": (
        ["scenes:6"],
        {'VIT_TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"': 'VIT_TINY = "vit"',
         "source, count=count)": "source, count=count, batch=2)"},
        ["benchmark_imagenet_from_depth.csv"],
    ),
    "circuits.py": (
        ["measure", "--model", "LLAMA"],
        {'SITES = ("attention", "mlp", "residual", "heads")': 'SITES = ("mlp", "residual")'},
        ["circuits_smollm2.npz"],
    ),
    "smollm2.py": (
        ["measure", "--model", "LLAMA"],
        {'"IG", "Attention Rollout", "Random"]': '"Random"]',
         '["IxG", "FullGrad+", "AttCAT", "GenAtt", "LeGrad"]': '["IxG", "FullGrad+"]'},
        ["smollm2_deletion.parquet"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_ends_as_an_undisturbed_one(name, tmp_path, llama):
    if name == "train_vits.py" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon, which came with 2.9")
    options, *others = SCRIPTS[name]
    options = [option.replace("LLAMA", llama) for option in options]
    undisturbed, killed = (Script(tmp_path / folder, name, options, *others) for folder in ("undisturbed", "killed"))
    undisturbed.finish()
    killed.kill_after_saving(1, moment=0.01 * random.random())
    killed.finish()
    assert killed.results() == undisturbed.results()
    killed.finish()  # once more than needed
    assert killed.results() == undisturbed.results()
    assert not list(killed.folder.rglob("*.lock"))


SWEEP = ["-m", "libragrad_minimal", "sweep", "timm", "--pattern", "test_vit[23]"]


@pytest.mark.slow
def test_a_killed_sweep_ends_as_an_undisturbed_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    undisturbed, killed = tmp_path / "undisturbed.csv", tmp_path / "killed.csv"
    subprocess.run([sys.executable, *SWEEP, "-o", undisturbed], check=True, **run)
    process = subprocess.Popen([sys.executable, *SWEEP, "-o", killed], **run)
    while not (killed.exists() and killed.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with killed.open("ab") as file:
        file.write(b"test_vit3,tow")  # the moment of a row
    subprocess.run([sys.executable, *SWEEP, "-o", killed], check=True, **run)
    measured = {"seconds", "megabytes"}
    tables = [
        [{k: v for k, v in row.items() if k not in measured} for row in read(path)] for path in (undisturbed, killed)
    ]
    assert len(tables[0]) == 2 and tables[0] == tables[1]


@pytest.mark.slow
def test_a_second_run_is_told(tmp_path):
    script = Script(tmp_path, "train_vits.py", *SCRIPTS["train_vits.py"])
    script.options = ["vit", "--steps", "1000000"]
    first = script.start()
    try:
        while not (script.folder / ".cache" / "train_vits_vit.pt").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = script.start()
        _, errors = second.communicate()
        assert second.returncode == 1
        assert errors.startswith("another process is at work on") and errors.count("\n") == 1
    finally:
        first.kill()
        first.communicate()
