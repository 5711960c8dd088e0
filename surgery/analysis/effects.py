"""What a spec does to a model's output: how far logits move, in nats, in answers that change, and at which positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.forwards import forward
from surgery.analysis.metrics import divergence
from surgery.analysis.tables import as_html
from surgery.analysis.targets import present, targets
from surgery.errors import SpecError, closest, describe
from surgery.evaluation import evaluating
from surgery.patch import as_spec, cuts_of, patched
from surgery.plots import measures_by_position
from surgery.plots.style import in_words
from surgery.spec import Spec
from surgery.terminal import printed, table_of

MEASURES = {
    "largest": "largest absolute change",
    "mean": "mean absolute change",
    "kl": "KL(uncut || cut)",
    "agreement": "top-1 agreement",
    "loss": "loss change",
}
"""What is measured, in words; of an output without a distribution over tokens or classes the first two."""


@dataclass(frozen=True, eq=False)
class Effect:
    """What `verify_effect` found. `print` shows a table; the data:

    arrays: measure to (example, position) in float64. "largest" and "mean": of |cut - uncut| over the entries at a position;
      "kl": KL(uncut || cut) in nats; "agreement": 1 where the same token has the largest logit, else 0; "loss": nats, cut -
      uncut, at the position whose logits predict the token, with "loss_before" and "loss_after". NaN at padding (but for
      the loss of labels that count there), where no token is predicted, and behind the end of a shorter batch; infinite where a
      cut makes NaN of a number. One position where the output has none (a class for each example).
    output: the name of what was compared: "logits", or the model's main output if it gives none (then without kl, agreement
      and loss). positions: whether the second axis of the arrays counts positions. notes: what was left out, and why.
    """

    spec: Spec
    output: str
    arrays: dict[str, np.ndarray]
    positions: bool = True
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> float:
        """The largest absolute change of any entry."""
        return float(np.nanmax(self.arrays["largest"]))

    @property
    def mean(self) -> float:
        """The mean absolute change."""
        return self._mean("mean")

    @property
    def kl(self) -> float:
        """Nats; NaN where the output is no distribution."""
        return self._mean("kl")

    @property
    def agreement(self) -> float:
        """The share of positions where the largest logit is still that of the same token, from 0 to 1."""
        return self._mean("agreement")

    @property
    def loss_change(self) -> float:
        """Nats per token, positive where the cut does harm; NaN where no loss is defined."""
        return self._mean("loss")

    def totals(self) -> dict[str, float]:
        """The measures over everything: a maximum for "largest", else the mean over examples of each example's mean."""
        return {name: self.largest if name == "largest" else self._mean(name) for name in MEASURES if name in self.arrays}

    def by_example(self) -> pd.DataFrame:
        """A row for each example: its largest change, and its means over positions."""
        return self._frame(1, "example")

    def by_position(self) -> pd.DataFrame:
        """A row for each position, over the examples that have one there; counted in "examples"."""
        frame = self._frame(0, "position")
        frame.insert(1, "examples", (~np.isnan(self.arrays["largest"])).sum(0))
        return frame[frame.examples > 0].reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """A row for each example and position that is no padding."""
        present = np.argwhere(~np.isnan(self.arrays["largest"]))
        columns = {name: values[tuple(present.T)] for name, values in self.arrays.items()}
        return pd.DataFrame({"example": present[:, 0], "position": present[:, 1], **columns})

    def table(self) -> Table:
        """The totals as a rich table, beside the example where each is worst."""
        title = f"{len(self.arrays['largest'])} examples"
        frame, rows = self.by_example(), []
        for name, value in self.totals().items():
            worst = frame[name].min() if name == "agreement" else frame[name].max()
            rows.append((MEASURES[name], f"{value:.4g}", f"{worst:.4g}", self._unit(name)))
        names = (f"of {self.output}", "all", "worst example", "unit")
        return table_of(names, rows, title, names[1:3])

    def picture(self) -> Figure:
        """Each measure by position: the mean over examples, and the range that they lie in.

        Raises SpecError for an output without positions.
        """
        if not self.positions:
            do = "Print the effect, or look at by_example()."
            raise SpecError(describe("picture", f"an output ({self.output}) without positions", "one that has them", do))
        known = {MEASURES[n]: self.arrays[n] for n in MEASURES if n in self.arrays and not np.isnan(self.arrays[n]).all()}
        units = {MEASURES[n]: self._unit(n).replace(" of positions", "").replace(" per token", "") for n in MEASURES}
        return measures_by_position(known, units, {MEASURES["agreement"]: 1.0}, in_words(self.spec) or "no cuts")

    figure = picture

    def __str__(self) -> str:
        return printed(f"{self.spec}" if len(self.spec) else "no cuts", self.table(), *self.notes)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        totals = pd.DataFrame([(MEASURES[n], v, self._unit(n)) for n, v in self.totals().items()], columns=["", "all", "unit"])
        return as_html(totals) + as_html(self.by_position(), max_rows=12)

    def _mean(self, name: str) -> float:
        if name not in self.arrays:
            return float("nan")
        return float(_nanmean(_nanmean(self.arrays[name], 1), 0))

    def _frame(self, axis: int, label: str) -> pd.DataFrame:
        columns = {name: (_nanmax if name == "largest" else _nanmean)(values, axis) for name, values in self.arrays.items()}
        return pd.DataFrame({label: np.arange(len(columns["largest"])), **columns})

    def _unit(self, name: str) -> str:
        own = "logits" if self.output == "logits" else "as the output"
        units = {"kl": "nats", "agreement": "share of positions" if self.positions else "share of examples"}
        return {**units, "loss": "nats per token" if self.positions else "nats"}.get(name, own)


