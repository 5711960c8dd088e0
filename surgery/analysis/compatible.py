"""What each attention of a model allows, found out before anything is changed: sites, kernels, weights, baking, KV cache."""

from __future__ import annotations

import copy
import html
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from surgery.analysis.foldable import Foldable, stores_its_map
from surgery.anatomy import Attention
from surgery.behind import scale_and_shift
from surgery.classes import SurgicalAttention
from surgery.errors import SurgeryError, describe
from surgery.inspection import Rows
from surgery.linear import linear_of
from surgery.patch import anatomy_of
from surgery.plan import Plan
from surgery.sites import MATRIX_SITES, SITES
from surgery.swap import foreign_classes, obstacles, tap_problems
from surgery.terminal import printed, table_of
from surgery.verify import verify

KNOWN = ("eager", "sdpa", "flex_attention")
"""Implementations whose masks are known, beside those with "flash" in their name."""


@dataclass(frozen=True)
class Row:
    """What one attention allows. In every mapping "" means that it is there, or may be done; else the reason why not.

    sites: by name. kernel: what the attention runs when nothing is cut. cuts: by site that exists, what a cut there makes
    it run. weights: "W_Q", "W_K", "W_V", "W_O". baking: by cut of one head (`surgery.analysis.foldable.CUTS`); "" says that an
    export would try it on real activations, and fold it if the output is the same. cache: what to know of a KV cache.
    obstacles: why the attention cannot be patched as it is now.
    """

    address: str
    path: str
    attention: str
    heads: int
    kv_heads: int
    kernel: str
    sites: dict[str, str] = field(default_factory=dict)
    cuts: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    baking: dict[str, str] = field(default_factory=dict)
    cache: str = ""
    obstacles: tuple[str, ...] = ()


