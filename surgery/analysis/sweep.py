"""Many specs on one batch: as if each were patched in and run, in a fraction of the time.

A cut in one layer leaves the layers before it as they are, so a forward starts there (see `surgery.analysis.replay`); several
cuts run as blocks of one batch, each block with cuts of its own (see `surgery.blocks`); logits are computed where they are
read. What comes out is what the plain loop gives, to the rounding of matrix products of other sizes: float32 within 1e-4 of the
largest entry. Before it is relied on, that is checked on every model: without cuts from each layer where cuts begin, with one
from the first of these, on an example of the first batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from surgery.analysis.agreement import require_same, require_same_run
from surgery.analysis.batches import rows_of
from surgery.analysis.kept import Kept
from surgery.analysis.narrow import narrowed, watching
from surgery.analysis.replay import Layers, first_rows, recording, repeated, starting_at
from surgery.analysis.workers import ALONE, Workers
from surgery.blocks import Blocks
from surgery.errors import NotFiredWarning, SpecError, describe
from surgery.evaluation import evaluating, uncached
from surgery.patch import anatomy_of, cuts_of, patched
from surgery.spec import Freeze, Spec
from surgery.taps import runs_on

Result = TypeVar("Result")

LOOP = -1
"""Of a start: a forward of its own for each spec."""
TOKENS = {"cpu": 512, "other": 16384}
"""Tokens in one forward, unless told otherwise: on a CPU more of them leave its caches, a GPU wants to be filled."""
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference between one way and the other, as a part of the largest entry; products of other sizes round otherwise."""
ROUGH = 3e-2
"""The same in half precision."""


@dataclass
class Checked:
    """What was found out about a model.

    starts: by number of a layer's call, and whether outputs have numbers of the whole batch, where cuts that begin there are
    started: there, at 0, or LOOP, one by one. is_narrow: whether modules behind the last attention may compute the kept
    positions alone.
    """

    starts: dict[tuple[int, bool], int] = field(default_factory=dict)
    is_narrow: bool = True