def verify_effect(model: Any, spec: Any, inputs: Any, output: str | None = None) -> Effect:
    """Runs the model with the spec's cuts and no others beside the model without cuts, and measures what changes.

    model: patched or not; it is left as it was. It runs in evaluation mode, in the kernel that it was patched with, without a
    KV cache and with the same random numbers twice. spec: a Spec, one or several cuts. inputs: see
    `surgery.analysis.batches.batches`; each row is an example. Padding (attention_mask 0) is left out. output: the name of what
    to compare; by default the logits, or what the model gives first if it gives none.
    A loss is that of `surgery.analysis.metrics.loss`: of labels among the inputs, or of the next of the model's own tokens.
    Raises what `patch_model` raises, and SpecError for a model that gives no numbers to compare.
    """
    spec, (_, kernel), found = as_spec(spec), cuts_of(model), []
    with torch.no_grad(), evaluating(model), patched(model, Spec(), kernel=kernel, strict=False):
        for batch in batches(model, inputs):
            before = forward(model, batch)
            with patched(model, spec, kernel=kernel, strict=False):
                after = forward(model, batch)
            found.append(_compared(model, batch, before, after, output))
    names = {one.output for one in found}
    if len(names) > 1:
        do = "Call verify_effect for each kind of inputs."
        raise SpecError(describe("verify_effect", f"batches that give {', '.join(sorted(names))}", "one kind of output", do))
    length = max(one.arrays["largest"].shape[1] for one in found)
    kept = [name for name in found[0].arrays if all(name in one.arrays for one in found)]
    arrays = {name: np.concatenate([_widened(one.arrays[name], length) for one in found]) for name in kept}
    notes = tuple(dict.fromkeys(note for one in found for note in one.notes))
    return Effect(spec, found[0].output, arrays, found[0].positions, notes)


@dataclass
class _Batch:
    """The measures of one batch, as in Effect."""

    output: str
    positions: bool
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _compared(model: Any, batch: Batch, before: Any, after: Any, wanted: str | None) -> _Batch:
    """The measures of two outputs for the same batch, row by row: a vocabulary in float64 fills memory quickly."""
    name, one, other = _main(before, after, wanted)
    rows = rows_of(batch)
    is_by_example = len(one) == rows
    is_distribution = name == "logits" and is_by_example and one.dim() in (2, 3)
    positions = is_by_example and one.dim() == 3
    found = _Batch(name, positions)
    if name != "logits":
        found.notes.append(f"Not logits, but {name} is compared, without KL, agreement and loss.")
    elif not is_distribution:
        found.notes.append(f"Logits of shape {tuple(one.shape)} are no distributions over tokens; only changes are measured.")
    if not is_by_example:
        found.notes.append(f"The {name} has {len(one)} rows for {rows} examples; each batch counts as one example.")
        one, other = one[None], other[None]
    if not positions:
        one, other = (t[:, None] if is_distribution else t.flatten(1)[:, None] for t in (one, other))
    shown = present(model, batch, one) if positions else _everywhere(one)
    parts = [_row(*pair, is_distribution) for pair in zip(one, other, strict=True)]
    for measure in parts[0]:
        values = torch.stack([part[measure] for part in parts]).cpu()
        found.arrays[measure] = torch.where(shown.cpu(), values, torch.nan).numpy()
    if is_distribution:
        _add_loss(found, model, batch, before, after)
    return found


