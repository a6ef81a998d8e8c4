"""libra_grad, balanced, audit: autograd with the repairs of a walk installed on its graph, and nothing left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .graph import Audit, Edge, Walk
from .rules import LIBRA, PLAIN, Backward, Rules


@dataclass(eq=False)
class Balancing:
    """One libra_grad call, or one `balanced` block."""

    is_call: bool


# Whose each running backward pass is, by autograd's own number for the pass. A hook acts in its owner's passes only:
# a plain backward pass, another thread or a nested call on the same graph passes it by.
_owners: dict[int, Balancing] = {}


@contextlib.contextmanager
def installed(walk: Walk, entrances: Sequence[Node], balancing: Balancing) -> Iterator[None]:
    """The walk's hooks on its graph, for backward passes that come in through `entrances`; removed in any case."""
    passes: list[int] = []
    handles = []

    def enter(grad_outputs) -> None:
        number = torch._C._current_graph_task_id()
        if number not in _owners or not _owners[number].is_call:
            _owners[number] = balancing
            passes.append(number)

    def in_own_passes(node: Node, backward: Backward):
        def hook(grad_inputs, grad_outputs):
            mine = _owners.get(torch._C._current_graph_task_id()) is balancing
            if mine and any(gradient is not None for gradient in grad_outputs):
                if torch.is_grad_enabled():
                    raise ValueError(
                        "create_graph=True is not supported: balanced gradients have no graph of their own"
                    )
                return backward(node, grad_inputs, grad_outputs)

        return hook

    try:
        handles.extend(node.register_prehook(enter) for node in entrances)
        handles.extend(node.register_hook(in_own_passes(node, backward)) for node, backward in walk.hooks)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for number in passes:
            _owners.pop(number, None)


def libra_grad(
    output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor], rules: Rules = LIBRA, **autograd_grad_options
) -> tuple[Tensor, ...]:
    """Balanced gradients of `output` with respect to `inputs`: a drop-in for `torch.autograd.grad` (Mehri et al. 2025).

    The model is not touched: the repairs of `rules` are applied to the graph that its forward pass left behind.

    Args:
        output: the logit to explain, of shape () or (B,), one for each sample; samples must not mix in the model.
            Any other shape needs `grad_outputs`, as for torch.autograd.grad. Several outputs are summed.
        inputs: tensors of that forward pass which required grad: images, embeddings, the input of any layer.
        rules: LIBRA, PLAIN, ATTN_LRP, ALI_LRP, DECOMPX or your own `Rules`.
        **autograd_grad_options: grad_outputs, retain_graph, allow_unused, materialize_grads of torch.autograd.grad.
    Returns:
        One gradient for each input, of its shape. <input, gradient> summed over the input and its additive
        constants (biases, position embeddings) is the output.
    Raises:
        UnsupportedOperation: an operation without a rule; nothing was computed.
        ValueError: what was passed in can't be explained; the message says what, where and what to do.
    """
    outputs, inputs = as_tuple(output), as_tuple(inputs)
    options = checked_options(outputs, autograd_grad_options)
    check_outputs(outputs)
    allow_unused = options.pop("allow_unused", False) or options.get("materialize_grads", False)
    grad_outputs = options.pop("grad_outputs", None)
    with torch.enable_grad():  # an entrance of this call's own into the graph, so that its pass can be told from others
        roots = [o.sum() if grad_outputs is None else o.view_as(o) for o in outputs]
    with explained_errors():
        walk = balanced_walk(outputs, inputs, rules, allow_unused)
        with installed(walk, [root.grad_fn for root in roots], Balancing(is_call=True)):
            gradients = torch.autograd.grad(roots, inputs, grad_outputs, allow_unused=True, **options)
    return tuple(checked_gradient(g, x, i, walk) for i, (g, x) in enumerate(zip(gradients, inputs, strict=True)))


@contextlib.contextmanager
def balanced(
    output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor], rules: Rules = LIBRA
) -> Iterator[None]:
    """Inside this block, backward passes from `output`, or from anything computed from it, are balanced.

        with balanced(logits, images):
            cat, dog = (torch.autograd.grad(logits[:, c].sum(), images, retain_graph=True)[0] for c in (281, 207))

    output: any shape. inputs: the tensors that gradients are wanted for. `.backward()` works too. Raises as libra_grad.
    """
    outputs = as_tuple(output)
    check_outputs(outputs)
    with explained_errors():
        walk = balanced_walk(outputs, as_tuple(inputs), rules, allow_unused=False)
        with installed(walk, [o.grad_fn for o in outputs], Balancing(is_call=False)):
            yield


