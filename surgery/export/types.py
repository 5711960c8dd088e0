"""The number types of a model's tensors, where they are not what transformers loads: it gives a model one type.

A model that was cast after loading has its positional angles cast too, which no checkpoint stores; one that was cast in
part (norms or a head in float32) comes back as a whole in the type that its config names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from surgery.errors import ExportError, describe

Types = dict[str, str]
"""The name of a tensor to the name of its type in torch; "" for all that are not named."""


def types_of(model: Any, new: Mapping[str, Tensor]) -> Types:
    """The type of most floating tensors of the state dict; by name, those of the others and of buffers that are not in it.

    new: tensors that the saved model has beside the model's.
    """
    stored = model.state_dict().keys()
    counted = Counter(tensor.dtype for name, tensor in _floats(model) if name in stored)
    if not counted:
        return {}
    [(usual, _)] = counted.most_common(1)
    every = [*((name, tensor) for name, tensor in new.items() if name not in stored), *_floats(model)]
    found = {name: tensor.dtype for name, tensor in every if tensor.dtype != usual or name not in stored}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in {"": usual, **found}.items()}


def restore(model: nn.Module, types: Mapping[str, str], folder: Path, variant: str | None = None) -> None:
    """Gives the tensors of a model that was loaded from a folder these types.

    Parameters are read anew, as what loading has rounded does not come back.
    Raises ExportError for a tensor that the folder does not have by this name, or that is offloaded.
    """
    files, stored = _Files(folder, variant), model.state_dict().keys()
    for name, tensor in _floats(model):
        known = types.get(name) or (types.get("") if name in stored else None)
        dtype = tensor.dtype if known is None else getattr(torch, known)
        if tensor.dtype == dtype:
            continue
        found = files.read(name)
        if tensor.is_meta or (found is None and name in stored and not _holds(tensor.dtype, dtype)):
            do = "Load it with dtype=, for one type everywhere, and without an offload to disk."
            raise ExportError(describe(f"{name!r}", f"it loaded as {tensor.dtype}", f"{dtype}, as it was exported", do))
        tensor.data = (tensor.data if found is None else found.to(tensor.device)).to(dtype)


def narrowest(model: nn.Module) -> torch.dtype:
    """The type of a model's parameters that rounds most."""
    return max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps)


def _floats(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors, not those of quantised layers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_wrapped = hasattr(type(tensor), "__tensor_flatten__")
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not is_wrapped:
            yield name, tensor


def _holds(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether a cast from the second to the first and back loses nothing."""
    return torch.promote_types(narrow, wide) == narrow


class _Files:
    """The tensors of a folder by name, one at a time."""

    def __init__(self, folder: Path, variant: str | None) -> None:
        self.folder = folder
        self.single, index = (folder / _named(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        text = index.read_text(encoding="utf-8") if index.is_file() else '{"weight_map": {}}'
        self.files: dict[str, str] = json.loads(text)["weight_map"]

    def read(self, name: str) -> Tensor | None:
        path = self.folder / Path(self.files[name]).name if name in self.files else self.single
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name) if name in set(file.keys()) else None


def _named(name: str, variant: str | None) -> str:
    """As transformers names the files of a variant: model.fp16.safetensors, and its index."""
    stem, _, kind = name.rpartition(".")
    return f"{stem}.{variant}.{kind}" if variant else name
