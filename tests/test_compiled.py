"""A compiled model has no more graphs than unpatched, and is compiled no more often: a prompt, then steps on a static cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached import CACHE
from families import FAMILIES, LENGTH
from test_exactness import fresh
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import StaticCache

from surgery import Edit, patch_model

ROOM, PROMPT = 12, 4

NAMES = ("gpt2", "llama")


def cuts(name: str) -> dict[str, list[Edit]]:
    """Of some heads; at k, which heads share, of a whole group."""
    group = [2, 3] if name == "llama" else [1, 3]
    some = {site: [Edit(site, "scale", 0.5, heads=group if site == "k" else [1, 3])] for site in "qkvz"}
    mean = torch.linspace(-1, 1, 16 if name == "llama" else 8)
    return {
        "no cuts": [],
        **some,
        "rot_k": [Edit("rot_k", "scale", 0.5, heads=[1])],
        "z by position": [Edit("z", "add", mean.expand(4, LENGTH, -1))],
    }


@torch.no_grad()
def decode(model: Any, run: Any) -> Tensor:
    """Logits of a prompt and of the steps after it."""
    ids = FAMILIES["llama"].inputs(padding=0)["input_ids"]
    cache, found = StaticCache(model.config, max_cache_len=ROOM), []
    for part in (slice(0, PROMPT), *(slice(step, step + 1) for step in range(PROMPT, LENGTH))):
        mask = (torch.arange(ROOM) < part.stop).expand(len(ids), ROOM)
        found.append(run(ids[:, part], attention_mask=mask, **{CACHE: cache}).logits)
    return torch.cat(found, dim=1)


def compiled(model: Any, between: Callable[[], Any] = lambda: None) -> tuple[Tensor, dict[str, int]]:
    """Logits of the second of two runs, how many graphs they have, how often one was compiled, and their operations in all."""
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounterWithBackend("eager")
    run = torch.compile(model, fullgraph=True, backend=backend)
    decode(model, run)
    between()
    found = decode(model, run)
    assert counters["graph_break"] == {}
    return found, {"graphs": len(backend.graphs), "compiled": backend.frame_count, "operations": backend.op_count}


@functools.cache
def unpatched(name: str) -> dict[str, int]:
    return compiled(fresh(name, "sdpa"))[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["no cuts", *"qkvz", "rot_k", "z by position"])
def test_no_more_graphs_than_unpatched(dynamo: None, name: str, what: str) -> None:
    expected = unpatched(name)
    model = patch_model(fresh(name, "sdpa"), cuts(name)[what])
    found, counts = compiled(model)
    # Traced code may round differently.
    torch.testing.assert_close(found, decode(model, model), atol=1e-4, rtol=1e-4)
    assert expected["graphs"] == 2, "one for the prompt, one for all steps"
    assert (counts["graphs"], counts["compiled"]) == (expected["graphs"], expected["compiled"])
    assert (
        counts["operations"] == expected["operations"] if what == "no cuts" else counts["operations"] > expected["operations"]
    )


def test_a_graph_more_would_be_counted(dynamo: None) -> None:
    flags: list[bool] = []
    model = patch_model(fresh("llama", "sdpa"), Edit("z", lambda z: z * 0.5 if flags else z * 0.25))
    expected = unpatched("llama")
    assert compiled(model)[1]["compiled"] == expected["compiled"]
    counts = compiled(model, between=lambda: flags.append(True))[1]
    assert counts["compiled"] > expected["compiled"] and counts["graphs"] > expected["graphs"]
