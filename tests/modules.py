# ruff: noqa: B008 (a case makes its layer once, as the default of an argument)
"""Small modules as people write them, and what libra_grad must say of each: complete, or refused and why.

The verdicts are mathematics, not what some version of the engine does. *Complete*: after the repairs every function
here is of degree one in its input and its additive constants together, so that <t, gradient> over all of them sums to
the output. *Refused*: what is asked for is no stream (a probability, an exponential, a number drawn at random), or
nobody can know what an operation does. `linear` marks what plain gradients complete as well: a check of completeness
says nothing about balancing there. A number, mask or buffer that is added anywhere counts as a constant: about half of
the modules hide one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from models import Twice
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

TOKENS, IMAGES = (2, 5, 8), (2, 4, 6, 6)  # batch, tokens, width; batch, channels, height, width


@dataclass(frozen=True)
class Case:
    """One module with its verdict: refused if there is a `reason`, complete otherwise."""

    function: Callable[[Tensor], Tensor]
    reason: str = ""
    linear: bool = False
    shape: tuple[int, ...] = TOKENS


CASES: dict[str, Case] = {}


def complete(name: str, function=None, **options):
    """Adds a case to the table: as a decorator, or complete("name", lambda x: ...)."""

    def add(function):
        assert name not in CASES, f"two cases are called {name!r}"
        CASES[name] = Case(function, **options)
        return function

    return add if function is None else add(function)


def refused(name: str, reason: str, function=None, **options):
    return complete(name, function, reason=reason, **options)


generator = torch.Generator().manual_seed(0)


def buffer(*shape: int, dtype=torch.float64) -> Tensor:
    """A constant that autograd knows nothing of."""
    return torch.randn(*shape, dtype=dtype, generator=generator) / 2


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(buffer(*shape))


def drawn(module: nn.Module) -> nn.Module:
    """The module in float64 and evaluation mode, with every number drawn: no bias is 0, no norm's weight 1."""
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(buffer(*tensor.shape))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module


def frozen(module: nn.Module) -> nn.Module:
    """The same, its biases hidden: nothing in it requires a gradient."""
    return drawn(module).requires_grad_(False)


P, Q, R, S, T, U = (parameter(8, 8) for _ in range(6))
A, B, C = (parameter(8) for _ in range(3))
HIDDEN, HIDDEN_MATRIX, HIDDEN_TOKENS = buffer(8), buffer(5, 8), buffer(2, 9, 8)
MASK = torch.tensor([True, False, True, True, False, False, True, False])
CAUSAL = torch.ones(5, 5).triu(1).bool()


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# ---- constants of every kind -----------------------------------------------------------------------------------------

complete("a number is added", lambda x: x + 1, linear=True)
complete("a number is added before GELU", lambda x: F.gelu(x + 0.5))
complete("a number is added in place", lambda x: (x * 2).add_(0.5).sub_(HIDDEN, alpha=3), linear=True)
complete("a truth value is added", lambda x: F.gelu(x) + True)
complete("one minus", lambda x: 1 - x, linear=True)
complete("a buffer minus", lambda x: F.silu(torch.rsub(x, HIDDEN)))
complete("a buffer is added", lambda x: F.gelu(x + HIDDEN) @ P + B)
complete("a float32 buffer is added", lambda x: x + HIDDEN.float(), linear=True)
complete("integers are added", lambda x: x + torch.arange(8), linear=True)
complete("a mask is added", lambda x: x + (x > 0), linear=True)
complete("noise is added", lambda x: x + 0.1 * torch.randn_like(x), linear=True)
complete("a frozen parameter's exponential is added", lambda x: F.gelu(x) + B.detach().exp())
refused(
    "a parameter's exponential is added",
    "no slope f(b)/b to the leaf, and the exponential is none itself; frozen, it would be",
    lambda x: F.gelu(x) + B.exp(),
)
complete("a detached part", lambda x: F.gelu(x) + (x @ P).detach())
complete("straight-through rounding", lambda x: x + (x.round() - x).detach(), linear=True)
complete("a detached factor", lambda x: x * x.detach(), linear=True)
complete(
    "ones and zeros are concatenated",
    lambda x: torch.cat([torch.ones(2, 1, 8), x, 0 * x, HIDDEN_MATRIX.expand(2, 5, 8)], 1) @ P,
    linear=True,
)
complete("a class token that learns", lambda x: F.gelu(torch.cat([A.expand(2, 1, 8), x], 1)))
complete("a class token that is frozen", lambda x: F.gelu(torch.cat([HIDDEN.expand(2, 1, 8), x], 1)))
complete("a buffer is stacked", lambda x: F.gelu(torch.stack([x, HIDDEN_MATRIX.expand_as(x)])))
complete("padding with a value", lambda x: F.gelu(F.pad(x, (1, 2), value=0.7)))
complete(
    "circular padding",
    lambda x: F.conv1d(F.pad(x.mT, (1, 1), mode="circular"), P[:, :, None].expand(8, 8, 3)).mT,
    linear=True,
)
complete("the larger of stream and buffer", lambda x: torch.maximum(x, HIDDEN), linear=True)
complete("the larger of stream and number", lambda x: torch.fmin(F.gelu(x), torch.tensor(0.3)))
complete("clamped GELU", lambda x: F.gelu(x).clamp(0.1, 0.6))
# 0 times no slope is 0.2: the bound itself is the constant that is added
complete("clamp that lifts exact zeros", lambda x: F.relu(x @ P).square().clamp(min=0.2))
complete("hardtanh that lifts exact zeros", lambda x: F.hardtanh(F.relu(x @ P).square(), 0.2, 0.9))
complete("threshold with a value", lambda x: F.threshold(x, 0.1, 0.7), linear=True)
complete("filled by mask with a value", lambda x: x.masked_fill(MASK, 0.7), linear=True)
complete("masked max pooling with -inf", lambda x: F.gelu(x).masked_fill(MASK, -math.inf).amax(-1))
complete("where with a number", lambda x: torch.where(x > 0, F.gelu(x), 0.3))
complete("where with a buffer", lambda x: torch.where(MASK, HIDDEN, x), linear=True)
complete("where with two branches", lambda x: torch.where(x > 0, F.silu(x + 1), 1 - (x @ P)))
complete("a value is scattered", lambda x: x.scatter(-1, torch.tensor([[[1, 3]]]).expand(2, 5, 2), 0.5), linear=True)
complete("indices filled with a number", lambda x: F.gelu(x).index_fill(-1, torch.tensor([0, 5]), 0.5))
complete(
    "a buffer is copied to indices", lambda x: x.index_copy(1, torch.tensor([3, 0]), HIDDEN_TOKENS[:, :2]), linear=True
)
complete(
    "a buffer is added at indices", lambda x: x.index_add(1, torch.tensor([3, 3]), HIDDEN_TOKENS[:, :2]), linear=True
)
complete("a buffer is scattered by mask", lambda x: x.masked_scatter(MASK, HIDDEN_TOKENS), linear=True)
complete(
    "the stream is written into a buffer by index",
    lambda x: HIDDEN_TOKENS.index_put((torch.tensor([[0], [1]]), torch.tensor([8, 1, 2, 6, 3])), x),
    linear=True,
)
complete("a slice is replaced", lambda x: torch.select_scatter(F.gelu(x), HIDDEN_MATRIX[:2], 1, 2))
complete("towards a buffer by lerp", lambda x: torch.lerp(F.gelu(x), HIDDEN, 0.3))
complete("a product of buffers is added", lambda x: torch.addcmul(F.gelu(x), HIDDEN, HIDDEN_MATRIX, value=0.5))
complete("addmm onto a buffer", lambda x: F.gelu(torch.addmm(HIDDEN_MATRIX, x[0], P, beta=0.5)))
complete("linear layer with frozen bias", lambda x: F.gelu(F.linear(x, P, HIDDEN)))
complete("convolution with frozen bias", lambda x, layer=frozen(nn.Conv2d(4, 3, 3)): F.gelu(layer(x)), shape=IMAGES)
complete(
    "transposed convolution", lambda x, layer=frozen(nn.ConvTranspose2d(4, 3, 3, 2)): F.gelu(layer(x)), shape=IMAGES
)
complete("frozen position embedding by index", lambda x: F.gelu(x + HIDDEN_MATRIX[torch.tensor([4, 0, 0, 1, 2])]))
complete("frozen position embedding by view", lambda x: F.gelu(x.flatten(1) + HIDDEN_MATRIX.flatten()[None]))
complete(
    "position embedding resized",
    lambda x: F.gelu(x + F.interpolate(HIDDEN_MATRIX.mT[None, :, :3], 5, mode="linear")[0].mT),
)
complete(
    "a complex buffer is added",
    lambda x, c=buffer(4, dtype=torch.complex128): torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (4, 2))) + c
    ),
    linear=True,
)
complete("whitened by running statistics", lambda x: F.gelu((x - HIDDEN) / (HIDDEN.abs() + 0.5)))


