"""`surgery bench`: this library beside others on this machine, by the benchmarks of the checkout that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from surgery.commands.shared import messages


def bench(context: typer.Context) -> None:
    """Compare speed and memory with transformers, plain hooks, TransformerLens, nnsight and pyvene (--help: options).

    Needs the repository: the benchmarks are beside the package, not in it.
    """
    with messages(debug=False):
        from surgery.errors import SurgeryError, describe

        root = Path(__file__).parents[2]
        if not (root / "benchmarks" / "__main__.py").exists():
            do = "Clone the repository, `pip install -e .` there, and try again."
            raise SurgeryError(describe("surgery bench", f"no benchmarks in {root}", "a checkout of the repository", do))
        if missing := [name for name in ("pandas", "matplotlib") if find_spec(name) is None]:
            do = '`pip install -e ".[analysis]"` in the checkout.'
            raise SurgeryError(
                describe("surgery bench", f"no {' and no '.join(missing)}", "what its tables and pictures need", do)
            )
        paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "benchmarks", *context.args]
        raise typer.Exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode)
