"""What to cut: `Edit` at a site, `Freeze` of a circuit, and `Spec`, an ordered list of them.

A spec is a value: it is checked when it is made (all problems at once), compares by content, prints, and goes to and from
JSON and YAML; tensors in it live in safetensors. Nothing here knows a model; `surgery.lower` checks a spec against one.

Order. Edits at different sites act in the order of computation (`surgery.sites.SITES`). Edits at one site act in the order of
the spec, each on what the one before left. `strength`, `positions` and `backward` belong to each edit alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.errors import SpecError, describe, listing
from surgery.reference import Reference, as_reference
from surgery.sites import SITES

VERSION = 1
REPLACING = ("zero", "value", "mean", "noise", "identity", "activation", "resample")
TRANSFORMING = ("scale", "add")
TEMPLATES = ("uniform", "diagonal", "previous", "first")
ACTIONS = (*REPLACING, *TRANSFORMING, *TEMPLATES)
FREEZES = ("zero", "mean", "noise", "identity", "activation", "resample")
CIRCUITS = ("qk", "ov", "both")


class _Value(BaseModel):
    """Immutable, positional construction, our errors in place of pydantic's."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, *args: Any, **data: Any) -> None:
        names = list(type(self).model_fields)
        if len(args) > len(names) or any(name in data for name in names[: len(args)]):
            raise TypeError(f"{type(self).__name__}() takes {', '.join(names)}; an argument was given twice or is too many")
        try:
            super().__init__(**dict(zip(names, args, strict=False)), **data)
        except ValidationError as error:
            problems = []
            for e in error.errors():
                where = ".".join(str(part) for part in e["loc"])
                text = e["msg"].removeprefix("Value error, ")
                problems.append(text if e["type"] == "value_error" else describe(where, repr(e["input"]), text, ""))
            raise SpecError(listing(type(self).__name__, (p.strip() for p in problems))) from None


def _choice(name: str, allowed: tuple[str, ...], more: str = "") -> BeforeValidator:
    """A validator of one word out of `allowed`."""

    def check(value: Any) -> Any:
        if more and callable(value):
            return value
        if value not in allowed:
            raise ValueError(describe(name, repr(value), ", ".join(map(repr, allowed)) + more, "Choose one of these."))
        return value

    return BeforeValidator(check)


def _numbers(name: str, everything: str | None) -> BeforeValidator:
    """A validator of distinct numbers from 0, in ascending order; `everything` is the value that means all."""

    def check(value: Any) -> Any:
        if (value is None and everything is None) or (isinstance(value, str) and value == everything):
            return value
        items = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, Iterable) else ()
        if (
            not items
            or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in items)
            or len(set(items)) < len(items)
        ):
            expected = f"{everything!r}, or at least one number from 0, each once"
            raise ValueError(describe(name, repr(value), expected, f"For example {name}=[0, 3]."))
        return tuple(sorted(items))

    return BeforeValidator(check)


def _check_layers(value: Any) -> Any:
    if isinstance(value, str) and value == "all":
        return value
    items = (value,) if isinstance(value, int | str) else tuple(value) if isinstance(value, Iterable) else ()
    if not items or any(isinstance(i, bool) or not isinstance(i, int | str) or (isinstance(i, int) and i < 0) for i in items):
        expected = "'all', or at least one layer number from 0 or address"
        raise ValueError(describe("layers", repr(value), expected, 'For example layers=[5, 6] or layers=["encoder.self.0"].'))
    return items


