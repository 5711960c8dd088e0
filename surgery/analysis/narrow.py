"""What is behind the last attention, on the positions that are read alone: nothing there looks at another position.

Maps of a decoder's last layer (its MLP, its experts) are most of that layer. Which modules these are is watched in a forward;
that they treat each position by itself is not assumed: elsewhere they then give NaN, so that whatever reads more shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.analysis.replay import Layers, around
from surgery.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class _Call:
    """sample: where the module maps tensors (rows, position, feature) to such a one, one position of one row; else None."""

    module: nn.Module
    is_attention: bool
    sample: tuple[Tensor, ...] | None
    length: int = 0


class Watched:
    """The modules that layers call in a forward, attention or else, in their order."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def behind(self) -> tuple[nn.Module, ...]:
        """The modules with matrices that are called once, on such tensors alone, when no attention follows."""
        last = max((number for number, call in enumerate(self.calls) if call.is_attention), default=len(self.calls))
        counts = Counter(id(call.module) for call in self.calls)
        found = [call for call in self.calls[last + 1 :] if counts[id(call.module)] == 1]
        return tuple(c.module for c in found if any(p.dim() > 1 for p in c.module.parameters()) and _is_apart(c))


@contextmanager
def watching(model: nn.Module, layers: Layers, anatomy: Anatomy) -> Iterator[Watched]:
    """Within the block, one forward is watched."""
    attention = {id(model.get_submodule(path)) for found in anatomy for path in found.paths}
    watched = Watched()

    def watch(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        shapes = {t.shape[:2] if isinstance(t, Tensor) and t.dim() == 3 else None for t in (*args, output)}
        fits = bool(args) and not kwargs and len(shapes) == 1 and next(iter(shapes), None) is not None
        sample = tuple(arg[:1, :1].detach() for arg in args) if fits else None
        watched.calls.append(_Call(module, id(module) in attention, sample, args[0].shape[1] if fits else 0))
        return output

    with around([part for layer in layers.modules for part in _parts(layer, attention)], watch):
        yield watched


@contextmanager
def narrowed(modules: Sequence[nn.Module], positions: Sequence[int]) -> Iterator[None]:
    """Within the block the modules compute these positions alone, and give NaN elsewhere."""

    def narrow(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        rows, length = args[0].shape[:2]
        picked = torch.tensor([position % length for position in positions], device=args[0].device)
        found = forward(*(arg[:, picked] for arg in args))
        output = found.new_full((rows, length, found.shape[-1]), float("nan"))
        output[:, picked] = found
        return output

    with around(modules, narrow):
        yield


def _is_apart(call: _Call) -> bool:
    """Whether a position gives alone what it gives after as many like it as there are others.

    Experts of limited capacity do not: they are all full by then, which other tokens may never show.
    """
    if call.sample is None:
        return False
    alone = call.module(*call.sample)
    after = call.module(*(part.expand(1, call.length, -1) for part in call.sample))[:, -1:]
    return bool(torch.allclose(after.float(), alone.float(), rtol=1e-2, atol=1e-3 * float(alone.abs().max())))


def _parts(module: nn.Module, attention: set[int]) -> Iterator[nn.Module]:
    """The outermost modules in one that are attention or hold none."""
    for child in module.children():
        if id(child) not in attention and any(id(part) in attention for part in child.modules()):
            yield from _parts(child, attention)
        else:
            yield child
