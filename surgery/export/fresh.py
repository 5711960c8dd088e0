"""A written folder, loaded by plain transformers in a process of its own, against the patched model in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.errors import ExportError, describe
from surgery.evaluation import evaluating
from surgery.export.inputs import output_of, without_padding
from surgery.export.load import implementation_of
from surgery.export.types import narrowest
from surgery.patch import patched
from surgery.reference import stored

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference, as a part of the largest entry: folded weights are rounded once, sums are taken in another order."""
ROUGH = 5e-2
"""The same in half precision, where a folded weight is rounded to 8 or 11 bits."""

SCRIPT = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file

folder, work, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if options["surgery"]:
    from surgery.export.load import load_checkpoint
    model = load_checkpoint(folder, **options["load"])
else:
    cls = getattr(transformers, options["class"], transformers.AutoModel)
    model = cls.from_pretrained(folder, attn_implementation=options["implementation"], **options["load"])
    assert "surgery" not in sys.modules and "patches" not in sys.modules
model = model.eval()
if "device_map" not in options["load"]:
    model = model.to(options["device"])
inputs = {**{n: t.to(options["device"]) for n, t in load_file(work + "/inputs.safetensors").items()}, **options["inputs"]}
with torch.no_grad():
    output = model(**inputs)
tensor = output.logits if "logits" in output else output[0]
floats = [*model.named_parameters(), *model.named_buffers()]
types = {name: str(t.dtype) for name, t in floats if t.is_floating_point()}
save_file({"output": tensor.contiguous().cpu()}, work + "/output.safetensors", {"types": json.dumps(types)})
"""


@dataclass(frozen=True)
class Comparison:
    """difference: the largest, between the folder's output and the patched model's; relative: as a part of the largest entry.

    changed, positions: predicted tokens (largest logits) that differ, of how many. by: who loaded the folder.
    """

    difference: float
    relative: float
    changed: int
    positions: int
    by: str

    def __str__(self) -> str:
        tokens = f"{self.changed} of {self.positions} predicted tokens differ"
        return f"loaded by {self.by}: largest difference {self.difference:.3g} ({self.relative:.1e} of the largest); {tokens}"


def compare(
    model: Any,
    folder: Path,
    inputs: Mapping[str, Any],
    with_surgery: bool,
    names: Mapping[str, str],
    variant: str | None = None,
) -> Comparison:
    """Raises ExportError if the folder does not load, or does not compute what the patched model does."""
    with evaluating(model):
        expected = output_of(model, inputs)
        with patched(model, strict=False):
            uncut = output_of(model, inputs)
    with tempfile.TemporaryDirectory() as work:
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        save_file(stored(tensors), Path(work) / "inputs.safetensors")
        options = {
            "class": _loader(model),
            "implementation": implementation_of(names),
            "device": str(model.device) if model.device.type != "meta" else "cpu",
            "inputs": {name: value for name, value in inputs.items() if not isinstance(value, Tensor)},
            "surgery": with_surgery,
            "load": _options(model, Path(work), variant),
        }
        # Modules come from where this process has them, and never from the folder in which it happens to stand (-P).
        command = [sys.executable, "-P", "-c", SCRIPT, str(folder), work, json.dumps(options)]
        places = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=places)
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or ["no message"]
            do = "Please report this with the message above."
            raise ExportError(describe("the written folder", f"that it does not load ({last[0]})", "a loadable model", do))
        with safe_open(Path(work) / "output.safetensors", framework="pt") as file:
            tensor, types = file.get_tensor("output"), json.loads(file.metadata()["types"])
    if not with_surgery:
        _require_types(model, types)
    by = "this package" if with_surgery else "plain transformers"
    rows = [without_padding(output, inputs) for output in (tensor, expected, uncut)]
    comparison = measured(rows[0], rows[1], by, narrowest(model))
    _require_effect(comparison, difference(rows[2], rows[1], by), narrowest(model))
    return comparison


def _require_types(model: nn.Module, types: Mapping[str, str]) -> None:
    """Raises ExportError for tensors that plain transformers loads in another type than they have in the model."""
    own = {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}
    wrong = [f"{n} ({own[n]}, loaded as {dtype})" for n, dtype in types.items() if n in own and str(own[n]) != dtype]
    if wrong:
        do = "Load the model with dtype= in place of casting it, and bake that; or use bake=False, which keeps types."
        found = f"{len(wrong)} tensors of other types: {', '.join(wrong[:3])}"
        raise ExportError(describe("the baked folder", found, "the types that plain transformers gives", do))


def _require_effect(comparison: Comparison, effect: Comparison, dtype: torch.dtype) -> None:
    """Raises ExportError for a folder that is as far from the patched model as the uncut model is, rounding apart."""
    least = TOLERANCE.get(dtype, 1e-2)
    if comparison.relative > max(least, effect.relative / 2):
        found = f"{comparison}; the model without its cuts differs by {effect.difference:.3g}"
        do = "Please report this; bake the model in float32 meanwhile."
        raise ExportError(describe("the written folder", found, "less than half of what the cuts change", do))


def _loader(model: Any) -> str:
    """The class of transformers that loads a model: its own, or the auto class for which its own code has it."""
    name, targets = type(model).__name__, getattr(model.config, "auto_map", None) or {}
    bases = [base.__name__ for base in type(model).__mro__ if getattr(transformers, base.__name__, None) is base]
    found = [auto for auto, target in targets.items() if str(target).endswith(f".{name}")]
    return next(iter([*found, *bases]), name)


def _options(model: Any, work: Path, variant: str | None) -> dict[str, Any]:
    """Of from_pretrained: a model that is in part on a disk here is there as well."""
    found: dict[str, Any] = {"variant": variant} if variant else {}
    if type(model).__module__.startswith("transformers_modules."):
        found["trust_remote_code"] = True  # the code is that of the model which runs in this process already
    places = getattr(model, "hf_device_map", None) or {}
    if "disk" in places.values():
        found |= {"device_map": {name: str(place) for name, place in places.items()}, "offload_folder": str(work / "offload")}
    return found


def difference(found: Tensor, expected: Tensor, by: str) -> Comparison:
    """Compares rows of outputs, NaN (of queries that attend to nothing) with zero."""
    gap = float((found.double() - expected.double()).abs().nan_to_num().max())
    relative = gap / max(float(expected.double().abs().nan_to_num().max()), 1e-30)
    changed = int((found.argmax(-1) != expected.argmax(-1)).sum())
    return Comparison(gap, relative, changed, len(expected), by)


def measured(
    found: Tensor,
    expected: Tensor,
    by: str,
    dtype: torch.dtype,
    what: str = "the written folder",
    do: str = "Please report this; export with bake=False meanwhile.",
) -> Comparison:
    """Compares rows of outputs. Raises ExportError if they differ by more than rounding in a type."""
    if found.shape != expected.shape:
        raise ExportError(describe(what, f"an output of shape {tuple(found.shape)}", f"{tuple(expected.shape)}", do))
    comparison = difference(found, expected, by)
    allowed = TOLERANCE.get(dtype, ROUGH)
    if not torch.equal(found.isnan(), expected.isnan()) or comparison.relative > allowed:
        raise ExportError(describe(what, str(comparison), f"at most {allowed:g} of the largest entry", do))
    return comparison
