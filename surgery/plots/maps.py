"""Heat maps: any number side by side with one scale, over layer × head or other axes, and where some of the heads look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from surgery.plots.style import (
    COST,
    GAIN_AND_COST,
    OUTLINES,
    color_bar,
    extent,
    is_dark,
    name_ticks,
    new_figure,
    new_part,
    number,
    plain,
    scale,
)
from surgery.plots.tokens import draw_pattern

NUMBERED = 12
"""Cells hold their numbers up to this many rows and columns, if there is room for them."""
LEAST_FONT = 5.0
"""Points: smaller numbers are left out."""
ACROSS = 3
"""Most maps in one row."""


@dataclass(frozen=True, eq=False)
class Named:
    """A head to point out. row, head: its cell; pattern: (query, key) attention, or None to draw no pattern."""

    name: str
    row: int
    head: int
    pattern: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class _Maps:
    """Heat maps of one shape. rows, columns: names; axes: what these are; edges: lines before these rows, and columns."""

    maps: Mapping[str, np.ndarray]
    rows: Sequence[str]
    columns: Sequence[str]
    axes: tuple[str, str]
    unit: str
    limits: tuple[float, float] | None = None
    middle: float = 0.0
    edges: tuple[Sequence[int], Sequence[int]] = ((), ())

    @property
    def across(self) -> int:
        return 2 if len(self.maps) == 4 else min(len(self.maps), ACROSS)

    @property
    def down(self) -> int:
        return math.ceil(len(self.maps) / self.across)

    @property
    def panel(self) -> tuple[float, float]:
        """Inches of one map."""
        width = min(max(0.5 * len(self.columns), 2.8), 9.0 if self.across == 1 else 5.5)
        return width, min(max(0.38 * len(self.rows), 1.7), 9.0 if self.down == 1 else 6.0)

    @property
    def size(self) -> tuple[float, float]:
        """Inches of all with their labels."""
        names, below = (0.08 * max(map(len, labels), default=1) for labels in (self.rows, self.columns))
        return self.across * (self.panel[0] + 0.15) + names + 1.8, self.down * (self.panel[1] + 0.65 + below)

    def draw(self, part: Any, panel: tuple[float, float] | None = None) -> list[Axes]:
        """The maps on a figure or part of it, with a bar for all. panel: inches of one."""
        width, height = panel or self.panel
        everything = np.stack([np.asarray(values, dtype=float) for values in self.maps.values()])
        norm, colormap = scale(everything, self.middle)
        if self.limits is not None:
            norm, colormap = Normalize(*self.limits), COST if self.limits[0] >= 0 else GAIN_AND_COST
        low, high = extent(everything, self.middle)
        grid: Any = part.subplots(self.down, self.across, sharey=True, squeeze=False)
        for axes in grid.flat[len(self.maps) :]:
            axes.set_visible(False)
        used = list(grid.flat[: len(self.maps)])
        signs = "" if not self.middle and colormap is GAIN_AND_COST else "+"
        reach = max(high - self.middle, self.middle - low)
        for axes, (title, values) in zip(used, zip(self.maps, everything, strict=True), strict=True):
            axes.set_facecolor("#e4e4e4")
            image = axes.imshow(values, norm=norm, cmap=colormap, aspect="auto", interpolation="nearest")
            axes.set_title(title, fontsize=11, parse_math=False)
            axes.set_xlabel(self.axes[1])
            name_ticks(axes.xaxis, self.columns, width)
            plain(axes)
            for edge in self.edges[0]:
                axes.axhline(edge - 0.5, color="#b0b0b0", linewidth=0.6 if len(self.rows) <= 200 else 0.2)
            for edge in self.edges[1]:
                axes.axvline(edge - 0.5, color="#b0b0b0", linewidth=0.6 if len(self.columns) <= 200 else 0.2)
            if max(values.shape) <= NUMBERED:
                texts = {at: number(v, reach).removeprefix(signs) for at, v in np.ndenumerate(values) if np.isfinite(v)}
                _write(axes, values, texts, norm, colormap, width)
        for axes in grid[:, 0]:
            axes.set_ylabel(self.axes[0])
            name_ticks(axes.yaxis, self.rows, height)
        color_bar(part, image, used, self.unit, height * self.down, None if self.limits else (low, high))
        return used


def heat_maps(
    maps: Mapping[str, np.ndarray],
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    axes: tuple[str, str] = ("layer", "head"),
    unit: str = "",
    middle: float = 0.0,
    limits: tuple[float, float] | None = None,
    edges: Sequence[int] = (),
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Heat maps of any axes with one scale. maps: title to (row, column), all of one shape; NaN is left grey.

    rows, columns: labels; axes: what they are. unit: of the values. middle: the value that is white. limits: of the scale, by
    default the values'. edges: draw lines before these rows.
    """
    found = _of(maps, rows, columns, axes=axes, unit=unit, limits=limits, middle=middle, edges=(edges, ()))
    width, height = found.size
    figure = new_figure(width, height + 0.35 * (bool(title) + bool(subtitle)), title)
    found.draw(new_part(figure, subtitle))
    return figure


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
    found = _of(maps, layers, None, axes=("layer", "head"), unit=unit, limits=limits)
    shown = [n for n in named if n.pattern is not None]
    width, height = found.size
    lower = 4.7 if shown else 0.0
    width = max(width, 4.6 * max(len(shown), 2) + 0.8) if shown else width
    figure = new_figure(width, height + lower + 0.35 * (bool(title) + bool(subtitle)), title)
    parts: Any = [figure] if not shown else figure.subfigures(2, 1, height_ratios=[height + 0.3 * bool(subtitle), lower])
    for axes in found.draw(new_part(parts[0], subtitle)):
        _outline(axes, named)
    if shown:
        below = parts[1].subplots(1, max(len(shown), 2))
        for axes in below[len(shown) :]:
            axes.set_visible(False)
        for axes, head in zip(below, shown, strict=False):
            color = OUTLINES[list(named).index(head) % len(OUTLINES)]
            text = f"{head.name} head: layer {found.rows[head.row]} head {head.head}"
            image = draw_pattern(axes, np.asarray(head.pattern), text, tokens, divider, color)
        color_bar(parts[1], image, below[: len(shown)], "attention", 4.0)
    return figure


