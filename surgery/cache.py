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


def check_cache(cache: Cache, fingerprint: str, module: nn.Module, path: str) -> None:
    """Marks an empty cache with a spec's fingerprint. Raises CacheError for one that was filled under another spec."""
    stamp = getattr(cache, STAMP, "")
    if stamp == fingerprint:
        return
    # A compiled graph cannot read a tensor's value: there, a cache without our mark is taken for an empty one.
    filled = 0 if torch.compiler.is_compiling() else cache.get_seq_length(layer_of(module))
    if bool(filled > 0):
        raise CacheError(
            describe(
                f"{path!r}",
                f"a KV cache of {int(filled)} positions filled under {'another spec' if stamp else 'no cuts'}",
                "a cache filled under the cuts that the model has now",
                "Start generation anew: the keys and values behind a cut depend on it.",
            )
        )
    setattr(cache, STAMP, fingerprint)


def offsets(cache: Cache, module: nn.Module, is_cross: bool) -> tuple[Any, Any]:
    """Absolute positions of a call's first query and first key, read before the cache takes the call's keys in.

    A sliding cache drops its oldest keys, so its first key is not position 0.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layer = layer_of(module)
    queries = own.get_seq_length(layer)
    # A static cache counts in place.
    queries = queries.clone() if isinstance(queries, Tensor) else queries
    keys = 0 if is_cross else own.get_mask_sizes(1, layer)[1]
    return queries, keys
