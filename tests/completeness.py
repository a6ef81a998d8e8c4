"""Does it add up? Inputs and constants, each times its balanced gradient, beside the output."""

import torch
from torch import Tensor

from libragrad_minimal import LIBRA, Rules, additive_constants, libra_grad


def total_of(output: Tensor, *inputs: Tensor, rules: Rules = LIBRA) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum, in double precision, and what it is taken over: the inputs and all constants that are added to them."""
    parts = (*inputs, *additive_constants(output, inputs))
    gradients = libra_grad(output, parts, rules, retain_graph=True)
    return sum((part * gradient).double().sum() for part, gradient in zip(parts, gradients, strict=True)), parts


def relative_error(output: Tensor, x: Tensor, rules: Rules = LIBRA) -> float:
    """How far the sum is from the output, relative to the magnitude of the output's entries."""
    total, _ = total_of(output, x, rules=rules)
    return abs(total - output.double().sum()).item() / output.double().abs().sum().item()


def assert_complete(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The sum is the output; returns the constants."""
    total, parts = total_of(output, *inputs)
    torch.testing.assert_close(total.to(output.dtype), output.sum())
    return parts[len(inputs) :]
