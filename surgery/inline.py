"""Attention that a class computes inline: its own functions, compiled again with intervention points in their places."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.family import Family
from surgery.labels import PATTERN, Labelled
from surgery.layout import BATCH, HEAD, Layout
from surgery.record import watch
from surgery.source import (
    Kind,
    Place,
    Position,
    Wrap,
    definition,
    find,
    find_unpacking,
    owned_functions,
    rewrite,
    unpacked_name,
)
from surgery.steps import PRODUCTS, Defeat, Product, Step
from surgery.stubs import Recording
from surgery.witness import Witness


@dataclass(frozen=True, eq=False)
class Inline:
    """A rewritten inline attention: methods by name, the layout of each core site, and the new source to read.

    is_fused: it calls torch's fused kernel; before: sites whose point is not at the kernel but before it, as the mask is made
    of them, too, and their layouts there. beside: what else of the kind the class computes, which stays as it is, in words.
    within: functions of modules within the class that are compiled along. is_written: by a patch, whose forward may come to a
    site several times.
    """

    methods: Mapping[str, Callable[..., Any]]
    layouts: Mapping[str, Layout]
    code: str
    is_fused: bool = False
    before: Mapping[str, Layout] = field(default_factory=dict)
    beside: str = ""
    within: frozenset[types.FunctionType] = frozenset()
    is_written: bool = False


def record_inline(module: nn.Module, is_cross: bool) -> Recording:
    """The recording of a module that computes its attention inline, with the family that was made from it.

    Raises Defeat, or what the forward raised for the arguments that it was given.
    """
    try:
        recording, witnesses = watch(module, is_cross)
        inline = make_inline(*witnesses)
    except Defeat as error:
        recording, inline = _record_inner(module, is_cross, error)
    kernels = {"sdpa": _call} if inline.is_fused else {}
    recording.family = Family(_eager, members=inline.methods, kernels=kernels, inline=inline)
    recording.core["kwargs"] = {}
    return recording


def _record_inner(module: nn.Module, is_cross: bool, error: Defeat) -> tuple[Recording, Inline]:
    """As above, with points in the code of modules within, too. Raises the error that was met without them if that fails."""
    inner = {type(part) for part in module.modules() if part is not module and owned_functions(type(part))}
    if error.is_other or not inner:
        raise error
    try:
        recording, witnesses = watch(module, is_cross, inner)
        return recording, make_inline(*witnesses)
    except Exception as other:  # the first error says more of the module's own code
        raise error from other


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What a fused kernel computes, written out; enable_gqa repeats heads so."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(pattern, p=dropout)
    return torch.matmul(weights, value).transpose(1, 2), weights


def _call(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, call: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return call(query, key, value), None


def make_inline(witness: Witness, *others: Witness) -> Inline:
    """The methods with their points. Raises Defeat if a step is not written out where a call can be put round it.

    others: of runs that may have taken other branches; their points are added.
    """
    wraps = _wraps(witness)
    for other in others:
        try:
            more = _wraps(other)
        except Defeat:
            continue  # that branch is not rewritten: whoever comes to it is told that a point was never reached
        if other.layouts == witness.layouts:
            witness.before |= other.before
            wraps += [one for one in more if one not in wraps]
    try:
        return _compile(wraps, witness)
    except (OSError, TypeError, SyntaxError) as error:
        raise Defeat(f"source that cannot be rewritten ({error})") from error


def _compile(wraps: list[tuple[tuple[Place, ...], Wrap]], witness: Witness) -> Inline:
    """wraps: each with the calls of helpers that lead from a method to its function, the innermost first."""
    own, within = set(witness.methods.values()), set(witness.inner.values())

    def kind(function: types.FunctionType) -> Kind:
        return "inner" if function in within else "method" if function in own and not is_static(function) else "function"

    def is_static(function: types.FunctionType) -> bool:
        return "staticmethod" in [getattr(d, "id", "") for d in definition(function).decorator_list]

    by_function: dict[types.FunctionType, list[Wrap]] = {}
    calls: dict[types.FunctionType, dict[Position, types.FunctionType]] = {}
    for path, wrap in wraps:
        by_function.setdefault(wrap.place.function, []).append(wrap)
        inner = wrap.place.function
        for place in path:
            calls.setdefault(place.function, {})[place.position] = inner
            inner = place.function
    done: dict[types.FunctionType, Callable[..., Any]] = {}
    sources: list[str] = []

    def make(function: types.FunctionType) -> Callable[..., Any]:
        if function not in done:
            helpers = {p: (f.__name__, make(f), kind(f)) for p, f in calls.get(function, {}).items()}
            is_method = kind(function) == "method"
            done[function], source = rewrite(function, by_function.get(function, ()), helpers, is_method)
            sources.append(source)
        return done[function]

    methods = {name: make(f) for f in {**by_function, **calls} for name in witness.names.get(f, ())}
    layouts, before = dict(witness.layouts), dict(witness.before)
    compiled = frozenset(function for function in done if function in within)
    return Inline(methods, layouts, "\n\n".join(sources), witness.fused is not None, before, within=compiled)


def _wraps(witness: Witness) -> list[tuple[tuple[Place, ...], Wrap]]:
    """Every point: the calls of helpers that lead to its place, and the call to put into the source."""
    if witness.fused is not None:
        before = (_shared(witness, site) for site in ("rot_q", "rot_k"))
        return [_kernel(witness, witness.fused), *(one for one in before if one is not None)]
    main, values, softmax = witness.main, witness.values, witness.softmax
    assert main is not None and values is not None and softmax is not None
    for step in (main, values, softmax):
        if step.place is None:
            raise Defeat(f"a {step.name} outside the module's own functions and their helpers")
        if 0 not in witness.places_of(step):
            raise Defeat(f"a {step.name} that runs more than once in a forward", step.place)
    found = []
    for number, site in enumerate(("rot_q", "rot_k")):
        found.append(_shared(witness, site) or _operand(main, site, PRODUCTS[main.name] + witness.order.index(number)))
    found.append(_operand(softmax, "scores", 0))
    found.append(_pattern(witness, values))
    found.append(_operand(values, "v", PRODUCTS[values.name] + (1 if witness.is_first else 0)))
    found.append((values.places[1 : values.depth + 1], Wrap(values.places[0], "z")))
    return found


def _kernel(witness: Witness, step: Step) -> tuple[tuple[Place, ...], Wrap]:
    if step.place is None or not step.place.is_direct or not _is_expression(step.place):
        raise Defeat("a fused kernel outside the module's own functions and their helpers", step.place)
    if 0 not in witness.places_of(step):
        raise Defeat("a fused kernel that runs more than once in a forward", step.place)
    return step.places[1 : step.depth + 1], Wrap(step.place, kernel="fused")


def _operand(step: Step, site: str, number: int) -> tuple[tuple[Place, ...], Wrap]:
    """A point round an operand of a step."""
    return step.places[1 : step.depth + 1], Wrap(step.places[0], site, number)


def _at_value(witness: Witness, tensor: Tensor, site: str) -> tuple[tuple[Place, ...], Wrap] | None:
    """A point round the innermost expression whose value is a tensor, computed once in the forward; None if there is none."""
    step, part = witness.steps.get(id(tensor)), witness.parts.get(id(tensor))
    for number in witness.places_of(step) if step is not None else ():
        place = step.places[number]  # type: ignore[union-attr]
        if part is None and not place.is_direct and _is_unpacked(place, 0):
            continue  # a module of its own gives the tensor and others beside it
        if _is_expression(place) if part is None else _is_unpacked(place, part):
            return step.places[number + 1 : step.depth + 1], Wrap(place, site, target=part)  # type: ignore[union-attr]
    return None


def _shared(witness: Witness, site: str) -> tuple[tuple[Place, ...], Wrap] | None:
    """Where a factor of the product q k^T that other terms of the scores use, too, is last one tensor; None if none do."""
    factor = witness.tensors[site]
    if not isinstance(factor, Labelled):
        return None
    channels = set(factor.labels.unique().tolist())
    chain = list(witness.ancestors(factor))
    first = 0
    for product in _terms(witness):
        if product is witness.main:
            continue
        for other in product.factors:
            others = [t for t in witness.ancestors(other) if isinstance(t, Labelled)]
            shared = [n for n, tensor in enumerate(chain) if any(tensor is t for t in others)]
            # What q and k were split from is not q, nor k.
            if shared and set(chain[shared[0]].labels.unique().tolist()) == channels:  # type: ignore[attr-defined]
                first = max(first, shared[0] + 1)
    if not first:
        return None
    tensor = chain[first - 1]
    found = _at_value(witness, tensor, site)
    layout = _layout_like(witness.layouts[site], factor, tensor)
    if found is None or layout is None:
        reason = f"{site}, which several terms of the scores are made of and which is not one expression"
        raise Defeat(reason, (witness.main or witness.fused).place)  # type: ignore[union-attr]
    (witness.layouts if witness.fused is None else witness.before)[site] = layout
    return found


def _layout_like(layout: Layout, factor: Labelled, tensor: Any) -> Layout | None:
    """The layout of a tensor whose axes are those of a factor in another order, or with batch and head as one; else None."""
    for order in itertools.permutations(range(factor.dim())) if tensor.dim() == factor.dim() else ():
        if tensor.permute(order).shape == factor.shape and torch.equal(tensor.labels.permute(order), factor.labels):
            axes = dict(zip(order, layout.axes, strict=True))
            return Layout(tuple(axes[n] for n in range(len(axes))), layout.heads)
    for number in range(factor.dim() - 1) if tensor.dim() == factor.dim() - 1 else ():
        both = layout.axes[number] + layout.axes[number + 1]
        merged = factor.labels.flatten(number, number + 1)
        if sorted(both) == [BATCH, HEAD] and merged.shape == tensor.shape and torch.equal(merged, tensor.labels):
            return Layout((*layout.axes[:number], both, *layout.axes[number + 2 :]), layout.heads)
    return None


def _terms(witness: Witness) -> list[Product]:
    """The products that the scores, or a fused kernel's mask, are made of, directly or not."""
    core = witness.softmax or witness.fused
    assert core is not None
    found: list[Product] = []
    seen: set[int] = set()
    left: list[Tensor] = list(core.given)
    if witness.fused is not None:
        left = [t for t in left if not any(t is factor for factor in witness.tensors.values())]
    while left:
        tensor = left.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        step = witness.steps.get(id(tensor))
        if isinstance(step, Product):
            found.append(step)
        left.extend(step.given if step is not None else ())
    return found


def _pattern(witness: Witness, values: Product) -> tuple[tuple[Place, ...], Wrap]:
    """The pattern as dropout takes it, or v's product: after casts, so that weights that are returned show the cut."""
    factor = values.factors[0 if witness.is_first else 1]
    before = list(witness.ancestors(factor))
    dropped, drop = next(((d, step) for d, step in witness.drops if any(d is t for t in before)), (factor, None))
    assert isinstance(dropped, Labelled)
    witness.find_layout("pattern", dropped, PATTERN)
    if (found := _at_value(witness, dropped, "pattern")) is not None:
        return found
    if drop is not None and 0 in witness.places_of(drop) and _is_expression(drop.places[0]):
        return _operand(drop, "pattern", 0)
    witness.find_layout("pattern", factor, PATTERN)  # type: ignore[arg-type]
    return _operand(values, "pattern", PRODUCTS[values.name] + (0 if witness.is_first else 1))


def _is_unpacked(place: Place, part: int) -> bool:
    try:
        unpacked_name(find_unpacking(place.function, place.position), part)
    except OSError:
        return False
    return True


def _is_expression(place: Place) -> bool:
    try:
        find(place.function, place.position)
    except OSError:
        return False
    return True
