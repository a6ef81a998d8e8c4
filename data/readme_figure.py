"""Draw the README's picture: an ImageNet ViT-Tiny on real photographs, plain gradients beside balanced ones.

python data/readme_figure.py    # writes data/readme_figure.png
"""

from pathlib import Path

import torch
from PIL import Image

from libragrad_minimal import LIBRA, PLAIN
from libragrad_minimal.attribution import attribute
from libragrad_minimal.models import load_pretrained
from libragrad_minimal.photographs import draw_collage, photograph
from libragrad_minimal.plots import heatmaps

FILE = Path(__file__).with_suffix(".png")
COLLAGES = [draw_collage(1, ["cat", "coffee"]), draw_collage(2, ["motorcycle", "cameraman"])]


def main() -> None:
    vit = load_pretrained("vit", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    pictures, targets = [], []
    for collage in COLLAGES:
        for name in collage.names:  # ask once for each photograph's class: what the model sees in it alone
            pictures.append(collage.image)
            targets.append(vit.model(vit.transform(photograph(name))[None]).argmax().item())
    images, targets = torch.stack([vit.transform(picture) for picture in pictures]), torch.tensor(targets)

    maps = {
        f"{gradients} gradients": attribute(vit.model, images, targets, "FullGrad+", rules).maps
        for gradients, rules in (("plain", PLAIN), ("Libra", LIBRA))
    }
    figure = heatmaps(pictures, maps, [vit.class_names[target].split(",")[0] for target in targets], size=2)
    figure.savefig(FILE, dpi=90)
    drawn = Image.open(FILE).convert("RGB")
    palette = drawn.quantize(256, Image.Quantize.MAXCOVERAGE)
    drawn.quantize(palette=palette).save(FILE, optimize=True)  # dithered to 256 colours: a third of the bytes


if __name__ == "__main__":
    main()
