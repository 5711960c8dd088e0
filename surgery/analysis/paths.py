"""Path patching: what one head tells another, and nothing else.

Wang et al. 2022 (https://arxiv.org/abs/2211.00593), Goldowsky-Dill et al. 2023. A sender's corrupted result goes into a
receiver's q, k or v alone, while the rest of the model is as on the clean inputs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from surgery.analysis.agreement import in_step, require_same_data, require_same_results, require_same_run
from surgery.analysis.batches import Batch
from surgery.analysis.ends import LOGITS, SITES, Head, Input, Receiver, receivers_of, senders_of
from surgery.analysis.held import Held
from surgery.analysis.labelled import Labelled
from surgery.analysis.outcome import Patching
from surgery.analysis.pairs import Observed, measured, paired_batches, patch, replacement
from surgery.analysis.reading import Reading
from surgery.analysis.sweep import Checked, Sweep
from surgery.analysis.workers import Workers, workers_of
from surgery.anatomy import Anatomy
from surgery.errors import NoMatchError, NotFiredWarning, SpecError, describe
from surgery.patch import anatomy_of, probed
from surgery.plan import Probe
from surgery.reference import Entry, Reference
from surgery.spec import Edit, Spec


class Kept:
    """A callable edit: the tensor of another run in place of what is at hand."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, x: Tensor) -> Tensor:
        return self.value


@in_step
def path_patching(
    model: Any,
    clean: Any,
    corrupted: Any = None,
    metric: Any = "loss",
    senders: Any = "all",
    receivers: Any = LOGITS,
    to: Any = "corrupted",
    *,
    freeze_mlps: bool = False,
    seed: int = 0,
    tokens: int | None = None,
    fast: bool = True,
    progress: bool = True,
) -> Patching:
    """The metric when a sender's corrupted result reaches one receiver alone, for each sender and receiver.

    clean, corrupted, metric: as of `surgery.analysis.patching.activation_patching`.
    senders: "all" heads, or a list of (layer or address, head). receivers: "logits", (layer or address, head, "q" | "k" | "v"),
      or a list of these, each on its own; a list within the list is patched together. Of grouped heads, k and v are those
      that this query head reads; its neighbours go on with the clean ones.
    to: what becomes of the sender's z, with what follows for its result: as of `activation_patching`.

    Three runs. (1) Both inputs, to see z of every head. (2) The clean inputs, with z of the sender replaced and z of all
    heads of all attentions behind it as in the clean run, so that what changes goes through no other head; MLPs and norms
    between are computed again, as in the paper. freeze_mlps=True holds every linear map of the layers outside attention, too,
    and leaves the residual stream as the only way. (3) The clean inputs with the receiver's q, k or v of (2), all else free.
    For the logits run (2) is the measurement: the direct effect.
    A sender that runs after a receiver, or in the same attention, has no path to it: the value is the clean one, without a run.
    Terms of scores that a family computes from q outside the dot product (relative positions of some encoders) stay clean.
    tokens: the most in one forward (see Sweep), which also bounds how many senders are kept at a time.
    Over several processes (`surgery.analysis.workers`) senders are divided.
    Raises SpecError or NoMatchError for what does not fit, or where layers share an attention.
    """
    reading, anatomy = Reading([metric]), anatomy_of(model)
    chosen = senders_of(senders, anatomy)
    targets = receivers_of(receivers, anatomy)
    to = replacement(to, corrupted)
    parts: list[np.ndarray] = []
    runs: dict[str, list[np.ndarray]] = {"clean": [], "corrupted": []}
    notes: list[str] = []
    ran: set[Head] = set()
    forwards = 0.0
    options, workers = {"tokens": tokens, "fast": fast, "checked": Checked()}, workers_of(model)
    with tqdm(desc="patching paths", unit="path", disable=not (progress and workers.is_main)) as bar:
        pairs = paired_batches(model, clean, corrupted)
        require_same_data(workers, *zip(*pairs, strict=True))
        for mine, theirs in pairs:
            batch = _Paths(model, anatomy, reading, mine, theirs, to, seed, freeze_mlps, options)
            todo = batch.existing(chosen, senders == "all")
            bar.total = (bar.total or 0) + len(todo) * len(targets)
            parts.append(np.full((len(targets), len(chosen), batch.sweep.rows), np.nan))
            for sender, target, values in batch.run(todo, targets, workers, bar):
                parts[-1][targets.index(target), chosen.index(sender)] = values
            runs["clean"].append(batch.clean)
            if batch.corrupted is not None:
                runs["corrupted"].append(batch.corrupted)
            ran.update(todo)
            notes += [note for note in batch.sweep.notes if note not in notes]
            forwards += batch.sweep.forwards + 1 + (theirs is not None)
    values = np.concatenate(parts, axis=-1)
    found = {target.label: _labelled(values[n], chosen, ran, anatomy, reading) for n, target in enumerate(targets)}
    joined = {name: np.concatenate(of) for name, of in runs.items() if of}
    metric = reading.metrics[0]
    return Patching("receiver", found, joined["clean"], joined.get("corrupted"), "clean", metric, notes, forwards)


