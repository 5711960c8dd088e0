"""Where q, k, v and z are in transformers' modules, for ways that address these: by family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.comparison.task import Settings


@dataclass(frozen=True)
class Places:
    """layers: path of the list of layers. attention: path within a layer. q, k, v: (path there, first channel). o: W_O."""

    layers: str
    attention: str
    q: tuple[str, int]
    k: tuple[str, int]
    v: tuple[str, int]
    o: str

    def attentions(self, model: Any) -> list[Any]:
        """Of each layer, of a module or whatever wraps it."""
        layers = model
        for name in self.layers.split("."):
            layers = getattr(layers, name)
        return [getattr(layer, self.attention) for layer in layers]


def places(s: Settings) -> Places:
    if s.family == "gpt2":
        width = s.heads * s.d_head
        return Places("transformer.h", "attn", ("c_attn", 0), ("c_attn", width), ("c_attn", 2 * width), "c_proj")
    return Places("model.layers", "self_attn", ("q_proj", 0), ("k_proj", 0), ("v_proj", 0), "o_proj")


def channels(heads: Sequence[int], d_head: int, first: int = 0) -> list[int]:
    """Of these heads, in the output of a projection."""
    return [first + head * d_head + channel for head in heads for channel in range(d_head)]


def as_heads(tensor: Tensor, first: int, heads: int, d_head: int) -> Tensor:
    """(batch, position, channel) to (batch, head, position, d_head)."""
    return tensor[..., first : first + heads * d_head].unflatten(-1, (heads, d_head)).transpose(1, 2)


def sorted_out(found: Sequence[dict[str, Tensor]], s: Settings) -> list[Tensor]:
    """Of what modules gave in each layer (by name of `Places`), q, k, v, pattern and z as `Way.read_everything` has them."""
    where, kv_heads = places(s), s.heads if s.family == "gpt2" else s.kv_heads
    tensors = []
    for layer in found:
        tensors += [as_heads(layer["q"], where.q[1], s.heads, s.d_head)]
        tensors += [as_heads(layer[name], getattr(where, name)[1], kv_heads, s.d_head) for name in ("k", "v")]
        tensors += [layer["pattern"], as_heads(layer["z"], 0, s.heads, s.d_head)]
    return tensors


def score(z: Tensor, gradient: Tensor, s: Settings) -> Tensor:
    """(head): minus z times its gradient, summed; both (batch, position, head and d_head)."""
    return -(z.detach() * gradient).unflatten(-1, (s.heads, s.d_head)).sum((0, 1, 3))
