"""Integrated gradients along the patch path (Sundararajan et al. 2017, on activations as Marks et al. 2024).

The gates of heads on one path open together, α from 0 to 1, and a head's score is the integral of the metric's derivative by
its own gate. Scores on a path add up to what the metric changes when all of its heads are replaced (completeness).

A path holds the heads of one attention ("layer"): every other layer computes on, so that effects through later heads count, as
they do when one head is cut. With all heads of all layers on one path ("all") there are as many passes as steps, but an
early head's way through later ones is closed to the degree that these are replaced: a share of a joint effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from surgery.analysis.attribution import Scores, by_circuit, gates, gradients
from surgery.analysis.baselines import Baseline, Selection
from surgery.analysis.objective import Objective
from surgery.errors import SpecError, describe
from surgery.spec import Spec

PATHS = ("layer", "all")


def integrated(
    objective: Objective, selection: Selection, circuits: Sequence[str], baseline: Baseline, steps: int = 8, path: str = "layer"
) -> Scores:
    """Scores of all heads by `steps` points of Gauss and Legendre on each path: a forward and a backward for each.

    Circuits have paths of their own. Raises SpecError for another path, or less than one step.
    """
    if path not in PATHS or steps < 1:
        expected = f"path {' or '.join(map(repr, PATHS))} and at least 1 step"
        raise SpecError(describe("integrated gradients", f"path={path!r}, steps={steps}", expected, "Choose of these."))
    if objective.start is None:
        with torch.no_grad():
            objective.value(Spec())
    together = [selection] if path == "all" else [[one] for one in selection]
    places, weights = np.polynomial.legendre.leggauss(steps)
    found: Scores = {}
    for circuit in circuits:
        for group in together:
            for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
                points = gates(group, baseline.sites(circuit), baseline, float(place))
                slopes = gradients(objective, objective.value(points.spec), [points])
                scores = by_circuit(slopes, group, [circuit], baseline)
                for key, score in scores.items():
                    found[key] = found.get(key, 0) + float(weight) * score
    return found
