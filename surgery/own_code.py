"""Intervention points in a class's own code, where that computes attention inline.

The rewritten code (`surgery.inline`) has `self._surgery.spot(site, tensor)` at each point, `fused` in place of torch's kernel,
and `inner` at modules whose forward is part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import Core
from surgery.errors import SurgeryError, describe
from surgery.sites import SITES
from surgery.source import method_names
from surgery.stubs import has_hooks

_MASKED = -5000.0
"""Scores of an inline attention below this are masked: families add -10,000, -1e9, the dtype's minimum, or minus infinity."""


class Surgery(Core):
    """The state of one patched module, whose core may be in its own code."""

    def spot(self, site: str, tensor: Any, layout: Any = None) -> Any:
        """An intervention point in the code of an inline attention, where the tensor has the axes of that code.

        layout: of this tensor; None: that of the site.
        """
        if site not in self.sites and not (site == "scores" and self.edited_matrix_heads):
            self.now.reached.add(site)
            return tensor
        inline, now = self.family.inline, self.now
        if site in now.reached and not inline.is_written and now.rows.get(site, 0) < now.queries:
            raise SurgeryError(
                describe(
                    f"{self.path!r}",
                    f"a forward that came to {site} a second time, in a loop over parts of the sequence",
                    "once, as when it was recorded: the positions of parts are not those of the sequence",
                    "Cut or capture another site, give shorter inputs, or describe the class in patches/.",
                )
            )
        layout = layout or inline.before.get(site) or inline.layouts[site]
        standard = layout.to_standard(tensor)
        now.rows.setdefault(site, standard.shape[2])
        if site not in ("rot_q", "z"):
            self.place_keys(now.queries, standard.shape[3 if SITES[site].is_matrix else 2])
        if site == "scores":
            now.where.allowed = standard > _MASKED
        if self.plan.of(site) and standard.shape[1] < self.heads:
            standard = standard.repeat_interleave(self.heads // standard.shape[1], 1)
        is_watched = site in self.plan.probes
        # The class may go on in place with what it has here; what is captured must not follow.
        edited = self.at(site, standard.clone() if is_watched else standard)
        if not self.plan.of(site):
            return tensor
        return layout.from_standard(edited.clone() if is_watched else edited, tensor)

    def inner(self, module: nn.Module) -> nn.Module:
        """A module within an inline attention whose forward is part of the rewritten code: it is not called as a module."""
        if torch.compiler.is_compiling():
            return module
        found = "a hook on it, or a forward that something else set"
        if not (has_hooks(module) or "forward" in module.__dict__):
            own: Any = type(module)
            if not self.family.inline.within.isdisjoint(method_names(own)):
                return module
            found = "a module of another class than when the model was patched"
        raise SurgeryError(
            describe(
                f"a {type(module).__name__} in {self.path!r}, which has cuts",
                found,
                "the module that was there: its code is compiled into the attention's, with intervention points",
                "Put it back, or unpatch the model and patch it again; hooks may stand on the attention itself.",
            )
        )

    def fused(
        self,
        kernel: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In place of torch's scaled_dot_product_attention in the code of a class that calls it itself."""
        layouts = self.family.inline.layouts
        given = {"rot_q": query, "rot_k": key, "v": value}
        standard = [layouts[site].to_standard(tensor) for site, tensor in given.items()]
        mask = attn_mask
        if mask is not None:
            mask = layouts["rot_q"].to_standard(mask.expand(*query.shape[:-1], key.shape[-2]))
        like = query[..., :1].expand(*query.shape[:-1], value.shape[-1])

        def call(*tensors: Tensor) -> Tensor:
            own = [layouts[site].from_standard(t, tensor) for (site, tensor), t in zip(given.items(), tensors, strict=True)]
            options = {"enable_gqa": True} if enable_gqa and own[1].shape != own[0].shape else {}
            output = kernel(*own, attn_mask, dropout_p, is_causal, scale=scale, **options)
            return layouts["z"].to_standard(output).transpose(1, 2)

        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = standard
        own = {"dropout": dropout_p, "is_causal": is_causal, "scaling": scaling, "call": call}
        output, _ = self.attend(q, k, v, mask, "sdpa", self.family.inline.before, **own)
        return layouts["z"].from_standard(output.transpose(1, 2), like)
