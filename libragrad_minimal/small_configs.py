"""Configurations of transformers, made small: two layers of width 64, and what has to follow from that.

A model's own defaults are its published size. Names are what its configurations share, so a name is given a small value
wherever it stands; what is written to by none of them keeps its default.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from .special_configs import LAYERS, NUMBER_OF_HEADS, PLACEHOLDER, SPECIAL, WIDTH, WORDS


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
    cross_attention_layers=(1,),
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
# Where widths have to fit each other in ways of their own, they are kept, and only depths and vocabularies are small.
SHALLOW = {name: value for name, value in SMALL.items() if re.search("layers?$|depth|blocks?$|vocab", name)}
SHALLOW |= {name: SMALL[name] for name in NEEDED if name.endswith("token_id")}
PICTURE_SIZE = 64  # of vision-language models and pairs, where the model lets it be chosen
SMALL_VISION = dict(image_size=PICTURE_SIZE, patch_size=16)


def part_for(model_class: Any, config: Any) -> Any:
    """The configuration, or the part of it that the class is made of."""
    wanted = getattr(model_class, "config_class", None) or type(config)
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    return config if isinstance(config, wanted) or not parts else parts[0]


def small_config(default: Any, pictures: bool, filled: bool = False, wide: bool = False, model_class: str = "") -> Any:
    """The configuration with two layers of width 64, and so those that are part of it.

    filled: with less of None. wide: with two layers and few words, but all widths as they are. model_class: of the
    model that is made of it, where that needs something of its own.
    """
    small = SHALLOW if wide else SMALL
    config_class = type(default)
    usual = vars(config_class())
    said = {name: value for name, value in vars(default).items() if name[0] != "_" and not is_config(value)}
    changes: dict[str, Any] = {name: value for name, value in said.items() if usual.get(name) != value}
    for name, value in vars(default).items():
        if is_config(value):
            changes[name] = small_config(value, pictures, filled, wide)
        elif value is None and filled and name in FILLED and (not wide or name not in SMALL or name in SHALLOW):
            changes[name] = FILLED[name]
        elif value is None and filled and name == "vision_config" and name in config_class.sub_configs:
            changes[name] = small_config(config_class.sub_configs[name](), pictures, filled, wide)
        elif name in small and (alike(value, small[name]) or value is None and name in NEEDED):
            changes[name] = small[name] if is_number(small[name]) or not isinstance(value, list) else list(small[name])
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
    if not wide:
        changes |= SPECIAL.get(config_class.__name__, {}) | SPECIAL.get(model_class, {})
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
    if hasattr(default, "intermediate_layers_indices"):  # read beside the last one
        follows |= {"intermediate_layers_indices": [0], "vision_output_dim": 2 * WIDTH}
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
