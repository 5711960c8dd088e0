"""Conflict of two tasks, sample by sample: do their gradients point against each other at a head and block?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from surgery.analysis.interference.checks import (
    as_scores,
    check_reach,
    names_of,
    numbers_of,
    wrong_arrays,
    wrong_hypotheses,
    wrong_options,
)
from surgery.analysis.interference.randomised import enough, flips, products, tails
from surgery.analysis.interference.sizes import one_sample
from surgery.analysis.interference.tested import Tested, as_tested
from surgery.analysis.statistics import corrected
from surgery.errors import SpecError, describe, listing

ONE_MAP = 1e-3
"""Means of the same map by rows and by columns, in float32, are closer than this part of a typical entry of either."""


def sign_flip_test(
    rows: Any,
    columns: Any,
    blocks: Sequence[str] | None = None,
    *,
    hypotheses: pd.DataFrame | None = None,
    n_permutations: int | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    memory_mib: float = 64.0,
    progress: bool = False,
) -> Tested:
    """Do the gradients of A and B point against each other at a head and block? Of signed scores K, positive for conflict.

    rows: (n_A, hypothesis), means of K_ij over B's samples; columns: (n_B, hypothesis), means over A's. No control is needed:
    without alignment scores are as often positive as negative. Options, p_fdr: as in `permutation_test`.

    p_row flips signs of A's samples, given those of B. Its null hypothesis is that what the average of *these* samples of B
    does to a sample of A is symmetric about 0; p_col likewise. Both are exact under it for any symmetric distribution. But that
    is not the hypothesis one means, that the *tasks'* mean gradients do not oppose each other: where A's samples share a mean
    gradient, the chance part of B's average meets it in all of them alike, which p_row does not see vary. Of two tasks with
    orthogonal mean gradients, p_row rejects 34 % at a nominal 5 % if only A has one (40 samples each), and max(p_row, p_col) up
    to 12 % if both have: twice the variance that each sees, P(z > 1.645 / √2). Therefore p_both: the mean of the map over its
    error from both tasks' samples, √(s_row²/n_A + s_col²/n_B), against the same of deviations from that mean with their signs
    flipped, of both tasks at once. Its null hypothesis is of the tasks, not of these samples: their mean gradients do
    not oppose each other. It holds its level approximately: 2 to 6 % in simulations of 10 to 40 samples where means are shared,
    1 % where none is (the variance of chance meeting chance is counted twice).

    p = max(p_row, p_col, p_both). p_maxt: of p_both against the largest of all hypotheses, and no less than p. effect: mean of
    the scores; g: it over their standard deviation, unbiased (Hedges); delta: P(positive) − P(negative).
    The test is one-sided: co-operating heads have p near 1. Scores must be of unit-length gradients, or a few samples decide.
    Raises SpecError for scores that do not fit, all problems at once; warns as `permutation_test` does.
    """
    arrays = {"rows": as_scores(rows), "columns": as_scores(columns)}
    count = arrays["rows"].shape[-1] if arrays["rows"].ndim == 2 else 0
    if blocks is None:
        blocks = list(hypotheses["block"]) if hypotheses is not None and "block" in hypotheses else [""] * count
    names = np.asarray(list(blocks), dtype=object)
    problems = [*wrong_arrays(arrays, len(names)), *wrong_options(n_permutations, alpha, memory_mib, seed)]
    problems += wrong_hypotheses(hypotheses, names)
    if not problems:
        means = [array.mean(axis=0) for array in arrays.values()]
        typical = sum(np.sqrt((array**2).mean(axis=0)) for array in arrays.values())
        if (apart := np.abs(means[0] - means[1]) > ONE_MAP * typical).any():
            do = "Pass the means of one map over its columns and over its rows."
            problems.append(
                describe("rows and columns", f"other means of {numbers_of(apart)}", "the same mean, of one map", do)
            )
    if problems:
        raise SpecError(listing("sign_flip_test", problems))

    most = enough(len(names), alpha) if n_permutations is None else int(n_permutations)
    (n_a, _), (n_b, _) = (array.shape for array in arrays.values())
    draws = {"row": flips(n_a, most, seed), "col": flips(n_b, most, seed + 1), "both": flips(n_a + n_b, most, seed + 2)}
    check_reach("sign_flip_test", draws, len(names), alpha)
    found: dict[str, Any] = {}
    live = (arrays["rows"] != 0).any(axis=0) & (arrays["columns"] != 0).any(axis=0)
    notes = [] if live.all() else [f"p is 1 where all scores are 0: {names_of(~live, hypotheses, names)}"]
    kept = {name: array[:, live] for name, array in arrays.items()}
    familywise = np.ones(len(live))
    with tqdm(total=sum(d.count for d in draws.values()), desc="flipping", unit="draw", disable=not progress) as bar:
        for way, (name, array) in zip(("row", "col"), arrays.items(), strict=True):
            found |= {f"{k}_{way}": np.where(live, v, np.nan) for k, v in one_sample(array).items()}
            found[f"p_{way}"] = np.ones(len(live))
            if live.any():
                unit = kept[name] / np.linalg.norm(kept[name], axis=0)  # Student's t is a growing function of their sum
                found[f"p_{way}"][live], _ = tails(draws[way], products(unit), unit.sum(axis=0), memory_mib, bar)
        found["p_both"] = np.ones(len(live))
        if live.any():
            both = _BothWays(kept["rows"], kept["columns"])
            found["p_both"][live], familywise[live] = tails(
                draws["both"], both, both.observed, memory_mib, bar, is_among_them=False
            )
    found["p"] = np.maximum.reduce([found["p_row"], found["p_col"], found["p_both"]])
    found["p_fdr"] = corrected(found["p"])
    found["p_maxt"] = np.maximum(familywise, found["p"])
    return as_tested(found, hypotheses, names, alpha, {"rows": n_a, "columns": n_b}, draws, seed, notes)


class _BothWays:
    """t of a map's mean with errors from its rows and its columns, and the same of deviations whose signs were flipped."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray) -> None:
        self.parts = [part - part.mean(axis=0) for part in (rows, columns)]
        self.squares = [(part**2).sum(axis=0) for part in self.parts]
        with np.errstate(divide="ignore", invalid="ignore"):
            self.observed = np.nan_to_num(rows.mean(axis=0) / self._error([0.0, 0.0]), posinf=np.inf, neginf=-np.inf)

    def _error(self, means: list[Any]) -> np.ndarray:
        """Standard error, of values with these means and the parts' sums of squares, which flipping does not change."""
        sizes = [len(part) for part in self.parts]
        left = [np.maximum(s - n * mean**2, 0) / (n * (n - 1)) for s, n, mean in zip(self.squares, sizes, means, strict=True)]
        return np.sqrt(left[0] + left[1])

    def __call__(self, signs: np.ndarray) -> np.ndarray:
        split = np.split(signs, [len(self.parts[0])], axis=1)
        means = [chunk @ part / len(part) for chunk, part in zip(split, self.parts, strict=True)]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num((means[0] + means[1]) / self._error(means), posinf=np.inf, neginf=-np.inf)
