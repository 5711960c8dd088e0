"""One tiny run of an attention module in which tensors carry channel numbers: where q, k, v come from, where z goes.

Every projection is replaced by a stub whose output is labelled with the projection and its channel numbers. Views, splits,
permutations and joins act on the labels as on the values; elementwise arithmetic (positions, norms, scaling) hands on the
labels of its first labelled operand. What arrives at the core then says, for each head, which channels of which projection
it is made of; what arrives at the output projection, which of its columns read z of which head. No weight is looked at, so
this works for quantised, adapted, offloaded and meta modules alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.family import IMPLEMENTATION, Family, input_width, is_projection, projection_width
from surgery.labels import BASE, Labelled

QUERIES, SOURCE = 3, 5
"""Lengths of the recorded sequence and of the cross-attended one: small, and different from one another."""


@dataclass
class Recording:
    """What one run showed. Labels: (head, d) as arrived, for one batch row and the last position.

    projections: names of the projections met, in the order of their owner numbers. core: mask and keywords of the core call.
    output: the projection that read z, and which entry of z (head * d_value + d) each of its inputs is.
    """

    family: Family
    projections: list[str] = field(default_factory=list)
    core: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    output: tuple[str, Tensor] | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    calls: int = 0

    def owner(self, label: int) -> str:
        return self.projections[label // BASE]

    def ends_in(self, projection: str) -> bool:
        """Whether the forward's output is that projection's, by views and elementwise arithmetic, as far as one can tell."""
        owners = self.labels["output"].div(BASE, rounding_mode="floor")
        return not owners.numel() or bool((owners == self.projections.index(projection)).any())


_Z = 1 << 20  # the owner number of z's labels: channel = head * d_head + d


class _State:
    """Stands where a patched module has its surgery state; the core call ends here."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    computes_as = "eager"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, implementation: str | None = None, **kwargs: Any
    ) -> Any:
        record = self.recording
        record.calls += 1
        record.core = {"mask": attention_mask, "kwargs": kwargs}
        for name, tensor in (("q", query), ("k", key), ("v", value)):
            record.shapes[name] = tuple(tensor.shape)
            if isinstance(tensor, Labelled):
                record.labels[name] = tensor.labels[0, :, -1].clone()
        batch, heads, queries, _ = query.shape
        width = value.shape[-1]
        labels = (torch.arange(heads * width).view(heads, width) + _Z * BASE).expand(batch, queries, heads, width)
        plain = value.as_subclass(Tensor)
        return Labelled.make(plain.new_ones(batch, queries, heads, width), labels.contiguous()), None

    def config(self, config: Any) -> Any:
        return config_view(config)


