"""What stands for a module's projections, parts and surgery while its forward is recorded, and running it on these.

The run sees a copy of the module's attributes, fires no hook of the user's and moves no random numbers on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.arguments import Form, type_of
from surgery.configs import config_view
from surgery.evaluation import accelerators, evaluating, keeping_random, keeping_state
from surgery.family import Family, is_pointwise, is_projection, projection_width
from surgery.labels import BASE, WEIGHT, Fate, Labelled, Z, owner_of
from surgery.layout import STANDARD
from surgery.source import n_returned
from surgery.threads import BORROWED
from surgery.witness import z_labels

Give = Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]
"""The output of a stub: of a projection's name, and of a shape, type and device."""


@dataclass
class Recording:
    """What one run showed. Labels: (head, d) as arrived, at one position; several: the sites where others differ, and how.

    projections: names of the projections met, in the order of their owner numbers. core: mask and keywords of the core call.
    form: of the arguments that the forward took.
    leads: the axes before the channels, by projection. without_z: the projections that read something else than z.
    output: the projection that read z, and which entry of z (head * d_value + d) each of its inputs is.
    returned: what the forward gave; fate: what became of what the last projection gave, up to there.
    give: what stubs give in place of labelled ones; arrived: the core's v, kept in such a run.
    """

    family: Family
    projections: list[str] = field(default_factory=list)
    core: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    several: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    output: tuple[str, Tensor] | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    leads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    without_z: set[str] = field(default_factory=set)
    fate: Fate = "given"
    calls: int = 0
    returned: Any = None
    witness: Any = None
    form: Form | None = None
    give: Give | None = None
    arrived: Tensor | None = None

    def owner(self, label: int) -> str:
        return self.projections[label // BASE]

    def note(self, site: str, labels: Tensor) -> None:
        """Keeps what one position of a site is made of. labels: (batch, head, position, d)."""
        rows = labels.transpose(1, 2).flatten(0, 1)
        # Padding, and rows taken from elsewhere, bear no labels.
        full = rows[(rows >= 0).flatten(1).all(dim=1)]
        self.labels[site] = (full[-1] if len(full) else rows[-1]).clone()
        if len(full) and bool((full != full[-1]).any()):
            owners = dict.fromkeys(full.div(BASE, rounding_mode="floor").flatten().tolist())
            whose = " and ".join(self.name_of(owner) for owner in owners)
            self.several[site] = f"{site} comes from other channels at other positions (of {whose})"

    def name_of(self, owner: int) -> str:
        return self.projections[owner] if owner < len(self.projections) else "a parameter"

    def exactly(self, value: Any, dtype: torch.dtype) -> Any:
        """A part of the module as a run on numbers computes with it: where its own type would round, in this one."""
        is_number = self.give is not None and isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_number and 1 < value.dtype.itemsize < dtype.itemsize else value

    def reaches(self, owner: int) -> bool:
        """Whether anything of an owner is in what the forward returned."""
        return bool((self.labels["output"] >= owner * BASE).any())

    def batch_axes(self, projection: str, site: str) -> int:
        """How many axes of a projection's input are the core's batch; 0 if positions come first, and the batch after them."""
        batch, _, positions, _ = self.shapes[site]
        lead = self.leads.get(projection, ())
        if lead == (positions, batch) != (batch, positions):
            return 0
        return next((n for n in range(1, len(lead)) if math.prod(lead[:n]) == batch and math.prod(lead[n:]) == positions), 1)

    def ends_in(self, projection: str) -> bool:
        """Whether the forward's output is that projection's, by views and elementwise arithmetic, as far as one can tell."""
        owners = self.labels["output"].div(BASE, rounding_mode="floor")
        return not owners.numel() or bool((owners == self.projections.index(projection)).any())


class _State:
    """Stands where a patched module has its surgery state; the core call ends here."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    computes_as = "eager"

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        implementation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        record = self.recording
        record.calls += 1
        record.arrived = None if record.give is None else value
        record.core = {**record.core, "mask": attention_mask, "kwargs": kwargs}
        for name, tensor in (("q", query), ("k", key), ("v", value)):
            self._note(name, tensor)
        batch, heads, queries, _ = query.shape
        z = self._z(value.as_subclass(Tensor).new_ones(batch, heads, queries, value.shape[-1]))
        return z.transpose(1, 2).contiguous(), None

    def spot(self, site: str, tensor: Any, layout: Any = None) -> Any:
        """A point of a forward that a patch writes out. Between those of q, k, v and that of z no labels are needed."""
        layout = self.recording.family.inline.layouts[site] if layout is None else layout
        if self.recording.give is not None:  # numbers, and no labels
            self.recording.arrived = layout.to_standard(tensor) if site == "v" else self.recording.arrived
            return tensor
        if site == "z":
            self.recording.calls = 1
            return layout.from_standard(self._z(layout.to_standard(tensor)), tensor)
        if site in ("rot_q", "rot_k", "v"):
            self._note(site[-1], layout.to_standard(tensor))
            # Whoever writes a forward out knows which rows are of other projections.
            self.recording.several.pop(site[-1], None)
            return tree_map(lambda t: t.as_subclass(Tensor) if isinstance(t, Tensor) else t, tensor)
        return tensor

    def _note(self, name: str, tensor: Tensor) -> None:
        record = self.recording
        record.shapes[name] = tuple(tensor.shape)
        if isinstance(tensor, Labelled):
            record.note(name, tensor.labels)

    def _z(self, like: Tensor) -> Labelled:
        """(batch, head, query, d_head), with labels of its own."""
        return Labelled.make(like.as_subclass(Tensor), z_labels(STANDARD, like))

    def fused(
        self, kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any
    ) -> Tensor:
        self.spot("v", value)
        return kernel(query, key, value, *args, **more)

    @staticmethod
    def inner(module: nn.Module) -> nn.Module:
        """A module whose code is rewritten, too."""
        return module

    def config(self, config: Any) -> Any:
        return config_view(config, self.recording.family.shows_name)


class _Stub:
    """A projection in the recorded run."""

    def __init__(self, module: nn.Module, name: str, recording: Recording, dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.name, self.recording, self.dtype, self.device = module, name, recording, dtype, device
        self.axis = 1 if is_pointwise(module) else -1
        self.returned = n_returned(type(module).forward)

    def __getattr__(self, name: str) -> Any:
        return self.recording.exactly(getattr(self.module, name), self.dtype)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.axis == 1:
            return self._apply(x.movedim(1, -1)).movedim(-1, 1)
        output = self._apply(x)
        # Some give scales of a quantisation beside it, which only numbers have.
        return output if self.returned is None else (output, *[None] * (self.returned - 1))

    def _apply(self, x: Tensor) -> Tensor:
        record = self.recording
        if isinstance(x, Labelled) and bool((x.labels >= Z * BASE).any()):
            record.output = (self.name, (x.labels.reshape(-1, x.shape[-1])[-1] - Z * BASE).clone())
        else:
            record.without_z.add(self.name)
            if isinstance(x, Labelled) and 0 <= owner_of(x.labels) < WEIGHT:
                record.inputs[self.name] = record.owner(int(x.labels.max()))
        if self.name not in record.projections:
            record.projections.append(self.name)
        owner = record.projections.index(self.name)
        width: Any = self.module.out_channels if self.axis == 1 else projection_width(self.module)
        record.leads[self.name] = tuple(x.shape[:-1])
        shape = (*x.shape[:-1], width)
        if record.give is not None:
            return record.give(self.name, shape, self.dtype, self.device)
        value = torch.ones(shape, dtype=self.dtype, device=self.device)
        return Labelled.make(value, (torch.arange(width) + owner * BASE).expand(shape).contiguous(), record.witness)


class _Chain(list[Any]):
    """A list of modules in the recorded run; called, they run one after another."""

    def __call__(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x


def run_on_stubs(
    module: nn.Module, prefix: str, recording: Recording, family: Family | None, arguments: Mapping[str, Any], given: Any = None
) -> Any:
    """The output of a module's forward whose projections, and those of its parts, are stubs. given: members to replace."""
    _, device = type_of(module)
    devices = accelerators(device)
    # In training a forward would count these numbers in its batch norms; what draws or keeps some all the same must not move
    # the user's on. Nor must autocast, which stubs do not follow, mix the types of what they give with others.
    plain = torch.autocast(device.type if devices else "cpu", enabled=False)
    with evaluating(module), plain, BORROWED, keeping_random(devices), keeping_state(module):
        view = _view(module, prefix, recording, family, given or {})
        return type(view).forward(view, **arguments)


def _view(module: nn.Module, prefix: str, recording: Recording, family: Family | None, given: Mapping[str, Any]) -> Any:
    """An object like the module, on a copy of its attributes, whose projections are stubs and which fires no user hooks."""
    base = type(module)
    if hasattr(base, "_surgery_base"):
        base = base._surgery_base
    dtype, device = type_of(module)
    dtype = exact_type(module) if recording.give is not None else dtype

    def getattribute(self: Any, name: str) -> Any:
        if name in given:
            return given[name]
        value = recording.exactly(nn.Module.__getattr__(self, name), dtype)
        if isinstance(value, nn.Parameter) and value.dim() > 1 and recording.witness is not None:
            return recording.witness.weight(value, f"{prefix}{name}")
        if isinstance(value, nn.Module):
            return wrap(value, f"{prefix}{name}")
        return value

    def wrap(value: nn.Module, path: str) -> Any:
        if is_projection(value) or (is_pointwise(value) and recording.witness is not None):
            return _Stub(value, path, recording, dtype, device)
        if isinstance(value, nn.ModuleList | nn.Sequential):
            return _Chain(wrap(child, f"{path}.{name}") for name, child in value._modules.items() if child is not None)
        is_coarse = any(recording.exactly(t, dtype) is not t for t in (*value.parameters(), *value.buffers()))
        if is_coarse or any(is_projection(child) or has_hooks(child) for child in value.modules()):
            return _view(value, f"{path}.", recording, None, {})
        return value

    members: dict[str, Any] = {"__getattr__": getattribute, **(family.members if family else {})}
    if family is not None and "config" in module.__dict__:
        shows_name = family.shows_name
        members["config"] = property(lambda self: config_view(self.__dict__["config"], shows_name))
    view: Any = object.__new__(type(base.__name__, (base,), members))
    attributes = {k: v for k, v in module.__dict__.items() if k not in ("forward", "_hf_hook", "_old_forward", "_surgery")}
    attributes.update({hooks: {} for hooks in HOOKS})
    # Some forwards set a buffer again, or keep a table in a dictionary: here that must not reach the module.
    attributes.update({name: dict(value) for name, value in attributes.items() if type(value) is dict})
    view.__dict__.update(attributes, _surgery=_State(recording))
    return view


def exact_type(module: nn.Module) -> torch.dtype:
    """What a run on numbers computes in, where two numbers count as equal or not: the module's own type may round too much."""
    return torch.promote_types(type_of(module)[0], torch.float32)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called around a module's forward."""
    return "_hf_hook" in module.__dict__ or any(module.__dict__.get(hooks) for hooks in HOOKS)
