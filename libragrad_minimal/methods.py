"""The attribution methods and the sets of rules by name. To add a method, write the function and name it here; nothing
else lists them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import attention_methods, averaged, cams, gradient_methods, occlusions
from .engine import ALI_LRP, ATTN_LRP, CP_LRP, DECOMPX, LIBRA, PLAIN, Rules
from .recording import BETWEEN, CONSTANTS, LAYERS, MAP_GRADIENTS, MAPS
from .scores import Method

METHODS: dict[str, Method] = {
    "IxG": gradient_methods.ixg,
    "Saliency": gradient_methods.saliency,
    "FullGrad": gradient_methods.fullgrad,
    "FullGrad+": gradient_methods.fullgrad_plus,
    "SkipPLUS": gradient_methods.skip_plus,
    "Occluded FullGrad+": occlusions.occluded_fullgrad_plus,
    "HiResCAM": cams.hirescam,
    "GradCAM": cams.gradcam,
    "XGradCAM": cams.xgradcam,
    "GradCAM++": cams.gradcam_plus_plus,
    "GradCAM+": cams.gradcam_plus,
    "XGradCAM+": cams.xgradcam_plus,
    "AttCAT": attention_methods.attcat,
    "GenAtt": attention_methods.genatt,
    "TokenTM": attention_methods.tokentm,
    "RawAtt": attention_methods.raw_attention,
    "Attention Rollout": attention_methods.rollout,
    "Gradient Attention Rollout": attention_methods.gradient_rollout,
    "LeGrad": attention_methods.legrad,
    "LeGrad class token": attention_methods.legrad_class_token,
    "IG": averaged.integrated_gradients,
    "SmoothGrad": averaged.smoothgrad,
    "Random": gradient_methods.random_scores,
}

NAMED_RULES: dict[str, Rules] = {
    "libra": LIBRA,
    "plain": PLAIN,
    "attn-lrp": ATTN_LRP,
    "ali-lrp": ALI_LRP,
    "cp-lrp": CP_LRP,
    "decompx": DECOMPX,
    "residual": replace(LIBRA, residual=True),
    # Libra with one repair left out, as Mehri et al. 2025 do in their table 5 (without products: DecompX)
    "no norm": LIBRA.without("norm"),
    "no activation": LIBRA.without("activation"),
    "no attention": LIBRA.without("attention"),
}


def reads_of(name: str) -> frozenset[str]:
    return getattr(METHODS[name], "reads", frozenset({LAYERS}))


def default_rules(name: str) -> Rules:
    return METHODS[name].rules if hasattr(METHODS[name], "rules") else LIBRA  # type: ignore[attr-defined]


def uses_gradients(name: str) -> bool:
    """Whether its scores depend on rules."""
    return bool(reads_of(name) - {MAPS, BETWEEN})


# Whatever reads gradients beyond those of the first tokens can read means of them; occlusions make their own runs.
AVERAGED = [name for name in METHODS if reads_of(name) & {LAYERS, CONSTANTS, MAP_GRADIENTS}]
AVERAGED.remove("Occluded FullGrad+")
METHODS |= {f"IG {name}": averaged.integrated(METHODS[name]) for name in AVERAGED}
METHODS |= {f"SmoothGrad {name}": averaged.smoothed(METHODS[name]) for name in AVERAGED}


def check_method(method: Any, options: Any) -> None:
    """Raises ValueError for a method, or options of it, that there aren't."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if not isinstance(options, Mapping):
        raise ValueError(f"options of {method} must be a dict of names and values, got {options!r}; without any, {{}}")
    known = list(inspect.signature(METHODS[method]).parameters)[1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(map(str, unknown))}; it has {', '.join(known) or 'none'}")
