"""Other people's libraries as references. Each test is skipped, and says so, where its library can't be imported."""

import pytest
import torch
from models import PICTURES, tiny_vit


@pytest.fixture(scope="session")
def vit():
    """A timm ViT of three blocks, 4 x 4 patches behind a class token, five classes."""
    torch.manual_seed(0)
    return tiny_vit()


@pytest.fixture
def tokens(vit):
    """(2, 17, 24) the tokens that enter the first block."""
    with torch.no_grad():
        return vit._pos_embed(vit.patch_embed(PICTURES)).requires_grad_()
