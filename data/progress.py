"""What an interrupted training goes on from, in one file: it is that of the last step saved, or of the one before."""

from pathlib import Path
from typing import Any

import torch

from libragrad_minimal.files import whole_file

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
