"""Which parts of a block write to the stream, attention and MLP: the graph of one forward pass tells.

A block adds to the tokens that it is given. The additions on the way from its input to its output show what is added,
and which module made that. A part whose answer at one position depends on other positions is attention, or what stands
in its place; one that works on each position alone is an MLP. No name of a module is read.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_maps import find_attention
from .block_tokens import token_place, with_tokens
from .engine.nodes import Edge, edge_of, operation_name, result_shape
from .families import name_of, plain
from .layout import Axes
from .recording import Recording, Request, record
from .streams import below, dependents, find_streams, in_this_thread, removed, separators, stream_argument, topological

SITES = ("attention", "mlp", "residual", "heads", "neurons")


@dataclass(frozen=True)
class Place:
    """A tensor of every forward pass: what a module is given or returns, cut into `groups` along its channels."""

    module: nn.Module
    call: int = 0  # which of the module's runs, if blocks share it
    given: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Found:
    """One place a block, the blocks in the order in which they run, and how tokens lie in what is there."""

    places: tuple[Place, ...]
    blocks: tuple[nn.Module, ...]
    axes: Axes


_known: WeakKeyDictionary[nn.Module, dict[tuple, Found]] = WeakKeyDictionary()


def find_places(request: Request, sites: str) -> Found:
    """Where the values of `sites` are. Raises ValueError where they can't be found."""
    if sites not in SITES:
        raise ValueError(f"sites are one of {', '.join(SITES)}, got {sites!r}")
    known = _known.setdefault(plain(request.model), {})
    key = (sites, *request.inputs.tensors)  # not their length: parts are the same modules for any
    if key not in known:
        known[key] = searched_places(request, sites)
    return known[key]


def searched_places(request: Request, sites: str) -> Found:
    # the math kernel is the one whose softmax shows in the graph
    kernel = sdpa_kernel(SDPBackend.MATH) if sites == "heads" else contextlib.nullcontext()
    find_streams(request.model, request.inputs, request.blocks)  # may run the model; what is listened to is one run
    with listening(request.model) as calls, kernel:
        run = record(request, copies=True)
    check_positions(run)
    ran = [one for one in calls if one.module in run.blocks]
    if sites == "residual":
        places = [Place(one.module, one.call, given=True) for one in ran]
    else:
        places = [FOUND_BY[sites](Block(run, layer, calls)) for layer in range(len(ran))]
    return Found(tuple(places), tuple(one.module for one in ran), run.axes[0])


def check_positions(run: Recording) -> None:
    name, axes = name_of(run.request.model), run.axes
    if len(axes[0].tokens) > 1 or len({one.sizes(h) for one, h in zip(axes, run.stream, strict=True)}) > 1:
        raise ValueError(
            f"the blocks of {name} don't all work on the same row of tokens, so there are no (layers, positions) to "
            "patch; this needs a model without windows, grids in space and stages"
        )
    if run.tokens[0].shape[1] < 2:
        raise ValueError("there is one position only, at which attention can't be told from an MLP: give more tokens")


# ---- what ran --------------------------------------------------------------------------------------------------------


class Called(NamedTuple):
    """One run of a module: what it was given, if that depends on the stream, and what it returned."""

    module: nn.Module
    call: int
    given: Tensor | None
    returned: Tensor


@contextlib.contextmanager
def listening(model: nn.Module) -> Iterator[list[Called]]:
    """Inside, every run of every module is noted, in the order in which they end."""
    calls: list[Called] = []
    numbers: Counter[nn.Module] = Counter()

    def note(module, args, kwargs, result):
        place, returned = given_place(args, kwargs), returned_tensor(result)
        number = numbers[module]
        numbers[module] += 1
        if returned is None or not returned.requires_grad:
            return None
        given = None if place is None else args[place] if isinstance(place, int) else kwargs[place]
        calls.append(Called(module, number, given if given is not None and given.requires_grad else None, returned))
        # a copy goes on: a tensor that the model changes in place would belong to another node afterwards
        return with_returned(result, returned.clone())

    with removed(module.register_forward_hook(in_this_thread(note), with_kwargs=True) for module in model.modules()):
        yield calls