def pair_map(
    values: np.ndarray,
    names: Sequence[str],
    edges: Sequence[int],
    *,
    rows: str,
    columns: str,
    unit: str,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """A heat map over pairs of heads, white at 0; NaN is grey. edges: draw lines before these heads, where layers begin."""
    found = _of({"": values}, names, names, axes=(rows, columns), unit=unit, edges=(edges, edges))
    side = min(max(0.3 * len(names), 3.4), 10.5)
    figure = new_figure(side + 2.2, side + 1.0 + 0.35 * (bool(title) + bool(subtitle)), title)
    (axes,) = found.draw(new_part(figure, subtitle), (side, side))
    axes.set_aspect("equal")
    return figure


def _of(maps: Mapping[str, np.ndarray], rows: Any, columns: Any, **more: Any) -> _Maps:
    """Maps with names of their rows and columns, numbers by default. Raises ValueError where they do not fit together."""
    shapes = {np.shape(values) for values in maps.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"heat maps: found maps of shapes {sorted(shapes)}; expected two axes, all the same. Fill with NaN.")
    ((high, wide),) = shapes
    names = [[str(n) for n in (range(size) if own is None else own)] for own, size in ((rows, high), (columns, wide))]
    if [len(names[0]), len(names[1])] != [high, wide]:
        found = f"{len(names[0])} names of rows and {len(names[1])} of columns"
        raise ValueError(f"heat maps: found {found}; expected {high} and {wide}, one each. Pass names of them all.")
    return _Maps(maps, names[0], names[1], **more)


def _write(axes: Axes, values: np.ndarray, texts: Mapping[Any, str], norm: Normalize, colormap: Colormap, room: float) -> None:
    """Parts the cells, and writes each one's number in it, if the room (inches that the map is wide, about) is enough."""
    rows, columns = values.shape
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d0d0d0", linewidth=0.8)
    plain(axes)
    longest = max(map(len, texts.values()), default=1)
    size = min(9.0, 72 * room / columns / (0.76 * longest))  # a digit is about 0.6 of the font's size wide
    if size < LEAST_FONT:
        return
    for (row, column), text in texts.items():
        color = "white" if is_dark(colormap(norm(values[row, column]))) else "#222222"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)


def _outline(axes: Axes, named: Sequence[Named]) -> None:
    for index, head in enumerate(named):
        box = Rectangle((head.head - 0.5, head.row - 0.5), 1, 1, fill=False, linewidth=2.5, clip_on=False, zorder=3)
        box.set_edgecolor(OUTLINES[index % len(OUTLINES)])
        axes.add_patch(box)
