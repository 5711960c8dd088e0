"""Arguments for recording an attention's forward, made from the names and the sizes that it shows."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.family import Family, example_of, input_width, is_pointwise, is_projection

QUERIES, SOURCE = 3, 5
"""Lengths of the recorded sequence and of the cross-attended one: small, and different from one another."""


def type_of(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The type that a module computes in, and the device that it is recorded on."""
    parameters = list(module.parameters())
    # 8-bit floats are storage of quantised weights, not a type that is computed in.
    dtype = next((p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1), torch.float32)
    # A module with any part on meta (offloaded, or not yet loaded) is recorded on meta: values are not needed.
    devices = sorted((p.device for p in parameters), key=lambda device: device.type != "meta")
    return dtype, devices[0] if devices else torch.device("cpu")


_NONE = ("attention_mask", "mask", "past_key_values", "past_key_value", "layer_past", "cache", "head_mask", "position_bias")
_SOURCES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
_LONGEST, _MOST, _FEW = 600, 32, 4
"""The longest sequence that is tried, whose attention matrix is still small; how many lengths are, and with all arguments."""


class Angles(tuple[Any, ...]):
    """Cosines and sines; also by layer type, as a few families hand them on."""

    def __getitem__(self, key: Any) -> Any:
        return self if isinstance(key, str) else super().__getitem__(key)


@dataclass(frozen=True)
class Form:
    """One guess at what a forward takes.

    side: height of the grid that the positions lie in, after `extra` others (a class token); axes: of the hidden states.
    mask: where everything may be attended to: nothing said (or none, against an example, too), pairs or additive
    (batch, 1, query, key), or positions (batch, position). angles: what stands for positional angles; others: what is given
    for required arguments of unknown names.
    """

    batch: int = 1
    queries: int = QUERIES
    side: int = 1
    axes: str = "bnc"
    angles: Any = None
    others: str = "nothing"
    mask: str = "nothing"
    extra: int = 0

    @property
    def columns(self) -> int:
        """The width of the grid."""
        return (self.queries - self.extra) // self.side

    def tensor(self, width: int, dtype: torch.dtype, device: torch.device, length: int | None = None) -> Tensor:
        """Hidden states of this form."""
        if self.axes == "nc":
            return torch.ones(length or self.queries, width, dtype=dtype, device=device)
        if self.axes == "bcn":
            return torch.ones(self.batch, width, length or self.queries, dtype=dtype, device=device)
        if self.axes == "bpnc":
            return torch.ones(self.batch, 2, length or self.queries, width, dtype=dtype, device=device)
        if length is not None or self.axes == "bnc":
            return torch.ones(self.batch, length or self.queries, width, dtype=dtype, device=device)
        grid = (self.side, self.columns)
        shape = (self.batch, *grid, width) if self.axes == "bhwc" else (self.batch, width, *grid)
        return torch.ones(shape, dtype=dtype, device=device)


def plain_forms(module: nn.Module) -> Iterator[Form]:
    """Three positions of a sequence, with positional angles in the forms that families take."""
    yield from _remembered(module)
    for angles in _angles(module, QUERIES):
        yield Form(angles=angles)
    for mask in ("additive", "pairs", "positions"):
        for angles in (None, *_angles(module, QUERIES)):
            yield Form(angles=angles, mask=mask)
    # Packed: sequences after one another, without a batch.
    for angles in (None, *_angles(module, QUERIES)):
        yield Form(axes="nc", angles=angles if angles is None else Angles(a[0] for a in angles))
    yield Form(angles="states")
    yield Form(angles="states", others="states")
    for others in ("states", "numbers"):
        yield Form(others=others)
    for angles in (None, *_angles(module, 4)):
        yield Form(queries=4, side=2, axes="bhwc", angles=angles)
    yield Form(axes="bpnc", others="states")
    yield Form(queries=64, side=8)


_GOOD: dict[type, Form] = {}
"""The form that a class's forward took last: the next layer takes it, too."""


def _remembered(module: nn.Module) -> list[Form]:
    return [_GOOD[type(module)]] if type(module) in _GOOD else []


def inline_forms(module: nn.Module) -> Iterator[Form]:
    """Two sequences: of the lengths, grids and windows that the module's sizes suggest, then with other arguments."""
    yield from _remembered(module)
    sizes = list(dict.fromkeys((QUERIES, 64, *_lengths(module))))
    shapes = [(queries, math.isqrt(queries)) for queries in sizes]
    shapes = [(queries, side if side * side == queries else 1) for queries, side in shapes]
    every = ("bcn", "bchw") if any(map(is_pointwise, module.children())) else ("bnc", "bhwc", "bchw")
    for axes in every:
        for queries, side in shapes:
            if side > 1 or axes in ("bnc", "bcn"):
                yield Form(2, queries, side, axes)
    for queries, side in shapes:
        if side > 1:
            yield Form(2, queries + 1, side, extra=1)
    for queries, side in shapes[:_FEW]:
        for axes in every:
            if side == 1 and axes in ("bhwc", "bchw"):
                continue
            for angles in ("states", *_angles(module, queries)):
                yield Form(2, queries, side, axes, angles)
            for others in ("states", "numbers"):
                yield Form(2, queries, side, axes, None, others)
            for others in ("nothing", "states"):
                for mask in ("pairs", "positions"):
                    yield Form(2, queries, side, axes, "states", others, mask)


