"""Tensors in one safetensors file beside what is known of them: written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgery.errors import SpecError, describe


def write_tensors(path: str | Path, kind: str, about: Any, tensors: Mapping[str, Tensor]) -> None:
    """kind: what it is, as `read_about` asks for it. about: plain data."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, {kind: json.dumps(about)})
    os.replace(unfinished, path)


def read_about(path: str | Path, kind: str) -> Any:
    """What is known of the tensors of a file. Raises SpecError for one of another kind."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[kind])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise SpecError(describe(f"{str(path)!r}", found, kind, "Name one that was saved as that.")) from None


def read_tensors(path: str | Path, *names: str) -> dict[str, Tensor]:
    """By name; all of a file if none is named."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}
