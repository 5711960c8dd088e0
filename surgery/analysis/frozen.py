"""A forward whose norms divide by numbers that are fixed: what is left of a norm is then linear.

RMS and layer norms divide by a scale that they compute from their input. With the scale of one forward kept (frozen), the rest
(centring, gains, shifts) is affine, and what is summed before the norm can be told apart behind it: the usual reading of direct
logit attribution (Elhage et al. 2021; nostalgebraist 2020). Nothing is known of any model here: roots and inverse roots are
caught as torch functions; whether what is left is affine is for the caller to check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_ROOTS: frozenset[Any] = frozenset(
    {torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt, torch.std, Tensor.std, torch.norm, Tensor.norm, torch.linalg.norm}
    | {torch.linalg.vector_norm, torch.rsqrt_, Tensor.rsqrt_, Tensor.sqrt_}
)
_POWERS: frozenset[Any] = frozenset({torch.pow, Tensor.pow, Tensor.__pow__})
_LAYER_NORMS: frozenset[Any] = frozenset({F.layer_norm, torch.layer_norm})
_RMS_NORMS: frozenset[Any] = frozenset({F.rms_norm, torch.rms_norm})


class FrozenScales(TorchFunctionMode):
    """Within the block, scales of norms bear no gradient.

    kept: those of an earlier block, to be used again in their order. unit: they are 1. count: how many there were.
    """

    def __init__(self, kept: list[Tensor] | None = None, *, unit: bool = False) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.count, self._unit = 0, unit
        self._again = None if kept is None else iter(kept)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LAYER_NORMS:
            return self._layer_norm(*args, **kwargs)
        if func in _RMS_NORMS:
            return self._rms_norm(*args, **kwargs)
        if func in _ROOTS or (func in _POWERS and _is_root(*args, **kwargs)):
            return self._frozen(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _frozen(self, compute: Callable[[], Tensor]) -> Tensor:
        self.count += 1
        if self._again is not None:
            return next(self._again)
        if self._unit:
            return torch.ones_like(compute())
        self.kept.append(compute().detach())
        return self.kept[-1]

    def _layer_norm(
        self, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
    ) -> Tensor:
        axes = tuple(range(-len(tuple(normalized_shape)), 0))
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        centred = wide - wide.mean(axes, keepdim=True)
        return self._scaled(centred, centred, axes, eps, weight, bias, input.dtype)

    def _rms_norm(self, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        axes = tuple(range(-len(tuple(normalized_shape)), 0))
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        eps = torch.finfo(wide.dtype).eps if eps is None else eps
        return self._scaled(wide, wide, axes, eps, weight, None, input.dtype)

    def _scaled(self, x: Tensor, of: Tensor, axes: tuple[int, ...], eps: float, weight: Any, bias: Any, dtype: Any) -> Tensor:
        found = x * self._frozen(lambda: (of.square().mean(axes, keepdim=True) + eps).rsqrt())
        found = found if weight is None else found * weight
        return (found if bias is None else found + bias).to(dtype)


def _is_root(base: Any, exponent: Any, **_: Any) -> bool:
    """Whether a power is a root or a division, and not a square or a cube."""
    return isinstance(base, Tensor) and isinstance(exponent, float | int) and (exponent < 0 or exponent % 1 != 0)
