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
LINES, INDENT = 2.1, 13.0  # of a sentence: rows that it takes, and where it begins, in percent of the width
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
    """Each picture once, and beside it a line for each question: plain, Libra. Narrow, so that phones can show it."""
    part.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    grid = part.add_gridspec(2 * len(rows), 3, width_ratios=[1.75, 1, 1])
    for line, (picture, asked) in enumerate(rows):
        panels = [(part.add_subplot(grid[2 * line : 2 * line + 2, 0]), picture)]
        for question, (name, maps) in enumerate(asked):
            for column, how in enumerate(RULES, 1):
                large = Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)
                panels.append(
                    (part.add_subplot(grid[2 * line + question, column]), blended(np.asarray(large), maps[how]))
                )
                if line == question == 0:
                    panels[-1][0].set_title(how, fontsize=11)
            panels[-2][0].set_ylabel(name, fontsize=10, parse_math=False)
        for axes, shown in panels:
            axes.imshow(shown)
            axes.set(xticks=[], yticks=[])


def draw_sentences(part: SubFigure, title: str, strips: list[dict]) -> None:
    part.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    axes = part.subplots()
    axes.set(xlim=(0, 100), ylim=(2 * LINES * len(strips), -0.2))
    axes.axis("off")
    for number, strip in enumerate(strips):
        for order, how in enumerate(RULES):
            at, row = INDENT, LINES * (2 * number + order)
            axes.text(0, row + 0.4, how, fontsize=10, va="center")
            for token, strength in zip(strip["tokens"], Strip(strip["tokens"], strip[how]).opacities(), strict=True):
                colour = [channel / 255 for channel in (POSITIVE if strength >= 0 else NEGATIVE)]
                shown = axes.text(at, row + 0.4, token.strip(), fontsize=10, va="center", parse_math=False)
                shown.set_bbox({"facecolor": (*colour, STRONGEST * abs(strength)), "linewidth": 0, "pad": 2})
                width = shown.get_window_extent().transformed(axes.transData.inverted()).width
                if at + width > 100:
                    at, row = INDENT, row + 1
                    shown.set_position((at, row + 0.4))
                at += width + 1.6
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
    figure, grid = plt.subplots(6, 4, figsize=(5.6, 9.3), layout="constrained", facecolor="white")
    for axes, (name, picture) in zip(grid.flat, pictures.items(), strict=False):
        axes.imshow(picture)
        axes.set_title(name.replace("Gradient Attention", "Gradient"), fontsize=10)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    figure.savefig(SHEET, dpi=100, pil_kwargs={"optimize": True})


def main() -> None:
    figure = plt.figure(figsize=(5, 11), layout="constrained", facecolor="white")
    parts = figure.subfigures(3, 1, height_ratios=[5.4, 2.95, 2.5])
    draw_rows(parts[0], "Which patches speak for the class? An ImageNet ViT", photographs())
    draw_rows(parts[1], "Which patches does a sentence speak of? A small CLIP", prompts())
    draw_sentences(parts[2], "Which words made the model say this? SmolLM2-135M", sentences())
    figure.savefig(FILE, dpi=100, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
    draw_methods()
