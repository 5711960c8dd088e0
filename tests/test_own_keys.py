"""Keys and values of some heads in a step of decoding: a second call of the kernel, beside one that runs as unpatched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cached import CACHE
from families import FAMILIES, HEADS, LENGTH
from test_exactness import by_chunks, cache_error, fresh, vectors
from torch import Tensor

import surgery.own_keys
from surgery import Edit, Freeze, Spec, capture, find_anatomy, patch_model
from surgery.own_code import Surgery
from surgery.own_keys import OwnKeys, own_keys, reads_apart, with_own_keys
from surgery.plan import Plan, Probe
from surgery.unfused import Call

CUTS: dict[str, Callable[[int], list[Edit | Freeze]]] = {
    "v of two heads": lambda d: [Edit("v", "scale", -0.5, heads=[1, 2])],
    "rot_k of one head": lambda d: [Edit("rot_k", "add", torch.linspace(-1, 1, d), heads=[3])],
    "both, of other heads": lambda d: [
        Edit("v", "noise", heads=[2], seed=3),
        Edit("rot_k", "scale", 2.0, heads=[0, 2], positions=[1, 5]),
    ],
    "by position, beside z": lambda d: [
        Edit("v", "value", vectors(2, LENGTH, d), heads=[0, 3]),
        Edit("z", "scale", 3.0, heads=[1]),
    ],
    "QK of a head, v of a group": lambda d: [Freeze("qk", heads=[0]), Edit("v", "scale", 0.5, heads=[2], gqa="shared")],
}
"""By the width of a head."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls whose heads are computed in two, however short the cache."""
    found: list[Call] = []

    def watched(surgery: Any, own: OwnKeys, call: Call, kernel: Callable[..., Any]) -> Any:
        found.append(call)
        return with_own_keys(surgery, own, call, kernel)

    monkeypatch.setattr(surgery.own_keys, "MANY_KEYS", 0)
    monkeypatch.setattr(surgery.core, "with_own_keys", watched)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bart"])
@pytest.mark.parametrize("what", CUTS)
def test_steps_give_what_a_copy_of_the_cache_gives(
    name: str, what: str, runs: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(name, "sdpa")
    layers = ("decoder.self.*",) if name == "bart" else "all"
    cuts = CUTS[what](find_anatomy(model)[0].d_head)
    spec = Spec([cut.model_copy(update={"layers": layers}) for cut in cuts])
    chunks = (LENGTH - 5, 1, 1, 1)
    patch_model(model, spec)
    apart, _ = by_chunks(model, name, chunks, False)
    assert runs and all(call.query.shape[2] == 1 for call in runs)
    del runs[:]
    monkeypatch.setattr(surgery.own_keys, "MANY_KEYS", 10**9)
    copied, _ = by_chunks(model, name, chunks, False)
    # The same products, of tensors that lie otherwise in memory: some roundings of float32.
    assert not runs and (apart - copied).abs().max() < 1e-6 * copied.abs().max()
    monkeypatch.setattr(surgery.own_keys, "MANY_KEYS", 0)
    for static in (False, True):
        # Other shapes of products add up in other orders.
        assert cache_error(model, name, static) < 2e-5


@torch.no_grad()
def step(model: Any, ids: Tensor, sites: Sequence[str] = ()) -> Any:
    """z of a step after a prompt, and whatever else is captured in it."""
    cache = model(ids[:, :-1], use_cache=True)[CACHE]
    with capture(model, ["z", *sites]) as run:
        model(ids[:, -1:], **{CACHE: cache})
    return run


def test_other_heads_keep_their_bits(runs: list[Call]) -> None:
    ids = FAMILIES["llama"].inputs(padding=0)["input_ids"]
    model = patch_model(fresh("llama", "sdpa"), Edit("v", "scale", -0.5, layers=[0], heads=[1]))
    cut = step(model, ids)["self.0", "z"]
    assert len(runs) == 1
    uncut = step(patch_model(model, []), ids)["self.0", "z"]
    assert torch.equal(cut[:, [0, 2, 3]], uncut[:, [0, 2, 3]]) and not torch.allclose(cut[:, 1], uncut[:, 1], atol=1e-3)


@pytest.mark.parametrize("site", ["v", "rot_k", "pattern"])
def test_what_is_watched_is_whole(runs: list[Call], site: str) -> None:
    ids = FAMILIES["llama"].inputs(padding=0)["input_ids"]
    model = patch_model(fresh("llama", "sdpa"), Edit("v", "scale", -0.5, heads=[1]))
    found = step(model, ids, [site])["self.1", site]
    assert found.shape[1] == HEADS and not runs


def test_plans_that_need_all_heads() -> None:
    def of(*edits: Edit, reconstruct: bool = False, probe: str = "") -> OwnKeys | None:
        model = patch_model(fresh("llama", "sdpa"), edits)
        surgery: Surgery = model.model.layers[0].self_attn._surgery
        probes = {probe: [Probe(probe, (1,), lambda tensor, where: None)]} if probe else {}
        return own_keys(Plan(surgery.plan.operations, probes, reconstruct), surgery.heads, surgery.core_groups)

    some = Edit("v", "scale", 0.5, heads=[1, 2])
    found = of(some)
    assert found is not None and found.heads.numbers == (1, 2) and found.rows.numbers == (0, 1)
    assert of(some, probe="z") is not None and of(some, probe="rot_k") is None
    assert of(some, reconstruct=True) is None and of(some, Edit("scores", "scale", 0.5, heads=[1])) is None
    assert of(Edit("v", "scale", 0.5)) is None and of(Edit("z", "scale", 0.5, heads=[1])) is None


def test_calls_that_are_not_computed_in_two(runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(fresh("llama", "sdpa"), Edit("v", "scale", 0.5, heads=[1]))
    surgery_: Surgery = model.model.layers[0].self_attn._surgery

    def may(implementation: str = "sdpa", queries: int = 1, mask: Any = None, **kwargs: Any) -> bool:
        query, key = torch.zeros(2, HEADS, queries, 16), torch.zeros(2, 2, 5, 16)
        return reads_apart(surgery_, Call(implementation, query, key, key, mask, kwargs, 2))

    yes = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert may() and may(mask=yes) and may("flash_attention_2", mask=torch.ones(2, 5)) and may(dropout=0.0)
    assert may(position_ids=torch.zeros(2, 1, dtype=torch.long))
    assert not may("eager") and not may(queries=2) and not may(dropout=0.1)
    assert not may(mask=yes.expand(2, HEADS, 1, 5)) and not may(mask=object()), "a mask by head, or of a form of its own"
    assert not may(s_aux=torch.zeros(HEADS)), "sinks by head"
    monkeypatch.setattr(surgery.own_keys, "MANY_KEYS", 6)
    assert not may(), "the copy of a short cache is cheaper than a call"
