"""LibraGrad for untouched models: balance the autograd graph, not the model (Mehri et al., CVPR 2025)."""

from .attribution import Attribution, attribute
from .engine import (
    ALI_LRP,
    ATTN_LRP,
    CP_LRP,
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
from .methods import METHODS
from .targets import Against, Probability

__all__ = [
    "ALI_LRP",
    "ATTN_LRP",
    "CP_LRP",
    "DECOMPX",
    "LIBRA",
    "METHODS",
    "PLAIN",
    "Against",
    "Attribution",
    "Audit",
    "Probability",
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
