"""A model's forward as a function of tensors, by name, that gives tensors, by name: what a program can hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import ExportError, closest, describe
from surgery.evaluation import uncached
from surgery.export.inputs import require_plain


class Forward(nn.Module):
    """Runs a model on tensors by name, beside plain inputs that are fixed, and without a cache unless one is asked for.

    Gives a flat dictionary of the tensors in the model's output, so that a program of it needs no class of transformers when it
    is loaded. A cache is no part of it. The model is a part of this module and is not touched.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        given = uncached(model, inputs)
        self.fixed = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        require_plain(inputs)
        if not self.tensors:
            raise ExportError(describe("example_inputs", f"{dict(inputs)!r}", "tensors by name", "Pass {'input_ids': ...}."))

        def forward(**tensors: Tensor) -> dict[str, Tensor]:
            return flat(self.model(**tensors, **self.fixed))

        # torch reads the names of the inputs off the signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in self.tensors])  # type: ignore[attr-defined]
        self.forward = forward


def flat(output: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of a model's output by name; those of a list have numbers behind it, as in hidden_states.0."""
    if isinstance(output, Tensor):
        return {name or "output": output}
    parts = enumerate(output) if isinstance(output, tuple | list) else output.items() if isinstance(output, Mapping) else ()
    return {n: tensor for key, part in parts for n, tensor in flat(part, f"{name}.{key}" if name else str(key)).items()}


def main_output(outputs: Mapping[str, Tensor]) -> str:
    """The name of the logits, or else of the first tensor."""
    return "logits" if "logits" in outputs else next(iter(outputs))


def dimensions(tensors: Mapping[str, Tensor], wanted: Any) -> dict[str, Any] | None:
    """What torch.export takes as dynamic_shapes, for every input, from what the user wants: None, True, or some of them.

    Raises ExportError for an input that is not there.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        return {name: dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO) for name, tensor in tensors.items()}
    if not isinstance(wanted, Mapping):
        do = "Pass a dictionary as of torch.export.export, or True for all sizes that can vary."
        raise ExportError(describe("dynamic_shapes", f"a {type(wanted).__name__}", "a dictionary by the inputs' names", do))
    for name in wanted:
        if name not in tensors:
            do = f"{closest(name, tensors)}Pass it in example_inputs too, as a tensor."
            raise ExportError(describe("dynamic_shapes", f"{name!r}", f"names of {sorted(tensors)}", do))
        axes = wanted[name] if isinstance(wanted[name], Mapping) else {}
        if beyond := [axis for axis in axes if not (isinstance(axis, int) and 0 <= axis < tensors[name].dim())]:
            expected = f"axes 0 to {tensors[name].dim() - 1}"
            raise ExportError(describe(f"dynamic_shapes of {name!r}", f"axes {beyond}", expected, "Count axes from 0."))
    return {name: wanted.get(name) for name in tensors}
