"""pyvene (0.1.8 or newer): interventions at a head's query or attention value output, of an IntervenableModel made before.

Work without cuts has no intervention, and runs the plain model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from benchmarks import models
from benchmarks.comparison.task import Task
from benchmarks.comparison.way import NotOffered, Way

COMPONENTS = {"z": "head_attention_value_output", "q": "head_query_output"}


class Pyvene(Way):
    name, key = "pyvene", "pyvene"
    package: ClassVar[str | None] = "pyvene"
    remark: ClassVar[str | None] = "work without cuts runs the plain model"

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
        more = {} if past is None else {models.CACHE: past, "use_cache": True}
        return self._intervened({"input_ids": ids, **more}).logits

    def cache(self, ids: Tensor) -> Any:
        if self.present is None:
            return super().cache(ids)
        return self._intervened({"input_ids": ids, "use_cache": True})[models.CACHE]

    def _intervened(self, inputs: dict[str, Any]) -> Any:
        """The model's output, under the cuts."""
        assert self.present is not None
        model, heads = self.present
        units = {"base": [[heads] * len(inputs["input_ids"])] * len(model.interventions)}
        return model(inputs, unit_locations=units)[1]

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
