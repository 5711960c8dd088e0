"""Falcon fuses q, k and v in three layouts, and scales, drops out and adds ALiBi differently in eager and in sdpa.

Multi-query: one kv head for all. New decoder architecture: k and v are repeated per query head before the core. ALiBi: the
model puts the bias into the mask, and eager attention adds it once more, before scaling. Asked for attention weights, a
model on sdpa computes as eager does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from surgery.family import Family, register_example, register_patch
from surgery.interface import attend, implementation_of


def matmul(query: Tensor, key: Tensor) -> Tensor:
    """query @ key, equal bit for bit for one kv head and for that head repeated. One node for torch.fx.

    Broadcasting one head copies it if the batch has more than one row, and the product's last bits depend on the layout.
    """
    if has_torch_function((query, key)):
        return handle_torch_function(matmul, (query, key), query, key)
    return query @ (key.contiguous() if key.shape[0] > 1 else key)


def eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    alibi: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """alibi: (batch, head, 1, key), in the dtype of the hidden states, which autocast does not change."""
    is_multi_query = module.multi_query and not module.new_decoder_architecture
    scores = (matmul if is_multi_query else torch.matmul)(query, key.transpose(-1, -2))
    scores = scores / math.sqrt(module.head_dim) if alibi is None else (scores + alibi.float()) * module.inv_norm_factor
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = F.softmax(scores, dim=-1, dtype=(query if alibi is None else alibi).dtype)
    weights = pattern if alibi is None else module.attention_dropout(pattern)
    return (weights @ value).transpose(1, 2), weights


def sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    alibi: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, None]:
    is_causal = module.is_causal and attention_mask is None and query.shape[2] > 1
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, is_causal)
    return output.transpose(1, 2), None


def forward(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    query, key, value = (part.transpose(1, 2) for part in self._split_heads(self.query_key_value(hidden_states)))
    if alibi is None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[misc]
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    kernel, dropout = "eager" if output_attentions else implementation_of(self), 0.0
    if alibi is not None:
        dropout = self.attention_dropout.p if self.training else 0.0
        alibi = alibi.view(query.shape[0], self.num_heads, 1, -1)
        alibi = alibi if kernel == "eager" else torch.zeros_like(alibi)  # sdpa has it in the mask alone
    output, weights = attend(self, query, key, value, attention_mask, implementation=kernel, alibi=alibi, dropout=dropout)
    return self.dense(output.flatten(2)), weights


FALCON = Family(eager, members={"forward": forward}, kernels={"sdpa": sdpa})
NAME = "transformers.models.falcon.modeling_falcon.FalconAttention"


@register_example(NAME)
def example(module: Any, states: Tensor) -> dict[str, Any]:
    return {"alibi": states.new_zeros(module.num_heads, 1, 1)} if module.config.alibi else {}


@register_patch(NAME)
def describe(module: nn.Module, family: Family | None) -> Family | None:
    return None if hasattr(module, "_flash_attn_uses_top_left_mask") else FALCON  # not of the class that runs flash attention
