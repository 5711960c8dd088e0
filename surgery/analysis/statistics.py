"""What paired differences say: size, how sure it is, and whether chance would give it. Examples are the units.

Positions within an example, and heads of one model, are not independent samples, and are never treated as such.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 9999
SAME = 1e-12
"""Differences that are closer to each other than this part of the largest differ by rounding alone."""


@dataclass(frozen=True)
class Paired:
    """Of differences d, one per example. effect: mean of d; size: mean / standard deviation of d (Cohen's d_z; 0 if all are 0).

    low, high: of the mean, by bootstrap over examples (bias-corrected and accelerated; Efron 1987). Of few examples they are
      too narrow: of normal differences, 95 % intervals hold the mean in 80 % of samples of 4, 89 % of 8, 92 % of 16
      (`benchmarks/coverage.py`).
    size_low, size_high: of the size, likewise by percentiles; a resample of one difference alone is of infinite size, so that
      few examples may leave the interval open.
    p: two-sided, by flipping signs of d (Fisher 1935), exact for few examples: under the null hypothesis that a cut moves
    examples either way alike. NaN for fewer than two examples.
    """

    effect: float
    size: float
    low: float
    high: float
    size_low: float
    size_high: float
    p: float


def paired(differences: np.ndarray, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Paired:
    """Describes differences (example,). The same seed gives the same numbers."""
    d = np.asarray(differences, dtype=np.float64)
    nan = float("nan")
    effect = float(d.mean())
    if len(d) < 2 or not np.isfinite(d).all():
        return Paired(effect, nan, nan, nan, nan, nan, nan)
    unit = float(np.abs(d).max()) or 1.0  # squares of the tiniest numbers are nothing
    d = d / unit
    size = float(_sizes(d[None])[0])
    if not d.any() or np.isinf(size):  # the same everywhere: nothing to resample
        return Paired(effect, size, effect, effect, size, size, 1.0 if effect == 0 else float(2.0 ** (1 - len(d))))
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(d), size=(resamples, len(d)))
    samples = d[picks]
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    size_low, size_high = np.quantile(_sizes(samples), tails, method="inverted_cdf")  # others would take inf - inf
    interval = stats.bootstrap((d,), np.mean, n_resamples=resamples, confidence_level=confidence, rng=rng).confidence_interval
    test = stats.permutation_test((d,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples, rng=rng)
    low, high = float(interval.low) * unit, float(interval.high) * unit
    return Paired(effect, size, low, high, float(size_low), float(size_high), float(test.pvalue))


def _sizes(samples: np.ndarray) -> np.ndarray:
    """Mean / standard deviation of each of (sample, example): infinite, or 0 of nothing, where all are one number."""
    mean, largest = samples.mean(1), np.abs(samples).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = mean / samples.std(1, ddof=1)
    alike = np.where(mean == 0, 0.0, np.copysign(np.inf, mean))
    return np.where(np.ptp(samples, axis=1) <= SAME * largest, alike, sizes)


def corrected(p: np.ndarray) -> np.ndarray:
    """p-values whose expected share of false discoveries is controlled (Benjamini and Hochberg 1995); NaN stays, uncounted."""
    p = np.asarray(p, dtype=np.float64)
    found, known = np.full_like(p, np.nan), ~np.isnan(p)
    if known.any():
        found[known] = stats.false_discovery_control(p[known], method="bh")
    return found
