"""Heads that are split over several processes (tensor parallel): which of them this one holds, and its plan for these alone.

Each process of a group runs the same forward on equal inputs with its own part of every attention's heads: the projections
to q, k and v hold these heads' channels, the output projection adds up over the group. A spec, a reference and a captured run
number the heads of the whole model. What a process does to its own heads is what the whole model would do to them; what is
captured is gathered from all, in every process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy import Attention, Projection
from surgery.errors import PatchError, UnsupportedArchitectureError, describe
from surgery.interventions import Operation
from surgery.plan import Plan, Probe
from surgery.reference import Entry
from surgery.sites import SITES
from surgery.where import Where

SPLIT = (None, "rowwise", "packed_rowwise")
"""What transformers calls output projections that get a part of the heads; None: torch's own way, which has no name."""


@dataclass(frozen=True, eq=False)
class Share:
    """Part `number` of `count` equal ones of an attention's heads, each in a process of the group."""

    number: int
    count: int
    group: Any

    def of(self, heads: int) -> range:
        """This process's heads among so many."""
        size = heads // self.count
        return range(self.number * size, (self.number + 1) * size)

    def gathered(self, tensor: Tensor) -> Tensor:
        """(batch, heads of the whole model, ..) of this process's heads, in every process."""
        every: Tensor = _Exchange.apply(tensor, self, True)
        return every

    def attention(self, whole: Attention) -> Attention:
        """An attention as this process has it: its heads, and their channels where they lie in its parts of projections."""
        shapes = {
            site: (shape[0], shape[1] // self.count, *shape[2:]) if site in ("q", "k", "v") else shape
            for site, shape in whole.recording.shapes.items()
        }
        own = {site: self._channels(projection) for site, projection in whole.projections.items()}
        projections = {}
        for site, projection in whole.projections.items():
            # A projection to several sites holds a part of each, in the order of the whole.
            beside = [own[other].flatten() for other, p in whole.projections.items() if p.path == projection.path]
            held = torch.cat(beside).sort().values
            projections[site] = replace(projection, channels=torch.searchsorted(held, own[site]))
        return replace(
            whole,
            heads=whole.heads // self.count,
            kv_heads=whole.kv_heads // self.count,
            projections=projections,
            recording=replace(whole.recording, shapes=shapes),
        )

    def _channels(self, projection: Projection) -> Tensor:
        """(head, d): of this process's heads, as the whole projection numbers them."""
        own = self.of(len(projection.channels))
        return projection.channels[own.start : own.stop]

    def plan(self, plan: Plan, whole: Attention) -> Plan:
        """What of a plan for all heads this process does."""
        operations: dict[str, list[Operation]] = {}
        for site, some in plan.operations.items():
            own = self.of(whole.kv_heads if site == "k" else whole.heads)
            held = [local for operation in some if (local := self._operation(operation, own)) is not None]
            if held or site in plan.probes:
                operations[site] = held  # [] has what is captured in the form in which the others have it
        heads = len(self.of(whole.heads))
        probes = {site: [self._probe(probe, heads) for probe in some] for site, some in plan.probes.items()}
        return Plan(operations, probes, plan.reconstruct)

    def _operation(self, operation: Operation, own: range) -> Operation | None:
        """What of an operation this process does to its own heads; None if it concerns none of them."""
        return _Whole.of(operation, len(own), self) if callable(operation.edit.action) else _operation(operation, own)

    def _probe(self, probe: Probe, heads: int) -> Probe:
        """Sees all heads of this process, and hands on those that are wanted of all processes."""

        def take(tensor: Tensor, where: Where) -> None:
            every = self.gathered(tensor)
            probe.take(every if probe.heads is None else every[:, list(probe.heads)], where)

        return Probe(probe.site, None if probe.heads is None else tuple(range(heads)), take, probe)


@dataclass
class _Whole(Operation):
    """What is called with heads of several processes, and so by each of these: with all of them, of which it keeps its own."""

    whole: Operation | None = None
    share: Share | None = None

    @classmethod
    def of(cls, whole: Operation, heads: int, share: Share) -> _Whole:
        """heads: of this process, all of which are concerned."""
        numbers = tuple(range(heads))
        return cls(whole.number, whole.edit, whole.site, whole.address, numbers, numbers, None, whole.block, whole, share)

    @property
    def acts_here(self) -> bool:
        assert self.whole is not None and self.share is not None
        own = self.share.of(self.share.count * len(self.heads))
        return any(head in own for head in self.whole.heads)

    def _apply(self, x: Tensor, where: Where, held: Sequence[int] | None) -> Tensor:
        assert self.whole is not None and self.share is not None
        if where.allowed is not None and where.allowed.shape[1] > 1:
            where = replace(where, allowed=self.share.gathered(where.allowed))
        new: Tensor = _Exchange.apply(self.whole._apply(self.share.gathered(x), where, None), self.share, False)
        return new


class _Exchange(torch.autograd.Function):
    """This process's heads to those of all, or back again; the gradient goes the other way.

    What follows the heads of all is the same in every process, and so is its gradient; that of a process's own heads comes
    together from the processes that go on with them.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, share: Share, is_gathered: bool) -> Tensor:
        ctx.share, ctx.is_gathered = share, is_gathered
        return (_all if is_gathered else _own)(tensor, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (_own if ctx.is_gathered else _all)(gradients[0], ctx.share), None, None


def _all(tensor: Tensor, share: Share) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    # Its name from torch 2.13 on, where the older one warns.
    gather: Any = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    every: Tensor = collectives.wait_tensor(gather(tensor.contiguous(), 1, share.group))
    return every


def _own(tensor: Tensor, share: Share) -> Tensor:
    own = share.of(tensor.shape[1])
    return tensor[:, own.start : own.stop].clone()


def _operation(operation: Operation, own: range) -> Operation | None:
    """The same of a process's own heads, numbered from 0; None if it concerns none of them."""
    chosen = [number for number, head in enumerate(operation.heads) if head in own]
    if not chosen:
        return None
    edit, entry = operation.edit, operation.entry
    if isinstance(edit.value, Tensor):
        edit = edit.model_copy(update={"value": _of_heads(edit.value, chosen, operation)})
    heads = tuple(operation.heads[number] - own.start for number in chosen)
    if entry is not None:
        entry = _entry(entry, [operation.heads[number] for number in chosen], heads)
    noise = tuple(operation.noise_heads[number] for number in chosen)
    return replace(operation, edit=edit, heads=heads, noise_heads=noise, entry=entry)


def _of_heads(value: Tensor, chosen: Sequence[int], operation: Operation) -> Tensor:
    """The rows of some of an operation's heads: (head, d), (head, position, d), (batch, head, position, d)."""
    axis = {2: None if SITES[operation.site].is_matrix else 0, 3: 0, 4: 1}.get(value.dim())
    return (
        value if axis is None or value.shape[axis] == 1 else value.index_select(axis, torch.tensor(chosen, device=value.device))
    )


def _entry(entry: Entry, wanted: Sequence[int], heads: tuple[int, ...]) -> Entry:
    axis = 1 if entry.value.dim() == 4 else 0
    held = list(range(entry.value.shape[axis]) if entry.heads is None else entry.heads)
    rows = torch.tensor([held.index(head) for head in wanted], device=entry.value.device)
    value, spread = (None if t is None else t.index_select(axis, rows) for t in (entry.value, entry.spread))
    assert value is not None
    return Entry(value, spread, heads)


def share_of(model: nn.Module, attention: Attention) -> Share | None:
    """The part of an attention's heads that this process holds; None if it holds them all."""
    out = attention.projections.get("o")
    weight = None if out is None else getattr(model.get_submodule(out.path), "weight", None)
    found = None if out is None else _split(model, out, weight)
    return None if found is None else Share(*found)


def is_shared(model: nn.Module) -> bool:
    """Whether forwards of a model need all processes: its heads or weights are spread over them, or it keeps them in step."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    wrappers = FullyShardedDataParallel, DistributedDataParallel
    if any(isinstance(module, wrappers) or getattr(module, "_tp_size", None) for module in model.modules()):
        return True
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())  # ds_id: DeepSpeed's partitions


def require_whole(model: nn.Module, attentions: Iterable[Attention], what: str, do: str) -> None:
    """Raises UnsupportedArchitectureError for what needs all heads of an attention in one process."""
    if split := [attention.address for attention in attentions if share_of(model, attention) is not None]:
        found = f"{', '.join(split[:4])}, whose heads are split over processes"
        raise UnsupportedArchitectureError(describe(what, found, "heads that are all in one process", do))


def require_same(shares: Iterable[Share | None], what: str) -> None:
    """Raises PatchError, in all processes that hold shares, unless each was given the same: what it does is its own part of it.

    what: cuts and captures in words. A process that makes no call at all keeps the others waiting.
    """
    if (share := next((share for share in shares if share is not None), None)) is None:
        return
    given = [""] * share.count
    torch.distributed.all_gather_object(given, what, group=share.group)
    if len(set(given)) > 1:
        found = "; ".join(f"process {number}: {words}" for number, words in enumerate(given))
        do = "Number heads as in the whole model, and make the same calls in every process."
        raise PatchError(describe("patch_model, of heads that are split over processes", found, "the same in all", do))


def split_problems(attention: Attention, share: Share, plan: Plan) -> list[str]:
    """What cannot be done where heads are split."""
    found = []
    what = f"{attention.path!r}, whose heads are split over {share.count} processes"
    if math.gcd(share.count, attention.heads, attention.kv_heads) != share.count:
        heads = f"{attention.heads} heads and {attention.kv_heads} kv heads"
        found.append(describe(what, heads, f"multiples of {share.count}", "Use as many processes as divide both."))
    if "result" in plan.sites:
        do = "Use site 'z': what a head adds to the output is z times its rows of W_O."
        found.append(describe(what, "a cut or capture of 'result', which is added up over processes", "another site", do))
    return found


def _split(model: nn.Module, out: Projection, weight: Any) -> tuple[int, int, Any] | None:
    """(number, count, group) of the processes over which a projection's inputs are split."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(weight, DTensor):
        return None
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    parents = [model.get_submodule(path) for path in _above(out.path)]
    if "tp" in names:
        axis = names.index("tp")
    elif mesh.ndim == 1 and not any(isinstance(parent, FSDPModule) for parent in parents):
        axis = 0
    else:
        return None  # weights that come together before a forward
    placement = weight.placements[axis]
    if not isinstance(placement, Shard) or placement.dim % weight.dim() != weight.dim() - 1 or mesh.size(axis) == 1:
        return None
    if _style(model, out.path) not in SPLIT:
        return None  # it gets all heads, and takes its part of them itself
    return mesh.get_local_rank(axis), mesh.size(axis), mesh.get_group(axis)


def _style(model: Any, path: str) -> str | None:
    """How transformers splits a projection, by the model's plan; None where it is not in one."""
    plan = getattr(model, "tp_plan", None) or {}
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return next((style for name, style in plan.items() if generic == name or generic.endswith(f".{name}")), None)


def _above(path: str) -> list[str]:
    """The paths of the modules that hold a module, and its own."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
