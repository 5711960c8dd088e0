"""The intervention points of one attention module: their names, shapes and order.

Axis letters: head (query heads), kv_head (key/value heads; query head h reads kv head h // group_size), query and key
(positions), d_head, d_model. Shapes are those of `surgery.capture`; an edit sees the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Circuit = Literal["qk", "ov"]


@dataclass(frozen=True)
class Site:
    """One point. `where` says which code reaches it: a projection's output, the core, or the output projection.

    projection: the one that it is at, where it is at one; instead: the site to use where that projection is not derived.
    """

    name: str
    circuit: Circuit
    axes: tuple[str, str, str, str]
    where: Literal["projection", "core", "output"]
    meaning: str
    projection: Literal["q", "k", "o"] | None = None
    instead: str = ""

    @property
    def is_matrix(self) -> bool:
        """Whether the point exists only when the attention matrix is computed (scores, pattern)."""
        return self.axes[-1] == "key"

    @property
    def over_keys(self) -> bool:
        """Whether its third axis counts key positions; otherwise it counts query positions."""
        return self.axes[2] == "key"


def _site(name: str, circuit: Circuit, axes: str, where: Any, meaning: str, projection: Any = None, instead: str = "") -> Site:
    first, second, third, fourth = axes.split()
    return Site(name, circuit, (first, second, third, fourth), where, meaning, projection, instead)


# In order of computation. Two edits at one site act in the order of the spec; edits at different sites in this order.
SITES: dict[str, Site] = {
    site.name: site
    for site in (
        _site(
            "q",
            "qk",
            "batch head query d_head",
            "projection",
            "output of the q projection, before norm and positions",
            "q",
            "rot_q",
        ),
        _site(
            "k",
            "qk",
            "batch kv_head key d_head",
            "projection",
            "output of the k projection, before norm and positions",
            "k",
            "rot_k",
        ),
        _site("rot_q", "qk", "batch head query d_head", "core", "q as it enters the dot product: after norm and positions"),
        _site("rot_k", "qk", "batch head key d_head", "core", "k as each query head reads it: after norm, positions, cache"),
        _site("v", "ov", "batch kv_head key d_head", "core", "values as they enter the weighted sum, cache included"),
        _site("scores", "qk", "batch head query key", "core", "scaled, capped and masked, before softmax"),
        _site("pattern", "qk", "batch head query key", "core", "after softmax, before dropout"),
        _site("z", "ov", "batch head query d_head", "core", "pattern @ v"),
        _site("result", "ov", "batch head query d_model", "output", "what the head adds to the output: z @ W_O", "o", "z"),
    )
}

CORE_SITES = tuple(name for name, site in SITES.items() if site.where == "core")
PROJECTION_SITES = {name: site.projection for name, site in SITES.items() if site.projection is not None}
MATRIX_SITES = tuple(name for name, site in SITES.items() if site.is_matrix)
