"""Two runs of one model, clean and corrupted, with what was seen at some sites: what patching takes from and puts into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from surgery.analysis.batches import Batch, batches
from surgery.analysis.reading import Reading
from surgery.analysis.sweep import Sweep
from surgery.captures import capture
from surgery.errors import SpecError, closest, describe
from surgery.reference import Entry, Reference
from surgery.spec import Edit

TO = ("corrupted", "zero", "mean", "resample")
"""What is put in, in words."""


@dataclass
class Observed:
    """One run: a sweep that patches into it, and what it gave at the sites that were asked for."""

    batch: Batch
    sweep: Sweep
    seen: Reference | None


def replacement(to: Any, corrupted: Any) -> str | Reference:
    """What is patched in: a word of TO or a Reference (of a captured run, its own). Raises SpecError for anything else.

    Also for "corrupted" without corrupted inputs.
    """
    to = to.reference() if callable(getattr(to, "reference", None)) else to
    if not isinstance(to, Reference) and (not isinstance(to, str) or to not in TO):
        found = repr(to) if isinstance(to, str) else f"a {type(to).__name__}"
        raise SpecError(describe("to", found, f"{', '.join(map(repr, TO))}, or a Reference", closest(to, TO) or "Choose one."))
    if corrupted is None and to == "corrupted":
        do = "Pass corrupted inputs, or to='zero', 'mean', 'resample' or a Reference."
        raise SpecError(describe("corrupted", "None", "the inputs of the other run", do))
    return to


def patch(site: str, given: str | Reference, address: str, heads: Sequence[int] | None, **options: Any) -> Edit:
    """The edit that puts a replacement in at one attention. heads: None for all."""
    options = {"layers": [address], "heads": "all" if heads is None else heads, **options}
    if not isinstance(given, Reference):
        return Edit(site, given, **options)
    action = "activation" if given.kind == "activation" else "mean"
    return Edit(site, action, reference=part(given, address, site, heads), **options)


def observe(
    model: nn.Module, batch: Batch, reading: Reading, sites: Sequence[str] = (), layers: Any = "all", **options: Any
) -> Observed:
    """Runs a batch with the cuts that the model has. sites: to be seen, in all heads; options: of Sweep."""
    if not sites:
        return Observed(batch, Sweep(model, batch, reading.positions, **options), None)
    with capture(model, sites, layers, detach=True) as run:
        sweep = Sweep(model, batch, reading.positions, **options)
    return Observed(batch, sweep, run.reference())


def paired_batches(model: nn.Module, clean: Any, corrupted: Any) -> list[tuple[Batch, Batch | None]]:
    """Batches of both in pairs; corrupted None gives None. Raises SpecError unless every tensor has its twin's shape."""
    mine = batches(model, clean)
    if corrupted is None:
        return [(batch, None) for batch in mine]
    theirs = batches(model, corrupted)
    do = "Make both of the same examples, position by position; pad what is shorter."
    if len(mine) != len(theirs):
        raise SpecError(describe("corrupted", f"{len(theirs)} batches", f"{len(mine)}, as clean has", do))
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        shapes = [{n: tuple(v.shape) for n, v in batch.items() if isinstance(v, Tensor)} for batch in (a, b)]
        if shapes[0] != shapes[1]:
            raise SpecError(describe(f"corrupted, batch {number}", f"{shapes[1]}", f"{shapes[0]}, as clean has", do))
    return list(zip(mine, theirs, strict=True))


def measured(model: nn.Module, reading: Reading, output: Any, clean: Observed) -> np.ndarray:
    """(example,): the one metric of an output of either run. Labels, tokens and padding are those of the clean inputs."""
    return reading.read(model, clean.batch, output, clean.sweep.clean)[0]


def part(reference: Reference, address: str, site: str, heads: Sequence[int] | None) -> Reference:
    """What a reference holds for some heads of one attention (None: all), so that a cut carries no more than it uses.

    The whole reference where it has nothing for them, or holds kv heads: what does not fit is refused where specs are.
    """
    entry = reference.find(address, site)
    if entry is None or heads is None or site == "k":
        return reference if entry is None else Reference(reference.kind, {(address, site): entry}, reference.model)
    axis = 1 if reference.kind == "activation" else 0
    held = list(range(entry.value.shape[axis])) if entry.heads is None else list(entry.heads)
    if not set(heads) <= set(held) or (tuple(heads) == tuple(held) and len(reference) == 1):
        return reference
    rows = [held.index(head) for head in heads]

    def take(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[(slice(None),) * axis + (rows,)]

    value = take(entry.value)
    assert value is not None
    return Reference(reference.kind, {(address, site): Entry(value, take(entry.spread), tuple(heads))}, reference.model)
