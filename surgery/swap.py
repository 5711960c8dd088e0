"""Giving modules their patched classes, taking them back, and what stands in the way of either."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from surgery.anatomy import Attention
from surgery.classes import Owned, SurgicalAttention, SurgicalOwner, attach, attach_owner, attention_class, owner_class
from surgery.errors import PatchError, describe, listing
from surgery.own_code import Surgery
from surgery.plan import Plan, Session
from surgery.running import forget_pages
from surgery.shares import Share
from surgery.sites import PROJECTION_SITES, SITES
from surgery.taps import Tap


def swap(model: nn.Module, attention: Attention, plan: Plan, session: Session, share: Share | None = None) -> None:
    """Gives an attention its patched class, if it has its own, and its plan; taps go to whoever calls the projections.

    share: of the heads, where this process does not hold them all.
    """
    if share is not None:
        plan, attention = share.plan(plan, attention), share.attention(attention)
    module: Any = attention.module
    if not isinstance(module, SurgicalAttention):
        module.__dict__["_surgery"] = Surgery(attention, session)
        own_class: Any = type(module)
        set_class(module, attention_class(own_class))
    surgery: Surgery = module._surgery
    surgery.session, surgery.address, surgery.path = session, attention.address, attention.path
    surgery.share = share
    if (surgery.heads, surgery.kv_heads) != (attention.heads, attention.kv_heads):
        surgery.set_heads(attention)
    own: dict[str, Tap] = {}
    for site in (s for s in PROJECTION_SITES if s in plan.sites):
        place = attention.projections[PROJECTION_SITES[site]]
        if place.owner == attention.path:
            taps = own
        else:
            owner: Any = model.get_submodule(place.owner)
            if not isinstance(owner, SurgicalOwner):
                owner_type: Any = type(owner)
                owner.__dict__["_surgery"] = Owned()
                set_class(owner, owner_class(owner_type))
            taps = owner._surgery.taps
        taps.setdefault(place.name, Tap(surgery)).add(site, place.channels, place.batch_axes, plan.only_heads(site))
        if taps is not own:
            attach_owner(owner)
    surgery.set_plan(plan, own)
    attach(module)


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
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


def restore_all(model: nn.Module) -> None:
    """Undoes patching. Raises PatchError, with nothing undone, if something else has changed a class."""
    if problems := foreign_classes(model):
        raise PatchError(listing("unpatch_model", problems))
    forget_pages(model)
    for module in patched_modules(model):
        restore(module)
    sweep(model)


def sweep(model: nn.Module) -> None:
    """Removes what an interrupt between the two steps of a swap left behind."""
    for module in model.modules():
        if not isinstance(module, SurgicalAttention | SurgicalOwner):
            module.__dict__.pop("_surgery", None)


def restore(module: Any) -> None:
    """Gives one module its own class back."""
    set_class(module, module._surgery_base)
    del module.__dict__["_surgery"]


def foreign_classes(model: nn.Module) -> list[str]:
    """Patched modules whose class something else has changed since."""
    found = []
    for path, module in model.named_modules():
        base: Any = getattr(type(module), "_surgery_base", None)  # of the class: a wrapper may hand on its module's attributes
        if base is not None and type(module) not in (attention_class(base), owner_class(base)):
            what = f"the class {type(module).__name__}, which something else gave the patched module"
            found.append(
                describe(f"{path!r} ({base.__name__})", what, "the class that patching gave it", "Undo that change first.")
            )
    return found


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of a model whose class was swapped."""
    return [m for m in model.modules() if isinstance(m, SurgicalAttention | SurgicalOwner)]


def obstacles(module: nn.Module, path: str) -> list[str]:
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


def tap_problems(model: nn.Module, attention: Attention, plan: Plan) -> list[str]:
    """Why a projection cannot be tapped where it is called."""
    found = []
    parent = model.get_submodule(attention.path.rpartition(".")[0])
    if plan.sites and isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        found.append(
            describe(
                f"{attention.path!r}",
                "torch's fast path, on which an nn.TransformerEncoderLayer never calls its attention in evaluation",
                "a forward that comes to every cut and capture",
                "Call torch.backends.mha.set_fastpath_enabled(False) first.",
            )
        )
    for site in (s for s in PROJECTION_SITES if s in plan.sites):
        place = attention.projections[PROJECTION_SITES[site]]
        if place.name.isdigit():
            found.append(
                describe(
                    f"{attention.path!r}",
                    f"{site}: the projection {place.path!r} is an entry of a list",
                    "a projection that is an attribute",
                    f"Use site {SITES[site].instead!r}.",
                )
            )
        elif place.owner != attention.path:
            found += obstacles(model.get_submodule(place.owner), place.owner)
    return found
