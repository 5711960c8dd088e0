"""The matrix of a linear map, however it is stored: torch's Linear, transformers' Conv1D, with adapters, quantised.

Nothing is believed of a module whose forward is not torch's or transformers' own: the matrix found is compared with what
the module computes, and where it differs (or there is none), the module itself is asked, row by row of the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.errors import SurgeryError, UnsupportedArchitectureError, describe
from surgery.family import input_width

LinearMap = tuple[Tensor, Tensor | None]
"""(d_in, d_out) and (d_out,) or None: the output is x @ matrix + bias."""


def linear_of(module: nn.Module, path: str) -> LinearMap:
    """The matrix and bias of a module that maps its last axis linearly; `path` is its name in errors.

    Linear stores (d_out, d_in), Conv1D (d_in, d_out); it is (d_in, d_out) here. Both are the parameters or views of them,
    and computed from the parameters where an adapter adds to them, so gradients flow. Active adapters are included, as
    without dropout; a quantised weight is dequantised, in the type that the module computes in.
    Raises UnsupportedArchitectureError if the module is no linear map, SurgeryError if its weights are on the meta device.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        raise SurgeryError(
            describe(
                f"the weight of {path!r}",
                "it on the meta device, without data",
                "a weight in memory",
                "Load the model fully, on a CPU if need be; offloaded modules have no weight between forwards.",
            )
        )
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in module.__dict__:
        stored = _stored(module)
        if stored is not None:
            return stored
    found = ""
    for find in (_stored, _adapted, _asked):
        try:
            candidate = find(module)
            if candidate is not None and _agrees(module, *candidate):
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


def _stored(module: nn.Module) -> LinearMap | None:
    """From the module's own weight, if it has one of numbers."""
    if hasattr(module, "base_layer") or not isinstance(module, nn.Linear | Conv1D):
        return None
    weight: Tensor = module.weight
    if type(weight).dequantize is not Tensor.dequantize:  # a subclass that stores numbers in its own way
        weight = weight.dequantize()
    if not _is_wide(weight):
        return None
    return (weight if isinstance(module, Conv1D) else weight.mT), module.bias


def _adapted(module: Any) -> LinearMap | None:
    """From a base layer and what the active adapters add to it, if they say what that is (as PEFT's LoRA does)."""
    base = _stored(getattr(module, "base_layer", nn.Identity()))
    if base is None:
        return None
    matrix, bias = base
    if module.merged or module.disable_adapters:
        return base
    for adapter in module.active_adapters:
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
    with _without_dropout(module):
        bias = module.forward(torch.zeros(1, 1, width, dtype=dtype, device=device))[0, 0]
        matrix = module.forward(torch.eye(width, dtype=dtype, device=device)[None])[0] - bias
    return matrix, (bias if bool(bias.any()) else None)


@torch.no_grad()
def _agrees(module: Any, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether the module computes x @ matrix + bias, for small and large x."""
    dtype, device = _numbers(module)
    rows = torch.randn(3, matrix.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (rows * torch.tensor([[0.01], [1.0], [10.0]])).to(device, dtype)
    with _without_dropout(module):
        found = module.forward(rows[None])[0].double()
    expected = rows.double() @ matrix.double() + (0 if bias is None else bias.double())
    # Rounding of the result, and of its sum; tensor cores round factors to 10 bits if they may; int8 activations to 7.
    exact = torch.get_float32_matmul_precision() == "highest"
    tolerance = 0.05 if _is_quantised(module) else 4 * torch.finfo(dtype).eps + (1e-5 if exact else 2e-3)
    scale = expected.abs().amax(dim=-1, keepdim=True)
    return bool(((found - expected).abs() <= tolerance * scale).all())


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, put back afterwards: set by hand, for some classes merge weights when `eval()` is called."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _numbers(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The type and place that inputs of a module should have."""
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next((t.dtype for t in tensors if _is_wide(t)), torch.float32)
    return dtype, next((t.device for t in tensors), torch.device("cpu"))


def _is_wide(tensor: Tensor) -> bool:
    """Whether its entries are numbers by themselves: 8-bit floats are not, their scales lie elsewhere."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _is_quantised(module: nn.Module) -> bool:
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.dim() > 1]
    return any(not _is_wide(t) or type(t).dequantize is not Tensor.dequantize for t in tensors)
