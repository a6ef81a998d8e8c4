"""Everything that is needed for the notebooks or the tests, set up and started, with nothing but Python 3.10 or newer.

    python run.py notebooks     open the notebooks in a browser
    python run.py html          execute them all into web pages, in results/
    python run.py test          run the tests; what follows goes to pytest, such as `-k rules`
    python run.py site          the notebooks and a gallery as a website, in results/site

The first run fills .venv, and later ones start at once; it is filled again when pyproject.toml has changed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
EXTRAS = ".[notebooks,test]"
RESULTS = {"html": ("The executed notebooks are", "results"), "site": ("The site is", "results/site")}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Set up, then run what was asked for; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=["notebooks", "html", "test", "site"])
    parser.add_argument("--cpu", action="store_true", help="fill .venv with PyTorch for the CPU alone")
    asked, further = parser.parse_known_args(arguments)
    try:
        set_up(root, asked.cpu)
        status = subprocess.call([*command(asked.what, root), *further], cwd=root)
    except subprocess.CalledProcessError as error:
        print(f"\nThe set-up stopped at: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        print("Mend what it says above and start again; it goes on from what is there.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    if asked.what in RESULTS and status == 0:
        print(f"{RESULTS[asked.what][0]} in {root / RESULTS[asked.what][1]}")
    return status


def command(what: str, root: Path) -> list[str]:
    python = str(python_of(root))
    if what == "test":
        return [python, "-m", "pytest"]
    if what == "html":
        notebooks = sorted(str(path.relative_to(root)) for path in (root / "notebooks").glob("*.ipynb"))
        return [python, "-m", "nbconvert", "--execute", "--to", "html", "--output-dir", "results", *notebooks]
    if what == "site":
        return [python, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", "site/mkdocs.yml"]
    is_root = getattr(os, "geteuid", lambda: 1)() == 0  # in a container, say; there is none on Windows
    return [python, "-m", "jupyter", "lab", "notebooks", *(["--allow-root"] if is_root else [])]


# ---- the set-up ------------------------------------------------------------------------------------------------------


def set_up(root: Path, cpu: bool = False) -> None:
    """Fill .venv, unless that was done since pyproject.toml changed; one that was interrupted is done again."""
    ready, project = root / ".venv" / "ready", root / "pyproject.toml"
    if ready.exists() and ready.stat().st_mtime >= project.stat().st_mtime:
        return
    print(announcement(cpu), flush=True)
    for step in steps(root, cpu):
        subprocess.run(step, cwd=root, check=True)
    ready.touch()


def announcement(cpu: bool) -> str:
    """What is about to be downloaded, and how much (summed over pip's report for Linux, November 2026)."""
    where = "The first run (or a changed pyproject.toml) fills .venv with the packages that pyproject.toml names: "
    if cpu:
        return f"{where}\nPyTorch for the CPU from {CPU_WHEELS} and 0.5 GB from PyPI."
    if sys.platform == "linux":
        return (
            f"{where}\n3.4 GB from PyPI, 3.0 GB of them PyTorch with CUDA; more than 6 GB on disk. Without an NVIDIA "
            "GPU stop here (Ctrl-C) and add --cpu: 0.5 GB, and PyTorch for the CPU alone."
        )
    return f"{where}\n0.5 GB from PyPI, and PyTorch."


def steps(root: Path, cpu: bool) -> list[list[str]]:
    """The commands that fill .venv; each can be run again."""
    pip = [str(python_of(root)), "-m", "pip", "install"]
    install = [*pip, "-e", EXTRAS]
    make = [sys.executable, "-m", "venv", str(root / ".venv")]
    if not cpu:
        return [make, install]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    torch = re.findall(r'"(torch(?:vision)?>=[\d.]+)"', project)
    return [make, [*pip, *torch, "--index-url", CPU_WHEELS], install]  # what is there already isn't fetched again


def python_of(root: Path) -> Path:
    return root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036, said to those who have an older one
        sys.exit(f"LibraGrad needs Python 3.10 or newer, and this is {sys.version.split()[0]}")
    sys.exit(main())
