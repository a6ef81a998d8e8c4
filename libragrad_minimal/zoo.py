"""Every model of timm, transformers and open_clip, small and with random weights, with something to explain in it.

What a sweep runs on. Norms, biases and running statistics are changed at random, as those of a trained model are: fresh
ones are 0 or 1, and hide what is left out of an attribution.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import Inputs, call, embedding_of, generates

LIBRARIES = ("timm", "transformers", "open_clip")
ATTENTION = re.compile(r"att(entio)?n|mhsa|gpsa|litemla", re.I)
CHANNELS_ALONE = re.compile(
    r"selectivekernel|squeeze|effnet_?attn|nonlocal|^(se|eca|cbam|split|channel|spatial)\w*att", re.I
)
MIXING = re.compile(r"mixer|mixing|poolformer|glu|gated|gating|mamba|recurrent|sequencer|^resmlp", re.I)
SMALL_BY_NAME = re.compile(r"nano|tiny|atto|femto|pico|xxs|xs|small|050|035|micro|_s(_|\d|$)|_t(_|\d|i_|$)|_m?0|_9_")
LARGE = re.compile(
    r"giant|huge|large|enormous|gigantic|so\d+m|_7b|_[123]b|base|medium|_x?l(_|$)|_x?b(_|$)|\d{3}m|384|512"
)
MOST_PARAMETERS = 250e6
LARGEST_PICTURE, SMALLER_PICTURE = 512, 384  # for timm's models, where another size can be chosen
NOTHING_MIXED = "has no attention, mixer or gated MLP: it isn't asked for"


class NotBuilt(Exception):
    """The model can't be made small, or not from what is installed, or doesn't run on the inputs made for it."""


@dataclass
class Case:
    """A model, what goes in, and what is explained: the arguments of `attribute`."""

    kind: str
    model: nn.Module
    inputs: Tensor | dict[str, Any]
    target: Any = 1
    readout: Any = None


def registered(library: str, pattern: str = "*", few: int | None = None) -> list[str]:
    """Names of models; few: only so many of every file of timm, those that are small by their names."""
    if library == "timm":
        names = timm_names(pattern, few)
    elif library == "transformers":
        names = [name for name in transformers_heads() if fnmatch.fnmatch(name, pattern)]
    else:
        import open_clip

        towers = (f"{name} {tower}" for name in open_clip.list_models() for tower in ("picture", "text"))
        names = [name for name in towers if fnmatch.fnmatch(name, pattern)]
    return sorted(names)


def build(library: str, name: str) -> Case:
    """A small model of that name, perturbed, in eval mode. Raises NotBuilt."""
    torch.manual_seed(0)
    return {"timm": timm_case, "transformers": transformers_case, "open_clip": open_clip_case}[library](name)


def perturbed(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and (parameter.dim() <= 1 or "norm" in name or "bias" in name):
                parameter.add_(noise(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(noise(buffer))
            elif name.endswith("running_var"):
                buffer.add_(noise(buffer).abs())
    return model.eval()


def asked(kind: str, model: nn.Module, inputs: Tensor | dict[str, Any]) -> Case:
    """A case whose target and readout fit the model's answer."""
    with torch.no_grad():
        answer = call(model, Inputs(inputs))
    target: Any = 1
    if not isinstance(answer, Tensor):
        vector = embedding_of(answer)
        answer = vector if vector is not None else getattr(answer, "last_hidden_state", None)
        if answer is None:
            raise NotBuilt("answers with neither logits nor an embedding")
        target = torch.randn(answer.shape[1 if answer.dim() == 4 else -1])
        if vector is None and answer.dim() == 2:
            return Case(kind, model, inputs, lambda answer: answer.last_hidden_state[:, 1])
    if answer.dim() == 1:
        return Case(kind, model, inputs, None)
    if answer.dim() == 2 or answer.dim() == 3 and generates(model):
        return Case(kind, model, inputs, target)
    return Case(kind, model, inputs, target, 2 if answer.dim() == 3 else (1,) * (answer.dim() - 2))


# ---- timm ------------------------------------------------------------------------------------------------------------


def timm_names(pattern: str, few: int | None) -> list[str]:
    import timm
    from timm.models._registry import _model_to_module

    names = timm.list_models(pattern)
    if few is None:
        return names
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(_model_to_module[name], []).append(name)

    def order(name: str) -> tuple[bool, bool, str]:
        return bool(LARGE.search(name)), not SMALL_BY_NAME.search(name), name

    return [name for file in files.values() for name in sorted(file, key=order)[:few]]


