"""One attention pattern on its axes: from which token to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize

from surgery.plots.style import ATTENTION, plain, ticks

UNIT = Normalize(0, 1)


def draw_pattern(
    axes: Axes,
    pattern: np.ndarray,
    title: str,
    tokens: Sequence[str] = (),
    divider: int | None = None,
    color: str = "#b0b0b0",
    *,
    norm: Normalize = UNIT,
    colormap: Colormap = ATTENTION,
    most: int = 40,
    sources: Sequence[str] | None = None,
) -> Any:
    """Draws a pattern (query, key). tokens: labels of the queries; sources: of the keys, by default the same.

    divider: a line before this position. color: of title and frame. most: labels on an axis. Returns the image, for a bar.
    """
    image = axes.imshow(pattern, norm=norm, cmap=colormap, interpolation="nearest")
    is_plain = color == "#b0b0b0"
    axes.set_title(title, fontsize=11, color="#222222" if is_plain else color, fontweight="normal" if is_plain else "bold")
    axes.set_xlabel("attends to")
    axes.set_ylabel("from token")
    if divider is not None:
        axes.axhline(divider - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.axvline(divider - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
    rows = list(tokens) or [str(i) for i in range(pattern.shape[0])]
    columns = list(sources if sources is not None else tokens) or [str(i) for i in range(pattern.shape[1])]
    axes.set_xticks(*ticks(columns, most), rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(*ticks(rows, most), fontsize=7, parse_math=False)
    plain(axes)
    if not is_plain:
        for spine in axes.spines.values():
            spine.set(visible=True, edgecolor=color, linewidth=2.0)
    return image
