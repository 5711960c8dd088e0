"""Pegasus-X: the keys of a block are those of the global tokens and its own, multiplied apart and joined before the softmax.

What is cut is this attention of the tokens. That of the global tokens, by the same projections, stays the family's: cuts of q
and k at the projections act in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.family import Family, register_example, register_patch
from surgery.interface import arranged, point, written_out

CLASS = "transformers.models.pegasus_x.modeling_pegasus_x.PegasusXGlobalLocalAttention"


def compute_local_attention_representations(
    self: Any, global_k: Tensor, global_v: Tensor, local_q: Tensor, local_k: Tensor, local_v: Tensor, mask: Tensor, dim: Any
) -> tuple[Tensor, Tensor]:
    blocks = (dim.batch_size, dim.num_heads, dim.num_blocks, dim.block_size, dim.dim_per_head)
    query = _at(self, "rot_q", local_q.view(blocks))
    keys = _joined(self, "rot_k", global_k, local_k.view(blocks))
    values = _joined(self, "v", global_v, local_v.view(blocks))
    scores = torch.cat([torch.einsum(f"BHNKF,{axes}->BHNKX", query, part) for axes, part in keys], dim=-1)
    mask = F.pad(mask.view(dim.batch_size, dim.num_blocks, dim.block_size), pad=(dim.global_len, 0), value=0)
    scores = _at(self, "scores", scores + mask[:, None, :, None, :])
    pattern = _at(self, "pattern", F.softmax(scores, dim=-1))
    pattern = F.dropout(pattern, p=self.dropout, training=self.training)
    shares = pattern.split([dim.global_len, dim.block_size], dim=-1)
    first, second = (torch.einsum(f"BHNKX,{axes}->BHNKF", share, v) for share, (axes, v) in zip(shares, values, strict=True))
    return _at(self, "z", first + second), pattern


def _at(self: Any, site: str, tensor: Tensor) -> Tensor:
    """A point; blocks are a second axis of the batch."""
    return point(self, site, tensor, arranged("b h b r c", self.num_heads))


def _joined(self: Any, site: str, first: Tensor, second: Tensor) -> list[tuple[str, Tensor]]:
    """The rows of the global tokens and of each block, which are one site, with the letters of their axes.

    Uncut, they are the very tensors that they were: products of other shapes round otherwise.
    """
    every = first.unsqueeze(2).expand(-1, -1, second.shape[2], -1, -1)
    whole = torch.cat([every, second], dim=3)
    found = _at(self, site, whole)
    if found is whole:
        return [("BHXF", first), ("BHNXF", second)]
    return [("BHNXF", part) for part in found.split([first.shape[2], second.shape[3]], dim=3)]


@register_example(CLASS)
def one_block(module: Any, states: Tensor) -> dict[str, Any]:
    length, width = module.block_size, module.embed_dim
    return {
        "token_hidden_states": states.new_ones(len(states), length, width),
        "global_hidden_states": states.new_ones(len(states), 3, width),
        "attention_mask": states.new_zeros(len(states), length),
    }


PEGASUS_X = written_out(
    {"compute_local_attention_representations": compute_local_attention_representations},
    beside="the attention of its global tokens",
)


@register_patch(CLASS)
def describe(module: Any, family: Family | None) -> Family:
    return PEGASUS_X
