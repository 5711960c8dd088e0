"""Every implementation's attention mask, turned into the additive mask that eager attention takes.

A model builds the mask of its own implementation, and the patched module gets that one:

* eager: additive (batch, 1 | head, query, key), or None for nothing masked.
* sdpa: boolean of that shape (True: attend), additive, or None. None means causal when the module is causal and there is
  more than one query, with the triangle at the upper left, as torch's `is_causal` has it; transformers passes None with
  more keys than queries only for the first call on a static cache, where the rest of the cache is still empty.
* flash_attention_2/3/4: (batch, key) with 1 for tokens, or None; causal from the module or a keyword, the triangle at the
  lower right (queries are the last positions); sliding windows as a keyword; packed sequences as position_ids that start
  again or as cumulative lengths. Queries that are padding give zeros.
* flex_attention: a BlockMask, or additive.

`allowed` is what all have in common: which keys a query may attend to. Sliding windows: a query attends to the keys with
query - key < window (transformers' convention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import MaskError, describe

Rows = tuple[int, int]

_KNOWN = ("eager", "sdpa", "flex_attention")


@dataclass(frozen=True)
class Mask:
    """One call's mask. additive: (batch | 1, head | 1, query, key) or None; allowed: boolean of that shape or None for all.

    empty_rows: (batch, query) True where the query is padding and the original kernel leaves it out; or None.
    """

    additive: Tensor | None
    allowed: Tensor | None
    empty_rows: Tensor | None = None


def to_additive(
    implementation: str,
    mask: Any,
    query: Tensor,
    key: Tensor,
    module: nn.Module,
    kwargs: Mapping[str, Any],
    rows: Rows | None = None,
) -> Mask:
    """The additive equivalent of a mask made for `implementation`.

    query: (batch, head, query, d_head), key: (batch, kv_head, key, d_head), both as the core gets them.
    rows: first and last + 1 of the queries wanted; None for all. Raises MaskError for a format that this file does not know.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    rows = (0, n_queries) if rows is None else rows
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if "flash" in implementation:
        return _from_flash(mask, query, key, bool(causal), kwargs, rows)
    if mask is None:
        if implementation not in _KNOWN and n_queries > 1 and causal:
            raise MaskError(
                describe(
                    f"{_name(module)} with attn_implementation={implementation!r}",
                    "no mask at a causal attention, under an implementation that is not known",
                    f"a mask, or one of {', '.join(_KNOWN)}, whose meaning of None is known",
                    'Load the model with attn_implementation="sdpa" or "eager".',
                )
            )
        if implementation == "sdpa" and n_queries > 1 and causal:
            allowed = _numbers(rows, query.device)[:, None] >= torch.arange(n_keys, device=query.device)
            return _from_boolean(allowed[None, None], query.dtype)
        return Mask(None, None)
    if isinstance(mask, Tensor):
        if mask.dim() == 4 and mask.dtype == torch.bool:
            return _from_boolean(_of_rows(mask, rows)[..., :n_keys], query.dtype)
        if is_additive(mask):
            mask = _of_rows(mask, rows)[..., :n_keys]
            return Mask(mask, mask > torch.finfo(mask.dtype).min / 2)
    elif hasattr(mask, "mask_mod"):
        return _from_boolean(_from_block_mask(mask, query, rows, n_keys), query.dtype)
    raise MaskError(
        describe(
            f"attention mask for attn_implementation={implementation!r} at {_name(module)}",
            f"{_shape(mask)}",
            "a boolean or additive mask (batch, head, query, key), (batch, key) for flash, a BlockMask for flex, or None",
            'Load the model with attn_implementation="sdpa" or "eager".',
        )
    )


def is_additive(mask: Any) -> bool:
    """Whether a mask is an additive one, (batch, head, query, key)."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.is_floating_point()


def _from_boolean(allowed: Tensor, dtype: torch.dtype) -> Mask:
    # The same numbers as transformers' eager masks: the dtype's minimum, not -inf, so that empty rows are uniform.
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return Mask(torch.where(allowed, zero, torch.finfo(dtype).min), allowed)


def _numbers(rows: Rows, device: torch.device) -> Tensor:
    return torch.arange(*rows, device=device)


def _of_rows(mask: Tensor, rows: Rows) -> Tensor:
    """The rows of a mask, which may have one for all queries."""
    return mask if mask.shape[2] == 1 else mask[:, :, slice(*rows)]


def _from_flash(mask: Any, query: Tensor, key: Tensor, causal: bool, kwargs: Mapping[str, Any], wanted: Rows) -> Mask:
    batch, n_queries, n_keys, device = query.shape[0], query.shape[2], key.shape[2], query.device
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise MaskError(
            describe("attention mask for flash attention", _shape(mask), "None or (batch, key)", "Pass a padding mask.")
        )
    # On a static cache the mask is shorter than the keys: what it does not reach is not filled yet.
    reach = n_keys if mask is None else min(n_keys, mask.shape[1])
    rows = _numbers(wanted, device)[:, None] + (reach - n_queries)
    columns = torch.arange(n_keys, device=device)[None, :]
    allowed = (rows >= columns if causal else torch.ones_like(rows >= columns))[None]
    window = kwargs.get("sliding_window")
    if window is not None and n_keys > window:
        allowed = allowed & (rows - columns < window)
        if not causal:
            allowed = allowed & (columns - rows < window)
    empty = None
    if mask is not None:
        keys = torch.nn.functional.pad(mask.bool()[:, -n_keys:], (0, n_keys - reach))
        allowed = allowed & keys[:, None, :]
        empty = ~keys[:, reach - n_queries :][:, slice(*wanted)] if 1 < n_queries <= reach else None
    elif (document := _documents(batch, n_queries, n_keys, device, kwargs)) is not None:
        allowed = allowed & (document[:, slice(*wanted), None] == document[:, None, :])
    result = _from_boolean(allowed[:, None], query.dtype)
    return Mask(result.additive, result.allowed, empty)


def _documents(batch: int, n_queries: int, n_keys: int, device: torch.device, kwargs: Mapping[str, Any]) -> Tensor | None:
    """(1, position) the number of the packed sequence that each position belongs to, or None if nothing is packed.

    Packed as transformers' flash attention reads it: one row, cumulative lengths, or position_ids that start again.
    """
    if batch != 1 or n_queries != n_keys or n_queries == 1:
        return None
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is not None:
        return torch.bucketize(torch.arange(n_queries, device=device), lengths[1:].to(device), right=True)[None]
    positions = kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[0] != 1:
        return None
    return (positions == positions.min()).cumsum(-1)


def _from_block_mask(mask: Any, query: Tensor, rows: Rows, n_keys: int) -> Tensor:
    device, batch, n_heads = query.device, query.shape[0], query.shape[1] if mask.shape[1] > 1 else 1
    batches, heads, keys = (torch.arange(n, device=device) for n in (batch, n_heads, n_keys))
    grid = (batches[:, None, None, None], heads[None, :, None, None], _numbers(rows, device)[None, None, :, None], keys)
    return mask.mask_mod(*grid).expand(batch, n_heads, rows[1] - rows[0], n_keys)


def _name(module: nn.Module) -> str:
    """The class of an attention module, and its path where it is patched."""
    own = getattr(type(module), "_surgery_base", type(module)).__name__
    path = getattr(getattr(module, "_surgery", None), "path", None)
    return own if path is None else f"{path!r} ({own})"


def _shape(mask: Any) -> str:
    return f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
