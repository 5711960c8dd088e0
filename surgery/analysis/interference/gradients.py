"""Per-sample gradients of every head's Q, K, V and O on a task, collected once and kept as factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.interference.factors import Block, blocks_of, factors, squared_norms, weight_gradient
from surgery.analysis.interference.store import SUFFIX, Part
from surgery.analysis.journal import digest
from surgery.analysis.metrics import Measured, Metric, as_metric
from surgery.analysis.metrics import loss as next_token_loss
from surgery.errors import SpecError, UnsupportedArchitectureError, describe, listing
from surgery.evaluation import uncached
from surgery.patch import anatomy_of, cuts_of, patched

VERSION = 2
DESCRIPTION = "gradients.json"


class Gradients:
    """The gradients of samples of one task, of each sample's own loss, per block and head.

    task: a name. blocks: what there are gradients of. losses: (sample,) float64. about: what must be the same for two tasks
    to be compared: model, cuts, loss, blocks.
    """

    def __init__(self, task: str, blocks: Sequence[Block], parts: Sequence[Part], about: dict[str, Any]) -> None:
        self.task, self.parts, self.about = task, list(parts), about
        self.blocks = {block.key: block for block in blocks}
        self.losses = torch.tensor([loss for part in parts for loss in part.about["losses"]], dtype=torch.float64)

    def __len__(self) -> int:
        """Samples."""
        return len(self.losses)

    @property
    def hypotheses(self) -> list[tuple[str, str, int]]:
        """(address, block, head) of every part that a number is given of, in the order of the model."""
        return [(block.address, block.name, head) for block in self.blocks.values() for head in range(block.heads)]

    def gradient(self, sample: int, address: str, block: str, head: int) -> Tensor:
        """(d_in, channel) float32 of Q, K, V, (channel, d_model) of O: one sample's gradient of a head's part of a weight.

        For K and V head is a kv head. With biases=True the last row of Q, K and V is the bias's where there is one. Formed
        here alone, for looking: maps never hold it whole.
        """
        found = self._block(address, block)
        for part in self.parts:
            rows = len(part.about["losses"])
            if sample < rows:
                wide, narrow = part.factor(found.key)
                formed = weight_gradient((wide[sample : sample + 1], narrow[sample : sample + 1]), found, head)[0]
                return formed.mT if block == "O" else formed
            sample -= rows
        raise SpecError(describe("gradient", f"no sample {sample}", f"0 to {len(self) - 1}", "Samples count from 0."))

    def norms(self) -> Tensor:
        """(sample,) float64: the L2 norm over all blocks."""
        return sum(self.squared_norms(key) for key in self.blocks).sqrt()  # type: ignore[union-attr]

    def squared_norms(self, key: str) -> Tensor:
        """(sample,) float64: of one block."""
        return torch.tensor([norm for part in self.parts for norm in part.about["squared_norms"][key]], dtype=torch.float64)

    def is_split(self, block: Block) -> bool:
        """Whether the gradients of a block's heads were kept apart by query head."""
        return all(block.split_key in part.names for part in self.parts)

    def factors(self, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(wide, narrow) of a block, by its key or split_key, batch by batch."""
        return (part.factor(key) for part in self.parts)

    def save(self, folder: str | Path) -> None:
        """Writes one safetensors file for each batch, and gradients.json. Raises SpecError for a folder of something else."""
        folder = Path(folder)
        is_split = any(map(self.is_split, self.blocks.values()))
        _claim(folder, self.task, self.about, self.blocks.values(), len(self.parts), is_split)
        for number, part in enumerate(self.parts):
            part.whole().write(_file(folder, number))

    @classmethod
    def load(cls, folder: str | Path, model: Any) -> Gradients:
        """What `save` wrote, or `collect(resume=...)`; the numbers are read when they are needed.

        model: the one that they are of, for the places of its heads. Raises SpecError for another one.
        """
        folder = Path(folder)
        known = _known(folder)
        blocks, _ = blocks_of(list(anatomy_of(model)))
        chosen = [block for block in blocks if block.key in known["blocks"]]
        for what, present in (("model", anatomy_of(model).fingerprint), ("weights", _weights(model))):
            if known["about"][what] != present:
                raise _another(folder, f"{what}: {known['about'][what]}", f"{what}: {present}")
        files = [_file(folder, number) for number in range(known["batches"])]
        if missing := [file for file in files if not file.exists()]:
            found = f"{len(files) - len(missing)} of {known['batches']} batches"
            do = "Let collect(resume=...) go on with it."
            raise SpecError(describe(f"{str(folder)!r}", found, "all of them", do))
        return cls(known["task"], chosen, [Part.read(file) for file in files], known["about"])

    def _block(self, address: str, block: str) -> Block:
        key = f"{address}.{block}"
        if key not in self.blocks:
            raise SpecError(describe("block", repr(key), ", ".join(list(self.blocks)[:8]), "Name one that was collected."))
        return self.blocks[key]

    def __repr__(self) -> str:
        kept = "on disk" if self.parts and self.parts[0].path is not None else "in memory"
        heads = len(self.hypotheses)
        return f"Gradients of {self.task!r}: {len(self)} samples, {heads} parts of heads in {len(self.blocks)} blocks, {kept}"


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
    layers: numbers or addresses. biases: those of Q, K and V count as weights of an input that is 1, one more row of each
      head's gradient (that of O belongs to no head).
    query_heads: where query heads share heads of k and v, keep apart what comes through each of them, for
      `heatmap(query_heads=True)`: so many more gradients at k and v, and a backward of each attention for each.
    resume: a folder for the factors, where an interrupted collection goes on; else they are
      kept in memory: 4 bytes × samples × positions × about 6 d_model for each layer (2 for half precision).
    Raises SpecError (mode, data, samples without a loss or with one that is not finite), UnsupportedArchitectureError where a
    projection cannot be derived.
    """
    metric, given = as_metric(loss or next_token_loss()), batches(model, data)
    _refuse(model)
    anatomy = anatomy_of(model)
    blocks, missing = blocks_of(anatomy.select(layers, "collect"))
    if missing:
        raise UnsupportedArchitectureError(listing("collect", missing))
    spec, kernel = cuts_of(model)
    about: dict[str, Any] = {"model": anatomy.fingerprint, "weights": _weights(model)}
    about |= {"cuts": spec.fingerprint(), "loss": metric.name, "biases": biases}
    folder = None if resume is None else Path(resume)
    done: dict[int, Part] = {}
    if folder is not None:
        done = _claim(folder, task, about, blocks, len(given), query_heads)
    parts = []
    with patched(model, spec, kernel=kernel), tqdm(total=len(given), desc=f"gradients of {task}", disable=not progress) as bar:
        for number, batch in enumerate(given):
            data = digest(sorted(batch.items()))
            part = done.get(number)
            if part is not None and part.about["data"] != data:
                raise _another(folder, f"other data in batch {number}", "the data that were collected there")
            if part is None:
                part = _collected(model, batch, blocks, metric, data, biases=biases, query_heads=query_heads)
                if folder is not None:
                    part.write(_file(folder, number))
            parts.append(part)
            bar.update()
    return Gradients(task, blocks, parts, about)


def _collected(model: Any, batch: Batch, blocks: Sequence[Block], metric: Metric, data: str, **options: bool) -> Part:
    rows = rows_of(batch)
    found, losses = factors(model, blocks, rows, _losses(model, batch, metric, rows), **options)
    by_block = {block.key: squared_norms(found[block.key]) for block in blocks}
    norms = torch.stack(list(by_block.values())).sum(0)
    wrong = [str(n) for n in range(rows) if not (losses[n].isfinite() and norms[n].isfinite() and norms[n] > 0)]
    if wrong:
        what = f"samples {', '.join(wrong)} of a batch of {rows}"
        expected = "a finite loss and a gradient in each"
        do = "Leave samples without tokens that count out (labels of -100, padding)."
        raise SpecError(describe(f"collect: {what}", "no loss, or a gradient that is zero or not finite", expected, do))
    kept = {key: squares.tolist() for key, squares in by_block.items()}
    return Part.of(found, {"losses": losses.double().tolist(), "data": data, "squared_norms": kept})


def _losses(model: Any, batch: Batch, metric: Metric, rows: int) -> Callable[[], Tensor]:
    """A forward that gives (sample,) losses with their gradient."""

    def run() -> Tensor:
        output = model(**uncached(model, batch))
        logits = getattr(output, "logits", None)
        found = metric.raw(Measured(model, batch, output, logits if isinstance(logits, Tensor) else None, None))
        if len(found) != rows:
            expected = f"one for each of {rows} samples"
            raise SpecError(describe(f"loss {metric.name!r}", "one number for all", expected, "Do not reduce over samples."))
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
    if problems:
        raise SpecError(listing("collect", problems))


def _weights(model: Any) -> str:
    """A hash: gradients of other weights are those of another model."""
    return digest(model.state_dict().items())


def _claim(folder: Path, task: str, about: dict[str, Any], blocks: Any, number: int, query_heads: bool) -> dict[int, Part]:
    """Makes a folder one of so many batches of these gradients, or finds what it has of them. Raises SpecError."""
    content: dict[str, Any] = {"version": VERSION, "task": task, "about": about, "query_heads": query_heads}
    content["blocks"] = [block.key for block in blocks]
    path = folder / DESCRIPTION
    done = {}
    if path.exists():
        known = _known(folder)
        old, new = ({**c, **c["about"], "about": None} for c in (known, content))
        if keys := [key for key in new if old.get(key) != new[key]]:
            raise _another(folder, *("; ".join(f"{key}: {c.get(key)!r}" for key in keys) for c in (old, new)))
        done = {n: Part.read(_file(folder, n)) for n in range(number) if _file(folder, n).exists()}
    elif folder.exists() and any(folder.iterdir()):
        raise _another(folder, "a folder with other files", "an empty one, or one that was collected into")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "batches": number}, indent=1) + "\n", encoding="utf-8")
    return done


def _known(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if known["version"] != VERSION or not {"task", "about", "blocks", "batches"} <= set(known):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        found = f"no {DESCRIPTION} that can be read"
        raise _another(folder, found, "a folder that gradients were collected into") from None
    return known


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05}{SUFFIX}"


def _another(folder: Any, found: str, expected: str) -> SpecError:
    return SpecError(describe(f"{str(folder)!r}", found, expected, "Name another folder, or remove this one."))
