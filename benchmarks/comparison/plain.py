"""transformers' own attention implementations, without any surgery."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from benchmarks.comparison.way import Way


class Sdpa(Way):
    """What everything else is measured over."""

    name, key = "unpatched sdpa", "sdpa"


class Eager(Way):
    name, key, implementation = "unpatched eager", "eager", "eager"
    whole_layers = math.inf

    def patterns(self, heads: Sequence[int] | None) -> list[Tensor]:
        found = self.model(self.task.ids, output_attentions=True, use_cache=False).attentions
        return list(found) if heads is None else [pattern[:, list(heads)] for pattern in found]


class Flex(Way):
    """transformers compiles it on the first call."""

    name, key, implementation = "unpatched flex", "flex", "flex_attention"
