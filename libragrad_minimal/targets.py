"""What can be explained beside a logit: a class's probability, and how far its logit is ahead of others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probability:
    """The class's probability among all, softmax(logits)[class].

    Its gradient is that of the logits' combination with weights p_class ([k = class] - p_k), the softmax's own
    derivative, whatever the rules: balancing a softmax at the head would be wrong, as it gates no stream. (The deletion
    protocol of Mehri et al. 2025 explains this number.) What the combination's value misses of the probability is a
    constant, and counts as one that lies on no token.
    """

    target: int | Tensor  # a class, or (B,) one for each sample

    def of(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            raise ValueError(
                "among one class its probability is always 1: explain the logit itself, target=0 (that of a sigmoid "
                "rises with it)"
            )
        chosen = classes(self.target, logits)
        probabilities = logits.detach().softmax(-1)
        p = probabilities.gather(1, chosen)
        combined = (p * (one_hot(chosen, logits) - probabilities) * logits).sum(-1)
        return combined + (p[:, 0] - combined.detach())


@dataclass(frozen=True)
class Against:
    """The class's logit less the mean logit of the `others` strongest other classes: why this one and not those?

    others=None is against all classes, each as probable as the model finds it: the weights e_c - p, which are the
    derivative of the class's log-probability.
    """

    target: int | Tensor  # a class, or (B,) one for each sample
    others: int | None = 1

    def of(self, logits: Tensor) -> Tensor:
        chosen = classes(self.target, logits)
        if self.others is None:
            return ((one_hot(chosen, logits) - logits.detach().softmax(-1)) * logits).sum(-1)
        if type(self.others) is not int or not 1 <= self.others < logits.shape[1]:
            raise ValueError(
                f"there are {logits.shape[1]} classes: set against 1..{logits.shape[1] - 1} of them, "
                f"not {self.others!r}"
            )
        rivals = logits.detach().scatter(1, chosen, -torch.inf).topk(self.others, dim=1).indices
        return logits.gather(1, chosen)[:, 0] - logits.gather(1, rivals).mean(1)


def classes(target: int | Tensor, logits: Tensor) -> Tensor:
    """(B, 1) a class for each sample of logits (B, classes)."""
    samples, count = logits.shape
    numbers = torch.as_tensor(target, device=logits.device)
    if numbers.is_floating_point():
        raise ValueError(f"the class is no whole number: {target!r}")
    if numbers.dim() > 1 or numbers.dim() == 1 and len(numbers) != samples:
        raise ValueError(
            f"need one target class, or one for each of {samples} samples; got shape {tuple(numbers.shape)}"
        )
    if not 0 <= numbers.min() <= numbers.max() < count:
        raise ValueError(f"target classes must lie in 0..{count - 1}, got {numbers.tolist()}")
    return numbers.long().expand(samples)[:, None]


def one_hot(chosen: Tensor, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(1, chosen, 1)
