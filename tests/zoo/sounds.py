"""Sound as waves or as spectra."""

from __future__ import annotations

from typing import Any

import torch

from zoo.shapes import BATCH, find, normal, parts

# Families whose spectra have the time before the bins.
_TIME_FIRST = {
    "audio-spectrogram-transformer", "canary", "cohere_asr", "granite_speech5_ctc", "granite_speech5_encoder", "lasr_ctc",
    "lasr_encoder", "parakeet_ctc", "parakeet_encoder", "parakeet_rnnt", "parakeet_tdt", "nemotron3_5_asr", "speech_to_text",
    "nemotron3_5_transcribe_asr_audio", "nemotron3_5_transcribe_audio", "nemotron_asr_streaming", "seamless_m4t",
    "nemotron_asr_streaming_encoder", "nemotron3_diarization", "nemotron3_diarization_audio", "wav2vec2-bert", "gemma4_audio",
    "granite_speech", "granite_speech_plus", "phi4_multimodal", "gemma3n", "gemma4", "univnet", "seamless_m4t_v2",
    "nemo_speechlm",
    "nemotron3_5_transcribe_word_timestamp", "fun_asr_nano", "fun_asr_nano_encoder",
    "neucodec", "xcodec2",
}  # fmt: skip
_WAVES_WITH_CHANNEL = {
    "dac", "encodec", "mimi", "mimi_encoder", "xcodec", "xcodec2", "neucodec", "higgs_audio_v2_tokenizer", "pe_audio",
    "pe_audio_encoder", "pe_audio_video", "pe_audio_video_encoder", "pocket_tts_audio_tokenizer", "moshi",
    "pocket_tts_audio_tokenizer_encoder", "vibevoice_acoustic_tokenizer", "vibevoice",
    "vibevoice_asr", "omniasr", "omniasr_audio", "omniasr_ctc", "wavtokenizer", "wavtokenizer_encoder", "apertus1p5",
}  # fmt: skip
# Where the width is a product of several fields.
_FIXED_BINS = {
    "fun_asr_nano": 112, "fun_asr_nano_encoder": 112, "gemma4_audio": 32, "granite_speech5_ctc": 64,
    "granite_speech5_encoder": 64,
}  # fmt: skip
# More samples than the others, for filters that are long.
_LENGTHS = {"pe_audio": 3840, "pe_audio_encoder": 3840, "pe_audio_video": 3840, "pe_audio_video_encoder": 3840}
_FRAMES = {"fun_asr_nano": 32, "fun_asr_nano_encoder": 32, "voxtral_realtime": 72, "xcodec2": 3, "neucodec": 3}
_BINS = ("num_mel_bins", "n_mels", "n_mel_bins", "feature_size", "input_feat_per_channel", "input_feat_size", "mel_bins")


def bins(config: Any) -> int:
    """The number of frequency bins of the part that hears."""
    found = _FIXED_BINS.get(config.model_type)
    if found is not None:
        return found
    for part in parts(config):
        for name in (*_BINS, "feature_projection_input_dim", "input_dim"):
            value = vars(part).get(name)
            if isinstance(value, int) and value:
                return value
    return 16


def add_sounds(made: dict[str, Any], config: Any, model_type: str, names: dict[str, Any], generator: torch.Generator) -> None:
    if "audio_config" in vars(config) and config.audio_config is None:
        return
    if "input_features" in names:
        length = _FRAMES.get(model_type) or 2 * (find(config, "max_source_positions") or find(config, "n_window") or 32)
        shape = (length, bins(config)) if model_type in _TIME_FIRST else (bins(config), length)
        made["input_features"] = normal(generator, BATCH, *shape)
        if "input_features_mask" in names:
            made["input_features_mask"] = torch.ones(BATCH, length, dtype=torch.long)
        if "feature_attention_mask" in names:
            made["feature_attention_mask"] = torch.ones(BATCH, length, dtype=torch.long)
    both = "input_features" in made and names["input_values"].default is None if "input_values" in names else False
    if "input_values" in names and not both:
        samples = _LENGTHS.get(model_type, 960)
        shape = (1, samples) if model_type in _WAVES_WITH_CHANNEL else (samples,)
        made["input_values"] = normal(generator, BATCH, *shape)
    if "attention_mask" in made and "input_ids" not in made:
        del made["attention_mask"]
