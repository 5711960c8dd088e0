"""Tiny random models of every family that the tests run on, built offline.

Two layers, four heads, two kv heads where the family groups, d_head different from d_model / heads where the family
allows, sliding windows shorter than the sequence, weights large enough for patterns that are clearly not uniform.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn

HEADS, KV_HEADS, D_MODEL, VOCAB, LAYERS, WINDOW = 4, 2, 32, 67, 2, 5
BATCH, LENGTH, PADDING = 2, 9, 3


@dataclass(frozen=True)
class TinyFamily:
    """One row. architecture and config: class names in transformers; options: of the config; kind: what inputs it takes."""

    name: str
    architecture: str
    config: str
    options: dict[str, Any]
    kind: str = "decoder"
    tweak: Callable[[Any], None] | None = None

    def build(self, implementation: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Any:
        """A model in evaluation mode, the same weights for the same seed whatever the implementation."""
        config = getattr(transformers, self.config)(**{**self.options, **options})
        config._attn_implementation = implementation
        torch.manual_seed(seed)
        model = getattr(transformers, self.architecture)(config)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and "norm" in name.lower() and "bias" not in name:
                    parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
                else:
                    scale = 0.3 if parameter.dim() > 1 else 0.2
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        model.tie_weights()
        return model.to(dtype).eval()

    def inputs(self, batch: int = BATCH, length: int = LENGTH, padding: int = PADDING, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs; the first row is padded on the left."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, VOCAB, (batch, length), generator=generator)
        if self.kind == "speech":
            return {"input_features": torch.randn(batch, 8, 24, generator=generator), "decoder_input_ids": ids}
        mask = torch.ones_like(ids)
        if padding:
            mask[0, :padding] = 0
            ids[0, :padding] = 0
        if self.kind == "encoder_decoder":
            decoder = torch.randint(5, VOCAB, (batch, length - 2), generator=generator)
            return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def sdpa(self) -> bool:
        """Whether the installed transformers runs it on sdpa, with all that it computes."""
        # Older versions offer it for Gemma 2, and leave its soft cap out there.
        return getattr(transformers, self.architecture)._supports_sdpa and self.name != "gemma2"

    @property
    def is_causal_lm(self) -> bool:
        return self.kind == "decoder"


def _common(**more: Any) -> dict[str, Any]:
    base = dict(
        vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=40,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return {**base, **more}


def _gpt2(**more: Any) -> dict[str, Any]:
    base = dict(vocab_size=VOCAB, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS, n_positions=64, bos_token_id=1, eos_token_id=2)
    return {**base, "pad_token_id": 0, **more}


def _bart(**more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=VOCAB, d_model=D_MODEL, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None, **more,
    )  # fmt: skip


_grouped = dict(num_key_value_heads=KV_HEADS)
_layer_types = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, TinyFamily] = {
    family.name: family
    for family in (
        TinyFamily("gpt2", "GPT2LMHeadModel", "GPT2Config", _gpt2()),
        TinyFamily(
            "gpt2_reordered",
            "GPT2LMHeadModel",
            "GPT2Config",
            _gpt2(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
        ),
        TinyFamily("gptj", "GPTJForCausalLM", "GPTJConfig", _gpt2(rotary_dim=4)),
        TinyFamily("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _common(rotary_pct=0.5)),
        TinyFamily("codegen", "CodeGenForCausalLM", "CodeGenConfig", _gpt2(rotary_dim=4)),
        TinyFamily("llama", "LlamaForCausalLM", "LlamaConfig", _common(**_grouped, head_dim=16)),
        TinyFamily("mistral", "MistralForCausalLM", "MistralConfig", _common(**_grouped, head_dim=16, sliding_window=WINDOW)),
        TinyFamily(
            "mixtral",
            "MixtralForCausalLM",
            "MixtralConfig",
            _common(**_grouped, head_dim=16, num_local_experts=4, sliding_window=None),
        ),
        TinyFamily("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _common(**_grouped)),
        TinyFamily("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _common(**_grouped, head_dim=16)),
        TinyFamily(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            _common(**_grouped, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        ),
        TinyFamily(
            "falcon_multi_query",
            "FalconForCausalLM",
            "FalconConfig",
            _common(multi_query=True, new_decoder_architecture=False, alibi=False, bias=True),
        ),
        TinyFamily(
            "falcon_grouped",
            "FalconForCausalLM",
            "FalconConfig",
            _common(new_decoder_architecture=True, num_kv_heads=KV_HEADS, alibi=False),
        ),
        TinyFamily(
            "falcon_alibi",
            "FalconForCausalLM",
            "FalconConfig",
            _common(multi_query=False, new_decoder_architecture=False, alibi=True),
        ),
        TinyFamily(
            "bloom",
            "BloomForCausalLM",
            "BloomConfig",
            dict(
                vocab_size=VOCAB,
                hidden_size=D_MODEL,
                n_layer=LAYERS,
                n_head=HEADS,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        TinyFamily(
            "opt",
            "OPTForCausalLM",
            "OPTConfig",
            dict(
                vocab_size=VOCAB,
                hidden_size=D_MODEL,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                ffn_dim=40,
                word_embed_proj_dim=D_MODEL,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        TinyFamily(
            "gpt_neo",
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            dict(
                vocab_size=VOCAB,
                hidden_size=D_MODEL,
                num_layers=LAYERS,
                num_heads=HEADS,
                max_position_embeddings=64,
                attention_types=[[["global", "local"], 1]],
                window_size=WINDOW,
                intermediate_size=40,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        TinyFamily(
            "mpt",
            "MptForCausalLM",
            "MptConfig",
            dict(
                vocab_size=VOCAB,
                d_model=D_MODEL,
                n_layers=LAYERS,
                n_heads=HEADS,
                max_seq_len=64,
                expansion_ratio=1,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        TinyFamily("phi", "PhiForCausalLM", "PhiConfig", _common(**_grouped, qk_layernorm=True, partial_rotary_factor=0.5)),
        TinyFamily("phi3", "Phi3ForCausalLM", "Phi3Config", _common(**_grouped, sliding_window=WINDOW)),
        TinyFamily(
            "gemma2",
            "Gemma2ForCausalLM",
            "Gemma2Config",
            _common(**_grouped, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=3.0),
        ),
        TinyFamily(
            "gemma3",
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            _common(**_grouped, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, layer_types=_layer_types),
        ),
        TinyFamily(
            "gpt_oss",
            "GptOssForCausalLM",
            "GptOssConfig",
            _common(
                **_grouped,
                head_dim=16,
                sliding_window=WINDOW,
                num_local_experts=4,
                num_experts_per_tok=2,
                layer_types=_layer_types,
            ),
        ),
        TinyFamily("olmo2", "Olmo2ForCausalLM", "Olmo2Config", _common(**_grouped)),
        TinyFamily(
            "stablelm", "StableLmForCausalLM", "StableLmConfig", _common(**_grouped, qk_layernorm=True, use_qkv_bias=True)
        ),
        TinyFamily(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            _common(
                num_key_value_heads=HEADS,
                q_lora_rank=16,
                kv_lora_rank=12,
                qk_rope_head_dim=4,
                qk_nope_head_dim=8,
                v_head_dim=12,
                n_routed_experts=4,
                n_group=1,
                topk_group=1,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                first_k_dense_replace=1,
            ),
        ),
        TinyFamily("bert", "BertForMaskedLM", "BertConfig", _common(), kind="encoder"),
        TinyFamily("roberta", "RobertaForMaskedLM", "RobertaConfig", _common(pad_token_id=1, bos_token_id=0), kind="encoder"),
        TinyFamily(
            "t5",
            "T5ForConditionalGeneration",
            "T5Config",
            dict(
                vocab_size=VOCAB,
                d_model=D_MODEL,
                d_kv=12,
                d_ff=40,
                num_layers=LAYERS,
                num_heads=HEADS,
                pad_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=0,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=16,
            ),
            kind="encoder_decoder",
        ),
        TinyFamily("bart", "BartForConditionalGeneration", "BartConfig", _bart(), kind="encoder_decoder"),
        TinyFamily(
            "whisper",
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {**_bart(), "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64},
            kind="speech",
        ),
    )
}

FAMILIES_ALL = list(FAMILIES)
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]


def model_class(model: nn.Module) -> str:
    return type(model).__name__
