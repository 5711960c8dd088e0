"""nnsight (0.8 or newer): traces of transformers' modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.comparison.places import channels, places, score, sorted_out
from benchmarks.comparison.task import Task
from benchmarks.comparison.way import Way, frozen


class Nnsight(Way):
    name, key = "nnsight", "nnsight"
    package: ClassVar[str | None] = "nnsight"
    whole_layers = 1

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.traced = self._wrap(self.model)
        self.where = places(task.settings)
        self.cuts: list[tuple[str, list[int], list[int], bool]] = []

    def _wrap(self, model: Any) -> Any:
        from nnsight import NNsight

        return NNsight(model)

    @cached_property
    def eager(self) -> Any:
        """Of a fused kernel there is no pattern."""
        return self._wrap(self.task.twin("eager"))

    @contextmanager
    def cut(self, site: str, layers: Sequence[int], heads: Sequence[int], ste: bool = False) -> Iterator[None]:
        first = self.where.q[1] if site == "q" else 0
        self.cuts.append((site, list(layers), channels(heads, self.task.settings.d_head, first), ste))
        try:
            yield
        finally:
            self.cuts.pop()

    def _intervene(self) -> None:
        """The cuts, written into a trace."""
        for site, layers, index, ste in self.cuts:
            attentions = self.where.attentions(self.traced)
            for layer in layers:
                if site == "q":
                    getattr(attentions[layer], self.where.q[0]).output[..., index] = 0
                    continue
                module = getattr(attentions[layer], self.where.o)
                if ste:
                    z = module.input
                    cut = z.index_fill(-1, torch.tensor(index, device=z.device), 0)
                    module.input = z + (cut - z).detach()
                else:
                    module.input[..., index] = 0

    def logits(self, ids: Tensor, past: Any = None) -> Tensor:
        with self.traced.trace(ids, **{models.CACHE: past}, use_cache=past is not None):
            self._intervene()
            found = self.traced.lm_head.output.save()
        return found

    def cache(self, ids: Tensor) -> Any:
        with self.traced.trace(ids, use_cache=True):
            self._intervene()
            found = self.traced.output.save()
        return found[models.CACHE]

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        mask, options = torch.ones_like(ids), models.greedy(steps)
        with self.traced.trace(ids, fn=self.model.generate, attention_mask=mask, **options) as tracer:
            for _ in tracer.iter[:steps]:
                self._intervene()
            found = tracer.result.save()
        return found

    def patterns(self, heads: Sequence[int] | None) -> list[Tensor]:
        import nnsight

        with self.eager.trace(self.task.ids, use_cache=False):
            index = slice(None) if heads is None else list(heads)
            found = nnsight.save([attention.output[1][:, index] for attention in self.where.attentions(self.eager)])
        return found

    def everything(self) -> Any:
        import nnsight

        with self.eager.trace(self.task.ids, use_cache=False):
            found = []
            for attention in self.where.attentions(self.eager):
                kept = {name: getattr(attention, getattr(self.where, name)[0]).output for name in "qkv"}
                kept["z"] = getattr(attention, self.where.o).input
                kept["pattern"] = attention.output[1]
                found.append(kept)
            found = nnsight.save(found)
        return found

    def read_everything(self, found: Any) -> list[Tensor]:
        return sorted_out(found, self.task.settings)

    def importance(self) -> Tensor:
        import nnsight

        gradients: list[Tensor] = []
        with torch.enable_grad(), self.traced.trace(self.task.ids, use_cache=False):
            z = [getattr(attention, self.where.o).input for attention in self.where.attentions(self.traced)]
            with self.task.difference(self.traced.lm_head.output).backward():
                for one in reversed(z):
                    gradients.insert(0, one.grad)
            z = nnsight.save(z)
            gradients = nnsight.save(gradients)
        return torch.stack([score(*pair, self.task.settings) for pair in zip(z, gradients, strict=True)])

    def for_importance(self) -> AbstractContextManager[Any]:
        return frozen(self.model)

    def install(self, model: Any) -> None:
        self._wrap(model)
