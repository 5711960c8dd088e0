"""Random numbers that depend on where they are used and on nothing else, so that every way of computing draws the same."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(stream: int, positions: Tensor, columns: Tensor) -> Tensor:
    """(position, column) standard normal numbers, each a function of (stream, position, column) alone.

    Counter-based, so that a decoding step draws what the whole sequence would have drawn there: splitmix64's finaliser
    (Steele, Lea and Flood 2014) on the counter, then Box and Muller.
    """
    counter = (positions.long()[:, None] << 24) + columns.long()[None, :]
    first, second = (_mix(_mix(counter + salt) + stream) for salt in (0x1234567, 0x89ABCDE))
    uniform = [((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53 for bits in (first, second)]
    return torch.sqrt(-2.0 * torch.log1p(-uniform[0])) * torch.cos(2.0 * torch.pi * uniform[1])


def _mix(x: Tensor) -> Tensor:
    """splitmix64 on int64 lanes; shifts are made logical by masking the sign's copies."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))
