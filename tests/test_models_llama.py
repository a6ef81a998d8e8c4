"""Loading language models: what the demo Llama knows, and what is said where the hub refuses."""

import httpx
import pytest
import questions  # lies in data/, beside the script that trains on it
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from models import tiny_llama

from libragrad_minimal import models
from libragrad_minimal.models import DATA, UNGATED_LLAMA, LoadedModel, _text_of, load_demo, load_pretrained, token_texts
from libragrad_minimal.untrusted import tell_gguf_version


@pytest.fixture(scope="module")
def tiny():
    return tiny_llama()


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_demo("llama")


def test_demo_llama_has_llama_3_features_and_answers(demo):
    config = demo.model.config
    assert (DATA / "demo_llama.safetensors").stat().st_size <= 4e6
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.rope_parameters["rope_type"] == "llama3" and config.hidden_act == "silu"
    assert len(demo.blocks) == config.num_hidden_layers and not demo.model.training
    asked = questions.held_out_questions(200, seed=2)
    batch = demo.tokenizer([q.prompt for q in asked], return_tensors="pt", padding=True, padding_side="left")
    best = demo.model(**batch, logits_to_keep=1).logits[:, -1].argmax(-1)
    right = [text == q.answer for text, q in zip(token_texts(demo.tokenizer, best), asked, strict=True)]
    assert sum(right) >= 0.95 * len(right)


@pytest.mark.parametrize(
    "text", ["Anna has a red ball.\nBen's kite", "  two  spaces, tabs\t", "caf\u00e9 \u6f22\u5b57 <script> \U0001f642"]
)
def test_demo_tokens_spell_the_text(demo, text):
    ids = demo.tokenizer(text)["input_ids"]
    assert ids[0] == demo.tokenizer.bos_token_id
    assert demo.tokenizer.decode(ids[1:]) == text
    assert "".join(token_texts(demo.tokenizer, ids[1:])) == text


def test_a_character_cut_in_two_stands_at_its_first_token(demo):
    ids = demo.tokenizer("\u6f22", add_special_tokens=False)["input_ids"]
    assert token_texts(demo.tokenizer, ids) == ["\u6f22", "", ""]
    assert token_texts(demo.tokenizer, ids[:2]) == ["<E6>", "<BC>"]


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "stories260K"])
def test_tokens_of_other_tokenizers_spell_the_text(shared, model):
    """SmolLM2's merge some of the bytes; the stories' are SentencePiece's, which puts a space in front."""
    from transformers import AutoTokenizer

    tell_gguf_version()  # which older transformers look for in vain
    folder = shared / "models" / model
    file = next((path.name for path in folder.glob("*.gguf")), None)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    text = "Ben's \u7ea2\u8272\u7684 kite, caf\u00e9 \U0001f642\u200d\U0001f642 \ufffd \u9f98"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)).removeprefix(" ") == text


def answer_with(error, monkeypatch, tiny):
    """Make the hub answer with `error`, except for the open copy."""
    asked = []

    def download(name, device_map=None):
        asked.append(name)
        if name != UNGATED_LLAMA:
            raise OSError("wrapped by transformers") from error
        return models.LoadedModel("llama", name, tiny, [])

    monkeypatch.setattr(models, "_download_llama", download)
    return asked


def hub_error(kind, status):
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_is_replaced_with_a_message(monkeypatch, tiny, status):
    asked = answer_with(hub_error(GatedRepoError, status), monkeypatch, tiny)
    with pytest.warns(UserWarning, match=f"gated and the hub answered {status}.*accept its licence"):
        assert load_pretrained("llama", "meta-llama/Llama-3.2-1B").name == UNGATED_LLAMA
    assert asked == ["meta-llama/Llama-3.2-1B", UNGATED_LLAMA]


def test_a_misspelled_model_is_not_replaced(monkeypatch, tiny):
    asked = answer_with(hub_error(RepositoryNotFoundError, 401), monkeypatch, tiny)
    with pytest.raises(OSError, match="the hub answered 401 to no/such-model: there is none of this name"):
        load_pretrained("llama", "no/such-model")
    assert asked == ["no/such-model"]


def test_offline_says_what_to_do(monkeypatch, tiny):
    answer_with(LocalEntryNotFoundError("not cached"), monkeypatch, tiny)
    with pytest.raises(OSError, match=r'the hub can\'t be reached.*load_demo\("llama"\)'):
        load_pretrained("llama", "meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize(
    ("token", "alone", "text"),
    [("\u2581Ben", "Ben", " Ben"), ("\u2581\u2581", " ", "  "), ("\u0120Ben", " Ben", " Ben"), ("\u0120", "", " ")]
    + [("\u0120urf", "\u0120urf", "\u0120urf"), ("Ben", "Ben", "Ben"), ("", "", "")],  # the first is a Maltese letter
)
def test_spaces_that_decoding_drops_are_put_back(token, alone, text):
    assert _text_of(token, alone) == text
