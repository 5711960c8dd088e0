"""BLOOM adds a linear position bias (ALiBi) inside the product q k^T, and its attention adds the residual itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.family import Family, register_example, register_patch
from surgery.interface import attend


def eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, alibi: Tensor
) -> tuple[Tensor, Tensor]:
    """alibi: (batch, head, 1, key). The product runs over batch and heads as one axis."""
    product = alibi.flatten(0, 1).baddbmm(
        query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2), beta=module.beta, alpha=module.inv_norm_factor
    )
    scores = product.unflatten(0, query.shape[:2])
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = module.attention_dropout(pattern)
    return torch.matmul(weights, value).transpose(1, 2), weights


def forward(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    alibi = alibi.view(query.shape[0], self.num_heads, 1, -1)
    output, weights = attend(self, query, key, value, attention_mask, alibi=alibi)
    output = output.flatten(2)
    if self.pretraining_tp > 1 and self.slow_but_exact:
        width = self.hidden_size // self.pretraining_tp
        parts = zip(output.split(width, -1), self.dense.weight.split(width, 1), strict=True)
        output = sum((F.linear(part, weight) for part, weight in parts), torch.zeros_like(output))
    else:
        output = self.dense(output)
    return residual + F.dropout(output, p=self.hidden_dropout, training=self.training), weights


BLOOM = Family(eager, members={"forward": forward}, kernels={})
NAME = "transformers.models.bloom.modeling_bloom.BloomAttention"


@register_example(NAME)
def example(module: Any, states: Tensor) -> dict[str, Any]:
    return {"alibi": states.new_zeros(module.num_heads, 1, 1)}


@register_patch(NAME)
def describe(module: nn.Module, family: Family | None) -> Family:
    return BLOOM
