"""Attention of two streams that share their scores: which of the class's two softmaxes is the attention that is cut.

The other stays the family's. What is cut of the product q k^T (at q, k, rot_q, rot_k) acts in both; scores, pattern, v, z and
result are those of one stream alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from surgery.family import register_example, register_softmax

LILT, LILT_BLOCK = (f"transformers.models.lilt.modeling_lilt.{name}" for name in ("LiltSelfAttention", "LiltAttention"))
FUSIONS = (
    "transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoBiMultiHeadAttention",
    "transformers.models.mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention",
)

register_softmax(1, LILT)  # the text's; before it comes the layout's, whose scores are the same sum
register_softmax(1, *FUSIONS)  # the image's, which reads the text; before it comes the text's, by the same product transposed


@register_example(LILT, LILT_BLOCK)
def layout(module: Any, states: Tensor) -> dict[str, Any]:
    width = getattr(module, "self", module).layout_query.in_features
    return {"layout_inputs": states.new_ones(*states.shape[:-1], width)}


@register_example(*FUSIONS)
def text(module: Any, states: Tensor) -> dict[str, Any]:
    return {"text_features": states.new_ones(len(states), 5, module.text_dim)}
