"""What has to be known of timm, transformers and open_clip: how a model is called, and what it says of itself.

Nothing else that explains a model names a library or one of its classes (zoo.py makes models, to be swept). Where a
model says nothing, streams.py and layout.py find out by running it.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .engine import UnsupportedOperation

TOKEN_IDS = "input_ids"
EMBEDDINGS = "inputs_embeds"
ANSWERS = ("logits", "logits_per_image", "prediction_logits", "pred_logits")
EMBEDDED = ("image_embeds", "text_embeds", "pooler_output")  # one vector a sample, of a tower without a head
CACHES = ("cache", "past_key_values")  # of keys and values, as transformers names them since 5.24 and before
REMEMBERED = (*CACHES, "past_key_value", "cache_params", "past_buckets_states", "mems")  # of earlier calls
STREAM_ARGUMENTS = ("hidden_states", "x", "src", "input", "inputs")


def plain(model: nn.Module) -> Any:
    """The model itself, not its compiled wrapper."""
    return getattr(model, "_orig_mod", model)


def name_of(model: nn.Module) -> str:
    return type(plain(model)).__name__


# ---- what a model is given -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """One tensor, or keyword arguments, as the user passed them."""

    given: Tensor | Mapping[str, Any]
    about_picture: bool = False  # the explained tokens are a picture's, and a text is there beside them

    @property
    def tensors(self) -> dict[str, Tensor]:
        if isinstance(self.given, Tensor):
            return {"": self.given}
        return {name: value for name, value in self.given.items() if isinstance(value, Tensor)}

    @property
    def text(self) -> Tensor | None:
        """Token ids (B, T) or their embeddings (B, T, C) that the explained tokens show; None where there are none."""
        return None if self.about_picture else self.words

    @property
    def words(self) -> Tensor | None:
        """The text that the model is given, explained or not."""
        named = self.tensors
        for name in (TOKEN_IDS, EMBEDDINGS):
            if name in named:
                return named[name]
        others = [tensor for name, tensor in named.items() if name in ("", "inputs")]
        return next((tensor for tensor in others if not tensor.is_floating_point()), None)

    @property
    def answered(self) -> Tensor | None:
        """The text whose positions are the rows of a generating model's answer: a decoder's own, where it has one."""
        return self.tensors.get("decoder_input_ids", self.tensors.get("decoder_inputs_embeds", self.words))

    @property
    def picture(self) -> str | None:
        """The name of the pixels, (B, channels, height, width) or a video's (B, ..., height, width); "" for the one
        tensor; None where there is no picture."""
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and tensor.dim() in (4, 5) and "mask" not in name:
                return name
        return None

    @property
    def main(self) -> Tensor:
        """The tensor that tells how many samples there are."""
        if self.text is not None:
            return self.text
        if self.picture is not None:
            return self.tensors[self.picture]
        return next((tensor for tensor in self.tensors.values() if tensor.is_floating_point()), torch.empty(0))

    @property
    def samples(self) -> int:
        return len(self.main)

    @property
    def mask(self) -> Tensor | None:
        """(B, T), 0 at padding."""
        mask = self.tensors.get("attention_mask")
        return mask if mask is not None and mask.dim() == 2 and not self.about_picture else None

    @property
    def answered_mask(self) -> Tensor | None:
        name = "decoder_attention_mask" if self.answered is not self.words else "attention_mask"
        mask = self.tensors.get(name)
        return mask if mask is not None and mask.dim() == 2 else None

    def replaced(self, name: str, tensor: Tensor) -> Inputs:
        return replace(self, given=tensor if isinstance(self.given, Tensor) else {**self.given, name: tensor})

    def copied(self) -> Tensor | dict[str, Any]:
        if isinstance(self.given, Tensor):
            return self.given.clone()
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in self.given.items()}

    def settings(self) -> tuple:
        """All that is given beside the picture and the text, as far as it can be told apart by its values."""
        if isinstance(self.given, Tensor):
            return ()
        explained = [self.words, None if self.picture is None else self.tensors[self.picture]]
        beside = {name: value for name, value in self.given.items() if not any(value is one for one in explained)}
        return tuple(
            (name, value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            if isinstance(value, Tensor)
            else (name, repr(value))
            for name, value in sorted(beside.items())
        )

    def choices(self) -> tuple:
        """What is given beside tensors: which way the model goes may depend on it."""
        given = {} if isinstance(self.given, Tensor) else self.given
        return tuple((name, repr(given[name])) for name in sorted(given) if not isinstance(given[name], Tensor))

    def shapes(self) -> tuple:
        return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(self.tensors.items()))


# ---- how a model is called -------------------------------------------------------------------------------------------


def accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(plain(model).forward).parameters


def generates(model: nn.Module) -> bool:
    """Does it continue texts, so that its last row is the one that is meant?"""
    return bool(getattr(plain(model), "can_generate", bool)())


def pairs_pictures_and_texts(model: nn.Module) -> bool:
    """open_clip's models: two towers that never run in one forward pass here."""
    return hasattr(plain(model), "encode_image") and hasattr(plain(model), "encode_text")


