"""A tiny model with its inputs, run so that nothing but what is tested can differ between two runs."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from surgery import inspect_model, patch_model, unpatch_model
from surgery.anatomy import Anatomy, Attention
from surgery.errors import NotFiredWarning
from surgery.patch import anatomy_of, session_of
from zoo.build import build, make_inputs
from zoo.compare import Named, flatten

OURS = tuple(str(Path(__file__).parents[2] / folder) for folder in ("surgery", "patches"))


@contextmanager
def silenced(ours: list[str]) -> Iterator[None]:
    """Keeps the warnings of other libraries from the tests; what surgery warns of is collected."""
    logging.set_verbosity_error()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    for warning in seen:
        text = str(warning.message)
        is_ours = issubclass(warning.category, NotFiredWarning) or text.startswith(("patch_model", "patched model"))
        if is_ours or warning.filename.startswith(OURS):
            ours.append(text)


def seed() -> None:
    """Some forwards draw: noise of diffusion, masks in training, sampled points."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Case:
    """One built model with its inputs, and what it gave before it was ever patched."""

    def __init__(self, model_type: str, implementation: str = "eager") -> None:
        self.model_type, self.implementation = model_type, implementation
        self.model: Any = build(model_type, implementation)
        self.inputs = make_inputs(self.model, model_type)
        self.before = self.run()
        self.classes = {name: type(module) for name, module in self.model.named_modules()}

    def run(self, **more: Any) -> Named:
        with torch.no_grad():
            return flatten(self.forward(**more))

    def forward(self, **more: Any) -> Any:
        """A forward on copies of the inputs, from the same random state."""
        seed()
        return self.model(**copy.deepcopy(self.inputs), **more)

    def patch(self, spec: Any = None, kernel: Any = "auto") -> None:
        patch_model(self.model, spec, kernel=kernel, strict=False)

    def unpatch(self) -> None:
        unpatch_model(self.model)

    @contextmanager
    def patched(self, spec: Any = None, kernel: Any = "auto") -> Iterator[None]:
        """Within a block of its own kind the model stays patched, which is quick; at the end of the outermost it is not."""
        is_outer = session_of(self.model) is None
        try:
            self.patch(spec, kernel)
            yield
        finally:
            if is_outer:
                self.unpatch()
            else:
                self.patch()

    def anatomy(self) -> Anatomy:
        return anatomy_of(self.model, strict=False)

    @functools.cached_property
    def ran(self) -> set[str]:
        """The addresses of the attentions that a forward runs."""
        with self.patched():
            self.run()
            return {address for row in inspect_model(self.model) if row.runs for address in row.address.split(", ")}

    def fused(self) -> list[str]:
        """The classes that run a fused kernel with these settings."""
        with self.patched():
            return sorted({row.attention for row in inspect_model(self.model) if row.kernel not in ("eager", "its own code")})

    def running(self, anatomy: Anatomy) -> list[Attention]:
        """The attentions that run with the inputs of the case."""
        return [a for a in anatomy if self.ran.intersection(a.addresses)]

    def module(self, attention: Attention) -> nn.Module:
        return self.model.get_submodule(attention.path)
