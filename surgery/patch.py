"""Patching and unpatching a model: plan everything, check everything, then swap classes; undo is exact."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from surgery.anatomy import Anatomy, Attention, find_anatomy
from surgery.classes import Owned, SurgicalAttention, SurgicalOwner, attach, attach_owner, attention_class, owner_class
from surgery.core import Plan, Probe, Session, Surgery, sample_arguments
from surgery.errors import NotFiredWarning, ParityError, PatchError, SpecError, describe, listing
from surgery.family import find_family
from surgery.lower import lower, on_meta
from surgery.rewrite import Rewriter
from surgery.spec import Freeze, Spec
from surgery.taps import Tap

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
    _apply(model, as_spec(spec), kernel, strict, _probes(model))
    return model


def unpatch_model(model: Model) -> Model:
    """Gives every module its own class back: the very same classes and tensors as before patching.

    Does nothing to a model that is not patched. Warns (NotFiredWarning) of cuts that never ran while others did.
    Raises PatchError, with nothing undone, if something else has changed a patched module's class meanwhile.
    """
    session = session_of(model)
    _restore_all(model)
    if session is not None:
        _warn_silent(session.never_ran)
    return model


@contextmanager
def patched(model: Model, spec: Any = None, *, kernel: Kernel = "auto", strict: bool = True) -> Iterator[Model]:
    """Within the block the model has these cuts; afterwards what it had before, also after an exception.

    Warns (NotFiredWarning) of cuts that never ran in the block although the model did. Raises what patch_model raises.
    """
    with _restored(model):
        patch_model(model, spec, kernel=kernel, strict=strict)
        yield model


def freeze_qk_circuit(model: Model, layers: Any = "all", heads: Any = "all", to: Any = "zero", **options: Any) -> Model:
    """Adds a freeze of QK circuits to the cuts that the model has; options as in Freeze. Returns the same model."""
    return _add(model, Freeze("qk", layers, heads, to, **options))


def freeze_ov_circuit(model: Model, layers: Any = "all", heads: Any = "all", to: Any = "zero", **options: Any) -> Model:
    """Adds a freeze of OV circuits to the cuts that the model has; options as in Freeze. Returns the same model."""
    return _add(model, Freeze("ov", layers, heads, to, **options))


def _add(model: Model, cut: Freeze) -> Model:
    session = session_of(model)
    spec, kernel = (session.spec, session.kernel) if session is not None else (Spec(), "auto")
    return patch_model(model, spec + Spec(cut), kernel=kernel)  # type: ignore[arg-type]


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


def anatomy_of(model: nn.Module, strict: bool = True) -> Anatomy:
    """The anatomy of a model, from its patched modules where it is known already."""
    session = session_of(model)
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
    session = session_of(model)
    spec, own_kernel = (session.spec, session.kernel) if session is not None else (Spec(), "auto")
    before = _probes(model)
    together = {address: [*before.get(address, ()), *probes.get(address, ())] for address in {**before, **probes}}
    with _restored(model):
        _apply(model, spec, kernel or own_kernel, strict, together)
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Brings back, at the end, the state of patching that the model has now: plans, taps and session."""
    before = session_of(model)
    probes = _probes(model)
    failed = True
    try:
        yield
        failed = False
    finally:
        inner = session_of(model)
        silent = inner.never_ran if inner is not None and inner is not before and not failed else []
        if before is None:
            _restore_all(model)
        else:
            _apply(model, before.spec, before.kernel, False, probes, before)
        _warn_silent(silent)


