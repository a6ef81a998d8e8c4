"""What one forward pass of an untouched model leaves behind for attribution methods to read.

Three public means of PyTorch suffice: forward hooks on the blocks catch the tokens between them, a `TorchFunctionMode`
notes every constant that is added to the stream, and the autograd graph between two blocks holds the attention map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .engine import LIBRA, Rules, libra_grad, record_residuals
from .engine.nodes import operation_name
from .engine.observed import ADDITIONS

BLOCK_LISTS = ("blocks", "layers", "layer", "h", "resblocks")  # timm; Llama, BERT, GPT-2 in transformers; open_clip


# ---- where the blocks are --------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of a model of timm, transformers or open_clip, in forward order.

    Raises ValueError where there is no list of blocks under one of the usual names.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder: its tokens don't form one stream of blocks")
    tower = getattr(model, "visual", getattr(model, "vision_model", model))
    lists = {
        name: module
        for name, module in tower.named_modules()
        if name.rpartition(".")[2] in BLOCK_LISTS and isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    }
    # hierarchical models: `layers` is a list of stages, each of which holds its `blocks`
    stages = [
        name
        for name in lists
        if all(any(f"{name}.{i}.{b}" in lists for b in BLOCK_LISTS) for i in range(len(lists[name])))
    ]
    innermost = {name: module for name, module in lists.items() if name not in stages}
    outermost = [
        module for name, module in innermost.items() if not any(name.startswith(f"{other}.") for other in innermost)
    ]
    if not outermost:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks called {', '.join(BLOCK_LISTS)}, so no tokens. "
            "libra_grad(output, inputs) works on any model, with inputs of your choice."
        )
    return [block for module in outermost for block in module]


# ---- constants -------------------------------------------------------------------------------------------------------


class Constant(NamedTuple):
    """A bias-like constant: `value`, shaped to broadcast, was added to the result of `node`.

    layer: the number of the block that was running, or had run last; L after the last block.
    """

    value: Tensor
    node: Node
    layer: int
    channels: int = -1  # the dimension of the result that `value` runs along
    tokens_first: bool = False  # the result is (N, B, C), as inside nn.MultiheadAttention


# function -> name and position of the argument it adds, and the dimension of the result which that runs along
BIASES = {
    F.linear: ("bias", 2, -1),
    F.layer_norm: ("bias", 3, -1),
    F.group_norm: ("bias", 3, 1),
    F.batch_norm: ("bias", 4, 1),
    torch.conv1d: ("bias", 2, 1),
    torch.conv2d: ("bias", 2, 1),
    torch.conv3d: ("bias", 2, 1),
    torch.addmm: ("input", 0, -1),  # GPT-2's Conv1D
}


class record_additions(TorchFunctionMode):
    """Context for the forward pass: calls constant(value, result, ...) for every bias and parameter that is added, and
    addition(a, b, result) for every sum of two tensors."""

    def __init__(self, constant: Callable[..., None], addition: Callable[[Tensor, Tensor, Tensor], None]):
        super().__init__()
        self.constant, self.addition = constant, addition

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in BIASES:
            name, position, dimension = BIASES[function]
            bias = args[position] if len(args) > position else kwargs.get(name)
            if bias is not None:
                if dimension == 1:
                    bias = bias.reshape(-1, *[1] * (result.dim() - 2))  # one number a channel
                self.constant(bias, result, dimension)
        elif function in ADDITIONS and len(args) == 2 and all(isinstance(operand, Tensor) for operand in args):
            first, second = args
            self.addition(first, second, result)
            for operand in args:
                if isinstance(operand, nn.Parameter):
                    self.constant(operand, result)
        elif function is F.multi_head_attention_forward and args[6] is not None:
            self.constant(attention_bias(*args), result[0], tokens_first=True)
        return result


def attention_bias(*args) -> Tensor:
    """What nn.MultiheadAttention adds to its output: rows of a map sum to 1, so the values' bias passes it whole.

    Biases of queries and keys act inside the softmax; under LIBRA they carry no gradient, and they are not counted.
    """
    in_bias, out_weight, out_bias = args[6], args[11], args[12]  # all of the arguments come by position
    return out_weight @ in_bias.chunk(3)[2] + out_bias


# ---- attention maps --------------------------------------------------------------------------------------------------

RESHAPES = {
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Expand",
    "Clone",
    "ToCopy",
    "Alias",
    "Unsqueeze",
    "Squeeze",
    "NativeDropout",
}


class AttentionMap(NamedTuple):
    """Where one attention map sits in the graph: the softmax, and the product that applies it to the values."""

    softmax: Any  # a node; what it saved is no part of Node's type
    product: Node
    factor: int  # which operand of the product it is


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
    """Gradients of the output, aligned with a recording's tokens, constants and attention maps."""

    tokens: list[Tensor]
    constants: list[Tensor]
    attention: list[Tensor]  # (B, H, N, N) each; empty if the model has none that can be read


