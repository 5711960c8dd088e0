"""`surgery patch`: a model with the cuts of a spec, as a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.shared import Debug, Inputs, Json, Model, Trust, messages, read_inputs, say, write_json


def patch(
    model: Model,
    spec: Annotated[Path, typer.Option(help="The cuts: .yaml or .json, by Spec.save or by hand (see `surgery schema`).")],
    out: Annotated[Path, typer.Option(help="The folder to write; an earlier export there is replaced.")],
    bake: Annotated[bool, typer.Option("--bake", help="Fold the cuts into the weights, for plain transformers.")] = False,
    where_possible: Annotated[
        bool, typer.Option("--where-possible", help="With --bake: keep in surgery.json what cannot be folded.")
    ] = False,
    shrink: Annotated[bool, typer.Option("--shrink", help="With --bake: remove heads that add nothing.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare what was written with the patched model.")] = True,
    inputs: Inputs = None,
    device_map: Annotated[
        str | None, typer.Option(help="Where weights go, as from_pretrained takes it: auto for models larger than memory.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Apply a spec to a model and write the result as a Hugging Face folder."""
    if (where_possible or shrink) and not bake:
        raise typer.BadParameter("It goes with --bake.", param_hint="--where-possible" if where_possible else "--shrink")
    with messages(debug):
        from surgery.export.save import export_checkpoint
        from surgery.patch import patch_model
        from surgery.pretrained import load_any, processor_of
        from surgery.spec import Spec

        cuts = Spec.load(spec)
        options = {} if device_map is None else {"device_map": device_map}
        loaded = load_any(model, trust_remote_code=trust_remote_code, **options)
        done = export_checkpoint(
            patch_model(loaded, cuts),
            out,
            bake="where_possible" if where_possible else bake,
            shrink=shrink,
            tokenizer=processor_of(model, trust_remote_code=trust_remote_code),
            example_inputs=read_inputs(inputs),
            verify=verify,
        )
        if as_json:
            comparison = None if done.comparison is None else asdict(done.comparison)
            write_json({"out": str(out), "folded": list(done.folded), "kept": list(done.kept), "comparison": comparison})
            return
        say(done)
