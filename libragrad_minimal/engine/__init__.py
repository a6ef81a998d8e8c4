"""The engine: balanced gradients of any PyTorch graph. It needs torch alone.

Which question is answered where:
    rules.py       which repairs are on
    operations.py  what each operation is to LibraGrad, and what to do about one that is refused
    repairs.py     the formulas
    nodes.py       what can be read off a node of the autograd graph
    plan.py        what is done at each node of a graph: the two passes
    reach.py       where a gradient is known to be zero
    applied.py     a formula at work: its values, its precision, PyTorch's kernel spared
    checks.py      what is asked of the caller, the forward pass and the results
    added.py       additive constants
    backward.py    libra_grad, balanced, audit
    observed.py    the context for a forward pass
    functions.py   which functions add, and what; rewritten.py: those that need another way
    leaves.py      a constant as a leaf that requires grad
"""

from .added import additive_constants
from .backward import Audit, audit, balanced, libra_grad
from .observed import observed, record_residuals
from .operations import register_rule
from .plan import UnsupportedOperation
from .rules import ALI_LRP, ATTN_LRP, CP_LRP, DECOMPX, LIBRA, PLAIN, Rules

__all__ = [
    "ALI_LRP",
    "ATTN_LRP",
    "CP_LRP",
    "DECOMPX",
    "LIBRA",
    "PLAIN",
    "Audit",
    "Rules",
    "UnsupportedOperation",
    "additive_constants",
    "audit",
    "balanced",
    "libra_grad",
    "observed",
    "record_residuals",
    "register_rule",
]
