"""`surgery interference`: which heads learning task B disturbs for task A: tables, pictures and a short report."""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.commands.data import Layers, layers_of
from surgery.commands.lines import batches_of, read_lines, require_known
from surgery.commands.report import write_report
from surgery.commands.shared import Debug, Device, Json, Model, Trust, device_of, messages, say, write_json

Task = Annotated[Path, typer.Option(exists=True, dir_okay=False, help='JSON lines: {"text": ...} or {"input_ids": ...}.')]
SHOWN = 20
"""Rows of the table of top heads."""


class KernelName(StrEnum):
    """What is measured between two samples."""

    qkov = "qkov"
    whitened = "whitened"
    ewc = "ewc"


def interference(
    model: Model,
    task_a: Task,
    task_b: Task,
    control: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="JSON lines of a third task, which A and B are compared with.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for tables (.csv, .tex), report.md, pictures (.png, .pdf).")],
    kernel: Annotated[KernelName, typer.Option(help="Of the overlap; the signed one is always shown beside it.")] = (
        KernelName.qkov
    ),
    layers: Layers = "all",
    rho: Annotated[float, typer.Option(help="Of the Fisher reference's mean, added to it.")] = 1e-3,
    biases: Annotated[bool, typer.Option("--biases", help="Count those of Q, K and V.")] = False,
    query_heads: Annotated[
        bool, typer.Option("--query-heads", help="Also share K and V out among the query heads that share them.")
    ] = False,
    permutations: Annotated[
        int | None, typer.Option(min=1, help="Ways to hand out labels.", show_default="2 × heads and blocks / alpha")
    ] = None,
    alpha: Annotated[float, typer.Option(help="False discovery rate.")] = 0.05,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a sample that are read.", show_default="all")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of one length that are read at a time.")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Keep gradients in OUT, and go on where it was stopped.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of permutations and intervals.")] = 0,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the heads, and which of their Q, K, V and O, that learning task B disturbs for task A.

    Two tests: whether samples of B meet those of A at a head more than samples of the control task do (overlap), and whether
    the gradients of A and B point against each other there (conflict). A sample is a line: about 20 of each task and more.
    """
    if not rho > 0:
        raise typer.BadParameter(f"{rho} is not above 0.", param_hint="--rho")
    if not 0 < alpha < 1:
        raise typer.BadParameter(f"{alpha} is not between 0 and 1.", param_hint="--alpha")
    with messages(debug):
        from surgery.analysis.interference import collect, conflict_test, heatmap, overlap_test
        from surgery.analysis.interference.checks import FEWEST
        from surgery.plots import save
        from surgery.pretrained import load_any, tokenizer_of

        files = {"A": task_a, "B": task_b, "control": control}
        samples = {name: read_lines(file, FEWEST) for name, file in files.items()}
        tokenizer, missing = tokenizer_of(model, trust_remote_code=trust_remote_code)
        given = {name: batches_of(some, tokenizer, missing, batch, length) for name, some in samples.items()}
        place = device_of(device)
        loaded = load_any(model, trust_remote_code=trust_remote_code).to(place)
        for name, file in files.items():
            require_known(file, given[name], loaded)
        is_shown = sys.stderr.isatty()
        a, b, n = (
            collect(
                loaded,
                batches,
                task=f"{name}: {files[name].stem}",
                layers=layers_of(layers),
                biases=biases,
                query_heads=query_heads,
                resume=out / "gradients" / name if resume else None,
                progress=is_shown,
            )
            for name, batches in given.items()
        )
        formed: dict[str, Any] = {"device": place, "progress": is_shown}
        options = {"n_permutations": permutations, "alpha": alpha, "seed": seed, **formed}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            overlap = overlap_test(a, b, n, kernel=kernel.value, rho=rho, **options)
            conflict = conflict_test(a, b, **options)
        measured = heatmap(a, b, [a, b, n], kernel.value, rho=rho, **formed)
        signed = heatmap(a, b, kernel="signed", **formed)
        notes = [*(str(one.message) for one in caught), *overlap.notes, *conflict.notes]

        out.mkdir(parents=True, exist_ok=True)
        table = _table(measured, signed, overlap, conflict)
        top = _largest(table, overlap, "mean")
        table.to_csv(out / "interference.csv", index=False)
        overlap.frame.to_csv(out / "tested.csv", index=False)
        conflict.frame.to_csv(out / "conflict.csv", index=False)
        top.to_csv(out / "top.csv", index=False)
        (out / "top.tex").write_text(overlap.to_latex(top), encoding="utf-8")
        title = f"What {task_b.stem} disturbs for {task_a.stem}"
        save(measured.picture(overlap, title), out / "heads")
        save(measured.blocks_picture(seed=seed, title=title), out / "blocks")
        save(measured.beside(signed, overlap, conflict, f"{title}, and where the two are opposed"), out / "conflict")
        pictures = ["heads", "blocks", "conflict"]
        if query_heads:
            shared_out = heatmap(a, b, [a, b, n], kernel.value, rho=rho, query_heads=True, keep_maps=False, **formed)
            shared_out.to_frame().to_csv(out / "query-heads.csv", index=False)
            save(shared_out.picture(title=f"{title}, K and V by query head"), out / "query-heads")
            pictures.append("query-heads")
        tasks = [
            f"* {name}: `{files[name]}`, {len(one)} samples, loss {one.losses.mean():.4g} nats per token"
            for name, one in zip(files, (a, b, n), strict=True)
        ]
        _report(out, f"{title} in {Path(model).name}", tasks, kernel.value, rho, overlap, conflict, table, top, notes, pictures)
        if as_json:
            found = {"overlap": overlap.title, "conflict": conflict.title}
            write_json({"out": str(out), "kernel": kernel.value, **found, "notes": notes, "rows": table.to_dict("records")})
            return
        say(overlap)
        say(f"Opposed: {conflict}")
        say(f"Tables, pictures and report: {out}")


def _table(measured: Any, signed: Any, overlap: Any, conflict: Any) -> Any:
    """A row for each hypothesis: what is measured, and both tests beside it."""
    tested = overlap.frame[["g_row", "g_col", "p_fdr", "p_maxt"]]
    opposed = {"conflict": signed.means.numpy(), "conflict_p_fdr": conflict.frame["p_fdr"]}
    return measured.to_frame().join(tested).assign(**opposed)


def _largest(table: Any, tested: Any, column: str) -> Any:
    """Rows that a test found, those with the largest numbers; the surest, if it found none."""
    found = tested.significant()
    if not len(found):
        return table.loc[tested.top(SHOWN).index]
    return table.loc[found.index].sort_values(column, ascending=False, kind="stable").head(SHOWN)


def _report(
    out: Path,
    title: str,
    tasks: list[str],
    kernel: str,
    rho: float,
    overlap: Any,
    conflict: Any,
    table: Any,
    top: Any,
    notes: list[str],
    pictures: list[str],
) -> None:
    """What was read, both tests' findings, and how far they can be trusted."""
    text = [
        *tasks,
        f"* mean: the kernel {kernel!r} over all pairs of samples, with the Fisher reference of all three tasks (ρ = {rho:g})",
        "* g_row, g_col: how much more A's samples are disturbed by B than the control's, and B's samples disturb A than the "
        "control's do (Hedges' g of log scores, of gradients of length one)",
        "* conflict: part of −cos of the whole gradients, positive where a step on B raises A's loss",
        f"* overlap: {overlap.title}",
        f"* conflict: {conflict.title}",
    ]
    opposed = _largest(table, conflict, "conflict")
    parts = []
    for tested, rows, what in ((overlap, top, "Overlap"), (conflict, opposed, "Conflict")):
        is_found = len(tested.significant()) > 0
        heading = f"## {what}: {'found, the largest first' if is_found else 'nothing is found; the surest'}"
        parts.append([heading, "", *tested.to_markdown(rows, list(rows.columns)).splitlines()])
    trust = [
        "The test of overlap compares a head with the others of the same sample, so that a difference in loss alone is not "
        "found. It finds shares, not sizes: a head that does next to nothing may be found too, and its mean says so."
    ]
    shown = [line for name in pictures for line in (f"![{name}]({name}.png)", "")]
    write_report(out, title, text, trust, shown, *parts, [f"* {note}" for note in notes])
