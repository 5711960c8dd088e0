"""Flint computes q k^T in float32 outside autocast, in a context that torch.fx does not see; its sinks share the softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import maybe_autocast

from surgery.family import Family, register_patch


def matmul(query: Tensor, key: Tensor) -> Tensor:
    """q k^T in float32, also under autocast. One node for torch.fx."""
    if has_torch_function((query, key)):
        return handle_torch_function(matmul, (query, key), query, key)
    with maybe_autocast(device_type=query.device.type, enabled=False):
        return torch.matmul(query.float(), key.float().transpose(2, 3))


def eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    groups = module.num_key_value_groups
    key, value = (t.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) if groups > 1 else t for t in (key, value))
    scores = matmul(query, key) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], 1)
    pattern = F.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1].to(value.dtype)
    weights = F.dropout(pattern, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


FLINT = Family(eager, interface=ALL_ATTENTION_FUNCTIONS)


@register_patch("transformers.models.flint.modeling_flint.FlintAttention")
def describe(module: nn.Module, family: Family | None) -> Family:
    return FLINT