class Compatibility(Rows[Row]):
    """The rows of `compatibility`. `print` shows tables; `.rows`, `.as_dicts()` and `.to_frame()` are the data.

    unsupported: attention that cannot be patched, with the reason; others: what is seen to be no softmax attention.
    """

    made_by = "compatibility"

    def __init__(self, model_class: str, rows: tuple[Row, ...], unsupported: tuple[str, ...], others: tuple[str, ...]) -> None:
        self.model_class, self.rows, self.unsupported, self.others = model_class, rows, unsupported, others

    def to_frame(self) -> Any:
        """A row for each attention and question, as a pandas DataFrame: address, kind, name, possible, why (or how)."""
        import pandas as pd

        rows = []
        for row in self.rows:
            for kind in ("sites", "weights", "baking"):
                answers = getattr(row, kind)
                rows += [(row.address, kind, name, not why, why) for name, why in answers.items()]
            rows += [(row.address, "cuts", name, True, how) for name, how in row.cuts.items()]
        return pd.DataFrame(rows, columns=["address", "kind", "name", "possible", "why"])

    def table(self) -> Table:
        """Attentions that allow the same in one row."""
        rows = []
        names = ("address", "class", "kernel", "sites", "cuts of scores and pattern", "weights", "baking an export would try")
        for alike in self._alike():
            row = alike[0]
            matrix = row.cuts.get("scores", "-")
            lists = (row.sites, row.weights, row.baking)
            rows.append((_range(alike), row.attention, row.kernel, _had(lists[0]), matrix, _had(lists[1]), _had(lists[2])))
        return table_of(names, rows, f"What the attention of {self.model_class} allows")

    def reasons(self) -> list[str]:
        """Why something is not there, each reason once with the attentions that it holds for; then what is to be known."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            missing: dict[str, list[str]] = {}
            for kind in ("sites", "weights", "baking"):
                for name, why in getattr(row, kind).items():
                    if why:
                        missing.setdefault(why, []).append(f"baking {name}" if kind == "baking" else name)
            lines = [f"no {', '.join(names)}: {why}" for why, names in missing.items()]
            for line in [*lines, *(f"cannot be patched now: {why}" for why in row.obstacles), f"KV cache: {row.cache}"]:
                found.setdefault(line, []).append(row)
        return [f"{_range(rows)}: {line}" for line, rows in found.items()]

    def __str__(self) -> str:
        left = [f"left as it is: {line}" for line in self.unsupported]
        return printed(self.table(), *self.reasons(), *left, *(f"no softmax attention: {line}" for line in self.others))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("address", "class", "kernel", "sites", "weights", "baking"))
        cells = [
            (_range(rows), r.attention, r.kernel, _had(r.sites), _had(r.weights), _had(r.baking))
            for rows in self._alike()
            for r in rows[:1]
        ]
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        notes = "".join(f"<li>{html.escape(line)}</li>" for line in (*self.reasons(), *self.unsupported, *self.others))
        return f"<table><caption>Attention of {self.model_class}</caption><tr>{head}</tr>{body}</table><ul>{notes}</ul>"

    def _alike(self) -> list[list[Row]]:
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            answers = [[name for name, why in getattr(row, kind).items() if why] for kind in ("sites", "weights", "baking")]
            stack = row.address.rpartition(".")[0]
            groups.setdefault(f"{stack} {row.attention} {row.kernel} {answers} {row.cuts} {row.obstacles}", []).append(row)
        return list(groups.values())


def compatibility(model: nn.Module) -> Compatibility:
    """What each attention of a model allows, which may be patched or not, with data or on the meta device, and is not changed.

    No forward of the model runs, and numbers of projections are read only where they are not plain (adapted, quantised).
    Raises NoMatchError for a model without attention.
    """
    anatomy = anatomy_of(model, strict=False)
    foreign = foreign_classes(model)
    foldable = Foldable(model, anatomy)
    rows, unsupported = [], list(anatomy.unsupported)
    for attention in anatomy:
        try:
            if not isinstance(attention.module, SurgicalAttention):
                verify(attention)
        except Exception as error:  # of whatever kind foreign code raises, written anew
            found = f"{type(error).__name__}: {error}"
            what, expected = f"{attention.path!r} ({attention.class_name})", "a reconstruction that is exact"
            own = isinstance(error, SurgeryError)
            unsupported.append(str(error) if own else describe(what, found, expected, "Please report this class."))
            continue
        rows.append(_row(model, attention, foldable, foreign))
    return Compatibility(anatomy.model_class, tuple(rows), tuple(unsupported), anatomy.others)


def _row(model: nn.Module, attention: Attention, foldable: Foldable, foreign: list[str]) -> Row:
    kernel = _kernel(attention)
    sites = {site: _why_no_site(model, attention, site, kernel) for site in SITES}
    return Row(
        address=", ".join(attention.addresses),
        path=attention.path,
        attention=attention.class_name,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        kernel=kernel,
        sites=sites,
        cuts={site: _cut(attention, site, kernel) for site, why in sites.items() if not why},
        weights={f"W_{site.upper()}": _why_no_weight(model, attention, site) for site in "qkvo"},
        baking=foldable.why_not(attention),
        cache=_cache(attention),
        obstacles=(*foreign, *obstacles(attention.module, attention.path), *_everywhere(model, attention)),
    )


def _everywhere(model: nn.Module, attention: Attention) -> list[str]:
    """What stands in the way of any cut or capture at all."""
    return tap_problems(model, attention, Plan(probes={"z": []}))


# -- sites and kernels ---------------------------------------------------------------------------------------------------


def _why_no_site(model: nn.Module, attention: Attention, site: str, kernel: str) -> str:
    if attention.underived(site):
        return attention.why[SITES[site].projection or ""]
    everywhere = _everywhere(model, attention)
    problems = [p for p in tap_problems(model, attention, Plan(probes={site: []})) if p not in everywhere]
    if problems:
        return problems[0]
    if site in MATRIX_SITES and attention.family.inline is None and kernel not in KNOWN and "flash" not in kernel:
        return f"the masks of attn_implementation={kernel!r} are not known, unless they are additive or boolean"
    return ""


def _kernel(attention: Attention) -> str:
    inline = attention.family.inline
    if inline is not None:
        return "sdpa" if inline.is_fused else "its own code"
    config = attention.module.__dict__.get("config")
    return getattr(config, "_attn_implementation", None) or "eager"


def _cut(attention: Attention, site: str, kernel: str) -> str:
    """What an attention runs that is cut at a site."""
    if kernel == "its own code":
        return "its own code, with the point in it"
    if site in MATRIX_SITES:
        if attention.family.is_eager(kernel):
            return "all heads by the reconstruction"
        return f"{kernel}, and the heads concerned beside it"
    if site in ("rot_k", "v") and attention.core_groups > 1:
        return f"{kernel}, keys and values repeated for each query head"
    return kernel


# -- weights -------------------------------------------------------------------------------------------------------------


def _why_no_weight(model: nn.Module, attention: Attention, site: str) -> str:
    """As `surgery.weights` would say it, in short."""
    projection = attention.projections.get(site)
    if projection is None:
        return attention.why.get(site, f"{site} comes from different projections in different heads")
    module = model.get_submodule(projection.path)
    on_meta = any(parameter.is_meta for parameter in module.parameters())
    if not stores_its_map(module):
        if on_meta:
            return f"{projection.path} is a {type(module).__name__}, whose weight is known only once it is loaded"
        try:
            with torch.no_grad():
                linear_of(module, projection.path)
        except SurgeryError as error:
            return str(error)
    return _why_no_v(attention) if site == "v" else ""


def _why_no_v(attention: Attention) -> str:
    try:
        with torch.no_grad():
            found = scale_and_shift(replace(attention, module=_with_numbers(attention.module)))
    except Exception as error:  # of whatever kind a foreign forward raises for numbers that it does not take
        return f"its forward cannot be run on random numbers ({type(error).__name__}: {error})"
    name = attention.projections["v"].name
    return "" if found is not None else f"v is more than a scale and a shift of what {name} gives (a norm, a gate, positions)"


def _with_numbers(module: nn.Module) -> nn.Module:
    """The module; one without data as a copy with numbers, a single one for each tensor, which take no memory."""
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return module
    double = copy.deepcopy(module)
    for part in double.modules():
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for store in stores:
            for number, (name, tensor) in enumerate(store.items()):
                if tensor is not None and tensor.is_meta:
                    store[name] = _filled(tensor, number)
    return double


def _filled(tensor: Tensor, number: int) -> Tensor:
    value = torch.full((), 0.7 + 0.1 * number if tensor.is_floating_point() else 0, dtype=tensor.dtype)
    expanded = value.expand(tensor.shape)
    return nn.Parameter(expanded, requires_grad=False) if isinstance(tensor, nn.Parameter) else expanded


# -- KV cache ------------------------------------------------------------------------------------------------------------


def _cache(attention: Attention) -> str:
    base: Any = getattr(type(attention.module), "_surgery_base", type(attention.module))
    names = inspect.signature(base.forward).parameters
    if not any("past" in name or "cache" in name for name in names):
        return "none"
    if attention.kind == "cross":
        return "keys and values are made once, in the first step; k has no point after that"
    queries, keys = (attention.recording.shapes[name][2] for name in "qk")
    if queries != keys:
        return "keys of several sequences are joined: cuts by position at rot_k, v, scores, pattern are refused with one"
    return "exact step by step; not for a mean of the current activations, nor in a cache that was filled under other cuts"


# -- words ---------------------------------------------------------------------------------------------------------------


def _had(answers: dict[str, str]) -> str:
    """What is there, in words."""
    there = [name for name, why in answers.items() if not why]
    missing = [name for name, why in answers.items() if why]
    if not missing:
        return "all"
    return "none" if not there else f"all but {', '.join(missing)}" if len(missing) < len(there) else ", ".join(there)


def _range(rows: Iterable[Row]) -> str:
    """Addresses, neighbours as a range: "self.0 to self.11"."""
    addresses = dict.fromkeys(address for row in rows for address in row.address.split(", "))
    stacks: dict[str, list[list[int]]] = {}
    for address in addresses:
        stack, _, number = address.rpartition(".")
        parts = stacks.setdefault(stack, [])
        if parts and parts[-1][-1] == int(number) - 1:
            parts[-1].append(int(number))
        else:
            parts.append([int(number)])
    return ", ".join(
        f"{stack}.{part[0]}" + (f" to {stack}.{part[-1]}" if len(part) > 1 else "")
        for stack, parts in stacks.items()
        for part in parts
    )