@complete("moving average from a frozen state", linear=True)
def moving_average(x):
    state, states = HIDDEN.expand(2, 8), []
    for token in x.unbind(1):
        state = 0.9 * state + 0.1 * token
        states.append(state)
    return torch.stack(states, 1)


@complete("constants made under no_grad")
def made_without_gradient(x):
    with torch.no_grad():
        centre = x.mean(1, keepdim=True).tanh() + A
    return F.gelu(x - centre)


# ---- in place --------------------------------------------------------------------------------------------------------


@complete("a chain in place", linear=True)
def chain_in_place(x):
    return (x @ P).add_(0.5).mul_(2).relu_()


@complete("slices in place")
def slices_in_place(x):
    y = x @ P
    y[..., :4] *= torch.sigmoid(x[..., 4:])
    y[:, 1:] += F.gelu(x[:, :-1])
    y[:, 0] -= HIDDEN
    return y


@complete("slices written", linear=True)
def slices_written(x):
    y = x.clone()
    y[:, 0] = x[:, 1] @ P
    y[:, 1, 2:4] = 0.7
    y[:, 2:4].fill_(0.3)
    y[:, 4, :2].zero_()
    return y


@complete("stream written into ones")
def written_into_ones(x):
    y = torch.ones(2, 7, 10, dtype=x.dtype)
    y[:, 1:6, 2:] = x
    return F.gelu(y)


@complete("tokens written into zeros one by one")
def written_into_zeros(x):
    y, last = torch.zeros_like(x), HIDDEN
    for i in range(5):
        y[:, i] = last = F.silu(x[:, i] + last @ Q)
    return y


@complete("key-value cache")
def key_value_cache(x):
    keys, values = torch.zeros(2, 9, 8, dtype=x.dtype), torch.zeros(2, 9, 8, dtype=x.dtype)
    keys[:, :5], values[:, :5] = x @ P, x @ Q + B
    visible = torch.arange(9) < 5
    return F.scaled_dot_product_attention(x @ R, keys, values, attn_mask=visible.expand(5, 9))


@complete("through a view in place")
def through_a_view(x):
    y = x @ P
    y.view(2, 40)[:, 3:20].add_(1).mul_(HIDDEN_MATRIX.flatten()[3:20])
    y.mT.relu_()
    return F.gelu(y)


@complete("copied into a buffer's slice", linear=True)
def copied_into_a_slice(x):
    y = HIDDEN_TOKENS.clone()
    y[:, 2:7].copy_(x)
    return y


@complete("by mask in place")
def by_mask_in_place(x):
    y = x * 2
    y.masked_fill_(MASK, 0.5)
    y[y > 1] = 0.9
    return F.gelu(y)


@complete("by index in place")
def by_index_in_place(x):
    y = x @ P
    y[:, torch.tensor([0, 3])] = HIDDEN
    y.index_add_(1, torch.tensor([1, 1]), x[:, :2])
    y.scatter_add_(-1, torch.tensor([0, 7]).expand(2, 5, 2), x[..., :2])
    return F.gelu(y)


