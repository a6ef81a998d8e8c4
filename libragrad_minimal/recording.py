"""What one forward pass of an untouched model leaves behind for attribution methods to read.

Forward hooks on the blocks catch the tokens between them, the engine's `observed()` every constant that is added, and
the autograd graph between two blocks holds the attention map. What a method doesn't read is not kept.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from .added_constants import Constant, ConstantShare, catch_shares, catch_tokens_first, constants_of, precise
from .attention_maps import AttentionMap, caught_map_gradients, check_memory, find_attention
from .block_tokens import argument, standing_in, token_place, with_argument, with_tokens
from .engine import LIBRA, Rules, libra_grad, observed
from .engine.nodes import OPERANDS, noted
from .families import Inputs, biases_in_sight, call, name_of
from .layout import SURE, Axes, Layout, check_samples, coarsening, first_tokens, layer_axes, layout_of
from .padding import padding_mask, valid_tokens
from .readout import chosen_rows, explained, kept_rows, rows_of_answer
from .streams import (
    Streams,
    candidates,
    dependents,
    find_streams,
    in_this_thread,
    named_blocks,
    removed,
    separators,
    topological,
)

# What a method may ask a recording for, beside the tokens.
FIRST = "the gradient at the first tokens"
LAYERS = "layers"  # gradients at every block
CONSTANTS = "constants"  # what each added constant contributes
MAPS = "attention maps"  # needs memory quadratic in the number of tokens
MAP_GRADIENTS = "gradients of attention maps"
BETWEEN = "the stream between attention and MLP"
GRAPH = "the graph, after the first backward pass"
APART = "what the model reads off each block"


@dataclass(frozen=True)
class Request:
    """What is asked of a model: everything that decides how it is run and read."""

    model: nn.Module
    inputs: Inputs
    target: Any
    rules: Rules = LIBRA
    blocks: Any = None
    readout: Any = None
    start: Any = None
    reads: frozenset[str] = frozenset({LAYERS})


# ---- the recording ---------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """Gradients of the output, at least in single precision, aligned with a recording's tokens and attention maps."""

    tokens: list[Tensor]  # (B, N_l, C) for each block, or for the first alone
    constants: list[ConstantShare]
    attention: list[Tensor]  # (B, H, N, N) each
    second: Tensor | None  # (B, N', C)


