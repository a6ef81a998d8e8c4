"""The models of the notebooks, each with what an attribution needs to know about it.

`load_demo(kind)` gives the small model shipped in data/, `load_pretrained(kind, name)` a public one from its hub.
Both return a `LoadedModel`, so a notebook written for one runs on the other.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoints import LONGEST, Checkpoint, damaged, read_checkpoint
from .demo_vits import SIDE, VITS, build
from .room import announce, cause, device_and_dtype, or_a_smaller_one
from .sentences import one_line, similar_ones
from .token_bytes import bytes_of, whole_characters
from .untrusted import (
    check_open_clip_config,
    check_timm_config,
    config_of_weights,
    in_one_sentence,
    place_of,
    without_pickled_code,
)

PACKAGE = Path(__file__).resolve().parent
DATA = PACKAGE / "data" if (PACKAGE / "data").is_dir() else PACKAGE.parent / "data"  # in a wheel; in a clone


@dataclass
class LoadedModel:
    """A model in eval mode, and where its tokens come from."""

    kind: str  # "vit", "clip" or "llama"
    name: str
    model: Any  # an nn.Module with the attributes of its library
    blocks: list[nn.Module]  # in forward order
    transform: Any = None  # picture -> (3, H, W); None for text-only models
    tokenizer: Any = None
    class_names: list[str] | None = None
    prefix_tokens: int = 0  # class and register tokens, which come before the patches
    grid: tuple[int, int] | None = None  # rows and columns of patches


def load_demo(kind: str) -> LoadedModel:
    """The small model that ships with this project, from data/demo_<kind>.safetensors.

    Args:
        kind: "vit", "clip" or "llama"; or another family of image models, which are of the kind "vit": "eva02",
            "beitv2", "flexivit", "siglip", "clip_vit", "deit3", "mixer"; or a smaller ViT: "vit_tiny", "vit_small",
            "vit_base".
    Returns:
        The model in eval mode on the CPU, fp32. How it was trained stands in its card, data/demo_<kind>.md.
    Raises:
        ValueError: another kind, or a damaged checkpoint.
        FileNotFoundError: a missing checkpoint.
    """
    build = _loader(DEMOS, kind)
    checkpoint = read_checkpoint(DATA / f"demo_{kind}.safetensors")
    with checkpoint.building():
        return build(checkpoint)


def load_pretrained(kind: str, name: str, device_map: str | None = None) -> LoadedModel:
    """A public model, downloaded once, then taken from the Hugging Face cache.

    Args:
        kind: "vit", "clip" or "llama".
        name: for "vit" a timm name; for "llama" a hub's name, a folder or a .gguf file ("folder/x.gguf", or a hub's
            "owner/name/x.gguf"); for "clip" open_clip's name and tag, "ViT-B-16/laion2b_s34b_b88k", a name and a file
            in place of the tag, "ViT-B-16/folder/weights.safetensors", or "hf-hub:owner/name" or "local-dir:folder",
            which hold their own shape.
        device_map: of a "llama": "auto" spreads one that is too large for a device over all there are (accelerate).
    Returns:
        The model in eval mode: a "llama" on the GPU in half precision where there is one, all others on the CPU, fp32.
    Raises:
        ValueError: an unknown kind, or a model without Transformer blocks in the usual place.
        OSError: the hub can't be reached, or refuses the model. For an unknown name, whatever its library raises.
        torch.OutOfMemoryError: the model doesn't fit; what to take instead is said.
    """
    load = _loader(PRETRAINED, kind)
    if device_map is None:
        return load(name)
    if kind != "llama":
        raise ValueError(f"device_map spreads language models over devices; {name} is none")
    return load(name, device_map)


def seen_picture(loaded: LoadedModel, pixels: Tensor) -> np.ndarray:
    """What the model sees, for people: (H, W, 3) uint8 from its input (3, H, W), whose normalisation is undone."""
    normalise = [
        step for step in getattr(loaded.transform, "transforms", []) if hasattr(step, "mean") and hasattr(step, "std")
    ]
    mean, std = (normalise[-1].mean, normalise[-1].std) if normalise else (0.5, 0.5)
    mean, std = (torch.as_tensor(value, dtype=pixels.dtype).reshape(-1, 1, 1) for value in (mean, std))
    return ((pixels * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()


def kind_of(name: str) -> str:
    """Whose model a name is: "vit", timm's; "clip", open_clip's; else "llama", transformers'."""
    import open_clip
    import timm

    if timm.is_model(name.split(".")[0]):
        return "vit"
    is_pair = name.split("/")[0] in open_clip.list_models() or name.startswith("local-dir:")
    return "clip" if is_pair else "llama"


