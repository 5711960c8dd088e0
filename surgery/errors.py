"""The exceptions of the package. Every message names what failed and where, what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class SurgeryError(Exception):
    """Base of every error that this package raises on purpose."""


class UnsupportedArchitectureError(SurgeryError, NotImplementedError):
    """A module computes attention in a way that cannot be derived and that no file in `patches/` describes."""


class NoMatchError(SurgeryError, ValueError):
    """A selection (layers, heads, sites, addresses) matches nothing in this model."""


class SpecError(SurgeryError, ValueError):
    """A spec is wrong in itself, or does not fit the model that it is applied to."""


class MaskError(SurgeryError, ValueError):
    """An attention mask arrived in a format that has no exact additive equivalent."""


class CacheError(SurgeryError, RuntimeError):
    """A KV cache was filled under another spec, or an edit is not defined step by step."""


class PatchError(SurgeryError, RuntimeError):
    """The model is not in the state that patching or unpatching needs (replaced forward, foreign class)."""


class ParityError(SurgeryError, RuntimeError):
    """A reconstruction, or a patched model, does not give the numbers that it must give."""


class ExportError(SurgeryError, RuntimeError):
    """A checkpoint or program cannot be written as asked, or its files are not what was written."""


class NotFiredWarning(UserWarning):
    """An edit or a capture was planned but never executed during a forward pass."""


LONGEST = 400
"""Characters of what was found that a message shows."""


def closest(word: Any, known: Iterable[str]) -> str:
    """A hint at the known word that somebody may have meant, or nothing."""
    found = get_close_matches(str(word), list(known), 1)
    return f"Did you mean {found[0]!r}? " if found else ""


def describe(what: str, found: str, expected: str, do: str) -> str:
    """One message of the four parts that every error of this package has. A value of a thousand entries is cut short."""
    if len(found) > LONGEST:
        found = f"{found[:LONGEST]}... ({len(found):,} characters)"
    return f"{what}: found {found}; expected {expected}. {do}"


def listing(title: str, problems: Iterable[str]) -> str:
    """Several problems under one title, one line each."""
    problems = list(problems)
    if len(problems) == 1:
        return f"{title}: {problems[0]}"
    return "\n".join([f"{title}: {len(problems)} problems", *(f"  {i}. {p}" for i, p in enumerate(problems, 1))])
