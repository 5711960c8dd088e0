"""The FX pass: a family's own eager attention function, traced and given intervention points.

The function is the specification. It is traced symbolically as it stands (`surgery.trace`), so that soft-capping, sinks,
position biases and upcasting come along unread. Reading key and value by the grouped-query head map replaces the family's
own repetition of kv heads. There is one trace for each combination of arguments that are None.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.reconstruction import Reconstruction, read
from surgery.trace import kind, trace


class Rewriter:
    """The reconstructions of one module's eager attention function, one for each way in which it is called.

    The function is `eager(module, query, key, value, attention_mask, **kwargs)`. Traces are shared by all modules that
    would trace alike; the module's tensors are inputs of the trace.
    """

    def __init__(self, eager: Callable[..., Any], module: nn.Module) -> None:
        self.eager, self.module = eager, module
        self.names, self.takes_any, self.floats = _parameters(eager)
        self._known: dict[tuple[Any, ...], Trace] = {}

    def bind(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a core call by parameter name; keywords that the function never reads are left out."""
        arguments = dict(zip(self.names[1:5], (query, key, value, mask), strict=True))
        for name, argument in kwargs.items():
            if self.takes_any or name in self.names:
                # A whole number for a float (a dropout of 0 in a config) would be a constant, and so make another trace.
                arguments[name] = float(argument) if type(argument) is int and name in self.floats else argument
        return arguments

    def graph(self, arguments: Mapping[str, Any], group_size: int) -> Reconstruction:
        """The reconstruction for such arguments. group_size: query heads per head of key and value, baked into the code.

        Raises UnsupportedArchitectureError if the function has not one softmax between two matrix products.
        """
        kinds = [kind(value) for value in arguments.values()]
        key = (group_size, *arguments, *kinds)
        found = self._known.get(key)
        if found is None or not _fits(self.module, found[0]):
            found = self._known[key] = _shared(self.eager, self.module, arguments, key, group_size)
        return found[1]


Trace = tuple[dict[str, Any], Reconstruction]
"""What a trace read of the module, by path, and the reconstruction that holds for modules with the same."""

_TRACES: dict[Any, list[Trace]] = {}


def _shared(
    eager: Callable[..., Any], module: nn.Module, arguments: Mapping[str, Any], key: tuple[Any, ...], group_size: int
) -> Trace:
    traces = _TRACES.setdefault((eager, key), [])
    for known in traces:
        if _fits(module, known[0]):
            return known
    found, reads = trace(eager, module, arguments, group_size)
    traces.append(new := (reads, found))
    return new


def _fits(module: nn.Module, reads: Mapping[str, Any]) -> bool:
    return all(_reads_alike(module, path, value) for path, value in reads.items())


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], bool, frozenset[str]]:
    """Parameter names, whether the body reads its **kwargs (most take them only to ignore them), and which are floats."""
    parameters = inspect.signature(function).parameters.values()
    floats = frozenset(p.name for p in parameters if isinstance(p.default, float))
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    # From Python 3.13 on, one instruction may load two names.
    loads = [i.argval for i in dis.get_instructions(function) if i.opname.startswith("LOAD_FAST")]
    used = any(rest in (names if isinstance(names, tuple) else (names,)) for names in loads)
    return names, rest is not None and used, floats


def _reads_alike(module: nn.Module, path: str, value: Any) -> bool:
    """Whether a module has, at a path that a trace read, what the traced module had."""
    try:
        mine = read(module, path)
    except AttributeError:
        return False
    if isinstance(mine, Tensor):
        return value is Tensor
    if isinstance(mine, types.MethodType):
        return mine.__func__ is value
    return type(mine) is value if isinstance(mine, nn.Module) else type(mine) is type(value) and mine == value
