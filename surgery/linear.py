"""The matrix of a linear map, however it is stored: torch's Linear, transformers' Conv1D, with adapters, quantised.

Nothing is believed of a module whose forward is not torch's or transformers' own: the matrix found is compared with what
the module computes, and where it differs (or there is none), the module itself is asked, row by row of the identity.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.errors import SurgeryError, UnsupportedArchitectureError, describe
from surgery.evaluation import evaluating
from surgery.family import input_width
from surgery.stubs import HOOKS
from surgery.taps import answer, at_hand, has_numbers, runs_on, runs_own_forward

LinearMap = tuple[Tensor, Tensor | None]
"""(d_in, d_out) and (d_out,) or None: the output is x @ matrix + bias."""


def linear_of(module: nn.Module, path: str) -> LinearMap:
    """The matrix and bias of a module that maps its last axis linearly; `path` is its name in errors.

    Linear stores (d_out, d_in), Conv1D (d_in, d_out); it is (d_in, d_out) here. Both are the parameters or views of them,
    and computed from the parameters where an adapter adds to them, so gradients flow. Active adapters are included, as
    without dropout; a quantised weight is dequantised, to what it multiplies with in evaluation mode. An offloaded weight is
    loaded; it is a copy. One that is split over processes is gathered, so that all of them must ask.
    Raises UnsupportedArchitectureError if the module is no linear map, SurgeryError if its weights are on the meta device.
    """
    with at_hand(module):
        if any(parameter.is_meta for parameter in module.parameters()):
            raise SurgeryError(
                describe(
                    f"the weight of {path!r}",
                    "it on the meta device, without data",
                    "a weight in memory",
                    "Load the model fully, on a CPU if need be.",
                )
            )
        if isinstance(module, nn.Linear) and hasattr(module.weight, "full_tensor"):  # torch's DTensor
            bias: Any = module.bias
            return module.weight.full_tensor().mT, bias.full_tensor() if hasattr(bias, "full_tensor") else bias
        if type(module).forward in (nn.Linear.forward, Conv1D.forward) and runs_own_forward(module):
            stored = _stored(module) if has_numbers(module.weight) else None
            if stored is not None:
                return stored
    found = ""
    for find in (_dequantised,) if _is_quantised(module) else (_stored, _adapted, _asked):
        try:
            with at_hand(module):
                candidate = find(module)
            if candidate is not None and (find is _dequantised or _agrees(module, *candidate)):
                return candidate
        except Exception as error:  # any failure of a foreign module's code means the same: not known
            found = f" ({type(error).__name__}: {error})"
    raise UnsupportedArchitectureError(
        describe(
            f"the weight of {path!r}",
            f"a {type(module).__name__} that does not compute x @ W + b with any W that it shows{found}",
            "a linear map of the last axis",
            "Merge its adapters (merge_adapter() of the PEFT model), or load the model without quantisation.",
        )
    )


def computes_stored(module: nn.Module) -> bool:
    """Whether a module computes x @ W + b with the very weight and bias that it stores, in numbers."""
    with at_hand(module):
        stored = _stored(module) if not any(parameter.is_meta for parameter in module.parameters()) else None
        return stored is not None and has_numbers(module.weight) and _agrees(module, *stored)


def _stored(module: nn.Module) -> LinearMap | None:
    """From the module's own weight, if it has one of numbers or one that says how to get them."""
    if hasattr(module, "base_layer") or not isinstance(module, nn.Linear | Conv1D):
        return None
    weight: Tensor = module.weight
    if type(weight).dequantize is not Tensor.dequantize:  # a subclass that stores numbers in its own way
        weight = weight.dequantize()
    if not has_numbers(weight):
        return None
    return (weight if isinstance(module, Conv1D) else weight.mT), module.bias


