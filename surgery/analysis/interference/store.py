"""Factors of batches, in memory or in files that are read part by part."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgery.errors import SpecError, describe

SUFFIX = ".safetensors"


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

    def factor(self, key: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(wide, narrow) of a block."""
        if self.path is None:
            wide, narrow = (self.tensors[name] for name in self.names[key])
        else:
            with safe_open(self.path, "pt") as file:
                wide, narrow = (file.get_tensor(name) for name in self.names[key])
        return wide.to(device), narrow.to(device)

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all, and forgets the tensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        about = {"about": json.dumps(self.about), "names": json.dumps(self.names)}
        save_file(self.tensors, unfinished, metadata=about)
        os.replace(unfinished, path)
        self.path, self.tensors = path, {}

    @classmethod
    def read(cls, path: Path) -> Part:
        """What `write` wrote. Raises SpecError for another file."""
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata() or {}
            names = {key: (wide, narrow) for key, (wide, narrow) in json.loads(known["names"]).items()}
            found = cls({}, names, json.loads(known["about"]))
        except (OSError, KeyError, ValueError, TypeError, Exception) as error:
            if not isinstance(error, OSError | KeyError | ValueError | TypeError) and "Safetensor" not in type(error).__name__:
                raise
            do = "Remove it, and collect again."
            raise SpecError(
                describe(f"{str(path)!r}", f"a file of something else ({error})", "collected gradients", do)
            ) from None
        found.path = path
        return found

    def whole(self) -> Part:
        """The same in memory."""
        if self.path is None:
            return self
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in dict.fromkeys(n for pair in self.names.values() for n in pair)}
        return Part(tensors, self.names, self.about)
