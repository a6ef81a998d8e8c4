"""Data sets in every layout that is promised, each a tiny folder of the same format made here."""

import json

import numpy as np
import pytest
from PIL import Image

from libragrad_minimal.examples import COCO_AS_IMAGENET, Classes, classes_of, imagenet_classes, open_data
from libragrad_minimal.models import LoadedModel, load_demo

TENCH, GOLDFISH = "n01440764", "n01443537"  # ImageNet's first two classes


class Named:
    num_classes = 1000


@pytest.fixture(scope="module")
def imagenet_model() -> LoadedModel:
    from timm.data import ImageNetInfo

    return LoadedModel("vit", "an ImageNet model", Named(), [], class_names=ImageNetInfo().label_descriptions())


def paint(file, size=(32, 24), colour=(200, 30, 30), mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)
    return file


def square_mask(file, value, size=(32, 24), background=0):
    """A picture file of `background` with `value` in its left half."""
    pixels = np.full((size[1], size[0], *np.shape(value)), background, dtype=np.uint8)
    pixels[:, : size[0] // 2] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


LEFT_HALF = np.arange(32)[None, :].repeat(24, 0) < 16


def test_imagenet_folders(tmp_path, imagenet_model):
    paint(tmp_path / TENCH / "a.JPEG")
    paint(tmp_path / GOLDFISH / "b.png")
    (tmp_path / GOLDFISH / "notes.txt").write_text("no picture")
    found = open_data(f"imagenet:{tmp_path}", imagenet_model)
    assert [(example.name, example.labels) for example in found] == [
        (f"{TENCH}/a.JPEG", (0,)),
        (f"{GOLDFISH}/b.png", (1,)),
    ]
    assert found[0].picture().size == (32, 24)


def test_flat_folder_of_named_files(tmp_path, imagenet_model):
    paint(tmp_path / f"{GOLDFISH}_goldfish.jpg")
    assert [example.labels for example in open_data(f"imagenet:{tmp_path}", imagenet_model)] == [(1,)]


def test_folders_by_class_name_and_number(tmp_path):
    paint(tmp_path / "cat" / "a.png")
    paint(tmp_path / "7" / "b.png")
    vit = load_demo("vit")
    assert {example.labels[0] for example in open_data(f"imagenet:{tmp_path}", vit)} == {
        7,
        vit.class_names.index("cat"),
    }


def test_folder_that_names_no_class(tmp_path, imagenet_model):
    paint(tmp_path / "griffin" / "a.png")
    with pytest.raises(ValueError, match="'griffin' is none of the 1000 classes of an ImageNet model"):
        open_data(f"imagenet:{tmp_path}", imagenet_model)


def test_no_pictures(tmp_path, imagenet_model):
    with pytest.raises(ValueError, match="holds no pictures"):
        open_data(f"imagenet:{tmp_path}", imagenet_model)
    with pytest.raises(ValueError, match="there is no folder"):
        open_data(f"imagenet:{tmp_path / 'nowhere'}", imagenet_model)


@pytest.mark.parametrize("source", ["imagenet", "imagenet:", "photos:here", ""])
def test_source_that_is_none(source, imagenet_model):
    with pytest.raises(ValueError, match="write KIND:WHERE"):
        open_data(source, imagenet_model)


def test_imagenet_s(tmp_path, imagenet_model):
    """Red + 256 green is the class's number, 1000 (232 + 3 x 256) is ignored."""
    for number, synset in enumerate((TENCH, GOLDFISH), start=1):
        paint(tmp_path / "validation" / synset / "x.JPEG")
        square_mask(tmp_path / "validation-segmentation" / synset / "x.png", (number, 0, 0), background=(232, 3, 0))
    found = open_data(f"imagenet-s:{tmp_path}", imagenet_model)
    assert [example.labels for example in found] == [(0,), (1,)]
    for example in found:
        assert (example.mask() == LEFT_HALF).all()


def test_objects(tmp_path, imagenet_model):
    paint(tmp_path / "a.jpg")
    square_mask(tmp_path / "a.png", 255)
    entry = {"picture": "a.jpg", "mask": "a.png", "imagenet_class": 281}
    (tmp_path / "objects.json").write_text(json.dumps([entry]))
    (example,) = open_data(f"objects:{tmp_path}", imagenet_model)
    assert example.labels == (281,) and (example.mask() == LEFT_HALF).all()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"picture": "a.jpg", "mask": "wide.png", "imagenet_class": 1}, "40 x 24 pixels and its picture 32 x 24"),
        ({"picture": "a.jpg", "mask": "a.png", "imagenet_class": 1000}, "has the label 1000"),
        ({"picture": "a.jpg"}, "needs a file objects.json"),
    ],
)
def test_objects_that_do_not_fit(entry, message, tmp_path, imagenet_model):
    paint(tmp_path / "a.jpg")
    square_mask(tmp_path / "a.png", 255)
    square_mask(tmp_path / "wide.png", 255, size=(40, 24))
    (tmp_path / "objects.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=message):
        open_data(f"objects:{tmp_path}", imagenet_model)


def test_pets(tmp_path, imagenet_model):
    """torchvision's own loader; 1 is the pet, 2 background, 3 the border. Cats' names begin with a capital."""
    root = tmp_path / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "beagle_1"):
        paint(root / "images" / f"{name}.jpg")
        square_mask(root / "annotations" / "trimaps" / f"{name}.png", 1, background=2)
    (root / "annotations" / "test.txt").write_text("Abyssinian_1 1 1 1\nbeagle_1 2 2 1\n")
    found = open_data(f"pets:{tmp_path}", imagenet_model)
    assert [example.labels for example in found] == [(281, 282, 283, 284, 285), (162,)]  # any cat; ImageNet's beagle
    assert (found[0].mask() == LEFT_HALF).all()


