"""Every model of timm, transformers and open_clip, small and with random weights, with something to explain in it.

What a sweep runs on. Norms, biases and running statistics are changed at random, as those of a trained model are: fresh
ones are 0 or 1, and hide what is left out of an attribution.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .families import Inputs, call, embedding_of, generates
from .made_inputs import INPUTS
from .small_configs import LAYERS, WORDS, part_for, small_config
from .small_timm import MOST_PARAMETERS, picture_of, smallest
from .treatments import TREATMENTS

LIBRARIES = ("timm", "transformers", "open_clip", "treated")  # the last: one small Llama in many ways
ATTENTION = re.compile(r"att(entio)?n|mhsa|gpsa|litemla", re.I)
CHANNELS_ALONE = re.compile(
    r"selectivekernel|squeeze|effnet_?attn|nonlocal|^(se|eca|cbam|split|channel|spatial)\w*att", re.I
)
MIXING = re.compile(r"mixer|mixing|metaformer|glu|gated|gating|mamba|recurrent|sequencer|^resmlp", re.I)
SMALL_BY_NAME = re.compile(r"nano|tiny|atto|femto|pico|xxs|xs|small|050|035|micro|_s(_|\d|$)|_t(_|\d|i_|$)|_m?0|_9_")
LARGE = re.compile(
    r"giant|huge|large|enormous|gigantic|so\d+m|_7b|_[123]b|base|medium|_x?l(_|$)|_x?b(_|$)|\d{3}m|384|512"
)
CONVOLUTIONS = "convolutions"
NOTHING_MIXED = "has no attention, mixer or gated MLP: it isn't asked for"


class NotBuilt(Exception):
    """The model can't be made small, or not from what is installed, or doesn't run on the inputs made for it."""


@dataclass
class Case:
    """A model, what goes in, and what is explained: the arguments of `attribute`."""

    kind: str
    model: nn.Module
    inputs: Tensor | dict[str, Any]
    target: Any = 1
    readout: Any = None


def registered(library: str, pattern: str = "*") -> list[str]:
    """Names of models; of timm those first that are small by their names."""
    if library == "timm":
        return timm_names(pattern)
    if library == "transformers":
        names = [name for name in transformers_heads() if fnmatch.fnmatch(name, pattern)]
    elif library == "treated":
        names = [name for name in TREATMENTS if fnmatch.fnmatch(name, pattern)]
    else:
        import open_clip

        towers = (f"{name} {tower}" for name in open_clip.list_models() for tower in ("picture", "text"))
        names = [name for name in towers if fnmatch.fnmatch(name, pattern)]
    return sorted(names)


def build(library: str, name: str) -> Case:
    """A small model of that name, perturbed, in eval mode. Raises NotBuilt."""
    torch.manual_seed(0)
    cases = {"timm": timm_case, "transformers": transformers_case, "open_clip": open_clip_case, "treated": treated_case}
    return cases[library](name)


def perturbed(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and (parameter.dim() <= 1 or "norm" in name or "bias" in name):
                parameter.add_(noise(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(noise(buffer))
            elif name.endswith("running_var"):
                buffer.add_(noise(buffer).abs())
    return model.eval()


def asked(kind: str, model: nn.Module, inputs: Tensor | dict[str, Any]) -> Case:
    """A case whose target and readout fit the model's answer."""
    with torch.no_grad():
        answer = call(model, Inputs(inputs))
    target: Any = 1
    if not isinstance(answer, Tensor):
        given, vector = answer, embedding_of(answer)
        answer = vector if vector is not None else getattr(answer, "last_hidden_state", None)
        if answer is None and getattr(given, "feature_maps", None):  # of a backbone
            return Case(kind, model, inputs, lambda answer: answer.feature_maps[-1].flatten(1)[:, 1])
        if answer is None:
            raise NotBuilt("answers with neither logits nor an embedding")
        target = torch.randn(answer.shape[1 if answer.dim() == 4 else -1])
        if vector is None and answer.dim() == 2:
            return Case(kind, model, inputs, lambda answer: answer.last_hidden_state[:, 1])
    if answer.dim() == 1:
        return Case(kind, model, inputs, None)
    if answer.dim() == 2 or answer.dim() == 3 and generates(model):
        return Case(kind, model, inputs, target)
    row = min(2, answer.shape[1] - 1)
    return Case(kind, model, inputs, target, row if answer.dim() == 3 else (1,) * (answer.dim() - 2))


