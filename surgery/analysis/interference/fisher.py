"""The Fisher reference I: the mean of squared per-sample gradients, by which a parameter's own steepness is divided out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.analysis.interference.factors import weight_gradient
from surgery.analysis.interference.files import read_about, read_tensors, write_tensors
from surgery.analysis.interference.gradients import Gradients
from surgery.errors import SpecError, describe

KIND = "a Fisher reference"


class Fisher:
    """A mean of squared gradients that fills as samples come, kept whole: as many numbers as the blocks have weights.

    beta: None for the plain mean of all samples; else in (0, 1): a moving average, corrected for its beginning, in which the
      k-th of n samples has the weight (1 − β) β^(n−1−k) / (1 − βⁿ): it depends on their order, not on how they are batched.
    is_unit: of gradients of length one over all blocks, as tests and heatmap(is_unit=True) take them.
    Empirical Fisher: squares of the gradients of the true targets' loss (Kunstner et al. 2019 say what that is not).
    """

    def __init__(self, beta: float | None = None, *, is_unit: bool = False) -> None:
        if beta is not None and not 0 < beta < 1:
            raise SpecError(describe("Fisher", f"beta={beta}", "a number between 0 and 1, or None", "For example 0.99."))
        self.beta, self.is_unit, self.count = beta, is_unit, 0
        self.about: dict[str, Any] | None = None
        self._sums: dict[str, Tensor] = {}

    def update(self, gradients: Gradients) -> Fisher:
        """Takes in samples, in their order. Raises SpecError for those of another model, loss or other layers."""
        if not isinstance(gradients, Gradients):
            raise SpecError(describe("Fisher", f"a {type(gradients).__name__}", "gradients", "Pass what collect returns."))
        if self.about is None:
            self.about = dict(gradients.about)
        require_same("Fisher", self.about, gradients.about)
        if self._sums and list(self._sums) != list(gradients.blocks):
            given = f"gradients of {', '.join(list(gradients.blocks)[:4])}, ..."
            do = "Collect the same layers, or make a reference for each."
            raise SpecError(describe("Fisher", given, f"those of {', '.join(list(self._sums)[:4])}, ...", do))
        scales = gradients.norms().square().reciprocal() if self.is_unit else torch.ones(len(gradients), dtype=torch.float64)
        if self.beta is not None:
            scales = scales * (1 - self.beta) * self.beta ** torch.arange(len(gradients) - 1, -1, -1, dtype=torch.float64)
        for key, block in gradients.blocks.items():
            for head in range(block.heads):
                done = 0
                for factor in gradients.factors(key):
                    squares = weight_gradient(factor, block, head).square_()
                    found = torch.einsum("n,npc->pc", scales[done : done + len(squares)].float(), squares)
                    if key not in self._sums:
                        self._sums[key] = found.new_zeros(block.heads, *found.shape)
                    if done == 0 and self.beta is not None:
                        self._sums[key][head] *= self.beta ** len(gradients)
                    self._sums[key][head] += found
                    done += len(squares)
        self.count += len(gradients)
        return self

    def require(self, keys: Iterable[str]) -> None:
        """Raises SpecError for blocks that no sample had."""
        if missing := [key for key in keys if key not in self._sums]:
            found = f"no samples of {', '.join(missing[:4])}" if self.count else "no samples yet"
            do = "Update it with gradients of these layers."
            raise SpecError(describe("Fisher", found, "a reference for every block", do))

    def part(self, key: str, head: int, start: int, stop: int) -> Tensor:
        """(wide, channel) of a head, a stretch of its wide side. Raises SpecError for what no sample had."""
        return self._sum(key)[head, start:stop] / self._weight

    def mean(self, key: str) -> float:
        """Over all parameters of a block."""
        return float(self._sum(key).double().mean()) / self._weight

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        write_tensors(
            path, KIND, {"beta": self.beta, "is_unit": self.is_unit, "count": self.count, "about": self.about}, self._sums
        )

    @classmethod
    def load(cls, path: str | Path) -> Fisher:
        """What `save` wrote. Raises SpecError for another file."""
        known = read_about(path, KIND)
        found = cls(known["beta"], is_unit=known["is_unit"])
        found.count, found.about, found._sums = known["count"], known["about"], read_tensors(path)
        return found

    @property
    def _weight(self) -> float:
        return float(self.count) if self.beta is None else 1 - self.beta**self.count

    def _sum(self, key: str) -> Tensor:
        self.require([key])
        return self._sums[key]

    def __repr__(self) -> str:
        kind = "mean" if self.beta is None else f"moving average, beta {self.beta}"
        return f"Fisher ({kind}) of {self.count} samples, {len(self._sums)} blocks"


def require_same(what: str, *abouts: Any) -> None:
    """Raises SpecError for gradients that do not belong together, naming all that differs."""
    first, *others = abouts
    for other in others:
        if other != first:
            keys = [key for key in first if first[key] != other.get(key)]
            found, expected = ("; ".join(f"{key}: {about.get(key)!r}" for key in keys) for about in (other, first))
            do = "Collect all tasks on one model, under the same cuts and by the same loss."
            raise SpecError(describe(what, f"gradients with {found}", expected, do))


def gradients_in(pool: Any) -> list[Gradients]:
    """The gradients of a reference that is a pool of samples."""
    found = [pool] if isinstance(pool, Gradients) else list(pool) if isinstance(pool, Iterable) else []
    if not found or not all(isinstance(one, Gradients) for one in found):
        expected = "a Fisher, Gradients, several of these, or None for those of the tasks"
        raise SpecError(describe("fisher", f"a {type(pool).__name__}", expected, "Pass one of these."))
    return found
