"""Holding what the layers compute beside attention: every linear map there gives again what it gave in a recorded run.

So a change that one head makes reaches a later one along the residual stream alone. What is held are the modules that own a
matrix (linear maps, experts), not the norms around them, and not the projections of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.analysis.replay import Layers
from surgery.anatomy import Anatomy
from surgery.errors import SpecError, SurgeryError, describe


class Held:
    """The modules of a model's layers that own a matrix and belong to no attention, by path, and what they gave.

    Raises SpecError for a model whose layers are not known, or where a matrix is owned by what holds attention, too.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        names = {id(module): path for path, module in model.named_modules()}
        layers = Layers(model, anatomy).modules
        own = [path for attention in anatomy for path in attention.paths]
        own += [projection.path for attention in anatomy for projection in attention.projections.values()]
        parts = {names[id(part)]: part for layer in layers for part in layer.modules() if _owns_matrix(part)}
        self.modules = {path: part for path, part in parts.items() if not any(_is_within(path, o) for o in own)}
        around = [path for path in self.modules if any(_is_within(o, path) for o in own)]
        if not self.modules or around:
            found = f"a matrix that {', '.join(around)} owns beside attention" if around else "no linear maps in its layers"
            do = "Leave freeze_mlps out."
            raise SpecError(describe("freeze_mlps", found, "layers with linear maps in modules of their own", do))
        self.outputs: dict[str, Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what each module gives in the one forward of the block. Raises SpecError for one that is not called once."""

        def record(path: str, output: Any) -> None:
            if path in self.outputs:
                raise self._refuse(f"{path}, which one forward calls several times")
            self.outputs[path] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

        with self._hooks(record):
            yield
        if silent := [path for path in self.modules if path not in self.outputs]:
            raise self._refuse(f"{', '.join(silent)}, which the forward does not call")

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within the block the modules give what they gave, to each copy of the recorded batch."""
        with self._hooks(lambda path, output: tree_map(lambda old, new: _like(path, old, new), self.outputs[path], output)):
            yield

    @contextmanager
    def _hooks(self, call: Callable[[str, Any], Any]) -> Iterator[None]:
        handles = []
        try:
            for path, module in self.modules.items():
                handles.append(module.register_forward_hook(lambda m, args, output, path=path: call(path, output)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _refuse(self, found: str) -> SpecError:
        return SpecError(describe("freeze_mlps", found, "each linear map called once", "Leave freeze_mlps out."))


def _owns_matrix(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.dim() > 1 for tensor in own)


def _is_within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _like(path: str, old: Any, new: Any) -> Any:
    """What was recorded, as often as the batch now holds the recorded one; a copy, for layers may go on in it in place."""
    if not isinstance(old, Tensor) or not old.dim():
        return old
    copies, rest = divmod(len(new), max(len(old), 1))
    if rest or new.shape[1:] != old.shape[1:]:
        found, expected = f"an output of shape {tuple(new.shape)}", f"copies of {tuple(old.shape)}"
        raise SurgeryError(describe(f"freeze_mlps: {path}", found, expected, "Leave freeze_mlps out."))
    return old.repeat(copies, *[1] * (old.dim() - 1))
