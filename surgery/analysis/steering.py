"""Steering: vectors that are added to what heads compute, found from examples.

Mean differences: Turner et al. 2023, Rimsky et al. 2024 (there in the residual stream); per head: Li et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.kept import Kept
from surgery.analysis.metrics import Measured, Metric, as_metric
from surgery.analysis.tokens import chosen_tokens
from surgery.analysis.vectors import SteeringVectors, marks
from surgery.captures import capture
from surgery.errors import SpecError, closest, describe
from surgery.evaluation import evaluating, uncached
from surgery.patch import anatomy_of, cuts_of, patched
from surgery.spec import Edit, Spec

SITES = ("z", "result")
METHODS = ("mean_difference", "gradient")

Activations = dict[str, Tensor]
"""(batch, head, query, d) by address."""


def discover_vector(
    model: Any,
    positives: Any,
    negatives: Any = None,
    layers: Any = "all",
    heads: Any = "all",
    site: str = "z",
    method: str = "mean_difference",
    metric: Any = None,
    positions: int | Sequence[int] | None = -1,
) -> SteeringVectors:
    """A vector for each head that moves a model from negatives towards positives, with the cuts that the model has.

    positives, negatives: examples, see `surgery.analysis.batches.batches`; the two may differ in number and in length.
    site: "z" (d_head entries), or "result" (d_model: what the head adds to the residual stream).
    positions: the tokens of each example that are looked at, those of padding (attention_mask 0) not counted: -1 is the last
      one whichever side padding is on; None is all. An example counts the same however many tokens it has.
    method:
      "mean_difference": the mean over positives minus that over negatives, in units of the activation. Strength 1 adds
        the whole difference, in the direction of the positives.
      "gradient": the mean over all examples and their chosen tokens of the derivative of `metric` with respect to the site, in
        units of the metric per unit of activation: the direction in which the metric grows fastest. To first order, adding
        strength × vector at one chosen token changes it by strength × norm². Needs a differentiable metric; negatives are
        further examples, and may be left out. `scaled` makes strengths of different heads comparable.
    Raises SpecError or NoMatchError for what does not fit.
    """
    for what, found, known in (("site", site, SITES), ("method", method, METHODS)):
        if found not in known:
            do = closest(found, known) or "Choose one of these."
            raise SpecError(describe(what, repr(found), ", ".join(map(repr, known)), do))
    if (method == "gradient") != (metric is not None):
        expected = "one to follow" if metric is None else "None with method='mean_difference'"
        raise SpecError(describe("metric", repr(metric), expected, "Pass a metric with method='gradient', and only then."))
    if method == "mean_difference" and negatives is None:
        raise SpecError(describe("negatives", "None", "examples to move away from", "Pass them."))
    anatomy = anatomy_of(model)
    checked = Edit(site, "identity", layers=layers, heads=heads)  # the same checks as a cut of the same selection
    chosen = anatomy.select(checked.layers, "discover_vector")
    numbers = {a.address: tuple(range(a.heads)) if checked.heads == "all" else checked.heads for a in chosen}
    tokens = None if positions is None else tuple(positions) if isinstance(positions, Sequence) else (positions,)
    sides = [batches(model, data) for data in (positives, negatives) if data is not None]
    selection: dict[str, Any] = {"layers": list(numbers), "heads": checked.heads}
    if method == "gradient":
        slope_of = as_metric(metric)
        examples = [batch for side in sides for batch in side]
        vectors = _mean(examples, lambda batch: _slopes(model, batch, site, selection, slope_of), tokens)
        unit = f"{slope_of.unit or slope_of.name} per unit of {site}"
    else:
        high, low = (_mean(side, lambda batch: _activations(model, batch, site, selection), tokens) for side in sides)
        vectors = {address: high[address] - low[address] for address in numbers}
        unit = f"units of {site}"
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    kept = {address: vectors[address].to(dtype) for address in numbers}
    used = frozenset(mark for side in sides for batch in side for mark in marks(model, batch))
    return SteeringVectors(model, site, method, unit, kept, numbers, used)


def _mean(given: Sequence[Batch], see: Callable[[Batch], Activations], tokens: tuple[int, ...] | None) -> Activations:
    """(head, d) by address, float64 on the CPU: the mean over examples of the mean over each one's chosen tokens."""
    total: Activations = {}
    count = 0
    for batch in given:
        seen = see(batch)
        for address, tensor in seen.items():
            if len(tensor) != rows_of(batch):
                found = f"{len(tensor)} rows at {address} for {rows_of(batch)} examples (windows or chunks)"
                raise SpecError(describe("discover_vector", found, "one for each example", "Choose other layers."))
            shares = chosen_tokens(address, batch, len(tensor), tensor.shape[2], tokens).to(tensor.device, torch.float64)
            # Not a product with shares of 0: what stands at padding may be NaN.
            picked = torch.where(shares[:, None, :, None] > 0, tensor.double() * shares[:, None, :, None], 0)
            total[address] = total.get(address, torch.zeros((), dtype=torch.float64)) + picked.sum(dim=(0, 2)).cpu()
        count += rows_of(batch)
    return {address: value / count for address, value in total.items()}


def _activations(model: Any, batch: Batch, site: str, selection: dict[str, Any]) -> Activations:
    with capture(model, [site], detach=True, **selection) as run, torch.no_grad(), evaluating(model):
        model(**uncached(model, batch))
    return {address: run[address, site] for address in selection["layers"]}


class _Nudge:
    """A callable edit that adds zeros, with respect to which the output is differentiated."""

    def __init__(self) -> None:
        self.zeros: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.zeros.append(torch.zeros_like(x, requires_grad=True))
        return x + self.zeros[-1]


def _slopes(model: Any, batch: Batch, site: str, selection: dict[str, Any], metric: Metric) -> Activations:
    """The derivative of each example's metric. Parameters, and what has gathered in their `grad`, are left alone.

    A metric that gives one number for the batch is taken for its mean.
    """
    base, kernel = cuts_of(model)
    nudges = {address: _Nudge() for address in selection["layers"]}
    edits = Spec([Edit(site, nudge, layers=[a], heads=selection["heads"]) for a, nudge in nudges.items()])
    inputs = uncached(model, batch)
    kept = Kept(model, inputs, metric.positions)
    with patched(model, base + edits, kernel=kernel, strict=False), evaluating(model), torch.enable_grad():
        output = model(**inputs, **kept.more)
        found = metric.function(Measured(model, inputs, output, kept.logits(output), None))
        if several := [address for address, nudge in nudges.items() if len(nudge.zeros) != 1]:
            found_there = f"{', '.join(several)}, which a forward does not run just once"
            raise SpecError(describe("discover_vector", found_there, "one call of each", "Choose other layers."))
        zeros = [nudge.zeros[0] for nudge in nudges.values()]
        if not isinstance(found, Tensor) or not found.requires_grad:
            do = "Take a logit, a logit difference or a loss."
            raise SpecError(describe(f"metric {metric.name!r}", "a number without a gradient", "a differentiable one", do))
        total = found.sum() if found.dim() and len(found) > 1 else found.sum() * len(zeros[0])
        slopes = torch.autograd.grad(total, zeros, materialize_grads=True, allow_unused=True)
    return dict(zip(nudges, slopes, strict=True))
