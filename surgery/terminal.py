"""Tables and sentences as text, as wide as the terminal is."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTHS = (72, 140)
"""Letters in a line, at least and at most; as many as the latter where there is no terminal."""


def printed(*parts: Table | str) -> str:
    """What printing the tables and lines shows. Lines are not broken, so that they can be searched and copied."""
    width = min(max(shutil.get_terminal_size((WIDTHS[1], 24)).columns, WIDTHS[0]), WIDTHS[1])
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in parts:
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def table_of(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    numbers: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> Table:
    """A table without the columns that are empty in all rows.

    numbers: names of columns that line up on the right; these and those of whole are never broken.
    """
    table = Table(
        title=Text(title) if title else None, title_justify="left", padding=(0, 1, 0, 0), box=box.SIMPLE_HEAD, show_edge=False
    )
    kept = [i for i in range(len(names)) if not rows or any(row[i] for row in rows)]
    for i in kept:
        justify: Any = "right" if names[i] in numbers else "left"
        table.add_column(names[i], justify=justify, overflow="fold", no_wrap=names[i] in (*numbers, *whole))
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table
