"""Removing heads that add nothing from a baked model, where its config can express fewer heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from surgery.anatomy import Anatomy, Attention
from surgery.errors import ExportError, describe, listing
from surgery.export.offload import loaded
from surgery.export.saving import replaced

DO = "Export without shrink=True: the heads are zero in the weights."


@dataclass(frozen=True)
class Shrunk:
    """The state dict and the config of a model with fewer heads; model: that model on the meta device, without data."""

    tensors: dict[str, Tensor]
    config: Any
    model: Any


def shrink(model: Any, anatomy: Anatomy, changed: Mapping[str, Tensor], config: Any = None) -> Shrunk:
    """Removes, in every attention, as many whole groups of heads as every attention has without effect (columns of W_O zero).

    changed: the folded weights by name; config: with the biases among them, None for the model's own.
    Raises ExportError, with every reason, where that is not possible: an attention whose heads all act, or a config that does
    not say the number of heads, or ties it to widths.
    """
    tensors = replaced(model, changed)
    shapes = {(a.heads, a.kv_heads, a.d_head, a.d_value) for a in anatomy}
    silent = {attention.path: _silent_groups(model, attention, tensors) for attention in anatomy}
    problems = []
    if len(shapes) > 1:
        problems.append(describe("shrink", f"attentions of {len(shapes)} shapes", "one number of heads", DO))
    full = [attention for attention in anatomy if not silent[attention.path]]
    if full:
        where = ", ".join(attention.address for attention in full)
        found = f"no group of heads without effect at {where}"
        problems.append(describe("shrink", found, "one in every attention, as the config has one number of heads", DO))
    if problems:
        raise ExportError(listing("heads cannot be removed", problems))
    [(heads, kv_heads, d_head, _)] = shapes
    count, size = min(map(len, silent.values())), heads // kv_heads
    try:
        config = _config(config or model.config, heads, kv_heads, d_head, count)
        with torch.device("meta"):
            smaller = type(model)(config)
    except Exception as error:  # of whatever kind an architecture raises for numbers that do not fit
        found = f"a config that cannot say {heads - count * size} heads of width {d_head} ({error})"
        raise ExportError(describe("shrink", found, "a number of heads apart from the widths", DO)) from None
    expected = {name: tuple(t.shape) for name, t in smaller.state_dict().items()}
    for attention in anatomy:
        removed = silent[attention.path][:count]
        _cut(model, attention, removed, tensors)
    wrong = [
        describe(f"shrink: {name}", f"{tuple(t.shape)}", f"{expected.get(name)}, as the config with fewer heads has it", DO)
        for name, t in tensors.items()
        if tuple(t.shape) != expected.get(name)
    ]
    if wrong:
        raise ExportError(listing("heads cannot be removed", wrong[:8]))
    return Shrunk(tensors, config, smaller)


def _silent_groups(model: Any, attention: Attention, tensors: Mapping[str, Tensor]) -> list[int]:
    """The kv heads whose query heads all have zeros in W_O."""
    if set(attention.projections) < {"q", "k", "v", "o"}:
        return []
    projection = attention.projections["o"]
    weight = _numbers(model, tensors, f"{projection.path}.weight")
    matrix = weight if isinstance(model.get_submodule(projection.path), Conv1D) else weight.T
    silent = [not bool(matrix[channels].any()) for channels in projection.channels]
    size = attention.group_size
    return [kv for kv in range(attention.kv_heads) if all(silent[kv * size : (kv + 1) * size])]


def _config(config: Any, heads: int, kv_heads: int, d_head: int, count: int) -> PreTrainedConfig:
    """A copy that says fewer heads of the same width, by the names that transformers gives these numbers."""
    new = copy.deepcopy(config)
    new.num_attention_heads = heads - count * (heads // kv_heads)
    if getattr(config, "num_key_value_heads", None) is not None:
        new.num_key_value_heads = kv_heads - count
    if hasattr(config, "head_dim") or getattr(config, "hidden_size", None) == heads * d_head:
        new.head_dim = d_head
    return new


def _cut(model: Any, attention: Attention, removed: list[int], tensors: dict[str, Tensor]) -> None:
    """Takes the channels of kv heads, and of the query heads that read them, out of the projections and per-head vectors."""
    size = attention.group_size
    queries = [head for head in range(attention.heads) if head // size in removed]
    gone: dict[str, set[int]] = {}
    for site in ("q", "k", "v", "o"):
        projection = attention.projections[site]
        channels = projection.channels[removed if site in ("k", "v") else queries]
        gone.setdefault(f"{projection.path}/{'in' if site == 'o' else 'out'}", set()).update(channels.flatten().tolist())
    for key, numbers in gone.items():
        path, side = key.split("/")
        is_transposed = isinstance(model.get_submodule(path), Conv1D)
        axis = 1 if (side == "in") is not is_transposed else 0
        weight = _numbers(model, tensors, f"{path}.weight")
        kept = torch.tensor([n for n in range(weight.shape[axis]) if n not in numbers], device=weight.device)
        tensors[f"{path}.weight"] = weight.index_select(axis, kept)
        if side == "out" and f"{path}.bias" in tensors:
            tensors[f"{path}.bias"] = _numbers(model, tensors, f"{path}.bias").index_select(0, kept)
    left = torch.tensor([head for head in range(attention.heads) if head not in queries])
    for name, parameter in attention.module.named_parameters(recurse=False):
        if parameter.dim() == 1 and len(parameter) == attention.heads:  # one number a head, such as a sink
            full = f"{attention.path}.{name}"
            vector = _numbers(model, tensors, full)
            tensors[full] = vector.index_select(0, left.to(vector.device))


def _numbers(model: Any, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of the new state dict, loaded if it is one of the model's that lies elsewhere."""
    return loaded(model, name) if tensors[name].is_meta else tensors[name]
