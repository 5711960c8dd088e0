"""What studies find whose work is divided: `torchrun ... tests/divided_worker.py FOLDER KILL`, or in one process.

Each process writes what it found into FOLDER, "<count>.<number>.pkl". KILL: "number:metrics:batches" ends a process after it
has measured so many cuts in a study that goes on, or collected so many batches; "" lets all work be done.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
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
    path_patching,
)
from surgery.analysis.interference import Gradients, collect, collecting
from surgery.analysis.workers import alone, processes, workers_of

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
    found["paths"] = [paths.examples[key].values for key in paths.keys]
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


def refused(model: Any, number: int) -> dict[str, str]:
    """What is no common work."""
    found = {}
    own = torch.full_like(CLEAN, number + 1)
    for what, data in (("data", own), ("batches", BATCHES[: number + 1])):
        try:
            ablation_study(model, data, **QUIET) if what == "data" else collect(model, data, **QUIET)
        except SurgeryError as error:
            found[what] = str(error)
    torch.manual_seed(number)
    other = type(model)(model.config).eval()
    with torch.no_grad():
        other.lm_head.weight.mul_(number + 1)
    try:
        ablation_study(other, CLEAN, **QUIET)
    except SurgeryError as error:
        found["model"] = str(error)

    def broken(output: Any) -> Any:
        broken.count += 1  # type: ignore[attr-defined]
        if number == 1 and broken.count > 2:  # type: ignore[attr-defined]
            raise ValueError("no more")
        return output.logits[:, -1, 3]

    broken.count = 0  # type: ignore[attr-defined]
    try:
        ablation_study(model, CLEAN, metrics=[broken], **QUIET)
    except (SurgeryError, ValueError) as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    with alone():
        study = ablation_study(model, own, "ov", **QUIET)
        found["alone"] = str(len(study.cuts)) if number else "not called"
    return found


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
