"""Files that survive an interruption: written beside and renamed, and written by one process only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

PATIENCE = 10  # seconds; the workers of a process that was killed hold its lock until they miss it


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; when the block ends, what lies there takes the place of `path` in one step.

    So `path` is whole or isn't there, whenever the process ends; what was there stays if the block raises. The name
    ends in ".unfinished", not as `path` does: nothing that looks for finished files finds it.
    """
    beside = path.with_name(f"{path.name}.{uuid4().hex[:8]}.unfinished")  # two processes never share one
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())  # else a machine that loses power may keep the new name and not the content
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Inside the block no other process is: those that ask for the same `path` are told so.

    The lock, a file beside `path`, is the operating system's, so that it ends with its process, however that ends.
    What a killed process left unfinished of `path` is taken away.

    Raises:
        BlockingIOError: another process is at work on `path`.
    """
    file = path.with_name(f".{path.name}.lock")
    try:
        lock = FileLock(file).acquire(timeout=PATIENCE)
    except Timeout:
        raise BlockingIOError(
            f"another process is at work on {path}: let it finish, or end it and start this one again"
        ) from None
    with lock:
        for beside in path.parent.glob(f"{escape(path.name)}.????????.unfinished"):
            beside.unlink(missing_ok=True)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows takes it away itself
                file.unlink()
