"""The attention modules of a model: their addresses, heads, and which channels of which projection belong to which head.

Everything is derived by recording one tiny run of each module (`surgery.record`); nothing is declared per architecture.
Addresses: [stack.]kind.layer, for example "self.3", "encoder.self.0", "decoder.cross.2", "vision.self.5".
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import NoMatchError, UnsupportedArchitectureError, describe, listing
from surgery.family import Family, computes_attention, find_family
from surgery.interface import attend as _registered  # noqa: F401 (importing it registers our implementation)
from surgery.record import _BASE, Recording, record, record_parent


@dataclass(frozen=True, eq=False)
class Projection:
    """Where a head's channels lie in a linear map.

    owner: module path of the module that calls it; name: attribute path below the owner; channels: (head, d) numbers of
    output channels (q, k, v) or of input channels (o).
    """

    owner: str
    name: str
    channels: Tensor

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

    def __repr__(self) -> str:
        heads = f"{self.heads} heads over {self.kv_heads} kv heads, d_head {self.d_head}"
        return f"Attention({self.address}: {self.class_name} at {self.path!r}, {heads})"


@dataclass(frozen=True)
class Anatomy:
    """All attention modules of a model, in the order of the model, and what could not be understood."""

    attentions: tuple[Attention, ...]
    unsupported: tuple[str, ...]
    model_class: str

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
        rows = ",".join(f"{a.address}:{a.class_name} {a.heads}/{a.kv_heads}x{a.d_head},{a.d_value}" for a in self.attentions)
        return rows

    def matches(self, layers: Any) -> set[str]:
        """The addresses that layer numbers or address patterns select.

        A number is the only or the decoder's self-attention of that layer. Raises NoMatchError for what matches nothing.
        """
        every = [address for attention in self.attentions for address in attention.addresses]
        if isinstance(layers, str) and layers == "all":
            return set(every)
        chosen: set[str] = set()
        missing = []
        for item in layers:
            pattern = self._main_address(item) if isinstance(item, int) else item
            found = {address for address in every if fnmatch.fnmatchcase(address, pattern)}
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

    def _main_address(self, layer: int) -> str:
        """The self-attention that a plain number means: the only stack's, or the decoder's beside others."""
        every = {address for attention in self.attentions for address in attention.addresses}
        plain = any(address.startswith("self.") for address in every)
        return f"self.{layer}" if plain else f"decoder.self.{layer}"

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


def find_anatomy(model: nn.Module, strict: bool = True) -> Anatomy:
    """Every attention module of a model.

    strict: raise if the model holds attention that cannot be reconstructed; otherwise list it in `unsupported`.
    Raises UnsupportedArchitectureError, naming all such modules, and NoMatchError if there is no attention at all.
    """
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    families = {m: f for m in paths if (f := find_family(m)) is not None}
    unsupported = [
        f"{paths[m][0]!r} ({type(m).__name__}): a softmax over a product of its projections, computed inline"
        for m in paths
        if m not in families and computes_attention(m)
    ]
    named = _addresses({m: p for m, p in paths.items() if m in families})
    attentions = []
    for module, (addresses, kind, layer) in named.items():
        try:
            attentions.append(_examine(model, module, tuple(paths[module]), families[module], addresses, kind, layer))
        except UnsupportedArchitectureError as error:
            unsupported.append(str(error))
    if unsupported and strict:
        raise UnsupportedArchitectureError(
            listing(f"{type(model).__name__} holds attention that cannot be patched", unsupported)
            + "\nDescribe these classes in a file like those in patches/, or pass strict=False to leave them as they are."
        )
    if not attentions:
        raise NoMatchError(
            describe(
                type(model).__name__, "no attention module", "at least one", "Pass a transformers model with softmax attention."
            )
        )
    base = getattr(type(model), "_surgery_base", type(model))
    return Anatomy(tuple(attentions), tuple(unsupported), base.__name__)


def _addresses(paths: dict[nn.Module, list[str]]) -> dict[nn.Module, tuple[tuple[str, ...], Literal["self", "cross"], int]]:
    """Addresses by module. A module that is shared by several layers has several; the first is its own."""
    places = [(path, module) for module, all_paths in paths.items() for path in all_paths]
    prefixes = dict.fromkeys(_stack_path(path) for path, _ in places)
    stacks = _stack_names(list(prefixes))
    groups: dict[tuple[str, str], list[tuple[str, nn.Module]]] = defaultdict(list)
    for path, module in places:
        kind = "cross" if _is_cross(path, module) else "self"
        groups[stacks[_stack_path(path)], kind].append((path, module))
    found: dict[nn.Module, list[tuple[str, Literal["self", "cross"], int]]] = defaultdict(list)
    for (stack, kind), members in groups.items():
        numbers = [int(n.group(1)) if (n := re.search(r"\.(\d+)(?:\.|$)", f".{path}")) else -1 for path, _ in members]
        if len(set(numbers)) < len(numbers) or -1 in numbers:
            numbers = list(range(len(members)))
        for (_, module), number in zip(members, numbers, strict=True):
            found[module].append((f"{stack}{kind}.{number}", kind, number))  # type: ignore[arg-type]
    return {m: (tuple(a for a, _, _ in found[m]), found[m][0][1], found[m][0][2]) for m in paths}


def _stack_path(path: str) -> str:
    return re.split(r"(?:^|\.)\d+(?:\.|$)", path)[0]


_STACKS = ("vision", "visual", "image", "audio", "speech", "encoder", "decoder")


def _stack_names(prefixes: list[str]) -> dict[str, str]:
    """A short name with a dot for every stack of layers; "" where there is only one, and for the text model beside others."""
    if len(prefixes) == 1:
        return {prefixes[0]: ""}
    names: dict[str, str] = {}
    for prefix in prefixes:
        word = next((w for w in _STACKS if w in prefix.lower()), "")
        word = {"visual": "vision", "image": "vision", "speech": "audio"}.get(word, word)
        names[prefix] = f"{word}." if word else ""
        if names[prefix] in [n for p, n in names.items() if p != prefix]:
            names[prefix] = f"{prefix}."
    return names


def _is_cross(path: str, module: nn.Module) -> bool:
    """Whether an attention reads another sequence: by its own flag, or by the name that its block gives it."""
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool) and flag:
        return True
    tail = path.lower().rsplit(".", 3)[-3:]
    return (
        any("cross" in part or part in ("encoder_attn", "encdecattention") for part in tail) or "Cross" in type(module).__name__
    )


def _examine(
    model: nn.Module,
    module: nn.Module,
    paths: tuple[str, ...],
    family: Family,
    addresses: tuple[str, ...],
    kind: Literal["self", "cross"],
    layer: int,
) -> Attention:
    try:
        found = record(module, family, kind == "cross")
    except Exception as error:
        raise UnsupportedArchitectureError(
            describe(
                f"{paths[0]!r} ({type(module).__name__})",
                f"a forward that cannot be recorded ({type(error).__name__}: {error})",
                "a forward that runs on small tensors",
                "Give the arguments that it needs in a file in patches/.",
            )
        ) from error
    (_, heads, _, d_head), (_, kv_heads, _, _), (_, _, _, d_value) = (found.shapes[n] for n in "qkv")
    if heads % kv_heads:
        raise UnsupportedArchitectureError(
            describe(f"{paths[0]!r}", f"{heads} heads over {kv_heads} kv heads", "a whole number of heads per kv head", "")
        )
    core_groups, kv_heads = heads // kv_heads, _distinct(found.labels.get("v"), kv_heads)
    attention = Attention(
        addresses[0], paths, module, family, kind, layer, found, heads, kv_heads, d_head, d_value, addresses, core_groups
    )
    for site in ("q", "k", "v"):
        _derive_input(attention, site)
    _derive_output(model, attention)
    return attention


def _distinct(labels: Tensor | None, heads: int) -> int:
    """The number of kv heads: a family that repeats them before the core shows rows that are equal, one group at a time."""
    if labels is None or labels.dim() != 2 or bool((labels < 0).any()):
        return heads
    changes = 1 + int((labels[1:] != labels[:-1]).any(dim=-1).sum())
    return changes if heads % changes == 0 else heads


def _derive_input(attention: Attention, site: str) -> None:
    labels = attention.recording.labels.get(site)
    if labels is None or labels.dim() != 2 or bool((labels < 0).any()):
        attention.why[site] = f"{site} does not come from a projection by views and elementwise arithmetic alone"
        return
    owners = sorted({attention.recording.owner(int(label)) for label in labels.flatten()})
    channels = labels.remainder(_BASE)
    if len(owners) > 1:
        attention.why[site] = f"{site} is joined from the projections {', '.join(owners)}"
        return
    if site != "q":
        channels = channels[:: channels.shape[0] // attention.kv_heads]
    if channels.unique().numel() < channels.numel():
        attention.why[site] = f"{site} heads share channels of {owners[0]}"
        return
    # A tap is set on the module that calls the projection: the last attribute is its name there.
    inner, _, name = owners[0].rpartition(".")
    owner = ".".join(part for part in (attention.path, inner) if part)
    attention.projections[site] = Projection(owner, name, _order(channels) if site in "qk" else channels)


def _order(channels: Tensor) -> Tensor:
    """Channels of a head in stored order: positions may have turned pairs of them round on the way to the core."""
    return channels.sort(dim=-1).values


def _derive_output(model: nn.Module, attention: Attention) -> None:
    recording, owner = attention.recording, attention.path
    parent, _, child = attention.path.rpartition(".")
    if recording.output is None and recording.labels["output"].numel():
        try:
            recording, owner = record_parent(model.get_submodule(parent), child, recording), parent
        except Exception as error:  # any failure of a foreign forward means the same: not derived
            attention.why["o"] = f"the parent {parent!r} cannot be recorded ({type(error).__name__}: {error})"
            return
    if recording.output is None:
        attention.why["o"] = "z does not reach a projection by views and elementwise arithmetic alone"
        return
    name, labels = recording.output
    if not recording.ends_in(name):
        attention.why["o"] = f"{name}, which reads z, is not the last map before the output"
        return
    order = torch.argsort(labels)
    if labels.numel() != attention.heads * attention.d_value or not torch.equal(labels[order], torch.arange(labels.numel())):
        attention.why["o"] = f"{name} reads {labels.numel()} channels that are not the {attention.heads} heads' z, each once"
        return
    # A tap is set on the module that calls the projection: the last attribute is its name there.
    inner, _, name = name.rpartition(".")
    owner = ".".join(part for part in (owner, inner) if part)
    attention.projections["o"] = Projection(owner, name, order.view(attention.heads, attention.d_value))