complete("diagonal filled in place", lambda x: F.gelu((x[0] @ P).fill_diagonal_(0.5)))
complete("tanh in place", lambda x: (x @ P).tanh_() @ Q)
complete("SiLU in place", lambda x: F.silu(x @ P, inplace=True))
complete(
    "ReLU in place on a convolution",
    lambda x, layer=frozen(nn.Conv2d(4, 3, 3)): F.relu(layer(x), inplace=True),
    shape=IMAGES,
    linear=True,
)
complete("division in place", lambda x: (x @ P).div_(1 + x.abs()))
complete("copied into an empty tensor", lambda x: F.gelu(torch.empty_like(x).copy_(x)))
refused("ELU in place", "in place it keeps its result only", lambda x: F.elu(x @ P, inplace=True))
refused("CELU in place", "in place it keeps its result only", lambda x: F.celu(x @ P, inplace=True))


# ---- attention -------------------------------------------------------------------------------------------------------


def attention(x, change_logits=lambda a: a, change_map=lambda a: a, change_qk=lambda q: q):
    q, k, v = heads(change_qk(x @ P)), heads(change_qk(x @ Q)), heads(x @ R + A)
    return merged(change_map(change_logits(q @ k.mT / 2).softmax(-1)) @ v) @ S + B


complete("eager attention", attention)
complete("causal attention", lambda x: attention(x, lambda a: a.masked_fill(CAUSAL, -math.inf)))
complete("relative position bias", lambda x, bias=buffer(2, 5, 5): attention(x, lambda a: a + bias))
complete("ALiBi", lambda x: attention(x, lambda a: a - torch.tensor([0.5, 0.25])[:, None, None] * torch.arange(5)))
complete(
    "attention sinks",
    lambda x, sink=parameter(1, 2, 1, 1): attention(
        x, lambda a: torch.cat([a, sink.expand(2, 2, 5, 1)], -1), lambda a: a[..., :-1]
    ),
)
complete(
    "talking heads",
    lambda x, pre=parameter(2, 2), post=parameter(2, 2): attention(
        x, lambda a: torch.einsum("bhqk,hg->bgqk", a, pre), lambda a: torch.einsum("bhqk,hg->bgqk", a, post)
    ),
)
complete("soft-capped attention", lambda x: attention(x, lambda a: 3 * torch.tanh(a / 3)))
complete("QK-norm", lambda x, norm=drawn(nn.RMSNorm(8)): attention(x, change_qk=norm), linear=True)
complete(
    "cosine attention, learned temperature",
    lambda x: attention(x, lambda a: a * A[0].clamp(max=4).exp(), change_qk=lambda q: F.normalize(q, dim=-1)),
)
complete("sigmoid attention", lambda x: torch.sigmoid(x @ P @ x.mT - 1) @ (x @ Q) / 5)
complete("squared-ReLU attention", lambda x: (F.relu(x @ P @ x.mT).square() / 5) @ (x @ Q))
complete(
    "fused attention, grouped queries",
    lambda x: merged(
        F.scaled_dot_product_attention(heads(x @ P, 4), heads(x @ Q[:, :4]), heads(x @ R[:, :4] + 1), enable_gqa=True)
    ),
)
complete(
    "fused attention with a bias",
    lambda x, bias=parameter(5, 5): F.scaled_dot_product_attention(x @ P, x @ Q, x @ R + HIDDEN, attn_mask=bias),
)
complete(
    "multi-query",
    lambda x: merged((heads(x @ P) @ (x @ Q[:, :4])[:, None].mT).softmax(-1) @ (x @ R[:, :4] + 1)[:, None]),
)
complete("cross attention", lambda x: ((x[:, :2] @ P) @ (x[:, 2:] @ Q).mT).softmax(-1) @ F.gelu(x[:, 2:]))
complete(
    "additive attention", lambda x: (torch.tanh((x @ P)[:, :, None] + (x @ Q)[:, None] + HIDDEN) @ A).softmax(-1) @ x
)
complete("attention pooling by a learned query", lambda x: (x @ A / 3).softmax(-1)[:, None] @ F.gelu(x))
complete(
    "attention as a custom mixture of softmaxes", lambda x: sum((x @ W @ x.mT).softmax(-1) / 2 for W in (P, Q)) @ x
)
complete(
    "softmax by hand",
    lambda x: (lambda e: e / e.sum(-1, keepdim=True))((x @ x.mT - (x @ x.mT).amax(-1, keepdim=True)).exp()) @ x,
)
complete(
    "module: MultiheadAttention",
    lambda x, layer=drawn(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)): layer(
        x, x, x
    )[0],
)
complete(
    "module: TransformerEncoderLayer",
    lambda x, layer=drawn(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")): layer(x),
)
complete(
    "module: frozen TransformerDecoderLayer",
    lambda x, layer=frozen(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)): layer(x[:, :2], x),
)
# The map is held constant, so that all of the output would be the constants': a softmax that is the stream is refused.
CODEBOOK = "what is read out is a sum of constants, weighted by a softmax of the input"
refused("attention to values that learn", CODEBOOK, lambda x: (x @ P).softmax(-1) @ Q)
refused("attention to frozen values", CODEBOOK, lambda x: (x @ P).softmax(-1) @ HIDDEN)
refused(
    "fused attention to frozen values",
    CODEBOOK,
    lambda x: F.scaled_dot_product_attention(x @ P, x @ Q, HIDDEN_MATRIX[None]),
)


@complete("linear attention, elu + 1")
def linear_attention(x):
    q, k, v = F.elu(x @ P) + 1, F.elu(x @ Q) + 1, x @ R
    return q @ (k.mT @ v) / (q @ k.sum(1)[..., None])


@complete("Performer: exponential features")
def performer(x):
    def features(t):
        return torch.exp(t @ S / 2 - t.square().sum(-1, keepdim=True) / 8)

    q, k, v = features(x @ P / 2), features(x @ Q / 2), x @ R
    return q @ (k.mT @ v) / (q @ k.sum(1)[..., None])


