"""`surgery inspect`: what a model's attention is made of, and the surgery of an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from surgery.commands.shared import Debug, Json, Model, Trust, messages, say, working, write_json

Full = Annotated[
    bool, typer.Option("--full", help="Also what each attention allows: sites, kernels, weights, baking, KV cache.")
]


def inspect(
    model: Model, full: Full = False, trust_remote_code: Trust = False, as_json: Json = False, debug: Debug = False
) -> None:
    """Show a model's attention modules: addresses, heads, projections and how they are fused, kernel.

    Its weights are not read. Of an exported folder also the cuts.
    """
    with messages(debug):
        from surgery.analysis.compatible import compatibility
        from surgery.inspection import inspect_model
        from surgery.pretrained import skeleton

        with working(f"Deriving the attention of {model}"):
            bones = skeleton(model, trust_remote_code=trust_remote_code)
            found, allowed = inspect_model(bones), compatibility(bones) if full else None
        cuts, baked = _surgery(Path(model))
        if as_json:
            data: dict[str, Any] = {"model": found.model_class, "attention": found.as_dicts()}
            data["unsupported"] = list(found.unsupported)
            if allowed is not None:
                data["allowed"] = allowed.as_dicts()
            write_json({**data, "cuts": cuts, "baked": baked})
            return
        Console().print(found.table())
        for line in found.unsupported:
            say(f"cannot be patched: {line}")
        if allowed is not None:
            Console().print(allowed.table())
            more = [line for line in allowed.unsupported if line not in found.unsupported]
            for line in (*allowed.reasons(), *(f"cannot be patched: {reason}" for reason in more)):
                say(line)
        for line in cuts:
            say(f"cut by load_checkpoint: {line}")
        for line in baked:
            say(f"in the weights: {line}")


def _surgery(folder: Path) -> tuple[list[str], list[str]]:
    """The cuts in an exported folder, in words: those that loading applies, and those in its weights."""
    from surgery.export import document
    from surgery.export.folder import MARK

    if not (folder / MARK).is_file():
        return [], []
    found, spec = document.read(folder)
    return [str(cut) for cut in spec], found.baked
