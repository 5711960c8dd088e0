"""Numbers that a cut changes, one per example: functions of a model's output.

A metric is given the output of a forward under a cut and, where it compares, of the same forward without it. Any callable
that takes the output and gives a number, or one for each example, is a metric, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.errors import SpecError, describe


@dataclass(frozen=True)
class Measured:
    """What a metric sees of one forward: the model, the inputs, the whole output, and the logits that the metric asked for.

    logits: (batch, kept positions, vocabulary), all positions unless the metric names some; (batch, classes) of a classifier.
    clean: the same of the forward without cuts.
    """

    model: Any
    inputs: Mapping[str, Any]
    output: Any
    logits: Tensor | None
    clean: Tensor | None


@dataclass(frozen=True)
class Metric:
    """A named number per example. positions: those whose logits it reads (from the end if negative), None for all.

    function: Measured to a tensor (batch,), or to one number for the whole batch.
    """

    name: str
    unit: str
    function: Callable[[Measured], Tensor]
    positions: tuple[int, ...] | None = None

    def __call__(self, measured: Measured) -> Tensor:
        """(batch,) in float64 on the CPU; a number for the whole batch stands for each example. Raises SpecError."""
        return self.units(measured).expand(_rows(measured))

    def units(self, measured: Measured) -> Tensor:
        """The same as it was given: (batch,), or (1,) where one number is that of the whole batch."""
        found = self.function(measured)
        found = found if isinstance(found, Tensor) else torch.as_tensor(found)
        rows = _rows(measured)
        if found.dim() > 1 or (found.dim() == 1 and len(found) not in (1, rows)):
            expected = f"a number, or one for each of {rows} examples"
            do = "Reduce it to one number per example."
            raise SpecError(describe(f"metric {self.name!r}", f"a tensor of shape {tuple(found.shape)}", expected, do))
        return found.detach().double().cpu().reshape(-1)


def _rows(measured: Measured) -> int:
    return next(len(value) for value in measured.inputs.values() if isinstance(value, Tensor) and value.dim())


def loss(positions: Sequence[int] | None = None) -> Metric:
    """Mean cross entropy in nats per token, of labels if the inputs have them, else of the next token of input_ids.

    Labels of -100 and padding (attention_mask 0) do not count. positions: of the tokens that are predicted, from 0, to count
    these alone. Causal models predict labels one position on, as transformers' own loss has it.
    """
    return Metric("loss", "nats per token", lambda m: _mean(*losses_of(m, positions)))


def perplexity(positions: Sequence[int] | None = None) -> Metric:
    """exp of `loss`, per example."""
    return Metric("perplexity", "", lambda m: _mean(*losses_of(m, positions)).exp())


def accuracy(positions: Sequence[int] | None = None) -> Metric:
    """The share of tokens (see `loss`) whose logit is the largest, from 0 to 1."""

    def of(m: Measured) -> Tensor:
        logits, targets, counted = _targets(m, positions)
        return _mean((logits.argmax(-1) == targets).double(), counted)

    return Metric("accuracy", "share of tokens", of)


def logit_difference(correct: Any, wrong: Any, position: int = -1) -> Metric:
    """The logit of one token minus that of another at a position (the last), in logits (nats).

    correct, wrong: token numbers, one for all examples or one for each; (batch, n): the mean over n.
    """
    pair = [torch.as_tensor(tokens) for tokens in (correct, wrong)]

    def of(m: Measured) -> Tensor:
        logits = _logits(m)[:, 0]
        values = []
        for tokens in pair:
            index = tokens.to(logits.device).view(-1, *tokens.shape[1:]) if tokens.dim() else tokens.view(1)
            index = index.reshape(len(index), -1)
            if len(index) not in (1, len(logits)):
                found = f"tokens for {len(index)} examples"
                raise SpecError(describe("logit_difference", found, f"one, or {len(logits)}", "Use a batch of all examples."))
            values.append(logits.double().gather(1, index.to(logits.device).expand(len(logits), -1)).mean(1))
        return values[0] - values[1]

    return Metric("logit difference", "logits", of, (position,))


def kl(positions: Sequence[int] | None = None) -> Metric:
    """KL(uncut || cut) of the predicted distributions in nats, the mean over positions that are no padding; 0 without cuts."""

    def of(m: Measured) -> Tensor:
        logits, clean = _logits(m).double().log_softmax(-1), _required(m.clean, "clean logits").double().log_softmax(-1)
        found = (clean.exp() * (clean - logits)).sum(-1)
        return found if found.dim() == 1 else _mean(found, present(m, found))

    return Metric("KL", "nats", of, None if positions is None else tuple(positions))


METRICS: dict[str, Callable[[], Metric]] = {"loss": loss, "perplexity": perplexity, "accuracy": accuracy, "kl": kl}
"""Metrics that need no more than a name."""


def as_metric(metric: Any) -> Metric:
    """A Metric from a Metric, a name of METRICS, or a callable of the output. Raises SpecError for anything else."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]()
    if callable(metric) and not isinstance(metric, type):
        return Metric(getattr(metric, "__name__", "metric"), "", lambda m: metric(m.output))
    expected = f"{', '.join(map(repr, METRICS))}, a Metric, or a callable of the model's output"
    raise SpecError(describe("metric", repr(metric), expected, "For example metrics.logit_difference(5, 7)."))


