"""One process of a comparison: `python -m benchmarks.comparison.worker SETTINGS WAY [WAY ...]` prints its findings as JSON.

SETTINGS is JSON of `task.Settings`. The unpatched model and this library run in every process, whatever others do, so that
each is compared with what ran moments before on the same weights. Nothing is timed that gives other numbers than ours.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
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
from benchmarks.comparison.works import WORKS, Run, Work, chosen
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
PART = 0.1
"""Of what a cut changes: a way that differs from ours by no less may have cut something else, or nothing."""
SHORT = 5.0
"""Seconds: heavy work that takes less is called once more before it is timed."""
MEMORY_LAYERS = 2
"""Layers of the models whose peaks of memory are measured, in all lengths: those with fewer layers hold less."""


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
    rows: list[dict[str, Any]] = []
    for work in chosen(settings):
        try:
            found = cells(work, task, ways, notes)
        except torch.OutOfMemoryError:
            note = "not compared: this library, or the unpatched model, runs out of memory"
            found = {name: {"note": notes.get(name, note)} for name in (*ways, *notes)}
        rows += [{"work": work.name, "way": name, **cell} for name, cell in found.items()]
    add_memory(settings, rows)
    return {"rows": rows, "versions": versions, "with": {name: version(name) for name in ("torch", "transformers")}}


def cells(work: Work, task: Task, ways: Mapping[str, Way], notes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of one work, by way. Raises torch.OutOfMemoryError where there is nothing to compare with."""
    s = task.settings
    found: dict[str, dict[str, Any]] = {name: {"note": note} for name, note in notes.items()}
    available = available_bytes(s.device)
    fitting: dict[str, Way] = {}
    for name, way in ways.items():
        size = task.model.dtype.itemsize * s.batch * s.length * held(work, way, s)
        if 5 * size > available:  # held by one way after another, by the check beside ours, and inside of an eager layer
            found[name] = {"note": f"needs {size / 2**30:.1f} GiB for what is captured"}
        else:
            fitting[name] = way
    if Auto.name not in fitting:
        return found
    runs: dict[str, Run] = {}
    slowest = 0.0
    uncut = _uncut(work, task, ways) if work.cuts else None
    with torch.no_grad(), ExitStack() as stack:
        expected: list[Tensor] = []
        effect: float | None = None
        for name in sorted(fitting, key=lambda name: name != Auto.name):
            print(f"{s.name}: {work.words}: {name}", file=sys.stderr, flush=True)
            try:
                run = work.start(ways[name], task, stack)
                start = time.perf_counter()
                result = run.call()
                slowest = max(slowest, time.perf_counter() - start)
                given = run.read(result)
                del result
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
            if name == Auto.name and uncut is not None:
                effect = _effect(work, given, uncut)
            found[name] = {"difference": gap, "largest": largest}
            if (note := disagreement(given, expected, effect, CLOSE[ways[name].model.dtype])) is None:
                runs[name] = run
            else:
                found[name]["note"] = note
            del given
        expected.clear()
        _time(work, task, ways, runs, found, warmup=int(not work.heavy or slowest < SHORT))
    return found


def held(work: Work, way: Way, s: Settings) -> float:
    """Numbers that are held at a time for each of batch × length: an eager layer has the patterns of all its heads."""
    least = work.held(s)
    return min(max(least, s.heads * s.layers * s.length), least + way.whole_layers * s.heads * s.length) if least else 0


def _uncut(work: Work, task: Task, ways: Mapping[str, Way]) -> list[Tensor]:
    """What the unpatched model gives where there is a cut."""
    with torch.no_grad(), ExitStack() as stack:
        run = _named(work.over).start(ways[Sdpa.name], task, stack)
        return work.uncut(run.read(run.call()), task)


def _effect(work: Work, given: list[Tensor], uncut: list[Tensor]) -> float:
    """The largest change by a cut. Raises RuntimeError for one that agreement says nothing of."""
    effect, largest = difference(given, uncut)
    if not effect > (0 if are_tokens(uncut) else LIVE * largest):
        raise RuntimeError(
            f"{work.words}: changes nothing that is compared ({effect:.2g}, of at most {largest:.2g}), so that "
            "agreement would say nothing; take another --seed, or the cut of this library is broken"
        )
    return effect


