"""What to cut: `Edit` at a site, `Freeze` of a circuit, and `Spec`, an ordered list of them.

A spec is a value: it is checked when it is made (all problems at once), compares by content, prints, and goes to and from
JSON and YAML; tensors in it live in safetensors. Nothing here knows a model; `surgery.lower` checks a spec against one.

Order. Edits at different sites act in the order of computation (`surgery.sites.SITES`). Edits at one site act in the order of
the spec, each on what the one before left. `strength`, `positions` and `backward` belong to each edit alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.cuts import Edit as Edit
from surgery.cuts import Freeze as Freeze
from surgery.errors import SpecError, closest, describe, listing
from surgery.reference import Reference, stored

VERSION = 1
KINDS: dict[str, type[Edit | Freeze]] = {"edit": Edit, "freeze": Freeze}


class Spec:
    """An ordered, immutable list of cuts. `Spec()` is empty: the model computes what it always did.

    Equal by content; `str` is a readable list; `a + b` concatenates; `to_json`, `to_yaml`, `save` and their inverses.
    """

    def __init__(self, cuts: Iterable[Edit | Freeze] | Edit | Freeze = ()) -> None:
        cuts = (cuts,) if isinstance(cuts, Edit | Freeze) or not isinstance(cuts, Iterable) else tuple(cuts)
        wrong = [type(c).__name__ for c in cuts if not isinstance(c, Edit | Freeze)]
        if wrong:
            raise SpecError(
                describe("Spec", f"entries of type {', '.join(wrong)}", "Freeze or Edit", 'For example Spec([Freeze("qk")]).')
            )
        self._cuts: tuple[Edit | Freeze, ...] = cuts
        self._fingerprint: str | None = None

    @property
    def cuts(self) -> tuple[Edit | Freeze, ...]:
        return self._cuts

    def block_of(self, number: int) -> tuple[int, int] | None:
        """The block of the batch that a cut is for, and how many there are; None for the whole batch."""
        return None

    def __iter__(self) -> Iterator[Edit | Freeze]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)

    def __add__(self, other: Spec | Edit | Freeze) -> Spec:
        if not isinstance(other, Spec | Edit | Freeze):
            return NotImplemented
        return Spec((*self._cuts, *(other if isinstance(other, Spec) else (other,))))

    def __repr__(self) -> str:
        return f"Spec([{', '.join(map(str, self._cuts))}])"

    def __str__(self) -> str:
        return "\n".join(f"{number}. {cut}" for number, cut in enumerate(self._cuts)) or "(no cuts)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        return self._cuts == other._cuts

    def __hash__(self) -> int:
        return hash(self._cuts)

    def fingerprint(self) -> str:
        """A hash of everything in the spec, tensors included; "" for the empty spec. Marks KV caches."""
        if not self._cuts:
            return ""
        if self._fingerprint is None:
            data, tensors = self._content()
            digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
            for name, tensor in tensors.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                if not tensor.is_meta:
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _content(self, strict: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        cuts, tensors = [], {}
        for number, cut in enumerate(self._cuts):
            data, named = cut.content(str(number), strict)
            cuts.append(data)
            tensors.update(named)
        return {"version": VERSION, "cuts": cuts}, tensors

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the spec under the names that its JSON uses."""
        return self._content()[1]

    def to_json(self) -> str:
        """The spec as JSON text; tensors are named in it (see `tensors`). Raises SpecError for a callable."""
        return json.dumps(self._content(strict=True)[0], indent=2)

    def to_yaml(self) -> str:
        """The spec as YAML text; otherwise as `to_json`."""
        return yaml.safe_dump(self._content(strict=True)[0], sort_keys=False)

    @classmethod
    def from_json(cls, text: str, tensors: Mapping[str, Tensor] | None = None) -> Spec:
        """The inverse of `to_json`. Raises SpecError, listing every cut that cannot be read."""
        return cls._from_json(text, tensors or {}, None)

    @classmethod
    def from_yaml(cls, text: str, tensors: Mapping[str, Tensor] | None = None) -> Spec:
        """The inverse of `to_yaml`. Raises SpecError, listing every cut that cannot be read."""
        return cls._from_yaml(text, tensors or {}, None)

    @classmethod
    def _from_json(cls, text: str, tensors: Mapping[str, Tensor], folder: Path | None) -> Spec:
        try:
            return cls._from_plain(json.loads(text), tensors, folder)
        except json.JSONDecodeError as error:
            raise SpecError(describe("Spec.from_json", f"text that is not JSON ({error})", "JSON", "Check the file.")) from None

    @classmethod
    def _from_yaml(cls, text: str, tensors: Mapping[str, Tensor], folder: Path | None) -> Spec:
        try:
            return cls._from_plain(yaml.safe_load(text), tensors, folder)
        except yaml.YAMLError as error:
            raise SpecError(describe("Spec.from_yaml", f"text that is not YAML ({error})", "YAML", "Check the file.")) from None

    def save(self, path: str | Path) -> None:
        """Writes `path` (.json, .yaml or .yml) and, if the spec holds tensors, `path` with .safetensors added to its name."""
        path = Path(path)
        if path.suffix not in (".json", ".yaml", ".yml"):
            raise SpecError(describe("Spec.save", f"{path.name!r}", "a name ending in .json, .yaml or .yml", "Rename it."))
        text = self.to_yaml() if path.suffix in (".yaml", ".yml") else self.to_json()
        if tensors := self.tensors():
            save_file(stored(tensors), _beside(path))
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Spec:
        """Reads what `save` wrote, or a file written by hand (see `surgery schema` for editors).

        There a reference may name a file of Reference.save, from the spec's folder on: `reference: {file: means.safetensors}`.
        Raises SpecError, listing every cut that cannot be read, also for files that are missing or damaged.
        """
        path = Path(path)
        try:
            tensors = load_file(_beside(path)) if _beside(path).exists() else {}
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, SafetensorError) as error:
            what, found = f"Spec.load({str(path)!r})", f"{type(error).__name__}: {error}"
            raise SpecError(describe(what, found, "a .json or .yaml file of cuts", "Check the path and the file.")) from None
        read = cls._from_yaml if path.suffix in (".yaml", ".yml") else cls._from_json
        return read(text, tensors, path.parent)

    @classmethod
    def _from_plain(cls, data: Any, tensors: Mapping[str, Tensor], folder: Path | None) -> Spec:
        version = data.get("version") if isinstance(data, Mapping) else None
        if not isinstance(data, Mapping) or version != VERSION or not isinstance(data.get("cuts"), list):
            found = f"version {version!r}" if version != VERSION else "no list of cuts"
            found = found if isinstance(data, Mapping) else "nothing" if data is None else f"a {type(data).__name__}"
            do = f"Begin a file with `version: {VERSION}` and `cuts:`, or write it with Spec.save."
            raise SpecError(describe("Spec", found, f"version {VERSION} and a list of cuts", do))
        if more := sorted(map(str, set(data) - {"version", "cuts", "$schema"})):
            raise SpecError(describe("Spec", f"beside its cuts {', '.join(more)}", "version and cuts alone", "Remove it."))
        cuts, problems = [], []
        for number, item in enumerate(data["cuts"]):
            try:
                item = dict(item)
                name = item.pop("kind", None)
                kind = KINDS.get(name)
                if kind is None:
                    expected = ", ".join(map(repr, KINDS))
                    raise SpecError(describe("kind", repr(name), expected, closest(name, KINDS) or "Choose one of these."))
                cuts.append(kind(**{name: _from_plain(value, tensors, folder) for name, value in item.items()}))
            except SpecError as error:
                problems.append(f"cut {number}: {error}")
            except (KeyError, TypeError, ValueError) as error:
                found = f"what cannot be read ({type(error).__name__}: {error})"
                problems.append(describe(f"cut {number}", found, "a cut as Spec.to_json has it", "Write it with Spec.save."))
        if problems:
            raise SpecError(listing("Spec", problems))
        return cls(cuts)


