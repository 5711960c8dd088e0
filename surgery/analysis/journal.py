"""Results of long work on disk, line by line as they come, so that a killed study goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import SpecError, describe


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
