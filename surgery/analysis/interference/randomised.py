"""How often chance gives a statistic as high: labels or signs handed out again, one draw for all hypotheses at once.

A chunk of draws is a matrix (draw, sample), its product with the scores (sample, hypothesis) the statistics of all hypotheses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice, product
from math import ceil, comb, sqrt
from typing import Any

import numpy as np

TIE = 1e-9
"""Statistics, all of the order of 1, that are closer than this are the same but for rounding, and count as equally high."""

ARRAYS = 6
"""Arrays (draw, hypothesis) of float64 that a statistic and its comparison may hold at a time."""


LEAST = 9999
"""Draws, also of few hypotheses: p of 0.05 then has a standard error of 0.002."""


@dataclass(frozen=True)
class Draws:
    """Ways to hand out labels or signs. count: how many; exact: all there are, with the one that changes nothing among them.

    chunks: gives them in matrices (draw, sample) of at most so many rows; the same ones in chunks of any size.
    """

    count: int
    exact: bool
    samples: int
    chunks: Callable[[int], Iterator[np.ndarray]]


def enough(hypotheses: int, alpha: float) -> int:
    """Draws with which a single finding among so many hypotheses has p_fdr <= alpha, and some to spare."""
    return max(LEAST, ceil(2 * hypotheses / alpha))


def labelings(task: int, control: int, most: int, seed: int) -> Draws:
    """Ways to call `task` of all samples the task's: all of them if there are no more than `most`, else `most` at random.

    A draw has mean 0 and length 1, so that its product with scores of mean 0 and length 1 is a correlation. Of two groups, that
    is a growing function of Student's t with pooled variance and of the difference of means, and stands for both.
    """
    samples = task + control
    weights = sqrt(control / (task * samples)), -sqrt(task / (control * samples))
    ways = comb(samples, task)

    def all_of_them(rows: int) -> Iterator[np.ndarray]:
        chosen = combinations(range(samples), task)
        while chunk := list(islice(chosen, rows)):
            yield _labels(np.array(chunk), samples, weights)

    def some(rows: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        for start in range(0, most, rows):
            order = rng.random((min(rows, most - start), samples))
            yield _labels(np.argpartition(order, task - 1, axis=1)[:, :task], samples, weights)

    return Draws(ways, True, samples, all_of_them) if ways <= most else Draws(most, False, samples, some)


def _labels(chosen: np.ndarray, samples: int, weights: tuple[float, float]) -> np.ndarray:
    labels = np.full((len(chosen), samples), weights[1])
    np.put_along_axis(labels, chosen, weights[0], axis=1)
    return labels


def flips(samples: int, most: int, seed: int) -> Draws:
    """Signs, +1 or -1 of each sample: all ways if there are no more than `most`, else `most` at random."""

    def all_of_them(rows: int) -> Iterator[np.ndarray]:
        ways = product((1.0, -1.0), repeat=samples)
        while chunk := list(islice(ways, rows)):
            yield np.array(chunk)

    def some(rows: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        for start in range(0, most, rows):
            yield np.where(rng.random((min(rows, most - start), samples)) < 0.5, -1.0, 1.0)

    return Draws(2**samples, True, samples, all_of_them) if 2**samples <= most else Draws(most, False, samples, some)


def products(scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The statistic that is one matrix product: of draws (draw, sample) with scores (sample, hypothesis)."""
    return lambda draws: draws @ scores


def tails(
    draws: Draws,
    statistic: Callable[[np.ndarray], np.ndarray],
    observed: np.ndarray,
    memory_mib: float,
    bar: Any,
    *,
    is_among_them: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """One-sided p of each hypothesis, and p of each against the largest statistic of all hypotheses (max-T).

    statistic: of a chunk of draws, (draw, hypothesis). observed: (hypothesis,). p is (1 + count) / (1 + draws), which is never
    0 and holds the level exactly (Phipson and Smyth 2010); of all ways, count / ways, as the observed one is counted there.
    is_among_them: whether all ways give the observed statistic once; not if they are of values that were centred first.
    """
    rows = max(1, int(memory_mib * 2**20 / (8 * (ARRAYS * len(observed) + 3 * draws.samples))))
    least = observed - TIE
    counts, largest = np.zeros(len(observed), dtype=np.int64), []
    for chunk in draws.chunks(rows):
        found = statistic(chunk)
        counts += np.count_nonzero(found >= least, axis=0)
        largest.append(found.max(axis=1))
        bar.update(len(chunk))
    above = draws.count - np.searchsorted(np.sort(np.concatenate(largest)), least, side="left")
    own = 0 if draws.exact and is_among_them else 1
    return (counts + own) / (draws.count + own), (above + own) / (draws.count + own)
