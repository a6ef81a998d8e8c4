"""Prompts and pictures: which part of a picture each prompt speaks of, for open_clip models."""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .attribution import Attribution, attribution
from .engine import Rules
from .families import Inputs
from .methods import check_method, default_rules, reads_of
from .models import LoadedModel
from .recording import GRAPH, Request, record


def attribute_prompts(
    loaded: LoadedModel,
    images: Tensor,
    prompts: Sequence[str] | str,
    method: str = "FullGrad+",
    rules: Rules | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Attribution:
    """Every picture with every prompt: one forward pass a batch of pictures, one backward pass a prompt.

    Args:
        loaded: from load_demo("clip") or load_pretrained("clip", name).
        images: (B, 3, H, W) from loaded.transform.
        prompts: P sentences.
        method: a key of METHODS.
        rules: PLAIN, LIBRA, ...: how gradients flow back; default as in `attribute`.
        batch_size: pictures in one forward pass.
        progress: show a bar on stderr.
    Returns:
        An Attribution of the similarities (B, P), cosine times the logit scale: scores (B, P, patches) and maps
        (B, P, rows, columns).
    Raises:
        ValueError: an empty prompt or an unknown method.
        UnsupportedOperation: as libra_grad does.
    """
    check_method(method, {})
    texts = encode_prompts(loaded, prompts).to(images.device)
    batches = images.split(batch_size)
    bar = tqdm(total=len(images) * len(texts), unit="map", disable=not progress)
    results = []
    for batch in batches:
        columns = []
        for result in _each_prompt(loaded, batch, texts, method, rules or default_rules(method)):
            columns.append(result)
            bar.update(len(batch))
        results.append(columns)
    bar.close()

    def joined(part: Callable[[Attribution], Tensor]) -> Tensor:
        return torch.cat([torch.stack([part(column) for column in columns], dim=1) for columns in results])

    return replace(
        results[0][0],
        scores=joined(lambda one: one.scores),
        output=joined(lambda one: one.output),
        completeness_error=joined(lambda one: one.completeness_error),
    )


def _each_prompt(
    loaded: LoadedModel, images: Tensor, texts: Tensor, method: str, rules: Rules
) -> Iterator[Attribution]:
    features = []

    def keep(answer: Tensor) -> Tensor:
        features.append(answer)
        return answer @ texts[0]

    request = Request(loaded.model, Inputs(images), keep, rules, reads=reads_of(method) | {GRAPH})
    shared = record(request)
    for text in texts:
        run = replace(shared, output=features[0] @ text, request=replace(request, target=text))
        yield attribution(run, method, {})


@torch.no_grad()
def encode_prompts(loaded: LoadedModel, prompts: Sequence[str] | str) -> Tensor:
    """The prompts as directions in the space that pictures share.

    Args:
        loaded: from load_demo("clip") or load_pretrained("clip", name).
        prompts: P sentences.
    Returns:
        (P, D) unit vectors times the logit scale: their product with a picture's unit vector is the similarity.
    Raises:
        ValueError: an empty prompt.
    """
    tokens = tokenize_prompts(loaded.tokenizer, prompts).to(next(loaded.model.parameters()).device)
    return loaded.model.logit_scale.exp() * F.normalize(loaded.model.encode_text(tokens), dim=-1)


def tokenize_prompts(tokenizer: Any, prompts: Sequence[str] | str) -> Tensor:
    """Token ids; warns, and says where, if a prompt is too long and has to be cut.

    Args:
        tokenizer: one of open_clip.
        prompts: P sentences.
    Returns:
        (P, context length) int.
    Raises:
        ValueError: an empty prompt.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {number} is a {type(prompt).__name__}, not text")
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty; say what to look for, such as 'a red heart'")
        kept = words_kept(tokenizer, prompt)
        if kept != prompt:
            end = f"after {kept[-60:]!r}" if kept else "within its first word"
            warnings.warn(
                f"prompt {number} is longer than the {tokenizer.context_length} tokens this model reads: "
                f"it is cut {end}",
                stacklevel=2,
            )
    return tokenizer(prompts)


def words_kept(tokenizer: Any, prompt: str) -> str:
    """As much of a prompt, in whole words, as fits into the context length.

    Args:
        tokenizer: one of open_clip.
        prompt: one sentence.
    Returns:
        The prompt itself if all of it fits.
    """

    def is_cut(text: str) -> bool:
        fitting = tokenizer([text], tokenizer.context_length)[0]
        longer = tokenizer([text], tokenizer.context_length + 1)[0]  # one more is padding, unless something is missing
        return not torch.equal(longer[:-1], fitting)

    if not is_cut(prompt):
        return prompt
    words = prompt.split()[: tokenizer.context_length]  # every word takes a token at least
    return " ".join(words[: bisect_left(range(1, len(words) + 1), True, key=lambda n: is_cut(" ".join(words[:n])))])
