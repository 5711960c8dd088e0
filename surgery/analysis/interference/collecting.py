"""Collecting per-sample gradients on a task, batch by batch, so that a collection that was stopped goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from surgery.analysis.agreement import in_step
from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.interference.factors import Block, blocks_of, factors, squared_norms
from surgery.analysis.interference.folder import Folder
from surgery.analysis.interference.gradients import Gradients
from surgery.analysis.interference.identity import data_of, loss_of, samples_of
from surgery.analysis.interference.store import Part
from surgery.analysis.journal import LENGTH, digest, weights_of
from surgery.analysis.kept import Kept
from surgery.analysis.metrics import Measured, Metric, as_metric
from surgery.analysis.metrics import loss as next_token_loss
from surgery.analysis.workers import workers_of
from surgery.errors import SpecError, UnsupportedArchitectureError, describe, listing
from surgery.evaluation import keeping_state, uncached
from surgery.fields import listed
from surgery.patch import anatomy_of, cuts_of, patched
from surgery.shares import require_whole


@in_step
def collect(
    model: Any,
    data: Any,
    loss: Any = None,
    task: str = "task",
    *,
    layers: Any = "all",
    biases: bool = False,
    query_heads: bool = False,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Gradients:
    """The gradients of each sample's own loss, for every head's part of Q, K, V and O.

    model: in evaluation mode and without gradient checkpointing; patched or not: cuts count. Parameters, their `.grad` and
      `requires_grad` stay as they are; frozen and quantised weights have gradients, too (of an adapted projection: that of
      the sum of weight and adapter).
    data: batches as elsewhere; every row is a sample. loss: a Metric, or a callable of the output that gives one number for
      each row; by default the mean cross entropy of a sample's tokens (`metrics.loss`).
    layers: numbers or addresses. biases: those of the projections to Q, K and V count as weights of an input that is 1, one
      more row of each head's gradient (that of O belongs to no head).
    query_heads: where query heads share heads of k and v, keep apart what comes through each of them, for
      `heatmap(query_heads=True)`: so many more gradients at k and v, and a backward of each attention for each.
    Over several processes (`surgery.analysis.workers`) batches are divided, and each process gets the gradients of all: to keep
      them once, name a folder that all processes see.
    resume: a folder for the factors, where an interrupted collection goes on; else they are
      kept in memory: 4 bytes × samples × positions × about 6 d_model for each layer (2 for half precision).
    In the first batch, samples are checked to be computed each by itself. Raises SpecError (mode, data, samples without a loss
    or with one that is not finite, a folder of something else), SurgeryError (samples that are mixed, projections that are
    called in a way that has no samples), UnsupportedArchitectureError where a projection cannot be derived.
    """
    metric, given = as_metric(loss or next_token_loss()), batches(model, data)
    _refuse(model)
    anatomy = anatomy_of(model)
    attentions = anatomy.select(layers if isinstance(layers, str) and layers == "all" else listed(layers), "collect")
    blocks, missing = blocks_of(attentions)
    require_whole(model, attentions, "collect", "Load it without tensor parallelism for this.")
    if missing:
        raise UnsupportedArchitectureError(listing("collect", missing))
    spec, kernel = cuts_of(model)
    about: dict[str, Any] = {"model": anatomy.fingerprint, "weights": weights_of(model)}
    about |= {"cuts": spec.fingerprint(), "loss": loss_of(metric), "biases": biases}
    is_split = query_heads and any(block.group > 1 for block in blocks)
    content = {"task": task, "about": about, "blocks": [block.key for block in blocks], "query_heads": is_split}
    contents = [data_of(batch) for batch in given]
    workers = workers_of(model)
    workers.agree("collect", digest([("", content), ("", contents)])[:LENGTH])
    folder, done = None, {}
    if resume is not None:
        folder = Folder(resume)
        done = workers.once(lambda: folder.claim(content, contents))
    pending = [number for number in range(len(given)) if number not in done]
    is_checked = False

    def part_of(number: int) -> Part:
        nonlocal is_checked
        checks = not is_checked and rows_of(given[number]) > 1
        options = {"biases": biases, "query_heads": is_split, "checks": checks}
        part = _collected(model, given[number], contents[number], blocks, metric, **options)
        is_checked = is_checked or checks
        bar.update()
        if folder is None:
            return part
        file = folder.file(number)
        return part.written(file) if workers.is_divided else workers.once(lambda: part.written(file))

    is_shown = progress and workers.is_main
    with (
        keeping_state(model),
        patched(model, spec, kernel=kernel),
        tqdm(total=len(given), initial=len(done), desc=f"gradients of {task}", disable=not is_shown) as bar,
    ):
        done |= dict(zip(pending, workers.each(pending, part_of), strict=True))
        bar.update(len(given) - bar.n)  # what other processes did
    parts = [done[number] for number in range(len(given))]
    if unseen := [str(part.path) for part in parts if part.path is not None and not part.path.exists()]:
        do = "Name a folder that all processes share, or leave `resume` out."
        raise SpecError(describe(f"collect, process {workers.number}", f"no file {unseen[0]}", "what another one wrote", do))
    return Gradients(task, blocks, parts, about)


def _collected(model: Any, batch: Batch, data_hash: str, blocks: Sequence[Block], metric: Metric, **options: bool) -> Part:
    rows = rows_of(batch)
    found, losses = factors(model, blocks, rows, _losses(model, batch, metric, rows), **options)
    losses = losses.cpu()  # layers may be on several devices
    by_block = {block.key: squared_norms(found[block.key]).cpu() for block in blocks}
    norms = torch.stack(list(by_block.values())).sum(0)
    wrongs = (
        (~(losses.isfinite() & norms.isfinite()), "numbers that are not finite", "Check the model's weights, and the labels."),
        (norms == 0, "no gradient", "Leave samples without tokens that count out (labels of -100, padding)."),
    )
    for numbers, what, do in wrongs:
        if wrong := numbers.nonzero().flatten().tolist():
            where = f"collect: samples {', '.join(map(str, wrong))} of a batch of {rows}"
            raise SpecError(describe(where, what, "a finite loss and a gradient in each", do))
    kept = {key: squares.tolist() for key, squares in by_block.items()}
    about = {"losses": losses.double().tolist(), "data": data_hash, "rows": samples_of(batch), "squared_norms": kept}
    return Part.of(found, about)


def _losses(model: Any, batch: Batch, metric: Metric, rows: int) -> Callable[[], Tensor]:
    """A forward that gives (sample,) losses with their gradient."""

    def run() -> Tensor:
        kept = Kept(model, batch, metric.positions)
        output = model(**uncached(model, batch), **kept.more)
        found = metric.raw(Measured(model, batch, output, kept.logits(output), None))
        expected = f"one with a gradient for each of {rows} samples"
        if len(found) != rows:
            what = "one number for all" if len(found) == 1 else f"{len(found)} numbers"
            raise SpecError(describe(f"loss {metric.name!r}", what, expected, "Do not reduce over samples."))
        if not found.requires_grad:
            do = "Return a tensor that is made of the output by what has a gradient, outside torch.inference_mode."
            raise SpecError(describe(f"loss {metric.name!r}", "numbers without a gradient", expected, do))
        return found

    return run


def _refuse(model: Any) -> None:
    """Raises SpecError, listing all, for a model whose gradients would not be those of its weights."""
    problems = []
    if training := [name or "the model" for name, module in model.named_modules() if module.training]:
        found = f"training mode ({training[0]}{f' and {len(training) - 1} more' if len(training) > 1 else ''})"
        problems.append(describe("model", found, "evaluation mode: samples would meet random dropout", "Call model.eval()."))
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        do = "Call model.gradient_checkpointing_disable()."
        problems.append(describe("model", "gradient checkpointing, which runs forwards twice", "none", do))
    if torch.is_inference_mode_enabled():
        do = "Leave the block; torch.no_grad is allowed."
        problems.append(describe("collect", "torch.inference_mode", "a mode in which there are gradients", do))
    if problems:
        raise SpecError(listing("collect", problems))