@complete("retention")
def retention(x):
    steps = torch.arange(5.0, dtype=x.dtype)
    decay = (0.9 ** (steps[:, None] - steps)).tril()
    return F.group_norm(((x @ P) @ (x @ Q).mT * decay @ (x @ R)).flatten(0, 1), 2).view_as(x) * F.silu(x @ S)


@complete("gated attention unit")
def gated_attention_unit(x):
    shared = F.silu(x @ P)
    scores = F.relu((shared * A + HIDDEN) @ (shared * B + C).mT / 5).square()
    return F.silu(x @ Q) * (scores @ F.silu(x @ R)) @ S


def threshold_of_sparsemax(z):
    ordered = z.sort(-1, descending=True)[0]
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    excess = ordered.cumsum(-1) - 1
    support = (count * ordered > excess).sum(-1, keepdim=True)
    return excess.gather(-1, support - 1) / support


@complete("sparsemax attention")
def sparsemax_attention(x):
    scores = x @ P @ x.mT
    return (scores - threshold_of_sparsemax(scores)).clamp(min=0) @ x


@complete("sparsemax as the stream", linear=True)
def sparsemax(x):
    return F.relu(x - threshold_of_sparsemax(x))


@complete("entmax by sort")
def entmax_attention(x):
    scores = (x @ P @ x.mT) / 2
    ordered = scores.sort(-1, descending=True)[0]
    count = torch.arange(1, 6, dtype=x.dtype)
    mean, mean_square = ordered.cumsum(-1) / count, ordered.square().cumsum(-1) / count
    delta = (1 - count * (mean_square - mean**2)) / count
    tau = mean - delta.clamp(min=1e-6).sqrt()
    support = (tau <= ordered).sum(-1, keepdim=True)
    return (scores - tau.gather(-1, support - 1)).clamp(min=0).square() @ x


@complete("slot attention")
def slot_attention(x, cell=drawn(nn.GRUCell(8, 8))):
    slots = (HIDDEN_MATRIX[:3] + A).expand(2, 3, 8)
    for _ in range(2):
        weights = (F.layer_norm(slots, (8,)) @ P @ x.mT).softmax(1) + 1e-8
        updates = weights / weights.sum(-1, keepdim=True) @ (x @ Q)
        slots = cell(updates.flatten(0, 1), slots.flatten(0, 1)).view(2, 3, 8)
    return slots


@complete("rotary embedding", linear=True)
def rotary(x):
    angles = torch.outer(torch.arange(5.0), 10.0 ** -torch.arange(4.0)).double()
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@complete("rotary embedding as complex numbers")
def rotary_as_complex(x):
    turns = torch.polar(torch.ones(5, 4).double(), torch.outer(torch.arange(5.0), 10.0 ** -torch.arange(4.0)).double())

    def turned(t):
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (4, 2))) * turns).flatten(-2)

    return (turned(x @ P) @ turned(x @ Q).mT).softmax(-1) @ F.gelu(turned(x + 1))


@complete("deformable attention", shape=IMAGES)
def deformable_attention(x, offsets=drawn(nn.Conv2d(4, 2, 1)), value=frozen(nn.Conv2d(4, 4, 1))):
    grid = F.affine_grid(torch.eye(2, 3).double().expand(2, 2, 3), (2, 4, 6, 6), align_corners=False)
    return F.grid_sample(value(x), grid + 0.3 * torch.tanh(offsets(x)).permute(0, 2, 3, 1), align_corners=False)


# ---- recurrent -------------------------------------------------------------------------------------------------------


def scanned(x, step, state):
    states = []
    for token in x.unbind(1):
        state = step(token, state)
        states.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(states, 1)


@complete("LSTM by hand, frozen first state")
def lstm_by_hand(x, cell=frozen(nn.Linear(16, 32))):
    def step(token, state):
        hidden, memory = state
        i, f, g, o = cell(torch.cat([token, hidden], -1)).chunk(4, -1)
        memory = torch.sigmoid(f + 1) * memory + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(memory), memory

    return scanned(x, step, (HIDDEN.expand(2, 8), HIDDEN_MATRIX[0].expand(2, 8)))


@complete("GRU by hand")
def gru_by_hand(x):
    def step(token, hidden):
        reset, update = torch.sigmoid(token @ P + hidden @ Q), torch.sigmoid(token @ R + A)
        return (1 - update) * torch.tanh(token @ S + reset * (hidden @ T + B)) + update * hidden

    return scanned(x, step, torch.zeros(2, 8, dtype=x.dtype))


@complete("minimal GRU")
def min_gru(x):
    def step(token, hidden):
        update = torch.sigmoid(token @ P + A)
        return (1 - update) * hidden + update * (token @ Q + HIDDEN)

    return scanned(x, step, HIDDEN.expand(2, 8))


@refused("minimal GRU in log space", "an exponential of a log-sum is the stream")
def min_gru_in_log_space(x):
    gates, hidden = x @ P, x @ Q
    log_hidden = torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
    decay = (-F.softplus(gates)).cumsum(1)
    return (decay + (log_hidden - F.softplus(-gates) - decay).logcumsumexp(1)).exp()


complete(
    "module: LSTM",
    lambda x, layer=drawn(nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)): layer(x)[0],
)
complete(
    "module: frozen LSTM with a state",
    lambda x, layer=frozen(nn.LSTM(8, 8, batch_first=True)): layer(
        x, (HIDDEN.expand(1, 2, 8), HIDDEN.expand(1, 2, 8) / 2)
    )[0],
)
complete("module: GRU", lambda x, layer=drawn(nn.GRU(8, 6, batch_first=True)): layer(x)[0])
complete(
    "module: frozen GRU with a state",
    lambda x, layer=frozen(nn.GRU(8, 8, batch_first=True)): layer(x, HIDDEN.expand(1, 2, 8))[0],
)
complete("module: RNN with tanh", lambda x, layer=frozen(nn.RNN(8, 6, batch_first=True)): layer(x)[0])
complete(
    "module: RNN with ReLU",
    lambda x, layer=frozen(nn.RNN(8, 6, batch_first=True, nonlinearity="relu")): layer(x)[0],
    linear=True,
)


