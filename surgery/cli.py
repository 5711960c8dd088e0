"""The command line: `surgery demo` studies every head of a model, `surgery inspect` shows what its attention is made of.

Exit codes: 0 good, 1 a model or file is not as needed, 2 wrong usage. torch is imported only when a command runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

SMALL = 10_000_000
"""Parameters of a model that runs best on one thread."""

app = typer.Typer(
    help="Cut the QK and OV circuits of attention heads in Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


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


Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, in place of the table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
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
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default="cuda if there is one")] = None,
    debug: Debug = False,
) -> None:
    """Find out what each head is worth for copying in context: freeze its QK, then its OV, and measure the loss.

    The model reads sequences that say everything twice. The table shows how much each cut adds to the loss on the second
    copy; the induction head and the previous-token head are named by these numbers and their attention patterns.
    """
    with _messages(debug):
        from surgery.demo import report
        from surgery.demo.study import study
        from surgery.demo.subject import load, read_text
        from surgery.plots import FORMATS, save

        if out.suffix.lower() not in FORMATS or out.is_dir():
            raise typer.BadParameter(
                f"{str(out)!r} is no file with one of the suffixes {', '.join(FORMATS)}.", param_hint="--out"
            )
        start = time.monotonic()
        subject = load(model, _device(device))
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
            _write({**found.as_dict(), "picture": str(out), "seconds": round(time.monotonic() - start, 3)})
            return
        console = Console()
        console.print(report.table(found))
        for line in report.lines(found):
            console.print(line, highlight=False, markup=False)
        console.print(f"Picture: {out}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or hub name of any transformers model; its weights are not read.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's attention modules: addresses, heads, projections and how they are fused, kernel."""
    with _messages(debug):
        from surgery.demo.subject import skeleton
        from surgery.inspection import inspect_model

        found = inspect_model(skeleton(model))
        if as_json:
            _write({"model": found.model_class, "attention": found.as_dicts(), "unsupported": list(found.unsupported)})
            return
        console = Console()
        console.print(found.table())
        for line in found.unsupported:
            console.print(f"cannot be patched: {line}", highlight=False, markup=False)


def main() -> None:
    """The console script `surgery`."""
    app()


@contextmanager
def _messages(debug: bool) -> Iterator[None]:
    """Turns errors that say what to do into a message and exit code 1; with debug they keep their traceback."""
    from surgery.errors import SurgeryError

    try:
        yield
    except (SurgeryError, OSError) as error:
        if debug:
            raise
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(f"{name!r} cannot be used: {str(error).splitlines()[0]}", param_hint="--device") from None
    return name


def _use_few_threads(model: Any) -> None:
    """One thread for a small model on the CPU: more of them wait for each other, on a busy machine for seconds."""
    import torch

    if model.device.type == "cpu" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)


def _write(data: object) -> None:
    typer.echo(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