def _main(before: Any, after: Any, wanted: str | None = None) -> tuple[str, Tensor, Tensor]:
    """The name of what is compared, and both tensors: the logits, or the first numbers that the model gives beside a loss."""
    pairs = _named(before)
    names = [name for name, value in pairs.items() if isinstance(value, Tensor) and value.is_floating_point() and value.dim()]
    if not names:
        expected, do = "logits, or another tensor of numbers", "Pass a model whose forward gives one."
        raise SpecError(describe("verify_effect", f"an output ({type(before).__name__}) without one", expected, do))
    if wanted is not None and wanted not in names:
        raise SpecError(
            describe("output", repr(wanted), f"one of {', '.join(names)}", closest(wanted, names) or "Choose of these.")
        )
    name = wanted or ("logits" if "logits" in names else names[0])
    one, other = pairs[name], _named(after)[name]
    if one.shape != other.shape:
        found = f"{name} of shape {tuple(other.shape)} with the cuts"
        do = "Compare outputs whose size does not depend on them (no generation, no dropping of tokens)."
        raise SpecError(describe("verify_effect", found, f"{tuple(one.shape)}, as without", do))
    return name, one, other


def _named(output: Any) -> dict[str, Any]:
    if isinstance(output, Tensor):
        return {"output": output}
    return dict(output) if isinstance(output, Mapping) else {f"output {i}": value for i, value in enumerate(output)}


def _row(before: Tensor, after: Tensor, is_distribution: bool) -> dict[str, Tensor]:
    """The measures of one example (position, entry), each (position,)."""
    before, after = before.double(), after.double()
    change = _without_nan((after - before).abs(), before, after)
    found = {"largest": change.amax(-1), "mean": change.mean(-1)}
    if is_distribution:
        found |= {"kl": divergence(before, after), "agreement": (before.argmax(-1) == after.argmax(-1)).double()}
    return found


def _without_nan(change: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """A change from NaN or infinity to the same is none; to another number it is infinite. NaN is what padding has."""
    is_same = (before == after) | (before.isnan() & after.isnan())
    return torch.where(is_same, 0.0, torch.where(change.isnan(), torch.inf, change))


def _add_loss(found: _Batch, model: Any, batch: Batch, before: Any, after: Any) -> None:
    try:
        pair = [targets(model, batch, output, output.logits) for output in (before, after)]
    except SpecError as error:
        found.notes.append(f"No loss: {error}")
        return
    shape, counted, first = found.arrays["largest"].shape, pair[0].counted, pair[0].first
    one, other = (part.losses() for part in pair)
    for name, losses in (("loss_before", one), ("loss_after", other), ("loss", _without_nan(other - one, one, other))):
        found.arrays[name] = np.full(shape, np.nan)
        places = slice(first, first + losses.shape[1])
        found.arrays[name][:, places] = torch.where(counted, losses, torch.nan).cpu().numpy()


def _everywhere(like: Tensor) -> Tensor:
    return torch.ones(like.shape[:2], dtype=torch.bool)


def _widened(values: np.ndarray, length: int) -> np.ndarray:
    """NaN behind the end of a batch that is shorter than another."""
    return np.pad(values, ((0, 0), (0, length - values.shape[1])), constant_values=np.nan)


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """NaN, without a warning, where there is nothing."""
    count = (~np.isnan(values)).sum(axis)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / np.where(count, count, np.nan)


def _nanmax(values: np.ndarray, axis: int) -> np.ndarray:
    return np.where(np.isnan(values).all(axis), np.nan, np.where(np.isnan(values), -np.inf, values).max(axis))
