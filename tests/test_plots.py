"""Strips: what is escaped, muted, coloured, and what a browser makes of it. Heatmaps: sign, strength and place."""

import io
import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from libragrad_minimal.plots import NEGATIVE, POSITIVE, STRONGEST, Strip, TokenStrips, heatmaps, prompt_maps, visible

# ---- strips ----------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>document.title = 'it ran'</script>",
    "<img src=x onerror=\"document.title='it ran'\">",
    "' onload='",
    "&lt;",
]


class Reader(HTMLParser):
    """Collects the text of a page, its tags, and the spans' hover texts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.tags, self.spans = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "span":
            self.spans.append(dict(attributes))

    def handle_data(self, data):
        self.text += data


def html(*strips: Strip) -> str:
    return TokenStrips(*strips)._repr_html_()


def opacity(span: dict) -> float:
    return float(re.search(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", span["style"]).group(1))


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs", "Cc"])), st.floats(-1e6, 1e6)), max_size=20))
@settings(deadline=None)
def test_any_token_shows_as_text(pairs):
    page = Reader(html(Strip([token for token, _ in pairs], [score for _, score in pairs], "a <b>title</b>")))
    assert page.text == "a <b>title</b>" + "".join(visible(token) for token, _ in pairs)
    assert set(page.tags) <= {"div", "span", "br"}
    assert len(page.spans) == len(pairs)


@pytest.mark.parametrize(
    "code", [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x61C, 0, 8, 0x1B, 0x9B]
)
def test_what_has_an_effect_and_no_shape_is_written_out(code):
    """Else "user\u202etxt.exe" would be read as "userexe.txt"."""
    strips = TokenStrips(Strip([f"a{chr(code)}b"], [1.0], title=f"why {chr(code)}"))
    page = Reader(strips._repr_html_())
    assert page.text == f"why [U+{code:04X}]a[U+{code:04X}]b"
    drawn = "".join(text.get_text() for text in strips.figure().axes[0].texts)
    assert drawn == page.text


def test_whitespace_is_visible_and_lines_break():
    page = Reader(html(Strip([" a", "\t", "b\n", "c"], [1, 1, 1, 1])))
    assert page.text == "·a⇥b↵c"
    assert page.tags.count("br") == 1


def test_what_has_no_shape_at_all_can_be_seen():
    """The rest of a character that was cut in two, and a joiner of emoji."""
    strips = TokenStrips(Strip(["\u6f22", "", "\u200d"], [1, 2, 3]))
    page = Reader(strips._repr_html_())
    assert page.text == "\u6f22⋯[U+200D]"
    assert [span["title"] for span in page.spans] == ["+1", "+2, for a part of the character before", "+3"]


def test_sign_strength_and_hover():
    up, down, weak, none = Reader(html(Strip(list("abcd"), [2.0, -1.0, 0.05, 0.0]))).spans
    assert "{},{},{}".format(*POSITIVE) in up["style"] and "{},{},{}".format(*NEGATIVE) in down["style"]
    assert opacity(up) == pytest.approx(STRONGEST) and opacity(down) == pytest.approx(STRONGEST / 2, abs=0.006)
    assert opacity(weak) < 0.05 and opacity(none) == 0
    assert "dotted" in down["style"] and "dotted" not in up["style"]  # the sign survives without colour
    assert (up["title"], down["title"]) == ("+2", "-1")


def test_muted_tokens_carry_no_colour_and_do_not_set_the_scale():
    muted, kept = Reader(html(Strip(["role", "word"], [100.0, 1.0], muted={0}))).spans
    assert "rgba" not in muted["style"] and muted["title"] == "not scored"
    assert opacity(kept) == pytest.approx(STRONGEST)


def test_scores_may_be_a_tensor_zero_or_not_a_number():
    assert Strip(["a", "b"], torch.tensor([0.5, -1.0])).opacities() == [0.5, -1.0]
    assert Strip(["a", "b"], [0.0, 0.0]).opacities() == [0, 0]
    assert Strip(["a", "b"], [float("nan"), 2.0]).opacities() == [0, 1]
    assert Strip([], []).opacities() == []
    TokenStrips(Strip([], []), Strip(["a"], [float("nan")])).figure()


def test_wrong_number_of_scores_is_refused():
    with pytest.raises(ValueError, match="2 tokens but 1 scores"):
        Strip(["a", "b"], [1.0])


def test_colours_differ_for_colour_blind_eyes():
    """The two hues under simulated deuteranopia and protanopia (Viénot, Brettel and Mollon 1999) stay far apart."""
    to_lms = torch.tensor([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    blind = {
        "protanopia": torch.tensor([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1.0]]),
        "deuteranopia": torch.tensor([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1.0]]),
    }
    pair = torch.tensor([POSITIVE, NEGATIVE]) / 255
    for projection in blind.values():
        seen = (torch.linalg.inv(to_lms) @ projection @ to_lms @ pair.T).T.clamp(0, 1)
        assert (seen[0] - seen[1]).norm() > 0.5


PAGES = {  # background, text, and the text's own opacity
    "Jupyter light": ((255, 255, 255), (0, 0, 0), 0.87),
    "Jupyter dark": ((17, 17, 17), (255, 255, 255), 1),
    "Colab dark": ((56, 56, 56), (226, 226, 226), 1),
    "our site, light": ((255, 255, 255), (0, 0, 0), 0.87),
    "our site, dark": ((30, 33, 41), (226, 228, 233), 0.82),
}


@pytest.mark.parametrize("page", PAGES)
def test_text_is_readable_on_light_and_dark_pages(page):
    """The contrast is at least 4.5, the WCAG AA threshold, on the strongest colours and where tokens are muted."""

    def luminance(colour):
        channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour)]
        return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))

    def over(upper, lower, opacity):
        return [opacity * a + (1 - opacity) * b for a, b in zip(upper, lower, strict=True)]

    def contrast(text, background, opacity):
        light, dark = sorted((luminance(over(text, background, opacity)), luminance(background)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    background, text, of_text = PAGES[page]
    up, down, muted = Reader(html(Strip(list("abc"), [1.0, -1.0, 0.0], muted={2}))).spans
    for span, hue in ((up, POSITIVE), (down, NEGATIVE)):
        assert contrast(text, over(hue, background, opacity(span)), of_text) >= 4.5
    faded = float(re.search(r"opacity:([\d.]+)", muted["style"]).group(1))
    assert contrast(text, background, of_text * faded) >= 4.5


@pytest.mark.filterwarnings("ignore:no font on this machine")
def test_figure_draws_every_token_inside_its_page():
    tokens = ["Anna", " has", "\n", "$x^2$", "<b>", "\u6f22", " word"] * 30
    figure = TokenStrips(Strip(tokens, range(len(tokens)), "title $1")).figure(width=6)
    figure.canvas.draw()
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == ["title $1", *["Anna", "·has", "↵", "$x^2$", "<b>", "□", "·word"] * 30]  # no glyph, no warning
    page = figure.bbox
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= page.x0 and box.x1 <= page.x1 + 1 and box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine: the strips are not tried in a browser")

    def run(page, folder, *action):
        quiet = "--disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"
        command = [path, "--headless", "--no-sandbox", *quiet.split(), f"--user-data-dir={folder / 'profile'}"]
        return subprocess.run([*command, *action, page.as_uri()], capture_output=True, text=True, timeout=120).stdout

    return run


def page_with(strips: str, folder, style="background:#fff;color:#111"):
    page = folder / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><title>quiet</title><body style='{style}'>{strips}")
    return page


@pytest.mark.slow
def test_no_script_runs_in_a_browser(browser, tmp_path):
    strips = html(Strip(HOSTILE, range(len(HOSTILE)), title=HOSTILE[0]))
    assert "<title>quiet</title>" in browser(page_with(strips, tmp_path), tmp_path, "--dump-dom")
    unescaped = page_with(HOSTILE[0], tmp_path)  # the check can fail: the same text unescaped does run
    assert "<title>it ran</title>" in browser(unescaped, tmp_path, "--dump-dom")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["background:#fff;color:#111", "background:#111;color:#eee"], ids=["light", "dark"])
def test_colours_reach_the_screen_on_light_and_dark_pages(browser, tmp_path, style):
    strips = html(Strip([" for" * 5, " against" * 5, " script"], [1.0, -1.0, 0.0]))
    picture = tmp_path / "page.png"
    browser(page_with(strips, tmp_path, style), tmp_path, f"--screenshot={picture}", "--window-size=900,200")
    seen = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(1_000_000)}
    background = 255 if "#fff" in style else 17
    for hue in (POSITIVE, NEGATIVE):
        mixed = [STRONGEST * channel + (1 - STRONGEST) * background for channel in hue]
        assert min(max(abs(a - b) for a, b in zip(colour, mixed, strict=True)) for colour in seen) <= 3


# ---- heatmaps --------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("draw", ["heatmaps", "prompt_maps"])
def test_a_rows_name_keeps_its_line_breaks_and_stays_beside_its_row(draw):
    names = ["umbrella\nplain", "a name that is longer than its row is high", "turned \u202e around"]
    if draw == "heatmaps":
        figure = heatmaps([PICTURE] * 3, {"map": torch.zeros(3, 4, 4)}, names, size=1)
    else:
        figure = prompt_maps([PICTURE] * 3, [["map"]] * 3, [torch.zeros(1, 4, 4)] * 3, names, size=1)
    figure.draw_without_rendering()
    first = [figure.axes[i] for i in (0, 2, 4)]
    assert [" ".join(axes.get_ylabel().split()) for axes in first] == [
        "umbrella plain",
        names[1],
        "turned [U+202E] around",
    ]
    assert first[0].get_ylabel() == names[0]
    boxes = [axes.yaxis.label.get_window_extent() for axes in first]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes)), "names lie over one another"
    assert all(box.x0 >= 0 for box in boxes), "names are cut"


def test_a_column_of_the_wrong_length_is_named():
    with pytest.raises(ValueError, match="column 'Libra' has 1 maps for 2 pictures"):
        heatmaps([PICTURE] * 2, {"Libra": torch.zeros(1, 3, 3)})
