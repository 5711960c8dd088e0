"""Results of long work on disk, line by line as they come, so that a killed study goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SpecError, describe

LENGTH = 16
"""Digits of a hash that people read."""
CLOSE = 1e-3
"""Largest difference of what is measured again, as a part of the largest of its numbers: other machines round otherwise."""


class Journal:
    """A file of JSON lines: what the study is, then one result a line. Keys are strings, results plain data.

    path: None keeps nothing on disk. about: what must be the same for results to go together; a file that says otherwise is
    refused with SpecError, as is one that something else has written. A last line that was cut off counts as not written.
    """

    def __init__(self, path: str | Path | None, about: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.found: dict[str, Any] = {}
        self.about = json.loads(json.dumps(about))
        if self.path is None:
            return
        if self.path.exists() and self.path.stat().st_size:
            self._read(self.path)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"about": self.about})

    def add(self, key: str, result: Any) -> None:
        """Keeps a result, on disk before it returns."""
        self.found[key] = result
        if self.path is not None:
            self._append({"key": key, "result": result})

    def confirm(self, key: str, result: np.ndarray) -> None:
        """Adds a result (.., example) that is measured in every run. Raises SpecError if the file has another one."""
        if key not in self.found:
            self.add(key, result.tolist())
            return
        known = np.array(self.found[key], dtype=np.float64)
        largest = np.abs(np.where(np.isfinite(result), result, 0)).max(-1, keepdims=True)
        if known.shape != result.shape or not np.isclose(known, result, rtol=0, atol=CLOSE * largest, equal_nan=True).all():
            raise self._refuse(f"another study (results without cuts: {_few(known)})", f"{_few(result)}, as they are now")

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        try:
            head, *rest = [json.loads(line) for line in lines]
            about = head["about"]
            self.found = {entry["key"]: entry["result"] for entry in rest}
        except (ValueError, KeyError, TypeError):
            raise self._refuse("lines of something else", "the results of a study") from None
        if about != self.about:
            keys = [key for key in {**about, **self.about} if about.get(key) != self.about.get(key)]
            changes = "; ".join(f"{key}: {about.get(key)!r}" for key in keys)
            expected = "; ".join(f"{key}: {self.about.get(key)!r}" for key in keys)
            raise self._refuse(f"another study ({changes})", expected)
        with path.open("r+", encoding="utf-8") as file:  # a line that was cut off would spoil the next
            file.truncate(len("".join(lines).encode()))

    def _append(self, entry: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _refuse(self, found: str, expected: str) -> SpecError:
        return SpecError(describe(f"resume={str(self.path)!r}", found, expected, "Name another file, or remove this one."))


def digest(named: Iterable[tuple[str, Any]]) -> str:
    """A hash of names and values, of tensors every byte (1 to 2 GB a second); of meta tensors, which hold none, the shape."""
    found = hashlib.sha256()
    for name, value in named:
        if not isinstance(value, Tensor):
            found.update(f"{name} {value!r};".encode())
        elif hasattr(value, "__tensor_flatten__"):  # quantized weights hold tensors
            parts, more = value.__tensor_flatten__()
            found.update(f"{name} {digest((part, getattr(value, part)) for part in parts)} {more!r};".encode())
        else:
            found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            if not value.is_meta:
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def weights_of(model: Any) -> str:
    """A hash of all parameters and kept buffers, and of which adapters take part, by peft's attributes."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    adapters = [
        (f"{path}.{name}", repr(getattr(module, name)))
        for path, module in model.named_modules()
        for name in names
        if hasattr(module, "active_adapters") and hasattr(module, name) and not callable(getattr(module, name))
    ]
    return digest([*model.state_dict().items(), *adapters])[:LENGTH]


def _few(numbers: np.ndarray) -> str:
    shown = [f"{number:.6g}" for number in numbers.flat[:4]]
    return ", ".join(shown) + (", ..." if numbers.size > len(shown) else "")
