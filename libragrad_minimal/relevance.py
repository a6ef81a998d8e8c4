"""Which words make this passage answer this question? A cross-encoder's one logit, shared out over the words.

A cross-encoder reads question and passage together and says with one number how well they fit (Nogueira and Cho 2019,
"Passage re-ranking with BERT"). Scores of tokens are shares of that number, so those of a word's pieces add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .attribution import Attribution, attribute
from .engine import Rules
from .plots import Strip
from .sentences import check_text, one_line
from .untrusted import config_of_weights, in_one_sentence

MS_MARCO = "cross-encoder/ms-marco-MiniLM-L12-v2"


@dataclass(frozen=True)
class CrossEncoder:
    """A model in eval mode that gives one logit for two texts, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Relevance:
    """The words of question and passage as they stand there, and what each contributed to the logit."""

    words: list[str]  # with the spaces before them; special tokens by their names
    scores: list[float]
    special: set[int]  # the places of special tokens
    tokens: list[str]  # as the vocabulary writes them
    attribution: Attribution  # of the tokens

    def strip(self, title: str = "") -> Strip:
        return Strip(self.words, self.scores, title, self.special)


def load_cross_encoder(name: str = MS_MARCO) -> CrossEncoder:
    """A cross-encoder of transformers, fp32, on the GPU where there is one.

    Args:
        name: a hub's name or a folder.
    Raises:
        ValueError: it gives no single logit for two texts, or can't be read. OSError: it isn't here and the hub can't
            be reached.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        with in_one_sentence(f"{name} can't be loaded"):
            config = config_of_weights(name, AutoModelForSequenceClassification)
            if config.num_labels != 1:
                raise ValueError(f"{name} is no cross-encoder: it tells {config.num_labels} classes apart; {CURE}")
            options = {"config": config, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            options |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
            model, found = AutoModelForSequenceClassification.from_pretrained(name, **options)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise OSError(f"{name} is not on this machine and the hub can't be reached; name a folder") from error
        raise
    if missing := sorted(found["missing_keys"]):  # transformers makes them up
        raise ValueError(f"{name} is no cross-encoder: it has no {one_line(missing[0], 100)}; {CURE}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return CrossEncoder(name, model.eval().requires_grad_(False).to(device), tokenizer)


CURE = f"take one with a single logit, such as {MS_MARCO}"


def relevance(
    question: str, passage: str, encoder: CrossEncoder, method: str = "FullGrad", rules: Rules | None = None
) -> Relevance:
    """What each word contributes to "this passage answers this question".

    Args:
        question, passage: texts.
        encoder: from load_cross_encoder.
        method: a key of METHODS. FullGrad, the default, is complete here: it counts the biases of BERT.
        rules: PLAIN, LIBRA, ...; default as in `attribute`.
    Raises:
        ValueError: an empty text, one that isn't UTF-8, or both together longer than the model reads.
        UnsupportedOperation: as libra_grad does.
    """
    for what, text in {"question": question, "passage": passage}.items():
        if not text.strip():
            raise ValueError(f"the {what} is empty")
        check_text(text, f"the {what}")
    encoded = encoder.tokenizer(question, passage, return_tensors="pt", return_offsets_mapping=True, verbose=False)
    spans = encoded.pop("offset_mapping")[0].tolist()
    longest = min(encoder.model.config.max_position_embeddings, encoder.tokenizer.model_max_length)
    if len(spans) > longest:
        raise ValueError(
            f"question and passage have {len(spans)} tokens together, and {encoder.name} reads {longest}: "
            f"shorten the passage by {len(spans) - longest} tokens, or ask for its parts one by one"
        )
    inputs = {key: value.to(encoder.model.device) for key, value in encoded.items()}
    result = attribute(encoder.model, inputs, 0, method, rules)
    return _by_words(encoded, spans, (question, passage), result)


def _by_words(encoded: Any, spans: list[list[int]], texts: tuple[str, str], result: Attribution) -> Relevance:
    """Adds up the scores of a word's pieces; what lies between two words is the second one's."""
    words: list[str] = []
    scores: list[float] = []
    special, ends, last = set(), [0, 0], None
    tokens, scored = encoded.tokens(), result.scores[0].tolist()
    places = zip(tokens, encoded.sequence_ids(), encoded.word_ids(), spans, scored, strict=True)
    for token, text, word, (_, end), score in places:
        if text is None:
            special.add(len(words))
            words.append(token)
            scores.append(score)
        else:
            piece, ends[text] = texts[text][ends[text] : end], max(end, ends[text])
            if (text, word) == last:
                words[-1] += piece
                scores[-1] += score
            else:
                words.append(piece)
                scores.append(score)
        last = (text, word)
    return Relevance(words, scores, special, tokens, result)