def _beside(path: Path) -> Path:
    """The file of a spec's tensors: a.yaml.safetensors for a.yaml, so that no two files of ours share it."""
    return path.with_name(f"{path.name}.safetensors")


def _from_plain(value: Any, tensors: Mapping[str, Tensor], folder: Path | None) -> Any:
    """folder: where a reference that is named by its file is looked for; None where a text may name no files."""
    if isinstance(value, Mapping) and set(value) == {"tensor"}:
        if value["tensor"] not in tensors:
            raise SpecError(
                describe(
                    f"tensor {value['tensor']!r}",
                    f"tensors {sorted(tensors)[:5]}",
                    "the tensor that the spec names",
                    "Load the .safetensors file that was saved beside it.",
                )
            )
        return tensors[value["tensor"]]
    if isinstance(value, Mapping) and set(value) == {"reference"}:
        return Reference.from_description(value["reference"], tensors)
    if isinstance(value, Mapping) and set(value) == {"file"}:
        if folder is None:
            found = f"the file {value['file']!r}"
            raise SpecError(describe("reference", found, "values, in a text without a place", "Use Spec.load."))
        return Reference.load(folder / str(value["file"]))
    if isinstance(value, Mapping):
        found, expected = f"{dict(value)!r}", "{file: means.safetensors}, {reference: ...} or {tensor: name}"
        raise SpecError(describe("a value", found, expected, "Name a file that Reference.save wrote, or use Spec.save."))
    return value
