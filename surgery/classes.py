"""The generated classes of patched modules.

A patched module's class is a subclass (SurgicalAttention, X) of its own class X; only `__class__` changes, so parameters,
names, state dict and isinstance stay. Its forward runs X's own forward on a *view*: an object of another subclass of X that
shares the module's attributes (the very same __dict__), but sees a config that names our implementation, and taps in place
of the projections that are cut. So the family's code runs as written and arrives at `surgery.core.Core.attend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.configs import config_view
from surgery.errors import SurgeryError, describe
from surgery.inline import Inline
from surgery.own_code import Surgery
from surgery.paged import beginning
from surgery.reconstruction import Reconstruction
from surgery.sites import SITES
from surgery.taps import Tap, Tapped
from surgery.threads import made_once
from surgery.trace import GROUPS


class Surgical:
    """Mixin of every module whose class was swapped."""

    _surgery_base: type[nn.Module]
    _surgery_maker: Callable[[type[nn.Module]], type[nn.Module]]

    def _replicate_for_data_parallel(self) -> Any:
        raise SurgeryError(
            describe(
                "DataParallel",
                f"a patched {type(self)._surgery_base.__name__}, whose replicas would share what it knows of a forward",
                "an unpatched model",
                "Use torch.nn.parallel.DistributedDataParallel, or unpatch_model first.",
            )
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class has no importable name: copies and pickles rebuild it from its base.
        return _rebuild, (type(self)._surgery_maker.__name__, self._surgery_base), self.__dict__


class SurgicalAttention(Surgical):
    """Mixin of patched attention classes; isinstance(module, SurgicalAttention) tells a patched attention."""

    _surgery: Surgery

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        attach(self)

    def train(self, mode: bool = True) -> Any:
        """As of every module. Continuous batching calls eval() before its thread begins, in which an error would get lost."""
        with beginning(self) as is_batching:  # type: ignore[arg-type]
            if is_batching:
                self._surgery.check_paged()
        return super().train(mode)  # type: ignore[misc]

    @property
    def reconstruction(self) -> Reconstruction | Inline:
        """The rewritten eager attention; `print(module.reconstruction.code)` shows it with its intervention points."""
        return self._surgery.reconstruction


@dataclass
class Owned:
    """The state of a module that calls tapped projections without being the attention: taps by attribute name."""

    taps: dict[str, Tap] = field(default_factory=dict)
    module: Any = None
    view: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"taps": self.taps, "module": None, "view": None}


class SurgicalOwner(Surgical):
    """Mixin of a module that calls a tapped projection without being the attention (an output block beside it)."""

    _surgery: Owned

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        attach_owner(self)


def _rebuild(maker: str, base: Any) -> nn.Module:
    cls = {"attention_class": attention_class, "owner_class": owner_class}[maker](base)
    return cls.__new__(cls)


@made_once
def attention_class(base: Any) -> type[nn.Module]:
    """The patched class of an attention class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        surgery: Surgery = self._surgery
        if surgery.module is not self:
            attach(self)
        if not torch.compiler.is_compiling():
            surgery.session.enter(surgery.address)
        surgery.enter(args, kwargs)
        if surgery.is_idle:
            output = base.forward(self, *args, **kwargs)
        else:
            output = type(surgery.view).forward(surgery.view, *args, **kwargs)
            surgery.require()
        if not torch.compiler.is_compiling():
            surgery.session.leave()
        return output

    def extra_repr(self: Any) -> str:
        done = f"cuts {describe_cuts(self._surgery)}; kernel {self._surgery.kernel_in_use}"
        return ", ".join(part for part in (base.extra_repr(self), f"surgery at {self._surgery.address}: {done}") if part)

    return _subclass(SurgicalAttention, base, attention_class, forward, extra_repr=extra_repr)


