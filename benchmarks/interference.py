"""Interference maps against loops over pairs: `python -m benchmarks.interference [--planted] [--quick] [--json FILE]`.

A random GPT-2 of the small model's width, two tasks of random tokens. The loops are given every sample's gradient of one block,
formed and kept; the map forms them from factors as it goes. Both compute the same map of one layer's block, and take turns.

--planted: instead, what the tests of overlap and conflict find of what was planted in real attentions (`benchmarks.planted`),
in `rounds` studies of other heads and samples each, and the level of the tests where nothing was. On the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import arguments, models, planted, results
from benchmarks.results import Row, row
from benchmarks.timing import pairs, take_turns
from surgery.analysis.interference.gradients import collect
from surgery.analysis.interference.maps import heatmap


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. samples: of each task; memory_mib: of the map's workspace."""

    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    rounds: int = 5
    layers: int = 6
    heads: int = 12
    d_head: int = 64
    samples: int = 100
    length: int = 64
    memory_mib: float = 64.0
    compared: int = 2


QUICK = Settings(rounds=1, layers=1, heads=2, d_head=16, samples=8, length=16)
TARGETS = {"a loop over pairs": 1 / 50, "a loop over A's samples, all of B at once": 1 / 3}
"""Of the time of each."""


def measure(s: Settings) -> Iterator[Row]:
    """Times of the map of one layer over those of the loops, of `compared` heads of every block."""
    model = models.gpt2(s.layers, s.heads, s.heads * s.d_head, head=True, device=s.device, seed=s.seed)
    a, b = (
        collect(model, list(models.tokens(s.samples, s.length, s.device, seed).split(10)), layers=[0], progress=False)
        for seed in (s.seed, s.seed + 1)
    )
    hypotheses = [h for h in a.hypotheses if h[2] < s.compared]
    kept = {h: [torch.stack([g.gradient(i, *h).flatten() for i in range(len(g))]) for g in (a, b)] for h in hypotheses}
    references = {h: torch.cat(both).square().mean(0) for h, both in kept.items()}
    blocks = {h[1]: [k for k in a.hypotheses if k[1] == h[1]] for h in hypotheses}
    whole = {name: torch.cat([_gradients(a, b, h) for h in members], 1).square().mean() for name, members in blocks.items()}
    more = {h: 1e-3 * float(whole[h[1]]) for h in hypotheses}

    def naive() -> Tensor:
        found = torch.zeros(len(hypotheses), s.samples, s.samples)
        for number, h in enumerate(hypotheses):
            ga, gb = kept[h]
            for i in range(s.samples):
                for j in range(s.samples):
                    found[number, i, j] = (ga[i].square() / (references[h] + more[h]) * gb[j].abs()).sum()
        return found

    def by_rows() -> Tensor:
        found = torch.zeros(len(hypotheses), s.samples, s.samples)
        for number, h in enumerate(hypotheses):
            ga, gb = kept[h]
            for i in range(s.samples):
                found[number, i] = (ga[i].square() / (references[h] + more[h]) * gb.abs()).sum(1)
        return found

    def ours() -> Tensor:
        maps = heatmap(a, b, memory_mib=s.memory_mib).maps
        assert maps is not None
        return maps

    ways = {"ours": ours, "a loop over pairs": naive, "a loop over A's samples, all of B at once": by_rows}
    expected = naive()
    chosen = [a.hypotheses.index(h) for h in hypotheses]
    for name, found in (("ours", ours()[chosen]), ("by rows", by_rows())):
        if not torch.allclose(found, expected, rtol=1e-3):
            raise RuntimeError(f"{name}: differs from the loop over pairs by {float((found - expected).abs().max()):.2g}")
    share = len(hypotheses) / len(a.hypotheses)
    group = f"map of {s.samples} × {s.samples} samples, {s.length} tokens, GPT-2 of width {s.heads * s.d_head}, per head"
    taken = take_turns(ways, rounds=s.rounds, seed=s.seed, device=s.device, warmup=0)
    for name, target in TARGETS.items():
        found = pairs(taken[name], tuple((wall * share, cpu * share) for wall, cpu in taken["ours"])).to_dict()
        yield row(group, f"time over that of {name}, with gradients kept", found, target)


def _gradients(a: object, b: object, hypothesis: tuple[str, str, int]) -> Tensor:
    return torch.cat([torch.stack([g.gradient(i, *hypothesis).flatten() for i in range(len(g))]) for g in (a, b)])  # type: ignore[attr-defined,arg-type]


@dataclass(frozen=True)
class PlantedSettings:
    """Sizes of the studies, see `planted.Sizes`. rounds: studies; replicates: of the level."""

    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    rounds: int = 40
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
    for name, study in (("overlap_test", planted.overlap), ("conflict_test", planted.conflict)):
        found = [study(planter, s.seed + number) for number in range(s.rounds)]
        group = f"{name}: {s.rounds} studies of {size}"
        yield row(group, "planted hypotheses that were missed", _rate([1 - one.power for one in found]), 0.05)
        yield row(group, "false discovery rate", _rate([one.false for one in found]), 0.05)
    shares = planted.level(planter.task("pool", 3 * s.samples), s.replicates, s.seed)
    for way in ("p_row", "p_col"):
        group = f"level: {s.replicates} replicates of {size}"
        found = _rate(shares[way].tolist())
        yield row(group, f"share of {way} at most 0.05", found, 0.06, 0.04 <= found["value"] <= 0.06)


def _rate(values: list[float]) -> dict[str, float]:
    """One number of all studies: rates are means."""
    mean = sum(values) / len(values)
    return {"value": mean, "low": mean, "high": mean}


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