def timm_case(name: str) -> Case:
    import timm

    def made(**shape) -> nn.Module:
        return timm.create_model(name, num_classes=7, **shape)

    def size(**shape) -> float:
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in made(**shape).parameters())
        except Exception:
            return torch.inf

    shapes: list[dict[str, Any]] = [{}, {"depth": 2}, {"num_blocks": 2}, {"depths": (2, 2, 2, 2)}]
    expected = timm.get_pretrained_cfg(name).input_size
    if max(expected) > LARGEST_PICTURE and size(img_size=SMALLER_PICTURE) < torch.inf:
        expected = (3, SMALLER_PICTURE, SMALLER_PICTURE)
        shapes = [shape | {"img_size": SMALLER_PICTURE} for shape in shapes]
    sizes = [size(**shape) for shape in shapes]
    if min(sizes) > MOST_PARAMETERS and sizes[0] is not torch.inf:
        raise NotBuilt(f"has {min(sizes) / 1e6:.0f} million parameters")
    model: Any = perturbed(made(**shapes[sizes.index(min(sizes))]))
    kind = kind_of(model)
    if kind == "convolutions":
        raise NotBuilt(NOTHING_MIXED)
    return asked(kind, model, torch.randn(1, *expected))


def kind_of(model: nn.Module) -> str:
    """What its code has, by the names of its classes: attention over places, a mixer or gated MLP, or neither."""
    names = [name for name in {type(module).__name__ for module in model.modules()} if not CHANNELS_ALONE.search(name)]
    if any(map(ATTENTION.search, names)):
        return "attention"
    return "mixer" if any(map(MIXING.search, names)) else "convolutions"


# ---- transformers ----------------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


HEADS = {  # kind -> the registry of heads
    "decoder": "CAUSAL_LM",
    "classifier": "SEQUENCE_CLASSIFICATION",
    "masked": "MASKED_LM",
    "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
    "audio": "AUDIO_CLASSIFICATION",
    "vision": "IMAGE_CLASSIFICATION",
    "tower": "IMAGE",
    "video": "VIDEO_CLASSIFICATION",
    "detection": "OBJECT_DETECTION",
    "segmentation": "SEMANTIC_SEGMENTATION",
    "pair": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "vision-language": "IMAGE_TEXT_TO_TEXT",
}
WIDTH, LAYERS, NUMBER_OF_HEADS, WORDS = 64, 2, 4, 200
SMALL: dict[str, Any] = dict(
    **dict.fromkeys("hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim".split(), WIDTH),
    **dict.fromkeys(
        "attention_hidden_size encoder_hidden_size lru_width ffn_hidden_size out_hidden_size".split(), WIDTH
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth".split(), LAYERS
    ),
    **dict.fromkeys("num_encoder_layers num_decoder_layers num_blocks".split(), LAYERS),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads encoder_attention_heads".split(), NUMBER_OF_HEADS),
    **dict.fromkeys("decoder_attention_heads encoder_num_heads linear_num_value_heads".split(), NUMBER_OF_HEADS),
    **dict.fromkeys("num_key_value_heads num_kv_heads n_head_kv linear_num_key_heads".split(), 2),
    **dict.fromkeys("intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim".split(), 256),
    **dict.fromkeys("head_dim d_kv v_head_dim linear_key_head_dim linear_value_head_dim kv_lora_rank".split(), 16),
    **dict.fromkeys("q_lora_rank d_head attention_head_size".split(), 16),
    **dict.fromkeys("qk_rope_head_dim qk_nope_head_dim".split(), 8),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_k".split(), 2),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size".split(), 64),
    **dict.fromkeys("n_group num_group num_expert_group topk_group first_k_dense_replace".split(), 1),
    **dict.fromkeys("vision_output_dim projector_input_dim projector_output_dim projection_dim".split(), WIDTH),
    vocab_size=WORDS,
    vocab_size_per_layer_input=WORDS,
    hidden_size_per_layer_input=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    num_labels=7,
    max_position_embeddings=512,
    mm_tokens_per_image=4,
    rotary_dim=8,
    state_size=8,
    emb_dim=WIDTH,
    entity_vocab_size=WORDS,
    attn_layer_period=2,
    attn_layer_offset=1,
    num_kv_shared_layers=0,
    num_self_attends_per_block=LAYERS,
    encoder_hash_byte_group_vocab=WORDS,
    base_channels=32,
    d_latents=WIDTH,
    coordinate_size=10,  # of layouts: four of these and two of the next are the width
    shape_size=12,
    axial_pos_embds_dim=(16, WIDTH - 16),
    projector_patch_to_query_dict={16: 4},
)
# Where a configuration says None and its model can't be made so: what its models have.
FILLED: dict[str, Any] = {name: value for name, value in SMALL.items() if is_number(value)} | dict(
    layer_types=["full_attention"] * LAYERS,
    mlp_layer_types=["dense", "sparse"],
    n_shared_experts=1,
    sliding_window=8,
    default_language="en_XX",
    backbone="resnet18",
)
NEEDED = {name for name in SMALL if name.endswith("token_id")} | {  # also where the default is None
    *"vocab_size num_key_value_heads num_experts_per_tok n_group topk_group".split()
}
PICTURE_SIZE = 64  # of vision-language models and pairs, where the model lets it be chosen
SMALL_VISION = dict(image_size=PICTURE_SIZE, patch_size=16)
PLACEHOLDER = WORDS - 1  # the id that stands for a picture's tokens


