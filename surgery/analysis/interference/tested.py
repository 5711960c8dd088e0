"""The table of what was tested: a row for each hypothesis, its p-values and sizes of effect, for reading and for papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from surgery.analysis.interference.randomised import Draws
from surgery.errors import SpecError, closest, describe

P_VALUES = ("p_row", "p_col", "p_both", "p", "p_fdr", "p_maxt")


@dataclass(frozen=True)
class Tested:
    """What a test found.

    frame: a row for each hypothesis, in the order in which they were given: the caller's columns (address, block, head), then
      effect, g and delta of row and of column scores (each test says of what), p_row, p_col (and p_both of signed scores),
      p (the test of the hypothesis), p_fdr (Benjamini and Hochberg over all rows) and p_maxt (familywise, by the largest).
    alpha: the level that was planned for. sizes: samples, by name. permutations: ways to hand out labels that each test
      went through, by name; exact: those names for which these were all there are.
    notes: hypotheses that could not be tested, and why.
    """

    frame: pd.DataFrame
    alpha: float
    sizes: Mapping[str, int]
    permutations: Mapping[str, int]
    exact: tuple[str, ...]
    seed: int
    notes: list[str] = field(default_factory=list)

    def significant(self, alpha: float | None = None, by: str = "p_fdr") -> pd.DataFrame:
        """The rows found at a level (the planned one), the surest first. by: "p_fdr", or "p_maxt" for none false at all."""
        known = [name for name in P_VALUES if name in self.frame]
        if by not in known:
            do = closest(by, known) or 'Leave it out for "p_fdr".'
            raise SpecError(describe("significant", f"by={by!r}", f"of {', '.join(map(repr, known))}", do))
        return self._ordered(self.frame[self.frame[by] <= (self.alpha if alpha is None else alpha)])

    def top(self, count: int = 10) -> pd.DataFrame:
        """The surest rows, significant or not; of equally sure ones those of the larger effect first."""
        return self._ordered(self.frame).head(count)

    def _ordered(self, rows: pd.DataFrame) -> pd.DataFrame:
        smaller = np.minimum(rows.g_row, rows.g_col)  # the weaker of the two tests decides
        order = pd.DataFrame({"p": rows.p, "g": -smaller.fillna(-np.inf)}).sort_values(["p", "g"], kind="stable").index
        return rows.loc[order]

    @property
    def title(self) -> str:
        """One line: how many were found, of how many, by what."""
        how = ", ".join(
            f"{count:,} {name} ({'all there are' if name in self.exact else 'drawn'})"
            for name, count in self.permutations.items()
        )
        sizes = ", ".join(f"{name} {count}" for name, count in self.sizes.items())
        least = len(self.frame) / min(count + (name not in self.exact) for name, count in self.permutations.items())
        out_of_reach = f" (too few permutations: p_fdr of a single finding is at least {min(1.0, least):.3g})"
        return (
            f"{len(self.significant())} of {len(self.frame)} hypotheses at FDR {self.alpha:g}"
            f"{out_of_reach if least > self.alpha else ''}, "
            f"{len(self.significant(by='p_maxt'))} at familywise {self.alpha:g}; samples: {sizes}; permutations: {how}"
        )

    def __repr__(self) -> str:
        return f"{self}"

    def __str__(self) -> str:
        """The title, the surest rows, the notes."""
        return "\n".join([self.title, self.top().to_string(index=False, float_format="%.3g".__mod__), *self.notes])

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.title)}</p>{self.top().to_html(index=False, float_format='%.3g'.__mod__)}"

    def to_latex(self, rows: pd.DataFrame | None = None, **options: Any) -> str:
        """A LaTeX table of the frame, or of some rows of it; options of DataFrame.to_latex."""
        shown = self.frame if rows is None else rows
        return shown.to_latex(**{"index": False, "float_format": "%.3g", "escape": True, **options})

    def to_markdown(self, rows: pd.DataFrame | None = None, columns: Sequence[str] | None = None) -> str:
        """A Markdown table of the frame, or of some rows or columns of it."""
        shown = (self.frame if rows is None else rows)[list(self.frame.columns if columns is None else columns)]
        lines = [list(map(str, shown.columns)), ["---"] * shown.shape[1], *(map(_cell, row) for row in _records(shown))]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _records(shown: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The rows with each column's own type: iterating a frame turns whole numbers beside fractions into fractions."""
    return list(zip(*(shown[name].tolist() for name in shown.columns), strict=True))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def as_tested(
    columns: dict[str, Any],
    hypotheses: pd.DataFrame | None,
    blocks: np.ndarray,
    alpha: float,
    sizes: dict[str, int],
    draws: dict[str, Draws],
    seed: int,
    notes: list[str],
) -> Tested:
    """The table of what a test computed: the caller's columns first, then effects, then p-values."""
    frame = pd.DataFrame() if hypotheses is None else hypotheses.reset_index(drop=True)
    known = {} if "block" in frame or not any(blocks) else {"block": blocks}
    order = [name for name in columns if not name.startswith("p")] + [name for name in columns if name.startswith("p")]
    frame = pd.concat([frame, pd.DataFrame(known | {name: columns[name] for name in order})], axis=1)
    counts = {f"p_{way}": d.count for way, d in draws.items()}
    return Tested(frame, alpha, sizes, counts, tuple(f"p_{way}" for way, d in draws.items() if d.exact), seed, notes)