def audit(output: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor], rules: Rules = LIBRA) -> Audit:
    """Which operations lie between `inputs` and `output`, and how each would be treated. Computes no gradient.

    Operations without a rule are listed as unsupported instead of being refused. Raises ValueError as libra_grad does.
    """
    outputs = as_tuple(output)
    check_outputs(outputs)
    with explained_errors():
        return walk_graph(outputs, as_tuple(inputs), rules, allow_unused=False).audit()


# ---- what goes in and comes out --------------------------------------------------------------------------------------


def as_tuple(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    several = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    for tensor in several:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected tensors, got a {type(tensors).__name__} of {type(tensor).__name__}: take the tensor you "
                "mean out of it, for example output.logits[:, target]"
            )
    return several


def checked_options(outputs: Sequence[Tensor], options: dict) -> dict:
    """The options for torch.autograd.grad, without those that mean nothing for balanced gradients."""
    for name in ("create_graph", "is_grads_batched"):
        if options.pop(name, False):
            raise ValueError(
                f"{name}=True is not supported: balanced gradients are repaired node by node, outside of any graph"
            )
    for i, output in enumerate(outputs):
        if output.dim() > 1 and options.get("grad_outputs") is None:
            raise ValueError(
                f"output {i} has shape {tuple(output.shape)}, which is not one scalar per sample: choose a logit, "
                "for example logits[:, target], or pass grad_outputs"
            )
    return options


def check_outputs(outputs: Sequence[Tensor]) -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError("there are no gradients inside torch.inference_mode(): call from outside of it")
    for i, output in enumerate(outputs):
        if output.grad_fn is None:
            raise ValueError(
                f"output {i} has no graph: compute it from inputs that require grad, outside torch.no_grad() and "
                "torch.inference_mode(), without .detach()"
            )
        bad = output.detach()[~torch.isfinite(output)]
        if len(bad):
            raise ValueError(
                f"output {i} is {bad[0].item()} in {len(bad)} of {output.numel()} places: the forward pass overflowed "
                "or divided by zero. Look at its inputs, or run the model in a wider dtype."
            )


def edge_of(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def walk_graph(outputs: Sequence[Tensor], inputs: Sequence[Tensor], rules: Rules, allow_unused: bool) -> Walk:
    """The walk from `outputs` to `inputs`, once it is clear that they are connected."""
    if not isinstance(rules, Rules):
        raise TypeError(f"rules must be LIBRA, PLAIN, another preset or Rules(...), got {rules!r}")
    for i, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            raise ValueError(
                f"input {i} of shape {tuple(tensor.shape)} does not require grad: call .requires_grad_() on it "
                "before the forward pass"
            )
    edges = [edge_of(tensor) for tensor in inputs]
    walk = Walk([edge_of(output) for output in outputs], set(edges), rules)
    for i, (node, _) in enumerate(edges):
        if node not in walk.edges and not allow_unused:
            raise ValueError(
                f"input {i} of shape {tuple(inputs[i].shape)} is not in the graph of the output: pass the very tensor "
                "that the model was given (a copy made afterwards is another tensor), or allow_unused=True"
            )
    return walk


def balanced_walk(outputs: Sequence[Tensor], inputs: Sequence[Tensor], rules: Rules, allow_unused: bool) -> Walk:
    """A walk whose every operation has a rule. Plain rules are torch.autograd: they change and refuse nothing."""
    walk = walk_graph(outputs, inputs, rules, allow_unused)
    if rules == PLAIN:
        walk.hooks.clear()
    else:
        walk.raise_refusals()
    return walk


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "the graph of this output has been freed by an earlier backward pass: pass retain_graph=True to that one, "
            "or run the model again"
        ) from error


def checked_gradient(gradient: Tensor | None, tensor: Tensor, index: int, walk: Walk) -> Tensor | None:
    if gradient is None:
        return torch.zeros_like(tensor) if edge_of(tensor)[0] in walk.edges else None  # reached through constants only
    if not torch.isfinite(gradient).all():
        raise ValueError(
            f"the gradient of input {index} is not finite although the output is: the backward pass overflowed. Run "
            "the model in a wider dtype (float32 for float16)."
        )
    return gradient