@complete("selective scan")
def selective_scan(x, decay=parameter(8, 4)):
    inner, gate = F.silu(x @ P + A), x @ Q
    dt = F.softplus(inner @ R + HIDDEN)
    write, read = inner @ S[:, :4], inner @ S[:, 4:]
    state, outputs = torch.zeros(2, 8, 4, dtype=x.dtype), []
    for t in range(5):
        step = dt[:, t, :, None]
        state = torch.exp(-step * decay.exp()) * state + step * write[:, t, None] * inner[:, t, :, None]
        outputs.append((state * read[:, t, None]).sum(-1) + B * inner[:, t])
    return torch.stack(outputs, 1) * F.silu(gate)


@complete("RWKV time mixing")
def rwkv(x):
    shifted = F.pad(x, (0, 0, 1, -1))
    mixed = x * A + shifted * (1 - A)
    keys, values, receptance = mixed @ P, mixed @ Q, torch.sigmoid(mixed @ R)
    above, below, top, outputs = 0, 0, torch.full((2, 8), -1e38, dtype=x.dtype), []
    for k, v in zip(keys.unbind(1), values.unbind(1), strict=True):
        new_top = torch.maximum(top, k + B)
        old, new = torch.exp(top - new_top), torch.exp(k + B - new_top)
        outputs.append((old * above + new * v) / (old * below + new))
        new_top = torch.maximum(top - HIDDEN.exp(), k)
        old, new = torch.exp(top - HIDDEN.exp() - new_top), torch.exp(k - new_top)
        above, below, top = old * above + new * v, old * below + new, new_top
    return receptance * torch.stack(outputs, 1)


@complete("S4: diagonal states as a long convolution")
def s4(x, poles=buffer(8, 4), residues=buffer(8, 4, dtype=torch.complex128)):
    lags = torch.arange(5.0, dtype=x.dtype)
    kernel = (residues[..., None] * torch.exp(torch.complex(-poles.exp(), poles)[..., None] * lags)).sum(1).real
    spectrum = torch.fft.rfft(x.mT, n=10) * torch.fft.rfft(kernel, n=10)
    return F.gelu(torch.fft.irfft(spectrum, n=10)[..., :5].mT + x * HIDDEN) @ P + B


@complete("gated delta rule by a triangular solve")
def delta_rule(x):
    keys, values = F.normalize(x @ P, dim=-1), x @ Q + HIDDEN
    strength = torch.sigmoid(x @ A)[..., None]
    system = torch.eye(5).double() + ((strength * keys) @ keys.mT).tril(-1)
    corrected = torch.linalg.solve_triangular(system, strength * values, upper=False)
    return ((x @ R) @ keys.mT).tril() @ corrected


@complete("exponential gating with a normaliser")
def exponential_gating(x):
    def step(token, state):
        _, cell, normaliser = state
        forget, write = torch.sigmoid(token @ P), torch.exp(token @ Q / 2)
        cell, normaliser = forget * cell + write * torch.tanh(token @ R), forget * normaliser + write
        return torch.sigmoid(token @ S) * cell / normaliser, cell, normaliser

    zeros = torch.zeros(2, 8, dtype=x.dtype)
    return scanned(x, step, (zeros, zeros, zeros))


# ---- modulation, gates, experts --------------------------------------------------------------------------------------


@complete("AdaLN from a frozen condition")
def adaln(x):
    shift, scale, gate = (F.silu(HIDDEN + C) @ W for W in (P, Q, R))
    return x + gate * F.gelu((F.layer_norm(x, (8,)) * (1 + scale) + shift) @ S + B)


@complete("AdaLN from a condition that is added, too")
def adaln_added(x):
    condition = F.silu(C @ T)
    return (F.layer_norm(x + condition, (8,)) * (1 + condition @ P + A) + condition @ Q + B) @ R


@complete("FiLM from the stream")
def film(x):
    condition = F.relu(x.mean(1, keepdim=True) @ P + A)
    return F.gelu(x) * (1 + condition @ Q + HIDDEN) + condition @ R + B


complete("highway", lambda x: (lambda t: t * F.relu(x @ Q + B) + (1 - t) * x)(torch.sigmoid(x @ P - 1)))
complete("hypernetwork", lambda x: F.relu(x @ (x.mean(1) @ P + A)[..., None] * HIDDEN + x @ Q))
complete(
    "squeeze and excite",
    lambda x, down=drawn(nn.Conv2d(4, 2, 1)), up=frozen(nn.Conv2d(2, 4, 1)): (
        x * torch.sigmoid(up(4 * F.relu(down(x.amax((2, 3), keepdim=True)))))
    ),
    shape=IMAGES,
)
complete(
    "squeeze and excite, hard",
    lambda x, layer=drawn(nn.Conv2d(4, 4, 1)): F.hardswish(x) * F.hardsigmoid(layer(F.adaptive_avg_pool2d(x, 1))),
    shape=IMAGES,
)


@complete("CBAM", shape=IMAGES)
def cbam(x, channels=drawn(nn.Linear(4, 4)), space=frozen(nn.Conv2d(2, 1, 3, padding=1))):
    x = x * torch.sigmoid(channels(x.mean((2, 3))) + channels(x.amax((2, 3))))[..., None, None]
    return x * torch.sigmoid(space(torch.stack([x.mean(1), x.amax(1)], 1)))


complete("ReGLU", lambda x: (x @ P) * F.relu(x @ Q) @ R)
complete("GEGLU", lambda x: (x @ P + HIDDEN) * F.gelu(x @ Q + A) @ R)
complete("SwiGLU", lambda x: (x @ P) * F.silu(x @ Q) @ R)
complete("bilinear GLU", lambda x: (x @ P + 1) * (x @ Q) @ R)
complete("GLU", lambda x: F.glu(x @ P + HIDDEN, -1))
complete(
    "gMLP: spatial gating",
    lambda x, space=parameter(5, 5): (lambda u, v: u * (space @ F.layer_norm(v, (4,)) + 1))(
        *F.gelu(x @ P).chunk(2, -1)
    ),
)
complete("layer scale", lambda x: x + 0.1 * HIDDEN * F.gelu(x @ P + A))
complete("stochastic depth at rest", lambda x: x + F.dropout(F.gelu(x), 0.5, training=False))
complete("gate of gates", lambda x: F.gelu(x) * (1 - torch.sigmoid(x @ P) * x.softmax(-1).sqrt()).clamp(min=0.1))


