"""What an attention does to v between its projection and the weighted sum, where that is a scale and a shift of each channel.

The recorded forward runs on numbers: once with a projection that gives zeros, where the shift is what arrives and the scale
its gradient, and once with another vector, which must arrive scaled and shifted by just these. Whatever else the forward
reads (its arguments, other projections) is noise, and another one each time: only parameters can be part of what is found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.anatomy import Attention
from surgery.arguments import arguments_for, type_of
from surgery.stubs import Recording, run_on_stubs
from surgery.taps import at_hand

ScaleAndShift = tuple[Tensor | None, Tensor | None]
"""(kv_head, d_value) each, None for ones and for zeros; with the gradient to the parameters that they come from."""


def scale_and_shift(attention: Attention) -> ScaleAndShift | None:
    """What v is of what its projection gives; None if it is not this channel by channel, the same wherever it stands.

    Of evaluation mode, and of the parameters as they are now.
    """
    projection = attention.projections["v"]
    name = projection.path.removeprefix(f"{attention.path}.") if attention.path else projection.path
    channels = projection.channels
    width = int(channels.max()) + 1
    numbers = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    with at_hand(attention.module), torch.inference_mode(False), torch.enable_grad():
        zeros = torch.zeros(width, requires_grad=True)
        first, second = _arrived(attention, name, zeros, 1), _arrived(attention, name, numbers, 2)
        channels = channels.to(first.device)
        # Rows that do not come from the projection: padding of windows, learned keys.
        comes = (first != second).flatten(-1).any(dim=-1).all(dim=1) if first.shape == second.shape else None
        if comes is None or not bool(comes.any()):
            return None
        batch, position = comes.nonzero()[0].tolist()
        shift = first[batch, :, position]
        scale = torch.autograd.grad(shift.sum(), zeros, create_graph=True, allow_unused=True)[0]
    if scale is None:
        return None
    scale = scale.to(channels.device)[channels].to(shift.dtype)
    with torch.no_grad():
        rows = second.transpose(1, 2)[comes]
        scaled = scale * numbers.to(rows.device, rows.dtype)[channels]
        # A few roundings, of numbers no larger than these.
        tolerance = 16 * torch.finfo(rows.dtype).eps * torch.maximum(shift.abs().max(), scaled.abs().max())
        if not bool(((rows - (scaled + shift)).abs() <= tolerance).all()):
            return None
    if not torch.is_grad_enabled():
        scale, shift = scale.detach(), shift.detach()
    return None if bool((scale == 1).all()) else scale, None if bool((shift == 0).all()) else shift


def _arrived(attention: Attention, name: str, vector: Tensor, seed: int) -> Tensor:
    """(batch, kv_head, key, d_value): the core's v where the named projection gives a vector at every position."""
    generator = torch.Generator().manual_seed(seed)
    known, module = attention.recording, attention.module
    _, device = type_of(module)  # not the recorded arguments': weights that were elsewhere are here now

    def noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        exact = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=exact).to(device, dtype)

    def noisy(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_number = value.is_floating_point() or value.is_complex()
            return noise(tuple(value.shape), value.dtype, device) if is_number else value
        if isinstance(value, dict):
            return {key: noisy(part) for key, part in value.items()}
        return type(value)(map(noisy, value)) if isinstance(value, tuple | list) else value

    def give(projection: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if projection != name:
            return noise(shape, dtype, device)
        padded = torch.nn.functional.pad(vector, (0, shape[-1] - len(vector)))
        return padded.to(device, dtype).expand(shape).clone()

    family = None if known.family.inline is not None else known.family
    assert known.form is not None
    arguments = arguments_for(module, family, attention.kind == "cross", known.form)
    recording = Recording(known.family, give=give)
    run_on_stubs(module, "", recording, known.family, noisy(arguments))
    v = recording.arrived
    assert v is not None
    return v[:, :: v.shape[1] // attention.kv_heads]
