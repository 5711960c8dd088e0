"""A sweep over all heads, the plain loop, and other libraries: `python -m benchmarks.sweep [--quick] [--json FILE]`.

A random GPT-2 of the small model's shape; the OV circuit of each head is frozen in turn, and the log probability of one token
at the last position read. The plain loop patches each cut in and runs the model; `surgery.analysis.Sweep` starts at the cut's
layer; the others (`benchmarks.peers`, those that are installed) run the model once for each head, with the head's z set to
zero. Some of their numbers are compared first; then all take turns (`benchmarks.timing`). A loop that knows to ask transformers
for one position's logits is measured beside the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import arguments, models, peers, results
from benchmarks.results import Row, row
from benchmarks.timing import pairs, take_turns
from surgery import Freeze, Spec, patch_model, patched
from surgery.analysis.sweep import Sweep


@dataclass(frozen=True)
class Settings(arguments.Common):
    """Sizes of the measurement. token: whose log probability is read."""

    rounds: int = 3
    layers: int = 12
    heads: int = 12
    d_head: int = 64
    batch: int = 4
    length: int = 128
    token: int = 5


QUICK = Settings(rounds=1, layers=3, heads=4, batch=1, length=32)
TARGETS = {"cpu": 1 / 2.5, "cuda": 1 / 8}
"""Of the time of each of the others."""
CLOSE = 1e-3
"""Largest difference of a log probability: float32 sums of 768 products, in 12 layers, in another order."""
COMPARED = 13
"""One head in so many is compared: of other layers and other places within them."""


def measure(s: Settings) -> Iterator[Row]:
    """Time over that of each other way. difference: of its numbers from the plain loop's, where the largest effect is `effect`.

    Raises RuntimeError for a way that gives other numbers.
    """
    model, *others = (
        models.gpt2(s.layers, s.heads, s.heads * s.d_head, head=True, device=s.device, seed=s.seed, half=False)
        for _ in range(1 + len(peers.installed()))
    )
    patch_model(model)
    ids = models.tokens(s.batch, s.length, s.device, s.seed)
    heads = [(layer, head) for layer in range(s.layers) for head in range(s.heads)]
    specs = [Spec(Freeze("ov", [layer], [head])) for layer, head in heads]

    def read(logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1)[..., s.token]

    def loop(chosen: Sequence[int], **options: Any) -> Tensor:
        found = []
        for number in chosen:
            with patched(model, specs[number]), torch.no_grad():
                found.append(read(model(ids, use_cache=False, **options).logits[:, -1]))
        return torch.stack(found)

    def sweep(chosen: Sequence[int]) -> Tensor:
        found: dict[int, Tensor] = {}
        work = Sweep(model, {"input_ids": ids}, (-1,))
        work.run([specs[n] for n in chosen], lambda n, output: found.update({n: read(output.logits[:, -1])}))
        return torch.stack([found[n] for n in range(len(chosen))])

    def peer(name: str, twin: Any) -> Callable[[Sequence[int]], Tensor]:
        cut = peers.PEERS[name](twin)
        return lambda chosen: torch.stack([read(cut(ids, *heads[number])) for number in chosen])

    ways: dict[str, Callable[[Sequence[int]], Tensor]] = {
        "Sweep": sweep,
        "the plain loop": loop,
        "the plain loop, logits of one position": partial(loop, logits_to_keep=1),
    }
    for (name, number), twin in zip(peers.installed().items(), others, strict=True):
        ways[f"{name} {number}"] = peer(name, twin)
    group = f"{len(specs)} heads of GPT-2, {s.batch} × {s.length} tokens, one position read, by `surgery.analysis.Sweep`"
    some, every = range(0, len(specs), COMPARED), range(len(specs))
    expected = loop(some)
    gaps = {name: float((way(some) - expected).abs().max()) for name, way in ways.items() if way is not loop}
    with torch.no_grad():
        effect = float((expected - read(model(ids, use_cache=False).logits[:, -1])).abs().max())
    for name, gap in gaps.items():
        if not gap < min(CLOSE, effect / 10):
            raise RuntimeError(f"{name}: differs from the plain loop by {gap:.2g}; the largest effect of a cut is {effect:.2g}")
    timed = {name: partial(way, every) for name, way in ways.items()}
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
