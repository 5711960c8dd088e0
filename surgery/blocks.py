"""Other cuts for other rows of one batch: a batch of equal blocks, each computed as if it were alone under its own spec."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from surgery.errors import SpecError, describe
from surgery.spec import Spec


class Blocks(Spec):
    """The batch is cut into len(specs) equal blocks of rows, in order; the i-th has the cuts of specs[i] and no others.

    For sweeps: one forward of many copies of a batch in place of many forwards. An edit that looks at the batch (a mean of
    current activations, resampling) sees its own block alone. It is a spec for `patch_model`, and cannot be saved.
    """

    def __init__(self, specs: Sequence[Spec]) -> None:
        self.specs = tuple(specs)
        if not self.specs:
            raise SpecError(describe("Blocks", "no specs", "one for each block of the batch", "Pass at least one."))
        super().__init__([cut for spec in self.specs for cut in spec])
        self._numbers = [number for number, spec in enumerate(self.specs) for _ in spec]

    def block_of(self, number: int) -> tuple[int, int]:
        """The block that a cut belongs to, and how many there are."""
        return self._numbers[number], len(self.specs)

    def fingerprint(self) -> str:
        if not len(self):
            return ""
        return hashlib.sha256("/".join(spec.fingerprint() for spec in self.specs).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and self.specs == other.specs

    def __hash__(self) -> int:
        return hash(self.specs)

    def __add__(self, other: Any) -> Spec:
        raise SpecError(describe("Blocks", "a sum with other cuts", "the specs of all blocks", "Add to each spec."))

    __radd__ = __add__

    def __repr__(self) -> str:
        return f"Blocks([{', '.join(map(repr, self.specs))}])"

    def __str__(self) -> str:
        return "\n".join(f"block {number}:\n{spec}" for number, spec in enumerate(self.specs))

    def _content(self, strict: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if strict:
            raise SpecError(describe("Blocks", "cuts of blocks of a batch", "one spec", "Save the specs one by one."))
        return super()._content()
