"""Time of patching: `python -m benchmarks.patching --layers 12` patches a model in this process and prints seconds as JSON.

The first patch in a process records every module, traces the family's attention function and proves the reconstruction:
all of that is counted, only importing the package comes before. Hence each measurement in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import models
from benchmarks.results import Row, child, row
from benchmarks.timing import Spread, synchronize
from surgery import Edit, Freeze, Spec, patch_model, unpatch_model

STEPS = {
    "first": "first patch in a process; bound: 1 s",
    "again": "patch of an unpatched model, later on",
    "cut": "new cuts on a patched model",
    "other": "other cuts in their place",
    "unpatch": "unpatch",
}
"""What is timed, in words."""


def measure(layers: int, *, device: str = "cpu", heads: int = 12, d_head: int = 64) -> dict[str, float]:
    """Seconds of every step, and of one forward of 4 × 128 tokens to compare them with."""
    model = models.gpt2(layers, heads, heads * d_head, positions=128, vocabulary=64, device=device)
    ids = models.tokens(4, 128, device, vocabulary=64)
    cut, other = Spec(Freeze("ov", heads=[1])), Spec([Freeze("qk", heads=[1]), Edit("pattern", "uniform", heads=[0])])
    seconds = {
        "first": _seconds(lambda: patch_model(model), device),
        "cut": _seconds(lambda: patch_model(model, cut), device),
        "other": _seconds(lambda: patch_model(model, other), device),
        "unpatch": _seconds(lambda: unpatch_model(model), device),
        "again": _seconds(lambda: patch_model(model), device),
    }
    unpatch_model(model)
    with torch.no_grad():
        seconds["forward"] = min(_seconds(lambda: model(ids), device) for _ in range(4))
    return seconds


def _seconds(call: Callable[[], Any], device: str) -> float:
    gc.collect()  # Python's pass over all that torch has made takes longer than patching; whose turn it is, is chance
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def rows(sizes: Sequence[int], rounds: int, device: str, threads: int) -> Iterator[Row]:
    """Measures models of these numbers of layers in turn, `rounds` times, each in a new process."""
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            runs[size].append(child("patching", f"--layers={size}", f"--device={device}", f"--threads={threads}"))
    yield from summary(runs)


def summary(runs: dict[int, list[dict[str, float]]]) -> Iterator[Row]:
    """runs: by number of layers, what `measure` gave. Times are in forwards of the same model, growth is a ratio of times."""
    usual, largest = 12 if 12 in runs else min(runs), max(runs)
    for step, what in STEPS.items():
        numbers = _spread([run[step] / run["forward"] for run in runs[usual]])
        numbers["seconds"] = statistics.median(run[step] for run in runs[usual])
        bound = max(run[step] for run in runs[usual]) < 1.0 if step == "first" else None
        yield row(f"patching, GPT-2 small, {usual} layers, in forwards of 4 × 128 tokens", what, numbers, met=bound)
    for step in ("first", "again"):
        medians = {size: statistics.median(run[step] for run in of) for size, of in runs.items()}
        numbers = _spread([b[step] / a[step] for a, b in zip(runs[usual], runs[largest], strict=True)])
        if len(medians) > 1:
            slope, constant = statistics.linear_regression(list(medians), list(medians.values()))
            numbers |= {"seconds_per_layer": slope, "seconds_constant": constant}
        numbers["seconds"] = {str(size): median for size, median in medians.items()}
        # Linear growth is at most proportional: what is spent once, whatever the number of layers, makes it less.
        group = f"patching, {largest} layers over {usual}; proportional would be {largest / usual:g}"
        yield row(group, STEPS[step].partition(";")[0], numbers, largest / usual)


def _spread(values: list[float]) -> dict[str, Any]:
    spread = Spread.of(values)
    return {"value": spread.median, "low": spread.low, "high": spread.high, "rounds": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(measure(given.layers, device=given.device)))


if __name__ == "__main__":
    main()
