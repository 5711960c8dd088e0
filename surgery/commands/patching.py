"""`surgery patching`: activations of one run put into another, or along single paths: a table, a picture, a short report."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.commands.data import Seed, in_batches, layers_of
from surgery.commands.pairs import (
    Answer,
    Asked,
    Clean,
    Corrupted,
    CorruptedInputs,
    MetricOption,
    Pair,
    PairInputs,
    Rows,
    Wrong,
    load_pair,
)
from surgery.commands.report import markdown_table, write_report
from surgery.commands.shared import Debug, Device, Json, Model, Trust, listed, messages, say, together, write_json
from surgery.sites import SITES


class To(StrEnum):
    """What is put in."""

    corrupted = "corrupted"
    zero = "zero"
    mean = "mean"
    resample = "resample"


class Direction(StrEnum):
    """Which run is patched."""

    noising = "noising"
    denoising = "denoising"


def patching(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for patching.csv, report.md, pictures (.png, .pdf).")],
    clean: Clean = None,
    corrupted: Corrupted = None,
    inputs: PairInputs = None,
    corrupted_inputs: CorruptedInputs = None,
    answer: Answer = None,
    wrong: Wrong = None,
    metric: MetricOption = None,
    to: Annotated[To, typer.Option(help="What is put in; corrupted takes it from the other run.")] = To.corrupted,
    sites: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(SITES)}; several with commas.", show_default="z", autocompletion=listed(*SITES)),
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            help="layer, head, position; several with commas. What is left out is patched at once.",
            show_default="layer,head",
            autocompletion=listed("layer", "head", "position"),
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Addresses with commas, such as 3,4 or decoder.cross.*", show_default="all")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Of queries, or of keys at k, rot_k and v; with commas: 4,-1", show_default="all")
    ] = None,
    direction: Annotated[
        Direction | None,
        typer.Option(help="noising patches the clean run; denoising the corrupted, with the clean.", show_default="noising"),
    ] = None,
    senders: Annotated[
        str | None, typer.Option(help="Of paths: heads with commas, ADDRESS.HEAD, such as 0.1,self.0.2", show_default="all")
    ] = None,
    receivers: Annotated[
        str | None,
        typer.Option(
            help="Of paths: logits or heads' inputs, such as 1.3.k,1.3.v; with + those patched at once.", show_default="logits"
        ),
    ] = None,
    freeze_mlps: Annotated[bool, typer.Option("--freeze-mlps", help="Of paths: the residual stream is the only way.")] = False,
    rows: Rows = 16,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples that are run at a time.", show_default="all")] = None,
    seed: Seed = 0,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put activations of the corrupted run into the clean one, place by place, and measure what a metric says.

    With --senders or --receivers, a sender's corrupted result goes into a receiver's q, k or v alone, all else is as in the
    clean run (path patching). Clean and corrupted inputs are two texts or two files; without any, random tokens that are said
    twice, in which case the corrupted ones say the first time backwards.
    """
    is_path = senders is not None or receivers is not None
    asked = Asked(clean, corrupted, inputs, corrupted_inputs, metric, answer, wrong, rows, seed)
    asked.check(needs_corrupted=to is To.corrupted)
    places = {"--sites": sites, "--over": over, "--layers": layers, "--positions": positions, "--direction": direction}
    if is_path and (both := [option for option, value in places.items() if value is not None]):
        raise typer.BadParameter("It does not go with --senders and --receivers.", param_hint=both[0])
    if freeze_mlps and not is_path:
        raise typer.BadParameter("It goes with --senders or --receivers.", param_hint="--freeze-mlps")
    ends = (_heads(senders or "all"), _inputs(receivers or "logits"))
    where = None if positions is None else _numbers(positions)
    with messages(debug), together() as is_main:
        from surgery.analysis import activation_patching, path_patching
        from surgery.plots import save

        loaded, pair = load_pair(asked, model, device, trust_remote_code)
        given = (
            loaded,
            in_batches(pair.clean, batch),
            None if pair.corrupted is None else in_batches(pair.corrupted, batch),
            pair.metric,
        )
        options: dict[str, Any] = {"to": to.value, "seed": seed, "progress": sys.stderr.isatty()}
        if is_path:
            found = path_patching(*given, *ends, **options, freeze_mlps=freeze_mlps)
        else:
            found = activation_patching(
                *given,
                sites=(sites or "z").split(","),
                over=(over or "layer,head").split(","),
                direction=(direction or Direction.noising).value,
                layers=layers_of(layers or "all"),
                positions=where,
                **options,
            )
        if not is_main:
            return
        out.mkdir(parents=True, exist_ok=True)
        found.to_frame().to_csv(out / "patching.csv", index=False)
        save(found.picture(tokens=pair.tokens), out / "patching")
        _report(out, model, pair, found, to.value, is_path)
        if as_json:
            write_json(_as_dict(out, found))
            return
        say(found)
        say(f"Table, picture and report: {out}")


