"""What scores of all heads cost, in forwards, and how they rank: `python -m benchmarks.importance [--quick] [--json FILE]`.

A random GPT-2 of the small model's shape, the metric a logit difference at the last position. Every method runs alternately
with one plain forward of the same model (`benchmarks.timing`). Ranks are compared with exact patching of every head's circuits;
also on the demo model, whose attention is saturated, so that plain attribution ranks its QK circuits wrongly and AtP* does not.

--demo: the ranks on the demo model alone, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import arguments, models, results
from benchmarks.results import Row, row
from benchmarks.timing import interleave
from surgery import patch_model
from surgery.analysis.importance import Importance, head_importance
from surgery.analysis.metrics import logit_difference, loss
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences


@dataclass(frozen=True)
class Settings(arguments.Common):
    """Sizes of the measurement. every: a token in so many is another in the corrupted inputs."""

    layers: int = 12
    heads: int = 12
    d_head: int = 64
    batch: int = 4
    length: int = 128
    every: int = 4
    ranks: bool = True


QUICK = Settings(rounds=2, batch=1, length=32, ranks=False)
Method = tuple[str, dict[str, Any], float | None]
METHODS: tuple[Method, ...] = (
    ("attribution patching, to zero", {"method": "atp", "to": "zero"}, None),
    ("attribution patching, to corrupted", {"method": "atp"}, None),
    ("AtP* without GradDrop", {"method": "atp*", "drop_layers": False}, None),
    ("AtP*", {"method": "atp*"}, None),
    ("integrated gradients, 4 steps, one path", {"method": "ig", "steps": 4, "path": "all"}, None),
)


def measure(s: Settings) -> Iterator[Row]:
    """Costs in forwards, then rank correlations of magnitudes, by circuit."""
    model = models.gpt2(s.layers, s.heads, s.heads * s.d_head, head=True, device=s.device, seed=s.seed)
    patch_model(model)
    clean, other = (models.tokens(s.batch, s.length, s.device, s.seed + n) for n in range(2))
    corrupted = torch.where(torch.arange(s.length, device=s.device) % s.every == 1, other, clean)
    metric = logit_difference(5, 7)

    def forward() -> None:
        with torch.no_grad():
            model(clean, use_cache=False, logits_to_keep=1)

    def score(options: dict[str, Any]) -> Any:
        return head_importance(model, clean, corrupted, metric, **options)

    group = f"scores of {s.layers * s.heads} heads × QK and OV, GPT-2, {s.batch} × {s.length} tokens, over one forward"
    for what, options, target in METHODS:
        pairs = interleave(forward, lambda: score(options), rounds=s.rounds, seed=s.seed, device=s.device, warmup=1)  # noqa: B023
        found = score(options)
        yield row(group, what, {**pairs.to_dict(), "forwards": found.forwards, "backwards": found.backwards}, target)
    if not s.ranks:
        return
    yield from _ranks("patching, random model", METHODS[1:], score)
    yield from measure_demo(DemoSettings(seed=s.seed))


@dataclass(frozen=True)
class DemoSettings(arguments.Common):
    """What the demo model reads: so many sequences, of so many tokens said twice. Ranks are measured once: nothing is timed."""

    rounds: int = 1
    batch: int = 8
    segment: int = 20


def measure_demo(s: DemoSettings) -> Iterator[Row]:
    """Rank correlations of magnitudes on the demo model, in float64, by circuit."""
    model = patch_model(load_model().double().to(s.device))
    text = repeated_sequences(s.batch, s.segment, model.config.vocab_size, s.seed)
    second = loss(range(s.segment + 2, 2 * s.segment + 1))
    yield from _ranks(
        "cuts to zero, demo model, loss of the second copy",
        (METHODS[0], *METHODS[2:]),
        lambda options: head_importance(model, text, None, second, **{**options, "to": "zero"}),
    )


def _ranks(group: str, methods: Sequence[Method], score: Callable[[dict[str, Any]], Importance]) -> Iterator[Row]:
    """What exact scores of the same heads take, in whole forwards' worth, and Spearman's correlations with them."""

    def number(value: float) -> dict[str, float]:
        return dict.fromkeys(("value", "low", "high"), value)

    exact = score({"method": "ablation"})
    yield row(f"exact {group}: work of the sweep, in forwards", "QK and OV of all heads", number(exact.forwards))
    for what, options, _ in methods:
        found = score(options)
        frame = found.frame.assign(exact=exact.frame.exact.abs())
        cost = {"forwards": found.forwards, "backwards": found.backwards}
        for circuit, rows in frame.groupby("circuit", sort=False):
            value = float(rows.magnitude.corr(rows.exact, method="spearman"))
            yield row(f"rank correlation with exact {group}", f"{what}: {circuit}", {**number(value), **cost})


def main() -> None:
    parser = arguments.parser(__doc__, "few rounds and short sequences, to see that it runs")
    parser.add_argument("--demo", action="store_true", help="ranks on the demo model alone, in place of all")
    given = parser.parse_args()
    if given.demo:
        demo = arguments.settings(given, DemoSettings(), DemoSettings())
        results.report("importance_demo", demo, list(measure_demo(demo)), given.json)
        return
    settings = arguments.settings(given, Settings(), QUICK)
    results.report("importance", settings, list(measure(settings)), given.json)


if __name__ == "__main__":
    main()
