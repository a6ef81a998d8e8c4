"""Which modules are the blocks: those that the whole answer passes through, one after another.

A name doesn't tell a Transformer's blocks from a head, a stem or a second tower that is called `layers` as well. The
graph of one forward pass does: a tensor between two blocks is a *separator*, without which nothing that the model was
given reaches the answer. Blocks are the members of a list whose inputs are separators, one after the other.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .families import (
    STREAM_ARGUMENTS,
    Inputs,
    accepts,
    call,
    embedding_of,
    generates,
    name_of,
    plain,
    searched,
)

Argument = int | str  # of a block: a position or a name


@dataclass(frozen=True)
class Streams:
    """The blocks that the explained tokens pass through, and those of a second stream, a decoder that attends to it."""

    blocks: tuple[nn.Module, ...]
    second: tuple[nn.Module, ...] = ()
    of_picture: bool = False  # is it the pixels alone that come in through them, though there is a text as well?
    beside: tuple[str, ...] = ()  # arguments of the model that reach its answer through the blocks and past them, too
    anew: tuple[str, ...] = ()  # arguments that reach later blocks past the first, too
    reused: bool = False  # is the tensor that enters the first block used elsewhere, too?


def told(arguments: tuple[str, ...]) -> str:
    return " and ".join(name or "the input" for name in arguments)


_found: WeakKeyDictionary[nn.Module, dict[tuple, Streams]] = WeakKeyDictionary()


def find_streams(model: nn.Module, inputs: Inputs, blocks: Iterable[str | nn.Module] | str | None = None) -> Streams:
    """The blocks named by the user, else those that the model's only list holds, else those that its graph shows.

    Raises ValueError where there are none, where it isn't clear which are meant (candidates are listed), or where a
    part of the answer leads past them, unless the user named them.
    """
    named = None if blocks is None else named_blocks(model, blocks)
    lists = lists_of_blocks(searched(model, inputs)) if named is None else {"blocks": list(named)}
    if not lists:
        raise ValueError(
            f"{name_of(model)} has no list of blocks, so no tokens between them: name the modules that work on tokens, "
            "blocks=[...]; libra_grad(output, inputs) works on any model, with inputs of your choice"
        )
    blocks_in_lists = tuple(id(block) for several in lists.values() for block in several)
    key = (tuple(inputs.tensors), inputs.choices(), blocks_in_lists)
    known = _found.setdefault(plain(model), {})
    if key not in known:
        known[key] = streams_in_graph(model, inputs, lists)
    found = known[key]
    if found.beside and named is None:
        raise ValueError(
            f"a part of what {name_of(model)} answers leads past its blocks: {told(found.beside)} reaches the "
            "answer by another way, too, so tokens between the blocks explain the rest alone. Explain "
            "libra_grad(output, inputs) from the inputs on; or name the blocks, blocks=[...], and what leads past them "
            f"counts as a constant; {candidates(model)}"
        )
    return found


def named_blocks(model: nn.Module, blocks: Iterable[str | nn.Module] | str) -> tuple[nn.Module, ...]:
    """Modules for names: of single modules, or of one list of them."""
    modules = dict(plain(model).named_modules())
    if not isinstance(blocks, str | nn.Module | Iterable):
        raise ValueError(f"blocks must hold modules or their names, got a {type(blocks).__name__}; {candidates(model)}")
    named = [blocks] if isinstance(blocks, str | nn.Module) else list(blocks)
    found: list[nn.Module] = []
    for block in named:
        if isinstance(block, str) and block not in modules:
            raise ValueError(
                f"blocks names {block!r}, and {name_of(model)} has no module of that name; {candidates(model)}"
            )
        module = modules[block] if isinstance(block, str) else block
        if not isinstance(module, nn.Module):
            raise ValueError(f"blocks must hold modules or their names, got a {type(module).__name__}")
        found.extend(module if isinstance(module, nn.ModuleList | nn.Sequential) else [module])
    if not found:
        raise ValueError(f"blocks is empty; {candidates(model)}")
    return tuple(found)


def lists_of_blocks(root: nn.Module) -> dict[str, list[nn.Module]]:
    """Every list of modules that aren't single layers. Lists whose names differ in numbers (stages) are one."""
    lists: dict[str, list[nn.Module]] = {}
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            members = [member for member in module if not is_single_layer(member)]
            if members:
                lists.setdefault(re.sub(r"\d+", "#", name), []).extend(members)
    return lists


