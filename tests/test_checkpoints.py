"""Our own checkpoints: one that is missing, damaged or spoiled is refused in one sentence that has the cure."""

import hashlib
import json
import random
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spoiled import spoiled

from libragrad_minimal import models
from libragrad_minimal.checkpoints import Damaged
from libragrad_minimal.demo_vits import VITS
from libragrad_minimal.models import LoadedModel, load_demo

DATA = Path(__file__).resolve().parents[1] / "data"


KINDS = tuple(models.DEMOS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_checkpoint_is_the_one_of_its_card(kind):
    (stated,) = re.findall(r"SHA-256\*\*: `(\w{64})`", (DATA / f"demo_{kind}.md").read_text(encoding="utf-8"))
    assert hashlib.sha256((DATA / f"demo_{kind}.safetensors").read_bytes()).hexdigest() == stated


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A copy of the demo ViT's file that a test may damage."""
    path = tmp_path / "demo_vit.safetensors"
    shutil.copy(models.DATA / path.name, path)
    monkeypatch.setattr(models, "DATA", tmp_path)
    return path


def assert_load_fails(error, path, reason):
    with pytest.raises(error) as caught:
        load_demo("vit")
    message = str(caught.value)
    assert str(path) in message and reason in message
    assert "python data/train_vits.py vit`" in message and "git checkout -- data/demo_vit.safetensors" in message


def test_missing_checkpoint(checkpoint):
    checkpoint.unlink()
    assert_load_fails(FileNotFoundError, checkpoint, "missing")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1000])
def test_truncated_checkpoint(checkpoint, kept):
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    assert_load_fails(ValueError, checkpoint, "can't be read as safetensors")


def test_checkpoint_of_another_shape(checkpoint):
    with safe_open(checkpoint, "pt") as file:
        header = file.metadata()
    tensors = load_file(checkpoint)
    save_file({**tensors, "head.weight": tensors["head.weight"][:5].clone()}, checkpoint, header)
    assert_load_fails(ValueError, checkpoint, "don't fit")


@pytest.mark.parametrize("header", [None, {"architecture": "{"}])
def test_checkpoint_with_a_useless_header(checkpoint, header):
    save_file(load_file(checkpoint), checkpoint, header)
    assert_load_fails(ValueError, checkpoint, "architecture")


