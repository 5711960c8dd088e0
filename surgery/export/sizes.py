"""Inputs of other sizes than the example's, by which a size that was taken from the example as a constant is found out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

Shape = tuple[int | str, ...]
STEPS = (-1, 3)
"""By how much sizes differ from the example's: one fewer, and more than a power of two would be rounded up to."""


@dataclass(frozen=True)
class Sizes:
    """shapes: of a program's inputs, by name; a size that may vary is a symbol, or an expression of one.

    ranges: the lowest and the highest number of a symbol, where the program says so.
    """

    shapes: dict[str, Shape]
    ranges: dict[str, tuple[int, int]]

    @property
    def symbols(self) -> list[str]:
        """The sizes that may vary and stand alone somewhere, in order."""
        sizes = [size for shape in self.shapes.values() for size in shape]
        return list(dict.fromkeys(size for size in sizes if isinstance(size, str) and size.isidentifier()))

    def __str__(self) -> str:
        return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in self.shapes.items())


def sizes_of(program: torch.export.ExportedProgram, names: Iterable[str]) -> Sizes:
    """The sizes of a program's inputs, which have these names, from its graph."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    shapes = {
        name: tuple(size if isinstance(size, int) else str(size) for size in values[place].shape)
        for name, place in zip(names, program.graph_signature.user_inputs, strict=True)
    }
    ranges = {str(symbol): (_whole(r.lower, 0), _whole(r.upper, 1 << 30)) for symbol, r in program.range_constraints.items()}
    return Sizes(shapes, ranges)


def other_inputs(inputs: Mapping[str, Tensor], sizes: Sizes) -> Iterator[dict[str, Tensor]]:
    """The inputs with every size that may vary made smaller, then made larger, as far as its range goes."""
    example = {
        symbol: inputs[name].shape[axis]
        for name, shape in sizes.shapes.items()
        for axis, symbol in enumerate(shape)
        if symbol in sizes.symbols
    }
    seen = [example]
    for step in STEPS:
        chosen = {}
        for symbol, size in example.items():
            low, high = sizes.ranges.get(symbol, (2, size + step))
            chosen[symbol] = min(max(size + step, low, 1), high)
        if chosen not in seen:
            seen.append(chosen)
            yield {name: _resized(inputs[name], shape, chosen) for name, shape in sizes.shapes.items()}


def _resized(tensor: Tensor, shape: Shape, chosen: Mapping[str, int]) -> Tensor:
    """A tensor of another shape with entries of its own, so that tokens are known ones: repeated, or fewer from the end."""
    for axis, entry in enumerate(shape):
        old, new = tensor.shape[axis], _number(entry, chosen)
        if new != old:
            tensor = tensor.index_select(axis, (torch.arange(new, device=tensor.device) - new) % old)
    return tensor


def _number(entry: int | str, chosen: Mapping[str, int]) -> int:
    if isinstance(entry, int):
        return entry
    names = {name: sympy.Symbol(name) for name in re.findall(r"[A-Za-z_]\w*", entry)}
    return int(sympy.sympify(entry, locals=names).subs({names[n]: chosen[n] for n in names if n in chosen}))


def _whole(bound: Any, otherwise: int) -> int:
    """A bound as a number, where it is finite."""
    return int(bound) if isinstance(bound, int) or bound.is_Integer else otherwise
