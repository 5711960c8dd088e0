"""Which heads and blocks interfere more than chance: tests whose unit is a sample, over scores of samples.

Two tests: `permutation_test` of overlap, against a control task; `sign_flip_test` of conflict, without one. A score belongs to
a sample: the mean of the map M over the other task's samples. No torch, no model: numbers in, a table out.

Two others come to mind, and are not offered because they are wrong (tests/test_interference_statistics.py has the numbers):

* Treating the n_A × n_B pairs as independent samples. Pairs share samples: a task has n of them, not n². With 40 samples a
  task, log M_ij = b_j + e_ij, and b_j of a quarter of the spread of e_ij, a t-test of the A × B against the A × N pairs rejects
  19 % of true null hypotheses at a nominal 5 %; 29 % at half of it, 35 % at equal spreads, and more with more samples.
* Permuting within a task (samples of B among themselves, or rows of the map). That leaves every mean over the task as it was:
  the permuted statistic is the observed one, p is 1 whatever the data say, and any smaller p comes from rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from surgery.analysis.interference.checks import (
    as_scores,
    check_reach,
    empty_blocks,
    names_of,
    wrong_arrays,
    wrong_hypotheses,
    wrong_options,
)
from surgery.analysis.interference.randomised import enough, labelings, products, tails
from surgery.analysis.interference.sizes import two_sample
from surgery.analysis.interference.tested import Tested, as_tested
from surgery.analysis.statistics import corrected
from surgery.errors import SpecError, describe, listing

DIGITS = 12
"""Decimals of a log score, in nats. Further ones are rounding, which would tell apart scores that are tied."""


@dataclass(frozen=True)
class Scores:
    """Raw scores, all positive or 0, each array (sample, hypothesis): means of the map over the other task's samples.

    rows_a[i]: mean over B of M_ij, for i of A. rows_n[n]: mean over B of M_nj, for n of the control N in A's place.
    columns_b[j]: mean over A of M_ij, for j of B. columns_n[n]: mean over A of M_in, for n of the control N in B's place.

    Gradients are of unit length, sample by sample, before M is formed: otherwise a task of larger loss is "found". The Fisher
    reference must treat the tasks that are compared alike (of other samples, or pooled over A, B and N): with A's own samples
    as the reference, A's rows and N's would differ under the null hypothesis too, and p_row would not hold its level.
    """

    rows_a: Any
    rows_n: Any
    columns_b: Any
    columns_n: Any


def permutation_test(
    scores: Scores,
    blocks: Sequence[str],
    *,
    hypotheses: pd.DataFrame | None = None,
    n_permutations: int | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    memory_mib: float = 64.0,
    progress: bool = False,
) -> Tested:
    """Does task B disturb task A at a head and block more than the control task N does, and A more than N is disturbed?

    blocks: each hypothesis's block ("Q", "K", "V", "O"). hypotheses: columns for the result (address, head), a row each.
    n_permutations: 2 m / alpha by default (and 9,999 or more), so that a single finding among m hypotheses can pass; where
      there are no more ways than that to hand out labels, all of them. memory_mib: bounds the working memory. progress: a bar.

    The scores that are tested are logs, minus the sample's median over the heads of the same block: what a sample does to a
    head compared with its other heads. A factor on all of a sample's scores is nothing. Scores of 0 have no part in medians; a
    0 then counts as the smallest score of its hypothesis among task and control samples together, which looks at no label. A
    hypothesis without spread (0 for all samples, or the only one of its block) has p = 1, effects NaN, and a note; it stays in
    the family.

    p_col hands out the labels B and N of column scores again, p_row the labels A and N of row scores: one-sided, the task's
    samples score higher. Null hypothesis of each: the labels could be exchanged (the task's samples are distributed as the
    control's at this head and block, given the other task's samples); also groups that differ in spread alone break it. The
    level is exact under it, for any distribution and any size. p = max(p_row, p_col) is the intersection-union test: it finds
    what both say. A head that B uses more than N does, but A no more than N, is only B's, and not found.

    p_fdr: Benjamini and Hochberg over all hypotheses as one family. That assumes independence or positive dependence; p_maxt
    does not: against the largest of all hypotheses' (studentised) statistics under the same labels (Westfall and Young 1993),
    times 2 because a hypothesis may be null by its rows or by its columns.
    effect: difference of mean log scores (nats: exp of it is a ratio). g: Hedges' g, unbiased. delta: Cliff's, P(task higher) −
    P(task lower). Each of rows (A against N) and of columns (B against N).

    Raises SpecError for scores that do not fit, all problems at once, and where even the smallest p would be above alpha. Warns
    where a single finding could not have p_fdr <= alpha. Pairs as samples, and permuting within a task: see the module.
    """
    arrays = {field.name: as_scores(getattr(scores, field.name)) for field in fields(Scores)}
    names = np.asarray(list(blocks), dtype=object)
    problems = [*wrong_arrays(arrays, len(names)), *wrong_options(n_permutations, alpha, memory_mib, seed)]
    for name in ("rows_n", "columns_n"):
        if arrays[name].size == 0:
            do = "Score a third task N in A's and in B's place too: without it, what is special to A and B is not known."
            problems.append(describe(name, "no control samples", "scores of a control task", do))
    for name, array in arrays.items():
        if negative := int((array < 0).sum()):
            do = "Use sign_flip_test for scores of the signed kernel."
            problems.append(describe(name, f"{negative:,} negative scores", "scores that are positive or 0", do))
    problems += wrong_hypotheses(hypotheses, names)
    if not problems:
        for name, array in arrays.items():
            problems += empty_blocks(name, array, names, {n: a for n, a in arrays.items() if n[:3] == name[:3]})
    if problems:
        raise SpecError(listing("permutation_test", problems))

    most = enough(len(names), alpha) if n_permutations is None else int(n_permutations)
    pairs = {"row": ("rows_a", "rows_n"), "col": ("columns_b", "columns_n")}
    draws = {
        way: labelings(len(arrays[task]), len(arrays[control]), most, seed + number)
        for number, (way, (task, control)) in enumerate(pairs.items())
    }
    check_reach("permutation_test", draws, len(names), alpha)
    columns: dict[str, Any] = {}
    notes: list[str] = []
    familywise = []
    with tqdm(total=sum(d.count for d in draws.values()), desc="permuting", unit="draw", disable=not progress) as bar:
        for way, (task, control) in pairs.items():
            logs = _relative(np.concatenate([arrays[task], arrays[control]]), names)
            n, live = len(arrays[task]), np.ptp(logs, axis=0) > 0  # NaN has none
            if not live.all():
                notes.append(f"p_{way} is 1 where {task} and {control} have no spread: {names_of(~live, hypotheses, names)}")
            columns |= {f"{k}_{way}": np.where(live, v, np.nan) for k, v in two_sample(logs[:n], logs[n:]).items()}
            p, against_all = np.ones(len(live)), np.ones(len(live))
            if live.any():
                standard = logs[:, live] - logs[:, live].mean(axis=0)
                standard /= np.linalg.norm(standard, axis=0)
                labels = np.repeat([1 / n, -1 / (len(logs) - n)], [n, len(logs) - n])
                observed = labels / np.linalg.norm(labels) @ standard
                p[live], against_all[live] = tails(draws[way], products(standard), observed, memory_mib, bar)
            columns[f"p_{way}"] = p
            familywise.append(against_all)
    columns["p"] = np.maximum(columns["p_row"], columns["p_col"])
    columns["p_fdr"] = corrected(columns["p"])
    columns["p_maxt"] = np.minimum(1, 2 * np.maximum(*familywise))
    sizes = {name: len(array) for name, array in arrays.items()}
    return as_tested(columns, hypotheses, names, alpha, sizes, draws, seed, notes)


def _relative(raw: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Logs minus the sample's median over the heads of the same block. NaN where all samples have 0. See permutation_test."""
    is_positive = raw > 0
    logs = np.log(raw, where=is_positive, out=np.full(raw.shape, np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a block, or a hypothesis, that is 0 throughout: NaN
        for block in np.unique(blocks.astype(str)):
            heads = blocks == block
            logs[:, heads] -= np.nanmedian(logs[:, heads], axis=1, keepdims=True)
        return np.where(is_positive, logs, np.nanmin(logs, axis=0)).round(DIGITS)
