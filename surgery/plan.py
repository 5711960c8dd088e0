"""What the modules of a patched model are to do: a plan each, and one session for all of them."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.anatomy import Anatomy
from surgery.errors import SurgeryError, describe
from surgery.interventions import Operation
from surgery.spec import Spec
from surgery.threads import PerThread
from surgery.where import Where

_MARK = "_surgery_mark"


@dataclass
class Probe:
    """A request to see a site: `take(tensor, where)` gets (batch, head, .., ..) of the wanted heads; None for all.

    At k and v, None gives one row per kv head (after cuts at v, per query head, for they may differ then), a choice of heads
    what each of these query heads reads.
    of: the request of the whole model's heads that this one serves, where processes hold a share each.
    """

    site: str
    heads: tuple[int, ...] | None
    take: Callable[[Tensor, Where], None]
    of: Probe | None = None


@dataclass
class Plan:
    """What one module does: operations and probes by site, in spec order. reconstruct: never use a fused kernel."""

    operations: dict[str, list[Operation]] = field(default_factory=dict)
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    reconstruct: bool = False

    @property
    def sites(self) -> set[str]:
        return set(self.operations) | set(self.probes)

    def of(self, site: str) -> list[Operation]:
        return self.operations.get(site, [])

    def only_heads(self, site: str) -> tuple[int, ...] | None:
        """The heads, in this order, that all work at a site is about, along its own axis; None if there is no such choice."""
        chosen = {operation.heads for operation in self.of(site)}
        return chosen.pop() if len(chosen) == 1 and site not in self.probes else None

    def heads_at(self, sites: Iterable[str], heads: int, probes: bool = True) -> tuple[int, ...]:
        """The heads that any operation (and any probe) at these sites concerns."""
        chosen: set[int] = set()
        for site in sites:
            for operation in self.of(site):
                chosen.update(operation.heads)
            for probe in self.probes.get(site, ()) if probes else ():
                chosen.update(range(heads) if probe.heads is None else probe.heads)
        return tuple(sorted(chosen))


class Progress(PerThread):
    """How far a thread is in its present forward of the model.

    forward: the addresses that it has run, and last of them; is_inside: it has not come to its end (or never will, if it
    raised). call: that forward, as long as it may turn out to have left modules out.
    """

    def __init__(self) -> None:
        self.forward: set[str] = set()
        self.last = ""
        self.is_inside = False
        self.call: Any = None


@dataclass
class Session:
    """What the patched modules of one model share: spec, kernel, anatomy, strictness, and which of its cuts have run.

    watch(operation, before, after): sees every operation act, for the self-test. now: the forward of each thread.
    is_cut_off: the module that one of them entered last has not come to its end, or none was entered. owner: the thread that
    has a block open (`patched`, `capture`), which alone may change the cuts.
    """

    spec: Spec = field(default_factory=Spec)
    kernel: str = "auto"
    anatomy: Anatomy | None = None
    planned: frozenset[str] = frozenset()
    strict: bool = True
    runs: dict[str, int] = field(default_factory=dict)
    watch: Callable[[Operation, Tensor, Tensor], None] | None = None
    report: Callable[[Sequence[str]], None] | None = None
    now: Progress = field(default_factory=Progress)
    is_cut_off: bool = True
    owner: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Blocks are open on this model, not on its copy.
        return {**self.__dict__, "anatomy": None, "owner": None}

    def enter(self, address: str) -> None:
        """Counts a run of a module. When one runs again after another, modules that never ran were left out by a forward.

        Again at once says nothing: layers may share a module; nor does again in the very same forward of the model, which
        may go through some of its layers several times. Raises SurgeryError within a callable edit of this model.
        """
        now = self.now
        if (now.is_inside or address in now.forward) and (cut := self.acting_cut()) is not None:
            # It would take the place of what the outer forward knows: positions, and which points it has come to.
            raise SurgeryError(
                describe(
                    f"cut {cut.number} at {cut.address} {cut.site}",
                    f"a callable that runs the model which it cuts (its forward came to {address})",
                    "one that computes from the tensor it is given: the inner forward would be cut, too",
                    "Run the model before and let the callable use what you keep of it, or run copy.deepcopy(model).",
                )
            )
        if now.is_inside:
            now.forward.clear()  # an exception ended the forward before: it says nothing of the modules that it left out
        self.runs[address] = self.runs.get(address, 0) + 1
        may_be_silent = self.report is not None and not self.planned <= self.runs.keys()
        here = outermost_call() if may_be_silent and (not now.forward or address in now.forward) else None
        if address in now.forward and address != now.last and (here is None or here is not now.call):
            now.forward.clear()
            silent = sorted(self.planned - set(self.runs))
            report, self.report = self.report, None
            if silent and report is not None:
                report(silent)
        if not now.forward:
            now.call = here
        if not may_be_silent:
            now.call = None
        now.forward.add(address)
        now.last = address
        now.is_inside = self.is_cut_off = True

    def acting_cut(self) -> Operation | None:
        """The cut of this model within which this is called, by a callable; None if there is none."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            inner, frame = frame, frame.f_back
            if frame is None or inner.f_code is not Operation.apply.__code__:
                continue
            if getattr(frame.f_locals.get("self"), "session", None) is self:
                cut: Operation = inner.f_locals["self"]
                return cut
        return None

    def leave(self) -> None:
        """Ends what `enter` began."""
        self.now.is_inside = self.is_cut_off = False

    @property
    def never_ran(self) -> list[str]:
        """Addresses with cuts or captures that never ran although others did."""
        return [] if self.is_cut_off else sorted(self.planned - set(self.runs))


class _Mark:
    """Lies in the keyword arguments of a call, which have been handed on by then, and goes with them."""


def _mark_of(frame: types.FrameType) -> Any:
    kwargs = frame.f_locals["kwargs"]
    return weakref.ref(kwargs.setdefault(_MARK, _Mark()))


def outermost_call() -> Any:
    """An object that only the present call of the outermost module has, and that keeps nothing of it alive."""
    return next((_mark_of(frame) for frame in reversed(list(_calls()))), None)


def model_call() -> Any:
    """The same of the innermost model of transformers; None if there is none: another module may make many steps in a call."""
    models = (frame for frame in _calls() if isinstance(frame.f_locals["self"], PreTrainedModel))
    found = next(models, None)
    return None if found is None else _mark_of(found)


def _calls() -> Iterator[types.FrameType]:
    """The calls of modules that are going on, the innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module.__call__.__code__:
            yield frame
        frame = frame.f_back
