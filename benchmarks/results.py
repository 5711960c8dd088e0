"""Results of a benchmark: rows, their JSON, the table on the terminal; and measurements in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"

Row = dict[str, Any]
"""group, what, value, low and high (quartiles), target or None, met or None, and whatever else was measured."""


def row(group: str, what: str, numbers: dict[str, Any], target: float | None = None, met: bool | None = None) -> Row:
    """met: by default, whether the value is at most the target."""
    if met is None and target is not None:
        met = numbers["value"] <= target
    return {"group": group, "what": what, **numbers, "target": target, "met": met}


WALL = ("value", "low", "high", "ratio_of_medians", "seconds")
"""What is told by the clock on the wall."""


def by_cpu(what: str, numbers: dict[str, Any], device: str) -> tuple[str, dict[str, Any]]:
    """On a CPU, the ratio of CPU times in place of that by the clock on the wall, which is kept beside it (`wall_value`).

    What else runs on a machine for minutes is no noise that medians of a few rounds take away. what: "time ..".
    """
    if not device.startswith("cpu"):
        return what, numbers
    names = ("value", "low", "high")
    kept = {name: value for name, value in numbers.items() if name not in WALL}
    wall = {f"wall_{name}": numbers[name] for name in WALL if name in numbers}
    return f"CPU {what}", {**kept, **wall, **{name: numbers[f"cpu_{name}"] for name in names}}


def child(module: str, *arguments: str) -> Any:
    """Runs a measurement in a process of its own; its last line is JSON. Raises RuntimeError with what it said."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def shown(row: Row) -> tuple[str, str, str, str]:
    """A row in words: value, quartiles, target, whether it was met."""
    digits = 3 if row["value"] < 2 else 2
    value, low, high = (f"{row[name]:.{digits}f}" for name in ("value", "low", "high"))
    target = "" if row["target"] is None else f"≤ {row['target']:.3g}"
    met = "" if row["met"] is None else "yes" if row["met"] else "no"
    return value, "" if low == high else f"{low} – {high}", target, met


def show(rows: Sequence[Row]) -> None:
    """Prints one table for each group; CPU time beside wall time where both were taken."""
    console = Console(width=150)
    for group, members in groupby(rows, key=lambda row: row["group"]):
        table = Table(title=group, title_justify="left")
        for name in ("", "median", "quartiles", "CPU time", "quartiles", "target", "met"):
            table.add_column(name, justify="left" if name == "" else "right")
        for member in members:
            value, spread, target, met = shown(member)
            cpu = [f"{member[f'cpu_{name}']:.3f}" for name in ("value", "low", "high")] if "cpu_value" in member else None
            table.add_row(member["what"], value, spread, *((cpu[0], f"{cpu[1]} – {cpu[2]}") if cpu else ("", "")), target, met)
        console.print(table)


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def report(benchmark: str, settings: Any, rows: list[Row], path: Path | None) -> None:
    """Prints the rows of a benchmark that is over, and the machine; writes both to `path`, if there is one."""
    show(rows)
    about = machine.describe(settings.device)
    print(machine.sentence(about))
    if path is not None:
        save(path, {"benchmark": benchmark, "machine": about, "settings": asdict(settings), "rows": rows})


def made_by(name: str) -> str:
    """The command that makes results of this name, in words."""
    if name.startswith("compare"):
        return "run python -m benchmarks --out benchmarks/results"
    return f"run python -m benchmarks.{name} --json benchmarks/results/{name}-cpu.json"
