"""What the rules by name cannot know, by model type of the config (sub-configs have their own entries)."""

from __future__ import annotations

from typing import Any

import transformers

from zoo.backbones import Part, tiny_resnet, tiny_vit

_LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}


_LETTERS = [*"ABCDEFGHIJ", *(f"B{c}" for c in "ABCDEF")]  # 0 to 15, as a family spells its digits
_TILED = {"image_grid_pinpoints": [[32, 64], [64, 32]]}

OVERRIDES: dict[str, dict[str, Any]] = {
    # pictures
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "bit": {"num_groups": 8},
    "bridgetower": {"hidden_size": 128},
    "bridgetower_text_model": {"hidden_size": 128},
    "bridgetower_vision_model": {"hidden_size": 128},
    "chmv2": {"backbone_config": {"return_class_token": True}},
    "cvt": {"depth": [1, 2, 3]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [1, 0]},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "levit": {"patch_size": 16, "image_size": 64},
    "lw_detr": {"projector_scale_factors": [1.0], "num_feature_levels": 1},
    "mobilevitv2": {"image_size": 64},
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [4, 4, 4, 4],
        "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [3],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam2_prompt_encoder": {"image_size": 64, "patch_size": 16},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam_vision_model": {"num_pos_feats": 16},
    "sam_hq_vision_model": {"num_pos_feats": 16},
    "superpoint": {"keypoint_decoder_dim": 65},
    "tvp": {"visual_prompt_size": 4, "max_img_size": 64},
    "vitmatte": {"fusion_hidden_sizes": [32, 32, 32, 32], "backbone_config": {"patch_size": 16, "image_size": 64}},
    **{
        name: {"window_size": 32, "fullatt_block_indexes": [1]}
        for name in ("qwen2_5_vl_vision", "exaone4_5_vision", "qwen2_5_omni_vision_encoder")
    },
    "apertus1p5": {
        "image_token_offset": 50,
        "audio_token_offset": 66,
        "vision_config": {"codebook_size": 16},
        "audio_config": {"codebook_size": 16},
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "align": {"projection_dim": 64},
    **{name: {"vision_config": Part("gemma4_vision")} for name in ("gemma4", "embedding_gemma2")},
    "gemma4_unified": {"vision_config": Part("gemma4_unified_vision")},
    "chameleon": {"vocabulary_map": {"<image>": 96, **{f"IMGIMG{letters}Z": 70 + i for i, letters in enumerate(_LETTERS)}}},
    "chameleon_vqgan": {"num_embeddings": 16},
    "emu3": {
        "vocabulary_map": {
            "<|extra_200|>": 95,
            "<image>": 96,
            **{f"<|visual token {i:06d}|>": 70 + i for i in range(16)},
        }
    },
    "emu3_vqgan": {"codebook_size": 16, "hidden_size": 128},
    "fast_vlm": {"vision_config": lambda arguments, tokens: tiny_resnet([4], hidden_size=32)},
    "perception_lm": {"vision_config": lambda arguments, tokens: tiny_vit(model_args={"embed_dim": 32})},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "2/4",
        "spatial_target_layers": [1],
        "vision_config": {"hidden_size": 128},
        **_TILED,
    },
    "llava_next": _TILED,
    "llava_next_video": _TILED,
    "llava_onevision": _TILED,
    "llama4_vision_model": {"intermediate_size": 128},
    "molmo2_vision": {"num_position_embeddings": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "oneformer": {"mask_dim": 32, "conv_dim": 32, "hidden_dim": 32},
    "sapiens2_head": {
        "upsample_out_channels": [32, 32],
        "upsample_kernel_sizes": [4, 4],
        "conv_out_channels": [32],
        "conv_kernel_sizes": [1],
    },
    "omdet-turbo": {
        "apply_layernorm_after_vision_backbone": False,
        "encoder_hidden_dim": 64,
        "decoder_hidden_dim": 64,
        "vision_features_channels": [64, 64, 64],
    },
    "seggpt": {
        "image_size": [64, 32],
        "num_hidden_layers": 5,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1, 2, 3, 4],
    },
    "udop": {"relative_attention_num_buckets": 32},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 32]},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4]},
    "mllama_vision_model": {"vision_output_dim": 64, "intermediate_layers_indices": [0]},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 192},
    "pix2struct_text_model": {"d_kv": 8},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 99, "class_order": list(range(99))},
    # time series
    **{
        name: {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "label_length": 4}
        for name in ("autoformer", "informer", "time_series_transformer")
    },
    # sound
    "audioflamingo3_encoder": {"intermediate_size": 128},
    "csm": {"codebook_size": 64},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 16},
    "glmasr_encoder": {"intermediate_size": 128},
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "nemotron_asr_streaming_encoder": {"default_num_lookahead_tokens": 1},
    "nemotron3_5_asr": {"default_num_lookahead_tokens": 1},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "granite_speech5_encoder": {"num_key_value_heads": 4},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "clap_audio_model": {"hidden_size": 64},
    "clvp_encoder": {"hidden_size": 128},
    "clvp_decoder": {"hidden_size": 128},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4},
    "qwen2_5_omni_thinker": {"vision_start_token_id": lambda arguments, tokens: tokens["vision_start_token_id"]},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": lambda arguments, tokens: tokens["vision_start_token_id"]},
    "neucodec": {"quantization_dim": 64, "num_key_value_heads": 4},
    "xcodec2": {"quantization_dim": 64, "num_key_value_heads": 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "vibevoice_acoustic_tokenizer": {"num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "voxtral_encoder": {"intermediate_size": 128},
    # several axes of position
    "cohere_compass_text": {"rope_parameters": {"full_attention": _mrope(2, 1, 1)}},
    **{name: {"rope_parameters": _mrope(4, 2, 2)} for name in ("cosmos3_edge_text",)},
    **{
        name: {"rope_parameters": _mrope(2, 1, 1)}
        for name in (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "qwen2_5_omni_text",
            "qwen2_5_omni_talker",
        )
    },
    **{
        name: {"rope_parameters": {**_mrope(1, 1, 0), "partial_rotary_factor": 0.5}}
        for name in ("glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text", "glmga_text")
    },
    "hunyuan_vl_text": {"rope_parameters": _mrope(4, 2, 2)},
    "paddleocr_vl_text": {"rope_parameters": _mrope(4, 2, 2)},
    # text
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "ernie4_5_vl_moe_text": {"rope_parameters": _mrope(1, 1, 2)},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 2, "index_kpool": 2},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "hy_v4_vl_text": {"rope_parameters": _mrope(1, 1, 0)},
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
    },
    "step3p5": {"sliding_window": 5},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"head_dim": 16},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 12,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
        "is_decoder": True,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "bamba": {"attn_layer_indices": [1]},
    "bros": {"hidden_size": 64},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": 99, "pad_token_id": 0, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {**_SHARED_KEYS, "intermediate_size": [40] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": _SHARED_KEYS,
    "gemma4_unified_text": _SHARED_KEYS,
    "granitemoehybrid": {"layer_types": _LINEAR_THEN_FULL},
    "helium": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "longformer": {"attention_window": 4},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "mpnet": {"relative_attention_num_buckets": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xmod": {"default_language": "en_XX"},
}