# ---- ViT (timm) ----


def _demo_vit(family: str, checkpoint: Checkpoint) -> LoadedModel:
    sizes = checkpoint.sizes("architecture", _demo_vit_sizes(family, checkpoint))
    names = checkpoint.read("class_names")
    if not _are_texts(names) or len(names) != sizes["num_classes"]:
        raise damaged(checkpoint.path, f"its header's 'class_names' isn't a list of {sizes['num_classes']} names")
    model = checkpoint.fill(build(family, sizes)).eval()
    checkpoint.tried(model, torch.zeros(1, 3, SIDE, SIDE))
    return _describe_vit(f"demo {family}", model, _demo_transform, names)


def _demo_vit_sizes(family: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a header may say: the sizes of the file's own tensors, and numbers of heads."""
    classes, width = checkpoint.shape("head.weight", 2)
    stem, depth = ("stem", "num_blocks") if family == "mixer" else ("patch_embed", "depth")
    allowed = {
        "img_size": SIDE,
        "patch_size": checkpoint.shape(f"{stem}.proj.weight", 4)[-1],
        "embed_dim": width,
        depth: checkpoint.count("blocks."),
        "num_classes": classes,
    }
    return allowed if family == "mixer" else allowed | {"num_heads": range(1, width + 1)}


def _pretrained_vit(name: str) -> LoadedModel:
    import timm
    from huggingface_hub.errors import LocalEntryNotFoundError
    from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ValueError(f"timm has no model {name!r}; {similar_ones(name.split('.')[0], timm.list_models())}")
    about = timm.get_pretrained_cfg(name)
    if about is not None and about.hf_hub_id:
        announce("vit", name, about.hf_hub_id, "model.safetensors", "pytorch_model.bin")
    try:
        if name.startswith(("hf-hub:", "local-dir:")):
            check_timm_config(name)
        model = timm.create_model(name, pretrained=True)
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, "the name of a model that is", "vit") from error
    info = ImageNetInfo()
    is_imagenet = model.num_classes == info.num_classes()
    class_names = [info.index_to_description(i) for i in range(model.num_classes)] if is_imagenet else None
    # Many models were evaluated on a middle cut; here a square picture is seen whole, so that maps lie over all of it.
    transform = create_transform(**{**resolve_model_data_config(model), "crop_pct": 1.0})
    return _describe_vit(name, model, transform, class_names)


def _describe_vit(name: str, model: Any, transform: Callable, class_names: list[str] | None) -> LoadedModel:
    stem: Any = getattr(model, "patch_embed", None) or getattr(model, "stem", None)  # the latter, of MLP-Mixers
    if not hasattr(model, "blocks") or not hasattr(stem, "grid_size"):
        raise ValueError(f"{name} has no blocks and patch_embed, as timm's Vision Transformers have; pick one of those")
    return LoadedModel(
        kind="vit",
        name=name,
        model=model.eval(),
        blocks=list(model.blocks),
        transform=transform,
        class_names=class_names,
        prefix_tokens=getattr(model, "num_prefix_tokens", 0),
        grid=tuple(stem.grid_size),
    )


