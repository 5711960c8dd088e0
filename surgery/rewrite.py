"""The FX pass: a family's own eager attention function, traced and given intervention points.

The function is the specification. It is traced symbolically as it stands, so that soft-capping, sinks, position biases and
upcasting come along unread; then the softmax and the two matrix products are found, the points of `surgery.sites` are
inserted between them, and code is generated. Reading key and value by the grouped-query head map replaces the family's own
repetition of kv heads. `print(reconstruction.code)` shows the result.

What is constant in the trace: integers and attributes of the module. What stays an input: tensors (of the call and of the
module), floats, and `training`. Which arguments are None decides the branches, so there is one trace for each combination.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.errors import UnsupportedArchitectureError, describe
from surgery.sites import CORE_SITES

GROUPS = "num_key_value_groups"
"""The attribute that transformers' attention functions read the group size from (the interface's convention)."""

_NORMS = ("softmax", "_softmax")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "__matmul__", "einsum")


@dataclass(frozen=True)
class Reconstruction:
    """An eager attention function rewritten with intervention points.

    call(at, module, arguments): `at(site, tensor) -> tensor` is called at every point, in the order of the sites.
    Returns what the family's function returns: output (batch, query, head, d_head) and attention weights.
    """

    graph_module: fx.GraphModule
    inputs: tuple[str, ...]

    @property
    def code(self) -> str:
        """The generated Python source, with its intervention points."""
        return self.graph_module.code.replace("surgery_rewrite_point", "point")

    def __call__(self, at: Callable[[str, Tensor], Tensor], module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        values = [at if n == "at" else arguments[n] if n in arguments else read(module, n) for n in self.inputs]
        return self.graph_module(*values)


def point(at: Callable[[str, Tensor], Tensor], site: str, tensor: Tensor) -> Tensor:
    """An intervention point in the generated code: hands the tensor to whoever runs the graph."""
    return at(site, tensor)


class Rewriter:
    """The reconstructions of one module's eager attention function, one for each way in which it is called.

    The function is `eager(module, query, key, value, attention_mask, **kwargs)`. Traces are shared by all modules that
    would trace alike; the module's tensors are inputs of the trace.
    """

    def __init__(self, eager: Callable[..., Any], module: nn.Module) -> None:
        self.eager, self.module = eager, module
        self.names, self.takes_any, self.floats = _parameters(eager)
        self._known: dict[tuple[Any, ...], Reconstruction] = {}

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
        kinds = [_kind(value) for value in arguments.values()]
        key = (group_size, *arguments, *kinds)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _shared(self.eager, self.module, arguments, key, group_size)
        return found


_TRACES: dict[Any, list[tuple[dict[str, Any], Reconstruction]]] = {}


def _shared(
    eager: Callable[..., Any], module: nn.Module, arguments: Mapping[str, Any], key: tuple[Any, ...], group_size: int
) -> Reconstruction:
    traces = _TRACES.setdefault((eager, key), [])
    for reads, found in traces:
        if all(_reads_alike(module, path, value) for path, value in reads.items()):
            return found
    found, reads = _trace(eager, module, arguments, group_size)
    traces.append((reads, found))
    return found


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


def _kind(value: Any) -> Any:
    """What a trace depends on in an argument: None-ness and Python constants; tensors and floats stay inputs."""
    if value is None or isinstance(value, bool | int | str):
        return value
    return "input" if isinstance(value, Tensor | float) else type(value)


def read(module: nn.Module, path: str) -> Any:
    """The tensor or flag of the module that a graph input names: `module_training`, `module_sinks`."""
    value: Any = module
    for part in path.removeprefix("module_").split("__dot__"):
        value = getattr(value, part)
    return value


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
            inner = _StandIn(value, f"{path}__dot__", self._inputs, self._reads)
            return functools.partial(type(value).forward, inner)
        if isinstance(value, types.MethodType) and value.__self__ is self._module:
            self._reads.setdefault(path, value.__func__)
            return types.MethodType(value.__func__, self)
        if not callable(value):
            self._reads.setdefault(path, value)
        return value


def _trace(
    function: Callable[..., Any], module: nn.Module, arguments: Mapping[str, Any], group_size: int
) -> tuple[Reconstruction, dict[str, Any]]:
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
    traced = {n: add_input(n) if _kind(v) == "input" else v for n, v in arguments.items()}
    query, key, value = list(traced)[:3]
    for name, site in ((query, "rot_q"), (key, "rot_k"), (value, "v")):
        source: Any = traced[name]
        if name != query and group_size > 1:
            source = torch.repeat_interleave(source, group_size, 1)
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
    graph.eliminate_dead_code()
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users and n.target != "at"]:
        graph.erase_node(node)
    graph.lint()
    graph_module = fx.GraphModule(nn.Module(), graph, class_name="Reconstruction")
    inputs = tuple(str(n.target) for n in graph.nodes if n.op == "placeholder")
    missing = set(CORE_SITES) - {n.args[1] for n in graph.nodes if n.target is point}
    if missing:
        raise _unsupported(function, f"no live place for the points {sorted(missing)}")
    return Reconstruction(graph_module, inputs), reads


def _point(graph: fx.Graph, at: fx.Node, site: str, node: fx.Node) -> fx.Node:
    """Appends a point on `node` where the graph is being built; later uses take the point."""
    new = graph.create_node("call_function", point, (at, site, node), name=site)
    return new


def _insert_points(function: Callable[..., Any], graph: fx.Graph, at: fx.Node) -> None:
    """Finds softmax(scores) and pattern @ v, and puts the points scores, pattern and z there."""
    named = {
        n: str(n.target).rpartition(".")[2] if n.op == "call_method" else getattr(n.target, "__name__", "") for n in graph.nodes
    }
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
    drops = [i for i, node in enumerate(after) if named[node] in ("dropout", "dropout_")]
    pattern = after[drops[0] - 1] if drops else after[-2]
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if dim not in (-1, 3):
        raise _unsupported(function, f"a softmax over axis {dim}, not over the keys")
    for site, node in (("scores", scores), ("pattern", pattern), ("z", pv)):
        with graph.inserting_after(node):
            new = graph.create_node("call_function", point, (at, site, node), name=site)
        for user in [u for u in node.users if u is not new]:
            user.replace_input_with(node, new)


def _path(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes from start to end along first uses, both included; [] if end does not depend on start."""
    if start is end:
        return [end]
    for user in start.users:
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
