"""Strangers' models: nothing in a file makes us run somebody's code or build what the file can't fill."""

import copy
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
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations import hub_kernels

from libragrad_minimal import models
from libragrad_minimal.checkpoints import Damaged
from libragrad_minimal.demo_vits import VITS
from libragrad_minimal.models import LoadedModel, load_demo, load_pretrained
from libragrad_minimal.untrusted import transformers_config

DATA = Path(__file__).resolve().parents[1] / "data"
KINDS = tuple(models.DEMOS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_checkpoint_is_the_one_of_its_card(kind):
    (stated,) = re.findall(r"SHA-256\*\*: `(\w{64})`", (DATA / f"demo_{kind}.md").read_text(encoding="utf-8"))
    assert hashlib.sha256((DATA / f"demo_{kind}.safetensors").read_bytes()).hexdigest() == stated


# ---- the headers of our own checkpoints ------------------------------------------------------------------------------


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


HOSTILE = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**9, 10**30, 0.5, -1.5, 1e300, float("nan"), float("inf"), "", "8",
    "x" * 1000, "owner/kernel", "../../etc/passwd", "\x1b[31m\n\u202e", [], [1, 2], ["a"], {}, {"a": 1}, [[[[]]]],
    10**400,
]  # fmt: skip
NAMES = [
    "attn_implementation",
    "_attn_implementation",
    "auto_map",
    "trust_remote_code",
    "norm_layer",
    "dtype",
    "embed_dim",
]


def spoiled(value, rng: random.Random):
    """A copy in which something, at any depth, is missing, more, or another."""
    if rng.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return rng.choice(HOSTILE)
    changed = copy.copy(value)
    key = rng.choice(list(changed)) if isinstance(changed, dict) else rng.randrange(len(changed))
    what = rng.random()
    if what < 0.15:
        del changed[key]
    elif what < 0.3 and isinstance(changed, dict):
        changed[rng.choice(NAMES)] = rng.choice(HOSTILE)
    elif what < 0.4 and isinstance(changed, list):
        changed.insert(key, rng.choice(HOSTILE))
    else:
        changed[key] = spoiled(changed[key], rng)
    return changed


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


# ---- other people's models -------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch) -> None:
    """The moment at which transformers would fetch a kernel from the hub."""

    def fetched(*names, **options):
        pytest.fail(f"the kernel {names} was asked for")

    for name in ("get_kernel", "lazy_load_kernel", "load_and_register_attn_kernel"):
        monkeypatch.setattr(hub_kernels, name, fetched)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small language model of somebody's, as transformers saves it."""
    folder = tmp_path_factory.mktemp("small")
    config = transformers.LlamaConfig(
        vocab_size=700, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    load_demo("llama").tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def somebodys(small, tmp_path) -> Path:
    return shutil.copytree(small, tmp_path / "small")


def with_settings(folder: Path, **settings) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_a_model_without_wishes_loads(somebodys):
    assert load_pretrained("llama", str(somebodys)).blocks


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "owner/kernel"},
        {"_attn_implementation": "paged|owner/kernel@main:function"},
        {"attn_implementation": {"": "owner/kernel"}},
        {"experts_implementation": "owner/kernel"},
        {"per_layer_config": {"0": {"attn_implementation": "owner/kernel"}}},
        {"quantization_config": {"trust_remote_code": True}},
        {"kernel_config": {"kernel_mapping": {"RMSNorm": "owner/kernel:RMSNorm"}}},
    ],
    ids=str,
)
def test_configs_that_name_code(somebodys, no_kernels, settings):
    with pytest.raises(ValueError) as caught:
        load_pretrained("llama", str(with_settings(somebodys, **settings)))
    assert "somebody's code" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("wish", ["flash_attention_2", "flash_attention_3", "sdpa", "eager"])
def test_a_wish_for_a_library_is_passed_over(somebodys, no_kernels, wish):
    """It would be computed by a kernel of the hub where that library is absent."""
    model = load_pretrained("llama", str(with_settings(somebodys, _attn_implementation=wish))).model
    assert model.config._attn_implementation == (wish if wish == "eager" else "sdpa")


