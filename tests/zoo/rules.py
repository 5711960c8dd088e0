"""What each field of a configuration becomes: rules by the field's name alone, for all families."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

D_MODEL, HEADS, KV_HEADS, HEAD_DIM, LAYERS, FFN, VOCAB, WINDOW, POSITIONS = 32, 4, 2, 16, 2, 40, 99, 5, 64

Rule = Callable[[int], int]


def _at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


def _to(new: int) -> Rule:
    return lambda value: new if value else value


# The first pattern that matches the whole name decides. Values that are not positive stay as they are.
_RULES: list[tuple[re.Pattern[str], Rule]] = [
    (re.compile(pattern), rule)
    for pattern, rule in (
        # what must keep its value
        (r"num_channels|in_chans|in_channels|input_channels|audio_channels|num_channels_out|out_channels", _at_most(32)),
        (r"(.*_)?kernel(_sizes?)?", _at_most(31)),
        (r".*(coefficient|cost|temperature|theta|stride|_rate|_factor|_base|_value|ignore_index)", lambda v: v),
        (r"chunk_size_feed_forward|pretraining_tp|spatial_merge_size|temporal_patch_size|merge_size|seed", lambda v: v),
        # token ids are given out by the shrinker, sizes of vocabularies are all the same
        (r"max_2d_position_embeddings|type_vocab_size|task_type_vocab_size", lambda v: v),
        (r"(.*_)?vocab_size(_.*)?|num_embeddings|entity_vocab_size|.*_hash_buckets", _to(VOCAB)),
        (r"codebook_size", _at_most(64)),  # often a power of two
        # layers
        (r"num_feature_levels|num_feat_extract_layers", lambda v: v),
        (r"(.*_)?(n|num)?_?(hidden_)?layers?|layers|depth|(.*_)?depth", _at_most(LAYERS)),
        (r"num_blocks|num_.*layers|.*_num_layers", _at_most(LAYERS)),
        (r"num_layers_per_stack|n_layers?|encoder_layers", _at_most(LAYERS)),
        (r"decoder_layers|num_self_attends_per_block|resampler_depth", _at_most(LAYERS)),
        (r"first_k_dense_replace|.*_sparse_step|decoder_sparse_step", _at_most(1)),
        (r"max_window_layers", _at_most(1)),
        # heads
        (r"(.*_)?(num_key_value_(attention_)?heads|num_kv_heads|kv_n_heads|n_head_kv)", _at_most(KV_HEADS)),
        (r"linear_num_key_heads|num_query_groups", _to(KV_HEADS)),
        (r"index_n_heads", _to(KV_HEADS)),
        (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|num_heads_mamba", _to(HEADS)),
        (r"(.*_)?(attention_heads|num_heads|n_heads?|num_attn_heads|resampler_heads|num_attention_heads)", _to(HEADS)),
        # head sizes
        (r"qk_rope_head_dim", _to(4)),
        (r"qk_nope_head_dim|index_head_dim|linear_(key|value)_head_dim|linear_head_dim|kv_channels", _to(8)),
        (r"v_head_dim|d_kv", _to(12)),
        (r"mamba_(d_)?head(_dim)?", _to(16)),
        (r"(.*_)?head_dim|dim_head|(.*_)?attention_head_dim", _to(HEAD_DIM)),
        (r"q_lora_rank|o_lora_rank", _to(16)),
        (r"kv_lora_rank", _to(12)),
        (r"rotary_dim", _to(4)),
        (r"query_pre_attn_scalar", _to(HEAD_DIM)),
        # mixtures of experts
        (r"n_group|topk_group|num_expert_group|n_expert_groups?", _to(1)),
        (r"(.*_)?(top_k|topk|num_experts_per_tok(en)?|moe_top_k|moe_k|num_selected_experts)", _at_most(2)),
        (r"(.*_)?(n_shared_experts|num_shared_experts)", _at_most(1)),
        (r"(.*_)?(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)", _at_most(4)),
        (r"(.*_)?(moe|expert|experts).*(intermediate|ffn|hidden).*", _to(16)),
        # positions, windows, lengths
        (r"(attention_chunk|chunk|mamba_chunk|conf_attention_chunk)_size|.*_chunk_(length|size)", _at_most(8)),
        (r"(.*_)?(sliding_window(_size)?|attention_window_size|local_attention)", _at_most(WINDOW)),
        (r"(.*_)?(window_size|num_windows)", _at_most(4)),
        (r"(.*_)?(max_.*position(s|_embeddings)?|n_positions|n_ctx)", _at_most(POSITIONS)),
        (r"(.*_)?(max_seq_len|max_length|seq_len|model_max_length)", _at_most(POSITIONS)),
        (r"original_max_position_embeddings", _at_most(32)),
        (r"max_source_positions|max_sequence_length|max_bucket_distance|context_length", _at_most(POSITIONS)),
        (r"relative_attention_num_buckets|rel_pos_bins|rel_2d_pos_bins", _at_most(8)),
        (r"relative_attention_max_distance|max_rel_pos|max_rel_2d_pos", _at_most(16)),
        # images and sound
        (r"pos_emb_(height|width)", _at_most(8)),
        (r"(.*_)?(image_size|img_size|pretrain_image_size|crop_size|max_img_size)", _to(32)),
        (r"(.*_)?patch_size", _at_most(8)),
        (r"num_mel_bins|n_mel_bins|num_mel_channels|mel_dim|n_mels|model_in_dim", _at_most(16)),
        (r"num_frames|frames_per_clip", _at_most(4)),
        (r"num_queries|num_denoising|num_detection_tokens", _at_most(8)),
        (r"num_query_tokens|two_stage_num_proposals|num_object_queries", _at_most(8)),
        (r"(.*_)?(num_latents|num_latents_2d|latent_query_num)|resampler_n_latents", _at_most(4)),
        (r"num_image_tokens|mm_tokens_per_image", _at_most(4)),
        (r"num_codebooks|n_codebooks|num_quantizers|n_codes_total|num_code_groups", _at_most(4)),
        (r"train_num_points", _at_most(16)),
        # state space models
        (r"(.*_)?n_groups", _at_most(2)),
        (r"state_size|mamba_d_state|ssm_state_size|(.*_)?d_state", _at_most(8)),
        (r"mamba_d_ssm|mamba_dt_rank|time_step_rank", _at_most(8)),
        # sizes
        (r"(.*_)?(intermediate|ffn|feedforward|mlp|ff|dff)(_(dim|size))?(_mlp)?", _to(FFN)),
        (r"(.*_)?(intermediate|ffn|feedforward|mlp)_(hidden_size|hidden_dim|intermediate_size)|d_inner", _to(FFN)),
        (r"(.*_)?dim_(feedforward|ff)|(.*_)?d_ff|(.*_)?dff|(.*_)?intermediate_(size|dim).*|(.*_)?linear_units", _to(FFN)),
        (r"hidden_size|d_model|n_embd|dim", _to(D_MODEL)),
        (r"(.*_)?hidden_(size|dim)|(.*_)?embed_dim|(.*_)?proj(ection)?_(dim|size)", _to(D_MODEL)),
        (r"(.*_)?(hidden_size|embed(ding)?_(dim|size)|emb_(dim|size)|d_model)", _at_most(D_MODEL)),
        (r"(.*_)?(model_dim|output_dim|input_dim|width)", _at_most(D_MODEL)),
        (r".*(_size|_dim|_dims|_channels?|_units|_features|_rank|_width|_filters|_outplanes|_inplanes)", _at_most(D_MODEL)),
        (r"num_filters|lru_width|latent_channels", _at_most(D_MODEL)),
        (r"upsample_groups|vector_quantization_hidden_dimension|hidden_size_global", _at_most(D_MODEL)),
    )
]  # fmt: skip


def scalar(name: str, value: int) -> int:
    """The small value of an integer field."""
    if value <= 0:
        return value
    for pattern, rule in _RULES:
        if pattern.fullmatch(name):
            return rule(value)
    return value


_STAGE_LAYERS = re.compile(
    r"(.*_)?(depths|num_block_repeats|blocks_per_stage|stage_num_blocks|block_sizes|stage_numb_of_layers|depth)"
)
_STAGE_HEADS = re.compile(r"(.*_)?num_(attention_)?heads(_per_stage)?|num_attention_heads_per_layer")
_STAGE_SIZES = re.compile(
    r"(.*_)?(hidden_sizes|embed_dims?|embed_dim_per_stage|conv_dim|channels?|in_channels|out_channels|feature_sizes"
    r"|channel_list|feature_dims|vision_features_channels|tdnn_dim)"
)


def sequence(name: str, value: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    """The small value of a field with one entry for each stage: the number of stages stays."""
    if not value or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
        return value
    if _STAGE_LAYERS.fullmatch(name):
        return type(value)(min(entry, LAYERS) for entry in value)
    if _STAGE_HEADS.fullmatch(name):
        return type(value)(HEADS for _ in value)
    if _STAGE_SIZES.fullmatch(name):
        return type(value)(min(entry, D_MODEL) for entry in value)
    if name in {"image_size", "img_size"}:
        return type(value)(32 for _ in value)
    if name == "patch_size":
        return type(value)(min(entry, 8) for entry in value)
    return value
