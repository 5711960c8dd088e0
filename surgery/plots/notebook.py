"""Attention to look at in a notebook: heads to choose from, and tokens to point at. Needs the package circuitsvis."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from surgery.errors import SurgeryError, describe
from surgery.plots.patterns import Head, head_name, patterns_of


class AttentionView:
    """A picture of its own HTML and JavaScript, which a notebook shows; nothing is loaded from elsewhere."""

    def __init__(self, html: str) -> None:
        self.html = html

    def _repr_html_(self) -> str:
        return self.html


def attention_view(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    heads: Sequence[Head],
    labels: Sequence[str] | None = None,
    spec: Any = None,
    *,
    example: int = 0,
) -> AttentionView:
    """The patterns of heads, to choose from and to point at in a notebook; with a spec, before and after its cuts.

    Arguments as of `surgery.plots.pattern_pictures`; labels are texts of the tokens, numbers by default. Self-attention only,
    as both axes have the same tokens. Raises SurgeryError if circuitsvis is not installed, or a pattern is not square.
    """
    try:
        draw = importlib.import_module("circuitsvis.attention").attention_heads
    except ImportError as error:
        found, do = f"no package circuitsvis ({error})", 'pip install "attention-surgery[notebook]"'
        raise SurgeryError(describe("attention_view", found, "the package that draws it", do)) from error
    shown = patterns_of(model, inputs, spec, heads, example)
    names = [f"{head_name(head)}{when}" for when in shown for head in heads]
    patterns = np.stack([pattern for of in shown.values() for pattern in of])
    rows, columns = patterns.shape[1:]
    if rows != columns:
        found = f"patterns of {rows} queries over {columns} keys"
        raise SurgeryError(describe("attention_view", found, "self-attention", "Use pattern_pictures, which has both axes."))
    tokens = list(labels) if labels is not None else [str(i) for i in range(rows)]
    if len(tokens) != rows:
        raise SurgeryError(
            describe("attention_view", f"{len(tokens)} labels", f"{rows}, one a token", "Pass labels of them all.")
        )
    is_causal = not np.triu(patterns, 1).any()
    view = draw(
        attention=patterns, tokens=tokens, attention_head_names=names, min_value=0.0, max_value=1.0, mask_upper_tri=is_causal
    )
    return AttentionView(view.local_src)  # its other form loads a script from a server, and asks another whether it is on line
