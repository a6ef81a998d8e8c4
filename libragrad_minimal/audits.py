"""The audit of a model by its name, without its weights where a library knows its shape."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from .engine import Audit, audit
from .models import DEMOS, LoadedModel, load_demo
from .sentences import one_line, similar_ones
from .untrusted import transformers_config


def audit_model(name: str) -> Audit:
    """How each operation of a model is treated.

    Args:
        name: a demo's, such as vit, clip or llama; a timm or open_clip name, or a transformers name or folder.
    """
    if name in DEMOS:
        loaded = load_demo(name)
        return audit_text(loaded.model) if name == "llama" else audit_pictures(loaded.model, pixel_size(loaded))
    import open_clip
    import timm

    if timm.is_model(name.split(".")[0]):
        model = timm.create_model(name.split(".")[0]).eval()
        return audit_pictures(model, model.default_cfg["input_size"][1:])
    if name in open_clip.list_models():
        model = open_clip.create_model(name).eval()
        return audit_pictures(model, model.visual.image_size)
    from transformers import AutoModelForCausalLM

    try:
        config = transformers_config(name)
    except OSError as error:
        similar = similar_ones(name, [*DEMOS, *timm.list_models(), *open_clip.list_models()])
        raise OSError(
            f"{name} is no demo, and neither timm nor open_clip has it ({similar}); "
            f"nor has transformers: {one_line(error)}"
        ) from error
    return audit_text(AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval())


def audit_pictures(model: Any, size: tuple[int, int]) -> Audit:
    pixels = torch.randn(1, 3, *size, requires_grad=True)
    answer = model.encode_image(pixels, normalize=True) if hasattr(model, "encode_image") else model(pixels)
    return audit(answer.flatten(1)[:, 0], pixels)


def audit_text(model: Any) -> Audit:
    tokens = model.get_input_embeddings()(torch.arange(4, 10)[None]).detach().requires_grad_()
    return audit(model(inputs_embeds=tokens, use_cache=False).logits[:, -1, 0], tokens)


def pixel_size(loaded: LoadedModel) -> tuple[int, int]:
    return tuple(loaded.transform(Image.new("RGB", (64, 64))).shape[1:])
