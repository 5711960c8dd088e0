"""Cuts as changes of the weights beside them: rows of W_Q, W_K and W_V, columns of W_O, and biases.

Every fold is a claim about one attention; `surgery.export.bake` tries it on real activations before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.anatomy import Attention
from surgery.export.affine import Affine, Unfoldable, affine_of
from surgery.interventions import Operation
from surgery.linear import computes_stored
from surgery.lower import width_of
from surgery.taps import at_hand, has_numbers


@dataclass
class Weights:
    """New values of parameters by their full name, as far as they changed; the model has none of `added` yet.

    In float64 while one attention is worked on, and then, settled, in the model's own types. shared: parameters of two modules.
    """

    model: nn.Module
    changed: dict[str, Tensor] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    shared: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, anatomy: Iterable[Attention]) -> Weights:
        return cls(model, shared=_shared(model) | _of_several(model, anatomy))

    def copy(self) -> Weights:
        return Weights(self.model, dict(self.changed), set(self.added), self.shared)

    def settle(self) -> None:
        """Rounds what changed to the types of the parameters: a large model has no room for copies in float64."""
        for name, value in self.changed.items():
            owner, _, kind = name.rpartition(".")
            module: Any = self.model.get_submodule(owner)
            own = getattr(module, kind, None)
            self.changed[name] = value.to(module.weight.dtype if own is None else own.dtype)

    def matrix(self, path: str) -> Tensor:
        """(d_in, d_out) of a linear map, a copy in float64. Raises Unfoldable for a map that is not stored as numbers."""
        module: Any = self.model.get_submodule(path)
        if not computes_stored(module):
            raise Unfoldable(f"{path} is a {type(module).__name__} with more than a weight; merge its adapters first")
        value = self._value(f"{path}.weight", module)
        return value if isinstance(module, Conv1D) else value.T

    def bias(self, path: str) -> Tensor:
        """(d_out,) of a linear map, a copy in float64; zeros where it has none."""
        module: Any = self.model.get_submodule(path)
        if module.bias is None and f"{path}.bias" not in self.changed:
            return torch.zeros(self.matrix(path).shape[1], dtype=torch.float64)
        return self._value(f"{path}.bias", module)

    def put_matrix(self, path: str, value: Tensor) -> None:
        module: Any = self.model.get_submodule(path)
        self.changed[f"{path}.weight"] = value if isinstance(module, Conv1D) else value.T

    def put_bias(self, path: str, value: Tensor) -> None:
        module: Any = self.model.get_submodule(path)
        if module.bias is None:
            if not bool(value.any()) and f"{path}.bias" not in self.changed:
                return
            self.added.add(f"{path}.bias")
        self.changed[f"{path}.bias"] = value

    def _value(self, name: str, module: nn.Module) -> Tensor:
        if name in self.shared:
            raise Unfoldable(f"{name} is the weight of another module or attention too")
        if name in self.changed:
            return self.changed[name].to(torch.float64, copy=True)
        with at_hand(module):
            value = getattr(module, name.rpartition(".")[2])
            if not has_numbers(value):
                raise Unfoldable(f"{name} is quantised; load the model without quantisation")
            if value.is_meta:
                raise Unfoldable(f"{name} is on the meta device, without data")
            return value.detach().cpu().double().clone()


def _shared(model: nn.Module) -> frozenset[str]:
    """The names of parameters that two modules have; a module that stands at two places is one."""
    owners: dict[int, set[int]] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        owners.setdefault(id(parameter), set()).add(id(model.get_submodule(name.rpartition(".")[0])))
    # Ties of offloaded weights are known by their names alone.
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    own = {name for name, parameter in named if len(owners[id(parameter)]) > 1}
    away = {n for n, p in named if p.is_meta and (n in ties or n in ties.values())}
    return frozenset(own | away)


def _of_several(model: nn.Module, anatomy: Iterable[Attention]) -> frozenset[str]:
    """The names of parameters of a linear map that several attentions call: its new weights would change them all."""
    users: dict[int, set[str]] = {}
    for attention in anatomy:
        for projection in attention.projections.values():
            users.setdefault(id(model.get_submodule(projection.path)), set()).add(attention.address)
    named = model.named_modules(remove_duplicate=False)
    return frozenset(f"{n}.{kind}" for n, m in named if len(users.get(id(m), ())) > 1 for kind in ("weight", "bias"))


def folds(attention: Attention, site: str, operations: list[Operation], weights: Weights) -> Iterator[Weights]:
    """The ways in which the edits of one site may become weights, the plainest first.

    Raises Unfoldable, at first or after the others, with the reason why there are no more.
    """
    heads = attention.kv_heads if site == "k" else attention.heads
    affine = affine_of(operations, heads, width_of(attention, site) or 2)  # of a matrix any number of keys
    if site in ("q", "k"):
        yield _rows(attention, site, affine, weights)
    elif site in ("rot_q", "rot_k", "scores"):  # a factor of k, as one query head reads it, is one of its q
        yield _rows(attention, "q", affine.of_width(attention.d_head), weights)
    elif site == "pattern" and any(operation.edit.action == "uniform" for operation in operations):
        scale = torch.where(affine.changed, 0.0, 1.0)[:, None].double()
        if bool((affine.scale[affine.changed] != 0).any()):
            raise Unfoldable("a part of the pattern stays")
        yield _rows(attention, "q", Affine(scale, torch.zeros_like(scale)).of_width(attention.d_head), weights)
    elif site == "result":
        yield _result(attention, affine, weights)
    else:
        affine = affine.of_width(attention.d_value) if site == "pattern" else affine
        yield from _values(attention, site, affine, weights)


def _values(attention: Attention, site: str, affine: Affine, weights: Weights) -> Iterator[Weights]:
    """v and z: by the columns of W_O, or by the rows of W_V, whose sum weighted by a pattern adds what W_V adds."""
    ways = [
        lambda: _columns(attention, affine, weights),
        lambda: _rows(attention, "v", affine.of_heads(attention.group_size), weights),
    ]
    found, reasons = [], []
    for way in ways if site == "z" or not affine.has_shift else ways[::-1]:
        try:
            found.append(way())
        except Unfoldable as reason:
            reasons.append(str(reason))
    # Biases that are there come before biases that the config has yet to be given.
    yield from sorted(found, key=lambda one: len(one.added))
    if reasons:
        raise Unfoldable("; ".join(reasons))


def _rows(attention: Attention, site: str, affine: Affine, weights: Weights) -> Weights:
    """The output channels of a projection: y = x W + b becomes scale * y + shift."""

    def change(matrix: Tensor, bias: Tensor, channels: Tensor, scale: Tensor, shift: Tensor) -> None:
        matrix[:, channels] = _scaled(matrix[:, channels], scale)
        bias[channels] = _scaled(bias[channels], scale) + shift

    return _changed(attention, site, affine, weights, change)


def _columns(attention: Attention, affine: Affine, weights: Weights) -> Weights:
    """The input channels of W_O: z W becomes (scale * z + shift) W."""

    def change(matrix: Tensor, bias: Tensor, channels: Tensor, scale: Tensor, shift: Tensor) -> None:
        bias += shift @ matrix[channels]
        matrix[channels] = _scaled(matrix[channels], scale[:, None])

    return _changed(attention, "o", affine, weights, change)


def _result(attention: Attention, affine: Affine, weights: Weights) -> Weights:
    """What heads add to the output: z W becomes scale * (z W) + shift."""

    def change(matrix: Tensor, bias: Tensor, channels: Tensor, scale: Tensor, shift: Tensor) -> None:
        matrix[channels] = _scaled(matrix[channels], scale)
        bias += shift

    return _changed(attention, "o", affine, weights, change)


def _changed(attention: Attention, site: str, affine: Affine, weights: Weights, change: Callable[..., None]) -> Weights:
    """A copy of the weights; change(matrix, bias, channels, scale, shift) works on a projection in place, head by head."""
    if site not in attention.projections:
        raise Unfoldable(f"it has no projection of its own: {attention.why[site]}")
    projection, new = attention.projections[site], weights.copy()
    matrix, bias = new.matrix(projection.path), new.bias(projection.path)
    for head in affine.changed.nonzero().flatten().tolist():
        change(matrix, bias, projection.channels[head], affine.scale[head], affine.shift[head])
    new.put_matrix(projection.path, matrix)
    new.put_bias(projection.path, bias)
    return new


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """0 * NaN is no zero, and -0.0 no 0.0."""
    return torch.where(scale == 0, 0.0, tensor * scale)
