"""Positions of a batch by the tokens that stand there, whatever side padding is on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SpecError, describe


def chosen_tokens(address: str, inputs: Mapping[str, Any], rows: int, length: int, positions: Sequence[int] | None) -> Tensor:
    """(batch, position) shares that add up to 1 in each example, spread evenly over the chosen tokens.

    address: of the attention whose queries are meant; those of a decoder beside an encoder have a mask of their own.
    positions: of the tokens that are no padding, from 0, from the end if negative; None for all of them.
    Raises SpecError for an example with fewer tokens, or for padding that cannot be told by position.
    """
    present = _present(address, inputs, rows, length)
    count = present.sum(-1, keepdim=True)
    rank = present.cumsum(-1) - 1
    chosen = present if positions is None else torch.zeros_like(present)
    for position in positions or ():
        short = count.flatten() < (position + 1 if position >= 0 else -position)
        if bool(short.any()):
            example = int(short.nonzero()[0])
            found, do = f"{int(count[example])} tokens in example {example}", "Leave it out, or choose other positions."
            raise SpecError(describe("positions", found, f"one at position {position}", do))
        chosen = chosen | (present & (rank == (position if position >= 0 else count + position)))
    if not bool(chosen.any(-1).all()):
        example = int((~chosen.any(-1)).nonzero()[0])
        raise SpecError(describe("positions", f"no token in example {example}", "at least one", "Leave it out."))
    return chosen / chosen.sum(-1, keepdim=True)


def _present(address: str, inputs: Mapping[str, Any], rows: int, length: int) -> Tensor:
    """(batch, position): where there is no padding."""
    name = "decoder_attention_mask" if address.startswith("decoder.") else "attention_mask"
    mask = inputs.get(name)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return torch.ones(rows, length, dtype=torch.bool)
    if tuple(mask.shape) != (rows, length):
        found = f"{name} of shape {tuple(mask.shape)} with padding"
        do = "Pass examples of one length, or choose other layers."
        raise SpecError(describe(f"positions at {address}", found, f"({rows}, {length})", do))
    return mask.bool().cpu()
