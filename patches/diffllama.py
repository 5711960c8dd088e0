"""DiffLlama calls attention twice, with one pattern and two halves of its values; here one call has values twice as wide.

In the paper (Ye et al. 2024, equation 1) the values of a head have 2 d_head channels, too. Heads h and h + heads / 2 make a
pair, whose difference, weighted by lambda, is normed before W_O: `z` is before that difference. A fused kernel is still called
twice, for in one call with wide values it would be another one with other roundings.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from surgery.family import Family, register_patch
from surgery.interface import attend, take_cache


def forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    from transformers.models.diffllama.modeling_diffllama import apply_rotary_pos_emb

    cache = take_cache(kwargs)
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
    value = torch.cat(torch.chunk(value, 2, dim=1), dim=-1).repeat(1, 2, 1, 1)
    output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
    first, second = torch.chunk(output, 2, dim=2)
    exponents = ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
    one, two = (torch.exp(torch.sum(q * k, dim=-1, dtype=torch.float32)).to(query.dtype) for q, k in exponents)
    output = first - (one - two + self.lambda_init) * second
    output = (1 - self.lambda_init) * self.groupnorm(output)
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class Halves:
    """The interface's kernels, called for each half of the values."""

    def __init__(self, interface: Any) -> None:
        self.interface = interface

    def get_interface(self, implementation: str, eager: Any) -> Any:
        kernel = self.interface.get_interface(implementation, eager)
        return eager if kernel is eager else functools.partial(by_halves, kernel)


def by_halves(
    kernel: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    outputs = [kernel(module, query, key, half, attention_mask, **kwargs)[0] for half in value.chunk(2, dim=-1)]
    return torch.cat(outputs, dim=-1), None


@register_patch("transformers.models.diffllama.modeling_diffllama.DiffLlamaAttention")
def describe(module: nn.Module, family: Family | None) -> Family | None:
    if family is None:
        return None  # the inline classes of older versions
    return Family(family.eager, members={"forward": forward}, interface=Halves(family.interface))
