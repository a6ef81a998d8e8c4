"""What one forward pass of an untouched model leaves behind for attribution methods to read.

Forward hooks on the blocks catch the tokens between them, the engine's `observed()` every constant that is added, and
the autograd graph between two blocks holds the attention map. What a method doesn't read is not kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from .added_constants import Constant, ConstantShare, catch_shares, catch_tokens_first, constants_of, precise
from .engine import LIBRA, Rules, libra_grad, observed
from .engine.nodes import OPERANDS, noted, operation_name
from .families import Inputs, attention_heads, call, name_of
from .layout import Axes, Layout, coarsening, first_tokens, layer_axes, layout_of
from .readout import chosen_rows, explained, kept_rows
from .streams import (
    Streams,
    candidates,
    dependents,
    find_streams,
    is_stream,
    removed,
    separators,
    stream_argument,
    topological,
)

# What a method may ask a recording for, beside the first tokens and their gradient.
LAYERS = "layers"  # gradients at every block
CONSTANTS = "constants"  # what each added constant contributes
MAPS = "attention maps"  # needs memory quadratic in the number of tokens
MAP_GRADIENTS = "gradients of attention maps"
BETWEEN = "the stream between attention and MLP"
GRAPH = "the graph, after the first backward pass"


@dataclass(frozen=True)
class Request:
    """What is asked of a model: everything that decides how it is run and read."""

    model: nn.Module
    inputs: Inputs
    target: Any
    rules: Rules = LIBRA
    blocks: Any = None
    readout: Any = None
    reads: frozenset[str] = frozenset({LAYERS})


# ---- attention maps --------------------------------------------------------------------------------------------------

RESHAPES = "View UnsafeView ReshapeAlias Expand Clone ToCopy Alias Unsqueeze Squeeze NativeDropout".split()


class AttentionMap(NamedTuple):
    """Where one attention map sits in the graph: the softmax, and the product that applies it to the values."""

    softmax: Any  # a node; what it saved is no part of Node's type
    product: Any
    factor: int  # which operand of the product it is

    def gradient(self, arriving: Tensor) -> Tensor:
        """The map's gradient from the product's, whatever a rule makes of it there."""
        if self.factor == 0:
            return arriving @ self.product._saved_mat2.transpose(-1, -2)
        return self.product._saved_self.transpose(-1, -2) @ arriving


def find_attention(start: Node, stop: set[Node]) -> list[AttentionMap]:
    """The attention maps in the graph from `start` down to the nodes in `stop`."""
    consumers: dict[Node, tuple[Node, int]] = {}
    seen, stack, softmaxes = set(stop), [start], []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if operation_name(node) in ("Softmax", "SafeSoftmax"):
            softmaxes.append(node)
        for i, (child, _) in enumerate(node.next_functions):
            if child is not None:
                consumers[child] = (node, i)
                stack.append(child)
    maps = []
    for softmax in softmaxes:
        node, factor = consumers[softmax]
        while operation_name(node) in RESHAPES and node in consumers:
            node, factor = consumers[node]
        if operation_name(node) == "Bmm":
            maps.append(AttentionMap(softmax, node, factor))
    return maps


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
    rerun: Callable[..., Recording]  # rerun(start=...), rerun(apart=...): as in `record`
    again: Callable[[], Recording]  # the same once more
    path_gradients: dict[int, Gradients] = field(default_factory=dict)  # steps -> mean along the path of IG

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
                "the decorator @reads(...) of libragrad_minimal.attribution"
            )

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

    def per_head(self, maps: Tensor) -> Tensor:
        samples, tokens = self.valid.shape
        if maps.shape[-2:] != (tokens, tokens) or maps.numel() % (samples * tokens**2):
            raise ValueError(
                f"attention maps of shape {tuple(maps.shape)} don't tie {tokens} tokens to each other (windows, "
                "pooled tokens); use a method without, such as FullGrad+ or IxG"
            )
        return precise(maps.reshape(samples, -1, tokens, tokens))

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
            _ = self.reading  # needs the graph, too
        _ = self.prefixes
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
        return used.float() / used.sum(1, keepdim=True).clamp(min=1)


@contextlib.contextmanager
def caught_map_gradients(maps: list[AttentionMap]) -> Iterator[dict[int, Tensor]]:
    """Inside, a backward pass notes the gradient of each attention map, by its number, before any rule cuts it off."""
    found: dict[int, Tensor] = {}

    def catch(i: int, place: AttentionMap):
        def hook(arriving):
            if arriving[0] is not None:
                found[i] = place.gradient(arriving[0])

        return place.product.register_prehook(hook)

    with removed([catch(i, place) for i, place in enumerate(maps)]):
        yield found


# ---- the forward pass ------------------------------------------------------------------------------------------------


def record(
    request: Request,
    start: Callable[[Tensor], Tensor] | None = None,
    apart: int | None = None,
    copies: bool = False,
) -> Recording:
    """Run the model once and note what the attribution methods need.

    Args:
        request: what is run and explained.
        start: replaces the tokens that enter the first block, of either stream, by start(tokens).
        apart: the number of blocks, to start a graph of its own at each of them and to read each one's output, all at
            once: the recording's output is (blocks * B,), and no graph leads from one block to the one before.
        copies: hand each block a copy of its tokens, because one of them changes them in place.
    """
    if apart is not None:
        request = replace(request, reads=frozenset({LAYERS, MAPS, MAP_GRADIENTS}))
    model, inputs, reads = request.model, request.inputs, request.reads
    streams = find_streams(model, inputs, request.blocks)
    rows = chosen_rows(model, inputs, request.target, request.readout)
    kept, rows = kept_rows(model, inputs, rows)
    passed = Passed(request, streams, start, apart, copies)
    # the math kernel is the one whose softmax shows in the graph
    kernel = sdpa_kernel(SDPBackend.MATH) if MAPS in reads else contextlib.nullcontext()
    residuals = request.rules.residual or BETWEEN in reads
    eager = torch.compiler.set_stance("force_eager")
    with removed(passed.hooks()), torch.no_grad(), eager, kernel, unfused(model), observed(residuals=residuals):
        answer = call(model, inputs, kept)
        with torch.enable_grad():
            output = explained(model, answer, *repeated(request, rows, apart), inputs.samples * (apart or 1))
    if not copies and passed.changed_in_place():
        return record(request, start, apart, copies=True)
    return passed.finished(output)


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
    start: Callable[[Tensor], Tensor] | None
    apart: int | None
    copies: bool
    stream: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)

    def hooks(self) -> list[Any]:
        blocks = set(self.streams.blocks)
        others = set(self.streams.second) - blocks
        return [
            *(block.register_forward_pre_hook(self.enter, with_kwargs=True) for block in blocks),
            *(block.register_forward_hook(self.leave, with_kwargs=True) for block in blocks),
            *(block.register_forward_pre_hook(self.enter_second, with_kwargs=True) for block in others),
        ]

    def begin(self, h: Tensor) -> Tensor:
        """Everything before the first block is the input: the graph begins at its tokens."""
        torch.set_grad_enabled(True)
        return (self.start(h.detach()) if self.start else h.detach()).requires_grad_()

    def enter(self, block, args, kwargs):
        h = argument(block, args, kwargs)
        if not self.stream and MAPS in self.request.reads:
            check_memory(self.request.model, h, len(self.streams.blocks))
        begins = not self.stream or self.apart is not None
        self.stream.append(self.begin(h) if begins else h)
        given = self.stream[-1].clone() if begins or self.copies else h
        self.versions.append(self.stream[-1]._version)
        if BETWEEN in self.request.reads:
            self.entered.append(given)
        return with_argument(given, args, kwargs)

    def enter_second(self, block, args, kwargs):
        if not self.second:
            self.second.append(self.begin(argument(block, args, kwargs)))
            return with_argument(self.second[0].clone(), args, kwargs)

    def leave(self, block, args, kwargs, result):
        several = isinstance(result, tuple | list)
        parts = list(result) if several else [result]
        place = next((i for i, part in enumerate(parts) if is_stream(part)), None)
        if place is None:
            raise ValueError(f"{type(block).__name__} returns no tokens; name other blocks, blocks=[...]")
        self.left.append(parts[place])
        if self.apart is not None and len(self.left) == self.apart:
            parts[place] = torch.cat(self.left)
            return type(result)(parts) if several else parts[0]

    def changed_in_place(self) -> bool:
        return any(h._version != version for h, version in zip(self.stream, self.versions, strict=True))

    def finished(self, output: Tensor) -> Recording:
        request, inputs = self.request, self.request.inputs
        self.check(output)
        if self.streams.of_picture and inputs.words is not None:
            inputs = replace(inputs, about_picture=True)
        layout = layout_at(request, inputs, self.streams, self.stream[0])
        stream = [*self.stream, self.left[-1]]
        axes = [layer_axes(layout.axes, stream[0], h, layout.grid) for h in stream]
        samples, length = layout.axes.arrange(stream[0]).shape[:2]
        return Recording(
            request=request,
            output=output,
            stream=stream,
            second=self.second[0] if self.second else None,
            layout=layout,
            axes=axes,
            valid=valid_tokens(inputs.mask, layout, samples, length).to(output.device),
            is_text=inputs.picture is None or inputs.text is not None,
            left=self.left,
            entered=self.entered,
            rerun=partial(record, request),
            again=partial(record, request, self.start, self.apart),
        )

    def check(self, output: Tensor) -> None:
        """Did the blocks run, one after another, and does the output come from them?"""
        name = name_of(self.request.model)
        if not self.stream:
            raise ValueError(f"{name} ran none of its blocks on this input; name those that run, blocks=[...]")
        if output.grad_fn is None:
            raise ValueError(
                f"what is explained doesn't depend on the blocks of {name}: is it detached, or of another tower?"
            )
        if self.apart is not None:
            return
        reached = dependents([output.grad_fn], get_gradient_edge(self.stream[0]).node)
        apart = [
            i for i, h in enumerate(self.stream) if not h.requires_grad or get_gradient_edge(h).node not in reached
        ]
        if apart:
            raise ValueError(
                f"block {apart[0]} of {name} doesn't work on what the block before it made: there are several towers. "
                f"Name the blocks of one, blocks=[...]; {candidates(self.request.model)}"
            )


def layout_at(request: Request, inputs: Inputs, streams: Streams, tokens: Tensor) -> Layout:
    """The layout of the first tokens. Where a user named blocks that come late in the stream, behind which patches have
    mixed, it is that of the stream's first block, if its tokens are as many."""
    if request.blocks is not None:
        with contextlib.suppress(ValueError):
            earlier = find_streams(request.model, inputs).blocks
            if set(streams.blocks) <= set(earlier):
                first = first_tokens(request.model, inputs, earlier)
                if first.shape == tokens.shape:
                    return layout_of(request.model, inputs, earlier, first)
    return layout_of(request.model, inputs, streams.blocks, tokens)


