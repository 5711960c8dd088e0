"""GPT-2 with reorder_and_upcast_attn scales q k^T inside the product and upcasts it, but only if its implementation is "eager".

A patched module sees another implementation's name, and so comes to the interface; what eager means there is told here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import maybe_autocast

from surgery.family import Family, register_patch


def baddbmm(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """scaling * q k^T in float32, also under autocast. One node for torch.fx, which does not see the context."""
    if has_torch_function((query, key)):
        return handle_torch_function(baddbmm, (query, key), query, key, scaling)
    with maybe_autocast(query.device.type, enabled=False):
        q, k = query.flatten(0, 1).float(), key.transpose(-1, -2).flatten(0, 1).float()
        return torch.baddbmm(q.new_empty(()), q, k, beta=0, alpha=scaling).unflatten(0, query.shape[:2])


def eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    scores = baddbmm(query, key, scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = nn.functional.softmax(scores, dim=-1).type(value.dtype)
    weights = module.attn_dropout(pattern)
    return torch.matmul(weights, value).transpose(1, 2), weights


REORDERED = Family(eager, interface=ALL_ATTENTION_FUNCTIONS)


@register_patch(
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention",
    "transformers.models.decision_transformer.modeling_decision_transformer.DecisionTransformerGPT2Attention",
)
def describe(module: Any, family: Family | None) -> Family | None:
    # Shown the name "eager", such a module would leave for a method of its own.
    return REORDERED if module.reorder_and_upcast_attn or family is None else replace(family, shows_name=False)