@dataclass
class Recording:
    """One forward pass. B samples, N tokens (class token and all), L blocks."""

    request: Request
    output: Tensor  # (B,) what is explained
    stream: list[Tensor]  # L + 1, entering each block and leaving the last, in the model's own order of dimensions
    second: Tensor | None  # what enters the first block of a second stream, a decoder's
    layout: Layout
    axes: list[Axes]  # of each of the stream's tensors
    valid: Tensor  # (B, N) False at padding
    is_text: bool
    left: list[Tensor]  # L, as each block returned them
    entered: list[Tensor]  # L, as each block was given them, if the recording is to tell what is added to them
    returned: list[Any]  # L, all that each block returned, if the recording is to read the model's answer off them
    blocks: tuple[nn.Module, ...]
    recorded: Callable[..., Recording]  # as `record`; this and the next two under the user's autocast
    again: Callable[[], Recording]  # the same once more
    answer: Callable[..., Tensor]  # as `answered`
    # means over changed tokens, by what was changed; a recording of another target, made by `replace`, has its own
    averages: dict[Any, Gradients] = field(default_factory=dict, init=False)

    @property
    def rules(self) -> Rules:
        return self.request.rules

    @cached_property
    def tokens(self) -> list[Tensor]:
        """L + 1 of (B, N_l, C), entering each block and leaving the last."""
        return [axes.arrange(h.detach()) for axes, h in zip(self.axes, self.stream, strict=True)]

    def asked_for(self, *what: str) -> None:
        missing = set(what) - self.request.reads
        if missing:
            raise ValueError(
                f"this recording holds no {' and no '.join(sorted(missing))}: say that your method reads them, with "
                "the decorator @reads(...) of libragrad_minimal.scores"
            )

    def rerun(self, changed: Callable[[Tensor], Tensor]) -> Recording:
        """The same with other tokens entering the first block."""
        return self.recorded(self.request, changed)

    @property
    def dtype(self) -> torch.dtype:
        """In which scores are computed: that of the most precise tokens, single precision at least."""
        return reduce(torch.promote_types, (h.dtype for h in self.stream), torch.float32)

    @cached_property
    def rounding(self) -> float:
        """The relative precision of the least precise numbers on the way, 2^-7 where something is in bfloat16."""
        nodes = topological([get_gradient_edge(self.output).node])
        dtypes = {result.dtype for node in nodes for result in node._input_metadata}
        return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)

    @cached_property
    def whole(self) -> list[bool]:
        """L + 1: does everything that the first tokens tell pass through these? Not where something leads past them."""
        between = separators([get_gradient_edge(self.output).node], get_gradient_edge(self.stream[0]).node)
        return [get_gradient_edge(h).node in between for h in self.stream]

    @property
    def starts(self) -> list[Tensor]:
        """Where the graph begins: the tokens that enter the first block, of either stream."""
        return [self.stream[0]] if self.second is None else [self.stream[0], self.second]

    @cached_property
    def constants(self) -> list[Constant]:
        """Everything that is added on the way."""
        return constants_of(self.request.model, self.output, self.starts, self.stream)

    @cached_property
    def attention_maps(self) -> list[AttentionMap]:
        """Where each block's attention map sits. Raises ValueError where there isn't one in every block."""
        self.asked_for(MAPS)
        if self.second is not None:
            raise ValueError(
                f"{name_of(self.request.model)} has two streams of tokens that attend to each other; methods that read "
                "attention maps explain one. Use IxG, FullGrad or FullGrad+"
            )
        if not all(self.in_place):
            raise ValueError(
                f"before block {self.in_place.index(False)} tokens are dropped or put into another order, so attention "
                "maps don't belong to the same tokens: use IxG or FullGrad"
            )
        stop = {get_gradient_edge(h).node for h in self.stream}
        ends = [get_gradient_edge(h).node for h in self.left]
        found = [find_attention(end, stop - {end}) for end in ends]
        if not any(found):
            raise ValueError("this model has no attention maps to read; use a method without, such as FullGrad+ or IxG")
        for layer, maps in enumerate(found):
            if len(maps) != 1:
                raise ValueError(
                    f"block {layer} has {len(maps)} attention maps; methods that read them need one a block"
                )
        return [maps[0] for maps in found]

    @cached_property
    def attention(self) -> list[Tensor]:
        """L attention maps (B, H, N, N): how much each query (row) takes from each key (column)."""
        return [self.per_head(place.softmax._saved_result.detach()) for place in self.attention_maps]

    @cached_property
    def prefixes(self) -> list[int | None]:
        """L + 1: how many class tokens come before the picture's cells, which may have become coarser; None if the
        tokens' number doesn't tell."""
        return [self.prefix(layer) for layer in range(len(self.stream))]

    def prefix(self, layer: int) -> int | None:
        first, grid, sizes = self.layout.prefix, self.layout.grid, self.axes[layer].sizes(self.stream[layer])
        if first is None or grid is None:
            return None
        if len(sizes) > 1:
            return 0 if first == 0 and coarsening(grid, sizes) else None
        if coarsening(grid, (sizes[0] - first,)):
            return first
        # a class token that comes in late is in front, if what is in front doesn't depend on the first tokens
        late = next(i for i, h in enumerate(self.stream) if self.axes[i].sizes(h) == sizes)
        if first or not coarsening(grid, (sizes[0] - 1,)):
            return None
        front = self.axes[late].arrange(self.stream[late])[:, :1].sum()
        (gradient,) = torch.autograd.grad(front, self.stream[:1], retain_graph=True, allow_unused=True)
        return 1 if gradient is None or not gradient.any() else None

    @cached_property
    def in_place(self) -> list[bool]:
        """L + 1: do these tokens lie as the first ones do? Not after some were dropped, sorted or turned round between
        two blocks."""
        found = [True]
        for layer in range(1, len(self.left)):
            found.append(found[-1] and self.stays(layer))
        return [*found, found[-1]]

    def stays(self, layer: int) -> bool:
        """Whether each token of what a block returned is, in number order, what the next is given of it: asked by the
        gradient of a part of them, for every digit of their numbers in base two."""
        before, after = self.left[layer - 1], self.stream[layer]
        views = [(h.data_ptr(), h.shape, h.stride()) for h in (before, after)]
        if views[0] == views[1]:
            return True
        axes, prefix = layer_axes(self.layout.axes, self.stream[0], before, self.layout.grid), self.prefixes[layer]
        sizes, coarse = axes.sizes(before), self.axes[layer].sizes(after)
        if prefix and len(sizes) == 1:
            sizes, coarse = (sizes[0] - prefix,), (coarse[0] - prefix,)
        cell = torch.arange(math.prod(coarse))
        if sizes != coarse:
            number = self.coarse_cells(sizes, coarse)
            if number is None:
                return True  # no relation is known, so none is used
            cell = number
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(after.shape, generator=generator).to(after)
        for bit in range((math.prod(coarse) - 1).bit_length()):
            has = torch.arange(math.prod(coarse)) >> bit & 1 == 1
            felt = []
            for chosen in (has, ~has):
                chosen = nn.functional.pad(chosen, (self.axes[layer].arrange(after).shape[1] - len(chosen), 0))
                (gradient,) = torch.autograd.grad(
                    after,
                    before,
                    noise * on_tokens(self.axes[layer], chosen, after),
                    retain_graph=True,
                    allow_unused=True,
                )
                if gradient is None:
                    return True
                felt.append(axes.arrange(gradient)[:, -len(cell) :].double().norm(dim=-1))
            # what is mixed between the blocks (by one that wasn't named, for instance) feels both and can't be asked
            asked = torch.minimum(*felt) < 1e-6 * torch.maximum(*felt)
            if ((felt[0] > felt[1]) == has[cell].to(after.device))[asked].double().mean() < SURE:
                return False
        return True

    def coarse_cells(self, fine: tuple[int, ...], coarse: tuple[int, ...]) -> Tensor | None:
        """For each cell of a grid, row by row, the number of that of a coarser grid in which it lies."""
        grid = self.layout.grid
        k, m = (None if grid is None else coarsening(grid, sizes) for sizes in (fine, coarse))
        if grid is None or k is None or m is None or m % k:
            return None
        cell = torch.zeros((), dtype=torch.long)
        for length in grid:
            cell = cell[..., None] * -(-length // m) + torch.arange(-(-length // k)) // (m // k)
        return cell.flatten()

    def per_head(self, maps: Tensor) -> Tensor:
        samples, tokens = self.valid.shape
        if maps.shape[-2:] != (tokens, tokens) or maps.numel() % (samples * tokens**2):
            raise ValueError(
                f"attention maps of shape {tuple(maps.shape)} don't tie {tokens} tokens to each other (windows, "
                "pooled tokens); use a method without, such as FullGrad+ or IxG"
            )
        return maps.reshape(samples, -1, tokens, tokens).to(self.dtype)

    @cached_property
    def after_attention(self) -> list[Tensor | None]:
        """L of (B, N, C), where there is one: the stream between attention and MLP, block input plus one term."""
        self.asked_for(BETWEEN)
        return [self.middle(layer) for layer in range(len(self.stream) - 1)]

    def middle(self, layer: int) -> Tensor | None:
        h, end = self.entered[layer], get_gradient_edge(self.left[layer]).node
        first = None
        for node in topological([end], stop={get_gradient_edge(self.stream[layer]).node}):
            operands = noted(node, OPERANDS)
            if operands is not None and any(one.tensor.data_ptr() == h.data_ptr() for one in operands):
                kept = all(one.unchanged for one in operands) and node is not end
                first = operands[0].tensor + operands[1].tensor if kept else None
                break
        return None if first is None else self.axes[layer].arrange(first)

    @cached_property
    def gradients(self) -> Gradients:
        """Gradients of the output under the rules, all from one backward pass."""
        reads = self.request.reads
        maps = self.attention_maps if MAP_GRADIENTS in reads and self.attention else []
        constants = self.constants if CONSTANTS in reads else []
        if MAPS in reads:
            _ = self.reading, self.attention  # which need the graph, too
        _ = self.in_place
        wanted = self.stream if LAYERS in reads else self.stream[:1]
        seconds = [self.second] if self.second is not None else []
        tokens_first = self.tokens_first(constants)
        with (
            caught_map_gradients(maps) as attention,
            catch_shares(constants, self.axes, self.stream, tokens_first) as shares,
        ):
            found = libra_grad(
                self.output,
                [*wanted, *seconds, *(constant.tensor for constant in constants)],
                self.rules,
                retain_graph=GRAPH in reads or shares.needs_check(constants),
                allow_unused=True,
            )
        tokens = [
            axes.arrange(precise(torch.zeros_like(h) if g is None else g))
            for g, axes, h in zip(found, self.axes, wanted, strict=False)
        ]
        for constant, gradient in zip(constants, found[len(wanted) + len(seconds) :], strict=True):
            shares.settle(constant, gradient)
        if shares.assumed:
            shares.check_assumed(dict(zip(constants, self.totals(self.output[0]), strict=True)))
        if shares.unclear:
            shares.clear_up(dict(zip(constants, self.again().totals_by_sample(), strict=True)))
        second = self.second_axes.arrange(precise(found[len(wanted)])) if seconds else None
        return Gradients(tokens, shares.settled, [self.per_head(attention[i]) for i in range(len(maps))], second)

    def own_map_gradients(self, layers: Sequence[int], read: Callable[[Tensor, int], Tensor]) -> dict[int, Tensor]:
        """For each of these blocks the gradient (B, H, N, N) at its map of the answer read off its own output.

        One backward pass through the blocks: at each block's output what arrives from later ones gives way to the
        gradient of that block's own answer. `read` makes of an output, and the block's number, the tokens that the
        model reads its answer off.
        """
        self.asked_for(APART)
        _ = self.attention  # a model without maps, or with windows, is refused here
        arriving, last = {}, max(layers)
        for layer in range(min(layers), last + 1):
            leaf = self.left[layer].detach().requires_grad_()
            if layer in layers:
                # no block is left in this graph, and with it no residual addition to be shared
                rules = replace(self.rules, residual=False)
                (arriving[layer],) = libra_grad(self.answer_to(read(leaf, layer)), leaf, rules)
            else:
                arriving[layer] = torch.zeros_like(leaf)
        places = {layer: self.attention_maps[layer] for layer in layers}
        outputs = {self.left[layer]: gradient for layer, gradient in arriving.items() if layer != last}
        with caught_map_gradients(list(places.values())) as found, gradients_given(outputs):
            options = dict(grad_outputs=arriving[last], retain_graph=True, allow_unused=True)
            libra_grad(self.left[last], self.stream[min(layers)], self.rules, **options)
        return {layer: self.per_head(found[i]) for i, layer in enumerate(places)}

    def answer_to(self, tokens: Tensor) -> Tensor:
        """(B,) what the model would answer if these were the tokens that leave its last block. No block is run."""
        request = self.request
        results = [*self.returned[:-1], with_tokens(self.returned[-1], tokens.to(self.left[-1].dtype))]
        with standing_in(self.blocks, results):
            return self.answer(request, self.rules.residual)

    @property
    def second_axes(self) -> Axes:
        """A decoder has the order of dimensions that its encoder has."""
        assert self.second is not None
        dims = self.second.dim()
        return self.axes[0] if dims == self.stream[0].dim() else Axes(0, tuple(range(1, dims - 1)))

    def tokens_first(self, constants: list[Constant]) -> set[Node]:
        """Where constants are added to tokens in the order (N, B, C), asked only if N = B, as sizes tell it else."""
        samples = len(self.output)
        if samples == 1 or all(self.axes[i].sizes(h) != (samples,) for i, h in enumerate(self.stream)):
            return set()
        with catch_tokens_first(constants) as found:
            self.totals(self.output[0])
        return found

    def totals(self, output: Tensor) -> list[Tensor]:
        """What each constant contributes to one sample's output. The graph is kept."""
        tensors = [constant.tensor for constant in self.constants]
        inputs = [*self.starts, *tensors]  # all of them: what is a stream and what a gate depends on the inputs
        found = libra_grad(output, inputs, self.rules, retain_graph=True, allow_unused=True)[len(self.starts) :]
        shares = (torch.zeros_like(output) if g is None else (t * g).sum() for t, g in zip(tensors, found, strict=True))
        return [precise(share.detach()) for share in shares]

    def totals_by_sample(self) -> list[Tensor]:
        """(B,) for each constant: what it contributes to each sample, one backward pass a sample."""
        return list(torch.stack([torch.stack(self.totals(one)) for one in self.output], dim=1))

    @cached_property
    def reading(self) -> Tensor:
        """Which tokens the output is read from, as weights (B, N): the class token, the last token, or all it uses."""
        (gradient,) = torch.autograd.grad(self.output, self.stream[-1], torch.ones_like(self.output), retain_graph=True)
        used = (self.axes[-1].arrange(gradient) != 0).any(-1)
        if used.shape != self.valid.shape:
            used = self.valid
        return used.to(self.dtype) / used.sum(1, keepdim=True).clamp(min=1)


def on_tokens(axes: Axes, chosen: Tensor, like: Tensor) -> Tensor:
    """Values (N,) of tokens, in the order of dimensions of `like`, to be broadcast to it."""
    sizes = axes.sizes(like)
    values = chosen.view(1, *sizes, *[1] * (like.dim() - 1 - len(sizes))).to(like)
    return values.movedim(tuple(range(1 + len(sizes))), (axes.batch, *axes.tokens))


@contextlib.contextmanager
def gradients_given(given: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, a backward pass goes on from each of these tensors with the given gradient, whatever arrives there."""

    def give(place: int, gradient: Tensor):
        return lambda arriving: tuple(gradient if i == place else g for i, g in enumerate(arriving))

    edges = {get_gradient_edge(tensor): gradient for tensor, gradient in given.items()}
    with removed(edge.node.register_prehook(give(edge.output_nr, g)) for edge, g in edges.items()):
        yield


# ---- the forward pass ------------------------------------------------------------------------------------------------


ONE_AT_A_TIME = threading.RLock()  # which kernel attention takes, and whether compiled code runs, a process decides


def record(request: Request, changed: Callable[[Tensor], Tensor] | None = None, copies: bool = False) -> Recording:
    """Run the model once and note what the attribution methods need.

    Args:
        request: what is run and explained.
        changed: replaces the tokens that enter the first block, of either stream, by changed(tokens).
        copies: hand each block a copy of its tokens, because one of them changes them in place.
    """
    streams = find_streams(request.model, request.inputs, request.blocks)
    start = None if request.start is None else starting_module(request.model, request.start)
    passed = Passed(request, streams, start, changed, copies)
    # the math kernel is the one whose softmax shows in the graph
    kernel = sdpa_kernel(SDPBackend.MATH) if MAPS in request.reads else contextlib.nullcontext()
    with ONE_AT_A_TIME, removed(passed.hooks()), kernel:
        output = answered(request, request.rules.residual or BETWEEN in request.reads)
    if not copies and passed.changed_in_place():
        return record(request, changed, copies=True)
    return passed.finished(output)


def answered(request: Request, residuals: bool) -> Tensor:
    """(B,) what is explained, of one forward pass; its graph begins where a hook or a stand-in lets it begin."""
    model, inputs = request.model, request.inputs
    rows = chosen_rows(model, inputs, request.target, request.readout)
    kept, rows = kept_rows(model, inputs, rows)
    with torch.no_grad(), unfused(model), biases_in_sight(model), observed(residuals=residuals):
        answer = call(model, inputs, kept)
        if rows is not None:
            number = None if kept is None else len(kept)
            rows = rows_of_answer(name_of(model), inputs, answer, request.readout, rows, number)
        with torch.enable_grad():
            return explained(model, answer, request.target, request.readout, rows, inputs.samples)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, autocast makes no half precision of what is computed on such a device."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def in_this_autocast(run: Callable, device: str) -> Callable:
    """The function as if it were called here: methods work without autocast, the model under the user's."""
    if not torch.is_autocast_enabled(device):
        return run
    dtype = torch.get_autocast_dtype(device)

    def under_it(*args, **kwargs):
        with torch.autocast(device, dtype):
            return run(*args, **kwargs)

    return under_it


def starting_module(model: nn.Module, start: Any) -> nn.Module:
    modules = named_blocks(model, start)
    if len(modules) > 1:
        raise ValueError(f"start names one module, whose input are the tokens; got {len(modules)}")
    return modules[0]


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Inside, recurrent layers run step by step: fused ones hide their gates."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
        yield


@dataclass
class Passed:
    """What the hooks on the blocks see of one forward pass."""

    request: Request
    streams: Streams
    start: nn.Module | None  # where the tokens enter, if that is before the first block
    changed: Callable[[Tensor], Tensor] | None
    copies: bool
    stream: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def hooks(self) -> Iterator[Any]:
        blocks = set(self.streams.blocks)
        for block in blocks:
            yield block.register_forward_pre_hook(in_this_thread(self.enter), with_kwargs=True)
            yield block.register_forward_hook(in_this_thread(self.leave), with_kwargs=True)
        for block in set(self.streams.second) - blocks:
            yield block.register_forward_pre_hook(in_this_thread(self.enter_second), with_kwargs=True)
        if self.start is not None:
            yield self.start.register_forward_pre_hook(in_this_thread(self.enter_start), with_kwargs=True)

    def begin(self, h: Tensor) -> Tensor:
        """Everything before the first block is the input: the graph begins at its tokens."""
        torch.set_grad_enabled(True)
        return (self.changed(h.detach()) if self.changed else h.detach()).requires_grad_()

    def enter_start(self, module, args, kwargs):
        if not self.stream:
            return with_argument(self.entrance(argument(module, args, kwargs)), args, kwargs)

    def entrance(self, h: Tensor) -> Tensor:
        """The first tokens, noted, and the copy of them that is handed on."""
        if MAPS in self.request.reads:
            check_memory(self.request.model, h, len(self.streams.blocks))
        shared = self.streams.reused and is_own_memory(h, self.request.model)
        self.stream.append(self.begin(h.clone() if shared else h))
        self.versions.append(self.stream[-1]._version)
        if shared:
            as_if_made_here(h)
            h.copy_(self.stream[-1])  # whoever else holds this tensor takes part in the graph, too
        return self.stream[-1].clone()

    def enter(self, block, args, kwargs):
        h = argument(block, args, kwargs)
        if self.start is not None and not self.left:
            if not self.stream:
                raise ValueError(f"start names {type(self.start).__name__}, which doesn't run before the first block")
            given = h
        elif not self.stream:
            given = self.entrance(h)
        else:
            self.stream.append(h)
            self.versions.append(h._version)
            given = h.clone() if self.copies else h
        if BETWEEN in self.request.reads:
            self.entered.append(given)
        return with_argument(given, args, kwargs)

    def enter_second(self, block, args, kwargs):
        if not self.second:
            self.second.append(self.begin(argument(block, args, kwargs)))
            return with_argument(self.second[0].clone(), args, kwargs)

    def leave(self, block, args, kwargs, result):
        place = token_place(result, argument(block, args, kwargs).shape)
        if place is None:
            raise ValueError(f"{type(block).__name__} returns no tokens; name other blocks, blocks=[...]")
        self.left.append(result if isinstance(result, Tensor) else result[place])
        if APART in self.request.reads:
            self.returned.append(result)

    def changed_in_place(self) -> bool:
        return any(h._version != version for h, version in zip(self.stream, self.versions, strict=True))

    def finished(self, output: Tensor) -> Recording:
        request, inputs = self.request, self.request.inputs
        self.check(output)
        if self.streams.of_picture and inputs.words is not None:
            inputs = replace(inputs, about_picture=True)
        entrances = self.streams.blocks if self.start is None else (self.start,)
        layout = layout_at(request, inputs, entrances, self.stream[0])
        if self.changed is None:
            check_samples(request.model, inputs, layout.axes, entrances, self.stream[0])
        stream = [*self.stream, self.left[-1]]
        axes = [layer_axes(layout.axes, stream[0], h, layout.grid) for h in stream]
        samples, length = layout.axes.arrange(stream[0]).shape[:2]
        mask, device = padding_mask(inputs, output, self.stream[0], layout), output.device.type
        return Recording(
            request=request,
            output=output,
            stream=stream,
            second=self.second[0] if self.second else None,
            layout=layout,
            axes=axes,
            valid=valid_tokens(mask, layout, samples, length).to(output.device),
            is_text=inputs.picture is None or inputs.text is not None,
            left=self.left,
            entered=self.entered,
            returned=self.returned,
            blocks=self.streams.blocks,
            recorded=in_this_autocast(record, device),
            again=in_this_autocast(partial(record, request, self.changed), device),
            answer=in_this_autocast(answered, device),
        )

    def check(self, output: Tensor) -> None:
        """Did the blocks run, one after another, and does the output come from them?"""
        name = name_of(self.request.model)
        if not self.stream:
            raise ValueError(f"{name} ran none of its blocks on this input; name those that run, blocks=[...]")
        first = get_gradient_edge(self.stream[0]).node
        reached = set() if output.grad_fn is None else dependents([output.grad_fn], first)
        if first not in reached:
            raise ValueError(
                f"what is explained doesn't depend on the blocks of {name}: is it detached, of another tower, made by "
                "layers without a gradient, as some quantised ones are, or checkpointed with use_reentrant=True?"
            )
        apart = [
            i for i, h in enumerate(self.stream) if not h.requires_grad or get_gradient_edge(h).node not in reached
        ]
        if apart:
            raise ValueError(
                f"block {apart[0]} of {name} doesn't work on what the block before it made: there are several towers. "
                f"Name the blocks of one, blocks=[...]; {candidates(self.request.model)}"
            )


def is_own_memory(h: Tensor, model: nn.Module) -> bool:
    """Whether a tensor can be written to: neither a weight nor one number in several places."""
    if any(stride == 0 and size > 1 for stride, size in zip(h.stride(), h.shape, strict=True)):
        return False
    held = (tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    return h.untyped_storage().data_ptr() not in set(held)


def as_if_made_here(h: Tensor) -> None:
    """A view that was made without a graph, before the first block, may be written to like one that has been made with
    a graph: autograd forbids it since it can't know which of the two is meant."""
    if h._is_view():
        if not hasattr(torch._C._functions.CopySlices, "_wrapped_node"):  # type: ignore[attr-defined]
            raise ValueError(
                "the tokens that enter the first block are a view of memory that is used elsewhere, too, and "
                f"PyTorch {torch.__version__} hides what is written to a view: explain libra_grad(output, inputs) from "
                "the inputs on, or install PyTorch 2.14"
            )
        autograd = torch._C._autograd
        autograd._set_creation_meta(h, autograd.CreationMeta.DEFAULT)


def layout_at(request: Request, inputs: Inputs, blocks: tuple[nn.Module, ...], tokens: Tensor) -> Layout:
    """The layout of the first tokens. Where a user named blocks that come late in the stream, behind which patches have
    mixed, it is that of the stream's first block, if its tokens are as many."""
    if request.blocks is not None:
        with contextlib.suppress(ValueError):
            earlier = find_streams(request.model, inputs).blocks
            if set(blocks) <= set(earlier):
                first = first_tokens(request.model, inputs, earlier)
                if first.shape == tokens.shape:
                    return layout_of(request.model, inputs, earlier, first)
    return layout_of(request.model, inputs, blocks, tokens)
