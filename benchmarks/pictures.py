"""Pictures of committed results: `python -m benchmarks.pictures [--results FOLDER] [--out FOLDER] [--check]`.

Of comparisons (compare-FAMILY-LENGTH-DEVICE.json): bars of ratios by work, and peak memory against context length. Of growth
(growth-DEVICE.json): cost against layers and heads. Each picture says which numbers it was drawn from, so that --check can
tell, without drawing, that they are those of the results; it exits 1 where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison.grid import ways_of
from benchmarks.comparison.plain import Sdpa
from benchmarks.comparison.task import Settings
from benchmarks.comparison.worker import WAYS
from benchmarks.comparison.works import WORKS, Work
from benchmarks.results import FOLDER
from surgery.plots.style import new_figure, plain

COLORS = dict(
    zip(WAYS, ("#000000", "#8c8c8c", "#c9b458", "#56a0d3", "#0b4f8a", "#7fb2e5", "#d55e00", "#009e73", "#7b3fa0"), strict=True)
)
"""Of ways: this library in blue."""
MOST = 3.0
"""Ratios above are drawn up to here, with their number beside them."""
DRAWN = ("forward", "cut_z", "two_patterns", "patterns")
"""Work whose peaks of memory are drawn."""
MANY = (0.01, 400.0)
"""Forwards, on a scale of powers of ten."""


def draw(results: Path, out: Path) -> list[Path]:
    """Draws what the results in a folder allow; returns the files."""
    written = []
    for path, sources, make in _wanted(results, out):
        found = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Text as text, and names that do not change from run to run: pictures are in version control.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
            make(found).savefig(path, metadata={"Date": None, "Description": f"numbers {fingerprint(sources)}"})
        written.append(path)
    return written


def stale(results: Path, out: Path) -> list[Path]:
    """Pictures that are missing, or were drawn from other numbers."""
    return [path for path, sources, _ in _wanted(results, out) if not _is_of(path, fingerprint(sources))]


def fingerprint(sources: Sequence[Path]) -> str:
    """Of the contents of files."""
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _is_of(path: Path, wanted: str) -> bool:
    return path.exists() and re.search(rf"numbers {wanted}\b", path.read_text(encoding="utf-8")) is not None


def _wanted(results: Path, out: Path) -> Iterator[tuple[Path, list[Path], Any]]:
    """Each picture: its file, the results that it shows, and what draws it."""
    comparisons = sorted(results.glob("compare-*-*-*.json"))
    for source in comparisons:
        if any("value" in row and row["way"] != Sdpa.name for row in _rows(source)):
            yield out / f"{source.stem}.svg", [source], lambda found: bars(found[0])
    for start in sorted({re.sub(r"-\d+-(\w+)\.json$", r"-*-\1.json", path.name) for path in comparisons}):
        sources = sorted(results.glob(start), key=lambda path: int(path.stem.split("-")[2]))
        if len(sources) > 1 and any(row["work"] in DRAWN and "memory_mib" in row for path in sources for row in _rows(path)):
            yield out / f"memory-{start.split('-')[1]}-{start.split('-')[3].removesuffix('.json')}.svg", sources, memory
    for source in sorted(results.glob("growth-*.json")):
        yield out / f"{source.stem}.svg", [source], lambda found: growth(found[0])


def _rows(source: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(source.read_text(encoding="utf-8"))["rows"]
    return found


def bars(found: Mapping[str, Any]) -> Figure:
    """Of each work, the ratios of all ways to the unpatched model, with quartiles; below, what takes many forwards."""
    ways = [way for way in ways_of(found) if way != Sdpa.name]
    measured = {row["work"] for row in found["rows"] if "value" in row and row["way"] in ways}
    works = [work for work in WORKS if work.name in measured]
    parts = [[work for work in works if work.is_in_forwards == many] for many in (False, True)]
    title = f"Cost over the unpatched model: {Settings(**found['settings']).shape}"
    figure = new_figure(9.5, 1.4 + 0.1 * len(works) * (len(ways) + 2), title)
    shown = [part for part in parts if part]
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[len(part) for part in shown])[:, 0]
    time = "time" if "gpu" in found["machine"] else "CPU time"
    for axes, part in zip(panels, shown, strict=True):
        _bars(axes, found, part, ways)
        axes.set_xlabel(
            "forwards of the unpatched model" if part[0].is_in_forwards else f"{time} over unpatched sdpa", fontsize=8
        )
    handles = {way: panels[0].barh(0, 0, color=COLORS[way]) for way in ways}
    figure.legend(handles.values(), handles, fontsize=7, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _bars(axes: Axes, found: Mapping[str, Any], works: Sequence[Work], ways: Sequence[str]) -> None:
    by_place = {(row["work"], row["way"]): row for row in found["rows"] if "value" in row}
    name, height = "" if "gpu" in found["machine"] else "cpu_", 1 / (len(ways) + 2)
    largest = 1.0
    for index, way in enumerate(ways):
        for place, work in enumerate(works):
            if (row := by_place.get((work.name, way))) is None:
                continue
            value, low, high = (row[f"{name}{part}"] for part in ("value", "low", "high"))
            at, start = place + (index + 1) * height, 1.0 if not work.is_in_forwards else MANY[0]
            end = value if work.is_in_forwards else min(value, MOST)
            axes.barh(at, end - start, 0.9 * height, left=start, color=COLORS[way])
            if end == value:
                axes.plot([low, high], [at, at], color="#444444", linewidth=0.8)
            largest = max(largest, end)
            text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            axes.text(max(end, high if end == value else end, start), at, f"  {text}", va="center", fontsize=6)
    axes.set_yticks([place + 0.45 for place in range(len(works))], [work.words for work in works], fontsize=8)
    axes.set_ylim(len(works), -0.05)
    if works[0].is_in_forwards:
        axes.set_xscale("log")
        axes.set_xlim(MANY)
    else:
        axes.axvline(1, color="#000000", linewidth=0.8)
        axes.set_xlim(0.8, max(1.3, 1.05 * largest))
    axes.tick_params(axis="x", labelsize=7)
    plain(axes)


def memory(found: Sequence[Mapping[str, Any]]) -> Figure:
    """Peak memory above the weights against the context, a panel for each work, a line for each way."""
    words = {work.name: work.words for work in WORKS}
    measured = [row for one in found for row in one["rows"] if "memory_mib" in row]
    works = [work for work in DRAWN if any(row["work"] == work for row in measured)]
    layers = " or ".join(str(number) for number in sorted({row["memory_layers"] for row in measured}))
    figure = new_figure(
        max(6.2, 3.1 * len(works)), 3.4, f"Peak memory of one forward above the weights, models of {layers} layers"
    )
    for axes, work in zip(figure.subplots(1, len(works), sharey=True, squeeze=False)[0], works, strict=True):
        for way in WAYS:
            rows = [(f["settings"], r) for f in found for r in f["rows"] if (r["work"], r["way"]) == (work, way)]
            points = [(s["length"], r["memory_mib"]) for s, r in rows if "memory_mib" in r]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, color=COLORS[way], label=way)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(words[work], fontsize=9)
        axes.set_xlabel("tokens", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("MiB", fontsize=8)
    handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, fontsize=7, loc="outside lower center", ncols=4, frameon=False)
    return figure


def growth(found: Mapping[str, Any]) -> Figure:
    """A panel for each group of rows: the value, with quartiles, against a number (`at`)."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in found["rows"]:
        groups.setdefault(row["group"], {}).setdefault(row["series"], []).append(row)
    figure = new_figure(3.4 * len(groups), 3.2, "Cost against layers and heads")
    for axes, (group, series) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        for color, (name, rows) in zip(("#0b4f8a", "#d55e00", "#8c8c8c"), series.items(), strict=False):
            at = [row["at"] for row in rows]
            axes.plot(at, [row["value"] for row in rows], marker="o", markersize=3, linewidth=1, color=color, label=name)
            axes.fill_between(at, [row["low"] for row in rows], [row["high"] for row in rows], color=color, alpha=0.2)
        axes.set_title(group, fontsize=8, wrap=True)
        axes.set_xlabel(next(iter(series.values()))[0]["axis"], fontsize=8)
        axes.set_ylim(0)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=FOLDER / "pictures")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        for path in (old := stale(given.results, given.out)):
            print(f"{path} is not of {given.results}: run python -m benchmarks.pictures")
        return int(bool(old))
    for path in draw(given.results, given.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
