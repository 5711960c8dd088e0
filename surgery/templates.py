"""Pattern templates: where a head looks, made by hand, over what the mask allows.

Each is a function (original (batch, head, query, key), allowed boolean of that shape or broadcast to it or None, where) ->
a pattern of the original's shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgery.where import Where, positions_of


def uniform(original: Tensor, allowed: Tensor | None, where: Where) -> Tensor:
    """The same share for every key that the query may attend to."""
    if allowed is None:
        return torch.full_like(original, 1.0 / original.shape[-1])
    share = allowed.to(original.dtype)
    return (share / share.sum(dim=-1, keepdim=True).clamp(min=1)).expand_as(original)


def diagonal(original: Tensor, allowed: Tensor | None, where: Where) -> Tensor:
    """All attention on the query's own position."""
    return _back(original, allowed, where, 0)


def previous(original: Tensor, allowed: Tensor | None, where: Where) -> Tensor:
    """All attention on the position before the query's."""
    return _back(original, allowed, where, 1)


def first(original: Tensor, allowed: Tensor | None, where: Where) -> Tensor:
    """All attention on the first key that the query may attend to."""
    if allowed is None:
        target = torch.zeros(original.shape[2], dtype=torch.long, device=original.device)
        return _one_hot(target[None, None], original).expand_as(original)
    return _one_hot(allowed.int().argmax(dim=-1), original).expand_as(original)


TEMPLATES: dict[str, Callable[[Tensor, Tensor | None, Where], Tensor]] = {
    "uniform": uniform,
    "diagonal": diagonal,
    "previous": previous,
    "first": first,
}


def _back(original: Tensor, allowed: Tensor | None, where: Where, steps: int) -> Tensor:
    """All attention `steps` positions back, or on the query's own position where that one may not be attended to.

    A row that may attend to neither stays as it is.
    """
    if isinstance(where.key_offset, Tensor) and where.key_offset.dim() == 1:
        return _back_in_row(original, allowed, where, steps)
    queries = positions_of(original, where.query_offset) - where.key_offset
    own = queries.clamp(0, original.shape[-1] - 1)
    target = (queries - steps).clamp(0, original.shape[-1] - 1)
    pattern = _one_hot(target[None, None], original)
    if allowed is not None:
        for fallback in (_one_hot(own[None, None], original), original):
            pattern = torch.where((pattern.bool() & allowed).any(dim=-1, keepdim=True), pattern, fallback)
    return pattern.expand_as(original)


def _back_in_row(original: Tensor, allowed: Tensor | None, where: Where, steps: int) -> Tensor:
    """As `_back`, where one row holds several sequences: of the keys at a position, the mask says which is of the query's."""
    assert allowed is not None
    queries = positions_of(original, where.query_offset)[:, None]
    keys = torch.arange(original.shape[-1], device=original.device) + where.key_offset
    pattern = original
    for back in (0, steps):
        chosen = (keys == queries - back) & allowed
        pattern = torch.where(chosen.any(dim=-1, keepdim=True), chosen.to(original.dtype), pattern)
    return pattern.expand_as(original)


def _one_hot(target: Tensor, like: Tensor) -> Tensor:
    """(.., query) key numbers -> (.., query, key) rows with a single 1."""
    keys = torch.arange(like.shape[-1], device=like.device)
    return (target[..., None] == keys).to(like.dtype)
