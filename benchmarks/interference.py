"""Interference maps and tests against loops: `python -m benchmarks.interference [--planted] [--quick] [--json FILE]`.

A random GPT-2, two tasks of random tokens. The loops over pairs of samples are given every sample's gradients, formed and kept;
the map forms them from factors as it goes. All compute the same map of one layer's four blocks, and take turns; loops are timed
on their first samples of A (`looped`), for each takes as long. Memory is what the allocator held at most.

--planted: instead, what the tests of overlap and conflict find of what was planted in real attentions (`benchmarks.planted`),
in `rounds` studies of other heads and samples each, and the level of the tests where nothing was. On the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import arguments, memory, models, planted, results
from benchmarks.results import Row, row
from benchmarks.timing import pairs, take_turns
from surgery.analysis.interference.collecting import collect
from surgery.analysis.interference.gradients import Gradients
from surgery.analysis.interference.maps import heatmap
from surgery.analysis.interference.statistics import Scores, permutation_test


@dataclass(frozen=True)
class Settings(arguments.Common):
    """Sizes of the measurement. widths: of a head, each a model; samples: of each task; stacked: layers of a whole map."""

    heads: int = 12
    widths: tuple[int, ...] = (8, 16, 32, 64)
    samples: int = 100
    length: int = 64
    memory_mib: float = 64.0
    looped: int = 2
    stacked: int = 32
    permutations: int = 1000


QUICK = Settings(rounds=1, heads=2, widths=(4,), samples=8, length=16, stacked=2, permutations=50)
TARGETS = {"a loop over pairs": 1 / 50, "a loop over A's samples, all of B at once": 1 / 3}
"""Of the time of each."""


def measure(s: Settings) -> Iterator[Row]:
    """Times over those of loops, and memory."""
    for width in s.widths:
        a, b = _tasks(s, 1, s.heads, width)
        yield from _times(s, width, a, b)
    if s.device == "cpu":  # kineto's memory events
        yield from _memory(s, a, b)
    yield _permutations(s)


def _tasks(s: Settings, layers: int, heads: int, d_head: int) -> list[Gradients]:
    model = models.gpt2(layers, heads, heads * d_head, head=True, device=s.device, seed=s.seed)
    ids = (models.tokens(s.samples, s.length, s.device, s.seed + task) for task in (0, 1))
    return [collect(model, list(some.split(10)), progress=False) for some in ids]


def _times(s: Settings, width: int, a: Gradients, b: Gradients) -> Iterator[Row]:
    """Of the map of one layer over those of the loops."""
    kept = [{h: torch.stack([g.gradient(i, *h).flatten() for i in range(len(g))]) for h in a.hypotheses} for g in (a, b)]
    squares = {h: torch.cat([some[h] for some in kept]).square().mean(0) for h in a.hypotheses}
    more = {name: 1e-3 * float(torch.stack([squares[h] for h in squares if h[1] == name]).mean()) for name in "QKVO"}

    def naive(rows: int = s.looped) -> Tensor:
        found = torch.zeros(len(squares), rows, s.samples)
        for i in range(rows):
            for j in range(s.samples):
                for number, h in enumerate(squares):
                    found[number, i, j] = (kept[0][h][i].square() / (squares[h] + more[h[1]]) * kept[1][h][j].abs()).sum()
        return found

    def by_rows(rows: int = s.looped) -> Tensor:
        found = torch.zeros(len(squares), rows, s.samples)
        for i in range(rows):
            for number, h in enumerate(squares):
                found[number, i] = (kept[0][h][i].square() / (squares[h] + more[h[1]]) * kept[1][h].abs()).sum(1)
        return found

    def ours() -> Tensor:
        maps = heatmap(a, b, memory_mib=s.memory_mib, device=s.device).maps
        assert maps is not None
        return maps

    ways = {"ours": ours, "a loop over pairs": naive, "a loop over A's samples, all of B at once": by_rows}
    expected = naive()
    for name, found in (("ours", ours()[:, : s.looped]), ("by rows", by_rows())):
        if not torch.allclose(found, expected, rtol=1e-3):
            raise RuntimeError(f"{name}: differs from the loop over pairs by {float((found - expected).abs().max()):.2g}")
    share = s.looped / s.samples
    group = f"map of {s.samples} × {s.samples} samples, {s.length} tokens, {s.heads} heads, d_model {s.heads * width}"
    taken = take_turns(ways, rounds=s.rounds, seed=s.seed, device=s.device, warmup=1)
    for name, target in TARGETS.items():
        found = pairs(taken[name], tuple((wall * share, cpu * share) for wall, cpu in taken["ours"])).to_dict()
        what, numbers = results.by_cpu(f"time over that of {name}, with gradients kept", found, s.device)
        yield row(group, what, numbers, target)


def _memory(s: Settings, a: Gradients, b: Gradients) -> Iterator[Row]:
    """Bytes that the allocator held at most: beside the map, and of a map of many layers and heads, over its own."""
    width = s.heads * s.widths[-1]
    peak = memory.peak_cpu(lambda: heatmap(a, b, memory_mib=s.memory_mib, keep_maps=False))
    factors = (len(a) + len(b)) * s.length * 2 * width * 4
    formed = (len(a) + len(b)) * width**2 * 4
    group = f"memory of {s.samples} × {s.samples} samples, {s.length} tokens"
    yield row(group, f"workspace in MiB, d_model {width}", _one(peak / 2**20), 100)
    yield row(group, f"factors of a block over its gradients, d_model {width}", _one(factors / formed))
    a, b = _tasks(s, s.stacked, s.stacked, 2)
    size = 4 * len(a.hypotheses) * len(a) * len(b)
    peak = memory.peak_cpu(lambda: heatmap(a, b, memory_mib=s.memory_mib))
    what = f"peak over a map of {s.stacked} layers × {s.stacked} heads × 4 blocks ({size / 1e6:.0f} MB)"
    yield row(group, what, _one(peak / size), 1.5)
    peak = memory.peak_cpu(lambda: heatmap(a, b, memory_mib=s.memory_mib, keep_maps=False))
    yield row(group, "the same where means alone are kept", _one(peak / size), 0.5)


def _permutations(s: Settings) -> Row:
    """Of the test over a loop over its permutations, each of all hypotheses at once."""
    blocks = [name for name in "QKVO" for _ in range(s.stacked**2)]
    rng = np.random.default_rng(s.seed)
    scores = Scores(*np.exp(rng.normal(size=(4, s.samples, len(blocks)))))
    values = np.log(np.concatenate([scores.columns_b, scores.columns_n]))

    def loop() -> Any:
        sums = []
        for _ in range(2 * s.permutations):  # of rows and of columns
            task = rng.permutation(len(values)) < s.samples
            sums.append(values[task].mean(0) - values[~task].mean(0))
        return sums

    def ours() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # so few permutations find nothing among so many
            return permutation_test(scores, blocks, n_permutations=s.permutations)

    taken = take_turns({"ours": ours, "loop": loop}, rounds=s.rounds, seed=s.seed, warmup=1)
    found = pairs(taken["loop"], taken["ours"]).to_dict()
    group = f"test of {len(blocks):,} hypotheses, {s.samples} samples a task, {s.permutations:,} permutations"
    found["cpu_seconds"] = sorted(cpu for _, cpu in taken["ours"])[s.rounds // 2]
    what, numbers = results.by_cpu("time over that of a loop over permutations", found, "cpu")
    return row(group, what, numbers)


@dataclass(frozen=True)
class PlantedSettings(arguments.Common):
    """Sizes of the studies, see `planted.Sizes`. replicates: of the level. rounds_are: in words."""

    rounds: int = 40
    rounds_are: str = "studies"
    layers: int = 8
    heads: int = 12
    d_head: int = 4
    length: int = 64
    samples: int = 40
    replicates: int = 200


PLANTED_QUICK = PlantedSettings(rounds=1, layers=6, heads=6, length=32, replicates=4)


def measure_planted(s: PlantedSettings) -> Iterator[Row]:
    """Power, FDR and level; their targets are those of tests/test_interference_planted.py."""
    sizes = planted.Sizes(s.layers, s.heads, s.d_head, s.length, s.samples)
    planter = planted.Planter(planted.model(sizes, s.seed), sizes, s.seed)
    size = f"{4 * len(planter.places())} hypotheses, {s.samples} samples a task"
    for name, study in (("test of overlap", planted.overlap), ("test of conflict", planted.conflict)):
        found = [study(planter, s.seed + number) for number in range(s.rounds)]
        group = f"{name}: {s.rounds} studies of {size}"
        yield row(group, "planted hypotheses that were missed", _mean([1 - one.power for one in found]), 0.05)
        yield row(group, "false discovery rate", _mean([one.false for one in found]), 0.05)
    shares = planted.level(planter.task("pool", 3 * s.samples), s.replicates, s.seed)
    for way in ("p_row", "p_col"):
        group = f"level: {s.replicates} replicates of {size}"
        found = _mean(shares[way].tolist())
        yield row(group, f"share of {way} at most 0.05", found, 0.06, 0.04 <= found["value"] <= 0.06)


def _mean(values: list[float]) -> dict[str, float]:
    """One number of all studies: rates are means."""
    return _one(sum(values) / len(values))


def _one(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


def main() -> None:
    parser = arguments.parser(__doc__, "a small model, to see that it runs")
    parser.add_argument("--planted", action="store_true", help="what the tests find of what was planted, in place of times")
    given = parser.parse_args()
    if given.planted:
        if given.device != "cpu":
            parser.error(f"--planted: found --device {given.device}; expected cpu, where its random numbers are drawn")
        planted_settings = arguments.settings(given, PlantedSettings(), PLANTED_QUICK)
        results.report("interference_planted", planted_settings, list(measure_planted(planted_settings)), given.json)
        return
    settings = arguments.settings(given, Settings(), QUICK)
    results.report("interference", settings, list(measure(settings)), given.json)


if __name__ == "__main__":
    main()
