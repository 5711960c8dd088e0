"""Weights that accelerate keeps on a disk or in a CPU's memory while their modules do not run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from surgery.errors import ExportError, describe
from surgery.taps import at_hand, mover

SHARD = "2GB"
"""Size of the files of a model that is offloaded, unless another is given: transformers holds one of them in memory."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weight is elsewhere. Raises ExportError for one that is nowhere: on the meta device, without a hook."""
    away = [name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta]
    lost = [name for name in away if not any(mover(model.get_submodule(owner)) for owner in _owners(name))]
    if lost:
        do = "Load the model with its weights."
        found = f"{len(lost)} weights on the meta device, without data ({lost[0]!r})"
        raise ExportError(describe("the model", found, "weights in memory, or offloaded by accelerate", do))
    return bool(away)


def loaded(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name, with its numbers, wherever they are; no copy where they are in memory."""
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    with at_hand(module):
        tensor: Tensor = getattr(module, kind)
        return tensor.detach()


def copied(module: nn.Module) -> Any:
    """A deep copy that has its weights for good: accelerate's hooks, which would bring the old ones, stay behind."""
    memo: dict[int, Any] = {id(mover(part)): mover(part) for part in module.modules() if mover(part) is not None}
    with at_hand(module):
        found = copy.deepcopy(module, memo)
    for part in found.modules():
        if mover(part) is None:
            continue
        del part._hf_hook, part.forward
        forward = part.__dict__.pop("_old_forward")
        if getattr(forward, "__func__", None) is not type(part).forward:
            part.forward = forward
    return found


def without_ties(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the second names of offloaded weights: on the meta device each is a tensor of its own."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    away = [name for name in ties if name in tensors and tensors[name].is_meta]
    second = {name for name in away if loaded(model, name).data_ptr() == loaded(model, ties[name]).data_ptr()}
    return {name: tensor for name, tensor in tensors.items() if name not in second}


@contextmanager
def told(model: Any) -> Iterator[None]:
    """Within the block, save_pretrained finds offloaded weights though no device map of from_pretrained has put them away.

    transformers looks for them only where `hf_device_map` says so; accelerate's own cpu_offload and disk_offload set none.
    """
    known = getattr(model, "hf_device_map", None)
    if not is_offloaded(model) or {"cpu", "disk"} & set((known or {}).values()):
        yield
        return
    model.hf_device_map = {"": "disk"}
    try:
        yield
    finally:
        if known is None:
            del model.hf_device_map
        else:
            model.hf_device_map = known


def _owners(name: str) -> Iterator[str]:
    """The modules round a weight, the innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name
