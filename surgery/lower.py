"""From a spec and a model's anatomy to a plan for each module: checked entirely, then cut at the cheapest exact place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy import HERE, Anatomy, Attention, grouped, summary
from surgery.errors import NoMatchError, SpecError, describe, listing
from surgery.interventions import Operation
from surgery.plan import Plan
from surgery.reference import ANY
from surgery.sites import SITES
from surgery.spec import Edit, Spec

# An edit to zero at these sites computes the same as z = 0, forward and backward, and z = 0 leaves the kernel in place.
# Not so at result where a norm lies between z and W_O.
_SAME_AS_ZERO_Z = ("v", "pattern")


@dataclass(frozen=True)
class Placement:
    """A cut as one edit at one attention; `number` counts the spec's cuts from 0."""

    number: int
    edit: Edit
    attention: Attention


def lower(
    spec: Spec, anatomy: Anatomy, on_meta: bool = False, probed: Mapping[str, Collection[str]] | None = None
) -> dict[str, Plan]:
    """A plan for every attention that the spec concerns, by address.

    on_meta: the model has no data. probed: sites that are watched, by address, so that cuts there stay where they are written.
    Raises SpecError (or NoMatchError if only selections fail), listing every problem of the whole spec.
    """
    problems: list[str] = []
    failures: list[str] = []
    placements = []
    for number, cut in enumerate(spec):
        what = f"cut {number} ({cut})"
        if on_meta and cut.needs_data:
            problems.append(
                describe(what, "a model on the meta device", "a model with data", "Load the weights first, or cut to zero.")
            )
        if not on_meta and any(tensor.is_meta for tensor in cut.content()[1].values()):
            problems.append(describe(what, "a tensor on the meta device", "a tensor with data", "Load or compute it first."))
        try:
            selected = anatomy.select(cut.layers, what)
        except NoMatchError as error:
            failures.append(str(error))
            continue
        for attention in selected:
            if missing := _uncovered(attention, cut.layers, anatomy):
                problems.append(
                    describe(
                        what,
                        f"a module {attention.path!r} that the layers {', '.join(attention.addresses)} share",
                        f"all of them; {', '.join(missing)} is not selected",
                        "Cut all layers that share it: they run the same module.",
                    )
                )
            placements += [Placement(number, edit, attention) for edit in cut.edits()]
    plans: dict[str, Plan] = {}
    misfits: list[tuple[Attention, str]] = []
    for placement in placements:
        found = list(_problems(placement, anatomy.fingerprint))
        misfits += [(placement.attention, problem) for problem in found]
        if not found:
            operation = replace(_operation(placement), block=spec.block_of(placement.number))
            plan = plans.setdefault(placement.attention.address, Plan())
            plan.operations.setdefault(operation.site, []).append(operation)
    problems += grouped(misfits)
    if problems or failures:
        kind = SpecError if problems else NoMatchError
        raise kind(listing(f"the spec does not fit {anatomy.model_class}", [*failures, *problems]))
    for address, plan in plans.items():
        _move_zeros(plan, (probed or {}).get(address, ()))
    return plans


def _uncovered(attention: Attention, layers: Any, anatomy: Anatomy) -> list[str]:
    """Addresses of a shared module that a selection leaves out."""
    if layers == "all" or len(attention.addresses) == 1:
        return []
    covered = anatomy.matches(layers)
    return [address for address in attention.addresses if address not in covered]


