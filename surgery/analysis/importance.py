"""Which heads matter, for the price of a few forwards: estimates of what replacing a head's circuit would change.

`head_importance` has them by gradients, and checks the best, and a random sample of the others, by doing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from surgery.analysis.agreement import in_step, require_same_data
from surgery.analysis.atpstar import attribution_star
from surgery.analysis.attribution import Scores, attribution
from surgery.analysis.baselines import CIRCUIT_SITES, Baseline, Selection, baseline_of
from surgery.analysis.batches import Batch, batches
from surgery.analysis.edges import edge_scores
from surgery.analysis.ends import pairs_of
from surgery.analysis.exact import Node, exact_changes
from surgery.analysis.integrated import PATHS, integrated
from surgery.analysis.metrics import Metric
from surgery.analysis.objective import Objective
from surgery.analysis.tables import as_html, as_text
from surgery.analysis.workers import Workers, workers_of
from surgery.errors import SpecError, closest, describe
from surgery.lower import lower
from surgery.patch import anatomy_of, as_spec, cuts_of, patched
from surgery.plots import head_maps, heat_maps, importance_against_exact
from surgery.plots.style import short, with_unit
from surgery.spec import Freeze, Spec

COLUMNS = ("score", "dropped", "magnitude", "exact")
"""Numbers that a head has in a frame."""
METHODS = ("ablation", "atp", "atp*", "ig")
TITLES = {"qk": "QK: where it looks", "q": "q", "k": "k", "ov": "OV: what it moves", "v": "v"}
ENDS = ("sender (layer.head)", "receiver (layer.head)")
CONFIDENCE = 0.95
FLAT = 1e-9
"""Largest score, as a part of the metric, that is no slope but rounding."""


class Importance:
    """What `head_importance` found.

    frame: a row for each head and circuit: address, head, circuit, score (estimated change of the metric's mean), dropped (of
      GradDrop; NaN without), magnitude (by which heads are ranked: the larger of dropped and the score's size), exact (the
      change when it is done; NaN where it was not).
    baseline: the metric without changes, in `unit`; to: what circuits are replaced by, in words. positions: by (address,
      circuit), estimates (head, position) of each position's share, heads in the order of the frame; of circuits of one site,
      by gradients. edges: see `surgery.analysis.edges`.
    forwards, backwards: passes that it took, in whole forwards' worth. sampled: rows that were verified by chance.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        method: str,
        metric: Metric,
        baseline: float,
        positions: Mapping[tuple[str, str], np.ndarray],
    ) -> None:
        self.frame, self.method, self.baseline, self.positions = frame, method, baseline, positions
        self.metric, self.unit, self.to = metric.name, metric.unit, ""
        self.forwards, self.backwards = 0.0, 0.0
        self.sampled: list[int] = []
        self.edges: pd.DataFrame | None = None
        self.notes: list[str] = []

    def top(self, count: int = 10, circuit: str | None = None) -> pd.DataFrame:
        """The rows of largest magnitude, of one circuit or of all. Raises SpecError for a circuit that was not scored."""
        rows = self.frame if circuit is None else self._rows("top", circuit)
        return rows.sort_values("magnitude", ascending=False, kind="stable").head(count)

    def matrix(self, circuit: str, column: str = "score") -> pd.DataFrame:
        """Layers (addresses) × heads of one circuit. column: of COLUMNS. Raises SpecError for what is not there."""
        rows = self._rows("matrix", circuit)
        if column not in COLUMNS:
            do = closest(column, COLUMNS) or "Choose of these."
            raise SpecError(describe("matrix: column", repr(column), ", ".join(map(repr, COLUMNS)), do))
        return rows.pivot(index="address", columns="head", values=column).reindex(rows.address.unique())

    def _rows(self, what: str, circuit: str) -> pd.DataFrame:
        rows = self.frame[self.frame.circuit == circuit]
        if rows.empty:
            do = f"Choose of {', '.join(map(repr, self.frame.circuit.unique()))}."
            raise SpecError(describe(what, repr(circuit), "a circuit that was scored", do))
        return rows

    def edge_matrix(self, name: str) -> pd.DataFrame:
        """Senders × receivers, (address, head) each, of edges into one input: "q", "k" or "v". NaN where there is no way."""
        if self.edges is None or name not in set(self.edges.input):
            found = "no edges" if self.edges is None else repr(name)
            raise SpecError(describe("edge_matrix", found, "edges into q, k or v", "Pass edges=True, and one of these."))
        rows = self.edges[self.edges.input == name]
        order = pd.MultiIndex.from_frame(self.frame[["address", "head"]].drop_duplicates())
        table = rows.pivot(index=["address", "head"], columns=["to_address", "to_head"], values="score")
        return table.reindex(index=order)

    def picture(self, column: str = "score") -> Figure:
        """Heat maps of the scores over layer × head, the circuits side by side. column: of the frame."""
        tables = {circuit: self.matrix(circuit, column) for circuit in self.frame.circuit.unique()}
        what = "change" if column == "exact" or self.method == "ablation" else f"{self._method} estimate of the change"
        return head_maps(
            {TITLES[circuit]: table.to_numpy() for circuit, table in tables.items()},
            layers=list(map(short, next(iter(tables.values())).index)),
            title=f"What replacing a head's circuit would change ({self._method})",
            subtitle=f"{self.metric} as it is {self.baseline:.3g}; replaced {self.to}",
            unit=with_unit(f"{what} of {self.metric}", self.unit),
        )

    def against_exact(self) -> Figure:
        """The estimates against the exact changes of what was verified, a panel for each circuit.

        Raises SpecError where nothing was.
        """
        rows = self.frame.dropna(subset=["exact"])
        if self.method == "ablation" or rows.empty:
            found = "scores that are exact themselves" if self.method == "ablation" else "no exact changes"
            raise SpecError(describe("against_exact", found, "estimates that were verified", "Pass verify_top with a method."))
        return importance_against_exact(
            {c.upper(): rows.score.where(rows.circuit == c).to_numpy() for c in rows.circuit.unique()},
            rows.exact.to_numpy(),
            names=[f"{short(address)}.{head}" for address, head in zip(rows["address"], rows["head"], strict=True)],
            unit=with_unit(f"change of {self.metric}", self.unit),
            title=f"Estimates ({self._method}) against exact changes",
        )

    def edge_picture(self) -> Figure:
        """Heat maps of edges, senders × receivers, a panel for each of q, k and v; grey where there is no way.

        Raises SpecError if there are no edges.
        """
        tables = {n: self.edge_matrix(n) for n in (("q", "k", "v") if self.edges is None else self.edges.input.unique())}
        assert self.edges is not None
        sending = set(zip(self.edges["address"], self.edges["head"], strict=True))
        senders = [head for head in next(iter(tables.values())).index if head in sending]
        receivers = list(dict.fromkeys(head for table in tables.values() for head in table.columns))
        return heat_maps(
            {f"into {n}": table.reindex(index=senders, columns=receivers).to_numpy() for n, table in tables.items()},
            [f"{short(address)}.{head}" for address, head in senders],
            [f"{short(address)}.{head}" for address, head in receivers],
            axes=ENDS,
            unit=with_unit(f"estimated change of {self.metric}", self.unit),
            edges=[i for i in range(1, len(senders)) if senders[i][0] != senders[i - 1][0]],
            title="What passes from head to head, to first order",
            subtitle="grey: no way between the two",
        )

    @property
    def _method(self) -> str:
        return {"atp": "AtP", "atp*": "AtP*", "ig": "integrated gradients", "ablation": "exact"}[self.method]

    @property
    def correlation(self) -> float:
        """Rank correlation (Spearman) of magnitudes with the exact changes' sizes, over what was verified; NaN below three."""
        rows = self.frame.dropna(subset=["exact"])
        return float(stats.spearmanr(rows.magnitude, rows.exact.abs()).statistic) if len(rows) > 2 else float("nan")

    @property
    def missed(self) -> float:
        """The largest exact change, either way, in the random sample of heads that were not among the best; NaN without one."""
        return float(self.frame.exact[self.sampled].abs().max()) if self.sampled else float("nan")

    @property
    def bound(self) -> float:
        """At most this share of the heads that were not among the best change more than `missed`, with 95 % confidence.

        A sample of n in which none is larger than its largest: 1 - 0.05^(1/n). NaN without a sample, 0 if it is all of them.
        """
        if self.sampled and self.frame.exact.notna().all():
            return 0.0
        return 1 - (1 - CONFIDENCE) ** (1 / len(self.sampled)) if self.sampled else float("nan")

    def __repr__(self) -> str:
        lines = [
            f"{self.method} of {self.metric}, {self.baseline:.4g} as it is; "
            f"{self.forwards:.3g} forwards and {self.backwards:.3g} backwards",
            as_text(self.top()),
        ]
        if self.sampled:
            rest = (
                f"at most {self.bound:.0%} of the rest do ({CONFIDENCE:.0%} confidence)" if self.bound else "there are no more"
            )
            lines += [f"of {len(self.sampled)} others, drawn at random, none changes more than {self.missed:.3g};\n{rest}"]
        if self.edges is not None:
            lines.append("edges are to first order, whatever the method; path_patching does one exactly")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return as_html(self.top())


