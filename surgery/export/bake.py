"""Which cuts can be folded into the weights, decided for each attention and site, and what stays of the spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from surgery.anatomy import Anatomy, Attention
from surgery.cuts import Edit
from surgery.errors import ExportError, describe, listing
from surgery.export.affine import Unfoldable
from surgery.export.biases import Biases
from surgery.export.fold import Weights, folds
from surgery.export.trial import CLOSE, Trial, Trials
from surgery.interventions import Operation
from surgery.lower import lower
from surgery.patch import anatomy_of, session_of
from surgery.spec import Spec

# q and k change from the input on; W_O from the output back, so that what is folded later acts earlier.
ORDER = ("q", "k", "rot_q", "rot_k", "scores", "result", "z", "v", "pattern")

Key = tuple[int, int, str]
"""A cut's number in the spec, an edit's number in the cut, and the address where it acts."""


@dataclass
class Baked:
    """kept: the cuts that stay; folded, refused: every edit in words, the latter with the reason.

    changed: new parameters by name, in the model's type; config: one that has the biases among them, or None for the model's.
    """

    kept: Spec
    folded: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    changed: dict[str, Tensor] = field(default_factory=dict)
    config: Any = None


def bake(model: Any, inputs: Mapping[str, Any], progress: bool = False) -> Baked:
    """Folds what can be folded of the cuts of a patched model. Nothing is written, and the model stays as it is.

    inputs: of a forward that runs every attention with cuts. Whatever is folded has been tried on it: the attention's output
    with the new weights equals that with the cut, to rounding, together with whatever is not folded.
    """
    session = session_of(model)
    assert session is not None
    if getattr(model, "hf_quantizer", None) is not None:
        why = "the model is quantised, and its weights are saved as they are; load it without quantisation"
        return Baked(session.spec, refused=[f"cut {n} ({cut}): {why}" for n, cut in enumerate(session.spec)])
    anatomy = anatomy_of(model, strict=False)
    plans = lower(session.spec, anatomy)
    concerned = [attention for attention in anatomy if attention.address in plans]
    trials = Trials(model, concerned, inputs)
    result = Baked(session.spec)
    weights, biases = Weights.of(model, anatomy), Biases(model)
    done: set[Key] = set()
    for attention in tqdm(concerned, desc="folding cuts", unit="attention", disable=not progress, leave=False):
        operations = plans[attention.address].operations
        left = {_key(session.spec, o, attention): o for site in operations for o in operations[site]}
        trial = Trial(trials, attention, _cuts(left, attention))
        for site, together in ((s, group) for s in sorted(operations, key=ORDER.index) for group in _groups(operations[s])):
            what = [f"cut {o.number} ({session.spec.cuts[o.number]}) at {attention.address} {site}" for o in together]
            keys = [_key(session.spec, o, attention) for o in together]
            rest = {key: o for key, o in left.items() if key not in keys}
            try:
                weights = _folded(trial, site, together, _cuts(rest, attention), weights, biases)
            except Unfoldable as reason:
                result.refused += [f"{text}: {reason}" for text in what]
                continue
            left = rest
            result.folded += what
            done.update(keys)
        weights.settle()
    result.kept = _kept(session.spec, anatomy, done)
    result.config = biases.config(weights)
    weights.settle()
    result.changed = {name: value.contiguous() for name, value in weights.changed.items()}
    return result


def _folded(trial: Trial, site: str, together: list[Operation], rest: Spec, weights: Weights, biases: Biases) -> Weights:
    """The weights with the edits of a site in them, found right beside the cuts that are left. Raises Unfoldable."""
    if not trial.runs:
        raise Unfoldable("the example inputs do not run this attention")
    reasons, best = [], float("inf")
    try:
        for tried in folds(trial.attention, site, together, weights):
            try:
                biases.require(tried.added)
            except Unfoldable as reason:
                reasons.append(str(reason))
                continue
            best = min(best, trial.gap(rest, tried))
            if best <= CLOSE:
                return tried
    except Unfoldable as reason:
        reasons.append(str(reason))
    if best < float("inf"):
        reasons.append(f"the weights that come nearest change its output by {best:.2g} of the largest entry")
    raise Unfoldable("; ".join(reasons))


def require_all(baked: Baked) -> None:
    """Raises ExportError, naming every edit that could not be folded and why."""
    if baked.refused:
        do = 'Use bake="where_possible", which keeps these in surgery.json, or bake=False.'
        problems = [describe("bake", text, "a cut that is a change of weights", do) for text in baked.refused]
        raise ExportError(listing("these cuts cannot be folded into weights", problems))


def _groups(operations: list[Operation]) -> list[list[Operation]]:
    """The edits of one site, those that meet in a head together, each group in the order of the spec."""
    groups: list[list[Operation]] = []
    for operation in operations:
        met = [group for group in groups if any(set(other.heads) & set(operation.heads) for other in group)]
        groups = [group for group in groups if group not in met] + [[*(o for group in met for o in group), operation]]
    return groups


def _key(spec: Spec, operation: Operation, attention: Attention) -> Key:
    edits = spec.cuts[operation.number].edits()
    return operation.number, edits.index(operation.edit), attention.address


def _cuts(operations: Mapping[Key, Operation], attention: Attention) -> Spec:
    """The edits of one attention alone, in the order of the spec."""
    return Spec([_at(operations[key].edit, attention.addresses) for key in sorted(operations)])


def _at(edit: Edit, addresses: tuple[str, ...]) -> Edit:
    return edit.model_copy(update={"layers": addresses})


def _kept(spec: Spec, anatomy: Anatomy, done: set[Key]) -> Spec:
    """The spec without what is folded: cuts as they were where nothing of them is, else their edits where they stay."""
    cuts: list[Any] = []
    for number, cut in enumerate(spec):
        selected = anatomy.select(cut.layers)
        if not any(key[0] == number for key in done):
            cuts.append(cut)
            continue
        for index, edit in enumerate(cut.edits()):
            stays = [a for a in selected if (number, index, a.address) not in done]
            if stays:
                cuts.append(_at(edit, tuple(address for a in stays for address in a.addresses)))
    return Spec(cuts)
