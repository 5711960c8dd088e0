"""What an attention does to v between its projection and the weighted sum, where that is a scale and a shift of each channel.

The recorded forward runs on numbers: once with a projection that gives zeros, where the shift is what arrives and the scale
its gradient, and once with other numbers at every position, where each position that arrives must be that of one position,
scaled and shifted by just these. Whatever else the forward reads (its arguments, other projections) is noise, and another one
each time: only parameters can be part of what is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy import Attention
from surgery.arguments import arguments_for, type_of
from surgery.stubs import Recording, exact_type, run_on_stubs
from surgery.taps import at_hand

ScaleAndShift = tuple[Tensor | None, Tensor | None]
"""(kv_head, d_value) each, None for ones and for zeros; with the gradient to the parameters that they come from."""


def scale_and_shift(attention: Attention) -> ScaleAndShift | None:
    """What v is of what its projection gives; None if it is not this channel by channel, the same wherever it stands.

    Of evaluation mode, and of the parameters as they are now. Raises what the forward raises that is run for it.
    """
    projection = attention.projections["v"]
    name = projection.path.removeprefix(f"{attention.path}.") if attention.path else projection.path
    channels = projection.channels
    numbers = torch.Generator().manual_seed(0)
    zeros = torch.zeros(int(channels.max()) + 1, dtype=exact_type(attention.module), requires_grad=True)
    given: list[Tensor] = []

    def shift_alone(shape: tuple[int, ...]) -> Tensor:
        return torch.nn.functional.pad(zeros, (0, shape[-1] - len(zeros))).expand(shape)

    def every_size(shape: tuple[int, ...]) -> Tensor:
        """Of another size at each position, for norms and what bends large numbers give themselves away by it."""
        size = torch.exp2(6 * torch.rand((*shape[:-1], 1), generator=numbers) - 3)
        given.append(size * torch.randn(shape, generator=numbers))
        return given[-1]

    with at_hand(attention.module), torch.inference_mode(False), torch.enable_grad():
        first, second = _arrived(attention, name, shift_alone, 1), _arrived(attention, name, every_size, 2)
        # Rows that do not come from the projection: padding of windows, learned keys.
        comes = (first != second).flatten(-1).any(dim=-1).all(dim=1) if first.shape == second.shape else None
        if comes is None or not bool(comes.any()):
            return None
        batch, position = comes.nonzero()[0].tolist()
        shift = first[batch, :, position]
        scale = torch.autograd.grad(shift.sum(), zeros, create_graph=True, allow_unused=True)[0]
    if scale is None:
        return None
    scale = scale.to(shift.device)[channels.to(shift.device)].to(shift.dtype)
    with torch.no_grad():
        rows = second.transpose(1, 2)[comes]
        scaled = (
            scale * torch.cat([one.flatten(0, -2) for one in given]).to(rows.device, rows.dtype)[:, channels.to(rows.device)]
        )
        distances = torch.cdist(rows.flatten(1), (scaled + shift).flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        scaled = scaled[distances.argmin(dim=1)]
        # A few roundings, of numbers no larger than these.
        sizes = torch.maximum(scaled.flatten(1).abs().amax(dim=1), shift.abs().max())[:, None, None]
        if not bool(((rows - (scaled + shift)).abs() <= 4 * torch.finfo(rows.dtype).eps * sizes).all()):
            return None
    if not torch.is_grad_enabled():
        scale, shift = scale.detach(), shift.detach()
    return None if bool((scale == 1).all()) else scale, None if bool((shift == 0).all()) else shift


def _arrived(attention: Attention, name: str, of_projection: Callable[[tuple[int, ...]], Tensor], seed: int) -> Tensor:
    """(batch, kv_head, key, d_value): the core's v where the named projection gives what is made for its shape."""
    generator = torch.Generator().manual_seed(seed)
    known, module = attention.recording, attention.module
    dtype, device = exact_type(module), type_of(module)[1]  # the recorded arguments' weights may have been elsewhere

    def noise(shape: tuple[int, ...], is_complex: bool = False) -> Tensor:
        exact = torch.complex128 if is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=exact).to(device, dtype.to_complex() if is_complex else dtype)

    def noisy(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_number = value.is_floating_point() or value.is_complex()
            return noise(tuple(value.shape), value.is_complex()) if is_number else value
        if isinstance(value, dict):
            return {key: noisy(part) for key, part in value.items()}
        return type(value)(map(noisy, value)) if isinstance(value, tuple | list) else value

    def give(projection: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return of_projection(shape).to(device, dtype).clone() if projection == name else noise(shape)

    family = None if known.family.inline is not None else known.family
    assert known.form is not None
    arguments = arguments_for(module, family, attention.kind == "cross", known.form)
    recording = Recording(known.family, give=give)
    run_on_stubs(module, "", recording, known.family, noisy(arguments))
    v = recording.arrived
    assert v is not None
    return v[:, :: v.shape[1] // attention.kv_heads]
