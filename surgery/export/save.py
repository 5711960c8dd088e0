"""Writing a patched model as a Hugging Face folder: with its surgery beside its weights, or folded into them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm

from surgery.configs import config_parts
from surgery.derive import find_anatomy
from surgery.errors import ExportError, PatchError, describe
from surgery.export import document
from surgery.export.bake import Baked, require_all
from surgery.export.bake import bake as bake_cuts
from surgery.export.card import card
from surgery.export.fit import Fingerprint
from surgery.export.folder import MARK, require_free, written
from surgery.export.fresh import Comparison, compare
from surgery.export.inputs import example_inputs as inputs_for
from surgery.export.inputs import require_plain
from surgery.export.offload import is_offloaded
from surgery.export.saving import replaced, require_complete, require_savable, save
from surgery.export.shrink import shrink as shrink_heads
from surgery.export.types import types_of
from surgery.patch import anatomy_of, session_of
from surgery.spec import Spec

Bake = Literal[False, True, "where_possible"]


@dataclass(frozen=True)
class Exported:
    """What `export_checkpoint` wrote.

    folded: the edits that are in the weights now; kept: the reasons of those that stayed in surgery.json (after
    bake="where_possible"); comparison: of the written folder with the patched model (None if it was not asked for).
    """

    path: Path
    folded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    comparison: Comparison | None = None

    def __str__(self) -> str:
        lines = [f"exported to {self.path}"]
        lines += [f"  folded: {text}" for text in self.folded] + [f"  kept: {text}" for text in self.kept]
        return "\n".join([*lines, f"  {self.comparison}"] if self.comparison else lines)

    __repr__ = __str__


def export_checkpoint(
    model: Any,
    path: str | Path,
    *,
    bake: Bake = False,
    shrink: bool = False,
    tokenizer: Any = None,
    example_inputs: Mapping[str, Any] | None = None,
    verify: bool = True,
    progress: bool = True,
    **options: Any,
) -> Exported:
    """Writes a patched model as an ordinary Hugging Face folder, complete or not at all.

    bake=False: the weights as they are, with the cuts in surgery.json (and surgery.safetensors): `load_checkpoint` gives the
      patched model, bit for bit; plain from_pretrained gives the uncut one.
    bake=True: the cuts folded into the weights, so that plain transformers computes the patched model. Raises ExportError,
      before anything is written, naming each edit that is no change of weights, and why.
    bake="where_possible": folds what can be folded and keeps the rest in surgery.json.
    shrink: after baking, remove heads that add nothing (OV to zero, whole groups) where every attention has as many of them and
      the config can say fewer heads: a smaller and faster model. Raises ExportError where that is not so.
    tokenizer: a tokenizer or processor to write beside the model. example_inputs: as the model's forward takes them, to try
      the folded weights on; by default random tokens. They should run every attention with cuts.
    verify: after baking, load the folder by plain transformers in a new process and compare it with the patched model; the
      result is in the model card (README.md) and in what is returned. Without baking, the surgery is read back.
    progress: show a bar while cuts are folded, and the comparison, on stderr.
    options: of save_pretrained, such as max_shard_size, variant. A model that accelerate offloads is written in files of 2 GB
      unless max_shard_size says otherwise, one of them in memory at a time.
    The forward of the baked model is the patched model's; gradients are those of its new weights.
    An earlier export at `path` is replaced. Raises PatchError for a model that is not patched, SpecError for a callable
    (without baking), ExportError for a path that is taken or a folder that does not compute the same.
    """
    spec, more = surgery_of(model)
    if bake not in (False, True, "where_possible"):
        raise ExportError(
            describe("export_checkpoint", f"bake={bake!r}", "False, True or 'where_possible'", "Use one of these.")
        )
    require_free(path)
    require_savable(model, options)
    if verify:
        require_complete(model)
    is_offloaded(model)  # weights that are nowhere are found before anything is written
    inputs = inputs_for(model, example_inputs, spec) if bake else {}
    if verify:
        require_plain(inputs)
    baked = bake_cuts(model, inputs, progress) if bake else Baked(spec)
    if bake is True:
        require_all(baked)
    baked.kept.to_json()  # a callable is found before anything is written
    anatomy = anatomy_of(model)
    fingerprint = Fingerprint.of(model, anatomy)
    types = types_of(model, baked.changed)
    tensors = replaced(model, baked.changed) if baked.changed else None
    config = baked.config
    if shrink:
        _require_no_cuts(baked.kept)
        smaller = shrink_heads(model, anatomy, baked.changed, baked.config)
        tensors, config = smaller.tensors, smaller.config
        fingerprint = Fingerprint.of(smaller.model, find_anatomy(smaller.model, strict=False))
    with written(path) as folder:
        save(model, folder, tensors, options)
        baked.changed.clear()  # written: the comparison needs the memory
        if config is not None:
            config.architectures, config.dtype = model.config.architectures, model.config.dtype
            config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        document.write(folder, baked.kept, fingerprint, types=types, baked=baked.folded, **more)
        comparison = None
        variant = options.get("variant")
        if verify and document.read(folder)[1] != baked.kept:
            raise ExportError(describe(f"{str(path)!r}", "another spec in surgery.json", "the one written", "Check the disk."))
        if verify and bake:
            comparison = compare(model, folder, inputs, bool(len(baked.kept)), more["implementation"], variant)
        (folder / "README.md").write_text(card(model, spec, baked, comparison), encoding="utf-8")
    if comparison is not None and progress:
        tqdm.write(f"{path} {comparison}", file=sys.stderr)
    return Exported(Path(path), tuple(baked.folded), tuple(baked.refused), comparison)


def export_spec(model: nn.Module, path: str | Path) -> Path:
    """Writes the surgery of a patched model alone, a few kilobytes: surgery.json, and surgery.safetensors if it has tensors.

    path: a folder; earlier surgery alone there is replaced, not a checkpoint. Returns it. `load_spec` reads it.
    Raises PatchError for a model that is not patched, SpecError for a callable, ExportError for a path that is taken.
    """
    spec, more = surgery_of(model)
    spec.to_json()
    with written(path, only=(MARK, document.TENSORS)) as folder:
        document.write(folder, spec, Fingerprint.of(model, anatomy_of(model)), **more)
    return Path(path)


def surgery_of(model: nn.Module) -> tuple[Spec, dict[str, Any]]:
    """The spec of a patched model, and what else surgery.json says of it."""
    session = session_of(model)
    if session is None:
        raise PatchError(describe("the model", "it not patched", "a patched model", "Call patch_model first."))
    return session.spec, {"kernel": session.kernel, "implementation": _implementations(model)}


def _implementations(model: nn.Module) -> dict[str, str]:
    """The attention implementation of a model's config ("") and, by name, of its parts."""
    parts = config_parts(getattr(model, "config", None))
    found = {name: part._attn_implementation for name, part in parts.items()}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _require_no_cuts(kept: Spec) -> None:
    """Raises ExportError: heads that go away take their numbers along."""
    if len(kept):
        do = "Export without shrink=True."
        raise ExportError(describe("shrink", f"cuts that stay in surgery.json: {kept!r}", "all cuts in the weights", do))
