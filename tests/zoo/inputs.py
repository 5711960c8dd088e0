"""Random inputs for a tiny model, from what its forward takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from zoo.feeds import FEEDS
from zoo.pictures import add_pictures
from zoo.placeholders import add_placeholders
from zoo.scenes import SCENES
from zoo.shapes import BATCH, LENGTH, find, ids
from zoo.sounds import add_sounds

PADDING = 3


def parameters(model: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(model).forward).parameters)


def text(model: Any, generator: torch.Generator, names: dict[str, inspect.Parameter]) -> dict[str, Tensor]:
    """Token ids, the first row padded on the left where the family takes a mask."""
    tokens = ids(generator)
    if "attention_mask" not in names:
        return {"input_ids": tokens}
    mask = torch.ones_like(tokens)
    mask[0, :PADDING] = 0
    pad = find(model.config, "pad_token_id")
    tokens[0, :PADDING] = pad if isinstance(pad, int) and pad >= 0 else 0
    return {"input_ids": tokens, "attention_mask": mask}


def make_inputs(model: Any, model_type: str, seed: int = 0) -> dict[str, Any]:
    """The inputs as keyword arguments of the forward."""
    generator = torch.Generator().manual_seed(seed)
    names, config = parameters(model), model.config
    made: dict[str, Any] = {}
    if "input_ids" in names:
        made.update(text(model, generator, names))
    if "mm_token_type_ids" in names:
        made["mm_token_type_ids"] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    add_pictures(made, config, model_type, names, generator)
    add_sounds(made, config, model_type, names, generator)
    if "decoder_input_ids" in names and (find(config, "is_encoder_decoder") or "input_ids" not in names):
        made["decoder_input_ids"] = ids(generator, LENGTH - 2)
    if "bbox" in names:
        low = torch.randint(0, 20, (BATCH, LENGTH, 2), generator=generator)
        made["bbox"] = torch.cat([low, low + 10], dim=-1)
    feed = FEEDS.get(model_type) or SCENES.get(model_type)
    if feed is not None:
        made = feed(model, made, generator)
    return add_placeholders(model, made)
