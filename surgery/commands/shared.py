"""What the commands share: options, errors as messages, JSON, a sign of life on long work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Model = Annotated[str, typer.Argument(help="Folder or hub name of a transformers model.")]
Folder = Annotated[Path, typer.Argument(help="A folder that `surgery patch` or export_checkpoint wrote.")]
Device = Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default="cuda if there is one")]
Inputs = Annotated[
    Path | None,
    typer.Option(help="A .safetensors file of inputs by the names of forward's arguments.", show_default="random tokens"),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that lies beside the model.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, in place of the table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def listed(*words: str) -> Callable[[str], list[str]]:
    """The shell's completion of a list with commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last) and word not in before.split(",")]

    return complete


@contextmanager
def messages(debug: bool) -> Iterator[None]:
    """Turns errors into a message on stderr and exit code 1; with debug they keep their traceback."""
    from surgery.errors import SurgeryError

    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            raise
        is_ours = isinstance(error, SurgeryError | OSError)
        text = str(error) if is_ours else f"{type(error).__name__}: {error} (--debug shows where)"
        Console(stderr=True).print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def together() -> Iterator[bool]:
    """Joins the processes of a launcher for the length of the block; gives whether this one speaks and writes files."""
    from torch import distributed

    from surgery.analysis.workers import launched

    workers = launched()
    try:
        yield workers.is_main
    finally:
        if workers.count > 1:
            distributed.destroy_process_group()


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says on stderr, where that is a terminal, what is being done for the length of the block."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def device_of(name: str | None) -> str:
    """A device that can be used; cuda where there is one, if none is named. Wrong usage otherwise."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(f"{name!r} cannot be used: {str(error).splitlines()[0]}", param_hint="--device") from None
    return name


def read_inputs(path: Path | None) -> dict[str, Any] | None:
    """The tensors of a file, or None. Raises SurgeryError for a file that cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from surgery.errors import SurgeryError, describe

    if path is None:
        return None
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        do = "Write one with safetensors.torch.save_file({'input_ids': ids}, path)."
        raise SurgeryError(describe(f"inputs {str(path)!r}", f"{error}", "a .safetensors file", do)) from None


def write_json(data: object) -> None:
    """To stdout. JSON has no word for NaN and infinity: they become null."""
    typer.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def warn(text: object) -> None:
    """To stderr, as it is."""
    Console(stderr=True).print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def say(text: object) -> None:
    """To stdout, as it is."""
    Console().print(str(text), highlight=False, markup=False, soft_wrap=True)
