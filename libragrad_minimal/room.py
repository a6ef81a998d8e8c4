"""Is there room for a model, and for explaining it? Where there is none, one sentence says what to do instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

CHOICES = {  # what the notebooks and the command line offer, each smaller than the one before
    "vit": ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    "clip": ("ViT-L-14/laion2b_s32b_b82k", "ViT-B-16/laion2b_s34b_b88k"),
    "llama": (
        "unsloth/Meta-Llama-3.1-8B",
        "unsloth/Llama-3.2-3B",
        "unsloth/Llama-3.2-1B",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}

BIG = 100_000_000  # bytes; what is smaller is here before anybody wonders


def device_and_dtype() -> tuple[str, torch.dtype]:
    """fp32 on a CPU; on a GPU bf16 where the hardware has it (a T4 only emulates it), else fp16."""
    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def free_memory(device: torch.device) -> int | None:
    """Bytes, or None where this system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def smaller_than(kind: str, name: str) -> str:
    """The next smaller choice; of a model that isn't among them the smallest."""
    choices = CHOICES[kind]
    following = choices[choices.index(name) + 1 :] if name in choices else choices[-1:]
    return following[0] if following else f'load_demo("{kind}")'


def announce(kind: str, name: str, repository: str, *weights: str) -> None:
    """Before a big download: one line on stderr, how much that is and how much memory the model takes.

    Silent about what is on this machine already or is here in a moment, and where the hub doesn't answer: then loading
    says why.

    Args:
        kind: "vit", "clip" or "llama".
        name: as the user calls it.
        repository: of the hub, or a folder.
        weights: patterns of files; those of the first that there are will be fetched.
    Raises:
        torch.OutOfMemoryError: its weights alone need more than is free.
    """
    from huggingface_hub import model_info, try_to_load_from_cache

    if Path(repository).exists():
        return
    try:
        about = model_info(repository, files_metadata=True, timeout=10)
    except Exception:  # whatever it is, loading meets it next
        return
    files = {file.rfilename: file.size or 0 for file in about.siblings or [] if "/" not in file.rfilename}
    matching = ([file for file in files if fnmatch(file, pattern)] for pattern in weights)
    fetched = next(filter(None, matching), [])
    size = sum(files[file] for file in fetched if not isinstance(try_to_load_from_cache(repository, file), str))
    if size < BIG:
        return
    line = f"{name}: {size / 1e9:.1f} GB to download, once"
    device, dtype = device_and_dtype() if kind == "llama" else ("cpu", torch.float32)
    free, parameters = free_memory(torch.device(device)), getattr(about.safetensors, "total", None)
    if parameters and free:
        needed = parameters * dtype.itemsize
        if needed > free:
            raise no_room(kind, name, f"its weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        line += f"; in memory its weights take {needed / 1e9:.1f} of the {free / 1e9:.1f} GB that are free ({device})"
    print(line, file=sys.stderr)


class NoRoom(torch.OutOfMemoryError):
    """There isn't enough memory; its message is one sentence with what to do."""


def no_room(kind: str, name: str, why: str) -> NoRoom:
    return NoRoom(f"{name} doesn't fit: {why}; the next smaller choice is {smaller_than(kind, name)}")


@contextmanager
def or_else(refusal: NoRoom) -> Iterator[None]:
    """Where the memory doesn't suffice inside, this is raised in place of what PyTorch and Python say."""
    try:
        yield
    except NoRoom:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise refusal from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what PyTorch's allocator on the CPU says
            raise
        raise refusal from error


@contextmanager
def or_a_smaller_one(kind: str, name: str) -> Iterator[None]:
    """Where the memory doesn't suffice inside, or the hub refuses the model, one sentence says what to take instead."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with or_else(no_room(kind, name, "there isn't enough memory")):
            yield
    except (OSError, RuntimeError) as error:  # the latter is what open_clip makes of it
        refusal = cause(error, HfHubHTTPError)
        if refusal is None or refusal.response.status_code not in (401, 403):
            raise
        raise OSError(
            f"the hub answered {refusal.response.status_code} to {name}: there is none of this name, or its licence "
            f"must be accepted on its page and you logged in (`hf auth login`, in Colab a secret HF_TOKEN); "
            f"open to all is {smaller_than(kind, name)}"
        ) from error


def cause(error: BaseException | None, kind: type) -> Any:
    """The error of this kind among those that led to `error`, or None."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error
