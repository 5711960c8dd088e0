"""Inputs to try a model on, where none are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.errors import ExportError, describe
from surgery.sites import SITES
from surgery.spec import Spec
from surgery.taps import runs_on
from surgery.vocabulary import vocabulary_of

BATCH, LENGTH = 2, 16
PLAIN = bool | int | float | str | None


def example_inputs(model: Any, given: Mapping[str, Any] | None = None, spec: Spec | None = None) -> dict[str, Any]:
    """The given inputs, or random tokens for a model that reads tokens: (batch, position), the same at every call.

    spec: whose values for certain rows and positions the tokens are to fit.
    Raises ExportError for a model that reads anything else.
    """
    if given is not None:
        return dict(given)
    names = inspect.signature(type(model).forward).parameters
    name = getattr(model, "main_input_name", "input_ids")
    vocabulary = vocabulary_of(model)
    if name != "input_ids" or vocabulary is None:
        do = "Pass example_inputs={...}, as the model's forward takes them."
        raise ExportError(describe("example inputs", f"a model that reads {name!r}", "input_ids", do))
    device = runs_on(model) if model.device.type == "meta" else model.device
    generator = torch.Generator().manual_seed(0)
    low = min(5, vocabulary - 1)  # the first tokens are often special: padding changes what a model does
    rows, length = _sizes(spec or Spec())
    ids = torch.randint(low, vocabulary, (rows, length), generator=generator).to(device)
    found: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids.roll(1, 0)[:, : max(1, length // 2)]
    return found


def _sizes(spec: Spec) -> tuple[int, int]:
    """How many rows and positions there are values for in all cuts that have some by row or position."""
    rows, length = BATCH, LENGTH
    for edit in (edit for cut in spec for edit in cut.edits()):
        tensors = [edit.value] if isinstance(edit.value, Tensor) else []
        by_head = 0 if SITES[edit.site].is_matrix else 1  # axes before positions in a value of a head alone
        if edit.reference is not None:
            tensors = [entry.value for entry in edit.reference.entries.values()]
        for tensor in tensors:
            if tensor.dim() > 1 + by_head:
                sizes = tensor.shape[-2:] if SITES[edit.site].is_matrix else tensor.shape[-2:-1]
                length = min(length, *(size for size in sizes if size > 1), length)
            if tensor.dim() == 4 and tensor.shape[0] > 1:
                rows = tensor.shape[0]
    return rows, length


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


def require_plain(inputs: Mapping[str, Any]) -> None:
    """Raises ExportError for inputs that are neither tensors nor plain values."""
    wrong = {n: type(value).__name__ for n, value in inputs.items() if not isinstance(value, Tensor | PLAIN)}
    if wrong:
        found = ", ".join(f"{name} (a {kind})" for name, kind in wrong.items())
        do = "Leave them out: caches, lists and functions cannot be handed on."
        raise ExportError(describe("example_inputs", found, "tensors and plain values by name", do))
