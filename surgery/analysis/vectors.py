"""Steering vectors: what is added to heads, and what adding it does. `surgery.analysis.steering` finds them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.labelled import Labelled, pictured
from surgery.analysis.reading import Reading
from surgery.analysis.sweep import Sweep
from surgery.analysis.tables import as_html, as_text
from surgery.analysis.targets import unpadded
from surgery.errors import NoMatchError, describe
from surgery.patch import anatomy_of
from surgery.plots.patterns import head_name
from surgery.spec import Edit, Spec

STRENGTHS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
MOST_LINES = 6
"""Heads that a picture shows, those that do most."""


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """A vector for each head. vectors: address to (head, d); heads: address to the heads of its rows.

    unit: of their entries. examples: marks of the examples that they were found on, so that an effect on these is noticed.
    """

    model: Any = field(repr=False)
    site: str
    method: str
    unit: str
    vectors: dict[str, Tensor] = field(repr=False)
    heads: dict[str, tuple[int, ...]]
    examples: frozenset[str] = field(repr=False, default=frozenset())

    def __getitem__(self, where: tuple[str | int, int]) -> Tensor:
        """(d,): the vector of (layer or address, head). Raises NoMatchError if there is none."""
        address, head = anatomy_of(self.model)[where[0]].address, where[1]
        if head not in self.heads.get(address, ()):
            known = "; ".join(f"{a} heads {list(heads)}" for a, heads in self.heads.items())
            raise NoMatchError(describe("vector", f"{address} head {head}", known, "Name one of these."))
        return self.vectors[address][self.heads[address].index(head)]

    def only(self, heads: Sequence[tuple[str | int, int]]) -> SteeringVectors:
        """Those of some heads, (layer or address, head) each. Raises NoMatchError for one that there is not."""
        anatomy, chosen = anatomy_of(self.model), dict[str, list[int]]()
        for layer, head in heads:
            _ = self[layer, head]
            chosen.setdefault(anatomy[layer].address, []).append(head)
        numbers = {address: tuple(sorted(set(chosen[address]))) for address in self.heads if address in chosen}
        vectors = {a: torch.stack([self[a, head] for head in numbers[a]]) for a in numbers}
        return replace(self, vectors=vectors, heads=numbers)

    def scaled(self, norm: float = 1.0) -> SteeringVectors:
        """The same directions, each vector of one L2 norm; one that is 0 stays so."""
        vectors = {a: v * norm / v.norm(dim=-1, keepdim=True).clamp(min=1e-30) for a, v in self.vectors.items()}
        return replace(self, vectors=vectors, unit=f"norm {norm:g}")

    def norms(self) -> Labelled:
        """(layer, head): the L2 norm of each vector, in its unit."""
        numbers = sorted({head for heads in self.heads.values() for head in heads})
        values = np.full((len(self.vectors), len(numbers)), np.nan)
        present = np.zeros_like(values, dtype=bool)
        for row, (address, vectors) in enumerate(self.vectors.items()):
            places = [numbers.index(head) for head in self.heads[address]]
            values[row, places] = vectors.double().norm(dim=-1).numpy()
            present[row, places] = True
        return Labelled(values, {"layer": list(self.vectors), "head": numbers}, f"norm at {self.site}", self.unit, present)

    def spec(self, strength: float = 1.0, positions: Sequence[int] | None = None) -> Spec:
        """Adds strength × vector at each head. positions: absolute, padding included; None for all, generated ones, too.

        Strength 0 is the empty spec. It saves and exports as any spec; without positions, at z, it bakes into biases.
        """
        if not strength:
            return Spec()
        return Spec(
            [
                Edit(self.site, "add", value=strength * v, layers=[a], heads=self.heads[a], positions=positions)
                for a, v in self.vectors.items()
            ]
        )

    def effect(
        self,
        inputs: Any,
        metric: Any,
        strengths: Sequence[float] = STRENGTHS,
        positions: Sequence[int] | None = None,
        *,
        each: bool = False,
        tokens: int | None = None,
        fast: bool = True,
        progress: bool = True,
    ) -> Steered:
        """A metric over a range of strengths, on inputs that the vectors were not found on: examples of these are warned of.

        inputs: see `surgery.analysis.batches.batches`. each: every head's vector alone; otherwise all are added together.
        positions: see `spec`. tokens, fast: see Sweep.
        """
        reading, given = Reading([metric]), batches(self.model, inputs)
        if seen := sum(mark in self.examples for batch in given for mark in marks(self.model, batch)):
            found = f"{seen} examples that the vectors were found on"
            do = "What it does there says little about others."
            warnings.warn(describe("effect", found, "held-out inputs", do), UserWarning, stacklevel=2)
        alone = [(a, head) for a, heads in self.heads.items() for head in heads]
        sets = {f"{a} head {head}": self.only([(a, head)]) for a, head in alone} if each else {"all": self}
        jobs = [(key, strength) for key in sets for strength in strengths]
        specs = [sets[key].spec(strength, positions) for key, strength in jobs]
        parts, unsteered = [], []
        with tqdm(total=len(jobs) * len(given), desc="steering", unit="spec", disable=not progress) as bar:
            for batch in given:
                sweep = Sweep(self.model, batch, reading.positions, tokens=tokens, fast=fast)
                before = reading.read(self.model, batch, sweep.clean, sweep.clean)[0]
                values = np.tile(before, (len(jobs), 1))
                steered = [number for number, spec in enumerate(specs) if len(spec)]
                bar.update(len(jobs) - len(steered))
                read = _reader(self.model, batch, reading, sweep, steered, values, bar)
                sweep.run([specs[n] for n in steered], read)
                parts.append(values)
                unsteered.append(before)
        values, before = np.concatenate(parts, axis=1), np.concatenate(unsteered)
        axes: dict[str, Sequence[Any]] = {"head": list(sets), "strength": list(map(float, strengths))}
        axes["example"] = range(len(before))
        shaped = values.reshape(len(sets), len(strengths), len(before))
        return Steered(Labelled(shaped, axes, reading.metrics[0].name, reading.metrics[0].unit), before, self.site)

    def picture(self) -> Figure:
        """The vectors' norms, layer × head."""
        return pictured({"": self.norms()}, f"Steering vectors at {self.site}", f"method: {self.method.replace('_', ' ')}")


