"""A metric as a function that has gradients: its mean over a batch, on the graph of a forward with cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.analysis.kept import Kept
from surgery.analysis.metrics import Measured, as_metric
from surgery.errors import SpecError, describe
from surgery.evaluation import evaluating, uncached
from surgery.patch import cuts_of, patched
from surgery.spec import Spec


class Objective:
    """The mean of a metric over one batch. Cuts that the model has stay, below those of each spec.

    clean: logits of the first forward, which must be one whose cuts change no number: metrics that compare, compare with it.
    start: the metric's mean in it. forwards, backwards: passes through the model so far.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], metric: Any) -> None:
        self.model, self.metric = model, as_metric(metric)
        self.base, self.kernel = cuts_of(model)
        self.inputs = uncached(model, inputs)
        self.kept = Kept(model, self.inputs, self.metric.positions)
        self.clean: Tensor | None = None
        self.start: float | None = None
        self.forwards, self.backwards = 0.0, 0.0

    def forward(self, spec: Spec, inputs: Mapping[str, Any] | None = None) -> Any:
        """The model's output on the batch, or on inputs of the same shape, in evaluation mode."""
        given = self.inputs if inputs is None else {**self.inputs, **inputs}
        self.forwards += 1
        with patched(self.model, self.base + spec, kernel=self.kernel, strict=False), evaluating(self.model):
            return self.model(**given, **self.kept.more)

    def value(self, spec: Spec) -> Tensor:
        """The metric's mean over examples. Raises SpecError where it is not one number for each."""
        with torch.enable_grad():
            output = self.forward(spec)
            logits = self.kept.logits(output)
            if self.clean is None and logits is not None:
                self.clean = logits.detach()
            mean = self.metric.raw(Measured(self.model, self.inputs, output, logits, self.clean)).double().mean()
        self.start = float(mean.detach()) if self.start is None else self.start
        return mean

    def gradients(self, value: Tensor, leaves: Sequence[Tensor], keep: bool = False) -> list[Tensor]:
        """The gradient at each leaf; zeros where the metric does not depend on it. keep: the graph, for another time.

        Raises SpecError for a metric without a gradient.
        """
        if not value.requires_grad:
            found = "a number that has no gradient"
            do = "Write it in torch without .item() or argmax, or use method='ablation', which needs no gradient."
            raise SpecError(describe(f"metric {self.metric.name!r}", found, "a differentiable function of the output", do))
        self.backwards += 1
        slopes = torch.autograd.grad(value, list(leaves), retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, slopes, strict=True)]
