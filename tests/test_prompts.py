"""Prompts as strangers type them: every one is explained, shown as text, or refused in one sentence."""

import random
import warnings

import pytest
from test_plots import Reader

from libragrad_minimal import attribute
from libragrad_minimal.models import load_demo, token_texts
from libragrad_minimal.plots import Strip, TokenStrips, visible
from libragrad_minimal.prompts import encode_prompts

PIECES = [
    *("a red heart", "Anna has a", "word", " ", "\n", "\t", "\0", "\x1b[31m", "\x85", "\u2028", "\u202e", "\ufeff"),
    *("\u3000", "\uffff", "\U0010ffff", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "e" + "\u0301" * 40),
    *("\ufdfa" * 9, "\u0130\u00df\u02bc", "!" * 99, "a" * 200, "<|begin_of_text|>", "<|pad|>", "<|eot_id|>"),
    *("<|endoftext|>", "<end_of_text>", "&amp;lt;", "<script>", "</span>", "$x^2$", "{{ 7*7 }}", "%s%n", "../../etc"),
]


def strange(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) + rng.choice(("", " ")) for _ in range(rng.choice((1, 1, 2, 5))))


def check_pictures_prompts(seed: int, count: int) -> None:
    clip, rng = load_demo("clip"), random.Random(seed)
    for _ in range(count):
        prompt = strange(rng) + rng.choice(("", "\udcff"))  # what a terminal makes of bytes that are no UTF-8
        try:
            assert encode_prompts(clip, [prompt]).isfinite().all()
        except ValueError as error:
            assert not prompt.strip() and "is empty" in str(error)


def check_texts(seed: int, count: int) -> None:
    llama, rng = load_demo("llama"), random.Random(seed)
    for _ in range(count):
        prompt = strange(rng)
        ids = llama.tokenizer(prompt, return_tensors="pt")["input_ids"]
        try:
            result = attribute(llama.model, ids, 5, "IxG", readout="last")
        except ValueError as error:
            assert ids.shape[1] > 512 and "positions: shorten it" in str(error)
            continue
        assert result.scores.isfinite().all()
        tokens = token_texts(llama.tokenizer, ids[0])
        page = Reader(TokenStrips(Strip(tokens, result.scores[0]))._repr_html_())
        assert set(page.tags) <= {"div", "span", "br"} and len(page.spans) == len(tokens)
        assert page.text == "".join(map(visible, tokens))


@pytest.mark.filterwarnings("ignore:prompt 1 is longer")
def test_prompts_for_pictures():
    check_pictures_prompts(seed=0, count=100)


def test_texts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_texts(seed=0, count=40)
