"""Build one tiny random model of a model type, with the same weights for the same seed whatever the implementation."""

from __future__ import annotations

import functools
import importlib
import math
import os
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.auto_factory import getattribute_from_module
from transformers.models.auto.configuration_auto import model_type_to_module_name

from zoo.composed import COMPOSED
from zoo.inputs import make_inputs
from zoo.overrides import ARCHITECTURES, RANDOM, TEXT_ONLY, UNBUILDABLE, WEIGHT_SCALE
from zoo.shrink import shrink
from zoo.types import ENTRIES, TYPES

__all__ = [
    "RANDOM",
    "TEXT_ONLY",
    "TYPES",
    "UNBUILDABLE",
    "architecture",
    "build",
    "make_config",
    "make_inputs",
    "supports_sdpa",
]


def architecture(model_type: str) -> type[nn.Module]:
    """The class that stands for the model type."""
    name = ARCHITECTURES.get(model_type, ENTRIES[model_type].architecture)
    folder = model_type_to_module_name(model_type)
    try:
        return getattribute_from_module(importlib.import_module(f".{folder}", "transformers.models"), name)
    except ValueError:  # a class that the package does not export
        return getattr(importlib.import_module(f".{folder}.modeling_{folder}", "transformers.models"), name)


def _of_class(config: PretrainedConfig, cls: type | None) -> PretrainedConfig:
    """The config that the class takes: some text models of composite families take the text part alone."""
    if not isinstance(cls, type) or isinstance(config, cls):
        return config
    parts = [value for value in vars(config).values() if isinstance(value, cls)]
    return parts[0] if parts else config


def make_config(model_type: str, implementation: str = "eager") -> PretrainedConfig:
    """The small config with the attention implementation set, on every sub-config too."""
    composed = COMPOSED.get(model_type)
    config = composed() if composed is not None else shrink(CONFIG_MAPPING[model_type]())
    config = _of_class(config, getattr(architecture(model_type), "config_class", None))
    if ENTRIES[model_type].table == "CAUSAL_LM" and vars(config).get("is_decoder") is False:
        config.is_decoder = True  # families that are encoders unless they are told otherwise
    _implement(config, implementation)
    return config


def _implement(config: PretrainedConfig, implementation: str) -> None:
    config._attn_implementation = implementation
    for part in vars(config).values():  # sub-configs that the family does not declare as such
        if isinstance(part, PretrainedConfig):
            _implement(part, implementation)


def _fan_in(module: nn.Module, parameter: nn.Parameter) -> int:
    if isinstance(module, nn.Embedding) or parameter.dim() < 2:
        return 1
    if "Conv" in type(module).__name__ and parameter.dim() > 2:
        return max(1, math.prod(parameter.shape[1:]))
    return max(1, *parameter.shape[-2:])


def _draw(model: nn.Module, seed: int, strength: float) -> None:
    """All parameters from one generator: matrices strong enough for patterns that are clearly not uniform."""
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() <= 1 and name == "weight" and is_norm:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() <= 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(strength * min(1.0, 1.6 / math.sqrt(_fan_in(module, parameter))) * noise)


def build(model_type: str, implementation: str = "eager", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model in evaluation mode."""
    config = make_config(model_type, implementation)
    torch.manual_seed(seed)
    model = architecture(model_type)(config)
    with torch.no_grad():
        _draw(model, seed, WEIGHT_SCALE.get(model_type, 1.0))
    model.tie_weights()
    if implementation == "eager":  # which every class has; parts that a model makes itself may have chosen sdpa
        for part in model.modules():
            if isinstance(config := getattr(part, "config", None), PretrainedConfig):
                _implement(config, implementation)
    return model.to(dtype).eval()


@functools.cache
def supports_sdpa(model_type: str) -> bool:
    """Whether the family, with every part of it, can be built with the implementation "sdpa"."""
    try:
        with torch.device("meta"):
            architecture(model_type)(make_config(model_type, "sdpa"))
    except ValueError as error:
        if "scaled_dot_product_attention" in str(error):
            return False
        raise
    return True
