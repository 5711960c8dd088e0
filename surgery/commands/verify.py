"""`surgery verify`: what an exported folder computes, beside itself without cuts and beside the original."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from surgery.commands.shared import (
    Debug,
    Device,
    Folder,
    Inputs,
    Json,
    Trust,
    device_of,
    messages,
    read_inputs,
    say,
    write_json,
)


def verify(
    folder: Folder,
    original: Annotated[str | None, typer.Option(help="The model that it was made from: folder or hub name.")] = None,
    inputs: Inputs = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check the files of an export, and measure what its cuts change.

    Patched without cuts the folder must equal itself in plain transformers bit for bit, and, unless cuts are in its weights,
    the original. Exit code 1 if it does not, or if a file was changed since the export.
    """
    with messages(debug):
        from surgery.export.audit import audit

        where, given = device_of(device), read_inputs(inputs)
        found = audit(folder, original, given, where, trust_remote_code)
        if as_json:
            write_json(found.as_dict())
        else:
            _show(found)
        if found.problems:
            raise typer.Exit(1)


def _show(found: Any) -> None:
    title = f"cuts that loading applies: {len(found.cuts)}; cuts in the weights: {len(found.baked)}"
    table = Table("compared", "difference", "tokens changed", title=title, title_justify="left")
    for row in found.rows:
        verdict = (" (equal)" if row.difference == 0 else " (must be 0)") if row.must_equal else ""
        table.add_row(row.compared, f"{row.difference:.3g}{verdict}", f"{row.changed} of {row.positions}")
    Console().print(table)
    if found.changed_weights is not None:
        shown = ", ".join(found.changed_weights[:4]) + (", .." if len(found.changed_weights) > 4 else "")
        say(f"weights that are not the original's: {len(found.changed_weights)} {shown}".strip())
    for line in found.notes:
        say(line)
    for line in found.problems:
        Console(stderr=True).print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
