"""Methods that read attention maps A (B, H, N, N), alone or with their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .added_constants import precise
from .recording import APART, BETWEEN, GRAPH, LAYERS, MAP_GRADIENTS, MAPS, Recording
from .scores import Scores, chosen_layers, input_times_gradient, mean_over_tokens, reads


def received(run: Recording, maps: Tensor) -> Tensor:
    """Maps (B, H, N, N) -> (B, N): mean over heads and queries, what each key received."""
    return mean_over_tokens(run, maps.mean(1))[:, 0]


def read_row(run: Recording, matrix: Tensor) -> Tensor:
    """The row of (B, N, N) that the output is read from: class or last token's, or the mean of those it reads."""
    return torch.einsum("bq,bqk->bk", run.reading, matrix)


def identity(run: Recording) -> Tensor:
    return torch.eye(run.valid.shape[1], dtype=run.dtype, device=run.output.device).expand(len(run.output), -1, -1)


@reads(MAPS)
def raw_attention(run: Recording) -> Scores:
    """The last block's attention map, mean over heads, read where the output is read."""
    return Scores(read_row(run, run.attention[-1].mean(1)))


# ---- products over blocks --------------------------------------------------------------------------------------------

FUSIONS = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}


@reads(MAPS)
def rollout(run: Recording, head_fusion: str = "mean", discard_ratio: float = 0.0) -> Scores:
    """Attention Rollout (Abnar & Zuidema 2020), with vit-explain's head_fusion (mean, max, min) and discard_ratio."""
    if head_fusion not in list(FUSIONS):
        raise ValueError(f"unknown head_fusion {head_fusion!r}; there are {', '.join(FUSIONS)}")
    return roll_out(run, map(FUSIONS[head_fusion], run.attention), discard_ratio)


@reads(MAPS, MAP_GRADIENTS)
def gradient_rollout(run: Recording, discard_ratio: float = 0.0) -> Scores:
    """Rollout of relu(mean over heads of A dA), as vit-explain has it, without its defects."""
    maps = zip(run.attention, run.gradients.attention, strict=True)
    return roll_out(run, ((a * g).mean(1).relu() for a, g in maps), discard_ratio)


def roll_out(run: Recording, fused: Iterable[Tensor], discard_ratio: float) -> Scores:
    """Product over blocks of (A + I)/2 with rows that sum to 1, lowest entries of A (B, N, N) dropped."""
    if not isinstance(discard_ratio, int | float) or not 0 <= discard_ratio < 1:
        raise ValueError(f"discard_ratio must lie in [0, 1), got {discard_ratio!r}")
    result = identity(run)
    for maps in fused:
        mixed = (discard_lowest(run, maps, discard_ratio) + identity(run)) / 2
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return Scores(read_row(run, result))


def discard_lowest(run: Recording, maps: Tensor, share: float) -> Tensor:
    """Zero the lowest share of the entries of each map (B, N, N), never the class token's own."""
    lowest = maps.flatten(1).topk(int(share * maps[0].numel()), dim=1, largest=False).indices
    kept = torch.ones_like(maps, dtype=torch.bool).flatten(1).scatter(1, lowest, False).view_as(maps)
    own = torch.diag_embed(run.reading == 1)
    return maps.where(kept | own, torch.zeros_like(maps))


@reads(MAPS, MAP_GRADIENTS)
def genatt(run: Recording) -> Scores:
    """Generic attention explainability (Chefer et al. 2021): R = I, then R += mean over heads of relu(A dA) times R."""
    relevance = identity(run)
    for a, g in zip(run.attention, run.gradients.attention, strict=True):
        relevance = relevance + (a * g).relu().mean(1) @ relevance
    return Scores(read_row(run, relevance))


@reads(MAPS, MAP_GRADIENTS, BETWEEN)
def tokentm(run: Recording) -> Scores:
    """Token transformation matters (Wu et al. 2024): as GenAtt, weighted by how much each branch changes a token."""
    attention, middle = run.attention, [h for h in run.after_attention if h is not None]
    if len(middle) < len(attention):
        raise ValueError(
            "TokenTM needs a residual stream between attention and MLP, and these blocks run them side by side"
        )
    relevance = torch.diag_embed(run.tokens[0].to(run.dtype).norm(dim=-1))
    for layer, (a, g) in enumerate(zip(attention, run.gradients.attention, strict=True)):
        before, after = change(run, run.tokens[layer], middle[layer]), change(run, middle[layer], run.tokens[layer + 1])
        relevance = relevance + a.mean(1) * before[:, None] * g.relu().mean(1) @ relevance
        relevance = relevance + after[..., None] * relevance
    return Scores(read_row(run, relevance))


def change(run: Recording, old: Tensor, new: Tensor) -> Tensor:
    """How much each token changed, (B, N): ratio of lengths times softmax over tokens of the cosine."""
    old, new = precise(old.detach()), precise(new.detach())
    cosine = torch.cosine_similarity(old, new, dim=-1).masked_fill(~run.valid, -torch.inf)
    return new.norm(dim=-1) / old.norm(dim=-1) * cosine.softmax(1)


# ---- sums over blocks ------------------------------------------------------------------------------------------------


@reads(LAYERS, MAPS)
def attcat(run: Recording, layers: Iterable[int] | None = None) -> Scores:
    """AttCAT (Qiang et al. 2022): sum over blocks of the attention that a token received, times the input x gradient
    of the next block. layers: default all."""

    def one_block(layer: int) -> Tensor:
        return received(run, run.attention[layer]) * input_times_gradient(run, layer + 1)

    return Scores(torch.stack([one_block(layer) for layer in chosen_layers(layers, run)]).sum(0))


@reads(MAPS, GRAPH, APART)
def legrad(run: Recording, layers: Iterable[int] | None = None) -> Scores:
    """LeGrad (Bousselham et al. 2024): sum over blocks of relu(ds/dA), mean over heads and queries, where s is the
    answer that the model would read off the mean token of that block's own output.

    layers: default all; the published package's default are the last two, layers=(-2, -1).
    """
    return sum_of_own_gradients(run, layers, lambda tokens, layer: mean_token(run, layer, tokens))


@reads(MAPS, GRAPH, APART)
def legrad_class_token(run: Recording, layers: Iterable[int] | None = None) -> Scores:
    """LeGrad with each block's own output read as the model reads its last one: off the class token where it has one,
    which isn't what is published. layers: default all."""
    return sum_of_own_gradients(run, layers, lambda tokens, layer: tokens)


def sum_of_own_gradients(run: Recording, layers: Iterable[int] | None, read) -> Scores:
    gradients = run.own_map_gradients(chosen_layers(layers, run), read)
    return Scores(torch.stack([received(run, gradient.relu()) for gradient in gradients.values()]).sum(0))


def mean_token(run: Recording, layer: int, tokens: Tensor) -> Tensor:
    """What left a block, every token replaced by the mean of all but padding; dimensions in the stream's own order."""
    axes = run.axes[layer + 1]
    share = (run.valid / run.valid.sum(1, keepdim=True)).unflatten(1, axes.sizes(tokens)).unsqueeze(-1)
    share = share.movedim(tuple(range(1 + len(axes.tokens))), (axes.batch, *axes.tokens)).to(tokens)
    return (tokens * share).sum(axes.tokens, keepdim=True).expand_as(tokens)
