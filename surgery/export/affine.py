"""What an edit does to a head's activations where it is the same for every token: x -> scale * x + shift, by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.interventions import Operation
from surgery.sites import SITES
from surgery.where import Where


class Unfoldable(Exception):
    """Why an edit is not a change of weights, in words."""


@dataclass(frozen=True)
class Affine:
    """x -> scale * x + shift; both (head, width) in float64, for every head of the site."""

    scale: Tensor
    shift: Tensor

    @property
    def has_shift(self) -> bool:
        return bool(self.shift.any())

    @property
    def changed(self) -> Tensor:
        """(head,) boolean: the heads that it does anything to."""
        return (self.scale != 1).any(-1) | self.shift.any(-1)

    def without_shift(self) -> Affine:
        """The same; raises Unfoldable if it adds anything."""
        if self.has_shift:
            raise Unfoldable("it sets or adds values behind positions or norms, where no weight stands")
        return self

    def of_heads(self, groups: int) -> Affine:
        """For kv heads, from query heads of which `groups` read one. Raises Unfoldable where these differ."""
        scale, shift = (t.unflatten(0, (-1, groups)) for t in (self.scale, self.shift))
        if not (torch.equal(scale, scale[:, :1].expand_as(scale)) and torch.equal(shift, shift[:, :1].expand_as(shift))):
            raise Unfoldable(f"it changes what some of the {groups} query heads of a group read, and a kv head has one weight")
        return Affine(scale[:, 0], shift[:, 0])

    def of_width(self, width: int) -> Affine:
        """For heads of another width, if every channel of a head has the same scale."""
        scale = self.without_shift().scale
        if bool((scale != scale[:, :1]).any()):
            raise Unfoldable("it scales the channels of a head differently, behind positions or norms")
        return Affine(scale[:, :1].expand(-1, width).clone(), torch.zeros(len(scale), width, dtype=scale.dtype))


def affine_of(operations: Sequence[Operation], heads: int, width: int) -> Affine:
    """What the edits of one site do together, in their order. Raises Unfoldable with the reason if that is not affine.

    heads, width: of the site; at scores and pattern, where entries are changed alike, any width.
    """
    for operation in operations:
        _require_constant(operation)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, heads, 2, width, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        shift, one, found = (_apply(operations, x) for x in (torch.zeros_like(given), torch.ones_like(given), given))
    affine = Affine((one - shift)[0, :, 0], shift[0, :, 0])
    expected = given * affine.scale[:, None] + affine.shift[:, None]
    # float64 rounds the difference that the scale is read off; another function is off by its size.
    if not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
        raise Unfoldable("it is not the same function of every token")
    return affine


def _apply(operations: Sequence[Operation], x: Tensor) -> Tensor:
    for operation in operations:
        x = operation.apply(x, Where())
    return x


def _require_constant(operation: Operation) -> None:
    edit = operation.edit
    if callable(edit.action):
        raise Unfoldable("a callable has no weights")
    if edit.positions is not None:
        raise Unfoldable("it acts at some positions only")
    if edit.action in ("noise", "resample", "activation"):
        raise Unfoldable(f"{edit.action!r} gives every token something else")
    if operation.is_current_mean:
        raise Unfoldable("the mean of the current activations depends on the input; give a reference")
    if operation.needs_position:
        raise Unfoldable("its values, or its template, depend on the position")
    if edit.action == "first" or (SITES[operation.site].is_matrix and edit.action == "value"):
        raise Unfoldable(f"{edit.action!r} at {operation.site} depends on the position")