def is_single_layer(module: nn.Module) -> bool:
    """A list counts by its own members; a module without parts is one layer, unless it holds several matrices."""
    if type(module) in (nn.ModuleList, nn.Sequential, nn.ModuleDict):
        return True
    return not list(module.children()) and sum(p.dim() > 1 for p in module.parameters()) < 2


def candidates(model: nn.Module) -> str:
    lists = lists_of_blocks(plain(model))
    told = (
        f"{name or '(the model itself)'} ({len(blocks)} {type(blocks[0]).__name__})" for name, blocks in lists.items()
    )
    return f"its lists of modules are {', '.join(told) or 'none'}"


# ---- what a block is given -------------------------------------------------------------------------------------------


def is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 3


def stream_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> Argument | None:
    """Which argument holds the tokens: the first tensor by position, else the one with a usual name, else the first."""
    by_name = [name for name in STREAM_ARGUMENTS if name in kwargs] + list(kwargs)
    places: list[tuple[Argument, Any]] = [*enumerate(args), *((name, kwargs[name]) for name in by_name)]
    return next((place for place, value in places if is_stream(value)), None)


# ---- the graph's word ------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One run of a block in the looking-round pass."""

    name: str  # of its list
    block: nn.Module
    entered: Node | None = None  # what it was given; None if it doesn't depend on the inputs
    source: Node | None = None  # the same tensor, what else uses it included
    shape: tuple[int, ...] = ()
    left: Node | None = None  # the tokens that it returned
    exits: list[Node] = field(default_factory=list)  # all that it returned


Roots = dict[Node, str]  # what the model is given, ids once they are embedded -> the name of the argument


def streams_in_graph(model: nn.Module, inputs: Inputs, lists: dict[str, list[nn.Module]]) -> Streams:
    """The streams, out of these lists, that the graph of one forward pass shows."""
    answer, roots, calls = look_round(model, inputs, lists)
    ran = {call.name for call in calls}  # of a text alone, the tower for pictures doesn't
    if len(lists) == 1 or len(ran) == 1:
        found = Streams(tuple(lists[ran.pop()] if ran else next(iter(lists.values()))))
    else:
        found = told_apart(model, inputs, lists, answer, roots, calls)
    return with_ways_past(found, answer, roots, calls)


def told_apart(
    model: nn.Module, inputs: Inputs, lists: dict[str, list[nn.Module]], answer: Any, roots: Roots, calls: list[Call]
) -> Streams:
    """Which of several lists are blocks."""
    ends = [tensor.grad_fn for tensor in tensors_in(answer) if tensor.grad_fn is not None]
    served = {root: lists_between(ends, root, calls) for root in roots}
    served = {root: names for root, names in served.items() if names}
    if not served:
        served = {root: names for root in roots if (names := lists_with_residuals_outside(ends, root, calls))}
    if not served:
        raise ValueError(
            f"the answer of {name_of(model)} passes through no list of blocks as a whole (towers side by side, or "
            f"tokens in several tensors): name the blocks, blocks=...; {candidates(model)}"
        )
    votes = Counter(name for names in served.values() for name in names)
    first = largest({name for name, count in votes.items() if count == max(votes.values())}, lists)
    chosen = [first]
    left = [names for names in served.values() if first not in names]
    if left:
        chosen.append(largest(set.intersection(*left) or set.union(*left), lists))
    chosen.sort(key=[call.name for call in calls].index)
    ran = {call.block for call in calls}
    streams = [tuple(block for block in lists[name] if block in ran) for name in chosen]
    through = {roots[root] for root, names in served.items() if chosen[0] in names}
    of_picture = inputs.words is not None and any(inputs.tensors[name].is_floating_point() for name in through)
    of_picture = of_picture and not any(inputs.tensors[name] is inputs.words for name in through)
    return Streams(streams[0], streams[1] if len(streams) > 1 else (), of_picture)


