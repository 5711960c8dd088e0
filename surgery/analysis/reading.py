"""Several metrics read off one forward, each at the positions that it asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from surgery.analysis.batches import rows_of
from surgery.analysis.kept import at_positions
from surgery.analysis.metrics import Measured, Metric, as_metric
from surgery.errors import SpecError, describe


class Reading:
    """positions: whose logits a forward must give for all of the metrics; None for all positions.

    metrics: those of one name are numbered ("loss", "loss 2"). joint: names of metrics that were seen to give one number for
    several examples together, which says nothing of each.
    Raises SpecError for what is no metric, and for none at all.
    """

    def __init__(self, metrics: Any) -> None:
        given = metrics if isinstance(metrics, Sequence) and not isinstance(metrics, str) else [metrics]
        self.metrics: tuple[Metric, ...] = _numbered([as_metric(metric) for metric in given])
        if not self.metrics:
            raise SpecError(describe("metrics", "none", "at least one", "For example 'loss'."))
        self.joint: set[str] = set()
        wanted = [metric.positions for metric in self.metrics]
        self.positions: tuple[int, ...] | None = None
        if all(positions is not None for positions in wanted):
            self.positions = tuple(dict.fromkeys(p for positions in wanted for p in positions or ()))

    def read(self, model: Any, inputs: Mapping[str, Any], output: Any, clean: Any = None) -> np.ndarray:
        """(metric, example) in float64. output, clean: of forwards that gave logits at `positions`."""
        found, rows = [], rows_of(inputs)
        for metric in self.metrics:
            logits, before = (self._of(metric, getattr(o, "logits", None)) for o in (output, clean))
            values = metric.units(Measured(model, inputs, output, logits, before)).numpy()
            if len(values) < rows:
                self.joint.add(metric.name)
            found.append(np.broadcast_to(values, rows))
        return np.stack(found)

    def _of(self, metric: Metric, logits: Tensor | None) -> Tensor | None:
        """The logits of one metric's own positions."""
        if logits is None or metric.positions is None or logits.dim() < 3:
            return logits
        if self.positions is None:
            return at_positions(logits, metric.positions)
        return logits[:, [self.positions.index(p) for p in metric.positions]]


def _numbered(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """The same with a number behind each name that is taken."""
    found: dict[str, Metric] = {}
    for metric in metrics:
        name, number = metric.name, 1
        while name in found:
            number += 1
            name = f"{metric.name} {number}"
        found[name] = replace(metric, name=name)
    return tuple(found.values())
