"""The steps of one labelled run of a forward, and where in the class's own code each stands."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgery.errors import UnsupportedArchitectureError
from surgery.labels import Labelled
from surgery.source import Place, position_of

PRODUCTS = {"matmul": 0, "bmm": 0, "__matmul__": 0, "baddbmm": 1, "einsum": 1}
"""The functions that multiply matrices, and which argument is the first factor."""

_PLAIN_FILES = ("torch/nn/functional.py", "torch/functional.py", "torch/overrides.py", "torch/_tensor.py", "surgery/labels.py")
"""Code that only hands a call on."""


@dataclass(eq=False)
class Step:
    """One function call on labelled tensors: its places, from the innermost expression to that in the forward.

    depth: how many of the places are in helpers that methods call; given: its labelled arguments.
    """

    name: str
    places: tuple[Place, ...]
    depth: int
    given: tuple[Labelled, ...]

    @property
    def place(self) -> Place | None:
        return self.places[0] if self.places else None


@dataclass(eq=False)
class Product(Step):
    """A product of matrices: its factors, and letters for the axes of the first, the second and the result."""

    factors: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
    axes: tuple[str, str, str] = ("", "", "")
    result: Labelled = field(default_factory=lambda: Labelled.make(torch.empty(0), torch.empty(0)))

    @property
    def free(self) -> tuple[str, str]:
        """The one axis of the first factor, and of the second, that the other has not but the result has."""
        a, b, out = self.axes
        first, second = [c for c in a if c not in b and c in out], [c for c in b if c not in a and c in out]
        if len(first) != 1 or len(second) != 1:
            raise Defeat(f"a product over the axes {a}, {b} -> {out}", self.place)
        return first[0], second[0]

    @property
    def contracted(self) -> str:
        """The axis that is summed over."""
        a, b, out = self.axes
        common = [c for c in a if c in b and c not in out]
        if len(common) != 1:
            raise Defeat(f"a product that sums over {len(common)} axes", self.place)
        return common[0]


class Defeat(UnsupportedArchitectureError):
    """Why an inline attention cannot be rewritten, and at which expression. is_other: it is no softmax over q k^T."""

    def __init__(self, reason: str, place: Place | None = None, is_other: bool = False) -> None:
        self.reason, self.place, self.is_other = reason, place, is_other
        super().__init__(reason if place is None else f"{reason} ({place})")


def locate(
    methods: Mapping[types.CodeType, types.FunctionType],
    names: Container[types.FunctionType],
    inner: Mapping[types.CodeType, types.FunctionType],
    depth: int,
) -> tuple[tuple[Place, ...], int]:
    """The expressions of a module's own code that are being computed, the innermost first; how many are in helpers.

    methods: the functions of the module's class, by code; names: those that an instance has as methods; inner: the functions
    of modules within it, which count as helpers; depth: how many frames above this one lie outside that code.
    """
    frame: types.FrameType | None = sys._getframe(depth)
    is_direct = True
    places: list[tuple[Place, bool]] = []
    while frame is not None:
        code = frame.f_code
        if code.co_name == "run_on_stubs" and code.co_filename.replace("\\", "/").endswith("surgery/stubs.py"):
            break
        function = methods.get(code) or inner.get(code)
        is_method = function is not None and function in names
        if function is None:
            function = _global_function(frame)
        if function is not None and (position := position_of(frame)) is not None:
            places.append((Place(function, position, is_direct), is_method))
        if not code.co_filename.replace("\\", "/").endswith(_PLAIN_FILES):
            is_direct = False
        frame = frame.f_back
    helpers = next((n for n, (_, is_method) in enumerate(places) if is_method), None)
    # A helper counts only if the module's own method calls it, directly or through other helpers.
    return ((), 0) if helpers is None else (tuple(place for place, _ in places), helpers)


def _global_function(frame: types.FrameType) -> types.FunctionType | None:
    """The function of a frame, if it is a global function of a package other than torch and this one."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if package in ("torch", "surgery", ""):
        return None
    found = frame.f_globals.get(frame.f_code.co_name)
    found = inspect.unwrap(found) if callable(found) else None
    return found if isinstance(found, types.FunctionType) and found.__code__ is frame.f_code else None
