"""What a patched module needs of a KV cache: where in the sequence a call is, and under which spec the cache was filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from surgery.errors import CacheError, describe

STAMP = "_surgery_fingerprint"
"""The attribute of a cache that tells under which spec it was filled; absent: under none."""


def find_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """The KV cache among a forward's arguments, whatever its name there."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache):
            return value
    return None


def layer_of(module: nn.Module, layer: int = 0) -> int:
    """The number under which a module keeps its keys and values: by the names in use, or else that of its own layer."""
    for name in ("layer_idx", "layer_id"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return layer


def check_cache(cache: Cache, fingerprint: str, layer: int, path: str, is_cross: bool = False) -> None:
    """Marks an empty cache with a spec's fingerprint. Raises CacheError for one that was filled under another spec."""
    # The part that this call reads: a few families hand the parts to their modules, others put caches together.
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.cross_attention_cache if is_cross else cache.self_attention_cache
    stamp = getattr(cache, STAMP, "")
    if stamp == fingerprint:
        return
    filled = _length(cache, layer)
    if isinstance(filled, Tensor) and torch.compiler.is_compiling():
        filled = 0  # a compiled graph cannot read it: a static cache without our mark is taken for an empty one
    if bool(filled > 0):
        raise CacheError(
            describe(
                f"{path!r}",
                f"a KV cache of {int(filled)} positions filled under {'another spec' if stamp else 'no cuts'}",
                "a cache filled under the cuts that the model has now",
                "Start generation anew: keys and values depend on the cuts (which may begin late: positions=range(n, m)).",
            )
        )
    setattr(cache, STAMP, fingerprint)


def _length(cache: Cache, layer: int) -> Any:
    """How many positions a layer has filled; 0 for one that reads another layer's keys and values."""
    try:
        return cache.get_seq_length(layer)
    except ValueError:
        return 0


def is_updated(cache: Cache | None, layer: int) -> bool:
    """Whether a cross-attention may read its keys and values from the cache, without projecting them again."""
    if isinstance(cache, EncoderDecoderCache):
        return bool(cache.is_updated.get(layer))
    return cache is not None and (torch.compiler.is_compiling() or bool(_length(cache, layer) > 0))


def n_queries(args: Sequence[Any], kwargs: Mapping[str, Any], axis: int = 1) -> int:
    """The number of queries of a forward, from its hidden states, whatever their name: the first tensor of three axes.

    axis: of the positions, 0 in modules that take (query, batch, d_model).
    """
    named = [kwargs[name] for name in ("hidden_states", "query") if name in kwargs]
    states = next((x for x in (*named, *args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 3), None)
    return 0 if states is None else states.shape[axis]


def offsets(cache: Cache, layer: int, is_cross: bool, queries: int, path: str = "") -> tuple[Any, Any, Any]:
    """Where a call is, read before the cache takes its keys in.

    queries: how many the call has. path: of the module, if what it does depends on the position.
    Returns the absolute position of its first query and of its first key, and how many positions will have keys (None for
    cross-attention). A sliding cache drops its oldest keys, so its first key is not position 0: None if the keys end where
    the queries do, as in every cache that grows. A decoder's self-attention
    (of the same layer; of the first where cross-attention keeps keys of its own in the same cache) has counted the queries
    of a cross-attention already. Raises CacheError for more queries than it has counted, if a path is given.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layer = 0 if is_cross and own is cache else layer
    try:
        first, seen = own.get_seq_length(layer), layer
    except ValueError:  # this layer reads the keys of another, which has counted the queries
        first, seen = own.get_seq_length() - queries, 0
    # A static cache counts in place.
    first = first.clone() if isinstance(first, Tensor) else first
    if not is_cross:
        is_static = isinstance(first, Tensor) or (seen < len(own.layers) and own.layers[seen].is_compileable)
        return first, own.get_mask_sizes(1, seen)[1] if is_static else None, first + queries
    if isinstance(first, Tensor) and torch.compiler.is_compiling():
        return first - queries, 0, None
    if path and bool(first < queries):
        raise CacheError(
            describe(
                f"{path!r} with a KV cache",
                f"{queries} queries where the decoder has counted {int(first)} positions, and cuts that depend on the position",
                "one query for each position: rows of several streams, for one, have other numbers in each step",
                "Run without a cache (use_cache=False), or cut at all positions alike.",
            )
        )
    return max(first - queries, first * 0), 0, None