def _as_dict(out: Path, found: Any) -> dict[str, Any]:
    runs = {"clean": float(found.clean.mean()), "corrupted": None if found.corrupted is None else float(found.corrupted.mean())}
    about = {"metric": found.metric.name, "unit": found.metric.unit, "base": found.base, "forwards": found.forwards}
    return {"out": str(out), **about, **runs, "notes": found.notes, "rows": found.to_frame().to_dict("records")}


def _report(out: Path, model: str, pair: Pair, found: Any, to: str, is_path: bool) -> None:
    """The largest effects, and what was patched with what."""
    metric, name = found.metric, Path(model).name
    what = {
        "corrupted": "what it is on the corrupted inputs",
        "zero": "zero",
        "mean": "its mean over examples and positions",
        "resample": "what it is in another example",
    }
    source = "what it is on the clean inputs" if found.base == "corrupted" else what[to]
    place = "z of one head, as one receiver alone sees it," if is_path else "the activation at one place"
    runs = f"clean {found.clean.mean():.4g}"
    if found.corrupted is not None:
        runs += f", corrupted {found.corrupted.mean():.4g}"
    text = [
        *pair.about,
        f"* {metric.name}{f' ({metric.unit})' if metric.unit else ''}: {runs}",
        f"* value: {metric.name} of the {found.base} run when {place} becomes {source}",
        f"* effect: its difference from the {found.base} run's own",
    ]
    if found.corrupted is not None:
        text.append("* recovery: 1 as the clean run, 0 as the corrupted")
    text.append(f"* cost: {found.forwards:.3g} forwards")
    table = found.top(20).dropna(axis=1, how="all")
    title = f"What passes from head to head in {name}" if is_path else f"What patching changes in {name}"
    notes = [f"* {note}" for note in found.notes]
    write_report(out, title, text, markdown_table(table, list(table.columns)), ["![patching](patching.png)"], notes)


def _numbers(text: str) -> list[int]:
    """Whole numbers with commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers, such as 4,-1.", param_hint="--positions") from None


def _heads(text: str) -> Any:
    """Senders as `path_patching` takes them."""
    return text if text == "all" else [_head(one, "--senders", "a head, such as 0.1 or self.0.1") for one in text.split(",")]


def _inputs(text: str) -> Any:
    """Receivers as `path_patching` takes them: a list for each that is written with +."""
    found: list[Any] = []
    for one in text.split(","):
        if one == "logits":
            found.append(one)
            continue
        together = []
        for part in one.split("+"):
            head, _, what = part.rpartition(".")
            if what not in ("q", "k", "v"):
                do = f"{part!r} is no head's input, such as 1.3.k or self.1.3.k, and not logits."
                raise typer.BadParameter(do, param_hint="--receivers")
            together.append((*_head(head, "--receivers", "a head's input, such as 1.3.k"), what))
        found.append(together)
    return found


def _head(text: str, option: str, expected: str) -> tuple[int | str, int]:
    """(layer or address, head) of ADDRESS.HEAD."""
    address, _, head = text.rpartition(".")
    if not address or not head.isdecimal():
        raise typer.BadParameter(f"{text!r} is not {expected}.", param_hint=option)
    return int(address) if address.isdecimal() else address, int(head)
