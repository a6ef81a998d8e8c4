"""Draw notebook 03's picture of a real model: an ImageNet ViT-Tiny on collages of scikit-image's photographs.

python data/vit_tiny_classes.py    # writes data/vit_tiny_classes.png
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


def main() -> None:
    vit = load_pretrained("vit", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    collage = draw_collage(1, ["cat", "coffee"])
    targets = torch.cat([vit.model(vit.transform(photograph(name))[None]).argmax(1) for name in collage.names])
    images = vit.transform(collage.image).expand(2, -1, -1, -1)
    maps = {
        f"{gradients} {method}": attribute(vit.model, images, targets, method, rules).maps
        for gradients, rules in (("plain", PLAIN), ("Libra", LIBRA))
        for method in ("IxG", "FullGrad+")
    }
    names = [vit.class_names[target].split(",")[0] for target in targets]
    heatmaps([collage.image] * 2, maps, names, size=1.05).savefig(FILE, dpi=100)
    drawn = Image.open(FILE).convert("RGB")
    drawn.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(FILE, optimize=True)


if __name__ == "__main__":
    main()
