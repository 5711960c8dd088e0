"""How sure the mean of a map of two tasks' samples is: both tasks' samples are drawn again, each on its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from surgery.analysis.interference.checks import FEWEST
from surgery.errors import SpecError, describe, listing


@dataclass(frozen=True)
class Intervals:
    """mean, low, high: of one map numbers (arrays without axes), of several an entry each (hypothesis,)."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    confidence: float


def two_way_bootstrap(
    values: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    memory_mib: float = 64.0,
    progress: bool = False,
) -> Intervals:
    """Percentile intervals of the mean of a map (sample of A, sample of B), or of many: (hypothesis, sample of A, sample of B).

    Rows and columns are drawn with replacement independently of each other, both at once (Owen 2007, "The pigeonhole
    bootstrap"); drawing pairs would treat the n_A × n_B entries as independent, and give intervals that are too short by far.
    It is slightly too wide where entries differ beyond what their row and column say (that part of the variance, of the order
    of 1 / (n_A n_B), is counted up to three times), never too short by its order. All hypotheses share the draws.
    memory_mib: bounds the working memory. The same seed gives the same numbers. Raises SpecError for maps that do not fit.
    """
    maps = np.asarray(values)
    problems = []
    if maps.ndim not in (2, 3) or len(maps) == 0:
        expected = "(n_A, n_B) or (hypothesis, n_A, n_B)"
        problems.append(describe("values", f"shape {maps.shape}", expected, "Pass the map itself, not its means."))
    elif min(maps.shape[-2:]) < FEWEST:
        found = f"{maps.shape[-2]} and {maps.shape[-1]} samples (shape {maps.shape})"
        do = "Collect more: of one sample, nothing says how far another would be."
        problems.append(describe("values", found, f"at least {FEWEST} of each task", do))
    elif not np.isfinite(maps).all():
        found = f"{int((~np.isfinite(maps)).sum()):,} of {maps.size:,} entries that are not finite"
        problems.append(describe("values", found, "numbers", "Leave out the samples that have none."))
    if not 0 < confidence < 1:
        problems.append(describe("confidence", f"{confidence}", "a number between 0 and 1", "Try 0.95."))
    if resamples < 1 or not memory_mib > 0:
        found = f"resamples={resamples}, memory_mib={memory_mib}"
        problems.append(describe("options", found, "both above 0", "Leave them out for the defaults."))
    if problems:
        raise SpecError(listing("two_way_bootstrap", problems))
    stacked = maps.reshape(-1, *maps.shape[-2:])
    hypotheses, rows, columns = stacked.shape
    rng = np.random.default_rng(seed)
    of_rows, of_columns = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in (rows, columns))
    step = max(1, int(memory_mib * 2**20 / (8 * resamples * (columns + 1))))
    low, high = np.empty(hypotheses), np.empty(hypotheses)
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    with tqdm(total=hypotheses, desc="resampling", unit="map", disable=not progress, leave=False) as bar:
        for start in range(0, hypotheses, step):
            part = slice(start, start + step)
            means = np.einsum("hrc,rc->hr", of_rows @ stacked[part].astype(np.float64, copy=False), of_columns)
            low[part], high[part] = np.quantile(means, tails, axis=1)
            bar.update(means.shape[0])
    shape = maps.shape[:-2]
    return Intervals(
        stacked.mean(axis=(1, 2), dtype=np.float64).reshape(shape), low.reshape(shape), high.reshape(shape), confidence
    )
