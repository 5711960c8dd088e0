"""Memory that exports take: `python -m benchmarks.export [--quick] [--json FILE]`; with PLACE and CASE, one measurement.

Growth of the highest memory over the size of the model, beside that of transformers' own save_pretrained. Each measurement in
a new process, the cases in an order that is drawn anew in every round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import machine, models, results
from benchmarks.resident import watched
from benchmarks.results import Row, child, row
from benchmarks.timing import Spread
from surgery import Freeze, export_checkpoint, patch_model


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurement. The defaults are those that the targets are stated for."""

    threads: int = 1
    seed: int = 0
    rounds: int = 5
    layers: int = 14
    heads: int = 12
    d_head: int = 64
    vocabulary: int = 1024
    shards: int = 10
    """The model's size over that of a shard."""


QUICK = Settings(rounds=1, layers=2)

HEADERS = 100_000
"""Bytes: the names in all files are less."""

PLACES = {
    "memory": "a model in memory, one file",
    "shards": "a model in memory, files of a tenth of it",
    "disk": "a model with its layers on a disk, files of a tenth of it",
}
CASES: dict[str, tuple[str, dict[str, float]]] = {
    "save": ("save_pretrained, unpatched", {}),
    "export": ("export_checkpoint", dict.fromkeys(PLACES, 0.05)),
    "bake": ("export_checkpoint, bake=True, both circuits cut in every layer", dict.fromkeys(PLACES, 0.65)),
    "verify": ("… compared with it in a new process, which counts as well", {}),
}
"""What is done, in words, and its targets by place: a third of this model is matrices that baking changes."""


def rows(s: Settings) -> Iterator[Row]:
    """The median over rounds, in sizes of the model."""
    order = random.Random(s.seed)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {(place, case): [] for place in PLACES for case in CASES}
    for _ in range(s.rounds):
        for place, case in order.sample(sorted(runs), len(runs)):
            runs[place, case].append(child("export", place, case, "--settings", json.dumps(asdict(s))))
    for (place, case), of in runs.items():
        what, targets = CASES[case]
        spread = Spread.of([run["growth"] / run["size"] for run in of])
        numbers = {"value": spread.median, "low": spread.low, "high": spread.high, "rounds": len(of)}
        numbers |= {"size_bytes": of[0]["size"], "wall_seconds": Spread.of([run["wall"] for run in of]).median}
        group = (
            f"growth of peak memory while {PLACES[place]}, is exported, over the model's size ({of[0]['size'] / 2**20:.0f} MiB)"
        )
        yield row(group, what, numbers, targets.get(place))


def measure(place: str, case: str, s: Settings, folder: Path) -> dict[str, float]:
    """Bytes by which the highest memory grew, and the model's size; seconds."""
    model = build(place, s, folder)
    size = sum(p.nbytes for p in model.parameters())
    ids = models.tokens(2, 16, seed=s.seed, vocabulary=s.vocabulary)
    heads = [s.heads // 4, s.heads // 2 + 1]
    if case != "save":
        patch_model(model, [Freeze("qk", heads=heads[:1]), Freeze("ov", heads=heads[1:])])
    options: dict[str, Any] = {} if place == "memory" else {"max_shard_size": size // s.shards}
    if case in ("bake", "verify"):
        options |= {"bake": True, "verify": case == "verify", "example_inputs": {"input_ids": ids}}
    with torch.no_grad():
        model(ids)  # code that is made on a first call is not what is measured
    with watched() as found:
        start = time.perf_counter()
        if case == "save":
            model.save_pretrained(folder / "out", **options)
        else:
            export_checkpoint(model, folder / "out", **options)
        wall = time.perf_counter() - start
    written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
    if not size <= written < size + HEADERS:
        raise RuntimeError(f"{place}, {case}: {written} bytes were written of a model of {size}")
    return {"growth": found["highest"] - found["before"], "size": size, "wall": wall}


def build(place: str, s: Settings, folder: Path) -> Any:
    """A random GPT-2 with its head; for "disk", its layers come from a checkpoint and stay there."""
    width = s.heads * s.d_head
    model = models.gpt2(s.layers, s.heads, width, positions=64, vocabulary=s.vocabulary, head=True, seed=s.seed)
    if place != "disk":
        return model
    model.save_pretrained(folder / "source")
    del model
    where: dict[str, str] = {f"transformer.{name}": "cpu" for name in ("wte", "wpe", "drop", "ln_f")}
    where |= {f"transformer.h.{layer}": "disk" for layer in range(s.layers)}
    return transformers.GPT2LMHeadModel.from_pretrained(
        folder / "source", device_map={**where, "lm_head": "cpu"}, offload_folder=folder / "offload"
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", nargs="?", choices=list(PLACES))
    parser.add_argument("case", nargs="?", choices=list(CASES))
    parser.add_argument("--quick", action="store_true", help="a small model, once, to see that it runs")
    parser.add_argument("--json", type=Path, help="where to write the results (results/export-cpu.json are those shown)")
    parser.add_argument("--settings", type=json.loads, default={}, help="sizes, as JSON")
    given = parser.parse_args()
    settings = Settings(**(asdict(QUICK if given.quick else Settings()) | given.settings))
    torch.set_num_threads(settings.threads)
    if given.place:
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(given.place, given.case, settings, Path(folder))))
        return
    load = os.getloadavg()[0]
    found = {
        "benchmark": "export",
        "machine": machine.describe("cpu"),
        "settings": asdict(settings),
        "rows": list(rows(settings)),
    }
    found["load"] = [round(load, 2), round(os.getloadavg()[0], 2)]
    if given.json:
        results.save(given.json, found)
    results.show(found["rows"])
    print(machine.sentence(found["machine"]))


if __name__ == "__main__":
    main()
