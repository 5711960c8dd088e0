"""`surgery demo`: what each head of a model is worth for copying in context, by freezing its circuits."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from surgery.commands.shared import Debug, Device, Json, device_of, messages, say, write_json

SMALL = 10_000_000
"""Parameters of a model that runs best on one thread."""


class To(StrEnum):
    """What a frozen circuit's activations become."""

    zero = "zero"
    mean = "mean"
    resample = "resample"
    noise = "noise"


class KernelName(StrEnum):
    """How the model computes attention."""

    auto = "auto"
    eager = "eager"


def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a causal LM.", show_default="the packaged model")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text or text file to repeat.", show_default="random tokens")] = None,
    to: Annotated[To, typer.Option(help="What frozen circuits become.")] = To.zero,
    seed: Annotated[int, typer.Option(help="Of the random tokens, of noise and of resampling.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences (of a text: at most).")] = 16,
    segment: Annotated[
        int | None, typer.Option(min=4, help="Tokens that a sequence says twice.", show_default="24, or what fits")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture; its suffix chooses the format: .png, .pdf, .svg.")] = Path(
        "surgery-demo.png"
    ),
    as_json: Json = False,
    kernel: Annotated[KernelName, typer.Option(help="auto cuts in the model's own kernel.")] = KernelName.auto,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Find out what each head is worth for copying in context: freeze its QK, then its OV, and measure the loss.

    The model reads sequences that say everything twice. The table shows how much each cut adds to the loss on the second
    copy; the induction head and the previous-token head are named by these numbers and their attention patterns.
    """
    with messages(debug):
        from surgery.demo import report
        from surgery.demo.study import study
        from surgery.demo.subject import load, read_text
        from surgery.plots import FORMATS, save

        if out.suffix.lower() not in FORMATS or out.is_dir():
            raise typer.BadParameter(
                f"{str(out)!r} is no file with one of the suffixes {', '.join(FORMATS)}.", param_hint="--out"
            )
        start = time.monotonic()
        subject = load(model, device_of(device))
        content = None if text is None else read_text(text)
        copies = subject.copies(batch, segment, seed, content, varied=to is To.resample)
        fresh = [subject.copies(batch, segment, seed + 1 + i) for i in range(4)] if to is To.mean and text is None else []
        _use_few_threads(subject.model)
        found = study(
            subject.model, copies, name=subject.name, to=to.value, reference=fresh, seed=seed, kernel=kernel.value,
            label=subject.label,
        )  # fmt: skip
        save(report.picture(found), out)
        if as_json:
            write_json({**found.as_dict(), "picture": str(out), "seconds": round(time.monotonic() - start, 3)})
            return
        Console().print(report.table(found))
        for line in report.lines(found):
            say(line)
        say(f"Picture: {out}")


def _use_few_threads(model: Any) -> None:
    """One thread for a small model on the CPU: more of them wait for each other, on a busy machine for seconds."""
    import torch

    if model.device.type == "cpu" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
