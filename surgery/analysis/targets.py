"""Which token each position of a model's logits is to predict, and which of these predictions count.

Labels among the inputs are followed as transformers' own losses follow them: -100 alone does not count. Without labels each
token is the target of the position before it, where neither of the two is padding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.errors import SpecError, describe
from surgery.masks import is_additive

UNCOUNTED = -100
"""The label of what does not count, in all of transformers."""
_SHIFTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Models whose own loss was seen to predict labels one position on, or in place."""


@dataclass(frozen=True)
class Targets:
    """logits: (batch, target, vocabulary); tokens: (batch, target), what they are to predict; counted: which of these count.

    first: the position of the first of these logits among all.
    """

    logits: Tensor
    tokens: Tensor
    counted: Tensor
    first: int = 0

    def losses(self) -> Tensor:
        """(batch, target): the cross entropy of each, in nats, in float64."""
        losses = F.cross_entropy(self.logits.flatten(0, 1).double(), self.tokens.flatten(), reduction="none")
        return losses.view(self.tokens.shape)


def targets(
    model: Any, inputs: Mapping[str, Any], output: Any, logits: Tensor, positions: Sequence[int] | None = None
) -> Targets:
    """The targets of the logits of all positions, or of a class for each example.

    positions: of target tokens, from 0, from the end if negative; of the tokens without labels, the first has nothing that
    predicts it. Raises SpecError where inputs have no targets, or none that fit.
    """
    labels = inputs.get("labels")
    tokens = _next_tokens(model, inputs) if labels is None else labels
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or logits.dim() not in (2, 3):
        found = f"{_form(tokens)} for logits of shape {tuple(logits.shape)}"
        raise SpecError(describe("targets", found, "numbers of tokens, or of a class for each example", "Check the labels."))
    if logits.dim() == 2:
        return _classes(logits, tokens, labels is not None, positions)
    first = _offset(inputs, tokens, logits)
    is_shifted = labels is None or _shifts(model, output, logits[:, first:], tokens)
    counted = present(model, inputs, tokens) if labels is None else tokens != UNCOUNTED
    if labels is None:  # a token that padding predicts is the model's guess at nothing
        counted = torch.cat([counted[:, :1], counted[:, 1:] & counted[:, :-1]], dim=1)
    if positions is not None:
        counted = counted & _chosen(positions, tokens.shape[1], int(is_shifted)).to(counted.device)
    tokens, logits = tokens.clamp(min=0), logits[:, first:]
    if is_shifted:
        logits, tokens, counted = logits[:, :-1], tokens[:, 1:], counted[:, 1:]
    return Targets(logits, tokens, counted, first)


def present(model: Any, inputs: Mapping[str, Any], like: Tensor, positions: Sequence[int] | None = None) -> Tensor:
    """(batch, position): where the sequence that logits are of has no padding, see `unpadded`."""
    return unpadded(inputs.get(f"{'decoder_' * is_encoder_decoder(model)}attention_mask"), like, positions)


def unpadded(mask: Any, like: Tensor, positions: Sequence[int] | None = None) -> Tensor:
    """(batch, position): where an attention mask hides no token. positions: those alone, in their order.

    like: (batch, position, ...), whose shape and device what comes out has. A mask of four dimensions hides a token that no
    query may attend to. Positions before those of a shorter mask (of an image, of a prompt) are no padding.
    """
    everywhere = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return everywhere
    known = mask.bool()
    if mask.dim() == 4:
        allowed = mask > torch.finfo(mask.dtype).min / 2 if is_additive(mask) else known
        known = allowed.flatten(1, 2).any(1)
    if len(known) not in (1, len(like)):
        return everywhere
    known = known.expand(len(like), -1).to(like.device)
    if positions is not None:
        return known[:, list(positions)]
    missing = like.shape[1] - known.shape[1]
    return everywhere if missing < 0 else torch.cat([everywhere[:, :missing], known], dim=1)


def predicts_the_next(model: Any) -> bool:
    """Whether labels are predicted one position on, as the losses of transformers have it: by the kind of the model's class."""
    is_in_place = getattr(model, "loss_type", None) not in (None, "ForCausalLM", "ForConditionalGeneration")
    return not is_in_place and not is_encoder_decoder(model)