@dataclass
class Recording:
    """One forward pass. B samples, N tokens (class token and all), L blocks."""

    output: Tensor  # (B,) what is explained
    tokens: list[Tensor]  # L + 1 of (B, N, C), entering each block and leaving the last; (B, rows, columns, C) in Swin
    after_attention: list[Tensor | None]  # L of (B, N, C), the stream between attention and MLP, where there is one
    constants: list[Constant]
    valid: Tensor  # (B, N) False at padding
    is_text: bool
    rules: Rules
    rerun: Callable[..., Recording]  # rerun(start=...), rerun(finish=...): as in `record`
    path_gradients: dict[int, Gradients] = field(default_factory=dict)  # steps -> mean along the path of IG

    @cached_property
    def attention_maps(self) -> list[AttentionMap]:
        """Where each block's attention map sits. Raises ValueError where there isn't one in every block."""
        stop = {h.grad_fn for h in self.tokens if h.grad_fn is not None}
        ends = [after.grad_fn for after in self.tokens[1:]]
        found = [find_attention(end, stop - {end}) if end is not None else [] for end in ends]
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

    def per_head(self, maps: Tensor) -> Tensor:
        samples, tokens = self.valid.shape
        if maps.shape[-2:] != (tokens, tokens) or maps.numel() % (samples * tokens**2):
            raise ValueError(
                f"attention maps of shape {tuple(maps.shape)} don't tie {tokens} tokens to each other (windows, "
                "pooled tokens); use a method without, such as FullGrad+ or IxG"
            )
        return maps.reshape(samples, -1, tokens, tokens).float()

    @cached_property
    def gradients(self) -> Gradients:
        """Gradients of the output under the rules, all from one backward pass."""
        try:
            maps = self.attention_maps if self.attention else []
        except ValueError:  # a method that needs them asks for them, and hears why there are none
            maps = []
        with caught_gradients(self.constants, maps) as (constants, attention):
            tokens = libra_grad(self.output.sum(), self.tokens, self.rules, retain_graph=True)
        return Gradients(
            [gradient.float() for gradient in tokens],
            [constants.get(i, torch.zeros((), device=self.output.device)) for i in range(len(self.constants))],
            [self.per_head(attention[i]) for i in range(len(maps))],
        )

    def attention_gradient(self, output: Tensor, layer: int) -> Tensor:
        """Gradient (B, H, N, N) of output (B,) with respect to one block's attention map."""
        with caught_gradients([], [self.attention_maps[layer]]) as (_, attention):
            libra_grad(output.sum(), [self.tokens[layer]], self.rules, retain_graph=True)
        return self.per_head(attention[0])

    @cached_property
    def readout(self) -> Tensor:
        """Which tokens the output is read from, as weights (B, N): the class token, the last token, or all alike."""
        (gradient,) = torch.autograd.grad(self.output.sum(), self.tokens[-1], retain_graph=True)
        used = (gradient != 0).any(-1).flatten(1)
        one_each = bool((used.sum(1) == 1).all()) and used.shape == self.valid.shape
        weights = (used if one_each else self.valid).float()
        return weights / weights.sum(1, keepdim=True)


@contextlib.contextmanager
def caught_gradients(constants: list[Constant], maps: list[AttentionMap]):
    """Inside, a backward pass notes what arrives at each constant and at each attention map, by their numbers.

    A map's gradient is taken at the product that uses it, before any rule cuts it off there.
    """
    at_constants: dict[int, Tensor] = {}
    at_maps: dict[int, Tensor] = {}

    def catch_constant(i: int):
        def hook(grad_outputs):
            if grad_outputs[0] is not None:
                at_constants[i] = grad_outputs[0].float()

        return constants[i].node.register_prehook(hook)

    def catch_map(i: int):
        def hook(grad_inputs, grad_outputs):
            at_maps[i] = grad_inputs[maps[i].factor]

        return maps[i].product.register_hook(hook)

    handles = [*map(catch_constant, range(len(constants))), *map(catch_map, range(len(maps)))]
    try:
        yield at_constants, at_maps
    finally:
        for handle in handles:
            handle.remove()


