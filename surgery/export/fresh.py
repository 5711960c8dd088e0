"""A written folder, loaded by plain transformers in a process of its own, against the patched model in this one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.errors import ExportError, describe
from surgery.evaluation import evaluating
from surgery.export.inputs import output_of, without_padding
from surgery.export.load import implementation_of
from surgery.export.types import narrowest

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
save_file({"output": tensor.contiguous().cpu()}, work + "/output.safetensors")
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
    with tempfile.TemporaryDirectory() as work:
        tensors = {name: value.contiguous().cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
        save_file(tensors, Path(work) / "inputs.safetensors")
        options = {
            "class": _loader(model),
            "implementation": implementation_of(names),
            "device": str(model.device) if model.device.type != "meta" else "cpu",
            "inputs": {name: value for name, value in inputs.items() if not isinstance(value, Tensor)},
            "surgery": with_surgery,
            "load": _options(model, Path(work), variant),
        }
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder), work, json.dumps(options)], capture_output=True, text=True, check=False
        )
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or ["no message"]
            do = "Please report this with the message above."
            raise ExportError(describe("the written folder", f"that it does not load ({last[0]})", "a loadable model", do))
        tensor = load_file(Path(work) / "output.safetensors")["output"]
    by = "this package" if with_surgery else "plain transformers"
    return measured(without_padding(tensor, inputs), without_padding(expected, inputs), by, narrowest(model))


def _loader(model: Any) -> str:
    """The class of transformers that loads a model: its own, or the auto class for which its own code has it."""
    name, targets = type(model).__name__, getattr(model.config, "auto_map", None) or {}
    return next((auto for auto, target in targets.items() if str(target).endswith(f".{name}")), name)


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
    comparison = difference(found, expected, by)
    allowed = TOLERANCE.get(dtype, ROUGH)
    if not torch.equal(found.isnan(), expected.isnan()) or comparison.relative > allowed:
        raise ExportError(describe(what, str(comparison), f"at most {allowed:g} of the largest entry", do))
    return comparison
