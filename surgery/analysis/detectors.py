"""Heads known by where they look: previous-token, duplicate-token, induction and sink heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.looking import JOBS, Target, looks
from surgery.analysis.repeats import random_copies
from surgery.analysis.tables import as_html, as_text
from surgery.analysis.targets import is_encoder_decoder, unpadded
from surgery.anatomy import Attention, grouped
from surgery.errors import SpecError, closest, describe, listing
from surgery.patch import anatomy_of
from surgery.plots import head_maps
from surgery.plots.style import short
from surgery.spec import Freeze

SEQUENCES = 8
"""Of random tokens, if there are no data."""


class Detected:
    """What `detect_heads` found.

    frame: a row for each head and job. address, head, job, score, chance (the score of uniform attention over what the mask
    allows), share (how far the score goes from chance to 1, (score - chance) / (1 - chance); NaN where chance is 1).
    examples: sequences. notes: what was left out, and why.
    """

    def __init__(self, frame: pd.DataFrame, examples: int, notes: Sequence[str]) -> None:
        self.frame, self.examples, self.notes = frame, examples, list(notes)

    def __repr__(self) -> str:
        parts = [f"{self.examples} sequences; the three highest scores of each job:"]
        parts += [as_text(pd.concat([self.top(3, job) for job in self.jobs])[["job", "address", "head", "score", "chance"]])]
        return "\n".join(parts + [f"left out: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        return as_html(pd.concat([self.top(3, job) for job in self.jobs]))

    @property
    def jobs(self) -> list[str]:
        return list(dict.fromkeys(self.frame.job))

    def top(self, count: int = 10, job: str = "induction") -> pd.DataFrame:
        """The heads with the highest scores of a job. Raises SpecError for a job that was not looked for."""
        return self._of(job).sort_values("score", ascending=False, kind="stable").head(count)

    def matrix(self, job: str, column: str = "score") -> pd.DataFrame:
        """Layers (addresses) × heads."""
        return self._of(job).pivot_table(index="address", columns="head", values=column, sort=False, dropna=False)

    def picture(self, jobs: Sequence[str] | None = None) -> Figure:
        """Heat maps of the scores over layer × head, one scale from 0 to 1 for all jobs."""
        chosen = list(jobs or self.jobs)
        maps = {job.capitalize(): self.matrix(job) for job in chosen}
        return head_maps(
            {name: table.to_numpy() for name, table in maps.items()},
            layers=[short(address) for address in next(iter(maps.values())).index],
            title="Where heads look",
            subtitle=f"{self.examples} sequences",
            unit="mean attention",
            limits=(0.0, 1.0),
        )

    def _of(self, job: str) -> pd.DataFrame:
        if job not in self.jobs:
            expected = f"one of {', '.join(map(repr, self.jobs))}"
            raise SpecError(describe("detect_heads", f"job {job!r}", expected, closest(job, self.jobs) or "Choose of these."))
        return self.frame[self.frame.job == job]


def detect_heads(
    model: nn.Module,
    data: Any = None,
    layers: Any = None,
    heads: Any = "all",
    *,
    jobs: Sequence[str] = tuple(JOBS),
    seed: int = 0,
    tokenizer: Any = None,
) -> Detected:
    """Scores in [0, 1] of every head for jobs that are known by where a head looks.

    With A the pattern (query t, key s), x the tokens and the mean over all t of all sequences that have such a key, padding
    left out:

    * "previous token": mean of A[t, t - 1].
    * "duplicate token": mean over t whose token was there before of the sum of A[t, s] over s < t with x[s] = x[t] (Wang et
      al. 2022, Interpretability in the Wild, arXiv:2211.00593).
    * "induction": mean over the same t of the sum of A[t, s + 1] over s + 1 < t with x[s] = x[t]: prefix matching (Olsson et
      al. 2022, In-context Learning and Induction Heads, there on random tokens said several times, as here without data).
    * "sink": mean over t behind the first token of A[t, first], mostly BOS (Xiao et al. 2023, Efficient Streaming Language
      Models with Attention Sinks, arXiv:2309.17453).

    Each comes with the score that uniform attention has on the same data (chance), by a forward with it. Where some of the
    attention goes to a learned sink that is no token, rows sum to less than 1, and so do scores.

    data: token ids, a mapping of inputs, or several; None: random tokens said twice (`random_copies`, of tokenizer and seed),
      on which the scores are those of the literature. layers: of self-attention; None for that of the text.
    Of an encoder-decoder, the decoder's heads are scored on decoder_input_ids alone. What cannot be scored is named in notes.
    Raises NoMatchError or SpecError for selections that do not fit the model.
    """
    if (unknown := [job for job in jobs if job not in JOBS]) or not jobs:
        hint = "".join(closest(job, JOBS) for job in unknown)
        raise SpecError(
            describe("jobs", f"{unknown or 'none'}", f"of {', '.join(map(repr, JOBS))}", hint or "Choose of these.")
        )
    anatomy = anatomy_of(model, strict=False)
    checked = Freeze("qk", "all" if layers is None else layers, heads)
    chosen = anatomy.select(checked.layers, "detect_heads")
    if layers is None:
        chosen = [a for a in chosen if a.kind == "self" and a.address.rpartition("self.")[0] in ("", "encoder.", "decoder.")]
    numbers = None if checked.heads == "all" else list(checked.heads)
    if problems := grouped((a, text) for a in chosen for text in a.beyond(checked.heads)):
        raise SpecError(listing("detect_heads", problems))
    given = batches(model, _copies(model, seed, tokenizer) if data is None else data)
    notes = dict.fromkeys(f"{a.address}: its keys are of another sequence" for a in chosen if a.kind == "cross")
    chosen = [a for a in chosen if a.kind == "self"]
    totals: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for batch in given:
        targets = {}
        for a in chosen:
            if (own := _targets(model, batch, a, jobs)) is None:
                notes[f"{a.address}: the data have no {_side(model, a)}input_ids"] = None
            else:
                targets[a.address] = own
        found = looks(model, batch, targets, [a for a in chosen if a.address in targets], numbers)
        notes.update(dict.fromkeys(f"{address}: {why}" for address, why in found.missing.items()))
        for address, scores in found.scores.items():
            weights = torch.tensor([float(target.queries) for target in targets[address]], dtype=torch.float64)
            totals.setdefault(address, []).append((weights, scores, found.chance[address]))
    if not totals:
        do = "Pass layers=, or data with token ids."
        raise SpecError(describe("detect_heads", "; ".join(notes) or "no self-attention", "heads that read tokens", do))
    return Detected(_frame(totals, jobs, numbers), sum(rows_of(batch) for batch in given), list(notes))


def _copies(model: Any, seed: int, tokenizer: Any) -> Batch:
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        found = f"a {type(model).__name__}, which reads {model.main_input_name}, and no data"
        raise SpecError(
            describe("detect_heads", found, "a model of text, or data", "Pass inputs with the decoder's token ids.")
        )
    inputs = random_copies(model, SEQUENCES, seed=seed, tokenizer=tokenizer).inputs()
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _targets(model: Any, batch: Mapping[str, Any], attention: Attention, jobs: Sequence[str]) -> list[Target] | None:
    """The targets of an attention's tokens; None if the batch does not have them."""
    ids, mask = (batch.get(f"{_side(model, attention)}{name}") for name in ("input_ids", "attention_mask"))
    if not isinstance(ids, Tensor):
        return None
    present = unpadded(mask, ids)
    return [Target(job, ids.shape[1], *JOBS[job](ids, present)) for job in jobs]


def _side(model: Any, attention: Attention) -> str:
    """What the names of an attention's own inputs begin with."""
    return "decoder_" if attention.address.startswith("decoder.") and is_encoder_decoder(model) else ""


def _frame(totals: Mapping[str, Any], jobs: Sequence[str], numbers: Sequence[int] | None) -> pd.DataFrame:
    """Means over batches, weighted by their queries."""
    rows = []
    for address, parts in totals.items():
        weights = torch.stack([weight for weight, _, _ in parts])[..., None]
        total = weights.sum(0)
        scores, chance = (
            (torch.stack([part[i] for part in parts]).nan_to_num() * weights).sum(0).div(total).numpy() for i in (1, 2)
        )
        for number, job in enumerate(jobs):
            for place, head in enumerate(numbers if numbers is not None else range(scores.shape[1])):
                score, least = float(scores[number, place]), float(chance[number, place])
                share = (score - least) / (1 - least) if least < 1 else np.nan
                rows.append({"address": address, "head": head, "job": job, "score": score, "chance": least, "share": share})
    return pd.DataFrame(rows)
