"""Keys and values that some heads alone are to read, for one query: a second call of the kernel in place of a copy of them all.

In a step of decoding, keys and values of every position come out of the cache for a single query. To write those of two heads
into a copy moves more memory than the attention itself, and three times that where heads are grouped. So the kernel runs on
what the cache holds, as it does unpatched, then on the keys and values of the heads concerned alone, whose z is put in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from surgery.family import Family
from surgery.plan import Plan
from surgery.sites import MATRIX_SITES
from surgery.unfused import Call
from surgery.where import Heads

MANY_KEYS = 128
"""From this many keys on, a copy of all costs more than another call of the kernel."""

_SITES = ("rot_k", "v")


class Host(Protocol):
    """What this file needs of a patched module's state (`surgery.core.Core`)."""

    module: Any
    ungrouped: Any
    family: Family
    heads: int

    def at(self, site: str, tensor: Tensor, held: Sequence[int] | None) -> Tensor:
        """The intervention point of a site, for the heads held."""
        ...


@dataclass(frozen=True)
class OwnKeys:
    """The heads that read keys or values of their own, and the heads of the cache from which these come."""

    heads: Heads
    rows: Heads


def own_keys(plan: Plan, heads: int, groups: int) -> OwnKeys | None:
    """The heads of a plan for which a second call will do; None if there are none, or the others are of interest, too."""
    concerned = plan.heads_at(_SITES, heads)
    is_watched = any(site in plan.probes for site in _SITES)
    if plan.reconstruct or is_watched or not plan.sites.isdisjoint(MATRIX_SITES) or not 0 < len(concerned) < heads:
        return None
    return OwnKeys(Heads(concerned), Heads([head // groups for head in concerned]))


def reads_apart(surgery: Host, call: Call) -> bool:
    """Whether the heads of this call may be computed in two: one query, a kernel without a matrix, nothing else by head."""
    if call.query.shape[2] != 1 or surgery.family.inline is not None or surgery.family.is_eager(call.implementation):
        return False
    # A compiled graph must not ask for the number of keys: it would be made anew when the cache outgrows it.
    if not torch.compiler.is_compiling() and call.key.shape[2] < MANY_KEYS:
        return False
    is_for_all = call.mask is None or (isinstance(call.mask, Tensor) and (call.mask.dim() == 2 or call.mask.shape[1] == 1))
    by_head = [value for value in call.kwargs.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return is_for_all and not by_head and not call.kwargs.get("dropout")


def with_own_keys(surgery: Host, own: OwnKeys, call: Call, kernel: Callable[..., Any]) -> tuple[Tensor, Any]:
    """The kernel's output (batch, query, head, d_head) and weights; the heads concerned read keys and values of their own."""
    output, weights = kernel(surgery.module, call.query, call.key, call.value, call.mask, **call.kwargs)
    key, value = (own.rows.take(tensor) for tensor in (call.key, call.value))
    key, value = surgery.at("rot_k", key, own.heads.numbers), surgery.at("v", value, own.heads.numbers)
    module = surgery.module if call.groups == 1 else surgery.ungrouped
    apart, _ = kernel(module, own.heads.take(call.query), key, value, call.mask, **call.kwargs)
    return own.heads.put(output, apart, 2), weights
