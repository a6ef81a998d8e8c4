"""The repairs as formulas: from the gradient that arrives, and what the layer computed, to the gradient it sends on.

Mehri et al. 2025, section 3, theorems 4 and 5: a layer is complete once <input, gradient> equals its output. Nothing
here knows about autograd nodes, kernels, precision or memory; each formula makes one new tensor and changes no
argument. `x` is the layer's input, `y` its output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- activations: the slope f(x)/x of the line from the origin to (x, f(x)) ------------------------------------------


def secant(gradient: Tensor, y: Tensor, x: Tensor, at_zero: float = 1.0) -> Tensor:
    """gradient * y/x, where y = f(x) is a tensor of the caller's own; at_zero is f'(0), the limit of y/x."""
    slope = y.div_(x).nan_to_num_(at_zero, math.inf, -math.inf)  # 0/0 is the only NaN
    return slope.mul_(gradient)


def gelu(gradient: Tensor, x: Tensor, approximate: str) -> Tensor:
    return secant(gradient, F.gelu(x, approximate=approximate), x, at_zero=0.5)


def silu(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.sigmoid(x).mul_(gradient)


def hardswish(gradient: Tensor, x: Tensor) -> Tensor:
    return secant(gradient, F.hardswish(x), x, at_zero=0.5)


def mish(gradient: Tensor, x: Tensor) -> Tensor:
    return secant(gradient, F.mish(x), x, at_zero=0.6)


def elu(gradient: Tensor, x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    negative = alpha * torch.expm1(x.clamp(max=0) * input_scale)
    return secant(gradient, scale * torch.where(x > 0, x, negative), x)


def celu(gradient: Tensor, x: Tensor, alpha: float) -> Tensor:
    return secant(gradient, F.celu(x, float(alpha)), x)


def clamp(gradient: Tensor, x: Tensor, min: float | Tensor | None, max: float | Tensor | None) -> Tensor:
    return secant(gradient, torch.clamp(x, min, max), x).sum_to_size(x.shape)  # type: ignore[arg-type]


def clamp_min(gradient: Tensor, x: Tensor, min: float | Tensor) -> Tensor:
    return secant(gradient, x.clamp(min=min), x).sum_to_size(x.shape)  # bounds may be of a larger shape


def clamp_max(gradient: Tensor, x: Tensor, max: float | Tensor) -> Tensor:
    return secant(gradient, x.clamp(max=max), x).sum_to_size(x.shape)


def hardtanh(gradient: Tensor, x: Tensor, min_val: float, max_val: float) -> Tensor:
    return secant(gradient, x.clamp(min_val, max_val), x)


def softshrink(gradient: Tensor, x: Tensor, lambd: float) -> Tensor:
    return secant(gradient, F.softshrink(x, float(lambd)), x)


def erf(gradient: Tensor, x: Tensor) -> Tensor:
    return secant(gradient, torch.erf(x), x, at_zero=2 / math.sqrt(math.pi))


def atan(gradient: Tensor, x: Tensor) -> Tensor:
    return secant(gradient, torch.atan(x), x)


def asinh(gradient: Tensor, x: Tensor) -> Tensor:
    return secant(gradient, torch.asinh(x), x)


def log1p(gradient: Tensor, x: Tensor) -> Tensor:
    return secant(gradient, torch.log1p(x), x)


def tanh(gradient: Tensor, y: Tensor, argument: Tensor) -> Tensor:
    return secant(gradient, y.clone(), argument)


def expm1(gradient: Tensor, y: Tensor, argument: Tensor) -> Tensor:
    return secant(gradient, y.clone(), argument)


def sigmoid(gradient: Tensor, y: Tensor, argument: Tensor) -> Tensor:
    """sigmoid(x) = 1/2 + tanh(x/2)/2: the second term is the stream's, the first a constant."""
    return secant(gradient, y - 0.5, argument, at_zero=0.25)


