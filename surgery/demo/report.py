"""A study in words, as a table, and as one picture."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from surgery.demo.study import Job, Study, least_cost
from surgery.plots import Named, heatmaps

LONGEST_TABLE = 32
"""Heads; of a larger model the table shows this many, the dearest first."""
LOOKS_AT = {"previous-token": "the token before", "induction": "the token that followed the same token last time"}


def table(study: Study) -> Table:
    """What each head's cuts cost and how much its pattern is that of the two jobs. The named heads stand out."""
    order = list(study.heads())
    title = f"What freezing a head to {study.to} costs"
    if len(order) > LONGEST_TABLE:
        title += f" (the dearest {LONGEST_TABLE} of {len(order)} heads)"
        order = sorted(order, key=lambda index: -study.costs_nats[index])[:LONGEST_TABLE]
    found = Table(title=title, title_justify="left")
    found.add_column("head")
    names = ("QK frozen\n(Δ nats)", "OV frozen\n(Δ nats)", "previous-token\nscore", "induction\nscore")
    for name in names:
        found.add_column(name, justify="right")
    styles = {study.previous_token.head: "bold blue", study.induction.head: "bold green"}
    for index in order:
        layers = ",".join(map(str, study.layers[index[0]]))
        cells = (_signed(study.qk_nats[index]), _signed(study.ov_nats[index]))
        scores = (f"{job.scores[index]:.3f}" for job in (study.previous_token, study.induction))
        found.add_row(f"L{layers} H{index[1]}", *cells, *scores, style=styles.get(index))
    return found


def lines(study: Study) -> list[str]:
    """What the numbers are measured on, and who the two heads are."""
    sequences = f"{study.sequences} sequence{'s' * (study.sequences != 1)} of {study.segment} tokens said twice"
    loss = f"{study.baseline_nats:.4f} nats per token of the second copy"
    data = f"Measured on {sequences} ({study.model}), where the loss without cuts is {loss}."
    return [data, *(_sentence(study, job) for job in (study.previous_token, study.induction))]


def _sentence(study: Study, job: Job) -> str:
    """Who does a job and what cutting it costs; or that nobody does, and how near the best one came."""
    looks_at = LOOKS_AT[job.name]
    head = job.head
    if head is not None:
        return (
            f"{job.name.capitalize()} head: {_name(study, head)}. Freezing where it looks (QK) costs "
            f"{_signed(study.qk_nats[head])} nats per token, freezing what it moves (OV) {_signed(study.ov_nats[head])}. "
            f"It puts {job.scores[head]:.1%} of its attention on {looks_at} (uniform attention: {job.chance:.1%})."
        )
    row, best = np.unravel_index(np.nanargmax(job.scores), job.scores.shape)
    index = (int(row), int(best))
    return (
        f"{job.name.capitalize()} head: none found. {_name(study, index).capitalize()} looks most at {looks_at}: "
        f"{job.scores[index]:.1%} of its attention (needed: {job.least_score:.1%}), and the dearer of its cuts costs "
        f"{_signed(study.costs_nats[index])} nats per token (needed: {least_cost(study.costs_nats):.3f})."
    )


def picture(study: Study) -> Figure:
    """Heat maps of both circuits' costs, and the patterns of the named heads."""
    jobs = (study.previous_token, study.induction)
    named = [Named(job.name.capitalize(), *job.head, job.pattern) for job in jobs if job.head is not None]
    return heatmaps(
        study.qk_nats,
        study.ov_nats,
        layers=[", ".join(map(str, layers)) for layers in study.layers],
        named=named,
        tokens=study.tokens,
        divider=(len(study.tokens) + 1) // 2,
        title="What each attention head is worth for copying in context",
        subtitle=f"{study.model} · frozen to {study.to} · loss without cuts {study.baseline_nats:.4f} nats per token",
    )


def _signed(nats: float) -> str:
    """A change of the loss: "+0.123"; "0.000" has no sign."""
    text = f"{nats:+.3f}"
    return text[1:] if float(text) == 0 else text


def _name(study: Study, index: tuple[int, int]) -> str:
    row, head = index
    layers = study.layers[row]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} head {head}"
