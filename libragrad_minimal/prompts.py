"""Prompts and pictures: which part of a picture each prompt speaks of, for open_clip models."""

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .attribution import attribution, check_method, reads_of
from .engine import LIBRA, Rules
from .families import Inputs
from .models import LoadedModel
from .recording import GRAPH, Request, record


@dataclass(frozen=True)
class PromptAttribution:
    """What each patch of B pictures contributed to its similarity to each of P prompts."""

    maps: Tensor  # (B, P, rows, columns), signed
    similarity: Tensor  # (B, P) cosine times the logit scale
    completeness_error: (
        Tensor  # (B, P) |similarity - all attributions|; NaN for methods that don't promise completeness
    )


def attribute_prompts(
    loaded: LoadedModel,
    images: Tensor,
    prompts: Sequence[str] | str,
    method: str = "FullGrad+",
    rules: Rules = LIBRA,
    batch_size: int = 32,
    progress: bool = True,
) -> PromptAttribution:
    """Every picture with every prompt: one forward pass a batch of pictures, one backward pass a prompt.

    Args:
        loaded: from load_demo("clip") or load_pretrained("clip", name).
        images: (B, 3, H, W) from loaded.transform.
        prompts: P sentences.
        method: a key of attribution.METHODS.
        rules: LIBRA, PLAIN, ...: how gradients flow back.
        batch_size: pictures in one forward pass.
        progress: show a bar on stderr.
    Returns:
        Maps (B, P, rows, columns), similarities and completeness errors (B, P).
    Raises:
        ValueError: an empty prompt or an unknown method.
        UnsupportedOperation: as libra_grad does.
    """
    check_method(method, [])
    texts = encode_prompts(loaded, prompts).to(images.device)
    batches = images.split(batch_size)
    bar = tqdm(total=len(images) * len(texts), unit="map", disable=not progress)
    results = []
    for batch in batches:
        columns = []
        for result in _each_prompt(loaded, batch, texts, method, rules):
            columns.append(result)
            bar.update(len(batch))
        results.append([torch.stack(parts, dim=1) for parts in zip(*columns, strict=True)])
    bar.close()
    return PromptAttribution(*(torch.cat(parts) for parts in zip(*results, strict=True)))


def _each_prompt(loaded: LoadedModel, images: Tensor, texts: Tensor, method: str, rules: Rules):
    features = []

    def keep(answer: Tensor) -> Tensor:
        features.append(answer)
        return answer @ texts[0]

    request = Request(loaded.model, Inputs(images), keep, rules, reads=reads_of(method) | {GRAPH})
    shared = record(request)
    for text in texts:
        asked = replace(request, target=text)
        run = replace(shared, output=features[0] @ text, request=asked, rerun=partial(record, asked))
        result = attribution(run, method, {})
        yield result.maps, result.output, result.completeness_error


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
            warnings.warn(
                f"prompt {number} is longer than the {tokenizer.context_length} tokens this model reads: "
                f"it is cut after {kept[-60:]!r}",
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
