"""A sweep over all heads, the plain loop, and other libraries: `python -m benchmarks.sweep [--quick] [--json FILE]`.

A random GPT-2 of the small model's shape; the OV circuit of each head is frozen in turn, and the log probability of one token
at the last position read. The plain loop patches each cut in and runs the model; `surgery.analysis.Sweep` starts at the cut's
layer; the others (`benchmarks.comparison`, those that are installed) run the model once for each head, with the head's z set to
zero. Some of their numbers are compared first; then all take turns (`benchmarks.timing`). A loop that knows to ask transformers
for one position's logits is measured beside the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks import arguments, models, results
from benchmarks.comparison import task
from benchmarks.comparison.environments import is_here
from benchmarks.comparison.ours import Auto
from benchmarks.comparison.way import Place, Way, log_probability
from benchmarks.comparison.worker import WAYS
from benchmarks.results import Row, row
from benchmarks.timing import pairs, take_turns


@dataclass(frozen=True)
class Settings(task.Settings):
    """Sizes of the measurement, which has the vocabulary of GPT-2."""

    rounds: int = 3
    batch: int = 4
    vocabulary: int = models.VOCABULARY


QUICK = Settings(rounds=1, layers=3, heads=4, batch=1, length=32)
TARGETS = {"cpu": 1 / 2.5, "cuda": 1 / 8}
"""Of the time of each of the others."""
CLOSE = 1e-3
"""Largest difference of a log probability: float32 sums of 768 products, in 12 layers, in another order."""
COMPARED = 13
"""One head in so many is compared: of other layers and other places within them."""
PLAIN = "the plain loop"


class Loop(Auto):
    """Each cut patched in, then a forward."""

    def sweep(self, places: Sequence[Place]) -> Tensor:
        return Way.sweep(self, places)


class LoopOfOnePosition(Loop):
    """That knows to ask transformers for one position's logits."""

    def logits(self, ids: Tensor, past: Any = None) -> Tensor:
        found: Tensor = self.model(ids, use_cache=False, logits_to_keep=1).logits
        return found


def measure(s: Settings) -> Iterator[Row]:
    """Time over that of each other way. difference: of its numbers from the plain loop's, where the largest effect is `effect`.

    Raises RuntimeError for a way that gives other numbers.
    """
    work = task.Task(s, half=False)
    ours = Auto(work)
    ways: dict[str, Callable[[Sequence[Place]], Tensor]] = {
        "Sweep": ours.sweep,
        PLAIN: Loop(work).sweep,
        f"{PLAIN}, logits of one position": LoopOfOnePosition(work).sweep,
    }
    others = {way.package: way for way in WAYS.values() if way.package is not None and is_here(way.package)}
    ways |= {f"{package} {version(package)}": way(work).sweep for package, way in others.items()}
    group = f"{len(work.places)} heads of GPT-2, {s.batch} × {s.length} tokens, one position read, by `surgery.analysis.Sweep`"
    some = work.places[::COMPARED]
    with torch.no_grad():
        expected = ways[PLAIN](some)
        gaps = {name: float((way(some) - expected).abs().max()) for name, way in ways.items() if name != PLAIN}
        effect = float((expected - log_probability(ours.logits(work.ids), work)).abs().max())
    for name, gap in gaps.items():
        if not gap < min(CLOSE, effect / 10):
            raise RuntimeError(f"{name}: differs from the plain loop by {gap:.2g}; the largest effect of a cut is {effect:.2g}")
    timed = {name: partial(way, work.places) for name, way in ways.items()}
    with torch.no_grad():
        taken = take_turns(timed, rounds=s.rounds, seed=s.seed, device=s.device, warmup=0)  # they ran already
    for name, seconds in taken.items():
        target = None if "one position" in name else TARGETS[torch.device(s.device).type]
        if name != "Sweep":
            found = {**pairs(seconds, taken["Sweep"]).to_dict(), "difference": gaps.get(name, 0.0), "effect": effect}
            yield row(group, *results.by_cpu(f"time over that of {name}", found, s.device), target)


def main() -> None:
    parser = arguments.parser(__doc__, "a small model, to see that it runs")
    for name in ("batch", "length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    given = parser.parse_args()
    settings = arguments.settings(given, Settings(batch=given.batch, length=given.length), QUICK)
    results.report("sweep", settings, list(measure(settings)), given.json)


if __name__ == "__main__":
    main()
