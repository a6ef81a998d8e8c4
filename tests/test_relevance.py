"""Which words make a passage answer a question: sums over a word's pieces, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import libragrad_minimal.cli as cli
from libragrad_minimal.relevance import load_cross_encoder, relevance

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "sings", "?", "lin", "##da", "##s", "song", "a"]


def saved(folder: Path, labels: int = 1, kind=BertForSequenceClassification) -> Path:
    """A small BERT with random weights, as its makers would save it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, num_labels=labels, **sizes)
    kind(config).save_pretrained(folder)
    backend = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("encoder"))


def test_the_pieces_of_a_word_add_up(folder):
    found = relevance("who  sings ?", "lindas song, linda", load_cross_encoder(str(folder)))
    expected = ["[CLS]", "who", "  sings", " ?", "[SEP]", "lindas", " song", ",", " linda", "[SEP]"]
    assert found.words == expected and found.special == {0, 4, 9}
    pieces = found.attribution.scores[0]  # [CLS] who sings ? [SEP] lin ##da ##s song , lin ##da [SEP]
    assert len(pieces) == 13
    assert found.scores[5] == pytest.approx(pieces[5:8].sum().item(), rel=1e-5)
    assert found.scores[8] == pytest.approx(pieces[10:12].sum().item(), rel=1e-5)
    assert sum(found.scores) == pytest.approx(pieces.sum().item(), rel=1e-4, abs=1e-5)
    assert found.strip("why?").muted == found.special


def test_the_logit_is_the_models_own(folder):
    encoder = load_cross_encoder(str(folder))
    found = relevance("who sings ?", "linda", encoder)
    ids, kinds = torch.tensor([[2, 4, 5, 6, 3, 7, 8, 3]]), torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    logit = encoder.model(input_ids=ids, token_type_ids=kinds).logits.item()
    assert found.attribution.output.item() == pytest.approx(logit, abs=1e-5)
    assert found.attribution.completeness_error.item() < 1e-4


@pytest.mark.parametrize(
    ("question", "passage", "message"),
    [
        (" ", "linda", "the question is empty"),
        ("who ?", "\n", "the passage is empty"),
        ("who ?", "\ud800", "the passage isn't UTF-8"),
        ("who ?", "song " * 20, "25 tokens together, and .* reads 16: shorten the passage by 9 tokens"),
    ],
)
def test_texts_that_are_refused(folder, question, passage, message):
    with pytest.raises(ValueError, match=message):
        relevance(question, passage, load_cross_encoder(str(folder)))


def test_shortening_is_a_cure(folder):
    assert relevance("who ?", "song " * 11, load_cross_encoder(str(folder))).words[-1] == "[SEP]"


def test_models_that_are_no_cross_encoders(tmp_path):
    with pytest.raises(ValueError, match="no cross-encoder: it tells 3 classes apart; take one with a single logit"):
        load_cross_encoder(str(saved(tmp_path / "classes", labels=3)))
    with pytest.raises(ValueError, match="no cross-encoder: it has no classifier.bias"):
        load_cross_encoder(str(saved(tmp_path / "bare", kind=transformers.BertModel)))
    with pytest.raises(OSError, match="nobody/nothing is not on this machine and the hub can't be reached"):
        load_cross_encoder("nobody/nothing")


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out.html"
    asked = ["relevance", "who sings ?", "<b>linda</b>", "--model", str(folder), "-o", str(out)]
    assert cli.main([*asked, "--save-scores", str(tmp_path / "out.npz")]) == 0
    saved = np.load(tmp_path / "out.npz")
    tokens = transformers.AutoTokenizer.from_pretrained(folder).tokenize(asked[1], asked[2], add_special_tokens=True)
    assert saved["tokens"].tolist() == tokens and saved["scores"].shape == (1, len(tokens))
    assert saved["word_scores"].sum() == pytest.approx(saved["scores"].sum(), rel=1e-5)
    printed, page = capsys.readouterr().out, out.read_text(encoding="utf-8")
    assert "completeness error" in printed and "linda" in page and "<b>" not in page
    assert cli.main([*asked[:2], " ", *asked[3:], "--overwrite"]) == 2
    assert "error: the passage is empty" in capsys.readouterr().err


def test_a_real_one_finds_the_inhabitants(shared):
    encoder = load_cross_encoder(str(shared / "models" / "ms-marco-minilm"))
    passage = "Berlin has 3.7 million inhabitants and lies on the river Spree; its museums are famous."
    found = relevance("How many people live in Berlin?", passage, encoder)
    assert found.attribution.completeness_error.item() < 1e-4
    by_word = {word.strip(): score for word, score in zip(found.words, found.scores, strict=True)}
    assert min(by_word["Berlin"], by_word["inhabitants"], by_word["million"]) > 10 * abs(by_word["museums"])
    wrong = relevance("How many people live in Berlin?", "New York City is famous for its museums.", encoder)
    assert wrong.attribution.output.item() < -5 < 5 < found.attribution.output.item()
