"""Shrink the default configuration of any family, sub-configurations included."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from zoo.backbones import Part, tiny_resnet
from zoo.overrides import KEPT, OVERRIDES
from zoo.rules import HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCAB, scalar, sequence

_TOKEN = re.compile(
    r"(.*_)?(token_id|token_index|(bos|eos|pad|start|end|sep|cls|newline|patch|nothink|think_bos|think_eos)_id)"
)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "cls_token_id": 4}
_LAYER_COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_num_layers", "layers",
    "encoder_num_hidden_layers", "decoder_layers",
)  # fmt: skip
_KEPT = {"id2label", "label2id", "transformers_version", "architectures", "dtype", "_name_or_path", "per_layer_config"}
_FIRST_TOKEN = 96
# Sizes that many families derive from others where they are not given.
_DERIVED = {"qk_head_dim", "mamba_dt_rank", "time_step_rank", "mamba_d_ssm", "codebook_dim"}
_PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "audio_token_id",
    "audio_token_index",
    "video_token_id",
    "video_token_index",
)
_LAYER_KINDS = ("layer_types", "layers_block_type")


class Tokens:
    """Gives each name of a special token one id below the vocabulary's size, the same in the whole tree of configs."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name in _SPECIAL:
            return _SPECIAL[name]
        name = name.removesuffix("_index").removesuffix("_id")
        return self.given.setdefault(name, _FIRST_TOKEN - len(self.given))


def config_key(config: PretrainedConfig) -> str:
    """The name under which overrides are kept: the model type, or the class where there is none."""
    return config.model_type or type(config).__name__


