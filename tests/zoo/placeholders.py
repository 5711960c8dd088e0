"""Put as many placeholders for an image into the text as the model has features for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.shapes import find

# The placeholder's id in the config, the method that computes the features, the inputs that it needs.
_KINDS = (
    (("image_token_id", "image_token_index", "media_placeholder_token_id"), "get_image_features", ("pixel_values",)),
    (("audio_token_id", "audio_token_index"), "get_audio_features", ("input_features", "input_values")),
)
_ELSEWHERE = {"pi0"}  # pictures go before the text, not into it
_TYPE = {"get_image_features": 1, "get_audio_features": 3}
_TEXT = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "decoder_input_ids"}
_PASSED_ON = {"padding_mask", "image_merge_sizes", "sample"}
_OPEN = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def count_features(features: Any) -> int:
    """How many vectors there are, all images together."""
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    return sum(tensor.numel() // tensor.shape[-1] for tensor in _tensors(features))


def _method(model: Any, name: str) -> Any:
    return next((getattr(module, name) for module in model.modules() if hasattr(module, name)), None)


def _token(config: Any, names: tuple[str, ...]) -> int | None:
    value = find(config, *names)
    return value if isinstance(value, int) else None


def add_placeholders(model: Any, made: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with the placeholders after the padding of each row."""
    if "input_ids" not in made or model.config.model_type in _ELSEWHERE:
        return made
    for names, method_name, inputs in _KINDS:
        token, method = _token(model.config, names), _method(model, method_name)
        if token is None or method is None or not any(name in made for name in inputs):
            continue
        if bool((made["input_ids"] == token).any()):
            continue
        takes = inspect.signature(method).parameters
        with torch.no_grad():
            features = method(**_given(takes, made))
        made = insert(made, token, count_features(features) // made["input_ids"].shape[0], _TYPE[method_name])
    return made


def _given(takes: Mapping[str, inspect.Parameter], made: dict[str, Any]) -> dict[str, Any]:
    """The inputs that are not text and that the method takes; all of them where it does not say."""
    every = all(parameter.kind in _OPEN for parameter in takes.values())
    passed_on = any(parameter.kind in _OPEN for parameter in takes.values())
    return {
        key: value
        for key, value in made.items()
        if (every or key in takes or (passed_on and key in _PASSED_ON)) and key not in _TEXT
    }


def insert(made: dict[str, Any], token: int, count: int, kind: int = 1) -> dict[str, Any]:
    """Insert a run of placeholders four positions before the end: after the padding, before some text."""
    rows = made["input_ids"].shape[0]
    at = made["input_ids"].shape[1] - 4
    run = torch.full((rows, count), token)
    made = {**made, "input_ids": torch.cat([made["input_ids"][:, :at], run, made["input_ids"][:, at:]], dim=1)}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", kind)):
        if name in made:
            old = made[name]
            made[name] = torch.cat([old[:, :at], torch.full((rows, count), fill), old[:, at:]], dim=1)
    return made
