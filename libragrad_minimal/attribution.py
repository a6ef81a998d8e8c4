"""Every attribution method on one recording of an untouched model, with plain or balanced gradients.

A method is a function of a `Recording` (B samples, N tokens, C channels, L blocks) that returns scores (B, N). One that
promises completeness returns (scores, total) with total (B,), which should equal the explained output. To add a method,
write the function and name it in METHODS.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .engine import LIBRA, Rules
from .recording import Gradients, Recording, picture_size, record

Scores = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Attribution:
    """What each token contributed to the output."""

    scores: Tensor  # (B, T), signed; patches only for pictures, every token for text (exactly 0 at padding)
    output: Tensor  # (B,) the explained number
    completeness_error: Tensor  # (B,) |output - all attributions|; NaN for methods that don't promise completeness
    grid: tuple[int, int] | None  # rows and columns of patches; None for text

    @property
    def maps(self) -> Tensor:
        """The scores of pictures as maps (B, rows, columns)."""
        if self.grid is None:
            raise ValueError("scores of text have no grid: use .scores")
        return self.scores.unflatten(1, self.grid)


def attribute(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    target: Any,
    method: str = "FullGrad+",
    rules: Rules = LIBRA,
    **options: Any,
) -> Attribution:
    """Explain `target` of an untouched timm, open_clip or transformers model in eval mode.

    inputs   pictures (B, 3, H, W), token ids (B, T), or keyword arguments of the model (a tokenizer's output)
    target   class or token id (an int, or (B,) integers): its logit, for text at the last token;
             or floating-point weights (classes,) or (B, classes): that combination of logits, e.g. logit a - logit b;
             for open_clip the text features (D,) or (B, D): the similarity to the picture;
             or a function of the model's answer (B, classes) that returns (B,)
    method   a key of METHODS
    rules    PLAIN, LIBRA, ATTN_LRP, ...: how gradients flow back
    options  of the method, e.g. discard_ratio=0.9

    Tokens are those that enter the first block; what came before it (patch embedding, positions) belongs to the input.
    Raises ValueError for a model, target, method or option that doesn't fit, UnsupportedOperation from libra_grad.
    """
    return attribute_many(model, inputs, target, {method: options}, rules)[method]


def attribute_many(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    target: Any,
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]],
    rules: Rules = LIBRA,
) -> dict[str, Attribution]:
    """Several methods on one forward and one backward pass: `methods` are names, or names with options each.

    Those that average gradients need more; Integrated Gradients and all that are combined with them share theirs.

    The other arguments and errors are those of `attribute`.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; call model.eval() first")
    methods = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    for name, options in methods.items():
        check_method(name, options)
    run = record(model, inputs, target, rules)
    size = picture_size(inputs)
    prefix, grid = (0, None) if size is None else patch_grid(model, run, size)
    output, results = run.output.detach(), {}
    for name, options in methods.items():
        result = METHODS[name](run, **options)
        scores, total = result if isinstance(result, tuple) else (result, torch.full_like(output, torch.nan))
        scores, error = (scores.detach() * run.valid)[:, prefix:], (output - total.detach()).abs()
        results[name] = Attribution(scores, output, error, grid)
    return results


def check_method(method: str, options: Iterable[str]) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    known = list(inspect.signature(METHODS[method]).parameters)[1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")


def patch_grid(model: nn.Module, run: Recording, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """How many class and register tokens come first, and the (rows, columns) of the patches after them."""
    if run.tokens[0].dim() == 4:
        rows, columns = run.tokens[0].shape[1:3]
        return 0, (rows, columns)
    tokens, (height, width) = run.valid.shape[1], size
    known = getattr(model, "num_prefix_tokens", 0)  # timm's word; some of its models add their class token later
    for prefix in [known, *range(tokens)]:
        patches = tokens - prefix
        grid = round((patches * height / width) ** 0.5), round((patches * width / height) ** 0.5)
        if grid[0] * grid[1] == patches:
            return prefix, grid
    raise ValueError(f"{tokens} tokens don't fit a grid of patches on a {height}x{width} picture")


# ---- input times gradient, and its sums over layers ------------------------------------------------------------------


def tokens_and_gradients(run: Recording, layer: int) -> tuple[Tensor, Tensor]:
    """Tokens entering a block and their gradients, both (B, N_layer, C) in at least single precision."""
    h, g = run.tokens[layer].detach().float(), run.gradients.tokens[layer]
    h, g = h.flatten(1, -2), g.flatten(1, -2)
    return (h * run.valid[..., None], g) if run.valid.shape == h.shape[:2] else (h, g)


def spread(scores: Tensor, run: Recording, layer: int) -> Tensor:
    """Scores of one layer's tokens (B, N_layer) on the tokens of the first, (B, N): a coarse one shares evenly."""
    first, here = run.tokens[0].shape[1:-1], run.tokens[layer].shape[1:-1]
    if first == here:
        return scores
    if len(first) != 2 or len(here) != 2 or first[0] % here[0] or first[1] % here[1]:
        raise ValueError(
            f"block {layer} works on {tuple(here)} tokens, the first block on {tuple(first)}: no known relation"
        )
    rows, columns = first[0] // here[0], first[1] // here[1]
    maps = scores.unflatten(1, here).repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    return maps.flatten(1) / (rows * columns)


def input_times_gradient(run: Recording, layer: int) -> Tensor:
    h, g = tokens_and_gradients(run, layer)
    return spread((h * g).sum(-1), run, layer)


def constant_attributions(run: Recording) -> Iterable[tuple[int, Tensor | float, Tensor]]:
    """For each constant: its layer, its attribution per token (B, N), and in total (B,).

    What can't be placed on a token (a head's bias, one inside a window) has 0 per token, and counts in total.
    """
    samples = len(run.output)
    for constant, gradient in zip(run.constants, run.gradients.constants, strict=True):
        if gradient.dim() == 0:  # no gradient came by
            continue
        product = (constant.value.float() * gradient).sum(constant.channels)
        if constant.tokens_first:
            product = product.transpose(0, 1)
        placed: Tensor | float = 0.0
        if product.shape[0] == samples and product[0].numel() == run.tokens[constant.layer][0, ..., 0].numel():
            placed = spread(product.flatten(1), run, constant.layer)
        yield constant.layer, placed, product.reshape(samples, -1).sum(1)


def ixg(run: Recording) -> Scores:
    """Input x gradient at the tokens; complete on its own only where a model adds no constants."""
    scores = input_times_gradient(run, 0)
    return scores if run.constants else (scores, scores.sum(1))


def fullgrad(run: Recording, layer: int = 0) -> Scores:
    """Input x gradient at one block, plus every constant added from there on (Srinivas & Fleuret 2019).

    With Libra each layer's scores and total explain the whole output (Mehri et al. 2025, section 3).
    """
    layer = range(len(run.tokens))[layer]
    scores = input_times_gradient(run, layer)
    total = scores.sum(1)
    for constant_layer, placed, sum_ in constant_attributions(run):
        if constant_layer >= layer:
            scores, total = scores + placed, total + sum_
    return scores, total


def fullgrad_plus(run: Recording) -> Scores:
    """FullGrad+ (Mehri et al. 2025): input x gradient of every block plus all constants.

    For pictures the completeness error is that of the FullGrad it extends. For text it is the mean over blocks of each
    block's FullGrad, so that the scores themselves, with what can't be placed, add up to the logit.
    """
    layers = range(len(run.tokens) - 1)
    if run.is_text:
        every = [fullgrad(run, layer) for layer in layers]
        scores, total = (torch.stack(part).mean(0) for part in zip(*every, strict=True))
        return scores, total
    first, total = fullgrad(run)
    return first + sum(input_times_gradient(run, layer) for layer in layers[1:]), total


# ---- class activation maps -------------------------------------------------------------------------------------------


def hirescam(run: Recording, layer: int = -1) -> Scores:
    """Input x gradient at one late block, the last by default (Draelos & Carin 2020)."""
    return input_times_gradient(run, range(len(run.tokens) - 1)[layer])


def gradcam_plus(run: Recording) -> Scores:
    """GradCAM summed over blocks: channels weighted by their mean gradient."""

    def one_block(layer):
        h, g = tokens_and_gradients(run, layer)
        return spread((h * mean_over_tokens(run, g)).sum(-1), run, layer)

    return sum(map(one_block, range(len(run.tokens) - 1)))


def xgradcam_plus(run: Recording) -> Scores:
    """XGradCAM summed over blocks: channels weighted by their share of the attribution."""

    def one_block(layer):
        h, g = tokens_and_gradients(run, layer)
        weight = (h * g).sum(1, keepdim=True) / h.abs().sum(1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
        return spread((h * weight).sum(-1), run, layer)

    return sum(map(one_block, range(len(run.tokens) - 1)))


def mean_over_tokens(run: Recording, values: Tensor) -> Tensor:
    """(B, N, C) -> (B, 1, C), padding left out."""
    if run.valid.shape != values.shape[:2]:
        return values.mean(1, keepdim=True)
    return (values * run.valid[..., None]).sum(1, keepdim=True) / run.valid.sum(1)[:, None, None]


# ---- attention -------------------------------------------------------------------------------------------------------


def received(run: Recording, maps: Tensor) -> Tensor:
    """Maps (B, H, N, N) -> (B, N): mean over heads and queries, what each key received."""
    return mean_over_tokens(run, maps.mean(1))[:, 0]


def read_row(run: Recording, matrix: Tensor) -> Tensor:
    """The row of (B, N, N) that the output is read from: class or last token's, or the mean row."""
    return torch.einsum("bq,bqk->bk", run.readout, matrix)


def identity(run: Recording) -> Tensor:
    return torch.eye(run.valid.shape[1], device=run.output.device).expand(len(run.output), -1, -1)


def raw_attention(run: Recording) -> Scores:
    """The last block's attention map, mean over heads, read where the output is read."""
    return read_row(run, run.attention[-1].mean(1))


FUSIONS = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}


def roll_out(run: Recording, fused: Iterable[Tensor], discard_ratio: float) -> Tensor:
    """Product over blocks of (A + I)/2 with rows that sum to 1, lowest entries of A (B, N, N) dropped."""
    if not 0 <= discard_ratio < 1:
        raise ValueError(f"discard_ratio must lie in [0, 1), got {discard_ratio}")
    result = identity(run)
    for maps in fused:
        mixed = (discard_lowest(run, maps, discard_ratio) + identity(run)) / 2
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return read_row(run, result)


def discard_lowest(run: Recording, maps: Tensor, share: float) -> Tensor:
    """Zero the lowest share of the entries of each map (B, N, N), never the class token's own."""
    lowest = maps.flatten(1).topk(int(share * maps[0].numel()), dim=1, largest=False).indices
    kept = torch.ones_like(maps, dtype=torch.bool).flatten(1).scatter(1, lowest, False).view_as(maps)
    own = torch.diag_embed(run.readout == 1)
    return maps.where(kept | own, torch.zeros_like(maps))


def rollout(run: Recording, head_fusion: str = "mean", discard_ratio: float = 0.0) -> Scores:
    """Attention Rollout (Abnar & Zuidema 2020), with vit-explain's head_fusion (mean, max, min) and discard_ratio."""
    if head_fusion not in FUSIONS:
        raise ValueError(f"unknown head_fusion {head_fusion!r}; there are {', '.join(FUSIONS)}")
    return roll_out(run, map(FUSIONS[head_fusion], run.attention), discard_ratio)


def gradient_rollout(run: Recording, discard_ratio: float = 0.0) -> Scores:
    """Rollout of attention times its gradient, positive parts only (as vit-explain, without its defects)."""
    return roll_out(run, positive_products(run), discard_ratio)


def positive_products(run: Recording) -> list[Tensor]:
    """L maps (B, N, N): attention times its gradient, negative parts cut, mean over heads."""
    maps = run.attention
    return [(a * g).relu().mean(1) for a, g in zip(maps, run.gradients.attention, strict=True)]


def genatt(run: Recording) -> Scores:
    """Generic attention explainability (Chefer et al. 2021)."""
    relevance = identity(run)
    for product in positive_products(run):
        relevance = relevance + product @ relevance
    return read_row(run, relevance)


def attcat(run: Recording) -> Scores:
    """AttCAT (Qiang et al. 2022): attention received in a block times input x gradient of the next."""

    def one_block(layer):
        return received(run, run.attention[layer]) * input_times_gradient(run, layer + 1)

    return sum(map(one_block, range(len(run.attention))))


def tokentm(run: Recording) -> Scores:
    """Token transformation matters (Wu et al. 2024)."""
    attention, middle = run.attention, [h for h in run.after_attention if h is not None]
    if len(middle) < len(attention):
        raise ValueError(
            "TokenTM needs a residual stream between attention and MLP, and these blocks run them side by side"
        )
    relevance = torch.diag_embed(run.tokens[0].detach().float().norm(dim=-1))
    for layer, (a, g) in enumerate(zip(attention, run.gradients.attention, strict=True)):
        before, after = change(run, run.tokens[layer], middle[layer]), change(run, middle[layer], run.tokens[layer + 1])
        relevance = relevance + a.mean(1) * before[:, None] * g.relu().mean(1) @ relevance
        relevance = relevance + after[..., None] * relevance
    return read_row(run, relevance)


def change(run: Recording, old: Tensor, new: Tensor) -> Tensor:
    """How much each token changed, (B, N): ratio of lengths times softmax over tokens of the cosine."""
    old, new = old.detach().float(), new.detach().float()
    cosine = torch.cosine_similarity(old, new, dim=-1).masked_fill(~run.valid, -torch.inf)
    return new.norm(dim=-1) / old.norm(dim=-1) * cosine.softmax(1)


def legrad(run: Recording) -> Scores:
    """LeGrad (Bousselham et al. 2024): each block's output, read by the model's head, explained by its attention."""

    def one_block(layer):
        own_output = run.rerun(finish=run.tokens[layer + 1]).output
        return received(run, run.attention_gradient(own_output, layer).relu())

    return sum(map(one_block, range(len(run.attention))))


# ---- gradients averaged over many inputs -----------------------------------------------------------------------------


def mean_gradients(run: Recording, starts: Sequence[Callable[[Tensor], Tensor]]) -> Gradients:
    """The mean of the gradients of runs that start from other tokens."""
    if not starts:
        raise ValueError("gradients are averaged over at least one step or sample, got 0")
    each = (run.rerun(start=start).gradients for start in tqdm(starts, "gradients", disable=None, leave=False))
    return Gradients(*([total / len(starts) for total in totals] for totals in reduce(add_gradients, each)))


def add_gradients(first: Gradients, second: Gradients) -> Gradients:
    return Gradients(*([a + b for a, b in zip(*lists, strict=True)] for lists in zip(first, second, strict=True)))


def with_gradients(run: Recording, gradients: Gradients) -> Recording:
    """The same recording, its gradients replaced."""
    other = copy(run)
    other.gradients = gradients
    return other


def along_path(run: Recording, steps: int) -> Recording:
    """The same recording, its gradients averaged along the straight path from zero tokens (midpoint rule)."""
    if steps not in run.path_gradients:
        starts = [partial(torch.mul, other=(step + 0.5) / steps) for step in range(steps)]
        run.path_gradients[steps] = mean_gradients(run, starts)
    return with_gradients(run, run.path_gradients[steps])


def integrated(method: Callable[..., Scores]) -> Callable[..., Scores]:
    """The method with the gradients of Integrated Gradients. Several such methods of one recording share them."""

    def with_path_gradients(run: Recording, steps: int = 50) -> Scores:
        result = method(along_path(run, steps))
        return result[0] if isinstance(result, tuple) else result

    return with_path_gradients


def integrated_gradients(run: Recording, steps: int = 50) -> Scores:
    """Integrated Gradients from zero tokens (Sundararajan et al. 2017); complete up to the output at zero."""
    scores = input_times_gradient(along_path(run, steps), 0)
    return scores, scores.sum(1) + run.rerun(start=torch.zeros_like).output


def smoothgrad(run: Recording, samples: int = 25, noise: float = 0.1, seed: int = 0) -> Scores:
    """Input x gradient, the gradient averaged over noisy tokens (Smilkov et al. 2017).

    noise is a share of the range of a sample's token values. All samples of a batch meet the same noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noisy(h: Tensor) -> Tensor:
        extent = (h.flatten(1).amax(1) - h.flatten(1).amin(1)).view(-1, *[1] * (h.dim() - 1))
        return h + noise * extent * torch.randn(h.shape[1:], generator=generator).to(h)

    return input_times_gradient(with_gradients(run, mean_gradients(run, [noisy] * samples)), 0)


def random_scores(run: Recording, seed: int = 0) -> Scores:
    """Noise, as a floor for every metric. It depends on the sample, not on its place in a batch."""

    def one_sample(h: Tensor) -> Tensor:
        fingerprint = zlib.crc32(h.detach().float().cpu().numpy().tobytes(), seed)
        return torch.randn(run.valid.shape[1], generator=torch.Generator().manual_seed(fingerprint))

    return torch.stack([one_sample(h) for h in run.tokens[0]]).to(run.output.device)


METHODS: dict[str, Callable[..., Scores]] = {
    "IxG": ixg,
    "FullGrad": fullgrad,
    "FullGrad+": fullgrad_plus,
    "HiResCAM": hirescam,
    "GradCAM+": gradcam_plus,
    "XGradCAM+": xgradcam_plus,
    "AttCAT": attcat,
    "GenAtt": genatt,
    "TokenTM": tokentm,
    "RawAtt": raw_attention,
    "Attention Rollout": rollout,
    "Gradient Attention Rollout": gradient_rollout,
    "LeGrad": legrad,
    "IG": integrated_gradients,
    "SmoothGrad": smoothgrad,
    "Random": random_scores,
}
COMPOSED_WITH_IG = [
    *"FullGrad FullGrad+ HiResCAM GradCAM+ XGradCAM+ AttCAT GenAtt TokenTM".split(),
    "Gradient Attention Rollout",
]
METHODS |= {f"IG {name}": integrated(METHODS[name]) for name in COMPOSED_WITH_IG}
