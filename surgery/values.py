"""Values: immutable, checked when made (all problems at once, in our words), equal by content, plain data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, dataclass_transform
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from surgery.errors import SpecError, closest, describe, listing
from surgery.reference import Reference, is_same

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


@dataclass_transform(frozen_default=True)
class _Positional(ModelMetaclass):
    """Fields are positional arguments, as in a dataclass; pydantic tells type checkers that they are keywords only."""


class Value(BaseModel, metaclass=_Positional):
    """Immutable, positional construction, equality by content, our errors in place of pydantic's, all of them at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, *args: Any, **data: Any) -> None:
        names = list(type(self).model_fields)
        if len(args) > len(names) or any(name in data for name in names[: len(args)]):
            raise TypeError(f"{type(self).__name__}() takes {', '.join(names)}; an argument was given twice or is too many")
        data = {**dict(zip(names, args, strict=False)), **data}
        disagreements = [p.strip() for p in self._agree(data)]
        problems = []
        try:
            super().__init__(**data)
        except ValidationError as error:
            problems = [self._problem(e) for e in error.errors()]
        if problems or disagreements:
            raise SpecError(listing(type(self).__name__, [*problems, *disagreements]))

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        # What help, notebooks and editors show.
        fields = {name: Parameter.empty if info.is_required() else info.default for name, info in cls.model_fields.items()}
        kind = Parameter.POSITIONAL_OR_KEYWORD
        cls.__signature__ = Signature([Parameter(name, kind, default=default) for name, default in fields.items()])

    def __setattr__(self, name: str, value: Any) -> None:
        what = f"{type(self).__name__}.{name}"
        raise SpecError(describe(what, "an assignment", "a cut that stays as it was made", "Make another one."))

    @classmethod
    def _agree(cls, data: dict[str, Any]) -> Iterator[str]:
        """What in the fields does not fit together. Puts values and references into their normal form."""
        raise NotImplementedError

    @classmethod
    def _problem(cls, error: Any) -> str:
        """One error of pydantic's in our words."""
        where = ".".join(str(part) for part in error["loc"])
        if error["type"] == "value_error":
            return str(error["msg"]).removeprefix("Value error, ").strip()
        if error["type"] == "missing":
            return describe(where, "nothing", "a value", f"Pass {where}=...")
        if error["type"] == "extra_forbidden":
            do = closest(where, cls.model_fields) or "Remove it."
            return describe(where, repr(error["input"]), "one of " + ", ".join(cls.model_fields), do.strip())
        return describe(where, repr(error["input"]), error["msg"], "Change it.")

    def content(self, name: str = "cut", strict: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The cut as plain data, defaults left out, and its tensors, which the data names `name`.field.

        strict: raise SpecError for a callable, which is no data.
        """
        tensors: dict[str, Tensor] = {}
        data: dict[str, Any] = {"kind": type(self).__name__.lower()}
        for field, info in type(self).model_fields.items():
            value = getattr(self, field)
            if isinstance(value, Tensor | Reference) or callable(value) or value != info.default:
                data[field] = _to_plain(value, f"{name}.{field}", tensors, strict)
        return data, tensors

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value):
            return NotImplemented
        (mine, tensors), (theirs, others) = self.content(), other.content()
        return mine == theirs and all(is_same(tensors[name], others[name]) for name in tensors)

    def __hash__(self) -> int:
        return hash(json.dumps(self.content()[0], sort_keys=True))

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        shown = self.content()[0]
        return ((name, getattr(self, name)) for name in type(self).model_fields if name in shown)


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
            found = f"the callable {callable_name(value)}"
            raise SpecError(
                describe("Spec", found, "cuts that are data", "Use it in this process only, or express it as another Edit.")
            )
        return {"callable": f"{callable_name(value)} {_serial(value)}"}
    return list(value) if isinstance(value, tuple) else value


_SERIALS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_COUNTER = itertools.count()


def _serial(value: Callable[..., Any]) -> int:
    """A number for a callable: its own in this process, never given again to another one (as its id would be)."""
    try:
        return _SERIALS.setdefault(value, next(_COUNTER))
    except TypeError:  # unhashable, or without weak references
        return id(value)


def callable_name(value: Callable[..., Any]) -> str:
    """The name of a function, or of what else is callable."""
    return getattr(value, "__qualname__", type(value).__name__)