class _Paths:
    """One pair of batches: what both runs gave, and the runs in between."""

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        reading: Reading,
        mine: Batch,
        theirs: Batch | None,
        to: str | Reference,
        seed: int,
        freeze_mlps: bool,
        options: dict[str, Any],
    ) -> None:
        self.model, self.anatomy, self.reading, self.seed = model, anatomy, reading, seed
        self.held = Held(model, anatomy) if freeze_mlps else None
        with self.held.recording() if self.held is not None else nullcontext():
            self.sweep, self.z = _seen(model, anatomy, mine, reading, options)
        self.order, self.to = list(self.z), to
        self.observed = Observed(mine, self.sweep, None)
        self.clean = measured(model, reading, self.sweep.clean, self.observed)
        self.corrupted: np.ndarray | None = None
        if theirs is not None:
            other, z = _seen(model, anatomy, theirs, reading, options)
            self.corrupted = measured(model, reading, other.clean, self.observed)
            if to == "corrupted":
                entries = {(address, "z"): Entry(value) for address, value in z.items()}
                self.to = Reference("activation", entries, anatomy.fingerprint)

    def existing(self, senders: Sequence[Head], is_all: bool) -> list[Head]:
        """The senders whose attention ran. Raises NoMatchError for one that was asked for and did not."""
        missing = [f"{address} head {head}" for address, head in senders if address not in self.z]
        if missing and not is_all:
            do = "Choose heads of attentions that these inputs run."
            raise NoMatchError(describe("senders", ", ".join(missing), f"heads of {', '.join(self.order)}", do))
        return [sender for sender in senders if sender[0] in self.z]

    def run(
        self, senders: Sequence[Head], receivers: Sequence[Receiver], workers: Workers, bar: Any
    ) -> Iterator[tuple[Head, Receiver, np.ndarray]]:
        """The metric (example,) of each sender and receiver. Senders of one attention go together, as many as fit."""
        require_same_run(workers, self.observed.batch, self.sweep.clean)
        require_same_results(workers, self.clean)
        groups = []
        for address in dict.fromkeys(address for address, _ in senders):
            heads = [head for where, head in senders if where == address]
            groups += [(address, heads[n : n + self.sweep.copies]) for n in range(0, len(heads), self.sweep.copies)]

        def measure(group: tuple[str, list[int]]) -> tuple[list[list[np.ndarray]], float]:
            self.sweep.forwards = 0.0
            found = self._group(*group, receivers)
            bar.update(len(found) * len(receivers))
            return found, self.sweep.forwards

        for address in dict.fromkeys(address for address, _ in groups):
            self._prepare(address, receivers)
        before = self.sweep.forwards
        found = workers.each(groups, measure)
        bar.update(bar.total - bar.n)  # what other processes did
        self.sweep.forwards = before + sum(forwards for _, forwards in found)
        for (address, heads), (values, _) in zip(groups, found, strict=True):
            for head, own in zip(heads, values, strict=True):
                for receiver, value in zip(receivers, own, strict=True):
                    yield (address, head), receiver, value

    def _prepare(self, address: str, receivers: Sequence[Receiver]) -> None:
        """Finds out where the cuts of this sender's runs can be started, before work is divided: the same in each process."""
        later, reached, is_direct = self._reached(address, receivers)
        if any(reached) or is_direct:
            with self.held.holding() if self.held is not None else nullcontext():
                self.sweep.prepare([Spec(Edit("z", "zero", layers=[address, *later]))])
        places = dict.fromkeys(tuple(sorted({i[0] for i in inputs})) for inputs in reached if inputs)
        self.sweep.prepare([Spec(Edit("z", "zero", layers=list(addresses))) for addresses in places])

    def _reached(self, address: str, receivers: Sequence[Receiver]) -> tuple[list[str], list[list[Input]], bool]:
        """The attentions behind a sender's, the inputs of each receiver that are there, and whether any is the logits."""
        later = self.order[self.order.index(address) + 1 :]
        reached = [[i for i in receiver.inputs if i[0] in later] for receiver in receivers]
        return later, reached, any(not receiver.inputs for receiver in receivers)

    def _group(self, address: str, heads: Sequence[int], receivers: Sequence[Receiver]) -> list[list[np.ndarray]]:
        """By sender of one attention and by receiver."""
        later, reached, is_direct = self._reached(address, receivers)
        wanted = {i for inputs in reached for i in inputs}
        direct, told = self._send(address, heads, later, wanted) if wanted or is_direct else ([], {})
        jobs = [(n, r) for n in range(len(heads)) for r, inputs in enumerate(reached) if inputs]
        specs = [self._receive(reached[r], {i: told[n, i] for i in reached[r]}) for n, r in jobs]
        values = dict(zip(jobs, self._measure(specs), strict=True))
        return [
            [values.get((n, r), self.clean) if receiver.inputs else direct[n] for r, receiver in enumerate(receivers)]
            for n in range(len(heads))
        ]

    def _send(
        self, address: str, heads: Sequence[int], later: Sequence[str], wanted: set[Input]
    ) -> tuple[list[np.ndarray], dict[tuple[int, Input], Tensor]]:
        """Run (2) for some senders: the metric of each, and what each made of the receivers' inputs."""
        behind = [Edit("z", Kept(self.z[other]), layers=[other]) for other in later]
        specs = [Spec([patch("z", self.to, address, [head], seed=self.seed), *behind]) for head in heads]
        last: dict[Input, Tensor] = {}
        probes: dict[str, list[Probe]] = {}
        for one in sorted(wanted):
            take = functools.partial(_note, last, one)
            probes.setdefault(one[0], []).append(Probe(SITES[one[2]], (one[1],), take))
        told: dict[tuple[int, Input], Tensor] = {}

        def read(number: int, output: Any) -> np.ndarray:
            for one, tensor in last.items():
                rows = len(self.z[one[0]])  # a forward has all of these senders, or one
                told[number, one] = tensor[number * rows :][:rows] if len(tensor) > rows else tensor
            return measured(self.model, self.reading, output, self.observed)

        with probed(self.model, probes), self.held.holding() if self.held is not None else nullcontext():
            return self.sweep.run(specs, read), told

    def _receive(self, inputs: Sequence[Input], values: dict[Input, Tensor]) -> Spec:
        """Run (3): the receiver's inputs of run (2), all else free."""
        edits = []
        for address, head, what in inputs:
            entry = Entry(values[address, head, what], None, (head,))
            given = Reference("activation", {(address, SITES[what]): entry}, self.anatomy.fingerprint)
            edits.append(patch(SITES[what], given, address, [head]))
        return Spec(edits)

    def _measure(self, specs: Sequence[Spec]) -> list[np.ndarray]:
        read = functools.partial(measured, self.model, self.reading, clean=self.observed)
        return self.sweep.run(specs, lambda _, output: read(output)) if specs else []


