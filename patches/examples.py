"""Arguments that some inline attentions cannot do without, for the one small run in which they are recorded.

Nothing else is said of these classes: what they compute is read off their own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.family import register_example


def _models(*names: str) -> list[str]:
    """Full class names from "folder.Class"."""
    parts = [name.split(".") for name in names]
    return [f"transformers.models.{folder}.modeling_{folder}.{cls}" for folder, cls in parts]


def _pairs(states: Tensor, *lead: int) -> Tensor:
    """(lead.., query, key) zeros."""
    return states.new_zeros(*lead, states.shape[1], states.shape[1])


@register_example(
    *_models("big_bird.BigBirdBlockSparseAttention", "bigbird_pegasus.BigBirdPegasusBlockSparseAttention"),
)
def blocks(module: Any, states: Tensor) -> dict[str, Any]:
    """As many as its random ones need. It has several softmaxes, and is refused for that, not for what it is given."""
    size, count = module.block_size, 2 * module.num_random_blocks + 6
    blocked = states.new_ones(1, count, size)
    return {
        "hidden_states": states.new_ones(1, count * size, states.shape[-1]),
        "band_mask": states.new_ones(1, 1, count - 4, size, 3 * size),
        "from_mask": states.new_ones(1, 1, count * size, 1),
        "to_mask": states.new_ones(1, 1, 1, count * size),
        "from_blocked_mask": blocked,
        "to_blocked_mask": blocked,
    }


@register_example(*_models("cpmant.CpmAntAttention"))
def keys_and_bias(module: Any, states: Tensor) -> dict[str, Any]:
    bias = _pairs(states, module.num_heads)
    return {"hidden_kv": states, "attention_mask": _pairs(states, len(states)) == 0, "position_bias": bias}


@register_example(*_models("deberta.DisentangledSelfAttention", "deberta_v2.DisentangledSelfAttention"))
def relative_embeddings(module: Any, states: Tensor) -> dict[str, Any]:
    reach = getattr(module, "pos_ebd_size", getattr(module, "max_relative_positions", 1))
    distance = torch.zeros(1, states.shape[1], states.shape[1], dtype=torch.long, device=states.device)
    return {
        "attention_mask": _pairs(states, len(states), 1) == 0,
        "rel_embeddings": states.new_ones(2 * reach, states.shape[-1]),
        "relative_pos": distance,
    }


@register_example(*_models("fastspeech2_conformer.FastSpeech2ConformerAttention"))
def embedded_distances(module: Any, states: Tensor) -> dict[str, Any]:
    distances = states.new_ones(len(states), 2 * states.shape[1] - 1, states.shape[-1])
    return {"pos_emb": distances, "attention_mask": states.new_ones(len(states), 1, states.shape[1])}


@register_example(*_models("funnel.FunnelRelMultiheadAttention"))
def position_terms(module: Any, states: Tensor) -> dict[str, Any]:
    length, width = states.shape[1:]
    positions: Any = [states.new_ones(length, width)] * 4
    if module.config.attention_type != "factorized":
        positions = [[states.new_ones(4 * length, width)] * 2] * (module.block_index + 1)
    return {"key": states, "value": states, "attention_inputs": (positions, None, None, None)}


@register_example(
    *_models("granite_speech.GraniteSpeechConformerAttention", "granite_speech_plus.GraniteSpeechPlusConformerAttention")
)
def distances(module: Any, states: Tensor) -> dict[str, Any]:
    size = module.context_size
    return {"attention_dists": torch.zeros(size, size, dtype=torch.long, device=states.device)}


@register_example(*_models("layoutlmv3.LayoutLMv3SelfAttention", "layoutlmv2.LayoutLMv2SelfAttention"))
def layout_biases(module: Any, states: Tensor) -> dict[str, Any]:
    bias = _pairs(states, len(states), module.num_attention_heads)
    return {"rel_pos": bias, "rel_2d_pos": bias}


@register_example(*_models("gemma3n.Gemma3nAudioAttention"))
def padding(module: Any, states: Tensor) -> dict[str, Any]:
    return {"mask": torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)}


@register_example(*_models("evolla.EvollaSequenceCompressorAttention"))
def latents(module: Any, states: Tensor) -> dict[str, Any]:
    return {"latents": states, "mask": states.new_ones(len(states), 2 * states.shape[1])}


@register_example(*_models("fun_asr_nano.FunAsrNanoAttention"))
def frames(module: Any, states: Tensor) -> dict[str, Any]:
    return {"input_features_mask": states.new_ones(states.shape[:2])}


@register_example(*_models("gemma4.Gemma4VisionAttention"))
def grid(module: Any, states: Tensor) -> dict[str, Any]:
    return {"position_ids": torch.zeros(len(states), states.shape[1], 2, dtype=torch.long, device=states.device)}


class _Shared(dict[str, Any]):
    """Keys and values of an earlier layer, whatever its name."""

    def __init__(self, module: Any, states: Tensor) -> None:
        super().__init__()
        self.shape = (len(states), module.config.num_key_value_heads, states.shape[1], module.head_dim)
        self.states = states

    def __missing__(self, layer: Any) -> tuple[Tensor, Tensor]:
        return self.states.new_ones(self.shape), self.states.new_ones(self.shape)


@register_example(
    *_models("gemma3n.Gemma3nTextAttention", "gemma4.Gemma4TextAttention", "gemma4_unified.Gemma4UnifiedTextAttention")
)
def keys_and_values_of_another_layer(module: Any, states: Tensor) -> dict[str, Any]:
    return {"shared_kv_states": _Shared(module, states)}


@register_example(*_models("speecht5.SpeechT5Attention"))
def relative_keys(module: Any, states: Tensor) -> dict[str, Any]:
    length = states.shape[1]
    return {} if module.is_decoder else {"position_bias": states.new_ones(length, length, module.head_dim)}


@register_example(*_models("granite_speech5.GraniteSpeech5EncoderAttention"))
def distances_in_a_block(module: Any, states: Tensor) -> dict[str, Any]:
    size = module.context_size
    return {"position_embeddings": torch.zeros(size, size, dtype=torch.long, device=states.device)}


@register_example(
    *_models("inkling2.Inkling2SlidingAttention", "inkling2.Inkling2FullAttention"),
    *_models("inkling2_loop.Inkling2LoopSlidingAttention", "inkling2_loop.Inkling2LoopFullAttention"),
)
def positions_and_distances(module: Any, states: Tensor) -> dict[str, Any]:
    places = torch.arange(states.shape[1], device=states.device)
    return {
        "key_hidden_states": states,
        "value_hidden_states": states,
        "position_ids": places[None],
        "relative_distance": places[:, None] - places,
    }


@register_example(
    *_models("inkling2.Inkling2BlockAttentionResidual", "inkling2_loop.Inkling2LoopBlockAttentionResidual"),
    *_models("inkling2_loop.Inkling2LoopMessageAttentionResidual"),
)
def sums_of_layers(module: Any, states: Tensor) -> dict[str, Any]:
    """Each position looks back at what blocks of layers gave there: no heads, and seen to be none."""
    shape = (*states.shape[:-1], module.query.shape[-1])
    blocks = states.new_ones(*shape[:-1], 5, shape[-1])
    return {"block_states": blocks, "partial_block_states": states.new_ones(shape), "loop_layer_idx": 0}


@register_example(*_models("llama4.Llama4VisionAttention"))
def complex_angles(module: Any, states: Tensor) -> dict[str, Any]:
    return {"freqs_ci": torch.ones(states.shape[1], module.head_dim // 2, dtype=torch.complex64, device=states.device)}


@register_example(*_models("mlcd.MLCDAttention"))
def angles_without_a_batch(module: Any, states: Tensor) -> dict[str, Any]:
    return {"position_embeddings": (states.new_ones(states.shape[1], 1),) * 2}


@register_example(*_models("wav2vec2_conformer.Wav2Vec2ConformerSelfAttention"))
def relative_or_rotary(module: Any, states: Tensor) -> dict[str, Any]:
    if module.position_embeddings_type == "rotary":
        width = states.shape[-1] // module.num_heads
        return {"relative_position_embeddings": states.new_ones(2, states.shape[1], 1, 1, width)}
    return {"relative_position_embeddings": states.new_ones(1, 2 * states.shape[1] - 1, states.shape[-1])}


@register_example(*_models("wavlm.WavLMAttention"))
def bias_of_the_first_layer(module: Any, states: Tensor) -> dict[str, Any]:
    return {"position_bias": _pairs(states, len(states) * module.num_heads)}


@register_example(*_models("xcodec2.Xcodec2Attention", "neucodec.NeuCodecAttention"))
def angles_by_head(module: Any, states: Tensor) -> dict[str, Any]:
    return {"position_embeddings": (states.new_ones(1, module.config.num_attention_heads, 1),) * 2}


@register_example(*_models("perceiver.PerceiverSelfAttention"))
def inputs_of_their_own_width(module: Any, states: Tensor) -> dict[str, Any]:
    if isinstance(module.layernorm2, torch.nn.Identity):
        return {}
    return {
        "hidden_states": states.new_ones(*states.shape[:-1], module.query.in_features),
        "inputs": states.new_ones(len(states), 5, module.key.in_features),
    }


@register_example(*_models("t5gemma2.T5Gemma2MergedAttention"))
def states_of_the_encoder(module: Any, states: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": states.new_ones(len(states), 5, states.shape[-1])}


@register_example(*_models("muse_glimmer_assistant.MuseGlimmerAssistantAttention"))
def context_before_the_states(module: Any, states: Tensor) -> dict[str, Any]:
    context = states.new_ones(len(states), 5, states.shape[-1])
    angles = states.new_ones(1, 5 + states.shape[1], module.head_dim)
    return {"context_hidden_states": context, "position_embeddings": (angles, angles)}


@register_example(*_models("slanet.SLANetAttentionGRUCell", "slanext.SLANeXtAttentionGRUCell"))
def one_step_of_a_recurrence(module: Any, states: Tensor) -> dict[str, Any]:
    read, width = module.input_to_hidden.in_features, module.hidden_to_hidden.in_features
    return {
        "prev_hidden": states.new_ones(len(states), width),
        "batch_hidden": states.new_ones(len(states), 5, read),
        "char_onehots": states.new_ones(len(states), module.rnn.input_size - read),
    }


@register_example(*_models("evolla.EvollaSequenceAlignerCrossAttention"))
def modalities(module: Any, states: Tensor) -> dict[str, Any]:
    """Three positions of each modality that the class has keys for."""
    found: dict[str, Any] = {"query_attn_mask": states.new_ones(states.shape[:2])}
    for name in ("protein", "structure", "msa"):
        key = getattr(module, f"key_{name}")
        found[f"{name}_kv_states"] = key and states.new_ones(len(states), 3, key.in_features)
        found[f"{name}_kv_attn_mask"] = key and states.new_ones(len(states), 3)
    return found


@register_example(*_models("xlnet.XLNetRelativeAttention"))
def one_stream(module: Any, states: Tensor) -> dict[str, Any]:
    """Sequence first; without the second stream, which predicts permuted tokens."""
    states = states.new_ones(3, 2, module.d_model)
    return {"h": states, "g": None, "r": states.new_ones(6, 2, module.d_model), "seg_mat": None}
