"""An eager attention function rewritten with intervention points: its code, and running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn


def point(at: Callable[[str, Tensor], Tensor], site: str, tensor: Tensor) -> Tensor:
    """An intervention point in the generated code: hands the tensor to whoever runs the graph."""
    return at(site, tensor)


def repeat_heads(tensor: Tensor, groups: int) -> Tensor:
    """Each kv head once for every query head that reads it: (batch, kv_head * groups, position, d_head).

    As families do it: a single head is not copied, and products of copies differ in their last bits.
    """
    return tensor.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def read(module: nn.Module, path: str) -> Any:
    """What a graph input names of the module, a tensor, a flag or a dropout: `module_sinks`, `module_training`."""
    value: Any = module
    for part in path.removeprefix("module_").split("__dot__"):
        value = getattr(value, part)
    return value


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """An eager attention function rewritten with intervention points; `print(reconstruction.code)` shows it.

    call(at, module, arguments): `at(site, tensor) -> tensor` is called at every point, in the order of the sites.
    Returns what the family's function returns: output (batch, query, head, d_head) and attention weights.
    """

    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    sites: tuple[str, ...]
    _parts: dict[str, Reconstruction] = field(default_factory=dict)

    @classmethod
    def make(cls, graph: fx.Graph) -> Reconstruction:
        """Generates the code of a graph, without what its output does not need."""
        graph.eliminate_dead_code()
        for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users and n.target != "at"]:
            graph.erase_node(node)
        graph.lint()
        inputs = tuple(str(n.target) for n in graph.nodes if n.op == "placeholder")
        sites = tuple(str(n.args[1]) for n in graph.nodes if n.target is point)
        return cls(fx.GraphModule(nn.Module(), graph, class_name="Reconstruction"), inputs, sites)

    def until(self, site: str) -> Reconstruction:
        """The same as far as a site, whose tensor it returns; what comes after is not computed."""
        if site not in self._parts:
            graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
            graph.graph_copy(self.graph_module.graph, copied)
            [last] = [new for old, new in copied.items() if old.target is point and old.args[1] == site]
            graph.output(last)
            self._parts[site] = Reconstruction.make(graph)
        return self._parts[site]

    @property
    def code(self) -> str:
        """The generated Python source, with its intervention points."""
        return self.graph_module.code.replace("surgery_reconstruction_", "")

    def __call__(self, at: Callable[[str, Tensor], Tensor], module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        values = [at if n == "at" else arguments[n] if n in arguments else read(module, n) for n in self.inputs]
        return self.graph_module(*values)