def experts(x, i):
    return F.gelu(x @ (P, Q, R)[i] + (A, B, HIDDEN)[i])


@complete("mixture of experts, top 2 of softmax")
def top_k_routing(x):
    tokens = x.flatten(0, 1)
    weights, chosen = (tokens @ S[:, :3]).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    result = torch.zeros_like(tokens)
    for i in range(3):
        rows, slots = torch.where(chosen == i)
        result.index_add_(0, rows, experts(tokens[rows], i) * weights[rows, slots, None])
    return result.view_as(x)


@complete("mixture of experts, switch")
def switch_routing(x):
    weights, chosen = (x @ S[:, :3]).softmax(-1).max(-1)
    result = torch.empty_like(x)
    for i in range(3):
        result[chosen == i] = experts(x[chosen == i], i)
    return x + result * weights[..., None]


@complete("mixture of experts, softmax over the chosen")
def softmax_over_chosen(x):
    logits, chosen = (x @ S[:, :3]).topk(2)
    weights = torch.zeros(2, 5, 3, dtype=x.dtype).scatter(-1, chosen, logits.softmax(-1))
    return sum(weights[..., i, None] * experts(x, i) for i in range(3))


@complete("mixture of experts, expert choice")
def expert_choice(x):
    gates = (x @ S[:, :3]).softmax(-1)
    weights, tokens = gates.topk(2, dim=1)
    result = torch.zeros_like(x)
    for i in range(3):
        index = tokens[..., i, None].expand(2, 2, 8)
        result = result.scatter_add(1, index, weights[..., i, None] * experts(x.gather(1, index), i))
    return result


@complete("mixture of experts, soft")
def soft_experts(x):
    logits = x @ S[:, :3]
    slots = logits.softmax(1).mT @ x
    return logits.softmax(-1) @ torch.stack([experts(slots[:, i], i) for i in range(3)], 1)


# ---- norms -----------------------------------------------------------------------------------------------------------

complete("batch norm at rest", lambda x, norm=frozen(nn.BatchNorm2d(4)): norm(x), shape=IMAGES, linear=True)
complete(
    "batch norm without weights", lambda x, norm=drawn(nn.BatchNorm2d(4, affine=False)): F.gelu(norm(x)), shape=IMAGES
)
complete(
    "batch norm as torch's own",
    lambda x: F.gelu(
        torch.batch_norm(x, None, HIDDEN[:4], HIDDEN[4:], HIDDEN[:4].abs() + 0.5, False, 0.1, 1e-5, False)
    ),
    shape=IMAGES,
)
complete(
    "instance norm with running statistics",
    lambda x, norm=frozen(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)): norm(x),
    shape=IMAGES,
    linear=True,
)
refused("batch norm in training", "the samples mix", lambda x: F.batch_norm(x, None, None, training=True), shape=IMAGES)
complete("layer norm, frozen", lambda x, norm=frozen(nn.LayerNorm(8)): norm(x))
complete("group norm, frozen", lambda x, norm=frozen(nn.GroupNorm(2, 4)): norm(x), shape=IMAGES)
complete("instance norm, frozen", lambda x, norm=frozen(nn.InstanceNorm2d(4, affine=True)): norm(x), shape=IMAGES)
complete("RMSNorm", lambda x, norm=drawn(nn.RMSNorm(8)): norm(x + HIDDEN))
complete("RMSNorm by hand", lambda x: A * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
complete("RMSNorm as Gemma's", lambda x: x / x.square().mean(-1, keepdim=True).sqrt() * (1 + A))
complete("RMSNorm in float32", lambda x: x * torch.rsqrt(x.float().square().mean(-1, keepdim=True)).double())
complete("gated RMSNorm", lambda x: F.rms_norm(x, (8,), A) * F.silu(x @ P))
complete("partial RMSNorm", lambda x: x / (x[..., :4].norm(dim=-1, keepdim=True) / 2 + 1e-8) + HIDDEN)
complete("ScaleNorm", lambda x: A[0] * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-5))
complete("pixel norm", lambda x: x / torch.sqrt(x.square().mean(1, keepdim=True) + 1e-8), shape=IMAGES)
complete("L1 norm", lambda x: x / x.abs().sum(-1, keepdim=True))
complete(
    "min-max scaling", lambda x: (x - x.amin(-1, keepdim=True)) / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True))
)
complete("standardised", lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) * A + HIDDEN)
complete("local response norm", lambda x: F.local_response_norm(x + 1, 3, alpha=1), shape=IMAGES)
complete(
    "global response norm",
    lambda x: (lambda g: A[:4, None, None] * x * (g / (g.mean(1, keepdim=True) + 1e-6)) + B[:4, None, None] + x)(
        x.norm(dim=(2, 3), keepdim=True)
    ),
    shape=IMAGES,
    linear=True,
)
complete(
    "layer norm over channels",
    lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,), None, HIDDEN[:4]).permute(0, 3, 1, 2),
    shape=IMAGES,
)
complete("dynamic tanh", lambda x: torch.tanh(0.8 * x) * A + HIDDEN)
complete("weight norm", lambda x, layer=parametrizations.weight_norm(drawn(nn.Linear(8, 8))): F.gelu(layer(x)))
complete(
    "spectral norm", lambda x, layer=parametrizations.spectral_norm(drawn(nn.Linear(8, 8))).eval(): F.gelu(layer(x))
)


@complete("weight standardisation", shape=IMAGES)
def weight_standardisation(x, layer=drawn(nn.Conv2d(4, 3, 3))):
    variance, mean = torch.var_mean(layer.weight, (1, 2, 3), keepdim=True)
    return F.gelu(F.conv2d(x, (layer.weight - mean) * torch.rsqrt(variance + 1e-6), layer.bias))