def _check_strength(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(describe("strength", repr(value), "a number from 0 to 1", "1 replaces entirely, 0 not at all."))
    return float(value)


Layers = Annotated[Any, BeforeValidator(_check_layers)]
Heads = Annotated[Any, _numbers("heads", "all")]
Positions = Annotated[Any, _numbers("positions", None)]
Strength = Annotated[float, BeforeValidator(_check_strength)]
Gqa = Annotated[str, _choice("gqa", ("isolated", "shared"))]


class Edit(_Value):
    """One change at one site, the general form of every cut.

    site: a name of `surgery.sites.SITES`.
    action:
      "zero", "value" (value), "mean" (reference, or the current mean over batch and positions), "noise" (Gaussian; mean and
      spread from value=(mean, spread), from the reference, or per vector from the activation that it replaces), "identity"
      (value unchanged, gradient by backward), "activation" (reference: another run), "resample" (another row of the batch):
      these replace.
      "scale" (value: factor), "add" (value: vector; steering), or a callable tensor -> tensor: these transform.
      "uniform", "diagonal", "previous", "first": pattern templates, over what the mask allows.
    value: float, or tensor that broadcasts to (batch, head, position, d) of the selected heads.
    layers: "all", layer numbers (the only or decoder self-attention) or addresses ("encoder.self.0", wildcards allowed).
    heads: "all" or numbers of query heads, from 0. positions: None (all) or absolute positions along the site's third axis
      (queries; keys at k, rot_k, v), counted from 0 with padding included.
    backward: "natural" (as the forward computes it; nothing through a replacement), "stopgrad", "ste" (see Freeze).
    strength: s in [0, 1] gives (1 - s) * original + s * edited.
    gqa: at k, rot_k and v of grouped heads, "isolated" changes what the selected query heads read and nothing else,
      "shared" changes the kv head, so that its whole group feels it.
    seed: of noise and resampling.
    At scores and pattern, entries that the mask forbids stay as they are (callables get and return them raw).
    Raises SpecError, listing every problem.
    """

    site: Annotated[str, _choice("site", tuple(SITES))]
    action: Annotated[Any, _choice("action", ACTIONS, " or a callable")]
    value: Any = None
    layers: Layers = "all"
    heads: Heads = "all"
    backward: Annotated[str, _choice("backward", ("natural", "stopgrad", "ste"))] = "natural"
    strength: Strength = 1.0
    positions: Positions = None
    gqa: Gqa = "isolated"
    reference: Any = None
    seed: int = 0

    @model_validator(mode="after")
    def _agree(self) -> Edit:
        problems = list(_value_problems(self.action, self.value))
        if self.action in TEMPLATES and self.site != "pattern":
            problems.append(
                describe("action", f"{self.action!r} at {self.site}", "a template at pattern", 'Use site="pattern".')
            )
        if self.action in ("activation",) and self.reference is None:
            problems.append(
                describe("reference", "None", "the run to take activations from", "Pass reference=run from surgery.capture.")
            )
        if self.action not in ("mean", "noise", "activation") and self.reference is not None:
            problems.append(describe("reference", "a value", f"None with action {self.action!r}", "Remove it."))
        try:
            object.__setattr__(self, "reference", _normal_reference(self.action, self.reference))
        except SpecError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def needs_data(self) -> bool:
        """Whether the replacement is made of tensors that somebody measured or gave."""
        return isinstance(self.value, Tensor) or self.reference is not None

    def edits(self) -> tuple[Edit, ...]:
        return (self,)

    def __str__(self) -> str:
        action = self.action if isinstance(self.action, str) else getattr(self.action, "__name__", repr(self.action))
        return f"{self.site} {action}{_selection(self)}"


class Freeze(_Value):
    """Cut a head's circuit off from its input: sugar for edits at the circuit's sites.

    circuit: "qk" (where the head looks), "ov" (what it moves), "both".
    to: what the circuit's activations become.
      "zero": scores 0, so attention is uniform over what the mask allows (biases and sinks stay); z = 0.
      "mean": of the reference, per head and channel (and per position if it was collected so); without a reference the mean
        over batch and positions of the current activations, which is refused when decoding with a KV cache.
      "noise": Gaussian with the reference's mean and spread, or per vector with those of the activation that it replaces;
        it depends on seed, layer, head and absolute position only.
      "identity": values unchanged, gradient by backward: a detached circuit.
      "activation" with reference=run (or to=run): the activations of another run.
      "resample": another row of the batch (a permutation without fixed points, drawn from seed).
    QK acts on q and k as they enter the dot product (sites rot_q, rot_k), so positions, norms and cache are those of the
    head; OV acts on z. With "identity", OV acts on v: the value path is detached, the path through the pattern is not.
    backward: "stopgrad" (no gradient to what was replaced) or "ste" (forward replaced, backward as if it were not: the
      gradient at the replaced tensor is handed on unchanged; Bengio et al. 2013, straight-through).
    strength: s in [0, 1]: (1 - s) * original + s * replacement, in forward and in stopgrad's backward.
    layers, heads, positions, gqa, reference, seed: see Edit.
    Raises SpecError, listing every problem.
    """

    circuit: Annotated[str, _choice("circuit", CIRCUITS)]
    layers: Layers = "all"
    heads: Heads = "all"
    to: Annotated[Any, _choice("to", FREEZES)] = "zero"
    backward: Annotated[str, _choice("backward", ("stopgrad", "ste"))] = "stopgrad"
    strength: Strength = 1.0
    positions: Positions = None
    gqa: Gqa = "isolated"
    reference: Any = None
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _run_as_target(cls, data: Any) -> Any:
        to = data.get("to", "zero")
        if hasattr(to, "reference") or isinstance(to, Reference | Tensor | Mapping):
            data = {**data, "to": "activation", "reference": to}
        return data

    @model_validator(mode="after")
    def _agree(self) -> Freeze:
        problems = []
        if self.to == "activation" and self.reference is None:
            problems.append(
                describe("reference", "None", "the run to take activations from", "Pass reference=run from surgery.capture.")
            )
        elif self.to not in ("mean", "noise", "activation") and self.reference is not None:
            problems.append(describe("reference", "a value", f"None with to={self.to!r}", "Remove it, or use to='mean'."))
        try:
            object.__setattr__(self, "reference", _normal_reference(self.to, self.reference))
        except SpecError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def needs_data(self) -> bool:
        """Whether the replacement is made of tensors that somebody measured or gave."""
        return self.reference is not None

    def edits(self) -> tuple[Edit, ...]:
        """The edits that this freeze stands for, in the order of computation."""
        sites: list[str] = []
        if self.circuit in ("qk", "both"):
            # q = 0 makes every score 0; changing k as well would only take q's straight-through gradient away.
            sites += ["rot_q"] if self.to == "zero" else ["rot_q", "rot_k"]
        if self.circuit in ("ov", "both"):
            sites += ["v"] if self.to == "identity" else ["z"]
        same = {name: getattr(self, name) for name in Edit.model_fields if name in Freeze.model_fields}
        return tuple(Edit(site, self.to, **same) for site in sites)

    def __str__(self) -> str:
        return f"freeze {self.circuit} to {self.to}{_selection(self)}"


class Spec:
    """An ordered, immutable list of cuts. `Spec()` is empty: the model computes what it always did.

    Equal by content; `str` is a readable list; `a + b` concatenates; `to_json`, `to_yaml`, `save` and their inverses.
    """

    def __init__(self, cuts: Iterable[Edit | Freeze] | Edit | Freeze = ()) -> None:
        cuts = (cuts,) if isinstance(cuts, Edit | Freeze) else tuple(cuts)
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

    def __iter__(self) -> Iterator[Edit | Freeze]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)

    def __add__(self, other: Spec) -> Spec:
        return Spec((*self._cuts, *other._cuts))

    def __repr__(self) -> str:
        return f"Spec([{', '.join(map(str, self._cuts))}])"

    def __str__(self) -> str:
        return "\n".join(f"{number}. {cut}" for number, cut in enumerate(self._cuts, 1)) or "(no cuts)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec):
            return NotImplemented
        (mine, tensors), (theirs, other_tensors) = self._content(), other._content()
        return mine == theirs and all(_same(tensors[name], other_tensors[name]) for name in tensors)

    def __hash__(self) -> int:
        return hash(json.dumps(self._content()[0], sort_keys=True))

    def fingerprint(self) -> str:
        """A hash of everything in the spec, tensors included; "" for the empty spec. Marks KV caches."""
        if not self._cuts:
            return ""
        if self._fingerprint is None:
            data, tensors = self._content()
            digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
            for name, tensor in tensors.items():
                digest.update(name.encode())
                if not tensor.is_meta:
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _content(self, strict: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        cuts = []
        for number, cut in enumerate(self._cuts):
            data: dict[str, Any] = {"kind": type(cut).__name__.lower()}
            for name, info in type(cut).model_fields.items():
                value = getattr(cut, name)
                if name in ("reference", "value", "action") or value != info.default:
                    data[name] = _to_plain(value, f"{number}.{name}", tensors, strict)
            cuts.append({name: value for name, value in data.items() if value is not None})
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
        try:
            return cls._from_plain(json.loads(text), tensors or {})
        except json.JSONDecodeError as error:
            raise SpecError(describe("Spec.from_json", f"text that is not JSON ({error})", "JSON", "Check the file.")) from None

    @classmethod
    def from_yaml(cls, text: str, tensors: Mapping[str, Tensor] | None = None) -> Spec:
        """The inverse of `to_yaml`. Raises SpecError, listing every cut that cannot be read."""
        try:
            return cls._from_plain(yaml.safe_load(text), tensors or {})
        except yaml.YAMLError as error:
            raise SpecError(describe("Spec.from_yaml", f"text that is not YAML ({error})", "YAML", "Check the file.")) from None

    def save(self, path: str | Path) -> None:
        """Writes `path` (.json, .yaml or .yml) and, if the spec holds tensors, `path` with the suffix .safetensors."""
        path = Path(path)
        text = self.to_yaml() if path.suffix in (".yaml", ".yml") else self.to_json()
        if tensors := self.tensors():
            save_file(
                {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path.with_suffix(".safetensors")
            )
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Spec:
        """Reads what `save` wrote."""
        path = Path(path)
        beside = path.with_suffix(".safetensors")
        tensors = load_file(beside) if beside.exists() else {}
        read = cls.from_yaml if path.suffix in (".yaml", ".yml") else cls.from_json
        return read(path.read_text(encoding="utf-8"), tensors)

    @classmethod
    def _from_plain(cls, data: Any, tensors: Mapping[str, Tensor]) -> Spec:
        if not isinstance(data, Mapping) or data.get("version") != VERSION or not isinstance(data.get("cuts"), list):
            version = data.get("version") if isinstance(data, Mapping) else None
            raise SpecError(
                describe("Spec", f"version {version!r}", f"version {VERSION} and a list of cuts", "Write it with Spec.save.")
            )
        cuts, problems = [], []
        for number, item in enumerate(data["cuts"]):
            try:
                item = dict(item)
                kind = {"edit": Edit, "freeze": Freeze}[item.pop("kind")]
                cuts.append(kind(**{name: _from_plain(value, tensors) for name, value in item.items()}))
            except SpecError as error:
                problems.append(f"cut {number}: {error}")
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"cut {number}: cannot be read ({type(error).__name__}: {error})")
        if problems:
            raise SpecError(listing("Spec", problems))
        return cls(cuts)


def _normal_reference(action: Any, reference: Any) -> Reference | None:
    if reference is None or action not in ("mean", "noise", "activation"):
        return reference
    return as_reference(reference, "activation" if action == "activation" else "mean")


def _value_problems(action: Any, value: Any) -> Iterator[str]:
    def problem(found: str, expected: str, do: str) -> str:
        return describe("value", found, expected, do)

    if action in ("value", "scale", "add"):
        if not isinstance(value, int | float | Tensor) or isinstance(value, bool):
            yield problem(repr(value), f"a number or a tensor with action {action!r}", "Pass value=...")
        elif isinstance(value, Tensor) and not value.is_meta and not bool(torch.isfinite(value).all()):
            yield problem("NaN or infinite entries in the tensor", "finite values", "Check where the tensor comes from.")
        elif not isinstance(value, Tensor) and not math.isfinite(value):
            yield problem(repr(value), "a finite number", "Pass one.")
    elif action == "noise":
        pair = value is None or (isinstance(value, tuple | list) and len(value) == 2 and all(map(math.isfinite, value)))
        if not pair or (value is not None and value[1] < 0):
            yield problem(repr(value), "None or (mean, spread) with spread >= 0", "Pass value=(0.0, 1.0).")
    elif value is not None:
        yield problem(repr(value), f"None with action {action!r}", "Remove it.")


def _selection(cut: Any) -> str:
    """What a cut selects, in words; defaults are left out."""
    name = cut.reference
    parts = [
        f"layers {cut.layers if cut.layers == 'all' else ', '.join(map(str, cut.layers))}",
        f"heads {cut.heads if cut.heads == 'all' else ', '.join(map(str, cut.heads))}",
    ]
    parts += [f"positions {', '.join(map(str, cut.positions))}"] if cut.positions is not None else []
    parts += [f"strength {cut.strength:g}"] if cut.strength != 1.0 else []
    parts += [f"backward {cut.backward}"] if cut.backward not in ("natural", "stopgrad") else []
    parts += [f"gqa {cut.gqa}"] if cut.gqa != "isolated" else []
    parts += [f"of {name!r}"] if name is not None else []
    return f" ({', '.join(parts)})"


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and not a.is_meta and torch.equal(a.cpu(), b.cpu()))


def _to_plain(value: Any, name: str, tensors: dict[str, Tensor], strict: bool) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Reference):
        description, named = value.describe(f"{name}.")
        tensors.update(named)
        return {"reference": description}
    if callable(value):
        if strict:
            raise SpecError(
                describe(
                    "Spec",
                    f"the callable {_callable_name(value)}",
                    "cuts that are data",
                    "Use it in this process only, or express it as an Edit.",
                )
            )
        return {"callable": f"{_callable_name(value)}@{id(value)}"}
    return list(value) if isinstance(value, tuple) else value


def _callable_name(value: Callable[..., Any]) -> str:
    return getattr(value, "__qualname__", type(value).__name__)


def _from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
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
    return value