@in_step
def head_importance(
    model: Any,
    clean: Any,
    corrupted: Any = None,
    metric: Any = "loss",
    method: str = "atp",
    *,
    circuits: Sequence[str] | str = ("qk", "ov"),
    to: Any = "corrupted",
    layers: Any = "all",
    heads: Any = "all",
    verify_top: int = 0,
    sample: int = 0,
    given: Any = None,
    edges: bool | Sequence[tuple[str | int, int]] = False,
    steps: int = 8,
    path: str = "layer",
    drop_layers: bool = True,
    seed: int = 0,
    tokens: int | None = None,
) -> Importance:
    """Scores each head's circuits by what replacing them changes in a metric.

    clean, corrupted: one batch of inputs each (see `surgery.analysis.batches.batches`), of equal shapes.
    metric: of `surgery.analysis.metrics`, or a callable of the output; differentiable, except for "ablation". One that is at
      its smallest on the clean inputs, as KL is, has no first order there: "atp" sees nothing, "ig" does.
    method: "ablation" (exact, by the sweep), "atp" (attribution patching: one forward and backward for all heads), "atp*"
      (with the softmax computed again, and GradDrop over layers unless drop_layers=False), "ig" (integrated gradients: `steps`
      passes on each `path`, see `surgery.analysis.integrated`). The first two of the estimates are linear in what a head
      moves: where that is most of what a later norm sees, they miss its size, and even its sign. "ig" shares out what all
      heads of a path change together, exactly: a head's share may differ from what it changes alone.
    circuits: "qk", "q", "k", "ov", "v" (see `surgery.analysis.baselines`). In "atp*", "k" is the sum over keys replaced one
      at a time, all other methods replace a head's keys together.
    to: "corrupted", "zero", "mean" (of the current activations), or a reference or captured run. "mean" is over the whole
      batch, padding included: scores depend on how it was padded; a reference of `surgery.collect_reference` leaves it out.
    verify_top: do it for this many rows of largest magnitude; sample: and for so many others, drawn by `seed`.
    given: cuts that the model has meanwhile, beside its own, on corrupted inputs too: backup heads show only once the heads
      that they stand in for are cut.
    edges: also edge attribution, between all of these heads, or from them to some, each (address or layer, head): a backward
      through half the model for each receiving head's q, k and v. tokens: see `surgery.analysis.sweep.Sweep`.
    Over several processes (`surgery.analysis.workers`) what is done exactly is divided; estimates are made in each.
    Raises SpecError or NoMatchError for what does not fit, before anything runs.
    """
    circuits = [circuits] if isinstance(circuits, str) else list(dict.fromkeys(circuits))
    known_circuits = tuple(CIRCUIT_SITES)
    for what, names, known in (("method", [method], METHODS), ("path", [path], PATHS), ("circuits", circuits, known_circuits)):
        if unknown := [name for name in names if name not in known] or ([] if names else ["none"]):
            hint = closest(unknown[0], known) or "Choose of these."
            raise SpecError(describe(f"head_importance: {what}", f"{unknown}", f"of {', '.join(map(repr, known))}", hint))
    for what, number in (("verify_top", verify_top), ("sample", sample)):
        if not isinstance(number, int) or number < 0:
            do = "0 verifies none, the number of rows all."
            raise SpecError(describe(f"head_importance: {what}", repr(number), "a whole number from 0 on", do))
    inputs, others = _only_batch(model, clean, "clean"), None
    if corrupted is not None:
        others = _only_batch(model, corrupted, "corrupted")
    base, kernel = cuts_of(model)
    cuts, workers = base + as_spec(given), workers_of(model)
    require_same_data(workers, [inputs], [others])
    with patched(model, cuts, kernel=kernel, strict=False):
        chosen = _selection(model, layers, heads)
        receivers = chosen if edges is True else _receivers(model, pairs_of(edges, "edges", "True, or ") if edges else ())
        objective = Objective(model, inputs, metric)
        sites = [CIRCUIT_SITES[circuit] for circuit in circuits] + [("z",)] * bool(edges)
        baseline = baseline_of(objective, to, others, chosen, list(dict.fromkeys(site for some in sites for site in some)))
        nodes = [(address, head, circuit) for address, own in chosen for head in own for circuit in circuits]
        if method == "ablation":
            done = exact_changes(objective, nodes, baseline, tokens, workers)
            rows = [(*node, done.changes[node], np.nan, done.changes[node]) for node in nodes]
            found = Importance(_frame(rows), method, objective.metric, done.start, {})
            found.forwards, found.notes = done.forwards, list(done.notes)
        else:
            found = _estimated(objective, method, chosen, circuits, baseline, steps, path, drop_layers)
            if verify_top or sample:
                found = workers.once(lambda: found)  # one ranking, where processes round otherwise
            _verify(found, objective, baseline, verify_top, sample, seed, tokens, workers)
            found.notes += _doubts(found)
        if edges:
            found.edges = edge_scores(objective, chosen, receivers, baseline)
        found.to = f"by {to}" if isinstance(to, str) else "by a reference"
        found.forwards += objective.forwards
        found.backwards = objective.backwards
    return found


