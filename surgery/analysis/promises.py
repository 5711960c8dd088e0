"""What the backward mode of an edit promises about gradients, and whether one backward pass kept it.

The gradient on both sides of an edit is that of zeros added there: in front of it and behind it, by edits of their own beside
it in the spec. Nothing of the edit's own arithmetic is used, so that an edit which breaks its promise is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy import Anatomy, Attention
from surgery.cuts import TRANSFORMING, Edit
from surgery.interventions import Operation
from surgery.lower import lower
from surgery.plan import Probe
from surgery.sites import SITES
from surgery.spec import Spec
from surgery.where import Where, positions_of

BEFORE = {
    "q": ("q", "rot_q", "scores", "pattern", "z", "result"),
    "k": ("k", "rot_k", "scores", "pattern", "z", "result"),
    "v": ("v", "z", "result"),
    "o": ("result",),
}
"""Sites through which all that a head's weight does must pass."""


@dataclass(eq=False)
class Point:
    """One edit at one attention in one forward, with the zeros in front of it and behind it, call by call."""

    number: int
    operation: Operation
    attention: Attention
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    wheres: list[Where] = field(default_factory=list)

    @property
    def edit(self) -> Edit:
        return self.operation.edit

    @property
    def share(self) -> float | None:
        """The share of the gradient behind the edit that must arrive at what it replaces; None where nothing is promised."""
        if self.edit.backward == "ste":
            return 1.0
        is_natural_change = self.edit.action in TRANSFORMING or callable(self.edit.action)
        if self.edit.backward == "natural" and is_natural_change:
            return None
        return 1.0 - self.edit.strength

    @property
    def promise(self) -> str:
        """The statement in words."""
        if self.edit.backward == "ste":
            return "the gradient in front of it equals that behind it, bit for bit"
        if self.share is None:
            return "nothing: the gradient is what the forward makes it"
        return f"exactly {self.share:g} of the gradient behind it" if self.share else "exactly zero into what was replaced"

    @property
    def seals(self) -> bool:
        """Whether nothing at all may go back through this point of these heads.

        Not where a query may attend to nothing: kernels then make a pattern of masked scores, which an edit leaves alone.
        """
        if self.share != 0.0 or self.edit.positions is not None:
            return False
        allowed = [where.allowed for where in self.wheres if where.allowed is not None]
        return not SITES[self.edit.site].is_matrix or all(bool(mask.any(-1).all()) for mask in allowed)

    def replaced(self, gradient: Tensor, where: Where) -> Tensor:
        """Boolean, as the gradient: the entries that the edit replaces; the others pass."""
        kept = torch.ones_like(gradient, dtype=torch.bool)
        site, edit = self.edit.site, self.edit
        if edit.positions is not None:
            chosen = torch.tensor(edit.positions, device=gradient.device)
            kept &= torch.isin(positions_of(gradient, where.offset(site)), chosen)[:, None]
        is_everywhere = callable(edit.action) or (site == "pattern" and edit.action == "zero")
        if SITES[site].is_matrix and where.allowed is not None and not is_everywhere:
            allowed = where.allowed
            kept &= allowed if allowed.shape[1] == 1 else allowed[:, list(self.operation.heads)]
        return kept

    def broken_by(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """The largest distance of the gradient in front of the edit from the promised one; 0.0 where it is kept."""
        assert self.share is not None
        worst = 0.0
        for front, behind, where in zip(before, after, self.wheres, strict=True):
            expected = torch.where(self.replaced(behind, where), behind * self.share if self.share else 0.0, behind)
            if not torch.equal(front, expected):
                worst = max(worst, float((front.double() - expected.double()).abs().nan_to_num(torch.inf).max()))
        return worst


def points_of(spec: Spec, anatomy: Anatomy) -> dict[tuple[int, str, str], Point]:
    """All edits of a spec where they act, by the number of their cut, address and site, in the order of the spec."""
    plans = lower(spec, anatomy, probed={attention.address: tuple(SITES) for attention in anatomy})  # edits stay where they are
    by_address = {attention.address: attention for attention in anatomy}
    found = {
        (operation.number, address, site): Point(operation.number, operation, by_address[address])
        for address, plan in plans.items()
        for site, operations in plan.operations.items()
        for operation in operations
    }
    order = list(SITES)
    return dict(
        sorted(found.items(), key=lambda item: (item[0][0], list(by_address).index(item[0][1]), order.index(item[0][2])))
    )


def between_zeros(spec: Spec, anatomy: Anatomy, points: dict[tuple[int, str, str], Point]) -> Spec:
    """The spec with zeros added in front of every edit and behind it, which each forward adds to the points' lists."""
    cuts: list[Edit] = []
    for number, cut in enumerate(spec):
        for edit in cut.edits():
            here = [points[number, attention.address, edit.site] for attention in anatomy.select(edit.layers)]
            cuts += [_beside(point, _adding(point.before)) for point in here]
            cuts.append(edit)
            cuts += [_beside(point, _adding(point.after)) for point in here]
    return Spec(cuts)


def detached(points: Sequence[Point]) -> Spec:
    """Edits that let no gradient through these points and change nothing else."""
    return Spec([_beside(point, torch.Tensor.detach) for point in points])


def watching(points: Sequence[Point]) -> dict[str, list[Probe]]:
    """Probes, by address, that note where each call of a point is."""
    found: dict[str, list[Probe]] = {}
    for point in points:
        heads = point.operation.heads if SITES[point.edit.site].is_matrix else None
        found.setdefault(point.attention.address, []).append(Probe(point.edit.site, heads, _noting(point.wheres)))
    return found


def sealed(points: Sequence[Point], attention: Attention, site: str) -> Iterator[tuple[int, list[Point]]]:
    """The heads of a weight (kv heads of W_K and W_V) whose every way to the output leads through sealing points; and these."""
    here = [point for point in points if point.attention is attention and point.seals and point.edit.site in BEFORE[site]]
    for head in range(attention.kv_heads if site in ("k", "v") else attention.heads):
        size = attention.group_size
        readers = range(head * size, (head + 1) * size) if site in ("k", "v") else (head,)
        own = [point for point in here if point.edit.site == "k" and head in point.operation.heads]
        ways = [
            own or [point for point in here if point.edit.site != "k" and reader in point.operation.heads] for reader in readers
        ]
        if all(ways):
            yield head, list(dict.fromkeys(point for way in ways for point in way))


def _beside(point: Point, action: Callable[[Tensor], Tensor]) -> Edit:
    edit = point.edit
    return Edit(edit.site, action, layers=list(point.attention.addresses), heads=edit.heads, gqa=edit.gqa)


def _adding(zeros: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def add_zeros(x: Tensor) -> Tensor:
        zeros.append(torch.zeros_like(x, requires_grad=True))
        return x + zeros[-1]

    return add_zeros


def _noting(wheres: list[Where]) -> Callable[[Tensor, Where], Any]:
    return lambda tensor, where: wheres.append(where)
