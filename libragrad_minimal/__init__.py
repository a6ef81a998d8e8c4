"""LibraGrad for untouched models: balance the autograd graph, not the model (Mehri et al., CVPR 2025)."""

from .attribution import METHODS, Attribution, attribute
from .backward import audit, balanced, libra_grad
from .constants import additive_constants
from .graph import Audit, UnsupportedOperation
from .residual import record_residuals
from .rules import ALI_LRP, ATTN_LRP, DECOMPX, LIBRA, PLAIN, Rules, register_rule

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
    "record_residuals",
    "register_rule",
]
