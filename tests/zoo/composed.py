"""Configs that are put together by hand: of parts that have no default, or of numbers that hang together closely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from zoo.shrink import shrink


def _decoder() -> Any:
    config = shrink(transformers.BertConfig())
    config.is_decoder = config.add_cross_attention = True
    return config


def _started(config: Any) -> Any:
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def _text_to_text() -> Any:
    join = transformers.EncoderDecoderConfig.from_encoder_decoder_configs
    return _started(join(shrink(transformers.BertConfig()), _decoder()))


def _speech_to_text() -> Any:
    join = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs
    return _started(join(shrink(transformers.Wav2Vec2Config()), _decoder()))


def _picture_to_text() -> Any:
    join = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs
    return _started(join(shrink(transformers.ViTConfig()), _decoder()))


def _picture_and_text() -> Any:
    join = transformers.VisionTextDualEncoderConfig.from_vision_text_configs
    return join(shrink(transformers.ViTConfig()), shrink(transformers.BertConfig()), projection_dim=32)


def _narrow_convolutions() -> Any:
    return transformers.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, image_size=64, dropout_rate=0.0
    )


def _assistant() -> Any:
    text = transformers.Gemma4TextConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        global_head_dim=16, intermediate_size=40, sliding_window=5, layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma4AssistantConfig(text_config=text, backbone_hidden_size=32)


COMPOSED: dict[str, Callable[[], Any]] = {
    "efficientnet": _narrow_convolutions,
    "encoder-decoder": _text_to_text,
    "gemma4_assistant": _assistant,
    "speech-encoder-decoder": _speech_to_text,
    "vision-encoder-decoder": _picture_to_text,
    "vision-text-dual-encoder": _picture_and_text,
}
