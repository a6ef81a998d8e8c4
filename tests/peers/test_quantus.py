"""Quantus (Hedström et al. 2023): pixel flipping, pointing game, relevance mass."""

import numpy as np
import pytest
import torch
from models import PICTURES

from libragrad_minimal import metrics

quantus = pytest.importorskip("quantus", reason="pip install quantus", exc_type=ImportError)
QUIET = dict(disable_warnings=True, display_progressbar=False)


@pytest.fixture
def maps():
    scores, masks = torch.randn(3, 4, 4), torch.zeros(3, 32, 32, dtype=torch.bool)
    for i in range(3):
        masks[i, 3 * i : 8 * i + 9, 4 : 20 + 4 * i] = True
    return scores, masks


def test_pixel_flipping(vit):
    """Pixels of one patch share a score; it flips one channel of them after another, so every third step is a patch."""
    scores = torch.randn(2, 4, 4)
    target = torch.tensor([3, 1])
    flipping = quantus.PixelFlipping(features_in_step=64, perturb_baseline=0.0, normalise=False, **QUIET)
    pixels = scores.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    expected = flipping(
        vit, PICTURES.numpy(), target.numpy(), a_batch=pixels.numpy(), device="cpu", softmax=False, channel_first=True
    )
    fractions = tuple(np.arange(1, 17) / 16)
    ours = metrics.deletion(vit, PICTURES, {"x": scores}, metrics.occlude_patches, target=target, fractions=fractions)[
        "x"
    ]
    np.testing.assert_allclose(ours.mif.logit[:, 1:], np.array(expected)[:, 2::3], rtol=1e-4, atol=1e-5)


def test_pointing_game(maps):
    scores, masks = maps
    fine = metrics.upsample(scores, (32, 32)).numpy()
    expected = quantus.PointingGame(**QUIET).evaluate_batch(a_batch=fine, s_batch=masks.numpy())
    np.testing.assert_array_equal(metrics.pointing_game(scores, masks), expected)


def test_relevance_mass(maps):
    """On maps as fine as the mask, positive parts only."""
    scores, masks = maps
    fine = scores.repeat_interleave(8, 1).repeat_interleave(8, 2)
    expected = quantus.RelevanceMassAccuracy(**QUIET).evaluate_batch(
        a_batch=fine.clamp(min=0).numpy(), s_batch=masks.numpy()
    )
    np.testing.assert_allclose(metrics.mass_inside(scores, masks), expected, rtol=1e-5)
