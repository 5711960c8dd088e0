"""Which heads, and which half of them, a behaviour needs: every head's circuits cut in turn, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from surgery.analysis.agreement import in_step, require_same_data, require_same_results
from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.ends import Head, pairs_of
from surgery.analysis.journal import Journal, digest, weights_of
from surgery.analysis.reading import Reading
from surgery.analysis.statistics import corrected, paired
from surgery.analysis.sweep import Checked, Sweep
from surgery.analysis.tables import as_html, as_text
from surgery.analysis.workers import workers_of
from surgery.cuts import CIRCUITS
from surgery.errors import SpecError, closest, describe
from surgery.lower import lower
from surgery.patch import anatomy_of, cuts_of
from surgery.plots import effect_bars, head_maps, lines
from surgery.plots.style import group_name, short, with_unit
from surgery.spec import Freeze, Spec

SHORT = 8
"""Letters of a group's heads that are named where a study is printed."""
FROZEN = {"qk": "QK frozen", "ov": "OV frozen", "both": "both frozen"}

COLUMNS = ("value", "baseline", "effect", "size", "low", "high", "size_low", "size_high", "p", "p_fdr")
"""Numbers that a row of a study has."""


@dataclass(frozen=True)
class Cut:
    """One row of a study: a circuit, the heads where it is frozen, the seed of noise, and the spec that does it."""

    circuit: str
    heads: tuple[Head, ...]
    seed: int
    spec: Spec

    @property
    def key(self) -> str:
        """A name that is the same in every run of the study."""
        return f"{self.circuit} {self.label} {self.seed}"

    @property
    def label(self) -> str:
        return " + ".join(f"{address}.{head}" for address, head in self.heads)


