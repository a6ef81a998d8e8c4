"""Long runs that are killed: what is started again ends with the very values of a run that nobody disturbed."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from libragrad_minimal.sweep import read

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"


class Script:
    """A script of data/ in a folder of its own, made to save often and to measure little."""

    def __init__(self, folder: Path, name: str, options: list[str], shorter: dict[str, str], outputs: list[str]):
        self.folder, self.name, self.options, self.outputs = folder / "data", name, options, outputs
        self.folder.mkdir(parents=True)
        for file in [*DATA.glob("*.py"), DATA / "demo_vit.safetensors", DATA / "evidence_questions.json"]:
            shutil.copy(file, self.folder)
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
        file = self.folder / self.outputs[0]
        if "train" in self.name:
            of_one = f"_{self.options[0]}" if self.name == "train_vits.py" else ""
            file = self.folder / f".cache/{Path(self.name).stem}{of_one}.pt"

        def version():
            return file.stat().st_mtime_ns if file.exists() else 0

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
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with safe_open(file, "pt") as opened:  # which orders its header by chance
        header = opened.metadata()
    return header, {name: tensor.view(torch.int16).tolist() for name, tensor in load_file(file).items()}


SCRIPTS = {
    "train_vits.py": (
        ["flexivit", "--steps", "4"],
        {"SAVE_EVERY = 250": "SAVE_EVERY = 1", "BATCH = 64": "BATCH = 2",
         "refinement: int = 100": "refinement: int = 2",
         "evaluate(options.name, count=2000)": "evaluate(options.name, count=4)"},
        ["demo_flexivit.safetensors"],
    ),
    "train_clip.py": (
        ["--steps", "4"],
        {"done % 250": "done % 1", "LEARNING_RATE, BATCH = 1e-3, 64": "LEARNING_RATE, BATCH = 1e-3, 2",
         "evaluate(count=1984)": "evaluate(count=64)"},
        ["demo_clip.safetensors"],
    ),
    "train_llama.py": (
        ["--steps", "4", "--rows", "2", "--questions", "6"],
        {"% 500": "% 1", "range(30_000)": "range(1_000)", "held_out_questions(300)": "held_out_questions(6)"},
        ["demo_llama.safetensors", "evidence_questions.json"],
    ),
    "gallery.py": (
        ["scenes", "--count", "3", "--chunk", "1"],
        {"MEASURED = [method for method in METHODS if not": 'MEASURED = [method for method in ("IxG", "Random") if not',
         'FEW = ["IxG", "FullGrad", "FullGrad+"]': 'FEW = ["IxG"]',
         "partial(measure_pictures, sweep=True)": "measure_pictures"},
        ["gallery_scenes.npz"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_ends_as_an_undisturbed_one(name, tmp_path):
    undisturbed, killed = (Script(tmp_path / folder, name, *SCRIPTS[name]) for folder in ("undisturbed", "killed"))
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
        assert second.returncode == 2
        assert "another process is at work on" in errors.splitlines()[-1]
    finally:
        first.kill()
        first.communicate()
