"""Class activation maps of Transformers: a block's tokens h, their channels weighted by the gradients g.

The maps are signed: what their authors cut off, the negative part, speaks against the target. GradCAM, XGradCAM and
GradCAM++ were made for feature maps of pictures; at one block only the tokens that show a part of the input count in
their weights, as in pytorch-grad-cam. The sums over blocks, GradCAM+ and XGradCAM+, count the class token too, as
their authors do (Mehri et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .recording import LAYERS, Recording
from .scores import (
    Scores,
    checked_layer,
    chosen_layers,
    input_times_gradient,
    mean_over_tokens,
    reads,
    shown,
    spread,
    tokens_and_gradients,
)


@reads(LAYERS)
def hirescam(run: Recording, layer: int = -1) -> Scores:
    """HiResCAM (Draelos & Carin 2020): sum_c h g at one late block, the last by default."""
    scores = input_times_gradient(run, checked_layer(layer, len(run.left)))
    return Scores(scores, scores.sum(1))


@reads(LAYERS)
def gradcam(run: Recording, layer: int = -1) -> Scores:
    """GradCAM (Selvaraju et al. 2017): sum_c w_c h_c at one block, w_c the mean of g over the tokens shown."""
    return weighted(run, layer, lambda h, g, seen: (g * seen).sum(1) / seen.sum(1))


@reads(LAYERS)
def xgradcam(run: Recording, layer: int = -1) -> Scores:
    """XGradCAM (Fu et al. 2020): sum_c w_c h_c at one block, w_c = sum_t g h / sum_t h over the tokens shown."""
    return weighted(run, layer, lambda h, g, seen: ratio((g * h * seen).sum(1), (h * seen).sum(1)))


@reads(LAYERS)
def gradcam_plus_plus(run: Recording, layer: int = -1) -> Scores:
    """GradCAM++ (Chattopadhay et al. 2018, equations 10 and 19): sum_c w_c h_c at one block, where
    w_c = sum_t a relu(g) with a = g^2 / (2 g^2 + g^3 sum_t' h), over the tokens shown."""

    def weights(h: Tensor, g: Tensor, seen: Tensor) -> Tensor:
        a = ratio(g**2, 2 * g**2 + g**3 * (h * seen).sum(1, keepdim=True))
        return (a * g.relu() * seen).sum(1)

    return weighted(run, layer, weights)


def weighted(run: Recording, layer: int, weights: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Scores:
    """sum_c w_c h_c at one block; `weights` makes (B, C) of tokens, gradients and which tokens are shown, (B, N, 1)."""
    layer = checked_layer(layer, len(run.left))
    h, g = tokens_and_gradients(run, layer)
    w = weights(h, g, shown(run, layer)[..., None])
    return Scores(spread((h * w[:, None]).sum(-1), run, layer))


@reads(LAYERS)
def gradcam_plus(run: Recording, layers: Iterable[int] | None = None) -> Scores:
    """GradCAM+ (Mehri et al. 2025): sum_l sum_c w_c h_c, w_c the mean of g over all tokens. layers: default all."""

    def one_block(layer: int) -> Tensor:
        h, g = tokens_and_gradients(run, layer)
        return spread((h * mean_over_tokens(run, g)).sum(-1), run, layer)

    return Scores(torch.stack([one_block(layer) for layer in chosen_layers(layers, run)]).sum(0))


@reads(LAYERS)
def xgradcam_plus(run: Recording, layers: Iterable[int] | None = None) -> Scores:
    """XGradCAM+ (Mehri et al. 2025): sum_l sum_c w_c h_c, w_c = sum_t g |h| / sum_t |h|. layers: default all.

    Where a channel keeps its sign the weight is Fu et al.'s sum_t g h / sum_t h.
    """

    def one_block(layer: int) -> Tensor:
        h, g = tokens_and_gradients(run, layer)
        weight = ratio((g * h.abs()).sum(1, keepdim=True), h.abs().sum(1, keepdim=True))
        return spread((h * weight).sum(-1), run, layer)

    return Scores(torch.stack([one_block(layer) for layer in chosen_layers(layers, run)]).sum(0))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where the whole is."""
    return part / whole.where(whole != 0, torch.inf)