# ---- activations and functions as the stream -------------------------------------------------------------------------

complete("PReLU", lambda x, layer=drawn(nn.PReLU(5)): layer(x), linear=True)
complete("Maxout", lambda x: torch.maximum(x @ P + A, x @ Q + HIDDEN), linear=True)
complete("hard shrink", lambda x: F.gelu(F.hardshrink(x, 0.3)))
complete("tanh shrink", F.tanhshrink)
complete("soft cap", lambda x: 2 * torch.tanh((x @ P + 1) / 2))
complete("softsign", lambda x: F.softsign(x + HIDDEN))
complete("squareplus", lambda x: (x + torch.sqrt(x.square() + HIDDEN.abs())) / 2)
complete("squared ReLU", lambda x: F.relu(x + 0.5).square())
complete("SELU, CELU, ELU", lambda x: F.selu(x) @ P + F.celu(x + 1, 0.7) @ Q + F.elu(x - HIDDEN, 1.3))
complete("Mish and GELU's approximation", lambda x: F.mish(x + 1) @ P + F.gelu(x, approximate="tanh"))
complete("sigmoid as the stream", lambda x: torch.sigmoid(x @ P + A) @ Q)
complete("two sigmoids as the stream", lambda x: torch.sigmoid(x @ P) * torch.sigmoid(x @ Q))
complete("log1p as the stream", lambda x: torch.log1p(F.relu(x @ P)))
complete("expm1 as the stream", lambda x: torch.expm1(x / 2) + HIDDEN)
complete("symlog", lambda x: torch.sign(x) * torch.log1p(x.abs()))
complete("square root as the stream", lambda x: (x.abs() + 0.1).sqrt())
complete("cube", lambda x: (x + 0.5) ** 3)
refused("exponential as the stream", "an exponential has no degree: explain what stands in it", torch.exp)
refused("softmax as the stream", "explain a logit, never a probability", lambda x: x.softmax(-1))
refused(
    "mixture of softmaxes as the stream",
    "explain a logit, never a probability",
    lambda x: x[..., :2].softmax(-1)[..., None, :] @ torch.stack([(x @ P).softmax(-1), (x @ Q).softmax(-1)], -2),
)
refused("log-softmax as the stream", "explain a logit, never a log-probability", lambda x: F.log_softmax(x @ P, -1))
refused("log-sum-exp pooling", "explain the logits in it", lambda x: x.logsumexp(1))
refused(
    "softplus as the stream", "at 0 it is log 2, which is nobody's: explain its argument", lambda x: F.softplus(x @ P)
)
refused(
    "sine as the stream",
    "periodic: a slope sin(x)/x would vanish at every multiple of pi",
    lambda x: torch.sin(x @ P + A),
)
refused("Snake", "holds a sine as the stream", lambda x: x + torch.sin(A * x).square() / A)
refused(
    "radial basis functions",
    "exponentials as the stream",
    lambda x: torch.exp(-(x[..., None, :] - Q).square().sum(-1)).sum(-1),
)
refused("logarithm as the stream", "infinite at 0, so that no slope f(x)/x exists", lambda x: torch.log(x.abs() + 0.1))
refused("one over the stream", "of degree -1, and no stream above the line", lambda x: 1 / (x.abs() + 1))
refused("negative power", "of degree -1, and no stream above the line", lambda x: (x.abs() + 1) ** -0.5)
refused("a number to the stream's power", "an exponential as the stream", lambda x: 2**x)
refused(
    "variance as a feature",
    "a variance is a denominator, not a stream: explain a standard deviation",
    lambda x: torch.cat([x, x.var(-1, keepdim=True)], -1),
)
refused("rounded", "its derivative is 0 everywhere", lambda x: x + torch.round(x))


@complete("KAN-like splines")
def splines(x, knots=torch.linspace(-3, 3, 9).double()):
    x = x[..., None].clamp(-2.9, 2.9)
    basis = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
    for order in (1, 2, 3):
        left = (x - knots[: -order - 1]) / (knots[order:-1] - knots[: -order - 1]) * basis[..., :-1]
        right = (knots[order + 1 :] - x) / (knots[order + 1 :] - knots[1:-order]) * basis[..., 1:]
        basis = left + right
    return basis @ P[:5]


# ---- features and products of the stream -----------------------------------------------------------------------------

complete("norm as a feature", lambda x: torch.cat([F.gelu(x), x.norm(dim=-1, keepdim=True)], -1))
complete("standard deviation as a feature", lambda x: F.gelu(torch.cat([x.mean(1), x.std(1)], -1) + 1))
complete("variance by hand as a feature", lambda x: (x - x.mean(-1, keepdim=True)).square().mean(-1))
complete("distance to a prototype", lambda x: torch.linalg.vector_norm(x - HIDDEN, dim=-1), linear=True)
complete("cosine similarity to a prototype", lambda x: F.cosine_similarity(x + 1, HIDDEN, dim=-1))
complete("one stream over another", lambda x: (x @ P + HIDDEN) / (1 + (x @ Q).square()))
complete("generalised-mean pooling", lambda x: x.abs().clamp(min=0.5).pow(3).mean(1).pow(1 / 3), linear=True)
complete("generalised-mean pooling, exponents that learn", lambda x: (x.abs() + 0.1).pow(A.abs() + 1).mean(1))
complete("einsum of four operands", lambda x: torch.einsum("btc,cd,btd,d->bt", x, P, x + 1, A))
complete("three times the same", lambda x: torch.einsum("btc,btc,btc->bt", x, x, x))
complete("module: Bilinear", lambda x, layer=drawn(nn.Bilinear(8, 8, 3)): layer(x + 1, F.gelu(x)))
complete("outer product", lambda x: x[:, 0, :, None] * F.gelu(x)[:, 1, None, :])
complete("covariance pooling", lambda x: (lambda c: c.mT @ c / 5)(x - x.mean(1, keepdim=True)))
complete("factorisation machine", lambda x: ((x @ P).square() - x.square() @ Q.square()).sum(-1) / 2 + x @ A + 0.3)
complete(
    "sorted, median, top",
    lambda x: x.sort(1)[0] @ P + x.median(1, keepdim=True)[0] + x.topk(5, -1)[0].mean() + 1,
    linear=True,
)
complete("cumulative sum and maximum", lambda x: x.cumsum(1) @ P + x.cummax(1)[0] + HIDDEN, linear=True)
complete(
    "bag of weighted embeddings",
    lambda x: F.embedding_bag(torch.arange(8).expand(2, 8), P, per_sample_weights=F.gelu(x[:, 0]), mode="sum"),
)
refused("product over tokens", "of the degree of the number of tokens, which no rule shares out", lambda x: x.prod(1))
refused(
    "matrix inverse", "of degree -1, and no stream above the line", lambda x: torch.linalg.inv(torch.eye(8) + x.mT @ x)
)
refused(
    "determinant",
    "of the degree of its size, which no rule shares out",
    lambda x: torch.linalg.det(torch.eye(8) + x.mT @ x),
)
refused(
    "a constant system solved for the stream's inverse",
    "of degree -1, and no stream above the line",
    lambda x: torch.linalg.solve_triangular(
        torch.eye(5) + (x @ x.mT).tril(-1), HIDDEN_MATRIX.expand(2, 5, 8), upper=False
    ),
)


