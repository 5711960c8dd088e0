"""ProphetNet's decoder attends in a main stream and in others that predict later tokens, each with a softmax of its own.

A predicting stream reads the keys of the main stream and then its own. Points are reached once for each stream in a forward,
last for the main one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.family import Family, register_example, register_patch
from surgery.interface import needs_position, point, refuse, take_cache, written_out


def _each(reach: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What a step makes of (batch, head, ..), or of every stream of (batch, stream, head, ..)."""
    return reach(tensor) if tensor.dim() == 4 else torch.stack([reach(one) for one in tensor.unbind(1)], 1)


def _pattern(self: Any, query: Tensor, key: Tensor, mask: Tensor | None, bias: Callable[[Tensor], Tensor]) -> Tensor:
    def normed(scores: Tensor) -> Tensor:
        scores = point(self, "scores", scores)
        return point(self, "pattern", F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores))

    query = _each(lambda q: point(self, "rot_q", q), query)
    key = _each(lambda k: point(self, "rot_k", k), key)
    scores = torch.einsum("...tc,...sc->...ts", query, key)
    scores = scores + bias(scores)
    return _each(normed, scores if mask is None else scores + mask)


def _output(self: Any, weights: Tensor, value: Tensor) -> Tensor:
    """(batch, stream * query, d_model)."""
    z = _each(lambda z: point(self, "z", z), torch.einsum("...ts,...sc->...tc", weights, value))
    rows = z.transpose(-2, -3).flatten(-2)
    return self.out_proj(rows if rows.dim() == 4 else rows.unsqueeze(1)).flatten(1, 2)


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    extended_predict_attention_mask: Tensor | None = None,
    main_relative_position_buckets: Tensor | None = None,
    predict_relative_position_buckets: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states: (batch, stream * query, d_model), the main stream first."""
    cache = take_cache(kwargs)
    batch, streams = hidden_states.shape[0], 1 + self.ngram

    def split(projected: Tensor) -> Any:
        return self._shape(projected, -1, batch).chunk(streams, dim=2)

    query, *queries = split(self.query_proj(hidden_states) / self.head_dim**0.5)
    key, *keys = split(self.key_proj(hidden_states))
    value, *values = split(self.value_proj(hidden_states))
    states, *others = hidden_states.chunk(streams, dim=1)
    if cache is not None:
        cache = getattr(cache, "self_attention_cache", cache)
        key, value = cache.update(key, value, self.layer_idx)
        _check_positions(self, key.shape[2] > query.shape[2])

    mask = extended_predict_attention_mask
    mask = None if mask is None else mask.permute(0, 2, 1, 3, 4).to(query.dtype)
    buckets = predict_relative_position_buckets
    bias = functools.partial(self.get_predict_relative_pos_embeddings, torch.stack(others, dim=2))
    own_keys = torch.stack([torch.cat([key, own], 2) for own in keys], 1)
    own_values = torch.stack([torch.cat([value, own], 2) for own in values], 1)
    predicting = _pattern(self, torch.stack(queries, 1), own_keys, mask, lambda scores: bias(scores, position_ids, buckets))
    own_values = _each(lambda v: point(self, "v", v), own_values)

    main_bias = functools.partial(self.get_main_relative_pos_embeddings, states)
    main_buckets = main_relative_position_buckets
    main = _pattern(self, query, key, attention_mask, lambda scores: main_bias(scores, position_ids, main_buckets))
    value = point(self, "v", value)

    main = F.dropout(main, p=self.attention_dropout, training=self.training)
    predicting = F.dropout(predicting, p=self.attention_dropout, training=self.training)
    outputs = [_output(self, predicting, own_values), _output(self, main, value)]
    output = torch.cat(outputs[::-1], 1)
    return F.dropout(output, p=self.dropout, training=self.training), main, predicting


def _check_positions(self: Any, has_past: bool) -> None:
    """Keys of a predicting stream stand behind those of the main one, and streams behind one another in the projections."""
    if has_past and (sites := needs_position(self, "q", "k", "rot_k", "v", "scores", "pattern", "result")):
        refuse(
            self,
            f"cuts at {', '.join(sites)} that depend on the position, in decoding with a cache",
            "a number for each key that does not change from step to step",
            "Generate with use_cache=False, or cut rot_q or z.",
        )


PROPHETNET = written_out({"forward": forward})
NAME = "transformers.models.prophetnet.modeling_prophetnet.ProphetNetNgramSelfAttention"


@register_example(NAME)
def example(module: Any, states: Tensor) -> dict[str, Any]:
    ngram, heads, length = module.ngram, module.num_attn_heads, 3
    zeros, buckets = states.new_zeros, functools.partial(torch.zeros, dtype=torch.long, device=states.device)
    return {
        "hidden_states": zeros(2, (1 + ngram) * length, module.hidden_size) + 1,
        "attention_mask": zeros(2, heads, length, length),
        "extended_predict_attention_mask": zeros(2, heads, ngram, length, 2 * length),
        "main_relative_position_buckets": buckets(2, length, length),
        "predict_relative_position_buckets": buckets(2, length, 2 * length),
    }


@register_patch(NAME)
def describe(module: nn.Module, family: Family | None) -> Family:
    return PROPHETNET
