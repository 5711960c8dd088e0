"""A patched model as a program, by torch.export or ONNX: written, loaded again and compared, on other sizes too."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from surgery.errors import ExportError, SurgeryError, describe
from surgery.evaluation import accelerators, evaluating, keeping_random, keeping_state
from surgery.export.folder import written_file
from surgery.export.forward import Forward, dimensions, main_output
from surgery.export.fresh import Comparison, measured
from surgery.export.inputs import example_inputs as inputs_for
from surgery.export.inputs import without_padding
from surgery.export.onnx_file import write_onnx
from surgery.export.save import surgery_of
from surgery.export.sizes import Sizes, other_inputs, sizes_of
from surgery.export.types import narrowest

Format = Literal["pt2", "onnx"]
FORMATS: dict[str, str] = {"pt2": "torch.export", "onnx": "onnxruntime"}
"""A format, which is also its files' suffix, and what loads and runs it."""

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A program that was loaded again, on tensors by name."""


@dataclass(frozen=True)
class Program:
    """What `export_program` wrote.

    sizes: the program's inputs, where a letter stands for a size that may vary. comparison: with the patched model, on the
    example; others: on inputs of other sizes, by what their sizes are.
    """

    path: Path
    sizes: Sizes
    comparison: Comparison
    others: dict[str, Comparison]

    def __str__(self) -> str:
        lines = [f"exported to {self.path}", f"  takes {self.sizes}", f"  {self.comparison}"]
        return "\n".join([*lines, *(f"  at {sizes}: {comparison}" for sizes, comparison in self.others.items())])

    __repr__ = __str__


def export_program(
    model: Any,
    path: str | Path,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    format: Format | None = None,
) -> Program:
    """Writes a patched model's forward, with its cuts, as one file that runs without this package and without transformers.

    path: a name ending in .pt2 (torch.export) or .onnx (transformers' own exporter; needs the extra "onnx"), or any with
      `format`. An earlier file there is replaced once the new one is complete and compared.
    example_inputs: as the model's forward takes them, by default random tokens. Tensors become the program's inputs, of the
      same names; plain values (output_hidden_states=True) are fixed in it. Caches are not taken, and none is given.
    dynamic_shapes: sizes that may vary, as torch.export takes them: {"input_ids": {1: torch.export.Dim("length", max=512)}},
      inputs that are not named being fixed; None fixes every size; True lets vary what can.
    The program is loaded again and compared with the model, in evaluation mode, on the example and on inputs of other sizes.
    It gives a dictionary: `torch.export.load("model.pt2").module()(input_ids=ids)["logits"]`.

    A .pt2 that this writes has no pickle in it: its tensors are raw bytes, and the example is left out. torch.export.load would
    unpickle what others have put into such a file, so load none that you do not trust.
    Sizes are tried near the example's: give a range (max=) that the model has positions for.
    Returns what was written; print it. Raises PatchError for a model that is not patched; ExportError, with nothing written,
    for one that cannot be exported and for a program that computes something else.
    """
    path, kind = Path(path), _format(Path(path), format)
    spec, _ = surgery_of(model)
    forward = Forward(model, inputs_for(model, example_inputs, spec))
    wanted = dimensions(forward.tensors, dynamic_shapes)
    devices = accelerators(next(iter(forward.tensors.values())).device)
    with ExitStack() as around:
        # Exporters set attributes of modules, and a trace leaves tensors without numbers where a forward keeps some.
        for block in (keeping_random(devices), keeping_state(forward), evaluating(forward), torch.no_grad()):
            around.enter_context(block)
        # The model runs first: a mistake in the inputs is its own error.
        expected = forward(**forward.tensors)
        file = around.enter_context(written_file(path))
        write = write_onnx if kind == "onnx" else _write_pt2
        sizes, run = _exported(lambda: write(forward, file, wanted))
        if wanted is not None and not sizes.symbols:
            do = "Leave dynamic_shapes out, or name a size that the model does not take for a constant."
            raise ExportError(describe("dynamic_shapes", f"that all sizes are fixed: {sizes}", "one that may vary", do))
        dtype = narrowest(forward)
        comparison = _compared(run, forward.tensors, expected, kind, dtype)
        others = {}
        for inputs in other_inputs(forward.tensors, sizes):
            text = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
            others[text] = _compared(run, inputs, _elsewhere(forward, inputs, text), kind, dtype, text)
    return Program(path, sizes, comparison, others)


def _format(path: Path, given: str | None) -> str:
    found = given or path.suffix.removeprefix(".")
    if found not in FORMATS:
        do = "Rename it, or pass format='pt2' or format='onnx'."
        raise ExportError(describe("export_program", f"format={given!r} for {path.name!r}", "a .pt2 or .onnx file", do))
    return found


def _exported(write: Callable[[], tuple[Sizes, Run]]) -> tuple[Sizes, Run]:
    try:
        return write()
    except SurgeryError:
        raise
    except Exception as error:  # of whatever kind an exporter raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        found = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        do = "See the error above. A size that the model takes for a constant cannot vary; nor can code depend on the data."
        raise ExportError(describe("export_program", found, "a model that can be exported", do)) from error


def _write_pt2(forward: Forward, file: Path, wanted: dict[str, Any] | None) -> tuple[Sizes, Run]:
    program = torch.export.export(forward, (), dict(forward.tensors), dynamic_shapes=wanted, strict=False)
    program.example_inputs = None  # would be pickled
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines and paths of this machine's files
    _compact(program.constants)
    with warnings.catch_warnings(), file.open("wb") as stream:  # by name, torch takes .pt2 alone
        # Weights that are no plain block of memory are written with the whole that they are in, and read with their strides.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(program, stream)
    require_no_pickle(file)
    with file.open("rb") as stream:
        loaded = torch.export.load(stream)
    module = loaded.module()
    return sizes_of(loaded, forward.tensors), lambda inputs: module(**inputs)


def _compact(constants: dict[str, Any]) -> None:
    """Gives parts of larger tensors, such as one head of a captured run, memory of their own: torch would write the whole."""
    for name, tensor in constants.items():
        if isinstance(tensor, Tensor):
            constants[name] = tensor.clone(memory_format=torch.contiguous_format)


def require_no_pickle(file: Path) -> None:
    """Raises ExportError if an archive of torch.export holds a pickled object: tensors of a class of their own, or examples."""
    found = []
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("_config.json"):
                payloads = json.loads(archive.read(entry))["config"]
                found += [name for name, payload in payloads.items() if payload["use_pickle"]]
            elif "/sample_inputs/" in entry.filename and entry.file_size:
                found.append(entry.filename)
    if found:
        do = "Export a model without them: not quantised, with plain tensors in its cuts."
        raise ExportError(describe("the archive", f"pickles, of {', '.join(found)}", "tensors as plain bytes only", do))


def _elsewhere(forward: Forward, inputs: Mapping[str, Tensor], text: str) -> dict[str, Tensor]:
    """The model on inputs of other sizes."""
    try:
        return forward(**inputs)
    except Exception as error:  # of whatever kind a model raises
        found = f"{text}, where the model itself raises {type(error).__name__}: {error}"
        do = "Bound the sizes, by Dim('length', min=..., max=...), or fix them."
        raise ExportError(describe("dynamic_shapes", found, "sizes that the model takes", do)) from error


def _compared(
    run: Run, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, dtype: torch.dtype, at: str = ""
) -> Comparison:
    """Of the main output. Raises ExportError if any is another than the model's."""
    program = f"the written program{at and f' at {at}'}"
    by, do = FORMATS[kind], "Please report this; the other format may do."
    try:
        found = run(inputs)
    except Exception as error:  # of whatever kind the program raises
        raise ExportError(describe(program, f"{type(error).__name__}: {error}", "a program that runs", do)) from error
    rows = {}
    for name, tensor in expected.items():
        shape = tuple(found[name].shape) if name in found else None
        if shape != tuple(tensor.shape):
            raise ExportError(describe(f"{name} of {program}", f"shape {shape}", f"shape {tuple(tensor.shape)}", do))
        if tensor.numel():
            pair = [without_padding(output, inputs) for output in (found[name], tensor)]
            rows[name] = measured(pair[0], pair[1], by, dtype, f"{name} of {program}", do)
    return rows[main_output(expected)]
