"""The heads whose attention matrix is needed beside a fused kernel: they alone, reconstructed, over blocks of queries.

Rows of an attention matrix do not know each other, so that blocks of them give what all at once give, up to the last bits of
the products. Memory then grows by what is captured and by one block, not by every intermediate of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from surgery.family import Family
from surgery.masks import Mask, Rows, is_additive, to_additive
from surgery.plan import Plan, Probe
from surgery.reconstruction import Reconstruction, read
from surgery.rewrite import Rewriter
from surgery.sites import MATRIX_SITES
from surgery.where import Heads, Where

BLOCK_ENTRIES = {"cpu": 1 << 19, "other": 1 << 24}
"""Entries of the matrix (batch × head × query × key) in a block, by device: what fits a cache, what keeps a GPU busy."""


class Host(Protocol):
    """What this file needs of a patched module's state (`surgery.core.Core`)."""

    plan: Plan
    now: Any
    module: Any
    family: Family
    rewriter: Rewriter
    heads: int
    matrix_heads: tuple[int, ...]
    edited_matrix_heads: tuple[int, ...]

    def at(self, site: str, tensor: Tensor, held: Sequence[int], show: Callable[[Probe, Tensor], None] | None) -> Tensor:
        """The intervention point of a site, for the heads held."""
        ...


@dataclass(frozen=True)
class Call:
    """One call of the core: its arguments, the implementation that they are made for, query heads per head of key."""

    implementation: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    kwargs: Mapping[str, Any]
    groups: int


@dataclass(frozen=True)
class _Chosen:
    """A call cut down to heads: arguments of the eager function without the mask, and the module's tensors it reads."""

    held: tuple[int, ...]
    groups: int
    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def with_matrix(surgery: Host, output: Tensor, call: Call) -> Tensor:
    """The kernel's output (batch, query, head, d_head) with the heads whose scores or pattern are cut put in.

    Heads that are only watched keep the kernel's numbers. So do rows without any key to attend to, and rows that are
    padding to the kernel: what a kernel gives there is its own.
    """
    chosen = _choose(surgery, call)
    edited, base, queries = surgery.edited_matrix_heads, surgery.now.where, call.query.shape[2]
    seen, z = _Seen(queries), _Joined(queries, 1)
    for rows in _blocks(surgery, call, chosen):
        mask = mask_of(surgery, call, rows)
        surgery.now.where = replace(base.of_queries(*rows), allowed=mask.allowed)
        graph, arguments = _graph(surgery, call, chosen, mask.additive, rows)

        def at(site: str, tensor: Tensor, rows: Rows = rows) -> Tensor:
            return surgery.at(site, tensor, chosen.held, seen.of(rows)) if site in MATRIX_SITES else tensor

        found = graph(at, surgery.module, arguments)
        if edited:
            z.add(rows, _merge(output[:, slice(*rows)], found[0], mask, chosen.held, edited))
    surgery.now.where = base
    seen.hand_on(base)
    return Heads(edited).put(output, z.whole(), 2) if edited else output


def mask_of(surgery: Host, call: Call, rows: Rows | None = None) -> Mask:
    """The mask of some rows (None for all) as eager attention takes it, and what it allows where the matrix is needed.

    What a family gives its own eager attention is passed on as it is, in whatever form that may be.
    """
    mask, is_eager = Mask(call.mask, None), surgery.family.is_eager(call.implementation)
    if not is_eager or (surgery.matrix_heads and is_additive(call.mask)):
        name = "eager" if is_eager else call.implementation
        mask = to_additive(name, call.mask, call.query, call.key, surgery.module, call.kwargs, rows)
    if surgery.family.allowed is None or not surgery.matrix_heads:
        return mask
    return replace(mask, allowed=surgery.family.allowed(surgery.module, call.query, call.key, call.mask, call.kwargs))


