"""Several metrics read off one forward, each at the positions that it asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from surgery.analysis.metrics import Measured, Metric, as_metric


class Reading:
    """positions: whose logits a forward must give for all of the metrics; None for all positions."""

    def __init__(self, metrics: Any) -> None:
        given = metrics if isinstance(metrics, Sequence) and not isinstance(metrics, str) else [metrics]
        self.metrics: tuple[Metric, ...] = tuple(map(as_metric, given))
        wanted = [metric.positions for metric in self.metrics]
        self.positions: tuple[int, ...] | None = None
        if all(positions is not None for positions in wanted):
            self.positions = tuple(dict.fromkeys(p for positions in wanted for p in positions or ()))

    def read(self, model: Any, inputs: Mapping[str, Any], output: Any, clean: Any = None) -> np.ndarray:
        """(metric, example) in float64. output, clean: of forwards that gave logits at `positions`."""
        found = []
        for metric in self.metrics:
            logits, before = (self._of(metric, getattr(o, "logits", None)) for o in (output, clean))
            found.append(metric(Measured(model, inputs, output, logits, before)).numpy())
        return np.stack(found)

    def _of(self, metric: Metric, logits: Tensor | None) -> Tensor | None:
        """The logits of one metric's own positions."""
        if logits is None or metric.positions is None or logits.dim() < 3:
            return logits
        if self.positions is None:
            return logits[:, list(metric.positions)]
        return logits[:, [self.positions.index(p) for p in metric.positions]]
