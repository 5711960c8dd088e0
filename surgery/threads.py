"""What belongs to one thread, and what all of them share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Maker = TypeVar("Maker", bound=Callable[..., Any])

CHANGES = threading.RLock()
"""Held while a model is patched, unpatched or brought back: what is checked then still holds when it is done."""
BORROWED = threading.RLock()
"""Held while an attention is recorded or compared: what that draws of the random numbers of all threads, it puts back."""


class PerThread(threading.local):
    """Attributes of which each thread has its own, as `__init__` makes them; copies and pickles come out new."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def made_once(make: Maker) -> Maker:
    """As functools.cache, which under threads may make a thing twice and give two of them: here everyone gets the same one."""
    cached, lock = functools.cache(make), threading.RLock()

    @functools.wraps(make)
    def made(*args: Any) -> Any:
        with lock:
            return cached(*args)

    return made  # type: ignore[return-value]
