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


def layer_of(module: nn.Module) -> int:
    """The layer number under which a module keeps its keys and values."""
    for name in ("layer_idx", "layer_id"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return 0


def check_cache(cache: Cache, fingerprint: str, module: nn.Module, path: str, is_cross: bool = False) -> None:
    """Marks an empty cache with a spec's fingerprint. Raises CacheError for one that was filled under another spec."""
    # A few families hand the parts of such a cache to their modules, and the whole to others.
    parts = (cache.self_attention_cache, cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else ()
    stamp = next((s for c in (cache, *parts) if (s := getattr(c, STAMP, ""))), "")
    if stamp == fingerprint:
        return
    filled = _length(parts[1] if parts and is_cross else cache, layer_of(module))
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
    for one in (cache, *parts):
        setattr(one, STAMP, fingerprint)


def _length(cache: Cache, layer: int) -> Any:
    """How many positions a layer has filled; 0 for one that reads another layer's keys and values."""
    try:
        return cache.get_seq_length(layer)
    except ValueError:
        return 0


def is_updated(cache: Cache | None, module: nn.Module) -> bool:
    """Whether a cross-attention will read its keys and values from the cache, without projecting them again."""
    return isinstance(cache, EncoderDecoderCache) and bool(cache.is_updated.get(layer_of(module)))


def n_queries(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The number of queries of a forward: the length of its hidden states, (batch, query, d_model)."""
    states = kwargs.get("hidden_states", args[0] if args else None)
    return states.shape[1] if isinstance(states, Tensor) else 0


def offsets(cache: Cache, module: nn.Module, is_cross: bool, queries: int) -> tuple[Any, Any, Any]:
    """Where a call is, read before the cache takes its keys in.

    queries: how many the call has. Returns the absolute position of its first query and of its first key, and how many
    positions will have keys (None for cross-attention). A sliding cache drops its oldest keys, so its first key is not
    position 0; the decoder's self-attention of a layer has already counted the queries of its cross-attention.
    Raises CacheError for a cross-attention with more queries than the decoder has positions: rows of several streams.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layer = layer_of(module)
    try:
        first, seen = own.get_seq_length(layer), layer
    except ValueError:  # this layer reads the keys of another, which has counted the queries
        first, seen = own.get_seq_length() - queries, 0
    # A static cache counts in place.
    first = first.clone() if isinstance(first, Tensor) else first
    if is_cross:
        if isinstance(first, int) and first < queries:
            raise CacheError(
                describe(
                    f"a cross-attention ({type(module).__name__}) with a KV cache",
                    f"{queries} queries, of {first} positions in several streams, and cuts that depend on the position",
                    "one query a position: rows of other streams have other numbers in each step",
                    "Run without a cache (use_cache=False), or cut at all positions alike.",
                )
            )
        return first - queries, 0, None
    return first, own.get_mask_sizes(1, seen)[1], first + queries
