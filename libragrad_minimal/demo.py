"""The page of `libragrad demo`: each command once, on the demo models, offline."""

from __future__ import annotations

from html import escape

from PIL import Image

from .audits import audit_model
from .engine import LIBRA, PLAIN
from .explanations import attribute_classes, attribute_phrases, attribute_text, class_name, picture_figure, rules_name
from .models import load_demo
from .pages import embedded, page
from .plots import TokenStrips
from .scenes import draw_scene

PROMPT = "Mary has a yellow ball. Dora has a red ring. Hugo has a brown cup. What colour is Dora's ring?"


def demo_page() -> str:
    """A whole HTML page."""
    legend = "<p>Orange speaks for the output, blue against it. Every map is scaled by its own largest score.</p>"
    return page("LibraGrad demo", "\n".join([legend, *pictures(), *prompts(), *text()]))


def pictures() -> list[str]:
    loaded = load_demo("vit")
    scene = draw_scene(2, classes=["cat", "umbrella"])
    pixels = loaded.transform(Image.fromarray(scene.image))
    targets = scene.classes.tolist()
    names = [class_name(loaded, target) for target in targets]
    parts = ["<h2>image: two classes in one picture</h2>"]
    for method, rules in (("FullGrad+", PLAIN), ("FullGrad+", LIBRA), ("Attention Rollout", PLAIN)):
        figure = picture_figure(loaded, pixels, attribute_classes(loaded, pixels, targets, method, rules), names)
        parts += [f"<h3>{method}, {rules_name(rules)}</h3>", embedded(figure, f"attribution for {' and '.join(names)}")]
    return [*parts, *audited("vit")]


def prompts() -> list[str]:
    loaded = load_demo("clip")
    scene = draw_scene(3, objects=2, classes=["heart", "cat"], colours=["red", "blue"])
    pixels = loaded.transform(Image.fromarray(scene.image))
    asked = ["a red heart", "a blue cat"]
    parts = ["<h2>clip: the region a prompt speaks of</h2>"]
    for rules in (PLAIN, LIBRA):
        figure = picture_figure(loaded, pixels, attribute_phrases(loaded, pixels, asked, "FullGrad+", rules), asked)
        parts += [f"<h3>FullGrad+, {rules_name(rules)}</h3>", embedded(figure, f"maps of {' and '.join(asked)}")]
    return [*parts, *audited("clip")]


def text() -> list[str]:
    loaded = load_demo("llama")
    strips = [attribute_text(loaded, PROMPT, rules=rules)[0] for rules in (PLAIN, LIBRA)]
    return ["<h2>text: where the next word comes from</h2>", TokenStrips(*strips)._repr_html_(), *audited("llama")]


def audited(kind: str) -> list[str]:
    return [
        f'<details><summary>audit {kind}</summary><pre tabindex="0">{escape(str(audit_model(kind)))}</pre></details>'
    ]
