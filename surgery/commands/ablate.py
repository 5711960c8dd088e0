"""`surgery ablate`: what every head's circuits are worth, as a table, pictures and a short report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.commands.shared import (
    Debug,
    Device,
    Inputs,
    Json,
    Model,
    Trust,
    device_of,
    messages,
    read_inputs,
    say,
    write_json,
)


def ablate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for study.csv, study.jsonl, heads.png, effects.png, report.md.")],
    inputs: Inputs = None,
    text: Annotated[
        str | None, typer.Option(help="Text or text file to read.", show_default="random tokens, said twice")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence of the text.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Sequences (of a text: at most).")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are read at a time.")] = 8,
    metric: Annotated[str, typer.Option(help="loss, perplexity, accuracy or kl; several with commas.")] = "loss",
    circuits: Annotated[str, typer.Option(help="qk, ov, both; several with commas.")] = "qk,ov,both",
    layers: Annotated[str, typer.Option(help="Addresses with commas, such as 3,4 or decoder.cross.*")] = "all",
    to: Annotated[str, typer.Option(help="What frozen circuits become: zero, mean, noise, resample.")] = "zero",
    seed: Annotated[int, typer.Option(help="Of random tokens, of noise and of resampling.")] = 0,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Freeze each head's QK, its OV and both, and measure what changes, with intervals and p-values over sequences.

    A study that was stopped goes on where it was when the command is given again. On random tokens that are said twice, the
    loss is that of the second time.
    """
    if inputs is not None and text is not None:
        raise typer.BadParameter("Give one of the two.", param_hint="--inputs / --text")
    with messages(debug):
        from surgery.analysis import ablation_study
        from surgery.plots import save
        from surgery.pretrained import load_any, tokenizer_of

        loaded = load_any(model, trust_remote_code=trust_remote_code).to(device_of(device))
        given = read_inputs(inputs)
        if given is None:
            tokenizer, missing = tokenizer_of(model, trust_remote_code=trust_remote_code)
            given = _copies(loaded, tokenizer, rows, seed) if text is None else _text(tokenizer, missing, text, length, rows)
        out.mkdir(parents=True, exist_ok=True)
        names = layers.split(",")
        study = ablation_study(
            loaded,
            _batches(given, batch),
            circuits.split(","),
            "all" if layers == "all" else [int(name) if name.isdecimal() else name for name in names],
            to=to,
            metrics=metric.split(","),
            seeds=(seed,),
            resume=out / "study.jsonl",
        )
        study.frame.to_csv(out / "study.csv", index=False)
        save(study.picture(), out / "heads.png")
        save(study.bars(), out / "effects.png")
        (out / "report.md").write_text(_report(model, study), encoding="utf-8")
        if as_json:
            write_json({"out": str(out), "rows": study.frame.to_dict("records"), "notes": study.notes})
            return
        say(study)
        say(f"Table, pictures and report: {out}")


def _copies(model: Any, tokenizer: Any, rows: int, seed: int) -> dict[str, Any]:
    """Random tokens, said twice; labels where the first time determines the second."""
    from surgery.analysis.repeats import random_copies

    copies = random_copies(model, rows, seed=seed, tokenizer=tokenizer)
    labels = copies.ids.clone()
    labels[:, 1:][~copies.scored[:, :-1]] = -100
    labels[:, 0] = -100
    return {"input_ids": copies.ids, "labels": labels}


def _text(tokenizer: Any, missing: str, text: str, length: int, rows: int) -> dict[str, Any]:
    """A text in sequences of equal length; its rest is left out. Raises SurgeryError for a text that is too short."""
    import torch

    from surgery.demo.subject import read_text
    from surgery.errors import SurgeryError, describe

    if tokenizer is None:
        do = "Pass --inputs, or leave --text out."
        raise SurgeryError(describe("--text", f"no tokenizer ({missing})", "one beside the model", do))
    ids = torch.tensor(tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < length:
        raise SurgeryError(describe("--text", f"{len(ids)} tokens", f"at least --length {length}", "Pass a longer text."))
    return {"input_ids": ids[: len(ids) // length * length].view(-1, length)[:rows]}


def _batches(given: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Inputs in batches of so many rows."""
    rows = len(next(iter(given.values())))
    return [{name: value[i : i + size] for name, value in given.items()} for i in range(0, rows, size)]


def _report(model: str, study: Any) -> str:
    """The largest effects in Markdown, and how they were measured."""
    columns = ["circuit", "address", "head", "metric", "baseline", "effect", "low", "high", "p_fdr"]
    lines = [f"# What freezing the heads of {Path(model).name} changes", ""]
    lines += [f"{len(study.cuts)} cuts on {study.examples.shape[-1]} sequences. Effects are means over sequences, with 95 %"]
    lines += ["intervals by bootstrap and p-values by flipping signs, corrected for all cuts (Benjamini-Hochberg).", ""]
    lines += [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for row in study.top(20)[columns].itertuples(index=False):
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![heads](heads.png)", "", "![effects](effects.png)", ""]
    return "\n".join([*lines, *(f"* {note}" for note in study.notes)])