def _demo_transform(picture: Image.Image) -> Tensor:
    """Any picture -> (3, SIDE, SIDE) in [-1, 1], as in training: cut square at the middle, then resized."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1


# ---- Llama and its relatives (transformers) ----

UNGATED_LLAMA = "unsloth/Llama-3.2-1B"


def _demo_llama(checkpoint: Checkpoint) -> LoadedModel:
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**_demo_llama_config(checkpoint))
    rows = config.vocab_size
    backend = Tokenizer.from_str(json.dumps(checkpoint.read("tokenizer")))
    vocabulary = backend.get_vocab()
    settings = checkpoint.read("tokenizer_settings")
    special = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token")}
    if max(vocabulary.values()) >= rows or not vocabulary.keys() >= set(special.values()):
        raise damaged(checkpoint.path, f"its tokenizer has other tokens than the model's {rows}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=str(settings["chat_template"]), **special
    )
    words = tokenizer("A word.", return_tensors="pt")["input_ids"]
    if len(tokenizer) > rows or words.max() >= rows:
        raise damaged(checkpoint.path, f"its tokenizer has other tokens than the model's {rows}")

    if "model.embed_tokens.weight" in checkpoint.tensors:  # tied, so stored once
        checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"]
    model = checkpoint.fill(LlamaForCausalLM(config)).eval()
    checkpoint.tried(lambda ids: model(ids).logits, words)
    return _describe_llama("demo llama", model, tokenizer)


def _demo_llama_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What has a say in the model, of all that transformers writes down."""
    first = "model.layers.0."
    rows, width = checkpoint.shape("model.embed_tokens.weight", 2)
    queries, keys = (checkpoint.shape(f"{first}self_attn.{name}_proj.weight", 2)[0] for name in "qk")
    factors = (1e-3, 1e3)
    allowed = {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": checkpoint.shape(f"{first}mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": checkpoint.count("model.layers."),
        "num_attention_heads": range(1, queries + 1),
        "num_key_value_heads": range(1, keys + 1),
        "head_dim": range(1, queries + 1),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rms_norm_eps": (0.0, 1.0),
        "max_position_embeddings": range(1, LONGEST),
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": (1.0, 1e9),
            "factor": factors,
            "low_freq_factor": factors,
            "high_freq_factor": factors,
            "original_max_position_embeddings": range(1, LONGEST),
        },
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), range(rows)),
    }
    config = checkpoint.sizes("config", allowed, others_matter=False)
    heads = [config["num_attention_heads"], config["num_key_value_heads"]]
    if [heads[0] * config["head_dim"], heads[1] * config["head_dim"]] != [queries, keys] or heads[0] % heads[1]:
        raise damaged(checkpoint.path, f"its header's heads aren't those of {queries} queries and {keys} keys")
    return config


def _pretrained_llama(name: str, device_map: str | None = None) -> LoadedModel:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return _download_llama(name, device_map)
    except OSError as error:
        refusal: Any = cause(error, HfHubHTTPError)
        misspelled = isinstance(refusal, RepositoryNotFoundError) and not isinstance(refusal, GatedRepoError)
        if refusal is not None and refusal.response.status_code in (401, 403) and not misspelled:
            if name == UNGATED_LLAMA:
                raise
            status = refusal.response.status_code
            warnings.warn(
                f"{name} is gated and the hub answered {status}; loading {UNGATED_LLAMA} instead. "
                f"To use {name}, accept its licence at https://huggingface.co/{name} and log in: `hf auth login`, "
                "or in Colab a secret HF_TOKEN.",
                stacklevel=4,
            )
            return _download_llama(UNGATED_LLAMA, device_map)
        if cause(error, LocalEntryNotFoundError) is not None:
            raise _unreachable(name, "the path of a folder or of a .gguf file that holds a model", "llama") from error
        raise


def _download_llama(name: str, device_map: str | None) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, dtype = device_and_dtype()
    place, file = place_of(name)
    if device_map is None:  # else nobody knows which memory is meant
        announce("llama", name, place, *(file.values() or ["*.safetensors"]))
    config = config_of_weights(name, AutoModelForCausalLM)
    safe = {"trust_remote_code": False, "config": config, **file}  # said aloud, or transformers asks
    tokenizer = AutoTokenizer.from_pretrained(place, **safe)
    safe |= _unpacked() if file else {"use_safetensors": True}
    options = {"dtype": dtype, "device_map": device_map, "output_loading_info": True}
    model, found = AutoModelForCausalLM.from_pretrained(place, **options, **safe)
    if missing := sorted(found["missing_keys"]):  # transformers makes them up
        raise ValueError(f"{name} lacks {len(missing)} of its weights, such as {one_line(missing[0], 100)}")
    model = model if device_map else model.to(device)
    return _describe_llama(name, model, tokenizer)


