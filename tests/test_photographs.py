"""Collages of photographs: repeatable, and every cell holds its photograph."""

import numpy as np
import pytest

from libragrad_minimal.photographs import PHOTOGRAPHS, draw_collage, photograph


def test_collages_are_repeatable_and_cut_in_cells():
    collage = draw_collage(3, ["cat", "coffee"])
    assert np.array_equal(np.asarray(collage.image), np.asarray(draw_collage(3, ["cat", "coffee"]).image))
    assert collage.names == ("cat", "coffee")
    assert (collage.masks.sum(0) == 1).all(), "every pixel belongs to one photograph"
    assert collage.masks[0, :, :112].all() and collage.masks[1, :, 112:].all()
    assert len(set(draw_collage(4).names)) == 2


def test_collage_cells_hold_their_photographs():
    """The coffee is redder than the cameraman, who was photographed in black and white."""
    pixels = np.asarray(draw_collage(0, ["coffee", "cameraman"]).image).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]
    assert redness[:, :112].mean() > 50 and abs(redness[:, 112:]).max() <= 2


def test_photographs_have_names():
    assert all(photograph(name).mode == "RGB" for name in PHOTOGRAPHS)
    with pytest.raises(ValueError, match="unknown photograph 'dog'; there are cat"):
        photograph("dog")
