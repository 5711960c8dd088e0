"""The state of a patched module and its attention core: which kernel computes what, and where the cuts act in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy import Attention
from surgery.cache import check_cache, find_cache, is_updated, layer_of, n_queries, offsets
from surgery.errors import CacheError, SurgeryError, describe
from surgery.family import Family, find_family
from surgery.forward import Forward
from surgery.inline import Inline, record_inline
from surgery.own_keys import own_keys, reads_apart, with_own_keys
from surgery.paged import is_paged, key_offset, obstacle, query_offset, read_pages, reads_keys
from surgery.plan import Plan, Probe, Session, model_call
from surgery.reconstruction import Reconstruction
from surgery.rewrite import Rewriter
from surgery.samples import blank_arguments, plain
from surgery.shares import Share
from surgery.sites import CORE_SITES, MATRIX_SITES, SITES
from surgery.unfused import Call, mask_of, with_matrix
from surgery.where import Where


class Core:
    """The state of one patched module and its core. It lives in the module's __dict__ as "_surgery" and is copied with it."""

    def __init__(self, attention: Attention, session: Session) -> None:
        self.session = session
        self.address, self.path, self.is_cross = attention.address, attention.path, attention.kind == "cross"
        self.set_heads(attention)
        self.layer = attention.layer
        self.share: Share | None = None
        self.query_axis = 0 if "q" in attention.projections and attention.projections["q"].batch_axes == 0 else 1
        self.family: Family = attention.family
        self.taps: dict[str, Any] = {}
        self.set_plan(Plan())

    def set_heads(self, attention: Attention) -> None:
        """How many heads there are here, which is less when they were split over processes since."""
        self.heads, self.kv_heads, self.core_groups = attention.heads, attention.kv_heads, attention.core_groups
        self.sample = (
            {name: attention.recording.shapes[name] for name in "qkv"},
            plain(attention.recording.core.get("kwargs", {})),
        )

    def set_plan(self, plan: Plan, taps: Mapping[str, Any] | None = None) -> None:
        """Gives the module its cuts. taps: by attribute name of the projections that the module itself calls."""
        self.plan = plan
        self.taps = dict(taps or {})
        self.sites = frozenset(plan.sites)
        self.is_idle = not self.sites and not plan.reconstruct
        self.matrix_heads = plan.heads_at(MATRIX_SITES, self.heads)
        self.edited_matrix_heads = plan.heads_at(MATRIX_SITES, self.heads, probes=False)
        self.result_heads = plan.heads_at(("result",), self.heads)
        self.edited_result_heads = plan.heads_at(("result",), self.heads, probes=False)
        self.edits_kv = bool(plan.of("rot_k") or plan.of("v"))
        self.own_keys = own_keys(plan, self.heads, self.core_groups)
        self.cuts_by_position = any(o.needs_position for site in plan.operations.values() for o in site)
        self.needs_position = bool(plan.probes) or self.cuts_by_position
        own = {site for tap in self.taps.values() for site in tap.sites}
        self.expected = {site for site in plan.sites if SITES[site].where == "core" or site in own}
        if self.family is not None and self.family.inline is not None and not self.family.inline.is_fused:
            # Another branch of the forward may have projections of its own, of which these points know nothing.
            self.expected |= {f"rot_{site}" for site in ("q", "k") if site in plan.sites}
        self.detach()

    def detach(self) -> None:
        """Forgets the live module and what is derived from it; the next forward makes it again."""
        self.module: Any = None
        self.view: Any = None
        self.ungrouped: Any = None
        self.rewriter: Rewriter = None  # type: ignore[assignment]
        self.config: Any = None
        self.config_view: Any = None
        self.now = Forward()

    def __getstate__(self) -> dict[str, Any]:
        names = ("module", "view", "ungrouped", "family", "rewriter", "config", "config_view", "share")
        # What watches this model does not watch its copy.
        unwatched = object.__new__(type(self))
        unwatched.__dict__.update(self.__dict__)
        unwatched.set_plan(Plan(self.plan.operations, {}, self.plan.reconstruct), self.taps)
        return {**unwatched.__dict__, **dict.fromkeys(names)}

    def attach(self, module: nn.Module, ungrouped: Any) -> None:
        """Takes the live module, and its view without head groups; whoever calls sets the view that its forward runs on."""
        if self.family is None:
            self.family = find_family(module) or record_inline(module, self.is_cross).family
        self.module, self.ungrouped = module, ungrouped
        if self.family.inline is not None and not self.family.inline.is_fused:
            return
        self.rewriter = Rewriter(self.family.eager, module)
        for masked in (False, True):
            # Made now, so that torch.compile never meets the tracer.
            arguments = blank_arguments(self.rewriter, self.sample[1], masked)
            for graph in (self.rewriter.graph(arguments, groups) for groups in {1, self.core_groups}):
                for site in MATRIX_SITES:
                    graph.until(site)

    @property
    def implementation(self) -> str:
        """The attention implementation that the unpatched module would run now."""
        if self.family.inline is not None:
            return "sdpa" if self.family.inline.is_fused else "eager"
        config = self.module.__dict__.get("config")
        return getattr(config, "_attn_implementation", None) or "eager"

    @property
    def computes_as(self) -> str:
        """The implementation whose numbers this module gives: its own, or eager where everything is reconstructed."""
        return "eager" if self.plan.reconstruct else self.implementation

    @property
    def kernel_in_use(self) -> str:
        """The kernel that the next forward runs, in words."""
        if self.family.inline is not None and not self.family.inline.is_fused:
            return "its own code"
        if self.plan.reconstruct or (self.matrix_heads and self.family.is_eager(self.implementation)):
            return "reconstructed eager"
        more = f" + {len(self.matrix_heads)} of {self.heads} heads reconstructed" if self.matrix_heads else ""
        return f"{self.implementation}{more}"

    @property
    def reconstruction(self) -> Reconstruction | Inline:
        """The rewritten eager attention of this module, for a call with a mask; the whole forward where it is inline."""
        if self.family.inline is not None:
            return self.family.inline
        return self.rewriter.graph(blank_arguments(self.rewriter, self.sample[1], masked=True), self.core_groups)

    # -- one forward ----------------------------------------------------------------------------------------------------

    def enter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before the family's forward: checks the KV cache, and reads from it where in the sequence this call is."""
        if (cache := find_cache(args, kwargs)) is not None:
            layer = layer_of(self.module, self.layer)
            check_cache(cache, self.session.spec.fingerprint(), layer, self.path, self.is_cross)
        if not self.is_idle:
            now = self.now
            now.reached = set()
            is_filled = self.is_cross and cache is not None and is_updated(cache, layer)
            now.awaited = self.expected - {"k"} if is_filled else self.expected
            now.where = Where(is_cross=self.is_cross)
            now.is_paged = cache is None and any(is_paged(value) for value in (*kwargs.values(), *args))
            if now.is_paged:
                self.check_paged()
            # Points in an inline attention's own code, and cuts by position, count queries.
            is_counted = self.family.inline is not None or self.needs_position
            now.queries, now.rows = n_queries(args, kwargs, self.query_axis) if is_counted else 0, {}
            if cache is not None and self.needs_position:
                self._check_joined()
                path = self.path if self.cuts_by_position else ""
                found = offsets(cache, layer, self.is_cross, now.queries, path)
                call = None if torch.compiler.is_compiling() else model_call()
                if call is not None and call is now.call[0]:
                    found = now.call[1]  # again in one forward of the model, whose keys may lie in another layer by now
                now.call = (call, found)
                now.where = Where(found[0], found[1], None, self.is_cross, found[2])
            elif self.cuts_by_position and now.is_paged:
                now.where = Where(self._find_tokens(kwargs, now.queries))

    def _check_joined(self) -> None:
        """Raises CacheError for cuts by the position of keys that are joined from several sequences, where a cache grows."""
        queries, keys = (self.sample[0][name][2] for name in "qk")
        if self.is_cross or queries == keys:
            return
        by_key = [site for site in CORE_SITES if "key" in SITES[site].axes]
        if sites := [site for site in by_key if any(operation.needs_position for operation in self.plan.of(site))]:
            raise CacheError(
                describe(
                    f"{self.path!r} with a KV cache",
                    f"cuts at {', '.join(sites)} that depend on the position",
                    "cuts that do not: keys of several sequences are joined there, and keys of one move on as the other grows",
                    "Run without a cache (use_cache=False), or cut at the projections.",
                )
            )

    def require(self, sites: Iterable[str] | None = None) -> None:
        """After the family's forward: these points must have been reached; None: all that this forward must come to."""
        now = self.now
        if now.where.allowed is not None:
            now.where = replace(now.where, allowed=None)  # a mask of the whole matrix is not kept until the next forward
        if missing := [site for site in (now.awaited if sites is None else sites) if site not in now.reached]:
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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        implementation: str | None = None,
        done: Collection[str] = (),
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Attention with the plan's cuts; see `surgery.interface.attend` for shapes. done: sites whose point came before.

        In the module's own kernel, unless the attention matrix of some heads is needed: then these heads alone are
        computed by the reconstruction, all of them where the module computes its matrix anyway.
        """
        if (query.shape[1], key.shape[1]) != (self.heads, self.heads // self.core_groups):
            raise self.of_other_heads(f"{query.shape[1]} heads on {key.shape[1]}")
        if implementation is None or self.plan.reconstruct:
            implementation = self.implementation
        if self.now.is_paged and reads_keys(self.plan):
            if is_paged(kwargs.get("cache")):
                key, value, kwargs = read_pages(self.module, key, value, kwargs)
            if self.cuts_by_position:
                where = self.now.where
                self.now.where = replace(where, key_offset=key_offset(kwargs, where.query_offset, key.shape[2]))
        self.place_keys(query.shape[2], key.shape[2])
        if self.plan.reconstruct or (self.matrix_heads and self.family.is_eager(implementation)):
            return self._all_heads(Call(implementation, query, key, value, attention_mask, kwargs, self.core_groups), done)
        query = query if "rot_q" in done else self.at("rot_q", query)
        module, groups, kernel = self.module, self.core_groups, self.family.kernel(implementation)
        if self.own_keys is not None:
            call = Call(implementation, query, key, value, attention_mask, kwargs, groups)
            if reads_apart(self, call):
                output, weights = with_own_keys(self, self.own_keys, call, kernel)
                return self.at("z", output.transpose(1, 2)).transpose(1, 2), weights
        if self.edits_kv and groups > 1:
            # Heads of a group no longer read the same keys and values.
            module, groups = self.ungrouped, 1
            key, value = (torch.repeat_interleave(t, self.core_groups, 1) for t in (key, value))
        key, value = key if "rot_k" in done else self.at("rot_k", key), self.at("v", value)
        output, weights = kernel(module, query, key, value, attention_mask, **kwargs)
        if self.matrix_heads:
            call = Call(implementation, query, key, value, attention_mask, kwargs, groups)
            output = with_matrix(self, output, call)
        return self.at("z", output.transpose(1, 2)).transpose(1, 2), weights

    def of_other_heads(self, found: str) -> SurgeryError:
        """Why numbers of heads no longer mean what they did."""
        return SurgeryError(
            describe(
                f"{self.path!r}",
                found,
                f"{self.heads} heads on {self.heads // self.core_groups}, as when the model was patched",
                "Call unpatch_model, then patch_model: split heads over processes, and replace projections, before patching.",
            )
        )

    def check_paged(self) -> None:
        """Raises CacheError for a plan that cannot act in continuous batching."""
        if not self.is_idle and (found := obstacle(self.plan, self.implementation, self.family.interface is None)):
            raise CacheError(
                describe(
                    f"{self.path!r} in continuous batching (a paged KV cache)",
                    found,
                    "work that is defined for each token of several sequences in one row",
                    "Use model.generate.",
                )
            )

    def _find_tokens(self, kwargs: Mapping[str, Any], queries: int) -> Tensor:
        """Where the tokens of a row are in their sequences. Raises CacheError if that is not known."""
        if (offset := query_offset(kwargs, queries)) is None:
            raise CacheError(
                describe(
                    f"{self.path!r} in continuous batching (a paged KV cache)",
                    "cuts by position, in a layer with a sliding window that does not get position_ids",
                    "position_ids, or layers without a window",
                    "Use model.generate.",
                )
            )
        return offset

    def place_keys(self, queries: int, keys: int) -> None:
        """In a cache that grows, keys end where the queries do, however many it keeps, and whichever layer filled it."""
        where = self.now.where
        if where.key_offset is None:
            self.now.where = replace(where, key_offset=where.query_offset + queries - keys)

    def at(
        self,
        site: str,
        tensor: Tensor,
        held: Sequence[int] | None = None,
        show: Callable[[Probe, Tensor], None] | None = None,
    ) -> Tensor:
        """An intervention point: applies the site's operations in spec order and shows the result to its probes.

        held: the heads on axis 1 of the tensor; None for all (at rot_k and v possibly one per kv head). show: gets what the
        probes would get, in their place.
        """
        if site not in self.sites:
            return tensor
        now = self.now
        now.reached.add(site)
        if site in ("rot_k", "v") and site in self.plan.probes:
            tensor = _copied(tensor)  # a static cache writes on in what it hands out
        for operation in self.plan.of(site):
            before, tensor = tensor, operation.apply(tensor, now.where, held)
            if self.session.watch is not None:
                self.session.watch(operation, before, tensor)
        for probe in self.plan.probes.get(site, ()):
            seen = self._seen(site, tensor, probe.heads, held)
            if show is None:
                probe.take(seen, now.where)
            else:
                show(probe, seen)
        return tensor

    def _seen(self, site: str, tensor: Tensor, heads: tuple[int, ...] | None, held: Sequence[int] | None) -> Tensor:
        """What a probe gets: its heads, whether or not the kv heads are repeated by now."""
        groups = self.heads // tensor.shape[1] if held is None else 1
        if heads is not None:
            return tensor[:, [head // groups if held is None else list(held).index(head) for head in heads]]
        if site == "k" or (site == "v" and site not in self.plan.operations):
            return tensor[:, :: tensor.shape[1] // self.kv_heads]
        # After cuts at v, the heads of a group may differ.
        return tensor.repeat_interleave(groups, 1) if groups > 1 else tensor

    def _all_heads(self, call: Call, done: Collection[str]) -> tuple[Tensor, Any]:
        """Everything by the reconstruction, every point in its place."""
        mask, base = mask_of(self, call), self.now.where
        self.now.where = replace(base, allowed=mask.allowed)
        arguments = self.rewriter.bind(call.query, call.key, call.value, mask.additive, call.kwargs)

        def at(site: str, tensor: Tensor) -> Tensor:
            return tensor if site in done else self.at(site, tensor)

        found = self.rewriter.graph(arguments, call.groups)(at if done else self.at, self.module, arguments)
        self.now.where = base
        return found


def _copied(tensor: Tensor) -> Tensor:
    """A copy; of one head that stands for several, so that products of it give the very same bits, one head again."""
    if tensor.stride(1) == 0 and tensor.shape[1] > 1:
        return tensor[:, :1].clone().expand_as(tensor)
    return tensor.clone()
