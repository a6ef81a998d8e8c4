"""Inputs for models of transformers: of each kind a few forms, one of which a model runs on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .small_configs import PLACEHOLDER, SMALL, is_config, is_number


def words(length: int = 9, samples: int = 2) -> Tensor:
    """Token ids that end as a text does, as some classifiers ask."""
    ids = torch.randint(5, 180, (samples, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = SMALL["eos_token_id"]
    return ids


def parts_of(config: Any) -> list[Any]:
    """The configuration, and all that are part of it."""
    return [config, *(part for value in vars(config).values() if is_config(value) for part in parts_of(value))]


def vision_part(config: Any) -> Any:
    """The configuration, or the part of it that tells how large pictures are."""
    parts = [getattr(config, "vision_config", None), *parts_of(config)]
    return next((part for part in parts if hasattr(part, "image_size")), config)


def pixels(config: Any, samples: int = 1) -> Tensor:
    vision = vision_part(config)
    size = getattr(vision, "image_size", 224)  # as large as most are trained with
    size = (size, size) if is_number(size) else tuple(size) if isinstance(size, list | tuple) else (224, 224)
    return torch.randn(samples, getattr(vision, "num_channels", 3), *size)


Made = Iterator[Any]
SIDES_OF_MERGED = ("spatial_merge_size", "merge_size", "merge_kernel_size")
PLACES_OF_PICTURES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask")


def text_inputs(model: nn.Module, config: Any) -> Made:
    yield {"input_ids": words()}
    yield {"input_ids": words(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    yield {"input_ids": words(), "bbox": torch.zeros(2, 9, 4, dtype=torch.long)}
    yield {"input_ids": words(), "lang_ids": torch.zeros(2, 9, dtype=torch.long)}
    yield {"input_ids": words(128)}
    yield {"input_ids": words(), "decoder_input_ids": words()}
    yield {"inputs": words(128)}
    if hasattr(config, "num_codebooks"):  # of sound
        yield {"input_ids": words(samples=2 * config.num_codebooks)}


def two_texts(model: nn.Module, config: Any) -> Made:
    known = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in known or "input_ids" not in known:
        yield {"input_ids": words(), "decoder_input_ids": words(4)}
    yield from sound_in_texts(config, known)
    yield from text_inputs(model, config)


def sound_in_texts(config: Any, known: Container[str]) -> Made:
    """Sound whose tokens are added to those of the text, or stand in their places."""
    if "input_ids" in known and "input_features" in known:
        yield {"input_ids": words(), "input_features": torch.randn(2, bins_of(config), 8 * 9)}
    if "input_ids" in known and "input_values" in known and "sample" in known:
        ids = words()
        ids[:, 1:7] = config.audio_token_id
        heard_by_it = {"input_values": torch.randn(2, 1, 6 * 4), "padding_mask": torch.ones(2, 6 * 4, dtype=torch.bool)}
        yield {"input_ids": ids, **heard_by_it, "sample": False}


def bins_of(config: Any, otherwise: int = 80) -> int:
    """How many frequencies the sound is given in."""
    bins = (part.num_mel_bins for part in parts_of(config) if is_number(getattr(part, "num_mel_bins", None)))
    return next(bins, otherwise)


def heard(model: nn.Module, config: Any) -> Made:
    bins = getattr(config, "num_mel_bins", getattr(config, "input_feat_per_channel", 80))
    frames = 2 * getattr(config, "max_source_positions", 100)
    bins = bins if is_number(bins) else 80
    texts = {"decoder_input_ids": words(4)}
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        texts = {}
    yield {"input_values": torch.randn(2, 2000)} | texts
    yield {"input_features": torch.randn(2, bins, frames)} | texts
    yield {"input_features": torch.randn(2, 100, bins)} | texts
    yield {"input_features": torch.randn(2, 100, 160)} | texts
    yield {"input_values": torch.randn(2, getattr(config, "max_length", 1024) or 1024, bins)} | texts
    yield {"input_features": torch.randn(2, 100, bins_of(config, bins))} | texts
    if hasattr(config, "codebook_vocab_size"):  # a word and a token of sound each at a time
        yield {"input_ids": words()[..., None].repeat(1, 1, config.num_codebooks + 1) % config.codebook_vocab_size}
    yield from two_texts(model, config)


def seen(model: nn.Module, config: Any) -> Made:
    yield {"pixel_values": pixels(config)}
    for size in (224, 256, 448, 512):
        yield {"pixel_values": torch.randn(1, 3, size, size)}
    yield {"inputs": pixels(config)}
    yield patches(config)
    yield tiles_with_ratios(config)
    yield from frames(model, config)
    yield from pictures_in_texts(model, config) if features_of(model) else text_inputs(model, config)


def patches(config: Any, samples: int = 1) -> dict[str, Tensor]:
    """A picture as a row of 4 x 4 flat patches."""
    patch = getattr(getattr(config, "vision_config", config), "patch_size", 16)
    return {
        "pixel_values": torch.randn(samples, 16, 3 * patch**2 if is_number(patch) else 768),
        "pixel_attention_mask": torch.ones(samples, 16, dtype=torch.long),
        "spatial_shapes": torch.full((samples, 2), 4),
    }


def frames(model: nn.Module, config: Any, samples: int = 1) -> Made:
    vision = vision_part(config)
    size: Any = getattr(vision, "image_size", 224)
    size = size if is_number(size) else max(size)
    numbers = [getattr(vision, name, 4) for name in ("num_frames", "frames_per_clip")]
    yield {"pixel_values": torch.randn(samples, numbers[0], 3, size, size)}
    for number in dict.fromkeys(reversed(numbers)):
        yield {"pixel_values_videos": torch.randn(samples, number, 3, size, size)}


def pairs(model: nn.Module, config: Any) -> Made:
    for length in (9, 64):
        for seen_by_it in ({"pixel_values": pixels(config, 2)}, patches(config, 2), *frames(model, config, 2)):
            yield {"input_ids": words(length), **seen_by_it}
            yield {"input_ids": words(length), "attention_mask": torch.ones(2, length, dtype=torch.long), **seen_by_it}


def pictures_in_texts(model: nn.Module, config: Any) -> Made:
    """A prompt with as many tokens for a picture as the model makes of it."""
    known = inspect.signature(model.forward).parameters
    for way in ways_of_giving_a_picture(config, known):
        for count in number_of_tokens(model, way):
            ids = torch.tensor([[1, 9, *[PLACEHOLDER] * count, 20, 21]])
            more = dict.fromkeys(PLACES_OF_PICTURES, (ids == PLACEHOLDER).long())
            whole = {"input_ids": ids, **way, **{name: value for name, value in more.items() if name in known}}
            answered = whole | {"decoder_input_ids": words(4, 1)} if "decoder_input_ids" in known else whole
            yield from (answered, whole) if getattr(config, "is_encoder_decoder", False) else (whole, answered)
    if "pixel_values" in known or "flattened_patches" in known:
        yield from pictures_beside_texts(config, known)
    else:  # a model of texts alone, in spite of its kind
        yield {"input_ids": words()}


def ways_of_giving_a_picture(config: Any, known: Container[str]) -> list[dict[str, Any]]:
    """A picture as models take it: whole, in tiles, or as rows of patches with their places; and what goes with it."""
    vision = getattr(config, "vision_config", config)
    side, patch = first_number(vision, SIDES_OF_MERGED, 2), first_number(vision, ("patch_size",), 16)
    flat = 3 * first_number(vision, ("temporal_patch_size", "patch_temporal"), 1) * patch**2
    merged = 3 * first_number(vision, ("model_patch_size",), patch) ** 2
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    one = pixels(config)
    size = torch.tensor([one.shape[-2:]])
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
    flat_patches = torch.randn(4 * side**2, flat)
    tiles_of_one = {"pixel_values": one[:, None].expand(1, 2, -1, -1, -1), "image_sizes": size}
    ways: list[dict[str, Any]] = [
        {"pixel_values": flat_patches, "image_grid_thw": grid},
        {"pixel_values": flat_patches, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([side])},
        {"pixel_values": one},
        {"pixel_values": one, "image_sizes": size},
        {"pixel_values": torch.randn(4 * side**2, 3, patch, patch), "image_grid_thw": grid},
        {"pixel_values": one[:, None]},
        {"pixel_values": one[:, None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.long)},
        {"pixel_values": one[:, None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)},
        tiles_of_one,
        tiles_of_one | {"batch_num_images": torch.tensor([1])},
        patches(config),
        {"pixel_values": torch.randn(1, 36, flat), "image_position_ids": places},
        {"pixel_values": torch.randn(1, 36, merged), "image_position_ids": places},
        {"pixel_values": torch.randn(1, 36, flat)},
        {"pixel_values": torch.randn(1, 3, patch, 16 * patch), "target_sizes": torch.tensor([[4, 4]])},
        {"pixel_values": flat_patches, "image_grid_hw": grid[:, 1:]},
        {"pixel_values": flat_patches, "image_grid_thw": grid.tolist()},
        {"pixel_values": torch.randn(4, side * patch, side * patch, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])},
        {"pixel_values": torch.randn(4, flat // (3 * patch**2), patch, patch, 3)},
        {  # of every token: the patches that are pooled in it
            "pixel_values": torch.randn(1, 16, flat),
            "image_token_pooling": torch.arange(16).view(4, 4),
            "image_grids": torch.tensor([[2, 2, 0, 0]]),
            "image_num_crops": torch.tensor([1]),
        },
    ]
    if "high_res_pixel_values" in known:
        ways += [{"pixel_values": one, "high_res_pixel_values": one.repeat(1, 1, n, n)} for n in (1, 4)]
    if "qformer_input_ids" in known:
        ways = [way | {"qformer_input_ids": words(4, 1)} for way in ways]
    if hasattr(config, "canvas_length"):  # filled at random, if it isn't given
        ways = [way | {"decoder_input_ids": words(config.canvas_length, 1)} for way in ways]
    return ways


def pictures_beside_texts(config: Any, known: Container[str]) -> Made:
    """Pictures that aren't among the text's tokens."""
    vision = getattr(config, "vision_config", config)
    one, patch = pixels(config), first_number(vision, ("patch_size",), 16)
    if "aspect_ratio_ids" in known:
        ids = torch.tensor([[1, 9, PLACEHOLDER, 20, 21]])
        tiled = tiles_with_ratios(config)
        tiles = tiled["pixel_values"].shape[2]
        yield {
            "input_ids": ids,
            **tiled,
            "cross_attention_mask": torch.ones(1, ids.shape[1], 1, tiles, dtype=torch.long),
        }
    if "state" in known:  # of a robot, whose next actions are asked for
        noise = torch.randn(1, config.chunk_size, config.max_action_dim)
        moment = {"state": torch.randn(1, config.max_state_dim), "noise": noise, "timestep": torch.tensor([0.5])}
        ids = torch.tensor([[*[PLACEHOLDER] * (one.shape[-1] // patch) ** 2, 1, 9]])
        seen_by_it = {"pixel_values": one[:, None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
        yield {"input_ids": ids, **seen_by_it, **moment}
    if "qformer_input_ids" in known:
        film = one[:, None].expand(1, 4, -1, -1, -1)
        ids = torch.tensor([[*[PLACEHOLDER] * 4 * config.num_query_tokens, 1, 9]])
        yield {"input_ids": ids, "pixel_values": film, "qformer_input_ids": words(4, 1)}
    yield {
        "input_ids": torch.tensor([[1, 9, 20, 21]]),
        "pixel_values": one[:, None],
        "image_attention_mask": torch.ones(1, 4, 1),
    }
    yield {"input_ids": torch.tensor([[1, 9, 20, 21]]), "pixel_values": one}
    if "decoder_input_ids" in known:
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
        for encoded in (
            {"pixel_values": one},
            {"input_ids": words(9, 1), "bbox": torch.zeros(1, 9, 4), "pixel_values": one},
        ):
            yield {**encoded, "decoder_input_ids": words(4, 1)}
        yield {
            "flattened_patches": torch.cat([places + 1.0, torch.randn(1, 36, 3 * patch**2)], -1),
            "attention_mask": torch.ones(1, 36, dtype=torch.long),
            "decoder_input_ids": words(4, 1),
        }


def tiles_with_ratios(config: Any) -> dict[str, Tensor]:
    """A picture in as many tiles as the model knows, and what it is told of them."""
    one, tiles = pixels(config), getattr(vision_part(config), "max_num_tiles", 1)
    return {
        "pixel_values": one[:, None, None].expand(1, 1, tiles, -1, -1, -1),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
    }


def first_number(config: Any, names: Sequence[str], otherwise: int) -> int:
    """The first of these values that there is, and 2 where it is one for height and one for width."""
    values = (getattr(config, name) for name in names if hasattr(config, name))
    value = next(values, otherwise)
    return value if is_number(value) else 2


def features_of(model: Any) -> Any:
    """The model's function that makes tokens of a picture; None where it has none."""
    return next((part.get_image_features for part in model.modules() if hasattr(part, "get_image_features")), None)


def number_of_tokens(model: Any, way: dict[str, Any]) -> list[int]:
    """How many tokens of the text a picture becomes, as the model's own function tells."""
    try:
        with torch.no_grad():
            features = features_of(model)(**way)
    except Exception:  # it can't take a picture in this way; the next may be its own
        return []
    for name in ("pooler_output", "last_hidden_state"):
        if isinstance(getattr(features, name, None), Tensor | list | tuple):
            features = getattr(features, name)
            break
    else:
        deep = getattr(features, "deepstack_features", None)  # for several layers of the decoder
        features = deep[0][1] if deep else features
    parts = features if isinstance(features, list | tuple) else [features]
    return list(dict.fromkeys([sum(part.shape[:-1].numel() for part in parts if isinstance(part, Tensor))]))


INPUTS: dict[str, Callable[[nn.Module, Any], Made]] = {
    **dict.fromkeys(("decoder", "classifier", "masked"), text_inputs),
    "encoder-decoder": two_texts,
    **dict.fromkeys(("speech", "audio"), heard),
    **dict.fromkeys(("vision", "tower", "detection", "segmentation"), seen),
    "video": frames,
    "pair": pairs,
    "vision-language": pictures_in_texts,
}