def _probes(model: nn.Module) -> dict[str, Sequence[Probe]]:
    if session_of(model) is None:
        return {}
    surgeries = [m._surgery for m in model.modules() if isinstance(m, SurgicalAttention)]
    return {s.address: [p for site in s.plan.probes.values() for p in site] for s in surgeries}


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
    anatomy = anatomy_of(model, strict)
    if anatomy.unsupported and not strict and session_of(model) is None:
        warnings.warn(listing("patch_model leaves as they are", anatomy.unsupported), UserWarning, stacklevel=3)
    plans = lower(spec, anatomy, on_meta(model.parameters()), [a for a, p in probes.items() if p])
    for attention in anatomy:
        plan = plans.setdefault(attention.address, Plan())
        plan.reconstruct = kernel == "eager"
        for probe in probes.get(attention.address, ()):
            plan.probes.setdefault(probe.site, []).append(probe)
    problems = _foreign_classes(model) + [p for attention in anatomy for p in _obstacles(attention.module, attention.path)]
    problems += [p for attention in anatomy for p in _tap_problems(model, attention, plans[attention.address])]
    if problems:
        raise PatchError(listing("patch_model", problems))
    for attention in anatomy:
        if not isinstance(attention.module, SurgicalAttention):
            verify(attention)
    # Nothing below fails for a reason that lies in the input; an interrupt may still come.
    if session is None:
        planned = frozenset(address for address, plan in plans.items() if plan.sites)
        session = Session(spec, kernel, anatomy, planned, report=_warn_silent)
        spec.fingerprint()  # computed now: a forward, perhaps compiled, only compares it
    before, old_probes = session_of(model), _probes(model)
    try:
        for module in _patched_modules(model):
            if isinstance(module, SurgicalOwner):
                _restore(module)
        for attention in anatomy:
            _swap(model, attention, plans[attention.address], session)
    except BaseException:
        if before is None:
            _restore_all(model)
        elif before is not session:
            _sweep(model)
            _apply(model, before.spec, before.kernel, False, old_probes, before)
        raise


def _swap(model: nn.Module, attention: Attention, plan: Plan, session: Session) -> None:
    module: Any = attention.module
    if not isinstance(module, SurgicalAttention):
        module.__dict__["_surgery"] = Surgery(attention, session)
        own_class: Any = type(module)
        _set_class(module, attention_class(own_class))
    surgery: Surgery = module._surgery
    surgery.session, surgery.address, surgery.path = session, attention.address, attention.path
    own: dict[str, Tap] = {}
    for site, projection in (("q", "q"), ("k", "k"), ("result", "o")):
        if site not in plan.sites:
            continue
        place = attention.projections[projection]
        if place.owner == attention.path:
            taps = own
        else:
            owner: Any = model.get_submodule(place.owner)
            if not isinstance(owner, SurgicalOwner):
                owner_type: Any = type(owner)
                owner.__dict__["_surgery"] = Owned()
                _set_class(owner, owner_class(owner_type))
            taps = owner._surgery.taps
        taps.setdefault(place.name, Tap(surgery)).add(site, place.channels)
        if taps is not own:
            attach_owner(owner)
    surgery.set_plan(plan, own)
    attach(module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Swaps the class, also under an accelerate hook, which keeps the bound forward of the class before."""
    before = type(module)
    module.__class__ = cls
    # Under "forward" itself that is what such a hook leaves behind when it is removed.
    for name in ("_old_forward", "forward"):
        if _is_own(module.__dict__.get(name), module, before):
            module.__dict__[name] = types.MethodType(cls.forward, module)


def _is_own(forward: Any, module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a forward is the module's class's own, bound to it."""
    return isinstance(forward, types.MethodType) and forward.__func__ is cls.forward and forward.__self__ is module


def _restore_all(model: nn.Module) -> None:
    """Undoes patching. Raises PatchError, with nothing undone, if something else has changed a class."""
    if problems := _foreign_classes(model):
        raise PatchError(listing("unpatch_model", problems))
    for module in _patched_modules(model):
        _restore(module)
    _sweep(model)


def _sweep(model: nn.Module) -> None:
    """Removes what an interrupt between the two steps of a swap left behind."""
    for module in model.modules():
        if not isinstance(module, SurgicalAttention | SurgicalOwner):
            module.__dict__.pop("_surgery", None)


def _restore(module: Any) -> None:
    _set_class(module, module._surgery_base)
    del module.__dict__["_surgery"]


def _foreign_classes(model: nn.Module) -> list[str]:
    """Patched modules whose class something else has changed since."""
    found = []
    for path, module in model.named_modules():
        base: Any = getattr(module, "_surgery_base", None)
        if base is not None and type(module) not in (attention_class(base), owner_class(base)):
            what = f"the class {type(module).__name__}, which something else gave the patched module"
            found.append(
                describe(f"{path!r} ({base.__name__})", what, "the class that patching gave it", "Undo that change first.")
            )
    return found


def _patched_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, SurgicalAttention | SurgicalOwner)]


