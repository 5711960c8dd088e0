"""The work that is compared: what is called, over what it is measured, and what it must give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.task import Settings, Task
from benchmarks.comparison.way import Way, log_probability


@dataclass(frozen=True)
class Run:
    """call is timed. read: of what it gave, the tensors that all ways must have alike; (batch, head, ..) of heads."""

    call: Callable[[], Any]
    read: Callable[[Any], list[Tensor]] = lambda found: [found]


@dataclass(frozen=True)
class Work:
    """words: what it is. start: makes a run of a way; contexts that have to be open meanwhile go onto the stack.

    over: the work of the unpatched sdpa model in which costs are counted. heavy: of many forwards. memory: its peak is
    measured, too. cuts: it must change what `over` gives (uncut: in the shape of what it gives itself). held: numbers that the
    results have, for each of batch × length; work that does not fit into memory is left out.
    """

    name: str
    words: str
    start: Callable[[Way, Task, ExitStack], Run]
    over: str = "forward"
    heavy: bool = False
    memory: bool = False
    cuts: bool = False
    uncut: Callable[[list[Tensor], Task], list[Tensor]] = lambda found, task: found
    held: Callable[[Settings], int] = lambda s: 0

    @property
    def is_in_forwards(self) -> bool:
        """Whether it takes many forwards, or none: a ratio near 1 means nothing."""
        return self.words.endswith(", in forwards")


def forward(site: str | None) -> Callable[[Way, Task, ExitStack], Run]:
    def start(way: Way, task: Task, stack: ExitStack) -> Run:
        _cut(way, task, stack, site)
        return Run(lambda: way.logits(task.ids))

    return start


def step(site: str | None) -> Callable[[Way, Task, ExitStack], Run]:
    def start(way: Way, task: Task, stack: ExitStack) -> Run:
        _cut(way, task, stack, site)
        cache = way.cache(task.ids)

        def call() -> Tensor:
            found = way.logits(task.next, cache)
            cache.crop(-1)
            return found

        return Run(call)

    return start


def decode(site: str | None) -> Callable[[Way, Task, ExitStack], Run]:
    def start(way: Way, task: Task, stack: ExitStack) -> Run:
        _cut(way, task, stack, site)
        return Run(lambda: way.generate(task.prompt, task.settings.steps), lambda found: [found])

    return start


def train(site: str | None) -> Callable[[Way, Task, ExitStack], Run]:
    def start(way: Way, task: Task, stack: ExitStack) -> Run:
        _cut(way, task, stack, site, ste=True)
        stack.enter_context(torch.enable_grad())
        embedding = way.model.get_input_embeddings().weight

        def call() -> None:
            way.model.zero_grad()
            task.loss(way.logits(task.ids)).backward()

        return Run(call, lambda found: [embedding.grad.clone()])

    return start


def patterns(of_two: bool) -> Callable[[Way, Task, ExitStack], Run]:
    return lambda way, task, stack: Run(lambda: way.patterns(task.two if of_two else None), list)


def everything(way: Way, task: Task, stack: ExitStack) -> Run:
    return Run(way.everything, way.read_everything)


def sweep(way: Way, task: Task, stack: ExitStack) -> Run:
    with way.cut("z", [0], [0]):  # or say that nothing is cut
        return Run(lambda: way.sweep(task.places))


def importance(way: Way, task: Task, stack: ExitStack) -> Run:
    stack.enter_context(way.for_importance())
    return Run(way.importance)


def install(way: Way, task: Task, stack: ExitStack) -> Run:
    s = task.settings
    fresh = [task.twin(way.implementation) for _ in range(s.rounds + 3)]
    return Run(lambda: way.install(fresh.pop()), lambda found: [])


def _cut(way: Way, task: Task, stack: ExitStack, site: str | None, ste: bool = False) -> None:
    if site is not None:
        stack.enter_context(way.cut(site, task.layers, task.two, ste))


def _uncut_sweep(logits: list[Tensor], task: Task) -> list[Tensor]:
    return [log_probability(logits[0], task).expand(len(task.places), -1)]


def _two(s: Settings) -> int:
    return 2 * s.layers * s.length


def _all(s: Settings) -> int:
    return s.heads * s.layers * s.length


WORKS: Sequence[Work] = (
    Work("forward", "forward", forward(None), memory=True),
    Work("cut_z", "z of two heads cut, every layer", forward("z"), memory=True, cuts=True),
    Work("freeze_qk", "QK of two heads frozen, every layer", forward("q"), memory=True, cuts=True),
    Work("two_patterns", "patterns of two heads, every layer", patterns(True), memory=True, held=_two),
    Work("patterns", "patterns of all heads", patterns(False), memory=True, held=_all),
    Work("everything", "q, k, v, pattern, z of all heads", everything, memory=True, held=_all),
    Work("step", "one token, with a cache", step(None), over="step"),
    Work("step_cut", "one token, z of two heads cut", step("z"), over="step", cuts=True),
    Work("decode", "decoding", decode(None), over="decode", heavy=True),
    Work("decode_cut", "decoding, z of two heads cut", decode("z"), over="decode", heavy=True, cuts=True),
    Work("sweep", "z of every head cut in turn, in forwards", sweep, heavy=True, cuts=True, uncut=_uncut_sweep),
    Work("importance", "attribution of all heads, in forwards", importance),
    Work("train", "forward and backward, unpatched", train(None), over="train"),
    Work("train_cut", "forward and backward, ste cut of z of two heads", train("z"), over="train", cuts=True),
    Work("install", "patch and unpatch (or wrap), in forwards", install),
)
"""In the order of tables."""

ONCE = {"sweep": "gpt2"}
"""What is measured in one family alone: of minutes, and the same in all."""
BY_LENGTH = {
    128: tuple(work.name for work in WORKS),
    1024: ("forward", "cut_z", "freeze_qk", "two_patterns", "patterns", "everything", "step", "step_cut", "train", "train_cut"),
    4096: ("forward", "cut_z", "freeze_qk", "two_patterns", "patterns"),
}
"""What is measured up to a length; longer ones have what the longest has."""


def chosen(s: Settings) -> list[Work]:
    """The works of a shape, in order."""
    key = min((known for known in BY_LENGTH if known >= s.length), default=max(BY_LENGTH))
    return [work for work in WORKS if work.name in BY_LENGTH[key] and ONCE.get(work.name, s.family) == s.family]
