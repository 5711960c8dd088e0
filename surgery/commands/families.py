"""`surgery families`: which model types of transformers are patched, and how."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from surgery.commands.shared import Debug, Json, messages, say, write_json


def _complete(incomplete: str) -> list[str]:
    """Model types that begin with what is there, for the shell."""
    return [row["model_type"] for row in _read()["types"] if row["model_type"].startswith(incomplete)]


def families(
    name: Annotated[
        str,
        typer.Argument(help="A part of the names of model types.", show_default="all of them", autocompletion=_complete),
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the model types of transformers: what is patched and how, what is not and why. Measured, not declared."""
    with messages(debug):
        from surgery.errors import NoMatchError, closest, describe

        found = _read()
        names = [row["model_type"] for row in found["types"]]
        rows = [row for row in found["types"] if name.lower() in row["model_type"]]
        if not rows:
            expected = f"a part of one of {len(names)} model types of transformers {found['versions']['transformers']}"
            do = f"{closest(name, names)}`surgery inspect` derives any other model."
            raise NoMatchError(describe("families", repr(name), expected, do))
        if as_json:
            write_json({"versions": found["versions"], "types": rows})
            return
        whole = Column("attention class", no_wrap=True)  # a name to be copied
        table = Table("model type", "status", whole, "reconstruction from", "sites not there")
        for column in table.columns:
            column.overflow = "fold"
        for row in rows:
            classes = [(a["name"], a["how"], ", ".join(a["missing"])) for a in row["attentions"]] or [("", "", "")]
            for number, cells in enumerate(classes):
                table.add_row(*(("", "") if number else (row["model_type"], row["status"])), *cells)
        Console().print(table)
        for row in rows:
            for reason in filter(None, [row["reason"], *(f"{cls}: {why}" for cls, why in row["refused"].items())]):
                say(f"{row['model_type']}: {reason}")
        patched = sum(row["status"] == "patched" for row in rows)
        versions = ", ".join(f"{library} {version}" for library, version in found["versions"].items())
        say(f"{patched} of {len(rows)} patched; checked as tiny random models with {versions}.")


def _read() -> dict[str, Any]:
    """What the tests of every model type found: versions, and types by name."""
    return json.loads(files("surgery.commands").joinpath("families.json").read_text(encoding="utf-8"))