class Steered:
    """What steering did. examples: (head, strength, example), head being "all" where all vectors were added together.

    unsteered: (example,) the metric without.
    """

    def __init__(self, examples: Labelled, unsteered: np.ndarray, site: str) -> None:
        self.examples, self.unsteered, self.site = examples, unsteered, site

    def value(self) -> Labelled:
        """(head, strength): the metric, the mean over examples."""
        return self.examples.mean("example")

    def to_frame(self) -> pd.DataFrame:
        """head, strength, value, unsteered, effect (their difference), error (the effect's standard error over examples)."""
        frame = self.value().to_frame()
        frame = frame.rename(columns={frame.columns[-1]: "value"})
        change = self.examples.values - self.unsteered
        frame["unsteered"] = self.unsteered.mean()
        frame["effect"] = change.mean(-1).ravel()
        count = len(self.unsteered)
        frame["error"] = change.std(-1, ddof=1).ravel() / np.sqrt(count) if count > 1 else np.nan
        return frame

    def picture(self, most: int = MOST_LINES) -> Figure:
        """The metric against strength, with the standard error of its change; of several heads those whose vectors do most."""
        found, before = self.value(), float(self.unsteered.mean())
        reach = np.abs(found.values - before).max(axis=1)
        chosen = {str(found.axes["head"][n]): n for n in np.argsort(-reach, kind="stable")[:most]}
        shown = {"steered" if name == "all" else _legend(name): found.at(head=name) for name in chosen}
        count = len(self.unsteered)
        change = self.examples.values - self.unsteered
        errors = change.std(-1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(found.shape)
        bands = {
            name: (array.values - errors[n], array.values + errors[n])
            for (name, array), n in zip(shown.items(), chosen.values(), strict=True)
        }
        title = f"Steering: strength × vector added at {self.site}"
        subtitle = f"{count} example{'s' * (count != 1)}" + (", with the standard error of the change" if count > 1 else "")
        return pictured(shown, title, subtitle, before, "unsteered", bands=bands if count > 1 else None)

    def __str__(self) -> str:
        unit = f" ({self.examples.unit})" if self.examples.unit else ""
        head = f"{self.examples.name}{unit} under steering at {self.site}, {len(self.unsteered)} examples"
        return f"{head}\n{as_text(self.to_frame())}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self.to_frame())


def _legend(head: str) -> str:
    """ "self.3 head 1" as other pictures name it."""
    address, _, number = head.rpartition(" head ")
    return head_name((address, int(number)))


def marks(model: Any, batch: Batch) -> list[str]:
    """A mark of each example, by what the model reads of it: token ids that are no padding, pixels and other features."""
    rows = rows_of(batch)
    each = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() and len(value) == rows}
    main = getattr(model, "main_input_name", "input_ids")
    read = {name: value for name, value in each.items() if name == main or _is_read(name, value)} or each
    kept = {
        name: unpadded(batch.get(name.replace("input_ids", "attention_mask")), value)
        for name, value in read.items()
        if name.endswith("input_ids")
    }
    found = []
    for row in range(rows):
        digest = hashlib.sha256()
        for name, value in sorted(read.items()):
            part = value[row][kept[name][row]].long() if name in kept else value[row]
            part = part.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(part.shape)}".encode() + part.flatten().view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def _is_read(name: str, value: Tensor) -> bool:
    """Neither labels, masks nor positions, which the same example may come with or without."""
    return name.endswith("input_ids") or (value.is_floating_point() and not name.endswith(("mask", "labels")))


def _reader(
    model: Any, batch: Batch, reading: Reading, sweep: Sweep, numbers: Sequence[int], values: np.ndarray, bar: Any
) -> Callable[[int, Any], None]:
    def read(index: int, output: Any) -> None:
        values[numbers[index]] = reading.read(model, batch, output, sweep.clean)[0]
        bar.update()

    return read
