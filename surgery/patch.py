"""Patching and unpatching a model: plan everything, check everything, then swap classes; undo is exact."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import nn

from surgery.anatomy import Anatomy
from surgery.classes import SurgicalAttention, SurgicalOwner
from surgery.derive import find_anatomy
from surgery.errors import (
    NotFiredWarning,
    PatchError,
    SpecError,
    SurgeryError,
    UnsupportedArchitectureError,
    describe,
    listing,
)
from surgery.family import find_family
from surgery.lower import lower, on_meta
from surgery.plan import Plan, Probe, Session
from surgery.running import batching_problems, forget_pages
from surgery.shares import require_same, share_of, split_problems
from surgery.spec import Freeze, Spec
from surgery.swap import foreign_classes, obstacles, patched_modules, restore, restore_all, swap, sweep, tap_problems
from surgery.taps import runs_on
from surgery.threads import CHANGES
from surgery.verify import verify

Model = TypeVar("Model", bound=nn.Module)
Kernel = Literal["auto", "eager"]
KERNELS = ("auto", "eager")


def patch_model(model: Model, spec: Any = None, *, kernel: Kernel = "auto", strict: bool = True) -> Model:
    """Rewrites the attention modules of a transformers model, in place, and cuts what the spec says.

    model: any PreTrainedModel (or module that holds one). Patching a patched model replaces its cuts; a capture goes on.
    spec: a Spec, one or several Freeze and Edit, or None for no cuts: then outputs, gradients and generation stay equal to
      the unpatched model's, bit for bit.
    kernel: "auto" leaves every module in its own kernel except where the attention matrix of some heads is needed; "eager"
      computes every module by the reconstruction of its family's eager attention, equal bit for bit to the model loaded
      with attn_implementation="eager".
    strict: raise for attention that cannot be patched; False warns once and leaves those modules as they are.
    Returns the same model object. Raises SpecError, NoMatchError, UnsupportedArchitectureError or PatchError, each listing
    all problems, with the model left exactly as it was.
    """
    with CHANGES:
        _apply(model, as_spec(spec), kernel, strict, _probes(model))
    return model


def unpatch_model(model: Model) -> Model:
    """Gives every module its own class back: the very same classes and tensors as before patching.

    Does nothing to a model that is not patched. Warns (NotFiredWarning) of cuts that never ran while others did.
    Raises PatchError, with nothing undone, if something else has changed a patched module's class meanwhile, if
    another thread has a block open on the model, or if continuous batching serves it.
    """
    with CHANGES:
        session = session_of(model)
        if session is not None and (problems := _others(model)):
            raise PatchError(listing("unpatch_model", problems))
        restore_all(model)
    if session is not None:
        _warn_silent(session.never_ran)
    return model


@contextmanager
def patched(model: Model, spec: Any = None, *, kernel: Kernel = "auto", strict: bool = True) -> Iterator[Model]:
    """Within the block the model has these cuts; afterwards what it had before, also after an exception.

    Warns (NotFiredWarning) of cuts that never ran in the block although the model did. Raises what patch_model raises.
    """
    with _restored(model, lambda: patch_model(model, spec, kernel=kernel, strict=strict)):
        yield model


def freeze_qk_circuit(model: Model, layers: Any = "all", heads: Any = "all", to: Any = "zero", **options: Any) -> Model:
    """Adds a freeze of QK circuits to the cuts that the model has; options as in Freeze. Returns the same model."""
    return _add(model, Freeze("qk", layers, heads, to, **options))


def freeze_ov_circuit(model: Model, layers: Any = "all", heads: Any = "all", to: Any = "zero", **options: Any) -> Model:
    """Adds a freeze of OV circuits to the cuts that the model has; options as in Freeze. Returns the same model."""
    return _add(model, Freeze("ov", layers, heads, to, **options))


def _add(model: Model, cut: Freeze) -> Model:
    with CHANGES:
        spec, kernel = cuts_of(model)
        return patch_model(model, spec + Spec(cut), kernel=kernel)


def as_spec(spec: Any) -> Spec:
    """A Spec from a Spec, a cut, several cuts, or None. Raises SpecError."""
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, Mapping | str):
        raise SpecError(describe("spec", f"a {type(spec).__name__}", "a Spec", "Read it with Spec.load or Spec.from_json."))
    return Spec(() if spec is None else spec)


def session_of(model: nn.Module) -> Session | None:
    """What the patched modules of a model share, or None for a model that is not patched. Raises PatchError for a non-model."""
    if not isinstance(model, nn.Module):
        raise PatchError(
            describe("model", f"a {type(model).__name__}", "a torch.nn.Module", "Load it first, with from_pretrained.")
        )
    for module in model.modules():
        if isinstance(module, SurgicalAttention):
            return module._surgery.session
    return None


def cuts_of(model: nn.Module) -> tuple[Spec, Any]:
    """The spec and the kernel= that a model is patched with; no cuts and "auto" for one that is not patched."""
    session = session_of(model)
    return (Spec(), "auto") if session is None else (session.spec, session.kernel)


def anatomy_of(model: nn.Module, strict: bool = True) -> Anatomy:
    """The anatomy of a model, from its patched modules where it is known already.

    A model that was patched with strict=False stays so.
    """
    session = session_of(model)
    strict = strict and (session is None or session.strict)
    known = session.anatomy if session is not None else None
    if known is not None and not (strict and known.unsupported):
        modules = dict(model.named_modules(remove_duplicate=False))
        paths = {path: attention.module for attention in known for path in attention.paths}
        # Paths change when something wraps the model (PEFT, accelerate) after patching; layers may have been added.
        if {path: m for path, m in modules.items() if path in paths or find_family(m) is not None} == paths:
            return known
    return find_anatomy(model, strict)


@contextmanager
def probed(
    model: nn.Module, probes: Mapping[str, Sequence[Probe]], kernel: str | None = None, strict: bool = True
) -> Iterator[None]:
    """Within the block, probes (by address) watch the model, with whatever cuts and probes it has already."""

    def watch() -> None:
        spec, own_kernel = cuts_of(model)
        before = _probes(model)
        together = {address: [*before.get(address, ()), *probes.get(address, ())] for address in {**before, **probes}}
        _apply(model, spec, kernel or own_kernel, strict, together)

    with _restored(model, watch):
        yield


@contextmanager
def _restored(model: nn.Module, change: Callable[[], Any]) -> Iterator[None]:
    """Makes a change, and at the end brings back the state of patching of before: plans, taps and session.

    Raises PatchError, with the model as it was, if another thread has a block open on it, or if continuous batching still
    serves it at the end.
    """
    with CHANGES:
        # Before there is anything to bring back: a block that is refused must not undo that of another thread.
        if problems := _others(model):
            raise PatchError(listing("patch_model", problems))
        before, probes = session_of(model), _probes(model)
        try:
            change()
            _own(model)
        except BaseException:
            _bring_back(model, before, probes)
            raise
    failed = True
    try:
        yield
        failed = False
    finally:
        with CHANGES:
            inner = session_of(model)
            silent = inner.never_ran if inner is not None and inner is not before and not failed else []
            _bring_back(model, before, probes)
        if not failed and (problems := batching_problems(model)):
            raise PatchError(listing("the block has ended", problems))
        _warn_silent(silent)


def _bring_back(model: nn.Module, before: Session | None, probes: Mapping[str, Sequence[Probe]]) -> None:
    if before is None:
        restore_all(model)
    else:
        _apply(model, before.spec, before.kernel, False, probes, before)


def _own(model: nn.Module) -> None:
    """Until the block that begins here ends, only this thread changes the model."""
    if (session := session_of(model)) is not None:
        session.owner = threading.get_ident()


def _others(model: nn.Module) -> list[str]:
    """Why this thread must not change the model's cuts: another has a block open on it, or continuous batching serves it."""
    session = session_of(model)
    owner = None if session is None else session.owner
    name = next((thread.name for thread in threading.enumerate() if thread.ident == owner), None)
    if session is not None and (cut := session.acting_cut()) is not None:
        what, do = f"change of cuts within cut {cut.number} at {cut.address} {cut.site}", "Change cuts between forwards."
        return [describe(what, "a callable that changes the cuts of the model which it cuts", "one that computes", do)]
    if owner in (None, threading.get_ident()) or name is None:  # a thread that is just starting has no number, either
        return batching_problems(model)
    found = f"a block (patched, capture) that the thread {name!r} has open on this model"
    do = "Wait for its end, open one block around all threads, or work on a copy (copy.deepcopy)."
    return [describe("change of cuts", found, "blocks of one thread at a time", do), *batching_problems(model)]


