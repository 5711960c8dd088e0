"""What studies find whose work is divided: `torchrun ... tests/divided_worker.py FOLDER KILL`, or in one process.

Each process writes what it found into FOLDER, "<count>.<number>.pkl". KILL: "number:metrics:batches" ends a process after it
has measured so many cuts in a study that goes on, or collected so many batches; "" lets all work be done.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES

from surgery import Freeze, Spec, SurgeryError
from surgery.analysis import (
    Sweep,
    ablation_study,
    activation_patching,
    cumulative_ablation,
    head_importance,
    metrics,
    path_patching,
)
from surgery.analysis import sweep as sweeping
from surgery.analysis.interference import Gradients, collect, collecting
from surgery.analysis.journal import Journal
from surgery.analysis.workers import alone, processes, workers_of
from surgery.reference import Entry, Reference

BATCHES = [torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
CLEAN, CORRUPTED = BATCHES[0], BATCHES[1]
QUIET: dict[str, Any] = {"progress": False}


class Ending:
    """Ends its process without a word once it was asked so often."""

    def __init__(self, after: int | None) -> None:
        self.after, self.count = after, 0

    def __call__(self) -> None:
        self.count += 1
        if self.after is not None and self.count > self.after:
            os._exit(9)


def resumed(model: Any, folder: Path, kill: tuple[int, int, int] | None, number: int) -> dict[str, Any]:
    """A study and a collection that go on where they were; how much this process did of each."""
    is_victim = kill is not None and number == kill[0]
    cuts, batches = (Ending(kill[n] if kill is not None and is_victim else None) for n in (1, 2))

    def loss(output: Any) -> Any:
        cuts()
        return output.logits[:, -1, 3]

    collected = collecting._collected

    def counting(*args: Any, **options: Any) -> Any:
        batches()
        return collected(*args, **options)

    collecting._collected = counting
    try:
        gradients = collect(model, BATCHES, resume=folder / "gradients", **QUIET)
    finally:
        collecting._collected = collected
    study = ablation_study(model, BATCHES[:2], metrics=[loss], fast=False, resume=folder / "study.jsonl", **QUIET)
    return {
        "study": study.examples,
        "frame": study.frame,
        "gradients": norms(gradients),
        "cuts": cuts.count,
        "batches": batches.count,
    }


def norms(gradients: Gradients) -> list[torch.Tensor]:
    return [tensor for key in gradients.blocks for pair in gradients.factors(key) for tensor in pair]


def work(model: Any) -> dict[str, Any]:
    """By name, what each kind of work gives."""
    study = ablation_study(model, BATCHES[:2], metrics=["loss", "kl"], **QUIET)
    found: dict[str, Any] = {"study": study.examples, "notes": study.notes, "frame": study.frame}
    found["growing"] = cumulative_ablation(model, CLEAN, [(1, 3), (0, 1), (0, 2)], **QUIET).examples
    for method in ("atp", "ig", "ablation"):
        importance = head_importance(model, CLEAN, CORRUPTED, method=method, verify_top=4, sample=3)
        found[f"importance {method}"] = importance.frame
        found[f"importance {method}, cost"] = importance.forwards
    patching = activation_patching(model, CLEAN, CORRUPTED, over=("layer", "head"), sites=["z", "pattern"], **QUIET)
    found["patching"] = [patching.examples[key].values for key in patching.keys] + [patching.forwards]
    ends: dict[str, Any] = {"senders": "all", "receivers": ["logits", (1, 2, "q"), (1, 0, "v")]}
    paths = path_patching(model, CLEAN, CORRUPTED, **ends, **QUIET)
    found["paths"] = [paths.examples[key].values for key in paths.keys] + [paths.forwards]
    found["paths, notes"] = paths.notes
    found["paths, slow"] = _slow_paths(model, ends)
    gradients = collect(model, BATCHES, **QUIET)
    found["gradients"], found["losses"] = norms(gradients), gradients.losses
    found["few batches"] = norms(collect(model, BATCHES[:1], **QUIET))
    found["one cut"] = ablation_study(model, CLEAN, "qk", [0], [1], **QUIET).examples
    specs = [Spec(Freeze("ov", [layer], [head])) for layer in range(2) for head in range(4)]
    called: list[int] = []

    def read(number: int, output: Any) -> torch.Tensor:
        called.append(number)
        return output.logits

    sweep = Sweep(model, {"input_ids": CLEAN}, workers=workers_of(model))
    found["sweep"], found["called"] = sweep.run(specs, read), sorted(called)
    return found


def _slow_paths(model: Any, ends: dict[str, Any]) -> list[Any]:
    """Notes and cost of path patching where no short cut is trusted."""
    trusted = sweeping.difference
    sweeping.difference = lambda *args, **more: "made up"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paths = path_patching(model, CLEAN, CORRUPTED, **ends, **QUIET)
    finally:
        sweeping.difference = trusted
    return [paths.notes, paths.forwards]


def refused(model: Any, number: int) -> dict[str, str]:
    """What is no common work. Each is refused in every process, which are then in step for the next."""
    found = {}

    def refuse(what: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except (SurgeryError, ValueError) as error:
            found[what] = f"{type(error).__name__}: {error}"

    own = torch.full_like(CLEAN, number + 1)
    refuse("data", lambda: ablation_study(model, own, **QUIET))
    refuse("batches", lambda: collect(model, BATCHES[: number + 1], **QUIET))
    torch.manual_seed(number)
    other = type(model)(model.config).eval()
    with torch.no_grad():
        other.lm_head.weight.mul_(number + 1)
    refuse("model", lambda: ablation_study(other, CLEAN, **QUIET))
    # Each of these was merged into wrong numbers, or ended with a connection that was closed.
    few: dict[str, Any] = {"layers": [0], "circuits": "ov", **QUIET}
    generator = (batch for batch in BATCHES[: number + 1])
    refuse("heads", lambda: ablation_study(model, CLEAN, heads=[number], **few))
    refuse("seeds", lambda: ablation_study(model, CLEAN, to="noise", seeds=(number,), **few))
    refuse("metrics", lambda: ablation_study(model, CLEAN, metrics=[["loss", "kl"][number > 0]], **few))
    refuse("batches of a study", lambda: ablation_study(model, generator, **few))
    one = metrics.logit_difference(5, 7 + number)
    refuse("metric of the same name", lambda: ablation_study(model, CLEAN, metrics=[one], **few))
    refuse("resume", lambda: ablation_study(model, CLEAN, resume=None if number else "study.jsonl", **few))
    refuse("sites", lambda: activation_patching(model, CLEAN, CORRUPTED, sites=[["z", "pattern"][number > 0]], **QUIET))
    reference = Reference("mean", {("self.0", "z"): Entry(torch.full((4, 8), 1.0 + number))})
    refuse("reference", lambda: activation_patching(model, CLEAN, to=reference, layers=[0], **QUIET))
    corrupted: dict[str, Callable[..., Any]] = {
        "activation_patching": functools.partial(activation_patching, **QUIET),
        "path_patching": functools.partial(path_patching, **QUIET),
        "head_importance": functools.partial(head_importance, method="ablation"),
    }
    for name, study in corrupted.items():
        refuse(f"corrupted of {name}", functools.partial(study, model, CLEAN, BATCHES[1 + number]))
    sweep = Sweep(model, {"input_ids": CLEAN}, workers=workers_of(model))
    refuse("specs", lambda: sweep.run([Spec(Freeze("ov", [0], [number]))], lambda _, output: output.logits))
    refuse("paths", lambda: Journal(f"{number}.jsonl", {}, workers_of(model)))
    refuse("order", lambda: workers_of(model).agree(f"{number}", 0))
    for what, limit in (("failure", 2), ("failure without cuts", 0)):
        refuse(what, lambda limit=limit: ablation_study(model, CLEAN, metrics=[Broken(number == 1, limit)], **QUIET))
    refuse("failure before", lambda: ablation_study(model, CLEAN, metrics=[], **QUIET))
    refuse("nothing", lambda: ablation_study(model, CLEAN, metrics=[Broken(False, 0)], **QUIET))
    with alone():
        study = ablation_study(model, own, "ov", **QUIET)
        found["alone"] = str(len(study.cuts)) if number else "not called"
    return found


class Broken:
    """A metric that one process cannot read any more after so many times."""

    def __init__(self, breaks: bool, limit: int) -> None:
        self.breaks, self.limit, self.count = breaks, limit, 0

    def __call__(self, output: Any) -> Any:
        self.count += 1
        if self.breaks and self.count > self.limit:
            raise ValueError("no more")
        return output.logits[:, -1, 3]


def main() -> None:
    folder, kill = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    model = FAMILIES["llama"].build()
    workers = workers_of(model)
    victim = tuple(map(int, kill.split(":"))) if kill else None
    found = {"resumed": resumed(model, folder, victim, workers.number)}  # type: ignore[arg-type]
    found["work"] = work(model)
    if workers.count > 1:
        found["refused"] = refused(model, workers.number)
    with (folder / f"{processes()}.{workers.number}.pkl").open("wb") as file:
        pickle.dump(found, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