def transformers_heads() -> dict[str, tuple[str, str, str]]:
    """name -> (kind, type of the model, name of its class)"""
    from transformers.models.auto import modeling_auto

    found = {}
    for kind, registry in HEADS.items():
        mapping = getattr(modeling_auto, f"MODEL_FOR_{registry}_MAPPING_NAMES")
        for model_type, classes in mapping.items():
            one = classes if isinstance(classes, str) else classes[0]
            found[f"{kind} {model_type}"] = (kind, model_type, one)
    return found


def transformers_case(name: str) -> Case:
    import transformers

    kind, model_type, class_name = transformers_heads()[name]
    failures = []
    for filled in (False, True):
        try:
            model_class = getattr(transformers, class_name)
            default = transformers.CONFIG_MAPPING[model_type]()
            config = part_for(model_class, small_config(default, kind in ("vision-language", "pair", "video"), filled))
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
        except Exception as error:
            failures.append(f"can't be made: {type(error).__name__}: {error}")
            continue
        if size > 130e6:
            failures.append(f"still has {size / 1e6:.0f} million parameters")
            continue
        model = perturbed(model_class(config))
        for inputs in INPUTS[kind](model, config):
            try:
                return asked(kind, model, inputs)
            except NotBuilt:
                raise
            except Exception as error:  # these inputs don't fit; the next may
                failures.append(f"runs on none of the inputs made for it: {type(error).__name__}: {error}")
    raise NotBuilt(failures[0])


def part_for(model_class: Any, config: Any) -> Any:
    """The configuration, or the part of it that the class is made of."""
    wanted = getattr(model_class, "config_class", None) or type(config)
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    return config if isinstance(config, wanted) or not parts else parts[0]


def small_config(default: Any, pictures: bool, filled: bool = False) -> Any:
    """The configuration with two layers of width 64, and so those that are part of it. filled: with less of None."""
    config_class = type(default)
    usual = vars(config_class())
    said = {name: value for name, value in vars(default).items() if name[0] != "_" and not is_config(value)}
    changes: dict[str, Any] = {name: value for name, value in said.items() if usual.get(name) != value}
    for name, value in vars(default).items():
        if is_config(value):
            changes[name] = small_config(value, pictures, filled)
        elif value is None and filled and name in FILLED:
            changes[name] = FILLED[name]
        elif value is None and filled and name == "vision_config" and name in config_class.sub_configs:
            changes[name] = small_config(config_class.sub_configs[name](), pictures, filled)
        elif name in SMALL and (alike(value, SMALL[name]) or value is None and name in NEEDED):
            changes[name] = SMALL[name]
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list | tuple):
            changes[name] = one_of_each(value)
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_type" in value:
            changes[name] = small_rope(value, pictures, filled)
        elif name == "num_heads" and isinstance(value, list | tuple) and hasattr(default, "embed_dim"):
            changes[name] = [NUMBER_OF_HEADS] * len(value)
        elif name == "vision_feature_layers" or name == "vision_feature_layer" and isinstance(value, list | tuple):
            changes[name] = [-1, -2]
        elif pictures and name in SMALL_VISION and (is_number(value) or isinstance(value, list | tuple)):
            changes[name] = SMALL_VISION[name] if is_number(value) else [SMALL_VISION[name]] * len(value)
        elif name == "image_grid_pinpoints" and pictures:
            changes[name] = [[PICTURE_SIZE, PICTURE_SIZE]]
        elif re.fullmatch(r"(image|video|audio)_token_(id|index)", name):
            changes[name] = PLACEHOLDER if name.startswith("image") else PLACEHOLDER - 1 - len(name) % 5
    changes |= fitting(default, changes)
    without = {name: value for name, value in changes.items() if name != "num_key_value_heads"}
    for some in (changes, without):
        with suppress(Exception):  # one that checks what belongs together
            return config_class(**some)
    for name, value in without.items():  # one that calls its arguments otherwise
        with suppress(Exception):
            setattr(default, name, value)
    return default


