"""Going through all heads with the gradients of several tasks formed, a stretch at a time, in buffers that are used again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from surgery.analysis.interference.factors import Block
from surgery.analysis.interference.fisher import Fisher, gradients_in, require_same
from surgery.analysis.interference.gradients import Gradients
from surgery.errors import SpecError, describe

RHO = 1e-3
MEMORY_MIB = 64.0
COPIES = 3
"""Of each gradient in a stretch: itself, what a kernel makes of it, and what squaring takes on the way."""

Factor = tuple[Tensor, Tensor, Tensor]
"""Of a batch: wide in float32, narrow, (sample, 1, 1) by what its gradients are multiplied."""


@dataclass(eq=False)
class Stretch:
    """A part of one head's parameters. gradients: of each task, (sample, parameter) float32; fisher: (parameter,) I + r.

    part: of the last task's gradients, what came through the query head whose number head then is; else these as they are.
    unit: a power of two by which gradients were divided, and √(I + r) too, so that squares of small ones are not lost.
    """

    block: Block
    head: int
    gradients: list[Tensor]
    fisher: Tensor
    part: Tensor
    unit: float


class Walk:
    """Every head's gradients of several tasks, with the reference by which they are divided.

    fisher: a Fisher; Gradients (one or several) whose samples are pooled; None: those of `tasks`. rho: r as a part of I's
    mean over a block. is_unit: each sample's gradient has length one over all blocks. needs_fisher: else I + r is 1.
    memory_mib: of the buffers; at least one row of a head's parameters is formed at a time. device: where that is done.
    query_heads: the gradients of K and V of the last task come apart by query head. Raises SpecError if they were not kept so.
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
        device: Any = "cpu",
        query_heads: bool = False,
        progress: bool = False,
    ) -> None:
        self.tasks, self.rho, self.memory_mib, self.progress = list(tasks), rho, memory_mib, progress
        self.device = _device(device)
        for what, number, why in (
            ("rho", rho, "It keeps small I from deciding all: 1e-3 is usual."),
            ("memory_mib", memory_mib, "It bounds what is formed at a time: 64 is usual."),
        ):
            if not (isinstance(number, int | float) and math.isfinite(number) and number > 0):
                raise SpecError(describe("interference", f"{what}={number!r}", "a finite number above 0", why))
        for name, task in zip("ab", self.tasks, strict=False):
            if not isinstance(task, Gradients):
                raise SpecError(describe(name, f"a {type(task).__name__}", "gradients", "Pass what collect returns."))
        self.fisher = fisher if isinstance(fisher, Fisher) and needs_fisher else None
        self.pool = list(tasks) if fisher is None or not needs_fisher else [] if self.fisher else gradients_in(fisher)
        self.needs_fisher = needs_fisher
        self.every = list({id(task): task for task in (*self.tasks, *self.pool)}.values())
        kept = [self.fisher.about] if self.fisher is not None and self.fisher.about else []
        require_same("interference", *[task.about for task in self.every], *kept)
        self.blocks = _common(self.every)
        if self.fisher is not None:
            _require_fit(self.fisher, self.blocks, is_unit)
        self.scales = {
            id(task): task.norms().reciprocal() if is_unit else torch.ones(len(task), dtype=torch.float64)
            for task in self.every
        }
        self.split = self.tasks[-1] if query_heads else None
        if self.split is not None:
            whole = [block.key for block in self.blocks if block.group > 1 and not self.split.is_split(block)]
            if whole:
                found = f"gradients of {self.split.task!r} by kv head alone ({', '.join(whole[:4])})"
                do = "Collect them with query_heads=True."
                raise SpecError(describe("query_heads", found, "what came through each query head", do))

    @property
    def hypotheses(self) -> list[tuple[str, str, int]]:
        """(address, block, head), in the order of the walk."""
        return [(block.address, block.name, head) for block in self.blocks for head in range(block.heads * self._group(block))]

    def __iter__(self) -> Iterator[Stretch]:
        with tqdm(total=len(self.hypotheses), desc="interference", unit="head", disable=not self.progress) as bar:
            for block in self.blocks:
                unit = self._unit(block)
                factors = {id(task): self._factors(task, block.key, unit) for task in self.every}
                through = self._factors(self.split, block.split_key, unit) if self.split and block.group > 1 else []
                wide = next(iter(factors.values()))[0][0].shape[-1]
                more = self.rho * self._mean(block, wide) / unit**2
                together, step = self._sizes(block, wide)
                group = self._group(block)
                size = together * step * block.narrow
                buffers = {id(task): torch.empty(len(task) * size, device=self.device) for task in self.every}
                spare = torch.empty(len(through) and len(self.tasks[-1]) * step * block.narrow, device=self.device)
                for first in range(0, block.heads, together):
                    heads = range(first, min(first + together, block.heads))
                    for start in range(0, wide, step):
                        rows = slice(start, min(start + step, wide))
                        formed = {key: _formed(some, heads, rows, block, buffers[key]) for key, some in factors.items()}
                        for head in heads:
                            of_head = {key: found[head - first] for key, found in formed.items()}
                            gradients = [of_head[id(task)] for task in self.tasks]
                            fisher = self._reference(block, head, rows, of_head, more, unit)
                            for number in range(head * group, (head + 1) * group):
                                one = range(number, number + 1)
                                part = _formed(through, one, rows, block, spare)[0] if through else gradients[-1]
                                yield Stretch(block, number, gradients, fisher, part, unit)
                    bar.update(len(heads) * group)

    def _group(self, block: Block) -> int:
        """Hypotheses of a head: the query heads that read it, or itself."""
        return 1 if self.split is None else block.group

    def _unit(self, block: Block) -> float:
        """A power of two near the size of what a channel of a block has as its gradient."""
        squares = torch.cat([task.squared_norms(block.key) * self.scales[id(task)].square() for task in self.every])
        mean = float(squares.mean()) / (block.heads * block.narrow)
        return 2.0 ** max(-100, min(round(math.log2(mean) / 2), 100)) if mean > 0 else 1.0

    def _factors(self, task: Gradients, key: str, unit: float) -> list[Factor]:
        scales = (self.scales[id(task)] / unit).float()
        found = []
        for wide, narrow in task.factors(key):
            scale, scales = scales[: len(wide)], scales[len(wide) :]
            found.append((wide.to(self.device).float(), narrow.to(self.device), scale[:, None, None].to(self.device)))
        return found

    def _sizes(self, block: Block, wide: int) -> tuple[int, int]:
        """Heads that are formed together, for products of few channels are slow, and rows of their wide side."""
        samples = sum(len(task) for task in self.every) + (len(self.tasks[-1]) if self.split else 0)
        rows = max(1, int(self.memory_mib * 2**20 / (4 * COPIES * samples * block.narrow)))
        return max(1, min(block.heads, rows // wide)), min(wide, rows)

    def _reference(self, block: Block, head: int, rows: slice, formed: dict[int, Tensor], more: float, unit: float) -> Tensor:
        if not self.needs_fisher:
            return torch.ones((), device=self.device)
        if self.fisher is not None:
            return (self.fisher.part(block.key, head, rows.start, rows.stop).mT.flatten().to(self.device) / unit) / unit + more
        squares = torch.stack([formed[id(task)].square().sum(0) for task in self.pool]).sum(0)
        return squares.div_(sum(len(task) for task in self.pool)).add_(more)

    def _mean(self, block: Block, wide: int) -> float:
        """Of I over a block's parameters, without forming a gradient."""
        if not self.needs_fisher:
            return 0.0
        if self.fisher is not None:
            found = self.fisher.mean(block.key)
        else:
            squares = sum(float(task.squared_norms(block.key) @ self.scales[id(task)].square()) for task in self.pool)
            found = squares / (sum(len(task) for task in self.pool) * wide * block.narrow * block.heads)
        return found if found > 0 else 1.0  # of a block without gradients: anything divides zero


def _formed(factors: list[Factor], heads: range, rows: slice, block: Block, buffer: Tensor) -> list[Tensor]:
    """For each head (sample, parameter): rows of its gradients, in a buffer that holds at least as much."""
    samples, channels = sum(len(wide) for wide, _, _ in factors), slice(heads.start * block.narrow, heads.stop * block.narrow)
    length = rows.stop - rows.start
    found = buffer[: samples * len(heads) * block.narrow * length].view(samples, -1, length)
    done = 0
    for wide, narrow, scale in factors:
        part = narrow[..., channels].float() * scale
        torch.bmm(part.mT, wide[..., rows], out=found[done : done + len(wide)])
        done += len(wide)
    return [found[:, k * block.narrow : (k + 1) * block.narrow].flatten(1) for k in range(len(heads))]


def _device(name: Any) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        found = f"{name!r} ({str(error).splitlines()[0]})"
        raise SpecError(describe("device", found, "a device that can be used", 'Leave it out, or pass "cuda".')) from None


def _require_fit(fisher: Fisher, blocks: Sequence[Block], is_unit: bool) -> None:
    """Raises SpecError for a reference without some of the blocks, and for one of gradients of another length."""
    fisher.require([block.key for block in blocks])
    if fisher.is_unit != is_unit:
        kinds = {True: "gradients of length one", False: "gradients as they are"}
        do = f"Make it with Fisher(is_unit={is_unit})."
        raise SpecError(describe("Fisher", f"a reference of {kinds[fisher.is_unit]}", kinds[is_unit], do))


def _common(tasks: Sequence[Gradients]) -> list[Block]:
    """The blocks of all tasks. Raises SpecError if they are not the same."""
    first, *others = tasks
    for other in others:
        if list(other.blocks) != list(first.blocks):
            differing = sorted(set(first.blocks).symmetric_difference(other.blocks))
            found = f"{', '.join(differing[:4])} in {first.task!r} or {other.task!r} alone"
            raise SpecError(describe("interference", found, "the same blocks of all", "Collect the same layers."))
    return list(first.blocks.values())
