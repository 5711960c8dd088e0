"""One tiny run of an attention module in which tensors carry channel numbers: where q, k, v come from, where z goes.

Every projection is replaced by a stub whose output is labelled with the projection and its channel numbers. Views, splits,
permutations and joins act on the labels as on the values; elementwise arithmetic (positions, norms, scaling) hands on the
labels of its first labelled operand. What arrives at the core then says, for each head, which channels of which projection
it is made of; what arrives at the output projection, which of its columns read z of which head. No weight is looked at, so
this works for quantised, adapted, offloaded and meta modules alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.arguments import arguments_for, inline_forms, plain_forms, remember, type_of
from surgery.family import Family, softmax_of
from surgery.labels import Labelled
from surgery.steps import Defeat
from surgery.stubs import Recording, run_on_stubs
from surgery.witness import Witness


def record(module: nn.Module, family: Family, is_cross: bool) -> Recording:
    """Runs a module's forward on stubs. Whatever the forward raises comes through; Defeat if its heads are none.

    A forward that takes the positions that it is given for something else (one more axis of the batch) comes to its core
    with a batch of them and one position each: such a run counts only where no other form gives another.
    """
    failures: list[tuple[int, Exception]] = []
    found: Recording | None = None
    for form in plain_forms(module):
        recording = Recording(family, form=form)
        try:
            recording.core["arguments"] = arguments_for(module, family, is_cross, form)
            output = run_on_stubs(module, "", recording, family, recording.core["arguments"])
        except Exception as error:  # of whatever kind a foreign forward raises for angles that it does not take
            failures.append((len(recording.leads), error.with_traceback(None)))  # whose frames would keep every tensor
            continue
        if not recording.calls:
            raise RuntimeError("the forward did not reach the core")
        _note_output(recording, output)
        if not recording.projections and _heads_are_positions(module, family, is_cross, recording):
            raise Defeat(
                "positions on the axis of heads, each of which looks at something else than the sequence", is_other=True
            )
        batch, _, positions, _ = recording.shapes["q"]
        if positions > 1 or batch <= form.batch:
            remember(module, form)
            return recording
        found = found or recording
    if found is None:
        raise _furthest(failures)
    return found


def _heads_are_positions(module: nn.Module, family: Family, is_cross: bool, first: Recording) -> bool:
    """Whether there are more heads in a longer sequence."""
    assert first.form is not None
    longer = replace(first.form, queries=first.form.queries + 1)
    second = Recording(family, form=longer)
    run_on_stubs(module, "", second, family, arguments_for(module, family, is_cross, longer))
    return second.shapes["q"][1] != first.shapes["q"][1]


def watch(module: nn.Module, is_cross: bool, inner: Collection[type] = ()) -> tuple[Recording, list[Witness]]:
    """Runs the forward of a module that computes its attention inline before a witness: once, and with its mask or without.

    inner: classes of modules within it whose code may hold points.

    Returns what the first run showed, and the witnesses. Raises Defeat if the core was seen and cannot be rewritten;
    otherwise what the forward raised where it came furthest.
    """
    failures: list[tuple[int, Exception]] = []
    for form in inline_forms(module):
        recording = Recording(None, form=form)  # type: ignore[arg-type]
        try:
            output = _watched(module, arguments_for(module, None, is_cross, form), recording, inner)
            remember(module, form)
            break
        except Exception as error:  # of whatever kind a foreign forward raises for arguments that it does not take
            failures.append((len(recording.leads), error.with_traceback(None)))  # whose frames would keep every tensor
            if isinstance(error, Defeat) and recording.witness.has_core:
                raise
    else:
        raise _furthest(failures)
    witness, others, given = recording.witness, [], _given(recording.core["arguments"])
    for mask in ("none", "additive", "pairs", "positions") if form.mask == "nothing" else ("none",):
        other = Recording(None)  # type: ignore[arg-type]
        try:
            arguments = arguments_for(module, None, is_cross, replace(form, mask=mask))
            if _given(arguments) == given:
                continue  # it would be the same run
            _watched(module, arguments, other, inner)
        except Exception:  # that kind of mask is not taken
            continue
        others.append(other.witness)
        break
    for site, tensor in (("q", "rot_q"), ("k", "rot_k"), ("v", "v")):
        found = witness.tensors[tensor]
        standard = witness.layouts[tensor].to_standard(found.as_subclass(Tensor))
        heads = standard.shape[1]
        recording.shapes[site] = tuple(standard.shape)
        if isinstance(found, Labelled):
            recording.note(site, witness.layouts[tensor].to_standard(found.labels)[:, :heads])
    _note_output(recording, output)
    return recording, [witness, *others]


def _watched(module: nn.Module, arguments: Mapping[str, Any], recording: Recording, inner: Collection[type]) -> Any:
    """One run before a witness, which must have seen the core whole."""
    base = getattr(type(module), "_surgery_base", type(module))
    recording.witness = Witness(base, recording.projections, inner, softmax_of(module))
    recording.core["arguments"] = arguments
    output = run_on_stubs(module, "", recording, None, arguments)
    if not recording.witness.has_core and not _first(output).is_floating_point():
        raise Defeat("a forward that gives indices, not values", is_other=True)
    recording.witness.check()
    return output


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is given to a forward: shapes of tensors, and whether anything else is there."""
    return {name: getattr(value, "shape", value is None) for name, value in arguments.items()}


def _furthest(failures: list[tuple[int, Exception]]) -> Exception:
    """The failure that says most: a core that was seen, or else the run that came to most projections."""
    seen = [error for _, error in failures if isinstance(error, Defeat)]
    return seen[0] if seen else max(failures, key=lambda one: one[0])[1]


def record_parent(parent: nn.Module, child: str, recording: Recording) -> Recording:
    """Continues in the parent of an attention that returns z itself: finds the output projection beside it.

    Raises what the parent's forward raised at first, if there is no form that it takes beside the attention's own.
    """
    dtype, device = type_of(parent)

    def attention(*args: Any, **kwargs: Any) -> Any:
        return tree_map(again, recording.returned)

    def again(value: Any) -> Any:
        if not isinstance(value, Labelled):
            return value
        return Labelled.make(torch.ones(value.shape, dtype=dtype, device=device), value.labels)

    own, labels = recording.form, recording.labels["output"]
    assert own is not None
    if labels.dim() == 3:  # as long as what the attention gave: parents add their input to it
        own = replace(own, batch=labels.shape[0], queries=labels.shape[1])
    failures: list[Exception] = []
    for others, mask in itertools.product(("nothing", "states"), ("nothing", "pairs", "additive", "positions")):
        found = Recording(recording.family)
        arguments = arguments_for(parent, None, False, replace(own, others=others, mask=mask))
        try:
            output = run_on_stubs(parent, "", found, None, arguments, {child: attention})
        except Exception as error:  # of whatever kind a foreign forward raises for arguments that it does not take
            failures.append(error.with_traceback(None))
            continue
        _note_output(found, output)
        return found
    raise failures[0]


def _note_output(recording: Recording, output: Any) -> None:
    first = _first(output)
    recording.returned = output
    recording.shapes["output"] = tuple(getattr(first, "shape", ()))
    recording.labels["output"] = first.labels if isinstance(first, Labelled) else torch.empty(0)
    recording.fate = first.fate if isinstance(first, Labelled) else "given"


def _first(output: Any) -> Any:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return _first(output[0]) if isinstance(output, tuple | list) and output else output
