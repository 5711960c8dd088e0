"""A metric as a function that has gradients: its mean over a batch, on the graph of a forward with cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.analysis.batches import rows_of
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
        self.model, self.metric, self.rows = model, as_metric(metric), rows_of(inputs)
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
            found = self.metric.function(Measured(self.model, self.inputs, output, logits, self.clean))
            found = found if isinstance(found, Tensor) else torch.as_tensor(found)
        if found.dim() > 1 or (found.dim() == 1 and len(found) not in (1, self.rows)):
            expected = f"a number, or one for each of {self.rows} examples"
            what, do = f"metric {self.metric.name!r}", "Reduce it to one number per example."
            raise SpecError(describe(what, f"a tensor of shape {tuple(found.shape)}", expected, do))
        with torch.enable_grad():
            mean = found.double().mean()
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
