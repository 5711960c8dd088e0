"""What each head's activations are worth, to first order: one forward and one backward for all heads at once.

A gate takes a head's activation x to x + α (x' - x). The metric's derivative by α at 0, which is the gradient at x times
(x' - x), estimates what replacing x by x' would change (attribution patching; Nanda 2023, Syed et al. 2023). Gates are edits:
they stand wherever a site does, in the model's own kernel; k and v have one for each query head that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.analysis.baselines import Baseline, Selection
from surgery.analysis.objective import Objective
from surgery.errors import SpecError, describe
from surgery.spec import Edit, Spec

Place = tuple[str, str]
"""An address and a site, or an address and a circuit."""
Scores = dict[Place, Tensor]
"""By address and circuit: (batch, head, position) in float64, whose sum over batch and positions is the estimated change.

One position stands for all where a circuit has several sites.
"""


class Tap:
    """An edit that changes nothing and remembers what it saw, on the path to the output: one tensor for each call."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:  # before all parameters that are trained
            x = x.detach().requires_grad_()
        self.seen.append(x)
        return x


class Gate:
    """x + alpha (x' - x), with one alpha of the same value for each example, head and position, on the graph."""

    def __init__(self, replacement: Callable[[Tensor], Tensor], alpha: float) -> None:
        self.replacement, self.alpha = replacement, alpha
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        alpha = torch.full((*x.shape[:3], 1), self.alpha, dtype=exact, device=x.device, requires_grad=True)
        self.seen.append(alpha)
        difference = self.replacement(x) - x
        # Rows that attend to nothing are NaN in some kernels, and would make NaN of a gradient that is zero.
        return (x + alpha * torch.where(difference.isnan(), 0, difference)).to(x.dtype)


class Points:
    """One callable edit of a kind at each site of each selected attention, and what they saw."""

    def __init__(self, selection: Selection, sites: Sequence[str], make: Callable[[str, tuple[int, ...], str], Any]) -> None:
        chosen = [(address, heads, site) for address, heads in selection for site in sites]
        self.at: dict[Place, Any] = {(address, site): make(address, heads, site) for address, heads, site in chosen}
        edits = [Edit(site, self.at[address, site], layers=[address], heads=list(heads)) for address, heads, site in chosen]
        self.spec = Spec(edits)

    def seen(self) -> dict[Place, list[Tensor]]:
        """What was seen, call by call, where an attention ran; the engine warns of those that did not.

        Raises SpecError for an attention that came to a site several times with other positions.
        """
        for (address, site), point in self.at.items():
            if len({tensor.shape for tensor in point.seen}) > 1:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in point.seen)
                do = "Choose other layers: it computes parts of the sequence one after another."
                raise SpecError(describe(f"{address} {site}", f"calls of shapes {shapes}", "one shape", do))
        return {place: point.seen for place, point in self.at.items() if point.seen}

    def last(self, place: Place) -> Tensor:
        """What a point saw, which saw one tensor."""
        return only(self.at[place].seen, *place)


def taps(selection: Selection, sites: Sequence[str]) -> Points:
    """Taps at sites."""
    return Points(selection, sites, lambda address, heads, site: Tap())


def gates(selection: Selection, sites: Sequence[str], baseline: Baseline, alpha: float = 0.0) -> Points:
    """Gates at sites, all at the same alpha."""

    def gate(address: str, heads: tuple[int, ...], site: str) -> Gate:
        return Gate(lambda x: baseline.value(address, heads, site, x), alpha)

    return Points(selection, sites, gate)


def only(seen: Sequence[Tensor], address: str, site: str) -> Tensor:
    """The one tensor that was seen. Raises SpecError if there were several, or none."""
    if len(seen) != 1:
        do = "Choose other layers, or a method that needs no attention pattern: 'atp', 'ig' or 'ablation'."
        raise SpecError(describe(f"{address} {site}", f"{len(seen)} calls in one forward", "one", do))
    return seen[0]


def gradients(objective: Objective, value: Tensor, points: Sequence[Points], keep: bool = False) -> Scores:
    """The gradient at what the points saw, by address and site; the sum over calls where an attention runs several times."""
    places = [(place, tensor) for some in points for place, tensors in some.seen().items() for tensor in tensors]
    found: Scores = {}
    for (place, _), gradient in zip(places, objective.gradients(value, [t for _, t in places], keep), strict=True):
        found[place] = found[place] + gradient if place in found else gradient
    return found


def by_circuit(by_site: Mapping[Place, Tensor], selection: Selection, circuits: Sequence[str], baseline: Baseline) -> Scores:
    """Gradients by gates (batch, head, position, 1) of sites, added up to those of circuits."""
    found: Scores = {}
    for address, _ in selection:
        for circuit in circuits:
            sites = baseline.sites(circuit)
            parts = [by_site[address, site][..., 0].double() for site in sites if (address, site) in by_site]
            if len(parts) == 1:
                found[address, circuit] = parts[0]
            elif parts:
                found[address, circuit] = torch.stack([part.sum(-1) for part in parts]).sum(0)[..., None]
    return found


def sites_of(circuits: Sequence[str], baseline: Baseline) -> list[str]:
    """All sites of some circuits, each once."""
    return list(dict.fromkeys(site for circuit in circuits for site in baseline.sites(circuit)))


def attribution(objective: Objective, selection: Selection, circuits: Sequence[str], baseline: Baseline) -> Scores:
    """Attribution patching: gradient times change, of all heads and circuits; one forward and one backward."""
    points = gates(selection, sites_of(circuits, baseline), baseline)
    value = objective.value(points.spec)
    return by_circuit(gradients(objective, value, [points]), selection, circuits, baseline)
