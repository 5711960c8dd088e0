"""What patching one run with another gives: a metric for each place, beside that of the two runs, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from surgery.analysis.labelled import Labelled, pictured
from surgery.analysis.metrics import Metric
from surgery.analysis.tables import as_html, as_text
from surgery.errors import NoMatchError, SpecError, closest, describe

VIEWS = ("value", "effect", "recovery")


class Patching:
    """The metric under each patch. kind: what the keys are ("site", "receiver").

    examples: key to Labelled with the axes of the places and last "example". clean, corrupted: (example,) the metric of the
    two runs, corrupted None where there is no such run. base: the run that was patched into, "clean" or "corrupted".
    notes: where the sweep could not take its short cut. forwards: whole forwards' worth of work.

    Views, each the mean over examples: `value`, the metric; `effect`, its difference from that of the base, 0 where the patch
    changes nothing; `recovery`, (value - corrupted) / (clean - corrupted), the ratio of means: 1 as the clean run, 0 as
    the corrupted one, and beyond both where a patch overshoots.
    """

    def __init__(
        self,
        kind: str,
        examples: Mapping[str, Labelled],
        clean: np.ndarray,
        corrupted: np.ndarray | None,
        base: str,
        metric: Metric,
        notes: Sequence[str] = (),
        forwards: float = 0.0,
    ) -> None:
        self.kind, self.examples, self.metric, self.base = kind, dict(examples), metric, base
        self.clean, self.corrupted = clean, corrupted
        self.notes, self.forwards = list(notes), forwards

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.examples)

    def value(self, key: str | None = None) -> Labelled:
        """The metric under each patch, in the metric's unit. key: of several; the first if it is left out."""
        found = self.examples[self._key(key)].mean("example")
        return found.with_values(found.values, self.metric.name, self.metric.unit)

    def effect(self, key: str | None = None) -> Labelled:
        """The change of the metric from the run that is patched into."""
        found, before = self.value(key), self.clean if self.base == "clean" else self.corrupted
        assert before is not None
        return found.with_values(found.values - before.mean(), f"change of {self.metric.name}", self.metric.unit)

    def recovery(self, key: str | None = None) -> Labelled:
        """The share of the way from the corrupted run's metric to the clean one's.

        Raises SpecError if there is no corrupted run, or if it has the clean one's metric.
        """
        found, gap = self.value(key), self.gap
        if self.corrupted is None or not gap:
            what = "no corrupted run" if self.corrupted is None else f"the same {self.metric.name} of both runs"
            do = "Pass corrupted inputs that the metric tells from the clean ones, or look at `effect`."
            raise SpecError(describe("recovery", what, "two runs that differ", do))
        share = (found.values - self.corrupted.mean()) / gap
        return found.with_values(share, "recovery", "1 clean, 0 corrupted")

    @property
    def gap(self) -> float:
        """The clean run's metric minus the corrupted one's; NaN if there is none."""
        return float("nan") if self.corrupted is None else float(self.clean.mean() - self.corrupted.mean())

    def to_frame(self) -> pd.DataFrame:
        """A row for each key and place: kind, the axes, value, effect, recovery (NaN where that is not defined)."""
        frames = []
        for key in self.keys:
            frame, present = self.value(key).to_frame(), self.value(key).present
            frame = frame.rename(columns={frame.columns[-1]: "value"})
            frame["effect"] = self.effect(key).values[present]
            has_gap = self.corrupted is not None and self.gap
            frame["recovery"] = self.recovery(key).values[present] if has_gap else np.nan
            frame.insert(0, self.kind, key)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def top(self, count: int = 10) -> pd.DataFrame:
        """The places with the largest effects, either way."""
        frame = self.to_frame()
        return frame.loc[frame.effect.abs().sort_values(ascending=False, kind="stable").index].head(count)

    def picture(self, view: str = "effect", keys: Sequence[str] | None = None, tokens: Sequence[str] = ()) -> Figure:
        """A heat map for each key, on one scale; white is a patch that changes nothing. Over one axis alone, lines.

        view: of VIEWS. tokens: texts of all positions; where one is empty the number stands alone.
        """
        if view not in VIEWS:
            do = closest(view, VIEWS) or "Choose one of these."
            raise SpecError(describe("picture", f"view={view!r}", ", ".join(map(repr, VIEWS)), do))
        maps = {self._title(key): _with_tokens(getattr(self, view)(key), tokens) for key in keys or self.keys}
        before = self.clean if self.base == "clean" else self.corrupted
        assert before is not None
        unchanged = {"value": float(before.mean()), "effect": 0.0, "recovery": 1.0 if self.base == "clean" else 0.0}
        what = "Paths" if self.kind == "receiver" else "Activations"
        title = f"{what} patched into the {self.base} run"
        return pictured(maps, title, f"{self._heading()}; {self._count()}", unchanged[view], "no change")

    def _title(self, key: str) -> str:
        return f"into {key}" if self.kind == "receiver" else f"at {key}"

    def _heading(self) -> str:
        of = f"{self.metric.name}: clean {self.clean.mean():.3g}"
        return f"{of}, corrupted {self.corrupted.mean():.3g}" if self.corrupted is not None else of

    def _count(self) -> str:
        return f"{len(self.clean)} example{'s' * (len(self.clean) != 1)}"

    def _key(self, key: str | None) -> str:
        if key is None:
            return self.keys[0]
        if key not in self.examples:
            do = closest(key, self.keys) or "Name one of these."
            raise NoMatchError(describe(self.kind, repr(key), ", ".join(map(repr, self.keys)), do))
        return key

    def __str__(self) -> str:
        head = f"{self._heading()} ({self.metric.unit or 'no unit'}; {self._count()})"
        return f"{head}\npatched into the {self.base} run; largest effects:\n{as_text(self.top())}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self.top())


def _with_tokens(array: Labelled, tokens: Sequence[str]) -> Labelled:
    """The same with the tokens' texts beside positions."""
    places = [int(place) for place in array.axes.get("position", ())]
    if not tokens or not places:
        return array
    if len(tokens) <= max(places):
        found, expected = f"{len(tokens)} texts of tokens", f"at least {max(places) + 1}, one for each position"
        raise SpecError(describe("picture", found, expected, "Pass the texts of the whole sequence."))
    axes = {**array.axes, "position": [f"{place} {tokens[place]}".strip() for place in places]}
    return Labelled(array.values, axes, array.name, array.unit, array.present)
