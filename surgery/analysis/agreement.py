"""What processes that divide work must have in common, seen before anything is divided."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from surgery.analysis.journal import LENGTH, digest
from surgery.analysis.metrics import Metric
from surgery.analysis.workers import Workers, workers_of
from surgery.cuts import Edit, Freeze
from surgery.reference import Reference
from surgery.spec import Spec

Study = TypeVar("Study", bound=Callable[..., Any])

ROUGH = 3e-2
"""Largest difference of outputs and metrics between processes, as a part of the largest: other machines round otherwise."""
LOOSE = 0.1
"""The same of single activations, which half precision rounds more; those of other inputs differ by far more."""
TINY = 1e-6
"""Size of numbers that are rounding alone, as of KL without cuts."""
SAMPLES = 8
"""Entries of a tensor that stand for it where it was measured by each process."""
SHOWN = 80
"""Letters of what is shown of an argument; of a longer one its hash says the rest."""
OWN = ("model", "progress")
"""Arguments that are not compared: models are, by their outputs; one process alone may draw a bar."""


def in_step(study: Study) -> Study:
    """A study that processes divide: they are called with the same arguments, and what one raises ends it in all of them."""

    @functools.wraps(study)
    def together(model: Any, *args: Any, **more: Any) -> Any:
        workers = workers_of(model)
        with workers.together(study.__name__):
            if workers.count > 1:
                given = inspect.signature(study).bind(model, *args, **more)
                given.apply_defaults()
                require_same(workers, study.__name__, {n: v for n, v in given.arguments.items() if n not in OWN})
            return study(model, *args, **more)

    return cast("Study", together)


def require_same(workers: Workers, what: str, named: Mapping[str, Any]) -> None:
    """Raises SurgeryError, in all processes, unless what is named is the same in each.

    Data are compared byte by byte, references and activations by some entries, callables by their names.
    """
    if workers.count == 1:
        return
    samples: list[list[float]] = []
    workers.agree(what, {name: _short(_plain(value, samples)) for name, value in named.items()})
    workers.agree(f"{what}: activations", samples, functools.partial(_all_close, part=LOOSE))


def require_same_run(workers: Workers, inputs: Mapping[str, Any], clean: Any) -> None:
    """Raises SurgeryError unless all processes have one batch and one model: outputs without cuts that differ by rounding."""
    if workers.count == 1:
        return
    workers.agree("the data", digest(sorted(inputs.items()))[:LENGTH])
    leaves = [leaf for leaf in tree_leaves(clean) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
    sizes = [[float(leaf.double().abs().nan_to_num().mean())] for leaf in leaves]
    workers.agree("outputs without cuts", sizes, functools.partial(_all_close, part=ROUGH))


def require_same_data(workers: Workers, *given: Sequence[Mapping[str, Any] | None]) -> None:
    """Raises SurgeryError unless all processes have as many batches, and the same: what an iterable gives is seen only now."""
    if workers.count == 1:
        return
    for batches in given:
        workers.agree("the data", f"{len(batches)} batches")
        found = [None if batch is None else digest(sorted(batch.items()))[:LENGTH] for batch in batches]
        workers.agree("the data", _short(found))


def require_same_results(workers: Workers, values: np.ndarray) -> None:
    """Raises SurgeryError unless metrics without cuts (.., example) differ by rounding: of two of one name, another one."""
    if workers.count > 1:
        rows = values.reshape(-1, values.shape[-1]).tolist()
        workers.agree("metrics without cuts", rows, functools.partial(_all_close, part=ROUGH))


def _all_close(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], part: float) -> bool:
    if [len(one) for one in mine] != [len(one) for one in theirs]:
        return False
    for one, other in zip(map(np.array, mine), map(np.array, theirs), strict=True):
        largest = max(float(np.abs(np.where(np.isfinite(one), one, 0)).max(initial=0)) for one in (one, other))
        if not np.isclose(one, other, rtol=0, atol=part * largest + TINY, equal_nan=True).all():
            return False
    return True


def _short(value: Any) -> Any:
    text = repr(value)
    return value if len(text) <= SHOWN else f"{text[:SHOWN]}... ({digest([('', text)])[:LENGTH]})"


def _plain(value: Any, samples: list[list[float]]) -> Any:
    """A value as plain data that is the same in every process; what each measured goes into samples."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {digest([('', value)])[:LENGTH]}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {digest([('', value.tolist())])[:LENGTH]}"
    if isinstance(value, Edit | Freeze | Spec):
        described = []
        for cut in Spec(value):
            data, tensors = cut.content()
            described.append(json.dumps(data, sort_keys=True, default=str))
            samples += map(_sampled, tensors.values())
        return described
    if not isinstance(value, Reference) and callable(of := getattr(value, "reference", None)):
        value = of()  # a captured run
    if isinstance(value, Reference):
        samples += [_sampled(entry.value) for entry in value.entries.values()]
        return [value.kind, value.model, [(key, tuple(entry.value.shape), entry.heads) for key, entry in value.entries.items()]]
    if isinstance(value, Metric):
        return [value.name, value.unit, value.positions]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): _plain(value[name], samples) for name in sorted(value, key=str)}
    if isinstance(value, set | frozenset):
        return sorted((_plain(one, samples) for one in value), key=repr)
    if isinstance(value, list | tuple | range):
        return [_plain(one, samples) for one in value]
    return getattr(value, "__name__", type(value).__name__)


def _sampled(tensor: Tensor) -> list[float]:
    """Some entries, spread evenly; of a tensor without values, or with values in several processes, none."""
    if tensor.is_meta or hasattr(tensor, "full_tensor") or not tensor.numel():
        return []
    index = torch.linspace(0, tensor.numel() - 1, min(SAMPLES, tensor.numel()), dtype=torch.float64).round().long()
    found: list[float] = tensor.detach().flatten()[index.to(tensor.device)].double().tolist()
    return found
