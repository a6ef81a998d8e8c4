"""Long runs: one process at a time, and what an interrupted training goes on from.

That is one file, of the last step saved or of the one before.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from libragrad_minimal.files import only_one, whole_file

FOLDER = Path(__file__).resolve().parent / ".cache"  # not in git


def saved(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an interrupted run, or None. A run with other settings is not gone on with."""
    if not file.exists():
        return None
    state = torch.load(file, weights_only=True)
    if state.get("settings") != settings:
        raise SystemExit(
            f"{file} is of a run with the settings {state.get('settings')}: go on with those, or delete it"
        )
    print(f"going on after step {state['done']} of {file} (delete it to start afresh)")
    return state


def save(file: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as unfinished:
        torch.save(state | {"settings": settings}, unfinished)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Inside, no other process makes `file`; a second one ends with the sentence that says so."""
    try:
        with only_one(file):
            yield
    except BlockingIOError as error:
        raise SystemExit(str(error)) from None


def end_with_the_run(worker: int) -> None:
    """For a DataLoader's worker: end when the process that trains was killed, instead of waiting for it for ever."""
    run = os.getppid()

    def watch() -> None:
        while os.getppid() == run:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
