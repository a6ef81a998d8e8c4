"""Characters that matplotlib's own font lacks are drawn by another that has them, or said to be boxes."""

import numpy as np
import pytest
from PIL import Image

from libragrad_minimal import fonts
from libragrad_minimal.plots import Strip, TokenStrips, heatmaps

ELSEWHERE = "STIXNonUnicode"  # a family that matplotlib ships, with characters that its own lacks


@pytest.fixture
def strange() -> str:
    """A character of that family alone."""
    others = fonts.characters(fonts.file_of(fonts.OWN)) | fonts.characters(fonts.file_of(fonts.OWN_MONO))
    return min(fonts.characters(fonts.file_of(ELSEWHERE)) - others)


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_a_family_that_has_the_character_is_found(strange):
    assert fonts.families_for("plain äß€ text\n") == [fonts.OWN]
    families = fonts.families_for(f"a {strange}")
    assert families[0] == fonts.OWN and strange in fonts.characters(fonts.file_of(families[1]))


def test_a_character_that_no_font_has_is_told_with_a_cure():
    nowhere = "\U000f1234"  # private use
    with pytest.warns(UserWarning, match=f"no font on this machine has {nowhere}.*install one"):
        assert fonts.families_for(f"a{nowhere}") == [fonts.OWN]


def test_a_font_that_was_installed_after_matplotlib_looked_is_found(monkeypatch, strange):
    fonts.system_fonts.cache_clear()
    file = fonts.file_of(ELSEWHERE)
    known = [entry for entry in fonts.fontManager.ttflist if entry.fname != file]
    monkeypatch.setattr(fonts.fontManager, "ttflist", known)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [file])
    assert fonts.families_for(strange)[1:] == [ELSEWHERE]
    fonts.system_fonts.cache_clear()


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_dollars_and_strange_characters_are_drawn_as_they_are_written(tmp_path, strange):
    picture = np.full((40, 40, 3), 200, np.uint8)
    title = f"$x_1$ costs $5 {strange}"
    figure = heatmaps([picture], {title: np.zeros((1, 4, 4))}, ["\\alpha $"], size=3)
    for name in ("a.png", "a.pdf", "a.svg"):
        figure.savefig(tmp_path / name)
    assert figure.axes[1].get_title() == title and not figure.axes[1].title.get_parse_math()
    TokenStrips(Strip(["$", f"x{strange}", "$"], [1, -1, 0], "$")).figure().savefig(tmp_path / "strip.png")


def test_a_title_of_several_lines_is_whole(tmp_path):
    picture = np.full((40, 40, 3), 200, np.uint8)
    figure = heatmaps([picture], {"a title of many words, which takes line after line after line": np.zeros((1, 4, 4))})
    figure.savefig(tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert (pixels[:2] == 255).all(), "nothing is cut at the upper edge"
    assert (pixels[:20] < 100).any()
