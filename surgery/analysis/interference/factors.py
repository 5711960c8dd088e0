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

    A head's gradient is (wide, narrow): wide is the side that all heads share (d_in of Q, K, V, and one more if there is a
    bias; d_model of O), narrow the head's own channels. group: query heads that read one of its heads.
    """

    address: str
    name: str
    projection: Projection
    heads: int
    group: int

    @property
    def key(self) -> str:
        return f"{self.address}.{self.name}"

    @property
    def split_key(self) -> str:
        """Of the same, split over the query heads that read each head."""
        return f"{self.key} by query head"

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
                why = attention.why.get(site, "it comes from none")
                do = "Leave its layer out by layers=."
                missing.append(describe(f"{attention.address}.{name}", why, "one projection of its own", do))
            else:
                heads = len(projection.channels)
                found.append(Block(attention.address, name, projection, heads, attention.heads // heads))
    return found, missing


@dataclass(eq=False)
class _Call:
    """What a module read in one call, in the graph, and the zeros that were added to what it gave."""

    read: Tensor
    nudge: Tensor


def factors(
    model: nn.Module,
    blocks: Sequence[Block],
    rows: int,
    losses: Callable[[], Tensor],
    *,
    biases: bool = False,
    query_heads: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """By key of a block (wide (sample, position, d), narrow (sample, position, head · channel)), and the losses (sample,).

    losses: runs one forward of `rows` samples, each computed by itself, and gives each one's loss. biases: a bias is the
    weight of an input that is 1. query_heads: also by `split_key`, for blocks that groups of query heads read, the part of
    narrow that came through each of these, (sample, position, query head · channel). Raises SurgeryError for a projection
    that does not map (…, d_in) to (…, d_out), or that the forward does not call.
    """
    modules = {block.projection.path: model.get_submodule(block.projection.path) for block in blocks}
    by_module: dict[int, list[_Call]] = {id(module): [] for module in modules.values()}
    calls = {block.key: by_module[id(modules[block.projection.path])] for block in blocks}

    def record(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        read = args[0] if args else next(iter(kwargs.values()))
        nudge = torch.zeros_like(output, requires_grad=True)
        by_module[id(module)].append(_Call(read, nudge))
        return output + nudge

    with torch.enable_grad():
        with around(list({id(module): module for module in modules.values()}.values()), record):
            found = losses()
        if silent := [path for path, module in modules.items() if not by_module[id(module)]]:
            do = "Leave their layers out by layers=, or pass inputs that reach them."
            raise SurgeryError(describe("collect", f"no call of {', '.join(silent)}", "a forward that runs every block", do))
        sought = [call.nudge for some in by_module.values() for call in some]
        if query_heads:
            sought += [call.read for block in blocks if block.name == "O" for call in calls[block.key]]
        behind = _gradients(found.sum(), sought, keep=query_heads)
        split = _through_query_heads(blocks, calls, behind) if query_heads else {}
    parts: dict[str, Any] = {}
    shared: dict[Any, Tensor] = {}
    for block in blocks:
        some = calls[block.key]
        read = _joined([call.read.detach() for call in some], block, rows, shared)
        if biases and block.name != "O" and getattr(modules[block.projection.path], "bias", None) is not None:
            read = _with_ones(read, shared)
        given = _joined([behind[call.nudge] for call in some], block, rows, shared)
        wide, narrow = (given, read) if block.name == "O" else (read, given)
        channels = block.projection.channels.to(narrow.device)
        parts[block.key] = wide, narrow[..., channels.flatten()]
        if block.split_key in split:
            members = [_joined(of_calls, block, rows, shared)[..., channels] for of_calls in split[block.split_key]]
            parts[block.split_key] = wide, torch.stack(members, 3).flatten(2)  # heads, then members of their groups
    return parts, found.detach()


def _gradients(
    output: Tensor, inputs: list[Tensor], along: Tensor | None = None, *, keep: bool = False
) -> dict[Tensor, Tensor]:
    """By input, its gradient; zeros where it has no part in the output."""
    found = torch.autograd.grad(output, inputs, along, retain_graph=keep, allow_unused=True)
    return {i: torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)}


def _through_query_heads(
    blocks: Sequence[Block], calls: dict[str, list[_Call]], behind: dict[Tensor, Tensor]
) -> dict[str, list[list[Tensor]]]:
    """By split_key, member of the groups and call: the gradient of what k or v gives that came through these query heads.

    Members go together: the gradient of z is kept for one query head of every group, and taken back through the attention.
    """
    writing = {block.address: block for block in blocks if block.name == "O"}
    found: dict[str, list[list[Tensor]]] = {}
    for block in blocks:
        if block.group == 1:
            continue
        out = writing[block.address]
        if len(calls[out.key]) != len(calls[block.key]):
            what = f"{len(calls[block.key])} calls of {block.projection.path}, {len(calls[out.key])} of {out.projection.path}"
            raise SurgeryError(describe("collect", what, "as many, to tell query heads apart", "Leave out query_heads=True."))
        members = [out.projection.channels[member :: block.group].flatten() for member in range(block.group)]
        found[block.split_key] = [
            [
                _gradients(to.read, [at.nudge], _only(behind[to.read], channels), keep=True)[at.nudge]
                for to, at in zip(calls[out.key], calls[block.key], strict=True)
            ]
            for channels in members
        ]
    return found


def _only(gradient: Tensor, channels: Tensor) -> Tensor:
    """The same at some channels, and zero at all others."""
    channels = channels.to(gradient.device)
    return torch.zeros_like(gradient).index_copy(-1, channels, gradient[..., channels])


def _with_ones(read: Tensor, shared: dict[Any, Tensor]) -> Tensor:
    """(sample, position, d + 1): the input of a bias beside those of the weight."""
    if id(read) not in shared:
        shared[id(read)] = torch.cat([read, read.new_ones(*read.shape[:-1], 1)], -1)
    return shared[id(read)]


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
