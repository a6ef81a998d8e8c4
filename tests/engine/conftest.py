"""What several tests of the engine ask about: a Transformer in double precision, and what goes in."""

import pytest
import torch
from models import Transformer


@pytest.fixture
def model():
    return Transformer().double().eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
