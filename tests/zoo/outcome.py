"""What the checks of one model type found, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Kind:
    """Attentions of a model that are alike. how: where the reconstruction comes from; missing: why a site does not exist."""

    name: str
    heads: int
    kv_heads: int
    how: str
    missing: dict[str, str]
    count: int = 0


@dataclass
class Outcome:
    """status: "patched", "no attention", "refused" (all of it), "unbuildable" or "failed" (to be built or run).

    refused, others: class to reason; others are modules with a softmax that is no attention. passed: checks that held;
    skipped: check to why it does not apply; failures: check to what was found. notes: what is true and worth knowing.
    """

    model_type: str
    kind: str
    architecture: str = ""
    status: str = "patched"
    reason: str = ""
    attentions: list[Kind] = field(default_factory=list)
    idle: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def fail(self, check: str, text: str) -> None:
        self.failures.setdefault(check, []).append(" ".join(text.split())[:400])

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def message(self) -> str:
        """All failures, one a line."""
        lines = [f"  {check}: {text}" for check, texts in self.failures.items() for text in texts]
        return "\n".join([f"{self.model_type} ({self.architecture}): {len(lines)} failures", *lines])

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "counts": dict(self.counts)}


class NotApplicable(Exception):
    """A check does not apply to a model, for the reason given."""
