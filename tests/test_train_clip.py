"""What the training script of the demo CLIP calls true of its captions."""

import importlib.util

from libragrad_minimal.models import DATA
from libragrad_minimal.scenes import CLASSES, COLOURS, caption, draw_scene


def test_what_training_calls_true():
    """Against a reading of the captions, word by word."""
    spec = importlib.util.spec_from_file_location("train_clip", DATA / "train_clip.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    scenes = [draw_scene(1, 1), draw_scene(2, 2), draw_scene(3, 3), script.draw_confusable(4)]
    shown = [{(list(COLOURS)[c], CLASSES[k]) for c, k in zip(s.colours, s.classes, strict=True)} for s in scenes]
    for group, (captions, true) in script.truths(scenes).items():
        for i, content in enumerate(shown):
            for j, text in enumerate(captions):
                words = text.replace(",", "").split()
                named = {(a, b) for a, b in zip(words, words[1:], strict=False) if a in COLOURS and b in CLASSES}
                fits = {
                    "phrases": named <= content,
                    "objects": any(words[-1] == kind for _, kind in content),
                    "colours": any(words[-1] == colour for colour, _ in content),
                    "complete": named == content and j < len(scenes),
                }[group]
                assert bool(true[i, j]) == fits, (group, text, content)
    unlike = [script.swapped(scene) != caption(scene) for scene in scenes]
    assert unlike[3] and not unlike[0]
