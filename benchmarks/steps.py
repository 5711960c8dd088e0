"""What surgery costs at one token: a step on a cache of some length, and greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import models
from benchmarks.results import Row
from benchmarks.setting import Settings, agree, require_close
from surgery import Edit, Freeze, Spec, collect_reference, patched

NO_CUTS, CUT = 1.05, 1.10
"""Targets at one token."""

ROUNDS = 5
"""A step is short: so many times the rounds."""


def one_token(s: Settings) -> Iterator[Row]:
    """A forward of one token on a cache, which then lets go of it again."""
    shapes: dict[str, tuple[Any, dict[str, int]]] = {
        "GPT-2 small": (models.gpt2, {"positions": s.caches[-1] + 1}),
        f"a Llama shape, {s.heads} heads on {s.kv_heads}": (models.llama, {"kv_heads": s.kv_heads}),
    }
    for name, (make, options) in shapes.items():
        plain, twin, _ = s.build(make, **options)
        group_size = s.heads // options.get("kv_heads", s.heads)
        for length in s.caches:
            group = f"time of a forward of one token on a cache of {length:,}, {name}, batch 1, over unpatched sdpa"
            ids = models.tokens(1, length + 1, s.device, s.seed)
            expected = on_cache(plain, ids)()

            with patched(twin):
                agree("no cuts", on_cache(twin, ids)(), expected)
                yield s.time(group, "patched, no cuts", on_cache(plain, ids), on_cache(twin, ids), NO_CUTS, ROUNDS)
            for what, spec in cuts(s, twin, ids, group_size).items():
                with patched(twin, spec):
                    check_step(what, twin, ids, expected)
                    yield s.time(group, what, on_cache(plain, ids), on_cache(twin, ids), CUT, ROUNDS)


def decoding(s: Settings) -> Iterator[Row]:
    """Greedy decoding with a cache."""
    plain, twin, ids = s.build(head=True)
    ids = ids[:1, : s.prompt]

    def generate(model: Any) -> Tensor:
        found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **models.greedy(s.steps))
        return found

    group = f"time of decoding {s.steps} tokens with a cache, GPT-2 small, batch 1, over unpatched sdpa"
    with patched(twin):
        agree("decoding", generate(twin), generate(plain))
        yield s.time(group, "patched, no cuts", lambda: generate(plain), lambda: generate(twin), NO_CUTS)
    for what, spec in cuts(s, twin, ids, 1).items():
        with patched(twin, spec):
            yield s.time(group, what, lambda: generate(plain), lambda: generate(twin), CUT)


def cuts(s: Settings, model: Any, ids: Tensor, group_size: int) -> dict[str, Spec]:
    """Cuts of every layer that never need the attention matrix, in words. At k, which heads share, of two whole groups."""
    means = collect_reference(model, [ids], sites="z", progress=False)
    groups = [head for head in range(s.heads) if head // group_size in {h // group_size for h in s.two}]
    at_k = "two heads" if group_size == 1 else "their groups"
    return {
        "QK of two heads to zero, every layer": Spec(Freeze("qk", heads=s.two)),
        "OV of two heads to zero, every layer": Spec(Freeze("ov", heads=s.two)),
        "OV of two heads to a reference's mean, every layer": Spec(Freeze("ov", heads=s.two, to="mean", reference=means)),
        "q of two heads scaled, every layer": Spec(Edit("q", "scale", value=0.5, heads=s.two)),
        f"k of {at_k} scaled, every layer": Spec(Edit("k", "scale", value=0.5, heads=groups)),
        "v of two heads scaled, every layer": Spec(Edit("v", "scale", value=0.5, heads=s.two)),
        "z of two heads scaled, every layer": Spec(Edit("z", "scale", value=0.5, heads=s.two)),
    }


def on_cache(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """A function that runs the last token on a cache of those before it, as often as it is called."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], **{models.CACHE: cache}, use_cache=True)

    def step() -> Tensor:
        found: Tensor = model(ids[:, -1:], **{models.CACHE: cache}, use_cache=True).last_hidden_state
        cache.crop(-1)
        return found

    return step


def check_step(what: str, model: Any, ids: Tensor, uncut: Tensor) -> None:
    """Raises RuntimeError unless a step changes under the cut, and gives what the whole sequence without a cache gives."""
    found, whole = on_cache(model, ids)(), model(ids).last_hidden_state[:, -1:]
    if torch.equal(found, uncut):
        raise RuntimeError(f"{what}: the cut changes nothing")
    require_close(f"{what}: a step differs from the whole sequence by", found, whole)
