"""Heatmaps show what they are given: the sign as colour, the strength as opacity, at the right place."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from libragrad_minimal.plots import NEGATIVE, POSITIVE, heatmaps

PICTURE = Image.fromarray(np.full((80, 80, 3), 100, np.uint8))


def shown_map(scores) -> np.ndarray:
    """The pixels of the map's panel, as handed to matplotlib."""
    return np.asarray(heatmaps([PICTURE], {"map": scores[None]}).axes[1].images[0].get_array())


def test_sign_is_colour_at_the_right_place():
    scores = torch.zeros(4, 4)
    scores[0, 3], scores[2, 1] = 2.0, -2.0
    pixels = shown_map(scores)
    assert np.abs(pixels[8, 72] - np.array(POSITIVE)).max() <= 9, "row 0, column 3: for, in (nearly) full colour"
    assert np.abs(pixels[50, 30] - np.array(NEGATIVE)).max() <= 9, "row 2, column 1: against"
    assert (pixels[72, 8] >= 188).all(), "far from both: the brightened grey picture, 150 + 0.4 * 100"


def test_half_the_score_is_half_the_opacity():
    scores = torch.ones(4, 4)
    scores[:, :2] = 0.5
    pixels = shown_map(scores).astype(float)
    expected = (np.array(POSITIVE) + 190) / 2
    assert np.abs(pixels[40, 4] - expected).max() <= 3


def test_scale_does_not_matter_and_zero_maps_are_grey():
    scores = torch.randn(5, 5)
    assert np.array_equal(shown_map(scores), shown_map(scores * 8))
    assert (shown_map(torch.zeros(5, 5)) == 190).all()


def test_rows_and_titles():
    figure = heatmaps([PICTURE] * 2, {"plain": torch.zeros(2, 3, 3), "Libra": torch.zeros(2, 3, 3)}, ["cat", "heart"])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["picture", "plain", "Libra"]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["cat", "heart"]
    file = io.BytesIO()
    figure.savefig(file)
    assert Image.open(file).size[0] > 100


def test_a_column_of_the_wrong_length_is_named():
    with pytest.raises(ValueError, match="column 'Libra' has 1 maps for 2 pictures"):
        heatmaps([PICTURE] * 2, {"Libra": torch.zeros(1, 3, 3)})
