"""Where a cut acts: positions in the sequence, and a choice of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.sites import SITES


@dataclass
class Where:
    """Where in the sequence a call is. Offsets: absolute position of the first query and of the first key.

    Where one row holds several sequences, offsets are (query,) and (key,): each one's position less its place in the row.
    is_cross: keys are of another sequence than queries.
    filled: number of positions that have keys by now, as a static cache has more room than that; None for all.
    allowed: boolean (batch | 1, head | 1, query, key), which keys a query may attend to; None for all, or not known.
    """

    query_offset: Any = 0
    key_offset: Any = 0
    allowed: Tensor | None = None
    is_cross: bool = False
    filled: Any = None

    def offset(self, site: str) -> Any:
        """The absolute position of a site's first row. At a projection, keys are those of this call's own tokens."""
        if not SITES[site].over_keys:
            return self.query_offset
        return self.key_offset if SITES[site].where == "core" or self.is_cross else self.query_offset

    def of_rows(self, first: int, last: int) -> Where:
        """The same for some rows of the batch."""
        if self.allowed is None or self.allowed.shape[0] == 1:
            return self
        return replace(self, allowed=self.allowed[first:last])

    def of_queries(self, first: int, last: int) -> Where:
        """The same for some of the queries."""
        offset = self.query_offset
        is_packed = isinstance(offset, Tensor) and offset.dim() == 1
        return replace(self, query_offset=(offset[first:last] if is_packed else offset) + first)

    def has_room(self, site: str) -> bool:
        """Whether a site's rows may be those of a cache that is not full yet."""
        return self.filled is not None and SITES[site].over_keys and SITES[site].where == "core"


class Heads:
    """A choice of heads along axis 1: read as a view where they are evenly spaced, as any two are, and by an index otherwise.

    Put back in one piece where they are neighbours; by an index otherwise, which costs less than a slice with steps.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)
        self._slice = _evenly(self.numbers)
        is_piece = self._slice is not None and self._slice.step == 1
        self._index = None if is_piece else _index(self.numbers)
        self._there: Tensor | None = None
        self._last = max(self.numbers, default=-1)

    def are_among(self, count: int) -> bool:
        """Whether so many heads include these: a slice that reaches beyond them would take fewer without a word."""
        return self._last < count

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        if self._slice is None:
            return x.index_select(dim, self._on(x.device))
        return x if self._is_all(x.shape[dim]) else x[(slice(None),) * (dim % x.dim()) + (self._slice,)]

    def put(self, x: Tensor, new: Tensor, dim: int = 1) -> Tensor:
        if self._slice is None or self._index is not None:
            return x.index_copy(dim, self._on(x.device), new)
        if self._is_all(x.shape[dim]):
            return new
        return torch.slice_scatter(x, new, dim, self._slice.start, self._slice.stop)

    def _is_all(self, count: int) -> bool:
        return self._slice == slice(0, count, 1)

    def _on(self, device: torch.device) -> Tensor:
        """The index on a device, and kept there: but not what is no tensor of its own, or of a block that ends."""
        assert self._index is not None
        if self._index.device == device:
            return self._index
        if self._there is not None and self._there.device == device:
            return self._there
        there = self._index.to(device)
        if type(there) is Tensor and not there.is_meta and not torch.is_inference_mode_enabled():
            self._there = there
        return there


def _index(numbers: tuple[int, ...]) -> Tensor:
    """Not a tensor of inference mode, where this may run: gradients may be asked for later."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return torch.tensor(numbers)
    with torch.inference_mode(False):
        return torch.tensor(numbers)


def _evenly(numbers: tuple[int, ...]) -> slice | None:
    """The slice of numbers that rise by equal steps; None for others."""
    first, last = (numbers[0], numbers[-1]) if numbers else (0, -1)
    step = numbers[1] - first if len(numbers) > 1 else 1
    return slice(first, last + 1, step) if step > 0 and numbers == tuple(range(first, last + 1, step)) else None


def positions_of(x: Tensor, offset: Any) -> Tensor:
    """The absolute positions of a tensor's third axis."""
    return torch.arange(x.shape[2], device=x.device) + offset
