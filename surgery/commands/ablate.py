"""`surgery ablate`: what every head's circuits are worth, as a table, pictures and a short report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.commands.data import Layers, in_batches, labelled, layers_of, sequences
from surgery.commands.report import markdown_table, write_report
from surgery.commands.shared import (
    Debug,
    Device,
    Inputs,
    Json,
    Model,
    Trust,
    device_of,
    listed,
    messages,
    read_inputs,
    say,
    together,
    write_json,
)


def ablate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for study.csv, study.jsonl, report.md, pictures (.png, .pdf).")],
    inputs: Inputs = None,
    text: Annotated[
        str | None, typer.Option(help="Text or text file to read.", show_default="random tokens, said twice")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence of the text.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Sequences (of a text: at most).")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are read at a time.")] = 8,
    metric: Annotated[
        str,
        typer.Option(
            help="loss, perplexity, accuracy or kl; several with commas.",
            autocompletion=listed("loss", "perplexity", "accuracy", "kl"),
        ),
    ] = "loss",
    circuits: Annotated[
        str, typer.Option(help="qk, ov, both; several with commas.", autocompletion=listed("qk", "ov", "both"))
    ] = "qk,ov,both",
    layers: Layers = "all",
    to: Annotated[str, typer.Option(help="What frozen circuits become: zero, mean, noise, resample.")] = "zero",
    seed: Annotated[int, typer.Option(help="Of random tokens, of noise and of resampling.")] = 0,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Freeze each head's QK, its OV and both, and measure what changes, with intervals and p-values over sequences.

    A study that was stopped goes on where it was when the command is given again. Several processes share the work:
    `torchrun --nproc-per-node 2 -m surgery ablate ...`. On random tokens that are said twice, the
    loss is that of the second time.
    """
    if inputs is not None and text is not None:
        raise typer.BadParameter("Give one of the two.", param_hint="--inputs / --text")
    with messages(debug), together() as is_main:
        from surgery.analysis import ablation_study
        from surgery.analysis.repeats import random_copies
        from surgery.plots import save
        from surgery.pretrained import load_any, tokenizer_of

        loaded = load_any(model, trust_remote_code=trust_remote_code).to(device_of(device))
        given, about = read_inputs(inputs), f"`{inputs}`"
        if given is None:
            tokenizer, missing = tokenizer_of(model, trust_remote_code=trust_remote_code)
            if text is None:
                copies = random_copies(loaded, rows, seed=seed, tokenizer=tokenizer)
                given = labelled(copies)
                about = f"{int(copies.lengths[0])} random tokens (seed {seed}), said twice; the second time counts"
            else:
                given, about = sequences(tokenizer, missing, text, length, rows), f"{length} tokens each of the text"
        out.mkdir(parents=True, exist_ok=True)
        study = ablation_study(
            loaded,
            in_batches(given, batch),
            circuits.split(","),
            layers_of(layers),
            to=to,
            metrics=metric.split(","),
            seeds=(seed,),
            resume=out / "study.jsonl",
        )
        if not is_main:
            return
        study.frame.to_csv(out / "study.csv", index=False)
        save(study.picture(), out / "heads")
        save(study.bars(), out / "effects")
        _report(out, model, study, about, to)
        if as_json:
            write_json({"out": str(out), "rows": study.frame.to_dict("records"), "notes": study.notes})
            return
        say(study)
        say(f"Table, pictures and report: {out}")


def _report(out: Path, model: str, study: Any, about: str, to: str) -> None:
    """The largest effects, and how they were measured."""
    columns = ["circuit", "address", "head", "metric", "baseline", "effect", "low", "high", "p_fdr"]
    how = [
        f"* read: {study.examples.shape[-1]} sequences, {about}",
        f"* {len(study.cuts)} cuts, each of one head, to {to}",
        "* effects: means over sequences, with 95 % intervals by bootstrap over them",
        "* p-values: by flipping the signs of sequences, corrected for all cuts (Benjamini-Hochberg)",
    ]
    write_report(
        out,
        f"What freezing the heads of {Path(model).name} changes",
        how,
        markdown_table(study.top(20), columns),
        ["![heads](heads.png)", "", "![effects](effects.png)"],
        [f"* {note}" for note in study.notes],
    )
