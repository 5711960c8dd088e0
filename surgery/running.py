"""Continuous batching that serves a model whose cuts are to change: its pages hold keys and values of the cuts of before."""

from __future__ import annotations

import threading

from torch import nn
from transformers.generation.continuous_batching import ContinuousBatchingManager

from surgery.errors import describe

_KEPT = "_cached_continuous_batching_manager"


def batching_problems(model: nn.Module) -> list[str]:
    """Why the cuts must not change: continuous batching runs the model in a thread, with pages (and on a GPU, graphs).

    What other threads do is not seen here: on Python 3.11, reading another thread's stack is not safe.
    """
    own, problems = set(model.modules()), []
    for thread in threading.enumerate():
        manager = getattr(getattr(thread, "_target", None), "__self__", None)
        if isinstance(manager, ContinuousBatchingManager) and not own.isdisjoint(manager.model.modules()):
            found = f"continuous batching that serves this model in the thread {thread.name!r}"
            expected = "a model that it does not: its pages were filled under the present cuts"
            problems.append(describe("change of cuts", found, expected, "Call manager.stop() first, and start a new one then."))
    return problems


def forget_pages(model: nn.Module) -> None:
    """Lets go of the manager that transformers keeps for the next `generate_batch`, whose pages are of other cuts."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_KEPT), ContinuousBatchingManager):
            module.__dict__[_KEPT].batch_processor = None  # which holds the pages, should somebody start it again
            module.destroy_cached_continuous_batching_manager()  # type: ignore[operator]
