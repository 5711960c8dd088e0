"""Data as batches of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.errors import SpecError, describe
from surgery.taps import runs_on

Batch = dict[str, Any]


def batches(model: nn.Module, data: Any) -> list[Batch]:
    """Keyword arguments of forward, batch by batch, on the model's device, without a KV cache where the model may keep one.

    data: token ids (batch, position), a mapping of inputs, or an iterable of these. Raises SpecError for anything else.
    """
    given = [data] if isinstance(data, Tensor | Mapping) else data
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise SpecError(describe("data", f"a {type(data).__name__}", "token ids, a mapping of inputs, or several", "Pass one."))
    found = [_batch(model, one) for one in given]
    if not found:
        raise SpecError(describe("data", "no batches", "at least one", "Check the iterable: a generator is read only once."))
    return found


def _batch(model: Any, given: Any) -> Batch:
    if isinstance(given, Tensor):
        given = {getattr(model, "main_input_name", "input_ids"): given}
    if not isinstance(given, Mapping):
        found = f"a batch of type {type(given).__name__}"
        raise SpecError(describe("data", found, "a tensor or a mapping of inputs", "Pass {'input_ids': ids}."))
    if not any(isinstance(value, Tensor) and value.dim() for value in given.values()):
        found = f"a batch without tensors ({', '.join(map(str, given)) or 'empty'})"
        raise SpecError(describe("data", found, "at least one tensor, whose rows are examples", "Pass {'input_ids': ids}."))
    device = runs_on(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def rows_of(batch: Mapping[str, Any]) -> int:
    """How many examples a batch holds: the length of its first tensor's first axis."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())
