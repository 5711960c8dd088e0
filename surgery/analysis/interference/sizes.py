"""Sizes of effects, of every hypothesis (the columns) at once."""

from __future__ import annotations

import numpy as np
from scipy import special, stats


def two_sample(task: np.ndarray, control: np.ndarray) -> dict[str, np.ndarray]:
    """Effect, Hedges' g and Cliff's delta of each hypothesis, task minus control."""
    sizes = len(task), len(control)
    freedom = sum(sizes) - 2
    effect = task.mean(axis=0) - control.mean(axis=0)
    pooled = (_squares(task) + _squares(control)) / freedom
    ranks = stats.rankdata(np.concatenate([task, control]), axis=0)[: sizes[0]].sum(axis=0)  # ties share their mean rank
    delta = 2 * (ranks - sizes[0] * (sizes[0] + 1) / 2) / (sizes[0] * sizes[1]) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"effect": effect, "g": _unbiased(freedom) * effect / np.sqrt(pooled), "delta": delta}


def one_sample(values: np.ndarray) -> dict[str, np.ndarray]:
    """Effect, Hedges' g and the share of positive minus that of negative scores, of each hypothesis against 0."""
    effect = values.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = _unbiased(len(values) - 1) * effect / np.sqrt(_squares(values) / (len(values) - 1))
    return {"effect": effect, "g": size, "delta": np.sign(values).mean(axis=0)}


def _squares(values: np.ndarray) -> np.ndarray:
    """Sums of squared deviations; of equal values exactly 0, so that sizes are infinite and not merely large."""
    shifted = values - values[0]
    return ((shifted - shifted.mean(axis=0)) ** 2).sum(axis=0)


def _unbiased(freedom: int) -> float:
    """Hedges' exact factor (1981): by how much a standardised mean difference of few samples is too large."""
    return float(np.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)) / np.sqrt(freedom / 2))
