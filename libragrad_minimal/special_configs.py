"""What single configurations of transformers need beside small values: of these, names alone tell too little.

The keys are names of classes: of a configuration, wherever it stands in another, or of the model that is made of it.
"""

from __future__ import annotations

from typing import Any

WIDTH, LAYERS, NUMBER_OF_HEADS, WORDS = 64, 2, 4, 200
PLACEHOLDER = WORDS - 1  # the id that stands for a picture's tokens
CODES = 16  # of pictures whose tokens are words of a codebook
FIRST_CODE, END_OF_ROW = 100, 150  # their ids

ROPE = {"rope_type": "default", "rope_theta": 1e4}
KINDS_OF_ATTENTION = ["sliding_attention", "full_attention"]
SMALL_STEM = dict(downsampling_ratios=[2, 2], depths=[1, 1, 1], num_filters=8)  # of sound

SPECIAL: dict[str, dict[str, Any]] = {
    # ---- of texts ----------------------------------------------------------------------------------------------------
    "CohereCompassTextConfig": dict(
        layer_types=KINDS_OF_ATTENTION, rope_parameters=dict.fromkeys(KINDS_OF_ATTENTION, ROPE)
    ),
    "DbrxAttentionConfig": dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8.0),
    "DiffusionGemmaTextConfig": dict(num_experts=4, top_k_experts=2, moe_intermediate_size=64),
    "GraniteMoeHybridConfig": dict(
        layer_types=["linear_attention", "full_attention"], mamba_n_heads=8, mamba_d_state=16, mamba_chunk_size=16
    ),
    "HYV4VLTextConfig": dict(
        rope_parameters=ROPE | {"mrope_section": [2, 1, 1]}, index_head_dim=16, index_n_heads=4, index_topk=64
    ),
    "Mistral4Config": dict(
        rope_parameters=ROPE
        | {"partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}
    ),
    "Qwen4ExpTextConfig": dict(
        indexer_n_heads=4,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
        hc_lowrank=16,
    ),
    "ReformerModelWithLMHead": dict(is_decoder=True),
    "ZambaConfig": dict(  # whose attention is one and the same in two places
        num_hidden_layers=3,
        layers_block_type=["hybrid", "linear_attention", "hybrid"],
        use_mamba_kernels=False,
        attention_hidden_size=2 * WIDTH,
        attention_head_dim=2 * WIDTH // NUMBER_OF_HEADS,
    ),
    # ---- of sound ----------------------------------------------------------------------------------------------------
    "KyutaiSpeechToTextConfig": dict(
        num_codebooks=3, codebook_vocab_size=40, audio_bos_token_id=39, audio_pad_token_id=38
    ),
    "MimiConfig": dict(upsample_groups=WIDTH),
    "MoonshineStreamingConfig": dict(num_key_value_heads=NUMBER_OF_HEADS),
    "VibeVoiceAcousticTokenizerConfig": SMALL_STEM,
    "VibeVoiceAcousticTokenizerEncoderConfig": SMALL_STEM,
    "VibeVoiceAcousticTokenizerDecoderConfig": SMALL_STEM,
    # ---- of pictures and videos --------------------------------------------------------------------------------------
    "BeitForSemanticSegmentation": dict(num_hidden_layers=4, out_indices=[0, 1, 2, 3]),
    "DeformableDetrConfig": dict(num_queries=20),
    "DepthProConfig": dict(patch_size=64, image_size=256, intermediate_hook_ids=[1, 0]),
    "EfficientNetConfig": dict(image_size=224, width_coefficient=0.5, depth_coefficient=0.3, hidden_dim=640),
    "LwDetrViTConfig": dict(num_hidden_layers=LAYERS, out_indices=[1, 2], image_size=256),
    "LwDetrConfig": dict(projector_scale_factors=[1.0], num_queries=10),
    "PerceiverConfig": dict(num_latents=16),
    "PPDocLayoutV2Config": dict(class_thresholds=[0.5] * 7, class_order=list(range(7))),
    "Sapiens2Config": dict(head_config=dict(upsample_out_channels=[WIDTH], conv_out_channels=[WIDTH])),
    "VJEPA2Config": dict(
        crop_size=64,
        image_size=64,
        frames_per_clip=4,
        pred_hidden_size=WIDTH,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=2,
    ),
    # ---- of pictures and texts ---------------------------------------------------------------------------------------
    "Apertus1p5Config": dict(image_token_offset=FIRST_CODE),
    "Apertus1p5VisionTokenizerConfig": dict(codebook_size=CODES, image_size=64),
    "Blip2ForImageTextRetrieval": dict(image_token_index=None),
    "Blip2QFormerConfig": dict(use_qformer_text_input=True),
    "ChameleonConfig": dict(
        vocabulary_map={"<image>": PLACEHOLDER}
        | {f"IMGIMG{'ABCDEFGHIJ'[code // 10]}{'ABCDEFGHIJ'[code % 10]}Z": FIRST_CODE + code for code in range(CODES)}
    ),
    "ChameleonVQVAEConfig": dict(num_embeddings=CODES, image_size=64),
    "CohereCompassVisionConfig": dict(deepstack_visual_indexes=[0, 1]),
    "Dots3NoteVisionConfig": dict(adapter_in_dim=WIDTH, adapter_out_dim=WIDTH),
    "Dots3NoteAudioConfig": dict(adapter_input_size=WIDTH, adapter_out_dim=WIDTH),
    "Emu3Config": dict(
        vocabulary_map={"<image>": PLACEHOLDER, "<|extra_200|>": END_OF_ROW}
        | {f"<|visual token {code:06d}|>": FIRST_CODE + code for code in range(CODES)}
    ),
    "Emu3VQVAEConfig": dict(codebook_size=CODES, hidden_size=2 * WIDTH, image_size=64),
    "DeepseekOcr2SamVisionConfig": dict(downsample_channels=[WIDTH, WIDTH]),
    "DeepseekVLHybridConfig": dict(
        high_res_vision_config=dict(
            model_type="sam_vision_model",
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=NUMBER_OF_HEADS,
            global_attn_indexes=[0],
            image_size=64,
            output_channels=WIDTH,
            mlp_dim=4 * WIDTH,
        )
    ),
    "DiffusionGemmaConfig": dict(canvas_length=4),
    "FastVlmConfig": dict(
        vision_config=dict(
            model_type="timm_wrapper",
            architecture="fastvit_mci0",
            do_pooling=True,
            global_pool="avg",
            hidden_size=256,
            image_size=64,
            model_args=dict(inference_mode=True, layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128)),
        )
    ),
    "Florence2VisionConfig": dict(
        depths=(1, 1), patch_size=(7, 3), patch_stride=(4, 2), patch_padding=(3, 1), patch_prenorm=(False, True)
    )
    | dict(embed_dim=(32, WIDTH), num_heads=(2, 4), num_groups=(2, 4), window_size=4, image_size=64),
    "Gemma3nAudioConfig": dict(conf_num_hidden_layers=LAYERS),
    "Gemma3nVisionConfig": dict(model_args=dict(channel_multiplier=0.25), hidden_size=2048),
    "Granite4VisionConfig": dict(
        deepstack_layer_map=[[-1, 0]], spatial_target_layers=[0, 0, 1, 1], downsample_rate="1/2"
    ),
    "InklingVisionConfig": dict(text_hidden_size=WIDTH),
    "Inkling2VisionConfig": dict(text_hidden_size=WIDTH, projection_hidden_dim=WIDTH),
    "InstructBlipVideoConfig": dict(video_token_index=PLACEHOLDER),
    "Kimi_K25Config": dict(projection_hidden_size=WIDTH),
    "MllamaTextConfig": dict(num_key_value_heads=2),
    "Molmo2AdapterConfig": dict(text_hidden_size=WIDTH, vision_feature_layer=[-1, -2]),
    "Molmo2Config": dict(image_patch_id=PLACEHOLDER),
    "MuseGlimmerConfig": dict(out_hidden_size=4 * WIDTH, projector_hidden_size=WIDTH),
    "MuseSparkConfig": dict(out_hidden_size=4 * WIDTH, projector_hidden_size=WIDTH),
    "NemotronH_Omni_Reasoning_V3_Config": dict(vision_hidden_size=WIDTH, projector_hidden_size=WIDTH),
    "PI0Config": dict(chunk_size=4),
    "PerceptionLMConfig": dict(
        vision_config=dict(
            model_type="timm_wrapper",
            architecture="vit_pe_core_large_patch14_336",
            image_size=56,
            model_args=dict(
                embed_dim=WIDTH,
                img_size=(56, 56),
                depth=LAYERS,
                num_heads=4,
                global_pool="",
                use_post_transformer_norm=False,
                init_values=0.1,
                ref_feat_shape=(4, 4),
            ),
        )
    ),
    "ShieldGemma2Config": dict(yes_token_index=10, no_token_index=11),
    "TimmBackbone": dict(backbone="vit_tiny_patch16_224"),
    "UnlimitedOcrSamVisionConfig": dict(downsample_channels=[WIDTH, WIDTH]),
}
