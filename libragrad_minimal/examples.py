"""Data sets by ordinary loaders, as lists of examples: pictures with their classes and masks, or texts.

A source is written KIND:WHERE, such as imagenet:~/imagenet/val or hub:taesiri/imagenet-hard. Nothing is opened before
it is needed, but what can be known beforehand is checked beforehand: labels, and the sizes of masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .models import LoadedModel
from .pictures import open_file, open_picture
from .scenes import CLASSES, COLOURS, draw_scene
from .sentences import shown

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Example:
    """A picture or a text, not opened yet."""

    name: str
    picture: Callable[[], Image.Image] | None = None
    labels: tuple[int, ...] = ()  # the classes that are right; () if unknown
    mask: Callable[[], np.ndarray] | None = None  # (H, W) bool, the object's pixels
    text: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", shown(self.name))  # of a file it may hold bytes that no table can


@dataclass(frozen=True)
class Classes:
    """The classes that a model tells apart."""

    model: str
    names: Sequence[str]  # of each class, its synonyms joined by ", "; empty where a model has none
    synsets: Sequence[str] = ()  # of ImageNet's classes: n01440764, ...

    def numbered(self, word: str, place: str) -> int:
        """The class that a word names: a synset, a name, or a number."""
        if word in self.synsets:
            return self.synsets.index(word)
        found = self.named(word)
        if found:
            return found[0]
        if word.isdigit() and int(word) < len(self.names):
            return int(word)
        raise ValueError(
            f"{place}: {word!r} is none of the {len(self.names)} classes of {self.model}; folders are named by synset "
            "(n01440764), by class name or by number"
        )

    def named(self, word: str) -> list[int]:
        """The classes that have this word among their synonyms."""
        wanted = word.replace("_", " ").lower()
        return [i for i, name in enumerate(self.names) if wanted in name.lower().split(", ")]

    def checked(self, labels: Iterable[int], place: str) -> tuple[int, ...]:
        labels = tuple(map(int, labels))
        outside = [label for label in labels if not 0 <= label < len(self.names)]
        if outside:
            raise ValueError(
                f"{place} has the label {outside[0]}, but {self.model} has classes 0..{len(self.names) - 1}: the data "
                "set isn't labelled with this model's classes"
            )
        return labels


def classes_of(loaded: LoadedModel) -> Classes:
    """The classes of a "vit"; for a "clip" those of ImageNet, or the phrases of GlyphScenes for the demo."""
    if loaded.kind == "clip" and loaded.name == "demo clip":
        return Classes(loaded.name, PHRASES)
    names = loaded.class_names
    if loaded.kind == "vit" and names is not None and len(names) != 1000:
        return Classes(loaded.name, names)
    if loaded.kind == "vit" and names is None:
        return Classes(loaded.name, [f"class {i}" for i in range(loaded.model.num_classes)])
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return Classes(loaded.name, names or info.label_descriptions(), info.label_names())


PHRASES = [f"a {colour} {thing}" for colour in COLOURS for thing in CLASSES]


# ---- pictures --------------------------------------------------------------------------------------------------------


def folder_of_pictures(where: str, classes: Classes) -> list[Example]:
    """ImageNet's layout: a folder for each class; or one folder of files that begin with a class and "_"."""
    root = existing(where)
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    if folders:
        return [
            Example(f"{folder.name}/{file.name}", partial(open_picture, file), (number,))
            for folder in folders
            for number in [classes.numbered(folder.name, str(root))]
            for file in pictures_in(folder)
        ]
    return [
        Example(file.name, partial(open_picture, file), (classes.numbered(file.stem.split("_")[0], str(file)),))
        for file in pictures_in(root)
    ]


def folder_of_masks(where: str, classes: Classes) -> list[Example]:
    """ImageNet-S's layout: validation/CLASS/x.JPEG and validation-segmentation/CLASS/x.png, whose red + 256 green is
    the number of the class among the folders, from 1 on; 0 is background and 1000 is ignored."""
    root = existing(where)
    pictures, masks = root / "validation", root / "validation-segmentation"
    if not (pictures.is_dir() and masks.is_dir()):
        raise ValueError(f"{root} needs two folders, validation and validation-segmentation, as ImageNet-S has them")
    found = []
    for number, folder in enumerate(sorted(folder for folder in masks.iterdir() if folder.is_dir()), start=1):
        label = classes.numbered(folder.name, str(masks))
        for file in pictures_in(pictures / folder.name):
            mask = folder / f"{file.stem}.png"
            found.append(
                Example(
                    f"{folder.name}/{file.name}", partial(open_picture, file), (label,), partial(coded, mask, number)
                )
            )
            same_size(file, mask)
    return found