def _unpacked() -> dict[str, Any]:
    """What makes a GGUF's weights ordinary ones; else newer versions of transformers keep them packed, for a kernel of
    the hub that is run wherever `kernels` is installed and that has no gradient."""
    import transformers

    known = hasattr(transformers, "GgufConfig")
    return {"quantization_config": transformers.GgufConfig(dequantize=True)} if known else {}


def _describe_llama(name: str, model: Any, tokenizer: Any) -> LoadedModel:
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if blocks is None:
        raise ValueError(f"{name} has no model.layers, as Llama and its relatives have; pick one of those")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # only ever behind an attention mask
    # gradients are wanted for tokens, not for weights: frozen weights save the activations those would need
    return LoadedModel("llama", name, model.eval().requires_grad_(False), list(blocks), tokenizer=tokenizer)


class Unreachable(OSError):
    """The hub can't be reached, and what is asked of it isn't in its cache."""


def _unreachable(name: str, alternative: str, kind: str) -> Unreachable:
    return Unreachable(
        f"{name} is not on this machine and the hub can't be reached. Connect to the internet (and unset "
        f'HF_HUB_OFFLINE), give {alternative}, or use load_demo("{kind}").'
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


CUT = "\N{REPLACEMENT CHARACTER}"  # decoding's word for a part of a character


def token_texts(tokenizer: Any, ids: list[int] | Tensor) -> list[str]:
    """Every token as it stands in the text, with its leading space: [" Ben", "'s", " kite"].

    Args:
        tokenizer: one of transformers.
        ids: (T,) token ids.
    Returns:
        T strings, which together are the text. A character that is cut over several tokens (of byte-level tokenizers)
        stands whole at the first of them, and the others are ""; one that isn't all there is its bytes, "<E7><BA>".
    """
    tokens = tokenizer.convert_ids_to_tokens(torch.as_tensor(ids).tolist())
    texts = [_text_of(token, tokenizer.convert_tokens_to_string([token])) for token in tokens]
    pieces = [(bytes_of(token) or b"") if CUT in text else b"" for token, text in zip(tokens, texts, strict=True)]
    for are_cut, places in groupby(range(len(tokens)), lambda place: bool(pieces[place])):
        if are_cut:
            run = list(places)
            for place, text in zip(run, whole_characters([pieces[place] for place in run]), strict=True):
                texts[place] = text
    return texts


def _text_of(token: str, alone: str) -> str:
    """A token's text, of what it is decoded to by itself, which may lack a leading space: that of SentencePiece, marked
    with U+2581, and in transformers 5.1 to 5.15 that of a Llama from a .gguf file, whose mark is U+0120."""
    mark = token[:1]
    if mark not in ("\u2581", "\u0120") or alone.startswith(mark):
        return alone
    return " " * (len(token) - len(token.lstrip(mark))) + alone.lstrip(" ")


# ---- CLIP (open_clip) ----


def _demo_clip(checkpoint: Checkpoint) -> LoadedModel:
    from open_clip import CLIP, SimpleTokenizer

    context, width = checkpoint.shape("positional_embedding", 2)
    tokenizer = SimpleTokenizer(context_length=context)
    architecture = checkpoint.sizes("architecture", _demo_clip_architecture(checkpoint, tokenizer.vocab_size))
    vocabulary = checkpoint.read("vocabulary")
    rows = checkpoint.shape("token_embedding.weight", 2)[0]
    if not isinstance(vocabulary, list) or not all(type(i) is int for i in vocabulary) or len(vocabulary) != rows - 1:
        raise damaged(checkpoint.path, f"its header's 'vocabulary' isn't a list of {rows - 1} tokens")
    if vocabulary != sorted({*vocabulary}) or not 0 <= vocabulary[0] <= vocabulary[-1] < tokenizer.vocab_size:
        raise damaged(checkpoint.path, f"its header's 'vocabulary' isn't of {tokenizer.vocab_size} tokens in order")
    small = checkpoint.tensors["token_embedding.weight"]
    table = small[:1].repeat(tokenizer.vocab_size, 1)  # row 0 stands for every token that training didn't know
    table[vocabulary] = small[1:]
    checkpoint.tensors["token_embedding.weight"] = table
    model = checkpoint.fill(CLIP(**architecture)).eval()
    checkpoint.tried(model, torch.zeros(1, 3, SIDE, SIDE), tokenizer(["a"]))
    return _describe_clip("demo clip", model, _demo_transform, tokenizer)


def _demo_clip_architecture(checkpoint: Checkpoint, words: int) -> dict[str, Any]:
    """What the header must say: sizes of the tensors, and numbers of heads."""
    context, width = checkpoint.shape("positional_embedding", 2)
    picture_width, _, _, patch = checkpoint.shape("visual.conv1.weight", 4)
    return {
        "embed_dim": checkpoint.shape("text_projection", 2)[1],
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": patch,
            "width": picture_width,
            "layers": checkpoint.count("visual.transformer.resblocks."),
            "head_width": range(1, picture_width + 1),
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": words,
            "width": width,
            "heads": range(1, width + 1),
            "layers": checkpoint.count("transformer.resblocks."),
        },
    }


