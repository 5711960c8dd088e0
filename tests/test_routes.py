"""Four routes to the two heads of the demo model's circuit, none of which is told where they are.

Ablation asks what breaks, AtP* what would by slopes, detectors where heads look, and path patching which head tells which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.analysis import ablation_study, detect_heads, head_importance, metrics, path_patching
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.patch import anatomy_of

Head = tuple[str, int]
Pair = tuple[Head, Head]
"""The earlier head, which tells what the token before was, and the later one, which looks for that."""

CLEAN = repeated_sequences(8, 20, 64, 0)
CORRUPTED = torch.cat([repeated_sequences(8, 20, 64, 1)[:, :21], CLEAN[:, 21:]], 1)  # of another first copy
METRIC = metrics.logit_difference(CLEAN[:, 31], CORRUPTED[:, 11], position=30)


def ordered(model: Any, heads: list[Head]) -> Pair:
    order = [attention.address for attention in anatomy_of(model)]
    first, second = sorted(heads, key=lambda head: order.index(head[0]))
    return first, second


def by_ablation(model: Any, clean: Tensor, corrupted: Tensor, metric: metrics.Metric) -> Pair:
    """The two heads that cost most."""
    study = ablation_study(model, clean, "both", metrics=metric, progress=False)
    return ordered(model, [(row.address, row.head) for row in study.top(2).itertuples()])


def by_attribution(model: Any, clean: Tensor, corrupted: Tensor, metric: metrics.Metric) -> Pair:
    """The two heads whose OV changes most by AtP*."""
    found = head_importance(model, clean, corrupted, metric, "atp*")
    return ordered(model, [(row.address, row.head) for row in found.top(2, "ov").itertuples()])


def by_detectors(model: Any, clean: Tensor, corrupted: Tensor, metric: metrics.Metric) -> Pair:
    """The best of each job, on random tokens of their own."""
    found = detect_heads(model)
    first, second = (found.top(1, job).iloc[0] for job in ("previous token", "induction"))
    return (first.address, first["head"]), (second.address, second["head"])


def by_paths(model: Any, clean: Tensor, corrupted: Tensor, metric: metrics.Metric) -> Pair:
    """The strongest of all paths from a head into another's q, k or v; which goes into a key."""
    names = {
        f"{a.address} head {head} {part}": (a.address, head, part)
        for a in anatomy_of(model)
        for head in range(a.heads)
        for part in "qkv"
    }
    found = path_patching(model, clean, corrupted, metric, receivers=list(names.values()), progress=False)
    best = found.top(1).iloc[0]
    address, head, part = names[best.receiver]
    assert part == "k", "one head tells another where to look"
    return (best.layer, int(best["head"])), (address, head)


ROUTES: list[Callable[[Any, Tensor, Tensor, metrics.Metric], Pair]] = [by_ablation, by_attribution, by_detectors, by_paths]


def test_four_routes_lead_to_the_same_two_heads() -> None:
    model = load_model()
    found = {route.__name__: route(model, CLEAN, CORRUPTED, METRIC) for route in ROUTES}
    assert len(set(found.values())) == 1, found
    ((first, second),) = set(found.values())
    assert first[0] != second[0], "the one reads what the other wrote, a layer before"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_routes_follow_the_heads_where_they_are_put(route: Callable[..., Pair]) -> None:
    """The same network with its heads in another order, in each layer: every route names the places that they have now."""
    model, order = load_model(), [2, 0, 3, 1]
    places = {head: place for place, head in enumerate(order)}
    before = route(model, CLEAN, CORRUPTED, METRIC)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for part in (attention.q_proj, attention.k_proj, attention.v_proj):
                part.weight.copy_(part.weight.unflatten(0, (4, -1))[order].flatten(0, 1))
            attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (4, -1))[:, order].flatten(1, 2))
    after = route(model, CLEAN, CORRUPTED, METRIC)
    assert after == tuple((address, places[head]) for address, head in before) != before