# ---- timm ------------------------------------------------------------------------------------------------------------


def timm_names(pattern: str) -> list[str]:
    import timm

    def order(name: str) -> tuple[bool, bool, str]:
        return bool(LARGE.search(name)), not SMALL_BY_NAME.search(name), name

    return sorted(timm.list_models(pattern), key=order)


def timm_case(name: str) -> Case:
    expected, chosen = picture_of(name)
    kind = ""
    with suppress(Exception), torch.device("meta"):  # some can't be made without weights
        kind = kind_of(smallest(name, num_classes=7, **chosen))
    if kind == CONVOLUTIONS:
        raise NotBuilt(NOTHING_MIXED)
    try:
        model: Any = perturbed(smallest(name, num_classes=7, **chosen))
    except ValueError as error:
        raise NotBuilt(str(error)) from error
    if not kind and (kind := kind_of(model)) == CONVOLUTIONS:
        raise NotBuilt(NOTHING_MIXED)
    return asked(kind, model, torch.randn(1, *expected))


def kind_of(model: nn.Module) -> str:
    """What its code has, by the names of its classes: attention over places, a mixer or gated MLP, or neither."""
    names = [name for name in {type(module).__name__ for module in model.modules()} if not CHANNELS_ALONE.search(name)]
    if any(map(ATTENTION.search, names)):
        return "attention"
    return "mixer" if any(map(MIXING.search, names)) else CONVOLUTIONS


# ---- transformers ----------------------------------------------------------------------------------------------------


HEADS = {  # kind -> the registry of heads
    "decoder": "CAUSAL_LM",
    "classifier": "SEQUENCE_CLASSIFICATION",
    "masked": "MASKED_LM",
    "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
    "audio": "AUDIO_CLASSIFICATION",
    "vision": "IMAGE_CLASSIFICATION",
    "tower": "IMAGE",
    "video": "VIDEO_CLASSIFICATION",
    "detection": "OBJECT_DETECTION",
    "segmentation": "SEMANTIC_SEGMENTATION",
    "pair": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "vision-language": "IMAGE_TEXT_TO_TEXT",
}


NEEDS_PACKAGE = "needs a package that isn't installed"
NO_MODEL_ALONE = "is no model by itself: it drafts words for another one, whose keys and values it has to be given"
WHY_NOT = {  # where what was raised isn't the reason
    "decoder gemma4_assistant": NO_MODEL_ALONE,
    "decoder gemma4_unified_assistant": NO_MODEL_ALONE,
    "vision-language llama4": "transformers itself fails on any input: forward reads image_outputs, which aren't there",
}
WITH_SMALL_PICTURES = ("vision-language", "pair", "video")


def transformers_heads() -> dict[str, tuple[str, str, str]]:
    """name -> (kind, type of the model, name of its class)"""
    from transformers.models.auto import modeling_auto

    found = {}
    for kind, registry in HEADS.items():
        mapping = getattr(modeling_auto, f"MODEL_FOR_{registry}_MAPPING_NAMES")
        for model_type, classes in mapping.items():
            one = classes if isinstance(classes, str) else classes[0]
            found[f"{kind} {model_type}"] = (kind, model_type, one)
    return found


