"""The beginning of a text, computed once: what a decoder remembers of it serves every run that differs only later."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .families import CACHES, TOKEN_IDS, Inputs, accepts, blamed, generates, plain


@dataclass(frozen=True)
class Memory:
    """What a decoder keeps of each token of a text: transformers' cache of keys and values, under the name that the
    model knows it by."""

    name: str
    cache: Any

    def rest(self, inputs: Inputs, start: int, rows: int) -> Inputs:
        """The text from `start` on, `rows` times side by side, with what is remembered of the tokens before."""
        words = inputs.tensors[TOKEN_IDS][:, start:].expand(rows, -1)
        if start == 0:
            return Inputs({TOKEN_IDS: words})
        before = copy.deepcopy(self.cache)  # a run adds to it
        with blamed("what the model remembers can't be cut"):
            before.crop(-words.shape[1])  # less than nothing: so many tokens of its end
            before.batch_repeat_interleave(rows)
        return Inputs({TOKEN_IDS: words, self.name: before})


def memory_of(model: nn.Module, inputs: Inputs) -> Memory | None:
    """None where the model keeps nothing of the kind, or the text isn't all that it is given.

    Raises:
        ValueError: the model itself fails when it is to remember.
    """
    name = next((name for name in CACHES if accepts(model, name)), None)
    unpadded = inputs.mask is None or bool(inputs.mask.all())
    text_alone = inputs.tensors.keys() - {"attention_mask"} == {TOKEN_IDS} and not inputs.choices()
    if name is None or not (generates(model) and accepts(model, "use_cache") and unpadded and text_alone):
        return None
    with blamed("it remembers nothing"), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        answer = plain(model)(**inputs.tensors, use_cache=True)
    cache = getattr(answer, name, None)
    return Memory(name, cache) if hasattr(cache, "crop") and hasattr(cache, "batch_repeat_interleave") else None
