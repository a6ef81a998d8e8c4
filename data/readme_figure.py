"""Draw the README's pictures: photographs, a prompt and sentences, by plain and balanced gradients; and every method.

python data/readme_figure.py    # writes data/readme_figure.png, data/readme_methods.png and data/readme_methods/

The ViT is an ImageNet ViT-Tiny from the hub, the sentences are those of SmolLM2 in smollm2_strips.json, the CLIP is our
demo model, which knows glyphs.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import SubFigure
from PIL import Image

from libragrad_minimal import LIBRA, METHODS, PLAIN, attribute
from libragrad_minimal.attribution import attribute_many
from libragrad_minimal.models import load_demo, load_pretrained
from libragrad_minimal.photographs import draw_collage, photograph
from libragrad_minimal.plots import NEGATIVE, POSITIVE, STRONGEST, Strip, blended
from libragrad_minimal.prompts import attribute_prompts
from libragrad_minimal.scenes import draw_scene

FILE = Path(__file__).with_suffix(".png")
SHEET = FILE.with_name("readme_methods.png")
SMALL = 112  # pixels of a picture in README's table
RULES = {"plain": PLAIN, "Libra": LIBRA}
Row = tuple[np.ndarray, list[tuple[str, dict[str, np.ndarray]]]]  # a picture; what was asked, and the maps by rules


def photographs() -> list[Row]:
    vit = load_pretrained("vit", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    rows = []
    for collage in (draw_collage(1, ["cat", "coffee"]), draw_collage(2, ["motorcycle", "cameraman"])):
        pixels, asked = vit.transform(collage.image)[None], []
        for name in collage.names:  # ask for each photograph's class: what the model sees in it alone
            target = vit.model(vit.transform(photograph(name))[None]).argmax().item()
            maps = {
                how: attribute(vit.model, pixels, target, "FullGrad+", r).maps[0].numpy() for how, r in RULES.items()
            }
            asked.append((vit.class_names[target].split(",")[0], maps))
        rows.append((np.asarray(collage.image), asked))
    return rows


def prompts() -> list[Row]:
    clip, scene = load_demo("clip"), draw_scene(5, classes=["cat", "umbrella"], colours=["yellow", "blue"])
    texts = ["a yellow cat", "a blue umbrella"]
    pixels = clip.transform(Image.fromarray(scene.image))[None]
    maps = {
        how: attribute_prompts(clip, pixels, texts, "FullGrad+", r, progress=False).maps[0] for how, r in RULES.items()
    }
    return [
        (scene.image, [(f'"{text}"', {how: maps[how][i].numpy() for how in RULES}) for i, text in enumerate(texts)])
    ]


def sentences() -> list[dict]:
    stored = json.loads(FILE.with_name("smollm2_strips.json").read_text(encoding="utf-8"))
    return [strip for strip in stored["strips"] if strip["answer"] in (" walnut", " cold")]


def draw_rows(part: SubFigure, title: str, rows: list[Row]) -> None:
    part.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    grid = part.subplots(len(rows), 5, squeeze=False)
    for axes, (picture, asked) in zip(grid, rows, strict=True):
        axes[0].imshow(picture)
        panels = [(name, how, maps[how]) for name, maps in asked for how in RULES]
        for panel, (name, how, scores) in zip(axes[1:], panels, strict=True):
            large = Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)
            panel.imshow(blended(np.asarray(large), scores))
            panel.set_title(f"{name}: {how}", fontsize=10, parse_math=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])


def draw_sentences(part: SubFigure, title: str, strips: list[dict]) -> None:
    part.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    axes = part.subplots()
    axes.set(xlim=(0, 100), ylim=(2.2 * len(strips) - 0.1, -0.2))
    axes.axis("off")
    for number, strip in enumerate(strips):
        for line, how in enumerate(RULES):
            at, row = 9.0, 2.2 * number + line
            axes.text(0, row + 0.4, how, fontsize=10, va="center")
            for token, strength in zip(strip["tokens"], Strip(strip["tokens"], strip[how]).opacities(), strict=True):
                colour = [channel / 255 for channel in (POSITIVE if strength >= 0 else NEGATIVE)]
                shown = axes.text(at, row + 0.4, token.strip(), fontsize=10, va="center", parse_math=False)
                shown.set_bbox({"facecolor": (*colour, STRONGEST * abs(strength)), "linewidth": 0, "pad": 2})
                width = shown.get_window_extent().transformed(axes.transData.inverted()).width
                at += width + 1.2
            axes.text(at, row + 0.4, f"→ {strip['answer'].strip()}", fontsize=10, va="center", fontweight="bold")


def draw_methods() -> None:
    """One collage, asked for the cat, by every method but averages of others: on a sheet, and each alone."""
    vit = load_pretrained("vit", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    collage = draw_collage(1, ["cat", "coffee"])
    target = vit.model(vit.transform(photograph("cat"))[None]).argmax().item()
    names = [name for name in METHODS if not name.startswith(("IG ", "SmoothGrad "))]
    found = attribute_many(vit.model, vit.transform(collage.image)[None], target, names)
    picture = np.asarray(collage.image.resize((224, 224), Image.Resampling.BICUBIC))
    maps = {name: blended(picture, found[name].maps[0].numpy()) for name in names}
    draw_sheet({"Egyptian cat?": picture, **maps})
    for name, drawn in {"picture": picture, **maps}.items():
        small = Image.fromarray(drawn).resize((SMALL, SMALL), Image.Resampling.LANCZOS)
        few_colours = small.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few_colours.save(SHEET.with_suffix("") / f"{file_name(name)}.png", optimize=True)


def file_name(method: str) -> str:
    return method.lower().replace("+", "-plus").replace(" ", "-")


def draw_sheet(pictures: dict[str, np.ndarray]) -> None:
    figure, grid = plt.subplots(4, 6, figsize=(9, 6.6), layout="constrained", facecolor="white")
    for axes, (name, picture) in zip(grid.flat, pictures.items(), strict=False):
        axes.imshow(picture)
        axes.set_title(name.replace("Gradient Attention", "Gradient"), fontsize=9)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    figure.savefig(SHEET, dpi=100, pil_kwargs={"optimize": True})


def main() -> None:
    figure = plt.figure(figsize=(9, 9.6), layout="constrained", facecolor="white")
    parts = figure.subfigures(3, 1, height_ratios=[4.1, 2.15, 2])
    draw_rows(parts[0], "Which patches speak for the class? An ImageNet ViT on photographs", photographs())
    draw_rows(parts[1], "Which patches does a sentence speak of? A small CLIP", prompts())
    draw_sentences(parts[2], "Which words made the model say this? SmolLM2-135M", sentences())
    figure.savefig(FILE, dpi=100, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
    draw_methods()
