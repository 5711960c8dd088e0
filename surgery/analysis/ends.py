"""Heads by name, as people give them; the ends of a path: heads that send, and heads' inputs that receive."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.anatomy import Anatomy
from surgery.errors import NoMatchError, SpecError, describe

LOGITS = "logits"
SITES = {"q": "rot_q", "k": "rot_k", "v": "v"}
"""Where a receiver's inputs are replaced: as they enter the dot product and the weighted sum, each query head's own."""

Head = tuple[str, int]
Input = tuple[str, int, str]
"""An address, a head, and "q", "k" or "v"."""


@dataclass(frozen=True)
class Receiver:
    """A head's inputs, or several that are patched together. No inputs: the logits."""

    inputs: tuple[Input, ...]

    @property
    def label(self) -> str:
        return " + ".join(f"{address} head {head} {what}" for address, head, what in self.inputs) or LOGITS


def pairs_of(given: Any, what: str, others: str = "") -> list[tuple[str | int, int]]:
    """(layer or address, head) pairs, numbers of numpy and whole floats, as frames have them, as int.

    others: what might have been given instead, in words. Raises SpecError for anything else, and for none.
    """
    pairs = [] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not pairs or not all(map(_is_pair, pairs)):
        expected, do = f"{others}(layer or address, head) pairs", "For example [(0, 3), ('self.1', 2)]."
        raise SpecError(describe(what, repr(given), expected, do))
    return [(address if isinstance(address, str) else int(address), int(head)) for address, head in pairs]


def _is_pair(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return False
    address, head = value
    return (isinstance(address, str) or _is_whole(address)) and _is_whole(head)


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | np.integer) or (isinstance(number, float) and number.is_integer())


def senders_of(senders: Any, anatomy: Anatomy) -> list[Head]:
    """Heads in the order of the model. Raises SpecError, or NoMatchError for heads that there are not."""
    if isinstance(senders, str) and senders == "all":
        return [(attention.address, head) for attention in anatomy for head in range(attention.heads)]
    given = [senders] if isinstance(senders, tuple) and len(senders) == 2 and isinstance(senders[1], int) else senders
    found = [_head(address, head, anatomy, "senders") for address, head in pairs_of(given, "senders", "'all', or ")]
    places = {attention.address: number for number, attention in enumerate(anatomy)}
    return sorted(dict.fromkeys(found), key=lambda one: (places[one[0]], one[1]))


def receivers_of(receivers: Any, anatomy: Anatomy) -> list[Receiver]:
    """Each receiver once, in the order given. Raises SpecError, or NoMatchError for heads that there are not."""
    given = [receivers] if _is_one(receivers) else receivers
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise _wrong(receivers)
    return list(dict.fromkeys(_receiver(one, anatomy) for one in given))


def _receiver(one: Any, anatomy: Anatomy) -> Receiver:
    if one == LOGITS:
        return Receiver(())
    parts = [one] if _is_one(one) else one
    if not isinstance(parts, Sequence) or not parts or not all(_is_one(part) and part != LOGITS for part in parts):
        raise _wrong(one)
    return Receiver(tuple(dict.fromkeys((*_head(a, head, anatomy, "receivers"), what) for a, head, what in parts)))


def _is_one(value: Any) -> bool:
    """Whether it is "logits" or (layer or address, head, "q" | "k" | "v")."""
    if isinstance(value, str):
        return value == LOGITS
    return isinstance(value, Sequence) and len(value) == 3 and isinstance(value[2], str) and value[2] in SITES


def _wrong(found: Any) -> SpecError:
    expected = "'logits', (layer or address, head, 'q' | 'k' | 'v'), or a list of these"
    return SpecError(describe("receivers", repr(found), expected, "For example [(1, 3, 'k'), 'logits']."))


def _head(address: str | int, head: Any, anatomy: Anatomy, what: str) -> Head:
    attention = anatomy[address]
    number = operator.index(head) if hasattr(head, "__index__") else -1  # numbers of numpy, as frames have them, too
    if not 0 <= number < attention.heads:
        do = "Heads count from 0."
        raise NoMatchError(describe(what, f"head {head!r} of {attention.address}", f"0 to {attention.heads - 1}", do))
    return attention.address, number