def given_place(args: tuple, kwargs: dict[str, Any]) -> int | str | None:
    """Which argument a module works on: a block's stream, else its first floating-point tensor."""
    floats = (i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point())
    place = stream_argument(args, kwargs)
    return next(floats, None) if place is None else place


def returned_tensor(result: Any) -> Tensor | None:
    if isinstance(result, Tensor):
        return result
    place = token_place(result) if type(result) in (tuple, list) else None
    return None if place is None else result[place]


def with_returned(result: Any, tensor: Tensor) -> Any:
    return tensor if isinstance(result, Tensor) else with_tokens(result, tensor)


# ---- what writes to the stream ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What one module adds to the stream."""

    output: Called
    entry: Node  # where it leaves the stream: all that it works on passes through here
    mixes: bool  # does its answer at one position depend on others?


class Block:
    """The graph between what enters one block and what leaves it."""

    def __init__(self, run: Recording, layer: int, calls: Sequence[Called]):
        self.name = f"block {layer} of {name_of(run.request.model)}"
        self.length = run.tokens[0].shape[1]
        self.start = edge_of(run.stream[layer])[0]
        self.end = edge_of(run.left[layer])[0]
        between = separators([self.end], self.start)
        order = topological([self.end], stop=below(self.start))
        self.trunk = [node for node in order if node in between]  # from the input to the output
        self.inside = dependents([self.end], self.start)
        self.calls = [one for one in calls if edge_of(one.returned)[0] in self.inside]
        self.outputs = {edge_of(one.returned): one for one in self.calls if self.is_row(one.returned)}

    def is_row(self, tensor: Tensor) -> bool:
        """Are these the channels of each position, in the order of the text?"""
        return tuple(tensor.shape[:-1]) in ((1, self.length), (self.length, 1), (self.length,))

    def uses(self) -> list[tuple[Called, Tensor]]:
        """The modules' runs with what they were given, where that is a row of positions."""
        return [(one, one.given) for one in self.calls if one.given is not None and self.is_row(one.given)]

    def part(self, mixes: bool) -> Part:
        """The attention, or the MLP: the one part that mixes positions, or the one that doesn't."""
        found = [part for part in self.parts() if part.mixes == mixes]
        if len(found) != 1:
            what = "whose answer at one position depends on others" if mixes else "that works on each position alone"
            raise ValueError(
                f"{self.name} has {len(found)} parts {what}, and {'attention' if mixes else 'an MLP'} is exactly one; "
                'sites="residual" needs none'
            )
        return found[0]

    def parts(self) -> list[Part]:
        additions = [node for node in self.trunk if operation_name(node) == "Add"]
        outputs = [one for node in additions for one in self.added(node)]
        return [self.described(one) for one in outputs]

    def added(self, addition: Node) -> Iterator[Called]:
        """The modules whose results are added to the stream here, if need be scaled or reshaped before."""
        waiting: list[Edge] = self.operands(addition)
        while waiting:
            edge = waiting.pop()
            node = edge[0]
            if node in self.trunk:
                continue
            if edge in self.outputs:
                yield self.outputs[edge]
                continue
            operands = self.operands(node)
            if len(operands) > 1 and operation_name(node) != "Add":
                raise ValueError(
                    f"{self.name} adds something to its tokens that no module of its own returns "
                    f"({operation_name(node)} of several tensors), so there is no module to patch; "
                    'sites="residual" needs none'
                )
            waiting.extend(operands)

    def operands(self, node: Node) -> list[Edge]:
        return [(child, number) for child, number in node.next_functions if child in self.inside]

    def described(self, output: Called) -> Part:
        passed = separators([edge_of(output.returned)[0]], self.start)
        entry = [node for node in self.trunk if node in passed][-1]
        last = output.returned.reshape(self.length, -1)[-1]
        weights = torch.arange(1, last.numel() + 1).to(last).cos()  # uneven: a norm at the end has no use for even ones
        (gradient,) = torch.autograd.grad(last, GradientEdge(entry, 0), weights, retain_graph=True)
        return Part(output, entry, bool(gradient.reshape(self.length, -1)[:-1].any()))