@made_once
def owner_class(base: Any) -> type[nn.Module]:
    """The patched class of a module that only calls a tapped projection."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        owned: Owned = self._surgery
        if owned.module is not self:
            attach_owner(self)
        output = base.forward(owned.view, *args, **kwargs)
        for tap in owned.taps.values():
            tap.surgery.require(tap.sites)
        return output

    return _subclass(SurgicalOwner, base, owner_class, forward)


def _subclass(mixin: type, base: type[nn.Module], maker: Any, forward: Callable[..., Any], **members: Any) -> type[nn.Module]:
    names = {"__module__": base.__module__, "_surgery_base": base, "_surgery_maker": staticmethod(maker), **members}
    return type(f"Surgical{base.__name__}", (mixin, base), {**names, "forward": functools.wraps(base.forward)(forward)})


def attach(module: Any) -> None:
    """Makes the views of a module, once; they follow whatever happens to it, for they share its attributes."""
    surgery: Surgery = module._surgery
    base = module._surgery_base
    surgery.attach(module, _share(_ungrouped_view(base), module))
    members = tuple(surgery.family.members.items())
    surgery.view = _share(_attention_view(base, tuple(sorted(surgery.taps)), members), module)
    if (config := module.__dict__.get("config")) is not None:
        # Made now, so that torch.compile never meets the making of a class.
        surgery.config, surgery.config_view = config, config_view(config, surgery.family.shows_name)


def attach_owner(module: Any) -> None:
    """As `attach`, for a module that only calls tapped projections."""
    owned: Owned = module._surgery
    owned.module = module
    owned.view = _share(_owner_view(module._surgery_base, tuple(sorted(owned.taps))), module)


def _share(cls: type, module: nn.Module) -> Any:
    view: Any = object.__new__(cls)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


def _tap(name: str, taps: Callable[[Any], dict[str, Tap]]) -> property:
    return property(lambda self: Tapped(self._modules[name], taps(self)[name]))


@made_once
def _attention_view(base: type, taps: tuple[str, ...], members: tuple[tuple[str, Any], ...]) -> type:
    def config(self: Any) -> Any:
        surgery = self._surgery
        # Of the module, whose class has no such property: torch 2.11's compiler takes this view's __dict__ for its attributes.
        config = getattr(surgery.module, "config", None)
        if config is None:
            raise AttributeError("config")
        if surgery.config is not config:
            view = surgery.config_view = config_view(config, surgery.family.shows_name)
            surgery.config = config  # last: another thread takes the view that goes with it
            return view
        return surgery.config_view

    names = {name: _tap(name, lambda self: self._surgery.taps) for name in taps}
    return type(base.__name__, (base,), {"__module__": base.__module__, "config": property(config), **dict(members), **names})


@made_once
def _owner_view(base: type, taps: tuple[str, ...]) -> type:
    names = {name: _tap(name, lambda self: self._surgery.taps) for name in taps}
    return type(base.__name__, (base,), {"__module__": base.__module__, **names})


@made_once
def _ungrouped_view(base: type) -> type:
    """The module as fused kernels see it when key and value already have one head per query head."""
    return type(base.__name__, (base,), {"__module__": base.__module__, GROUPS: property(lambda self: 1)})


def describe_cuts(surgery: Surgery) -> str:
    """What a patched module does, in words: its cuts in the order in which they act, then what is captured."""
    parts = []
    for site in SITES:
        for operation in surgery.plan.of(site):
            action = operation.edit.action
            name = action if isinstance(action, str) else getattr(action, "__name__", repr(action))
            count = surgery.kv_heads if site == "k" else surgery.heads
            share = surgery.share
            first, whole = (0, count) if share is None else (share.number * count, share.count * count)
            numbers = ", ".join(str(first + head) for head in operation.heads)
            which = "all heads" if len(operation.heads) == whole else f"heads {numbers}"
            parts.append(f"{site} {name} ({which})")
    parts += [f"capture {site}" for site in SITES if site in surgery.plan.probes]
    done = "; ".join(parts) or "none"
    if surgery.share is None:
        return done
    own = surgery.share.of(surgery.heads * surgery.share.count)
    return f"{done} (of heads {own.start} to {own.stop - 1} in this process)"
