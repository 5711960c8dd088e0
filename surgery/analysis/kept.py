"""The positions whose logits a metric looks at: a model is asked for these alone where it can be, else they are picked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SpecError, describe
from surgery.taps import runs_on

INPUTS = ("input_ids", "inputs_embeds")
"""Of which each position has its logits; those of the decoder, where there are two stacks."""


class Kept:
    """Logits at some positions, from the end if negative; None for all.

    more: an argument of the forward that keeps it from computing others. Not for inputs with labels: a model's own loss needs
    all of its logits. length: of the sequence that has logits, None where only the output tells.
    Raises SpecError for positions beyond the sequence.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], positions: Sequence[int] | None) -> None:
        self.positions = None if positions is None else list(positions)
        self.more: dict[str, Any] = {}
        is_double = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        names = [f"decoder_{name}" for name in INPUTS] if is_double else INPUTS
        self.length = next((v.shape[1] for name in names if isinstance(v := inputs.get(name), Tensor) and v.dim() > 1), None)
        if self.positions is None or self.length is None:
            return
        _require(self.positions, self.length)
        if "logits_to_keep" in inspect.signature(model.forward).parameters and inputs.get("labels") is None:
            kept = [position % self.length for position in self.positions]
            self.more = {"logits_to_keep": torch.tensor(kept, device=runs_on(model))}

    def logits(self, output: Any) -> Tensor | None:
        """(batch, kept position, vocabulary), or as they are without a position axis; None of a model that has none."""
        found = getattr(output, "logits", None)
        if not isinstance(found, Tensor) or self.positions is None or self.more or found.dim() < 3:
            return found if isinstance(found, Tensor) else None
        return at_positions(found, self.positions)


def at_positions(logits: Tensor, positions: Sequence[int]) -> Tensor:
    """(batch, chosen position, ...) of logits that have all positions. Raises SpecError for positions beyond the sequence."""
    _require(positions, logits.shape[1])
    return logits[:, list(positions)]


def _require(positions: Sequence[int], length: int) -> None:
    if beyond := [position for position in positions if not -length <= position < length]:
        expected = f"{-length} to {length - 1}, for {length} tokens"
        raise SpecError(describe("metric", f"positions {beyond}", expected, "Positions count from 0, or from the end."))
