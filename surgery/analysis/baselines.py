"""What takes the place of a head's activations: zeros, a mean, or those of another run; as numbers, and as a cut.

Circuits here are sets of sites that change together:

* "qk": q and k as they enter the dot product (to zero: q alone, which makes every score 0), v kept: where the head looks.
* "q", "k": each of the two alone.
* "ov": z, as `Freeze("ov")` has it: all that the head moves, be it for other values or for another pattern.
* "v": the values that the head reads, pattern kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from surgery.analysis.objective import Objective
from surgery.captures import capture
from surgery.errors import SpecError, describe
from surgery.reference import Entry, Reference, as_reference
from surgery.spec import Edit, Spec

CIRCUIT_SITES: dict[str, tuple[str, ...]] = {
    "qk": ("rot_q", "rot_k"),
    "q": ("rot_q",),
    "k": ("rot_k",),
    "ov": ("z",),
    "v": ("v",),
}

Selection = Sequence[tuple[str, tuple[int, ...]]]
"""Addresses, each with head numbers in ascending order."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """kind: "zero", "mean" or "activation". reference: of mean (None: of the current activations) and of activation.

    The mean of the current activations is that over the whole batch, padding included: what it changes depends on how the batch
    was padded. A reference of `surgery.collect_reference` leaves padding out.
    """

    kind: Literal["zero", "mean", "activation"]
    reference: Reference | None = None

    def sites(self, circuit: str) -> tuple[str, ...]:
        """The sites that change with a circuit."""
        return ("rot_q",) if (circuit, self.kind) == ("qk", "zero") else CIRCUIT_SITES[circuit]

    def edits(self, address: str, heads: Sequence[int], circuit: str) -> Spec:
        """The cut that puts the replacement in, for these heads together."""
        return Spec([self._edit(address, heads, site) for site in self.sites(circuit)])

    def _edit(self, address: str, heads: Sequence[int], site: str) -> Edit:
        reference = self.reference
        if reference is not None:  # of these heads alone: a spec is compared by its content
            axis = 1 if self.kind == "activation" else 0
            value = self._entry(address, site, heads, axis)
            reference = Reference(reference.kind, {(address, site): Entry(value, None, tuple(heads))})
        return Edit(site, self.kind, layers=[address], heads=list(heads), reference=reference)

    def value(self, address: str, heads: Sequence[int], site: str, x: Tensor) -> Tensor:
        """The replacement of x (batch, these heads, position, d), without a gradient. Raises SpecError if shapes differ."""
        if self.kind == "zero":
            return torch.zeros_like(x)
        if self.reference is None:
            return x.detach().mean(dim=(0, 2), keepdim=True).expand_as(x)
        value = self._entry(address, site, heads, 1 if self.kind == "activation" else 0).to(x)
        if value.dim() < 4:
            value = (value if value.dim() == 3 else value[:, None])[None]
        if value.shape[2] > x.shape[2] and self.kind == "mean":
            value = value[:, :, : x.shape[2]]
        if any(a not in (1, b) for a, b in zip(value.shape, x.shape, strict=True)):
            what, do = f"{address} {site}", "Collect it on inputs of the same shape."
            raise SpecError(describe(what, f"values of shape {tuple(value.shape)}", f"{tuple(x.shape)}", do))
        return value.expand_as(x)

    def _entry(self, address: str, site: str, heads: Sequence[int], axis: int) -> Tensor:
        assert self.reference is not None
        entry = self.reference.find(address, site)
        held = None if entry is None else entry.heads if entry.heads is not None else range(entry.value.shape[axis])
        if entry is None or held is None or (missing := [head for head in heads if head not in held]):
            found = f"{self.reference!r}" + (f" without heads {missing}" if entry is not None else "")
            do = "Collect these sites with surgery.collect_reference or surgery.capture."
            raise SpecError(describe("to", found, f"values of heads {list(heads)} at {address} {site}", do))
        rows = torch.tensor([list(held).index(head) for head in heads], device=entry.value.device)
        return entry.value.index_select(axis, rows)


def baseline_of(
    objective: Objective, to: Any, corrupted: Mapping[str, Any] | None, selection: Selection, sites: Sequence[str]
) -> Baseline:
    """From an argument `to`: "zero", "mean", "corrupted" (one forward of those inputs), or a reference or captured run."""
    if isinstance(to, str) and to in ("zero", "mean"):
        return Baseline("zero" if to == "zero" else "mean")
    if not isinstance(to, str):
        reference = to.reference() if callable(getattr(to, "reference", None)) else to
        kind = reference.kind if isinstance(reference, Reference) else "activation"
        return Baseline(kind, as_reference(reference, kind))
    if to != "corrupted":
        expected = "'corrupted', 'zero', 'mean', or a reference"
        raise SpecError(describe("to", repr(to), expected, "Choose one of these."))
    if corrupted is None:
        raise SpecError(describe("corrupted", "None", "inputs to take activations from", "Pass them, or to='zero'."))
    for name, value in objective.inputs.items():
        other = corrupted.get(name)
        if name == "labels" and other is None:
            continue  # what the metric asks for stays what it was
        if isinstance(value, Tensor) and (not isinstance(other, Tensor) or other.shape != value.shape):
            found = "nothing" if not isinstance(other, Tensor) else f"shape {tuple(other.shape)}"
            do = "Pad both to one length, token by token in line."
            raise SpecError(describe(f"corrupted[{name!r}]", found, f"{tuple(value.shape)}, as in the clean inputs", do))
    addresses = [address for address, _ in selection]
    with capture(objective.model, list(sites), addresses, detach=True, strict=False) as run, torch.no_grad():
        objective.forward(Spec(), corrupted)
    return Baseline("activation", run.reference())
