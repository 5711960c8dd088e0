"""Arguments to run a family's eager function on, made from one recorded call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.rewrite import Rewriter


def plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of a recorded call without their labels."""
    return {n: v.as_subclass(Tensor).detach() if isinstance(v, Tensor) else v for n, v in kwargs.items()}


def sample_arguments(
    rewriter: Rewriter, shapes: Mapping[str, tuple[int, ...]], kwargs: Mapping[str, Any], masked: bool
) -> dict[str, Any]:
    """Random arguments of the recorded shapes for a family's eager function, with an additive mask or with None."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shapes[name], generator=generator) for name in "qkv")
    mask = None
    if masked:
        mask = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2])
        mask[..., -1:] = torch.finfo(mask.dtype).min
    return rewriter.bind(query, key, value, mask, kwargs)


def blank_arguments(rewriter: Rewriter, kwargs: Mapping[str, Any], masked: bool) -> dict[str, Any]:
    """What `sample_arguments` gives, for a trace, which looks at no numbers and no sizes."""
    tensor = torch.empty(0)
    return rewriter.bind(tensor, tensor, tensor, tensor if masked else None, kwargs)
