"""Reading what was exported: a patched model from its folder, or the surgery alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from surgery.errors import ExportError, SurgeryError, describe
from surgery.export import document
from surgery.export.fit import Fingerprint
from surgery.export.types import restore
from surgery.patch import anatomy_of, patch_model
from surgery.pretrained import class_of, first_line, require_weights
from surgery.spec import Spec


def load_spec(path: str | Path, model: nn.Module | None = None) -> Spec:
    """The spec in an exported folder, to be given to `patch_model`.

    model: what it is to be applied to. Raises SpecError, listing every difference, if that has another architecture, other
    head counts or other shapes than the model that was exported; ExportError for damaged files.
    """
    found, spec = document.read(path)
    if model is not None:
        found.model.require(Fingerprint.of(model, anatomy_of(model)), "the model")
    return spec


def load_checkpoint(path: str | Path, *, model_class: Any = None, **options: Any) -> Any:
    """The patched model of a folder that `export_checkpoint` wrote: the logits, bit for bit, of what was exported.

    With options that change numbers or kernels: of the model that from_pretrained gives with them, under the same cuts.

    model_class: a class with from_pretrained; by default the one of transformers that the config names.
    options: of from_pretrained, such as dtype, device_map, quantization_config; the attention implementation is that of the
      exported model unless attn_implementation is given.
    Nothing is unpickled, and no code of the folder runs: a model whose code lies in its folder is loaded only with
    trust_remote_code=True, as by transformers.
    Raises ExportError for files that are missing, damaged or changed, SpecError if the surgery does not fit the weights.
    """
    path = Path(path)
    found, spec = document.read(path)
    cls = model_class or _class_of(path, options)
    if "attn_implementation" not in options:
        options["attn_implementation"] = _own_kernels(path, found.implementation)
    with_notes = bool(options.pop("output_loading_info", False))
    model, notes = _loaded(cls, path, options)
    found.model.require(Fingerprint.of(model, anatomy_of(model, strict=False)), "the loaded model")
    if found.types and not {"dtype", "torch_dtype", "quantization_config"} & set(options):
        restore(model, found.types, path, options.get("variant"))
    patch_model(model, spec, kernel=found.kernel, strict=False)
    return (model, notes) if with_notes else model


def _loaded(cls: Any, path: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model with all of its weights. Raises ExportError where the folder lacks some, or has damaged ones."""
    what = f"the weights in {str(path)!r}"
    try:
        model, notes = cls.from_pretrained(path, **{**options, "use_safetensors": True, "output_loading_info": True})
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: of other shapes
        do = "Export the model again, or copy the folder as a whole."
        raise ExportError(describe(what, first_line(error), "the safetensors files of the export", do)) from error
    try:
        require_weights(str(path), model, notes)
    except SurgeryError as error:
        raise ExportError(str(error)) from None
    return model, notes


def _own_kernels(path: Path, names: Mapping[str, str]) -> Any:
    """As from_pretrained takes it. Raises ExportError for a kernel of the hub, whose code would be fetched and run."""
    if foreign := sorted(name for name in names.values() if "/" in name):
        do = f"Pass attn_implementation={foreign[0]!r} if you trust that code, or another."
        what = f"the attention implementation in {str(path)!r}"
        raise ExportError(describe(what, f"code on the hub ({', '.join(foreign)})", "one of transformers' own", do))
    return implementation_of(names)


def implementation_of(names: Mapping[str, str]) -> Any:
    """As from_pretrained takes it: one name, or one for each part of the config; None for none."""
    return next(iter(names.values())) if len(set(names.values())) == 1 else (dict(names) or None)


def _class_of(path: Path, options: dict[str, Any]) -> Any:
    """The class that the config names: of transformers, or, if that is allowed, of the folder's own code."""
    what = f"the config of {str(path)!r}"
    try:
        found, config = class_of(path, bool(options.get("trust_remote_code")))
    except Exception as error:  # of whatever kind reading a damaged config raises
        do = (
            "Pass trust_remote_code=True if you trust the code in the folder."
            if "remote_code" in str(error)
            else "Export again."
        )
        raise ExportError(describe(what, first_line(error), "a config of a known architecture", do)) from None
    if found is None:
        do = "Pass model_class=, a class with from_pretrained."
        names = getattr(config, "architectures", None)
        raise ExportError(describe(what, f"the model classes {names!r}", "a model class of transformers", do))
    return found
