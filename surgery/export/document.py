"""surgery.json and surgery.safetensors: a spec with what it was made for, checked to the last bit when it is read.

The JSON holds a hash of itself and of the tensor file, so that a file that was cut short, damaged or edited by hand is an
error and never another surgery. Tensors lie in safetensors; nothing is pickled, and no name in the file leads anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from surgery.errors import ExportError, SpecError, describe
from surgery.export.fit import Fingerprint
from surgery.export.folder import MARK
from surgery.reference import stored
from surgery.spec import Spec

TENSORS = "surgery.safetensors"
TypeName = Literal["float64", "float32", "float16", "bfloat16"]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Document(BaseModel):
    """The contents of surgery.json.

    written_by: versions of this package, torch and transformers; implementation: the attention implementation by the name of
    the config's part ("" for the whole); types: see surgery.export.types; spec: as Spec.to_json has it; tensors: the hash of
    surgery.safetensors, or None without one; files: the hashes of what else was there
    when it was written, for `surgery verify`; baked: what was folded into the weights, in words, and is not in the spec any
    more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    written_by: dict[str, str]
    model: Fingerprint
    kernel: Literal["auto", "eager"] = "auto"
    implementation: dict[str, str]
    types: dict[str, TypeName] = {}
    spec: dict[str, Any]
    tensors: Digest | None = None
    baked: list[str] = []
    files: dict[str, Digest] = {}


def write(folder: Path, spec: Spec, model: Fingerprint, **more: Any) -> Document:
    """Writes both files into a folder. Raises SpecError for a callable, which no file can hold."""
    text = spec.to_json()
    digest = None
    if tensors := spec.tensors():
        save_file(stored(tensors), folder / TENSORS)
        digest = _digest((folder / TENSORS).read_bytes())
    versions = {name: version(name) for name in ("attention-surgery", "torch", "transformers")}
    others = (file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / TENSORS)
    files = {file.relative_to(folder).as_posix(): _of_file(file) for file in others}
    document = Document(written_by=versions, model=model, spec=json.loads(text), tensors=digest, files=files, **more)
    data = document.model_dump(mode="json")
    data["sha256"] = _digest(_canonical(data))
    (folder / MARK).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return document


def read(folder: str | Path) -> tuple[Document, Spec]:
    """What `write` wrote. Raises ExportError for files that are missing, damaged or changed."""
    folder = Path(folder)
    document = _document(folder / MARK)
    return document, _spec(folder, document)


def changed_files(folder: str | Path, document: Document) -> list[str]:
    """What lay beside surgery.json when it was written and is another now, or gone, in words."""
    found = []
    for name, digest in document.files.items():
        path = Path(folder) / name
        if ".." in path.parts or Path(name).is_absolute() or not path.is_file():
            found.append(f"{name} is gone")
        elif _of_file(path) != digest:
            found.append(f"{name} was changed")
    return found


def _document(path: Path) -> Document:
    what = f"{str(path)!r}"
    if not path.is_file():
        raise ExportError(describe(what, "no such file", f"the {MARK} of an export", "Give the folder that was exported."))
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if not isinstance(data, dict):
            raise ValueError(f"a JSON {type(data).__name__}")
        digest = data.pop("sha256", None)
        if digest != _digest(_canonical(data)):
            raise ValueError("contents that do not have the hash written in it: it was damaged, or edited by hand")
        return Document.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, and {error.error_count() - 1} more"
    except (ValueError, RecursionError, OSError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        found = str(error) or type(error).__name__
    do = "Export the model again; to change cuts, change the spec (Spec.save writes YAML) and export that."
    raise ExportError(describe(what, found, f"the {MARK} that was exported", do)) from None


def _spec(folder: Path, document: Document) -> Spec:
    path = folder / TENSORS
    what, do = f"{str(path)!r}", "Export the model again, or copy the folder as a whole."
    tensors: Mapping[str, torch.Tensor] = {}
    if document.tensors is not None:
        try:
            found = _digest(path.read_bytes())
            if found != document.tensors:
                raise ExportError(describe(what, f"contents of hash {found[:12]}", f"{document.tensors[:12]}", do))
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ExportError(describe(what, f"{type(error).__name__}: {error}", "the tensors of the spec", do)) from None
    try:
        return Spec.from_json(json.dumps(document.spec), tensors)
    except SpecError as error:
        raise ExportError(f"{str(folder / MARK)!r}: {error}") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"the number {constant}, which JSON has not")


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