class _Stub:
    """A projection in the recorded run."""

    def __init__(self, module: nn.Module, name: str, recording: Recording, dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.name, self.recording, self.dtype, self.device = module, name, recording, dtype, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        record = self.recording
        if isinstance(x, Labelled) and bool((x.labels >= _Z * BASE).any()):
            record.output = (self.name, (x.labels.reshape(-1, x.shape[-1])[-1] - _Z * BASE).clone())
        elif isinstance(x, Labelled) and bool((x.labels >= 0).any()):
            record.inputs[self.name] = record.owner(int(x.labels.max()))
        if self.name not in record.projections:
            record.projections.append(self.name)
        owner = record.projections.index(self.name)
        width = projection_width(self.module)
        assert width is not None
        shape = (*x.shape[:-1], width)
        value = torch.ones(shape, dtype=self.dtype, device=self.device)
        return Labelled.make(value, (torch.arange(width) + owner * BASE).expand(shape).contiguous())


class _Chain(list[Any]):
    """A list of modules in the recorded run; called, they run one after another."""

    def __call__(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x


def config_view(config: Any) -> Any:
    """A config that shares everything with the given one, live, but names our attention implementation."""
    view: Any = object.__new__(_config_class(type(config)))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


_CONFIG_CLASSES: dict[type, type] = {}


def _config_class(cls: type) -> type:
    if cls not in _CONFIG_CLASSES:
        implementation = property(lambda self: IMPLEMENTATION)
        _CONFIG_CLASSES[cls] = type(
            cls.__name__, (cls,), {"_attn_implementation": implementation, "__module__": cls.__module__}
        )
    return _CONFIG_CLASSES[cls]


def record(module: nn.Module, family: Family, is_cross: bool) -> Recording:
    """Runs a module's forward once on stubs. Whatever the forward raises comes through."""
    failure: Exception | None = None
    for angles in _angles(module):
        recording = Recording(family)
        try:
            output = _run(module, "", recording, family, _arguments(module, family, is_cross, angles))
            break
        except Exception as error:  # of whatever kind a foreign forward raises for angles that it does not take
            failure = failure or error
    else:
        assert failure is not None
        raise failure
    assert recording.calls, "the forward did not reach the core"
    recording.shapes["output"] = tuple(_first(output).shape)
    recording.labels["output"] = _labels_of(output)
    return recording


def record_parent(parent: nn.Module, child: str, recording: Recording) -> Recording:
    """Continues in the parent of an attention that returns z itself: finds the output projection beside it."""
    found = Recording(recording.family)
    labels = recording.labels["output"]
    dtype, device = _type_of(parent)

    def attention(*args: Any, **kwargs: Any) -> Any:
        return Labelled.make(torch.ones(labels.shape, dtype=dtype, device=device), labels), None

    found.labels["output"] = _labels_of(_run(parent, "", found, None, _arguments(parent, None, False), {child: attention}))
    return found


def _labels_of(output: Any) -> Tensor:
    output = _first(output)
    return output.labels if isinstance(output, Labelled) else torch.empty(0)


def _run(
    module: nn.Module, prefix: str, recording: Recording, family: Family | None, arguments: Mapping[str, Any], given: Any = None
) -> Any:
    view = _view(module, prefix, recording, family, given or {})
    _, device = _type_of(module)
    devices = [] if device.type in ("cpu", "meta") else [device]
    # A module in training draws its dropout; the user's random numbers must not move on.
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        return type(view).forward(view, **arguments)


def _view(module: nn.Module, prefix: str, recording: Recording, family: Family | None, given: Mapping[str, Any]) -> Any:
    """An object like the module, on a copy of its attributes, whose projections are stubs and which fires no user hooks."""
    base = type(module)
    if hasattr(base, "_surgery_base"):
        base = base._surgery_base
    dtype, device = _type_of(module)

    def getattribute(self: Any, name: str) -> Any:
        if name in given:
            return given[name]
        value = nn.Module.__getattr__(self, name)
        if isinstance(value, nn.Module):
            return wrap(value, f"{prefix}{name}")
        return value

    def wrap(value: nn.Module, path: str) -> Any:
        if is_projection(value):
            return _Stub(value, path, recording, dtype, device)
        if isinstance(value, nn.ModuleList | nn.Sequential):
            return _Chain(wrap(child, f"{path}.{name}") for name, child in value._modules.items() if child is not None)
        if any(is_projection(child) or _has_hooks(child) for child in value.modules()):
            return _view(value, f"{path}.", recording, None, {})
        return value

    members: dict[str, Any] = {"__getattr__": getattribute, **(family.members if family else {})}
    if family is not None and "config" in module.__dict__:
        members["config"] = property(lambda self: config_view(self.__dict__["config"]))
    view: Any = object.__new__(type(base.__name__, (base,), members))
    attributes = {k: v for k, v in module.__dict__.items() if k not in ("forward", "_hf_hook", "_old_forward", "_surgery")}
    attributes.update({hooks: {} for hooks in HOOKS})
    # Some forwards move a buffer to the inputs' device and set it again: here that must not reach the module.
    attributes["_buffers"] = dict(module._buffers)
    view.__dict__.update(attributes, _surgery=_State(recording))
    return view


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has_hooks(module: nn.Module) -> bool:
    return "_hf_hook" in module.__dict__ or any(module.__dict__.get(hooks) for hooks in HOOKS)


def _type_of(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameters = list(module.parameters())
    # 8-bit floats are storage of quantised weights, not a type that is computed in.
    dtype = next((p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1), torch.float32)
    # A module with any part on meta (offloaded, or not yet loaded) is recorded on meta: values are not needed.
    devices = sorted((p.device for p in parameters), key=lambda device: device.type != "meta")
    return dtype, devices[0] if devices else torch.device("cpu")


_NONE = ("attention_mask", "mask", "past_key_values", "past_key_value", "layer_past", "cache", "head_mask", "position_bias")
_SOURCES = ("key_value_states", "encoder_hidden_states")


def _angles(module: nn.Module) -> Iterator[Any]:
    """Positional angles in the forms that families take: cosines and sines, or complex numbers, of some width.

    The width is not known here: 1 broadcasts over whatever part of d_head is rotated; a family that takes half of them needs
    its own, which is among the module's numbers. Wrong widths and forms fail in the first product, so nothing is guessed.
    """
    dtype, device = _type_of(module)
    for width in (1, 2):
        yield (torch.ones(1, QUERIES, width, dtype=dtype, device=device),) * 2
    yield torch.ones(1, QUERIES, 1, dtype=torch.complex64, device=device)
    for width in sorted({v for v in vars(module).values() if type(v) is int and 2 < v <= 1024}):
        yield (torch.ones(1, QUERIES, width, dtype=dtype, device=device),) * 2


def _arguments(module: nn.Module, family: Family | None, is_cross: bool, angles: Any = None) -> dict[str, Any]:
    """Arguments for a forward, by the names that transformers gives them."""
    dtype, device = _type_of(module)
    width = next((w for m in module.modules() if is_projection(m) and (w := input_width(m))), 1)
    states = torch.ones(1, QUERIES, width, dtype=dtype, device=device)
    source = torch.ones(1, SOURCE, width, dtype=dtype, device=device)
    known: dict[str, Any] = {
        "position_embeddings": next(_angles(module)) if angles is None else angles,
        "position_ids": torch.arange(QUERIES, device=device)[None],
        "cache_position": torch.arange(QUERIES, device=device),
        "residual": states,
        "input_tensor": states,
        **dict.fromkeys(_NONE),
        **dict.fromkeys(_SOURCES, source if is_cross else None),
        **(family.example(module) if family and family.example else {}),
    }
    base = getattr(type(module), "_surgery_base", type(module))
    forward = (family.members.get("forward") if family else None) or base.forward
    arguments: dict[str, Any] = {}
    for number, (name, parameter) in enumerate(list(inspect.signature(forward).parameters.items())[1:]):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if number == 0:
            arguments[name] = states
        elif name in known:
            arguments[name] = known[name]
        elif parameter.default is parameter.empty:
            arguments[name] = None
    return arguments


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output