def _choose(surgery: Host, call: Call) -> _Chosen:
    """The call for the heads whose matrix is needed; for all, if something that the function reads has no clear head axis."""
    heads, rows = Heads(surgery.matrix_heads), [head // call.groups for head in surgery.matrix_heads]
    key, value = (Heads(rows).take(t) for t in (call.key, call.value))
    kwargs = {name: _of_heads(surgery, argument, heads) for name, argument in call.kwargs.items()}
    arguments = surgery.rewriter.bind(heads.take(call.query), key, value, None, kwargs)
    tensors = {}
    for name in surgery.rewriter.graph(arguments, 1).inputs:
        tensor = None if name in arguments or name == "at" else read(surgery.module, name)
        if isinstance(tensor, Tensor) and tensor.dim():
            if list(tensor.shape).count(surgery.heads) != 1:
                arguments = surgery.rewriter.bind(call.query, call.key, call.value, None, call.kwargs)
                return _Chosen(tuple(range(surgery.heads)), call.groups, arguments, {})
            tensors[name] = heads.take(tensor, list(tensor.shape).index(surgery.heads))
    return _Chosen(surgery.matrix_heads, 1, arguments, tensors)


def _of_heads(surgery: Host, argument: Any, heads: Heads) -> Any:
    is_by_head = isinstance(argument, Tensor) and argument.dim() == 4 and argument.shape[1] == surgery.heads > 1
    return heads.take(argument) if is_by_head else argument


def _graph(
    surgery: Host, call: Call, chosen: _Chosen, additive: Tensor | None, rows: Rows
) -> tuple[Reconstruction, dict[str, Any]]:
    """The reconstruction for some rows, and its arguments; as far as the last point that is watched, if nothing is cut."""
    key, value, mask = surgery.rewriter.names[2:5]
    arguments = {**chosen.arguments, mask: _of_heads(surgery, additive, Heads(chosen.held))}
    graph = surgery.rewriter.graph(arguments, chosen.groups)
    if not surgery.edited_matrix_heads:
        graph = graph.until(max(set(MATRIX_SITES) & set(surgery.plan.probes), key=MATRIX_SITES.index))
    if rows != (0, call.query.shape[2]):
        by_row = set(arguments) - {key, value, mask}
        arguments |= {name: _of_rows(arguments[name], call.query.shape[2], rows) for name in by_row}
    return graph, {**arguments, **chosen.tensors}


def _of_rows(argument: Any, queries: int, rows: Rows) -> Any:
    is_by_row = isinstance(argument, Tensor) and argument.dim() == 4 and argument.shape[2] == queries
    return argument[:, :, slice(*rows)] if is_by_row else argument


def _merge(output: Tensor, z: Tensor, mask: Mask, held: tuple[int, ...], edited: tuple[int, ...]) -> Tensor:
    """(batch, query, edited head, d_head): the reconstructed z, the kernel's own where a row attends to nothing."""
    heads = Heads(edited)
    z = Heads([held.index(head) for head in edited]).take(z.to(output.dtype), 2)
    if mask.allowed is None:
        return z
    allowed = mask.allowed if mask.allowed.shape[1] == 1 else heads.take(mask.allowed)
    live = allowed.any(dim=-1).transpose(1, 2)[..., None]
    if mask.empty_rows is not None:
        live = live & ~mask.empty_rows[:, :, None, None]
    return torch.where(live, z, heads.take(output, 2))


# -- blocks of queries --------------------------------------------------------------------------------------------------


def _blocks(surgery: Host, call: Call, chosen: _Chosen) -> Iterator[Rows]:
    """The blocks of queries to compute one after another: a single one if it is small, or if rows are not independent."""
    queries = call.query.shape[2]
    if torch.compiler.is_compiling() or not _may_split(surgery, call, chosen):
        yield 0, queries
        return
    step = max(1, _limit(call) // (call.query.shape[0] * len(chosen.held) * call.key.shape[2]))
    for start in range(0, queries, step):
        yield start, min(start + step, queries)


def _limit(call: Call) -> int:
    device = call.query.device.type
    return BLOCK_ENTRIES[device if device in BLOCK_ENTRIES else "other"]


def _may_split(surgery: Host, call: Call, chosen: _Chosen) -> bool:
    if call.query.shape[0] * len(chosen.held) * call.query.shape[2] * call.key.shape[2] <= _limit(call):
        return False
    if surgery.family.allowed is not None or call.query.is_meta or isinstance(call.query, FakeTensor):
        return False  # a rule for all queries; tensors without data, which take no memory
    if surgery.edited_matrix_heads and any(module.training for module in surgery.module.modules()):
        return False  # dropout, whose random numbers would be drawn in another order
    if not all(operation.acts_by_row for site in MATRIX_SITES for operation in surgery.plan.of(site)):
        return False
    graph, arguments = _graph(surgery, call, chosen, mask_of(surgery, call, (0, 1)).additive, (0, call.query.shape[2]))
    if id(graph) not in _BY_ROW:
        _BY_ROW[id(graph)] = _acts_by_row(surgery, call, graph, arguments)
    return _BY_ROW[id(graph)]


_BY_ROW: dict[int, bool] = {}
"""By reconstruction (they live as long as the process): whether it computes each row of the matrix from that row alone."""


def _acts_by_row(surgery: Host, call: Call, graph: Reconstruction, arguments: Mapping[str, Any]) -> bool:
    """Whether three rows over four keys, random, come out the same at once and in two blocks."""
    query, key, value, mask = surgery.rewriter.names[1:5]
    generator = torch.Generator().manual_seed(0)

    def small(name: str, argument: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.dim() != 4:
            return argument
        heads, length, width = argument.shape[1:]
        length = 4 if name in (key, value) else 3 if name == mask or length == call.query.shape[2] else length
        width = 4 if name not in (query, key, value) and width == call.key.shape[2] else width
        return torch.randn(1, heads, length, width, generator=generator).to(argument)

    small_ones = {name: small(name, argument) for name, argument in arguments.items()}

    def run(rows: Rows) -> Tensor:
        own = {n: _of_rows(a, 3, rows) if n not in (key, value) else a for n, a in small_ones.items()}
        found = graph(lambda site, tensor: tensor, surgery.module, own)
        return found if isinstance(found, Tensor) else found[0].transpose(1, 2)

    with torch.no_grad():
        whole, split = run((0, 3)).double(), torch.cat([run((0, 2)), run((2, 3))], 2).double()
    # Another blocking of the products changes their last bits; a row that knows others changes far more.
    return torch.allclose(whole, split, rtol=0.05, atol=0.05)


class _Joined:
    """A tensor put together from blocks of rows along an axis; written in place where no gradient needs the parts."""

    def __init__(self, queries: int, dim: int) -> None:
        self.queries, self.dim = queries, dim
        self.parts: list[Tensor] = []

    def add(self, rows: Rows, tensor: Tensor) -> None:
        if tensor.requires_grad or rows == (0, self.queries):
            self.parts.append(tensor)
            return
        if not self.parts:
            shape = list(tensor.shape)
            shape[self.dim] = self.queries
            self.parts.append(tensor.new_empty(shape))
        self.parts[0].narrow(self.dim, rows[0], rows[1] - rows[0]).copy_(tensor)

    def whole(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, self.dim)


class _Seen:
    """What probes see, put together from blocks of rows."""

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.of_probes: dict[int, tuple[Probe, _Joined]] = {}

    def of(self, rows: Rows) -> Any:
        """What takes a block's tensor in a probe's place; None if the block is everything."""

        def take(probe: Probe, tensor: Tensor) -> None:
            self.of_probes.setdefault(id(probe), (probe, _Joined(self.queries, 2)))[1].add(rows, tensor)

        return None if rows == (0, self.queries) else take

    def hand_on(self, where: Where) -> None:
        """Gives each probe its whole tensor."""
        for probe, seen in self.of_probes.values():
            probe.take(seen.whole(), where)