def remember(module: nn.Module, form: Form) -> None:
    """Notes that a form was taken."""
    _GOOD[type(module)] = form


def _lengths(module: nn.Module) -> list[int]:
    """Numbers of positions that tables of the module are made for: windows, and grids by their sides."""
    tables = [*module.named_buffers(), *module.named_parameters()]
    sizes = [size for name, t in tables if "relative" in name or "bias" in name or "rel_" in name for size in t.shape[:2]]
    numbers = [v for v in vars(module).values() if isinstance(v, int | tuple | list) and not isinstance(v, bool)]
    parts = [[p for p in (n if isinstance(n, tuple | list) else (n,)) if type(p) is int] for n in numbers]
    sides = [(size + 1) // 2 for size in sizes] + [part for several in parts for part in several]
    found = sizes + [math.prod(several) for several in parts if len(several) == 2] + sides + [side * side for side in sides]
    return sorted(size for size in set(found) if 3 < size <= _LONGEST)[:_MOST]


def _angles(module: nn.Module, queries: int) -> Iterator[Any]:
    """Positional angles in the forms that families take: cosines and sines, or complex numbers, of some width.

    The width is not known here: 1 broadcasts over whatever part of d_head is rotated; a family that takes half of them needs
    its own, which is among the module's numbers. Wrong widths and forms fail in the first product, so nothing is guessed.
    """
    dtype, device = type_of(module)
    for width in (1, 2):
        yield Angles((torch.ones(1, queries, width, dtype=dtype, device=device),) * 2)
    yield torch.ones(1, queries, 1, dtype=torch.complex64, device=device)
    for width in sorted({v for v in vars(module).values() if type(v) is int and 2 < v <= 1024}):
        yield Angles((torch.ones(1, queries, width, dtype=dtype, device=device),) * 2)


def _width(module: nn.Module) -> int:
    """d_model: what most of the module's own projections read, or else the first one in its parts."""
    maps = [m for m in module.children() if is_projection(m) or is_pointwise(m)]
    if maps:
        own: Counter[Any] = Counter(m.in_channels if is_pointwise(m) else input_width(m) or 1 for m in maps)
        return own.most_common(1)[0][0]
    return next((w for m in module.modules() if is_projection(m) and (w := input_width(m))), 1)


def arguments_for(module: nn.Module, family: Family | None, is_cross: bool, form: Form) -> dict[str, Any]:
    """Arguments for a forward, by the names that transformers gives them."""
    dtype, device = type_of(module)
    width = _width(module)
    states = form.tensor(width, dtype, device)
    source = states if form.others == "states" else form.tensor(width, dtype, device, SOURCE)
    queries = form.queries
    example = example_of(module, states)
    known: dict[str, Any] = {
        "position_embeddings": states if form.angles == "states" else form.angles,
        "position_ids": torch.arange(queries, device=device)[None],
        "cache_position": torch.arange(queries, device=device),
        "residual": states,
        "input_tensor": states,
        **dict.fromkeys(("cu_seqlens", "cu_seq_lens"), torch.tensor([0, queries], dtype=torch.int32, device=device)),
        "max_seqlen": queries,
        "height": form.side,
        "width": form.columns,
        **dict.fromkeys(_NONE),
        **dict.fromkeys(_SOURCES, source if is_cross else None),
        **dict.fromkeys(("key", "value", "keys", "values"), source if is_cross else states),
        **dict.fromkeys(("object_queries", "query_position_embeddings"), states if form.angles == "states" else None),
        "spatial_position_embeddings": source if is_cross and form.angles == "states" else None,
        **example,
    }
    if form.mask == "none":
        known |= dict.fromkeys(("attention_mask", "mask"))
    elif form.mask != "nothing":
        shape = (form.batch, 1, queries, SOURCE if is_cross else queries) if form.mask != "positions" else (form.batch, queries)
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        mask = torch.zeros(shape, dtype=dtype, device=device) if form.mask == "additive" else mask
        known |= dict.fromkeys(("attention_mask", "mask"), mask)
    others = {"nothing": None, "states": states, "numbers": queries}[form.others]
    base = getattr(type(module), "_surgery_base", type(module))
    forward = (family.members.get("forward") if family else None) or base.forward
    arguments: dict[str, Any] = {}
    parameters = list(inspect.signature(forward).parameters.items())[1:]
    for number, (name, parameter) in enumerate(parameters):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if number == 0:
            arguments[name] = known.get(name, states)
        elif name in known:
            arguments[name] = known[name]
        elif parameter.default is parameter.empty:
            arguments[name] = others
    if any(parameter.kind is parameter.VAR_KEYWORD for _, parameter in parameters):
        arguments |= {name: value for name, value in example.items() if name not in arguments}
    return arguments
