"""What scores of all heads cost, in forwards, and how they rank: `python -m benchmarks.importance [--quick] [--json FILE]`.

A random GPT-2 of the small model's shape, the metric a logit difference at the last position. Every method runs alternately
with one plain forward of the same model (`benchmarks.timing`). Ranks are compared with exact patching of every head's circuits;
also on the demo model, whose attention is saturated, so that plain attribution ranks its QK circuits wrongly and AtP* does not.
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
    demo, text = patch_model(load_model().double()), repeated_sequences(8, 20, 64, s.seed)
    second = loss(range(22, 41))
    yield from _ranks(
        "cuts to zero, demo model, loss of the second copy",
        (METHODS[0], *METHODS[2:]),
        lambda options: head_importance(demo, text, None, second, **{**options, "to": "zero"}),
    )


def _ranks(group: str, methods: Sequence[Method], score: Callable[[dict[str, Any]], Importance]) -> Iterator[Row]:
    """What exact scores of the same heads take, in whole forwards' worth, and Spearman's correlations with them."""

    def number(value: float) -> dict[str, float]:
        return dict.fromkeys(("value", "low", "high"), value)

    exact = score({"method": "ablation"})
    yield row(f"exact {group}: work of the sweep, in forwards", "QK and OV of all heads", number(exact.forwards))
    for what, options, _ in methods:
        frame = score(options).frame.assign(exact=exact.frame.exact.abs())
        for circuit, rows in frame.groupby("circuit", sort=False):
            value = float(rows.magnitude.corr(rows.exact, method="spearman"))
            yield row(f"rank correlation with exact {group}", f"{what}: {circuit}", number(value))


def main() -> None:
    given = arguments.parser(__doc__, "few rounds and short sequences, to see that it runs").parse_args()
    settings = arguments.settings(given, Settings(), QUICK)
    results.report("importance", settings, list(measure(settings)), given.json)


if __name__ == "__main__":
    main()