def coded(mask: Path, number: int) -> np.ndarray:
    colours = np.asarray(open_file(mask).convert("RGB"), dtype=int)
    return colours[..., 0] + 256 * colours[..., 1] == number


def listed_objects(where: str, classes: Classes) -> list[Example]:
    """A folder with objects.json: a list of {"picture": file, "mask": file, "imagenet_class": number}."""
    root = existing(where)
    try:
        listed = json.loads((root / "objects.json").read_text(encoding="utf-8"))
        files = [(root / entry["picture"], root / entry["mask"], entry["imagenet_class"]) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        form = '{"picture": ..., "mask": ..., "imagenet_class": ...}'
        raise ValueError(f"{root} needs a file objects.json, a list of {form}: {error}") from error
    for picture, mask, _ in files:
        same_size(picture, mask)
    return [
        Example(
            picture.name,
            partial(open_picture, picture),
            classes.checked([label], str(root)),
            partial(not_black, mask),
        )
        for picture, mask, label in files
    ]


def not_black(mask: Path) -> np.ndarray:
    return np.asarray(open_file(mask).convert("L")) > 0


def pets(where: str, classes: Classes) -> list[Example]:
    """Oxford-IIIT Pet with its trimaps, by torchvision; the pet and its border are the object."""
    from torchvision.datasets import OxfordIIITPet

    root = existing(where)
    try:
        data = OxfordIIITPet(root, split="test", target_types=["category", "segmentation"], download=False)
    except RuntimeError as error:
        raise ValueError(f"{root} holds no oxford-iiit-pet folder, as torchvision downloads it: {error}") from error
    found = []
    for file, mask, breed in zip(data._images, data._segs, data._labels, strict=True):
        same_size(file, mask)
        kind = "cat" if Path(file).name[0].isupper() else "dog"  # that is how the data set tells them apart
        name = data.classes[breed]
        labels = (breed,) if len(classes.names) == len(data.classes) else pet_labels(name, kind, classes)
        found.append(Example(Path(file).name, partial(open_picture, file), labels, partial(not_background, mask)))
    return found


def not_background(trimap: Path) -> np.ndarray:
    return np.asarray(open_file(trimap)) != 2


def pet_labels(breed: str, kind: str, classes: Classes) -> tuple[int, ...]:
    """ImageNet's class of a breed, or all cats or dogs where it has none of that name."""
    if len(classes.names) != 1000:
        return ()
    return tuple(classes.named(breed) or classes.named(f"{breed} {kind}") or imagenet_classes(kind))


def coco(where: str, classes: Classes) -> list[Example]:
    """COCO by pycocotools: WHERE is annotations/instances_SET.json, beside whose folder the pictures lie in SET/.

    The object is the category of a picture that covers most of it, among those for which ImageNet has classes."""
    from pycocotools.coco import COCO

    file = Path(where).expanduser()
    pictures = file.parent.parent / file.stem.removeprefix("instances_")
    if not file.is_file() or not pictures.is_dir():
        raise ValueError(f"COCO needs {file} and the folder {pictures}, as its archives unpack")
    data = quietly(COCO, file)
    names = {category["id"]: category["name"] for category in data.loadCats(data.getCatIds())}
    found = []
    for picture in data.loadImgs(sorted(data.getImgIds())):
        objects = data.loadAnns(data.getAnnIds(imgIds=picture["id"], iscrowd=False))
        areas: dict[str, float] = {}
        for one in objects:
            if imagenet_classes(names[one["category_id"]]):
                areas[names[one["category_id"]]] = areas.get(names[one["category_id"]], 0) + one["area"]
        if not areas:
            continue
        largest = max(areas, key=lambda name: areas[name])
        shapes = [one for one in objects if names[one["category_id"]] == largest]
        labels = classes.checked(imagenet_classes(largest), str(file))
        path = pictures / picture["file_name"]
        found.append(Example(path.name, partial(open_picture, path), labels, partial(outlined, data, shapes)))
    return found


def outlined(data: Any, shapes: list[dict]) -> np.ndarray:
    return np.any([data.annToMask(one) for one in shapes], axis=0)


def quietly(make: Callable, file: Path) -> Any:
    """pycocotools prints how long it took."""
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()):
        return make(str(file))


