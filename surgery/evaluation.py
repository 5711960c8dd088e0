"""Running a module's forward in evaluation mode, or in training without a trace, whatever mode its owner has it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, put back afterwards: set by hand, for some classes merge weights when `eval()` is called."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Running statistics, which a forward in training moves on, are after the block what they were."""
    own = [(m, name, buffer) for m in module.modules() if m.training for name, buffer in m._buffers.items()]
    kept = [(m, name, buffer, buffer.clone()) for m, name, buffer in own if buffer is not None]
    try:
        yield
    finally:
        for m, name, buffer, numbers in kept:
            with torch.no_grad():
                buffer.copy_(numbers)
            m._buffers[name] = buffer


@contextmanager
def keeping_random(devices: list[torch.device]) -> Iterator[None]:
    """The random numbers of torch (of the CPU and these devices) and of numpy are after the block where they were."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            yield
    finally:
        np.random.set_state(state)
