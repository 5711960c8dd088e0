"""The admissible values of a cut's fields: validators that say what was found, what was expected and what to do, and the
JSON Schema of each as it is written in a file, for editors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_before_validator_function

from surgery.errors import closest, describe


@dataclass(frozen=True)
class Choice:
    """One word out of `allowed`; with `more` a callable as well."""

    name: str
    allowed: tuple[str, ...]
    more: str = ""

    def check(self, value: Any) -> Any:
        if not (isinstance(value, str) and value in self.allowed) and not (self.more and callable(value)):
            do = f"{closest(value, self.allowed)}Choose one of these."
            raise ValueError(describe(self.name, repr(value), ", ".join(map(repr, self.allowed)) + self.more, do))
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.allowed)}


def listed(value: Any) -> tuple[Any, ...]:
    """The entries of a sequence, array or tensor of integers; a single number or word is the only entry."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, int | str):
        return (value,)
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        return ()
    return tuple(item.tolist() if hasattr(item, "tolist") else item for item in value)


def _single(value: Any) -> Any:
    """The number in an array or tensor that holds a single one."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numbers(name: str, everything: str | None) -> BeforeValidator:
    """A validator of distinct numbers from 0, in ascending order; `everything` is the value that means all."""

    def check(value: Any) -> Any:
        if (value is None and everything is None) or (isinstance(value, str) and value == everything):
            return value
        items = listed(value)
        if not items or not all(map(_is_number, items)) or len(set(items)) < len(items):
            expected = f"{everything!r}, or at least one number from 0, each once"
            raise ValueError(describe(name, repr(value), expected, f"For example {name}=[0, 3]."))
        return tuple(sorted(items))

    return BeforeValidator(check)


def _check_layers(value: Any) -> Any:
    if isinstance(value, str) and value == "all":
        return value
    items = listed(value)
    if not items or not all(isinstance(item, str) or _is_number(item) for item in items):
        expected = "'all', or at least one layer number from 0 or address"
        raise ValueError(describe("layers", repr(value), expected, 'For example layers=[5, 6] or layers=["encoder.self.0"].'))
    return items


def _check_strength(value: Any) -> float:
    value = _single(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(describe("strength", repr(value), "a number from 0 to 1", "1 replaces entirely, 0 not at all."))
    return float(value)


def _check_seed(value: Any) -> int:
    value = _single(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(describe("seed", repr(value), "a whole number", "For example seed=0."))
    return value


_NUMBER = {"type": "integer", "minimum": 0}
_NUMBERS = {"type": "array", "items": _NUMBER, "minItems": 1, "uniqueItems": True}
_LAYER = {"anyOf": [_NUMBER, {"type": "string"}]}
_LAYERS = {"anyOf": [*_LAYER["anyOf"], {"type": "array", "items": _LAYER, "minItems": 1}]}

Layers = Annotated[Any, BeforeValidator(_check_layers), WithJsonSchema(_LAYERS)]
Heads = Annotated[Any, _numbers("heads", "all"), WithJsonSchema({"anyOf": [{"const": "all"}, _NUMBER, _NUMBERS]})]
Positions = Annotated[Any, _numbers("positions", None), WithJsonSchema({"anyOf": [{"type": "null"}, _NUMBER, _NUMBERS]})]
Strength = Annotated[float, BeforeValidator(_check_strength), WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]
Seed = Annotated[int, BeforeValidator(_check_seed), WithJsonSchema({"type": "integer"})]
Gqa = Annotated[str, Choice("gqa", ("isolated", "shared"))]