def call(model: nn.Module, inputs: Inputs, rows: Tensor | None = None) -> Any:
    """The model's answer: its logits, else all that it returns. rows: the positions whose logits are wanted."""
    given = inputs.copied()  # the model may change them in place
    with blamed_on_inputs(model, inputs), torch.compiler.set_stance("force_eager"):  # compiled, no graph shows
        if pairs_pictures_and_texts(model) and isinstance(given, Tensor):
            encode = plain(model).encode_image if inputs.text is None else plain(model).encode_text
            return encode(given, normalize=True)
        settings: dict[str, Any] = {}
        if generates(model) and accepts(model, "use_cache"):
            settings["use_cache"] = False
        if rows is not None:
            settings["logits_to_keep"] = rows
        if isinstance(given, Tensor):
            return answer_of(model(given, **settings))
        return answer_of(model(**{**given, **settings}))


@contextmanager
def biases_in_sight(model: nn.Module) -> Iterator[None]:
    """Inside, frozen biases of bitsandbytes' layers are leaves: what its functions add, observed() can't see."""
    layers = [layer for layer in model.modules() if type(layer).__module__.startswith("bitsandbytes.")]
    named = ((layer, layer._parameters.get("bias")) for layer in layers)
    biases = {layer: bias for layer, bias in named if bias is not None and not bias.requires_grad}
    try:
        for layer, bias in biases.items():
            layer._parameters["bias"] = nn.Parameter(bias.detach())
        yield
    finally:
        for layer, bias in biases.items():
            layer._parameters["bias"] = bias


def blamed_on_inputs(model: nn.Module, inputs: Inputs) -> AbstractContextManager[None]:
    """Inside, what the model's own code raises tells that it was that."""
    missing = "decoder_input_ids"
    hint = f" (it is given no {missing})" if accepts(model, missing) and missing not in inputs.tensors else ""
    return blamed(f"{name_of(model)} itself doesn't run on these inputs{hint}")


@contextmanager
def blamed(sentence: str) -> Iterator[None]:
    """Inside, what other people's code raises becomes a ValueError that begins with the sentence. Out of memory, and
    what is ours, passes."""
    try:
        yield
    except Exception as error:
        if (
            isinstance(error, torch.OutOfMemoryError | MemoryError | Warning)
            or "memory" in str(error)
            or is_ours(error)
        ):
            raise
        raise ValueError(f"{sentence}: {type(error).__name__}: {error}") from error


def is_ours(error: Exception) -> bool:
    """A refusal that this package raises; what PyTorch raises when it is called from here isn't."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised_here = Path(last.filename).is_relative_to(Path(__file__).parent) and (last.line or "").startswith("raise")
    return raised_here and isinstance(error, ValueError | UnsupportedOperation)


def answer_of(result: Any) -> Any:
    """The logits among what a model returned; everything where nothing is called so."""
    if isinstance(result, Tensor):
        return result
    named = result if isinstance(result, Mapping) else vars(result) if hasattr(result, "__dict__") else {}
    for name in ANSWERS:
        if isinstance(named.get(name), Tensor):
            return named[name]
    return result


def embedding_of(answer: Any) -> Tensor | None:
    """One vector a sample (B, D) of a tower's answer, where it has one."""
    if isinstance(answer, Tensor):
        return answer
    named = answer if isinstance(answer, Mapping) else {}
    return next((named[name] for name in EMBEDDED if isinstance(named.get(name), Tensor)), None)


# ---- where the tokens are --------------------------------------------------------------------------------------------


