"""Reading what was exported: a patched model from its folder, or the surgery alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import ExportError, describe
from surgery.export import document
from surgery.export.fit import Fingerprint
from surgery.export.types import restore
from surgery.patch import anatomy_of, patch_model
from surgery.pretrained import class_of
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
    options.setdefault("attn_implementation", implementation_of(found.implementation))
    model = cls.from_pretrained(path, use_safetensors=True, **options)
    inner = model[0] if isinstance(model, tuple) else model  # with output_loading_info
    found.model.require(Fingerprint.of(inner, anatomy_of(inner, strict=False)), "the loaded model")
    if found.types and not {"dtype", "torch_dtype", "quantization_config"} & set(options):
        restore(inner, found.types, path, options.get("variant"))
    patch_model(inner, spec, kernel=found.kernel, strict=False)
    return model


def implementation_of(names: Mapping[str, str]) -> Any:
    """As from_pretrained takes it: one name, or one for each part of the config; None for none."""
    return next(iter(names.values())) if len(set(names.values())) == 1 else (dict(names) or None)


def _class_of(path: Path, options: dict[str, Any]) -> Any:
    """The class that the config names: of transformers, or, if that is allowed, of the folder's own code."""
    what = f"the config of {str(path)!r}"
    try:
        found, config = class_of(path, bool(options.get("trust_remote_code")))
    except (OSError, ValueError) as error:
        do = (
            "Pass trust_remote_code=True if you trust the code in the folder."
            if "remote_code" in str(error)
            else "Export again."
        )
        raise ExportError(describe(what, str(error).splitlines()[0], "a config of a known architecture", do)) from None
    if found is None:
        do = "Pass model_class=, a class with from_pretrained."
        names = getattr(config, "architectures", None)
        raise ExportError(describe(what, f"the model classes {names!r}", "a model class of transformers", do))
    return found
