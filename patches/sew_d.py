"""SEW-D masks within a softmax that has a gradient of its own; here it is written out, so that scores are masked scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.family import Family, register_example, register_patch
from surgery.interface import point, without_points, written_out


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The terms of relative positions are made of q and k, too, and so behind their points."""
    heads = self.num_attention_heads
    states = hidden_states if query_states is None else query_states

    def project(projection: nn.Module, states: Tensor, site: str) -> Tensor:
        by_head = self.transpose_for_scores(projection(states), heads).unflatten(0, (-1, heads))
        return point(self, site, by_head).flatten(0, 1)

    query = project(self.query_proj, states, "rot_q")
    key = project(self.key_proj, hidden_states, "rot_k")
    value = project(self.value_proj, hidden_states, "v")
    terms = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
    scale = torch.sqrt(torch.tensor(query.shape[-1], dtype=torch.float) * terms).to(dtype=query.dtype)
    scores = torch.bmm(query, key.transpose(-1, -2) / scale)
    if self.relative_attention:
        positions = self.pos_dropout(rel_embeddings)
        # Where they share the projections of q and k, positions are neither.
        own = without_points(self)
        scores = scores + own.disentangled_attention_bias(query, key, relative_pos, positions, terms)
    masked = ~attention_mask.to(torch.bool)
    scores = scores.unflatten(0, (-1, heads)).masked_fill(masked, torch.finfo(scores.dtype).min)
    scores = point(self, "scores", scores)
    pattern = point(self, "pattern", torch.softmax(scores, -1).masked_fill(masked, 0))
    weights = self.dropout(pattern)
    z = point(self, "z", torch.bmm(weights.flatten(0, 1), value).unflatten(0, (-1, heads)))
    return z.transpose(1, 2).flatten(2), weights


SEW_D = written_out({"forward": forward})
NAME = "transformers.models.sew_d.modeling_sew_d.DisentangledSelfAttention"


@register_example(NAME)
def example(module: Any, states: Tensor) -> dict[str, Any]:
    """The last position is padding."""
    attention_mask = torch.ones(len(states), 1, 1, states.shape[1], dtype=torch.bool, device=states.device)
    attention_mask[..., -1] = False
    reach = getattr(module, "pos_ebd_size", 1)
    return {"attention_mask": attention_mask, "rel_embeddings": states.new_ones(2 * reach, states.shape[-1])}


@register_patch(NAME)
def describe(module: nn.Module, family: Family | None) -> Family:
    return SEW_D
