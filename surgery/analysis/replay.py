"""A forward that starts in the middle: layers before a cut give again what they gave without it.

The layers are the modules of a model's module lists that hold attention, in the order in which a forward calls them. A
recorded forward keeps their outputs; a replay lets the calls before a given one return these, and runs all else: so whatever
a family computes around its layers is its own code, with its own masks, positions and head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.anatomy import Anatomy


class Layers:
    """The layers of a model that hold attention, by the outermost module list that each attention is in."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.modules: list[nn.Module] = []
        self._of: dict[str, list[nn.Module]] = {}
        for attention in anatomy:
            found = [_layer(model, path) for path in attention.paths]
            known = [module for module in found if module is not None]
            self._of[attention.address] = known if len(known) == len(found) else []
            self.modules += [module for module in known if not any(module is other for other in self.modules)]

    def first_call(self, addresses: Collection[str], calls: list[nn.Module]) -> int:
        """The number of the first of these calls that runs one of the attentions; 0 if that is not known."""
        if not all(self._of[address] for address in addresses):
            return 0
        modules = [module for address in addresses for module in self._of[address]]
        numbers = [number for number, called in enumerate(calls) if any(called is module for module in modules)]
        return min(numbers, default=0)


class Recorded:
    """The calls of layers in one forward, in order, each with what it returned."""

    def __init__(self) -> None:
        self.calls: list[nn.Module] = []
        self.outputs: list[Any] = []


@contextmanager
def recording(layers: Layers) -> Iterator[Recorded]:
    """Within the block, a forward's calls of layers are recorded; outputs are kept as they are, not copied."""
    recorded = Recorded()

    def record(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        recorded.calls.append(module)
        recorded.outputs.append(output)
        return output

    with around(layers.modules, record):
        yield recorded


@contextmanager
def starting_at(layers: Layers, recorded: Recorded, first: int, batch: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block, one forward's calls of layers before number `first` return what was recorded.

    batch: gives, of what was recorded, that of the forward's batch: see `repeated` and `first_rows`.
    """
    count = 0

    def replay(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > first:
            return forward(*args, **kwargs)
        return batch(recorded.outputs[count - 1])

    with around(layers.modules, replay):
        yield


def repeated(value: Any, rows: int, copies: int) -> Any:
    """Inputs or outputs of a batch of several copies, one after another."""
    return value if copies == 1 else _of_batch(value, rows, lambda leaf: leaf.repeat(copies, *[1] * (leaf.dim() - 1)))


def first_rows(value: Any, rows: int, count: int) -> Any:
    """Inputs or outputs of the first examples of a batch."""
    return value if rows == count else _of_batch(value, rows, lambda leaf: leaf[:count])


def _of_batch(value: Any, rows: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Changes every tensor that has the batch as its first axis."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else leaf, value)


@contextmanager
def around(modules: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Within the block, a module's forward is call(module, its forward, args, kwargs)."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = _wrapped(module, module.forward, call)
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def _wrapped(module: nn.Module, forward: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(module, forward, args, kwargs)


def _layer(model: nn.Module, path: str) -> nn.Module | None:
    """The entry of the outermost module list on the way to a module; None if there is no list."""
    module, parts = model, path.split(".")
    for number, part in enumerate(parts):
        parent, module = module, module.get_submodule(part)
        if isinstance(parent, nn.ModuleList):
            return module if number < len(parts) - 1 else None
    return None
