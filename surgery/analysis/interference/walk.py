"""Going through all heads with the gradients of several tasks formed, a stretch at a time, in buffers that are used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from surgery.analysis.interference.factors import Block, squared_norms
from surgery.analysis.interference.fisher import Fisher, gradients_in, require_same
from surgery.analysis.interference.gradients import Gradients
from surgery.errors import SpecError, describe

RHO = 1e-3
MEMORY_MIB = 64.0
COPIES = 3
"""Of each gradient in a stretch: itself, what a kernel makes of it, and what squaring takes on the way."""


@dataclass(eq=False)
class Stretch:
    """A part of one head's parameters. gradients: of each task, (sample, parameter) float32; fisher: (parameter,) I + r."""

    block: Block
    head: int
    gradients: list[Tensor]
    fisher: Tensor


class Walk:
    """Every head's gradients of several tasks, with the reference by which they are divided.

    fisher: a Fisher; Gradients (one or several) whose samples are pooled; None: those of `tasks`. rho: r as a part of I's
    mean over a block. is_unit: each sample's gradient has length one over all blocks. needs_fisher: else I + r is 1.
    memory_mib: of the buffers; at least one channel's parameters are formed at a time.
    """

    def __init__(
        self,
        tasks: Sequence[Gradients],
        fisher: Any = None,
        *,
        rho: float = RHO,
        is_unit: bool = False,
        needs_fisher: bool = True,
        memory_mib: float = MEMORY_MIB,
        pool: int | None = None,
        progress: bool = False,
    ) -> None:
        self.tasks, self.rho, self.memory_mib, self.progress = list(tasks), rho, memory_mib, progress
        if not rho > 0 or not memory_mib > 0:
            found = f"rho={rho}, memory_mib={memory_mib}"
            raise SpecError(describe("interference", found, "positive numbers", "rho keeps small I from deciding all."))
        self.fisher = fisher if isinstance(fisher, Fisher) else None
        self.pool = list(tasks[:pool]) if fisher is None else [] if self.fisher else gradients_in(fisher)
        self.needs_fisher = needs_fisher
        if not needs_fisher:
            self.pool, self.fisher = [], None
        self.every = list({id(task): task for task in (*self.tasks, *self.pool)}.values())
        kept = [self.fisher.about] if self.fisher is not None and self.fisher.about else []
        require_same("interference", *[task.about for task in self.every], *kept)
        self.blocks = _common(self.every)
        self.scales = {id(task): task.norms().reciprocal() if is_unit else torch.ones(len(task)) for task in self.every}

    @property
    def hypotheses(self) -> list[tuple[str, str, int]]:
        """(address, block, head), in the order of the walk."""
        return [(block.address, block.name, head) for block in self.blocks for head in range(block.heads)]

    def __iter__(self) -> Iterator[Stretch]:
        total = len(self.hypotheses)
        with tqdm(total=total, desc="interference", unit="head", disable=not self.progress) as bar:
            for block in self.blocks:
                factors = {
                    id(task): [self._scaled(factor, task, start) for start, factor in _counted(task.factors(block.key))]
                    for task in self.every
                }
                more = self.rho * self._mean(block, factors)
                wide = next(iter(factors.values()))[0][0].shape[-1]
                rows = sum(len(task) for task in self.every)
                step = max(1, min(wide, int(self.memory_mib * 2**20 / (4 * COPIES * rows * block.narrow))))
                buffers = {
                    id(t): torch.empty(len(t), step * block.narrow, device=factors[id(t)][0][0].device) for t in self.every
                }
                for head in range(block.heads):
                    for start in range(0, wide, step):
                        yield self._stretch(block, head, start, min(start + step, wide), factors, buffers, more)
                    bar.update()

    def _stretch(
        self, block: Block, head: int, start: int, stop: int, factors: Any, buffers: dict[int, Tensor], more: float
    ) -> Stretch:
        size = (stop - start) * block.narrow
        formed = {}
        for task in self.every:
            found = buffers[id(task)][:, :size].view(len(task), stop - start, block.narrow)
            row = 0
            for side, narrow in factors[id(task)]:
                part = narrow[..., head * block.narrow : (head + 1) * block.narrow]
                torch.bmm(side[..., start:stop].mT, part, out=found[row : row + len(side)])
                row += len(side)
            formed[id(task)] = found.view(len(task), size)
        return Stretch(
            block, head, [formed[id(task)] for task in self.tasks], self._reference(block, head, start, stop, formed, more)
        )

    def _reference(self, block: Block, head: int, start: int, stop: int, formed: dict[int, Tensor], more: float) -> Tensor:
        any_formed = next(iter(formed.values()))
        if not self.needs_fisher:
            return any_formed.new_ones(())
        if self.fisher is not None:
            return self.fisher.part(block.key, head, start, stop).flatten().to(any_formed.device) + more
        samples = sum(len(task) for task in self.pool)
        total = sum(formed[id(task)].square().sum(0) for task in self.pool)
        assert isinstance(total, Tensor)
        return total / samples + more

    def _mean(self, block: Block, factors: Any) -> float:
        """Of I over a block's parameters, without forming a gradient."""
        if not self.needs_fisher:
            return 0.0
        if self.fisher is not None:
            found = self.fisher.mean(block.key)
        else:
            squares = sum(float(squared_norms(f).sum()) for task in self.pool for f in factors[id(task)])
            wide = factors[id(self.pool[0])][0][0].shape[-1]
            found = squares / (sum(len(task) for task in self.pool) * wide * block.narrow * block.heads)
        return found if found > 0 else 1.0  # of a block without gradients: anything divides zero

    def _scaled(self, factor: tuple[Tensor, Tensor], task: Gradients, start: int) -> tuple[Tensor, Tensor]:
        wide, narrow = factor
        scale = self.scales[id(task)][start : start + len(wide)].to(narrow.device).float()
        return wide.float(), narrow.float() * scale[:, None, None]


def _counted(factors: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Each with the number of its first sample."""
    start = 0
    for factor in factors:
        yield start, factor
        start += len(factor[0])


def _common(tasks: Sequence[Gradients]) -> list[Block]:
    """The blocks of all tasks. Raises SpecError if they are not the same."""
    first, *others = tasks
    for other in others:
        if list(other.blocks) != list(first.blocks):
            differing = sorted(set(first.blocks).symmetric_difference(other.blocks))
            found = f"{', '.join(differing[:4])} in {first.task!r} or {other.task!r} alone"
            raise SpecError(describe("interference", found, "the same blocks of all", "Collect the same layers."))
    return list(first.blocks.values())
