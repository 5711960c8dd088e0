"""Plain torch hooks on transformers' modules, as one writes them by hand for one family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.places import channels, places, score, sorted_out
from benchmarks.comparison.way import Way


class Hooked(Way):
    """Cuts under the model's fused kernel; for patterns, which it never has, a twin that runs eager attention."""

    name, key = "plain torch hooks", "hooks"
    whole_layers = 1

    @cached_property
    def eager(self) -> Any:
        return self.task.twin("eager")

    def cut(self, site: str, layers: Sequence[int], heads: Sequence[int], ste: bool = False) -> AbstractContextManager[Any]:
        return self._hooks(self.model, site, layers, heads, ste)

    @contextmanager
    def _hooks(self, model: Any, site: str, layers: Sequence[int], heads: Sequence[int], ste: bool = False) -> Iterator[None]:
        where, s = places(self.task.settings), self.task.settings
        path, first = where.q if site == "q" else (where.o, 0)
        index = torch.tensor(channels(heads, s.d_head, first), device=s.device)

        def zeroed(tensor: Tensor) -> Tensor:
            cut = tensor.index_fill(-1, index, 0)
            return tensor + (cut - tensor).detach() if ste else cut

        def before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (zeroed(args[0]), *args[1:])

        def after(module: Any, args: Any, output: Tensor) -> Tensor:
            return zeroed(output)

        attentions = where.attentions(model)
        modules = [getattr(attentions[layer], path) for layer in layers]
        hooks: list[Any] = [
            module.register_forward_hook(after) if site == "q" else module.register_forward_pre_hook(before)
            for module in modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def patterns(self, heads: Sequence[int] | None) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            found.append(output[1] if heads is None else output[1][:, list(heads)])

        attentions = places(self.task.settings).attentions(self.eager)
        hooks = [attention.register_forward_hook(keep) for attention in attentions]
        self.eager(self.task.ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    def everything(self) -> Any:
        where = places(self.task.settings)
        found: list[dict[str, Tensor]] = [{} for _ in self.task.layers]

        def keep(layer: int, name: str, read: Callable[[Any, Any], Tensor]) -> Callable[..., None]:
            return lambda module, args, output: found[layer].update({name: read(args, output)})

        hooks = []
        for layer, attention in enumerate(where.attentions(self.eager)):
            modules = {name: getattr(attention, getattr(where, name)[0]) for name in "qkv"}
            for name, module in modules.items():
                hooks.append(module.register_forward_hook(keep(layer, name, lambda args, output: output)))
            output = getattr(attention, where.o)
            hooks.append(output.register_forward_hook(keep(layer, "z", lambda args, output: args[0])))
            hooks.append(attention.register_forward_hook(keep(layer, "pattern", lambda args, output: output[1])))
        self.eager(self.task.ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    def read_everything(self, found: Any) -> list[Tensor]:
        return sorted_out(found, self.task.settings)

    def importance(self) -> Tensor:
        s, where = self.task.settings, places(self.task.settings)
        found: list[Tensor] = []

        def keep(module: Any, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])

        modules = [getattr(attention, where.o) for attention in where.attentions(self.model)]
        hooks = [module.register_forward_pre_hook(keep) for module in modules]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.task.difference(self.logits(self.task.ids)), found)
        for hook in hooks:
            hook.remove()
        return torch.stack([score(z, gradient, s) for z, gradient in zip(found, gradients, strict=True)])

    def install(self, model: Any) -> None:
        with self._hooks(model, "z", self.task.layers, self.task.two):
            pass
