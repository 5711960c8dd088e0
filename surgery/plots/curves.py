"""Effects as lines over positions, as bars with their intervals, and estimates against exact numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from surgery.plots.style import COLORS, group_name, name_ticks, new_figure, new_part, short, with_unit

POINTED_OUT = 5
"""Heads of a scatter plot that bear their names: those with the largest exact effects."""
Band = tuple[np.ndarray, np.ndarray]


def lines(
    series: Mapping[str, np.ndarray],
    labels: Sequence[Any],
    *,
    axis: str,
    unit: str,
    bands: Mapping[str, Band] | None = None,
    middle: float = 0.0,
    note: str = "",
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """A line for each series over one axis, with bands (low, high) of some or all.

    labels: along the axis, numbers or texts; axis: what they are. unit: of the values. middle: where a line runs across, and
    note what it is.
    """
    names = None if all(isinstance(label, int | float) for label in labels) else [str(label) for label in labels]
    x = np.arange(len(labels)) if names else np.array(labels)
    width = min(max(7.0, 0.2 * len(labels) + 2.0), 16.0)
    figure = new_figure(width, 4.2 + 0.35 * bool(subtitle), title)
    part = new_part(figure, subtitle)
    axes: Axes = part.subplots()
    axes.axhline(middle, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)) if note else "-", label=note or None)
    for index, (name, values) in enumerate(series.items()):
        _line(axes, x, values, index, name, (bands or {}).get(name))
    if names:
        name_ticks(axes.xaxis, names, width - 1.5)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif all(isinstance(label, int) for label in labels):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(axis)
    axes.set_ylabel(unit)
    _open(axes)
    if len(series) > 1 or note:
        part.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    elif name := next(iter(series)):
        axes.set_title(name, fontsize=11, parse_math=False)
    return figure


def effect_by_position(
    effects: Mapping[str, np.ndarray],
    *,
    tokens: Sequence[str] = (),
    divider: int | None = None,
    unit: str = "loss change (nats per token)",
    title: str = "",
) -> Figure:
    """A line over positions for each cut, with a band: the normal 95 % interval of the mean over examples.

    effects: name to (example, position), or (position,) for one example, without a band. NaN leaves a gap; of several
    examples, positions count those that have a number. tokens: texts below the positions, for one sequence.
    """
    tables = {name: np.atleast_2d(np.asarray(values, dtype=float)) for name, values in effects.items()}
    lengths = {table.shape[1] for table in tables.values()}
    if len(lengths) != 1:
        raise ValueError(
            f"effect_by_position: found effects at {sorted(lengths)} positions; expected the same for all. Pad with NaN."
        )
    (length,) = lengths
    means = {name: _mean(table) for name, table in tables.items()}
    halves = {name: _half(table) for name, table in tables.items() if len(table) > 1}
    bands = {name: (means[name] - half, means[name] + half) for name, half in halves.items()}
    labels: Sequence[Any] = list(tokens) or range(length)
    axis = "position (token)" if tokens else "position (tokens, from 0)"
    figure = lines(means, labels, axis=axis, unit=unit, bands=bands, title=title)
    axes = next(a for a in figure.findobj(Axes))
    axes.set_xlim(-0.5, length - 0.5)
    if divider is not None:
        axes.axvline(divider - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
    return figure


def measures_by_position(
    measures: Mapping[str, np.ndarray], units: Mapping[str, str], levels: Mapping[str, float], title: str = ""
) -> Figure:
    """A panel for each measure below each other: the mean over examples, and the range that they lie in.

    measures: name to (example, position), NaN where there is none. levels: of the lines across, by default 0.
    """
    figure = new_figure(8.0, 0.7 + 1.5 * len(measures) + 0.3 * title.count("\n"), title)
    panels: Any = figure.subplots(len(measures), 1, sharex=True, squeeze=False)
    for axes, (name, values) in zip(panels[:, 0], measures.items(), strict=True):
        kept = np.flatnonzero(~np.isnan(values).all(0))
        known = values[:, kept]
        is_share = set(np.unique(known[np.isfinite(known)])) <= {0.0, 1.0}  # an example agrees or not
        band = None if len(values) < 2 or is_share else (np.nanmin(known, axis=0), np.nanmax(known, axis=0))
        _line(axes, kept, np.nanmean(known, axis=0), 0, "mean of examples", band, "range of examples")
        axes.axhline(levels.get(name, 0.0), color="#888888", linewidth=0.9)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_ylabel(units[name])
        axes.yaxis.set_label_coords(-0.065, 0.5)  # below each other
        axes.margins(x=0.01)
        if is_share:
            axes.set_ylim(-0.05, 1.05)
        _open(axes)
    panels[-1, 0].set_xlabel("position (tokens, from 0)")
    if len(next(iter(measures.values()))) > 1:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower right", frameon=False, fontsize=8, ncols=2)
    return figure


def importance_against_exact(
    estimated: Mapping[str, np.ndarray] | np.ndarray,
    exact: np.ndarray,
    *,
    names: Sequence[str] | None = None,
    unit: str = "effect (nats)",
    title: str = "",
) -> Figure:
    """Estimates of effects against exact ones, a panel for each method, with the line where they are equal.

    estimated: method to estimates, shaped as exact: of heads (layer, head), or a list. names: of the heads, in the order of
    exact.ravel(), for the largest; by default from (layer, head). Each panel says Spearman's rank correlation ρ, Pearson's r,
    and how many heads they are of; NaN on either side leaves a head out.
    """
    methods = dict(estimated) if isinstance(estimated, Mapping) else {"": estimated}
    truth = np.asarray(exact, dtype=float)
    labels = list(names) if names is not None else _names(truth.shape)
    figure = new_figure(min(4.6 * len(methods) + 0.6, 16.0), 4.9, title)
    panels: Any = figure.subplots(1, len(methods), squeeze=False, sharey=True)
    for axes, (name, values) in zip(panels.flat, methods.items(), strict=True):
        guess, known = np.asarray(values, dtype=float).ravel(), truth.ravel()
        if guess.shape != known.shape:
            raise ValueError(
                f"importance_against_exact: found {guess.size} estimates ({name}) of {known.size} exact effects; "
                "expected as many. Fill with NaN."
            )
        both = np.isfinite(guess) & np.isfinite(known)
        x, y = known[both], guess[both]
        ends = [float(f([*x, *y, 0.0])) for f in (min, max)]
        axes.plot(ends, ends, color="#888888", linewidth=0.9, zorder=1, label="estimate = exact")
        axes.scatter(x, y, s=18, color=COLORS[0], alpha=0.65, linewidth=0, zorder=2)
        for place in _apart(x, y, np.argsort(-np.abs(x), kind="stable")[:POINTED_OUT]):
            text = np.array(labels)[both][place]
            below = y[place] <= x[place]  # the line goes through neither
            offset, side = ((0, -5), "top") if below else ((0, 5), "bottom")
            at = (x[place], y[place])
            axes.annotate(text, at, offset, textcoords="offset points", ha="center", va=side, fontsize=8, color="#333333")
        found = f"ρ = {rank_correlation(x, y):.3f}, r = {_pearson(x, y):.3f}, {len(x)} heads"
        axes.set_title(f"{name}\n{found}" if name else found, fontsize=10, parse_math=False)
        axes.set_xlabel(f"exact {unit}")
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.08)
        axes.locator_params(nbins=5)
        axes.ticklabel_format(scilimits=(-3, 4))
        _open(axes)
    panels[0, 0].set_ylabel(f"estimated {unit}")
    panels[0, 0].legend(loc="best", frameon=False, fontsize=8)
    return figure


def effect_bars(frame: Any, *, count: int = 12, metric: str | None = None, title: str = "") -> Figure:
    """Effects of an ablation study as bars with their confidence intervals, circuits side by side, the largest heads on top.

    frame: of `surgery.analysis.ablation.Study` (or its like: circuit, address, head, metric, unit, effect, low, high). count:
    heads or groups, by their largest effect of any circuit, either way. metric: the first by default. Over several seeds,
    effects and ends of intervals are means.
    """
    rows = frame[frame["metric"] == (metric or frame["metric"].iloc[0])]
    if not len(rows):
        raise ValueError(f"effect_bars: found no rows of metric {metric!r}; expected one of {sorted(set(frame['metric']))}.")
    found: dict[str, dict[str, np.ndarray]] = {}
    for record in rows.to_dict("records"):
        is_single = np.isfinite(float(record["head"])) if record["head"] is not None else False
        name = f"{short(record['address'])}.{int(record['head'])}" if is_single else group_name(record["address"])
        numbers = np.array([[record["effect"], record["low"], record["high"]]], dtype=float)
        own = found.setdefault(name, {})
        own[record["circuit"]] = np.concatenate([own[record["circuit"]], numbers]) if record["circuit"] in own else numbers
    means = {name: {circuit: seeds.mean(0) for circuit, seeds in own.items()} for name, own in found.items()}
    order = sorted(means, key=lambda name: -max(abs(numbers[0]) for numbers in means[name].values()))[:count]
    circuits = list(dict.fromkeys(rows["circuit"]))
    of = with_unit(f"change of {rows['metric'].iloc[0]}", str(rows["unit"].iloc[0]))
    figure = new_figure(8.0, 1.3 + max(0.16 * len(circuits) + 0.14, 0.3) * len(order) + (0.4 if title else 0.0), title)
    axes: Axes = figure.subplots()
    height = 0.8 / len(circuits)
    for number, circuit in enumerate(circuits):
        places = [place for place, name in enumerate(order) if circuit in means[name]]
        effect, low, high = np.array([means[order[place]][circuit] for place in places]).T
        at = np.array(places) + (number - (len(circuits) - 1) / 2) * height
        label = {"qk": "QK", "ov": "OV", "both": "both"}.get(circuit, circuit)
        axes.barh(at, effect, height * 0.92, color=COLORS[number % len(COLORS)], label=label)
        errors = np.nan_to_num(np.stack([effect - low, high - effect])).clip(min=0)
        axes.errorbar(effect, at, xerr=errors, fmt="none", ecolor="#222222", elinewidth=0.9, capsize=2)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_ylabel("head (layer.head)")
    axes.set_xlabel(f"{of}, with its confidence interval")
    _open(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9, title="circuit cut")
    return figure


def _apart(x: np.ndarray, y: np.ndarray, places: np.ndarray) -> list[int]:
    """Those points of which none before it is so near that their names would cover each other."""
    chosen: list[int] = []
    span = max(float(np.ptp(np.concatenate([x, y, [0.0]]))), 1e-30)
    for place in places:
        if all(abs(x[place] - x[other]) > 0.11 * span or abs(y[place] - y[other]) > 0.05 * span for other in chosen):
            chosen.append(int(place))
    return chosen


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's ρ: the correlation of ranks, ties at their mean rank. NaN for fewer than two, or where all are tied."""
    return _pearson(_ranks(np.asarray(x)), _ranks(np.asarray(y)))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _names(shape: tuple[int, ...]) -> list[str]:
    return [".".join(map(str, index)) for index in np.ndindex(shape)]


def _line(axes: Axes, x: Any, values: Any, index: int, name: str, band: Band | None = None, says: str | None = None) -> None:
    """One line, told by its colour and beyond these by its strokes. says: what the band is."""
    color, strokes = COLORS[index % len(COLORS)], ("-", "--", ":")[index // len(COLORS) % 3]
    axes.plot(x, values, strokes, color=color, label=name, linewidth=1.6, marker="o", markersize=3)
    if band is not None:
        axes.fill_between(x, *band, color=color, alpha=0.18, linewidth=0, label=says)


def _mean(table: np.ndarray) -> np.ndarray:
    """(position,): over the examples that have a number there; NaN where none has."""
    count = np.isfinite(table).sum(0)
    total = np.nansum(table, axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _half(table: np.ndarray) -> np.ndarray:
    """(position,): half the normal 95 % interval of the mean; NaN where fewer than two examples have a number."""
    count = np.isfinite(table).sum(0)
    half = np.full(table.shape[1], np.nan)
    several = count > 1
    half[several] = 1.96 * np.nanstd(table[:, several], axis=0, ddof=1) / np.sqrt(count[several])
    return half


def _open(axes: Axes) -> None:
    """No frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