def is_encoder_decoder(model: Any) -> bool:
    """Whether logits are of a decoder's tokens, beside an encoder that reads others.

    Its forward takes both, which half of such a model does not; a wrapper's forward that takes anything does not tell.
    """
    names = inspect.signature(model.forward).parameters
    is_said = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "decoder_input_ids" in names or ("input_ids" not in names and bool(is_said))


def _next_tokens(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The tokens of which each is predicted by the position before. Raises SpecError where there are none."""
    name = "decoder_input_ids" if is_encoder_decoder(model) else "input_ids"
    is_next = is_encoder_decoder(model) or predicts_the_next(model)
    if not is_next or not isinstance(inputs.get(name), Tensor):
        expected = f"labels or {name}" if is_next else "labels, for it does not predict the next token"
        found = f"no labels among the inputs of a {type(model).__name__}"
        do = "Pass labels, or a metric that needs none (kl, a callable of the output)."
        raise SpecError(describe("targets", found, expected, do))
    return inputs[name]


def _classes(logits: Tensor, labels: Tensor, is_given: bool, positions: Sequence[int] | None) -> Targets:
    if not is_given or labels.numel() != len(logits):
        found = f"{_form(labels) if is_given else 'no labels'} for classes of {len(logits)} examples"
        raise SpecError(describe("targets", found, "labels, one for each example", "Pass these among the inputs."))
    tokens = labels.reshape(-1, 1)
    counted = tokens != UNCOUNTED
    if positions is not None:
        counted = counted & _chosen(positions, 1, 0).to(counted.device)
    return Targets(logits[:, None], tokens.clamp(min=0), counted)


def _offset(inputs: Mapping[str, Any], tokens: Tensor, logits: Tensor) -> int:
    """How many positions the logits have before the tokens: those of an image or of a learned prompt."""
    ids = inputs.get("input_ids")
    is_text = isinstance(ids, Tensor) and ids.shape == tokens.shape  # labels of fewer steps than audio has stand nowhere
    same = tokens.dim() == 2 and len(tokens) == len(logits)
    if not same or tokens.shape[1] > logits.shape[1] or (tokens.shape[1] < logits.shape[1] and not is_text):
        found, expected = _form(tokens), f"({len(logits)}, {logits.shape[1]}), as the logits have positions"
        raise SpecError(describe("targets", found, expected, "Pass labels of that shape, or a callable of the output."))
    return logits.shape[1] - tokens.shape[1]


def _shifts(model: Any, output: Any, logits: Tensor, labels: Tensor) -> bool:
    """Whether labels are predicted one position on: as the output's own loss shows, else by the kind of the class.

    Seen once, it is kept, for the loss of a forward of many cuts is a mean over them all, and shows nothing.
    """
    if model not in _SHIFTS:
        loss = getattr(output, "loss", None)
        own = float(loss.detach()) if isinstance(loss, Tensor) and loss.numel() == 1 else float("nan")
        if not math.isfinite(own):
            return predicts_the_next(model)
        flat = logits.detach().float()
        gaps = []
        for by in (0, 1):
            before, after = flat[:, : flat.shape[1] - by], labels[:, by:]
            gaps.append(abs(float(F.cross_entropy(before.flatten(0, 1), after.flatten(), ignore_index=UNCOUNTED)) - own))
        close = 1e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-4  # sums of other orders
        agree = [gap <= close * abs(own) and 10 * gap < other for gap, other in zip(gaps, reversed(gaps), strict=True)]
        if not any(agree):
            return predicts_the_next(model)
        _SHIFTS[model] = agree[1]
    return _SHIFTS[model]


def _chosen(positions: Sequence[int], length: int, least: int) -> Tensor:
    """(length,): which positions are chosen. Raises SpecError for one that is not there, or that nothing predicts."""
    if wrong := [p for p in positions if not -length <= p < length or p % length < least]:
        why = ": nothing predicts the first token" if least else ""
        expected = f"{least} to {length - 1}, or {least - length} to -1 from the end{why}"
        raise SpecError(describe("positions", f"{wrong} of {length}", expected, "Choose of these."))
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[list(positions)] = True
    return chosen


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"labels of shape {tuple(value.shape)} in {str(value.dtype).removeprefix('torch.')}"
    return f"labels of type {type(value).__name__}"
