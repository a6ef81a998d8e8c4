"""The explorer follows its menus, shows what `attribute` gives, refuses in a sentence; hover texts are the scores."""

import re

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from libragrad_minimal import PLAIN, attribute
from libragrad_minimal.explorer import Explorer, explore_clip, explore_llama, explore_vit
from libragrad_minimal.hovering import PatchMap, TokenMatrix
from libragrad_minimal.models import load_demo
from libragrad_minimal.scenes import draw_scene


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return Image.fromarray(draw_scene(3, classes=["cat", "umbrella"]).image)


def menus(box: ipywidgets.VBox) -> dict[str, ipywidgets.Widget]:
    return {menu.description: menu for menu in box.children[0].children}


def scores_on_hover(html: str) -> list[float]:
    return [float(number) for number in re.findall(r'title="([-+][\d.e+-]+)"', html)]


def test_menus_change_the_map(scene):
    vit = load_demo("vit")
    explorer = explore_vit(vit, scene, ["cat", "umbrella"])
    box = explorer.widget()
    picture, first = box.children[1], box.children[1].value
    pixels = vit.transform(scene)[None]
    for name, value in (("class_name", "umbrella"), ("rules", "plain"), ("method", "GenAtt")):
        before = picture.value
        menus(box)[name].value = value
        assert picture.value != before
    expected = attribute(vit.model, pixels, vit.class_names.index("umbrella"), "GenAtt", PLAIN).maps[0]
    assert np.allclose(scores_on_hover(picture.value), expected.flatten(), rtol=6e-3, atol=1e-9)
    assert explorer.show("umbrella", "GenAtt", "plain")._repr_html_() == picture.value
    assert explorer.show()._repr_html_() == first


def test_a_layer_is_one_block_or_the_first_of_a_sum(scene):
    vit = load_demo("vit")
    pixels, cat = vit.transform(scene)[None], vit.class_names.index("cat")
    explorer = explore_vit(vit, scene, ["cat"])
    late = attribute(vit.model, pixels, cat, "FullGrad+", layers=[3, 4]).maps[0]
    assert np.allclose(explorer.show(layer="3").scores, late, rtol=1e-5)
    last = attribute(vit.model, pixels, cat, "HiResCAM", layer=3).maps[0]
    assert np.allclose(explorer.show(method="HiResCAM", layer="3").scores, last, rtol=1e-5)
    with pytest.raises(ValueError, match="GenAtt reads all blocks at once: choose layer 'all'"):
        explorer.show(method="GenAtt", layer="3")


def test_what_is_refused_stands_where_the_map_would(scene):
    box = explore_vit(load_demo("vit"), scene, ["cat"]).widget()
    menus(box)["method"].value = "GenAtt"
    menus(box)["layer"].value = "2"
    assert (
        box.children[1].value == '<div role="alert">GenAtt reads all blocks at once: choose layer &#x27;all&#x27;</div>'
    )
    menus(box)["layer"].value = "all"
    assert "<img" in box.children[1].value


def test_prompts_can_be_typed(scene):
    box = explore_clip(load_demo("clip"), scene, "a yellow cat").widget()
    before = box.children[1].value
    menus(box)["prompt"].value = "an umbrella"
    assert box.children[1].value != before and "an umbrella (" in box.children[1].value
    menus(box)["prompt"].value = "<script>alert(1)</script>"
    assert "<script" not in box.children[1].value
    menus(box)["prompt"].value = "  "
    assert "role=" in box.children[1].value and "empty" in box.children[1].value


def test_texts_and_answers_can_be_typed():
    llama = load_demo("llama")
    prompt = "Anna has a red ball. Ben has a blue kite. What colour is Ben's kite?"
    box = explore_llama(llama, prompt, " blue").widget()
    ids = llama.tokenizer(prompt, return_tensors="pt").input_ids
    blue = llama.tokenizer(" blue", add_special_tokens=False).input_ids[0]
    expected = attribute(llama.model, ids, blue, "IxG").scores[0]
    menus(box)["method"].value = "IxG"
    assert np.allclose(scores_on_hover(box.children[1].value), expected, rtol=6e-3, atol=1e-9)
    menus(box)["answer"].value = ""
    assert "answer is empty" in box.children[1].value
    menus(box)["prompt"].value = "half \udcff"
    assert "the prompt isn&#x27;t UTF-8" in box.children[1].value


def test_choices_that_are_not_there():
    explorer = Explorer(lambda **asked: None, method=["a", "b"], text="free")
    with pytest.raises(ValueError, match="method can't be 'c'; it can be a, b"):
        explorer.show("c")
    with pytest.raises(ValueError, match="there is no choice 'rules'; there are method, text"):
        explorer.show(rules="plain")
    with pytest.raises(ValueError, match="2 choices, got 3"):
        explorer.show("a", "typed", "more")


def test_without_widgets_the_first_map_stands_by_itself(scene, monkeypatch):
    explorer = explore_vit(load_demo("vit"), scene, ["cat"])
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()
    monkeypatch.setattr("libragrad_minimal.explorer.find_spec", lambda name: None)
    still = explorer._repr_mimebundle_()
    assert set(still) == {"text/plain", "text/html"} and still["text/html"] == explorer.show()._repr_html_()


def test_a_patch_map_needs_rows_and_columns():
    html = PatchMap(np.zeros((20, 40, 3), np.uint8), [[1.0, -2.0]], 'a "title" <b>')._repr_html_()
    assert scores_on_hover(html) == [1, -2] and "<b>" not in html and "column 1" in html
    with pytest.raises(ValueError, match=r"\(rows, columns\), got shape \(3,\)"):
        PatchMap(np.zeros((20, 40, 3), np.uint8), torch.zeros(3))


def test_a_matrix_names_both_tokens():
    matrix = TokenMatrix([" blue", "."], ["<s>", " red"], [[1.0, -0.5], [float("nan"), 0]], "blue")
    html = matrix._repr_html_()
    assert 'title="&lt;s&gt;: +1"' in html and 'title="·red: -0.5"' in html and "<s>" not in html
    assert 'title="&lt;s&gt;: not scored"' in html
    with pytest.raises(ValueError, match=r"needs scores \(2, 2\), got shape \(2, 3\)"):
        TokenMatrix([" blue", "."], ["<s>", " red"], np.zeros((2, 3)))
