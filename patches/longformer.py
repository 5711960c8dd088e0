"""Longformer and LED's encoder keep scores as a band around the diagonal; some tokens attend, and are attended to, globally.

A global token is one more column beside the band of every query. Its own row, over all keys, has other projections:
query_global, key_global and value_global. Sites are (query, key) of the sequence: scores and pattern are spread out, and rows
of global tokens put in, only where they are cut or captured; the class's own kernels compute them. rot_k, k and v come twice in
a forward with global tokens, as those rows read them and then as all others do; a cut changes both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.family import Family, register_example, register_patch
from surgery.interface import point, refuse, written_out

Pair = tuple[Tensor, Any]
"""What belongs to all rows, and what to rows of global tokens, or None."""


@dataclass(frozen=True)
class Rows:
    """The rows of global tokens in a tensor (batch, head, query, x), and apart from it: (batch, head, slot, x).

    rows: their (batch, position); slots: (batch, slot) of the same. A batch row with fewer than another has spare slots.
    """

    most: Any
    rows: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]
    spare: tuple[Tensor, ...]

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        whole = whole.clone()
        whole[self.rows[0], :, self.rows[1]] = part[self.slots[0], :, self.slots[1]]
        return whole

    def take(self, whole: Tensor, like: Tensor) -> Tensor:
        part = like.clone()
        part[self.slots[0], :, self.slots[1]] = whole[self.rows[0], :, self.rows[1]]
        return part

    def to_standard(self, pair: Pair) -> Tensor:
        """(batch, head, query, x)."""
        return self.put(*pair)

    def from_standard(self, tensor: Tensor, like: Pair) -> Pair:
        """In rows of global tokens the first of the pair is never read."""
        return tensor, self.take(tensor, like[1])

    @property
    def named(self) -> dict[str, Any]:
        """As the class's own methods take them."""
        return {
            "max_num_global_attn_indices": self.most,
            "is_index_global_attn_nonzero": self.rows,
            "is_local_index_global_attn_nonzero": self.slots,
        }


