"""A forward as an ONNX file, by transformers' own exporter, under onnxruntime."""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.errors import ExportError, describe
from surgery.export.forward import Forward
from surgery.export.sizes import Sizes

LARGEST = 2**31 - 2**24
"""Bytes of weights that one file can hold beside its graph: protobuf ends at 2 GiB."""


def write_onnx(
    forward: Forward, file: Path, wanted: dict[str, Any] | None
) -> tuple[Sizes, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """Writes the file and loads it again: the sizes of its inputs, and what runs it. Raises ExportError if it cannot."""
    _needed("onnxscript")
    onnx_ir, onnxruntime = _needed("onnx_ir"), _needed("onnxruntime")
    size = sum(tensor.nbytes for tensor in itertools.chain(forward.parameters(), forward.buffers()))
    if size > LARGEST:
        do = "Use a .pt2 file, or half precision."
        raise ExportError(describe("the ONNX file", f"{size:,} bytes of weights", f"at most {LARGEST:,} in one file", do))
    with _quiet():
        exporters = _needed("transformers.exporters")
        config = exporters.OnnxConfig(dynamic_shapes=wanted)
        exported = exporters.OnnxExporter().export(forward, dict(forward.tensors), config)
    # An ExportedModel of one part; older versions give torch's ONNXProgram.
    program = exported.program if hasattr(exported, "program") else exported.model
    onnx_ir.save(program, str(file))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of constants that the exporter left unused
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    shapes = {entry.name: tuple(entry.shape) for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(outputs, {name: inputs[name].cpu().numpy() for name in shapes})
        return {name: torch.from_numpy(array) for name, array in zip(outputs, found, strict=True)}

    return Sizes(shapes, {}), run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and transformers say to their own developers; what the file computes is compared afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers.exporters", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # torch.onnx prints its steps
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)  # torch copying its own trees
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # in models that the exporter imports
        # numpy's, of entries behind a where, as the logarithm of distance 0 is, in constants that are computed beforehand.
        warnings.filterwarnings("ignore", "divide by zero encountered in log|invalid value encountered in cast", RuntimeWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)  # packages that are not there, versions not tried, constants not folded
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _needed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        do = 'pip install "attention-surgery[onnx]"'
        raise ExportError(describe("the ONNX file", str(error), "onnx, onnxscript and onnxruntime", do)) from None
