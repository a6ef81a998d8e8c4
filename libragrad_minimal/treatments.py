"""What is done to a model after it was trained: quantised, given adapters, checkpointed, offloaded. For the sweep."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def with_adapters(model: Any) -> nn.Module:
    """LoRA that says something, not merged."""
    import peft

    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def merged(model: Any) -> nn.Module:
    return with_adapters(model).merge_and_unload()  # type: ignore[operator]


def quantised(model: nn.Module, config: str) -> nn.Module:
    import torchao.quantization

    torchao.quantization.quantize_(model, getattr(torchao.quantization, config)())
    return model


def quantised_in_blocks(model: nn.Module, layer: str, weight: str, **options: Any) -> nn.Module:
    """bitsandbytes, which transformers uses likewise: every layer but the head."""
    import bitsandbytes

    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and name != "lm_head":
            new = getattr(bitsandbytes.nn, layer)(old.in_features, old.out_features, bias=False)
            if layer == "Linear4bit":
                new.compute_dtype = torch.float32  # transformers' default
            new.weight = getattr(bitsandbytes.nn, weight)(old.weight.data, requires_grad=False, **options)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)
    return model.to("cpu")


def quantised_by_torch(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def offloaded(model: nn.Module, to_disk: bool) -> nn.Module:
    import accelerate

    if to_disk:
        return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device="cpu")
    return accelerate.cpu_offload(model, execution_device="cpu")


def checkpointed(model: Any, reentrant: bool) -> nn.Module:
    for block in model.model.layers:
        block.forward = partial(recomputed, block.forward, reentrant)
    return model


def recomputed(forward: Callable, reentrant: bool, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)


TREATMENTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda model: model,
    "LoRA (peft)": with_adapters,
    "LoRA, merged (peft)": merged,
    "int8 weights (torchao)": partial(quantised, config="Int8WeightOnlyConfig"),
    "int8 weights and activations (torchao)": partial(quantised, config="Int8DynamicActivationInt8WeightConfig"),
    "int8 weights and activations (torch.ao)": quantised_by_torch,
    "4 bits (bitsandbytes)": partial(quantised_in_blocks, layer="Linear4bit", weight="Params4bit"),
    "8 bits (bitsandbytes)": partial(
        quantised_in_blocks, layer="Linear8bitLt", weight="Int8Params", has_fp16_weights=False
    ),
    "in memory until needed (accelerate)": partial(offloaded, to_disk=False),
    "on disk until needed (accelerate)": partial(offloaded, to_disk=True),
    "checkpointed": partial(checkpointed, reentrant=False),
    "checkpointed, reentrant": partial(checkpointed, reentrant=True),
}