def look_round(model: nn.Module, inputs: Inputs, lists: dict[str, list[nn.Module]]) -> tuple[Any, Roots, list[Call]]:
    """One forward pass whose graph begins at everything the model is given: floating-point tensors and embedded ids.

    Only which node leads to which is asked, so nothing is saved for a backward pass, and one row of logits is enough.
    """
    roots: Roots = {}
    calls: list[Call] = []
    running: list[Call] = []

    def root(tensor: Tensor, name: str) -> Tensor:
        leaf = tensor.detach().requires_grad_()
        roots[get_gradient_edge(leaf).node] = name
        return leaf.clone()  # the model may change it in place

    for name, tensor in inputs.tensors.items():
        if tensor.is_floating_point() and tensor.dim() > 1 and "mask" not in name:
            inputs = inputs.replaced(name, root(tensor, name))
    ids = {tuple(tensor.shape): name for name, tensor in inputs.tensors.items() if not tensor.is_floating_point()}
    ids |= {tuple(inputs.words.shape): name for name, tensor in inputs.tensors.items() if tensor is inputs.words}

    def embed(module, args, result):
        if args and isinstance(args[0], Tensor) and tuple(args[0].shape) in ids and not counts(args[0], inputs.words):
            return root(result, ids[tuple(args[0].shape)])

    def enter(name):
        def hook(block, args, kwargs):
            place = stream_argument(args, kwargs)
            one = Call(name, block)
            calls.append(one)
            running.append(one)
            tensor = None if place is None else args[place] if isinstance(place, int) else kwargs[place]
            if tensor is None or not tensor.requires_grad:
                return None
            given = tensor.clone()  # what else the tensor is used for leads past the block
            one.entered, one.source, one.shape = given.grad_fn, tensor.grad_fn, tuple(given.shape)
            if isinstance(place, int):
                return (*args[:place], given, *args[place + 1 :]), kwargs
            return args, {**kwargs, place: given}

        return hook

    def leave(block, args, result):
        one = running.pop()
        several = list(filter(is_stream, result if isinstance(result, tuple | list) else [result]))
        tensor = next((part for part in several if tuple(part.shape) == one.shape), several[0] if several else None)
        one.left = None if tensor is None else tensor.grad_fn
        one.exits = [part.grad_fn for part in tensors_in(result) if part.grad_fn is not None]

    def hooks() -> Iterator[Any]:
        embeddings = (module for module in plain(model).modules() if isinstance(module, nn.Embedding))
        yield from (module.register_forward_hook(in_this_thread(embed)) for module in embeddings)
        for name, block in ((name, block) for name, blocks in lists.items() for block in blocks):
            yield block.register_forward_pre_hook(in_this_thread(enter(name)), with_kwargs=True)
            yield block.register_forward_hook(in_this_thread(leave))

    embedded = EmbeddedWords(inputs, root)
    unsaved = saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
    with removed(hooks()), torch.enable_grad(), unsaved, embedded:
        answer = call(model, inputs, one_row(model, inputs))
    return answer, roots, calls


class EmbeddedWords(TorchFunctionMode):
    """Makes roots of what is computed of token ids, by whatever function: an embedding, an index, a cast of ones."""

    def __init__(self, inputs: Inputs, root: Callable[[Tensor, str], Tensor]):
        super().__init__()
        texts = (inputs.words, inputs.answered)
        words = {name: t for name, t in inputs.tensors.items() if any(t is one for one in texts)}
        self.made_of = {id(t): (name, t) for name, t in words.items() if not t.is_floating_point()}
        self.root = root

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = tensors_in([*args, *(kwargs or {}).values()])
        name = next((self.made_of[id(t)][0] for t in given if id(t) in self.made_of), None)
        if name is None or not isinstance(result, Tensor) or result.dtype == torch.bool:  # which words are padding, say
            return result
        if not result.is_floating_point():
            self.made_of[id(result)] = (name, result)
            return result
        made_of_states = any(t.is_floating_point() and not t.is_leaf for t in given)  # rows chosen by numbers
        return result if made_of_states else self.root(result, name)


