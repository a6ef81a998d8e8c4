"""Files that survive an interruption: `kill -9` at any moment leaves the old file or the new one, nothing between."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from libragrad_minimal import files
from libragrad_minimal.files import only_one, whole_file

PACKAGE = Path(files.__file__).parent


def started(code: str, *arguments: object) -> subprocess.Popen:
    """A process that imports the file alone: torch would take seconds."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "numbers.npz"
    path.write_text("old")
    with whole_file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert list(tmp_path.glob("*.npz")) == [path]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_raises_changes_nothing(tmp_path, error):
    path = tmp_path / "numbers.npz"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as beside:
        beside.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


REWRITES = """
import sys
from pathlib import Path
from files import whole_file
path = Path(sys.argv[1])
for letter in "abcdefghij" * 10_000:
    with whole_file(path) as beside, beside.open("w") as file:
        for _ in range(1000):
            file.write(letter * 1000)
    print(letter, flush=True)
"""


def test_killed_at_any_moment(tmp_path):
    path, rng = tmp_path / "letters", random.Random(0)
    for _ in range(5):
        process = started(REWRITES, path)
        process.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        content = path.read_text()
        assert content == content[0] * 1_000_000
    with only_one(path):
        assert not list(tmp_path.glob("*.unfinished"))
    assert list(tmp_path.iterdir()) == [path]


HOLDS = """
import sys, time
from pathlib import Path
from files import only_one
with only_one(Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is at work on a file."""
    process = started(HOLDS, tmp_path / "table.csv")
    assert process.stdout.readline() == "inside\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    with (
        pytest.raises(BlockingIOError, match="another process is at work on .*table.csv"),
        only_one(tmp_path / "table.csv"),
    ):
        pass
    with only_one(tmp_path / "another.csv"):
        pass


def test_a_lock_ends_with_its_process(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    for _ in range(2):
        with only_one(tmp_path / "table.csv"):
            pass


FORKS = """
import os, sys, time
from pathlib import Path
from files import only_one
with only_one(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker that loads data
        time.sleep(2)
        os._exit(0)
    print("inside", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_workers_of_a_killed_process_do_not_keep_its_lock(tmp_path):
    process = started(FORKS, tmp_path / "table.csv")
    assert process.stdout.readline() == "inside\n"
    process.kill()
    process.wait()
    with only_one(tmp_path / "table.csv"):
        pass