class Study:
    """What `ablation_study` measured.

    frame: a row for each cut and metric. circuit, address, head (both of a single head; of a group address is the label of all
    and head is NaN), heads (how many), seed, metric, unit, value and baseline (means over examples), effect (their
    difference), low and high (its confidence interval), size, size_low, size_high (see `surgery.analysis.statistics.Paired`),
    p, p_fdr (corrected over all rows of the same metric).
    examples: (cut, metric, example) values, with `baseline` (metric, example), for statistics of your own.
    A metric that gives one number for a whole batch has as many independent units as there are batches: means, interval and p
    are over these. In `examples` its number stands at each example of the batch.
    notes: such metrics, examples whose metric is not a finite number, and where the sweep could not take its short cut.
    """

    def __init__(
        self, frame: pd.DataFrame, cuts: Sequence[Cut], examples: np.ndarray, baseline: np.ndarray, notes: Sequence[str]
    ) -> None:
        self.frame, self.cuts, self.examples, self.baseline, self.notes = frame, tuple(cuts), examples, baseline, list(notes)

    def __repr__(self) -> str:
        return f"{self}"

    def __str__(self) -> str:
        """The heads whose cuts change most."""
        head = f"{len(self.cuts)} cuts {self._to}, {self.examples.shape[-1]} examples; largest effects:"
        return "\n".join([head, as_text(self._summary()), *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return as_html(self._summary())

    def _summary(self) -> pd.DataFrame:
        """The largest effects in a few columns, groups by their short names."""
        shown = self.top(10)[["circuit", "address", "head", "metric", "baseline", "effect", "low", "high", "p_fdr"]]
        single = shown["head"].notna()
        return shown.assign(address=shown.address.where(single, [group_name(label, SHORT) for label in shown.address]))

    def to_latex(self, **options: Any) -> str:
        """The frame as a LaTeX table; options of DataFrame.to_latex."""
        return self.frame.to_latex(**{"index": False, "float_format": "%.3g", "escape": True, **options})

    def top(self, count: int = 10, metric: str | None = None) -> pd.DataFrame:
        """The rows with the largest effects, either way, of one metric (the first). Raises SpecError for another."""
        rows = self._rows(metric)
        return rows.loc[rows.effect.abs().sort_values(ascending=False).index].head(count)

    def matrix(self, circuit: str, metric: str | None = None, column: str = "effect") -> pd.DataFrame:
        """Layers (addresses) × heads of one circuit, the mean over seeds; of studies of single heads.

        column: of COLUMNS. Raises SpecError for a circuit, metric or column that there is not.
        """
        rows = self._rows(metric, column)
        rows = rows[(rows.circuit == circuit) & (rows.heads == 1)]
        if rows.empty:
            do = f"Choose of {', '.join(map(repr, self.frame.circuit.unique()))}, and single heads."
            raise SpecError(describe("matrix", f"no single head cut at {circuit!r}", "a circuit that was studied", do))
        table = rows.pivot_table(index="address", columns="head", values=column, aggfunc="mean", sort=False)
        return table.rename(columns=int)

    def side_by_side(self, metric: str | None = None, column: str = "effect") -> pd.DataFrame:
        """A row for each head (or group), a column for each circuit: the mean over seeds. column: of COLUMNS."""
        rows = self._rows(metric, column)
        index = ["address", "head"] if rows["head"].notna().all() else ["address"]
        return rows.pivot_table(index=index, columns="circuit", values=column, aggfunc="mean", sort=False)

    def picture(self, metric: str | None = None) -> Figure:
        """Heat maps of the effects over layer × head, the circuits side by side; of groups that grow, lines.

        `surgery.plots.save` writes it. Raises SpecError for a study of other groups: see `bars`.
        """
        rows = self._rows(metric)
        name = rows.metric.iloc[0]
        circuits = list(self.frame.circuit.unique())
        label = with_unit(f"change of {name}", rows.unit.iloc[0])
        subtitle = f"{self.examples.shape[-1]} examples; {name} without cuts {self.baseline_of(name):.3g}"
        if (order := self._growing()) is not None:
            return self._curve(name, order, label, subtitle)
        tables = {circuit: self.matrix(circuit, name) for circuit in circuits}
        return head_maps(
            {FROZEN[circuit]: table.to_numpy() for circuit, table in tables.items()},
            layers=list(map(short, tables[circuits[0]].index)),
            title=f"What freezing each head {self._to} changes",
            subtitle=subtitle,
            unit=label,
        )

    def bars(self, count: int = 12, metric: str | None = None) -> Figure:
        """The largest effects as bars with their confidence intervals, circuits side by side."""
        title = f"The largest effects of freezing heads {self._to}"
        return effect_bars(self._rows(metric), count=count, title=title)

    def _curve(self, metric: str, order: Sequence[Head], label: str, subtitle: str) -> Figure:
        """The effect of more and more heads with its confidence interval, a line for each circuit; means over seeds."""
        rows = self.frame[self.frame.metric == metric]
        found = {c: rows[rows.circuit == c].groupby("heads")[["effect", "low", "high"]].mean() for c in rows.circuit.unique()}
        series = {FROZEN[circuit]: table.effect.to_numpy() for circuit, table in found.items()}
        bands = {FROZEN[circuit]: (table.low.to_numpy(), table.high.to_numpy()) for circuit, table in found.items()}
        names = [("" if n == 0 else "+ ") + f"{short(address)}.{head}" for n, (address, head) in enumerate(order)]
        title = f"What freezing one more head {self._to} changes"
        axis = "head (layer.head), with all before it"
        return lines(series, names, axis=axis, unit=label, bands=bands, title=title, subtitle=f"{subtitle}; with intervals")

    def _growing(self) -> list[Head] | None:
        """The heads in the order in which they join, if each group is the one before and one more; else None."""
        groups = list(dict.fromkeys(cut.heads for cut in self.cuts))
        is_growing = len(groups) > 1 and all(group == groups[-1][: n + 1] for n, group in enumerate(groups))
        return list(groups[-1]) if is_growing else None

    @property
    def _to(self) -> str:
        """What heads are frozen to, in words."""
        return " or ".join(dict.fromkeys(f"to {f.to}" for cut in self.cuts for f in cut.spec if isinstance(f, Freeze)))

    def baseline_of(self, metric: str) -> float:
        """The mean of a metric without cuts. Raises SpecError for one that was not measured."""
        return float(self._rows(metric).baseline.iloc[0])

    def _rows(self, metric: str | None, column: str = "effect") -> pd.DataFrame:
        """The rows of one metric, the first by default. Raises SpecError for one, or a column of numbers, that there is not."""
        metric = self.frame.metric.iloc[0] if metric is None else metric
        for what, name, known in (("metric", metric, self.frame.metric.unique()), ("column", column, COLUMNS)):
            if name not in known:
                do = closest(name, known) or "Choose of these."
                raise SpecError(describe(what, repr(name), ", ".join(map(repr, known)), do))
        return self.frame[self.frame.metric == metric]


@in_step
def ablation_study(
    model: Any,
    data: Any,
    circuits: Sequence[str] | str = CIRCUITS,
    layers: Any = "all",
    heads: Any = "all",
    to: str = "zero",
    metrics: Any = ("loss",),
    *,
    groups: Iterable[Sequence[tuple[str | int, int]]] | None = None,
    reference: Any = None,
    seeds: Sequence[int] = (0,),
    gqa: str = "isolated",
    resume: str | Path | None = None,
    confidence: float = 0.95,
    tokens: int | None = None,
    fast: bool = True,
    progress: bool = True,
) -> Study:
    """Freezes each head's circuits in turn and measures what changes, example by example.

    model: patched or not; cuts that it has stay, and belong to the baseline. data: see `surgery.analysis.batches.batches`; each
      row of a batch is an example. circuits: "qk", "ov", "both" (the whole head). layers, heads, to, reference, gqa: as in
      `Freeze`; "mean" without a reference is the mean over the batch as it is, padding included: where there is some, pass a
      `reference` of `surgery.collect_reference`, which leaves it out. metrics: of `surgery.analysis.metrics`, names of METRICS,
      or callables of the output; those of one name are numbered.
    groups: heads to cut together, each a list of (address or layer, head), in place of one at a time. seeds: of noise and
      resampling, each a row of its own.
    resume: a file that results are appended to as they come; a study that was stopped goes on where it was, and one of another
      model (other weights, or cuts of its own), other data, other cuts or other metrics is refused: what the metrics give
      without cuts is measured each time and compared.
    Over several processes (`surgery.analysis.workers`) forwards are divided; with `resume` each keeps what it did, and what one
      did not get done is done by the next run, of as many processes as there are then.
    tokens: the most in one forward, which bounds memory (see Sweep). fast=False: every forward whole and alone.
    Effects come with intervals and p-values over examples, not over positions, of which only the former are independent.
    Raises SpecError or NoMatchError for selections that do not fit, before anything runs.
    """
    if not isinstance(confidence, float) or not 0 < confidence < 1:
        do = "For example 0.95 for intervals of 95 %."
        raise SpecError(describe("ablation_study: confidence", repr(confidence), "a share between 0 and 1", do))
    reading, given = Reading(metrics), batches(model, data)
    cuts = _cuts(model, circuits, layers, heads, to, groups, reference, seeds, gqa)
    workers = workers_of(model)
    require_same_data(workers, given)
    journal = Journal(resume, {} if resume is None else _about(model, given, reading, cuts), workers)
    notes: list[str] = []
    options = {"tokens": tokens, "fast": fast, "checked": Checked(), "workers": workers}
    is_shown = progress and workers.is_main
    with tqdm(total=len(cuts) * len(given), desc="cutting heads", unit="cut", disable=not is_shown) as bar:
        for number, batch in enumerate(given):
            _measure(model, batch, number, cuts, reading, journal, notes, bar, options)
    journal.close()
    results = [[journal.found[f"{n}/{cut.key}"] for n in range(len(given))] for cut in cuts]
    values = np.array([np.concatenate([np.array(part) for part in parts], axis=1) for parts in results])
    baseline = np.concatenate([np.array(journal.found[f"{n}/"]) for n in range(len(given))], axis=1)
    starts = np.cumsum([0, *map(rows_of, given[:-1])])
    notes += [*_joint(reading, len(given)), *_unreadable(reading, cuts, values, baseline)]
    return Study(_frame(cuts, reading, values, baseline, starts, confidence), cuts, values, baseline, notes)


def cumulative_ablation(
    model: Any, data: Any, order: Sequence[tuple[str | int, int]], circuit: str = "both", **options: Any
) -> Study:
    """Cuts the first head of an order, the first two, and so on: a study whose groups grow. options: of `ablation_study`."""
    groups = [list(order[: count + 1]) for count in range(len(order))]
    return ablation_study(model, data, circuit, groups=groups, **options)


def _measure(
    model: Any,
    batch: Batch,
    number: int,
    cuts: Sequence[Cut],
    reading: Reading,
    journal: Journal,
    notes: list[str],
    bar: Any,
    options: Mapping[str, Any],
) -> None:
    """Runs the cuts that one batch lacks."""
    pending = [cut for cut in cuts if f"{number}/{cut.key}" not in journal.found]
    bar.update(len(cuts) - len(pending))
    sweep = Sweep(model, batch, reading.positions, **options)
    before = reading.read(model, batch, sweep.clean, sweep.clean)
    require_same_results(sweep.workers, before)
    journal.confirm(f"{number}/", before)

    def read(index: int, output: Any) -> list[list[float]]:
        values: list[list[float]] = reading.read(model, batch, output, sweep.clean).tolist()
        journal.add(f"{number}/{pending[index].key}", values)
        bar.update()
        return values

    found = sweep.run([cut.spec for cut in pending], read)
    journal.found |= {f"{number}/{cut.key}": values for cut, values in zip(pending, found, strict=True)}
    bar.update((number + 1) * len(cuts) - bar.n)  # what other processes did
    notes += [note for note in sweep.notes if note not in notes]


def _cuts(
    model: Any, circuits: Any, layers: Any, heads: Any, to: str, groups: Any, reference: Any, seeds: Any, gqa: str
) -> list[Cut]:
    """All cuts of a study in order. Raises SpecError for circuits that do not exist, NoMatchError for heads that do not."""
    anatomy = anatomy_of(model)
    circuits = [circuits] if isinstance(circuits, str) else list(dict.fromkeys(circuits))
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    for what, some, do in (("circuits", circuits, "Choose of 'qk', 'ov', 'both'."), ("seeds", seeds, "For example (0,).")):
        if not some:
            raise SpecError(describe(f"ablation_study: {what}", "none", "at least one", do))
    if unknown := [circuit for circuit in circuits if circuit not in CIRCUITS]:
        hint = "".join(closest(circuit, CIRCUITS) for circuit in unknown)
        raise SpecError(describe("circuits", f"{unknown}", f"of {', '.join(map(repr, CIRCUITS))}", hint or "Choose of these."))
    if groups is None:
        checked = Freeze("qk", layers, heads)  # the same checks as a cut of the same selection
        chosen = anatomy.select(checked.layers, "ablation_study")
        sets = [
            [(a.address, int(head))] for a in chosen for head in (range(a.heads) if checked.heads == "all" else checked.heads)
        ]
    else:
        given = [
            pairs_of(group, "groups", "groups, each of ") for group in (groups if isinstance(groups, Iterable) else [groups])
        ]
        sets = [[(anatomy[address].address, head) for address, head in group] for group in given]
    if not sets:
        raise SpecError(describe("groups", "none", "heads to cut", "Name at least one (address, head)."))
    options = {"to": to, "gqa": gqa, "reference": reference}
    cuts = []
    for circuit in circuits:
        for group in sets:
            for seed in seeds:
                freezes = [Freeze(circuit, [where], numbers, seed=seed, **options) for where, numbers in _by_address(group)]
                cuts.append(Cut(circuit, tuple(group), seed, Spec(freezes)))
    lower(Spec([freeze for cut in cuts for freeze in cut.spec]), anatomy)  # raises for what does not fit the model
    return cuts


def _by_address(group: Sequence[Head]) -> Iterable[tuple[str, list[int]]]:
    found: dict[str, list[int]] = {}
    for address, head in group:
        found.setdefault(address, []).append(head)
    return found.items()


def _joint(reading: Reading, count: int) -> list[str]:
    """Notes on metrics of which there is one number for a whole batch."""
    units = "of one batch there is no interval and no p" if count == 1 else f"intervals and p are over {count} batches"
    names = [metric.name for metric in reading.metrics if metric.name in reading.joint]
    return [f"{name} is one number for a whole batch, not one for each example: {units}" for name in names]


def _unreadable(reading: Reading, cuts: Sequence[Cut], values: np.ndarray, baseline: np.ndarray) -> list[str]:
    """Notes on examples of which a metric gives no finite number, so that rows have no effect."""
    notes = []
    for metric, measured, before in zip(reading.metrics, values.swapaxes(0, 1), baseline, strict=True):
        lost = ~np.isfinite(measured) | ~np.isfinite(before)
        if not lost.any():
            continue
        numbers = ", ".join(map(str, np.flatnonzero(lost.any(0))))
        count = f"{int(lost.any(1).sum())} of {len(cuts)} cuts have no interval"
        when = "without cuts" if not np.isfinite(before).all() else "under some cuts"
        do = "leave them out of the data for numbers of the others"
        notes.append(f"{metric.name} is not a finite number in example {numbers} (from 0), {when}: {count}; {do}")
    return notes


def _frame(
    cuts: Sequence[Cut],
    reading: Reading,
    values: np.ndarray,
    baseline: np.ndarray,
    starts: np.ndarray,
    confidence: float,
) -> pd.DataFrame:
    """starts: the first example of each batch, which stands for all of it where a metric is of the batch."""
    rows = []
    for cut, measured in zip(cuts, values, strict=True):
        is_single = len(cut.heads) == 1
        for metric, of, before in zip(reading.metrics, measured, baseline, strict=True):
            if metric.name in reading.joint:
                of, before = of[starts], before[starts]
            found = paired(of - before, confidence)
            rows.append(
                {
                    "circuit": cut.circuit,
                    "address": cut.heads[0][0] if is_single else cut.label,
                    "head": cut.heads[0][1] if is_single else None,
                    "heads": len(cut.heads),
                    "seed": cut.seed,
                    "metric": metric.name,
                    "unit": metric.unit,
                    "value": of.mean(),
                    "baseline": before.mean(),
                    **vars(found),
                }
            )
    frame = pd.DataFrame(rows)
    frame["p_fdr"] = frame.groupby("metric")["p"].transform(lambda p: corrected(p.to_numpy()))
    return frame


def _about(model: Any, given: Sequence[Batch], reading: Reading, cuts: Sequence[Cut]) -> dict[str, Any]:
    """What must be the same for results to go together. Metrics of one name differ in what they give without cuts."""
    base, _ = cuts_of(model)
    return {
        "model": anatomy_of(model).fingerprint,
        "weights": weights_of(model),
        "cuts of the model": base.fingerprint(),
        "data": digest((f"{n} {name}", batch[name]) for n, batch in enumerate(given) for name in sorted(batch)),
        "metrics": [[metric.name, metric.positions] for metric in reading.metrics],
        "cuts": digest((cut.key, cut.spec.fingerprint()) for cut in cuts),
    }