# COCO's categories by the numbers of ImageNet's classes that show the same thing; read off both lists of names.
COCO_AS_IMAGENET = {
    "bicycle": "444 671", "car": "436 468 479 511 609 627 656 661 751 817", "motorcycle": "665 670",
    "airplane": "404 895", "bus": "654 779 874", "train": "466 547 565 705 820 829", "truck": "555 569 675 717 864 867",
    "boat": "472 484 510 554 576 625 628 724 780 814 871 914", "traffic light": "920", "stop sign": "919",
    "parking meter": "704", "bench": "703", "bird": "7-24 80-100 127-146", "cat": "281-285", "dog": "151-268 273-275",
    "horse": "339", "sheep": "348 349", "cow": "345-347", "elephant": "385 386", "bear": "294-297", "zebra": "340",
    "backpack": "414", "umbrella": "879", "tie": "457 906", "skis": "795", "bottle": "440 737 898 907",
    "cup": "504 968", "spoon": "910", "bowl": "659 809", "banana": "954", "orange": "950", "broccoli": "937",
    "hot dog": "934", "pizza": "963", "chair": "423 559 765 857", "couch": "831", "potted plant": "738",
    "bed": "520 564 750", "dining table": "532", "toilet": "861", "tv": "664 782 851", "laptop": "620 681",
    "mouse": "673", "remote": "761", "keyboard": "508 878", "cell phone": "487", "microwave": "651", "toaster": "859",
    "refrigerator": "760", "clock": "409 530 604 892", "vase": "883", "teddy bear": "850", "hair drier": "589",
}  # fmt: skip


def imagenet_classes(category: str) -> tuple[int, ...]:
    spans = (part.partition("-") for part in COCO_AS_IMAGENET.get(category, "").split())
    return tuple(number for first, _, last in spans for number in range(int(first), int(last or first) + 1))


def mura(where: str, classes: Classes) -> list[Example]:
    """MURA's layout: XR_PART/patient.../study1_positive/image1.png; class 1 is positive."""
    root = existing(where)
    if len(classes.names) != 2:
        raise ValueError(f"MURA has two classes, negative and positive; {classes.model} has {len(classes.names)}")
    files = sorted(file for file in root.glob("XR_*/*/study*/*") if file.suffix.lower() in SUFFIXES)
    return [
        Example(str(file.relative_to(root)), partial(open_picture, file), (int(file.parent.name.endswith("positive")),))
        for file in files
    ]


def glyph_scenes(where: str, classes: Classes) -> list[Example]:
    """As many GlyphScenes with two objects, of seeds that training never saw; the object is the first."""
    phrases = len(classes.names) == len(PHRASES)
    if not phrases and list(classes.names) != list(CLASSES):
        raise ValueError(f"{classes.model} doesn't know the glyphs of GlyphScenes; take a demo model")
    found = []
    for seed in range(whole_number(where, "scenes")):
        scene = draw_scene(seed, objects=2)
        label = int(scene.colours[0] * phrases * len(CLASSES) + scene.classes[0])
        picture, mask = partial(Image.fromarray, scene.image), partial(np.asarray, scene.masks[0])
        found.append(Example(f"scene {seed}", picture, (label,), mask))
    return found


def hub_pictures(where: str, classes: Classes) -> list[Example]:
    """A data set of the Hugging Face hub, or a folder that `datasets` reads: its columns image and label."""
    data = from_hub(where)
    columns = set(data.column_names)
    if "image" not in columns:
        raise ValueError(f"{where} has no column image; its columns are {', '.join(sorted(columns))}")
    from datasets import Image as Encoded

    undecoded = data.cast_column("image", Encoded(decode=False))
    kept = data.remove_columns([name for name in columns if name not in ("label", "labels")])

    def picture(row: int) -> Image.Image:
        stored = undecoded[row]["image"]
        return open_picture(stored["bytes"] if stored["bytes"] is not None else stored["path"])

    found = []
    for row in range(len(data)):
        label = kept[row].get("label", kept[row].get("labels"))
        labels = () if label is None else label if isinstance(label, list) else (label,)
        found.append(Example(f"row {row}", partial(picture, row), classes.checked(labels, f"{where}, row {row},")))
    return found


