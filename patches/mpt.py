"""MPT adds a linear position bias (ALiBi) to its scores, and its mask is boolean with True for what is masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.family import Family, register_example, register_patch
from surgery.interface import attend, take_cache


def eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """position_bias: (1, head, 1, key)."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * module.softmax_scale
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        lowest = query.new_full((), -torch.inf).nan_to_num()  # torch.finfo(query.dtype).min, in terms that torch.fx can trace
        scores = scores.masked_fill(attention_mask.bool(), lowest)
    pattern = nn.functional.softmax(scores.float(), dim=-1).to(value.dtype)
    weights = nn.functional.dropout(pattern, p=module.attn_dropout_p, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def allowed(module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor | None:
    return None if attention_mask is None else ~attention_mask


def forward(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    cache = take_cache(kwargs)
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    shape = (*hidden_states.shape[:2], self.n_heads, self.head_dim)
    query, key, value = (part.reshape(shape).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
    if position_bias is not None:  # (head, 1, key) for all positions that the model can have: the last ones are ours
        position_bias = position_bias[None, ..., max(0, position_bias.size(2) - key.shape[2]) :]
    output, weights = attend(self, query, key, value, attention_mask, position_bias=position_bias)
    return self.out_proj(output.flatten(2)), weights


MPT = Family(eager, members={"forward": forward}, kernels={}, allowed=allowed)
NAME = "transformers.models.mpt.modeling_mpt.MptAttention"


@register_example(NAME)
def example(module: Any, states: Tensor) -> dict[str, Any]:
    return {"position_bias": states.new_zeros(module.n_heads, 1, module.max_seq_length)}


@register_patch(NAME)
def describe(module: nn.Module, family: Family | None) -> Family:
    return MPT
