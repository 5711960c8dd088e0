"""What all pictures share: colours, ticks, numbers, and how a figure is made and saved.

Figures are made without pyplot: nothing global changes, no window opens, and they work on machines without a screen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

FORMATS = (".png", ".pdf", ".svg")
"""Suffixes that `save` writes."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#7b3fa0", "#000000", "#8c6d1f")
"""Of lines, bars and their labels: told apart by colour-blind readers too."""
OUTLINES = ("#0072b2", "#009e73", "#7b3fa0", "#000000")
"""Of named heads: told apart from the colours of the cells as well."""
COST = LinearSegmentedColormap.from_list("cost", ["#ffffff", "#fdd9a0", "#f08a4b", "#b5283a", "#4a0c33"])
GAIN_AND_COST = LinearSegmentedColormap.from_list(
    "gain and cost", ["#0b3c5d", "#3d8bbd", "#b9dcee", "#ffffff", "#fdd9a0", "#f08a4b", "#b5283a"]
)
ATTENTION = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#c9d3ea", "#7486c0", "#2d2f7f", "#140b34"])


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """A white figure, in inches, whose parts make room for each other."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08, hspace=0.05)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
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


def scale(values: np.ndarray) -> tuple[Normalize, Colormap]:
    """Colours from 0 to the maximum; from both sides of 0 if the minimum is more than a twentieth of the maximum away."""
    finite = values[np.isfinite(values)]
    low, high = (float(f(finite)) for f in (np.min, np.max)) if finite.size else (0.0, 0.0)
    high = max(high, 1e-6)
    if low > -0.05 * high:
        return Normalize(0.0, high), COST
    return Normalize(-max(-low, high), max(-low, high)), GAIN_AND_COST


def plain(axes: Axes) -> None:
    """A thin grey frame and no marks at the ticks."""
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor="#b0b0b0", linewidth=0.8)


def ticks(labels: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Places and labels: all, or every so many that there are at most `most`."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, len(labels)) if len(labels) <= s * most)
    places = list(range(0, len(labels), step))
    return places, [labels[place] for place in places]


def number(value: float, largest: float = 1.0) -> str:
    """A sign and as many decimals as the largest value needs for two digits, two at least; "0" for what they do not show."""
    decimals = 2 if largest >= 0.1 or largest == 0 else min(1 - math.floor(math.log10(largest)), 6)
    shown = f"{value:+.{decimals}f}".replace("-", "−")
    return "0" if float(shown.replace("−", "-")) == 0 else shown


def is_dark(color: Sequence[float]) -> bool:
    """Whether white text reads better on a colour than black."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 0.55
