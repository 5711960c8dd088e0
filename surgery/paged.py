"""What a patched module needs of a paged KV cache (continuous batching): whose its tokens are, and its keys where they are cut.

Many sequences lie in one row, their tokens one after another. Keys and values are put into the cache, and those of all
sequences taken out in the same order: by the class's forward, or up to transformers 5.23 by the kernel. The mask keeps them
apart.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from surgery.errors import CacheError
from surgery.interventions import Operation
from surgery.plan import Plan
from surgery.sites import MATRIX_SITES


def is_paged(cache: Any) -> bool:
    """Whether a cache is one of continuous batching: ordinary ones come under the same name."""
    return isinstance(cache, PagedAttentionCache)


def obstacle(plan: Plan, implementation: str, is_own: bool) -> str:
    """Why a plan cannot act under continuous batching; "" if it can. is_own: the class has its own way to a kernel."""
    if is_own:
        return "a class that does not go through transformers' attention interface, as continuous batching needs it"
    if plan.probes:
        return f"a capture of {', '.join(plan.probes)}"
    operations = [operation for site in plan.operations.values() for operation in site]
    if found := [why for operation in operations if (why := _mixes(operation))]:
        return found[0]
    if "flash" in implementation and reads_keys(plan):
        sites = ", ".join(sorted(plan.sites & {"rot_k", "v", *MATRIX_SITES})) or "every site"
        return f"work at {sites}, whose keys flash attention reads from the pages by itself"
    return ""


def reads_keys(plan: Plan) -> bool:
    """Whether the keys and values of whole sequences are needed, not only those of the tokens at hand."""
    return plan.reconstruct or bool(plan.sites & {"rot_k", "v", *MATRIX_SITES})


def _mixes(operation: Operation) -> str:
    """Why an operation would mix the sequences of a row."""
    action, site = operation.edit.action, operation.site
    if callable(action):
        return f"a callable at {site}, which would get several sequences in one row"
    if operation.is_current_mean:
        return f"a mean of the current activations at {site}"
    if action == "resample" or operation.block is not None:
        return f"{action!r} at {site}, by rows of the batch"
    values = [operation.edit.value] if operation.entry is None else [operation.entry.value, operation.entry.spread]
    if any(isinstance(value, Tensor) and value.dim() == 4 and value.shape[0] > 1 for value in values):
        return f"values by row of the batch at {site}"
    return ""


@contextmanager
def beginning(module: nn.Module) -> Iterator[bool]:
    """Whether this thread is making a manager of continuous batching; if the block raises, what it has changed is put back.

    module: the one that it is putting into evaluation mode, which it does right after it has changed the attention
    implementation. Modules before this one are in evaluation mode already and get this one's mode: their own is not known.
    """
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not ContinuousBatchingManager.__init__.__code__:
        frame = frame.f_back
    try:
        yield frame is not None
    except CacheError:
        if frame is not None:
            manager, model = (frame.f_locals[name] for name in ("self", "model"))
            if manager._original_attn_impl is not None:
                model.set_attn_implementation(manager._original_attn_impl)
            for part in itertools.takewhile(lambda part: part is not module, model.modules()):
                part.training = module.training
        raise


def query_offset(kwargs: Mapping[str, Any], count: int) -> Tensor | None:
    """For each of so many tokens its position less its place in the row; None if the model does not hand on what tells it."""
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        return positions[0] - torch.arange(count, device=positions.device)
    queries, keys = kwargs["cu_seq_lens_q"].long(), kwargs["cu_seq_lens_k"]
    if isinstance(keys, Mapping):
        keys = keys.get("full_attention")  # of layers that drop no key, so that there are as many as positions
    if keys is None:
        return None
    return (keys[1:] - keys[:-1] - queries[1:])[_sequences(queries, count)]


def key_offset(kwargs: Mapping[str, Any], query_offset: Tensor, count: int) -> Tensor:
    """The same for each key, as they come out of the cache. query_offset: of the tokens."""
    queries, keys = kwargs["cu_seq_lens_q"].long(), kwargs["cu_seq_lens_k"].long()
    last = (queries[1:] - 1).clamp(min=0)  # keys end where the queries do
    return (query_offset[last] + last + 1 - keys[1:])[_sequences(keys, count)]


def _sequences(ends: Tensor, count: int) -> Tensor:
    """The number of the sequence that each of so many places in a row belongs to; the last one's where the row is padded."""
    places = torch.arange(count, device=ends.device)
    return torch.bucketize(places, ends[1:].contiguous(), right=True).clamp(max=len(ends) - 2)


class _Read:
    """Stands in for a paged cache towards a kernel, which gets the keys and values that it hands over, cut by now."""

    def __init__(self, is_packed: bool) -> None:
        self.is_packed = is_packed

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, **rest: Any) -> tuple[Tensor, Tensor]:
        """What was handed over, in the axes that the cache itself would give."""
        if self.is_packed:
            return _packed(key_states), _packed(value_states)
        return key_states, value_states


def _packed(tensor: Tensor) -> Tensor:
    return tensor[0].transpose(0, 1)


def read_pages(
    module: nn.Module, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Puts the new keys and values into the cache in place of a kernel that does so.

    Returns those of whole sequences, and the keywords for the kernel to go on with.
    """
    cache: Any = kwargs["cache"]
    after = dict(kwargs)
    names = inspect.signature(cache.update).parameters
    # Up to transformers 5.22 the indices are arguments of their own, and what comes back is (key, kv_head, d_head).
    more = {"kwargs": after} if "kwargs" in names else {name: kwargs[name] for name in ("read_index", "write_index")}
    keys, values = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, **more)
    is_packed = keys.dim() == 3
    if is_packed:
        keys, values = (tensor.transpose(0, 1)[None] for tensor in (keys, values))
    if isinstance(sizes := after["cu_seq_lens_k"], Mapping):
        is_full = cache.sliding_windows[module.layer_idx] == 1
        after["cu_seq_lens_k"] = sizes["full_attention" if is_full else "sliding_attention"]
    after["cache"] = _Read(is_packed)
    return keys, values, after
