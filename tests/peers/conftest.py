"""Other people's libraries as references. Each test is skipped, and says so, where its library can't be imported."""

import pytest
import timm
import torch
from models import perturbed


@pytest.fixture(scope="session")
def vit():
    """A timm ViT of three blocks, 4 x 4 patches behind a class token, five classes."""
    torch.manual_seed(0)
    config = dict(img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=3, num_classes=5)
    return perturbed(timm.models.VisionTransformer(**config))


@pytest.fixture
def tokens(vit):
    """(2, 17, 24) the tokens that enter the first block."""
    from models import PICTURES

    with torch.no_grad():
        return vit._pos_embed(vit.patch_embed(PICTURES)).requires_grad_()
