"""Language models from .gguf files: they load as others do, and a file that lies about itself is refused."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from transformers.convert_slow_tokenizer import bytes_to_unicode

from libragrad_minimal import LIBRA, attribute
from libragrad_minimal.gguf_header import tensor_shapes
from libragrad_minimal.models import LoadedModel, load_pretrained, token_texts

WIDTH, HEADS, INNER, LAYERS = 32, 4, 48, 2
TOKENS = ["<|begin|>", "<|end|>", *sorted(bytes_to_unicode().values()), "th", "the"]


def write(path: Path, leave_out: str = "", **settings: int) -> Path:
    """A small Llama with random weights and a tokenizer of bytes; `settings` are what its header says wrongly."""
    said = {"context_length": 64, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": INNER}
    said |= {"head_count": HEADS, "head_count_kv": HEADS, "rope_dimension_count": WIDTH // HEADS}
    writer = GGUFWriter(str(path), "llama")
    for name, value in (said | settings).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_name("small")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weights in tensors().items():
        if name != leave_out:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    block = {f"attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    block |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    block |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in block.items()}
    return {f"{name}.weight": rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_a_file_and_its_folder_load_alike(small):
    for name in (small, small.parent):
        loaded = load_pretrained("llama", str(name))
        assert len(loaded.blocks) == LAYERS and loaded.model.config.num_attention_heads == HEADS
        weights = dict(loaded.model.named_parameters())
        written = tensors()
        assert weights["model.embed_tokens.weight"].numpy() == pytest.approx(written["token_embd.weight"])
        assert weights["model.layers.1.mlp.down_proj.weight"].numpy() == pytest.approx(written["blk.1.ffn_down.weight"])
        ids = loaded.tokenizer("the cat", return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert token_texts(loaded.tokenizer, ids[0]) == ["the", " ", "c", "a", "t"]
        result = attribute(loaded.model, ids, 5, "IxG", LIBRA)
        assert result.completeness_error.item() < 1e-4


def test_the_header_is_read_as_the_library_reads_it(small):
    from gguf import GGUFReader

    expected = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in GGUFReader(small).tensors}
    assert tensor_shapes(small) == expected


def test_weights_are_unpacked_wherever_kernels_are_installed(small, monkeypatch):
    """Newer versions of transformers would fetch a kernel from the hub for packed ones."""
    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("this version of transformers always unpacks")
    from transformers.quantizers import quantizer_gguf

    monkeypatch.setattr(quantizer_gguf, "get_gguf_kernel", lambda: pytest.fail("a kernel was asked for"))
    monkeypatch.setattr(quantizer_gguf.GgufHeader, "has_quantized_weights", True)
    assert load_pretrained("llama", str(small)).blocks


@pytest.mark.parametrize("layers", [LAYERS + 1, 10**9])
def test_more_layers_than_weights(layers, tmp_path):
    with pytest.raises(ValueError, match=f"weights of {LAYERS} layers, and its config num_hidden_layers = {layers}"):
        load_pretrained("llama", str(write(tmp_path / "a.gguf", block_count=layers)))


@pytest.mark.parametrize(
    "settings", [{"embedding_length": 2**31}, {"feed_forward_length": 2**31}, {"head_count": 2**30}], ids=str
)
def test_sizes_that_the_weights_do_not_have(settings, tmp_path):
    started = time.process_time()
    with pytest.raises(ValueError) as caught:
        load_pretrained("llama", str(write(tmp_path / "a.gguf", **settings)))
    assert_one_sentence(caught.value)
    assert time.process_time() - started < 10


def test_a_weight_that_is_missing(tmp_path):
    path = write(tmp_path / "a.gguf", leave_out="blk.1.attn_q.weight")
    with pytest.raises(ValueError, match=r"lacks 1 of its weights, such as model\.layers\.1\.self_attn\.q_proj"):
        load_pretrained("llama", str(path))


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"nowhere\.gguf"):
        load_pretrained("llama", str(tmp_path / "nowhere.gguf"))


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert text.isprintable() and len(text) < 700, text


def check_damaged_gguf(small: Path, folder: Path, seed: int, count: int) -> int:
    """Each loads or is refused in one sentence and at once; how many were refused. For a night: raise `count`."""
    rng, path, refused = random.Random(seed), folder / "damaged.gguf", 0
    whole = small.read_bytes()
    for _ in range(count):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(rng.choice((64, 1000, 8000)))
            content[place] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            content = content[: rng.randrange(len(content))]
        path.write_bytes(content)
        started = time.process_time()
        try:
            assert isinstance(load_pretrained("llama", str(path)), LoadedModel)
        except (ValueError, OSError) as error:
            refused += 1
            assert_one_sentence(error)
        assert time.process_time() - started < 10
    return refused


def test_damaged_files(small, tmp_path):
    assert check_damaged_gguf(small, tmp_path, 0, 40) > 10


@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "settings"])
def test_absurd_counts(place, small, tmp_path):
    content = bytearray(small.read_bytes())
    content[place : place + 8] = (2**62).to_bytes(8, "little")
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="more parts than it has bytes"):
        load_pretrained("llama", str(tmp_path / "a.gguf"))


def test_an_array_without_end(small, tmp_path):
    """The library's reader would go on for ever behind the end of the file."""
    content, name = bytearray(small.read_bytes()), b"tokenizer.ggml.token_type"
    place = content.index(name) + len(name) + 8  # behind the types of the value and of its items
    content[place : place + 8] = (2**50).to_bytes(8, "little")
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="ends in the middle of its header"):
        load_pretrained("llama", str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("kept", [0, 5, 23, 30, 2000, -1])
def test_files_cut_short(kept, small, tmp_path):
    (tmp_path / "a.gguf").write_bytes(small.read_bytes()[:kept])
    with pytest.raises(ValueError, match="can't be read as GGUF: it (is too short|ends)"):
        load_pretrained("llama", str(tmp_path / "a.gguf"))


@pytest.mark.slow
def test_a_real_model_knows_its_capital(shared):
    folder = shared / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    loaded = load_pretrained("llama", str(folder))
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert token_texts(loaded.tokenizer, loaded.model(ids).logits[0, -1:].argmax(-1)) == [" Paris"]
    assert loaded.tokenizer.chat_template and len(loaded.blocks) == 30