def _required(value: Any, what: str) -> Any:
    if value is None:
        do = "Pass a callable of the output as the metric."
        raise SpecError(describe("metric", f"an output without {what}", "a model that gives logits", do))
    return value


def _logits(m: Measured) -> Tensor:
    return _required(m.logits, "logits")


def _targets(m: Measured, positions: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (batch, target, vocabulary), target tokens, and which of them count.

    Targets are those of the last positions, if there are fewer of them.
    """
    logits, labels = _logits(m), m.inputs.get("labels")
    if logits.dim() == 2:  # one label for each example
        targets = _required(labels, "labels among the inputs")[:, None]
        return logits[:, None], targets, targets != -100
    if labels is None:
        labels = _required(m.inputs.get("input_ids"), "labels or input_ids")
        is_shifted = True
    else:
        is_shifted = predicts_the_next(m.model)
    counted = _only(present(m, labels) & (labels != -100), labels.shape[1], positions)
    if is_shifted:
        logits, labels, counted = logits[:, :-1], labels[:, 1:], counted[:, 1:]
    return logits, labels.clamp(min=0), counted


def losses_of(m: Measured, positions: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """(batch, target): the loss of each token, and which count."""
    logits, targets, counted = _targets(m, positions)
    losses = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="none")
    return losses.view(targets.shape), counted


def present(m: Measured, like: Tensor) -> Tensor:
    """(batch, position): where the inputs have no padding."""
    name = "decoder_attention_mask" if "decoder_input_ids" in m.inputs else "attention_mask"
    mask = m.inputs.get(name)
    if isinstance(mask, Tensor) and mask.shape == like.shape[:2]:
        return mask.bool()
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """(batch,): the mean over what counts; NaN where nothing does."""
    return torch.where(counted, values, 0).sum(-1) / counted.sum(-1)


def _only(counted: Tensor, length: int, positions: Sequence[int] | None) -> Tensor:
    """What counts, at some positions of a sequence alone, of whose last positions there are targets."""
    if positions is None:
        return counted
    chosen = torch.zeros(length, dtype=torch.bool, device=counted.device)
    chosen[list(positions)] = True
    return counted & chosen[length - counted.shape[1] :]


def predicts_the_next(model: Any) -> bool:
    """Whether labels are predicted one position on, as the losses of transformers have it: by the kind of the model's class."""
    is_in_place = getattr(model, "loss_type", None) not in (None, "ForCausalLM", "ForConditionalGeneration")
    return not is_in_place and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
