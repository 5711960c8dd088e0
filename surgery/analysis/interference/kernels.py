"""What is measured between a sample of task A and one of task B: kernels, each a product of one number per parameter.

With g the gradients of a part of a head, I the Fisher reference and r = ρ · mean(I) of the block, summed over its parameters:

* "qkov": ⟨g_i² / (I + r), |g_j|⟩: how far B's step goes where A's loss is steep, relative to how steep losses are there.
* "whitened": ⟨g_i² / (I + r), |g_j| / √(I + r)⟩: the same, unchanged when the losses (and with them I) are scaled.
* "signed": −⟨g_i, g_j⟩ of gradients of length one over all blocks, positive where a step on B raises A's loss. "qkov" cannot
  tell heads that oppose one another from those that co-operate; heads and blocks add up to −cos of the whole gradients.
* "ewc": ⟨g_i², g_j²⟩: the penalty of elastic weight consolidation (Kirkpatrick et al. 2017) on B's step, without its constant.

Each is linear in one factor g_j, so that a part of it, such as what came through one query head, has its share: the numbers of
parts add up to that of the whole, ⟨g_i² / (I + r), sign(g_j) ⊙ part⟩ of "qkov".

A degeneracy to know: with A's own mean of squares as I and r → 0, the mean of "qkov" over A is ‖g_j‖₁, which says nothing of A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from surgery.errors import SpecError, closest, describe


@dataclass(frozen=True)
class Kernel:
    """left(g_i, I + r), right(g_j, a part of g_j or all of it, I + r): whose products are summed. is_unit: of length one.

    needs_fisher: whether it looks at I at all. degree: gradients and √I times c give c^degree times its numbers.
    """

    name: str
    left: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor, Tensor], Tensor]
    degree: int
    is_unit: bool = False
    needs_fisher: bool = True


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("qkov", lambda g, f: g.square().div_(f), lambda g, part, f: g.sign().mul_(part), 1),
        Kernel("whitened", lambda g, f: g.square().div_(f), lambda g, part, f: g.sign().mul_(part).div_(f.sqrt()), 0),
        Kernel("signed", lambda g, f: -g, lambda g, part, f: part, 2, is_unit=True, needs_fisher=False),
        Kernel("ewc", lambda g, f: g.square(), lambda g, part, f: g * part, 4, needs_fisher=False),
    )
}


def kernel_of(name: str) -> Kernel:
    """Raises SpecError for a name that there is not."""
    if name not in KERNELS:
        do = closest(name, tuple(KERNELS)) or "Choose one of these."
        raise SpecError(describe("kernel", repr(name), ", ".join(map(repr, KERNELS)), do))
    return KERNELS[name]
