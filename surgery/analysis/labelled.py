"""A small labelled array: numbers with named axes, whose entries have labels, and what they are measured in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from surgery.analysis.tables import as_html, as_text
from surgery.errors import NoMatchError, SpecError, closest, describe
from surgery.plots import heat_maps, lines
from surgery.plots.style import short, with_unit

LONGEST = 12
"""Rows of a summary when it is printed."""
IN_WORDS = {"position": "position (token)"}
"""Axes of pictures, where the name alone does not say what is counted."""


class Labelled:
    """values: float64; axes: name to labels, in the order of the values' axes; name and unit: of the numbers.

    present: which entries exist, None for all. An entry that does not exist (a head that a layer has not got) is NaN in
    `values` and in no frame; one that exists may be NaN, too, where a metric is.
    """

    def __init__(
        self,
        values: Any,
        axes: Mapping[str, Sequence[Any]],
        name: str = "value",
        unit: str = "",
        present: np.ndarray | None = None,
    ) -> None:
        self.axes: dict[str, tuple[Any, ...]] = {axis: tuple(labels) for axis, labels in axes.items()}
        shape = tuple(len(labels) for labels in self.axes.values())
        self.present = np.ones(shape, dtype=bool) if present is None else np.broadcast_to(present, shape)
        values = np.asarray(values, dtype=np.float64)
        if values.shape != shape:
            expected = ", ".join(f"{axis} {len(labels)}" for axis, labels in self.axes.items())
            do = "Give one label for each entry of each axis."
            raise NoMatchError(describe("Labelled", f"values of shape {values.shape}", f"({expected})", do))
        self.values = np.where(self.present, values, np.nan)
        self.name, self.unit = name, unit

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype)

    def at(self, **labels: Any) -> Labelled:
        """The part at one label of each named axis, which then is gone. Raises NoMatchError for one that is not there."""
        values, present, axes = self.values, self.present, dict(self.axes)
        self._check_axes("at", labels)
        for axis, label in labels.items():
            if label not in axes[axis]:
                known = ", ".join(map(repr, axes[axis]))
                raise NoMatchError(describe("at", f"{axis}={label!r}", known, "Name one of these."))
            place, number = list(axes).index(axis), axes[axis].index(label)
            values, present = values.take(number, place), present.take(number, place)
            del axes[axis]
        return Labelled(values, axes, self.name, self.unit, present)

    def mean(self, *over: str) -> Labelled:
        """The mean over some axes, of the entries that exist. Raises NoMatchError for one that is not there."""
        over = tuple(dict.fromkeys(over))
        self._check_axes("mean", over)
        places = tuple(list(self.axes).index(axis) for axis in over)
        kept = {axis: labels for axis, labels in self.axes.items() if axis not in over}
        count = self.present.sum(axis=places)
        total = np.where(self.present, self.values, 0.0).sum(axis=places)
        return Labelled(total / np.maximum(count, 1), kept, self.name, self.unit, count > 0)

    def _check_axes(self, what: str, named: Iterable[str]) -> None:
        for axis in named:
            if axis not in self.axes:
                do = f"{closest(axis, self.axes)}Name one of these."
                raise NoMatchError(describe(what, f"the axis {axis!r}", ", ".join(self.axes) or "none", do))

    def with_values(self, values: Any, name: str, unit: str) -> Labelled:
        """Other numbers for the same entries."""
        return Labelled(values, self.axes, name, unit, self.present)

    def item(self) -> float:
        """The number of an array of one entry."""
        return float(self.values.item())

    def to_frame(self) -> pd.DataFrame:
        """Tidy: a row for each entry that exists, a column for each axis, and one for the numbers under their name."""
        places = np.argwhere(self.present)
        columns = {axis: [labels[i] for i in places[:, n]] for n, (axis, labels) in enumerate(self.axes.items())}
        return pd.DataFrame({**columns, self.name: self.values[self.present]})

    def top(self, count: int = LONGEST) -> pd.DataFrame:
        """The rows of the frame whose numbers are farthest from 0, either way."""
        frame = self.to_frame()
        return frame.loc[frame[self.name].abs().sort_values(ascending=False, kind="stable").index].head(count)

    def picture(self, title: str = "", middle: float = 0.0) -> Figure:
        """The array as heat maps or as a line, see `pictured`."""
        return pictured({"": self}, title, middle=middle)

    def __str__(self) -> str:
        unit = f" ({self.unit})" if self.unit else ""
        size = " × ".join(f"{len(labels)} {axis}s" for axis, labels in self.axes.items()) or "one number"
        head = f"{self.name}{unit}: {size}"
        if len(self.axes) == 2 and max(self.shape) <= LONGEST:
            (rows, names), (columns, numbers) = self.axes.items()
            table = pd.DataFrame(self.values, pd.Index(names, name=rows), pd.Index(numbers, name=columns))
            return f"{head}\n{as_text(table, index=True)}"
        count = int(self.present.sum())
        more = f" (the {LONGEST} farthest from 0 of {count})" if count > LONGEST else ""
        return f"{head}{more}\n{as_text(self.top())}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self.top())


def pictured(
    arrays: Mapping[str, Labelled], title: str = "", subtitle: str = "", middle: float = 0.0, note: str = "", **options: Any
) -> Figure:
    """A heat map for each array of the same axes, by its title, on one scale that is white at `middle`; of one axis, a line.

    Of two axes the first goes down; of three the first two do, together. note: what is at `middle`, of lines. Entries that do
    not exist are grey. options: of `surgery.plots.lines`. Raises SpecError for arrays of another number of axes.
    """
    first = next(iter(arrays.values()))
    if not 1 <= len(first.axes) <= 3:
        do = "Choose a part by `at`, or take a `mean`."
        raise SpecError(describe("picture", f"an array of {len(first.axes)} axes", "1, 2 or 3", do))
    *down, across = first.axes
    columns = [short(label) if isinstance(label, str) else label for label in first.axes[across]]
    words: dict[str, Any] = {"unit": with_unit(first.name, first.unit), "middle": middle, "title": title, "subtitle": subtitle}
    if not down:
        values = {name: array.values for name, array in arrays.items()}
        return lines(values, columns, axis=IN_WORDS.get(across, across), note=note, **words, **options)
    rows = [".".join(map(short, labels)) for labels in itertools.product(*(first.axes[axis] for axis in down))]
    edges = range(first.shape[1], len(rows), first.shape[1]) if len(down) > 1 else ()
    maps = {name: array.values.reshape(len(rows), -1) for name, array in arrays.items()}
    axes = (".".join(IN_WORDS.get(axis, axis) for axis in down), IN_WORDS.get(across, across))
    return heat_maps(maps, rows, columns, axes=axes, edges=edges, **words)
