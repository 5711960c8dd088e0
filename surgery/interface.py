"""What a patched module's forward calls in place of a kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from surgery.family import IMPLEMENTATION


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
    """Attention with the module's cuts. Inline classes described in `patches/` call it from their rewritten forward.

    query: (batch, head, query, d_head), key and value: (batch, kv_head, key, d_head), attention_mask and kwargs as the
    module's own implementation takes them; the keyword `implementation` names it where a call does not run the config's.
    Returns output (batch, query, head, d_head) and attention weights or None.
    """
    surgery: Any = module._surgery
    return surgery.attend(query, key, value, attention_mask, **kwargs)


def implementation_of(module: nn.Module) -> str:
    """The implementation that a patched module computes as: "eager" under kernel="eager", otherwise the config's."""
    surgery: Any = module._surgery
    return surgery.computes_as


AttentionInterface.register(IMPLEMENTATION, attend)