# ---- places ----------------------------------------------------------------------------------------------------------


def attention(block: Block) -> Place:
    output = block.part(mixes=True).output
    return Place(output.module, output.call)


def mlp(block: Block) -> Place:
    output = block.part(mixes=False).output
    return Place(output.module, output.call)


def heads(block: Block) -> Place:
    """What the first module behind the attention's product is given: the heads' results side by side."""
    part = block.part(mixes=True)
    end = edge_of(part.output.returned)[0]
    maps = find_attention(end, set(block.trunk))
    if len(maps) != 1:
        raise ValueError(
            f'{block.name} has {len(maps)} attention maps, not one, so no heads; sites="attention" has none'
        )
    product, number = maps[0].product, result_shape(maps[0].product)[0]  # of one sample
    behind = dependents([end], product)
    users = [(one, given) for one, given in block.uses() if edge_of(given)[0] in behind]
    if users and users[0][1].shape[-1] % number == 0 and lie_side_by_side(users[0][1], number, product, block.length):
        first = users[0][0]
        return Place(first.module, first.call, given=True, groups=number)
    raise ValueError(
        f"{block.name} hands the results of its {number} heads to no module side by side, so they can't be told apart "
        'there; sites="attention" patches all of them together'
    )


def lie_side_by_side(given: Tensor, number: int, product: Node, length: int) -> bool:
    """Does the first slice of the channels depend on the first head alone?"""
    first = given.reshape(length, number, -1)[:, 0]
    weights = torch.arange(1, first.shape[-1] + 1).to(first).cos().expand_as(first)
    (gradient,) = torch.autograd.grad(first, GradientEdge(product, 0), weights, retain_graph=True)
    return bool(gradient[0].any()) and not bool(gradient[1:].any())


def neurons(block: Block) -> Place:
    """What the MLP's last matrix is given, if that comes from another matrix."""
    part = block.part(mixes=False)
    end = edge_of(part.output.returned)[0]
    passed = separators([end], part.entry)
    matrices = [(one, given) for one, given in block.uses() if holds_matrix(one.module)]
    made = {edge_of(one.returned)[0] for one, _ in matrices}
    last = [(one, given) for one, given in matrices if edge_of(one.returned)[0] in passed]
    if last and made & dependents([edge_of(last[-1][1])[0]], part.entry):
        one, given = last[-1]
        return Place(one.module, one.call, given=True, groups=given.shape[-1])
    raise ValueError(
        f"the MLP of {block.name} has no last matrix that all of it passes through on the way from another one (a "
        'mixture of experts?), so no neurons; sites="mlp" patches its result'
    )


def holds_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


FOUND_BY: dict[str, Callable[[Block], Place]] = dict(attention=attention, mlp=mlp, heads=heads, neurons=neurons)


# ---- at work ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def visiting(places: Mapping[int, Place], visit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Inside, each place's tensor is handed to visit(layer, tensor) and gives way to what that returns."""
    with removed(hook_at(place, layer, visit) for layer, place in places.items()):
        yield


def hook_at(place: Place, layer: int, visit: Callable[[int, Tensor], Tensor]) -> Any:
    calls = count()

    def enter(module, args, kwargs):
        if next(calls) != place.call:
            return None
        where = given_place(args, kwargs)
        if isinstance(where, int):
            return (*args[:where], visit(layer, args[where]), *args[where + 1 :]), kwargs
        return args, {**kwargs, where: visit(layer, kwargs[where])}

    def leave(module, args, result):
        if next(calls) != place.call:
            return None
        returned = returned_tensor(result)
        assert returned is not None  # as it did when the place was found
        return with_returned(result, visit(layer, returned))

    if place.given:
        return place.module.register_forward_pre_hook(in_this_thread(enter), with_kwargs=True)
    return place.module.register_forward_hook(in_this_thread(leave))
