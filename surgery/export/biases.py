"""Biases that an architecture has a place for but a model has not: found by asking its config."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from surgery.configs import config_parts
from surgery.export.affine import Unfoldable
from surgery.export.fold import Weights


class Biases:
    """The configs with one of their switches turned, each with the parameters that it adds. Found when first asked for."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._found: list[tuple[Any, dict[str, torch.Size]]] | None = None

    def require(self, added: Collection[str]) -> None:
        """Raises Unfoldable unless one switch of the config adds all of these biases, and nothing but biases."""
        if added and self._switch(added) is None:
            raise Unfoldable(f"{', '.join(sorted(added))} does not exist, and no switch of the config adds it")

    def config(self, weights: Weights) -> Any:
        """The config that has the biases that were added, and zeros for others that come along; None for the model's own."""
        if not weights.added:
            return None
        switch = self._switch(weights.added)
        assert switch is not None
        config, new = switch
        for name, shape in new.items():
            weights.changed.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            weights.added.add(name)
        return config

    def _switch(self, added: Collection[str]) -> tuple[Any, dict[str, torch.Size]] | None:
        if self._found is None:
            self._found = list(self._switches())
        return next(((config, new) for config, new in self._found if set(added) <= set(new)), None)

    def _switches(self) -> Iterator[tuple[Any, dict[str, torch.Size]]]:
        config = getattr(self.model, "config", None)
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        for part, own in config_parts(config).items():
            for name, value in vars(own).items():
                if not isinstance(value, bool) or "bias" not in name:
                    continue
                other = copy.deepcopy(config)
                setattr(getattr(other, part) if part else other, name, not value)
                try:
                    with torch.device("meta"):
                        built: nn.Module = type(self.model)(other)
                except Exception:  # a switch that this architecture does not take
                    continue
                found = {n: tensor.shape for n, tensor in built.state_dict().items()}
                new = {n: shape for n, shape in found.items() if n not in shapes}
                same = all(found.get(n) == shape for n, shape in shapes.items())
                if new and same and all(n.endswith(".bias") and len(shape) == 1 for n, shape in new.items()):
                    yield other, new
