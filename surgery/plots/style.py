"""What all pictures share: colours, ticks, numbers, and how a figure is made and saved.

Figures are made without pyplot: nothing global changes, no window opens, and they work on machines without a screen.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

FORMATS = (".png", ".pdf", ".svg")
"""Suffixes that `save` writes; the first two of a file without one."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#7b3fa0", "#000000", "#8c6d1f")
"""Of lines, bars and their labels: told apart by colour-blind readers too."""
OUTLINES = ("#0072b2", "#009e73", "#7b3fa0", "#000000")
"""Of named heads: told apart from the colours of the cells as well."""
LONGEST_NAME = 36
"""Letters of the name of a group of heads: of a larger one, the first heads are named."""
COST = LinearSegmentedColormap.from_list("cost", ["#ffffff", "#fdd9a0", "#f08a4b", "#b5283a", "#4a0c33"])
GAIN_AND_COST = LinearSegmentedColormap.from_list(
    "gain and cost", ["#0b3c5d", "#3d8bbd", "#b9dcee", "#ffffff", "#fdd9a0", "#f08a4b", "#b5283a"]
)
ATTENTION = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#c9d3ea", "#7486c0", "#2d2f7f", "#140b34"])


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """A white figure, in inches, whose parts make room for each other; wider if the title needs it."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08, hspace=0.05)
    width = max(width, 0.112 * max(map(len, title.split("\n"))) + 0.3)  # what a bold letter of size 13 takes
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    return figure


def new_part(figure: Figure, subtitle: str = "") -> Any:
    """Where to draw on a figure: below a line in small print, if there is one."""
    if not subtitle:
        return figure
    part: Any = figure.subfigures(1, 1)
    part.suptitle(subtitle, fontsize=10, color="#555555", parse_math=False)
    return part


def save(figure: Figure, path: str | Path, dpi: int = 160) -> tuple[Path, ...]:
    """Writes the figure in the format of the suffix, without a suffix as .png and as .pdf; makes the folder if need be.

    Returns the files that it wrote. Raises ValueError for another suffix.
    """
    path = Path(path)
    if path.suffix and path.suffix.lower() not in FORMATS:
        do = "Rename the file, or leave the suffix out for .png and .pdf."
        raise ValueError(f"save: found the suffix {path.suffix!r}; expected one of {', '.join(FORMATS)}. {do}")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = (path,) if path.suffix else tuple(path.with_suffix(suffix) for suffix in FORMATS[:2])
    with warnings.catch_warnings(), rc_context({"pdf.fonttype": 42}):  # text that can be searched and edited
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # tokens may be of any script
        for file in written:
            figure.savefig(file, dpi=dpi)
    return written


def scale(values: np.ndarray, middle: float = 0.0) -> tuple[Normalize, Colormap]:
    """Colours from the middle to the maximum; both ways if the minimum is more than a twentieth of that below it.

    The middle is white.
    """
    low, high = extent(values, middle)
    high = max(high - middle, 1e-6)
    if low - middle > -0.05 * high:
        return Normalize(middle, middle + high), COST
    reach = max(middle - low, high)
    return Normalize(middle - reach, middle + reach), GAIN_AND_COST


def extent(values: np.ndarray, middle: float = 0.0) -> tuple[float, float]:
    """The smallest and largest of the numbers and the middle."""
    finite = values[np.isfinite(values)]
    return float(finite.min(initial=middle)), float(finite.max(initial=middle))


def color_bar(figure: Any, image: Any, axes: Sequence[Axes], label: str, height: float, shown: Any = None) -> None:
    """A bar beside panels that take so many inches, its label broken where it is longer. shown: a part of the scale."""
    text = textwrap.fill(label, max(int(12 * height), 12))
    bar = figure.colorbar(image, ax=list(axes), label=text, pad=0.02, aspect=max(12.0, height / 0.2))
    if shown is not None and shown[1] > shown[0]:
        bar.ax.set_ylim(*shown)


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


def name_ticks(axis: XAxis | YAxis, labels: Sequence[str], room: float, size: float = 8.0) -> None:
    """Names along an axis of so many inches, as many as fit; upright if they are long."""
    letters, upright = max(map(len, labels), default=1), 0.0
    taken = 1.3 if isinstance(axis, YAxis) else 0.62 * letters + 1.0  # of the size of a letter
    if isinstance(axis, XAxis) and letters > 3 and taken * len(labels) * size / 72 > room:
        taken, upright = 1.3, 90.0
    places, names = ticks(labels, max(int(room * 72 / (taken * size)), 1))
    axis.set_ticks(places, names, rotation=upright, fontsize=size, parse_math=False)


def short(address: str | int) -> str:
    """An address as a label: a layer's number where the rest says nothing."""
    return str(address).removeprefix("self.")


def group_name(label: str, most: int = LONGEST_NAME) -> str:
    """The label of a group of heads, such as "self.0.1 + self.1.2", without what says nothing, and about so long at most."""
    heads = [short(head) for head in str(label).split(" + ")]
    shown = len(heads)
    while shown > 1 and len(" + ".join(heads[:shown])) > most:
        shown -= 1
    more = f" + {len(heads) - shown} more" if shown < len(heads) else ""
    return " + ".join(heads[:shown]) + more


def in_words(spec: Any, most: int = 2) -> str:
    """The cuts of a spec, a line each; of many the first."""
    lines = [line.partition(". ")[2] for line in str(spec).splitlines()] if len(spec) else []
    return "\n".join(lines if len(lines) <= most else [*lines[: most - 1], f"and {len(lines) - most + 1} more cuts"])


def with_unit(name: str, unit: str) -> str:
    """A quantity as a label."""
    return f"{name} ({unit})" if unit else name


def number(value: float, largest: float = 1.0) -> str:
    """A sign and as many decimals as the largest value needs for two digits, two at least; "0" for what they do not show."""
    decimals = 2 if largest >= 0.1 or largest == 0 else min(1 - math.floor(math.log10(largest)), 6)
    shown = f"{value:+.{decimals}f}".replace("-", "−")
    return "0" if float(shown.replace("−", "-")) == 0 else shown


def is_dark(color: Sequence[float]) -> bool:
    """Whether white text reads better on a colour than black."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 0.55
