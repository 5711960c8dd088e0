"""How an inline attention lays out the tensors of its core, and the way to the axes of `surgery.sites` and back.

A tensor of the core has four roles among its axes: batch (also windows, frames: whatever shares no keys), head, row
(queries or keys) and column (keys or channels). A role may be missing, and batch and head may be one axis.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH, HEAD, ROW, COLUMN = range(4)

Roles = tuple[int, ...]
"""The role of an axis, or the two of one that holds both."""


@dataclass(frozen=True)
class Layout:
    """Roles by axis: a tuple of one role, or of two for an axis that holds both, the outer first. heads: size of the role."""

    axes: tuple[Roles, ...]
    heads: int

    @property
    def _roles(self) -> list[int]:
        return [role for axis in self.axes for role in axis]

    def _split(self, tensor: Tensor) -> Tensor:
        """Every axis of two roles as two axes."""
        for number in reversed(range(len(self.axes))):
            if len(self.axes[number]) == 2:
                sizes = [self.heads if role == HEAD else -1 for role in self.axes[number]]
                tensor = tensor.unflatten(number, sizes)
        return tensor

    def to_standard(self, tensor: Tensor) -> Tensor:
        """(batch, head, row, column)."""
        tensor, roles = self._split(tensor), self._roles
        tensor = tensor.permute(self._order())
        for role in (HEAD, ROW, COLUMN):
            if role not in roles:
                tensor = tensor.unsqueeze(tensor.dim() - (3 - role))
        lead = tensor.dim() - 3
        return tensor.unsqueeze(0) if lead == 0 else tensor.flatten(0, lead - 1) if lead > 1 else tensor

    def from_standard(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Back to the axes of `like`, a tensor of this layout; the standard one may have more heads than `like`."""
        split, roles = self._split(like), self._roles
        order = self._order()
        shape = [split.shape[axis] for axis in order]
        heads = tensor.shape[1]
        for role in (HEAD, ROW, COLUMN):
            if role not in roles:
                tensor = tensor.squeeze(role - 4)
        lead = [size for axis, size in zip(order, shape, strict=True) if roles[axis] == BATCH]
        rest = [heads if roles[axis] == HEAD else size for axis, size in zip(order, shape, strict=True) if roles[axis] != BATCH]
        tensor = tensor.reshape(*lead, *rest).permute([order.index(axis) for axis in range(len(order))])
        for number, axis in enumerate(self.axes):
            if len(axis) == 2:
                tensor = tensor.flatten(number, number + 1)
        return tensor

    def _order(self) -> list[int]:
        """The split axes in the order batch, head, row, column."""
        roles = self._roles
        return sorted(range(len(roles)), key=lambda axis: roles[axis])


STANDARD = Layout(((BATCH,), (HEAD,), (ROW,), (COLUMN,)), 0)
"""The axes of `surgery.sites` themselves, for any number of heads."""


def letters(name: str, equation: str | None, first: Tensor, second: Tensor) -> tuple[str, str, str]:
    """The axes of a product of two tensors and its result as letters: equal letters are equal axes."""
    if equation is not None:
        inputs, _, output = equation.replace(" ", "").partition("->")
        a, _, b = inputs.partition(",")
        # An ellipsis stands for axes that both have, aligned at the last.
        spare = [max(t.dim() - len(axes.replace("...", "")), 0) for axes, t in ((a, first), (b, second))]
        extra = string.ascii_uppercase[: max(spare)]
        a, b = (axes.replace("...", extra[max(spare) - n :]) for axes, n in zip((a, b), spare, strict=True))
        return a, b, output.replace("...", extra)
    lead = max(first.dim(), second.dim()) - 2
    shared = string.ascii_lowercase[:lead]
    return (
        f"{shared[lead - first.dim() + 2 :]}yz",
        f"{shared[lead - second.dim() + 2 :]}zx",
        f"{shared}yx",
    )


def head_axes(axes: str, roles: dict[str, int], labels: Tensor) -> tuple[dict[str, Roles], int]:
    """Which of the axes that two factors share count heads, batch, or both, by where the labels of channels change.

    axes: one letter an axis; roles: the letters that are rows and columns. Returns roles by letter, and the number of heads.
    """
    found: dict[str, Roles] = {letter: (role,) for letter, role in roles.items()}
    heads = 1
    column = next((axes.index(letter) for letter, role in roles.items() if role == COLUMN and letter in axes), None)
    flat = labels if column is None else labels.amin(column, keepdim=True)
    for number, letter in enumerate(axes):
        if letter in roles:
            continue
        size = flat.shape[number]
        line = flat.movedim(number, 0).reshape(size, -1)[:, 0]
        distinct = len(set(line.tolist()))
        if distinct == 1:
            found[letter] = (BATCH,)
        else:
            heads = distinct
            is_outer = bool(line[0] == line[1])
            found[letter] = (HEAD,) if distinct == size else (HEAD, BATCH) if is_outer else (BATCH, HEAD)
    return found, heads


def from_coordinates(coordinates: tuple[Tensor, Tensor, Tensor, Tensor], heads: int) -> Layout | None:
    """The layout of a tensor for whose entries (batch, head, row, column) are known; None if its axes do not factor."""
    shape = coordinates[0].shape
    axes: list[Roles] = []
    for number, size in enumerate(shape):
        lines = [c.movedim(number, 0).reshape(size, -1)[:, 0] for c in coordinates]
        moving = [role for role, line in enumerate(lines) if len(set(line.tolist())) > 1]
        if size == 1:
            axes.append((BATCH,))
        elif len(moving) == 1:
            axes.append((moving[0],))
        elif moving == [BATCH, HEAD]:
            axes.append((HEAD, BATCH) if bool(lines[HEAD][0] == lines[HEAD][1]) else (BATCH, HEAD))
        else:
            return None
    layout = Layout(tuple(axes), heads)
    roles = [role for axis in axes for role in axis]
    if any(roles.count(role) > 1 for role in (HEAD, ROW, COLUMN)):
        return None
    return layout


def coordinates(shape: torch.Size, roles: list[Roles], heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(batch, head, row, column) of every entry of a tensor whose axes have these roles."""
    found = [torch.zeros(shape, dtype=torch.long) for _ in range(4)]
    for number, (size, axis) in enumerate(zip(shape, roles, strict=True)):
        index = torch.arange(size).view(-1, *[1] * (len(shape) - number - 1))
        parts = [(axis[0], index, size)]
        if len(axis) == 2:
            inner = heads if axis[1] == HEAD else size // heads
            parts = [(axis[0], index // inner, size // inner), (axis[1], index % inner, inner)]
        for role, part, width in parts:
            found[role] = found[role] * width + part
    return found[0], found[1], found[2], found[3]
