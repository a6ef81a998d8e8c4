"""Characters that matplotlib's own font lacks are drawn by another that has them, or said to be boxes."""

import dataclasses
import warnings

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


def test_a_family_that_has_no_regular_weight_is_used(monkeypatch, strange):
    """Such as WenQuanYi Zen Hei, whose only weight is medium."""
    fonts.system_fonts.cache_clear()
    entry = next(entry for entry in fonts.fontManager.ttflist if entry.name == ELSEWHERE and entry.style == "normal")
    medium = [dataclasses.replace(entry, weight=weight) for weight in (700, 500)]
    monkeypatch.setattr(fonts.fontManager, "ttflist", medium)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    assert fonts.system_fonts() == [(ELSEWHERE, entry.fname)]
    fonts.system_fonts.cache_clear()


def test_of_a_family_the_weight_nearest_to_regular_is_used(monkeypatch):
    fonts.system_fonts.cache_clear()
    entry = fonts.fontManager.ttflist[0]
    made = [dataclasses.replace(entry, weight=w, fname=str(w), style="normal", name="A") for w in (700, 380, 200, 900)]
    monkeypatch.setattr(fonts.fontManager, "ttflist", made)
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [])
    assert fonts.system_fonts() == [("A", "380")]
    fonts.system_fonts.cache_clear()


@pytest.mark.parametrize(
    "character, package",
    [("\u6f22", "fonts-noto-cjk"), ("\u3055", "fonts-noto-cjk"), ("\ud55c", "fonts-noto-cjk")]
    + [("\u0939", "fonts-noto-core"), ("\U0001f642", "fonts-symbola")],
)
def test_the_package_is_named_that_has_the_character(character, package):
    """Which of Debian 12's packages have them was tried: each drew its characters in a title."""
    assert fonts.package(character) == package


@pytest.mark.parametrize("draw", ["heatmaps", "strip"])
def test_one_warning_names_all_that_cannot_be_drawn(draw):
    nowhere = ["\U000f1234", "\U000f1235"]  # private use
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if draw == "heatmaps":
            heatmaps([np.zeros((9, 9, 3), np.uint8)], {name: np.zeros((1, 3, 3)) for name in nowhere}, ["plain"])
        else:
            TokenStrips(Strip([nowhere[0]], [1.0], nowhere[1])).figure()
    (told,) = (str(one.message) for one in caught if "no font" in str(one.message))
    assert all(name in told for name in nowhere)


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