# ---- pictures and signals --------------------------------------------------------------------------------------------

complete("interpolated", lambda x: F.interpolate(F.gelu(x + 1), scale_factor=2, mode="bilinear"), shape=IMAGES)
complete(
    "sampled on a constant grid",
    lambda x: F.grid_sample(
        x, torch.linspace(-1, 1, 36).double().reshape(1, 6, 3, 2).expand(2, 6, 3, 2), align_corners=False
    ),
    shape=IMAGES,
    linear=True,
)
complete("unfolded and folded", lambda x: F.fold(F.gelu(F.unfold(x, 3) + 0.2), (6, 6), 3), shape=IMAGES)
complete("pooled", lambda x: F.max_pool2d(F.gelu(x), 2) + F.avg_pool2d(x, 2) + HIDDEN[0], shape=IMAGES)
complete("Fourier mixing", lambda x: F.layer_norm(torch.fft.fft2(x).real + x, (8,), A, B))
complete(
    "global filter",
    lambda x, weights=buffer(3, 8, dtype=torch.complex128): F.gelu(
        torch.fft.irfft(torch.fft.rfft(x, dim=1) * weights, n=5, dim=1) + 1
    ),
)
complete("product of complex streams", lambda x: (lambda z: z * z.conj().roll(1, -1))(torch.complex(x, x @ P + 1)))
complete("modulus of a complex stream", lambda x: torch.complex(x, x @ P).abs() @ Q, linear=True)


@complete("long convolution with gates")
def long_convolution(x):
    positions = torch.linspace(0, 1, 5).double()[:, None]
    kernel = torch.sin(positions @ A[None] * 9) @ P * torch.exp(-positions * B.abs())  # of constants only
    first, second, y = x @ Q, x @ R, x @ S + HIDDEN
    for gate in (first, second):
        spectrum = torch.fft.rfft(y, n=10, dim=1) * torch.fft.rfft(kernel, n=10, dim=0)
        y = gate * (torch.fft.irfft(spectrum, n=10, dim=1)[:, :5] + y * C)
    return y


# ---- what autograd can be made to do ---------------------------------------------------------------------------------


class Relu(torch.autograd.Function):
    """Not what PyTorch means by the name: the cube."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Mul(torch.autograd.Function):
    """Not what PyTorch means by the name: a quotient."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a / b

    @staticmethod
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        return gradient / b, -gradient * a / b**2


UNKNOWN = "nobody knows what a custom autograd function does"
refused("custom function", UNKNOWN, Twice.apply)
refused("custom function called Relu", UNKNOWN, Relu.apply)
refused("custom function called Mul", UNKNOWN, lambda x: Mul.apply(x, x.square() + 1))


def block(x):
    return x + F.gelu(F.layer_norm(x, (8,), A, HIDDEN) @ P + 1) @ Q


def save_matrix_products(context, operation, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE


complete("checkpointed block", lambda x: checkpoint(block, x, use_reentrant=False))
complete(
    "selectively checkpointed block",
    lambda x: checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save_matrix_products)
    ),
)
refused("reentrant checkpoint", "it hides the graph", lambda x: checkpoint(block, x, use_reentrant=True))
complete(
    "checkpointed padding",
    lambda x: checkpoint(lambda x: F.gelu(F.pad(x, (1, 0), value=0.3)) + 1, x, use_reentrant=False),
)
refused(
    "vmap",
    "a constant added inside a transform of torch.func has no place in the graph",
    lambda x: torch.vmap(lambda sample: F.gelu(sample @ P + HIDDEN) @ Q + 1)(x),
)
refused(
    "gradient of an energy",
    "the graph holds derivatives of operations, which are none of the table",
    lambda x: torch.autograd.grad(F.gelu(x @ P).sum(), x, create_graph=True)[0],
)

RANDOM = "the output is random: dropout is active"
refused("dropout", RANDOM, lambda x: F.dropout(F.gelu(x), 0.5, training=True))
refused("alpha dropout", RANDOM, lambda x: F.alpha_dropout(F.selu(x), 0.5, training=True))
refused("feature dropout", RANDOM, lambda x: F.dropout2d(x, 0.5, training=True), shape=IMAGES)


class StochasticDepth(nn.Module):
    def forward(self, x):
        keep = x.new_empty(2, 1, 1).bernoulli_(0.5) if self.training else 1
        return x + F.gelu(x) * keep


refused("stochastic depth in training", RANDOM, lambda x, layer=StochasticDepth(): layer(x))
complete("stochastic depth at rest, as a module", lambda x, layer=StochasticDepth().eval(): layer(x))
