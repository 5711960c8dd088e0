"""What it costs to compute the attention matrix of one head beside a fused kernel, over many tokens: time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from benchmarks import memory, models
from benchmarks.results import Row
from benchmarks.setting import Settings, agree
from surgery import Edit, capture, patched

TIME = 1.3
"""The target of one unfused head's time."""


def rows(s: Settings) -> Iterator[Row]:
    """Time of the attention module alone and of a model of one layer, then growth of memory of the module alone."""
    length, head = s.unfused_length, s.two[:1]
    plain = models.gpt2(1, s.heads, s.heads * s.d_head, positions=length, vocabulary=64, device=s.device, seed=s.seed)
    twin, ids = models.twin(plain), models.tokens(1, length, s.device, s.seed, vocabulary=64)
    states = torch.randn(1, length, plain.config.n_embd, device=s.device, dtype=plain.dtype)
    places: dict[str, Callable[[Any], Any]] = {
        "the attention module alone": lambda model: model.h[0].attn(states, attention_mask=None)[0],
        "a model of one layer": lambda model: model(ids).last_hidden_state,
    }
    for place, run in places.items():
        group = f"time of {place}, {length:,} tokens, batch 1, over unpatched sdpa"
        expected = run(plain)
        for what, (changes, made) in states_of(twin, head).items():
            with made:
                found = run(twin)
                if not changes:
                    agree(what, found, expected)
                elif torch.equal(found, expected):
                    raise RuntimeError(f"{what}: the cut changes nothing")
                yield s.time(group, what, lambda run=run: run(plain), lambda run=run: run(twin), TIME)
    cases = ("fused", "no-op", "capture-one", "scores-one", "pattern-one")
    yield from memory.rows(length, s.device, s.threads, cases, whole_model=False)


def states_of(model: Any, heads: list[int]) -> dict[str, tuple[bool, AbstractContextManager[Any]]]:
    """States of a model in which it computes the matrix of one head, in words; and whether outputs change."""
    return {
        "pattern of one head captured": (False, capture(model, "pattern", heads=heads, keep="last")),
        "scores of one head scaled": (True, patched(model, Edit("scores", "scale", value=0.5, heads=heads))),
        "pattern of one head made uniform": (True, patched(model, Edit("pattern", "uniform", heads=heads))),
    }
