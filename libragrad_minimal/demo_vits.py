"""The families of image models that ship as demos: which class of timm's each one is, and what makes it that family.

A checkpoint's header gives sizes alone; what is built for a name stands here, so that a file can't name a class.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

SIDE = 64  # pixels, of what the demo models see

# as in timm's eva02_base, beitv2_base, flexivit_small, vit_base_patch16_siglip, vit_base_patch16_clip_quickgelu and
# deit3_small, but for a LayerScale that begins at 0.1: from their 1e-5 and 1e-6 it takes more steps than a demo has
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("VisionTransformer", {}),
    "eva02": (
        "Eva",
        {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True},
    ),
    "beitv2": ("Beit", {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}),
    "flexivit": ("VisionTransformer", {"no_embed_class": True}),
    "siglip": ("VisionTransformer", {"class_token": False, "global_pool": "map"}),
    "clip_vit": (
        "VisionTransformer",
        {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5), "act_layer": "quick_gelu"},
    ),
    "deit3": ("VisionTransformer", {"no_embed_class": True, "init_values": 0.1}),
    "mixer": ("MlpMixer", {}),
}
SIZES = ("vit_tiny", "vit_small", "vit_base", "vit")  # the same ViT, from small to large
VITS = FAMILIES | {name: FAMILIES["vit"] for name in SIZES}


def build(name: str, sizes: dict[str, int]) -> nn.Module:
    """A model of timm's with random weights.

    Args:
        name: one of `VITS`.
        sizes: img_size, patch_size, embed_dim, num_classes, depth, num_heads; of a mixer num_blocks for the last two.
    """
    import timm.models

    of_class, settings = VITS[name]
    return getattr(timm.models, of_class)(**settings, **sizes)