def _heads(placement: Placement) -> tuple[int, ...]:
    """The selected query heads; the whole group where the kv head is changed for all of it."""
    edit, attention = placement.edit, placement.attention
    heads = range(attention.heads) if edit.heads == "all" else edit.heads
    if edit.gqa == "shared" and edit.site in ("k", "rot_k", "v"):
        groups = {head // attention.group_size for head in heads}
        heads = [head for head in range(attention.heads) if head // attention.group_size in groups]
    return tuple(heads)


def _rows(placement: Placement) -> tuple[int, ...]:
    """The selected heads along the site's own head axis."""
    heads = _heads(placement)
    return tuple(sorted({h // placement.attention.group_size for h in heads})) if placement.edit.site == "k" else heads


def _operation(placement: Placement) -> Operation:
    edit, attention, heads = placement.edit, placement.attention, _rows(placement)
    is_by_group = edit.gqa == "shared" and edit.site != "k"
    noise = tuple(head // attention.group_size for head in heads) if is_by_group else heads
    entry = None if edit.reference is None else edit.reference.find(attention.address, edit.site)
    return Operation(placement.number, edit, edit.site, attention.address, heads, noise, entry)


def _problems(placement: Placement, fingerprint: str) -> list[str]:
    """Everything in which an edit does not fit the attention that it is placed at."""
    edit, attention = placement.edit, placement.attention
    what = f"cut {placement.number} at {HERE}"
    found = []
    if beyond := attention.beyond(edit.heads):
        return [f"cut {placement.number} at {problem}" for problem in beyond]
    found += [f"cut {placement.number} at {problem}" for problem in attention.underived(edit.site)]
    if edit.site == "k" and edit.gqa == "isolated" and attention.group_size > 1 and edit.heads != "all":
        group = attention.group_size
        if any({h // group for h in edit.heads} & {h // group} and h not in edit.heads for h in range(attention.heads)):
            found.append(
                describe(
                    what,
                    f"heads {list(edit.heads)} at k, which groups of {group} heads share",
                    "whole groups, or another site",
                    'Use site "rot_k" (what each head reads), or gqa="shared" (the whole group feels it).',
                )
            )
    if edit.reference is not None:
        found += _reference_problems(placement, what, fingerprint)
    if isinstance(edit.value, Tensor):
        found += _value_problems(placement, what)
    return found


def width_of(attention: Attention, site: str) -> int | None:
    """The length of a site's last axis; None where it is the number of keys."""
    if SITES[site].is_matrix:
        return None
    if site == "result":
        return attention.recording.shapes["output"][-1]
    return attention.d_value if site in ("v", "z") else attention.d_head


def _reference_problems(placement: Placement, what: str, fingerprint: str) -> list[str]:
    edit, attention = placement.edit, placement.attention
    reference, do = edit.reference, "Collect it on this model with surgery.collect_reference or surgery.capture."
    if reference.model is not None and reference.model != fingerprint:
        return [describe(what, f"a reference of {summary(reference.model)}", summary(fingerprint), do)]
    entry = reference.find(attention.address, edit.site)
    if entry is None:
        held = sorted({f"{a} {s}" for a, s in reference if a in (attention.address, ANY)}) or [repr(reference)]
        return [describe(what, f"a reference with {', '.join(held)}", f"{attention.address} {edit.site}", do)]
    found = []
    if edit.action == "noise" and edit.value is None and entry.spread is None:
        found.append(describe(what, "a reference without a spread", "mean and spread", do))
    axis = 1 if reference.kind == "activation" else 0
    heads = attention.kv_heads if edit.site == "k" else attention.heads
    rows = heads if entry.heads is None else len(entry.heads)
    needed = _rows(placement)
    if entry.heads is not None and (missing := [head for head in needed if head not in entry.heads]):
        found.append(describe(what, f"a reference of heads {list(entry.heads)}", f"also heads {missing}", do))
    width = width_of(attention, edit.site)
    shape = tuple(entry.value.shape)
    if shape[axis] != rows or (width is not None and shape[-1] != width):
        d = width if width is not None else "keys"
        expected = f"(batch, {rows}, position, {d})" if axis else f"({rows}, {d}) or ({rows}, position, {d})"
        found.append(describe(what, f"a reference of shape {shape}", expected, do))
    return found


def _value_problems(placement: Placement, what: str) -> list[str]:
    edit, attention = placement.edit, placement.attention
    shape, width = tuple(edit.value.shape), width_of(attention, edit.site)
    heads = len(_rows(placement))
    head_axis = {2: 0, 3: 0, 4: 1}.get(len(shape))
    if width is None and len(shape) == 2:
        head_axis = None
    wrong_width = width is not None and shape and shape[-1] not in (1, width)
    wrong_heads = head_axis is not None and shape[head_axis] not in (1, heads)
    if wrong_width or wrong_heads or len(shape) > 4:
        d = width if width is not None else "keys"
        expected = f"({d},), ({heads}, {d}), ({heads}, position, {d}) or (batch, {heads}, position, {d})"
        return [describe(what, f"a value of shape {shape}", expected, "Reshape it.")]
    return []


def _move_zeros(plan: Plan, probed: Collection[str]) -> None:
    """Takes edits to zero to z, where no other edit of the module and no probe could tell the difference."""
    for site in (s for s in _SAME_AS_ZERO_Z if s not in probed):
        operations = plan.of(site)
        others = [o for name, list_ in plan.operations.items() for o in list_ if name != site]
        if operations and not others and all(map(_is_plain_zero, operations)):
            plan.operations = {"z": [replace(operation, site="z") for operation in operations]}


def _is_plain_zero(operation: Operation) -> bool:
    edit = operation.edit
    whole = edit.positions is None or not SITES[edit.site].over_keys
    return edit.action == "zero" and edit.strength == 1.0 and edit.backward != "ste" and whole


def on_meta(tensors: Any) -> bool:
    """Whether every parameter is on the meta device."""
    tensors = list(tensors)
    return bool(tensors) and all(t.device == torch.device("meta") for t in tensors)
