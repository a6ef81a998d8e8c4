"""Measure every attribution method, plain and Libra, on pictures with two objects, for notebook 05.

    python data/gallery.py scenes   # the demo ViT on 100 GlyphScenes       -> data/gallery_scenes.npz
    python data/gallery.py photos   # an ImageNet ViT-Tiny on 20 collages   -> data/gallery_photos.npz
    python data/gallery.py prompts  # the demo CLIP on 50 GlyphScenes       -> data/gallery_prompts.npz
    python data/gallery.py text     # the demo Llama on 50 questions        -> data/gallery_text.npz

Each file holds names, "method | rules | metric", and values (names, pictures). Deletion is measured by two protocols,
and a metric of it bears the protocol's name: "SRG, occlude patches" at 10, 30 ... 90 % of the patches and the untouched
picture, "SRG, drop tokens" (of texts "SRG, mask tokens") as the authors do it, at 10, 20, ... 90 %. A run that was
stopped goes on where it was. Explained is, in pictures, the class of the two that has the higher logit; in text the
predicted token. For CLIP the classes are 72 prompts, "a red heart", and the logits the similarities.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import progress
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor
from tqdm import trange

from libragrad_minimal import ALI_LRP, ATTN_LRP, CP_LRP, DECOMPX, LIBRA, METHODS, PLAIN
from libragrad_minimal.attribution import attribute_many
from libragrad_minimal.batches import subject
from libragrad_minimal.dropping import drop_tokens
from libragrad_minimal.files import whole_file
from libragrad_minimal.methods import uses_gradients
from libragrad_minimal.metrics import (
    AUTHORS_PROTOCOL,
    Deletion,
    deletion,
    grid_pointing_game,
    mask_tokens,
    mass_inside,
    occlude_patches,
    pointing_game,
    segmentation_ap,
)
from libragrad_minimal.models import LoadedModel, load_demo, load_pretrained
from libragrad_minimal.photographs import draw_collage, photograph
from libragrad_minimal.scenes import CLASSES, draw_scene

FOLDER = Path(__file__).parent
VIT_TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"

COMBINED = {"IG FullGrad+", "IG AttCAT"}  # of the combinations with averages, which take hours together
MEASURED = [method for method in METHODS if not method.startswith(("IG ", "SmoothGrad ", "Occ")) or method in COMBINED]
WITH_GRADIENTS = [method for method in MEASURED if uses_gradients(method)]
FEW = ["IxG", "FullGrad", "FullGrad+"]
RUNS = {  # rules -> which methods
    "plain": (PLAIN, MEASURED),
    "Libra": (LIBRA, WITH_GRADIENTS),
    "AttnLRP": (ATTN_LRP, FEW),
    "AliLRP": (ALI_LRP, FEW),
    "CP-LRP": (CP_LRP, FEW),
    "DecompX": (DECOMPX, FEW),
    "residual-aware Libra": (replace(LIBRA, residual=True), FEW),
}
ONLY_ADDED_UP = {"AliLRP", "CP-LRP", "DecompX"}  # their maps are measured, but not by deletion
FUSIONS = ("mean", "max", "min")
DISCARD_RATIOS = (0.0, 0.3, 0.6, 0.9)
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the patches, taken away

Picture = tuple[Image.Image, np.ndarray, list[int]]  # picture, masks (2, H, W), classes of the two objects


def scene(seed: int, vit: LoadedModel) -> Picture:
    drawn = draw_scene(seed, objects=2)
    return Image.fromarray(drawn.image), drawn.masks, drawn.classes.tolist()


def collage(seed: int, vit: LoadedModel) -> Picture:
    drawn = draw_collage(seed)
    classes = [vit.model(vit.transform(photograph(name))[None]).argmax().item() for name in drawn.names]
    return drawn.image, drawn.masks, classes


def phrased_scene(seed: int, clip: LoadedModel) -> Picture:
    drawn = draw_scene(seed, objects=2)
    return Image.fromarray(drawn.image), drawn.masks, (drawn.colours * len(CLASSES) + drawn.classes).tolist()


def measure_pictures(loaded: LoadedModel, pictures: list[Picture], sweep: bool = False) -> dict[str, Tensor]:
    """ "method | rules | metric" -> one number per picture; with `sweep` also the rollouts with every option."""
    images = torch.stack([loaded.transform(picture) for picture, _, _ in pictures])
    classes = torch.tensor([classes for _, _, classes in pictures])
    of = subject(loaded)
    with torch.no_grad():
        stronger = of.answer(images).gather(1, classes).argmax(1)
    each = torch.arange(len(pictures))
    explained = classes[each, stronger]
    target = of.target(explained)
    masks = torch.stack([torch.from_numpy(masks) for _, masks, _ in pictures])[each, stronger]

    results = {}
    for name, (rules, methods) in RUNS.items():
        for method, result in attribute_many(loaded.model, images, target, methods, rules).items():
            results[f"{method} | {name}"] = result
    in_table = {name: result.maps for name, result in results.items() if name.split(" | ")[1] not in ONLY_ADDED_UP}
    if sweep:
        sweeps = [
            ("Attention Rollout", {"head_fusion": f, "discard_ratio": d}) for f in FUSIONS for d in DISCARD_RATIOS
        ]
        sweeps += [("Gradient Attention Rollout", {"discard_ratio": d}) for d in DISCARD_RATIOS]
        for method, options in sweeps:
            label = " ".join([method, *map(str, options.values())])
            results[f"{label} | plain"] = attribute_many(loaded.model, images, target, {method: options}, PLAIN)[method]

    maps = {name: result.maps for name, result in results.items()}
    measured = {f"{name} | logit": result.output for name, result in results.items()}
    for name, scores in maps.items():
        measured[f"{name} | AP"] = segmentation_ap(scores, masks)
        measured[f"{name} | pointing game"] = pointing_game(scores, masks)
        measured[f"{name} | mass inside"] = mass_inside(scores, masks)
        measured[f"{name} | completeness error"] = results[name].completeness_error
        if masks[0].float().mean() == 0.5:  # two photographs side by side
            measured[f"{name} | grid pointing game"] = grid_pointing_game(scores, stronger, grid=(1, 2))
    asked = {"target": explained, "labels": explained}
    painted = deletion(of.answer, images, in_table, occlude_patches, fractions=FRACTIONS, **asked)
    dropped = deletion(of.answer_without, images, in_table, drop_tokens, **AUTHORS_PROTOCOL, **asked)
    return measured | summaries(painted) | summaries(dropped)


def summaries(deleted: dict[str, Deletion]) -> dict[str, Tensor]:
    return {
        f"{name} | {metric}, {curves.protocol}": values
        for name, curves in deleted.items()
        for metric, values in curves.summary().items()
    }


def measure_text(llama: LoadedModel, questions: list[dict]) -> dict[str, Tensor]:
    """ "method | rules | metric" -> one number per question; the first and the last token are never taken away."""
    measured = defaultdict(list)
    for question in questions:
        encoded = llama.tokenizer(question["prompt"], return_tensors="pt", return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"][0].tolist()
        evidence = torch.tensor([any(a < end and start < b for a, b in question["evidence"]) for start, end in spans])
        removable = torch.ones_like(ids, dtype=torch.bool)
        removable[:, [0, -1]] = False
        with torch.no_grad():
            predicted = llama.model(ids).logits[:, -1].argmax(1)
        results = {}
        for name, (rules, methods) in RUNS.items():
            for method, result in attribute_many(llama.model, ids, predicted, methods, rules).items():
                results[f"{method} | {name}"] = result.scores
        answer = lambda inputs: llama.model(**inputs).logits[:, -1]  # noqa: E731
        found = summaries(deletion(answer, ids, results, mask_tokens, removable=removable, **AUTHORS_PROTOCOL))
        for name, scores in results.items():
            ranked = average_precision_score(evidence[1:-1], scores[0, 1:-1])
            found[f"{name} | evidence AP"] = torch.tensor([ranked])
        for name, values in found.items():
            measured[name].append(values)
    return {name: torch.cat(values) for name, values in measured.items()}


def question(seed: int, llama: LoadedModel) -> dict:
    return json.loads((FOLDER / "evidence_questions.json").read_text())[seed]


BENCHMARKS = {  # which model, which pictures or questions and how many, how to measure them
    "scenes": (lambda: load_demo("vit"), scene, 100, partial(measure_pictures, sweep=True)),
    "photos": (lambda: load_pretrained("vit", VIT_TINY), collage, 20, measure_pictures),
    "prompts": (lambda: load_demo("clip"), phrased_scene, 50, measure_pictures),
    "text": (lambda: load_demo("llama"), question, 50, measure_text),
}


def load_gallery(file: Path) -> dict[str, np.ndarray]:
    """ "method | rules | metric" -> one number per picture."""
    with np.load(file) as saved:
        return dict(zip(saved["names"].tolist(), saved["values"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--count", type=int, help="how many pictures or questions (default: all)")
    parser.add_argument("--chunk", type=int, default=10, help="how many to measure at a time")
    args = parser.parse_args()
    load, draw, count, measure = BENCHMARKS[args.benchmark]
    file = FOLDER / f"gallery_{args.benchmark}.npz"
    try:
        with progress.alone(file):
            complete(file, load(), draw, args.count or count, args.chunk, measure)
    except OtherMethods as error:
        parser.error(str(error))


class OtherMethods(ValueError):
    """A file's measurements can't be gone on with."""


def complete(file: Path, model, draw: Callable, count: int, chunk: int, measure: Callable) -> None:
    """Measure what the file doesn't hold yet."""
    done = load_gallery(file) if file.exists() else {}
    first = len(next(iter(done.values()), []))
    for start in trange(first, count, chunk):
        examples = [draw(seed, model) for seed in range(start, start + chunk)]
        measured = measure(model, examples)
        if done and done.keys() != measured.keys():
            raise OtherMethods(f"{file} holds measurements of other methods; move it away to start anew")
        done = {name: np.append(done.get(name, []), values) for name, values in measured.items()}
        with whole_file(file) as unfinished, unfinished.open("wb") as stream:  # by a path, numpy would name it anew
            np.savez_compressed(stream, names=list(done), values=np.float32(list(done.values())))


if __name__ == "__main__":
    main()
