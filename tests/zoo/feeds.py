"""Inputs that the general rules cannot make, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.placeholders import insert
from zoo.shapes import BATCH, LENGTH, find, ids, normal

Made = dict[str, Any]
Feed = Callable[[Any, Made, torch.Generator], Made]


def _codebooks_in_batch(model: Any, made: Made, generator: torch.Generator) -> Made:
    books = find(model.config, "num_codebooks")
    return {**made, "decoder_input_ids": ids(generator, LENGTH, batch=BATCH * books)}


def _spectrogram(model: Any, made: Made, generator: torch.Generator) -> Made:
    config = model.config
    return {"input_values": normal(generator, BATCH, config.max_length, config.num_mel_bins)}


def _clap(model: Any, made: Made, generator: torch.Generator) -> Made:
    audio = model.config.audio_config
    features = normal(generator, BATCH, 1, audio.spec_size, audio.num_mel_bins)
    return {**made, "input_features": features, "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)}


def _embedded_sound(model: Any, made: Made, generator: torch.Generator) -> Made:
    features = normal(generator, BATCH, LENGTH, model.config.d_model)
    return {"input_features": features, "decoder_input_ids": made["decoder_input_ids"]}


def _dia(model: Any, made: Made, generator: torch.Generator) -> Made:
    decoder = model.config.decoder_config
    shape = (BATCH, LENGTH - 2, decoder.num_channels)
    return {**made, "decoder_input_ids": torch.randint(5, 60, shape, generator=generator)}


def _lxmert(model: Any, made: Made, generator: torch.Generator) -> Made:
    features = normal(generator, BATCH, 4, model.config.visual_feat_dim)
    places = torch.rand(BATCH, 4, model.config.visual_pos_dim, generator=generator)
    return {**made, "visual_feats": features, "visual_pos": places}


def _jev(model: Any, made: Made, generator: torch.Generator) -> Made:
    one = made["input_ids"][1:]
    question = {"marks": [[3, 6]], "num_options": [[2, 2]], "question_type_ids": [[1, 1]]}
    return {"input_ids": one, **{name: torch.tensor(value) for name, value in question.items()}}


def _gemma3n_audio(model: Any, made: Made, generator: torch.Generator) -> Made:
    mel = normal(generator, BATCH, 64, model.config.input_feat_size)
    return {"audio_mel": mel, "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool)}


def _padding_mask(model: Any, made: Made, generator: torch.Generator) -> Made:
    mask = torch.ones(BATCH, made["input_values"].shape[-1], dtype=torch.bool)
    return {**made, "padding_mask": mask, "sample": False}  # the mean, not a draw


def _all_of_each_wave(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {**made, "padding_mask": torch.ones(BATCH, made["input_values"].shape[-1], dtype=torch.long)}


def _waves_only(model: Any, made: Made, generator: torch.Generator) -> Made:
    made.pop("input_features", None)
    return {**made, "input_values": normal(generator, BATCH, 960)}


def _past_values(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {"past_values": normal(generator, BATCH, model.config.context_length)}


def _past_channels(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {"past_values": normal(generator, BATCH, model.config.context_length, model.config.num_input_channels)}


def _past_and_future(model: Any, made: Made, generator: torch.Generator) -> Made:
    config = model.config
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    features = config.num_time_features
    return {
        "past_values": normal(generator, BATCH, past),
        "past_time_features": normal(generator, BATCH, past, features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": normal(generator, BATCH, future),
        "future_time_features": normal(generator, BATCH, future, features),
    }


def _episode(model: Any, made: Made, generator: torch.Generator) -> Made:
    config = model.config
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return {
        "states": normal(generator, BATCH, LENGTH, config.state_dim),
        "actions": normal(generator, BATCH, LENGTH, config.act_dim),
        "rewards": normal(generator, BATCH, LENGTH, 1),
        "returns_to_go": normal(generator, BATCH, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).expand(BATCH, -1),
        "attention_mask": mask,
    }


def _embeds(name: str, width: str = "hidden_size", channels_first: bool = False) -> Feed:
    def feed(model: Any, made: Made, generator: torch.Generator) -> Made:
        size = find(model.config, width)
        shape = (size, LENGTH) if channels_first else (LENGTH, size)
        return {name: normal(generator, BATCH, *shape)}

    return feed


def _queries(model: Any, made: Made, generator: torch.Generator) -> Made:
    config = model.config
    return {
        "query_embeds": normal(generator, BATCH, 4, config.hidden_size),
        "encoder_hidden_states": normal(generator, BATCH, LENGTH, config.encoder_hidden_size),
    }


def _without(*names: str) -> Feed:
    def feed(model: Any, made: Made, generator: torch.Generator) -> Made:
        return {name: value for name, value in made.items() if name not in names}

    return feed


def _wave(name: str) -> Feed:
    def feed(model: Any, made: Made, generator: torch.Generator) -> Made:
        return {name: normal(generator, BATCH, 1, 960)}

    return feed


def _text_and_codes(model: Any, made: Made, generator: torch.Generator) -> Made:
    books = model.config.num_codebooks
    codes = torch.randint(5, 60, (BATCH, LENGTH, books), generator=generator)
    return {**made, "input_ids": torch.cat([made["input_ids"][..., None], codes], dim=-1)}


def _padded_sound(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {**made, "padding_mask": torch.ones(BATCH, model.config.audio_chunk_size, dtype=torch.bool)}


def _timed_sound(model: Any, made: Made, generator: torch.Generator) -> Made:
    count = made["input_features"].shape[-1] // 4
    return insert(made, model.config.audio_token_id, count, 3)


def _one_sound(model: Any, made: Made, generator: torch.Generator) -> Made:
    return insert(made, find(model.config, "audio_token_index", "audio_token_id"), 1, 3)


def _task(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {**made, "task_inputs": ids(generator, model.config.task_seq_len)}


def _shown_example(model: Any, made: Made, generator: torch.Generator) -> Made:
    pixels = made["pixel_values"]
    return {
        **made,
        "prompt_pixel_values": normal(generator, *pixels.shape),
        "prompt_masks": normal(generator, *pixels.shape),
    }


def _time_condition(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {**made, "t_cond": normal(generator, BATCH, 1, model.config.hidden_size)}


def _drafting(model: Any, made: Made, generator: torch.Generator) -> Made:
    config = model.config
    width = config.hidden_size * len(config.target_layer_ids)
    return {
        "noise_embeds": normal(generator, BATCH, config.block_size, config.hidden_size),
        "context_hidden_states": normal(generator, BATCH, LENGTH, width),
        # the mask that the family makes without a cache leaves the context out
        "attention_mask": {"full_attention": None, "sliding_attention": None},
    }


def _chroma(model: Any, made: Made, generator: torch.Generator) -> Made:
    made = {**made, "input_features": normal(generator, BATCH, 8, find(model.config, "num_chroma"))}
    return _codebooks_in_batch(model, made, generator)


def _shared_keys(model: Any, made: Made, generator: torch.Generator) -> Made:
    config = model.config.get_text_config()
    states = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        shape = (BATCH, config.num_attention_heads // attention.num_key_value_groups, LENGTH, attention.head_dim)
        states[attention.layer_type] = (normal(generator, *shape), normal(generator, *shape))
    embeds = normal(generator, BATCH, LENGTH, 2 * model.config.backbone_hidden_size)
    places = torch.arange(LENGTH).expand(BATCH, -1)
    mask = made["attention_mask"]
    return {"inputs_embeds": embeds, "shared_kv_states": states, "position_ids": places, "attention_mask": mask}


def _noise(model: Any, made: Made, generator: torch.Generator) -> Made:
    length = made["input_features"].shape[1]
    return {**made, "noise_sequence": normal(generator, BATCH, length, model.config.model_in_channels)}


FEEDS: dict[str, Feed] = {
    "univnet": _noise,
    "gemma4_assistant": _shared_keys,
    "gemma4_unified_assistant": _shared_keys,
    "apertus1p5": _all_of_each_wave,
    "autoformer": _past_and_future,
    "blip_2_qformer": _queries,
    "csm": _without("input_values"),
    "decision_transformer": _episode,
    "granite_speech": _without("input_features_mask"),
    "granite_speech_plus": _without("input_features_mask"),
    "informer": _past_and_future,
    "kyutai_speech_to_text": _text_and_codes,
    "mimi_decoder": _embeds("latents", channels_first=True),
    "moss_transcribe_diarize": _padded_sound,
    "muse_glimmer_assistant": _drafting,
    "musicflamingo": _timed_sound,
    "nemotron3_5_transcribe_word_timestamp": _embeds("inputs_embeds"),
    "oneformer": _task,
    "patchtsmixer": _past_channels,
    "patchtst": _past_channels,
    "pocket_tts_audio_tokenizer_decoder": _embeds("latents", channels_first=True),
    "qwen2_audio": _one_sound,
    "seggpt": _shown_example,
    "time_series_transformer": _past_and_future,
    "timesfm": _past_values,
    "timesfm2_5": _past_values,
    "vibevoice_acoustic_tokenizer_decoder": _embeds("hidden_states", channels_first=True),
    "vibevoice_acoustic_tokenizer_encoder": _wave("hidden_states"),
    "vibevoice_asr": _padding_mask,
    "voxtral_realtime_text": _time_condition,
    "audio-spectrogram-transformer": _spectrogram,
    "clap": _clap,
    "dia": _dia,
    "gemma3n_audio": _gemma3n_audio,
    "jev": _jev,
    "lxmert": _lxmert,
    "musicgen": _codebooks_in_batch,
    "musicgen_melody": _chroma,
    "pop2piano": _embedded_sound,
    "speech-encoder-decoder": _waves_only,
    "vibevoice": _padding_mask,
}
