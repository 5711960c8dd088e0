"""torch's own multi-head attention: the module, and classes that call its function with projections of their own.

Asked for weights torch computes the matrix, by products over batch and heads as one axis, and so does its fast path for
inference; otherwise it runs its fused kernel. The fast path is left where there are cuts or captures; the last bits may differ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.family import Family, register_example, register_patch
from surgery.interface import attend


def eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    d_head: int = 1,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """is_causal: never; the mask says it all, and the fused kernel, too, must hear that."""
    q, k = (query * math.sqrt(1.0 / d_head)).flatten(0, 1), key.flatten(0, 1).transpose(-2, -1)
    scores = torch.bmm(q, k) if attention_mask is None else torch.baddbmm(_whole(attention_mask, query), q, k)
    pattern = F.softmax(scores.unflatten(0, query.shape[:2]), dim=-1)
    weights = F.dropout(pattern, p=dropout)
    return torch.matmul(weights, value).transpose(1, 2), weights


def _whole(mask: Tensor, query: Tensor) -> Tensor:
    """(batch * head, query, key)."""
    return mask.expand(query.shape[0], query.shape[1], -1, -1).flatten(0, 1)


def sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, **kwargs: Any
) -> tuple[Tensor, None]:
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout)
    return output.transpose(1, 2), None


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """A mask that is True for what must not be attended to, or additive, as an additive one."""
    return query.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(query.dtype)


def multihead(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    attention_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    needs_matrix: bool,
    dropout: float,
) -> tuple[Tensor, Any]:
    """query, key, value: projected, (position, batch, d_model). Returns z (position, batch, d_model) and weights."""
    length, batch, width = query.shape
    by_head = (
        t.reshape(t.shape[0], batch * heads, t.shape[-1] // heads).transpose(0, 1).unflatten(0, (batch, heads))
        for t in (query, key, value)
    )
    q, k, v = by_head
    mask: Any = None
    if attention_mask is not None:
        mask = _additive(attention_mask, q)
        mask = mask.unflatten(0, (batch, heads)) if mask.dim() == 3 else mask[None, None]
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    if mask is not None:
        mask = mask.expand(batch, heads, length, key.shape[0])
    kernel, dropout = "eager" if needs_matrix else "sdpa", dropout if module.training else 0.0
    z, weights = attend(module, q, k, v, mask, implementation=kernel, is_causal=False, dropout=dropout, d_head=width // heads)
    return z.transpose(0, 1).reshape(length, batch, -1), weights


def _projected(self: Any, states: list[Tensor], is_self: bool, is_one_source: bool) -> tuple[Tensor, ...]:
    """q, k and v, in one product where torch takes one: two products may be rounded otherwise."""
    counts = (3,) if is_self and is_one_source else (1, 2) if is_one_source else (1, 1, 1)
    if not self._qkv_same_embed_dim:
        weights, counts = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight], (1, 1, 1)
    else:
        weights = list(self.in_proj_weight.split([self.embed_dim * count for count in counts]))
    sizes = [self.embed_dim * count for count in counts]
    biases = [None] * len(counts) if self.in_proj_bias is None else list(self.in_proj_bias.split(sizes))
    found: list[Tensor] = []
    for number, (count, weight, bias) in enumerate(zip(counts, weights, biases, strict=True)):
        found += F.linear(states[number], weight, bias).chunk(count, dim=-1)
    return tuple(found)


def forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    is_batched = query.dim() == 3
    same = (query is key, key is value)
    states = [query, key, value]
    if not is_batched:
        states = [t.unsqueeze(1) for t in states]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif self.batch_first:
        states = [t.transpose(0, 1) for t in states]
    q, k, v = _projected(self, states, *same)
    is_fast = self.batch_first and not (self.training or self.num_heads % 2 or torch.is_grad_enabled()) and all(same)
    z, pattern = multihead(self, q, k, v, self.num_heads, attn_mask, key_padding_mask, need_weights or is_fast, self.dropout)
    output = self.out_proj(z)
    if pattern is not None and average_attn_weights:
        pattern = pattern.mean(dim=1)
    if not is_batched:
        return output.squeeze(1), None if pattern is None or not need_weights else pattern.squeeze(0)
    return output.transpose(0, 1) if self.batch_first else output, pattern if need_weights else None


def wavlm(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The weights that it returns are the mean over heads, for every head."""
    states = hidden_states.transpose(0, 1)
    padding = None if attention_mask is None else attention_mask.ne(1)
    q, k, v = self.q_proj(states), self.k_proj(states), self.v_proj(states)
    z, weights = multihead(self, q, k, v, self.num_heads, gated_position_bias, padding, True, self.dropout)
    if weights is not None:
        weights = weights.mean(dim=1, keepdim=True).expand_as(weights)
    return self.out_proj(z).transpose(0, 1), weights


@register_example("torch.nn.modules.activation.MultiheadAttention")
def keys_and_values(module: Any, states: Tensor) -> dict[str, Any]:
    return {"key": states.new_ones(*states.shape[:2], module.kdim), "value": states.new_ones(*states.shape[:2], module.vdim)}


MULTIHEAD = Family(eager, members={"forward": forward}, kernels={"sdpa": sdpa})
WAVLM = Family(eager, members={"torch_multi_head_self_attention": wavlm}, kernels={})


@register_patch("torch.nn.modules.activation.MultiheadAttention")
def describe(module: Any, family: Family | None) -> Family | None:
    return None if module.bias_k is not None or module.add_zero_attn else MULTIHEAD


@register_patch("transformers.models.wavlm.modeling_wavlm.WavLMAttention")
def describe_gated(module: nn.Module, family: Family | None) -> Family:
    return WAVLM