def _seen(
    model: Any, anatomy: Anatomy, batch: Batch, reading: Reading, options: dict[str, Any]
) -> tuple[Sweep, dict[str, Tensor]]:
    """One run, and z (batch, head, query, d_head) of every attention that it came to, in that order."""
    found: dict[str, Tensor] = {}

    def take(address: str, z: Tensor, where: Any) -> None:
        if address in found:
            do = "Path patching needs attentions that a forward comes to once."
            raise SpecError(describe("path_patching", f"{address}, which one forward runs several times", "one call", do))
        found[address] = z.detach()

    probes = {a.address: [Probe("z", None, functools.partial(take, a.address))] for a in anatomy}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotFiredWarning)  # which attentions run is what is asked here
        with probed(model, probes):
            return Sweep(model, batch, reading.positions, **options), found


def _note(last: dict[Input, Tensor], one: Input, tensor: Tensor, where: Any) -> None:
    last[one] = tensor.detach()


def _labelled(values: np.ndarray, senders: Sequence[Head], ran: set[Head], anatomy: Anatomy, reading: Reading) -> Labelled:
    """(sender, example) as (layer, head, example) over the attentions and heads that any sender is of that ran."""
    values = values[[number for number, sender in enumerate(senders) if sender in ran]]
    senders = [sender for sender in senders if sender in ran]
    layers = [attention.address for attention in anatomy if any(attention.address == address for address, _ in senders)]
    heads = sorted({head for _, head in senders})
    spread = np.full((len(layers), len(heads), values.shape[-1]), np.nan)
    present = np.zeros((len(layers), len(heads), 1), dtype=bool)
    for number, (address, head) in enumerate(senders):
        place = layers.index(address), heads.index(head)
        spread[place] = values[number]
        present[place] = True
    axes: dict[str, Sequence[Any]] = {"layer": layers, "head": heads, "example": range(values.shape[-1])}
    return Labelled(spread, axes, reading.metrics[0].name, reading.metrics[0].unit, present)
