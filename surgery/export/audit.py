"""What an exported folder computes: with its cuts, without them, and beside the model that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.evaluation import evaluating
from surgery.export import document
from surgery.export.fresh import difference
from surgery.export.inputs import example_inputs, output_of, without_padding
from surgery.export.load import implementation_of, load_checkpoint
from surgery.patch import patched, unpatch_model
from surgery.pretrained import load_any


@dataclass(frozen=True)
class Row:
    """Two outputs on the same inputs, in words, and how they differ (see Comparison).

    must_equal: whether they have to be equal bit for bit, or are as different as the cuts make them.
    """

    compared: str
    difference: float
    relative: float
    changed: int
    positions: int
    must_equal: bool


@dataclass(frozen=True)
class Audit:
    """cuts: that loading applies; baked: those in the weights; both in words. notes: what is no fault but worth a look.

    changed_weights: the names of those that the original has not, or has with other values (None: there was no original).
    problems: what makes the folder something else than it claims to be; none if all is well.
    """

    cuts: tuple[str, ...]
    baked: tuple[str, ...]
    rows: tuple[Row, ...]
    changed_weights: tuple[str, ...] | None
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def audit(
    folder: str | Path,
    original: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Audit:
    """Loads an exported folder, and the model that it was made from if that is named, and compares them on one forward.

    inputs: of forward; random tokens if None. Raises ExportError for damaged files or inputs that must be given, SpecError if
    the surgery does not fit the weights.
    """
    found, spec = document.read(folder)
    problems = [f"since the export, {text}" for text in document.changed_files(folder, found)]
    model = load_checkpoint(folder, trust_remote_code=trust_remote_code).to(device).eval()
    given = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in example_inputs(model, inputs, spec).items()}
    rows, notes = [], []
    changed: tuple[str, ...] | None = None

    def output(of: Any) -> Tensor:
        with evaluating(of):
            return without_padding(output_of(of, given), given)

    def row(what: str, mine: Tensor, other: Tensor, must_equal: bool) -> None:
        if mine.shape != other.shape:
            problems.append(f"{what}: outputs of shapes {tuple(mine.shape)} and {tuple(other.shape)}")
            return
        found = difference(mine, other, "this package")
        rows.append(Row(what, found.difference, found.relative, found.changed, found.positions, must_equal))
        if must_equal and not torch.equal(mine.nan_to_num(), other.nan_to_num()):
            problems.append(f"{what}: they must be equal, and differ by {found.difference:.3g}")

    with_cuts = output(model)
    with patched(model, kernel=found.kernel, strict=False):
        without = output(model)
    unpatch_model(model)
    plain = output(model)
    # Where the reconstruction is asked for by name, it is the eager function's, in another order of sums.
    row("patched without cuts, beside plain transformers", without, plain, found.kernel == "auto")
    if len(spec):
        row("with the cuts, beside without them", with_cuts, without, False)
        if rows[-1].difference == 0:
            notes.append("the cuts change nothing on these inputs; those at certain positions may need longer ones (--inputs)")
    if original is not None:
        source = load_any(original, trust_remote_code=trust_remote_code, dtype=model.dtype)
        source.set_attn_implementation(implementation_of(found.implementation))
        _as_cast(source.to(device), model)
        first = output(source)
        if not found.baked:
            row("without the cuts, beside the original", plain, first, True)
        row("with all cuts, beside the original", with_cuts, first, False)
        changed = _changed(model.state_dict(), source.state_dict())
        if changed and not found.baked:
            problems.append(f"{len(changed)} weights are not the original's, and nothing is folded into them: {changed[0]}, ..")
    cuts, baked = tuple(map(str, spec)), tuple(found.baked)
    return Audit(cuts, baked, tuple(rows), changed, tuple(notes), tuple(problems))


def _as_cast(source: Any, model: Any) -> None:
    """Gives the tensors of a model the types that those of another have by the same names: it was cast after loading."""
    types = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in (*source.named_parameters(), *source.named_buffers()):
        if tensor.is_floating_point() and types.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(types[name])


def _changed(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of tensors that only one of two state dicts has, or that differ."""
    both = set(mine) & set(theirs)
    same = {n for n in both if mine[n].shape == theirs[n].shape and torch.equal(mine[n], theirs[n])}
    return tuple(sorted((set(mine) | set(theirs)) - same))
