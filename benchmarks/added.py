"""What surgery adds to a step of one token, and where that time goes: `python -m benchmarks.added [--quick] [--json FILE]`.

In a model so narrow that its products take next to no time what is added is easily seen, and it does not grow with the width;
what it is beside the products of a real model, `benchmarks.steps` measures. Shares are of cProfile, which counts every
call of a Python function as dearer than it is, alike in all parts.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import surgery
from benchmarks import arguments, models
from benchmarks.results import Row, report, row
from benchmarks.setting import Settings as Sizes
from benchmarks.setting import agree
from benchmarks.steps import check_step, cuts, on_cache
from surgery import Spec, patched


@dataclass(frozen=True)
class Settings(arguments.Common):
    """Sizes of the measurement: those of GPT-2 small, but for the width of a head."""

    rounds: int = 300
    layers: int = 12
    heads: int = 12
    d_head: int = 8
    length: int = 16

    @property
    def sizes(self) -> Sizes:
        """The same for what times pairs."""
        same: Any = {name: getattr(self, name) for name in ("device", "threads", "seed", "rounds", "layers", "heads", "d_head")}
        return Sizes(**same, length=self.length, batch=1)


QUICK = Settings(rounds=5, layers=2)


def rows(s: Settings) -> Iterator[Row]:
    """For each cut: what is added over the unpatched step; then the shares of the parts in what the engine itself takes."""
    plain, twin, _ = s.sizes.build(models.gpt2, positions=s.length + 1)
    ids = models.tokens(1, s.length + 1, s.device, s.seed)
    expected = on_cache(plain, ids)()
    added = f"time of one token, {s.layers} layers, {s.heads} heads of {s.d_head}, over unpatched sdpa"
    found: list[Row] = []
    for what, spec in {"patched, no cuts": Spec(), **cuts(s.sizes, twin, ids, 1)}.items():
        with patched(twin, spec):
            step = on_cache(twin, ids)
            if spec == Spec():
                agree(what, step(), expected)
            else:
                check_step(what, twin, ids, expected)
            yield s.sizes.time(added, what, on_cache(plain, ids), step)
            shares = parts(step, s.rounds)
        whole = sum(shares.values())
        for part, seconds in shares.items():
            share = seconds / whole
            found.append(row(f"{what}: share of the engine's own time", part, {"value": share, "low": share, "high": share}))
    yield from found


def parts(step: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Seconds within the engine by what it does, the family's own code and the kernel left out."""
    with cProfile.Profile(time.thread_time) as profile:
        for _ in range(rounds):
            step()
    calls: dict[str, list[tuple[Any, ...]]] = {}
    stats: Any = pstats.Stats(profile)
    for (file, _, name), entry in stats.stats.items():
        calls.setdefault(f"{Path(file).name}:{name}" if Path(file).parent == _ENGINE else "", []).append(entry)

    def within(*names: str) -> float:
        return sum(cumulative for name in names for _, _, _, cumulative, _ in calls.get(name, ()))

    def itself(*names: str) -> float:
        return sum(own for name in names for _, _, own, _, _ in calls.get(name, ()))

    at_taps = sum(
        counted[3]
        for *_, callers in calls.get("core.py:at", ())
        for (file, _, name), counted in callers.items()
        if (Path(file).name, name) == ("taps.py", "_rows")
    )
    return {
        "entering and leaving: the mark of the cache, what has run": within(
            "core.py:enter", "plan.py:enter", "plan.py:leave", "core.py:require"
        ),
        "the cuts' own arithmetic": within("interventions.py:apply"),
        "points: finding what is to be done": within("core.py:at") - within("interventions.py:apply"),
        "reading and writing channels at projections": within("taps.py:_rows") - at_taps,
        "the way to the kernel and back": itself(
            "classes.py:forward", "interface.py:attend", "core.py:attend", "core.py:_place_keys", "taps.py:__call__"
        ),
    }


_ENGINE = Path(surgery.__file__).parent


def main() -> None:
    parser = arguments.parser(__doc__, "few steps, to see that it runs")
    given = parser.parse_args()
    settings = arguments.settings(given, Settings(), QUICK)
    with torch.no_grad():
        report("added", settings, list(rows(settings)), given.json)


if __name__ == "__main__":
    main()