# ---- texts -----------------------------------------------------------------------------------------------------------


def hub_texts(where: str) -> list[Example]:
    """The column text (or prompt, or sentence) of a data set of the hub, or of files that `datasets` reads."""
    data = from_hub(where)
    column = next((name for name in ("text", "prompt", "sentence") if name in data.column_names), None)
    if column is None:
        raise ValueError(f"{where} has no column text, prompt or sentence; it has {', '.join(data.column_names)}")
    return [Example(f"row {row}", text=str(text)) for row, text in enumerate(data[column])]


def file_of_texts(where: str) -> list[Example]:
    """A .json list of texts, or of objects with "prompt" or "text"; any other file holds a text a line."""
    file = Path(where).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    content = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        return [Example(f"line {i}", text=line) for i, line in enumerate(content.splitlines(), 1) if line.strip()]
    try:
        entries = json.loads(content)
        texts = [entry if isinstance(entry, str) else entry.get("prompt", entry.get("text")) for entry in entries]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'{file} is no list of texts, or of objects with "prompt" or "text": {error}') from error
    return [Example(f"entry {i}", text=text) for i, text in enumerate(texts)]


def from_hub(where: str) -> Any:
    """NAME, NAME/CONFIG or either with @SPLIT (default: its test, validation or only split)."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    name, _, split = where.partition("@")
    local = Path(name).expanduser()
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            data = load_from_disk(str(local))
        elif local.is_file():
            kind = {".jsonl": "json", ".txt": "text"}.get(local.suffix, local.suffix.lstrip("."))
            data = load_dataset(kind, data_files=str(local))
        else:
            owner, _, rest = name.partition("/")
            named, _, config = rest.partition("/")
            data = load_dataset("/".join(filter(None, (owner, named))), config or None)
    except Exception as error:  # whatever the hub, the network or a file raises
        raise ValueError(
            f"{where} can't be loaded by Hugging Face's datasets: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(data, DatasetDict):
        return data
    chosen = split or next((name for name in ("test", "validation") if name in data), next(iter(data)))
    if chosen not in data:
        raise ValueError(f"{name} has no split {chosen!r}; it has {', '.join(data)}")
    return data[chosen]


# ---- all of them -----------------------------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[str, Classes], list[Example]]] = {
    "imagenet": folder_of_pictures,
    "imagenet-s": folder_of_masks,
    "objects": listed_objects,
    "pets": pets,
    "coco": coco,
    "mura": mura,
    "scenes": glyph_scenes,
    "hub": hub_pictures,
}
TEXTS: dict[str, Callable[[str], list[Example]]] = {"texts": file_of_texts, "hub": hub_texts}


def open_data(source: str, loaded: LoadedModel) -> list[Example]:
    """The examples of a data set, in an order that doesn't change.

    Args:
        source: KIND:WHERE; kinds are the keys of PICTURES, for a language model of TEXTS.
        loaded: the model that is to see them, for its classes.
    Raises:
        ValueError: an unknown kind, nothing there, labels that aren't the model's, masks of another size.
    """
    kind, _, where = source.partition(":")
    kinds = TEXTS if loaded.kind == "llama" else PICTURES
    if kind not in kinds or not where:
        raise ValueError(f"can't read {source!r} for {loaded.name}: write KIND:WHERE, KIND one of {', '.join(kinds)}")
    found = TEXTS[kind](where) if loaded.kind == "llama" else PICTURES[kind](where, classes_of(loaded))
    if not found:
        raise ValueError(f"{source} holds no {'texts' if loaded.kind == 'llama' else 'pictures'}")
    return found


def existing(where: str) -> Path:
    root = Path(where).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    return root


def pictures_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def same_size(picture: Path, mask: Path) -> None:
    """Files that are missing or damaged are no matter of sizes: they are told of when they are opened."""
    try:
        sizes = [open_file(file).size for file in (picture, mask)]
    except (OSError, UnidentifiedImageError):
        return
    if sizes[0] != sizes[1]:
        of_picture, of_mask = (" x ".join(map(str, size)) for size in sizes)
        raise ValueError(f"{mask} has {of_mask} pixels and its picture {of_picture}: masks must lie on their pictures")


def whole_number(text: str, what: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise ValueError(f"how many {what}? Write a number, such as {what}:200, not {text!r}")
    return int(text)