def record(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    target: Any,
    rules: Rules = LIBRA,
    start: Callable[[Tensor], Tensor] | None = None,
    finish: Tensor | None = None,
) -> Recording:
    """Run the model once and note what the attribution methods need; arguments as in `attribute`.

    start   replaces the tokens that enter the first block by start(tokens)
    finish  replaces the tokens that leave the last block, graph and all
    """
    blocks = find_blocks(model)
    tokens: list[Tensor] = []
    entered: list[Tensor] = []
    after_attention: list[Tensor | None] = []
    constants: list[Constant] = []

    def enter(block, args, kwargs):
        name = None if args else next((n for n in ("hidden_states", "x") if n in kwargs), None)
        if not args and name is None:
            raise ValueError(
                f"{type(block).__name__} is given no tokens as hidden_states or x, but {', '.join(kwargs)}"
            )
        h = args[0] if args else kwargs[name]
        if not tokens:  # everything before the first block is the input: h_0 begins the graph
            h = (start(h.detach()) if start else h.detach()).requires_grad_()
        tokens.append(h)
        entered.append(h.clone())  # a block may add to its input in place
        after_attention.append(None)
        return ((entered[-1], *args[1:]), kwargs) if args else (args, {**kwargs, name: entered[-1]})

    def leave(block, args, kwargs, result):
        is_tuple = isinstance(result, tuple)
        tokens.append(result[0] if is_tuple else result)
        if finish is not None:
            return (finish, *result[1:]) if is_tuple else finish

    def note_constant(value, result, *how, **kind):
        if tokens and result.grad_fn is not None:
            constants.append(Constant(value.detach(), result.grad_fn, len(tokens) - 1, *how, **kind))

    def note_addition(a, b, result):
        if after_attention and after_attention[-1] is None and (a is entered[-1] or b is entered[-1]):
            after_attention[-1] = result

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(leave, with_kwargs=True))
    try:
        # the math kernel is the one whose softmax shows in the graph
        with (
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            record_residuals(),
            record_additions(note_constant, note_addition),
        ):
            answer, mask = run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    check_tokens(model, tokens, len(blocks), len(answer))
    for layer, middle in enumerate(after_attention):  # attention and MLP side by side: one sum, which ends the block
        if middle is not None and middle.grad_fn is tokens[layer + 1].grad_fn:
            after_attention[layer] = None

    is_text = picture_size(inputs) is None
    samples, length = tokens[0].shape[0], tokens[0][0, ..., 0].numel()
    valid = torch.ones(samples, length, dtype=torch.bool, device=answer.device)
    if is_text and mask is not None:
        valid = mask.bool()
    return Recording(
        output=explained(answer, target, valid),
        tokens=tokens,
        after_attention=after_attention,
        constants=constants,
        valid=valid,
        is_text=is_text,
        rules=rules,
        rerun=partial(record, model, inputs, target, rules),
    )


def run(model: Any, inputs: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The model's answer, (B, classes) or (B, N, classes) or image features (B, D), and the attention mask."""
    if hasattr(model, "encode_image"):  # open_clip
        return model.encode_image(inputs, normalize=True), None
    if isinstance(inputs, Mapping):
        answer = model(**inputs, **({"use_cache": False} if is_decoder(model) else {}))
    else:
        answer = model(inputs, **({"use_cache": False} if is_decoder(model) else {}))
    for name in ("logits", "logits_per_image"):
        answer = getattr(answer, name, answer)
    if not isinstance(answer, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns {type(answer).__name__} without logits: wrap it so that it returns them"
        )
    return answer, inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


def is_decoder(model: nn.Module) -> bool:
    return getattr(model, "can_generate", bool)()


def picture_size(inputs: Tensor | Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Height and width in pixels, None for text."""
    pixels = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        return None
    height, width = pixels.shape[-2:]
    return height, width


def explained(answer: Tensor, target: Any, valid: Tensor) -> Tensor:
    """The numbers to explain, (B,), from a model's answer (B, classes), or (B, N, classes) at the last token."""
    if answer.dim() == 3:
        last = valid.shape[1] - 1 - valid.flip(1).int().argmax(1)
        answer = answer[torch.arange(len(answer), device=answer.device), last]
    if callable(target):
        output = target(answer)
        if output.shape != answer.shape[:1]:
            raise ValueError(
                f"target(answer) must be one number per sample ({len(answer)},), got {tuple(output.shape)}"
            )
        return output
    target = torch.as_tensor(target, device=answer.device)
    if target.is_floating_point():
        if target.shape[-1:] != answer.shape[-1:]:
            raise ValueError(
                f"a target of weights must end in {answer.shape[-1]} numbers, got shape {tuple(target.shape)}"
            )
        return (answer * target).sum(-1)
    if target.dim() > 1 or target.dim() == 1 and len(target) != len(answer):
        raise ValueError(
            f"need one target class, or one for each of {len(answer)} samples; got shape {tuple(target.shape)}"
        )
    if not 0 <= target.min() <= target.max() < answer.shape[1]:
        raise ValueError(f"target classes must lie in 0..{answer.shape[1] - 1}, got {target.tolist()}")
    return answer.gather(1, target.expand(len(answer))[:, None])[:, 0]


def check_tokens(model: nn.Module, tokens: list[Tensor], blocks: int, samples: int) -> None:
    name = type(model).__name__
    if len(tokens) != blocks + 1:
        raise ValueError(f"{name} ran its {blocks} blocks {len(tokens) - 1} times: it isn't one stream of blocks")
    for layer, h in enumerate(tokens):
        if h.dim() not in (3, 4) or h.shape[0] != samples:
            raise ValueError(
                f"block {layer} of {name} works on {tuple(h.shape)}; need (B, N, C) or (B, rows, columns, C)"
            )
