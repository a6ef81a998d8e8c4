"""Tokens that no other sees, at the places where they are.

Blocks that tell where tokens are by their number (rotary embeddings, a bias for every two places) can't run without
some. That a token is gone means for the others that it is no summand: as a key of attention it gets the weight zero,
and in a layer that adds up tokens (MLP-Mixer) nothing of it is added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .engine.functions import is_written_in_python, spellings, step_by_step

SOFTMAX = {*spellings("softmax")}


class hidden_tokens(TorchFunctionMode):
    """Context inside which what runs doesn't see some tokens.

    Only what it knows is kept from seeing them, so whoever uses it must try whether their values still matter.

    Args:
        gone: (N, T) bool, the tokens of each sample that nobody sees.
    """

    def __init__(self, gone: Tensor):
        super().__init__()
        self.gone = gone

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if function in SOFTMAX or function is F.linear:
            given, *rest = args or (kwargs.pop("input"),)
            if function in SOFTMAX and self.over_tokens(given):
                given = given.masked_fill(self.like(given), -torch.inf)
            elif function is F.linear and self.adds_up_tokens(given):
                given = given.masked_fill(self.like(given), 0)
            return function(given, *rest, **kwargs)
        if is_written_in_python(function):  # its steps are looked at, too
            with self:
                return step_by_step(function)(*args, **kwargs)
        return function(*args, **kwargs)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args, **kwargs):
        if self.over_tokens(key.mT):
            seen = ~self.like(key.mT)
            nothing = False if attn_mask is None or attn_mask.dtype == torch.bool else -torch.inf
            attn_mask = seen if attn_mask is None else torch.where(seen, attn_mask, nothing)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def over_tokens(self, given: Tensor) -> bool:
        """(N, ..., T) or, of N samples with several heads each, (N H, ..., T)."""
        samples, count = self.gone.shape
        return given.dim() > 2 and given.shape[-1] == count and len(given) % samples == 0

    def adds_up_tokens(self, given: Tensor) -> bool:
        """(N, C, T): with channels last, it would be channels that the layer adds up."""
        return given.dim() == 3 and given.shape[::2] == self.gone.shape and given.shape[1] != given.shape[2]

    def like(self, given: Tensor) -> Tensor:
        """The hidden tokens, to be broadcast over (N, ..., T) or (N H, ..., T)."""
        gone = self.gone.repeat_interleave(len(given) // len(self.gone), 0)
        return gone.view(len(gone), *[1] * (given.dim() - 2), -1)
