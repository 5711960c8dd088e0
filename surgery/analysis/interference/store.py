"""Factors of batches, in memory or in files that are read part by part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.analysis.interference.files import read_about, read_tensors, write_tensors

SUFFIX = ".safetensors"
KIND = "collected gradients"


class Part:
    """The factors of one batch: by key of a block, (wide, narrow). Tensors that several blocks share are kept once.

    path: of a file that holds them, read when asked for; None: they are in memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, str]], about: Mapping[str, Any]) -> None:
        self.tensors, self.names, self.about = dict(tensors), dict(names), dict(about)
        self.path: Path | None = None

    @classmethod
    def of(cls, factors: Mapping[str, tuple[Tensor, Tensor]], about: Mapping[str, Any]) -> Part:
        """about: what else is known of the batch, plain data."""
        numbers: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        names = {}
        for key, pair in factors.items():
            for tensor in pair:
                if id(tensor) not in numbers:
                    numbers[id(tensor)] = str(len(numbers))
                    tensors[numbers[id(tensor)]] = tensor.detach().cpu().contiguous()
            names[key] = (numbers[id(pair[0])], numbers[id(pair[1])])
        return cls(tensors, names, about)

    def factor(self, key: str) -> tuple[Tensor, Tensor]:
        """(wide, narrow) of a block."""
        kept = self.tensors if self.path is None else read_tensors(self.path, *self.names[key])
        wide, narrow = self.names[key]
        return kept[wide], kept[narrow]

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        tensors = self.tensors if self.path is None else read_tensors(self.path)
        write_tensors(path, KIND, {"about": self.about, "names": self.names}, tensors)

    def written(self, path: Path) -> Part:
        """The same in a file, and no longer in memory."""
        self.write(path)
        return self.read(path)

    @classmethod
    def read(cls, path: Path) -> Part:
        """What `write` wrote. Raises SpecError for another file."""
        known = read_about(path, KIND)
        found = cls({}, {key: (wide, narrow) for key, (wide, narrow) in known["names"].items()}, known["about"])
        found.path = path
        return found
