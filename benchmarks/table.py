"""README's tables from committed results: `python -m benchmarks.table` rewrites them, `--check` exits 1 where they differ.

So it does with those of benchmarks/README.md. A file has a place for a table between `<!-- benchmark:NAME -->` and
`<!-- /benchmark:NAME -->`; it shows every results/NAME-*.json. Between `<!-- closest:NAME -->` markers each of its groups has
one row: the measurement that is closest to its target, or furthest beyond. Between `<!-- plan -->` markers comes the plan of a
large model (`plan.py`). Absolute times are shown only of a GPU: those of a shared CPU mean nothing elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import plan
from benchmarks.comparison import grid as comparison
from benchmarks.machine import sentence
from benchmarks.results import FOLDER, ROOT, Row, made_by, shown

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
_PLAN = re.compile(r"(<!-- plan -->\n).*?(<!-- /plan -->)", re.DOTALL)
_PLACE = re.compile(r"(<!-- (benchmark|closest):([\w-]+) -->\n).*?(<!-- /\2:\3 -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- (?:benchmark|closest):")


def fill(text: str, folder: Path = FOLDER) -> str:
    """The text with its tables as the results have them. Raises ValueError for text without a place, or without results."""
    places = [match.group(3) for match in _PLACE.finditer(text)]
    expected = len(_OPENING.findall(text))
    if not places or len(places) != expected:
        raise ValueError(f"{len(places)} of {expected} places between <!-- benchmark:NAME --> markers found")
    for name in places:
        if not _files(folder, name):
            raise ValueError(f"no {name}-*.json in {folder}; {made_by(name)} first")
    text = _PLACE.sub(lambda match: f"{match[1]}{tables(match[2], match[3], folder)}{match[4]}", text)
    return _PLAN.sub(lambda match: f"{match[1]}{chr(10).join(plan.lines(folder))}\n{match[2]}", text)


def tables(kind: str, name: str, folder: Path = FOLDER) -> str:
    """The Markdown tables of a benchmark under a line about the machine.

    kind: "benchmark" (one for each group of rows), or "closest" (one, with a row for each group that has targets).
    """
    found = (json.loads(path.read_text(encoding="utf-8")) for path in _files(folder, name))
    return "".join(f"{line}\n" for one in found for line in _KINDS[kind](one))


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.json"))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    if "versions" in found:
        yield from (*comparison.markdown(found), "")
        return
    is_gpu = "gpu" in found["machine"]
    yield _about(found)
    for title, rows in _groups(found):
        times = ("time",) if is_gpu else ()
        yield _row(title, "median", "quartiles", "target", "met", *times)
        yield _row("---", *["---:"] * (4 + len(times)))
        for row in rows:
            yield _row(row["what"], *shown(row), *([_milliseconds(row)] if is_gpu else []))
        yield ""


def _closest_lines(found: dict[str, Any]) -> Iterator[str]:
    yield _about(found)
    yield _row("", "closest to its target, or beyond", "median", "quartiles", "target", "targets met")
    yield _row("---", "---", *["---:"] * 4)
    for title, rows in _groups(found):
        if aimed := [row for row in rows if row["target"] is not None]:
            one = max(aimed, key=lambda row: row["value"] / row["target"])
            met = f"{sum(row['met'] for row in aimed)} of {len(aimed)}"
            yield _row(title, one["what"], *shown(one)[:3], met)
    yield ""


_KINDS = {"benchmark": _lines, "closest": _closest_lines}


def _groups(found: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    for group, rows in groupby(found["rows"], key=lambda row: row["group"]):
        yield f"{group[0].upper()}{group[1:]}", list(rows)


def _about(found: dict[str, Any]) -> str:
    machine, settings = found["machine"], found["settings"]
    rounds = f"{settings['rounds']} {settings.get('rounds_are', 'interleaved rounds')}"
    return f"{sentence(machine)}; seed {settings['seed']}, {rounds}, {machine['date']}.\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _milliseconds(row: dict[str, Any]) -> str:
    seconds = row.get("seconds")
    seconds = seconds[1] if isinstance(seconds, list) else seconds
    return f"{1000 * seconds:.1f} ms" if isinstance(seconds, float) else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--file", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=FOLDER)
    given = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in given.file}
    filled = {path: fill(text, given.results) for path, text in texts.items()}
    differing = [path for path in texts if filled[path] != texts[path]]
    for path in differing:
        if given.check:
            print(f"{path} differs from {given.results}: run python -m benchmarks.table")
        else:
            path.write_text(filled[path], encoding="utf-8")
    return int(given.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