def argument(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    place = stream_argument(args, kwargs)
    if place is None:
        raise ValueError(
            f"{type(block).__name__} is given no tokens, no floating-point tensor of three dimensions: name other "
            "blocks, blocks=[...]"
        )
    return args[place] if isinstance(place, int) else kwargs[place]


def with_argument(given: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    place = stream_argument(args, kwargs)
    if isinstance(place, int):
        return (*args[:place], given, *args[place + 1 :]), kwargs
    assert place is not None
    return args, {**kwargs, place: given}


def repeated(request: Request, rows: Tensor | None, apart: int | None) -> tuple[Any, Any, Tensor | None]:
    """Target, readout and rows for as many copies of the samples as there are blocks read apart."""
    target, readout, samples = request.target, request.readout, request.inputs.samples
    if apart is None:
        return target, readout, rows
    if isinstance(target, Tensor) and target.dim() == 1 + target.is_floating_point() and len(target) == samples:
        target = target.repeat(apart, *[1] * (target.dim() - 1))
    if isinstance(readout, Tensor) and readout.dim() and len(readout) == samples:
        readout = readout.repeat(apart, *[1] * (readout.dim() - 1))
    return target, readout, None if rows is None else rows.repeat(apart)


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


def check_memory(model: nn.Module, tokens: Tensor, blocks: int) -> None:
    """Methods that read attention maps keep one a block and head; better to say so than to be killed."""
    length = tokens.shape[1] if tokens.dim() == 3 else tokens.shape[1] * tokens.shape[2]
    needed = 2 * blocks * attention_heads(model) * tokens.shape[0] * length**2 * tokens.element_size()
    free = free_memory(tokens.device)
    if free is not None and needed > free:
        raise ValueError(
            f"a method that reads attention maps needs {needed / 1e9:.1f} GB for {blocks} blocks of {length} x "
            f"{length} tokens, and {free / 1e9:.1f} GB are free; use FullGrad+ or IxG, which need no maps"
        )


def free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
