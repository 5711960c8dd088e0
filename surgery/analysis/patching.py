"""Activation patching: activations of one run put into another, place by place, and what a metric says of each.

Vig et al. 2020, Meng et al. 2022; on the two directions and what they show, Heimersheim and Nanda 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from surgery.analysis.agreement import in_step, require_same_data, require_same_results
from surgery.analysis.labelled import Labelled
from surgery.analysis.outcome import Patching
from surgery.analysis.pairs import Observed, measured, observe, paired_batches, part, patch, replacement
from surgery.analysis.reading import Reading
from surgery.analysis.sweep import Checked
from surgery.analysis.workers import workers_of
from surgery.anatomy import Anatomy, Attention
from surgery.cuts import GROUPED
from surgery.errors import SpecError, closest, describe
from surgery.lower import lower
from surgery.patch import anatomy_of
from surgery.reference import Reference
from surgery.sites import SITES
from surgery.spec import Edit, Spec

OVER = ("layer", "head", "position")
DIRECTIONS = ("noising", "denoising")


@dataclass(frozen=True)
class Choice:
    """What is patched, and with what. heads, positions: in the order of the labels; None for all of them at once."""

    over: tuple[str, ...]
    attentions: tuple[Attention, ...]
    heads: tuple[int, ...] | None
    positions: tuple[int, ...] | None
    to: str | Reference
    gqa: str
    seed: int


@in_step
def activation_patching(
    model: Any,
    clean: Any,
    corrupted: Any = None,
    metric: Any = "loss",
    sites: Sequence[str] | str = ("z",),
    over: Sequence[str] | str = OVER,
    to: Any = "corrupted",
    direction: str = "noising",
    layers: Any = "all",
    heads: Any = "all",
    positions: Any = None,
    *,
    gqa: str = "isolated",
    seed: int = 0,
    tokens: int | None = None,
    fast: bool = True,
    progress: bool = True,
) -> Patching:
    """Patches each place at a time and measures; a place is one entry along each axis of `over`.

    model: patched or not; cuts that it has stay in both runs. clean, corrupted: token ids, mappings of inputs, or several
      batches of them, of equal shapes: a position is patched with what stands at the same position, padding included.
    metric: one of `surgery.analysis.metrics`, a name, or a callable of the output. Labels, tokens and padding that it looks at
      are the clean ones in every run, so that it is one function.
    sites: of `surgery.sites.SITES`. over: of "layer" (each attention), "head", "position"; what is left out is patched
      together. layers, heads: as in a spec. positions: absolute, along the site's third axis (queries, or keys at k, rot_k
      and v), from the end if negative; None for all. gqa: at k, rot_k and v, as in `Edit`.
    direction: "noising" runs clean and puts `to` in, which shows what the behaviour needs here; "denoising" runs corrupted
      and puts the clean activations in, which shows what is enough to bring it back.
    to: of noising: "corrupted", "zero", "mean" (over batch and positions of the run itself), "resample" (another row of
      the batch, by seed), or a Reference (of a data set, or of another run). Then corrupted inputs only scale `recovery`.
    tokens, fast: see Sweep. Over several processes (`surgery.analysis.workers`) forwards are divided.
    Raises SpecError or NoMatchError for what does not fit.
    """
    reading, anatomy = Reading([metric]), anatomy_of(model)
    sites = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    over = (over,) if isinstance(over, str) else tuple(over)
    to = replacement(to, corrupted)
    _check(sites, over, to, direction)
    checked = Edit("z", "identity", layers=layers, heads=heads)  # the same checks as a cut of the same selection
    choice = Choice(
        tuple(axis for axis in OVER if axis in over),
        tuple(anatomy.select(checked.layers, "activation_patching")),
        None if checked.heads == "all" else checked.heads,
        None if positions is None else _numbers(positions),
        to,
        gqa,
        seed,
    )
    parts: dict[str, list[Labelled]] = {site: [] for site in sites}
    runs: dict[str, list[np.ndarray]] = {"clean": [], "corrupted": []}
    notes: list[str] = []
    forwards = 0.0
    workers = workers_of(model)
    options = {"tokens": tokens, "fast": fast, "checked": Checked(), "workers": workers}
    with tqdm(desc="patching", unit="patch", disable=not (progress and workers.is_main)) as bar:
        pairs = paired_batches(model, clean, corrupted)
        require_same_data(workers, *zip(*pairs, strict=True))
        for mine, theirs in pairs:
            pair = _observed(model, mine, theirs, reading, sites, layers, choice, direction, options)
            for name, observed in pair.items():
                runs[name].append(measured(model, reading, observed.sweep.clean, pair["clean"]))
                require_same_results(workers, runs[name][-1])
            base = pair["clean" if direction == "noising" else "corrupted"]
            seen = next((observed.seen for observed in pair.values() if observed.seen is not None), None)
            for site in sites:
                parts[site].append(_patch(model, anatomy, site, base, seen, pair["clean"], choice, reading, bar))
            notes += [note for note in base.sweep.notes if note not in notes]
            forwards += base.sweep.forwards + len(pair)
    examples = {site: _joined(found) for site, found in parts.items()}
    joined = {name: np.concatenate(found) for name, found in runs.items() if found}
    base_name = "clean" if direction == "noising" else "corrupted"
    return Patching("site", examples, joined["clean"], joined.get("corrupted"), base_name, reading.metrics[0], notes, forwards)


def _observed(
    model: Any,
    clean: Any,
    corrupted: Any,
    reading: Reading,
    sites: Sequence[str],
    layers: Any,
    choice: Choice,
    direction: str,
    options: dict[str, Any],
) -> dict[str, Observed]:
    """Both runs; sites are seen in the run that is the source, or that tells how many positions there are."""
    counts = "position" in choice.over or choice.positions is not None
    shows = "clean" if direction == "denoising" else "corrupted" if choice.to == "corrupted" else "clean" if counts else ""
    found = {}
    for name, batch in {"clean": clean, "corrupted": corrupted}.items():
        if batch is not None:
            found[name] = observe(model, batch, reading, sites if name == shows else (), layers, **options)
    return found


def _patch(
    model: Any,
    anatomy: Anatomy,
    site: str,
    base: Observed,
    seen: Reference | None,
    clean: Observed,
    choice: Choice,
    reading: Reading,
    bar: Any,
) -> Labelled:
    """The metric under a patch of each place of one batch, (.., example)."""
    if seen is not None:  # what these inputs do not run, capture has warned of
        ran = tuple(a for a in choice.attentions if seen.find(a.address, site) is not None)
        choice = replace(choice, attentions=ran)
    lengths = {a.address: seen[a.address, site].shape[2] for a in choice.attentions} if seen is not None else {}
    whole = seen if choice.to == "corrupted" and seen is not None else choice.to

    @functools.cache  # one for all positions, or they would be many times the run that they are of
    def given(address: str, heads: tuple[int, ...] | None) -> str | Reference:
        return part(whole, address, site, heads) if isinstance(whole, Reference) else whole

    axes = _axes(choice, lengths)
    cells, specs = [], []
    for index in np.ndindex(*(len(labels) for labels in axes.values())):
        labels = {axis: axes[axis][i] for axis, i in zip(axes, index, strict=True)}
        edits = list(_edits(site, labels, choice, lengths, given))
        if edits:
            cells.append(index)
            specs.append(Spec(edits))
    lower(Spec([edit for spec in specs for edit in spec]), anatomy)  # raises for what does not fit, before anything runs
    bar.total = (bar.total or 0) + len(specs)
    bar.refresh()
    rows = base.sweep.rows
    shape = tuple(len(labels) for labels in axes.values())
    values, present = np.full((*shape, rows), np.nan), np.zeros((*shape, 1), dtype=bool)

    def read(number: int, output: Any) -> np.ndarray:
        bar.update()
        return measured(model, reading, output, clean)

    for cell, found in zip(cells, base.sweep.run(specs, read), strict=True):
        values[cell], present[cell] = found, True
    bar.update(bar.total - bar.n)  # what other processes did
    metric = reading.metrics[0]
    return Labelled(values, {**axes, "example": range(rows)}, metric.name, metric.unit, present)


def _axes(choice: Choice, lengths: dict[str, int]) -> dict[str, tuple[Any, ...]]:
    """The labels of each axis of `over`: of heads and positions, all that any of the attentions has."""
    every = {
        "layer": tuple(attention.address for attention in choice.attentions),
        "head": choice.heads or tuple(range(max(attention.heads for attention in choice.attentions))),
        "position": tuple(range(max(lengths.values(), default=0))),
    }
    if choice.positions is not None and lengths:
        every["position"] = tuple(dict.fromkeys(_placed(p, max(lengths.values())) for p in choice.positions))
    return {axis: every[axis] for axis in choice.over}


def _edits(
    site: str, labels: dict[str, Any], choice: Choice, lengths: dict[str, int], given: Callable[..., str | Reference]
) -> Iterator[Edit]:
    """The patch of one place: an edit for each attention, as far as it has such a head and position."""
    for attention in choice.attentions:
        if labels.get("layer", attention.address) != attention.address:
            continue
        heads = (labels["head"],) if "head" in labels else choice.heads
        if choice.heads is None and heads is not None and heads[0] >= attention.heads:
            continue
        positions: tuple[int, ...] | None = None
        if "position" in labels:
            positions = (labels["position"],)
        elif choice.positions is not None:
            positions = tuple(sorted({_placed(p, lengths[attention.address]) for p in choice.positions}))
        if positions is not None and positions[0] >= lengths[attention.address]:
            continue
        gqa = choice.gqa if site in GROUPED else "isolated"
        yield patch(
            site, given(attention.address, heads), attention.address, heads, positions=positions, gqa=gqa, seed=choice.seed
        )


def _placed(position: int, length: int) -> int:
    """A position counted from the start. Raises SpecError for one that there is not."""
    if not -length <= position < length:
        do = "Positions count from 0, from the end if negative."
        raise SpecError(describe("positions", f"{position}", f"{-length} to {length - 1}", do))
    return position % length


def _numbers(positions: Any) -> tuple[int, ...]:
    found = tuple(positions) if hasattr(positions, "__iter__") else (positions,)
    if not found or not all(isinstance(p, int | np.integer) and not isinstance(p, bool) for p in found):
        raise SpecError(describe("positions", repr(positions), "None, or whole numbers", "For example [-1]."))
    return tuple(map(int, found))


def _joined(parts: Sequence[Labelled]) -> Labelled:
    """Batches one after another along the axis of examples."""
    first = parts[0]
    places = {axis: labels for axis, labels in first.axes.items() if axis != "example"}
    for other in parts[1:]:
        if {axis: labels for axis, labels in other.axes.items() if axis != "example"} != places:
            do = "Pad all batches to one length, or leave 'position' out of `over`."
            raise SpecError(describe("activation_patching", "batches with other places", "the same places in all", do))
    values = np.concatenate([part.values for part in parts], axis=-1)
    present = np.concatenate([part.present for part in parts], axis=-1)
    return Labelled(values, {**places, "example": range(values.shape[-1])}, first.name, first.unit, present)


def _check(sites: Sequence[str], over: Sequence[str], to: str | Reference, direction: str) -> None:
    """Raises SpecError for options that are not there, or do not go together."""
    if not sites:
        raise SpecError(describe("sites", "none", "at least one", f"Choose from {', '.join(SITES)}."))
    for what, found, known in (("sites", sites, tuple(SITES)), ("over", over, OVER), ("direction", (direction,), DIRECTIONS)):
        if wrong := [word for word in found if word not in known]:
            do = closest(wrong[0], known) or "Choose of these."
            raise SpecError(describe(what, repr(wrong[0]), ", ".join(map(repr, known)), do))
    if direction == "denoising" and to != "corrupted":
        do = "Leave `to` out: the clean activations go into the corrupted run."
        raise SpecError(describe("to", repr(to), "'corrupted' with direction='denoising'", do))
