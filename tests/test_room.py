"""Before a download its size is said; what doesn't fit or is refused ends in one sentence that says what to do."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from models import PICTURES, tiny_vit

from libragrad_minimal import attribute, models, room
from libragrad_minimal.models import load_pretrained

EIGHT, THREE, ONE, LIGHT = room.CHOICES["llama"]


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_precision_is_one_that_the_gpu_has(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert room.device_and_dtype() == ("cuda", dtype)


def test_a_cpu_computes_in_full_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert room.device_and_dtype() == ("cpu", torch.float32)


@pytest.mark.parametrize(
    "kind, name, smaller",
    [
        ("llama", EIGHT, THREE),
        ("llama", ONE, LIGHT),
        ("llama", "somebody/llama", LIGHT),
        ("llama", LIGHT, 'load_demo("llama")'),
        ("clip", "ViT-bigG-14/laion2b_s39b_b160k", "ViT-B-16/laion2b_s34b_b88k"),
    ],
)
def test_the_next_smaller_choice(kind, name, smaller):
    assert room.smaller_than(kind, name) == smaller


@pytest.fixture
def hub(monkeypatch):
    """A hub whose every model has three billion parameters in two files, and a T4 with 14.5 GB."""
    files = [SimpleNamespace(rfilename=f"model-{i}-of-2.safetensors", size=3_200_000_000) for i in (1, 2)]
    files += [SimpleNamespace(rfilename=name, size=10**10) for name in ("original/x.safetensors", "x.gguf", "x.md")]
    files += [SimpleNamespace(rfilename="small.json", size=99_000_000)]
    about = SimpleNamespace(siblings=files, safetensors=SimpleNamespace(total=3_200_000_000))
    hub = SimpleNamespace(cached=set(), free=14.5e9)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: about)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda _, name: "/cache/file" if name in hub.cached else None
    )
    monkeypatch.setattr(room, "free_memory", lambda device: hub.free)
    monkeypatch.setattr(room, "device_and_dtype", lambda: ("cuda", torch.float16))
    return hub


def test_before_a_download_one_line_says_how_much(hub, capsys):
    room.announce("llama", THREE, THREE, "*.safetensors")
    said = "6.4 GB to download, once; in memory its weights take 6.4 of the 14.5 GB that are free (cuda)"
    assert capsys.readouterr().err == f"{THREE}: {said}\n"
    hub.cached = {"model-1-of-2.safetensors"}
    room.announce("llama", THREE, THREE, "*.safetensors")
    assert "3.2 GB to download" in capsys.readouterr().err
    room.announce("llama", "somebody/x/x.gguf", "somebody/x", "x.gguf")
    assert "10.0 GB to download" in capsys.readouterr().err
    room.announce("clip", "somebody/x", "somebody/x", "open_clip*.safetensors", "*.gguf")
    assert "10.0 GB to download, once; in memory its weights take 12.8 of the 14.5 GB" in capsys.readouterr().err


def test_nothing_is_said_of_what_is_here_or_unknown(hub, capsys, tmp_path, monkeypatch):
    room.announce("llama", "a folder", str(tmp_path), "*.safetensors")
    room.announce("llama", THREE, THREE, "small.json")
    hub.cached = {f"model-{i}-of-2.safetensors" for i in (1, 2)}
    room.announce("llama", THREE, THREE, "*.safetensors")
    monkeypatch.undo()  # and the hub is out of reach
    room.announce("llama", THREE, THREE, "*.safetensors")
    assert capsys.readouterr() == ("", "")


def test_what_does_not_fit_is_refused_before_it_is_downloaded(hub, monkeypatch, capsys):
    hub.free = 4e9
    monkeypatch.setattr(models, "config_of_weights", None)  # which fetches the weights
    with pytest.raises(torch.OutOfMemoryError) as caught:
        load_pretrained("llama", THREE)
    said = f"{THREE} doesn't fit: its weights take 6.4 GB, and 4.0 GB are free; the next smaller choice is {ONE}"
    assert str(caught.value) == said and capsys.readouterr().err == ""


def load_with(error: BaseException, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(models, "_download_llama", fail)
    return load_pretrained


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nGPU 0 has ..."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_no_memory_ends_in_one_sentence(error, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        load_with(error, monkeypatch)("llama", EIGHT)
    assert str(caught.value) == f"{EIGHT} doesn't fit: there isn't enough memory; the next smaller choice is {THREE}"


def refusal(kind, status: int) -> Exception:
    return kind("several\nlines", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    "name, kind, smaller", [(ONE, GatedRepoError, LIGHT), ("no/such", RepositoryNotFoundError, LIGHT)]
)
def test_a_401_ends_in_one_sentence(name, kind, smaller, monkeypatch):
    error = OSError("what transformers\nmakes of it")
    error.__cause__ = refusal(kind, 401)
    with pytest.raises(OSError) as caught:
        load_with(error, monkeypatch)("llama", name)
    message = str(caught.value)
    assert message.startswith(f"the hub answered 401 to {name}:") and message.endswith(f"open to all is {smaller}")
    assert "hf auth login" in message and "\n" not in message


@pytest.mark.parametrize("error", [OSError("the disk is full"), RuntimeError("of another kind")])
def test_other_errors_stay_what_they_are(error, monkeypatch):
    with pytest.raises((OSError, ValueError), match=str(error)):
        load_with(error, monkeypatch)("llama", ONE)


def test_what_is_offered_of_timm_and_open_clip_exists():
    import open_clip
    import timm

    assert all(timm.is_model(name.split(".")[0]) and name in timm.list_pretrained() for name in room.CHOICES["vit"])
    pairs = {"/".join(pair) for pair in open_clip.list_pretrained()}
    assert pairs >= set(room.CHOICES["clip"])


def test_explaining_too_much_at_once_ends_in_one_sentence():
    """The allocator's own error, while the model runs; and the cure that is named."""
    model = tiny_vit()
    block = model.blocks[0]
    run = block.forward
    block.forward = lambda x: run(x) if len(x) == 1 else torch.empty(2**60)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        attribute(model, PICTURES[:2], 1)
    said = str(caught.value)
    assert said.startswith("there isn't enough memory to compute FullGrad+ for 2 samples at once: give fewer at once")
    assert "\n" not in said and "allocate" in str(caught.value.__cause__)
    assert attribute(model, PICTURES[:1], 1).completeness_error.max() < 1e-4