def counts(ids: Tensor, words: Tensor | None) -> bool:
    """Whether these are positions or segments of a text, not its words."""
    if words is None or ids.shape[-1] < 3 or ids.shape == words.shape and torch.equal(ids, words.to(ids)):
        return False
    return bool((ids.diff(dim=-1).abs() <= 1).all())


def one_row(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """The first position, where a model computes logits of chosen ones alone: which way they go, all tell."""
    chosen = generates(model) and accepts(model, "logits_to_keep") and "labels" not in inputs.tensors
    return torch.zeros(1, dtype=torch.long) if chosen else None


def with_ways_past(found: Streams, answer: Any, roots: Roots, calls: list[Call]) -> Streams:
    """The streams, and which arguments come to the answer through these blocks, but past some or all of them, too.

    What goes on from the very tensor that enters the first block is no way past: the graph can begin at it.
    """
    if not isinstance(answer, Tensor):  # of many parts; a function picks, and those that are usually picked are asked
        parts, vector = tensors_in(answer), embedding_of(answer)
        usual = getattr(answer, "last_hidden_state", None) if vector is None else vector
        answer = parts[0] if usual is None and len(parts) == 1 else usual
    calls = [one for one in calls if one.block in {*found.blocks, *found.second}]
    if answer is None or answer.grad_fn is None or not calls:
        return found
    second = next((one for one in calls if one.block not in found.blocks), None)
    entrances = {one.entered for one in (calls[0], second) if one is not None and one.entered is not None}
    first = calls[0].source
    reused = used_elsewhere(answer.grad_fn, calls[0])
    begins = {*entrances, first} if first is not None and reused else entrances
    between = {one.source for one in calls if one.source is not None} - {first}
    through = names_below([one.entered for one in calls if one.entered is not None], set(), roots)
    beside = through & names_below(
        [answer.grad_fn], begins | between | {node for one in calls for node in one.exits}, roots
    )
    anew = through & names_below([answer.grad_fn], begins, roots) if calls[0].entered is not None else set()
    return replace(found, beside=tuple(sorted(beside)), anew=tuple(sorted(anew - beside)), reused=reused)


def used_elsewhere(end: Node, first: Call) -> bool:
    """Whether the answer takes the very tensor that enters the first block by another way, too."""
    if first.entered is None or first.source is None or len(first.source._input_metadata) > 1:  # one part of a split
        return False
    return first.source in topological([end], stop={first.entered})


def names_below(ends: Iterable[Node], stop: set[Node], roots: Roots) -> set[str]:
    """The arguments that reach `ends` by a way that leads past `stop`."""
    return {roots[root] for root in set(topological(ends, stop=stop)) & set(roots)}


def in_this_thread(hook: Callable) -> Callable:
    """The hook for the runs of the thread that sets it: others may be running the same model."""
    thread = threading.get_ident()

    def own_runs(*args):
        return hook(*args) if threading.get_ident() == thread else None

    return own_runs


@contextmanager
def removed(hooks: Iterable[Any]) -> Iterator[None]:
    """Inside, these hooks are on; a generator registers them here, so that an interrupt leaves none of them behind."""
    registered: list[Any] = []
    try:
        registered.extend(hooks)
        yield
    finally:
        take_off(registered)


def take_off(hooks: list[Any]) -> None:
    try:
        while hooks:
            hooks[-1].remove()
            hooks.pop()
    except KeyboardInterrupt:  # between two of them
        take_off(hooks)
        raise


def tensors_in(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer]
    several = answer.values() if hasattr(answer, "values") else answer if isinstance(answer, list | tuple) else ()
    return [tensor for part in several for tensor in tensors_in(part)]


def lists_between(ends: list[Node], root: Node, calls: list[Call]) -> set[str]:
    """The lists whose every run was given a separator of `root` and the answer. If there are none, those of which that
    holds for the first run alone. Every later run works on what the first one made of it."""
    between = separators(ends, root)
    by_list: dict[str, list[Call]] = {}
    for one in calls:
        by_list.setdefault(one.name, []).append(one)
    passed, whole = {}, set()
    for name, several in by_list.items():
        entered = [one.entered for one in several]
        if entered[0] in between and several[0].left is not None:
            behind = dependents(ends, several[0].left)
            if all(node in behind for node in entered[1:]):
                passed[name] = several
                if all(node in between for node in entered):
                    whole.add(name)
    blocks = innermost(passed)
    return blocks & whole or blocks


def lists_with_residuals_outside(ends: list[Node], root: Node, calls: list[Call]) -> set[str]:
    """XLM adds outside of its modules to what goes in: then the tensors that the blocks are given are separators, their
    use beside the blocks included. Of several lists that take turns, the one that is the first to run."""
    between = separators(ends, root)
    for name in dict.fromkeys(one.name for one in calls):
        first, *later = [one for one in calls if one.name == name]
        if not later or first.left is None or first.source not in between:
            continue
        behind = between & dependents(ends, first.left)
        if all(one.source in behind for one in later):
            return {name}
    return set()


def innermost(passed: dict[str, list[Call]]) -> set[str]:
    """Of lists within lists the inner one, where it is part of every member of the outer: the blocks of a pyramid's
    stages. Members of the outer that all work on tensors of one shape are blocks themselves, the inner their parts."""
    for outer in list(passed):
        for inner in list(passed):
            if outer in passed and inner in passed and is_within(passed[inner], passed[outer]):
                members = passed[outer]
                alike = len(members) > 1 and len({one.shape for one in members}) == 1
                covered = all(any(one.block in set(b.block.modules()) for one in passed[inner]) for b in members)
                del passed[outer if covered and not alike else inner]
    return set(passed)


def is_within(inner: list[Call], outer: list[Call]) -> bool:
    members = {module for one in outer for module in one.block.modules() if module is not one.block}
    return any(one.block in members for one in inner)


def largest(names: set[str], lists: dict[str, list[nn.Module]]) -> str:
    """The list with the most parameters: a Transformer's blocks, not the layers of a stem or a neck."""
    return max(sorted(names), key=lambda name: sum(p.numel() for block in lists[name] for p in block.parameters()))


def separators(ends: Sequence[Node], root: Node) -> set[Node]:
    """The nodes that every path from `ends` to `root` passes through, `root` among them; empty if there is no path.

    In topological order such a node is alone when its turn comes: no edge leads past it.
    """
    order = topological(ends, stop=below(root))
    reaches = dependents(ends, root)
    found: set[Node] = set()
    waiting = {end for end in ends if end in reaches}
    for node in reversed(order):
        if node not in reaches:
            continue
        if waiting <= {node}:
            found.add(node)
        waiting.discard(node)
        waiting.update(child for child, _ in node.next_functions if child in reaches)
    return found


def dependents(ends: Sequence[Node], root: Node) -> set[Node]:
    """The nodes below `ends` that `root` is below of, itself among them."""
    found: set[Node] = set()
    for node in topological(ends, stop=below(root)):
        if node is root or any(child in found for child, _ in node.next_functions):
            found.add(node)
    return found


def below(root: Node) -> list[Node]:
    return [child for child, _ in root.next_functions if child is not None]


def topological(ends: Iterable[Node], stop: Iterable[Node] = ()) -> list[Node]:
    """Every node below `ends` and above `stop`, each after all that it passes gradient on to."""
    order: list[Node] = []
    entered: set[Node] = set(stop)
    stack = [(end, False) for end in ends]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None)
    return order
