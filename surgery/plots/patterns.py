"""Where chosen heads look, before and after cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn

from surgery.captures import capture
from surgery.errors import SpecError, describe
from surgery.evaluation import evaluating, uncached
from surgery.patch import anatomy_of, as_spec, cuts_of, patched
from surgery.plots.style import GAIN_AND_COST, in_words, new_figure, short
from surgery.plots.tokens import UNIT, draw_pattern

Head = tuple[str | int, int]
COLUMNS = 4
"""Patterns side by side, where there is nothing to compare."""


def pattern_pictures(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    spec: Any = None,
    heads: Sequence[Head] = (),
    labels: Sequence[str] | None = None,
    *,
    sources: Sequence[str] | None = None,
    example: int = 0,
    divider: int | None = None,
    title: str = "",
) -> Figure:
    """Attention patterns of heads as the model is, under the spec's cuts beside it, and the difference; a row for each head.

    inputs: of one forward, of which one example (row of the batch) is shown. spec: cuts on top of those that the model has;
    None shows the patterns alone. heads: (address or layer, head). labels: texts of the tokens (in cross-attention those of
    the queries, and `sources` those of the keys), numbers by default. title: by default the cuts. Differences have a scale of
    their own, one for all. Raises SpecError or NoMatchError for heads that do not exist.
    """
    if not heads:
        raise SpecError(describe("pattern_pictures", "no heads", "at least one", "For example heads=[(5, 1), ('self.6', 9)]."))
    shown = patterns_of(model, inputs, spec, heads, example)
    if len(shown) == 1:
        return _alone(shown[""], heads, labels, sources, divider, title)
    before, after = shown.values()
    changes = [b - a for a, b in zip(before, after, strict=True)]
    largest = max(float(np.nanmax(np.abs(change), initial=0.0)) for change in changes) or 1.0
    title = title or in_words(as_spec(spec))
    figure = new_figure(13.0, 3.9 * len(heads) + 0.25 + 0.25 * len(title.split("\n")), title)
    rows: Any = figure.subplots(len(heads), 3, squeeze=False)
    for axes, head, *patterns in zip(rows, heads, before, after, changes, strict=True):
        name = head_name(head)
        options: dict[str, Any] = {"tokens": labels or (), "sources": sources, "divider": divider, "most": 32}
        draw_pattern(axes[0], patterns[0], f"{name}: before", **options)
        image = draw_pattern(axes[1], patterns[1], f"{name}: after", **options)
        norm = Normalize(-largest, largest)
        change = draw_pattern(axes[2], patterns[2], f"{name}: after − before", norm=norm, colormap=GAIN_AND_COST, **options)
        figure.colorbar(image, ax=list(axes[:2]), label="attention", pad=0.01, shrink=0.85)
        figure.colorbar(change, ax=axes[2], label="change of attention", pad=0.02, shrink=0.85)
    return figure


def patterns_of(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, spec: Any, heads: Sequence[Head], example: int
) -> dict[str, list[np.ndarray]]:
    """(query, key) of each head: {"": as the model is}, or with cuts {": before": .., ": after": ..}."""
    given = {getattr(model, "main_input_name", "input_ids"): inputs} if isinstance(inputs, Tensor) else dict(inputs)
    cuts = as_spec(spec)
    base, kernel = cuts_of(model)
    with patched(model, base, kernel=kernel, strict=False):
        before = _patterns(model, given, heads, example)
        if not len(cuts):
            return {"": before}
        with patched(model, base + cuts, kernel=kernel, strict=False):
            return {": before": before, ": after": _patterns(model, given, heads, example)}


def _alone(
    patterns: Sequence[np.ndarray],
    heads: Sequence[Head],
    labels: Sequence[str] | None,
    sources: Sequence[str] | None,
    divider: int | None,
    title: str,
) -> Figure:
    columns = min(COLUMNS, len(heads))
    lines = -(-len(heads) // columns)
    figure = new_figure(4.2 * columns + 1.0, 4.3 * lines + (0.5 if title else 0.1), title)
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(heads) :]:
        axes.set_visible(False)
    for axes, head, pattern in zip(grid.flat, heads, patterns, strict=False):
        image = draw_pattern(axes, pattern, head_name(head), labels or (), divider, norm=UNIT, most=32, sources=sources)
    figure.colorbar(image, ax=list(grid.flat[: len(heads)]), label="attention", pad=0.015, aspect=18 * lines)
    return figure


@torch.no_grad()
def _patterns(model: nn.Module, inputs: Mapping[str, Any], heads: Sequence[Head], example: int) -> list[np.ndarray]:
    """(query, key) of each head; a shared module's in its last run."""
    anatomy = anatomy_of(model, strict=False)
    chosen: dict[str, list[int]] = {}
    for address, head in dict.fromkeys(heads):
        chosen.setdefault(anatomy[address].address, []).append(head)
    found: dict[tuple[str, int], np.ndarray] = {}
    for address, numbers in chosen.items():
        with evaluating(model), capture(model, ["pattern"], layers=[address], heads=numbers, detach=True, strict=False) as run:
            model(**uncached(model, inputs))
        pattern = run[address, "pattern"]
        if not -len(pattern) <= example < len(pattern):
            expected = f"0 to {len(pattern) - 1}"
            raise SpecError(describe("pattern_pictures", f"example {example}", expected, "Choose a row of the batch."))
        for number, matrix in zip(numbers, pattern[example].float().cpu().numpy(), strict=True):
            found[address, number] = matrix
    return [found[anatomy[address].address, head] for address, head in heads]


def head_name(head: Head) -> str:
    """Like "layer 5 head 1"; with the address where that says more."""
    address, number = head
    layer = short(address)
    return f"layer {layer} head {number}" if layer.isdigit() else f"{layer} head {number}"
