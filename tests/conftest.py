"""What every test relies on: threads that share the cores, no network, fixed seeds, and the folder of shared models."""

import os
import random
import shutil
from pathlib import Path

import pytest

SHARED = (Path(__file__).resolve().parents[1] / ".." / "shared").resolve()

# pytest-xdist already runs a process per core. Set before torch is imported; notebooks' kernels inherit all of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LIBRAGRAD_MODELS", "demo")
if (SHARED / "hf").is_dir():
    os.environ.setdefault("HF_HOME", str(SHARED / "hf"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models beside a developer's checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent (models lent to developers, not part of the repository)")
    return SHARED


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever process runs it and in whatever order."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser():
    """A chromium without a window, by playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium to look at pages with")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
