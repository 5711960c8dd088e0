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

from surgery.analysis.batches import rows_of
from surgery.analysis.targets import Targets, present, targets
from surgery.analysis.targets import predicts_the_next as predicts_the_next
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
        return self.units(measured).expand(rows_of(measured.inputs))

    def units(self, measured: Measured) -> Tensor:
        """The same as it was given: (batch,), or (1,) where one number is that of the whole batch."""
        return self.raw(measured).detach().double().cpu()

    def raw(self, measured: Measured) -> Tensor:
        """What the function gives, with its gradient: (batch,), or (1,) where one number is that of the whole batch.

        Raises SpecError for anything else.
        """
        found, rows = _numbers(self.name, self.function(measured)), rows_of(measured.inputs)
        if found.dim() > 1 or (found.dim() == 1 and len(found) not in (1, rows)):
            expected = f"a number, or one for each of {rows} examples"
            do = "Reduce it to one number per example."
            raise SpecError(describe(f"metric {self.name!r}", f"a tensor of shape {tuple(found.shape)}", expected, do))
        return found.reshape(-1)


def loss(positions: Sequence[int] | None = None) -> Metric:
    """Mean cross entropy in nats per token, of labels if the inputs have them, else of the next of the model's own tokens.

    Labels are those of transformers' own loss: -100 alone does not count, and causal models predict them one position on. Own
    tokens are input_ids, in an encoder-decoder decoder_input_ids; padding (attention_mask 0) does not count, nor what it
    predicts. positions: of the tokens that are predicted, from 0, from the end if negative, to count these alone.
    Raises SpecError for an example in which nothing counts.
    """
    return Metric("loss", "nats per token", lambda m: _mean_loss(m, positions))


def perplexity(positions: Sequence[int] | None = None) -> Metric:
    """exp of `loss`, per example."""
    return Metric("perplexity", "", lambda m: _mean_loss(m, positions).exp())


def accuracy(positions: Sequence[int] | None = None) -> Metric:
    """The share of tokens (see `loss`) whose logit is the largest, from 0 to 1."""

    def of(m: Measured) -> Tensor:
        found = _targets(m, positions)
        return _mean("accuracy", (found.logits.argmax(-1) == found.tokens).double(), found.counted)

    return Metric("accuracy", "share of tokens", of)


def logit_difference(correct: Any, wrong: Any, position: int = -1) -> Metric:
    """The logit of one token minus that of another at a position (the last), in logits (nats).

    correct, wrong: token numbers, one for all examples or one for each; (batch, n): the mean over n.
    Raises SpecError for tokens that there are not, and where the position is padding.
    """
    pair = [torch.as_tensor(tokens) for tokens in (correct, wrong)]

    def of(m: Measured) -> Tensor:
        logits = _with_positions("logit_difference", _logits(m))
        real = present(m.model, m.inputs, logits[:, :, 0], (position,))
        if padded := (~real[:, 0]).nonzero().flatten().tolist():
            found, do = f"padding at position {position} of examples {padded}", "Pad on the left, or name another position."
            raise SpecError(describe("logit_difference", found, "a token", do))
        logits, values = logits[:, 0], []
        for tokens in pair:
            index = (tokens if tokens.dim() else tokens[None]).to(logits.device)
            index = index.reshape(len(index), -1)
            if len(index) not in (1, len(logits)):
                found = f"tokens for {len(index)} examples"
                raise SpecError(describe("logit_difference", found, f"one, or {len(logits)}", "Use a batch of all examples."))
            if strange := index[(index < 0) | (index >= logits.shape[1])].tolist():
                found, do = f"tokens {strange}", "Take numbers that the model's tokenizer gives."
                raise SpecError(describe("logit_difference", found, f"0 to {logits.shape[1] - 1}", do))
            values.append(logits.double().gather(1, index.expand(len(logits), -1)).mean(1))
        return values[0] - values[1]

    return Metric("logit difference", "logits", of, (position,))


def kl(positions: Sequence[int] | None = None) -> Metric:
    """KL(uncut || cut) of the predicted distributions in nats, the mean over positions that are no padding; 0 without cuts.

    positions: of the sequence, to count those alone. Raises SpecError for an example in which all are padding.
    """

    def of(m: Measured) -> Tensor:
        logits = _logits(m) if positions is None else _with_positions("kl", _logits(m))
        found = divergence(_required(m.clean, "clean logits"), logits)
        return found if found.dim() == 1 else _mean("KL", found, present(m.model, m.inputs, found, positions))

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
        name = getattr(metric, "__name__", "metric")
        return Metric(name, "", lambda m: _numbers(name, metric(m.output)))
    expected = f"{', '.join(map(repr, METRICS))}, a Metric, or a callable of the model's output"
    raise SpecError(describe("metric", repr(metric), expected, "For example metrics.logit_difference(5, 7)."))


def _numbers(name: str, found: Any) -> Tensor:
    try:
        return found if isinstance(found, Tensor) else torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        expected = "a number, or one for each example"
        what, do = f"metric {name!r}", "Return it, as a tensor if gradients are asked for."
        raise SpecError(describe(what, f"a {type(found).__name__}", expected, do)) from error


def _required(value: Any, what: str) -> Any:
    if value is None:
        do = "Pass a callable of the output as the metric."
        raise SpecError(describe("metric", f"an output without {what}", "a model that gives logits", do))
    return value


def _logits(m: Measured) -> Tensor:
    return _required(m.logits, "logits")


def _with_positions(name: str, logits: Tensor) -> Tensor:
    """Logits that have positions, as a classifier's do not."""
    if logits.dim() != 3:
        expected, do = "(batch, position, vocabulary)", "Pass a callable, such as lambda output: output.logits[:, 1]."
        raise SpecError(describe(f"positions of {name}", f"logits of shape {tuple(logits.shape)}", expected, do))
    return logits


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """(...,): KL(before || after) of logits (..., vocabulary), in nats, in float64; infinite where a number became NaN."""
    log_p, log_q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    changed = torch.where(terms.isnan(), torch.inf, terms)
    return torch.where(log_p.isnan() & log_q.isnan(), 0.0, changed).sum(-1)


def _targets(m: Measured, positions: Sequence[int] | None) -> Targets:
    return targets(m.model, m.inputs, m.output, _logits(m), positions)


def _mean_loss(m: Measured, positions: Sequence[int] | None) -> Tensor:
    found = _targets(m, positions)
    return _mean("loss", found.losses(), found.counted)


def _mean(name: str, values: Tensor, counted: Tensor) -> Tensor:
    """(batch,): the mean over what counts. Raises SpecError for examples where nothing does."""
    if empty := (~counted.any(-1)).nonzero().flatten().tolist():
        which = f"example{'s' * (len(empty) > 1)} {', '.join(map(str, empty))}"
        do = "Leave these examples out, or choose other labels or positions."
        raise SpecError(describe(f"metric {name!r}", f"no position that counts in {which}", "at least one in each", do))
    return torch.where(counted, values, 0).sum(-1) / counted.sum(-1)
