"""What surgery costs in compiled models: `torch.compile(fullgraph=True)` of the patched model over that of the unpatched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache

from benchmarks import models, steps
from benchmarks.results import Row, row
from benchmarks.setting import Settings, require_close
from surgery import Edit, patched

LAYERS = 4
"""At most so many: each graph takes its time to compile, and every layer costs the same."""

ROUNDS = 5
"""What is compiled is short beside what it takes to compile it: so many times the rounds."""

Run = Callable[[], Tensor]


def rows(s: Settings) -> Iterator[Row]:
    """Time, and then the graphs of both. The first row of each group times the twin before it is patched."""
    layers = min(s.layers, LAYERS)
    width = s.heads * s.d_head
    plain = models.gpt2(layers, s.heads, width, positions=s.caches[0] + 1, device=s.device, seed=s.seed)
    twin = models.twin(plain)
    ids = models.tokens(s.batch, s.caches[0] + 1, s.device, s.seed)
    shapes: dict[str, Callable[[Any], Run]] = {
        f"a forward, {s.shape}": lambda model: forward(model, ids[:, :-1]),
        f"one token on a static cache of {s.caches[0]:,}, batch 1": lambda model: on_static_cache(model, ids[:1]),
    }
    for name, make in shapes.items():
        shape = f"{name}, GPT-2 small's shape, {layers} layers, both by torch.compile, over unpatched sdpa"
        counted: list[tuple[int, int]] = []
        for what, state, target in states(s, twin, *(steps.NO_CUTS, steps.CUT) if "static" in name else (1.02, 1.05)):
            torch._dynamo.reset()  # one code object has room for a few graphs only
            over, graphs = compiled(make, plain)
            with state:
                run, found = compiled(make, twin)
                check(what, run(), make(twin)(), over(), changes="scaled" in what)
                counted.append((graphs, found))
                yield s.time(f"time of {shape}", what, over, run, target, ROUNDS)
        most = max(found / graphs for graphs, found in counted)
        numbers = {"value": most, "low": most, "high": most, "graphs": counted}
        yield row(f"graphs of {shape}", "patched, the most of all these", numbers, 1.0)
    torch._dynamo.reset()


def states(
    s: Settings, model: Any, no_cuts: float, cut: float
) -> Iterator[tuple[str, AbstractContextManager[Any], float | None]]:
    """States of the twin in words, and targets: unpatched, patched without cuts, and with cuts that need no matrix."""
    yield "unpatched itself (noise)", nullcontext(), None
    yield "patched, no cuts", patched(model), no_cuts
    for site in "qkvz":
        yield f"{site} of two heads scaled, every layer", patched(model, Edit(site, "scale", value=0.5, heads=s.two)), cut


def compiled(make: Callable[[Any], Run], model: Any) -> tuple[Run, int]:
    """What runs the model compiled, and how many graphs it has made in two runs."""
    counters.clear()
    run = make(torch.compile(model, fullgraph=True))
    run()
    run()
    return run, counters["stats"]["unique_graphs"]


def forward(model: Any, ids: Tensor) -> Run:
    return lambda: model(ids).last_hidden_state


def on_static_cache(model: Any, ids: Tensor) -> Run:
    """A step on a cache that a prompt has filled; the next call writes it anew at the same place."""
    own = getattr(model, "_orig_mod", model)
    length = ids.shape[1]
    cache = StaticCache(own.config, max_cache_len=length)
    own(ids[:, :-1], **{models.CACHE: cache}, use_cache=True)
    counted = [layer.cumulative_length.clone() for layer in cache.layers]

    def step() -> Tensor:
        found: Tensor = model(ids[:, -1:], **{models.CACHE: cache}, use_cache=True).last_hidden_state
        for layer, before in zip(cache.layers, counted, strict=True):
            layer.cumulative_length.copy_(before)
        return found

    return step


def check(what: str, found: Tensor, uncompiled: Tensor, uncut: Tensor, changes: bool) -> None:
    """Raises RuntimeError unless the compiled model gives what it gives uncompiled, and a cut something else than none."""
    require_close(f"{what}: compiled, it differs by", found, uncompiled)
    if changes == torch.allclose(found, uncut, rtol=1e-5, atol=1e-5):
        raise RuntimeError(f"{what}: the cut changes {'nothing' if changes else 'something'}")