def explains_picture_for_texts(model: nn.Module) -> bool:
    """CLIP and its kind in transformers: both towers run, and the picture's is explained, for the given texts."""
    return all(hasattr(plain(model), name) for name in ("get_image_features", "vision_model", "text_model"))


def searched(model: Any, inputs: Inputs) -> nn.Module:
    """The part of the model whose tokens are explained: of a pair of towers the one for pictures, else all of it."""
    model = plain(model)
    if explains_picture_for_texts(model):
        return model.vision_model
    if pairs_pictures_and_texts(model):
        if inputs.text is None:
            return model.visual
        return getattr(model, "text", None) or getattr(model, "transformer", None) or model
    return model


def text_config(model: nn.Module) -> Any:
    config = getattr(plain(model), "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if get is not None else config


def longest_text(model: nn.Module) -> int | None:
    """How many positions the model knows; None where it doesn't say, or has no limit."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def attention_heads(model: nn.Module) -> int:
    """At least so many; 1 where the model doesn't say."""
    said = [getattr(text_config(model), "num_attention_heads", None)]
    said += [getattr(module, "num_heads", None) for module in plain(model).modules()]
    return next((heads for heads in said if isinstance(heads, int)), 1)


def said_grids(model: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    """The (rows, columns) of patches that parts of the model report for pictures of `size`, likeliest first."""
    grids = []
    for module in plain(model).modules():
        dynamic = getattr(module, "dynamic_feat_size", None)  # timm's PatchEmbed
        if dynamic is not None:
            grids += [tuple(dynamic(size))] if getattr(module, "img_size", None) != size else []
        grid = getattr(module, "grid_size", None)
        if isinstance(grid, tuple | list) and len(grid) == 2:
            grids.append(tuple(grid))
        patch = getattr(module, "patch_size", None)
        patch = (patch, patch) if isinstance(patch, int) else patch
        if isinstance(patch, tuple | list) and len(patch) == 2 and all(isinstance(p, int) and p > 0 for p in patch):
            grids.append((size[0] // patch[0], size[1] // patch[1]))
    return list(dict.fromkeys(grids))


def picture_token_ids(model: nn.Module) -> list[int]:
    """The ids that stand for a picture's tokens in a text."""
    config = getattr(plain(model), "config", None)
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")
    ids = [getattr(config, name, None) for name in names]
    return [i for i in ids if isinstance(i, int)]


# ---- what is refused before the model runs ---------------------------------------------------------------------------


def check_inputs(model: nn.Module, given: Any) -> None:
    """Raises ValueError for inputs and models that can't be explained, with what, where and what to do."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}: give the torch.nn.Module itself")
    name = name_of(model)
    if isinstance(plain(model), torch.jit.ScriptModule):
        raise ValueError(f"{name} is TorchScript, whose steps nobody sees: give the model that it was made of")
    if torch.is_inference_mode_enabled():
        raise ValueError("there are no gradients inside torch.inference_mode(): call from outside of it")
    training = [part for part, module in plain(model).named_modules() if module.training and acts_in_training(module)]
    if plain(model).training or training:
        raise ValueError(
            f"{name if plain(model).training else training[0]} is in training mode; call model.eval() first"
        )
    if not isinstance(given, Tensor | Mapping):
        raise ValueError(
            f"inputs are a {type(given).__name__}: give a tensor, pictures (B, 3, H, W) or token ids (B, T), or a dict "
            "of the model's keyword arguments, as a tokenizer or processor returns"
        )
    inputs = Inputs(given)
    if isinstance(given, Mapping) and not all(isinstance(name, str) for name in given):
        raise ValueError(f"the names of inputs must be words, the model's arguments; got {list(given)}")
    check_numbers(model, inputs)
    for argument, tensor in inputs.tensors.items():
        label = f"{argument} of the input" if argument else "the input"
        if tensor.numel() == 0:
            raise ValueError(f"{label} is empty, {tuple(tensor.shape)}: there is nothing to explain")
        if tensor.is_floating_point() and not tensor.isfinite().all() and "mask" not in argument:
            raise ValueError(f"{label} holds NaN or infinity in {int((~tensor.isfinite()).sum())} places")
    remembered = [
        argument for argument in REMEMBERED if not isinstance(given, Tensor) and given.get(argument) is not None
    ]
    if remembered:
        raise ValueError(
            f"{remembered[0]} among the inputs stands for earlier tokens, which couldn't be explained, and changes "
            "with every run: leave it out and give the whole text"
        )
    if not inputs.tensors:
        raise ValueError("inputs hold no tensor: ask the tokenizer or processor for return_tensors='pt'")
    if inputs.main.dim() == 0 or inputs.samples == 0:
        raise ValueError(
            f"which of the inputs {', '.join(inputs.tensors)} is the text isn't known: give a dictionary with "
            f"{TOKEN_IDS}, or the token ids alone as one tensor"
        )
    check_batch(model, inputs)
    if inputs.mask is not None and not ((inputs.mask == 0) | (inputs.mask == 1)).all():
        raise ValueError("attention_mask must hold 1 for tokens and 0 for padding; this one holds other numbers")
    if inputs.mask is not None and not inputs.mask.bool().any(1).all():
        row = int((~inputs.mask.bool().any(1)).nonzero()[0])
        raise ValueError(f"attention_mask hides every token of sample {row}: there is nothing to explain")
    limit, text = longest_text(model), inputs.words
    if text is not None and limit is not None and text.shape[1] > limit:
        raise ValueError(f"the text has {text.shape[1]} tokens, and {name} knows {limit} positions: shorten it")
    known = vocabulary(model)
    if text is not None and known is not None and not text.is_floating_point() and int(text.max()) >= known:
        raise ValueError(
            f"the text holds token id {int(text.max())}, and {name} knows {known}: is it another tokenizer's?"
        )


def check_numbers(model: nn.Module, inputs: Inputs) -> None:
    """Tensors must hold numbers that autograd can follow."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError("inside a transform of torch.func no graph can be read: call attribute from outside of it")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"the parameters of {name_of(model)} were made inside torch.inference_mode(), so that no gradient can flow "
            "through them: make or load the model outside of it"
        )
    for name, tensor in inputs.tensors.items():
        if tensor is inputs.words or not tensor.is_complex():  # beside the text there may be frequencies, for example
            check_ordinary(name or "the input", tensor)
    if not any(hasattr(module, "_hf_hook") for module in plain(model).modules()):  # accelerate loads them when they run
        for name, parameter in plain(model).named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{name} is on the meta device, which holds no numbers: load its weights first")


def check_ordinary(name: str, tensor: Tensor) -> None:
    """Raises ValueError for tensors that hold no plain numbers side by side."""
    kinds = {
        "on the meta device, which holds no numbers": tensor.is_meta,
        "of torch's FakeTensorMode, which holds no numbers": isinstance(tensor, FakeTensor),
        "nested": tensor.is_nested,
        "quantised": tensor.is_quantized,
        "complex": tensor.is_complex(),
        "sparse": tensor.layout != torch.strided,
        str(tensor.dtype): tensor.is_floating_point() and tensor.itemsize == 1,  # of 8 bits, which don't add
    }
    kind = next((kind for kind, is_it in kinds.items() if is_it), None)
    if kind is not None:
        raise ValueError(f"{name} is {kind}: give an ordinary tensor, of integers or floating-point numbers")


def acts_in_training(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd)


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids there are; None where the model doesn't say."""
    try:
        return len(plain(model).get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def check_batch(model: nn.Module, inputs: Inputs) -> None:
    """The dimension of samples that is so easily forgotten."""
    named = inputs.tensors
    one = named.get("", named.get("pixel_values"))
    itself = plain(model)
    only_pictures = hasattr(itself, "patch_embed") or hasattr(itself, "default_cfg")
    only_pictures |= getattr(itself, "main_input_name", None) == "pixel_values"
    two_towers = pairs_pictures_and_texts(model)
    if one is not None and (only_pictures or two_towers and one.dim() > 2):
        if not one.is_floating_point():
            raise ValueError(
                f"pictures must be floating-point numbers, got {one.dtype}: convert and normalise them first"
            )
        if one.dim() == 3 and "spatial_shapes" not in named:  # which tells of flat patches
            raise ValueError(
                f"pictures need four dimensions, (B, 3, H, W), got {tuple(one.shape)}: add the one of samples, "
                "picture[None]"
            )
    elif inputs.words is not None and inputs.words.dim() < 2:
        raise ValueError(
            f"token ids need two dimensions, (B, T), got {tuple(inputs.words.shape)}: add the one of samples, ids[None]"
        )
