"""What a stranger's model may say of how it is to be computed: sizes and numbers, never whose code.

`trust_remote_code=False` doesn't settle that. A config of transformers may name an attention kernel, "owner/kernel",
which is fetched from the hub and run wherever `kernels` is installed; one of open_clip may pass `trust_remote_code` on
to its tokenizer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .gguf_header import tensor_shapes
from .sentences import one_line

# What transformers computes by itself; by all other names it loads libraries, some of them from the hub.
OWN = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")

OPTIONAL = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # PyTorch's own, read by each torch.load
DEEPEST = 1000  # layers; today's deepest models have a hundred


def refuse_remote_code(config: Any, name: str) -> None:
    """Raises if a config, or one within it, says that somebody's code is to be fetched and run.

    Args:
        config: JSON's dicts and lists, or an object of transformers that was made from it.
        name: whose config it is, for the message.
    Raises:
        ValueError: it names a place where code lies, as a kernel is named, or asks that such be trusted.
    """
    for path, value in entries(config):
        asks = path.endswith("trust_remote_code") and value not in (None, False)
        if asks or (is_implementation(path) and isinstance(value, str) and "/" in value):
            raise ValueError(
                f"{name} was not loaded: its config wants somebody's code to be fetched and run "
                f"({one_line(path.strip('.'), 100)}: {one_line(value, 100)!r}); "
                "download it and take that entry out of the config if you want the model without"
            )


def is_implementation(path: str) -> bool:
    return "implementation" in path or "kernel" in path


def entries(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no container, with the keys that lead to it."""
    inside = config if isinstance(config, dict) else vars(config) if hasattr(config, "sub_configs") else None
    if inside is not None:
        for key, value in inside.items():
            yield from entries(value, f"{path}.{key}")
    elif isinstance(config, list | tuple):
        for value in config:
            yield from entries(value, path)
    else:
        yield path, config


