"""What costs grow with: `python -m benchmarks.growth [--quick] [--json FILE]`.

Layers: one forward with z of two heads cut in each, over the unpatched model's, and patching in forwards. Heads: one forward
with the scores of so many heads scaled, or their patterns captured, over the unpatched model's; all others stay in the fused
kernel. The reconstruction of all heads (kernel="eager") beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import arguments, models, results
from benchmarks.results import Row, row
from benchmarks.timing import interleave
from surgery import Edit, capture, patch_model, patched, unpatch_model


@dataclass(frozen=True)
class Settings(arguments.Common):
    """layers: of models, and unfused: heads of one model of `deep` layers, which reads `length` tokens."""

    rounds: int = 10
    heads: int = 12
    d_head: int = 64
    batch: int = 1
    short: int = 128
    layers: tuple[int, ...] = (2, 4, 8, 16, 32)
    length: int = 1024
    deep: int = 2
    unfused: tuple[int, ...] = (0, 1, 2, 4, 8, 12)


QUICK = Settings(rounds=2, heads=4, d_head=16, short=32, layers=(1, 2), length=64, deep=1, unfused=(0, 1, 4))


def measure(s: Settings) -> Iterator[Row]:
    """Rows with `at`, a number of layers or heads, their `axis` in words, and a `series`."""
    with torch.no_grad():
        for layers in s.layers:
            yield from _of_layers(s, layers)
        yield from _of_heads(s)


def _of_layers(s: Settings, layers: int) -> Iterator[Row]:
    plain = models.gpt2(layers, s.heads, s.heads * s.d_head, positions=s.short, vocabulary=64, device=s.device, seed=s.seed)
    twin, ids = models.twin(plain), models.tokens(s.batch, s.short, s.device, s.seed, 64)
    cut = Edit("z", "zero", heads=models.two_heads(s.heads))

    def time(group: str, what: str, call: Any) -> Row:
        found = interleave(lambda: plain(ids), call, rounds=s.rounds, seed=s.seed, device=s.device)
        return _row(s, group, what, found.to_dict(), layers, "layers")

    def install() -> None:
        patch_model(twin, cut)
        unpatch_model(twin)

    group = f"{s.batch} × {s.short} tokens, over an unpatched forward"
    yield time(group, "patch and unpatch", install)
    with patched(twin):
        yield time(group, "forward, no cuts", lambda: twin(ids))
    with patched(twin, cut):
        yield time(group, "forward, z of two heads cut", lambda: twin(ids))


def _of_heads(s: Settings) -> Iterator[Row]:
    width, size = s.heads * s.d_head, {"positions": s.length, "vocabulary": 64, "device": s.device, "seed": s.seed}
    plain = models.gpt2(s.deep, s.heads, width, **size)
    ids = models.tokens(s.batch, s.length, s.device, s.seed, 64)
    group = f"{s.batch} × {s.length:,} tokens, over an unpatched forward"

    def time(what: str, model: Any, heads: int) -> Row:
        found = interleave(lambda: plain(ids), lambda: model(ids), rounds=s.rounds, seed=s.seed, device=s.device)
        return _row(s, group, what, found.to_dict(), heads, f"heads of {s.heads} that leave the fused kernel")

    for heads in s.unfused:
        chosen = list(range(heads))
        twin = models.twin(plain)
        with patched(twin, Edit("scores", "scale", value=0.5, heads=chosen) if heads else ()):
            yield time("scores scaled", twin, heads)
    for heads in s.unfused:
        chosen = list(range(heads))
        twin = models.twin(plain)
        if heads:
            with capture(twin, "pattern", heads=chosen):
                yield time("pattern captured", twin, heads)
        else:
            with patched(twin):
                yield time("pattern captured", twin, heads)
    eager = models.gpt2(s.deep, s.heads, width, **size, implementation="eager")
    with patched(eager, kernel="eager"):
        for heads in (min(s.unfused), max(s.unfused)):
            yield time('kernel="eager", no cuts', eager, heads)


def _row(s: Settings, group: str, what: str, numbers: dict[str, Any], at: int, axis: str) -> Row:
    name, numbers = results.by_cpu(what, numbers, s.device)
    return {**row(group, f"{name}, {at} {axis}", numbers), "series": what, "at": at, "axis": axis}


def main() -> None:
    given = arguments.parser(__doc__, "a small model, to see that it runs").parse_args()
    s = arguments.settings(given, Settings(), QUICK)
    results.report("growth", s, list(measure(s)), given.json)


if __name__ == "__main__":
    main()