def _pretrained_clip(name: str) -> LoadedModel:
    import open_clip
    from huggingface_hub.errors import LocalEntryNotFoundError

    itself = name.startswith(("hf-hub:", "local-dir:"))
    architecture, _, tag = (name, "", "") if itself else name.partition("/")
    known = open_clip.list_models()
    if not itself and architecture not in known:
        raise ValueError(f"open_clip has no model {architecture!r}; {similar_ones(architecture, known, cutoff=0.4)}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not itself and tag not in tags and not Path(tag).is_file():
        fault = f"{tag!r} is neither a file nor weights that open_clip has for it" if tag else "it needs weights, too"
        raise ValueError(
            f"{architecture}: {fault}; write {architecture}/FILE, or a tag in place of FILE: "
            f"{', '.join(tags) or 'none is known'}"
        )
    place = f"{name.split(':')[1]}/" if itself else open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "")
    repository, _, file = place.rpartition("/")
    if repository:
        announce("clip", name, repository, file or "open_clip*.safetensors", "open_clip*.bin")
    if itself:
        check_open_clip_config(name)
    try:
        model, _, transform = open_clip.create_model_and_transforms(architecture, tag or None)
    except (OSError, RuntimeError) as error:
        if cause(error, LocalEntryNotFoundError) is None:
            raise
        raise _unreachable(name, "a file of weights, NAME/FILE,", "clip") from error
    return _describe_clip(name, model, transform, open_clip.get_tokenizer(architecture))


def _describe_clip(name: str, model: Any, transform: Callable, tokenizer: Any) -> LoadedModel:
    tower = model.visual
    trunk = getattr(tower, "trunk", None)  # a timm model, as in SigLIP and EVA-CLIP
    blocks = getattr(trunk, "blocks", None) if trunk is not None else getattr(tower.transformer, "resblocks", None)
    if blocks is None:
        raise ValueError(f"the image tower of {name} has no list of Transformer blocks; pick a ViT")
    return LoadedModel(
        kind="clip",
        name=name,
        model=model.eval(),
        blocks=list(blocks),
        transform=transform,
        tokenizer=tokenizer,
        prefix_tokens=1 if trunk is None else trunk.num_prefix_tokens,
        grid=tuple(tower.grid_size if trunk is None else trunk.patch_embed.grid_size),
    )


# ---- which function loads what ----


def _carefully(kind: str, load: Callable) -> Callable:
    @wraps(load)
    def loading(name: str, *options: Any) -> LoadedModel:
        with in_one_sentence(f"{name} can't be loaded"), or_a_smaller_one(kind, name), without_pickled_code(name):
            return load(name, *options)

    return loading


DEMOS: dict[str, Callable[[Checkpoint], LoadedModel]] = {
    **{family: partial(_demo_vit, family) for family in VITS},
    "llama": _demo_llama,
    "clip": _demo_clip,
}
PRETRAINED = {
    "vit": _carefully("vit", _pretrained_vit),
    "llama": _carefully("llama", _pretrained_llama),
    "clip": _carefully("clip", _pretrained_clip),
}


def _loader(loaders: dict[str, Callable], kind: str) -> Callable:
    if kind not in loaders:
        raise ValueError(f"unknown kind of model {kind!r}; there are {', '.join(loaders)}")
    return loaders[kind]
