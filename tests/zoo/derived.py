"""The derived weights against what the heads compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.anatomy import Anatomy, Attention
from surgery.errors import UnsupportedArchitectureError
from surgery.weights import head_weights
from zoo.case import Case
from zoo.circuits import CLOSE, one_of_each
from zoo.compare import gap
from zoo.outcome import Outcome
from zoo.points import look


def check_weights(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """x @ W_Q + b_Q is q, likewise k and v; z @ W_O is result, and the heads' results add up to the projection's output."""
    for attention in one_of_each(case, anatomy):
        name = f"{attention.address} ({attention.class_name})"
        read = _Read(case, attention)
        weights = head_weights(case.model, attention.address)
        for site in ("q", "k", "v"):
            try:
                matrix, bias = getattr(weights, f"W_{site.upper()}"), getattr(weights, f"b_{site.upper()}")
            except UnsupportedArchitectureError as error:
                outcome.counts[f"no W_{site.upper()}"] += 1
                outcome.note(f"{attention.class_name}: {' '.join(str(error).split())[:160]}")
                continue
            x = read.inputs[attention.projections[site].path]
            expected = x.reshape(-1, 1, *x.shape[-2:]) @ matrix + (0 if bias is None else bias[:, None])
            _compare(f"W_{site.upper()}", site, expected, read, name, outcome)
        _check_output(attention, weights, read, name, outcome)


def _compare(weight: str, site: str, expected: Tensor, read: _Read, name: str, outcome: Outcome) -> None:
    found = read.seen.get(site)
    if found is None:
        return
    size = _gap_of_rows(found, expected.detach())
    if size <= CLOSE:
        outcome.counts[f"{weight} equal"] += 1
    else:
        outcome.fail("weights", f"{weight} at {name}: x @ W + b and {site} differ by {size:.3g}")


def _gap_of_rows(found: Tensor, expected: Tensor) -> float:
    """The gap up to the order of rows: windows and frames may be cut out of the batch, or positions come before the batch."""
    direct = gap(found, expected)
    rows, others = (t.transpose(0, 1).flatten(1, 2) for t in (found, expected))
    if direct <= CLOSE or rows.shape[0] != others.shape[0] or rows.shape[2] != others.shape[2]:
        return direct
    if rows.shape[1] == others.shape[1]:
        # As they are: a grid of positions has the order of the sequence.
        return min(
            direct, gap(rows, others), gap(*(t.gather(1, t[..., :1].argsort(dim=1).expand_as(t)) for t in (rows, others)))
        )
    # Padding of windows, prefixes and caches add rows: every row of the projection must be among those seen.
    nearest = torch.cdist(others.double(), rows.double()).amin(dim=-1)
    return min(direct, float(nearest.max() / others.abs().max().clamp_min(1e-12)))


class _Read:
    """What an attention's projections read and gave in one forward, and its captured sites."""

    def __init__(self, case: Case, attention: Attention) -> None:
        self.case, self.attention = case, attention
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        handles = []
        for path in {p.path for p in attention.projections.values()}:

            def hook(module: Any, args: Any, output: Any, path: str = path) -> None:
                self.inputs.setdefault(path, args[0].detach())
                self.outputs.setdefault(path, (output[0] if isinstance(output, tuple) else output).detach())

            handles.append(case.model.get_submodule(path).register_forward_hook(hook))
        try:
            with case.patched():
                seen, _ = look(case, [attention], ("q", "k", "v", "z", "result"), joined=True)
        finally:
            for handle in handles:
                handle.remove()
        self.seen = seen[attention.address]


def _check_output(attention: Attention, weights: Any, read: _Read, name: str, outcome: Outcome) -> None:
    try:
        matrix, bias = weights.W_O, weights.b_O
    except UnsupportedArchitectureError as error:
        outcome.counts["no W_O"] += 1
        outcome.note(f"{attention.class_name}: {' '.join(str(error).split())[:160]}")
        return
    projection = attention.projections["o"]
    x, result = read.inputs[projection.path], read.seen["result"]
    z = x.reshape(-1, *x.shape[-2:])[..., projection.channels].transpose(1, 2)
    if (size := _gap_of_rows(result, (z @ matrix).detach())) > CLOSE:
        outcome.fail("weights", f"W_O at {name}: z @ W_O and result differ by {size:.3g}")
    total = result.sum(dim=1) + (0 if bias is None else bias.detach())
    output = read.outputs[projection.path]
    if (size := _gap_of_rows(total[:, None], output.reshape(-1, 1, *output.shape[-2:]))) > CLOSE:
        outcome.fail("weights", f"W_O at {name}: the heads' results and the output differ by {size:.3g}")
    if _gap_of_rows(read.seen["z"], z) > CLOSE:
        outcome.note(f"{attention.class_name}: z is changed before the output projection (a gate, a norm)")
    outcome.counts["W_O equal"] += 1
