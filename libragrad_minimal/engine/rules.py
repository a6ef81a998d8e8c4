"""Which repairs are on: the switches, and the presets that the literature knows by name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

Rule = Literal["attention", "activation", "norm", "product"]
OTHER_FORMS = {"attention": "halve", "product": "hold"}  # of a repair, beside on and off


@dataclass(frozen=True)
class Rules:
    """Which repairs are on. A repair that is off leaves PyTorch's own derivative.

    attention:  True holds the attention map constant, so that only the values carry gradient (theorem 5);
                "halve" keeps the softmax's derivative and halves every product around it (AttnLRP: q/4, k/4, v/2).
    activation: GELU, SiLU and relatives get the slope f(x)/x; a sigmoid or tanh that multiplies a stream is constant
                (theorem 5).
    norm:       the denominator of a normalisation or division is constant (theorem 5, corollary 2).
    product:    each factor of a product of two streams gets half the gradient; x**k gets 1/k of it (theorem 4, Euler).
                "hold" holds a factor constant that is an activation's result, as in SwiGLU's up * silu(gate), so that
                the other gets all of it; products without one are halved (CP-LRP).
    residual:   share a residual addition's relevance by sign agreement (ResLRP, Berend et al. 2026); the forward pass
                must have run inside `observed(residuals=True)`.

    The theorems are those of Mehri et al. 2025, section 3.
    """

    attention: bool | Literal["halve"] = True
    activation: bool = True
    norm: bool = True
    product: bool | Literal["hold"] = True
    residual: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, other = getattr(self, field.name), OTHER_FORMS.get(field.name)
            if not isinstance(value, bool) and (other is None or value != other):
                choices = "True or False" if other is None else f'True, False or "{other}"'
                raise ValueError(f"the rule {field.name} is {choices}, got {value!r}")

    def without(self, *names: str) -> Rules:
        """The same rules with the named repairs switched off, e.g. `LIBRA.without("norm")`."""
        known = {field.name for field in fields(self)}
        if unknown := set(names) - known:
            raise ValueError(f"no rule is called {sorted(unknown)}; there are {sorted(known)}")
        return replace(self, **dict.fromkeys(names, False))

    def switch(self, rule: Rule) -> bool | Literal["halve", "hold"]:
        """Whether, and for attention and products how, the repair of this name is done."""
        return getattr(self, rule)


LIBRA = Rules()
PLAIN = Rules(attention=False, activation=False, norm=False, product=False)
# Achtibat et al. 2024. Relevance of positions (PA-LRP, Bakish et al. 2025) isn't split off from that of queries and
# keys: what a rotary embedding multiplies them with is a constant that a graph can't tell from any other. Learned
# positions are part of the first tokens.
ATTN_LRP = Rules(attention="halve")
ALI_LRP = Rules(activation=False, product=False)  # Ali et al. 2022; not conservative where two streams are multiplied
CP_LRP = Rules(product="hold")  # conservative propagation as Achtibat et al. 2024 have it, gates of SwiGLU constant
# DecompX (Modarressi et al. 2023): Libra without the product rule. The original propagates a vector for each token
# through layers that are linear once their gates are constant. A vector's share of a logit is therefore <h, gradient>
# under these rules, for all tokens in one backward pass (a test propagates the vectors). Left out is the original's
# spreading of biases over tokens; here each counts by itself.
DECOMPX = Rules(product=False)