def is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and not isinstance(value, type)


def fitting(default: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """What follows from others: heads of latent attention, inner widths, layers that are read from."""
    follows: dict[str, Any] = {}
    if "qk_rope_head_dim" in changes and "head_dim" in changes:
        follows["head_dim"] = changes["qk_rope_head_dim"]
    if "kv_lora_rank" in changes and "num_key_value_heads" in changes:
        follows["num_key_value_heads"] = NUMBER_OF_HEADS
    if "attention_hidden_size" in changes and "hidden_size" in changes:
        follows["attention_hidden_size"] = WIDTH * default.attention_hidden_size // default.hidden_size
    if "expand" in vars(default) and {"num_heads", "head_dim"} <= set(changes):
        follows["num_heads"] = int(WIDTH * default.expand) // SMALL["head_dim"]
    for name in ("out_indices", "backbone_out_indices"):  # layers whose tokens a neck reads
        read = getattr(default, name, None) or ()
        if len(read) > 1:
            follows[name] = list(read)
            if "num_hidden_layers" in changes:
                follows["num_hidden_layers"] = max(LAYERS, *(index + 1 for index in read))
    return follows


def alike(value: Any, small: Any) -> bool:
    """Could the small value stand there?"""
    if is_number(small):
        return is_number(value)
    return isinstance(value, list | tuple) if isinstance(small, tuple) else isinstance(value, type(small))


def small_rope(rope: dict[str, Any], pictures: bool, filled: bool) -> dict[str, Any]:
    """With a base, and with time, height and width sharing the rotated half of a head."""
    half = int(SMALL["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
    third = 3 * half // 8
    section = [half - 2 * third, third, third]
    if filled:  # height and width may come first
        section.reverse()
    shares = {"mrope_section": section} if pictures or "mrope_section" in rope else {}
    return rope | {"rope_theta": rope.get("rope_theta") or 1e4} | shares


def one_of_each(kinds: Any) -> list:
    """Two layers, of two kinds where there are two: the last one's first, which models end with."""
    last = kinds[-1]
    other = next((kind for kind in kinds if kind != last), last)
    return [other, last][-LAYERS:]


def words(length: int = 9, samples: int = 2) -> Tensor:
    """Token ids that end as a text does, as some classifiers ask."""
    ids = torch.randint(5, 180, (samples, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = SMALL["eos_token_id"]
    return ids


def pixels(config: Any, samples: int = 1) -> Tensor:
    vision = next((c for c in (getattr(config, "vision_config", None), config) if hasattr(c, "image_size")), config)
    size = getattr(vision, "image_size", 224)
    size = (size, size) if is_number(size) else tuple(size) if isinstance(size, list | tuple) else (224, 224)
    return torch.randn(samples, getattr(vision, "num_channels", 3), *size)


Made = Iterator[Any]


def text_inputs(model: nn.Module, config: Any) -> Made:
    yield {"input_ids": words()}
    yield {"input_ids": words(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    yield {"input_ids": words(), "bbox": torch.zeros(2, 9, 4, dtype=torch.long)}
    yield {"input_ids": words(), "lang_ids": torch.zeros(2, 9, dtype=torch.long)}
    yield {"input_ids": words(128)}
    yield {"input_ids": words(), "decoder_input_ids": words()}
    yield {"inputs": words(128)}


def two_texts(model: nn.Module, config: Any) -> Made:
    yield {"input_ids": words(), "decoder_input_ids": words(4)}
    yield from text_inputs(model, config)


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
    yield from two_texts(model, config)


def seen(model: nn.Module, config: Any) -> Made:
    yield {"pixel_values": pixels(config)}
    for size in (224, 256, 448, 512):
        yield {"pixel_values": torch.randn(1, 3, size, size)}
    yield {"inputs": pixels(config)}
    yield patches(config)
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
    vision = next((c for c in (getattr(config, "vision_config", None), config) if hasattr(c, "image_size")), config)
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
    vision = getattr(config, "vision_config", config)
    side, patch = (getattr(vision, name, default) for name, default in (("spatial_merge_size", 2), ("patch_size", 16)))
    side, patch = (value if is_number(value) else 2 for value in (side, patch))
    flat = 3 * getattr(vision, "temporal_patch_size", 1) * patch**2
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
        tiles_of_one,
        tiles_of_one | {"batch_num_images": torch.tensor([1])},
        patches(config),
        {"pixel_values": torch.randn(1, 36, flat), "image_position_ids": places},
        {"pixel_values": torch.randn(1, 36, flat)},
        {"pixel_values": torch.randn(1, 3, patch, 16 * patch), "target_sizes": torch.tensor([[4, 4]])},
        {"pixel_values": flat_patches, "image_grid_hw": grid[:, 1:]},
    ]
    known = inspect.signature(model.forward).parameters
    if "high_res_pixel_values" in known:
        ways += [{"pixel_values": one, "high_res_pixel_values": one.repeat(1, 1, n, n)} for n in (1, 4)]
    for way in ways:
        if "qformer_input_ids" in known:
            way["qformer_input_ids"] = words(4, 1)
        for count in number_of_tokens(model, way):
            ids = torch.tensor([[1, 9, *[PLACEHOLDER] * count, 20, 21]])
            more = dict.fromkeys(
                ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"), (ids == PLACEHOLDER).long()
            )
            yield {"input_ids": ids, **way, **{name: value for name, value in more.items() if name in known}}
    if "aspect_ratio_ids" in known:
        ids, ones = torch.tensor([[1, 9, PLACEHOLDER, 20, 21]]), torch.ones(1, 1, dtype=torch.long)
        tiles = getattr(vision, "max_num_tiles", 1)
        yield {
            "input_ids": ids,
            "pixel_values": one[:, None, None].expand(1, 1, tiles, -1, -1, -1),
            "aspect_ratio_ids": ones,
            "aspect_ratio_mask": ones[..., None].expand(1, 1, tiles),
            "cross_attention_mask": torch.ones(1, ids.shape[1], 1, tiles, dtype=torch.long),
        }
    yield {
        "input_ids": torch.tensor([[1, 9, 20, 21]]),
        "pixel_values": one[:, None],
        "image_attention_mask": torch.ones(1, 4, 1),
    }
    yield {"input_ids": torch.tensor([[1, 9, 20, 21]]), "pixel_values": one}


def features_of(model: Any) -> Any:
    """The model's function that makes tokens of a picture; None where it has none."""
    parts: tuple[Any, ...] = (model, getattr(model, "model", None))
    return next((part.get_image_features for part in parts if hasattr(part, "get_image_features")), None)


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


# ---- open_clip -------------------------------------------------------------------------------------------------------


def open_clip_case(name: str) -> Case:
    import open_clip

    name, tower = name.rsplit(" ", 1)
    config = open_clip.get_model_config(name)
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if isinstance(config.get(part, {}).get("layers"), int):
            config[part]["layers"] = LAYERS
    vision, text = config["vision_cfg"], config["text_cfg"]
    if tower == "picture":
        config["text_cfg"] = dict(layers=1, width=64, heads=1)
        text = config["text_cfg"] | {"context_length": 77}
    elif text.get("hf_model_name"):
        stand_in_for_hub()
        text["hf_model_pretrained"] = False
    if tower == "text":
        config["vision_cfg"] = dict(layers=1, width=64, head_width=64, image_size=32, patch_size=32)
    elif "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    custom = config.pop("custom_text", False) or "timm_model_name" in config["vision_cfg"] or "hf_model_name" in text
    config.pop("multimodal_cfg", None)
    try:
        with torch.device("meta"):
            made = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
        if (size := sum(p.numel() for p in made.parameters())) > MOST_PARAMETERS:
            raise NotBuilt(f"has {size / 1e6:.0f} million parameters")
    except NotImplementedError:  # can't be made without data; it is small
        pass
    model = perturbed((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config))
    if tower == "picture":
        size = vision["image_size"]
        inputs: Tensor = torch.randn(1, 3, *(size if isinstance(size, list | tuple) else (size, size)))
    else:
        inputs = torch.randint(5, WORDS, (2, text.get("context_length", 77)))
    with torch.no_grad():
        width = call(model, Inputs(inputs)).shape[-1]
    return Case(tower, model, inputs, torch.randn(width))


def stand_in_for_hub() -> None:
    """open_clip asks the hub for the shapes of text towers of transformers; here they are small ones of that kind."""
    import transformers
    from open_clip import hf_model

    def small(name: str, **options: Any) -> Any:
        kinds = ("mt5", "xlm-roberta", "roberta", "bert")
        kind = next((kind for kind in kinds if kind in name.lower()), "roberta")
        return small_config(transformers.AutoConfig.for_model(kind), pictures=False)

    hf_model.AutoConfig = type("AutoConfig", (), {"from_pretrained": staticmethod(small)})
