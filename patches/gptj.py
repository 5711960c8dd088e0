"""GPT-J computes attention in a method of its own, in float32 for any dtype, and divides by sqrt(d_head) before the mask.

Since transformers 5.24 it goes through the interface, and nothing here applies.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from surgery.family import Family, register_patch
from surgery.interface import attend


def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    output, weights = module._attn(query, key, value, attention_mask)
    return output.transpose(1, 2), weights


def _attn(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Any]:
    output, weights = attend(self, query, key, value, attention_mask)
    return output.transpose(1, 2), weights


GPTJ = Family(eager, members={"_attn": _attn}, kernels={})


@register_patch("transformers.models.gptj.modeling_gptj.GPTJAttention")
def describe(module: nn.Module, family: Family | None) -> Family | None:
    if hasattr(module, "_flash_attn_uses_top_left_mask"):
        return None  # the class that runs flash attention
    return family or GPTJ
