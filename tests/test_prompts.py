"""Prompts on pictures: many at once as one by one, cut where the warning says; and whatever strangers type."""

import json
import random
import warnings

import open_clip
import pytest
import torch
from models import image_tower, tiny_clip
from test_plots import Reader

from libragrad_minimal import attribute
from libragrad_minimal.models import DATA, LoadedModel, _describe_clip, load_demo, token_texts
from libragrad_minimal.plots import Strip, TokenStrips, visible
from libragrad_minimal.prompts import attribute_prompts, encode_prompts, tokenize_prompts, words_kept

# ---- many prompts on many pictures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    torch.manual_seed(1)
    model = tiny_clip()
    blocks = list(model.visual.transformer.resblocks)
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    return LoadedModel("clip", "tiny", model, blocks, tokenizer=tokenizer, prefix_tokens=1, grid=(4, 4))


@pytest.mark.parametrize("method", ["FullGrad+", "GradCAM+", "LeGrad", "Attention Rollout", "IG"])
def test_pictures_and_prompts_at_once_equal_one_by_one(tiny, method):
    images, prompts = torch.randn(3, 3, 32, 32), ["a cat", "two dogs"]
    together = attribute_prompts(tiny, images, prompts, method, batch_size=2, progress=False)
    assert together.maps.shape == (3, 2, 4, 4) and together.output.shape == (3, 2)
    for i, image in enumerate(images):
        for p, text in enumerate(encode_prompts(tiny, prompts)):
            alone = attribute(tiny.model, image[None], text[None], method)
            torch.testing.assert_close(together.maps[i, p], alone.maps[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(together.output[i, p], alone.output[0], rtol=1e-5, atol=1e-5)
    if method == "FullGrad+":
        assert together.completeness_error.max() <= 1e-4


def test_prompts_share_one_forward_pass_and_cost_one_backward_pass_each(tiny):
    forward, backward = [], []

    def passed(layer, inputs, output):
        forward.append(1)
        output.register_hook(lambda gradient: backward.append(1))

    handle = tiny.model.visual.ln_post.register_forward_hook(passed)
    attribute_prompts(tiny, torch.randn(2, 3, 32, 32), ["a", "b", "c", "d"], progress=False)
    handle.remove()
    assert len(forward) == 1 and len(backward) == 4


def test_similarity_is_the_models_own(tiny):
    images, prompts = torch.randn(2, 3, 32, 32), ["a cat", "two dogs"]
    result = attribute_prompts(tiny, images, prompts, progress=False)
    logits, _ = tiny.model.get_logits(images, tiny.tokenizer(prompts))
    torch.testing.assert_close(result.output, logits.detach(), rtol=1e-5, atol=1e-5)


def test_progress_goes_to_stderr(tiny, capsys):
    attribute_prompts(tiny, torch.randn(2, 3, 32, 32), ["a", "b"])
    printed = capsys.readouterr()
    assert "4/4" in printed.err and printed.out == ""


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16"])
def test_prompts_on_towers_of_timm(name):
    model = image_tower(name)
    loaded = _describe_clip(name, model, None, open_clip.SimpleTokenizer(context_length=8))
    result = attribute_prompts(loaded, torch.randn(1, 3, 224, 224), ["a cat", "two dogs"], progress=False)
    assert result.maps.shape == (1, 2, *loaded.grid) and loaded.grid == (14, 14)
    assert loaded.prefix_tokens == (1 if name == "EVA02-B-16" else 0)
    assert result.completeness_error.max() <= 1e-4 * result.output.abs().max()


# ---- what a model reads of a prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [("", "prompt 1 is empty"), (["a cat", " \n"], "prompt 2 is empty"), ([], "no prompts"), ([7], "is a int")],
)
def test_bad_prompts_get_one_clear_error(tiny, prompts, message):
    with pytest.raises(ValueError, match=message):
        tokenize_prompts(tiny.tokenizer, prompts)


def test_a_long_prompt_is_cut_and_the_warning_says_where(tiny):
    with pytest.warns(UserWarning, match="8 tokens this model reads: it is cut after 'one two three four five six'"):
        ids = tokenize_prompts(tiny.tokenizer, "one two three four five six seven eight")
    assert torch.equal(ids, tiny.tokenizer(["one two three four five six"]))


@pytest.mark.parametrize("prompt", ["one two three four five six", "a", "¡olé! 🙂", "Ünïcode", "!!!", "a  b"])
def test_a_prompt_that_fits_is_left_alone(tiny, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_prompts(tiny.tokenizer, prompt)
    assert words_kept(tiny.tokenizer, prompt) == prompt


def test_one_word_too_long_for_the_model(tiny):
    with pytest.warns(UserWarning, match="cut within its first word"):
        tokenize_prompts(tiny.tokenizer, "Donaudampfschifffahrtsgesellschaftskapitänsmütze" * 2)


def test_suggested_prompts_fit_and_belong_to_photographs():
    from libragrad_minimal.photographs import PHOTOGRAPHS

    suggested = json.loads((DATA / "prompts.json").read_text())["clip"]
    assert suggested.keys() == {*PHOTOGRAPHS, "demo"}
    prompts = [prompt for group in suggested.values() for prompt in group]
    assert len(prompts) == len(set(prompts)) >= 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_prompts(load_demo("clip").tokenizer, prompts)


# ---- as strangers type them ------------------------------------------------------------------------------------------

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