def test_coco(tmp_path, imagenet_model):
    """The category that covers most, among those that ImageNet has; persons aren't."""
    paint(tmp_path / "val" / "1.jpg")
    paint(tmp_path / "val" / "2.jpg")

    def polygon(width):
        return [[0, 0, width, 0, width, 24, 0, 24]]

    def shape(number, picture, category, width):
        outline = {"segmentation": polygon(width), "area": 24 * width, "bbox": [0, 0, width, 24], "iscrowd": 0}
        return {"id": number, "image_id": picture, "category_id": category} | outline

    sizes = {"height": 24, "width": 32}
    annotations = {
        "images": [{"id": 1, "file_name": "1.jpg"} | sizes, {"id": 2, "file_name": "2.jpg"} | sizes],
        "categories": [{"id": 1, "name": "person"}, {"id": 24, "name": "zebra"}, {"id": 17, "name": "cat"}],
        "annotations": [shape(1, 1, 1, 32), shape(2, 1, 24, 16), shape(3, 1, 17, 8), shape(4, 2, 1, 16)],
    }
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(json.dumps(annotations))
    (example,) = open_data(f"coco:{file}", imagenet_model)
    assert example.name == "1.jpg" and example.labels == (340,)
    assert (example.mask() == LEFT_HALF).all()


def test_categories_of_coco_are_the_same_things_in_imagenet():
    """Spot checks by the names of ImageNet's classes, which timm knows."""
    from timm.data import ImageNetInfo

    names = ImageNetInfo().label_descriptions()
    expected = {"dog": "terrier", "cat": "cat", "elephant": "elephant", "bear": "bear", "pizza": "pizza", "bus": "bus"}
    expected |= {"airplane": "plane", "broccoli": "broccoli", "umbrella": "umbrella", "clock": "clock", "car": "car"}
    for category, word in expected.items():
        assert any(word in names[number].lower() for number in imagenet_classes(category)), category
    numbers = [number for category in COCO_AS_IMAGENET for number in imagenet_classes(category)]
    assert 0 <= min(numbers) <= max(numbers) < 1000


def test_mura(tmp_path):
    paint(tmp_path / "XR_WRIST" / "patient1" / "study1_positive" / "image1.png", colour=90, mode="L")
    paint(tmp_path / "XR_WRIST" / "patient2" / "study1_negative" / "image1.png", colour=90, mode="L")
    two = LoadedModel("vit", "two classes", Named(), [], class_names=["negative", "positive"])
    found = open_data(f"mura:{tmp_path}", two)
    assert [example.labels for example in found] == [(1,), (0,)]
    assert found[0].picture().mode == "RGB"
    with pytest.raises(ValueError, match="MURA has two classes"):
        open_data(f"mura:{tmp_path}", load_demo("vit"))


def test_pictures_of_the_hub(tmp_path, imagenet_model):
    """ImageNet-Hard's columns: image, and a list of right labels."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Encoded

    file = str(paint(tmp_path / "a.png"))
    features = Features({"image": Encoded(), "label": List(Value("int64"))})
    Dataset.from_dict({"image": [file], "label": [[3, 4]]}, features=features).save_to_disk(tmp_path / "hard")
    (example,) = open_data(f"hub:{tmp_path / 'hard'}", imagenet_model)
    assert example.labels == (3, 4) and example.picture().size == (32, 24)
    with pytest.raises(ValueError, match="can't be loaded"):
        open_data("hub:nobody/nothing-of-this-name", imagenet_model)


def test_scenes_know_their_object():
    vit, clip = load_demo("vit"), load_demo("clip")
    (picture,), (phrase,) = open_data("scenes:1", vit), open_data("scenes:1", clip)
    assert vit.class_names[picture.labels[0]] in classes_of(clip).names[phrase.labels[0]]
    assert picture.mask().any()
    with pytest.raises(ValueError, match="how many scenes"):
        open_data("scenes:some", vit)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '["One two three.", {"prompt": "Four five."}]'),
        ("a.txt", "One two three.\n\nFour five.\n"),
        ("a.jsonl", '{"text": "One two three."}\n{"text": "Four five."}\n'),
        ("a.csv", "text\nOne two three.\nFour five.\n"),
    ],
)
def test_texts(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    kind = "hub" if name.endswith(("jsonl", "csv")) else "texts"
    found = open_data(f"{kind}:{tmp_path / name}", load_demo("llama"))
    assert [example.text for example in found] == ["One two three.", "Four five."]


def test_classes_by_any_of_their_synonyms():
    classes = Classes("m", ["tabby, tabby cat", "hotdog, hot dog"])
    assert classes.numbered("hot_dog", "here") == 1 and classes.named("cat") == []
