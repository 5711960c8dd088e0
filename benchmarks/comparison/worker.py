"""One process of a comparison: `python -m benchmarks.comparison.worker SETTINGS WAY [WAY ...]` prints its findings as JSON.

SETTINGS is JSON of `task.Settings`. The unpatched model and this library run in every process, whatever others do, so that
each is compared with what ran moments before on the same weights. Nothing is timed that gives other numbers than ours.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.hooked import Hooked
from benchmarks.comparison.ours import Auto, Reconstructed
from benchmarks.comparison.plain import Eager, Flex, Sdpa
from benchmarks.comparison.task import Settings, Task
from benchmarks.comparison.way import NotOffered, Way
from benchmarks.comparison.with_nnsight import Nnsight
from benchmarks.comparison.with_pyvene import Pyvene
from benchmarks.comparison.with_transformer_lens import TransformerLens
from benchmarks.comparison.works import Run, Work, chosen
from benchmarks.machine import available_bytes
from benchmarks.memory import peak_cpu, peak_cuda
from benchmarks.timing import pairs, take_turns

WAYS: Mapping[str, type[Way]] = {
    way.name: way for way in (Sdpa, Eager, Flex, Hooked, Auto, Reconstructed, TransformerLens, Nnsight, Pyvene)
}
ALWAYS = (Sdpa.name, Auto.name)
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference from ours, of the largest number: sums in another order, in every layer; half precision rounds each."""
LIVE = 2e-3
"""Cuts change what is compared by more than this part of the largest number, or agreement would say nothing of them."""


def measure(settings: Settings, names: list[str]) -> dict[str, Any]:
    """rows: of each work and way, the ratio to the unpatched model (median, quartiles), or what it `lacks`, or a `note`."""
    torch.manual_seed(settings.seed)
    task = Task(settings)
    ways: dict[str, Way] = {}
    versions, notes = {}, {}
    for name in dict.fromkeys([*ALWAYS, *names]):
        try:
            ways[name] = WAYS[name](task)
            if (package := WAYS[name].package) is not None:
                versions[name] = version(package)
        except Exception as error:  # other libraries raise what they like
            if name in ALWAYS:
                raise
            ways.pop(name, None)
            notes[name] = f"does not start: {in_a_line(error)}"
    rows = [
        {"work": work.name, "way": name, **cell}
        for work in chosen(settings)
        for name, cell in cells(work, task, ways, notes).items()
    ]
    return {"rows": rows, "versions": versions, "with": {name: version(name) for name in ("torch", "transformers")}}


def cells(work: Work, task: Task, ways: Mapping[str, Way], notes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of one work, by way."""
    s = task.settings
    found: dict[str, dict[str, Any]] = {name: {"note": note} for name, note in notes.items()}
    size = 4 * s.batch * s.length * work.held(s)
    if 5 * size > available_bytes():  # held by one way after another, by the check beside ours, and inside of an eager layer
        return {name: {"note": f"needs {size / 2**30:.1f} GiB for what is captured"} for name in (*ways, *notes)}
    runs: dict[str, Run] = {}
    uncut = _uncut(work, task, ways) if work.cuts else None
    with torch.no_grad(), ExitStack() as stack:
        expected: list[Tensor] = []
        for name in sorted(ways, key=lambda name: name != Auto.name):
            print(f"{s.name}: {work.words}: {name}", file=sys.stderr, flush=True)
            try:
                run = work.start(ways[name], task, stack)
                given = run.read(run.call())
                expected = expected or given
                gap, largest = difference(given, expected)
            except NotOffered as reason:
                found[name] = {"lacks": str(reason)}
                continue
            except Exception as error:  # other libraries raise what they like
                if name in ALWAYS:
                    raise
                found[name] = {"note": f"fails: {in_a_line(error)}"}
                continue
            if name == Auto.name and uncut is not None and not difference(given, uncut)[0] > LIVE * difference(given, uncut)[1]:
                raise RuntimeError(f"{work.words}: changes nothing that is compared")
            found[name] = {"difference": gap, "largest": largest}
            if gap <= CLOSE[ways[name].model.dtype] * largest:
                runs[name] = run
            else:
                found[name]["note"] = f"differs from ours by {gap:.2g}, of at most {largest:.2g}"
            del given
        expected.clear()
        _time(work, task, ways, runs, found)
    return found


def _uncut(work: Work, task: Task, ways: Mapping[str, Way]) -> list[Tensor]:
    """What the unpatched model gives where there is a cut."""
    with torch.no_grad(), ExitStack() as stack:
        run = _named(work.over, task).start(ways[Sdpa.name], task, stack)
        return run.read(run.call())


def _named(name: str, task: Task) -> Work:
    return next(work for work in chosen(task.settings) if work.name == name)


def _time(work: Work, task: Task, ways: Mapping[str, Way], runs: dict[str, Run], found: dict[str, dict[str, Any]]) -> None:
    """Adds ratios of time, and of peak memory, to the cells of what agrees with ours."""
    s = task.settings
    with ExitStack() as stack:
        base = _named(work.over, task).start(ways[Sdpa.name], task, stack)
        functions = {"": base.call, **{name: run.call for name, run in runs.items()}}
        rounds = s.heavy if work.heavy else s.rounds
        taken = take_turns(functions, rounds=rounds, seed=s.seed, device=s.device, warmup=0 if work.heavy else 1)
        for name in runs:
            found[name] |= pairs(taken[""], taken[name]).to_dict()
        if work.memory:
            peak = peak_cuda if torch.device(s.device).type == "cuda" else peak_cpu
            least = peak(base.call)
            for name, run in runs.items():
                most = peak(run.call)
                found[name] |= {"memory": most / least, "memory_mib": most / 2**20}


def difference(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """The largest difference, and the largest number. Raises ValueError for other shapes."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        raise ValueError(
            f"{[tuple(t.shape) for t in found][:2]} ..., where ours are {[tuple(t.shape) for t in expected][:2]} ..."
        )
    each = [(one.float() - other.float()).abs().max().item() for one, other in zip(found, expected, strict=True)]
    return max(each, default=0.0), max((one.abs().max().item() for one in expected), default=0.0)


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"[:160]


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore")  # of other libraries
    print(json.dumps(measure(settings, sys.argv[2:])))


if __name__ == "__main__":
    main()
