"""What tells gradients apart that look alike: what a loss computes, and the samples of a batch."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from surgery.analysis.batches import Batch, rows_of
from surgery.analysis.journal import LENGTH, digest
from surgery.analysis.metrics import Metric


def loss_of(metric: Metric) -> str:
    """Its name, and a hash of its code and of the values that it was made with.

    Of a method the object counts by its class alone.
    """
    return f"{metric.name} ({digest([('positions', metric.positions), *_code(metric.function)])[:LENGTH]})"


def data_of(batch: Batch) -> str:
    """A hash of a batch."""
    return digest(sorted(batch.items()))


def samples_of(batch: Batch) -> list[str]:
    """A hash of each sample of a batch."""
    rows = rows_of(batch)

    def row(value: Any, number: int) -> Any:
        return value[number] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value

    return [digest((name, row(value, number)) for name, value in sorted(batch.items()))[:LENGTH] for number in range(rows)]


def _code(value: Any, name: str = "loss", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Names and values that a function is made of: its code, defaults and what it closes over, and of these in turn."""
    if id(value) in above:  # a function that calls itself
        return
    above = (*above, id(value))
    if isinstance(value, types.MethodType):
        yield name, type(value.__self__).__qualname__
        value = value.__func__
    if isinstance(value, types.FunctionType):
        yield from _code(value.__code__, f"{name}.code", above)
        held: dict[str, Any] = {**(value.__kwdefaults__ or {})}
        held |= {f"default {n}": default for n, default in enumerate(value.__defaults__ or ())}
        held |= {f"cell {n}": cell.cell_contents for n, cell in enumerate(value.__closure__ or ())}
        for key, one in held.items():
            yield from _code(one, f"{name}.{key}", above)
    elif isinstance(value, types.CodeType):
        yield name, (value.co_code, value.co_names)
        for number, constant in enumerate(value.co_consts):
            yield from _code(constant, f"{name}.{number}", above)
    elif isinstance(value, list | tuple) and any(callable(one) or isinstance(one, Tensor) for one in value):
        for number, one in enumerate(value):
            yield from _code(one, f"{name}.{number}", above)
    elif callable(value) and not isinstance(value, type):
        yield name, getattr(value, "__qualname__", type(value).__qualname__)
    else:
        yield name, value
