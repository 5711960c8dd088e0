"""How analyses run a model: without a KV cache, each forward with the same random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from surgery.evaluation import accelerators, keeping_random, uncached
from surgery.taps import runs_on


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The output for a batch, no cache made unless the inputs ask for one; random numbers afterwards where they were."""
    with repeatable(model):
        return model(**uncached(model, inputs))


def repeatable(model: nn.Module) -> AbstractContextManager[None]:
    """Random numbers are after the block where they were: a second one draws the same, and shows the cut alone."""
    return keeping_random(accelerators(runs_on(model)))
