"""One picture of heads: what freezing their QK and their OV costs, side by side, and where some of them look.

Figures are made without pyplot: nothing global changes, no window opens, and they work on machines without a screen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

FORMATS = (".png", ".pdf", ".svg")
"""Suffixes that `save` writes."""
NUMBERED_HEADS = 12
"""Cells hold their numbers up to this many heads per layer and layers."""
COLORS = ("#0072b2", "#009e73", "#7b3fa0", "#000000")
"""Of named heads: told apart by colour-blind readers too, and from the colours of the cells."""
COST = LinearSegmentedColormap.from_list("cost", ["#ffffff", "#fdd9a0", "#f08a4b", "#b5283a", "#4a0c33"])
GAIN_AND_COST = LinearSegmentedColormap.from_list(
    "gain and cost", ["#0b3c5d", "#3d8bbd", "#b9dcee", "#ffffff", "#fdd9a0", "#f08a4b", "#b5283a"]
)
ATTENTION = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#c9d3ea", "#7486c0", "#2d2f7f", "#140b34"])


@dataclass(frozen=True, eq=False)
class Named:
    """A head to point out. row, head: its cell; pattern: (query, key) attention, or None to draw no pattern."""

    name: str
    row: int
    head: int
    pattern: np.ndarray | None = None


def heatmaps(
    qk: np.ndarray,
    ov: np.ndarray,
    *,
    layers: Sequence[str] | None = None,
    named: Sequence[Named] = (),
    tokens: Sequence[str] = (),
    divider: int | None = None,
    title: str = "",
    subtitle: str = "",
    unit: str = "loss change (nats per token)",
) -> Figure:
    """Heat maps of two circuits over layer × head with one scale, and below them the patterns of the named heads.

    qk, ov: (layer, head); NaN is left grey. layers: names of the rows. tokens: of the patterns' positions. divider: draw a
    line before this position. unit: of the values.
    Colours are white at 0, and run both ways if anything is clearly below it. From 2 × 4 to 48 × 64 heads and beyond.
    """
    names = list(layers) if layers is not None else [str(row) for row in range(len(qk))]
    shown = [n for n in named if n.pattern is not None]
    height_of_maps = min(max(0.42 * len(qk), 2.1), 9.0)
    height_of_patterns = 4.7 if shown else 0.0
    size = (11.0, 1.4 + height_of_maps + height_of_patterns)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08, hspace=0.05)
    figure = Figure(figsize=size, layout=layout, facecolor="white")
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    heights = [height_of_maps + 1.0, height_of_patterns] if shown else [1.0]
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    upper, *lower = parts.flat
    if subtitle:
        upper.suptitle(subtitle, fontsize=10, color="#555555")
    both = np.concatenate([qk, ov])
    norm, colormap = _scale(both)
    above = upper.subplots(1, 2, sharey=True)
    for axes, values, text in zip(above, (qk, ov), ("QK frozen: where it looks", "OV frozen: what it moves"), strict=True):
        image = _map(axes, values, norm, colormap)
        axes.set_title(text, fontsize=11)
        _outline(axes, named)
    above[0].set_ylabel("layer")
    above[0].set_yticks(*_ticks(names, 24))
    bar = upper.colorbar(image, ax=list(above), label=unit, pad=0.015, aspect=18)
    bar.ax.set_ylim(min(0.0, float(np.nanmin(both))), max(1e-6, float(np.nanmax(both))))
    if shown:
        below = lower[0].subplots(1, max(len(shown), 2))
        for axes in below[len(shown) :]:
            axes.set_visible(False)
        for axes, head in zip(below, shown, strict=False):
            image = _pattern(axes, head, tokens, divider, COLORS[list(named).index(head) % len(COLORS)], names)
        lower[0].colorbar(image, ax=list(below[: len(shown)]), label="attention", pad=0.015, aspect=24)
    return figure


def save(figure: Figure, path: str | Path, dpi: int = 160) -> None:
    """Writes the figure in the format of the suffix; makes the folder if need be. Raises ValueError for another suffix."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"save: found the suffix {path.suffix!r}; expected one of {', '.join(FORMATS)}. Rename the file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # tokens may be of any script
        figure.savefig(path, dpi=dpi)


def _scale(values: np.ndarray) -> tuple[Normalize, Colormap]:
    """Colours from 0 to the maximum; from both sides of 0 if the minimum is more than a twentieth of the maximum away."""
    low, high = (float(f(values)) for f in (np.nanmin, np.nanmax))
    high = max(high, 1e-6)
    if low > -0.05 * high:
        return Normalize(0.0, high), COST
    return Normalize(-max(-low, high), max(-low, high)), GAIN_AND_COST


def _map(axes: Axes, values: np.ndarray, norm: Normalize, colormap: Colormap) -> Any:
    rows, heads = values.shape
    axes.set_facecolor("#e4e4e4")
    image = axes.imshow(values, norm=norm, cmap=colormap, aspect="auto", interpolation="nearest")
    axes.set_xlabel("head")
    axes.set_xticks(*_ticks([str(head) for head in range(heads)], 16))
    _plain(axes)
    if max(rows, heads) <= NUMBERED_HEADS:
        axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#d0d0d0", linewidth=0.8)
        for (row, head), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = "white" if _is_dark(colormap(norm(value))) else "#222222"
                text = _number(value, float(np.nanmax(np.abs(values))))
                axes.text(head, row, text, ha="center", va="center", fontsize=9 if heads <= 8 else 7, color=color)
    return image


def _outline(axes: Axes, named: Sequence[Named]) -> None:
    for number, head in enumerate(named):
        box = Rectangle((head.head - 0.5, head.row - 0.5), 1, 1, fill=False, linewidth=2.5, clip_on=False, zorder=3)
        box.set_edgecolor(COLORS[number % len(COLORS)])
        axes.add_patch(box)


def _pattern(axes: Axes, head: Named, tokens: Sequence[str], divider: int | None, color: str, layers: Sequence[str]) -> Any:
    assert head.pattern is not None
    image = axes.imshow(head.pattern, norm=Normalize(0, 1), cmap=ATTENTION, interpolation="nearest")
    axes.set_title(f"{head.name} head: layer {layers[head.row]} head {head.head}", fontsize=11, color=color, fontweight="bold")
    axes.set_xlabel("attends to")
    axes.set_ylabel("from token")
    if divider is not None:
        axes.axhline(divider - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.axvline(divider - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
    places, labels = _ticks(list(tokens) or [str(i) for i in range(len(head.pattern))], 40)
    axes.set_xticks(places, labels, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(places, labels, fontsize=7, parse_math=False)
    _plain(axes)
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor=color, linewidth=2.0)
    return image


def _plain(axes: Axes) -> None:
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor="#b0b0b0", linewidth=0.8)


def _ticks(labels: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Places and labels: all, or every so many that there are at most `most`."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, len(labels)) if len(labels) <= s * most)
    places = list(range(0, len(labels), step))
    return places, [labels[place] for place in places]


def _number(value: float, largest: float = 1.0) -> str:
    """A sign and as many decimals as the largest value needs for two digits, two at least; "0" for what they do not show."""
    decimals = 2 if largest >= 0.1 or largest == 0 else min(1 - math.floor(math.log10(largest)), 6)
    shown = f"{value:+.{decimals}f}".replace("-", "−")
    return "0" if float(shown.replace("−", "-")) == 0 else shown


def _is_dark(color: Sequence[float]) -> bool:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 0.55
