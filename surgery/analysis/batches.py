"""Data as batches of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SpecError, describe
from surgery.taps import runs_on
from surgery.vocabulary import require_known

Batch = dict[str, Any]


def batches(model: nn.Module, data: Any) -> list[Batch]:
    """Keyword arguments of forward, batch by batch, on the model's device, without a KV cache where the model may keep one.

    data: token ids (batch, position), a mapping of inputs, or an iterable of these, each as it is or alone in a list or tuple
    (as a DataLoader over a TensorDataset gives it). Raises SpecError for anything else, for batches without rows, and for ids
    that are no tokens of the model.
    """
    given = [data] if isinstance(data, Tensor | Mapping) else data
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise SpecError(describe("data", f"a {type(data).__name__}", "token ids, a mapping of inputs, or several", "Pass one."))
    found = [_batch(model, one) for one in given]
    if not found:
        raise SpecError(describe("data", "no batches", "at least one", "Check the iterable: a generator is read only once."))
    return found


def _batch(model: Any, given: Any) -> Batch:
    if isinstance(given, list | tuple) and len(given) == 1:
        (given,) = given
    if isinstance(given, Tensor):
        given = {getattr(model, "main_input_name", "input_ids"): given}
    if not isinstance(given, Mapping):
        found = f"a batch of type {type(given).__name__}"
        if isinstance(given, list | tuple):
            found += f" with {len(given)} parts ({', '.join(dict.fromkeys(type(one).__name__ for one in given)) or 'empty'})"
        expected = "a tensor or a mapping of inputs, or a list or tuple of one of these"
        raise SpecError(describe("data", found, expected, "Pass {'input_ids': ids}: names say what a tensor is."))
    if not any(isinstance(value, Tensor) and value.dim() for value in given.values()):
        found = f"a batch without tensors ({', '.join(map(str, given)) or 'empty'})"
        raise SpecError(describe("data", found, "at least one tensor, whose rows are examples", "Pass {'input_ids': ids}."))
    if not rows_of(given):
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items() if isinstance(value, Tensor))
        raise SpecError(describe("data", f"a batch of 0 rows ({shapes})", "at least one example", "Leave it out."))
    _require_tokens(model, given)
    device = runs_on(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def _require_tokens(model: Any, batch: Mapping[str, Any]) -> None:
    """Raises SpecError for ids that have no positions, or are no tokens of the stack that reads them."""
    # Beside pictures and sounds stand placeholders, which some models have beyond their tokens.
    is_text = not any(isinstance(value, Tensor) and value.is_floating_point() for value in batch.values())
    for name in ("input_ids", "decoder_input_ids"):
        ids = batch.get(name)
        if not isinstance(ids, Tensor):
            continue
        if ids.dim() < 2 or not ids.numel() or ids.dtype.is_floating_point:
            found = f"{name} of shape {tuple(ids.shape)} and {ids.dtype}"
            do = "Pass tokenizer(texts, return_tensors='pt'); of one sequence, ids[None]."
            raise SpecError(describe("data", found, "whole numbers (batch, position)", do))
        if is_text:
            require_known(name, ids, model if name == "input_ids" else getattr(model, "get_decoder", lambda: None)())


def rows_of(batch: Mapping[str, Any]) -> int:
    """How many examples a batch holds: the length of its first tensor's first axis."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())
