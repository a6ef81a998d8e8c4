"""The residual-aware rule: relevance at an addition shared by sign agreement (ResLRP, Berend et al. 2026).

An addition saves nothing for its backward pass, so its operands have to be caught while the model runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

OPERANDS = "libragrad residual operands"
ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}


class record_residuals(TorchFunctionMode):
    """Context for the forward pass: remembers, on the graph itself, what each addition added.

    with record_residuals():
        logit = model(images)[:, 281]
    libra_grad(logit, images, rules=replace(LIBRA, residual=True))
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        alpha = kwargs.get("alpha", 1)
        adds_two = function in ADDITIONS and len(args) == 2 and all(isinstance(a, Tensor) for a in args) and alpha == 1
        if not adds_two or args[0].shape != args[1].shape:
            return function(*args, **kwargs)
        in_place = function in (Tensor.add_, Tensor.__iadd__)
        operands = (args[0].detach().clone() if in_place else args[0].detach(), args[1].detach())
        result = function(*args, **kwargs)
        if result.grad_fn is not None:
            result.grad_fn.metadata[OPERANDS] = operands
        return result


def shared_by_sign(node, grad_inputs, grad_outputs):
    """c = a + b: a's share of the relevance is (1 + [a and c agree in sign]) a over the same for a and b together."""
    a, b = node.metadata[OPERANDS]
    c = a + b
    weight_a = 1 + (a.sign() == c.sign()).to(c.dtype)
    weight_b = 1 + (b.sign() == c.sign()).to(c.dtype)
    total = weight_a * a + weight_b * b
    per_weight = torch.where(total == 0, 1, c / torch.where(total == 0, 1, total)) * grad_outputs[0]
    shares = (weight_a * per_weight, weight_b * per_weight)
    return tuple(g if g is None else share.to(g.dtype) for g, share in zip(grad_inputs, shares, strict=True))
