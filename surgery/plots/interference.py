"""Interference between tasks: heat maps of heads for each block side by side, found cells marked, and blocks with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from surgery.plots.style import COLORS, color_bar, extent, is_dark, name_ticks, new_figure, new_part, plain, scale, short

LARGEST_MARK = 5.0
"""Points across: marks in small cells are smaller."""


def block_maps(frames: Mapping[str, Any], *, title: str = "", subtitle: str = "") -> Figure:
    """Heat maps over layer × head, a panel for each block; a row of panels with one scale for each frame.

    frames: what is shown, with its unit, to a frame of address, block, head, value and, if cells are to be marked, found
    (true or false). Blocks and layers are in the frame's order. Blocks may have fewer heads than others (kv heads), and so may
    layers: a head that a layer lacks is left grey, as NaN is. Colours are white at 0, and run both ways if values do.
    subtitle: what marks say; left out where cells may be marked and none is.
    """
    if not frames or any(not len(frame) for frame in frames.values()):
        raise ValueError("block_maps: found no rows; expected address, block, head and value of some. Pass a frame of them.")
    first = next(iter(frames.values()))
    layers, heads = list(dict.fromkeys(first["address"])), _heads(first)
    if any(list(dict.fromkeys(frame["address"])) != layers or _heads(frame) != heads for frame in frames.values()):
        raise ValueError("block_maps: found frames of other heads; expected the same in all. Draw a figure for each.")
    widths = [max(0.36 * count, 1.1) for count in heads.values()]
    widths = [width * min(1.0, 15.0 / sum(widths)) for width in widths]
    height = min(max(0.36 * len(layers), 1.6), 9.0)
    names = 0.08 * max(len(short(layer)) for layer in layers)
    found = [frame["found"] for frame in frames.values() if "found" in frame]
    if found and not any(marks.any() for marks in found):
        subtitle = ""
    named = 0.3 * (len(frames) > 1)
    whole = (height + 1.0 + named) * len(frames) + 0.35 * (bool(title) + bool(subtitle))
    figure = new_figure(sum(widths) + 0.25 * len(heads) + names + 1.9, whole, title)
    part = new_part(figure, subtitle)
    rows: Any = [part] if len(frames) == 1 else part.subfigures(len(frames), 1)
    for row, (unit, frame) in zip(rows, frames.items(), strict=True):
        if named:
            row.suptitle(unit, fontsize=11, x=0.02, ha="left", parse_math=False)
        _row(row, frame, unit, layers, heads, widths, height)
    return figure


def _row(
    part: Any, frame: Any, unit: str, layers: list[str], heads: dict[str, int], widths: list[float], height: float
) -> None:
    """One panel for each block, with a bar for all."""
    values = {block: _table(frame, "value", block, layers, count) for block, count in heads.items()}
    everything = np.concatenate([table.ravel() for table in values.values()])
    norm, colormap = scale(everything)
    grid: Any = part.subplots(1, len(heads), sharey=True, squeeze=False, gridspec_kw={"width_ratios": widths})
    panels: list[Axes] = list(grid[0])
    for axes, (block, table), width in zip(panels, values.items(), widths, strict=True):
        axes.set_facecolor("#e4e4e4")
        image = axes.imshow(table, norm=norm, cmap=colormap, aspect="auto", interpolation="nearest")
        axes.set_title(block, fontsize=11, parse_math=False)
        axes.set_xlabel("head" if table.shape[1] == max(heads.values()) else "kv head")
        name_ticks(axes.xaxis, list(map(str, range(table.shape[1]))), width)
        plain(axes)
        if "found" in frame:
            at = np.argwhere(_table(frame, "found", block, layers, table.shape[1]) == 1)
            colors = ["white" if is_dark(colormap(norm(table[row, head]))) else "#222222" for row, head in at]
            size = min(LARGEST_MARK, 72 * 0.4 * min(width / table.shape[1], height / len(layers)))
            axes.scatter(at[:, 1], at[:, 0], s=size**2, c=colors, linewidth=0, gid="found")
    panels[0].set_ylabel("layer")
    name_ticks(panels[0].yaxis, list(map(short, layers)), height)
    color_bar(part, image, panels, unit, height, extent(everything))


def block_bars(frame: Any, *, unit: str, title: str = "", subtitle: str = "") -> Figure:
    """Blocks side by side with their intervals: of all layers together as bars, and of each layer.

    frame: address ("all" for all layers together), block, mean, low, high, in the order to be drawn. unit: of the values.
    """
    layers = [address for address in dict.fromkeys(frame["address"]) if address != "all"]
    blocks = list(dict.fromkeys(frame["block"]))
    wide = min(max(0.5 * len(layers), 2.2), 11.0)
    figure = new_figure(2.6 + wide + 1.6, 3.6 + 0.35 * (bool(title) + bool(subtitle)), title)
    part = new_part(figure, subtitle)
    panels: Any = part.subplots(1, 2, gridspec_kw={"width_ratios": [2.2, wide]})
    whole, single = panels
    for number, block in enumerate(blocks):
        rows = frame[frame["block"] == block]
        color = COLORS[number % len(COLORS)]
        mean, errors = _errors(rows[rows["address"] == "all"])
        whole.bar([number] * len(mean), mean, 0.8, color=color)
        whole.errorbar([number] * len(mean), mean, yerr=errors, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=3)
        own = rows[rows["address"] != "all"]
        at = np.array([layers.index(address) for address in own["address"]]) + 0.6 * ((number + 0.5) / len(blocks) - 0.5)
        mean, errors = _errors(own)
        single.errorbar(at, mean, yerr=errors, fmt="o", color=color, markersize=4, elinewidth=0.9, capsize=2, label=block)
    whole.set_xticks(range(len(blocks)), blocks)
    whole.set_ylabel(unit, parse_math=False)
    whole.set_title("all layers", fontsize=11)
    single.set_title("each layer", fontsize=11)
    single.set_xlabel("layer")
    single.set_xlim(-0.5, len(layers) - 0.5)
    name_ticks(single.xaxis, list(map(short, layers)), wide)
    for axes in panels:
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.tick_params(labelsize=8)
    part.legend(*single.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9, title="block")
    return figure


def _heads(frame: Any) -> dict[str, int]:
    """By block, the most heads that a layer has."""
    return {block: int(max(frame["head"][frame["block"] == block])) + 1 for block in dict.fromkeys(frame["block"])}


def _table(frame: Any, column: str, block: str, layers: Sequence[str], heads: int) -> np.ndarray:
    """(layer, head) of a block, NaN where there is none."""
    rows, found = frame[frame["block"] == block], np.full((len(layers), heads), np.nan)
    places = {layer: number for number, layer in enumerate(layers)}
    found[[places[address] for address in rows["address"]], rows["head"].to_numpy()] = rows[column].to_numpy(dtype=float)
    return found


def _errors(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means, and how far their intervals reach below and above."""
    mean, low, high = (rows[name].to_numpy(dtype=float) for name in ("mean", "low", "high"))
    return mean, np.nan_to_num(np.stack([mean - low, high - mean])).clip(min=0)