def _adapted(module: Any, base: LinearMap | None = None) -> LinearMap | None:
    """From a base layer and what the active adapters add to it, if they say what that is (as PEFT's LoRA does)."""
    base = _stored(getattr(module, "base_layer", nn.Identity())) if base is None else base
    if base is None:
        return None
    matrix, bias = base
    if module.merged or module.disable_adapters:
        return base
    for adapter in module.active_adapters:
        if adapter in getattr(module, "lora_variant", ()):
            return None  # it does more than add (DoRA scales the sum)
        if adapter in module.scaling:
            delta = module.get_delta_weight(adapter)
            matrix = matrix + (delta if isinstance(module.base_layer, Conv1D) else delta.mT).to(matrix)
            added = module.lora_B[adapter].bias
            if added is not None:
                bias = (0 if bias is None else bias) + added * module.scaling[adapter]
    return matrix, bias


def _asked(module: Any) -> LinearMap | None:
    """From what the module makes of the unit vectors. One forward of d_in rows."""
    width = input_width(module)
    if width is None:
        return None
    dtype, device = _numbers(module)
    with evaluating(module):
        bias = answer(module, torch.zeros(1, 1, width, dtype=dtype, device=device))[0, 0]
        matrix = answer(module, torch.eye(width, dtype=dtype, device=device)[None])[0] - bias
    return matrix, (bias if bool(bias.any()) else None)


def _dequantised(module: Any) -> LinearMap | None:
    """Of a quantised module: what its weight, with its adapters, says of itself, if that is what a copy of it answers.

    What is answered is without gradient: the copy's parameters are not the module's.
    """
    double = _double(module)
    with torch.no_grad():
        asked = _asked(double)
    if asked is None or not _agrees(double, *asked):
        return None
    base = getattr(module, "base_layer", None)
    if base is None:
        known = _stored(module)
    else:
        with torch.no_grad():
            known = _stored(base) or _asked(double.base_layer)
        known = _adapted(module, known)
    # One part in 255: inputs of 8 bits shrink a unit vector by that; bfloat16 rounds to as much.
    return known if known is not None and _is_close(known[0], asked[0], 8e-3) else asked


def _double(module: Any) -> Any:
    """A copy to run: some quantised layers repack their weight or settle on a type in their first forward.

    That must not happen to the module itself because someone looked at it. The user's hooks stay behind.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        memo.update({id(part.__dict__[hooks]): OrderedDict() for hooks in HOOKS})
        if "_hf_hook" in part.__dict__:
            memo[id(part._hf_hook)] = part._hf_hook
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # handles of a foreign kernel
        return module


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """As parts of the largest entry."""
    found, expected = found.detach().double(), expected.detach().double()
    return bool(((found - expected).abs() <= tolerance * expected.abs().amax()).all())


@torch.no_grad()
def _agrees(module: Any, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether the module computes x @ matrix + bias, for small and large x."""
    dtype, device = _numbers(module)
    rows = torch.randn(3, matrix.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (rows * torch.tensor([[0.01], [1.0], [10.0]])).to(device, dtype)
    with evaluating(module):
        found = answer(module, rows[None])[0].double()
    expected = rows.double() @ matrix.double() + (0 if bias is None else bias.double())
    # Rounding of the result, and of its sum; tensor cores round factors to 10 bits if they may; int8 activations to 7.
    exact = torch.get_float32_matmul_precision() == "highest"
    tolerance = 0.05 if _is_quantised(module) else 4 * torch.finfo(dtype).eps + (1e-5 if exact else 2e-3)
    scale = expected.abs().amax(dim=-1, keepdim=True)
    return bool(((found - expected).abs() <= tolerance * scale).all())


def _numbers(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The type and place that inputs of a module should have."""
    tensors = [*module.parameters(), *module.buffers()]
    # 8-bit floats are storage: their scales lie elsewhere.
    dtype = next((t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)
    return dtype, runs_on(module)


def _is_quantised(module: nn.Module) -> bool:
    return not all(has_numbers(t) for t in (*module.parameters(), *module.buffers()) if t.dim() > 1)
