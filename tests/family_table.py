"""Writes README's tables of sites, and of families from the tiny models of the tests: `python tests/family_table.py`."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from families import FAMILIES
from packaging.version import Version

from surgery import inspect_model
from surgery.family import find_family
from surgery.sites import SITES

OWN = "its eager function"
SINCE = {"gptj": "5.24", "codegen": "5.24"}
"""The transformers since when a family has gone through the interface, so that its file in `patches/` no longer applies."""


def family_table() -> str:
    """One row for each family: class, heads over kv heads, projections, how the patch is found."""
    lines = [
        "| family | attention class | heads / kv heads | projections | reconstruction from |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, family in FAMILIES.items():
        model = family.build()
        row = inspect_model(model, strict=True).rows[0]
        found = find_family(model.get_submodule(row.path))
        assert found is not None
        source = OWN if found.interface is not None and not found.members else "`patches/`"
        if not found.eager.__module__.startswith("transformers"):
            source = f"`patches/{found.eager.__module__.rpartition('.')[2]}.py`"
        if (since := SINCE.get(name)) is not None:
            patch = f"`patches/{name}.py`"
            assert source == (patch if Version(transformers.__version__) < Version(since) else OWN), (name, source)
            source = f"{OWN}; before transformers {since} {patch}"
        fused = row.fusion.replace("|", "\\|")
        cells = (name.replace("_", " "), row.attention, f"{row.heads} / {row.kv_heads}", fused, source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def site_table() -> str:
    """One row for each site: circuit, shape, meaning."""
    lines = ["| site | circuit | shape | is |", "| --- | --- | --- | --- |"]
    lines += [f"| `{s.name}` | {s.circuit.upper()} | {', '.join(s.axes)} | {s.meaning} |" for s in SITES.values()]
    return "\n".join(lines) + "\n"


TABLES = {"sites": site_table, "families": family_table}


def main() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        table = f"<!-- {name} -->\n{make()}<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*<!-- /{name} -->", lambda _, table=table: table, text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
