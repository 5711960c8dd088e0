"""`surgery schema`: the JSON Schema of a spec, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.shared import Debug, Json, messages, say, write_json


def schema(
    out: Annotated[Path | None, typer.Option(help="The file to write.", show_default="stdout")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the JSON Schema of spec.yaml, by which editors complete and check it.

    With the schema beside the spec, begin spec.yaml with the line `# yaml-language-server: $schema=surgery.schema.json`.
    """
    with messages(debug):
        from surgery.schema import spec_schema

        text = json.dumps(spec_schema(), indent=2)
        if out is None:
            say(text)
        else:
            out.write_text(text + "\n", encoding="utf-8")
            if as_json:
                write_json({"out": str(out)})