def glu(gradient: Tensor, x: Tensor, dim: int) -> Tensor:
    """First half times sigmoid(second half); only the first half is a stream."""
    dim -= 2**64 if dim >= 2**63 else 0  # PyTorch saves negative dimensions as unsigned numbers
    stream = torch.sigmoid(x.chunk(2, dim)[1]).mul_(gradient)
    return torch.cat([stream, torch.zeros_like(stream)], dim)


def bloom_gelu(gradient: Tensor, x: Tensor) -> Tensor:
    """The tanh-GELU that transformers' BLOOM writes out by hand."""
    gate = 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return gate * gradient


def unchanged(gradient: Tensor) -> Tensor:
    """Of degree one already."""
    return gradient


# ---- norms: (x - mean) / [std] * weight; only the mean stays differentiable ------------------------------------------


def layer_norm(gradient: Tensor, weight: Tensor | None, rstd: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    gradient = gradient.clone() if weight is None else gradient * weight
    return gradient.sub_(gradient.mean(dims, keepdim=True)).mul_(rstd)


def rms_norm(gradient: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    gradient = gradient * rstd
    return gradient if weight is None else gradient.mul_(weight)


def group_norm(gradient: Tensor, weight: Tensor | None, rstd: Tensor, N: int, C: int, group: int) -> Tensor:
    by_channel = gradient.reshape(N, C, -1)
    if weight is not None:
        by_channel = by_channel * weight[:, None]
    by_group = by_channel.reshape(N, group, -1)
    centred = by_group - by_group.mean(-1, keepdim=True)
    return centred.mul_(rstd.reshape(N, group, 1)).reshape(gradient.shape)


def batch_norm(gradient: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    """With the statistics of its own input it is a norm, as instance norm is."""
    shape = [1, -1] + [1] * (gradient.dim() - 2)  # one number a channel
    if weight is not None:
        gradient = gradient * weight.reshape(shape)
    centred = gradient - gradient.mean([0, *range(2, gradient.dim())], keepdim=True)
    return centred.mul_(rstd.reshape(shape))


# ---- attention: [softmax(q k' / sqrt d + mask)] v --------------------------------------------------------------------


def attention_values(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
    first_row: int,
) -> Tensor:
    """map' @ gradient, the map made anew from q, k and each row's log-sum-exp: two products of the usual five.

    All (B, heads, T, d); queries and gradient may be some rows only, from `first_row` on. It goes over blocks of as
    many keys as a head has channels, so that what lies in memory is never larger than the queries.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = logsumexp.masked_fill(logsumexp == -math.inf, math.inf)[..., None]  # a row without keys attends to none
    groups = query.shape[1] // key.shape[1]  # query heads to each key and value head
    result = gradient.new_empty(*key.shape[:-1], gradient.shape[-1])
    step = max(64, query.shape[-1])
    for start in range(0, key.shape[-2], step):
        keys = slice(start, start + step)
        hidden = max(0, start - first_row) if is_causal else 0  # earlier queries don't see these keys
        seen_by = slice(hidden, None)
        block = key[..., keys, :].repeat_interleave(groups, 1) if groups > 1 else key[..., keys, :]
        scores = torch.matmul(query[..., seen_by, :], block.mT).mul_(scale)
        if attn_mask is not None:
            scores.add_(attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])[..., keys])
        attention = scores.sub_(rows[..., seen_by, :]).exp_()
        if is_causal:
            attention.tril_(first_row + hidden - start)
        to_values = torch.matmul(attention.mT, gradient[..., seen_by, :])
        result[..., keys, :] = to_values.unflatten(1, (-1, groups)).sum(2) if groups > 1 else to_values
    return result


# ---- additions: relevance shared by sign -----------------------------------------------------------------------------


def shared_by_sign(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """c = a + b: a's share of the relevance is (1 + [a and c agree in sign]) a over the same for a and b together
    (ResLRP, Berend et al. 2026)."""
    c = a + b
    weight_a = 1 + (a.sign() == c.sign()).to(c.dtype)
    weight_b = 1 + (b.sign() == c.sign()).to(c.dtype)
    total = weight_a * a + weight_b * b
    per_weight = torch.where(total == 0, 1, c / torch.where(total == 0, 1, total)) * gradient
    return weight_a * per_weight, weight_b * per_weight
