"""Proof, when a model is patched, that each reconstruction equals its family's own eager attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from surgery.anatomy import Attention
from surgery.arguments import type_of
from surgery.errors import ParityError, describe
from surgery.evaluation import accelerators, keeping_random, keeping_state
from surgery.layout import Layout
from surgery.rewrite import Rewriter
from surgery.samples import sample_arguments
from surgery.sites import SITES
from surgery.stubs import HOOKS
from surgery.threads import BORROWED


def verify(attention: Attention) -> None:
    """Compares the reconstruction of an attention with its family's own eager function, on random tensors, bit for bit.

    Skipped for values (not for the trace) where the module has no data. Raises ParityError.
    """
    if attention.family.inline is not None:
        _verify_inline(attention)
        if not attention.family.inline.is_fused:
            return
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
        with torch.no_grad(), _undisturbed(module):
            torch.manual_seed(0)
            try:
                expected = rewriter.eager(module, **arguments)[0]
            except TypeError:
                if masked:
                    raise
                continue  # a function that is never called without a mask
            torch.manual_seed(0)
            found = graph(seen.setdefault, module, arguments)[0]
        what = f"the reconstruction of {attention.class_name} at {attention.path!r}"
        _require_equal(what, found, expected, "its eager attention")
        _require_places(what, _misplaced({site: tuple(tensor.shape) for site, tensor in seen.items()}, shapes))
        _VERIFIED.add(key)


class _Seer:
    """Stands where a patched module has its surgery: notes the standard tensor at every point."""

    def __init__(self, layouts: Mapping[str, Layout]) -> None:
        self.layouts = layouts
        self.seen: dict[str, tuple[int, ...]] = {}

    def spot(self, site: str, tensor: Any, layout: Any = None) -> Any:
        """A point."""
        if SITES[site].where == "core":
            self.seen[site] = tuple((layout or self.layouts[site]).to_standard(tensor).shape)
        return tensor

    def inner(self, module: nn.Module) -> nn.Module:
        """A module whose code is rewritten, too."""
        return module

    def fused(self, kernel: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A fused kernel."""
        return kernel(*args, **kwargs)


def _verify_inline(attention: Attention) -> None:
    """Compares the rewritten forward of an inline attention with the class's own, bit for bit, and looks at every point."""
    module, inline, recording = attention.module, attention.family.inline, attention.recording
    # Of the class, too: another may have the same code in its base, and more around it.
    base = getattr(type(module), "_surgery_base", type(module))
    key = (base, inline.code, attention.heads, attention.kv_heads, attention.d_head, attention.d_value, _settings(module))
    if key in _VERIFIED or any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return
    generator = torch.Generator().manual_seed(0)
    arguments = {name: _random(value, generator) for name, value in recording.core["arguments"].items()}
    view: Any = object.__new__(type(base.__name__, (base,), dict(inline.methods)))
    seer = _Seer({**inline.layouts, **inline.before})
    outputs = []
    for cls, surgery in ((type(view), {"_surgery": seer}), (base, {})):
        # Some forwards set an attribute, or change one: neither run may show it to the other, or to the module.
        with torch.no_grad(), _undisturbed(module):
            run: Any = object.__new__(cls)
            object.__setattr__(run, "__dict__", {**module.__dict__, **surgery})
            torch.manual_seed(0)
            outputs.append([t for t in tree_leaves(cls.forward(run, **arguments)) if isinstance(t, torch.Tensor)])
    what = f"the rewritten forward of {attention.class_name} at {attention.path!r}"
    for found, expected in zip(*outputs, strict=True):
        _require_equal(what, found, expected, "its own")
    if not inline.is_fused:
        missing = {site: ((), shape) for site, shape in _standard(recording.shapes).items() if site not in seer.seen}
        _require_places(what, missing | _misplaced(seer.seen, recording.shapes, broadcast=True))
    _VERIFIED.add(key)


_DO = "Please report this class; describe it in patches/ meanwhile."


def _require_equal(what: str, found: torch.Tensor, expected: torch.Tensor, other: str) -> None:
    if not (torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())):
        gap = (found - expected).abs().max()
        raise ParityError(describe(what, f"a difference of {gap:.3g} from {other}", "equality bit for bit", _DO))


def _require_places(what: str, wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    if wrong:
        found = ", ".join(f"{site} of shape {found}" for site, (found, _) in wrong.items())
        raise ParityError(describe(what, found, ", ".join(f"{expected}" for _, expected in wrong.values()), _DO))


def _random(value: Any, generator: torch.Generator) -> Any:
    """Random numbers in place of the ones that were recorded."""
    if isinstance(value, tuple):
        return tuple(_random(part, generator) for part in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value)
    return value


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """The user's hooks fire in forwards, not in our comparison, which leaves no trace in the module or in random numbers."""
    borrowed = keeping_random(accelerators(type_of(module)[1]))
    with _without_hooks(module), BORROWED, borrowed, keeping_state(module):
        yield


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    own = [(m, name, m.__dict__[name]) for m in module.modules() for name in HOOKS]
    for m, name, _ in own:
        m.__dict__[name] = {}
    try:
        yield
    finally:
        for m, name, hooks in own:
            m.__dict__[name] = hooks


def _misplaced(
    seen: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], broadcast: bool = False
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The points where a tensor of another shape stands than the site's: found and expected shapes by site.

    broadcast: axes of one entry stand for as many as the site has.
    """
    expected = _standard(shapes)

    def fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
        pairs = list(zip(shape, full, strict=False))
        return len(shape) == len(full) and all(a == b or (broadcast and a == 1) for a, b in pairs)

    return {site: (shape, expected[site]) for site, shape in seen.items() if not fits(shape, expected[site])}


def _standard(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape that the tensor of each core site has."""
    batch, heads, queries, width = shapes["q"]
    keys, d_value = shapes["k"][2], shapes["v"][3]
    matrix = (batch, heads, queries, keys)
    return {
        "rot_q": (batch, heads, queries, width),
        "rot_k": (batch, heads, keys, width),
        "v": (batch, heads, keys, d_value),
        "scores": matrix,
        "pattern": matrix,
        "z": (batch, heads, queries, d_value),
    }


def _settings(module: nn.Module) -> frozenset[tuple[str, Any]]:
    """What else decides which branch a forward takes; layers differ in their number alone."""
    own = {
        n: v for n, v in vars(module).items() if isinstance(v, bool | int | float | str) and n not in ("layer_idx", "layer_id")
    }
    return frozenset(own.items())


_VERIFIED: set[tuple[Any, ...]] = set()


def _like(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """On the module's device; what floats in float32, as random q, k and v are, or in float64 if the module computes in it.

    Tensors of the recorded call, such as a bias by position, have the module's own type.
    """
    parameter = next(module.parameters(), None)
    tensor = tensor if parameter is None else tensor.to(parameter.device)
    is_double = parameter is not None and parameter.dtype == torch.float64
    return tensor.to(torch.float64 if is_double else torch.float32) if tensor.is_floating_point() else tensor
