"""All processes of a comparison of one shape, and their findings in one place."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.comparison.environments import NotInstalled
from benchmarks.comparison.task import Settings
from benchmarks.comparison.worker import ALWAYS, WAYS
from benchmarks.comparison.works import chosen
from benchmarks.results import ROOT

Say = Callable[[str], None]


def compare(settings: Settings, names: Sequence[str], python_of: Callable[[str], Path], say: Say) -> dict[str, Any]:
    """The findings of some ways as one JSON-ready dictionary: machine, settings, rows (see `worker.measure`), versions.

    python_of: the interpreter that has a package. A row of another library has `ours`, the ratio of this library in its
    process. Raises RuntimeError with what was printed if a process of this environment fails; another library's is noted.
    """
    rows, versions, notes = [], {}, {}
    for interpreter, some in _processes(names, python_of, notes):
        is_home = not any(WAYS[name].package for name in some)
        try:
            found = _process(interpreter, settings, some, say)
        except RuntimeError as error:
            if is_home:
                raise
            notes |= dict.fromkeys(some, f"its process fails: {str(error).strip().splitlines()[-1]}")
            continue
        value = "cpu_value" if torch.device(settings.device).type == "cpu" else "value"
        ours = {row["work"]: row.get(value) for row in found["rows"] if row["way"] == ALWAYS[1]}
        more = {name: {**found["with"], "itself": number} for name, number in found["versions"].items()}
        versions |= more
        rows += [
            row if is_home else {**row, "ours": ours.get(row["work"])}
            for row in found["rows"]
            if is_home or row["way"] not in ALWAYS
        ]
    rows += [{"work": work.name, "way": name, "note": note} for name, note in notes.items() for work in chosen(settings)]
    order = [work.name for work in chosen(settings)], list(WAYS)
    return {
        "benchmark": settings.name,
        "machine": machine.describe(settings.device),
        "settings": asdict(settings),
        "versions": versions,
        "rows": sorted(rows, key=lambda row: (order[0].index(row["work"]), order[1].index(row["way"]))),
    }


def _processes(
    names: Sequence[str], python_of: Callable[[str], Path], notes: dict[str, str]
) -> Iterator[tuple[Path, list[str]]]:
    """An interpreter and its ways: those that need nothing more together, each of the others by itself."""
    yield Path(sys.executable), [name for name in names if WAYS[name].package is None]
    for name in names:
        if (package := WAYS[name].package) is not None:
            try:
                yield python_of(package), [name]
            except NotInstalled as reason:
                notes[name] = f"not installed: {reason}"


def _process(python: Path, settings: Settings, names: Sequence[str], say: Say) -> dict[str, Any]:
    command = [str(python), "-m", "benchmarks.comparison.worker", json.dumps(asdict(settings)), *names]
    lines = []
    # A pipe that nobody reads meanwhile would stop a library that prints much.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if line.startswith(settings.name):
                    say(line.strip())
        output.seek(0)
        printed = output.read().strip().splitlines()
    if process.returncode:
        said = "".join(line for line in lines[-40:] if not line.startswith(settings.name))
        raise RuntimeError(said.strip() or f"ends with {process.returncode} and no word")
    try:
        found: dict[str, Any] = json.loads(printed[-1])
    except (IndexError, ValueError):
        raise RuntimeError("prints no findings at its end") from None
    return found
