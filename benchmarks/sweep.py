"""A sweep over all heads against the plain loop: `python -m benchmarks.sweep [--quick] [--json FILE]`.

A random GPT-2 of the small model's shape; the OV circuit of each head is frozen in turn, and the log probability of one token
at the last position read. The plain loop patches each cut in and runs the model; `surgery.analysis.Sweep` starts at the cut's
layer. Both run alternately (`benchmarks.timing`), and their numbers are compared first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import arguments, models, results
from benchmarks.results import Row, row
from benchmarks.timing import interleave
from surgery import Freeze, Spec, patch_model, patched
from surgery.analysis.sweep import Sweep


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. token: whose log probability is read."""

    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    rounds: int = 3
    layers: int = 12
    heads: int = 12
    d_head: int = 64
    batch: int = 4
    length: int = 128
    token: int = 5


QUICK = Settings(rounds=1, layers=3, heads=4, batch=1, length=32)
TARGET = 1 / 2.5
"""Of the time of the plain loop, on a CPU."""


def measure(s: Settings) -> Iterator[Row]:
    """Time over the plain loop's, and the largest difference between their numbers."""
    model = models.gpt2(s.layers, s.heads, s.heads * s.d_head, head=True, device=s.device, seed=s.seed)
    patch_model(model)
    ids = models.tokens(s.batch, s.length, s.device, s.seed)
    specs = [Spec(Freeze("ov", [layer], [head])) for layer in range(s.layers) for head in range(s.heads)]

    def read(output: Any) -> Tensor:
        return output.logits[:, -1].log_softmax(-1)[:, s.token]

    def plain() -> Tensor:
        found = []
        for spec in specs:
            with patched(model, spec), torch.no_grad():
                found.append(read(model(ids, use_cache=False)))
        return torch.stack(found)

    def sweep() -> Tensor:
        found: dict[int, Tensor] = {}
        Sweep(model, {"input_ids": ids}, (-1,)).run(specs, lambda number, output: found.update({number: read(output)}))
        return torch.stack([found[number] for number in range(len(specs))])

    group = f"{len(specs)} heads of GPT-2, {s.batch} × {s.length} tokens, one position read, over the plain loop"
    gap = float((plain() - sweep()).abs().max())
    yield row(group, "largest difference of a log probability", dict.fromkeys(("value", "low", "high"), gap))
    pairs = interleave(plain, sweep, rounds=s.rounds, seed=s.seed, device=s.device, warmup=0)
    yield row(group, "surgery.analysis.Sweep", pairs.to_dict(), TARGET)


def main() -> None:
    given = arguments.parser(__doc__, "a small model, to see that it runs").parse_args()
    settings = arguments.settings(given, Settings(), QUICK)
    results.report("sweep", settings, list(measure(settings)), given.json)


if __name__ == "__main__":
    main()
