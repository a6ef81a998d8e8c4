"""The metrics against scikit-learn, brute-force loops and cases worked out by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from libragrad_minimal import metrics


@pytest.fixture
def maps():
    torch.manual_seed(0)
    scores, masks = torch.randn(5, 8, 8), torch.zeros(5, 32, 32, dtype=torch.bool)
    for i in range(5):
        masks[i, 3 * i : 3 * i + 9, 20 - 4 * i : 30 - 3 * i] = True
    return scores, masks


def test_mean_and_error_by_hand():
    mean, error = metrics.mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert error == pytest.approx((14 / 3) ** 0.5 / 2)
    assert np.isnan(metrics.mean_and_error(torch.tensor([1.0]))[1])


def test_segmentation_ap_equals_scikit_learn(maps):
    scores, masks = maps
    fine = metrics.upsample(scores, (32, 32))
    expected = [
        average_precision_score(m.flatten().numpy(), s.flatten().numpy()) for s, m in zip(fine, masks, strict=True)
    ]
    np.testing.assert_allclose(metrics.segmentation_ap(scores, masks), expected, atol=1e-6)


def test_segmentation_ap_shares_a_threshold_among_equal_scores(maps):
    scores, masks = maps
    coarse = scores.repeat_interleave(4, 1).repeat_interleave(4, 2).round()  # already at full size: many exact ties
    expected = [
        average_precision_score(m.flatten(), s.flatten()) for s, m in zip(coarse.numpy(), masks.numpy(), strict=True)
    ]
    np.testing.assert_allclose(metrics.segmentation_ap(coarse, masks), expected, atol=1e-6)
    constant = metrics.segmentation_ap(torch.zeros(5, 8, 8), masks)
    np.testing.assert_allclose(constant, masks.flatten(1).float().mean(1), atol=1e-6)


def test_a_perfect_map_gets_full_marks():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 4:8, 8:12] = True
    scores = mask.float()
    assert metrics.segmentation_ap(scores, mask).item() == 1
    assert metrics.pointing_game(scores, mask).item() == 1
    assert metrics.mass_inside(scores, mask).item() == 1
    assert metrics.pointing_game(-scores, mask).item() == 0
    assert metrics.mass_inside(-scores, mask).item() == 0


def test_mass_inside_by_hand():
    scores = torch.tensor([[[3.0, 1.0], [-5.0, 4.0]]])
    mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]], dtype=torch.bool)
    assert metrics.mass_inside(scores, mask).item() == pytest.approx((3 + 4 / 2) / 8)


def test_grid_pointing_game_by_hand():
    scores = torch.tensor([[[1.0, 2.0], [3.0, -9.0]]]).repeat_interleave(3, 1).repeat_interleave(2, 2).repeat(4, 1, 1)
    share = metrics.grid_pointing_game(scores, torch.arange(4))
    torch.testing.assert_close(share, torch.tensor([1 / 6, 2 / 6, 3 / 6, 0]))
    three = metrics.grid_pointing_game(torch.ones(1, 4, 6), torch.tensor([2]), grid=(1, 3))
    torch.testing.assert_close(three, torch.tensor([1 / 3]))


@pytest.mark.parametrize("metric", [metrics.segmentation_ap, metrics.pointing_game, metrics.mass_inside])
def test_bad_maps_get_one_clear_error(metric, maps):
    scores, masks = maps
    with pytest.raises(ValueError, match="boolean"):
        metric(scores, masks.float())
    with pytest.raises(ValueError, match="sample 2 is empty"):
        metric(scores, masks & (torch.arange(5) != 2)[:, None, None])
    with pytest.raises(ValueError, match=r"\(B, h, w\)"):
        metric(scores.flatten(1), masks)
    with pytest.raises(ValueError, match="NaN"):
        metric(scores / 0 * 0, masks)


def test_grid_pointing_game_refuses_what_it_cannot_cut():
    with pytest.raises(ValueError, match="equal cells"):
        metrics.grid_pointing_game(torch.ones(1, 7, 8), torch.tensor([0]))
    with pytest.raises(ValueError, match="0..3"):
        metrics.grid_pointing_game(torch.ones(1, 8, 8), torch.tensor([4]))