def transformers_case(name: str) -> Case:
    import transformers

    kind, model_type, class_name = transformers_heads()[name]
    failures = []
    for how in ({}, {"filled": True}, {"filled": True, "wide": True}):
        try:
            model_class = getattr(transformers, class_name)
            default = transformers.CONFIG_MAPPING[model_type]()
            small = small_config(default, kind in WITH_SMALL_PICTURES, model_class=class_name, **how)
            config = part_for(model_class, small)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
        except ImportError as error:
            wanted = re.search(r"requires the (\w+) library", str(error))
            raise NotBuilt(f"{NEEDS_PACKAGE}: {wanted[1] if wanted else error}") from error
        except Exception as error:
            failures.append(f"can't be made: {type(error).__name__}: {error}")
            continue
        if size > MOST_PARAMETERS:
            failures.append(f"still has {size / 1e6:.0f} million parameters")
            continue
        model = perturbed(model_class(config))
        for inputs in INPUTS[kind](model, config):
            try:
                return asked(kind, model, inputs)
            except NotBuilt:
                raise
            except Exception as error:  # these inputs don't fit; the next may
                failures.append(f"runs on none of the inputs made for it: {type(error).__name__}: {error}")
    raise NotBuilt(WHY_NOT.get(name, failures[0]))


def treated_case(name: str) -> Case:
    case = transformers_case("decoder llama")
    try:
        return asked("decoder", TREATMENTS[name](case.model).eval(), case.inputs)
    except ImportError as error:
        raise NotBuilt(f"{NEEDS_PACKAGE}: {error}") from error


# ---- open_clip -------------------------------------------------------------------------------------------------------


def open_clip_case(name: str) -> Case:
    import open_clip

    name, tower = name.rsplit(" ", 1)
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    captions = "multimodal_cfg" in config  # CoCa, which needs all of its parts
    for part in (vision, text, *([config["multimodal_cfg"]] if captions else [])):
        part["layers"] = [1, 1, 1, 1] if isinstance(part.get("layers"), list) else LAYERS
    if captions:
        text["vocab_size"] = WORDS
    elif tower == "picture":
        text = config["text_cfg"] = dict(layers=1, width=64, heads=1, vocab_size=WORDS)
    else:
        config["vision_cfg"] = vision = dict(layers=1, width=64, head_width=64, image_size=32, patch_size=32)
        text["vocab_size"] = WORDS
    if text.get("hf_model_name"):
        stand_in_for_hub()
        text["hf_model_pretrained"] = False
    custom = config.pop("custom_text", False) or "timm_model_name" in vision or "hf_model_name" in text
    made: Any = open_clip.CoCa if captions else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with small_timm():
        model = perturbed(made(**config))
    if tower == "picture":
        size = vision["image_size"]
        inputs: Tensor = torch.randn(1, 3, *(size if isinstance(size, list | tuple) else (size, size)))
    else:
        inputs = torch.randint(5, WORDS, (2, text.get("context_length", 77)))
    with torch.no_grad():
        width = call(model, Inputs(inputs)).shape[-1]
    return Case(tower, model, inputs, torch.randn(width))


@contextmanager
def small_timm() -> Iterator[None]:
    """Inside, open_clip's towers of timm are shallow."""
    from open_clip import timm_model

    theirs = timm_model.timm

    def create_model(name: str, pretrained: bool, **given: Any) -> nn.Module:
        return smallest(name, **given)

    timm_model.timm = SimpleNamespace(create_model=create_model)
    try:
        yield
    finally:
        timm_model.timm = theirs


def stand_in_for_hub() -> None:
    """open_clip asks the hub for the shapes of text towers of transformers; here they are small ones of that kind."""
    import transformers
    from open_clip import hf_model

    def small(name: str, **options: Any) -> Any:
        kinds = ("mt5", "xlm-roberta", "roberta", "bert")
        kind = next((kind for kind in kinds if kind in name.lower()), "roberta")
        return small_config(transformers.AutoConfig.for_model(kind), pictures=False)

    hf_model.AutoConfig = type("AutoConfig", (), {"from_pretrained": staticmethod(small)})
