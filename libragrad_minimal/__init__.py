"""LibraGrad for untouched models: balance the autograd graph, not the model (Mehri et al., CVPR 2025)."""

from .attribution import METHODS, Attribution, attribute
from .engine import (
    ALI_LRP,
    ATTN_LRP,
    DECOMPX,
    LIBRA,
    PLAIN,
    Audit,
    Rules,
    UnsupportedOperation,
    additive_constants,
    audit,
    balanced,
    libra_grad,
    observed,
    record_residuals,
    register_rule,
)

__all__ = [
    "ALI_LRP",
    "ATTN_LRP",
    "DECOMPX",
    "LIBRA",
    "METHODS",
    "PLAIN",
    "Attribution",
    "Audit",
    "Rules",
    "UnsupportedOperation",
    "additive_constants",
    "attribute",
    "audit",
    "balanced",
    "libra_grad",
    "observed",
    "record_residuals",
    "register_rule",
]