def _named(name: str) -> Work:
    return next(work for work in WORKS if work.name == name)


def _time(
    work: Work,
    task: Task,
    ways: Mapping[str, Way],
    runs: dict[str, Run],
    found: dict[str, dict[str, Any]],
    warmup: int,
) -> None:
    """Adds ratios of time to the cells of what agrees with ours."""
    s = task.settings
    with ExitStack() as stack:
        base = _named(work.over).start(ways[Sdpa.name], task, stack)
        functions = {"": base.call, **{name: run.call for name, run in runs.items()}}
        rounds = s.heavy if work.heavy else s.rounds
        taken = take_turns(functions, rounds=rounds, seed=s.seed, device=s.device, warmup=warmup)
        for name in runs:
            found[name] |= pairs(taken[""], taken[name]).to_dict()


def add_memory(settings: Settings, rows: list[dict[str, Any]]) -> None:
    """Adds the peak of memory, in models of MEMORY_LAYERS layers, to the rows of what was timed."""
    task = Task(replace(settings, layers=MEMORY_LAYERS))
    peak = peak_cuda if torch.device(settings.device).type == "cuda" else peak_cpu
    ways: dict[str, Way] = {}
    for work in (work for work in chosen(settings) if work.memory):
        with torch.no_grad():
            least = 0
            timed = [row for row in rows if row["work"] == work.name and "value" in row]
            for name, row in [(Sdpa.name, None), *((row["way"], row) for row in timed)]:
                if row is not None and not least:
                    break
                print(f"{settings.name}: memory: {work.words}: {name}", file=sys.stderr, flush=True)
                try:
                    with ExitStack() as stack:
                        way = ways.get(name) or ways.setdefault(name, WAYS[name](task))
                        run = (_named(work.over) if row is None else work).start(way, task, stack)
                        run.call()
                        most = peak(run.call)
                except Exception as error:  # other libraries raise what they like
                    if name in ALWAYS and not isinstance(error, torch.OutOfMemoryError):
                        raise
                    if row is not None:
                        row["note"] = f"memory is not measured: {in_a_line(error)}"
                    continue
                if row is None:
                    least = most
                else:
                    row |= {"memory": most / least, "memory_mib": most / 2**20, "memory_layers": MEMORY_LAYERS}


def disagreement(given: list[Tensor], expected: list[Tensor], effect: float | None, close: float) -> str | None:
    """What differs, in a few words, or None. Tokens agree or do not; other numbers do within `close` of the largest.

    And within PART of the `effect` of a cut, or what cuts nothing would agree where half precision rounds more than that.
    """
    gap, largest = difference(given, expected)
    if are_tokens(expected):
        wrong = sum(int((one != other).sum()) for one, other in zip(given, expected, strict=True))
        if are_tokens(given) and not wrong:
            return None
        return f"differs from ours in {wrong} of {sum(one.numel() for one in expected)} tokens"
    if not gap <= close * largest:
        return f"differs from ours by {gap:.2g}, of at most {largest:.2g}"
    if effect is not None and not gap < PART * effect:
        half = " (half precision cannot tell)" if close > CLOSE[torch.float32] else ""
        return f"differs from ours by {gap:.2g}, where the cut changes {effect:.2g}{half}"
    return None


def are_tokens(tensors: list[Tensor]) -> bool:
    return bool(tensors) and not any(tensor.is_floating_point() for tensor in tensors)


def difference(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """The largest difference, and the largest number. Raises ValueError for other shapes."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        raise ValueError(
            f"{[tuple(t.shape) for t in found][:2]} ..., where ours are {[tuple(t.shape) for t in expected][:2]} ..."
        )
    each = [(one.float() - other.float()).abs().max().item() for one, other in zip(found, expected, strict=True)]
    # A tensor's maximum is nan where there is one; Python's may not be.
    return torch.tensor(each or [0.0]).max().item(), max((one.float().abs().max().item() for one in expected), default=0.0)


def in_a_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
    return textwrap.shorten(text, 160, placeholder=" ...")


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore")  # of other libraries
    print(json.dumps(measure(settings, sys.argv[2:])))


if __name__ == "__main__":
    main()