def _probes(model: nn.Module) -> dict[str, Sequence[Probe]]:
    if session_of(model) is None:
        return {}
    surgeries = [m._surgery for m in model.modules() if isinstance(m, SurgicalAttention)]
    return {s.address: [p.of or p for site in s.plan.probes.values() for p in site] for s in surgeries}


def _apply(
    model: nn.Module,
    spec: Spec,
    kernel: str,
    strict: bool,
    probes: Mapping[str, Sequence[Probe]],
    session: Session | None = None,
) -> None:
    """Plans and checks the whole model, then swaps."""
    if kernel not in KERNELS:
        raise SpecError(describe("patch_model", f"kernel={kernel!r}", ", ".join(map(repr, KERNELS)), "Use one of these."))
    anatomy = _proved(anatomy_of(model, strict), strict)
    if anatomy.unsupported and not strict and session_of(model) is None:
        warnings.warn(listing("patch_model leaves as they are", anatomy.unsupported), UserWarning, stacklevel=3)
    shares = {attention.address: share_of(model, attention) for attention in anatomy}
    if session is None:  # before anything is refused that other processes may not refuse
        watched = {address: [(probe.site, probe.heads) for probe in some] for address, some in probes.items() if some}
        require_same(shares.values(), f"{spec!r}, kernel={kernel!r}" + (f", captures {watched}" if watched else ""))
    plans = lower(
        spec,
        anatomy,
        on_meta(model.parameters()) and runs_on(model).type == "meta",  # offloaded weights have data
        {address: [p.site for p in watching] for address, watching in probes.items()},
    )
    for attention in anatomy:
        plan = plans.setdefault(attention.address, Plan())
        plan.reconstruct = kernel == "eager"
        for probe in probes.get(attention.address, ()):
            plan.probes.setdefault(probe.site, []).append(probe)
    problems = foreign_classes(model) + (_others(model) if session is None else [])
    problems += [p for attention in anatomy for p in obstacles(attention.module, attention.path)]
    problems += [p for attention in anatomy for p in tap_problems(model, attention, plans[attention.address])]
    for attention in anatomy:
        if (share := shares[attention.address]) is not None:
            problems += split_problems(attention, share, plans[attention.address])
    if problems:
        raise PatchError(listing("patch_model", problems))
    # Nothing below fails for a reason that lies in the input; an interrupt may still come.
    if session is None:
        planned = frozenset(address for address, plan in plans.items() if plan.sites)
        session = Session(spec, kernel, anatomy, planned, not anatomy.unsupported, report=_warn_silent)
        session.owner = None if (replaced := session_of(model)) is None else replaced.owner
        spec.fingerprint()  # computed now: a forward, perhaps compiled, only compares it
    before, old_probes = session_of(model), _probes(model)
    forget_pages(model)
    try:
        for module in patched_modules(model):
            if isinstance(module, SurgicalOwner):
                restore(module)
        for attention in anatomy:
            swap(model, attention, plans[attention.address], session, shares[attention.address])
    except BaseException:
        if before is None:
            restore_all(model)
        elif before is not session:
            sweep(model)
            _apply(model, before.spec, before.kernel, False, old_probes, before)
        raise


