"""`surgery importance`: which heads matter, without a sweep: a table, pictures and a short report."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.commands.data import Layers, Seed, layers_of
from surgery.commands.pairs import (
    Answer,
    Asked,
    Clean,
    Corrupted,
    CorruptedInputs,
    MetricName,
    MetricOption,
    Pair,
    PairInputs,
    Rows,
    Wrong,
    load_pair,
)
from surgery.commands.report import markdown_table, write_report
from surgery.commands.shared import Debug, Device, Json, Model, Trust, listed, messages, say, together, working, write_json


class Method(StrEnum):
    """How scores are made."""

    ablation = "ablation"
    atp = "atp"
    atp_star = "atp*"
    ig = "ig"


class To(StrEnum):
    """What takes a circuit's place."""

    corrupted = "corrupted"
    zero = "zero"
    mean = "mean"


def importance(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for importance.csv, report.md, pictures (.png, .pdf).")],
    clean: Clean = None,
    corrupted: Corrupted = None,
    inputs: PairInputs = None,
    corrupted_inputs: CorruptedInputs = None,
    answer: Answer = None,
    wrong: Wrong = None,
    metric: MetricOption = None,
    method: Annotated[
        Method, typer.Option(help="ablation does it; atp, atp* and ig estimate it, from few forwards and backwards.")
    ] = Method.atp_star,
    to: Annotated[
        To, typer.Option(help="What takes the place of a circuit; corrupted takes it from the other run.")
    ] = To.corrupted,
    circuits: Annotated[
        str, typer.Option(help="qk, q, k, ov, v; several with commas.", autocompletion=listed("qk", "q", "k", "ov", "v"))
    ] = "qk,ov",
    layers: Layers = "all",
    verify_top: Annotated[int, typer.Option(min=0, help="Largest estimates to confirm by doing it.")] = 10,
    sample: Annotated[int, typer.Option(min=0, help="Others to confirm, drawn at random, which bounds what was missed.")] = 10,
    given: Annotated[Path | None, typer.Option(help="A spec with cuts that the model has meanwhile.")] = None,
    edges: Annotated[bool, typer.Option("--edges", help="Also from head to head: edges.csv and a picture.")] = False,
    rows: Rows = 16,
    seed: Seed = 0,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score each head's QK and OV by how a metric changes when they are those of other inputs, without a sweep.

    Clean and corrupted inputs are two texts or two files; without any, random tokens that are said twice, in which case the
    corrupted ones say the first time backwards. Estimates are linear or nearly so, and can be far off where a norm or a softmax
    is not: the report says how they compare with the exact changes of those that are confirmed.
    """
    asked = Asked(clean, corrupted, inputs, corrupted_inputs, metric, answer, wrong, rows, seed)
    asked.check(needs_corrupted=to is To.corrupted)
    if metric is MetricName.kl and method in (Method.atp, Method.atp_star):
        raise typer.BadParameter("It has no slope where nothing is changed yet; use ig or ablation.", param_hint="--metric kl")
    with messages(debug), together() as is_main:
        from surgery.analysis import head_importance
        from surgery.plots import save
        from surgery.spec import Spec

        cuts = None if given is None else Spec.load(given)
        loaded, pair = load_pair(asked, model, device, trust_remote_code)
        with working("Scoring heads") if is_main else nullcontext():
            found = head_importance(
                loaded,
                pair.clean,
                pair.corrupted,
                pair.metric,
                method.value,
                circuits=circuits.split(","),
                to=to.value,
                layers=layers_of(layers),
                verify_top=verify_top,
                sample=sample,
                given=cuts,
                edges=edges,
                seed=seed,
            )
        if not is_main:
            return
        out.mkdir(parents=True, exist_ok=True)
        found.frame.to_csv(out / "importance.csv", index=False)
        save(found.picture(), out / "heads")
        is_verified = method is not Method.ablation and bool(found.frame.exact.notna().any())
        if is_verified:
            save(found.against_exact(), out / "exact")
        if found.edges is not None:
            found.edges.to_csv(out / "edges.csv", index=False)
            save(found.edge_picture(), out / "edges")
        _report(out, model, pair, found, to.value, given, is_verified)
        if as_json:
            write_json(_as_dict(out, found))
            return
        say(found)
        say(f"Table, pictures and report: {out}")


def _as_dict(out: Path, found: Any) -> dict[str, Any]:
    names = ("method", "metric", "unit", "baseline", "forwards", "backwards", "correlation", "missed", "bound", "notes")
    data = {"out": str(out), **{name: getattr(found, name) for name in names}, "rows": found.frame.to_dict("records")}
    return data if found.edges is None else {**data, "edges": found.edges.to_dict("records")}


def _report(out: Path, model: str, pair: Pair, found: Any, to: str, given: Path | None, is_verified: bool) -> None:
    """The largest scores, what they cost, and how far they can be trusted."""
    places = {"corrupted": "those of the corrupted inputs", "zero": "zero", "mean": "their mean over examples and positions"}
    unit = f" ({found.unit})" if found.unit else ""
    how = "by doing it" if found.method == "ablation" else f"estimated by {found.method}"
    text = [
        *pair.about,
        f"* score: the change of {found.metric}{unit} when a circuit's activations become {places[to]}, {how}",
        f"* {found.metric} as it is: {found.baseline:.4g}",
        f"* cost: {found.forwards:.3g} forwards and {found.backwards:.3g} backwards",
    ]
    if found.frame.dropped.notna().any():
        text.append("* dropped: the same with one layer at a time held fixed, which finds ways that cancel (GradDrop)")
    if given is not None:
        text.append(f"* cuts that the model has meanwhile: `{given}`")
    table = found.top(20).dropna(axis=1, how="all")
    if found.method == "ablation":
        table = table.drop(columns=["magnitude", "exact"])  # the score's size, and the score
    pictures = ["![heads](heads.png)"]
    trust = []
    if is_verified:
        count = int(found.frame.exact.notna().sum())
        trust.append(
            f"{count} were confirmed by doing it. Rank correlation (Spearman) of magnitudes with the sizes of exact changes: "
            f"{found.correlation:.3f}."
        )
        pictures += ["", "![estimates against exact](exact.png)"]
    if found.frame.exact.isna().sum() and found.sampled:
        trust.append(
            f"Of {len(found.sampled)} that were not among the largest, drawn at random, none changes more than "
            f"{found.missed:.3g}; at most {found.bound:.0%} of the rest do (95 % confidence)."
        )
    parts: list[list[str]] = []
    if found.edges is not None:
        best = found.edges.loc[found.edges.score.abs().sort_values(ascending=False, kind="stable").index].head(10)
        parts = [
            ["## Edges, to first order"],
            ["A receiver that is sure of where it looks has little first order in q and k. On the same inputs this does it:"],
            [f"    surgery patching {model} --out paths{_doing(best)}"] if len(best) else [],
            markdown_table(best, list(best.columns)),
            ["![edges](edges.png)"],
        ]
    title = f"Which heads of {Path(model).name} matter"
    notes = [f"* {note}" for note in found.notes]
    write_report(out, title, text, markdown_table(table, list(table.columns)), trust, pictures, *parts, notes)


def _doing(edges: Any) -> str:
    """The options of `surgery patching` for the first of some edges, into all inputs of its receiver."""
    first = edges.iloc[0]
    receiver = f"{first.to_address}.{first.to_head}"
    return f" --senders {first.address}.{first['head']} --receivers {receiver}.q,{receiver}.k,{receiver}.v"
