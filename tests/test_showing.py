"""What notebooks show: a figure with its description, in few colours; a table with the rest folded."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from libragrad_minimal import showing
from libragrad_minimal.showing import folded


@pytest.fixture
def shown(monkeypatch):
    """show, and what it handed to the notebook: (data, description)."""
    handed = []
    monkeypatch.setattr(showing, "display", lambda data, raw, metadata: handed.append((data, metadata)))

    def showing_it(picture, alt):
        showing.show(picture, alt)
        data, metadata = handed[-1]
        return Image.open(io.BytesIO(data["image/png"])), metadata["image/png"]["alt"]

    return showing_it


def test_a_figure_carries_its_description_and_is_closed(shown):
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    stored, alt = shown(figure, "a line that rises")
    assert alt == "a line that rises" and stored.width > 100
    assert not plt.fignum_exists(figure.number)


def test_a_picture_keeps_its_size_and_has_at_most_256_colours(shown):
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    stored = shown(Image.fromarray(noise), "noise")[0]
    assert stored.size == (30, 40) and stored.mode == "P"
    assert len(np.unique(np.asarray(stored.convert("RGB")).reshape(-1, 3), axis=0)) <= 256


def test_a_picture_of_few_colours_is_kept_as_it_is(shown):
    stripes = Image.fromarray(np.tile(np.array([[[200, 10, 0], [0, 90, 255]]], dtype=np.uint8), (4, 4, 1)))
    stored = shown(stripes, "stripes")[0].convert("RGB")
    assert np.array_equal(np.asarray(stored), np.asarray(stripes))


def test_the_first_rows_are_seen_and_the_rest_is_folded():
    table = pd.DataFrame({"score": range(15)})
    top, rest = folded(table, shown=10).data.split("<details>")
    assert top.count("<tr>") + top.count("<tr ") == 11 and rest.count("<tr>") + rest.count("<tr ") == 6
    assert "the other 5 rows" in rest
    assert "<details>" not in folded(table.iloc[:10]).data


def test_several_spaces_are_the_same_with_every_pandas():
    page = folded(pd.DataFrame({"a   b": ["c   d"]})).data
    assert "<th>a   b</th>" in page and "<td>c   d</td>" in page
