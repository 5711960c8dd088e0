"""How analyses run a model: without a KV cache, each forward with the same random numbers, its own attention kernel kept."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from surgery.evaluation import accelerators, keeping_random
from surgery.patch import session_of
from surgery.taps import runs_on


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The output for a batch, no cache made unless the inputs ask for one; random numbers afterwards where they were."""
    with repeatable(model):
        return model(**uncached(model, inputs))


def uncached(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, with no KV cache to be made of them where the model would make one."""
    may_cache = "use_cache" in inspect.signature(model.forward).parameters and "use_cache" not in inputs
    return {**inputs, **({"use_cache": False} if may_cache else {})}


def repeatable(model: nn.Module) -> AbstractContextManager[None]:
    """Random numbers are after the block where they were: a second one draws the same, and shows the cut alone."""
    return keeping_random(accelerators(runs_on(model)))


def kernel_of(model: nn.Module) -> Any:
    """The kernel= that a model was patched with; "auto" if it is not patched."""
    session = session_of(model)
    return "auto" if session is None else session.kernel
