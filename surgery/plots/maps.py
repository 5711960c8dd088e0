"""Heat maps over layer × head: any number of circuits side by side with one scale, and where some of the heads look."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from surgery.plots.style import COST, GAIN_AND_COST, OUTLINES, is_dark, new_figure, number, plain, scale, ticks
from surgery.plots.tokens import draw_pattern

NUMBERED_HEADS = 12
"""Cells hold their numbers up to this many heads per layer and layers, if there is room for them."""
LEAST_FONT = 5.0
"""Points: smaller numbers are left out."""


@dataclass(frozen=True, eq=False)
class Named:
    """A head to point out. row, head: its cell; pattern: (query, key) attention, or None to draw no pattern."""

    name: str
    row: int
    head: int
    pattern: np.ndarray | None = None


def heatmaps(qk: np.ndarray, ov: np.ndarray, **options: Any) -> Figure:
    """`head_maps` of what freezing the two circuits of each head costs. qk, ov: (layer, head)."""
    return head_maps({"QK frozen: where it looks": qk, "OV frozen: what it moves": ov}, **options)


def head_maps(
    maps: Mapping[str, np.ndarray],
    *,
    layers: Sequence[str] | None = None,
    named: Sequence[Named] = (),
    tokens: Sequence[str] = (),
    divider: int | None = None,
    title: str = "",
    subtitle: str = "",
    unit: str = "loss change (nats per token)",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Heat maps over layer × head with one scale, and below them the patterns of the named heads.

    maps: title to (layer, head), all of one shape; NaN is left grey. layers: names of the rows. tokens: of the patterns'
    positions. divider: draw a line before this position. unit: of the values. limits: of the scale, by default the values'.
    Colours are white at 0, and run both ways if anything is clearly below it. From 2 × 4 to 48 × 64 heads and beyond.
    """
    shapes = {np.shape(values) for values in maps.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"head_maps: found maps of shapes {sorted(shapes)}; expected (layer, head), all the same. Fill with NaN."
        )
    ((rows, _),) = shapes
    names = list(layers) if layers is not None else [str(row) for row in range(rows)]
    shown = [n for n in named if n.pattern is not None]
    lines = 1 if len(maps) <= 3 else 2
    columns = math.ceil(len(maps) / lines)
    height_of_maps = (min(max(0.42 * rows, 2.1), 9.0 if lines == 1 else 6.0) + 0.4) * lines
    height_of_patterns = 4.7 if shown else 0.0
    width = min(max(5.5 * columns, 6.5), 16.0)
    figure = new_figure(width, 1.0 + height_of_maps + height_of_patterns, title)
    heights = [height_of_maps + 0.6, height_of_patterns] if shown else [1.0]
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    upper, *lower = parts.flat
    if subtitle:
        upper.suptitle(subtitle, fontsize=10, color="#555555")
    everything = np.stack(list(maps.values())).astype(float)
    norm, colormap = scale(everything)
    if limits is not None:
        norm, colormap = Normalize(*limits), COST if limits[0] >= 0 else GAIN_AND_COST
    above = upper.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in above.flat[len(maps) :]:
        axes.set_visible(False)
    room = (width - 1.6) / columns
    finite = everything[np.isfinite(everything)]
    largest = float(np.abs(finite).max(initial=0.0))
    is_signed = limits is None or limits[0] < 0

    def written(value: float) -> str:
        return number(value, largest) if is_signed else number(value, largest).removeprefix("+")

    for axes, (text, values) in zip(above.flat, maps.items(), strict=False):
        image = _map(axes, np.asarray(values, dtype=float), norm, colormap, room, written)
        axes.set_title(text, fontsize=11)
        _outline(axes, named)
    for axes in above[:, 0]:
        axes.set_ylabel("layer")
        axes.set_yticks(*ticks(names, 24))
    bar = upper.colorbar(image, ax=list(above.flat[: len(maps)]), label=unit, pad=0.015, aspect=max(18.0, height_of_maps / 0.2))
    if limits is None:
        bar.ax.set_ylim(float(finite.min(initial=0.0)), float(finite.max(initial=1e-6)))
    if shown:
        below = lower[0].subplots(1, max(len(shown), 2))
        for axes in below[len(shown) :]:
            axes.set_visible(False)
        for axes, head in zip(below, shown, strict=False):
            color = OUTLINES[list(named).index(head) % len(OUTLINES)]
            text = f"{head.name} head: layer {names[head.row]} head {head.head}"
            image = draw_pattern(axes, np.asarray(head.pattern), text, tokens, divider, color)
        lower[0].colorbar(image, ax=list(below[: len(shown)]), label="attention", pad=0.015, aspect=24)
    return figure


def pair_map(
    values: np.ndarray, names: Sequence[str], edges: Sequence[int], *, rows: str, columns: str, unit: str, title: str = ""
) -> Figure:
    """A heat map over pairs of heads, white at 0; NaN is grey. edges: draw lines before these heads, where layers begin."""
    size = min(max(0.32 * len(names) + 2.2, 5.0), 13.0)
    figure = new_figure(size + 1.0, size, title)
    axes: Axes = figure.subplots()
    norm, colormap = scale(np.asarray(values, dtype=float))
    axes.set_facecolor("#e4e4e4")
    image = axes.imshow(values, norm=norm, cmap=colormap, interpolation="nearest")
    most = 36
    axes.set_xticks(*ticks(list(names), most), rotation=90, fontsize=7)
    axes.set_yticks(*ticks(list(names), most), fontsize=7)
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    thin = 0.6 if len(names) <= 200 else 0.2
    for edge in edges:
        axes.axhline(edge - 0.5, color="#b0b0b0", linewidth=thin)
        axes.axvline(edge - 0.5, color="#b0b0b0", linewidth=thin)
    plain(axes)
    bar = figure.colorbar(image, ax=axes, label=unit, shrink=0.8, pad=0.02)
    finite = values[np.isfinite(values)]
    if finite.size:
        bar.ax.set_ylim(float(finite.min(initial=0.0)), float(finite.max(initial=1e-6)))
    return figure


def _map(
    axes: Axes, values: np.ndarray, norm: Normalize, colormap: Colormap, room: float, written: Callable[[float], str]
) -> Any:
    """One heat map. room: inches that it is wide, about; written: a value as text."""
    rows, heads = values.shape
    axes.set_facecolor("#e4e4e4")
    image = axes.imshow(values, norm=norm, cmap=colormap, aspect="auto", interpolation="nearest")
    axes.set_xlabel("head")
    axes.set_xticks(*ticks([str(head) for head in range(heads)], 16))
    plain(axes)
    if max(rows, heads) > NUMBERED_HEADS:
        return image
    axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d0d0d0", linewidth=0.8)
    texts = {index: written(value) for index, value in np.ndenumerate(values) if np.isfinite(value)}
    longest = max(map(len, texts.values()), default=1)
    size = min(9.0, 72 * room / heads / (0.76 * longest))  # a digit is about 0.6 of the font's size wide
    if size < LEAST_FONT:
        return image
    for (row, head), text in texts.items():
        color = "white" if is_dark(colormap(norm(values[row, head]))) else "#222222"
        axes.text(head, row, text, ha="center", va="center", fontsize=size, color=color)
    return image


def _outline(axes: Axes, named: Sequence[Named]) -> None:
    for index, head in enumerate(named):
        box = Rectangle((head.head - 0.5, head.row - 0.5), 1, 1, fill=False, linewidth=2.5, clip_on=False, zorder=3)
        box.set_edgecolor(OUTLINES[index % len(OUTLINES)])
        axes.add_patch(box)
