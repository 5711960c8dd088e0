"""`surgery interference`: which heads learning task B disturbs for task A: tables, pictures and a short report."""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.commands.data import Layers, layers_of
from surgery.commands.lines import as_tokens, batches_of, read_lines, require_fitting
from surgery.commands.report import write_report
from surgery.commands.shared import Debug, Device, Json, Model, Trust, device_of, messages, say, together, warn, write_json

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
    with messages(debug), together() as is_main:
        from surgery.analysis.interference import collect, conflict_test, heatmap, overlap_test
        from surgery.analysis.interference.checks import FEWEST, shared_samples
        from surgery.analysis.interference.study import require_reach
        from surgery.errors import SurgeryError, listing
        from surgery.plots import save
        from surgery.pretrained import load_any, tokenizer_of

        _require_folder(out)
        files = {"A": task_a, "B": task_b, "control": control}
        samples = {name: read_lines(file, FEWEST) for name, file in files.items()}
        require_reach([len(some) for some in samples.values()], permutations, alpha)
        tokenizer, missing = tokenizer_of(model, trust_remote_code=trust_remote_code)
        samples = {name: as_tokens(some, tokenizer, missing, length) for name, some in samples.items()}
        contents = {f"{name} ({files[name]})": [one.content for one in some] for name, some in samples.items()}
        if problems := shared_samples(contents):
            raise SurgeryError(listing("interference", problems))
        place = device_of(device)
        loaded = load_any(model, trust_remote_code=trust_remote_code).to(place)
        for some in samples.values():
            require_fitting(some, loaded)
        is_shown = sys.stderr.isatty()
        a, b, n = (
            collect(
                loaded,
                batches_of(some, batch),
                task=f"{name}: {files[name].stem}",
                layers=layers_of(layers),
                biases=biases,
                query_heads=query_heads,
                resume=out / "gradients" / name if resume else None,
                progress=is_shown,
            )
            for name, some in samples.items()
        )
        if not is_main:
            return
        formed: dict[str, Any] = {"device": place, "progress": is_shown}
        options = {"n_permutations": permutations, "alpha": alpha, "seed": seed, **formed}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            overlap = overlap_test(a, b, n, kernel=kernel.value, rho=rho, **options)
            conflict = conflict_test(a, b, **options)
        measured = heatmap(a, b, [a, b, n], kernel.value, rho=rho, **formed)
        signed = heatmap(a, b, kernel="signed", **formed)
        warned, notes = [str(one.message) for one in caught], [*overlap.notes, *conflict.notes]
        for text in warned:
            warn(text)

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
        else:  # of an earlier run: they would stand beside a report of other samples
            for suffix in (".csv", ".png", ".pdf"):
                (out / f"query-heads{suffix}").unlink(missing_ok=True)
        tasks = [
            f"* {name}: `{files[name]}`, {len(one)} samples, loss {one.losses.mean():.4g} nats per token"
            for name, one in zip(files, (a, b, n), strict=True)
        ]
        write_report(
            out,
            f"{title} in {Path(model).name}",
            [*tasks, f"* overlap: {overlap.title}", f"* conflict: {conflict.title}"],
            [f"* warning: {text}" for text in warned],
            _found("Overlap", overlap, top),
            _found("Conflict", conflict, _largest(table, conflict, "conflict")),
            [f"* {note}" for note in notes],
            "\n\n".join(f"![{name}]({name}.png)" for name in pictures).splitlines(),
            _columns(kernel.value, rho, biases, alpha),
            _files(query_heads),
        )
        if as_json:
            titles = {"overlap": overlap.title, "conflict": conflict.title, "notes": [*warned, *notes]}
            write_json({"out": str(out), "kernel": kernel.value, **titles, "rows": table.to_dict("records")})
            return
        say(overlap)
        say(f"Opposed: {conflict}")
        say(f"Tables, pictures and report: {out}")


def _require_folder(out: Path) -> None:
    """Raises SurgeryError if there is something else where a folder is to be made."""
    from surgery.errors import SurgeryError, describe

    known = next((path for path in (out, *out.parents) if path.exists()), None)
    if known is not None and not known.is_dir():
        raise SurgeryError(describe(f"--out {out}", f"a file at {known}", "a folder, or nothing yet", "Name another folder."))


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


def _found(what: str, tested: Any, rows: Any) -> list[str]:
    """A test's table, for the report."""
    heading = f"## {what}: {'found, the largest first' if len(tested.significant()) else 'nothing is found; the surest'}"
    return [heading, "", *tested.to_markdown(rows, list(rows.columns)).splitlines()]


def _columns(kernel: str, rho: float, biases: bool, alpha: float) -> list[str]:
    """What the tables say, and how far to trust them."""
    return [
        "## Columns",
        "",
        "* address, block, head: a head's part of Q, K, V or O. Of K and V, head is a kv head, which several query heads may "
        f"share. Biases of Q, K and V are {'' if biases else 'not '}counted.",
        f"* mean: the kernel {kernel!r} over all pairs of samples, with the Fisher reference of all three tasks (ρ = {rho:g}). "
        "It is of gradients as they are, so that large ones weigh more; both tests are of gradients of length one.",
        "* g_row, g_col: how much more A's samples are disturbed by B than the control's, and B's samples disturb A than the "
        "control's do: Hedges' g, a difference of means of log scores over their standard deviation.",
        f"* p_fdr: of overlap; of all rows with p_fdr ≤ {alpha:g}, at most {100 * alpha:g} % are expected to be false "
        f"(Benjamini and Hochberg). p_maxt: that of the rows with p_maxt ≤ {alpha:g} even one is false has at most "
        "that probability.",
        "* conflict: part of −cos of the whole gradients, positive where a step on B raises A's loss. conflict_p_fdr: p_fdr of "
        "the test of conflict.",
        "",
        "The test of overlap compares a head with the others of the same sample, so that a difference in loss alone is "
        "not found. It finds shares, not sizes: a head that does next to nothing may be found too, and its mean says so. A "
        "conflict that is found may be as small.",
    ]


def _files(query_heads: bool) -> list[str]:
    """What lies beside the report."""
    return [
        "## Files",
        "",
        "* interference.csv: these columns of all heads. tested.csv, conflict.csv: all that the tests of overlap and of "
        "conflict say: effects and p by rows (A's samples) and by columns (B's).",
        "* top.csv, top.tex: the table of overlap above.",
        *(["* query-heads.csv: mean, with K and V shared out among the query heads that share them."] if query_heads else []),
    ]
