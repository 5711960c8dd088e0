"""Which cuts might be baked into a model's weights, by what an export would try: projections, biases, ties, storage.

Nothing is computed with the weights, and no forward runs. Whether what might fold does fold, only the export's trial on real
activations can tell: norms, gates and biases may lie between a projection and the attention's core.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy import Anatomy, Attention
from surgery.cuts import Edit
from surgery.export.affine import Unfoldable
from surgery.export.biases import Biases
from surgery.export.fold import Weights, folds
from surgery.family import input_width, projection_width
from surgery.interventions import Operation
from surgery.linear import computes_stored
from surgery.taps import is_plain

CUTS: dict[str, Callable[..., Edit]] = {
    "QK to zero": lambda **options: Edit("rot_q", "zero", **options),
    "QK to a mean": lambda **options: Edit("rot_q", "value", value=1.0, **options),
    "pattern uniform": lambda **options: Edit("pattern", "uniform", **options),
    "q to a mean": lambda **options: Edit("q", "value", value=1.0, **options),
    "OV to zero": lambda **options: Edit("z", "zero", **options),
    "OV to a mean": lambda **options: Edit("z", "value", value=1.0, **options),
    "a vector added to z": lambda **options: Edit("z", "add", value=1.0, **options),
}
"""Cuts of one head, each as an edit that is folded as it is; means are those of a reference, not per position."""


@dataclass
class _Outline(Weights):
    """Weights as an export takes them, without their numbers: a matrix is as wide as its channels, and one along the rest."""

    reads: str = ""

    def copy(self) -> _Outline:
        return _Outline(self.model, dict(self.changed), set(self.added), self.shared, self.reads)

    def matrix(self, path: str) -> Tensor:
        module = self._stored(path)
        rows, columns = (input_width(module), 1) if path == self.reads else (1, projection_width(module))
        return torch.ones(rows or 0, columns or 0, dtype=torch.float64)

    def bias(self, path: str) -> Tensor:
        return torch.zeros(projection_width(self._stored(path)) or 0, dtype=torch.float64)

    def put_matrix(self, path: str, value: Tensor) -> None:
        """Numbers are of no interest."""

    def _stored(self, path: str) -> Any:
        module: Any = self.model.get_submodule(path)
        if not stores_its_map(module):
            raise Unfoldable(f"{path} is a {type(module).__name__}, which stores more than a weight of numbers")
        for name in (f"{path}.weight", f"{path}.bias"):
            if name in self.shared:
                raise Unfoldable(f"{name} is the weight of another module or attention too")
        return module


def stores_its_map(module: nn.Module) -> bool:
    """Whether a module computes x @ W + b with a weight and a bias of numbers that it stores, on meta as its class tells."""
    if is_plain(module):
        return True
    if not any(parameter.is_meta for parameter in module.parameters()):
        return computes_stored(module)
    if not isinstance(module, nn.Linear) or set(module._parameters) != {"weight", "bias"} or module._modules:
        return False
    small: Any = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    sizes = {"weight": (6, 5), "bias": (6,)}
    for name, size in sizes.items():
        if small._parameters[name] is not None:
            small._parameters[name] = nn.Parameter(torch.randn(size, generator=generator))
    return computes_stored(small)


class Foldable:
    """Asks, attention by attention, why a cut cannot be in the weights of a model."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.biases = model, Biases(model)
        self.shared = Weights.of(model, anatomy).shared
        self.is_quantised = getattr(model, "hf_quantizer", None) is not None

    def why_not(self, attention: Attention) -> dict[str, str]:
        """By name of CUTS, the reason why it cannot be folded; "" if an export would try it."""
        inside, beside = f"{attention.path}.", f"{attention.path.rpartition('.')[0]}."
        found = {name: self._why_not(attention, make) for name, make in CUTS.items()}
        return {name: why.replace(inside, "").replace(beside, "") for name, why in found.items()}

    def _why_not(self, attention: Attention, make: Callable[..., Edit]) -> str:
        if self.is_quantised:
            return "the model is quantised, and its weights are saved as they are"
        edit = make(layers=list(attention.addresses), heads=[0])
        if reasons := attention.underived(edit.site):
            return attention.why[edit.site] if edit.site in attention.why else reasons[0]
        operation = Operation(0, edit, edit.site, attention.address, (0,), (0,))
        projection = attention.projections.get("o")
        weights = _Outline(self.model, shared=self.shared, reads="" if projection is None else projection.path)
        found = []
        try:
            for way in folds(attention, edit.site, [operation], weights):
                try:
                    self.biases.require(way.added)
                    return ""
                except Unfoldable as reason:
                    found.append(str(reason))
        except Unfoldable as reason:
            found.append(str(reason))
        return "; ".join(found)