# Convolutions whose widths hang together too closely for rules; they are small enough as they are.
KEPT: set[str] = {
    "efficientloftr", "pp_lcnet_v4", "pp_ocrv5_mobile_rec", "pp_ocrv6_small_det", "pp_ocrv6_small_rec",
    "pp_ocrv6_tiny_rec", "uvdoc", "uvdoc_backbone",
}  # fmt: skip

# Another class than the one the tables would choose.
ARCHITECTURES: dict[str, str] = {
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",  # the whole has no forward
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",  # the whole has no forward
    "flava": "FlavaModel",  # the other needs a codebook's pixels
    "bark": "BarkSemanticModel",  # the whole has no forward
}

# A factor for the weights where attention patterns would otherwise be too even or too sharp.
WEIGHT_SCALE: dict[str, float] = {
    **dict.fromkeys(("gemma4_unified_assistant", "levit", "mobilebert", "t5gemma", "videoprism_vision_model"), 0.6),
    **dict.fromkeys(("axk2", "hy_v4", "inkling_text", "inkling_mm_model", "glm5_next_text", "mistral_large4"), 2.0),
    **dict.fromkeys(("funnel", "perceiver", "speecht5", "swin2sr"), 2.0),
    **dict.fromkeys(("mistral_large4_text", "swinv2", "granite_docling", "granite_docling_text"), 3.0),
}

# Families that draw random numbers in the forward, in evaluation mode too.
RANDOM: set[str] = {"diffusion_gemma", "vibevoice_acoustic_tokenizer", "vilt", "vits"}


def _assistant_gap() -> dict[str, str]:
    text = getattr(transformers, "Gemma4TextConfig", None)
    if hasattr(text, "kv_sharing_modes"):
        return {"gemma4_assistant": "the installed version refuses a text part that shares the keys of every layer"}
    return {}


def _llama4_gap() -> dict[str, str]:
    if transformers.__version__.startswith("5.24."):
        return {"llama4": "in transformers 5.24 its forward asks an output of its language model for pictures, which has none"}
    return {}


# Families with a tower for pictures that only get text here.
TEXT_ONLY: set[str] = {"diffusion_gemma", "glm_image", "phi4_multimodal"}

# What cannot be built, with the reason.
UNBUILDABLE: dict[str, str] = {
    "dinat": "needs the library natten",
    "edgetam": "its vision tower needs the library timm",
    "edgetam_vision_model": "needs the library timm",
    **_assistant_gap(),
    **_llama4_gap(),
    "gemma3n": "its vision tower needs the library timm",
    "gemma3n_vision": "needs the library timm",
    "glm_image_vqmodel": "has no forward",
    "higgs_audio_v2_tokenizer": "needs the library torchaudio",
    "layoutlmv2": "needs the library detectron2",
    "pp_ocrv5_server_det": "its default configuration has gaps (no attention in it)",
    "pp_ocrv6_medium_det": "its default configuration has gaps (no attention in it)",
    "pp_ocrv6_small_det": "the widths of its default configuration do not fit together (no attention in it)",
    "sam3_tracker_video": "its forward takes the session of a video",
    "timm_backbone": "needs the library timm",
    "uvdoc": "the widths of its default configuration do not fit together (no attention in it)",
    "timm_wrapper": "needs the library timm",
}
