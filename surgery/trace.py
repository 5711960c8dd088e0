"""Tracing a family's eager attention function: its graph, with the intervention points inserted.

The softmax and the two matrix products are found, and the points of `surgery.sites` put between them. Constant in a trace:
integers and attributes of the module. Its inputs: tensors (of the call and of the module), floats, `training`, and modules
for dropout. Which arguments are None decides the branches.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from surgery.errors import UnsupportedArchitectureError, describe
from surgery.reconstruction import Reconstruction, point, repeat_heads
from surgery.sites import CORE_SITES

GROUPS = "num_key_value_groups"
"""The attribute that transformers' attention functions read the group size from (the interface's convention)."""

_NORMS = ("softmax", "_softmax")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "__matmul__", "einsum")
_DROPS = ("dropout", "dropout_")


def kind(value: Any) -> Any:
    """What a trace depends on in an argument: None-ness and Python constants; tensors and floats stay inputs."""
    if value is None or isinstance(value, bool | int | str):
        return value
    return "input" if isinstance(value, Tensor | float) else type(value)


class _StandIn:
    """What the eager function gets as `module` while it is traced: tensors and `training` become graph inputs."""

    def __init__(self, module: nn.Module, path: str, inputs: Callable[[str], fx.Proxy], reads: dict[str, Any]) -> None:
        self.__dict__.update(_module=module, _path=path, _inputs=inputs, _reads=reads)

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}{name}"
        if name == GROUPS and not self._path.removeprefix("module_"):
            return 1  # key and value are already read by query head
        value = getattr(self._module, name)
        if name == "training" or isinstance(value, Tensor):
            if isinstance(value, Tensor):
                self._reads[path] = Tensor
            return self._inputs(path)
        if isinstance(value, nn.Module):
            self._reads.setdefault(path, type(value))
            if isinstance(value, nn.Dropout):
                return self._inputs(path)  # called as it is, with the user's hooks on it
            inner = _StandIn(value, f"{path}__dot__", self._inputs, self._reads)
            return functools.partial(type(value).forward, inner)
        if isinstance(value, types.MethodType) and value.__self__ is self._module:
            self._reads.setdefault(path, value.__func__)
            return types.MethodType(value.__func__, self)
        if not callable(value):
            self._reads.setdefault(path, value)
        return value


def trace(
    function: Callable[..., Any], module: nn.Module, arguments: Mapping[str, Any], group_size: int
) -> tuple[Reconstruction, dict[str, Any]]:
    """The reconstruction of an eager function for such arguments, and what it read of the module: by path, the value.

    Raises UnsupportedArchitectureError if the function has not one softmax between two matrix products.
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    last: list[fx.Node] = []

    def add_input(name: str) -> fx.Proxy:
        for node in graph.nodes:
            if node.op == "placeholder" and node.target == name:
                return fx.Proxy(node, tracer)
        # Placeholders stay together at the start, also those that the trace discovers on its way.
        with graph.inserting_after(last[-1]) if last else contextlib.nullcontext():
            last.append(graph.placeholder(name))
        return fx.Proxy(last[-1], tracer)

    at = add_input("at")
    traced = {n: add_input(n) if kind(v) == "input" else v for n, v in arguments.items()}
    query, key, value = list(traced)[:3]
    for name, site in ((query, "rot_q"), (key, "rot_k"), (value, "v")):
        source: Any = traced[name]
        if name != query and group_size > 1:
            source = fx.Proxy(graph.create_node("call_function", repeat_heads, (source.node, group_size)), tracer)
        traced[name] = fx.Proxy(_point(graph, at.node, site, source.node), tracer)
    reads: dict[str, Any] = {}
    stand_in = _StandIn(module, "module_", add_input, reads)
    try:
        result: Any = function(stand_in, **traced)
    except Exception as error:
        raise _unsupported(function, f"a body that torch.fx cannot trace ({type(error).__name__}: {error})") from error
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], fx.Proxy):
        raise _unsupported(function, "a result that is not a pair of output and attention weights")
    output, weights = result
    graph.output((output.node, weights.node if isinstance(weights, fx.Proxy) else weights))
    _insert_points(function, graph, at.node)
    found = Reconstruction.make(graph)
    if missing := set(CORE_SITES) - set(found.sites):
        raise _unsupported(function, f"no live place for the points {sorted(missing)}")
    return found, reads


def _point(graph: fx.Graph, at: fx.Node, site: str, node: fx.Node) -> fx.Node:
    """Appends a point on `node` where the graph is being built; later uses take the point."""
    new = graph.create_node("call_function", point, (at, site, node), name=site)
    return new


def _insert_points(function: Callable[..., Any], graph: fx.Graph, at: fx.Node) -> None:
    """Finds softmax(scores) and pattern @ v, and puts the points scores, pattern and z there."""
    named = {node: _name(node) for node in graph.nodes}
    softmaxes = [n for n in graph.nodes if named[n] in _NORMS]
    products = [n for n in graph.nodes if named[n] in _PRODUCTS]
    if len(softmaxes) != 1 or len(products) != 2:
        raise _unsupported(function, f"{len(softmaxes)} softmax and {len(products)} matrix products")
    softmax, (qk, pv) = softmaxes[0], products
    before, after = _path(qk, softmax), _path(softmax, pv)
    if not before or not after:
        raise _unsupported(function, "a softmax that does not lie between the two matrix products")
    # A sink joins the scores as one more column: the scores are what is joined, not the joined tensor.
    joins = [i for i, node in enumerate(before) if named[node] in ("cat", "concat")]
    scores = before[joins[0] - 1] if joins else before[-2]
    drops = [i for i, node in enumerate(after) if named[node] in _DROPS]
    pattern = after[drops[0] - 1] if drops else after[-2]
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if dim not in (-1, 3):
        raise _unsupported(function, f"a softmax over axis {dim}, not over the keys")
    for site, node in (("scores", scores), ("pattern", pattern), ("z", pv)):
        with graph.inserting_after(node):
            new = graph.create_node("call_function", point, (at, site, node), name=site)
        for user in [u for u in node.users if u is not new]:
            user.replace_input_with(node, new)


def _name(node: fx.Node) -> str:
    """What a node calls: a function, a method, or a module that is an input."""
    if node.op != "call_method":
        return getattr(node.target, "__name__", "")
    name = str(node.target).rpartition(".")[2]
    return _DROPS[0] if name == "__call__" else name  # the only modules that are inputs


def _path(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes from start to end along first uses, both included; [] if end does not depend on start."""
    if start is end:
        return [end]
    for user in start.users:
        if user.target is getattr:
            continue  # a shape or a type, not the values
        rest = _path(user, end)
        if rest:
            return [start, *rest]
    return []


def _unsupported(function: Callable[..., Any], found: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        describe(
            f"reconstruct {function.__module__}.{function.__qualname__}",
            found,
            "one softmax between the products q k^T and pattern @ v, traceable by torch.fx",
            "Write a file in patches/ that gives this family's attention in that form.",
        )
    )
