"""Which number of a model's answer is explained, one for each sample: a class, a combination of classes, a function.

Answers with one row a token, a patch or a query, or with one a pixel, need to be told which of them is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import targets
from .families import Inputs, accepts, blamed, check_ordinary, embedding_of, generates, name_of
from .streams import removed, tensors_in

CHOICES = (
    "readout=3 for row 3, readout=tensor of one row a sample, readout='last', or a function of the whole answer as "
    "target"
)


def last_rows(inputs: Inputs) -> Tensor:
    """(B,) the position of each text's last token that isn't padding."""
    text, mask = inputs.answered, inputs.answered_mask
    assert text is not None
    if mask is None or mask.shape != text.shape[:2]:
        return torch.full((len(text),), text.shape[1] - 1, device=text.device)
    return mask.shape[1] - 1 - mask.flip(1).bool().int().argmax(1)


def chosen_rows(model: nn.Module, inputs: Inputs, target: Any, readout: Any) -> Tensor | None:
    """(B,) the rows of an answer to a text that are read, as far as the request tells; None if it doesn't."""
    if inputs.answered is None:
        return None
    if isinstance(readout, str) and readout == "last":
        return last_rows(inputs)
    if readout is None:
        return last_rows(inputs) if generates(model) and not callable(target) else None
    length, padding = inputs.answered.shape[1], inputs.answered_mask
    if isinstance(readout, Tensor) and readout.dtype == torch.bool:
        if padding is not None and readout.shape[-1:] == padding.shape[-1:]:
            covered = (readout.to(padding.device) & ~padding.bool()).any(-1)
            if covered.any():
                raise ValueError(
                    f"the mask of readout covers padding of sample {int(covered.int().argmax())}: give one mask a "
                    "sample (B, T), without padding"
                )
        return None
    rows = torch.as_tensor(readout)
    if rows.dim() > 1:
        return None
    rows = one_each(rows, inputs.samples).to(inputs.answered.device)
    if rows.min() < -length or rows.max() >= length:
        return None
    rows = rows % length
    if padding is not None and padding.shape[1] == length:
        hidden = (~padding.bool().gather(1, rows[:, None])[:, 0]).nonzero().flatten().tolist()
        if hidden:
            raise ValueError(f"readout names row {int(rows[hidden[0]])} of sample {hidden[0]}, which is padding")
    return rows


def one_each(rows: Tensor, samples: int) -> Tensor:
    if rows.dim() > 1 or rows.dim() == 1 and len(rows) not in (1, samples):
        raise ValueError(f"readout needs one row, or one for each of {samples} samples; got shape {tuple(rows.shape)}")
    return rows.long().expand(samples)


