"""A folder of one task's gradients: what they are, and a file of factors for each batch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.analysis.interference.store import SUFFIX, Part
from surgery.errors import SpecError, describe

VERSION = 2
DESCRIPTION = "gradients.json"


class Folder:
    """path: of a folder that exists or not."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, number: int) -> Path:
        """Of one batch."""
        return self.path / f"{number:05}{SUFFIX}"

    def claim(self, content: Mapping[str, Any], data: Sequence[str]) -> dict[int, Part]:
        """Makes it a folder of these gradients and batches; gives what it has of them, by number of batch.

        content: what they are, plain data. data: a hash of each batch. Raises SpecError for a folder of something else, and
        leaves it as it is then. Of a folder with more batches, those that follow stay.
        """
        content, done, number = {"version": VERSION, **content}, {}, len(data)
        if (self.path / DESCRIPTION).exists():
            known = self.known()
            old, new = ({**c, **c["about"], "about": None, "batches": None} for c in (known, content))
            if keys := [key for key in new if old.get(key) != new[key]]:
                raise self.refuse(*("; ".join(f"{key}: {c.get(key)!r}" for key in keys) for c in (old, new)))
            done = {n: Part.read(self.file(n)) for n in range(number) if self.file(n).exists()}
            if others := [n for n, part in done.items() if part.about["data"] != data[n]]:
                what = f"other data in batch {others[0]}, or batches of another size"
                raise self.refuse(what, "the data that were collected there, in the same batches")
            number = max(number, known["batches"])
        elif self.path.exists() and any(self.path.iterdir()):
            raise self.refuse("a folder with other files", "an empty one, or one that was collected into")
        self.path.mkdir(parents=True, exist_ok=True)
        unfinished = self.path / f".{DESCRIPTION}.{os.getpid()}"
        unfinished.write_text(json.dumps({**content, "batches": number}, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path / DESCRIPTION)
        return done

    def known(self) -> dict[str, Any]:
        """What the gradients are. Raises SpecError for a folder of something else."""
        try:
            known: dict[str, Any] = json.loads((self.path / DESCRIPTION).read_text(encoding="utf-8"))
            if known["version"] != VERSION or not {"task", "about", "blocks", "batches"} <= set(known):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            found = f"no {DESCRIPTION} that can be read"
            raise self.refuse(found, "a folder that gradients were collected into") from None
        return known

    def parts(self) -> list[Part]:
        """All batches. Raises SpecError for a collection that was stopped."""
        count = self.known()["batches"]
        files = [self.file(number) for number in range(count)]
        if missing := [file for file in files if not file.exists()]:
            found, do = f"{count - len(missing)} of {count} batches", "Let collect(resume=...) go on with it."
            raise SpecError(describe(f"{str(self.path)!r}", found, "all of them", do))
        return [Part.read(file) for file in files]

    def refuse(self, found: str, expected: str) -> SpecError:
        return SpecError(describe(f"{str(self.path)!r}", found, expected, "Name another folder, or remove this one."))
