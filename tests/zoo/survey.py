"""Build every type, run it once, and say what came of it: `python -m zoo.survey [types...] [--json FILE]`."""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.build import TYPES, UNBUILDABLE, build, make_inputs, supports_sdpa
from zoo.types import ENTRIES


def tensors(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors of a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


def check(model_type: str) -> dict[str, Any]:
    """One line of the survey: what failed, or "ok"."""
    row: dict[str, Any] = {"type": model_type, "kind": ENTRIES[model_type].kind, "result": "ok", "sdpa": None}
    started = time.perf_counter()
    if model_type in UNBUILDABLE:
        return {**row, "result": f"unbuildable: {UNBUILDABLE[model_type]}", "seconds": 0.0}
    stage = "build"
    try:
        model = build(model_type)
        row["architecture"], row["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
        stage = "inputs"
        inputs = make_inputs(model, model_type)
        row["inputs"] = {name: list(v.shape) for name, v in inputs.items() if isinstance(v, Tensor)}
        stage = "forward"
        with torch.no_grad():
            outputs = list(tensors(model(**inputs)))
        if not outputs:
            row["result"] = "forward: no floating-point outputs"
        elif not all(bool(torch.isfinite(t).all() | _masked(t)) for t in outputs):
            row["result"] = "forward: outputs that are not finite"
        stage = "sdpa"
        row["sdpa"] = supports_sdpa(model_type)
    except Exception as error:  # one type's failure must not end the survey
        row["result"] = f"{stage}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {**row, "seconds": time.perf_counter() - started}


def _masked(tensor: Tensor) -> Tensor:
    """Some models answer minus infinity on purpose, for what may not be chosen; a number that is none is never right."""
    return (~torch.isnan(tensor)).all() & (tensor != float("inf")).all() & torch.isfinite(tensor).any()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", default=None)
    parser.add_argument("--failures", action="store_true", help="print only what failed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for model_type in options.types or TYPES:
        row = check(model_type)
        rows.append(row)
        if not options.failures or row["result"] != "ok":
            sys.stdout.write(f"{model_type:40} {row['kind']:16} {row['seconds']:6.2f} s  {row['result']}\n")
            sys.stdout.flush()
    good = collections.Counter(row["kind"] for row in rows if row["result"] == "ok")
    every = collections.Counter(row["kind"] for row in rows)
    for kind in sorted(every):
        sys.stdout.write(f"{kind}: {good[kind]} of {every[kind]}\n")
    sdpa = sum(bool(row["sdpa"]) for row in rows)
    total = sum(row["seconds"] for row in rows)
    sys.stdout.write(f"{sum(good.values())} of {len(rows)} built and run, {sdpa} with sdpa, {total:.0f} s\n")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
