"""GPT-Neo does not scale its scores, computes in float32, and masks by a buffer of the module: causal, or a local window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.family import Family, register_patch
from surgery.interface import attend


def _window(module: Any, query: Tensor, key: Tensor) -> Tensor:
    """(1, 1, query, key) True where the layer's own triangle or window lets a query see a key."""
    queries, keys = query.size(-2), key.size(-2)
    return module.bias[:, :, keys - queries : keys, :keys]


def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query.to(torch.float32), key.to(torch.float32).transpose(-1, -2))
    lowest = scores.new_full((), -torch.inf).nan_to_num()  # torch.finfo(scores.dtype).min, in terms that torch.fx can trace
    scores = torch.where(_window(module, query, key), scores, lowest)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = module.attn_dropout(nn.functional.softmax(scores, dim=-1).to(value.dtype))
    return torch.matmul(weights, value).transpose(1, 2), weights


def allowed(module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, kwargs: Mapping[str, Any]) -> Tensor:
    window = _window(module, query, key)
    return window if attention_mask is None else window & (attention_mask > torch.finfo(attention_mask.dtype).min / 2)


def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Any]:
    output, weights = attend(self, query, key, value, attention_mask)
    return output.transpose(1, 2), weights


GPT_NEO = Family(eager, members={"_attn": _attn}, kernels={}, allowed=allowed)


@register_patch("transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention")
def describe(module: nn.Module, family: Family | None) -> Family | None:
    return None if hasattr(module, "_flash_attn_uses_top_left_mask") else GPT_NEO  # not of the class that runs flash attention
