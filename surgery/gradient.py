"""Gradients that are chosen: forward one tensor, backward to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gradient(torch.autograd.Function):
    """Forward: `value`. Backward: `factor` times the gradient to `original`, none to `value`.

    A function rather than value + (original - original.detach()), which is NaN where masked scores are infinite.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(original: Tensor, value: Tensor, factor: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.factor, None, None


def with_gradient(original: Tensor, value: Tensor, factor: float) -> Tensor:
    """`value`, whose gradient goes to `original`, times `factor`; none at all where the factor is 0."""
    if factor == 0.0 or not (torch.is_grad_enabled() and original.requires_grad):
        return value.detach()
    return _Gradient.apply(original, value.detach(), factor)
