"""run.py sets up what isn't there, once, and starts what was asked for; nothing is installed here."""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_notebooks import PROJECT, ROOT

sys.path.insert(0, str(ROOT))
import run


class Recorder:
    """Stands for subprocess: keeps the commands, and makes the interpreter that venv would make."""

    CalledProcessError = subprocess.CalledProcessError

    def __init__(self, root: Path):
        self.root, self.commands, self.failing = root, [], None

    def run(self, command, cwd, check):
        assert cwd == self.root and check
        self.call(command, cwd)
        if self.failing and self.failing in command:
            raise subprocess.CalledProcessError(1, command)

    def call(self, command, cwd):
        self.commands.append([part.replace(str(self.root), "ROOT") for part in map(str, command)])
        return 3 if "broken" in command else 0


@pytest.fixture
def project(tmp_path, monkeypatch) -> Recorder:
    """A clone without .venv."""
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (tmp_path / "notebooks").mkdir()
    for name in ("01_b.ipynb", "00_a.ipynb"):
        (tmp_path / "notebooks" / name).touch()
    (tmp_path / ".venv").mkdir()
    recorder = Recorder(tmp_path)
    monkeypatch.setattr(run, "subprocess", recorder)
    return recorder


PYTHON = "ROOT/.venv/Scripts/python.exe" if os.name == "nt" else "ROOT/.venv/bin/python"
VENV = [sys.executable, "-m", "venv", "ROOT/.venv"]
INSTALL = [PYTHON, "-m", "pip", "install", "-e", ".[notebooks,test]"]
PYTEST = [PYTHON, "-m", "pytest"]


def test_the_first_run_sets_up_and_the_second_starts_at_once(project, capsys):
    assert run.main(["test", "-k", "rules", "tests/test_x.py", "-x"], project.root) == 0
    asked = [*PYTEST, "-k", "rules", "tests/test_x.py", "-x"]
    assert project.commands == [VENV, INSTALL, asked]
    assert re.search(r"fills .venv .* GB", capsys.readouterr().out, re.DOTALL)
    assert run.main(["test"], project.root) == 0
    assert project.commands[3:] == [PYTEST] and capsys.readouterr().out == ""


def test_a_changed_pyproject_installs_again(project):
    run.main(["test"], project.root)
    later = time.time() + 5
    os.utime(project.root / "pyproject.toml", (later, later))
    run.main(["test"], project.root)
    assert project.commands == [VENV, INSTALL, PYTEST] * 2


@pytest.mark.parametrize("step", ["venv", "-e"])
def test_an_interrupted_set_up_is_done_again(project, step, capsys):
    project.failing = step
    assert run.main(["test"], project.root) == 1
    assert PYTEST not in project.commands and "start again" in capsys.readouterr().err
    project.failing, project.commands = None, []
    assert run.main(["test"], project.root) == 0
    assert project.commands == [VENV, INSTALL, PYTEST]


def test_cpu_takes_pytorch_from_its_own_index_first(project, capsys):
    assert run.main(["--cpu", "test"], project.root) == 0
    named = [r for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["notebooks"] if "torch" in r]
    torch = sorted(requirement for requirement in named if not requirement.startswith("open_clip"))
    index = ["--index-url", "https://download.pytorch.org/whl/cpu"]
    assert project.commands == [VENV, [*INSTALL[:4], *torch, *index], INSTALL, PYTEST]
    assert "download.pytorch.org/whl/cpu" in capsys.readouterr().out


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("cpu", [True, False])
def test_what_is_downloaded_is_said_before_it_is(system, cpu, monkeypatch):
    monkeypatch.setattr(run.sys, "platform", system)
    said = run.announcement(cpu)
    assert re.search(r"\d GB", said) and ("CUDA" in said) == (system == "linux" and not cpu)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no root")
@pytest.mark.parametrize("user, flags", [(0, ["--allow-root"]), (1000, [])])
def test_notebooks_open_for_root_too(project, user, flags, monkeypatch):
    monkeypatch.setattr(run.os, "geteuid", lambda: user)
    assert run.main(["notebooks", "--port", "9999"], project.root) == 0
    assert project.commands[-1] == [PYTHON, "-m", "jupyter", "lab", "notebooks", *flags, "--port", "9999"]


def test_html_executes_all_notebooks_and_says_where_they_are(project, capsys):
    assert run.main(["html"], project.root) == 0
    assert project.commands[-1][1:8] == ["-m", "nbconvert", "--execute", "--to", "html", "--output-dir", "results"]
    executed = [Path(name).as_posix() for name in project.commands[-1][8:]]
    assert executed == ["notebooks/00_a.ipynb", "notebooks/01_b.ipynb"]
    assert str(project.root / "results") in capsys.readouterr().out
    assert run.main(["html", "broken"], project.root) == 3
    assert "results" not in capsys.readouterr().out


def test_site_is_one_command_and_says_where_it_is(project, capsys):
    assert run.main(["site"], project.root) == 0
    assert project.commands[-1] == [PYTHON, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", "site/mkdocs.yml"]
    assert str(project.root / "results") in capsys.readouterr().out
    assert (ROOT / "site" / "mkdocs.yml").is_file()


def test_control_c_is_one_word(project, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(project, "run", interrupted)
    assert run.main(["test"], project.root) == 130
    assert capsys.readouterr().err.strip() == "stopped"
    assert not (project.root / ".venv" / "ready").exists()


def test_it_needs_python_alone_and_is_short():
    source = (ROOT / "run.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert names <= set(sys.stdlib_module_names) and len(source.splitlines()) <= 120


def test_help_without_a_set_up():
    done = subprocess.run([sys.executable, ROOT / "run.py", "--help"], capture_output=True, text=True, check=True)
    assert "notebooks" in done.stdout and "--cpu" in done.stdout
