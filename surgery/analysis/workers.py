"""Work divided over the processes of a launcher (`torchrun`, `accelerate launch`): each does a part, all get everything.

Every process has the whole model and makes the same calls on the same data. A model that the processes share (its heads or its
weights are spread over them, or its forwards keep them in step) needs all of them in every forward: there nothing is divided,
all do the same, and what is kept on disk is written by the main process alone. A single process imports nothing for this;
several need accelerate only where work is divided.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from surgery.errors import SurgeryError, describe
from surgery.launcher import started
from surgery.shares import is_shared

Item = TypeVar("Item")
Result = TypeVar("Result")

WAIT = timedelta(days=2)
"""How long a process waits for the slowest; one that died is noticed by the launcher, which ends the others.

Of a process group that is begun here. One that was begun before, by the caller or a model that is shared, has the timeout that
it was begun with (torch: 10 minutes with NCCL, 30 with Gloo): `init_process_group(timeout=...)` sets a longer one.
"""
TOLD = "_told_to_all"
"""Of an exception: all processes know of it, and none waits for this one."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Workers:
    """number: of this process, from 0. count: of all. is_divided: each does a part of the work; else all do all of it."""

    number: int = 0
    count: int = 1
    is_divided: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and draws progress bars."""
        return self.number == 0

    def each(self, items: Sequence[Item], do: Callable[[Item], Result]) -> list[Result]:
        """What `do` gives for each item, in their order; divided, each process does every count-th.

        What one process raises, it raises there; the others raise SurgeryError with its message.
        """
        if not self.is_divided:
            return [do(item) for item in items]
        # Dealt like cards: neighbours cost about the same, so that each process has as much to do.
        dealt = [number for first in range(self.count) for number in range(first, len(items), self.count)]
        found: dict[int, Result] = {}
        with self._telling(), _state().split_between_processes(dealt) as own:
            found.update({number: do(items[number]) for number in own})
        parts = self._gather("results", (len(items), found))
        if len({length for length, _ in parts}) > 1:
            raise _differ("the work", [f"{length} items" for length, _ in parts])
        merged = {number: result for _, part in parts for number, result in part.items()}
        return [merged[number] for number in range(len(items))]

    def once(self, do: Callable[[], Result]) -> Result:
        """What `do` gives in the main process, in all of them. What it raises, all raise as in `each`."""
        if self.count == 1:
            return do()
        found: list[Any] = [None]
        with self._telling():
            if self.is_main:
                found[0] = do()
        self._gather("what the main process does", None)
        distributed.broadcast_object_list(found)
        return found[0]

    def agree(self, what: str, value: Any, same: Callable[[Any, Any], bool] = operator.eq) -> None:
        """Raises SurgeryError, in all processes, unless each has the same plain data; of mappings it shows what differs."""
        if self.count == 1:
            return
        values = self._gather(what, value)
        if all(same(one, values[0]) for one in values):
            return
        if all(isinstance(one, Mapping) for one in values):
            names = dict.fromkeys(name for one in values for name in one)
            differ = [n for n in names if any(one.get(n) != values[0].get(n) for one in values)]
            values = [{name: one.get(name) for name in differ} for one in values]
        raise _differ(what, values)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Divided work that all begin and end together: what one process raises in the block, the others raise as in `each`.

        They do so where they next wait for results, and stay in step when that is caught. May be nested.
        """
        if not self.is_divided:
            yield
            return
        with self._telling():
            yield
            self._gather(f"the end of {what}", None)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tells the others what is raised here, in place of what they wait for, once."""
        try:
            yield
        except Exception as error:
            if not hasattr(error, TOLD):
                setattr(error, TOLD, True)
                self._exchange((None, f"{type(error).__name__}: {error}"))
            raise

    def _gather(self, what: str, value: Any) -> list[Any]:
        """By process. Raises SurgeryError, in all, if one failed or waits for something else."""
        parts = self._exchange((what, value))
        for number, (purpose, failure) in enumerate(parts):
            if purpose is None:
                do = "Mend what failed there; with `resume` what was done is not lost."
                raise _told(SurgeryError(describe(f"process {number} of {self.count}", failure, "its part of the work", do)))
        if len({purpose for purpose, _ in parts}) > 1:
            raise _differ("what is waited for", [purpose for purpose, _ in parts])
        return [value for _, value in parts]

    def _exchange(self, value: Any) -> list[Any]:
        if not distributed.is_initialized():
            _state()
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found


ALONE = Workers()


@contextmanager
def alone() -> Iterator[None]:
    """For the length of the block this process works by itself: others need not make the same calls, nor on the same data."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def workers_of(model: nn.Module) -> Workers:
    """The processes that work on a model is divided over: all of the launcher's, or ALONE.

    Raises SurgeryError where there are several processes and accelerate is missing, or does not see them.
    """
    is_single = _alone.get() or processes() == 1
    return launched() if is_single or not is_shared(model) else Workers(distributed.get_rank(), distributed.get_world_size())


def launched() -> Workers:
    """The processes of the launcher, for work on a model that each of them has, or ALONE. Raises as `workers_of`."""
    if _alone.get() or processes() == 1:
        return ALONE
    state = _state()
    return Workers(state.process_index, state.num_processes, is_divided=True)


def processes() -> int:
    """How many a launcher started, or are in the process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return started()


def _state() -> Any:
    """accelerate's state of the processes, which begins the process group if nobody has."""
    what, count = "work over several processes", processes()
    stay = "or do this inside `with surgery.analysis.workers.alone():` in each process that is to do all of it."
    try:
        from accelerate import PartialState
    except ImportError:
        do = f"pip install 'attention-surgery[distributed]', {stay}"
        raise SurgeryError(describe(what, f"{count} processes and no accelerate", "accelerate, which divides it", do)) from None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_cpu = accelerator is None or accelerator.type == "mps"  # MPS is one device, and has no process groups
    is_cpu |= os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    begun = distributed.is_available() and distributed.is_initialized()
    state = PartialState(cpu=is_cpu, **({} if begun or PartialState._shared_state else {"timeout": WAIT}))
    if state.num_processes != count:
        found = f"{count} processes, of which accelerate's PartialState sees {state.num_processes}"
        do = f"Start them with torchrun or accelerate launch, make no PartialState before, on CPUs with cpu=True, {stay}"
        raise SurgeryError(describe(what, found, "as many in both", do))
    return state


def _told(error: SurgeryError) -> SurgeryError:
    setattr(error, TOLD, True)
    return error


def _differ(what: str, values: Sequence[Any]) -> SurgeryError:
    shown = "; ".join(f"process {number}: {value!r}" for number, value in enumerate(values))
    do = "Make the same call everywhere, or one of each process's own inside `with surgery.analysis.workers.alone():`."
    return _told(SurgeryError(describe(f"{what}, over {len(values)} processes", shown, "the same in all", do)))
