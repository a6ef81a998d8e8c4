"""Captum: gradients of the output at a ViT's tokens, and means of them."""

from functools import partial

import captum.attr
import torch
from models import PICTURES

from libragrad_minimal import PLAIN, Probability, attribute


def logit(vit, h0):
    return vit.forward_head(vit.norm(vit.blocks(h0)))[:, 3]


def probability(vit, h0):
    return vit.forward_head(vit.norm(vit.blocks(h0))).softmax(-1)[:, 3]


def test_input_times_gradient(vit, tokens):
    expected = captum.attr.InputXGradient(partial(logit, vit)).attribute(tokens).sum(-1)[:, 1:]
    torch.testing.assert_close(attribute(vit, PICTURES, 3, "IxG", PLAIN).scores, expected.detach())


def test_saliency(vit, tokens):
    expected = captum.attr.Saliency(partial(logit, vit)).attribute(tokens).amax(-1)[:, 1:]
    torch.testing.assert_close(attribute(vit, PICTURES, 3, "Saliency", PLAIN).scores, expected)


def test_integrated_gradients(vit, tokens):
    for function, target in ((logit, 3), (probability, Probability(3))):
        captums = captum.attr.IntegratedGradients(partial(function, vit))
        kwargs = dict(n_steps=50, method="riemann_middle", return_convergence_delta=True)
        expected, delta = captums.attribute(tokens, **kwargs)
        ours = attribute(vit, PICTURES, target, "IG")
        torch.testing.assert_close(ours.scores, expected.sum(-1)[:, 1:].float().detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.completeness_error, delta.abs().float().detach(), rtol=1e-4, atol=1e-5)


def test_smoothgrad(vit, tokens):
    h0 = tokens[:1].detach()
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(partial(logit, vit)))
    extent = (h0.max() - h0.min()).item()
    kwargs = dict(nt_type="smoothgrad", nt_samples=400, nt_samples_batch_size=400, stdevs=0.02 * extent, abs=False)
    expected = (h0 * tunnel.attribute(h0.requires_grad_(), **kwargs)).sum(-1)[:, 1:]
    ours = attribute(vit, PICTURES[:1], 3, "SmoothGrad", PLAIN, samples=400, noise=0.02).scores
    plain = attribute(vit, PICTURES[:1], 3, "IxG", PLAIN).scores
    # two Monte Carlo means of the same thing: far nearer to each other than to the gradient without noise
    assert (ours - expected).norm() < 0.25 * (ours - plain).norm()
