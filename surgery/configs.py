"""The config that a patched module sees: the model's own, live, but that the attention function it names is ours."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedConfig

from surgery.family import IMPLEMENTATION
from surgery.threads import made_once


class Shown(str):
    """An implementation's name that is looked up as ours, and is itself for whoever compares it or looks into it.

    Some forwards branch on the name (masks of their own for "eager" and "sdpa", packed sequences for flash): they must take
    the branch that the unpatched module takes.
    """

    def __eq__(self, other: object) -> bool:
        return other == IMPLEMENTATION or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(IMPLEMENTATION)

    def removeprefix(self, prefix: str, /) -> Shown:
        return self


@functools.cache
def _shown(name: str) -> Shown:
    return Shown(name)


def config_view(config: Any, shows_name: bool = False) -> Any:
    """A config that shares everything with the given one, live, but names our attention implementation.

    shows_name: under the name of the config's own, for forwards that read it.
    """
    cls: Any = type(config)
    view: Any = object.__new__(_config_class(cls, shows_name))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


def config_parts(config: Any) -> dict[str, PreTrainedConfig]:
    """A config ("") and, by name, those of its parts; empty if it is none of transformers'."""
    if not isinstance(config, PreTrainedConfig):
        return {}
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    return {"": config, **{name: part for name, part in parts.items() if isinstance(part, PreTrainedConfig)}}


@made_once
def _config_class(cls: Any, shows_name: bool) -> type:
    def shown(self: Any) -> Any:
        name = cls._attn_implementation.fget(self)
        return IMPLEMENTATION if name is None else _shown(name)

    implementation = property(shown if shows_name else lambda self: IMPLEMENTATION)
    return type(cls.__name__, (cls,), {"_attn_implementation": implementation, "__module__": cls.__module__})
