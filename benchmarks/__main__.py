"""This library beside others: `python -m benchmarks [--quick] [--out FOLDER]`, or `surgery bench`.

Compares transformers' attention (eager, sdpa, flex; unpatched), plain torch hooks, this library, TransformerLens, nnsight and
pyvene on the same weights and inputs: first whether they agree, then, in turns, time and peak memory over unpatched sdpa. Each
other library runs in a virtual environment of its own, which is made on the first run; one that cannot be installed is skipped
with a line. Writes for each shape JSON, Markdown and pictures.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import arguments, pictures, results
from benchmarks.comparison import environments
from benchmarks.comparison.grid import grid, markdown, notes, ways_of
from benchmarks.comparison.run import compare
from benchmarks.comparison.task import Settings
from benchmarks.comparison.worker import WAYS

QUICK = Settings(rounds=2, heavy=1, layers=3, heads=6, kv_heads=2, length=32, steps=8)
LENGTHS = {"cpu": (128, 1024, 4096), "cuda": (128, 1024, 4096, 16384)}
ON_A_CPU = {1024: {"layers": 4, "rounds": 6}, 4096: {"layers": 1, "rounds": 4}}
"""Longer sequences in fewer layers, which cost alike: a forward of twelve takes ten seconds."""


def main() -> None:
    parser = arguments.parser(__doc__, "a small model and few rounds, to see that it runs", json=None)
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder of what is written (default: comparison)")
    parser.add_argument("--families", nargs="+", choices=("gpt2", "llama"), default=["gpt2", "llama"])
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a sequence (default: 128 1024 4096; CUDA: 16384)")
    keys = {way.key: name for name, way in WAYS.items()}
    parser.add_argument("--ways", nargs="+", choices=keys, default=list(keys), help="what is compared (default: all)")
    parser.add_argument("--environments", type=Path, default=environments.FOLDER, help="where other libraries are installed")
    parser.add_argument("--here", action="store_true", help="other libraries as this environment has them; none is made")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    base = arguments.settings(given, Settings(), QUICK)
    lengths = given.lengths or ([QUICK.length] if given.quick else LENGTHS["cpu" if base.device == "cpu" else "cuda"])
    for family in given.families:
        for length in lengths:
            is_short = given.quick or base.device != "cpu"
            settings = replace(base, family=family, length=length, **({} if is_short else ON_A_CPU.get(length, {})))
            with console.status(f"{settings.name}: starts") as status:
                say = status.update if console.is_terminal else console.print
                made = partial(environments.python_of, folder=given.environments, say=say)
                python_of = environments.here if given.here else made
                try:
                    found = compare(settings, [keys[key] for key in given.ways], python_of, say)
                except RuntimeError as error:
                    sys.exit(
                        f"{error}\n{settings.name}: the process of this library itself fails, as said above; nothing is written"
                    )
            path = given.out / f"{settings.name}-{settings.device.partition(':')[0]}.json"
            results.save(path, found)
            path.with_suffix(".md").write_text("\n".join(markdown(found)) + "\n", encoding="utf-8")
            show(found, console)
    for path in pictures.draw(given.out, given.out):
        console.print(f"wrote {path}")


def show(found: dict, console: Console) -> None:  # type: ignore[type-arg]
    """Prints the table of times and what has none."""
    table = Table(title=f"{Settings(**found['settings']).shape}, medians over unpatched sdpa", title_justify="left")
    for name in ("", *ways_of(found)):
        table.add_column(name, justify="right" if name else "left")
    for row in grid(found, is_short=True):
        table.add_row(*row)
    console.print(table)
    for note in notes(found):
        console.print(note, style="dim")


if __name__ == "__main__":
    main()
