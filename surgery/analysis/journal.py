"""Results of long work on disk, line by line as they come, so that a killed study goes on where it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.analysis.workers import ALONE, Workers
from surgery.errors import SpecError, describe
from surgery.export.offload import loaded

LENGTH = 16
"""Digits of a hash that people read."""
CLOSE = 1e-3
"""Largest difference of what is measured again, as a part of the largest of its numbers: other machines round otherwise."""


class Journal:
    """A file of JSON lines: what the study is, then one result a line. Keys are strings, results plain data.

    path: None keeps nothing on disk. about: what must be the same for results to go together; a file that says otherwise is
    refused with SpecError, as is one that something else has written. A last line that was cut off counts as not written.
    workers: those that work is divided over. Each but the main one has a file of its own beside it, "<name>.part1" and so on;
    whoever opens the journal next, and `close`, put these into the one file.
    """

    def __init__(self, path: str | Path | None, about: Mapping[str, Any], workers: Workers = ALONE) -> None:
        self.path = None if path is None else (known := Path(path))
        self.found: dict[str, Any] = {}
        self.about = json.loads(json.dumps(about))
        self.workers = workers
        workers.agree("resume", {"path": None if path is None else str(path), **self.about})
        if self.path is None:
            return
        self.found = workers.once(lambda: self._claimed(known))
        self.own = known if workers.is_main else known.with_name(f"{known.name}.part{workers.number}")
        self.written = set(self.found)

    def add(self, key: str, result: Any) -> None:
        """Keeps a result of this process, on disk before it returns."""
        self.found[key] = result
        if self.path is not None and (self.workers.is_main or self.workers.is_divided):
            self._append(self.own, {"key": key, "result": result})
            self.written.add(key)

    def close(self) -> None:
        """All that was found by any process goes into the one file."""
        if self.path is None:
            return
        if self.workers.is_main:
            for key in [key for key in self.found if key not in self.written]:
                self.add(key, self.found[key])
        self.workers.once(lambda: None)  # all wait: no part goes before the one file has what is in it
        if self.workers.is_divided and not self.workers.is_main:
            self.own.unlink(missing_ok=True)

    def confirm(self, key: str, result: np.ndarray) -> None:
        """Adds a result (.., example) that is measured in every run. Raises SpecError if the file has another one."""
        if key not in self.found:
            self.found[key] = result.tolist()
            if self.workers.is_main:
                self.add(key, self.found[key])
            return
        known = np.array(self.found[key], dtype=np.float64)
        largest = np.abs(np.where(np.isfinite(result), result, 0)).max(-1, keepdims=True)
        if known.shape != result.shape or not np.isclose(known, result, rtol=0, atol=CLOSE * largest, equal_nan=True).all():
            raise self._refuse(f"another study (results without cuts: {_few(known)})", f"{_few(result)}, as they are now")

    def _claimed(self, path: Path) -> dict[str, Any]:
        """What is known already. Begins the file, or puts the parts that other processes left into it."""
        found: dict[str, Any] = {}
        if path.exists() and path.stat().st_size:
            found = self._read(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(path, {"about": self.about})
        for part in sorted(p for p in path.parent.iterdir() if re.fullmatch(rf"{re.escape(path.name)}\.part\d+", p.name)):
            if b"\n" in part.read_bytes():  # else its process ended while it wrote the first line
                for key, result in self._read(part).items():
                    if key not in found:
                        found[key] = result
                        self._append(path, {"key": key, "result": result})
            part.unlink()
        return found

    def _read(self, path: Path) -> dict[str, Any]:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        try:
            head, *rest = [json.loads(line) for line in lines]
            about = head["about"]
            found = {entry["key"]: entry["result"] for entry in rest}
        except (ValueError, KeyError, TypeError):
            raise self._refuse("lines of something else", "the results of a study", path) from None
        if about != self.about:
            keys = [key for key in {**about, **self.about} if about.get(key) != self.about.get(key)]
            changes = "; ".join(f"{key}: {about.get(key)!r}" for key in keys)
            expected = "; ".join(f"{key}: {self.about.get(key)!r}" for key in keys)
            raise self._refuse(f"another study ({changes})", expected, path)
        with path.open("r+", encoding="utf-8") as file:  # a line that was cut off would spoil the next
            file.truncate(len("".join(lines).encode()))
        return found

    def _append(self, path: Path, entry: Mapping[str, Any]) -> None:
        lines = [entry] if path.exists() or "about" in entry else [{"about": self.about}, entry]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _refuse(self, found: str, expected: str, path: Path | None = None) -> SpecError:
        """path: the file at fault, if it is not the journal's own but a part beside it."""
        what, do = f"resume={str(self.path)!r}", "Name another file, or remove this one."
        if path not in (None, self.path):
            found, do = f"beside it {str(path)!r} of {found}", f"Name another file, or remove {str(path)!r}."
        return SpecError(describe(what, found, expected, do))


def digest(named: Iterable[tuple[str, Any]]) -> str:
    """A hash of names and values, of tensors every byte (1 to 2 GB a second); of meta tensors, which hold none, the shape."""
    found = hashlib.sha256()
    for name, value in named:
        if not isinstance(value, Tensor):
            found.update(f"{name} {value!r};".encode())
        elif hasattr(value, "full_tensor"):  # spread over processes, all of which ask for this hash
            found.update(f"{name} {digest([('', value.full_tensor())])};".encode())
        elif hasattr(value, "__tensor_flatten__"):  # quantized weights hold tensors
            parts, more = value.__tensor_flatten__()
            found.update(f"{name} {digest((part, getattr(value, part)) for part in parts)} {more!r};".encode())
        else:
            found.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            if not value.is_meta:
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def weights_of(model: Any) -> str:
    """A hash of all parameters and kept buffers, wherever they are, and of which adapters take part, by peft's attributes."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    adapters = [
        (f"{path}.{name}", repr(getattr(module, name)))
        for path, module in model.named_modules()
        for name in names
        if hasattr(module, "active_adapters") and hasattr(module, name) and not callable(getattr(module, name))
    ]
    stored = ((name, loaded(model, name) if _is_away(value) else value) for name, value in model.state_dict().items())
    return digest(itertools.chain(stored, adapters))[:LENGTH]


def _is_away(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _few(numbers: np.ndarray) -> str:
    shown = [f"{number:.6g}" for number in numbers.flat[:4]]
    return ", ".join(shown) + (", ..." if numbers.size > len(shown) else "")
