"""Which tokens are padding, told by the usual mask or by an argument of a model's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .families import Inputs
from .layout import Layout

NEXT_TO_NOTHING = 1e-10  # a logit less 100, which is 0 at last, is meant to hide


def padding_mask(inputs: Inputs, output: Tensor, first: Tensor, layout: Layout) -> Tensor | None:
    """(B, parts), 0 at padding: the usual mask, else one of a name of its own.

    Whether 0 or 1 is padding in the latter, the output tells, which doesn't feel padding at all.
    """
    if inputs.mask is not None:
        return inputs.mask
    own = list(own_masks(inputs))
    if not own:
        return None
    (gradient,) = torch.autograd.grad(output.sum(), first, retain_graph=True)
    size = layout.pick(layout.axes.arrange(gradient).abs().amax(-1))
    felt = size > NEXT_TO_NOTHING * size.amax()
    sides = (side.to(felt.device) for mask in own for side in (mask, ~mask) if mask.shape == felt.shape)
    return next((side for side in sides if felt[side].any() and not felt[~side].any()), None)


def own_masks(inputs: Inputs) -> Iterator[Tensor]:
    """(B, parts), of the arguments that may tell of padding: of two values, zeros and ones or what is added to logits,
    for each part or for pairs of them; or lengths."""
    for tensor in inputs.tensors.values():
        if tensor is inputs.main:
            continue
        if tensor.dim() in (3, 4) and inputs.words is not None and tensor.shape[-1] == inputs.words.shape[1]:
            tensor = tensor.flatten(1, -2).amax(1)  # those that any other part sees
        if tensor.dim() == 1 and not tensor.is_floating_point():
            tensor = torch.arange(inputs.main.shape[1], device=tensor.device) < tensor[:, None]
        if tensor.dim() == 2 and len(tensor.unique()) == 2:
            yield tensor == tensor.amax()


def valid_tokens(mask: Tensor | None, layout: Layout, samples: int, length: int) -> Tensor:
    """(B, N): False at padding. Tokens that show no part of the text (a prompt's, a register) count."""
    valid = torch.ones(samples, length, dtype=torch.bool)
    if mask is None:
        return valid
    mask = mask.bool().cpu()
    if layout.place is None:
        return mask if mask.shape == valid.shape else valid
    if layout.place.dim() == 1 and mask.shape[1] == len(layout.place):
        valid[:, layout.place.cpu()] = mask
    return valid
