"""Small models with random weights that several tests share."""

import open_clip
import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=200)
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
del VISION["vocab_size"]
LLAMA = {**TEXT, "num_key_value_heads": 2}
VIT = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=3, num_classes=5)
CLIP_TEXT = dict(context_length=8, vocab_size=49408, width=32, heads=2, layers=2)
CLIP = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16),
    text_cfg=CLIP_TEXT,
)
IDS = torch.randint(5, 190, (2, 9), generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def perturbed(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Norms and biases that aren't the neutral ones of a fresh model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_vit(**changes) -> nn.Module:
    """timm's, of three blocks: 4 x 4 patches behind a class token, five classes."""
    return perturbed(timm.models.VisionTransformer(**VIT | changes))


def tiny_hf_vit() -> nn.Module:
    return perturbed(ViTForImageClassification(ViTConfig(**VISION, num_labels=5)))


def tiny_clip(**changes) -> nn.Module:
    """open_clip's: 4 x 4 patches, texts of eight tokens, similarities of 24 numbers."""
    return perturbed(open_clip.CLIP(**CLIP | changes))


def tiny_llama(**changes) -> nn.Module:
    return perturbed(LlamaForCausalLM(LlamaConfig(**LLAMA | changes)))


def tiny_gpt2() -> nn.Module:
    return perturbed(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=200, n_positions=32)))


def tiny_bert() -> nn.Module:
    return perturbed(BertForMaskedLM(BertConfig(**TEXT)))
