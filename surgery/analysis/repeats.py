"""Sequences that say everything twice: what a model does in the second copy, it does from its context alone.

Induction and duplicate-token heads show themselves on random tokens said twice (Olsson et al. 2022, In-context Learning and
Induction Heads, https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads/index.html).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError, describe
from surgery.vocabulary import vocabulary_of

SEGMENT = 24
"""Tokens in one copy, unless told otherwise."""
LEAST_SEGMENT = 4


@dataclass(frozen=True, eq=False)
class Copies:
    """Sequences of any tokens that say everything twice, or more often where a segment is shorter than another's.

    ids: (sequence, start + 2 * longest segment); lengths: (sequence,), tokens in one copy; start: tokens before the first
    copy, 1 (BOS) or 0.
    """

    ids: Tensor
    lengths: Tensor
    start: int

    @classmethod
    def of(cls, segments: Tensor, bos: int | None, lengths: Tensor | None = None) -> Copies:
        """Repeats the first `lengths` (sequence,) tokens of segments (sequence, longest), behind BOS unless it is None."""
        rows, longest = segments.shape
        lengths = torch.full((rows,), longest) if lengths is None else lengths
        copies = segments.gather(1, torch.arange(2 * longest) % lengths[:, None])
        before = [] if bos is None else [torch.full((rows, 1), bos)]
        return cls(torch.cat([*before, copies], dim=1), lengths, len(before))

    @property
    def scored(self) -> Tensor:
        """Where the first copy determines the next token of the second, (sequence, position) bool: not at its last token."""
        copied = torch.arange(self.ids.shape[1]) - self.start - self.lengths[:, None]  # position within the second copy
        return (copied >= 0) & (copied < self.lengths[:, None] - 1)

    def repeated(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sequence, query, key) of every scored query and the key behind its token's first occurrence: induction."""
        rows, queries = self.scored.nonzero(as_tuple=True)
        return rows, queries, queries - self.lengths[rows] + 1

    def previous(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sequence, query, key) of every query and the key before it."""
        rows, keys = torch.ones_like(self.ids[:, 1:]).nonzero(as_tuple=True)
        return rows, keys + 1, keys

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What the model takes."""
        ids = self.ids.to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def reversed(self) -> Tensor:
        """ids with the first copy said backwards: what followed a token there is now what stood before it."""
        place = torch.arange(self.ids.shape[1]) - self.start
        lengths = self.lengths[:, None]
        is_first = (place >= 0) & (place < lengths)
        return self.ids.gather(1, torch.where(is_first, lengths - 1 - place, place) + self.start)

    def rows(self, number: int) -> Copies:
        """The first so many sequences."""
        return Copies(self.ids[:number], self.lengths[:number], self.start)

    def shortened(self, length: int) -> Copies:
        """The first sequence alone, with at most so many tokens in a copy."""
        length = min(length, int(self.lengths[0]))
        first = self.ids[:1, self.start : self.start + length]
        return Copies(torch.cat([self.ids[:1, : self.start], first, first], dim=1), torch.tensor([length]), self.start)


def random_copies(model: nn.Module, batch: int, segment: int | None = None, seed: int = 0, tokenizer: Any = None) -> Copies:
    """Sequences of a segment of random tokens written twice, behind the model's BOS token if it has one.

    The tokens of a segment are distinct, of the whole vocabulary, special ones left out. segment: tokens in one copy, by
    default 24 or what fits. Raises SurgeryError for a model without room for two copies.
    """
    tokens, bos = usable_tokens(model, tokenizer), bos_of(model, tokenizer)
    segment = fitting_segment(model, segment, type(model).__name__, bos, len(tokens))
    segments = distinct(batch, segment, len(tokens), torch.Generator().manual_seed(seed))
    return Copies.of(tokens[segments], bos)


def distinct(batch: int, count: int, of: int, generator: torch.Generator) -> Tensor:
    """(batch, count): numbers below `of`, in each row all different, any order and choice alike likely."""
    # Ranking random numbers gives one permutation per row; its head is a draw without replacement.
    return torch.rand(batch, of, generator=generator).argsort(dim=1)[:, :count]


def bos_of(model: nn.Module, tokenizer: Any = None) -> int | None:
    """The token that a sequence begins with, or None."""
    found = getattr(_config(model) if tokenizer is None else tokenizer, "bos_token_id", None)
    found = found[0] if isinstance(found, list) else found
    # A small model often keeps its family's default, which lies beyond its own vocabulary.
    return found if found is not None and found < _vocabulary(model) else None


def usable_tokens(model: nn.Module, tokenizer: Any = None) -> Tensor:
    """The tokens of the vocabulary, without special ones."""
    vocabulary = _vocabulary(model)
    if tokenizer is None:
        tokens = (getattr(_config(model), f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        special = {i for token in tokens for i in (token if isinstance(token, list) else [token])}
    else:
        vocabulary, special = min(vocabulary, len(tokenizer)), set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(vocabulary) if i not in special], dtype=torch.long)


def fitting_segment(model: nn.Module, segment: int | None, name: str, bos: int | None, tokens: int | None = None) -> int:
    """A segment of which two copies fit into the model's positions, of no more than so many tokens. Raises SurgeryError."""
    positions = getattr(_config(model), "max_position_embeddings", None)
    limits = {} if tokens is None else {f"{tokens} tokens in the vocabulary": tokens}
    if positions is not None and positions > 0:  # -1 stands for any number
        limits[f"two copies within {positions} positions"] = (positions - (bos is not None)) // 2
    most = min(limits.values(), default=SEGMENT if segment is None else segment)
    if segment is None:
        segment = min(SEGMENT, most)
    if not LEAST_SEGMENT <= segment <= most:
        expected = f"{LEAST_SEGMENT} to {most} ({name} has room for {' and '.join(limits) or 'any number'})"
        raise SurgeryError(describe("segment", f"{segment} tokens", expected, "Pass such a segment."))
    return segment


def _config(model: Any) -> Any:
    """The configuration of the text model."""
    return model.config.get_text_config()


def _vocabulary(model: Any) -> int:
    size = vocabulary_of(model) or getattr(_config(model), "vocab_size", None)
    if size is None:
        do = "Pass inputs of your own: it cannot read random tokens."
        raise SurgeryError(describe(type(model).__name__, "no vocabulary", "a model that reads tokens", do))
    return int(size)
