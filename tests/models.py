"""Small models with random weights that several tests share."""

import torch
from torch import Tensor, nn

from libragrad_minimal import libra_grad

TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=200)
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
del VISION["vocab_size"]
IDS = torch.randint(5, 190, (2, 9), generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def perturbed(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Norms and biases that aren't the neutral ones of a fresh model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pixel_relevance(logit_of, pictures: Tensor, patch: int) -> Tensor:
    """(B, rows, columns): balanced input x gradient of every pixel, summed over patches."""
    pixels = pictures.clone().requires_grad_()
    (gradient,) = libra_grad(logit_of(pixels), pixels)
    return patch**2 * nn.functional.avg_pool2d((gradient * pixels).sum(1), patch).detach()


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
