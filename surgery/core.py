"""The state of a patched module and its attention core: which kernel computes what, and where the cuts act in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy import Anatomy, Attention
from surgery.cache import check_cache, find_cache, is_updated, n_queries, offsets
from surgery.errors import CacheError, SurgeryError, describe
from surgery.family import Family, find_family
from surgery.interventions import Heads, Operation, Where
from surgery.masks import Mask, is_additive, to_additive
from surgery.rewrite import Reconstruction, Rewriter, read
from surgery.sites import MATRIX_SITES, SITES
from surgery.spec import Spec

_PAGED_SITES = frozenset({"q", "k", "rot_q", "z", "result"})


@dataclass
class Probe:
    """A request to see a site: `take(tensor, offset)` gets (batch, head, .., ..) of the wanted heads; None for all.

    offset: the absolute position of the tensor's first row.

    At k and v, None gives one row per kv head (after cuts at v, per query head, for they may differ then), a choice of heads
    what each of these query heads reads.
    """

    site: str
    heads: tuple[int, ...] | None
    take: Callable[[Tensor, Any], None]


@dataclass
class Plan:
    """What one module does: operations and probes by site, in spec order. reconstruct: never use a fused kernel."""

    operations: dict[str, list[Operation]] = field(default_factory=dict)
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    reconstruct: bool = False

    @property
    def sites(self) -> set[str]:
        return set(self.operations) | set(self.probes)

    def of(self, site: str) -> list[Operation]:
        return self.operations.get(site, [])

    def heads_at(self, sites: Iterable[str], heads: int, probes: bool = True) -> tuple[int, ...]:
        """The heads that any operation (and any probe) at these sites concerns."""
        chosen: set[int] = set()
        for site in sites:
            for operation in self.of(site):
                chosen.update(operation.heads)
            for probe in self.probes.get(site, ()) if probes else ():
                chosen.update(range(heads) if probe.heads is None else probe.heads)
        return tuple(sorted(chosen))


@dataclass
class Session:
    """What the patched modules of one model share: spec, kernel, anatomy, and which of its cuts have run.

    watch(operation, before, after): sees every operation act, for the self-test. forward: the addresses that the present
    forward of the model has run; is_inside: one of them has not come to its end (or never will, if it raised).
    """

    spec: Spec = field(default_factory=Spec)
    kernel: str = "auto"
    anatomy: Anatomy | None = None
    planned: frozenset[str] = frozenset()
    runs: dict[str, int] = field(default_factory=dict)
    watch: Callable[[Operation, Tensor, Tensor], None] | None = None
    report: Callable[[Sequence[str]], None] | None = None
    forward: set[str] = field(default_factory=set)
    is_inside: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "anatomy": None}

    def enter(self, address: str) -> None:
        """Counts a run of a module. When one runs a second time, modules that never ran were left out by a whole forward."""
        if self.is_inside:
            self.forward.clear()  # an exception ended the forward before: it says nothing of the modules that it left out
        self.runs[address] = self.runs.get(address, 0) + 1
        if address in self.forward:
            self.forward.clear()
            silent = sorted(self.planned - set(self.runs))
            report, self.report = self.report, None
            if silent and report is not None:
                report(silent)
        self.forward.add(address)
        self.is_inside = True

    def leave(self) -> None:
        """Ends what `enter` began."""
        self.is_inside = False

    @property
    def never_ran(self) -> list[str]:
        """Addresses with cuts or captures that never ran although others did."""
        return sorted(self.planned - set(self.runs)) if self.forward and not self.is_inside else []


class Surgery:
    """The state of one patched module. It lives in the module's __dict__ as "_surgery" and is copied and pickled with it."""

    def __init__(self, attention: Attention, session: Session) -> None:
        self.session = session
        self.address, self.path, self.is_cross = attention.address, attention.path, attention.kind == "cross"
        self.heads, self.kv_heads, self.core_groups = attention.heads, attention.kv_heads, attention.core_groups
        self.sample = {name: attention.recording.shapes[name] for name in "qkv"}, _plain(attention.recording.core["kwargs"])
        self.taps: dict[str, Any] = {}
        self.set_plan(Plan())

    def set_plan(self, plan: Plan, taps: Mapping[str, Any] | None = None) -> None:
        """Gives the module its cuts. taps: by attribute name of the projections that the module itself calls."""
        self.plan = plan
        self.taps = dict(taps or {})
        self.is_idle = not plan.sites and not plan.reconstruct
        self.matrix_heads = plan.heads_at(MATRIX_SITES, self.heads)
        self.edited_matrix_heads = plan.heads_at(MATRIX_SITES, self.heads, probes=False)
        self.result_heads = plan.heads_at(("result",), self.heads)
        self.edits_kv = bool(plan.of("rot_k") or plan.of("v"))
        self.needs_position = bool(plan.probes) or any(o.needs_position for site in plan.operations.values() for o in site)
        own = {site for tap in self.taps.values() for site in tap.sites}
        self.expected = {site for site in plan.sites if SITES[site].where == "core" or site in own}
        self.detach()

    def detach(self) -> None:
        """Forgets the live module and what is derived from it; the next forward makes it again."""
        self.module: Any = None
        self.view: Any = None
        self.ungrouped: Any = None
        self.family: Family = None  # type: ignore[assignment]
        self.rewriter: Rewriter = None  # type: ignore[assignment]
        self.config: Any = None
        self.config_view: Any = None
        self.where = Where()
        self.reached: set[str] = set()
        self.awaited: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        names = ("module", "view", "ungrouped", "family", "rewriter", "config", "config_view")
        return {**self.__dict__, **dict.fromkeys(names), "where": Where(), "reached": set()}

    def attach(self, module: nn.Module, ungrouped: Any) -> None:
        """Takes the live module, and its view without head groups; whoever calls sets the view that its forward runs on."""
        family = find_family(module)
        assert family is not None
        self.module, self.ungrouped, self.family = module, ungrouped, family
        self.rewriter = Rewriter(family.eager, module)
        for masked in (False, True):
            # Made now, so that torch.compile never meets the tracer.
            arguments = sample_arguments(self.rewriter, *self.sample, masked=masked)
            for groups in {1, self.core_groups}:
                self.rewriter.graph(arguments, groups)

    @property
    def implementation(self) -> str:
        """The attention implementation that the unpatched module would run now."""
        config = self.module.__dict__.get("config")
        return getattr(config, "_attn_implementation", None) or "eager"

    @property
    def computes_as(self) -> str:
        """The implementation whose numbers this module gives: its own, or eager where everything is reconstructed."""
        return "eager" if self.plan.reconstruct else self.implementation

    @property
    def kernel_in_use(self) -> str:
        """The kernel that the next forward runs, in words."""
        if self.plan.reconstruct or (self.matrix_heads and self.family.is_eager(self.implementation)):
            return "reconstructed eager"
        more = f" + {len(self.matrix_heads)} of {self.heads} heads reconstructed" if self.matrix_heads else ""
        return f"{self.implementation}{more}"

    @property
    def reconstruction(self) -> Reconstruction:
        """The rewritten eager attention of this module, for a call with a mask."""
        return self.rewriter.graph(sample_arguments(self.rewriter, *self.sample, masked=True), self.core_groups)

    # -- one forward ----------------------------------------------------------------------------------------------------

    def enter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before the family's forward: checks the KV cache, and reads from it where in the sequence this call is."""
        if (cache := find_cache(args, kwargs)) is not None:
            check_cache(cache, self.session.spec.fingerprint(), self.module, self.path)
        if not self.is_idle:
            self.reached = set()
            self.awaited = self.expected - {"k"} if self.is_cross and is_updated(cache, self.module) else self.expected
            self.where = Where(is_cross=self.is_cross)
            if cache is not None and self.needs_position:
                queries, keys, filled = offsets(cache, self.module, self.is_cross, n_queries(args, kwargs))
                self.where = Where(queries, keys, None, self.is_cross, filled)

    def require(self, sites: Iterable[str]) -> None:
        """After the family's forward: these points must have been reached."""
        if missing := set(sites) - self.reached:
            raise SurgeryError(
                describe(
                    f"{self.path!r}",
                    f"a forward that never came to {', '.join(sorted(missing))}",
                    "every cut and capture executed",
                    "The module's code took a branch around its attention function; cut another site, or report it.",
                )
            )

    # -- the core -------------------------------------------------------------------------------------------------------

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, implementation: str | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Attention with the plan's cuts; see `surgery.interface.attend` for shapes.

        In the module's own kernel, unless the attention matrix of some heads is needed: then these heads alone are
        computed by the reconstruction, all of them where the module computes its matrix anyway.
        """
        if kwargs.get("cache") is not None:
            self._check_paged()
        if implementation is None or self.plan.reconstruct:
            implementation = self.implementation
        if self.plan.reconstruct or (self.matrix_heads and self.family.is_eager(implementation)):
            return self._all_heads(implementation, query, key, value, attention_mask, kwargs)
        query = self.at("rot_q", query)
        module, groups = self.module, self.core_groups
        if self.edits_kv and groups > 1:
            # Heads of a group no longer read the same keys and values.
            module, groups = self.ungrouped, 1
            key, value = (torch.repeat_interleave(t, self.core_groups, 1) for t in (key, value))
        key, value = self.at("rot_k", key), self.at("v", value)
        output, weights = self.family.kernel(implementation)(module, query, key, value, attention_mask, **kwargs)
        if self.matrix_heads:
            output = self._with_matrix(output, implementation, query, key, value, attention_mask, kwargs, groups)
        return self.at("z", output.transpose(1, 2)).transpose(1, 2), weights

    def _check_paged(self) -> None:
        """Continuous batching: many sequences in one row, and their keys in a paged cache that only the kernel reads."""
        if self.plan.reconstruct or self.needs_position or self.plan.sites - _PAGED_SITES:
            raise CacheError(
                describe(
                    f"{self.path!r}",
                    f"a paged KV cache (continuous batching) and work at {', '.join(sorted(self.plan.sites)) or 'every site'}",
                    f"kernel='auto' and cuts at {', '.join(sorted(_PAGED_SITES))} that do not depend on the position",
                    "Use model.generate.",
                )
            )

    def at(self, site: str, tensor: Tensor, held: Sequence[int] | None = None, only: frozenset[str] | None = None) -> Tensor:
        """An intervention point: applies the site's operations in spec order and shows the result to its probes.

        held: the heads on axis 1 of the tensor; None for all (at rot_k and v possibly one per kv head).
        """
        if site not in self.plan.sites or (only is not None and site not in only):
            return tensor
        self.reached.add(site)
        if site in ("rot_k", "v") and site in self.plan.probes:
            tensor = tensor.clone()  # a static cache writes on in what it hands out
        for operation in self.plan.of(site):
            before, tensor = tensor, operation.apply(tensor, self.where, held)
            if self.session.watch is not None:
                self.session.watch(operation, before, tensor)
        for probe in self.plan.probes.get(site, ()):
            probe.take(self._seen(site, tensor, probe.heads, held), self.where.offset(site))
        return tensor

    def _seen(self, site: str, tensor: Tensor, heads: tuple[int, ...] | None, held: Sequence[int] | None) -> Tensor:
        """What a probe gets: its heads, whether or not the kv heads are repeated by now."""
        groups = self.heads // tensor.shape[1] if held is None else 1
        if heads is None:
            if site in ("k", "v") and not self.plan.of(site):
                return tensor[:, :: tensor.shape[1] // self.kv_heads]
            if site in ("k", "v"):
                return tensor  # after cuts, the heads of a group may differ
            if groups > 1:
                return tensor.repeat_interleave(groups, 1)
            return tensor
        rows = [head // groups if held is None else list(held).index(head) for head in heads]
        return tensor[:, rows]

    def _mask(self, implementation: str, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> Mask:
        if not self.family.is_eager(implementation):
            found = to_additive(implementation, mask, query, key, self.module, kwargs)
        elif self.matrix_heads and is_additive(mask):
            found = to_additive("eager", mask, query, key, self.module, kwargs)
        else:
            found = Mask(mask, None)
        if self.family.allowed is not None and self.matrix_heads:
            return Mask(found.additive, self.family.allowed(self.module, query, key, mask, kwargs), found.empty_rows)
        return found

    def _all_heads(
        self, implementation: str, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Everything by the reconstruction, every point in its place."""
        mask = self._mask(implementation, query, key, attention_mask, kwargs)
        self.where.allowed = mask.allowed
        arguments = self.rewriter.bind(query, key, value, mask.additive, kwargs)
        return self.rewriter.graph(arguments, self.core_groups)(self.at, self.module, arguments)

    def _with_matrix(
        self,
        output: Tensor,
        implementation: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        kwargs: Mapping[str, Any],
        groups: int,
    ) -> Tensor:
        """The kernel's output (batch, query, head, d_head) with the heads whose scores or pattern are cut put in.

        Heads that are only watched keep the kernel's numbers. So do rows without any key to attend to, and rows that are
        padding to the kernel: what a kernel gives there is its own.
        """
        mask = self._mask(implementation, query, key, attention_mask, kwargs)
        self.where.allowed = mask.allowed
        if not self.edited_matrix_heads and "dropout" in kwargs:
            kwargs = {**kwargs, "dropout": 0.0}  # watching must not draw random numbers
        held, graph, arguments = self._some_heads(query, key, value, mask, kwargs, groups)
        at = functools.partial(self.at, held=held, only=frozenset(MATRIX_SITES))
        z = graph(at, self.module, arguments)[0].to(output.dtype)
        if not self.edited_matrix_heads:
            return output
        heads = Heads(self.edited_matrix_heads)
        z = Heads([held.index(head) for head in self.edited_matrix_heads]).take(z, 2)
        if mask.allowed is not None:
            allowed = mask.allowed if mask.allowed.shape[1] == 1 else heads.take(mask.allowed)
            live = allowed.any(dim=-1).transpose(1, 2)[..., None]
            if mask.empty_rows is not None:
                live = live & ~mask.empty_rows[:, :, None, None]
            z = torch.where(live, z, heads.take(output, 2))
        return heads.put(output, z, 2)

    def _some_heads(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, kwargs: Mapping[str, Any], groups: int
    ) -> tuple[tuple[int, ...], Reconstruction, dict[str, Any]]:
        """The call of the reconstruction for the heads whose matrix is needed: heads, graph, arguments.

        All heads, if something that the family's function reads has no clear head axis.
        """
        heads, rows = Heads(self.matrix_heads), [head // groups for head in self.matrix_heads]
        arguments = self.rewriter.bind(
            heads.take(query),
            key[:, rows] if groups > 1 else heads.take(key),
            value[:, rows] if groups > 1 else heads.take(value),
            self._of_heads(mask.additive, heads),
            {name: self._of_heads(argument, heads) for name, argument in kwargs.items()},
        )
        graph = self.rewriter.graph(arguments, 1)
        for name in graph.inputs:
            tensor = None if name in arguments or name == "at" else read(self.module, name)
            if isinstance(tensor, Tensor) and tensor.dim():
                if list(tensor.shape).count(self.heads) != 1:
                    arguments = self.rewriter.bind(query, key, value, mask.additive, kwargs)
                    return tuple(range(self.heads)), self.rewriter.graph(arguments, groups), arguments
                arguments[name] = heads.take(tensor, list(tensor.shape).index(self.heads))
        return self.matrix_heads, graph, arguments

    def _of_heads(self, argument: Any, heads: Heads) -> Any:
        is_by_head = isinstance(argument, Tensor) and argument.dim() == 4 and argument.shape[1] == self.heads > 1
        return heads.take(argument) if is_by_head else argument


def _plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v.as_subclass(Tensor).detach() if isinstance(v, Tensor) else v for n, v in kwargs.items()}


def sample_arguments(
    rewriter: Rewriter, shapes: Mapping[str, tuple[int, ...]], kwargs: Mapping[str, Any], masked: bool
) -> dict[str, Any]:
    """Random arguments of the recorded shapes for a family's eager function, with an additive mask or with None."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shapes[name], generator=generator) for name in "qkv")
    mask = None
    if masked:
        mask = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2])
        mask[..., -1:] = torch.finfo(mask.dtype).min
    return rewriter.bind(query, key, value, mask, kwargs)