def kept_rows(model: nn.Module, inputs: Inputs, rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The rows for which the model need compute logits, and where among them each sample's own is."""
    if rows is None or not accepts(model, "logits_to_keep") or "labels" in inputs.tensors:
        return None, rows
    if accepts(model, "decoder_input_ids") and "decoder_input_ids" not in inputs.tensors:
        return None, rows  # it makes its own, and perhaps fewer
    return rows.unique(return_inverse=True)


def rows_of_answer(
    name: str, inputs: Inputs, answer: Any, readout: Any, rows: Tensor, kept: int | None
) -> Tensor | None:
    """Positions in the text as rows of the answer; None where those are others (queries, a prompt before the text) and
    the user's own number counts them."""
    text, mask = inputs.answered, inputs.answered_mask
    assert text is not None
    if not isinstance(answer, Tensor) or answer.dim() != 3 or answer.shape[1] == (kept or text.shape[1]):
        return rows
    if readout is not None and not isinstance(readout, str):
        return None
    if mask is not None and not mask[:, -1].bool().all():
        raise ValueError(
            f"{name} answers with {answer.shape[1]} rows to a text of {text.shape[1]} tokens, so which row belongs to "
            "the last token before the padding isn't known: pad on the left, or give readout= one row a sample"
        )
    return torch.full_like(rows, answer.shape[1] - 1)


def explained(model: nn.Module, answer: Any, target: Any, readout: Any, rows: Tensor | None, samples: int) -> Tensor:
    """The numbers to explain (B,), of an answer whose rows are (B, rows, classes). rows: (B,) those that are read."""
    name = name_of(model)
    if not isinstance(answer, Tensor):
        answer = vector_answer(name, answer, target, readout)
        if callable(target):
            return picked(target, answer, samples)
    if callable(target) and readout is None:
        return picked(target, answer, samples)
    answer = answer if answer.dim() else answer.expand(1)  # squeezed
    if len(answer) != samples:
        raise ValueError(f"{name} answers with {tuple(answer.shape)} to {samples} samples: give a function as target")
    if answer.dim() == 1:
        return single_number(name, answer, target)
    if answer.dim() > 2:
        answer = one_row(name, answer, readout, rows)
    elif readout is not None and not isinstance(readout, str):
        raise ValueError(
            f"{name} answers with one row of {answer.shape[1]} numbers a sample: there is no row to choose"
        )
    if callable(target):
        return picked(target, answer, samples)
    return chosen_class(answer, target)


def vector_answer(name: str, answer: Any, target: Any, readout: Any) -> Any:
    """Of a model without logits: what a function may take apart, or one vector a sample, or its last states by rows."""
    if callable(target) and readout is None:
        return answer
    vector = embedding_of(answer) if readout is None else getattr(answer, "last_hidden_state", None)
    if vector is None:
        parts = ", ".join(answer) if hasattr(answer, "keys") else type(answer).__name__
        raise ValueError(
            f"{name} returns no logits but {parts}: give a function of that as target, for example "
            "lambda answer: answer.last_hidden_state[:, 0] @ direction"
        )
    return vector


def one_row(name: str, answer: Tensor, readout: Any, rows: Tensor | None) -> Tensor:
    """(B, classes) of an answer (B, rows, classes), or (B, classes, height, width)."""
    if isinstance(readout, Tensor) and readout.dtype == torch.bool:
        return masked_mean(name, answer, readout)
    if answer.dim() > 3:
        if isinstance(readout, Sequence) and len(readout) == answer.dim() - 2 and not isinstance(readout, str):
            if any(not -size <= place < size for place, size in zip(readout, answer.shape[2:], strict=True)):
                raise ValueError(f"readout names pixel {tuple(readout)}, and the answer has {tuple(answer.shape[2:])}")
            return answer[(slice(None), slice(None), *readout)]
        raise ValueError(
            f"{name} answers with {tuple(answer.shape)}, one number a class and a pixel: say which pixels, as "
            "readout=(row, column) or readout=mask, a boolean tensor, or give a function of the whole answer as target"
        )
    if rows is None and readout is not None and not isinstance(readout, str):
        rows = one_each(torch.as_tensor(readout), len(answer))
        if rows.min() < -answer.shape[1] or rows.max() >= answer.shape[1]:
            raise ValueError(f"readout names row {readout}, and the answer has {answer.shape[1]} rows")
    if rows is None and isinstance(readout, str):
        rows = torch.full((len(answer),), answer.shape[1] - 1)
    if rows is None:
        raise ValueError(
            f"{name} answers with {answer.shape[1]} rows of {answer.shape[2]} numbers a sample: say which is meant, "
            + CHOICES
        )
    return answer[torch.arange(len(answer), device=answer.device), rows.to(answer.device)]


def masked_mean(name: str, answer: Tensor, mask: Tensor) -> Tensor:
    """The mean over the rows or pixels of a mask, which may differ from sample to sample."""
    by_place = answer if answer.dim() == 3 else answer.flatten(2).transpose(1, 2)
    places = answer.shape[1:2] if answer.dim() == 3 else answer.shape[2:]
    if mask.shape not in (places, (len(answer), *places)):
        raise ValueError(
            f"{name} answers for {' x '.join(map(str, places))} places, and the mask is {tuple(mask.shape)}"
        )
    weight = mask.to(answer.device).expand(len(answer), *places).flatten(1).to(answer.dtype)
    if (weight.sum(1) == 0).any():
        raise ValueError("the mask of readout is empty for a sample: there is nothing to explain")
    return (by_place * (weight / weight.sum(1, keepdim=True))[..., None]).sum(1)


def single_number(name: str, answer: Tensor, target: Any) -> Tensor:
    if target is None or not isinstance(target, Tensor) and target == 0 and not isinstance(target, bool):
        return answer
    raise ValueError(
        f"{name} answers with one number a sample: there is no class {target}; target=None explains the number"
    )


def picked(target: Callable[[Any], Any], answer: Any, samples: int) -> Tensor:
    """What a user's function returns of the answer, if it is (B,) numbers that gradients can start from."""

    def refuse(gradient):
        raise ValueError(
            "the target function runs a backward pass: let it return the numbers (B,) alone, their gradients are "
            "computed afterwards"
        )

    hooks = (tensor.register_hook(refuse) for tensor in tensors_in(answer) if tensor.requires_grad)
    with removed(hooks), blamed("the target function fails on the model's answer"):
        output = target(answer)
    if isinstance(output, Tensor):
        check_ordinary("target(answer)", output)
    if not isinstance(output, Tensor) or output.shape != (samples,):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"target(answer) must be one number per sample ({samples},), got {found}")
    if not output.is_floating_point():
        raise ValueError(f"target(answer) must be floating-point numbers, got {output.dtype}")
    return output


