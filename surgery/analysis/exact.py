"""What replacing a head's circuit changes, by doing it: one cut after another, by the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.analysis.agreement import require_same_results
from surgery.analysis.baselines import Baseline
from surgery.analysis.objective import Objective
from surgery.analysis.reading import Reading
from surgery.analysis.sweep import Sweep
from surgery.analysis.workers import ALONE, Workers

Node = tuple[str, int, str]
"""An address, a head's number, a circuit."""


@dataclass(frozen=True)
class Exact:
    """changes: of the metric's mean, by node. start: the metric without changes. forwards: whole forwards' worth of layers."""

    changes: dict[Node, float]
    start: float
    forwards: float
    notes: tuple[str, ...]


def exact_changes(
    objective: Objective, nodes: Sequence[Node], baseline: Baseline, tokens: int | None = None, workers: Workers = ALONE
) -> Exact:
    """Replaces each node by itself. tokens, workers: see `surgery.analysis.sweep.Sweep`."""
    reading = Reading(objective.metric)
    sweep = Sweep(objective.model, objective.inputs, reading.positions, tokens=tokens, workers=workers)

    def measured(output: Any) -> np.ndarray:
        return reading.read(objective.model, objective.inputs, output, sweep.clean)

    before = measured(sweep.clean)
    require_same_results(workers, before)
    start = float(before.mean())
    specs = [baseline.edits(address, [head], circuit) for address, head, circuit in nodes]
    changes = sweep.run(specs, lambda _, output: float(measured(output).mean()) - start)
    return Exact(dict(zip(nodes, changes, strict=True)), start, 1 + sweep.forwards, tuple(sweep.notes))
