"""Block diagrams: every way leads from box to box, and gates look different from streams."""

import pytest
from matplotlib.colors import to_hex

from libragrad_minimal.diagrams import DIAGRAMS, GATE, STREAM, block_diagram

GATES = {
    "vit": {"queries, keys", "softmax", "1 / std", "Φ of GELU"},
    "llama": {"queries, keys", "softmax", "1 / rms", "σ of SiLU"},
    "clip": {r"1 / $\Vert e\Vert$", r"1 / $\Vert t\Vert$"},
}


@pytest.mark.parametrize("kind", DIAGRAMS)
def test_every_box_is_on_a_way_and_every_way_between_boxes(kind):
    diagram = DIAGRAMS[kind]()
    stops = {stop.replace("_", " ") for way in diagram.ways for stop in way.split() if not stop.startswith("|")}
    assert stops == set(diagram.boxes)


@pytest.mark.parametrize("kind", DIAGRAMS)
def test_gates_are_drawn_in_the_colour_of_gates(kind):
    drawn = {text.get_text(): text.get_bbox_patch() for text in block_diagram(kind).axes[0].texts if text.get_text()}
    amber = {text for text, box in drawn.items() if box and to_hex(box.get_facecolor()) == GATE}
    assert amber == GATES[kind]
    assert {to_hex(box.get_facecolor()) for box in drawn.values() if box} <= {GATE, STREAM, "#ffffff"}


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="vit, llama, clip"):
        block_diagram("bert")
