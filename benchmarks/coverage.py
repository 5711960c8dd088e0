"""How often intervals of few examples hold the mean: `python -m benchmarks.coverage [--quick] [--json FILE]`.

Differences are drawn from a normal distribution, whose mean is known, `rounds` times for each number of examples, and described
as every study describes its own (`surgery.analysis.statistics.paired`). Intervals that were neither too narrow nor too wide
would hold the mean in the share that is their confidence. A minute and a half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks import arguments, results
from benchmarks.results import Row, row
from surgery.analysis.statistics import paired


@dataclass(frozen=True)
class Settings(arguments.Common):
    """Sizes of the measurement. rounds: samples of each number of examples."""

    rounds: int = 4000
    examples: tuple[int, ...] = (4, 8, 16)
    confidence: float = 0.95


QUICK = Settings(rounds=20, examples=(4, 8))
MEAN = 1.0
"""Of the distribution; its standard deviation is 1."""


def measure(s: Settings) -> Iterator[Row]:
    """The share of intervals that hold the mean; error: its standard error, of as many draws as there are rounds."""
    rng = np.random.default_rng(s.seed)
    group = f"{s.confidence:.0%} intervals that hold the mean of normal differences, share of {s.rounds:,} samples"
    for count in s.examples:
        found = [paired(rng.normal(MEAN, size=count), s.confidence, seed=number) for number in range(s.rounds)]
        share = sum(one.low <= MEAN <= one.high for one in found) / s.rounds
        numbers = {**dict.fromkeys(("value", "low", "high"), share), "error": (share * (1 - share) / s.rounds) ** 0.5}
        yield row(group, f"{count} examples", numbers)


def main() -> None:
    given = arguments.parser(__doc__, "few samples, to see that it runs").parse_args()
    settings = arguments.settings(given, Settings(), QUICK)
    results.report("coverage", settings, list(measure(settings)), given.json)


if __name__ == "__main__":
    main()
