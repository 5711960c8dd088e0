"""The command line `surgery`: its commands are in `surgery.commands`.

Exit codes: 0 good, 1 the model or files are wrong, 2 wrong usage.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from surgery.commands.ablate import ablate
from surgery.commands.bench import bench
from surgery.commands.demo import demo
from surgery.commands.families import families
from surgery.commands.generate import generate
from surgery.commands.importance import importance
from surgery.commands.inspect import inspect
from surgery.commands.interference import interference
from surgery.commands.patch import patch
from surgery.commands.patching import patching
from surgery.commands.schema import schema
from surgery.commands.verify import verify
from surgery.launcher import started

app = typer.Typer(
    help="Cut the QK and OV circuits of attention heads in Hugging Face models.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (demo, inspect, patch, verify, generate, ablate, importance, patching, interference, families, schema):
    app.command()(command)
# Its options are those of the benchmarks, which also say what they are.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(bench)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"attention-surgery {version('attention-surgery')}")
        raise typer.Exit


DIVIDED = ("ablate", "importance", "patching", "interference")
"""Commands whose work several processes share."""


@app.callback()
def options(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command."""
    count = started()
    if count > 1 and context.invoked_subcommand not in DIVIDED:
        found = f"found {count} processes of a launcher; expected one, or a command that divides its work:"
        raise typer.BadParameter(
            f"{found} {', '.join(DIVIDED)}. Start it without torchrun.", param_hint=context.invoked_subcommand
        )


def main() -> None:
    """The console script `surgery`."""
    app()


if __name__ == "__main__":
    main()