def _estimated(
    objective: Objective,
    method: str,
    chosen: Selection,
    circuits: Sequence[str],
    baseline: Baseline,
    steps: int,
    path: str,
    drop_layers: bool,
) -> Importance:
    drops: Scores = {}
    if method == "atp":
        scores = attribution(objective, chosen, circuits, baseline)
    elif method == "ig":
        scores = integrated(objective, chosen, circuits, baseline, steps, path)
    else:
        scores, drops = attribution_star(objective, chosen, circuits, baseline, drop_layers)

    def total(of: Scores, address: str, circuit: str, index: int) -> float:
        return float(of[address, circuit][:, index].sum()) if of else np.nan

    rows = [
        (address, head, circuit, total(scores, address, circuit, index), total(drops, address, circuit, index), np.nan)
        for address, own in chosen
        for index, head in enumerate(own)
        for circuit in circuits
        if (address, circuit) in scores  # unless the inputs do not come to an attention, of which the engine warns
    ]
    positions = {key: score.sum(0).cpu().numpy() for key, score in scores.items() if len(baseline.sites(key[1])) == 1}
    assert objective.start is not None
    return Importance(_frame(rows), method, objective.metric, objective.start, positions)


def _frame(rows: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    """rows: address, head, circuit, score, dropped, exact."""
    frame = pd.DataFrame(rows, columns=["address", "head", "circuit", "score", "dropped", "exact"])
    frame.insert(5, "magnitude", np.fmax(frame.score.abs(), frame.dropped))
    return frame


def _verify(
    found: Importance,
    objective: Objective,
    baseline: Baseline,
    top: int,
    sample: int,
    seed: int,
    tokens: int | None,
    workers: Workers,
) -> None:
    """Fills in the exact changes of the best rows and of some others."""
    best = found.top(top).index.tolist()
    others = found.frame.index.difference(best).to_numpy()
    found.sampled = sorted(np.random.default_rng(seed).choice(others, min(sample, len(others)), replace=False).tolist())
    if not (chosen := [*best, *found.sampled]):
        return
    rows = found.frame.loc[chosen]
    nodes: list[Node] = list(zip(rows["address"], map(int, rows["head"]), rows["circuit"], strict=True))
    done = exact_changes(objective, nodes, baseline, tokens, workers)
    found.frame.loc[chosen, "exact"] = [done.changes[node] for node in nodes]
    found.forwards, found.notes = done.forwards, list(done.notes)


def _doubts(found: Importance) -> list[str]:
    """What makes estimates unfit to be read as changes, in words."""
    notes = []
    largest = float(found.frame.magnitude.max())
    if largest <= FLAT * (abs(found.baseline) or 1.0):
        notes.append(
            f"{found.metric} has no slope at the clean inputs: these scores are rounding. Use method='ig' or 'ablation', "
            "or a metric that is not at its smallest there."
        )
    rows = found.frame.dropna(subset=["exact"])
    exact, gap = float(rows.exact.abs().max()), float((rows.score - rows.exact).abs().max())
    if len(rows) and gap > exact / 2 > 0:
        worst = rows.loc[(rows.score - rows.exact).abs().idxmax()]
        notes.append(
            f"estimates are far from exact changes here: {worst.score:.3g} for {worst.address} head {worst['head']} "
            f"{worst.circuit}, which changes {worst.exact:.3g}. Read the column exact."
        )
    return notes


def _selection(model: Any, layers: Any, heads: Any) -> Selection:
    """The selected attentions with their heads. Raises SpecError or NoMatchError for what does not exist."""
    checked = Freeze("qk", layers, heads)  # the same checks as a cut of the same selection
    anatomy = anatomy_of(model)
    lower(Spec(checked), anatomy)
    return [
        (a.address, tuple(range(a.heads)) if checked.heads == "all" else tuple(sorted(checked.heads)))
        for a in anatomy.select(checked.layers, "head_importance")
    ]


def _receivers(model: Any, heads: Sequence[tuple[str | int, int]]) -> Selection:
    found: dict[str, set[int]] = {}
    for address, head in heads:
        [(name, _)] = _selection(model, [address], [head])
        found.setdefault(name, set()).add(head)
    return [(address, tuple(sorted(own))) for address, own in found.items()]


def _only_batch(model: Any, data: Any, what: str) -> Batch:
    found = batches(model, data)
    if len(found) != 1:
        do = "Score one after another, or join them into one."
        raise SpecError(describe(f"head_importance: {what}", f"{len(found)} batches", "one", do))
    return found[0]
