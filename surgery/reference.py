"""Values that a cut puts in place of an activation: means over a data set, or the activations of another run.

A `Reference` is plain data. `surgery.collect_reference` fills one by streaming over a data set, `capture` one from a
single run, and tensors given by hand become one as well. It is stored in safetensors, never pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgery.errors import NoMatchError, SpecError, describe

ANY = "*"
"""The address of a tensor that was given by hand, for whatever attention the cut selects."""


@dataclass(frozen=True)
class Entry:
    """The values for one address and site.

    value: (head, d) or (head, position, d) for kind "mean"; (batch, head, position, d) for kind "activation".
    spread: standard deviation, same shape as value, or None. heads: the heads that the head axis holds; None is all.
    """

    value: Tensor
    spread: Tensor | None = None
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Reference:
    """Replacement values by address and site; `kind` says whether they are means or one run's activations.

    `model` is the fingerprint of the model that they were measured on, its attention classes and shapes (None: given by hand,
    fits any model whose shapes fit); a cut refuses values of a model with others. Weights are not compared.
    """

    kind: Literal["mean", "activation"]
    entries: Mapping[tuple[str, str], Entry] = field(default_factory=dict)
    model: str | None = None

    def find(self, address: str, site: str) -> Entry | None:
        """The entry for an attention and a site, or None. What was given for just this address and site comes first."""
        keys = ((address, site), (address, ANY), (ANY, site), (ANY, ANY))
        return next((self.entries[key] for key in keys if key in self.entries), None)

    def __getitem__(self, key: tuple[str | int, str]) -> Tensor:
        """The values at (address, site), as Entry has them; a number is the layer of the only or decoder self-attention.

        Raises NoMatchError if it holds none.
        """
        address, site = key if isinstance(key, tuple) and len(key) == 2 else (key, "")
        names = [f"self.{address}", f"decoder.self.{address}"] if isinstance(address, int) else [str(address)]
        found = next((entry for name in names if (entry := self.find(name, site)) is not None), None)
        if found is None:
            raise NoMatchError(
                describe(f"reference[{key!r}]", f"{self!r}", "an address and a site that it holds", "Collect it.")
            )
        return found.value

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        sites = sorted({site for _, site in self.entries})
        addresses = list(dict.fromkeys(address for address, _ in self.entries))
        shown = ", ".join(addresses[:3]) + (f", .. ({len(addresses)} in all)" if len(addresses) > 3 else "")
        return f"Reference({self.kind} of {', '.join(sites)} at {shown})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reference):
            return NotImplemented
        (mine, tensors), (theirs, others) = self.describe(""), other.describe("")
        return mine == theirs and all(is_same(tensors[name], others[name]) for name in tensors)

    __hash__ = None  # type: ignore[assignment]

    def describe(self, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A JSON-ready description, and the tensors that it names as `prefix` + number."""
        tensors: dict[str, Tensor] = {}

        def name(tensor: Tensor | None) -> str | None:
            if tensor is None:
                return None
            tensors[f"{prefix}{len(tensors)}"] = tensor.detach()
            return f"{prefix}{len(tensors) - 1}"

        entries = [
            {
                "address": address,
                "site": site,
                "value": name(entry.value),
                "spread": name(entry.spread),
                "heads": None if entry.heads is None else list(entry.heads),
            }
            for (address, site), entry in self.entries.items()
        ]
        return {"kind": self.kind, "model": self.model, "entries": entries}, tensors

    @classmethod
    def from_description(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The inverse of `describe`. Raises SpecError if a named tensor is missing."""
        try:
            entries = {
                (e["address"], e["site"]): Entry(
                    tensors[e["value"]],
                    None if e["spread"] is None else tensors[e["spread"]],
                    None if e["heads"] is None else tuple(e["heads"]),
                )
                for e in data["entries"]
            }
            if data["kind"] not in ("mean", "activation"):
                raise ValueError(f"a reference of kind {data['kind']!r}")
            return cls(data["kind"], entries, data["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(
                describe(
                    "Reference.from_description",
                    f"a description that cannot be read ({type(error).__name__}: {error})",
                    f"keys kind, model, entries, and its tensors; there are {len(tensors)} tensors",
                    "Load the file with Spec.load, beside its .safetensors, or pass tensors=spec.tensors().",
                )
            ) from None

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, the description in its metadata."""
        description, tensors = self.describe("")
        save_file(stored(tensors), path, {"reference": json.dumps(description)})

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Reads what `save` wrote. Raises SpecError if the file is not a reference."""

        def refuse(found: str) -> SpecError:
            return SpecError(
                describe(f"Reference.load({str(path)!r})", found, "a file that Reference.save wrote", "Pass that file.")
            )

        try:
            with safe_open(str(path), framework="pt") as file:
                description = json.loads((file.metadata() or {}).get("reference", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise refuse(f"a file that cannot be read ({error})") from None
        if description is None:
            raise refuse("a safetensors file without a reference in its metadata")
        return cls.from_description(description, tensors)


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: on the CPU, contiguous, none sharing memory with another."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and entries; tensors without data are equal only to themselves."""
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and not a.is_meta and torch.equal(a.cpu(), b.cpu()))


def as_reference(value: Any, kind: Literal["mean", "activation"]) -> Reference:
    """A Reference from a Reference, a captured run, a tensor, or a mapping {address or (address, site): tensor}.

    Raises SpecError for anything else, for NaN (and infinite means), and for a tensor with the wrong number of axes.
    """
    if hasattr(value, "reference"):  # a captured run
        value = value.reference()
    if isinstance(value, str):
        found, expected = f"the name {value!r}", "a Reference; in a file {file: name}"
        raise SpecError(describe("reference", found, expected, "Load it with Reference.load."))
    if isinstance(value, Tensor):
        value = {(ANY, ANY): value}
    if isinstance(value, Mapping):
        named = {(key, ANY) if isinstance(key, str) else key: tensor for key, tensor in value.items()}
        if all(isinstance(key, tuple) and len(key) == 2 and isinstance(tensor, Tensor) for key, tensor in named.items()):
            value = Reference(kind, {key: Entry(tensor) for key, tensor in named.items()})
    if not isinstance(value, Reference):
        raise SpecError(
            describe(
                "reference",
                f"a {type(value).__name__}",
                "a Reference, a captured run, a tensor, or a mapping from (address, site) to tensors",
                "Collect one with surgery.collect_reference(model, data).",
            )
        )
    if value.kind != kind:
        raise SpecError(
            describe("reference", f"values of kind {value.kind!r}", f"kind {kind!r}", "Use the `to` that belongs to it.")
        )
    axes = (4,) if kind == "activation" else (2, 3)
    for (address, site), entry in value.entries.items():
        if entry.value.dim() not in axes:
            raise SpecError(
                describe(
                    f"reference[{address!r}, {site!r}]",
                    f"shape {tuple(entry.value.shape)}",
                    "(batch, head, position, d)" if kind == "activation" else "(head, d) or (head, position, d)",
                    'Give one row for each head; one value for all is Edit("z", "value", value=...).',
                )
            )
        for tensor in (entry.value, entry.spread):
            if tensor is None or tensor.is_meta:
                continue
            # Scores of another run may be -inf where its mask forbids.
            wrong = ~torch.isfinite(tensor) if kind == "mean" else torch.isnan(tensor)
            if bool(wrong.any()):
                raise SpecError(
                    describe(
                        f"reference[{address!r}, {site!r}]",
                        f"{int(wrong.sum())} values that are NaN or infinite",
                        "finite values",
                        "Check the data that the reference was collected on.",
                    )
                )
    return value
