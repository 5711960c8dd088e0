"""Interleaved timing of two functions: ratios of pairs taken moments apart, so that a machine's slow changes cancel."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Pairs:
    """Seconds of A and of B, one pair for each round: by the clock on the wall, and of this process's CPU time."""

    wall: tuple[tuple[float, float], ...]
    cpu: tuple[tuple[float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Ratios of B to A: of each round (median and quartiles), and of the medians of all rounds."""
        wall, cpu = (Spread.of([b / a for a, b in pairs]) for pairs in (self.wall, self.cpu))
        medians = [statistics.median(side) for side in zip(*self.wall, strict=True)]
        return {
            "value": wall.median,
            "low": wall.low,
            "high": wall.high,
            "ratio_of_medians": medians[1] / medians[0],
            "cpu_value": cpu.median,
            "cpu_low": cpu.low,
            "cpu_high": cpu.high,
            "seconds": medians,
            "rounds": len(self.wall),
        }


def interleave(
    a: Callable[[], Any], b: Callable[[], Any], *, rounds: int, seed: int, device: str = "cpu", warmup: int = 2
) -> Pairs:
    """Times A and B once in every round, as `take_turns` does."""
    taken = take_turns({"a": a, "b": b}, rounds=rounds, seed=seed, device=device, warmup=warmup)
    return pairs(taken["a"], taken["b"])


Taken = tuple[tuple[float, float], ...]
"""Seconds by the clock on the wall and of CPU time, for each round."""


def take_turns(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int, seed: int, device: str = "cpu", warmup: int = 2
) -> dict[str, Taken]:
    """Times each function once in every round, in an order that is drawn anew, after `warmup` calls of each.

    The garbage collector runs between the rounds, not within. On CUDA both ends of every interval wait for the device.
    """
    order, names = random.Random(seed), list(functions)
    for _ in range(warmup):
        for function in functions.values():
            _clock(function, device)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                taken[name].append(_clock(functions[name], device))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: tuple(found) for name, found in taken.items()}


def pairs(a: Taken, b: Taken) -> Pairs:
    """Of two that took turns, the pairs of each round."""
    wall, cpu = (tuple((one[i], other[i]) for one, other in zip(a, b, strict=True)) for i in (0, 1))
    return Pairs(wall, cpu)


def _clock(function: Callable[[], Any], device: str) -> tuple[float, float]:
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronize(device: str) -> None:
    """Waits for a CUDA device; nothing elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
