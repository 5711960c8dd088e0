"""The gradient of a loss with respect to every head's part of the projections, without touching the parameters.

For the length of a forward a projection has a stand-in for its weight: the same numbers in the same memory, detached, with a
gradient of its own. So frozen weights have a gradient too, and neither `.grad` nor `requires_grad` of a parameter changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.anatomy import Anatomy, Attention, Projection
from surgery.taps import has_numbers

NAMES = {"q": "W_Q", "k": "W_K", "v": "W_V", "o": "W_O"}
"""A projection's name in an anatomy to that of its weight."""


@dataclass(frozen=True, eq=False)
class Block:
    """One weight of one attention, a part for each head (W_Q, W_O) or kv head (W_K, W_V).

    module: the one that stores the weight; None where there is no gradient, and `why` then says so.
    """

    attention: Attention
    site: str
    projection: Projection | None
    module: Any
    why: str = ""

    @property
    def name(self) -> str:
        return NAMES[self.site]

    @property
    def heads(self) -> int:
        return self.attention.kv_heads if self.site in ("k", "v") else self.attention.heads

    @property
    def is_frozen(self) -> bool:
        return self.module is not None and not self.module.weight.requires_grad

    def by_head(self, gradient: Tensor) -> Tensor:
        """(head, d_in, d_head), of W_O (head, d_head, d_out), from the gradient of the stored weight."""
        assert self.projection is not None
        matrix = gradient if isinstance(self.module, Conv1D) else gradient.mT
        channels = self.projection.channels.to(matrix.device)
        return matrix[channels] if self.site == "o" else matrix[:, channels].transpose(0, 1)


def blocks_of(model: nn.Module, anatomy: Anatomy) -> list[Block]:
    """The weights of all attentions, those without a gradient with the reason."""
    return [_block(model, attention, site) for attention in anatomy for site in NAMES]


def _block(model: nn.Module, attention: Attention, site: str) -> Block:
    projection = attention.projections.get(site)
    if projection is None:
        return Block(attention, site, None, None, attention.why.get(site, f"{site} comes from no single projection"))
    module: Any = model.get_submodule(projection.path)
    while hasattr(module, "base_layer"):  # an adapter's: its gradient is that of the sum
        module = module.base_layer
    weight = getattr(module, "_parameters", {}).get("weight")
    why = ""
    if weight is None or not isinstance(module, nn.Linear | Conv1D):
        why = f"{projection.path} is a {type(module).__name__}, which stores its weight in a way of its own"
    elif hasattr(weight, "full_tensor"):  # torch's DTensor
        why = f"the weight of {projection.path} is spread over processes"
    elif not has_numbers(weight):
        why = f"the weight of {projection.path} is quantised"
    elif weight.is_meta:
        why = f"the weight of {projection.path} is offloaded, or has no data"
    return Block(attention, site, projection, None if why else module, why)


@contextmanager
def standing_in(blocks: list[Block]) -> Iterator[list[Tensor]]:
    """Within the block, projections compute with stand-ins, which are yielded in the order of `modules_of`."""
    modules = modules_of(blocks)
    before = [module._parameters["weight"] for module in modules]
    stands = [nn.Parameter(weight.detach()) for weight in before]
    try:
        for module, stand in zip(modules, stands, strict=True):
            module._parameters["weight"] = stand
        yield list(stands)
    finally:
        for module, weight in zip(modules, before, strict=True):
            module._parameters["weight"] = weight


def modules_of(blocks: list[Block]) -> list[Any]:
    """The modules that store the weights, each once: fused projections share one."""
    return list({id(block.module): block.module for block in blocks if block.module is not None}.values())


def measured(block: Block, gradient: Tensor) -> dict[str, list[float]]:
    """By head: the norm (L2), the mean and the largest absolute entry, and the share of entries that are not exactly zero."""
    parts = block.by_head(gradient).flatten(1).abs()
    exact = parts.double()
    found = {"norm": exact.norm(dim=1), "mean": exact.mean(1), "max": exact.amax(1), "nonzero": (parts != 0).double().mean(1)}
    return {name: values.tolist() for name, values in found.items()}


def is_zero(block: Block, gradient: Tensor) -> Tensor:
    """(head,) boolean: whether every entry of a head's part is exactly zero."""
    return (block.by_head(gradient) == 0).flatten(1).all(1)


def summed(gradients: list[Any], like: list[Tensor]) -> list[Tensor]:
    """Gradients as torch.autograd.grad gives them, zeros in place of None."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, like, strict=True)]