class Sweep:
    """A model's outputs on one batch under many specs.

    model: patched or not; cuts that it has already stay, below those of the specs. positions: whose logits are wanted, None for
    all. tokens: the most in one forward, which bounds memory beside the kept outputs of the layers; at least one copy of the
    batch runs; where an output has numbers of the whole batch (a loss), exactly one. fast=False: the plain loop.
    checked: fills as the sweep finds out; that of another batch of the same model may be given.
    workers: `surgery.analysis.workers.workers_of(model)` divides forwards over the processes of a launcher.
    notes: why, where the plain loop or a whole forward was needed. forwards: whole forwards' worth of layer calls so far.
    Raises SpecError for tokens below 1.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        positions: Sequence[int] | None = None,
        *,
        tokens: int | None = None,
        fast: bool = True,
        checked: Checked | None = None,
        workers: Workers = ALONE,
    ) -> None:
        if tokens is not None and tokens < 1:
            raise SpecError(describe("sweep", f"tokens={tokens}", "1 or more", "Leave it out, and as many as fit are run."))
        self.model, self.rows = model, rows_of(inputs)
        self.inputs, self.positions = uncached(model, inputs), positions
        self.kept = Kept(model, inputs, positions)
        length = max((v.shape[1] for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 1), default=1)
        self.copies = max(1, (tokens or TOKENS.get(runs_on(model).type, TOKENS["other"])) // (self.rows * length))
        self.notes: list[str] = []
        self.forwards = 0.0
        self.base, self.kernel = cuts_of(model)
        self.anatomy = anatomy_of(model)
        with (
            workers.together("the forward without cuts"),
            patched(model, self.base, kernel=self.kernel, strict=False),
            torch.no_grad(),
            evaluating(model),
        ):
            self.layers = Layers(model, self.anatomy)
            with (
                recording(self.layers) as self.recorded,
                watching(model, self.layers, self.anatomy) as watched,
            ):
                self.clean = self._forward(self.inputs)
            self.behind = watched.behind() if positions is not None else ()
        numbers = [leaf for leaf in tree_leaves(self.clean) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self.is_whole = any(not leaf.dim() or len(leaf) != self.rows for leaf in numbers)
        if self.is_whole:
            self.copies = 1
        self.checked = checked or Checked()
        self.is_fast = fast
        self.workers = workers
        require_same_run(workers, inputs, self.clean)

    def run(self, specs: Sequence[Spec], read: Callable[[int, Any], Result]) -> list[Result]:
        """What read(number of the spec, output) gives for each spec, called in the order of the layers where they begin.

        The forward that gave an output is the last that ran, so that what probes saw of it is at hand: in blocks, a block for
        each spec of that forward, in their order.
        The output is the model's, with logits (batch, kept positions, vocabulary). Gradients are off.
        Divided over workers, each process runs a part of the very forwards that one alone would run, and reads these; what was
        read is the same, bit for bit on equal machines, and given to all.
        """
        starts = [self._start(spec) for spec in specs]
        order = sorted(range(len(specs)), key=starts.__getitem__)
        chunks: list[list[int]] = []

        def forward(chunk: list[int]) -> tuple[list[Result], float]:
            self.forwards = 0.0
            outputs = self._outputs([specs[number] for number in chunk], starts[chunk[0]])
            return [read(number, output) for number, output in zip(chunk, outputs, strict=True)], self.forwards

        with (
            self.workers.together("a sweep"),
            torch.no_grad(),
            evaluating(self.model),
            patched(self.model, self.base, kernel=self.kernel, strict=False),
        ):
            while order:  # before any runs, and in every process, so that all go the same way
                chunk = self._chunk(order, starts)
                is_loop = self._start_of(specs[chunk[0]], starts[chunk[0]]) == LOOP
                chunks += [[number] for number in chunk] if is_loop else [chunk]
                del order[: len(chunk)]
            require_same(self.workers, "a sweep", {"specs": specs, "forwards": chunks})
            before = self.forwards
            parts = self.workers.each(chunks, forward)
        self.forwards = before + sum(forwards for _, forwards in parts)
        found: dict[int, Result] = {}
        for chunk, (results, _) in zip(chunks, parts, strict=True):
            found |= dict(zip(chunk, results, strict=True))
        return [found[number] for number in range(len(specs))]

    def prepare(self, specs: Sequence[Spec]) -> None:
        """Finds out, if it is not known, how forwards with cuts where these have theirs are started. `run` does so itself."""
        with torch.no_grad(), evaluating(self.model), patched(self.model, self.base, kernel=self.kernel, strict=False):
            for spec in specs:
                self._start_of(spec, self._start(spec))

    def _addresses(self, spec: Spec) -> list[str]:
        return sorted({attention.address for cut in spec for attention in self.anatomy.select(cut.layers)})

    def _start(self, spec: Spec) -> int:
        """The number of the call of a layer that the first cut is in."""
        addresses = self._addresses(spec)
        return self.layers.first_call(addresses, self.recorded.calls) if addresses else len(self.recorded.calls)

    def _chunk(self, order: Sequence[int], starts: Sequence[int]) -> list[int]:
        """The specs of the next forward; on a CPU those that begin at one layer, elsewhere as many as fit."""
        first = starts[order[0]]
        is_cpu = runs_on(self.model).type == "cpu"
        return [number for number in order[: self.copies] if starts[number] == first or not is_cpu]

    def _outputs(self, specs: list[Spec], first: int) -> Iterator[Any]:
        """The outputs under specs whose first cuts are in one call of a layer, each while no other forward has run since."""
        start = self._start_of(specs[0], first)
        if start == LOOP:
            yield from (self._plain(spec, self.inputs, 1) for spec in specs)
        else:
            output = self._blocks(specs, start, self.rows)
            yield from (_block(output, index, self.rows) for index in range(len(specs)))

    def _start_of(self, spec: Spec, first: int) -> int:
        if not self.is_fast:
            return LOOP
        key = (first, self.is_whole)
        if key not in self.checked.starts:
            self.checked.starts[key] = self._trusted(self._addresses(spec), first)
        return self.checked.starts[key]

    def _plain(self, spec: Spec, inputs: Mapping[str, Any], part: float) -> Any:
        """The slow way: patched and run. part: of the batch that the inputs are."""
        with patched(self.model, self.base + spec, kernel=self.kernel, strict=False):
            self.forwards += part
            return self._forward(inputs)

    def _blocks(self, specs: Sequence[Spec], first: int, rows: int) -> Any:
        """One forward of a copy of the batch, or of its first rows, for each spec, from a call of a layer on."""

        def batch(value: Any) -> Any:
            return repeated(first_rows(value, self.rows, rows), rows, len(specs))

        blocks = Blocks([self.base + spec for spec in specs])
        with (
            warnings.catch_warnings(),
            patched(self.model, blocks, kernel=self.kernel, strict=False),
            starting_at(self.layers, self.recorded, first, batch),
            narrowed(self.behind if self.checked.is_narrow else (), self.positions or ()),
        ):
            if first:
                warnings.simplefilter("ignore", NotFiredWarning)  # of cuts that the model has in layers which do not run
            self.forwards += len(specs) * rows / self.rows * (1 - first / max(1, len(self.recorded.calls)))
            return self._forward(batch(self.inputs))

    def _trusted(self, addresses: Sequence[str], first: int) -> int:
        """Where cuts in a call of a layer can be started: there, at 0, or LOOP; with a note why, if not there."""
        was_narrow = self.checked.is_narrow and bool(self.behind)
        # What costs least first. All examples where something looks at more, such as a reference for the whole batch.
        few = self.rows if self.is_whole else 1
        for start in dict.fromkeys((first, 0)):
            for is_narrow, rows in dict.fromkeys(((was_narrow, few), (False, few), (False, self.rows))):
                self.checked.is_narrow = is_narrow
                try:
                    problem = self._problem(addresses, start, rows)
                except Exception as error:  # of whatever kind a forward raises that does not take copies of its batch
                    problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                if not problem:
                    return start
            self._note(f"from layer call {start}: {problem}")
        self.checked.is_narrow = was_narrow
        return LOOP

    def _problem(self, addresses: Sequence[str], start: int, rows: int) -> str:
        """How a start fails to give what whole forwards of the first rows give, in words; "" if it does.

        That a forward without cuts gives the clean output is seen at every start; that one with cuts gives what it gives alone,
        beside another block, at the first.
        """
        clean, inputs = (first_rows(value, self.rows, rows) for value in (self.clean, self.inputs))
        problem = difference(self._blocks([Spec()], start, rows), clean, rows == self.rows)
        is_known = any(trusted != LOOP for (_, whole), trusted in self.checked.starts.items() if whole == self.is_whole)
        if problem or is_known:
            return problem
        cut = Spec([Freeze("ov", [address]) for address in addresses])
        alone = self._plain(cut, inputs, rows / self.rows)
        if self.is_whole:
            return difference(self._blocks([cut], start, rows), alone, True)
        output = self._blocks([cut, Spec()], start, rows)
        return difference(_block(output, 0, rows), alone) or difference(_block(output, 1, rows), clean)

    def _note(self, text: str) -> None:
        if not self.notes:
            what, do = f"a sweep over a {type(self.model).__name__}", "It is slower, and gives the same numbers."
            warnings.warn(describe(what, text, "what a whole forward gives", do), UserWarning, stacklevel=5)
        self.notes.append(text)

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        output = self.model(**inputs, **self.kept.more)
        logits = self.kept.logits(output)
        if logits is not None and logits is not output.logits:
            output.logits = logits
        return output


def _block(output: Any, index: int, rows: int) -> Any:
    """One copy of the batch in an output of several."""
    count = next(len(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim())

    def take(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count
        return leaf[index * rows : (index + 1) * rows] if is_batch else leaf

    return tree_map(take, output)


def difference(found: Any, expected: Any, with_means: bool = False) -> str:
    """How two outputs differ by more than rounding, in words; "" if they do not.

    with_means: numbers without axes, too, which are means over examples: of as many in both.
    """
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        if not (a.dim() or with_means):
            continue
        if a.shape != b.shape:
            return f"an output of shape {tuple(a.shape)}, not {tuple(b.shape)}"
        gap = float((a.double() - b.double()).abs().nan_to_num().max()) if a.numel() else 0.0
        largest = float(b.double().abs().nan_to_num().max()) if b.numel() else 0.0
        if not torch.equal(a.isnan(), b.isnan()) or gap > CLOSE.get(a.dtype, ROUGH) * max(largest, 1e-12):
            return f"a difference of {gap:.2g} where the largest entry is {largest:.2g}"
    return ""
