"""Reports of the commands on findings: Markdown with tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown_table(frame: Any, columns: Sequence[str]) -> list[str]:
    """Lines of a table; numbers with three digits, nothing where there is no number."""
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in frame[list(columns)].itertuples(index=False))]


def write_report(folder: Path, title: str, *parts: Sequence[str]) -> None:
    """report.md in a folder: a title, and parts with an empty line before each; parts without lines are left out."""
    lines = [f"# {title}"]
    for part in parts:
        lines += ["", *part] if part else []
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.3g}"
