"""Scores of single samples for tests: how much each meets the other task, beside the samples of a control task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from surgery.analysis.interference.gradients import Gradients
from surgery.analysis.interference.kernels import kernel_of
from surgery.analysis.interference.walk import MEMORY_MIB, RHO, Walk


def sample_scores(
    a: Gradients,
    b: Gradients,
    control: Gradients | None,
    fisher: Any = None,
    kernel: str = "qkov",
    *,
    rho: float = RHO,
    memory_mib: float = MEMORY_MIB,
    device: Any = "cpu",
    progress: bool = False,
) -> tuple[list[tuple[str, str, int]], dict[str, np.ndarray]]:
    """Hypotheses, and by name (sample, hypothesis) float64 means over the other task; of samples of length one.

    "rows_a", "rows_n": of samples of A and of the control as the disturbed ones, over B. "columns_b", "columns_n": of
    samples of B and of the control as the disturbing ones, over A. Without a control only "rows_a" and "columns_b".
    fisher=None pools all samples: a reference that knew A and B, but not the control, would tell the control from them.
    """
    chosen = kernel_of(kernel)
    tasks = [a, b] if control is None else [a, b, control]
    walk = Walk(
        tasks,
        fisher,
        rho=rho,
        is_unit=True,
        needs_fisher=chosen.needs_fisher,
        memory_mib=memory_mib,
        device=device,
        progress=progress,
    )
    numbers = {hypothesis: number for number, hypothesis in enumerate(walk.hypotheses)}
    sizes = {"rows_a": len(a), "columns_b": len(b)} | (
        {} if control is None else dict.fromkeys(("rows_n", "columns_n"), len(control))
    )
    found = {name: torch.zeros(size, len(numbers), dtype=torch.float64) for name, size in sizes.items()}
    for stretch in walk:
        number = numbers[stretch.block.address, stretch.block.name, stretch.head]
        disturbed = {"a": stretch.gradients[0]} | ({} if control is None else {"n": stretch.gradients[2]})
        disturbing = {"b": stretch.gradients[1]} | ({} if control is None else {"n": stretch.gradients[2]})
        rows = {f"rows_{name}": chosen.left(g, stretch.fisher) for name, g in disturbed.items()}
        columns = {f"columns_{name}": chosen.right(g, g, stretch.fisher) for name, g in disturbing.items()}
        of_a, of_b = rows["rows_a"].mean(0), columns["columns_b"].mean(0)
        parts = {name: left @ of_b for name, left in rows.items()} | {name: right @ of_a for name, right in columns.items()}
        for name, part in parts.items():
            found[name][:, number] += part.cpu().double() * stretch.unit**chosen.degree
    return walk.hypotheses, {name: scores.numpy() for name, scores in found.items()}