def chosen_class(answer: Tensor, target: Any) -> Tensor:
    samples, classes = answer.shape
    if target is None and classes == 1:
        return answer[:, 0]
    if target is None:
        raise ValueError(
            f"there is no target: give one of {classes} classes, weights for them, or a function of the answer"
        )
    if isinstance(target, targets.Probability | targets.Against):
        return target.of(answer)
    weights = torch.as_tensor(target, device=answer.device)
    if weights.is_floating_point():
        if weights.shape not in ((classes,), (samples, classes)):
            raise ValueError(
                f"a target of weights must end in {classes} numbers, one for each class (or each sample and class); "
                f"got shape {tuple(weights.shape)}"
            )
        return (answer * weights.to(answer.dtype)).sum(-1)
    return answer.gather(1, targets.classes(weights, answer))[:, 0]


def checked_readout(readout: Any) -> Any:
    """What can be said of a readout before the model runs; masks as tensors."""
    if isinstance(readout, str) and readout != "last":
        raise ValueError(f"unknown readout {readout!r}: {CHOICES}")
    if readout is None or isinstance(readout, str):
        return readout
    if isinstance(readout, Tensor):
        check_ordinary("readout", readout)
    try:
        numbers = torch.as_tensor(readout)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"readout is a {type(readout).__name__}: {CHOICES}") from error
    unclear = numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool and not numbers.dim()
    if unclear or numbers.numel() == 0:
        raise ValueError(f"readout holds no row's number and is no mask, {readout!r}: {CHOICES}")
    return numbers if numbers.dtype == torch.bool else readout


def check_target(target: Any) -> None:
    """What can be said of a target before the model runs."""
    if isinstance(target, str):
        raise ValueError(f"the target is a word, {target!r}: give the number of the class or of the token")
    if callable(target) or target is None:
        return
    if isinstance(target, targets.Probability | targets.Against):
        target = target.target
    if isinstance(target, Tensor):
        check_ordinary("the target", target)
    try:
        number = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the target is a {type(target).__name__}: give a class (an int, or one for each sample), weights of "
            "classes, or a function of the model's answer"
        ) from error
    if number.dtype == torch.bool:
        raise ValueError("the target is boolean: give the class's number, or weights as floating-point numbers")
    if number.is_complex() or number.numel() == 0:
        raise ValueError(f"the target holds no class: it is {target!r}")
