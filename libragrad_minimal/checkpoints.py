"""Checkpoints: safetensors whose header says how to build the model.

A header is believed only as far as the file's own tensors bear it out: every size in it is compared with theirs before
a model is built, and what isn't asked for never reaches a library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .demo_vits import VITS
from .sentences import one_line
from .untrusted import refuse_remote_code

LONGEST = 1 << 20  # of texts and positions, which no tensor tells


class Damaged(ValueError):
    """A checkpoint that can't be used; the message says why and how to get it back."""


@dataclass
class Checkpoint:
    """The tensors of a file, as fp32, and its header."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, str]

    def read(self, key: str) -> Any:
        """What the header says of `key` (the header's values are JSON).

        Raises:
            Damaged: no such key, no JSON, or it names somebody's code.
        """
        unreadable = damaged(self.path, f"its header has no readable {key!r}")
        try:
            value = json.loads(self.header[key])
        except (KeyError, ValueError, RecursionError) as error:
            raise unreadable from error
        try:
            refuse_remote_code(value, str(self.path))
        except RecursionError as error:  # a depth that JSON's reader just bore
            raise unreadable from error
        except ValueError as error:
            raise damaged(self.path, f"its header's {key!r} wants somebody's code to be fetched and run") from error
        return value

    def sizes(self, key: str, allowed: dict[str, Any], others_matter: bool = True) -> dict[str, Any]:
        """What the header says of `key`, an object whose values are known or have bounds.

        Args:
            allowed: for each name the number or text it must be; a range, for integers; two floats, bounds of a
                number; or such a dict again.
            others_matter: refuse names that aren't in `allowed` instead of leaving them out (within, always).
        Raises:
            Damaged: a value isn't allowed or is missing, and which.
        """
        return self._allowed(self.read(key), allowed, key, others_matter)

    def _allowed(self, value: Any, allowed: Any, name: str, others_matter: bool = True) -> Any:
        if isinstance(allowed, dict):
            if not isinstance(value, dict):
                raise damaged(self.path, f"its header's {name!r} is no object")
            if missing := [key for key in allowed if key not in value]:
                raise damaged(self.path, f"its header's {name!r} has no entry {missing[0]!r}")
            if others_matter and (others := sorted(value.keys() - allowed.keys())):
                raise damaged(
                    self.path, f"its header's {name!r} has an entry {one_line(others[0], 40)!r} that isn't known"
                )
            return {key: self._allowed(value[key], bounds, key) for key, bounds in allowed.items()}
        if isinstance(allowed, range):
            fits, expected = type(value) is int and value in allowed, f"from {allowed[0]} to {allowed[-1]}"
        elif isinstance(allowed, tuple):
            fits = type(value) in (int, float) and allowed[0] <= value <= allowed[1]
            expected = f"from {allowed[0]:g} to {allowed[1]:g}"
        else:
            fits, expected = type(value) is type(allowed) and value == allowed, str(allowed)
        if not fits:
            why = f"its tensors don't fit what its header says, {name} = {one_line(value, 40)}: it should be {expected}"
            raise damaged(self.path, why)
        return value

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor that a model of this kind has.

        Raises:
            Damaged: there is no such tensor, none of so many dimensions, or an empty one.
        """
        shape = tuple(self.tensors[name].shape) if name in self.tensors else ()
        if len(shape) != dimensions or 0 in shape:
            raise damaged(self.path, f"it has no tensor {name!r} of {dimensions} dimensions")
        return shape

    def count(self, blocks: str) -> int:
        """How many blocks the tensors belong to whose names begin with `blocks` and a number."""
        return len({name.removeprefix(blocks).split(".")[0] for name in self.tensors if name.startswith(blocks)})

    def fill(self, model: nn.Module) -> nn.Module:
        """Load the tensors into a model; they must fit exactly.

        Raises:
            Damaged: they don't.
        """
        try:
            model.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise damaged(self.path, "its tensors don't fit the model it describes") from error
        return model

    @torch.no_grad()
    def tried(self, model: Any, *inputs: Any) -> None:
        """Run the model once.

        Raises:
            Damaged: the answer isn't finite.
        """
        answer = model(*inputs)
        for tensor in answer if isinstance(answer, tuple) else (answer,):
            if not tensor.isfinite().all():
                raise damaged(self.path, "the model that it describes answers NaN or infinity")

    @contextmanager
    def building(self) -> Iterator[None]:
        """Whatever a library raises because of what the header says becomes one sentence.

        Raises:
            Damaged: something was raised, other than that a library is missing.
        """
        try:
            yield
        except (Damaged, ImportError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers' Rust panics, which isn't an Exception
            why = f"no model can be built from what its header says ({type(error).__name__}: {one_line(error, 150)})"
            raise damaged(self.path, why) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a demo checkpoint; errors say which file is at fault and how to make it again.

    Raises:
        FileNotFoundError: a missing file.
        Damaged: a damaged one, or one with NaN or infinity.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. {_how_to_rebuild(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            header = file.metadata() or {}
    except Exception as error:  # safetensors' own, and what odd types and shapes lead to
        raise damaged(path, f"it can't be read as safetensors ({one_line(error, 150)})") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise damaged(path, f"{one_line(name, 100)} holds {tensor.dtype}, not floats")
        tensors[name] = tensor.float()
        if not tensors[name].isfinite().all():
            raise damaged(path, f"{one_line(name, 100)} holds NaN or infinity")
    return Checkpoint(path, tensors, header)


def damaged(path: Path, why: str) -> Damaged:
    return Damaged(f"{path} is damaged: {one_line(why)}. {_how_to_rebuild(path)}")


def _how_to_rebuild(path: Path) -> str:
    name = path.stem.removeprefix("demo_")
    script = f"train_vits.py {name}" if name in VITS else f"train_{name}.py"
    return (
        f"Get it back by installing the package again, in a clone with `git checkout -- data/{path.name}`; "
        f"or make it again there: `python data/{script}`."
    )
