"""The findings of a comparison as a table: a row for each work, a column for each way; and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.comparison.ours import Auto
from benchmarks.comparison.plain import Eager, Flex, Sdpa
from benchmarks.comparison.task import Settings
from benchmarks.comparison.worker import WAYS
from benchmarks.comparison.works import WORKS
from benchmarks.machine import sentence

NOT_OFFERED = "–"
DIFFERS = "differs"


def ways_of(found: Mapping[str, Any]) -> list[str]:
    """In the order of columns; those that give no number at all are left out, and named below the table."""
    measured = {row["way"] for row in found["rows"] if "value" in row}
    return [name for name in WAYS if name in measured]


def grid(found: Mapping[str, Any], is_memory: bool = False, is_short: bool = False) -> list[list[str]]:
    """Cells as text: the work, then each way's ratio with quartiles (is_short: without), or its peak of memory."""
    ways, by_place = ways_of(found), {(row["work"], row["way"]): row for row in found["rows"]}
    table = []
    for work in WORKS:
        rows = [by_place.get((work.name, way), {}) for way in ways]
        if any(("memory" if is_memory else "value") in row for row in rows):
            table.append([work.words, *(_cell(row, is_memory, is_short, "gpu" in found["machine"]) for row in rows)])
    return table


def notes(found: Mapping[str, Any]) -> list[str]:
    """What has no number, and why: by way, each reason once. That unpatched models are not patched goes without saying."""
    said: dict[tuple[str, str], list[str]] = {}
    words = {work.name: work.words for work in WORKS}
    unpatched = {way.name for way in (Sdpa, Eager, Flex)}
    remarks = [f"{way}: {remark}" for way in ways_of(found) if (remark := WAYS[way].remark)]
    for row in found["rows"]:
        if note := row.get("note") or (row["way"] not in unpatched and row.get("lacks")):
            said.setdefault((row["way"], note), []).append(words[row["work"]])
    every = len({row["work"] for row in found["rows"]})
    return remarks + [
        f"{way}: {note}" if len(works) == every else f"{way}: {note} ({'; '.join(works)})"
        for (way, note), works in said.items()
    ]


def _cell(row: Mapping[str, Any], is_memory: bool, is_short: bool, is_gpu: bool) -> str:
    if "value" not in row:
        return DIFFERS if row.get("note", "").startswith("differs") else NOT_OFFERED
    if is_memory:
        return f"{row['memory']:.2f}"
    value, low, high = (row[f"{'' if is_gpu else 'cpu_'}{name}"] for name in ("value", "low", "high"))
    digits = _digits(value)
    ratio = _number(value) if is_short else f"{_number(value)} ({low:.{digits}f} – {high:.{digits}f})"
    return f"{ratio}, {1000 * row['seconds'][1]:.2f} ms" if is_gpu else ratio


def _digits(value: float) -> int:
    return 3 if value < 2 else 2 if value < 10 else 1


def _number(value: float) -> str:
    return f"{value:.{_digits(value)}f}"


def _version(name: str, of: Mapping[str, str], here: Mapping[str, Any]) -> str:
    """A library's, and those of torch and transformers in its environment where they are others."""
    others = [f"{package} {number}" for package, number in of.items() if package != "itself" and number != here.get(package)]
    return f"{name} {of['itself']}" + (f" (with {', '.join(others)})" if others else "")


def markdown(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines: what and where, the table of times, that of memory, what there is not, this library beside each of the others."""
    settings = Settings(**found["settings"])
    what = "time" if "gpu" in found["machine"] else "CPU time"
    libraries = ", ".join(_version(name, of, found["machine"]) for name, of in found["versions"].items())
    rounds = f"{settings.rounds} interleaved rounds ({settings.heavy} of decoding and sweeps)"
    where = "; ".join(part for part in (sentence(found["machine"]), libraries) if part)
    yield f"{where}; seed {settings.seed}, {rounds}, {found['machine']['date']}."
    yield f"{settings.shape}: {what} over unpatched sdpa.\n"
    yield from _table("median (quartiles)", ways_of(found), grid(found))
    memory = grid(found, is_memory=True)
    if memory:
        layers = {row["memory_layers"] for row in found["rows"] if "memory_layers" in row}
        yield f"\nPeak memory over unpatched sdpa, in models of {' or '.join(map(str, sorted(layers)))} layers.\n"
        yield from _table("peak memory", ways_of(found), memory)
    yield ""
    yield from (f"* {note}" for note in notes(found))
    yield from _ours_there(found)


def _ours_there(found: Mapping[str, Any]) -> Iterator[str]:
    """Folded: what this library takes in the processes of the others, beside which their ratios were measured."""
    ours = {(row["work"], row["way"]): row["ours"] for row in found["rows"] if "value" in row and row.get("ours") is not None}
    ways = [way for way in ways_of(found) if any(place[1] == way for place in ours)]
    works = [work for work in WORKS if any(place[0] == work.name for place in ours)]
    if ours:
        cells = {place: _number(value) for place, value in ours.items()}
        yield f"\n<details><summary>{Auto.name} in the process of each of the others</summary>\n"
        yield from _table("median", ways, [[w.words, *(cells.get((w.name, way), NOT_OFFERED) for way in ways)] for w in works])
        yield "\n</details>"


def _table(title: str, ways: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {title} | {' | '.join(ways)} |"
    yield f"| --- |{' ---: |' * len(ways)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
