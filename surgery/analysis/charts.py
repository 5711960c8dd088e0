"""Charts of labelled arrays: heat maps side by side on one scale, and lines.

As in `surgery.plots`, figures are made without pyplot, and saved by `surgery.plots.save`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from surgery.analysis.labelled import Labelled
from surgery.errors import SpecError, describe

COLORS = "RdBu_r"
"""White at the middle of the scale; readable by colour-blind readers."""
NUMBERED = 12
"""Cells hold their numbers up to this many rows and columns."""
CHARACTER = 0.09
"""Inches that one takes at a tick, with its share of the space between."""
PANELS = 3
"""Most panels in one row."""
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def heat_maps(maps: Mapping[str, Labelled], title: str = "", middle: float = 0.0) -> Figure:
    """A heat map for each array, by its title, on one scale that is white at `middle`.

    Of two axes the first goes down; of three the first two do, together. One axis is drawn as a line. Entries that do not
    exist are grey. Raises SpecError for arrays of another number of axes.
    """
    first = next(iter(maps.values()))
    axes = tuple(first.axes)
    if len(axes) == 1:
        return lines(maps, title, middle, "no change")
    if len(axes) not in (2, 3):
        do = "Choose a part by `at`, or take a `mean`."
        raise SpecError(describe("picture", f"an array of {len(axes)} axes", "1, 2 or 3", do))
    drawn = {name: array.values.reshape(-1, array.shape[-1]) for name, array in maps.items()}
    rows, columns = next(iter(drawn.values())).shape
    across = 2 if len(maps) == 4 else min(len(maps), PANELS)
    down = -(-len(maps) // across)
    width = min(max(0.5 * columns, 3.2), 9.0 if across == 1 else 6.0)
    height = min(max((0.42 if rows <= 24 else 0.2) * rows, 2.2), 14.0)
    figure = Figure(
        figsize=(max(width * across + 2.2, 6.4), (height + 1.0) * down + 0.4), layout="constrained", facecolor="white"
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    together = np.concatenate([values.ravel() for values in drawn.values()])
    reach = float(np.nanmax(np.abs(together - middle), initial=0.0)) or 1e-6
    norm, colors = Normalize(middle - reach, middle + reach), matplotlib.colormaps[COLORS]
    grid = figure.subplots(down, across, squeeze=False)
    for place in grid.flat[len(maps) :]:
        place.set_visible(False)
    names = _row_names(first)
    for number, (place, (name, values)) in enumerate(zip(grid.flat, drawn.items(), strict=False)):
        place.set_facecolor("#dddddd")
        image = place.imshow(values, norm=norm, cmap=colors, aspect="auto", interpolation="nearest")
        place.set_title(name, fontsize=11)
        place.set_xlabel(axes[-1])
        at, texts = _ticks([str(label) for label in first.axes[axes[-1]]], 20 if width > 5 else 12)
        is_crowded = len(texts) * max(map(len, texts), default=0) * CHARACTER > width
        place.set_xticks(at, texts, rotation=90 if is_crowded else 0, parse_math=False)
        place.set_yticks(*_ticks(names, 48))
        if number % across == 0:
            place.set_ylabel(" · ".join(axes[:-1]))
        else:
            place.set_yticklabels([])
        place.tick_params(length=0, labelsize=8)
        if max(rows, columns) <= NUMBERED:
            _write(place, values, middle, reach)
    label = f"{first.name} ({first.unit})" if first.unit else first.name
    bar = figure.colorbar(image, ax=list(grid.flat[: len(maps)]), label=label, pad=0.02, aspect=24 if height * down < 8 else 48)
    known = together[np.isfinite(together)]
    bar.ax.set_ylim(min(middle, *known) - 1e-9, max(middle, *known) + 1e-9)
    return figure


def lines(arrays: Mapping[str, Labelled], title: str = "", level: float | None = None, note: str = "") -> Figure:
    """A line for each array of one axis; level: a dashed line across, and what it is."""
    first = next(iter(arrays.values()))
    ((axis, labels),) = first.axes.items()
    figure = Figure(figsize=(7.5, 4.2), layout="constrained", facecolor="white")
    place = figure.subplots()
    is_number = all(isinstance(label, int | float) for label in labels)
    x: Sequence[Any] = labels if is_number else range(len(labels))
    if level is not None:
        place.axhline(level, color="#888888", linewidth=1.0, linestyle=(0, (4, 3)), label=note or None)
    for number, (name, array) in enumerate(arrays.items()):
        style = "-" if number < len(LINES) else "--"
        place.plot(x, array.values, style, marker="o", markersize=4, color=LINES[number % len(LINES)], label=name)
    if not is_number:
        place.set_xticks(*_ticks([str(label) for label in labels], 20), rotation=30, ha="right")
    elif all(isinstance(label, int) for label in labels):
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
    place.set_title(title, fontsize=12, fontweight="bold")
    place.set_xlabel(axis)
    place.set_ylabel(f"{first.name} ({first.unit})" if first.unit else first.name)
    place.grid(color="#e6e6e6", linewidth=0.8)
    place.spines[["top", "right"]].set_visible(False)
    if len(arrays) > 1 or note:
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(arrays) > len(LINES) else {}
        place.legend(frameon=False, fontsize=8, **beside)
    return figure


def _row_names(array: Labelled) -> list[str]:
    first, *second = list(array.axes.values())[:-1]
    if not second:
        return [str(label) for label in first]
    return [f"{a} · {b}" for a in first for b in second[0]]


def _ticks(labels: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Places and labels: all, or every so many that there are at most `most`."""
    step = -(-len(labels) // most)
    return list(range(0, len(labels), step)), list(labels[::step])


def _write(place: Any, values: np.ndarray, middle: float, reach: float) -> None:
    """Each cell's number in it."""
    decimals = 2 if reach >= 0.1 else min(1 - int(np.floor(np.log10(reach))), 6)
    size = 8 if values.shape[1] <= 8 else 6.5
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.{decimals}f}".replace("-", "−")
            text = "0" if float(text.replace("−", "-")) == 0 else text
            color = "white" if abs(value - middle) > 0.6 * reach else "#222222"
            place.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
