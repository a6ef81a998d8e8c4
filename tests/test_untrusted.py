"""Strangers' models: nothing in a file makes us run somebody's code or build what the file can't fill."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from spoiled import spoiled
from transformers.integrations import hub_kernels

from libragrad_minimal.models import LoadedModel, load_demo, load_pretrained
from libragrad_minimal.untrusted import transformers_config


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


@pytest.mark.parametrize(
    ("tower", "sizes"),
    [
        ("text_cfg", {"layers": 10**9}),
        ("vision_cfg", {"layers": 900, "width": 4096}),
        ("text_cfg", {"width": 10**7}),
        ("text_cfg", {"vocab_size": 10**9}),
        ("text_cfg", {"context_length": 10**9}),
        ("vision_cfg", {"image_size": 10**6}),
        ("vision_cfg", {"mlp_ratio": 1e6}),
    ],
    ids=str,
)
def test_towers_that_the_weights_cannot_fill(open_clips, tower, sizes, monkeypatch):
    """open_clip would build them, and then find that the weights don't fit."""
    import open_clip

    file = open_clips / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][tower] |= sizes
    file.write_text(json.dumps(config))
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *a, **b: pytest.fail("built"))
    with pytest.raises(ValueError, match="its config describes .* weights|no model has over 1000"):
        load_pretrained("clip", f"local-dir:{open_clips}")


VIT_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(params=["local-dir", "hf-hub"])
def somebodys_vit(request, tmp_path, monkeypatch) -> tuple[str, Path]:
    """A small ViT of timm's that holds its own shape, in a folder or in the hub's cache: its name and its place."""
    place = tmp_path / "vit"
    if request.param == "hf-hub":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        kept = tmp_path / "models--owner--vit"
        place = kept / "snapshots" / ("0" * 40)
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("0" * 40)
    place.mkdir(parents=True)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT_SIZES).state_dict(), weights_of(place))
    with_vit_settings(place)
    return f"{request.param}:{'owner/vit' if request.param == 'hf-hub' else place}", place


def weights_of(place: Path) -> Path:
    return place / "pytorch_model.bin"


def with_vit_settings(place: Path, **settings) -> None:
    about = {
        "input_size": [3, 32, 32],
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": about}
    (place / "config.json").write_text(json.dumps(config | {"model_args": VIT_SIZES | settings}))


def test_a_vit_that_holds_its_own_shape(somebodys_vit):
    assert load_pretrained("vit", somebodys_vit[0]).grid == (4, 4)


@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dim": 240_000},
        {"depth": 10**7},
        {"depth": 900, "embed_dim": 4096},
        {"img_size": 10**6},
        {"mlp_ratio": 1e6},
    ],
    ids=str,
)
def test_a_vit_that_its_weights_cannot_fill(somebodys_vit, sizes):
    name, place = somebodys_vit
    with_vit_settings(place, **sizes)
    with pytest.raises(ValueError, match="its config describes .* weights|no model has over 1000"):
        load_pretrained("vit", name)


@pytest.mark.parametrize("text", ["", "[]", '{"architecture": "nothing"}', '{"architecture": 7, "model_args": []}'])
def test_a_vit_with_a_damaged_config(somebodys_vit, text):
    name, place = somebodys_vit
    (place / "config.json").write_text(text)
    with pytest.raises(ValueError, match="has a config that can't be used: .") as caught:
        load_pretrained("vit", name)
    assert str(caught.value).count("\n") == 0


class Told:
    """What a pickle runs when it is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("elsewhere", [{}, {"hf_hub_filename": "other.bin"}], ids=["usual name", "another name"])
def test_weights_that_would_run_code(somebodys_vit, elsewhere, tmp_path):
    """Under timm 1.0.20 all but the usual name of a hub ran it, when nothing forbade it."""
    name, place = somebodys_vit
    torch.save({"state_dict": Told(tmp_path / "ran"), "weights": torch.randn(20_000)}, weights_of(place))
    weights_of(place).rename(place / elsewhere.get("hf_hub_filename", weights_of(place).name))
    config = json.loads((place / "config.json").read_text())
    config["pretrained_cfg"] |= elsewhere
    (place / "config.json").write_text(json.dumps(config))
    before = dict(os.environ)
    with pytest.raises(ValueError, match="more than tensors.*safetensors"):
        load_pretrained("vit", name)
    assert not (tmp_path / "ran").exists() and dict(os.environ) == before


@pytest.mark.parametrize("damaged", [b"", b"\x80\x02", b"PK\x03\x04 no zip", b"a text"])
def test_weights_that_are_none(somebodys_vit, damaged):
    name, place = somebodys_vit
    weights_of(place).write_bytes(damaged + bytes(200_000 * bool(damaged)))
    with pytest.raises(ValueError, match="damaged|can't be loaded|0 bytes") as caught:
        load_pretrained("vit", name)
    assert "more than tensors" not in str(caught.value) and "\n" not in str(caught.value)


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


@pytest.mark.parametrize(
    "sizes",
    [
        {"head_dim": 10**6},
        {"num_key_value_heads": 10**6},
        {"hidden_size": 2**20, "intermediate_size": 2**24},
        {"vocab_size": 10**8},
        {"model_type": "mixtral", "num_local_experts": 10**5},
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have(somebodys, sizes, monkeypatch):
    """transformers would build all of it, and then find that the weights don't fit."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **b: pytest.fail("built"))
    with pytest.raises(ValueError, match="has 55,136 weights, and its config describes a model of .*,"):
        load_pretrained("llama", str(with_settings(somebodys, **sizes)))


@pytest.mark.parametrize("layers", [2, 10**9])
def test_layers_without_weights(somebodys, layers):
    """transformers would make up what is missing."""
    with pytest.raises(ValueError, match=f"weights of 1 .*num_hidden_layers = {layers}"):
        load_pretrained("llama", str(with_settings(somebodys, num_hidden_layers=layers)))