def _kinds(values: list[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _layers(config: PretrainedConfig) -> tuple[str | None, int, int]:
    """The field that counts the layers, its value, and the small value: one layer of each kind, two at least."""
    for name in _LAYER_COUNTS:
        count = vars(config).get(name)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            small = min(count, LAYERS)
            for field in _LAYER_KINDS:
                types = getattr(config, field, None)
                if isinstance(types, list | tuple) and len(types) == count:
                    small = max(small, len(_kinds(list(types))))
            taps = vars(config).get("_out_indices")
            if taps and len(taps) > 1 and max(taps) <= count:  # a backbone: each of its feature maps from its own layer
                small = max(small, len(taps))
            return name, count, small
    return None, 0, 0


def _per_layer(name: str, values: Any, small: int) -> Any:
    """A list with one entry a layer, cut to the small number of layers, all its kinds kept where there is room."""
    entries = list(values)
    if all(isinstance(entry, str | bool | int) for entry in entries):
        kinds = _kinds(entries)
        if name.endswith(("types", "block_type", "layers")):
            picked = (kinds + entries[-1:] * small)[:small] if len(kinds) > 1 else entries[:small]
        else:
            picked = entries[:small]
            if all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
                picked = [scalar(name.removesuffix("_per_layer"), entry) for entry in picked]
    else:
        picked = entries[:small]
    return type(values)(picked)


def _small_value(name: str, value: Any, config: PretrainedConfig, tokens: Tokens, depth: tuple[str | None, int, int]) -> Any:
    layers_name, count, small = depth
    if isinstance(value, PretrainedConfig):
        return shrink(value, tokens)
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    if _TOKEN.fullmatch(name):
        if isinstance(value, int):
            return tokens[name] if value >= 0 else value
        if isinstance(value, list | tuple) and all(isinstance(entry, int) for entry in value):
            return type(value)(tokens[name] if index == 0 else tokens[f"{name}{index}"] for index in range(len(value)))
    if isinstance(value, int):
        if layers_name in (name, type(config).attribute_map.get(name, name)):
            return small
        if vars(config).get("qk_rope_head_dim"):  # latent attention: every head has its own keys, only a part of them is turned
            value = {"num_key_value_heads": HEADS, "head_dim": 4, "qk_head_dim": 12}.get(name, value)
            if name in {"num_key_value_heads", "head_dim", "qk_head_dim"}:
                return value
        return scalar(name, value)
    if isinstance(value, list | tuple):
        if count and name.endswith(("indexes", "indices")) and value and isinstance(value[0], int) and max(value) >= small:
            return type(value)([small - 1])  # layers of a kind of their own
        if count > 3 and len(value) == count and small != count:
            return _per_layer(name, value, small)
        return sequence(name, value)
    return value


def _fields(config: PretrainedConfig) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set(vars(config))


def _arguments(config: PretrainedConfig, tokens: Tokens) -> dict[str, Any]:
    """The arguments of the small config: what the rules change, and what this instance has that is not the default."""
    fields = _fields(config)
    depth = _layers(config)
    try:
        plain = vars(type(config)())
    except (ValueError, TypeError):
        plain = {}
    declared = {f.name: f.default for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else {}
    renamed = {stored: field for field, stored in config.attribute_map.items()}
    arguments: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in _KEPT or name.startswith("_"):
            continue
        name = renamed.get(name, name) if name not in fields else name
        new = _small_value(name, value, config, tokens, depth)
        if name not in fields:
            continue
        derived = declared.get(name, value) is None and (isinstance(value, list | tuple | dict) or name in _DERIVED)
        own = repr(plain.get(name)) != repr(value)
        if isinstance(value, PretrainedConfig) or own or (repr(new) != repr(value) and not derived):
            arguments[name] = new
    for name in _LAYER_KINDS:
        kinds = vars(config).get(name)
        if isinstance(kinds, list) and name in fields and depth[0]:
            arguments[name] = _per_layer(name, kinds, depth[2])
    taps = vars(config).get("_out_indices")
    plain_taps = plain.get("_out_indices")
    if taps and (len(taps) > 1 or taps != plain_taps):
        if depth[0] and depth[2] != depth[1]:
            taps = list(range(depth[2] - len(taps) + 1, depth[2] + 1))
        arguments["out_indices"] = list(taps)
    if vars(config).get("num_key_value_heads", 0) is None and "num_key_value_heads" in fields:
        arguments["num_key_value_heads"] = KV_HEADS
    for name in _PLACEHOLDERS:
        if name in fields and vars(config).get(name, 0) is None:
            arguments[name] = tokens[name]
    if vars(config).get("vocab_size", 0) is None and "vocab_size" in fields:
        arguments["vocab_size"] = VOCAB
    if vars(config).get("head_dim", 0) is None and "head_dim" in fields:
        arguments["head_dim"] = HEAD_DIM
    return arguments


def _merge(arguments: dict[str, Any], override: dict[str, Any], config: PretrainedConfig, tokens: Tokens) -> None:
    for name, value in override.items():
        if isinstance(value, Part):
            value = shrink(CONFIG_MAPPING[value.model_type](), tokens)
        elif callable(value):
            value = value(arguments, tokens)
        if isinstance(value, dict) and isinstance(arguments.get(name), PretrainedConfig):
            sub = getattr(config, name)
            inner = _build_arguments(sub, tokens)
            _merge(inner, value, sub, tokens)
            arguments[name] = type(sub)(**inner)
        else:
            arguments[name] = value


def _build_arguments(config: PretrainedConfig, tokens: Tokens) -> dict[str, Any]:
    arguments = _arguments(config, tokens)
    _merge(arguments, OVERRIDES.get(config_key(config), {}), config, tokens)
    return arguments


def shrink(config: PretrainedConfig, tokens: Tokens | None = None) -> PretrainedConfig:
    """A small config of the same class."""
    tokens = tokens if tokens is not None else Tokens()
    if config_key(config) in {"timm_backbone", "timm_wrapper"}:
        return tiny_resnet(list(config.out_indices) if getattr(config, "out_indices", None) else None)
    if config_key(config) in KEPT:
        return config
    return type(config)(**_build_arguments(config, tokens))
