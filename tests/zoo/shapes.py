"""Sizes of the inputs and how to find them in a config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SIDES = ("image_size", "img_size", "input_size", "max_img_size")
BATCH, LENGTH, FIRST_ID, LAST_ID = 2, 9, 5, 60


def parts(config: Any) -> list[Any]:
    """The config and its sub-configs, the outer ones first."""
    found, at = [config], 0
    while at < len(found):
        found.extend(value for value in vars(found[at]).values() if hasattr(value, "model_type"))
        at += 1
    return found


def find(config: Any, *names: str) -> Any:
    """The first of the fields that the config or one of its parts has."""
    for name in names:
        for part in parts(config):
            value = vars(part).get(name, getattr(part, name, None) if name in type(part).attribute_map else None)
            if value is not None:
                return value
    return None


def ids(generator: torch.Generator, length: int = LENGTH, limit: int = LAST_ID, batch: int = BATCH) -> Tensor:
    return torch.randint(FIRST_ID, limit, (batch, length), generator=generator)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def pair(value: Any, default: int) -> tuple[int, int]:
    if isinstance(value, list | tuple):
        return (value[0], value[-1])
    if isinstance(value, dict):
        return (value["height"], value["width"])
    return (value, value) if value else (default, default)


def vision(config: Any) -> Any:
    """The part that sees."""
    for part in parts(config):
        for name in ("vision_config", "vision_tower_config", "image_encoder_config", "visual"):
            if hasattr(vars(part).get(name), "model_type"):
                return getattr(part, name)
    return config


def side(config: Any) -> tuple[int, int]:
    """Height and width of the images."""
    seen = vision(config)
    return pair(find(seen, *_SIDES) or find(config, *_SIDES), 64)


def channels(config: Any) -> int:
    found = find(vision(config), "num_channels", "in_channels", "in_chans", "num_image_channels", "input_channels")
    return found if isinstance(found, int) else 3


def patch(config: Any) -> int:
    found = find(vision(config), "patch_size", "spatial_patch_size", "encoder_patch_size")
    return pair(found, 8)[0]
