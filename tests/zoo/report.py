"""The checks over many types: `python -m zoo.report all [--shard 1/4] [--json FILE]`, `--merge FILE...`, `--write`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from zoo.build import TYPES
from zoo.checks import check
from zoo.page import classes, page, short

RESULTS = Path(__file__).parents[2] / "surgery/commands/families.json"  # `surgery families` shows it
PAGE = Path(__file__).parents[2] / "FAMILIES.md"


def shard(types: Sequence[str], part: str) -> list[str]:
    """Every n-th type from the i-th on, for "i/n"; for "all" every type."""
    if part == "all":
        return list(types)
    number, _, count = part.partition("/")
    return list(types[int(number) - 1 :: int(count)])


def run(types: Sequence[str], file: str | None = None) -> list[dict[str, Any]]:
    """Checks types, a line each; the file holds what is done so far."""
    rows: list[dict[str, Any]] = []
    for model_type in types:
        outcome = check(model_type)
        rows.append(outcome.as_dict())
        text = outcome.reason if outcome.status != "patched" else f"{len(outcome.passed)} passed"
        if outcome.refused:
            text += f"; left as they are: {', '.join(outcome.refused)}"
        if outcome.failures:
            text += f"; FAILED: {', '.join(outcome.failures)}"
        sys.stdout.write(f"{model_type:42} {outcome.status:12} {outcome.seconds:6.1f} s  {text}\n")
        sys.stdout.flush()
        if file is not None:
            Path(file).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


def totals(rows: Sequence[dict[str, Any]]) -> str:
    """How many types of each status, what holds of how many, and how many attention classes there are of each origin."""
    status = Counter(row["status"] for row in rows)
    passed = Counter(name for row in rows for name in row["passed"])
    failed = Counter(name for row in rows for name in row["failures"])
    lines = [f"{len(rows)} types: " + ", ".join(f"{count} {name}" for name, count in status.most_common())]
    lines += [f"  {name}: {count} passed, {failed[name]} failed" for name, count in passed.items()]
    lines += [f"  {name}: {count} failed" for name, count in failed.items() if name not in passed]
    lines += [f"attention classes, {how}: {len(names)}" for how, names in classes(rows).items()]
    return "\n".join(lines) + f"\n{sum(row['seconds'] for row in rows):.0f} s\n"


def kept(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page needs, and no more."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    return {"versions": versions, "types": [_kept(row) for row in sorted(rows, key=lambda row: row["model_type"])]}


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    attentions: dict[str, Any] = {}
    for attention in row["attentions"]:
        small = {name: attention[name] for name in ("name", "heads", "kv_heads", "how", "missing")}
        attentions[json.dumps(small)] = small
    small = {name: row[name] for name in ("model_type", "kind", "status")}
    small["reason"] = row["reason"][:200]
    small["attentions"] = list(attentions.values())
    small["failures"] = sorted(row["failures"])
    for field in ("refused", "others"):
        small[field] = {name: short(reason) for name, reason in row[field].items()}
    return small


def as_text(results: dict[str, Any]) -> str:
    """JSON with one type a line, which reads well as a difference between two versions."""
    lines = ",\n".join(json.dumps(row) for row in results["types"])
    return f'{{"versions": {json.dumps(results["versions"])}, "types": [\n{lines}\n]}}\n'


def read(files: Sequence[str]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        rows.update((row["model_type"], row) for row in json.loads(Path(file).read_text(encoding="utf-8")))
    return list(rows.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help='names of model types, or "all"')
    parser.add_argument("--shard", default="all", help="i/n")
    parser.add_argument("--json", help="where the outcomes go, in full")
    parser.add_argument("--merge", nargs="*", help="outcomes of shards, to become families.json")
    parser.add_argument("--write", action="store_true", help="write FAMILIES.md from families.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = read(options.merge or [])
    if options.types:
        rows += run(shard(TYPES if options.types == ["all"] else options.types, options.shard), options.json)
    if rows:
        sys.stdout.write(totals(rows))
    if options.merge:
        RESULTS.write_text(as_text(kept(rows)), encoding="utf-8")
    if options.write:
        PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    return int(any(row["failures"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
