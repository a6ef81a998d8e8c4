"""GlyphScenes: repeatable, and their masks tell the truth about the picture."""

import numpy as np
import pytest

from libragrad_minimal.scenes import CLASSES, COLOURS, caption, draw_scene


def test_the_seed_decides_everything():
    first, again, other = draw_scene(5, objects=2), draw_scene(5, objects=2), draw_scene(6, objects=2)
    for name in ("image", "masks", "classes", "colours"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_shapes_and_visible_objects(objects):
    for seed in range(100):
        scene = draw_scene(seed, objects)
        assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (objects, 64, 64) and scene.masks.dtype == bool
        assert len(set(scene.classes)) == objects
        assert scene.masks.sum(0).max() == 1, "a pixel shows one object"
        assert scene.masks.sum((1, 2)).min() > 20, "every object can be seen"


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_masks_are_where_the_paint_is(objects):
    """Painted white, not red, an object is greener by 200 where it hides all else, and by less than half elsewhere."""
    for seed in range(30):
        colours = ["red"] * objects
        for i in range(objects):
            repainted = colours[:i] + ["white"] + colours[i + 1 :]
            before, after = draw_scene(seed, colours=colours), draw_scene(seed, colours=repainted)
            rise = (after.image.astype(int) - before.image).max(axis=2)
            assert (rise[before.masks[i]] > 0).all()
            assert (rise[~before.masks[i]] <= 101).all()


def test_every_class_and_colour_occurs():
    scenes = [draw_scene(seed) for seed in range(300)]
    assert {scene.classes[0] for scene in scenes} == set(range(len(CLASSES)))
    assert {scene.colours[0] for scene in scenes} == set(range(len(COLOURS)))
    assert len(CLASSES) >= 12 and len(COLOURS) == 6


def test_named_objects_and_captions():
    scene = draw_scene(0, classes=["heart", "cat", "star"], colours=["red", "blue", "white"])
    assert caption(scene) == "a red heart, a blue cat and a white star"
    assert caption(draw_scene(0, classes=["heart", "cat"], colours=["red", "blue"])) == "a red heart and a blue cat"
    assert caption(draw_scene(0, classes=["heart"], colours=["red"])) == "a red heart"
    assert caption(draw_scene(1, colours=["green"])).startswith("a green ")


def test_any_size():
    assert draw_scene(0, objects=2, size=96).masks.shape == (2, 96, 96)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"objects": 4}, "1, 2 or 3 objects, not 4"),
        ({"classes": ["dragon"]}, "unknown class 'dragon'; there are mouse"),
        ({"colours": ["mauve"]}, "unknown colour 'mauve'; there are red"),
        ({"objects": 2, "classes": ["cat"]}, "2 objects need a list of 2 class names"),
        ({"classes": "cat"}, "list"),
    ],
)
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(0, **wrong)