def place_of(name: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a model, and what else it must be told: of FOLDER/x.gguf or OWNER/NAME/x.gguf the file.

    A folder that holds one .gguf file and no config means that file.
    """
    folder = Path(name)
    files = [path.name for path in folder.glob("*.gguf")] if folder.is_dir() else []
    if len(files) == 1 and not (folder / "config.json").exists():
        return name, {"gguf_file": files[0]}
    if name.endswith(".gguf") and not folder.is_dir():
        return str(folder.parent), {"gguf_file": folder.name}
    return name, {}


def transformers_config(name: str) -> Any:
    """A model's config, to be handed to whatever builds the model, so that nothing reads it once more.

    Where attention is computed by a library that may not be here, transformers' own choice takes its place.

    Args:
        name: a hub's name, a folder or a .gguf file.
    Raises:
        ValueError: it names code, or can't be understood. OSError: there is none, or the hub can't be reached.
    """
    from transformers import AutoConfig, PreTrainedConfig

    place, file = place_of(name)
    with in_one_sentence(f"{name} has a config that can't be used"):
        if file:
            stored_shapes(name)  # what a file counts is checked before a library counts on it
            tell_gguf_version()
        refuse_remote_code(PreTrainedConfig.get_config_dict(place, **file)[0], name)  # all that is said
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **file)
        refuse_remote_code(config, name)  # and what was heard, if the file was another by then
    for setting in ("_attn_implementation", "_experts_implementation"):
        chosen = {value for path, value in entries(config) if setting in path and value is not None}
        if not chosen.issubset(OWN):
            setattr(config, setting, None)  # transformers sets it in the configs within, too
    return config


def tell_gguf_version() -> None:
    """Under Python 3.10 older transformers (5.15, not 5.24) asks gguf for its version, which gguf does not tell."""
    import gguf

    vars(gguf).setdefault("__version__", version("gguf"))


def config_of_weights(name: str, kind: Any) -> Any:
    """As `transformers_config`, of a model that is to be loaded: one that its file's own tensors can fill.

    Args:
        kind: what loads it, such as AutoModelForCausalLM.
    Raises:
        ValueError: there are more layers, or larger ones; transformers would build them all and fill them with random
            numbers.
    """
    config = transformers_config(name)
    shapes = stored_shapes(name)
    numbers = [int(part) for tensor in shapes for part in tensor.split(".") if part.isdecimal()]
    for path, value in entries(config):
        if numbers and path.endswith(("layers", "n_layer")) and isinstance(value, int) and value > max(numbers) + 1:
            raise ValueError(f"{name} has weights of {max(numbers) + 1} layers, and its config {path[1:]} = {value}")
    with in_one_sentence(f"{name} has a config that can't be used"), torch.device("meta"):  # which takes no memory
        model = kind.from_config(config, trust_remote_code=False)
    described, stored = sum(part.numel() for part in model.parameters()), sum(map(prod, shapes.values()))
    # Two matrices may be tied and stored as one; of weights of four bits eight may lie in one number.
    if shapes and described > (16 if getattr(config, "quantization_config", None) else 2) * stored:
        raise ValueError(f"{name} has {stored:,} weights, and its config describes a model of {described:,}")
    return config


def stored_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a model and their shapes, from the headers of its .gguf or its safetensors; none where it has no
    such."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    place, gguf = place_of(name)
    if gguf:
        return tensor_shapes(Path(cached_file(place, gguf["gguf_file"])))
    with in_one_sentence(f"{name} has weights that can't be read as safetensors"):
        files = [cached_file(name, SAFE_WEIGHTS_NAME, **OPTIONAL)]
        if files == [None] and (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **OPTIONAL)):
            shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
            files = [cached_file(name, shard, **OPTIONAL) for shard in sorted(set(shards))]
        return dict(pair for file in files if file for pair in shapes_in(file))


def shapes_in(file: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():
            yield key, tuple(opened.get_slice(key).get_shape())


def check_open_clip_config(name: str) -> None:
    """As `config_of_weights`, of a model that holds its own shape ("hf-hub:owner/name", "local-dir:folder").

    Raises:
        ValueError: it names code, can't be understood, or describes more numbers than its file has bytes.
    """
    import open_clip

    with in_one_sentence(f"{name} has a config that can't be used"):
        config = open_clip.get_model_config(name)
        refuse_remote_code(config, name)
        text_tower = config.get("text_cfg", {}).get("hf_model_name")
    for described in (config, transformers_config(text_tower) if text_tower else {}):
        refuse_too_deep(name, described)
    build = partial(open_clip.create_model, name, load_weights=False, pretrained_text=False, device="meta")
    refuse_too_large(name, build, open_clip_file(name))


def open_clip_file(name: str) -> Path | None:
    """The weights that open_clip will load; of a folder without its names the largest."""
    from transformers.utils import cached_file

    scheme, _, place = name.partition(":")
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    found = [Path(file) for file in (cached_file(place, known, **OPTIONAL) for known in names) if file]
    if not found and scheme == "local-dir":
        return largest(weights_in(place))
    return found[0] if found else None


def check_timm_config(name: str) -> None:
    """As `check_open_clip_config`, of a ViT that holds its own shape ("hf-hub:owner/name", "local-dir:folder")."""
    import timm
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    scheme, _, place = name.partition(":")
    repository, _, revision = place.partition("@")
    fetch = partial(hf_hub_download, repository, revision=revision or None)
    file = Path(place, "config.json") if scheme == "local-dir" else Path(fetch("config.json"))
    with in_one_sentence(f"{name} has a config that can't be used"):
        config = json.loads(file.read_text(encoding="utf-8"))
        refuse_remote_code(config, name)
        chosen = (config.get("pretrained_cfg") or config).get("hf_hub_filename")
    refuse_too_deep(name, config)
    if scheme == "local-dir":
        weights = weights_in(place)
    else:
        weights = []
        for known in [chosen] if chosen else ["model.safetensors", "pytorch_model.bin"]:
            with suppress(EntryNotFoundError):
                weights.append(Path(fetch(known)))
                break
    refuse_too_large(name, partial(timm.create_model, name), largest(weights))


def largest(files: list[Path]) -> Path | None:
    return max(files, key=lambda file: file.stat().st_size, default=None)


def weights_in(folder: str) -> list[Path]:
    return [file for file in Path(folder).glob("*") if file.suffix in (".safetensors", ".bin", ".pth", ".pt")]


def refuse_too_deep(name: str, config: Any) -> None:
    for path, value in entries(config):
        if path.endswith(("layers", "depth", "depths", "blocks")) and isinstance(value, int) and value > DEEPEST:
            raise ValueError(f"{name} has a config of {one_line(value, 40)} layers; no model has over {DEEPEST}")


def refuse_too_large(name: str, build: Callable[[], torch.nn.Module], file: Path | None) -> None:
    """Raises ValueError if a model, laid out without memory, has more numbers than its file has bytes."""
    with in_one_sentence(f"{name} has a config that can't be used"), torch.device("meta"), rates_on_the_cpu():
        numbers = sum(part.numel() for part in build().parameters())
    if file and numbers > file.stat().st_size:
        size = file.stat().st_size
        raise ValueError(f"{name} has weights of {size:,} bytes, and its config describes {numbers:,} weights")


class rates_on_the_cpu(TorchFunctionMode):
    """Inside, `torch.linspace` of as many numbers as a model has layers makes them on the meta device, too: older timm
    reads dropout rates off it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.linspace:
            steps = kwargs.get("steps", args[2] if len(args) > 2 else None)
            kwargs |= {"device": "cpu"} if isinstance(steps, int) and steps <= DEEPEST else {}
        return function(*args, **kwargs)


@contextmanager
def without_pickled_code(name: str) -> Iterator[None]:
    """Inside, `torch.load` makes tensors and nothing else, though a library asks for more: under timm 1.0.20 a file of
    weights in a folder may name what is to be run."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    except (UnpicklingError, EOFError, RuntimeError) as error:  # the last is what newer timm makes of the first
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        if "nsupported global" in str(error):
            why = "holds more than tensors, which would have to be run as code; take one in safetensors' format"
        else:
            why = "is damaged, or of a format that its library can't read"
        raise ValueError(f"{name} was not loaded: its file of weights {why}") from error
    finally:
        del os.environ[WEIGHTS_ONLY]
        os.environ |= {} if before is None else {WEIGHTS_ONLY: before}


@contextmanager
def in_one_sentence(saying: str) -> Iterator[None]:
    """Whatever a library raises because of what a file says becomes a ValueError: libraries don't expect strangers.

    What tells of this machine passes: a missing library, file or network, no memory left; so do this package's own
    refusals.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError and one_line(error, 600) == str(error):
            raise
        raise ValueError(f"{saying}: {one_line(error) or type(error).__name__}") from error
