"""Running a module's forward without a trace: in evaluation mode or its own, on its live parts, before its owner's eyes."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


def uncached(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a forward that keeps no KV cache, unless they say otherwise."""
    takes = "use_cache" in inspect.signature(module.forward).parameters
    return {**({"use_cache": False} if takes else {}), **inputs}


@contextmanager
def keeping_state(module: nn.Module) -> Iterator[None]:
    """Attributes of all parts, what their lists and dictionaries hold, and numbers in buffers are after the block as before.

    In any mode: a forward may count its calls, keep a log, or fit positional angles to the longest sequence that it has seen.
    """
    containers: dict[int, tuple[Any, Any]] = {}
    for part in module.modules():
        _collect(part.__dict__, containers)
    own = {id(b): b for part in module.modules() for b in part._buffers.values() if b is not None and not b.is_meta}
    buffers = [(buffer, buffer.clone()) for buffer in own.values()]
    try:
        yield
    finally:
        for container, kept in containers.values():
            _put_back(container, kept)
        for buffer, numbers in buffers:
            # A copy where nothing has changed would show in autograd, as a change made in place.
            if not torch.equal(buffer, numbers):
                with torch.no_grad():
                    buffer.copy_(numbers)


_MAPPINGS, _OTHERS = (dict, OrderedDict, defaultdict), (list, set, deque)


def _collect(value: Any, containers: dict[int, tuple[Any, Any]]) -> None:
    """Every container in a value with a copy of it, by its identity."""
    if type(value) in (*_MAPPINGS, *_OTHERS) and id(value) not in containers:
        containers[id(value)] = value, copy.copy(value)
        for part in value.values() if type(value) in _MAPPINGS else value:
            _collect(part, containers)


def _put_back(container: Any, kept: Any) -> None:
    now, then = ([*c.items()] if type(c) in _MAPPINGS else [*c] for c in (container, kept))
    flat_now, flat_then = (list(itertools.chain(*c)) if type(container) in _MAPPINGS else c for c in (now, then))
    if len(now) == len(then) and all(a is b for a, b in zip(flat_now, flat_then, strict=True)):
        return
    container.clear()
    (container.extend if type(container) in (list, deque) else container.update)(kept)


@contextmanager
def keeping_random(devices: list[torch.device]) -> Iterator[None]:
    """The random numbers of torch (of the CPU and these devices), numpy and Python are after the block where they were."""
    states = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


def accelerators(device: torch.device) -> list[torch.device]:
    """The device, if it has random numbers of its own."""
    return [] if device.type in ("cpu", "meta") else [device]
