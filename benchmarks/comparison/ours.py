"""This library."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.task import Task
from benchmarks.comparison.way import NotOffered, Place, Way, log_probability
from surgery import Edit, Freeze, Spec, capture, patch_model, patched, unpatch_model
from surgery.analysis import head_importance, metrics
from surgery.analysis.sweep import Sweep

SITES = ("q", "k", "v", "pattern", "z")


class Auto(Way):
    name, key, kernel = "attention-surgery", "surgery", "auto"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        patch_model(self.model, kernel=self.kernel)

    def cut(self, site: str, layers: Sequence[int], heads: Sequence[int], ste: bool = False) -> AbstractContextManager[Any]:
        cut = Edit(site, "zero", layers=list(layers), heads=list(heads), backward="ste" if ste else "stopgrad")
        return patched(self.model, cut, kernel=self.kernel)

    def patterns(self, heads: Sequence[int] | None) -> list[Tensor]:
        with capture(self.model, "pattern", heads="all" if heads is None else list(heads), kernel=self.kernel) as run:
            self.logits(self.task.ids)
        return [run[layer, "pattern"] for layer in self.task.layers]

    def everything(self) -> Any:
        with capture(self.model, list(SITES), kernel=self.kernel) as run:
            self.logits(self.task.ids)
        return run

    def read_everything(self, found: Any) -> list[Tensor]:
        return [found[layer, site] for layer in self.task.layers for site in SITES]

    def sweep(self, places: Sequence[Place]) -> Tensor:
        found: dict[int, Tensor] = {}
        specs = [Spec(Freeze("ov", [layer], [head])) for layer, head in places]
        work = Sweep(self.model, {"input_ids": self.task.ids}, (-1,))
        work.run(specs, lambda number, output: found.update({number: log_probability(output.logits, self.task)}))
        return torch.stack([found[number] for number in range(len(specs))])

    def importance(self) -> Tensor:
        metric = metrics.logit_difference(self.task.wanted, self.task.other)
        scores = head_importance(self.model, self.task.ids, None, metric, circuits="ov", to="zero")
        return torch.tensor(scores.frame.score.to_numpy()).view(len(self.task.layers), -1)

    def install(self, model: Any) -> None:
        patch_model(model, Edit("z", "zero", heads=self.task.two), kernel=self.kernel)
        unpatch_model(model)


class Reconstructed(Auto):
    """The same with every attention reconstructed, over an eager model."""

    name, key, kernel, implementation = 'attention-surgery, kernel="eager"', "surgery-eager", "eager", "eager"
    whole_layers = 1

    def sweep(self, places: Sequence[Place]) -> Tensor:
        raise NotOffered("not measured: as with kernel='auto'")
