"""What is asked of the caller's tensors, of the forward pass and of the results; each refusal says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointError

from .nodes import Half, constant_factors, edge_of, is_custom, operation_name, result_shape, saved
from .plan import SHARED, Plan, make_plan
from .rules import Rules


def as_tuple(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    several = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    for tensor in several:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"expected tensors, got a {type(tensors).__name__} of {type(tensor).__name__}: take the tensor you "
                "mean out of it, for example output.logits[:, target]"
            )
    return several


def checked_options(outputs: Sequence[Tensor], options: dict[str, Any]) -> dict[str, Any]:
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
        if output.is_complex():
            raise ValueError(f"output {i} is complex: explain a real number, such as its real part or absolute value")
        if output.grad_fn is None:
            raise ValueError(
                f"output {i} has no graph: compute it from inputs that require grad, outside torch.no_grad() and "
                "torch.inference_mode(), without .detach()"
            )
        if output.is_meta:
            raise ValueError(f"output {i} is on the meta device, which holds no numbers: load the model's weights")
        bad = output.detach()[~torch.isfinite(output)]
        if len(bad):
            raise ValueError(
                f"output {i} is {bad[0].item()} in {len(bad)} of {output.numel()} places: the forward pass overflowed "
                "or divided by zero. Look at its inputs, or run the model in a wider dtype."
            )


def checked_plan(outputs: Sequence[Tensor], inputs: Sequence[Tensor], rules: Rules, allow_unused: bool = False) -> Plan:
    """The plan from `outputs` to `inputs`, once it is clear that they are connected and the model was in eval mode."""
    if not isinstance(rules, Rules):
        raise TypeError(f"rules must be LIBRA, PLAIN, another preset or Rules(...), got {rules!r}")
    for i, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            raise ValueError(
                f"input {i} of shape {tuple(tensor.shape)} does not require grad: call .requires_grad_() on it "
                "before the forward pass"
            )
    edges = [edge_of(tensor) for tensor in inputs]
    plan = make_plan([edge_of(output) for output in outputs], set(edges), rules)
    for i, (node, _) in enumerate(edges):
        if node not in plan.graph and not allow_unused:
            raise ValueError(
                f"input {i} of shape {tuple(inputs[i].shape)} is not in the graph of the output: pass the very tensor "
                "that the model was given (a copy made afterwards is another tensor), or allow_unused=True"
            )
    for node in plan.values:
        check_eval_mode(node)
    if rules.residual and SHARED not in plan.treatments.values():
        raise ValueError(
            "the residual rule needs the operands of every addition, and this graph has not recorded any: "
            "run the forward pass inside `with observed(residuals=True):`"
        )
    return plan


# ---- the forward pass: was the model in eval mode? -------------------------------------------------------------------


def check_eval_mode(node: Node) -> None:
    """Refuse a forward pass whose samples mix or whose units were dropped at random."""
    if is_custom(node):
        return
    name = operation_name(node)
    if name.endswith("BatchNorm") and saved(node, "training") and saved(node, "input").shape[0] > 1:
        raise ValueError(
            f"{name} in the graph of the output: batch norm in training mode mixes the samples. Call model.eval() "
            "before the forward pass."
        )
    if drops_at_random(node, name):
        raise ValueError(
            f"{name} in the graph of the output: it looks as if dropout was active, so that the output is random. "
            "Call model.eval() before the forward pass; a mask of your own that looks like one, clone()."
        )


def drops_at_random(node: Node, name: str) -> bool:
    if name == "NativeDropout" or getattr(node, "_saved_dropout_p", 0) > 0:
        return True
    if name == "RreluWithNoise":
        return saved(node, "training")
    shape = result_shape(node)
    return any(is_dropout_mask(factor, shape) for factor in constant_factors(node)) or is_dropped_path(node)


def is_dropout_mask(factor: Tensor, shape: Sequence[int]) -> bool:
    """Dropout on the CPU multiplies with a constant: empty memory, filled with a Bernoulli sample in place and scaled
    in place, of zeros and one other value, or a single value a sample where whole paths are dropped.

    A mask that somebody wrote down has seen no such two changes in place: that is what tells them apart.
    """
    if factor._version != 2 or not factor.is_floating_point() or isinstance(factor, nn.Parameter) or not factor.numel():
        return False
    shapes = [(*shape[:dim], *[1] * (len(shape) - dim)) for dim in range(len(shape) + 1)]  # samples, channels, all
    if tuple(factor.shape) not in shapes:
        return False
    largest = factor.max()
    two_valued = bool(((factor == 0) | (factor == largest)).all())
    return two_valued and largest.item() not in (0.0, 1.0) or two_valued and is_one_number_a_sample(factor)


def is_one_number_a_sample(factor: Tensor) -> bool:
    return factor.dim() > 1 and factor.numel() == factor.shape[0]


def is_dropped_path(node: Node) -> bool:
    """transformers' DropPath divides by the probability to keep, and multiplies each sample with 0 or 1."""
    masks = [factor for factor in constant_factors(node) if is_one_number_a_sample(factor)]
    if not any(bool(((mask == 0) | (mask == 1)).all()) for mask in masks):
        return False
    divisions = [child for child, _ in node.next_functions if child is not None and child.name() == "DivBackward0"]
    divisors = [saved(division, "other") for division in divisions if division.next_functions[1][0] is None]
    return any(divisor.dim() == 0 and 0 < divisor.item() < 1 for divisor in divisors)


# ---- errors and results ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise RuntimeError(
            "a checkpointed part of the model saved other tensors when it was run again, which happens outside of "
            "observed(): run the model without checkpointing inside observed()"
        ) from error
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                "the graph of this output has been freed by an earlier backward pass: pass retain_graph=True to that "
                "one, or run the model again"
            ) from error
        if "modified by an inplace operation" in str(error):
            raise RuntimeError(
                "the model changed in place what its own derivative needs, so that there is none, balanced or not: "
                "change a copy there (bitsandbytes' layers of 8 bits do it to float16: run them in bfloat16 or float32)"
            ) from error
        if "use_reentrant=True" in str(error):
            raise RuntimeError(
                "a part of the model is checkpointed in the reentrant way, which hides the graph: checkpoint it with "
                "use_reentrant=False"
            ) from error
        if "selective activation checkpoint" in str(error):
            raise RuntimeError(
                "selective checkpointing hands out what it kept only once, and PyTorch's own derivative has had it: "
                "run the model again, and checkpoint it without context_fn"
            ) from error
        raise


def checked_gradient(gradient: Tensor | None, tensor: Tensor, index: int, plan: Plan) -> Tensor | None:
    if gradient is None and isinstance(tensor, Half):
        return torch.zeros_like(tensor)
    if gradient is None:
        return torch.zeros_like(tensor) if edge_of(tensor)[0] in plan.graph else None  # reached through constants only
    numbers = gradient.coalesce().values() if gradient.is_sparse else gradient
    if not torch.isfinite(numbers).all():
        raise ValueError(
            f"the gradient of input {index} is not finite although the output is: the backward pass overflowed. Run "
            "the model in a wider dtype (float32 for float16)."
        )
    return gradient
