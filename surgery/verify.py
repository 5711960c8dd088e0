"""Proof, when a model is patched, that each reconstruction equals its family's own eager attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from surgery.anatomy import Attention
from surgery.errors import ParityError, describe
from surgery.record import HOOKS
from surgery.rewrite import Rewriter
from surgery.samples import sample_arguments


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
        with torch.no_grad(), torch.random.fork_rng(), _without_hooks(module):
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


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """The user's hooks fire in forwards, not in our comparison."""
    own = [(m, name, m.__dict__[name]) for m in module.modules() for name in HOOKS]
    for m, name, _ in own:
        m.__dict__[name] = {}
    try:
        yield
    finally:
        for m, name, hooks in own:
            m.__dict__[name] = hooks


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