def _proved(anatomy: Anatomy, strict: bool) -> Anatomy:
    """The attentions whose reconstruction is proved right. Raises for one that is not, or, if not strict, leaves it out."""
    problems: dict[str, str] = {}
    for attention in anatomy:
        if isinstance(attention.module, SurgicalAttention):
            continue
        try:
            verify(attention)
        except Exception as error:  # of whatever kind foreign code raises, written anew
            what = f"{attention.path!r} ({attention.class_name})"
            found = f"{type(error).__name__}: {error}"
            do = "Please report this class; describe it in a file in patches/ meanwhile."
            text = str(error) if isinstance(error, SurgeryError) else describe(what, found, "a reconstruction that runs", do)
            if strict:
                raise error if isinstance(error, SurgeryError) else UnsupportedArchitectureError(text) from error
            problems[attention.address] = text
    if not problems:
        return anatomy
    proved = tuple(attention for attention in anatomy if attention.address not in problems)
    return replace(anatomy, attentions=proved, unsupported=(*anatomy.unsupported, *problems.values()))


def _warn_silent(addresses: Sequence[str]) -> None:
    if addresses:
        warnings.warn(
            describe(
                "patched model",
                f"a forward that never ran the attention at {', '.join(addresses)}",
                "every cut and capture executed",
                "The cuts there had no effect; check the inputs (encoder states, skipped layers) or the layers of the spec.",
            ),
            NotFiredWarning,
            stacklevel=4,
        )