def test_checkpoint_with_broken_numbers(checkpoint):
    with safe_open(checkpoint, "pt") as file:
        header = file.metadata()
    tensors = load_file(checkpoint)
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, checkpoint, header)
    assert_load_fails(ValueError, checkpoint, "norm.weight")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where load_demo looks."""
    monkeypatch.setattr(models, "DATA", tmp_path)
    return tmp_path


def stored(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = DATA / f"demo_{kind}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), dict(sorted(file.metadata().items()))  # which come in any order


def loaded_or_refused(kind: str, path: Path) -> LoadedModel | None:
    """None if it was refused, in one sentence and at once."""
    started = time.monotonic()
    try:
        loaded = load_demo(kind)
    except ValueError as error:
        text = str(error)
        assert type(error) is Damaged and text.startswith(f"{path} is damaged: ")
        assert f"git checkout -- data/demo_{kind}.safetensors" in text
        assert text.isprintable() and len(text) < 400 + 2 * len(str(path)), text
        return None
    finally:
        assert time.monotonic() - started < 5
    return loaded


def check_spoiled_headers(kind: str, folder: Path, seed: int, count: int) -> int:
    """Each is refused in one sentence or gives a model that works; how many were. For a night: raise `count`."""
    rng, path, refused = random.Random(f"{kind} {seed}"), folder / f"demo_{kind}.safetensors", 0
    tensors, header = stored(kind)
    save_file(tensors, path, header)
    assert load_demo(kind).blocks  # and what takes seconds is imported
    for _ in range(count):
        changed = dict(header)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(list(header))
            changed[key] = json.dumps(spoiled(json.loads(header[key]), rng))
            if rng.random() < 0.15:
                cut = rng.randrange(len(changed[key]))
                changed[key] = rng.choice([changed[key][:cut], "[" * 10**5, '{"a":' * 10**4, "", "\0", "1" * 5000])
        save_file(tensors, path, changed)
        loaded = loaded_or_refused(kind, path)
        if loaded is None:
            refused += 1
        elif kind == "llama":
            ids = loaded.tokenizer("Mary has a kite.", return_tensors="pt")["input_ids"]
            assert loaded.model(ids).logits.isfinite().all()
        else:
            assert all(isinstance(name, str) for name in loaded.class_names or [])
    return refused


@pytest.mark.parametrize(
    ("kind", "count"), [("clip", 30), ("llama", 150), *((family, 150 if family == "vit" else 20) for family in VITS)]
)
def test_spoiled_headers(kind, count, folder):
    assert check_spoiled_headers(kind, folder, 0, count) > 0.5 * count


def check_damaged_files(kind: str, folder: Path, seed: int, count: int) -> int:
    """The bytes of the format itself: its length, its index of tensors, and what follows."""
    rng, path, refused = random.Random(f"{kind} {seed}"), folder / f"demo_{kind}.safetensors", 0
    whole = (DATA / path.name).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    path.write_bytes(whole)
    assert load_demo(kind).blocks
    for _ in range(count):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(rng.choice((8, end, end)))
            content[place] = rng.choice((0, 0x20, 0x22, 0x30, 0x39, 0x7D, 0xFF, rng.randrange(256)))
        if rng.random() < 0.1:
            content = content[: rng.randrange(len(content))]
        path.write_bytes(content)
        refused += loaded_or_refused(kind, path) is None
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, folder):
    count = 40 if kind in ("vit", "clip", "llama") else 12
    assert check_damaged_files(kind, folder, 0, count) > 0.25 * count


@pytest.mark.parametrize(
    ("kind", "key", "change"),
    [
        ("vit", "architecture", {"depth": 10**9}),
        ("vit", "architecture", {"embed_dim": 10**7}),
        ("vit", "architecture", {"img_size": 10**6}),
        ("vit", "architecture", {"num_classes": 10**9}),
        ("eva02", "architecture", {"depth": 10**9}),
        ("mixer", "architecture", {"num_blocks": 10**9}),
        ("clip", "architecture", {"embed_dim": 10**9}),
        ("llama", "config", {"num_hidden_layers": 10**9}),
        ("llama", "config", {"hidden_size": 10**7}),
        ("llama", "config", {"head_dim": 10**9}),
        ("llama", "config", {"vocab_size": 10**10}),
    ],
)
def test_no_model_is_built_that_the_tensors_cannot_fill(kind, key, change, folder, monkeypatch):
    tensors, header = stored(kind)
    path = folder / f"demo_{kind}.safetensors"
    save_file(tensors, path, header)
    assert load_demo(kind).blocks
    save_file(tensors, path, header | {key: json.dumps(json.loads(header[key]) | change)})
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *args, **options: pytest.fail("a model was being built"))
    with pytest.raises(Damaged, match=f"don't fit.* {next(iter(change))} = 10"):
        load_demo(kind)


@pytest.mark.parametrize("family", VITS)
@pytest.mark.parametrize("more", [{"class": "Beit"}, {"block_fn": "os.system"}, {"norm_layer": "torch.load"}])
def test_a_header_names_no_class(family, more, folder):
    """What is built follows from the name that was asked for alone."""
    tensors, header = stored(family)
    changed = json.dumps(json.loads(header["architecture"]) | more)
    save_file(tensors, folder / f"demo_{family}.safetensors", header | {"architecture": changed})
    with pytest.raises(Damaged, match=f"has an entry '{next(iter(more))}' that isn't known"):
        load_demo(family)


def test_one_family_under_the_name_of_another(folder):
    tensors, header = stored("deit3")
    save_file(tensors, folder / "demo_vit.safetensors", header)
    with pytest.raises(Damaged, match="don't fit the model it describes"):
        load_demo("vit")


def test_a_tokenizer_that_panics(folder):
    """Its library is Rust's, and raises what is no Exception."""
    tensors, header = stored("llama")
    tokenizer = json.loads(header["tokenizer"])
    tokenizer["post_processor"]["special_tokens"] = {}
    path = folder / "demo_llama.safetensors"
    save_file(tensors, path, header | {"tokenizer": json.dumps(tokenizer)})
    assert loaded_or_refused("llama", path) is None


@pytest.mark.parametrize("tensors", [{}, {"head.weight": torch.ones(3)}, {"head.weight": torch.ones(0, 9)}])
def test_tensors_that_are_no_model(tensors, folder):
    for kind in KINDS:
        path = folder / f"demo_{kind}.safetensors"
        save_file(tensors, path, stored(kind)[1])
        assert loaded_or_refused(kind, path) is None


def test_integers_are_no_weights(folder):
    tensors, header = stored("vit")
    save_file(tensors | {"norm.bias": torch.zeros(128, dtype=torch.int64)}, folder / "demo_vit.safetensors", header)
    with pytest.raises(Damaged, match="norm.bias holds torch.int64"):
        load_demo("vit")
