"""What is wrong with scores and options of a test, in words; and whether a test can find anything at all."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from math import ceil
from typing import Any

import numpy as np
import pandas as pd

from surgery.analysis.interference.randomised import Draws
from surgery.errors import SpecError, describe, listing

FEWEST = 2

RESULTS = {f"{what}_{way}" for what in ("effect", "g", "delta", "p") for way in ("row", "col")} | {
    "p_both",
    "p",
    "p_fdr",
    "p_maxt",
}
"""Columns that a test makes."""


def as_scores(given: Any) -> np.ndarray:
    """In float64; nothing is an array without samples."""
    return np.empty((0, 0)) if given is None else np.asarray(given, dtype=np.float64)


def wrong_arrays(arrays: dict[str, np.ndarray], hypotheses: int) -> list[str]:
    """Shapes, numbers of samples, and scores that are no numbers. No control (..._n) is said elsewhere."""
    problems = []
    if hypotheses == 0:
        do = "Score at least one head and block."
        problems.append(describe("blocks", "no hypotheses", "a block for each hypothesis", do))
    for name, array in arrays.items():
        if array.size == 0 and name.endswith("_n"):
            continue
        if array.ndim != 2 or array.shape[1] != hypotheses:
            do = "Pass means of the map over the other task's samples, and the block of each of its hypotheses."
            problems.append(describe(name, f"shape {array.shape}", f"(sample, {hypotheses:,}), as blocks say", do))
        elif len(array) < FEWEST:
            do = "Collect more; about 20 make a test that finds something."
            problems.append(describe(name, f"{len(array)} samples", f"at least {FEWEST}", do))
        elif bad := int((~np.isfinite(array)).sum()):
            first = tuple(map(int, np.argwhere(~np.isfinite(array))[0]))
            found = f"{bad:,} of {array.size:,} scores NaN or infinite, the first of sample {first[0]}, hypothesis {first[1]}"
            problems.append(describe(name, found, "numbers", "Leave out samples without a gradient (no loss tokens), and NaN."))
    return problems


def wrong_options(n_permutations: int | None, alpha: float, memory_mib: float, seed: int) -> list[str]:
    """Options outside their range."""
    problems = []
    if n_permutations is not None and n_permutations < 1:
        problems.append(describe("n_permutations", f"{n_permutations}", "at least 1", "Leave it out for 2 m / alpha."))
    if not 0 < alpha < 1:
        problems.append(describe("alpha", f"{alpha}", "a number between 0 and 1", "Try 0.05."))
    if not memory_mib > 0:
        problems.append(describe("memory_mib", f"{memory_mib}", "more than 0", "Leave it out for 64."))
    if seed < 0:
        problems.append(describe("seed", f"{seed}", "0 or more", "Leave it out for 0."))
    return problems


def wrong_hypotheses(given: pd.DataFrame | None, blocks: np.ndarray) -> list[str]:
    """A frame that does not go with the blocks, or would have a column twice."""
    if given is None:
        return []
    problems = []
    if len(given) != len(blocks):
        found, expected = f"{len(given):,} rows", f"{len(blocks):,}, one for each column of the scores"
        problems.append(describe("hypotheses", found, expected, "Pass the hypotheses of the scores."))
    elif "block" in given and (other := np.asarray(given["block"].to_numpy() != blocks)).any():
        do = "Pass both in the order of the scores' columns."
        problems.append(describe("hypotheses", f"other blocks than `blocks` has: {numbers_of(other)}", "the same in both", do))
    if taken := sorted(RESULTS & set(given.columns)):
        found = f"columns {', '.join(taken)}"
        problems.append(describe("hypotheses", found, "none that the result makes", "Leave them out, or rename them."))
    return problems


def empty_blocks(name: str, array: np.ndarray, blocks: np.ndarray, beside: dict[str, np.ndarray]) -> list[str]:
    """Samples whose scores are all 0 in a block where other samples of the same test have some: their median is nowhere."""
    problems = []
    for block in np.unique(blocks.astype(str)):
        heads = blocks == block
        is_used = any((other[:, heads] > 0).any() for other in beside.values())
        if is_used and (empty := np.asarray((array[:, heads] > 0).sum(axis=1) == 0)).any():
            found = f"{int(empty.sum())} samples without any score above 0 in block {block}: {numbers_of(empty)}"
            do = "Leave these samples out: a text of one token, for one, has no gradient in Q and K."
            problems.append(describe(name, found, "a score above 0 at some head of each block", do))
    return problems


def shared_samples(tasks: Mapping[str, Sequence[Hashable]]) -> list[str]:
    """Tasks that have samples in common, whatever their order. tasks: by name, what tells each sample from others."""
    problems = []
    do = "Take other samples for each task: a sample against itself is no test."
    for (first, some), (second, others) in combinations(tasks.items(), 2):
        if count := len(set(some) & set(others)):
            among = "" if count == len(some) == len(others) else f" among {len(some)} and {len(others)}"
            found = f"the same {count} samples{among}"
            problems.append(describe(f"{first} and {second}", found, "samples of two tasks", do))
    return problems


def out_of_reach(what: str, draws: dict[str, Draws], alpha: float) -> list[str]:
    """No p can reach alpha: too few samples, or permutations."""
    fewest, ways, of = _fewest(what, draws)
    if 1 / ways <= alpha:
        return []
    do = "Collect more samples." if fewest.exact else "Pass more n_permutations, or leave it out."
    part = "samples" if fewest.exact else "n_permutations"
    return [describe(part, f"a smallest attainable p of {1 / ways:.3g}, as {of}", f"one of at most alpha={alpha:g}", do)]


def check_reach(what: str, draws: dict[str, Draws], hypotheses: int, alpha: float) -> None:
    """Raises SpecError where no p can reach alpha, warns where no single finding's p_fdr can."""
    if problems := out_of_reach(what, draws, alpha):
        raise SpecError(listing(what, problems))
    fewest, ways, of = _fewest(what, draws)
    kind = _kind(what)
    needed = ceil(2 * hypotheses / alpha)
    do = "Collect more samples." if fewest.exact else f"Pass n_permutations={needed:,}, or leave it out."
    if hypotheses / ways > alpha:
        together = ceil(hypotheses / (alpha * ways))
        found = f"a smallest p of {1 / ways:.3g} for {hypotheses:,} hypotheses, as {of}: p_fdr is at least"
        found += (
            f" {min(1.0, hypotheses / ways):.3g} for a single finding, and reaches {alpha:g} only if {together:,} have that p"
        )
        warnings.warn(describe(what, found, f"at least {needed:,} of them (2 m / alpha)", do), UserWarning, stacklevel=3)
    elif not fewest.exact and fewest.count < needed:
        found = f"{fewest.count:,} {kind} for {hypotheses:,} hypotheses: p_fdr is at least {hypotheses / ways:.3g}"
        found += f" for a single finding, just below alpha={alpha:g}, and any permutation as high as the observed one ends it"
        warnings.warn(describe(what, found, f"at least {needed:,} of them (2 m / alpha)", do), UserWarning, stacklevel=3)


