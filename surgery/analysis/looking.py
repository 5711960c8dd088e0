"""Where heads look: the mean attention from queries to the keys that a job is about, and what uniform attention gives."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy import Attention
from surgery.errors import NotFiredWarning
from surgery.evaluation import evaluating, uncached
from surgery.patch import as_spec, cuts_of, patched, probed
from surgery.plan import Probe
from surgery.spec import Edit
from surgery.where import Where

Pairs = tuple[Tensor, Tensor, Tensor]
"""(sequence, query, key), each (pair,)."""


@dataclass(frozen=True, eq=False)
class Target:
    """Keys that queries of sequences of `length` tokens may look at. queries: how many (sequence, query) the score is a mean
    over; those without a key of theirs do not belong to them."""

    name: str
    length: int
    rows: Tensor
    query: Tensor
    key: Tensor

    @property
    def queries(self) -> int:
        return int((self.rows * self.length + self.query).unique().numel())

    def score(self, pattern: Tensor) -> Tensor:
        """(head,) in float64: the mean over queries of what each gives to all of its keys. NaN if there are none."""
        found = pattern[self.rows, :, self.query, self.key]  # (pair, head)
        return found.double().sum(0).cpu() / (self.queries or float("nan"))


def previous_token(ids: Tensor, present: Tensor) -> Pairs:
    """Every token, and the one before it."""
    rows, keys = (present[:, 1:] & present[:, :-1]).nonzero(as_tuple=True)
    return rows, keys + 1, keys


def duplicate_token(ids: Tensor, present: Tensor) -> Pairs:
    """Every token that was there before, and all places where it was."""
    return _pairs(_again(ids, present))


def induction(ids: Tensor, present: Tensor) -> Pairs:
    """Every token that was there before, and the places behind the places where it was, itself excepted."""
    again = _again(ids, present)
    behind = torch.zeros_like(again)
    behind[:, :, 1:] = again[:, :, :-1]
    return _pairs(behind & ~torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device) & present[:, None, :])


def sink(ids: Tensor, present: Tensor) -> Pairs:
    """Every token but the first, and the first that is no padding."""
    first = present.int().argmax(1)
    rows, queries = present.nonzero(as_tuple=True)
    later = queries > first[rows]
    return rows[later], queries[later], first[rows[later]]


JOBS: dict[str, Callable[[Tensor, Tensor], Pairs]] = {
    "previous token": previous_token,
    "duplicate token": duplicate_token,
    "induction": induction,
    "sink": sink,
}
"""Functions of ids and present (sequence, position), the latter False at padding."""


class Looks:
    """What `looks` found. scores, chance: (target, head) by address, of the chosen heads; chance is that of uniform attention.

    missing: why there are none, by address.
    """

    def __init__(self) -> None:
        self.scores: dict[str, Tensor] = {}
        self.chance: dict[str, Tensor] = {}
        self.missing: dict[str, str] = {}


@torch.no_grad()
def looks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Mapping[str, Sequence[Target]],
    attentions: Sequence[Attention],
    heads: Sequence[int] | None = None,
    chance: bool = True,
) -> Looks:
    """The scores of targets (by address) in one forward, and in one with uniform attention wherever the mask allows it.

    Patterns are reduced layer by layer as the forward goes: no more than one layer's is kept. A module that runs several times
    (shared layers) has the mean over its runs. Cuts that the model has stay.
    """
    found = Looks()
    found.scores, found.missing = _forward(model, inputs, targets, attentions, heads, ())
    if chance:
        uniform = [Edit("pattern", "uniform", layers=list(found.scores))] if found.scores else []
        found.chance, _ = _forward(model, inputs, targets, attentions, heads, uniform)
    return found


def _forward(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Mapping[str, Sequence[Target]],
    attentions: Sequence[Attention],
    heads: Sequence[int] | None,
    cuts: Sequence[Edit],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    taken: dict[str, list[Tensor]] = {}
    missing: dict[str, str] = {}

    def take(address: str, pattern: Tensor, where: Where) -> None:
        own = targets[address]
        if any(pattern.shape[2:] != (target.length, target.length) for target in own):
            shape = " × ".join(map(str, pattern.shape[2:]))
            missing[address] = f"its pattern is {shape} (query × key), not that of sequences of {own[0].length} tokens"
        else:
            taken.setdefault(address, []).append(torch.stack([target.score(pattern) for target in own]))

    spec, kernel = cuts_of(model)
    chosen = None if heads is None else tuple(heads)
    probes = {a.address: [Probe("pattern", chosen, functools.partial(take, a.address))] for a in attentions}
    with (
        warnings.catch_warnings(),
        patched(model, spec + as_spec(list(cuts)), kernel=kernel, strict=False),
        probed(model, probes, strict=False),
        evaluating(model),
    ):
        warnings.simplefilter("ignore", NotFiredWarning)  # `missing` says so
        model(**uncached(model, inputs))
    for attention in attentions:
        if attention.address not in taken and attention.address not in missing:
            missing[attention.address] = "it did not run on these inputs"
    means = {address: torch.stack(steps).mean(0) for address, steps in taken.items() if address not in missing}
    return means, missing


def _again(ids: Tensor, present: Tensor) -> Tensor:
    """(sequence, query, key): whether the key is earlier and holds the query's token."""
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril(-1)
    return (ids[:, :, None] == ids[:, None, :]) & earlier & present[:, :, None] & present[:, None, :]


def _pairs(matrix: Tensor) -> Pairs:
    rows, queries, keys = matrix.nonzero(as_tuple=True)
    return rows, queries, keys
