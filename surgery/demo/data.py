"""Random token sequences that repeat, for training and probing in-context copying (induction).

A sequence is a beginning-of-sequence (BOS) token, a random segment, and that segment once more::

    index    0    1  2  ...  segment    segment+1 ...  2*segment
    token   BOS   A  B  ...     Z           A     ...      Z

All tokens of a segment differ, so that in the second copy the token after the one just read is determined
by the first copy. Nothing about it can be known from the tokens alone: segments are uniformly random. Nor is
there a fixed distance to look back if the segment length varies between sequences. What remains is the
induction circuit: a head that writes the previous token into each position, then a head that looks for
the position whose previous token is the current one, and copies what it finds there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.analysis.repeats import distinct

BOS_TOKEN_ID = 0


def repeated_sequences(batch: int, segment: int, vocab: int, seed: int | torch.Generator, *, bos: int = BOS_TOKEN_ID) -> Tensor:
    """Draw sequences of a BOS token and a random segment written twice.

    Args:
        batch: number of sequences.
        segment: tokens in one copy of the segment, at most `vocab - 1`.
        vocab: vocabulary size, BOS included. Segments draw from all ids below `vocab` but `bos`.
        seed: an integer (the same integer gives the same tokens), or a CPU generator to go on drawing from.
        bos: id of the BOS token.

    Returns:
        Token ids, int64 of shape (batch, 1 + 2 * segment). Each segment is drawn without replacement, so
        that every token of it has one earlier occurrence in the second copy, not several.
    """
    return mixed_sequences(batch, segment, segment, vocab, seed, bos=bos)[0]


def mixed_sequences(
    batch: int,
    min_segment: int,
    max_segment: int,
    vocab: int,
    seed: int | torch.Generator,
    *,
    bos: int = BOS_TOKEN_ID,
) -> tuple[Tensor, Tensor]:
    """Draw repeated sequences whose segment length is random for each sequence.

    Args:
        batch: number of sequences.
        min_segment: shortest segment, in tokens.
        max_segment: longest segment, in tokens (inclusive), at most `vocab - 1`.
        vocab: vocabulary size, BOS included.
        seed: an integer, or a CPU generator to go on drawing from.
        bos: id of the BOS token.

    Returns:
        ids: int64 of shape (batch, 1 + 2 * max_segment). Behind its second copy a shorter sequence is filled
            with BOS on the right, where a causal model's earlier positions cannot see it.
        lengths: int64 of shape (batch,), the tokens in one copy of each sequence's segment.
    """
    if not 1 <= min_segment <= max_segment <= vocab - 1:
        raise ValueError(
            f"need 1 <= min_segment <= max_segment <= vocab - 1, got {min_segment}, {max_segment} and vocab {vocab}"
        )
    if not 0 <= bos < vocab:
        raise ValueError(f"bos must be an id below vocab ({vocab}), got {bos}")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    lengths = torch.randint(min_segment, max_segment + 1, (batch,), generator=generator)
    segments = distinct(batch, max_segment, vocab - 1, generator)
    segments = segments + (segments >= bos).long()  # skip the BOS id
    offsets = torch.arange(2 * max_segment)
    copies = segments.gather(1, offsets % lengths[:, None])
    copies = copies.masked_fill(offsets >= 2 * lengths[:, None], bos)
    return torch.cat([torch.full((batch, 1), bos), copies], dim=1), lengths


def scored_positions(segment: int) -> Tensor:
    """Positions whose next-token prediction the first copy determines.

    The logits at position t predict the token at t + 1. Position `segment` (the end of the first copy) is
    left out, as nothing tells the model that the segment ends there; so is the last one, which has no next token.

    Args:
        segment: tokens in one copy of the segment.

    Returns:
        int64 of shape (segment - 1,): the positions segment + 1 ... 2 * segment - 1.
    """
    return torch.arange(segment + 1, 2 * segment)


def first_copy_positions(segment: int) -> Tensor:
    """Positions whose next token is a fresh random one: 0 ... segment - 1, int64 of shape (segment,)."""
    return torch.arange(segment)


def induction_sources(segment: int) -> Tensor:
    """Where an induction head looks from each of `scored_positions(segment)`.

    From position t in the second copy, the token read at t stood at t - segment before; the position after
    that holds the token to be copied.

    Returns:
        int64 of shape (segment - 1,): the positions 2 ... segment, that is t - segment + 1.
    """
    return scored_positions(segment) - segment + 1
