"""Trying folded weights: each attention is run on what a forward of the model gave it, with its cuts and with new weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache

from surgery.anatomy import Attention
from surgery.evaluation import evaluating
from surgery.export.fold import Weights
from surgery.export.offload import copied
from surgery.patch import patched
from surgery.spec import Spec
from surgery.taps import runs_on

CLOSE = 1e-5
"""Largest difference, as a part of the largest entry. The trial is in float64, but families norm and softmax in float32."""

FACTORS = (1.0, 16.0)
"""Of the hidden states that an attention is tried on."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Trials:
    """The last call of every module that holds an attention with its projections, in one forward of the model."""

    def __init__(self, model: nn.Module, attentions: list[Attention], inputs: Mapping[str, Any]) -> None:
        self.model = model
        self.masks = [t for n, t in inputs.items() if n.endswith("mask") and isinstance(t, Tensor) and t.dim() == 2]
        self.calls: dict[str, Call] = {}
        handles = []

        def note(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.calls[path] = tree_map(_noted, (args, kwargs), is_leaf=lambda value: isinstance(value, Cache))

            return hook

        for path in dict.fromkeys(map(_holder, attentions)):
            handles.append(model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True))
        try:
            with torch.no_grad(), evaluating(model):
                model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def output(self, attention: Attention, cuts: Spec, weights: Weights | None = None) -> Tensor:
        """(factor, batch, position, d_model): what the attention gives under cuts, with other weights, in float64.

        On what it was given, and on that times FACTORS: what is close for small scores alone is found out by large ones.
        """
        path = _holder(attention)
        with patched(self.model, cuts, kernel="eager", strict=False), evaluating(self.model):
            holder = self.model.get_submodule(path)
            device, module = runs_on(holder), copied(holder).double()
        for name, value in (weights.changed if weights is not None else {}).items():
            if name.startswith(f"{path}.") or not path:
                owner, _, kind = name.removeprefix(f"{path}.").rpartition(".")
                module.get_submodule(owner)._parameters[kind] = nn.Parameter(value.to(device, torch.float64))
        found = []
        for factor in FACTORS:
            args, kwargs = tree_map(lambda value: _doubled(value, device), self.calls[path])
            args, kwargs = _scaled(args, kwargs, factor)
            with torch.no_grad():
                leaves = tree_leaves(module(*args, **kwargs))
            found.append(next(t for t in leaves if isinstance(t, Tensor)))
        for part in module.modules():
            # A cycle with its surgery would keep the copy until the garbage collector comes: its weights go now.
            part._parameters.clear()
            part._buffers.clear()
        return torch.stack(found)


class Trial:
    """One attention: what it gives under its cuts, to compare with what it gives with other weights in place of some."""

    def __init__(self, trials: Trials, attention: Attention, cuts: Spec) -> None:
        self.trials, self.attention = trials, attention
        self.runs = _holder(attention) in trials.calls
        if self.runs:
            self.expected, uncut = trials.output(attention, cuts), trials.output(attention, Spec())
            # Where it is NaN a query attends to nothing; and cuts leave rows of padding as they are.
            self.rows = ~uncut.isnan().any(dim=-1)
            for mask in trials.masks:
                if mask.shape == self.rows.shape[1:]:
                    self.rows &= mask.to(self.rows.device).bool()

    def gap(self, cuts: Spec, weights: Weights) -> float:
        """The largest difference, as a part of the largest entry, with these cuts alone and other weights."""
        gaps = []
        for found, expected, rows in zip(
            self.trials.output(self.attention, cuts, weights), self.expected, self.rows, strict=True
        ):
            difference = (found[rows] - expected[rows]).abs()
            if bool(difference.isnan().any()):
                return float("inf")
            gaps.append(float(difference.max() / expected[rows].abs().max().clamp(min=1e-30)))
        return max(gaps)


def _holder(attention: Attention) -> str:
    """The path of the smallest module that holds an attention and all of its projections."""
    owners = [attention.path, *(projection.owner for projection in attention.projections.values())]
    parts = [owner.split(".") for owner in owners]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _noted(value: Any) -> Any:
    """A tensor's copy; a KV cache would be filled twice, and is left out."""
    if isinstance(value, Cache):
        return None
    return value.detach().clone() if isinstance(value, Tensor) else value


def _scaled(args: tuple[Any, ...], kwargs: dict[str, Any], factor: float) -> Call:
    """A call with its hidden states, its first floating tensor, multiplied."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return (args[0] * factor, *args[1:]), kwargs
    name = next(n for n, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
    return args, {**kwargs, name: kwargs[name] * factor}


def _doubled(value: Any, device: torch.device) -> Any:
    """A tensor in float64; where a mask forbids by the lowest number of its type, by that of float64."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value.to(device) if isinstance(value, Tensor) else value
    lowest = torch.finfo(value.dtype).min
    return value.to(device, torch.float64).masked_fill(value.to(device) <= lowest, torch.finfo(torch.float64).min)
