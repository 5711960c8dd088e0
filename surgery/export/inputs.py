"""Inputs to try a model on, where none are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import ExportError, describe
from surgery.taps import runs_on

BATCH, LENGTH = 2, 16


def example_inputs(model: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The given inputs, or random tokens for a model that reads tokens: (batch, position), the same at every call.

    Raises ExportError for a model that reads anything else.
    """
    if given is not None:
        return dict(given)
    names = inspect.signature(type(model).forward).parameters
    name = getattr(model, "main_input_name", "input_ids")
    vocabulary = _vocabulary(model)
    if name != "input_ids" or vocabulary is None:
        do = "Pass example_inputs={...}, as the model's forward takes them."
        raise ExportError(describe("example inputs", f"a model that reads {name!r}", "input_ids", do))
    device = runs_on(model) if model.device.type == "meta" else model.device
    generator = torch.Generator().manual_seed(0)
    low = min(5, vocabulary - 1)  # the first tokens are often special: padding changes what a model does
    ids = torch.randint(low, vocabulary, (BATCH, LENGTH), generator=generator).to(device)
    found: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids.roll(1, 0)[:, : LENGTH // 2]
    return found


def _vocabulary(model: nn.Module) -> int | None:
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embedding, "num_embeddings", None)


def output_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What a forward gives: logits, or else the first tensor of its output."""
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output[0]


def without_padding(tensor: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """(row, channel): an output's rows but those of padding, on the CPU."""
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and tensor.shape[:2] == mask.shape:
        tensor = tensor[mask.bool().to(tensor.device)]
    return (tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]).cpu()
