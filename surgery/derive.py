"""Deriving a model's anatomy: every attention module recorded on stubs, and read off the labels that arrive."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.addresses import find_addresses
from surgery.anatomy import Anatomy, Attention, Projection
from surgery.errors import NoMatchError, UnsupportedArchitectureError, describe, listing
from surgery.family import Family, computes_attention, find_family, is_projection
from surgery.inline import record_inline
from surgery.interface import attend as _registered  # noqa: F401 (importing it registers our implementation)
from surgery.labels import BASE, WEIGHT, Z
from surgery.record import record, record_parent
from surgery.steps import Defeat
from surgery.stubs import Recording

NO_ATTENTION = "a softmax that is no attention, and is left alone"


def find_anatomy(model: nn.Module, strict: bool = True) -> Anatomy:
    """Every attention module of a model.

    strict: raise if the model holds attention that cannot be reconstructed; otherwise list it in `unsupported`.
    Raises UnsupportedArchitectureError, naming all such modules, and NoMatchError if there is no attention at all.
    """
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    families = {m: f for m in paths if (f := find_family(m)) is not None}
    inline = [m for m in paths if m not in families and computes_attention(m)]
    # A model's own softmax is that of its head and of sampling, if attention is in its parts.
    parts = {*families, *inline}
    inline = [
        m for m in inline if not (isinstance(m, PreTrainedModel) and any(part in parts for part in list(m.modules())[1:]))
    ]
    attentions, unsupported, others = [], [], []
    found = {m: p for m, p in paths.items() if m in families or m in inline}
    for module, (addresses, kind, layer) in find_addresses(found).items():
        try:
            family = families.get(module)
            attentions.append(_examine(model, module, tuple(paths[module]), family, addresses, kind, layer))
        except NotAttention as error:
            others.append(str(error))
            del found[module]
        except UnsupportedArchitectureError as error:
            unsupported.append(str(error))
    if unsupported and strict:
        raise UnsupportedArchitectureError(
            listing(f"{type(model).__name__} holds attention that cannot be patched", unsupported)
            + "\nDescribe these classes in a file like those in patches/, or pass strict=False to leave them as they are."
        )
    if not attentions:
        name = type(model).__name__
        titles = {"no attention module but those that cannot be patched": unsupported, NO_ATTENTION: others}
        listed = [listing(f"{name} has {title}", problems) for title, problems in titles.items() if problems]
        if listed:
            raise NoMatchError("\n".join(listed))
        raise NoMatchError(
            describe(
                type(model).__name__, "no attention module", "at least one", "Pass a transformers model with softmax attention."
            )
        )
    if others:  # what is no attention has no number among those that are
        numbered = find_addresses(found)
        for attention in attentions:
            attention.addresses, _, attention.layer = numbered[attention.module]
            attention.address = attention.addresses[0]
    base = getattr(type(model), "_surgery_base", type(model))
    return Anatomy(tuple(attentions), tuple(unsupported), base.__name__, tuple(others))


class NotAttention(UnsupportedArchitectureError):
    """What a module computes is no softmax over products of queries and keys that weights values: left alone."""


_INLINE = "a softmax over q k^T whose pattern multiplies v, each step written out in the class's own code"
_DO = "Describe the class in a file like those in patches/."


def _examine(
    model: nn.Module,
    module: nn.Module,
    paths: tuple[str, ...],
    family: Family | None,
    addresses: tuple[str, ...],
    kind: Literal["self", "cross"],
    layer: int,
) -> Attention:
    try:
        found = record_inline(module, kind == "cross") if family is None else record(module, family, kind == "cross")
    except Defeat as error:
        what = f"{paths[0]!r} ({type(module).__name__})"
        raise (NotAttention if error.is_other else UnsupportedArchitectureError)(
            describe(what, error.reason if error.place is None else f"{error.reason}, at {error.place}", _INLINE, _DO)
        ) from error
    except Exception as error:
        raise UnsupportedArchitectureError(
            describe(
                f"{paths[0]!r} ({type(module).__name__})",
                f"a forward that cannot be recorded ({type(error).__name__}: {error})",
                "a forward that runs on small tensors",
                "Give the arguments that it needs in a file in patches/.",
            )
        ) from error
    if found.calls > 1:
        raise UnsupportedArchitectureError(
            describe(
                f"{paths[0]!r} ({type(module).__name__})",
                f"a forward that calls its attention function {found.calls} times",
                "one call, which the cuts of a head mean",
                "Describe the class in a file in patches/, by a forward that makes one call of them.",
            )
        )
    (_, heads, _, d_head), (_, kv_heads, _, _), (_, _, _, d_value) = (found.shapes[n] for n in "qkv")
    if heads % kv_heads:
        raise UnsupportedArchitectureError(
            describe(
                f"{paths[0]!r}",
                f"{heads} heads over {kv_heads} kv heads",
                "a whole number of heads per kv head",
                "Describe the class in a file in patches/.",
            )
        )
    core_groups, kv_heads = heads // kv_heads, _distinct(found, kv_heads)
    attention = Attention(
        addresses[0], paths, module, found.family, kind, layer, found, heads, kv_heads, d_head, d_value, addresses, core_groups
    )
    for site in ("q", "k", "v"):
        _derive_input(attention, site)
    _derive_output(model, attention)
    return attention


def _distinct(recording: Recording, heads: int) -> int:
    """The number of kv heads: a family that repeats them before the core shows rows that are equal, one group at a time.

    Of k and of v, as far as they are known: values may be shared by more heads than keys are.
    """
    known = [labels for name in "kv" if (labels := recording.labels.get(name)) is not None and labels.dim() == 2]
    rows = [labels for labels in known if not bool((labels < 0).any())]
    changes = max((1 + int((labels[1:] != labels[:-1]).any(dim=-1).sum()) for labels in rows), default=heads)
    return changes if heads % changes == 0 else heads


def _derive_input(attention: Attention, site: str) -> None:
    labels = attention.recording.labels.get(site)
    if labels is None or labels.dim() != 2 or bool((labels < 0).any()):
        attention.why[site] = f"{site} does not come from a projection by views and elementwise arithmetic alone"
        return
    if site in attention.recording.several:
        attention.why[site] = attention.recording.several[site]
        return
    channels = labels.remainder(BASE)
    if bool((labels >= WEIGHT * BASE).any()):
        attention.why[site] = f"{site} is a parameter"
        return
    owners = sorted({attention.recording.owner(int(label)) for label in labels.flatten()})
    if getattr(attention.recording.witness, "weights", ()) and owners[0] in attention.recording.witness.weights:
        attention.why[site] = f"{site} comes from the parameter {owners[0]}, which no module applies"
        return
    if len(owners) > 1:
        attention.why[site] = f"{site} is joined from the projections {', '.join(owners)}"
        return
    if site != "q":
        channels = channels[:: channels.shape[0] // attention.kv_heads]
    if channels.unique().numel() < channels.numel():
        attention.why[site] = f"{site} heads share channels of {owners[0]}"
        return
    if not is_projection(attention.module.get_submodule(owners[0])):
        attention.why[site] = f"{site} comes from {owners[0]}, which is no map of the last axis (a convolution)"
        return
    # A tap is set on the module that calls the projection: the last attribute is its name there.
    inner, _, name = owners[0].rpartition(".")
    owner = ".".join(part for part in (attention.path, inner) if part)
    batch_axes = attention.recording.batch_axes(owners[0], site)
    attention.projections[site] = Projection(owner, name, _order(channels) if site in "qk" else channels, batch_axes)


def _order(channels: Tensor) -> Tensor:
    """Channels of a head in stored order: positions may have turned pairs of them round on the way to the core."""
    return channels.sort(dim=-1).values


def _derive_output(model: nn.Module, attention: Attention) -> None:
    recording, owner = attention.recording, attention.path
    parent, _, child = attention.path.rpartition(".")
    if recording.output is None and recording.reaches(Z):
        try:
            recording, owner = record_parent(model.get_submodule(parent), child, recording), parent
        except Exception as error:  # any failure of a foreign forward means the same: not derived
            attention.why["o"] = f"the parent {parent!r} cannot be recorded ({type(error).__name__}: {error})"
            return
    if recording.output is None:
        attention.why["o"] = "z does not reach a projection by views and elementwise arithmetic alone"
        return
    name, labels = recording.output
    if not is_projection(model.get_submodule(".".join(part for part in (owner, name) if part))):
        attention.why["o"] = f"{name}, which reads z, is no map of the last axis (a convolution)"
        return
    if name in recording.without_z:
        attention.why["o"] = f"{name}, which reads z, reads something else in the same forward, too"
        return
    if not recording.ends_in(name):
        attention.why["o"] = f"{name}, which reads z, is not the last map before the output"
        return
    if recording.fate == "changed":
        attention.why["o"] = f"what {name} gives is scaled, gated or normed before it is the output"
        return
    recording.shapes.setdefault("q", attention.recording.shapes["q"])
    batch_axes = recording.batch_axes(name, "q")
    order = torch.argsort(labels)
    if labels.numel() != attention.heads * attention.d_value or not torch.equal(labels[order], torch.arange(labels.numel())):
        attention.why["o"] = f"{name} reads {labels.numel()} channels that are not the {attention.heads} heads' z, each once"
        return
    # A tap is set on the module that calls the projection: the last attribute is its name there.
    inner, _, name = name.rpartition(".")
    owner = ".".join(part for part in (owner, inner) if part)
    attention.projections["o"] = Projection(owner, name, order.view(attention.heads, attention.d_value), batch_axes)