def test_the_cure_that_is_named(somebodys):
    before = (somebodys / "config.json").read_text()
    with pytest.raises(ValueError, match="take that entry out"):
        transformers_config(str(with_settings(somebodys, attn_implementation="owner/kernel")))
    (somebodys / "config.json").write_text(before)
    assert load_pretrained("llama", str(somebodys)).blocks


def test_configs_within(no_kernels, tmp_path):
    """A model of several towers has a config for each."""
    text, vision = {"model_type": "llama", "num_hidden_layers": 1}, {"model_type": "clip_vision_model"}
    config = {
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision | {"attn_implementation": "owner/kernel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision_config.*owner/kernel"):
        transformers_config(str(tmp_path))
    vision["_attn_implementation"] = "flash_attention_2"
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": vision}))
    assert transformers_config(str(tmp_path)).vision_config._attn_implementation is None


@pytest.fixture
def open_clips(tmp_path) -> Path:
    """A folder that holds a small model of open_clip's and its own shape."""
    import open_clip

    shape = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    save_file(dict(open_clip.CLIP(**shape).state_dict()), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    return tmp_path


def with_text_settings(folder: Path, **settings) -> str:
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= settings
    file.write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_an_open_clip_folder(open_clips):
    assert load_pretrained("clip", f"local-dir:{open_clips}").blocks


def test_a_tokenizer_that_wants_code_run(open_clips, monkeypatch):
    opened = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **options: opened.append(options))
    trusting = {"hf_tokenizer_name": "owner/tokenizer", "tokenizer_kwargs": {"trust_remote_code": True}}
    with pytest.raises(ValueError, match="somebody's code.*trust_remote_code"):
        load_pretrained("clip", with_text_settings(open_clips, **trusting))
    assert opened == []


def test_a_text_tower_that_names_a_kernel(open_clips, small, no_kernels, tmp_path):
    tower = with_settings(shutil.copytree(small, tmp_path / "tower"), attn_implementation="owner/kernel")
    with pytest.raises(ValueError, match="somebody's code.*owner/kernel"):
        load_pretrained("clip", with_text_settings(open_clips, hf_model_name=str(tower)))


# ---- damaged configs of other people's models ------------------------------------------------------------------------


def check_spoiled_configs(small: Path, folder: Path, seed: int, count: int) -> int:
    """Each is refused in one sentence, or loads; returns how many were refused."""
    rng, refused = random.Random(seed), 0
    shutil.copytree(small, folder, dirs_exist_ok=True)
    config = json.loads((small / "config.json").read_text())
    for _ in range(count):
        (folder / "config.json").write_text(json.dumps(spoiled(config, rng)))
        started = time.monotonic()
        try:
            assert isinstance(load_pretrained("llama", str(folder)), LoadedModel)
        except (ValueError, OSError) as error:
            refused += 1
            assert len(" ".join(str(error).split())) < 700, str(error)
        assert time.monotonic() - started < 10
    return refused


def test_spoiled_configs(small, tmp_path, no_kernels):
    assert check_spoiled_configs(small, tmp_path, 0, 80) > 20


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_name_on_the_hub(small, tmp_path, monkeypatch, shards):
    """Without a network, from the hub's cache, which doesn't know what else the hub has."""
    repository = tmp_path / "hub" / "models--someone--small"
    snapshot = shutil.copytree(small, repository / "snapshots" / ("0" * 40))
    if shards:
        (snapshot / "model.safetensors").unlink()
        load_pretrained("llama", str(small)).model.save_pretrained(snapshot, max_shard_size="50KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    assert len(list(snapshot.glob("*.safetensors"))) == (1 if not shards else 3)
    assert load_pretrained("llama", "someone/small").blocks
    with_settings(snapshot, num_hidden_layers=3)
    with pytest.raises(ValueError, match="weights of 1 layers"):
        load_pretrained("llama", "someone/small")


@pytest.mark.parametrize("layers", [2, 10**9])
def test_layers_without_weights(somebodys, layers):
    """transformers would make up what is missing."""
    with pytest.raises(ValueError, match=f"weights of 1 .*num_hidden_layers = {layers}"):
        load_pretrained("llama", str(with_settings(somebodys, num_hidden_layers=layers)))
