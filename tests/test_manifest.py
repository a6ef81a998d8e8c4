"""What is stored in data/ is what its scripts made, and the list of it is complete and true."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import click
import pandas as pd
import pytest

from libragrad_minimal import cli

DATA = Path(__file__).resolve().parents[1] / "data"


def load(folder: Path):
    """data/manifest.py as it stands in a folder."""
    spec = importlib.util.spec_from_file_location("manifest", folder / "manifest.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


manifest = load(DATA)
ROWS = manifest.read()


def test_everything_stored_is_in_the_list_as_it_was_made():
    """A file that was made anew: `python data/manifest.py`."""
    assert {name: manifest.sha256(name) for name in manifest.stored()} == {
        name: row["sha256"] for name, row in ROWS.items()
    }


@pytest.mark.parametrize("name", ROWS)
def test_the_command_that_made_it_is_one(name):
    command = ROWS[name]["command"]
    if command != manifest.BY_HAND:
        for part in command.split(" && "):
            check_command(part, DATA.parent)


def check_command(command: str, root: Path) -> None:
    program, *words = shlex.split(command)
    if program == "libragrad":
        cli.libragrad.get_command(click.Context(cli.libragrad), words[0]).make_context(
            words[0], words[1:]
        )  # knows the options, and runs nothing
        return
    assert program == "python"
    source = (root / words[0]).read_text(encoding="utf-8")
    for choice in words[1:]:
        word = choice.split(":")[0]
        assert re.search(rf'"{word}"|{word}:', source), f"{words[0]} doesn't know {word}"


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name]["command"] != manifest.BY_HAND])
def test_the_versions_are_those_that_a_table_records_itself(name):
    told = ROWS[name]["made with"]
    assert re.match(r"\d{4}-\d\d-\d\d: (torch \d|not recorded)", told)
    if name.endswith((".parquet", ".csv")):
        table = (pd.read_parquet if name.endswith(".parquet") else pd.read_csv)(DATA / name)
        for library in table.columns.intersection(["torch", "timm", "transformers"]):
            for recorded in table[library].unique():
                assert f"{library} {recorded.split('+')[0]}" in told


# ---- each of these checks can fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, error",
    [
        ("python data/no_script.py", FileNotFoundError),
        ("python data/gallery.py sounds", AssertionError),
        ("libragrad sweeep timm", click.UsageError),
        ("libragrad sweep timm --fewer 2", click.UsageError),
    ],
)
def test_a_command_that_is_none_is_found_out(command, error):
    with pytest.raises(error):
        check_command(command, DATA.parent)


def test_the_list_is_renewed(tmp_path, capsys):
    """A file made anew gets its sum, in its card too; one that is gone is left out; a new one must tell its command."""
    for name in ("manifest.py", "manifest.csv", "demo_mixer.md", "gallery_text.npz"):
        shutil.copy(DATA / name, tmp_path)
    (tmp_path / "demo_mixer.safetensors").write_bytes(b"trained again")
    (tmp_path / "new.json").write_bytes(b"{}")
    there = load(tmp_path)
    assert there.renew() == ["new.json"]
    rows = there.read()
    assert list(rows) == ["demo_mixer.safetensors", "gallery_text.npz", "new.json"]
    assert rows["gallery_text.npz"] == ROWS["gallery_text.npz"]
    mixer = rows["demo_mixer.safetensors"]
    assert mixer["sha256"] == "7d3c78388b5a48e0a764b622ec2bb336223a091634be080c6c51e0cbb33f1dda"  # sha256sum
    assert mixer["sha256"] in (tmp_path / "demo_mixer.md").read_text() and mixer["command"].endswith("mixer")
    assert "torch" in mixer["made with"] and "demo_mixer" in capsys.readouterr().out
