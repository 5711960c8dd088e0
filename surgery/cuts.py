"""One cut: `Edit` at a site, `Freeze` of a circuit. Both are values: checked when made, compared by content, plain data.

Nothing here knows a model; `surgery.lower` checks cuts against one. `surgery.spec` puts them in order and writes them down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, TypeGuard

import torch
from pydantic import WithJsonSchema
from torch import Tensor

from surgery.errors import SpecError, describe
from surgery.fields import Choice, Gqa, Heads, Layers, Positions, Seed, Strength, listed
from surgery.reference import Reference, as_reference
from surgery.sites import MATRIX_SITES, SITES
from surgery.values import Value, callable_name

VALUED = ("value", "scale", "add")
"""Actions that need a value."""
REPLACING = ("zero", "value", "mean", "noise", "identity", "activation", "resample")
TRANSFORMING = ("scale", "add")
TEMPLATES = ("uniform", "diagonal", "previous", "first")
ACTIONS = (*REPLACING, *TRANSFORMING, *TEMPLATES)
FREEZES = ("zero", "mean", "noise", "identity", "activation", "resample")
CIRCUITS = ("qk", "ov", "both")
GROUPED = ("k", "rot_k", "v")
"""The sites where query heads of a group may share a kv head."""
_REFERRING = ("mean", "noise", "activation")

# In a file. Tensors lie beside it, and are named; short ones may be written out.
_TENSOR = {
    "type": "object",
    "properties": {"tensor": {"type": "string"}},
    "required": ["tensor"],
    "additionalProperties": False,
}
_VALUE = {"anyOf": [{"type": ["number", "array", "null"]}, _TENSOR]}
_REFERENCE = {
    "anyOf": [
        {"type": "null"},
        {
            "type": "object",
            "description": "A file that Reference.save wrote, or as Spec.save writes it",
            "properties": {"file": {"type": "string"}, "reference": {"type": "object"}},
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
        },
    ]
}


class Edit(Value):
    """One change at one site, the general form of every cut.

    site: a name of `surgery.sites.SITES`.
    action:
      "zero", "value" (value), "mean" (reference, or the current mean over batch and positions), "noise" (Gaussian; mean and
      spread from value=(mean, spread), from the reference, or per vector from the activation that it replaces), "identity"
      (value unchanged, gradient by backward), "activation" (reference: another run), "resample" (another row of the batch):
      these replace.
      "scale" (value: factor), "add" (value: vector; steering), or a callable tensor -> tensor: these transform.
      "uniform", "diagonal", "previous", "first": pattern templates, over what the mask allows.
    value: float, or tensor (or nested lists of numbers) that broadcasts to (batch, head, position, d) of the selected heads,
      these in the order of `heads`.
    layers: "all", layer numbers (the only or decoder self-attention) or addresses ("encoder.self.0", wildcards allowed).
    heads: "all" or numbers of query heads, from 0.
    positions: None (all) or absolute positions along the site's third axis (queries; keys at k, rot_k, v), counted from 0 with
      padding included.
    backward: "natural" (as the forward computes it; nothing through a replacement), "stopgrad", "ste" (see Freeze).
    strength: s in [0, 1] gives (1 - s) * original + s * edited.
    gqa: at rot_k and v of grouped heads, "isolated" changes what the selected query heads read and nothing else, "shared"
      changes the kv head, so that its whole group feels it. At k, where only kv heads exist, "isolated" takes whole groups.
    reference: of mean, noise and activation: what `surgery.collect_reference` collected or `capture` saw.
    seed: of noise and resampling.

    At scores and pattern, entries that the mask forbids stay as they are (callables get and return them raw; "zero" at pattern
    is zero everywhere).
    Raises SpecError, listing every problem.
    """

    site: Annotated[str, Choice("site", tuple(SITES))]
    action: Annotated[Any, Choice("action", ACTIONS, " or a callable")]
    value: Annotated[Any, WithJsonSchema(_VALUE)] = None
    layers: Layers = "all"
    heads: Heads = "all"
    backward: Annotated[str, Choice("backward", ("natural", "stopgrad", "ste"))] = "natural"
    strength: Strength = 1.0
    positions: Positions = None
    gqa: Gqa = "isolated"
    reference: Annotated[Any, WithJsonSchema(_REFERENCE)] = None
    seed: Seed = 0

    @classmethod
    def _agree(cls, data: dict[str, Any]) -> Iterator[str]:
        site, action = data.get("site"), data.get("action")
        if action in VALUED and isinstance(data.get("value"), list | tuple):
            with suppress(TypeError, ValueError, RuntimeError):  # then it stays what it is, and is refused below
                data["value"] = torch.tensor(data["value"], dtype=torch.float32)
        _sort_by_head(data)
        if data.get("gqa", "isolated") == "shared" and site in SITES and site not in GROUPED:
            expected = f"'isolated' at {site}, which every query head has of its own"
            yield describe("gqa", "'shared'", expected, f"Remove it, or cut {', '.join(GROUPED)}.")
        if not callable(action) and not (isinstance(action, str) and action in ACTIONS):
            return
        yield from _agree_on_value(action, data)
        if action in TEMPLATES and site in SITES and site != "pattern":
            yield describe("action", f"{action!r} at {site}", "a template at pattern", 'Use site="pattern".')
        yield from _agree_on_reference(action, data, f"action {action!r}")

    @property
    def needs_data(self) -> bool:
        """Whether the replacement is made of tensors that somebody measured or gave."""
        return isinstance(self.value, Tensor) or self.reference is not None

    def edits(self) -> tuple[Edit, ...]:
        return (self,)

    def __str__(self) -> str:
        action = self.action if isinstance(self.action, str) else callable_name(self.action)
        value = f"tensor of shape {tuple(self.value.shape)}" if isinstance(self.value, Tensor) else self.value
        return f"{self.site} {action}{'' if value is None else f' {value}'}{_selection(self)}"


class Freeze(Value):
    """Cut a head's circuit off from its input: sugar for edits at the circuit's sites.

    circuit: "qk" (where the head looks), "ov" (what it moves), "both".
    to: what the circuit's activations become.
      "zero": scores 0, so attention is uniform over what the mask allows (biases and sinks stay); z = 0.
      "mean": of the reference, per head and channel (and per position if it was collected so); without a reference the mean
        over batch and positions, padding included, of the current activations, which is refused when decoding with a KV cache.
        q and k that are the same at every position attend uniformly: for QK, a mean says more than zero only per position.
      "noise": Gaussian with the reference's mean and spread, or per vector with those of the activation that it replaces;
        it depends on seed, layer, head and absolute position only, so that all rows of a batch get the same.
      "identity": values unchanged, gradient by backward: a detached circuit.
      "activation" with reference=run (or to=run): the activations of another run.
      "resample": another row of the batch, position by position (a permutation without fixed points, drawn from
        seed); of a padded row that is whatever the kernel leaves at padding.
    QK acts on q and k as they enter the dot product (sites rot_q, rot_k), so positions, norms and cache are those of the
    head; OV acts on z. With "identity", OV acts on v: the value path is detached, the path through the pattern is not.
    backward: "stopgrad" (no gradient to what was replaced) or "ste" (forward replaced, backward as if it were not: the
      gradient at the replaced tensor is handed on unchanged; Bengio et al. 2013, straight-through).
    strength: s in [0, 1]: (1 - s) * original + s * replacement, in forward and in stopgrad's backward.
    gqa: "isolated" freezes what the selected query heads read, "shared" the kv heads behind them, so that the whole group feels
      it: then QK to zero acts on rot_k and OV on v (positions there are those of keys).
    layers, heads, positions, reference, seed: see Edit.

    Raises SpecError, listing every problem.
    """

    circuit: Annotated[str, Choice("circuit", CIRCUITS)]
    layers: Layers = "all"
    heads: Heads = "all"
    to: Annotated[Any, Choice("to", FREEZES)] = "zero"
    backward: Annotated[str, Choice("backward", ("stopgrad", "ste"))] = "stopgrad"
    strength: Strength = 1.0
    positions: Positions = None
    gqa: Gqa = "isolated"
    reference: Annotated[Any, WithJsonSchema(_REFERENCE)] = None
    seed: Seed = 0

    @classmethod
    def _agree(cls, data: dict[str, Any]) -> Iterator[str]:
        to = data.get("to", "zero")
        if callable(getattr(to, "reference", None)) or isinstance(to, Reference | Tensor | Mapping):
            if data.get("reference") is not None:
                yield describe("reference", "a second one beside to=", "one of them", 'Pass to="activation", reference=run.')
            data["to"], data["reference"] = "activation", to
        if isinstance(data.get("to", "zero"), str) and data.get("to", "zero") in FREEZES:
            yield from _agree_on_reference(data.get("to", "zero"), data, f"to={data.get('to', 'zero')!r}")

    @property
    def needs_data(self) -> bool:
        """Whether the replacement is made of tensors that somebody measured or gave."""
        return self.reference is not None

    def edits(self) -> tuple[Edit, ...]:
        """The edits that this freeze stands for, in the order of computation."""
        shared, sites = self.gqa == "shared", []
        if self.circuit in ("qk", "both") and self.to == "zero":
            # Either q = 0 or k = 0 makes every score 0; both would only take the other's straight-through gradient away.
            sites += ["rot_k" if shared else "rot_q"]
        elif self.circuit in ("qk", "both"):
            sites += ["rot_q", "rot_k"]
        if self.circuit in ("ov", "both"):
            sites += ["v" if shared or self.to == "identity" else "z"]
        same = {name: getattr(self, name) for name in Edit.model_fields if name in Freeze.model_fields and name != "gqa"}
        return tuple(Edit(site, self.to, gqa=self.gqa if site in GROUPED else "isolated", **same) for site in sites)

    def __str__(self) -> str:
        return f"freeze {self.circuit} to {self.to}{_selection(self)}"


def _sort_by_head(data: dict[str, Any]) -> None:
    """Puts the rows of a value in ascending order of their heads, as the heads themselves will be."""
    value, heads = data.get("value"), data.get("heads", "all")
    if not isinstance(value, Tensor) or isinstance(heads, str):
        return
    heads = listed(heads)
    axis = {2: None if data.get("site") in MATRIX_SITES else 0, 3: 0, 4: 1}.get(value.dim())
    if axis is not None and all(isinstance(head, int) for head in heads) and value.shape[axis] == len(heads) > 1:
        data["value"] = value.index_select(axis, torch.tensor(heads, device=value.device).argsort())


def _agree_on_reference(action: Any, data: dict[str, Any], what: str) -> Iterator[str]:
    """Makes a Reference of what was given for one; yields why it does not fit the action."""
    reference = data.get("reference")
    if reference is None:
        if action == "activation":
            yield describe("reference", "None", "the run to take activations from", "Pass reference=run from surgery.capture.")
    elif action not in _REFERRING:
        yield describe(
            "reference", f"a {type(reference).__name__}", f"None with {what}", "Remove it, or choose another action."
        )
    else:
        try:
            data["reference"] = as_reference(reference, "activation" if action == "activation" else "mean")
        except SpecError as error:
            yield str(error)


def _agree_on_value(action: Any, data: dict[str, Any]) -> Iterator[str]:
    """Makes numbers floats; yields why a value does not fit the action."""
    value = data.get("value")

    def problem(found: str, expected: str, do: str) -> str:
        return describe("value", found, expected, do)

    if action in VALUED:
        if isinstance(value, Tensor):
            if not value.is_meta and not bool(torch.isfinite(value).all()):
                yield problem("NaN or infinite entries in the tensor", "finite values", "To block a key, add -1e9 at scores.")
        elif not _is_real(value):
            yield problem(
                repr(value), f"a number or a tensor (or lists of equal lengths) with action {action!r}", "Pass value=..."
            )
        elif not math.isfinite(value):
            yield problem(repr(value), "a finite number", "Pass one.")
        else:
            data["value"] = float(value)
    elif action == "noise" and value is not None:
        is_pair = isinstance(value, tuple | list) and len(value) == 2 and all(_is_real(v) and math.isfinite(v) for v in value)
        if not is_pair or value[1] < 0:
            yield problem(repr(value), "None or (mean, spread) with spread >= 0", "Pass value=(0.0, 1.0).")
        else:
            data["value"] = (float(value[0]), float(value[1]))
    elif value is not None:
        yield problem(repr(value), f"None with action {action!r}", "Remove it.")


def _is_real(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _selection(cut: Any) -> str:
    """What a cut selects, in words; defaults are left out."""
    parts = [
        f"layers {cut.layers if cut.layers == 'all' else ', '.join(map(str, cut.layers))}",
        f"heads {cut.heads if cut.heads == 'all' else ', '.join(map(str, cut.heads))}",
    ]
    parts += [f"positions {', '.join(map(str, cut.positions))}"] if cut.positions is not None else []
    parts += [f"strength {cut.strength:g}"] if cut.strength != 1.0 else []
    parts += [f"backward {cut.backward}"] if cut.backward not in ("natural", "stopgrad") else []
    parts += [f"gqa {cut.gqa}"] if cut.gqa != "isolated" else []
    parts += [f"of {cut.reference!r}"] if cut.reference is not None else []
    parts += [f"seed {cut.seed}"] if cut.seed else []
    return f" ({', '.join(parts)})"
