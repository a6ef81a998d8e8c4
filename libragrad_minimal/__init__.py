"""LibraGrad for untouched models: balance the autograd graph, not the model (Mehri et al., CVPR 2025).

The names below are imported when they are first asked for: torch takes a second, and `libragrad --help` needs nothing
of it.
"""

from importlib import import_module

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than all the rest here
if TYPE_CHECKING:
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

HOMES = ("engine", "targets", "methods", "attribution")  # of these names; what needs least comes first

if not TYPE_CHECKING:  # else every misspelt name would pass a type checker

    def __getattr__(name: str):
        if name in HOMES:
            return import_module(f".{name}", __name__)
        for home in HOMES if name in __all__ else ():
            module = import_module(f".{home}", __name__)
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *HOMES})
