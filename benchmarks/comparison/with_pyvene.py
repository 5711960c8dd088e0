"""pyvene (0.1.8 or newer): interventions at a head's query or attention value output, of an IntervenableModel made before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from benchmarks.comparison.task import Task
from benchmarks.comparison.way import NotOffered, Way

COMPONENTS = {"z": "head_attention_value_output", "q": "head_query_output"}


class Pyvene(Way):
    name, key = "pyvene", "pyvene"
    package: ClassVar[str | None] = "pyvene"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.present: tuple[Any, list[int]] | None = None

    @contextmanager
    def cut(self, site: str, layers: Sequence[int], heads: Sequence[int], ste: bool = False) -> Iterator[None]:
        if ste:
            raise NotOffered("its zeros pass no gradient")
        self.present = (self._intervenable(site, tuple(layers)), list(heads))
        try:
            yield
        finally:
            self.present = None

    @cache  # noqa: B019 - lives as long as the process
    def _intervenable(self, site: str, layers: tuple[int, ...]) -> Any:
        return self._make(self.model, site, layers)

    def _make(self, model: Any, site: str, layers: Sequence[int]) -> Any:
        import pyvene

        places = [
            {"layer": layer, "component": COMPONENTS[site], "unit": "h", "intervention_type": pyvene.ZeroIntervention}
            for layer in layers
        ]
        found = pyvene.IntervenableModel(places, model=model)
        found.enable_model_gradients()  # which making it has switched off
        model.eval()  # which that has ended
        return found

    def logits(self, ids: Tensor, past: Any = None) -> Tensor:
        if self.present is None:
            return super().logits(ids, past)
        if past is not None:
            raise NotOffered("takes no cache")
        model, heads = self.present
        units = {"base": [[heads] * len(ids)] * len(model.interventions)}
        return model({"input_ids": ids}, unit_locations=units)[1].logits

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        if self.present is None:
            return super().generate(ids, steps)
        raise NotOffered("cuts heads in the prompt, or in what follows")

    def patterns(self, heads: Sequence[int] | None) -> list[Tensor]:
        raise NotOffered("its place for patterns is a module that transformers 5 does not call")

    def everything(self) -> Any:
        raise NotOffered("its place for patterns is a module that transformers 5 does not call")

    def importance(self) -> Tensor:
        raise NotOffered("what it collects is a copy, which no gradient comes to")

    def install(self, model: Any) -> None:
        self._make(model, "z", self.task.layers)
