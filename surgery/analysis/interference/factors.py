"""Gradients as factors: what each projection reads and the gradient of what it gives, for every sample of a batch.

For a linear map with input a and output gradient δ a sample's gradient is Σ_t a_t δ_tᵀ, a sum over its positions alone, so that
n · T · (d_in + d_out) numbers stand for n · d_in · d_out. δ is the gradient of zeros that are added to the output, so that no
weight has a gradient, frozen and quantised weights do as well as others, and `.grad` and `requires_grad` stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.analysis.replay import around
from surgery.anatomy import Attention, Projection
from surgery.errors import SurgeryError, describe

BLOCKS = {"Q": "q", "K": "k", "V": "v", "O": "o"}
"""Names of blocks to those of projections."""


@dataclass(frozen=True, eq=False)
class Block:
    """One projection of one attention: a part for each head (Q, O) or kv head (K, V).

    A head's gradient is (wide, narrow): wide is the side that all heads share (d_in of Q, K, V, d_model of O), narrow the
    head's own channels.
    """

    address: str
    name: str
    projection: Projection
    heads: int

    @property
    def key(self) -> str:
        return f"{self.address}.{self.name}"

    @property
    def narrow(self) -> int:
        """A head's channels."""
        return int(self.projection.channels.shape[1])


def blocks_of(attentions: Sequence[Attention]) -> tuple[list[Block], list[str]]:
    """The blocks of attentions, and why others cannot be had."""
    found, missing = [], []
    for attention in attentions:
        for name, site in BLOCKS.items():
            projection = attention.projections.get(site)
            if projection is None:
                missing.append(f"{attention.address}.{name}: {attention.why.get(site, 'it comes from no single projection')}")
            else:
                found.append(Block(attention.address, name, projection, len(projection.channels)))
    return found, missing


@dataclass(eq=False)
class _Call:
    """What a module read in one call, and the zeros that were added to what it gave."""

    read: Tensor
    nudge: Tensor


def factors(
    model: nn.Module, blocks: Sequence[Block], rows: int, losses: Callable[[], Tensor]
) -> tuple[dict[str, Any], Tensor]:
    """By key of a block (wide (sample, position, d), narrow (sample, position, head · channel)), and the losses (sample,).

    losses: runs one forward of `rows` samples, each computed by itself, and gives each one's loss. Raises SurgeryError for a
    projection that does not map (…, d_in) to (…, d_out), or that the forward does not call.
    """
    modules = {block.projection.path: model.get_submodule(block.projection.path) for block in blocks}
    calls: dict[int, list[_Call]] = {id(module): [] for module in modules.values()}

    def record(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        read = args[0] if args else next(iter(kwargs.values()))
        nudge = torch.zeros_like(output, requires_grad=True)
        calls[id(module)].append(_Call(read.detach(), nudge))
        return output + nudge

    with torch.enable_grad():
        with around(list({id(module): module for module in modules.values()}.values()), record):
            found = losses()
        every = [call for some in calls.values() for call in some]
        if silent := [path for path, module in modules.items() if not calls[id(module)]]:
            do = "Leave their layers out by layers=, or pass inputs that reach them."
            raise SurgeryError(describe("collect", f"no call of {', '.join(silent)}", "a forward that runs every block", do))
        gradients = torch.autograd.grad(found.sum(), [call.nudge for call in every], allow_unused=True)
    behind = {id(c): torch.zeros_like(c.nudge) if g is None else g for c, g in zip(every, gradients, strict=True)}
    parts: dict[str, Any] = {}
    shared: dict[Any, Tensor] = {}
    for block in blocks:
        some = calls[id(modules[block.projection.path])]
        read = _joined([call.read for call in some], block, rows, shared)
        given = _joined([behind[id(call)] for call in some], block, rows, shared)
        wide, narrow = (given, read) if block.name == "O" else (read, given)
        parts[block.key] = wide, narrow[..., block.projection.channels.flatten().to(narrow.device)]
    return parts, found.detach()


def _joined(tensors: list[Tensor], block: Block, rows: int, shared: dict[Any, Tensor]) -> Tensor:
    """(sample, position, d): of all calls one after another, for a weight's gradient is the sum of its calls'.

    The same tensors give the same one again: q, k and v mostly read one.
    """
    key = tuple((t.data_ptr(), t.shape, t.stride()) for t in tensors)
    if key not in shared:
        shared[key] = torch.cat([_by_sample(tensor, block.projection, rows) for tensor in tensors], 1)
    return shared[key]


def _by_sample(tensor: Tensor, projection: Projection, rows: int) -> Tensor:
    if not projection.batch_axes and tensor.dim() == 3:  # (position, batch, d)
        tensor = tensor.transpose(0, 1)
    if tensor.numel() == 0 or tensor.numel() // tensor.shape[-1] % rows:
        found, expected = f"{projection.path} reads or gives {tuple(tensor.shape)}", f"(…, d) with positions of {rows} samples"
        raise SurgeryError(describe("collect", found, expected, "Pass one sample at a time, or leave its layer out."))
    return tensor.reshape(rows, -1, tensor.shape[-1])


def weight_gradient(factor: tuple[Tensor, Tensor], block: Block, head: int) -> Tensor:
    """(sample, wide, narrow) in float32, from the factors of a batch."""
    wide, narrow = factor
    part = narrow[..., head * block.narrow : (head + 1) * block.narrow]
    return wide.float().mT @ part.float()


def squared_norms(factor: tuple[Tensor, Tensor]) -> Tensor:
    """(sample,) float64: the squared norm of a block's whole gradient, which is not formed: Σ_tt' (a_t·a_t') (δ_t·δ_t')."""
    wide, narrow = (part.double() for part in factor)
    return ((wide @ wide.mT) * (narrow @ narrow.mT)).sum((1, 2)).clamp(min=0)
