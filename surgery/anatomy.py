"""The attention modules of a model: their addresses, heads, and which channels of which projection belong to which head.

Everything is derived by recording one tiny run of each module (`surgery.record`); nothing is declared per architecture.
Addresses: [stack.]kind.layer, for example "self.3", "encoder.self.0", "decoder.cross.2", "vision.self.5".
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from surgery.addresses import main_address
from surgery.errors import NoMatchError, describe
from surgery.family import Family
from surgery.sites import SITES
from surgery.stubs import Recording

HERE = "\0"
"""Stands in a message for the attentions that it holds for, until `grouped` names them."""


@dataclass(frozen=True, eq=False)
class Projection:
    """Where a head's channels lie in a linear map.

    owner: module path of the module that calls it; name: attribute path below the owner; channels: (head, d) numbers of
    output channels (q, k, v) or of input channels (o). batch_axes: how many axes of what it reads are
    the batch, before positions; 0 for (position, batch, d_model).
    """

    owner: str
    name: str
    channels: Tensor
    batch_axes: int = 1

    @property
    def path(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name


@dataclass(eq=False)
class Attention:
    """One attention module of a model.

    projections: site ("q", "k", "v", "o") to its projection; a site is missing where its channels come from more than one
    projection or from none, and `why[site]` then says so. heads, kv_heads, d_head (of q and k), d_value (of v and z).
    core_groups: query heads per head of k and v as the core gets them; 1 where the family repeats kv heads before it.
    """

    address: str
    paths: tuple[str, ...]
    module: nn.Module
    family: Family
    kind: Literal["self", "cross"]
    layer: int
    recording: Recording
    heads: int
    kv_heads: int
    d_head: int
    d_value: int
    addresses: tuple[str, ...]
    core_groups: int
    projections: dict[str, Projection] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def group_size(self) -> int:
        return self.heads // self.kv_heads

    @property
    def class_name(self) -> str:
        return getattr(type(self.module), "_surgery_base", type(self.module)).__name__

    @property
    def fusion(self) -> str:
        """How the projections are stored: "q | k | v" in one matrix each, "q+k+v" in one; "(k)" is not derived."""
        groups: dict[str, list[str]] = defaultdict(list)
        for site in ("q", "k", "v"):
            known = site in self.projections
            groups[self.projections[site].path if known else site].append(site if known else f"({site})")
        return " | ".join("+".join(sites) for sites in groups.values())

    @property
    def beside(self) -> str:
        """What else of the kind the module computes, which stays as it is; "" if nothing."""
        step = getattr(self.recording.witness, "second", None)
        what = getattr(self.family.inline, "beside", "") if step is None else f"its softmax over scores at {step.place}"
        return what and f"{self.path!r} ({self.class_name}): {what}"

    def beyond(self, heads: Any) -> list[str]:
        """Why there are not all of these heads; empty if there are."""
        missing = [] if heads == "all" else [head for head in heads if head >= self.heads]
        expected = f"heads 0 to {self.heads - 1}"
        return [describe(HERE, f"heads {missing}", expected, "Heads count from 0.")] if missing else []

    def underived(self, site: str) -> list[str]:
        """Why a site does not exist here: it is at a projection that could not be derived. Empty if it does."""
        projection = SITES[site].projection
        if projection is None or projection in self.projections:
            return []
        found = f"site {site!r}: {self.why[projection]}"
        return [describe(HERE, found, "a site that exists", f"Use site {SITES[site].instead!r}.")]

    def __repr__(self) -> str:
        heads = f"{self.heads} heads over {self.kv_heads} kv heads, d_head {self.d_head}"
        return f"Attention({self.address}: {self.class_name} at {self.path!r}, {heads})"


def grouped(problems: Iterable[tuple[Attention, str]]) -> list[str]:
    """Messages about attentions: each once, naming the attentions that it holds for in place of HERE."""
    places: dict[str, list[Attention]] = {}
    for attention, text in problems:
        places.setdefault(text, []).append(attention)
    return [text.replace(HERE, _place(attentions)) for text, attentions in places.items()]


def _place(attentions: list[Attention]) -> str:
    names = ", ".join(f"{a.address} ({a.path!r})" for a in attentions[:2])
    return names if len(attentions) <= 2 else f"{names} and {len(attentions) - 2} more"


def summary(fingerprint: str) -> str:
    """A fingerprint for people: how many attentions of which kind, class and shape."""
    counts = Counter(re.sub(r"\.\d+:", "", row) for row in fingerprint.split("; "))
    return "; ".join(f"{count} × {row}" for row, count in counts.items())


@dataclass(frozen=True)
class Anatomy:
    """All attention modules of a model, in the order of the model, and what could not be understood.

    unsupported: softmax attention that cannot be patched, or may be; others: what is seen to be none, and is left alone.
    """

    attentions: tuple[Attention, ...]
    unsupported: tuple[str, ...]
    model_class: str
    others: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Attention]:
        return iter(self.attentions)

    def __len__(self) -> int:
        return len(self.attentions)

    def __getitem__(self, address: str | int) -> Attention:
        """The attention at an address or layer number. Raises NoMatchError."""
        found = self.select((address,))
        if len(found) != 1:
            raise NoMatchError(
                describe("attention", f"{address!r} selects {len(found)}", "exactly one", "Give its full address.")
            )
        return found[0]

    @property
    def fingerprint(self) -> str:
        """What a reference or captured run must share with a model: addresses, attention classes, head counts and widths."""
        rows = (f"{a.address}: {a.class_name} {a.heads}/{a.kv_heads} × {a.d_head}, {a.d_value}" for a in self.attentions)
        return "; ".join(rows)

    def matches(self, layers: Any) -> set[str]:
        """The addresses that layer numbers, address patterns or module paths select.

        A number is the only or the decoder's self-attention of that layer. Raises NoMatchError for what matches nothing.
        """
        every = [address for attention in self.attentions for address in attention.addresses]
        if isinstance(layers, str) and layers == "all":
            return set(every)
        by_path = {path: set(attention.addresses) for attention in self.attentions for path in attention.paths}
        chosen: set[str] = set()
        missing = []
        for item in layers:
            pattern = main_address(item, every) if isinstance(item, int) else item
            found = {address for address in every if fnmatch.fnmatchcase(address, pattern)} | by_path.get(item, set())
            chosen |= found
            missing += [] if found else [item]
        if missing:
            raise NoMatchError(
                describe("layers", ", ".join(map(repr, missing)), self._ranges(), "Layers and heads count from 0.")
            )
        return chosen

    def select(self, layers: Any, what: str = "attention") -> list[Attention]:
        """The attentions that `matches` selects, in the order of the model. Raises NoMatchError."""
        try:
            chosen = self.matches(layers)
        except NoMatchError as error:
            raise NoMatchError(f"{what}: {error}") from None
        return [a for a in self.attentions if chosen.intersection(a.addresses)]

    def _ranges(self) -> str:
        """The addresses that exist, as ranges: "self.0 to self.11"."""
        groups: dict[str, list[int]] = defaultdict(list)
        for attention in self.attentions:
            for address in attention.addresses:
                head, _, number = address.rpartition(".")
                groups[head].append(int(number))
        return ", ".join(
            f"{name}.{min(n)} to {name}.{max(n)}" if len(n) > 1 else f"{name}.{n[0]}" for name, n in groups.items()
        )
