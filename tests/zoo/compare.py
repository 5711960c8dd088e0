"""Outputs of models as flat lists of tensors, and whether two of them are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Named = dict[str, Tensor]


def flatten(value: Any, name: str = "output") -> Named:
    """Every tensor in an output by its place: of tuples, dictionaries, KV caches and other objects that hold tensors."""
    return dict(_leaves(value, name, set()))


def _leaves(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
        return
    if value is None or isinstance(value, str | int | float | nn.Module) or id(value) in seen:
        return
    seen.add(id(value))
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple | set):
        parts = enumerate(value)
    elif type(value).__module__.startswith("transformers") and not hasattr(value, "model_type"):
        parts = vars(value).items()
    for key, part in parts:
        yield from _leaves(part, f"{name}.{key}", seen)


def unequal(found: Named, expected: Named) -> str:
    """Where two outputs are not equal bit for bit, in words; "" if they are. NaN equals NaN: kernels define empty rows."""
    if list(found) != list(expected):
        return f"outputs {_list(set(found) - set(expected))} more, {_list(set(expected) - set(found))} fewer"
    wrong = [f"{name}: {text}" for name in expected if (text := _unequal(found[name], expected[name]))]
    return f"{len(wrong)} of {len(expected)} outputs differ, first {wrong[0]}" if wrong else ""


def _unequal(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{tuple(found.shape)} {found.dtype} in place of {tuple(expected.shape)} {expected.dtype}"
    if bool(((found == expected) | ((found != found) & (expected != expected))).all()):
        return ""
    return f"gap {gap(found, expected):.3g}"


def apart(found: Named, expected: Named, tolerance: float) -> str:
    """Where two outputs differ by more than a share of the largest number of the tensor; "" if nowhere."""
    if list(found) != list(expected):
        return unequal(found, expected)
    gaps = {name: gap(found[name], expected[name]) for name in expected}
    wrong = {name: g for name, g in gaps.items() if not g <= tolerance}
    if not wrong:
        return ""
    name, largest = max(wrong.items(), key=lambda item: item[1])
    return f"{len(wrong)} of {len(gaps)} outputs differ, the most at {name}: gap {largest:.3g}"


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest finite number expected; infinite where shapes or empty entries differ."""
    if found.shape != expected.shape:
        return float("inf")
    if found.numel() == 0:
        return 0.0
    if found.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    a, b = found.double(), expected.double()
    finite = b.isfinite()
    same = (a == b) | ((a != a) & (b != b))
    if bool((~finite & ~same).any()) or bool((finite & ~a.isfinite()).any()):
        return float("inf")
    largest = b[finite].abs().max() if bool(finite.any()) else torch.tensor(1.0)
    return float(((a - b)[~same].abs().max() if bool((~same).any()) else 0) / max(float(largest), 1e-12))


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) or "none"