def _obstacles(module: nn.Module, path: str) -> list[str]:
    """Why a module must not be touched: its forward was replaced by something that is not accelerate's hook."""
    forward = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    if forward is None or _is_own(forward, module, type(module)):
        return []
    name = getattr(forward, "__qualname__", repr(forward))
    base = getattr(type(module), "_surgery_base", type(module))
    return [
        describe(
            f"{path!r} ({base.__name__})",
            f"a forward that something else set on the module ({name})",
            "the class's own forward",
            "Undo that change before patching; our cuts would never run.",
        )
    ]


def _tap_problems(model: nn.Module, attention: Attention, plan: Plan) -> list[str]:
    """Why a projection cannot be tapped where it is called."""
    found = []
    for site, name in (("q", "q"), ("k", "k"), ("result", "o")):
        if site not in plan.sites:
            continue
        place = attention.projections[name]
        if place.name.isdigit():
            found.append(
                describe(
                    f"{attention.path!r}",
                    f"{site}: the projection {place.path!r} is an entry of a list",
                    "a projection that is an attribute",
                    "Use the sites rot_q, rot_k or z.",
                )
            )
        elif place.owner != attention.path:
            found += _obstacles(model.get_submodule(place.owner), place.owner)
    return found


def verify(attention: Attention) -> None:
    """Compares the reconstruction of an attention with its family's own eager function, on random tensors, bit for bit.

    Skipped for values (not for the trace) where the module has no data. Raises ParityError.
    """
    module, rewriter = attention.module, Rewriter(attention.family.eager, attention.module)
    core, shapes = attention.recording.core, attention.recording.shapes
    for masked in (False, True):
        arguments = sample_arguments(rewriter, shapes, core["kwargs"], masked)
        graph = rewriter.graph(arguments, attention.core_groups)
        # Layers of one shape share their trace, and need one comparison.
        key = (id(graph), (attention.heads, attention.kv_heads, attention.d_head, attention.d_value))
        if key in _VERIFIED or any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            continue
        arguments = {n: _like(module, t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        seen: dict[str, torch.Tensor] = {}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            expected = rewriter.eager(module, **arguments)[0]
            torch.manual_seed(0)
            found = graph(seen.setdefault, module, arguments)[0]
        if not torch.equal(expected, found):
            raise ParityError(
                describe(
                    f"the reconstruction of {attention.class_name} at {attention.path!r}",
                    f"a difference of {(expected - found).abs().max():.3g} from its eager attention",
                    "equality bit for bit",
                    "Please report this class; describe it in patches/ meanwhile.",
                )
            )
        if wrong := _misplaced({site: tuple(tensor.shape) for site, tensor in seen.items()}, shapes):
            raise ParityError(
                describe(
                    f"the reconstruction of {attention.class_name} at {attention.path!r}",
                    ", ".join(f"{site} of shape {found}" for site, (found, _) in wrong.items()),
                    ", ".join(f"{expected}" for _, expected in wrong.values()),
                    "Please report this class; describe it in patches/ meanwhile.",
                )
            )
        _VERIFIED.add(key)


def _misplaced(
    seen: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The points where a tensor of another shape stands than the site's: found and expected shapes by site."""
    batch, heads, queries, width = shapes["q"]
    keys, d_value = shapes["k"][2], shapes["v"][3]
    matrix = (batch, heads, queries, keys)
    expected = {
        "rot_q": (batch, heads, queries, width),
        "rot_k": (batch, heads, keys, width),
        "v": (batch, heads, keys, d_value),
        "scores": matrix,
        "pattern": matrix,
        "z": (batch, heads, queries, d_value),
    }
    return {site: (shape, expected[site]) for site, shape in seen.items() if shape != expected[site]}


_VERIFIED: set[tuple[int, Any]] = set()


def _like(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """On the module's device, and in float64 if the module computes in it."""
    parameter = next(module.parameters(), None)
    tensor = tensor if parameter is None else tensor.to(parameter.device)
    is_double = parameter is not None and parameter.dtype == torch.float64 and tensor.is_floating_point()
    return tensor.double() if is_double else tensor


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
