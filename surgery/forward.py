"""What a patched module knows of the forward that a thread is in."""

from __future__ import annotations

from typing import Any

from surgery.threads import PerThread
from surgery.where import Where


class Forward(PerThread):
    """What a patched module knows of the forward that a thread is in: where in the sequence, and which points it has reached.

    queries: how many it has; rows: of its inline points, by site; awaited: the points that it must reach; call: of the model,
    with what a cache said of it; is_paged: in continuous batching.
    """

    def __init__(self) -> None:
        self.where = Where()
        self.queries = 0
        self.is_paged = False
        self.rows: dict[str, int] = {}
        self.call: tuple[Any, Any] = (None, None)
        self.reached: set[str] = set()
        self.awaited: set[str] = set()