def _kind(what: str) -> str:
    return "flips of signs" if what in ("sign_flip_test", "conflict_test") else "labelings"


def _fewest(what: str, draws: dict[str, Draws]) -> tuple[Draws, int, str]:
    """The draws that are fewest, what their smallest p is one over, and both in words."""
    name, fewest = min(draws.items(), key=lambda item: item[1].count)
    of = f"p_{name} has {fewest.count:,} {_kind(what)} ({'all there are' if fewest.exact else 'n_permutations'})"
    return fewest, fewest.count + (0 if fewest.exact else 1), of


def numbers_of(which: np.ndarray) -> str:
    """Numbers of what is true, the first few of many."""
    return _few(np.flatnonzero(which))


def names_of(which: np.ndarray, hypotheses: pd.DataFrame | None, blocks: np.ndarray) -> str:
    """Address, block and head of the hypotheses for which it is true, the first few of many; numbers where they have none."""
    if hypotheses is None or not {"address", "head"} <= set(hypotheses.columns):
        return numbers_of(which)
    places = zip(hypotheses["address"], blocks, hypotheses["head"], strict=True)
    return _few([f"{address} {block} {head}" for (address, block, head), is_one in zip(places, which, strict=True) if is_one])


def _few(names: Sequence[Any] | np.ndarray, most: int = 8) -> str:
    return ", ".join(map(str, names[:most])) + (f", ... ({len(names):,} in all)" if len(names) > most else "")
