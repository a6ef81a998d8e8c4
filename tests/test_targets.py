"""What can be explained beside a logit: a probability, and how far a logit is ahead of others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import IDS, PICTURES, tiny_llama, tiny_vit

from libragrad_minimal import PLAIN, Against, Probability, attribute


def test_probability_has_its_own_gradient_under_every_rule_set():
    model = tiny_vit()
    h0 = model._pos_embed(model.patch_embed(PICTURES)).detach().requires_grad_()
    p = model.forward_head(model.norm(model.blocks(h0))).softmax(-1)
    (gradient,) = torch.autograd.grad(p[:, 3].sum(), h0)
    plain = attribute(model, PICTURES, Probability(3), "IxG", PLAIN)
    torch.testing.assert_close(plain.output, p[:, 3].detach())
    torch.testing.assert_close(plain.scores, (h0 * gradient).sum(-1)[:, 1:].detach(), rtol=1e-4, atol=1e-6)
    weights = p[:, 3:4] * (F.one_hot(torch.tensor(3), 5) - p)
    libra = attribute(model, PICTURES, Probability(3))
    torch.testing.assert_close(libra.scores, attribute(model, PICTURES, weights.detach()).scores, rtol=1e-4, atol=1e-6)
    assert (libra.completeness_error < 1e-5).all()


def test_against_the_strongest_others():
    model = tiny_vit()
    logits = model(PICTURES).detach()
    expected = torch.stack([z[3] - np.mean(sorted(z[[0, 1, 2, 4]].tolist())[-2:]) for z in logits])
    result = attribute(model, PICTURES, Against(torch.tensor([3, 3]), others=2))
    torch.testing.assert_close(result.output, expected.float())
    assert (result.completeness_error < 1e-5).all()
    with pytest.raises(ValueError, match=r"1\.\.4"):
        attribute(model, PICTURES, Against(3, others=5))
    # Against all: its derivative is the log-probability's, by PyTorch's own log_softmax.
    h0 = model._pos_embed(model.patch_embed(PICTURES)).detach().requires_grad_()
    log_probability = model.forward_head(model.norm(model.blocks(h0))).log_softmax(-1)[:, 3]
    (gradient,) = torch.autograd.grad(log_probability.sum(), h0)
    ahead = attribute(model, PICTURES, Against(3, others=None), "IxG", PLAIN)
    torch.testing.assert_close(ahead.scores, (h0 * gradient).sum(-1)[:, 1:].detach(), rtol=1e-4, atol=1e-6)
    assert (attribute(model, PICTURES, Against(3, others=None)).completeness_error < 1e-5).all()
    text = attribute(tiny_llama(), IDS, Against(7, others=3))
    assert (text.completeness_error < 1e-5).all()
