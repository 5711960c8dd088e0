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
    """What a module read in one call, in the graph, and the zeros that were added to what it gave.

    version: of what it read, for a change in place, which no backward would notice of a frozen weight.
    """

    read: Tensor
    nudge: Tensor
    version: int


Calls = dict[str, list[_Call]]
"""By key of a block, the calls of its projection."""


def factors(
    model: nn.Module,
    blocks: Sequence[Block],
    rows: int,
    losses: Callable[[], Tensor],
    *,
    biases: bool = False,
    query_heads: bool = False,
    checks: bool = True,
) -> tuple[dict[str, Any], Tensor]:
    """By key of a block (wide (sample, position, d), narrow (sample, position, head · channel)), and the losses (sample,).

    losses: runs one forward of `rows` samples, each computed by itself, and gives each one's loss. biases: a bias is the
    weight of an input that is 1. query_heads: also by `split_key`, for blocks that groups of query heads read, the part of
    narrow that came through each of these, (sample, position, query head · channel). checks: that samples, and with
    query_heads groups of heads, are by themselves, by a backward each. Raises SurgeryError where they are not, and for a
    projection that does not map (…, d_in) to (…, d_out), or that the forward does not call.
    """
    modules = {block.projection.path: model.get_submodule(block.projection.path) for block in blocks}
    by_module: dict[int, list[_Call]] = {id(module): [] for module in modules.values()}
    calls = {block.key: by_module[id(modules[block.projection.path])] for block in blocks}

    def record(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        read = args[0] if args else next(iter(kwargs.values()))
        nudge = torch.zeros_like(output, requires_grad=True)
        by_module[id(module)].append(_Call(read, nudge, read._version))
        return output + nudge

    joined = _Joined(rows)
    with torch.enable_grad():
        with around(list({id(module): module for module in modules.values()}.values()), record):
            found = losses()
        _require_calls(modules, by_module)
        nudges = [call.nudge for some in by_module.values() for call in some]
        reads = [call.read for block in blocks if block.name == "O" for call in calls[block.key]] if query_heads else []
        if checks and rows > 1 and bool(found.isfinite().all()):
            _require_apart(_gradients(found[0], nudges, keep=True), blocks, calls, rows)
        behind = _gradients(found.sum(), [*nudges, *reads], keep=query_heads)
        split = _through_query_heads(blocks, calls, behind, joined, checks) if query_heads else {}
    parts: dict[str, Any] = {}
    for block in blocks:
        some = calls[block.key]
        read = joined([call.read.detach() for call in some], block.projection)
        if biases and block.name != "O" and getattr(modules[block.projection.path], "bias", None) is not None:
            read = joined.with_ones(read)
        given = joined([behind[call.nudge] for call in some], block.projection)
        wide, narrow = (given, read) if block.name == "O" else (read, given)
        parts[block.key] = wide, narrow[..., block.projection.channels.to(narrow.device).flatten()]
        if block.key in split:
            parts[block.split_key] = wide, split[block.key]
    return parts, found.detach()


def _require_calls(modules: dict[str, nn.Module], calls: dict[int, list[_Call]]) -> None:
    if silent := [path for path, module in modules.items() if not calls[id(module)]]:
        do = "Leave their layers out by layers=, or pass inputs that reach them."
        raise SurgeryError(describe("collect", f"no call of {', '.join(silent)}", "a forward that runs every block", do))
    changed = [path for path, m in modules.items() if any(c.read._version != c.version for c in calls[id(m)])]
    if changed:
        found = f"a change in place of what {', '.join(changed)} has read"
        raise SurgeryError(describe("collect", found, "inputs that stay as they were", "Leave these layers out by layers=."))


def _gradients(output: Tensor, inputs: list[Tensor], along: Tensor | None = None, *, keep: bool) -> dict[Tensor, Tensor]:
    """By input, its gradient; zeros where it has no part in the output."""
    sought = [tensor for tensor in inputs if tensor.requires_grad] if output.requires_grad else []
    given = torch.autograd.grad(output, sought, along, retain_graph=keep, allow_unused=True) if sought else ()
    found = {i: g for i, g in zip(sought, given, strict=True) if g is not None}
    return {i: torch.zeros_like(i) if i not in found else found[i] for i in inputs}


def _require_apart(first: dict[Tensor, Tensor], blocks: Sequence[Block], calls: Calls, rows: int) -> None:
    """Raises SurgeryError where the first sample's loss has a gradient at others: models that mix or pack samples."""
    for block in blocks:
        for call in calls[block.key]:
            if bool(_by_sample(first[call.nudge], block.projection, rows)[1:].any()):
                path = block.projection.path
                found = f"a gradient of the first sample's loss at others' places in {path!r}"
                expected, do = "samples that are computed each by itself", "Pass one sample at a time, or leave its layer out."
                raise SurgeryError(describe("collect", found, expected, do))


def _through_query_heads(
    blocks: Sequence[Block], calls: Calls, behind: dict[Tensor, Tensor], joined: _Joined, checks: bool
) -> dict[str, Tensor]:
    """By key (sample, position, query head · channel): the gradient at k or v that came through each query head.

    Members of groups go together: the gradient of z is kept for one query head of every group, and taken back through the
    attention. Checked by one group alone, whose gradient must lie in its own kv head.
    """
    writing = {block.address: block for block in blocks if block.name == "O"}
    found: dict[str, Tensor] = {}
    for block in blocks:
        if block.group == 1:
            continue
        out = writing[block.address]
        if len(calls[out.key]) != len(calls[block.key]):
            what = f"{len(calls[block.key])} calls of {block.projection.path}, {len(calls[out.key])} of {out.projection.path}"
            raise SurgeryError(describe("collect", what, "as many, to tell query heads apart", "Leave out query_heads=True."))
        heads, channels = out.projection.channels, block.projection.channels

        def at(chosen: Tensor, block: Block = block, out: Block = out) -> Tensor:
            """(sample, position, kv head, channel): through these channels of z."""
            back = [
                _gradients(to.read, [at.nudge], _only(behind[to.read], chosen), keep=True)[at.nudge]
                for to, at in zip(calls[out.key], calls[block.key], strict=True)
            ]
            given = joined(back, block.projection)
            return given[..., block.projection.channels.to(given.device)]

        if checks and len(channels) > 1 and bool(at(heads[: block.group].flatten())[:, :, 1:].any()):
            what = f"what comes through the first group's query heads at other heads of {block.projection.path!r}, too"
            expected = "query heads that read one kv head each"
            raise SurgeryError(describe("collect", what, expected, "Leave out query_heads=True: heads are normed together."))
        found[block.key] = torch.stack([at(heads[g :: block.group].flatten()) for g in range(block.group)], 3).flatten(2)
    return found


def _only(gradient: Tensor, channels: Tensor) -> Tensor:
    """The same at some channels, and zero at all others."""
    channels = channels.to(gradient.device)
    return torch.zeros_like(gradient).index_copy(-1, channels, gradient[..., channels])


class _Joined:
    """(sample, position, d) of all calls of a module one after another, for a weight's gradient is the sum of its calls'.

    The same tensors give the same one again: q, k and v mostly read one.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._found: dict[tuple[Any, ...], Tensor] = {}
        self._of: list[Tensor] = []

    def __call__(self, tensors: list[Tensor], projection: Projection) -> Tensor:
        key = (projection.batch_axes, *((t.data_ptr(), t.shape, t.stride()) for t in tensors))
        if key not in self._found:
            self._of += tensors  # kept: another tensor may come to lie where one is gone
            self._found[key] = torch.cat([_by_sample(tensor, projection, self.rows) for tensor in tensors], 1)
        return self._found[key]

    def with_ones(self, read: Tensor) -> Tensor:
        """(sample, position, d + 1): the input of a bias beside those of the weight."""
        key = ("ones", id(read))
        if key not in self._found:
            self._found[key] = torch.cat([read, read.new_ones(*read.shape[:-1], 1)], -1)
        return self._found[key]


def _by_sample(tensor: Tensor, projection: Projection, rows: int) -> Tensor:
    if not projection.batch_axes and tensor.dim() == 3:  # (position, batch, d)
        tensor = tensor.transpose(0, 1)
    if tensor.numel() == 0 or tensor.shape[0] % rows:
        found, expected = f"{projection.path} reads or gives {tuple(tensor.shape)}", f"(batch, …, d) of {rows} samples"
        raise SurgeryError(describe("collect", found, expected, "Pass one sample at a time, or leave its layer out."))
    return tensor.reshape(rows, -1, tensor.shape[-1])


def weight_gradient(factor: tuple[Tensor, Tensor], block: Block, head: int) -> Tensor:
    """(sample, wide, narrow) in float32, from the factors of a batch."""
    wide, narrow = factor
    part = narrow[..., head * block.narrow : (head + 1) * block.narrow]
    return wide.float().mT @ part.float()


def squared_norms(factor: tuple[Tensor, Tensor]) -> Tensor:
    """(sample,) float64: the squared norm of a block's whole gradient, which is not formed: Σ_tt' (a_t·a_t') (δ_t·δ_t')."""
    found = []
    for wide, narrow in zip(*factor, strict=True):  # one at a time: products of all positions with all
        a, d = wide.double(), narrow.double()
        found.append(((a @ a.mT) * (d @ d.mT)).sum().clamp(min=0))
    return torch.stack(found)
