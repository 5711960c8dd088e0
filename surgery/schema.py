"""The JSON Schema of a spec as it is written in a file: editors complete and check spec.yaml by it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from surgery.cuts import VALUED, Edit
from surgery.spec import KINDS, VERSION

FIELD = re.compile(r"^(?P<names>\w+(?:, \w+)*): ?(?P<text>.*)$")


def spec_schema() -> dict[str, Any]:
    """As plain data, in the dialect of 2020-12. Every text that Spec.to_json writes fits it; what a file may say besides
    (numbers of other cuts, values that do not go with an action) Spec.load checks and words better than a schema can."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A spec of attention-surgery: which heads are cut, where and to what",
        "type": "object",
        "properties": {
            "$schema": {"type": "string", "description": "Where this schema is; JSON files name it here."},
            "version": {"const": VERSION, "description": "Of this format."},
            "cuts": {
                "type": "array",
                "description": "In their order; edits at one site act on what the one before left.",
                "items": {
                    "type": "object",
                    "properties": {"kind": {"enum": list(KINDS)}},
                    "required": ["kind"],
                    # One after another, so that an editor marks the wrong field and not the whole cut.
                    "allOf": [{"if": _has("kind", [kind]), "then": {"$ref": f"#/$defs/{kind}"}} for kind in KINDS],
                },
            },
        },
        "required": ["version", "cuts"],
        "additionalProperties": False,
        "$defs": {kind: _cut(kind, cls) for kind, cls in KINDS.items()},
    }


def _has(field: str, words: list[str]) -> dict[str, Any]:
    """The schema of what has one of these words in a field."""
    return {"properties": {field: {"enum": words}}, "required": [field]}


def _cut(kind: str, cls: Any) -> dict[str, Any]:
    """The schema of one kind of cut, from pydantic's, with the texts of its class's docstring."""
    schema = cls.model_json_schema()
    text = inspect.getdoc(cls) or ""
    texts = {**_fields(inspect.getdoc(Edit) or ""), **{n: t for n, t in _fields(text).items() if t != "see Edit."}}
    for name, field in schema["properties"].items():
        field.pop("title", None)
        field["description"] = texts[name]
    needs = [
        {
            "if": _has("action", list(VALUED)),
            "then": {"required": ["value"], "properties": {"value": {"not": {"type": "null"}}}},
        },
        {"if": _has("action", ["activation"]), "then": {"required": ["reference"]}},
    ]
    return {
        **({"allOf": needs} if cls is Edit else {}),
        "type": "object",
        "properties": {"kind": {"const": kind, "description": text.splitlines()[0]}, **schema["properties"]},
        "required": ["kind", *schema["required"]],
        "additionalProperties": False,
    }


def _fields(text: str) -> dict[str, str]:
    """What a docstring says of each field: lines "name: text", or "name, name: text", and those further in below them."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if match := FIELD.match(line):
            names = match["names"].split(", ")
            found.update(dict.fromkeys(names, match["text"]))
        elif line.startswith(" "):
            found.update((name, f"{found[name]} {line.strip()}".strip()) for name in names)
        else:
            names = []
    return found
