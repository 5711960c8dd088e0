"""The slow reference: attention by loops over heads and batch rows, with every cut applied by hand.

Nothing of `surgery` is imported here. A spec is read as plain data (site, action, heads, ...) and each action is written out
anew from its documentation. `Oracle` runs a whole tiny model this way, through a test-only attention implementation of
transformers; autograd flows, so gradients are compared as well. Whole sequences only: no KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from families import LAYERS, TinyFamily
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

Cut = Callable[[Tensor, "Tensor | None"], Tensor]
"""(tensor (batch, position, d), allowed (batch, query, key) or None) -> tensor: a change of one head at one site."""

Cuts = dict[tuple[str, int], list[Cut]]
"""Cuts by site and query head, in the order in which they act."""


def oracle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    cuts: Cuts,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q: (batch, head, query, d), k and v: (batch, kv_head, key, d), mask: additive (batch | 1, head | 1, query, key) or None.

    Returns z (batch, query, head, d) and pattern (batch, head, query, key).
    """
    batch, heads, n_queries, _ = q.shape
    group_size = heads // k.shape[1]
    if mask is None:
        mask = torch.zeros(1, 1, n_queries, k.shape[2], dtype=q.dtype)
    mask = mask.expand(batch, heads, -1, -1)
    everything, patterns = [], []
    for h in range(heads):
        allowed = mask[:, h] > torch.finfo(mask.dtype).min / 2

        def cut(site: str, x: Tensor, h: int = h, allowed: Tensor = allowed) -> Tensor:
            for change in cuts.get((site, h), ()):
                x = change(x, allowed if site in ("scores", "pattern") else None)
            return x

        q_h = cut("rot_q", q[:, h])
        k_h = cut("rot_k", k[:, h // group_size])
        v_h = cut("v", v[:, h // group_size])
        rows = []
        for b in range(batch):
            row = (q_h[b] @ k_h[b].T) * scaling
            if softcap is not None:
                row = softcap * torch.tanh(row / softcap)
            if bias is not None:
                row = row + bias.expand(batch, heads, -1, -1)[b, h]
            rows.append(row + mask[b, h])
        scores = cut("scores", torch.stack(rows))
        if sinks is not None:
            sink = sinks[h].expand(batch, n_queries, 1).to(scores.dtype)
            pattern = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            pattern = scores.softmax(dim=-1)
        pattern = cut("pattern", pattern)
        z = cut("z", torch.stack([pattern[b] @ v_h[b] for b in range(batch)]))
        everything.append(z)
        patterns.append(pattern)
    return torch.stack(everything, dim=2), torch.stack(patterns, dim=1)


def _implementation(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    scaling = kwargs.get("scaling")
    module.__dict__["oracle_widths"] = query.shape[-1], value.shape[-1]
    return oracle_attention(
        query,
        key,
        value,
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        module.__dict__.setdefault("oracle_cuts", {}),
        kwargs.get("softcap"),
        kwargs.get("position_bias"),
        getattr(module, "sinks", None),
    )


AttentionInterface.register("oracle", _implementation)
AttentionMaskInterface.register("oracle", eager_mask)


class Oracle:
    """A tiny model whose attention is `oracle_attention`; `set_cuts(spec)` before calling `model`."""

    def __init__(self, family: TinyFamily, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.model = family.build("oracle", dtype, seed)
        with torch.no_grad():
            self.model(**{n: x.to(dtype) if x.is_floating_point() else x for n, x in family.inputs().items()})
        called = [m for m in self.model.modules() if "oracle_cuts" in m.__dict__]
        if family.kind in ("encoder_decoder", "speech"):
            # Both T5's and BART's modules lie in this order: encoder, then each decoder layer's self before cross.
            names = [f"encoder.self.{i}" for i in range(LAYERS)]
            names += [f"decoder.{kind}.{i}" for i in range(LAYERS) for kind in ("self", "cross")]
        else:
            names = [f"self.{i}" for i in range(LAYERS)]
        self.d_head, self.d_value = called[0].__dict__["oracle_widths"]
        self.attentions: dict[str, nn.Module] = dict(zip(names, called, strict=True))

    def set_cuts(self, spec: Iterable[Any], heads: int, kv_heads: int) -> None:
        for address, module in self.attentions.items():
            cuts: Cuts = {}
            for edit in (edit for cut in spec for edit in edits_by_hand(cut)):
                if edit["layers"] == "all" or address in [_address(layer, self.attentions) for layer in edit["layers"]]:
                    for rank, head in enumerate(selected(edit, heads, kv_heads)):
                        cuts.setdefault((edit["site"], head), []).append(cut_by_hand(edit, address, rank, head))
            module.__dict__["oracle_cuts"] = cuts


def _address(layer: int | str, known: Iterable[str]) -> str:
    if isinstance(layer, str):
        return layer
    return f"self.{layer}" if f"self.{layer}" in known else f"decoder.self.{layer}"


def edits_by_hand(cut: Any) -> list[dict[str, Any]]:
    """A cut as plain edits: what a Freeze stands for, from its documentation."""
    fields = {name: getattr(cut, name) for name in type(cut).model_fields}
    if "site" in fields:
        return [fields]
    shared, to, sites = fields["gqa"] == "shared", fields["to"], []
    if fields["circuit"] in ("qk", "both"):
        if to == "zero":
            sites += ["rot_k"] if shared else ["rot_q"]
        else:
            sites += ["rot_q", "rot_k"]
    if fields["circuit"] in ("ov", "both"):
        sites += ["v"] if shared or to == "identity" else ["z"]
    return [{**fields, "site": site, "action": to, "value": None} for site in sites]


def selected(edit: dict[str, Any], heads: int, kv_heads: int) -> list[int]:
    """The query heads that an edit changes: the whole group of each where the kv head itself is cut."""
    chosen = list(range(heads)) if edit["heads"] == "all" else list(edit["heads"])
    if edit["gqa"] == "shared" and edit["site"] in ("rot_k", "v"):
        size = heads // kv_heads
        chosen = [h for h in range(heads) if any(h // size == c // size for c in chosen)]
    return chosen


def cut_by_hand(edit: dict[str, Any], address: str, rank: int, head: int) -> Cut:
    """What an edit does to one head. rank: the head's number among the selected ones (for values given by head)."""
    site, action, strength = edit["site"], edit["action"], edit["strength"]

    def given(value: Any, row: int, old: Tensor) -> Any:
        """A value of 0 to 4 axes for this head, with axes that broadcast to (batch, position, d)."""
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if value.dim() == 2:
            return value if site in ("scores", "pattern") else value[row]
        value = value[row] if value.dim() == 3 else value[:, row]
        return value[..., : old.shape[1], :]

    def replacement(old: Tensor, allowed: Tensor | None) -> Tensor:
        if callable(action):
            return action(old[:, None])[:, 0]  # a callable gets a head axis
        if action == "zero":
            return torch.zeros_like(old)
        if action == "identity":
            return old
        if action in ("value", "scale", "add"):
            value = given(edit["value"], rank, old)
            if action == "value":
                return torch.zeros_like(old) + value
            return old * value if action == "scale" else old + value
        if action in ("mean", "activation") and edit["reference"] is not None:
            value = edit["reference"].find(address, site).value
            if value.dim() == 2:
                return torch.zeros_like(old) + value[head]
            return torch.zeros_like(old) + given(value, head, old)
        if action == "mean":
            return _mean(old, allowed)
        if action == "resample":
            assert old.shape[0] == 2, "only two rows leave no choice"
            return torch.stack([old[1], old[0]])
        return _template(action, old, allowed)

    def cut(old: Tensor, allowed: Tensor | None) -> Tensor:
        new = replacement(old, allowed)
        if edit["backward"] != "natural" or not (callable(action) or action in ("scale", "add")):
            new = new.detach()
        if strength != 1.0:
            new = (1 - strength) * old + strength * new
        keep = torch.ones_like(old, dtype=torch.bool)
        for position in range(old.shape[1]):
            if edit["positions"] is not None and position not in edit["positions"]:
                keep[:, position] = False
        everywhere = callable(action) or (site == "pattern" and action == "zero")
        if allowed is not None and not everywhere:
            keep &= allowed
        new = torch.where(keep, new, old)
        if edit["backward"] == "ste":
            new = new.detach() + (old - old.detach())
        return new

    return cut


def _mean(old: Tensor, allowed: Tensor | None) -> Tensor:
    """The mean of each channel over batch and positions; of what the mask allows where there is a mask."""
    new = torch.zeros_like(old)
    for channel in range(old.shape[2]):
        entries = old[:, :, channel]
        chosen = entries[allowed[:, :, channel]] if allowed is not None else entries.flatten()
        if chosen.numel():
            new[:, :, channel] = chosen.mean()
    return new


def _template(name: str, old: Tensor, allowed: Tensor | None) -> Tensor:
    """Pattern templates, row by row."""
    assert allowed is not None
    new = torch.zeros_like(old)
    batch, n_queries, n_keys = old.shape
    for b in range(batch):
        for query in range(n_queries):
            may = allowed[b, query].nonzero().flatten().tolist()
            own, target = min(query, n_keys - 1), query
            if name == "uniform":
                new[b, query, may] = 1 / max(len(may), 1)
                continue
            if name == "previous":
                target = min(max(query - 1, 0), n_keys - 1)
            elif name == "first":
                target = may[0] if may else 0
            else:
                target = own
            target = target if target in may else own
            if target in may:
                new[b, query, target] = 1
            else:
                new[b, query] = old[b, query]
    return new