@dataclass(frozen=True)
class Band:
    """Scores or pattern: (batch, query, head, slot + 2 window + 1), with (batch, head, slot, key) of global rows, or None.

    empty: what stands for keys that a query does not see.
    """

    module: Any
    rows: Rows | None
    empty: float

    def to_standard(self, pair: Pair) -> Tensor:
        """(batch, head, query, key)."""
        band, columns, window = *self._parts(pair[0]), self.module.one_sided_attn_window_size
        batch, heads, length, _ = band.shape
        wide = band.new_full((batch, heads, length, length + 2 * window), self.empty)
        whole = wide.scatter(-1, self._keys(band), band)[..., window : window + length]
        if self.rows is None:
            return whole
        (numbers, keys), slots = self.rows.rows, self.rows.slots
        whole = whole.transpose(2, 3).clone()
        whole[numbers, :, keys] = columns.transpose(2, 3)[slots[0], :, slots[1]]
        return self.rows.put(whole.transpose(2, 3), pair[1])

    def from_standard(self, tensor: Tensor, like: Pair) -> Pair:
        """Raises SurgeryError if an edit has changed what no key in the band, and no global token, stands for."""
        band, columns, window = *self._parts(like[0]), self.module.one_sided_attn_window_size
        length = tensor.shape[2]
        keys = self._keys(band)
        is_own = ((keys >= window) & (keys < window + length)).expand(band.shape)
        wide = F.pad(tensor, (window, window), value=self.empty)
        is_there = torch.zeros_like(wide, dtype=torch.bool)
        if self.rows is not None:
            (numbers, positions), slots = self.rows.rows, self.rows.slots
            marked = torch.zeros(tensor.shape[0], wide.shape[-1], dtype=torch.bool, device=tensor.device)
            marked[numbers, positions + window] = True
            # What the band has of a global token is masked: its column counts.
            is_own = is_own & ~marked[:, None, None, :].expand(wide.shape).gather(-1, keys)
            is_there |= marked[:, None, None, :]
            is_there[numbers, :, positions] = True
        is_there = is_there.scatter(-1, keys, is_there.gather(-1, keys) | is_own)[..., window : window + length]
        if bool(((tensor > self.least) & ~is_there).any()):
            refuse(
                self.module,
                "an edit of scores or pattern that gives weight to keys beyond the window of their query",
                "changes within the window and at global tokens, for the class computes no others",
                "Let the callable keep what it is given where the pattern is zero.",
            )
        band = torch.where(is_own, wide.gather(-1, keys), band)
        if self.rows is None:
            return band.transpose(1, 2), None
        columns = columns.transpose(2, 3).clone()
        columns[slots[0], :, slots[1]] = tensor.transpose(2, 3)[numbers, :, positions]
        together = torch.cat((columns.transpose(2, 3), band), dim=-1)
        return together.transpose(1, 2), self.rows.take(tensor, like[1])

    @property
    def least(self) -> float:
        """What is no more than this gives a key no weight: a mask that was halved is still one."""
        return min(self.empty / 1000, 0.0)

    def _parts(self, band: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, head, query, 2 window + 1) of neighbours and (batch, head, query, slot) of global tokens."""
        size = 2 * self.module.one_sided_attn_window_size + 1
        band = band.transpose(1, 2)
        return band[..., -size:], band[..., :-size]

    def _keys(self, band: Tensor) -> Tensor:
        """The key of each entry of the band, counted from one window before the first."""
        _, _, length, size = band.shape
        first = torch.arange(length, device=band.device)[:, None]
        return (first + torch.arange(size, device=band.device)).expand(band.shape)


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    is_index_masked: Any = None,
    is_index_global_attn: Any = None,
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    states = hidden_states.transpose(0, 1)
    length, batch, width = states.shape
    scale, window = math.sqrt(self.head_dim), self.one_sided_attn_window_size

    def by_head(projected: Tensor) -> Tensor:
        return projected.view(-1, batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    rows: Rows | None = None
    queries: Any = None
    query = by_head(self.query(states))
    if is_global_attn:
        rows = Rows(*self._get_global_attn_indices(is_index_global_attn))
        marked = states.new_zeros(rows.most, batch, width)
        marked[rows.slots[::-1]] = states[rows.rows[::-1]]
        queries = point(self, "q", (query, by_head(self.query_global(marked))), rows)[1] / scale
        keys = point(self, "rot_k", point(self, "k", by_head(self.key_global(states))))
        values = point(self, "v", by_head(self.value_global(states)))
    query = query / scale
    query, queries = point(self, "rot_q", (query, queries), rows) if rows else (point(self, "rot_q", query), None)
    key = point(self, "rot_k", by_head(self.key(states)))
    value = point(self, "v", by_head(self.value(states))).transpose(1, 2)

    # Scores: the band, whose entries of padding and of global tokens are masked, and columns of global tokens.
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    is_masked = (attention_mask != 0)[:, :, None, None]
    mask = is_masked.type_as(query).masked_fill(is_masked, torch.finfo(query.dtype).min)
    scores = self._sliding_chunks_query_key_matmul(query, key, window)
    of_rows: Any = None
    scores = scores + self._sliding_chunks_query_key_matmul(torch.ones_like(mask), mask, window)
    lowest = torch.finfo(scores.dtype).min
    if rows:
        spare = {"is_local_index_no_global_attn_nonzero": rows.spare}
        columns = self._concat_with_global_key_attn_probs(query_vectors=query, key_vectors=key, **rows.named, **spare)
        scores = torch.cat((columns, scores), dim=-1)
        of_rows = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).unflatten(0, (batch, -1))
        of_rows[rows.spare[0], :, rows.spare[1]] = lowest
        of_rows = of_rows.masked_fill(is_index_masked[:, None, None, :], lowest)
    scores, of_rows = point(self, "scores", (scores, of_rows), Band(self, rows, lowest))

    # float32, and zero where the query itself is padding.
    pattern = F.softmax(scores, dim=-1, dtype=torch.float32).masked_fill(is_index_masked[:, :, None, None], 0.0)
    pattern = pattern.type_as(scores)
    if rows:
        of_rows = F.softmax(of_rows, dim=-1, dtype=torch.float32).type_as(of_rows)
    pattern, of_rows = point(self, "pattern", (pattern, of_rows), Band(self, rows, 0.0))
    weights = F.dropout(pattern, p=self.dropout, training=self.training)
    if rows:
        z = self._compute_attn_output_with_global_indices(value_vectors=value, attn_probs=weights, **rows.named)
        of_rows = F.dropout(of_rows, p=self.dropout, training=self.training)
        z_of_rows = torch.bmm(of_rows.flatten(0, 1), values.flatten(0, 1)).unflatten(0, (batch, -1))
        z = rows.put(z.transpose(1, 2), z_of_rows)
        weights = weights.masked_fill(is_index_global_attn[:, :, None, None], 0.0)
    else:
        z = self._sliding_chunks_matmul_attn_probs_value(weights, value, window).transpose(1, 2)
    z = point(self, "z", z)
    output = z.permute(2, 0, 1, 3).reshape(length, batch, width).contiguous().transpose(0, 1)
    if not output_attentions:
        return (output,)
    return (output, weights, of_rows) if rows else (output, weights)


LONGFORMER = written_out({"forward": forward})
NAMES = (
    "transformers.models.longformer.modeling_longformer.LongformerSelfAttention",
    "transformers.models.led.modeling_led.LEDEncoderSelfAttention",
)


@register_example(*NAMES)
def example(module: Any, states: Tensor) -> dict[str, Any]:
    """Two sequences: of two tokens with global attention, and of one and of padding. None of that where there are no values."""
    window = module.one_sided_attn_window_size
    length = max(2 * window, 4)
    mask = states.new_zeros(2, length)
    mask[0, :2] = mask[1, 0] = 10000
    mask[1, -2 if window > 1 else -1 :] = -10000
    return {
        "hidden_states": states.new_ones(2, length, module.embed_dim),
        "attention_mask": mask,
        "is_index_masked": mask < 0,
        "is_index_global_attn": mask > 0,
        "is_global_attn": not states.is_meta,
        "output_attentions": True,
    }


@register_patch(*NAMES)
def describe(module: nn.Module, family: Family | None) -> Family:
    return LONGFORMER
