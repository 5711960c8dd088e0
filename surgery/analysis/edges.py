"""Edge attribution: how much of what a head changes passes through one later head's q, k or v (Syed et al. 2023).

A sender's change z' - z, carried to q, k or v of a receiver, times the metric's gradient there: to first order, what path
patching of this one edge would change. It is carried along every way that no other attention lies on: the residual, with the
norms and MLPs that read it (as in the path patching of Wang et al. 2023; Syed et al. have MLPs as nodes of their own, and
leave them out). So nothing is assumed of where a layer adds what: autograd goes the ways that the model has.

Passes: one forward and backward for the gradients at receivers, one forward whose z are cut off from what is before them, and
through parts of it one backward for each receiving head and site, which gives its edges from all senders.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from surgery.analysis.attribution import Points, gradients, taps
from surgery.analysis.baselines import CIRCUIT_SITES, Baseline, Selection
from surgery.analysis.objective import Objective
from surgery.patch import anatomy_of

INPUTS = ("q", "k", "v")
COLUMNS = ["address", "head", "to_address", "to_head", "input", "score"]


class _Cut:
    """An edit that starts the graph anew: z is a leaf, on which all behind it depends, and which depends on nothing."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        self.seen.append(leaf)
        return leaf


def edge_scores(
    objective: Objective, senders: Selection, receivers: Selection, baseline: Baseline, inputs: Sequence[str] = INPUTS
) -> pd.DataFrame:
    """A row for each sending head, receiving head and input (q, k, v) of it; where there is a way, so only to later attentions.

    address, head: of the sender; to_address, to_head: of the receiver; score: the estimated change of the metric's mean.
    """
    sites = {name: CIRCUIT_SITES[name][0] for name in inputs}
    watched = taps(receivers, list(sites.values()))
    slopes = gradients(objective, objective.value(watched.spec), [watched])
    every = [(attention.address, tuple(range(attention.heads))) for attention in anatomy_of(objective.model)]
    cut, ends = Points(every, ["z"], lambda *_: _Cut()), taps(receivers, list(sites.values()))
    with torch.enable_grad():
        objective.forward(ends.spec + cut.spec)
    ran = [(address, heads) for address, heads in senders if cut.at[address, "z"].seen]
    leaves = {address: cut.last((address, "z")) for address, _ in ran}
    changes = {address: _change(leaves[address].detach(), baseline, address, heads) for address, heads in ran}
    rows = []
    for address, heads in receivers:
        for name, site in sites.items():
            if not ends.at[address, site].seen or not ends.last((address, site)).requires_grad:
                continue
            end, slope = ends.last((address, site)), slopes[address, site]
            for index, head in enumerate(heads):
                objective.backwards += 1
                through = torch.zeros_like(slope)
                through[:, index] = slope[:, index]
                found = torch.autograd.grad(end, list(leaves.values()), through, retain_graph=True, allow_unused=True)
                for (sender, numbers), gradient in zip(ran, found, strict=True):
                    if gradient is None:
                        continue
                    own = gradient[:, list(numbers)].double() * changes[sender].double()
                    scores = own.sum(dim=(0, 2, 3)).tolist()
                    rows += [(sender, number, address, head, name, s) for number, s in zip(numbers, scores, strict=True)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _change(z: Tensor, baseline: Baseline, address: str, heads: tuple[int, ...]) -> Tensor:
    """z' - z of the selected heads."""
    own = z[:, list(heads)]
    difference = baseline.value(address, heads, "z", own) - own
    return torch.where(difference.isnan(), 0, difference)
