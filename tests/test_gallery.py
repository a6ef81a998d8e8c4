"""The gallery holds what its command measures, remade here for a few pictures; stopping that command loses nothing."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from libragrad_minimal.methods import METHODS

DATA = Path(__file__).resolve().parents[1] / "data"
spec = importlib.util.spec_from_file_location("gallery", DATA / "gallery.py")
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)


# What differs between machines that round differently: noise whose seed comes from a sample's bits, and plain HiResCAM
# before the last block of a pre-norm ViT, which is rounding and nothing else.
LAST_BITS = ("Random | ", "HiResCAM | plain | ")


def remade(benchmark: str, count: int) -> None:
    load, draw, size, measure = gallery.BENCHMARKS[benchmark]
    stored = gallery.load_gallery(DATA / f"gallery_{benchmark}.npz")
    assert all(len(values) >= size for values in stored.values())
    model = load()
    measured = measure(model, [draw(seed, model) for seed in range(count)])
    assert measured.keys() == stored.keys()
    accurate = [
        np.isclose(values.numpy(), stored[name][:count], rtol=1e-3, atol=1e-3, equal_nan=True).mean()
        for name, values in measured.items()
        if not name.startswith(LAST_BITS) and not name.endswith("completeness error")
    ]
    # where two scores are nearly equal, another machine may order them the other way round
    assert np.mean(accurate) > 0.97


@pytest.mark.slow
def test_scenes():
    remade("scenes", 2)


@pytest.mark.slow
def test_text():
    remade("text", 2)


@pytest.mark.slow
def test_photos(shared):
    remade("photos", 1)


@pytest.mark.slow
def test_prompts():
    remade("prompts", 2)


def run_small(monkeypatch, folder, measure) -> dict[str, np.ndarray]:
    """The command on six numbers instead of pictures, two at a time; then what its file holds."""
    benchmarks = {"scenes": (lambda: None, lambda seed, model: float(seed), 6, measure)}
    monkeypatch.setattr(gallery, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(gallery, "FOLDER", folder)
    monkeypatch.setattr("sys.argv", ["gallery.py", "scenes", "--chunk", "2"])
    gallery.main()
    return gallery.load_gallery(folder / "gallery_scenes.npz")


def square(model, numbers):
    return {"square | plain | AP": torch.tensor(numbers) ** 2}


def test_a_stopped_run_goes_on_where_it_was(monkeypatch, tmp_path):
    asked = []

    def stopped_in_the_third_chunk(model, numbers):
        asked.append(numbers)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return square(model, numbers)

    with pytest.raises(KeyboardInterrupt):
        run_small(monkeypatch, tmp_path, stopped_in_the_third_chunk)
    (values,) = run_small(monkeypatch, tmp_path, stopped_in_the_third_chunk).values()
    np.testing.assert_array_equal(values, [0, 1, 4, 9, 16, 25])
    assert asked == [[0, 1], [2, 3], [4, 5], [4, 5]]
    assert [file.name for file in tmp_path.iterdir()] == ["gallery_scenes.npz"]


def test_measurements_of_other_methods_are_not_mixed(monkeypatch, tmp_path, capsys):
    np.savez(tmp_path / "gallery_scenes.npz", names=["cube | plain | AP"], values=np.float32([[0, 1]]))
    before = (tmp_path / "gallery_scenes.npz").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run_small(monkeypatch, tmp_path, square)
    assert "measurements of other methods" in capsys.readouterr().err
    assert (tmp_path / "gallery_scenes.npz").read_bytes() == before


def test_every_method_stands_in_a_stored_table():
    """Notebook 05 shows these tables: a method without a measured row has no place in METHODS."""
    measured = set()
    for file in DATA.glob("benchmark_*.parquet"):
        measured |= set(pd.read_parquet(file, columns=["method"])["method"])
    for file in DATA.glob("gallery_*.npz"):
        measured |= {name.split(" | ")[0] for name in np.load(file)["names"]}
    assert set(METHODS) <= measured
