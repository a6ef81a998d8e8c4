"""Small models with random weights that several tests share."""

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
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

from libragrad_minimal.models import DATA
from libragrad_minimal.sweep import read
from libragrad_minimal.zoo import Case, NotBuilt, build

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


def image_tower(name: str) -> open_clip.CustomTextCLIP:
    """open_clip's model of this name with its first two blocks and a text tower that hardly exists."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    vision |= {"layers": 2} if "layers" in vision else {}
    quick = config.get("quick_gelu", False)
    model = open_clip.CustomTextCLIP(config["embed_dim"], vision, CLIP_TEXT, quick_gelu=quick)
    if "timm_model_name" in vision:
        model.visual.trunk.blocks = model.visual.trunk.blocks[:2]
    return perturbed(model)


def tiny_llama(**changes) -> nn.Module:
    return perturbed(LlamaForCausalLM(LlamaConfig(**LLAMA | changes)))


def tiny_gpt2() -> nn.Module:
    return perturbed(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=200, n_positions=32)))


def tiny_bert() -> nn.Module:
    return perturbed(BertForMaskedLM(BertConfig(**TEXT)))


class Block(nn.Module):
    """A pre-norm Transformer block with everything that needs a rule."""

    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.gate, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * F.gelu(self.up(h)))


class Transformer(nn.Module):
    """Five tokens of eight channels with positions; the mean token is read. `run` calls a block."""

    def __init__(self, depth=2, width=8):
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x, run=lambda block, x: block(x)):
        x = x + self.position
        for block in self.blocks:
            x = run(block, x)
        return self.head(x.mean(1))


class Twice(torch.autograd.Function):
    """What somebody might have written: a custom function that no table knows."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def grouped_attention_is_fused() -> bool:
    """Whether PyTorch has one kernel for attention whose queries share keys: on a CPU 2.8 has none, 2.11 has."""
    q, k = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 2, 8, 8)
    attended = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    return "ScaledDotProduct" in attended.grad_fn.name()


def older_transformers() -> str:
    """Why models of the stored sweep may be absent here, or may not run; empty where all should."""
    _, release = read(DATA / "sweep_transformers.csv")[0]["library"].split()
    older = Version(transformers.__version__) < Version(release)
    return f"transformers {transformers.__version__} isn't yet {release}, which was swept" if older else ""


def built(library: str, name: str) -> Case:
    """A model of the sweep; skips where an older transformers hasn't got it, or can't run it."""
    try:
        return build(library, name)
    except (KeyError, NotBuilt) as error:
        if reason := older_transformers():
            pytest.skip(f"{reason}: {name}: {error}")
        raise
