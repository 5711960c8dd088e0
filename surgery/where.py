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
    """A choice of heads along axis 1, taken and put back without index tensors where the heads are neighbours."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)
        first, last = (self.numbers[0], self.numbers[-1] + 1) if self.numbers else (0, 0)
        self.range = (first, last) if self.numbers == tuple(range(first, last)) else None
        self._index = None if self.range else torch.tensor(self.numbers)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        if self.range is not None:
            first, last = self.range
            return x if (first, last) == (0, x.shape[dim]) else x.narrow(dim, first, last - first)
        return x.index_select(dim, self._on(x.device))

    def put(self, x: Tensor, new: Tensor, dim: int = 1) -> Tensor:
        if self.range is not None:
            first, last = self.range
            return new if (first, last) == (0, x.shape[dim]) else torch.slice_scatter(x, new, dim, first, last)
        return x.index_copy(dim, self._on(x.device), new)

    def _on(self, device: torch.device) -> Tensor:
        assert self._index is not None
        if self._index.device != device:
            self._index = self._index.to(device)
        return self._index


def positions_of(x: Tensor, offset: Any) -> Tensor:
    """The absolute positions of a tensor's third axis."""
    return torch.arange(x.shape[2], device=x.device) + offset
