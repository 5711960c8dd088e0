"""What every attention head is worth for copying in context: cut its QK, then its OV, and measure the loss.

The data are sequences that say everything twice; the loss is measured where the second time follows from the first.
Nothing here knows which heads do the work, nor which model it is: heads are named by what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from surgery.analysis.looking import Pairs, Target, looks
from surgery.analysis.repeats import Copies
from surgery.anatomy import Attention
from surgery.captures import capture
from surgery.collect import collect_reference
from surgery.patch import Kernel, anatomy_of, patched
from surgery.spec import Freeze

KINDS = ("zero", "mean", "resample", "noise")
COST_SHARE = 0.1
"""The dearer cut of a named head costs at least this share of the dearest cut of all."""
LEAST_COST_NATS = 0.01
"""And at least this much, in nats per token: below it, the difference between heads is chance."""
SCORE_SHARE = 0.25
"""And its pattern score goes at least this share of the way from uniform attention's score to 1."""
SCORED_ROWS = 4
"""Sequences that pattern scores are means over."""
SHOWN_SEGMENT = 12
"""Tokens in a copy of the sequence that the pictured patterns are of."""


@dataclass(frozen=True, eq=False)
class Job:
    """One of the two parts of the induction circuit, and who was found to play it.

    scores: (layer, head), the mean attention on the position that the job is about, in [0, 1]; chance: the score of uniform
    attention. head: (row, head) into the arrays, or None. pattern: (query, key) of that head on the shown tokens, or None.
    """

    name: str
    scores: np.ndarray
    chance: float
    head: tuple[int, int] | None
    pattern: np.ndarray | None = None

    @property
    def least_score(self) -> float:
        """The score that a head needs to be named."""
        return self.chance + SCORE_SHARE * (1 - self.chance)


@dataclass(frozen=True, eq=False)
class Study:
    """What `study` measured. Arrays have shape (layer, head); NaN where a layer has fewer heads than another.

    layers: the layer of each row; a module that several layers share is one row with all of them, cut in all.
    baseline_nats: loss of the whole model, nats per token; qk_nats, ov_nats: how much freezing each head's circuit adds.
    tokens: of the sequence that the jobs' patterns show.
    """

    model: str
    layers: tuple[tuple[int, ...], ...]
    to: str
    sequences: int
    segment: int
    baseline_nats: float
    qk_nats: np.ndarray
    ov_nats: np.ndarray
    previous_token: Job
    induction: Job
    tokens: tuple[str, ...] = field(repr=False, default=())

    @property
    def previous_token_head(self) -> tuple[int, int] | None:
        """(layer, head) of the previous-token head, or None."""
        return self.place(self.previous_token.head)

    @property
    def induction_head(self) -> tuple[int, int] | None:
        """(layer, head) of the induction head, or None."""
        return self.place(self.induction.head)

    @property
    def costs_nats(self) -> np.ndarray:
        """(layer, head): what the dearer of a head's two cuts costs, nats per token."""
        return np.fmax(self.qk_nats, self.ov_nats)

    def place(self, index: tuple[int, int] | None) -> tuple[int, int] | None:
        """(layer, head) of (row, head); of a shared module, its first layer."""
        return None if index is None else (self.layers[index[0]][0], index[1])

    def heads(self) -> Iterator[tuple[int, int]]:
        """(row, head) of every head."""
        return ((int(row), int(head)) for row, head in np.argwhere(~np.isnan(self.qk_nats)))

    def as_dict(self) -> dict[str, Any]:
        """The study as plain data, for JSON: numbers of the whole, the two named heads, and every head."""
        jobs = {"previous_token": self.previous_token, "induction": self.induction}

        def named(index: tuple[int, int]) -> dict[str, Any]:
            layer, *shared = self.layers[index[0]]
            return {"layer": layer, "head": index[1]} | ({"shared_with_layers": shared} if shared else {})

        return {
            "model": self.model,
            "to": self.to,
            "sequences": self.sequences,
            "segment": self.segment,
            "baseline_nats": self.baseline_nats,
            **{f"{name}_head": None if job.head is None else named(job.head) for name, job in jobs.items()},
            **{f"{name}_score_of_uniform_attention": job.chance for name, job in jobs.items()},
            "heads": [
                {
                    **named(index),
                    "qk_nats": float(self.qk_nats[index]),
                    "ov_nats": float(self.ov_nats[index]),
                    **{f"{name}_score": float(job.scores[index]) for name, job in jobs.items()},
                }
                for index in self.heads()
            ],
        }


@torch.no_grad()
def study(
    model: nn.Module,
    copies: Copies,
    *,
    name: str = "model",
    to: str = "zero",
    reference: Sequence[Copies] = (),
    seed: int = 0,
    kernel: Kernel = "auto",
    label: Callable[[int], str] = str,
    progress: bool = True,
) -> Study:
    """Cuts every head of the main stack's self-attention, one circuit at a time, and says what each cut costs.

    to: "zero", "mean" (over `reference`, by default over `copies`), "noise", or "resample" (another sequence: give segments
      of different lengths, as patterns of repetitions at one distance are all the same). seed: of noise and resampling.
    label: a token's text. progress: a bar with the time left, on stderr.
    The model is as before afterwards. Raises SurgeryError for a model or data that the study does not fit.
    """
    device = next(model.parameters()).device
    attentions = anatomy_of(model).select(("self.*",), "study")
    shape = (len(attentions), max(a.heads for a in attentions))
    costs = {circuit: np.full(shape, np.nan) for circuit in ("qk", "ov")}
    inputs, shown = copies.inputs(device), copies.shortened(SHOWN_SEGMENT)
    with patched(model, kernel=kernel):  # the cuts below replace each other within: the model is examined once
        options: dict[str, Any] = {"to": to, "seed": seed}
        if to == "mean":
            data = [c.inputs(device) for c in reference or [copies]]
            options["reference"] = collect_reference(model, data, layers=["self.*"], progress=False)
        baseline = _loss(model, copies, inputs)
        cuts = [(row, head, circuit) for row, a in enumerate(attentions) for head in range(a.heads) for circuit in costs]
        for row, head, circuit in tqdm(cuts, desc="cutting heads", unit="cut", disable=not progress, leave=False):
            cut = Freeze(circuit, layers=attentions[row].addresses, heads=[head], **options)
            with patched(model, cut, kernel=kernel):
                costs[circuit][row, head] = _loss(model, copies, inputs) - baseline
        few, jobs = copies.rows(SCORED_ROWS), []
        pairs = {"previous-token": few.previous(), "induction": few.repeated()}
        all_scores = _scores(model, few.inputs(device), attentions, pairs, shape)
        for (job, (_, queries, _)), scores in zip(pairs.items(), all_scores, strict=True):
            chance = float((1 / (queries + 1)).mean())
            found = name_head(np.fmax(costs["qk"], costs["ov"]), scores, chance)
            # Of a shared module, the pattern in the first layer that runs it.
            pattern = None if found is None else _patterns(model, shown, attentions[found[0]], [found[1]])[0][0, 0]
            jobs.append(Job(job, scores, chance, found, None if pattern is None else pattern.numpy()))
    return Study(
        model=name,
        layers=tuple(tuple(int(a.rpartition(".")[2]) for a in attention.addresses) for attention in attentions),
        to=to,
        sequences=copies.ids.shape[0],
        segment=int(copies.lengths.max()),
        baseline_nats=baseline,
        qk_nats=costs["qk"],
        ov_nats=costs["ov"],
        previous_token=jobs[0],
        induction=jobs[1],
        tokens=tuple(label(int(i)) for i in shown.ids[0]),
    )


def name_head(costs: np.ndarray, scores: np.ndarray, chance: float) -> tuple[int, int] | None:
    """The head that does a job, by measurement alone: it looks where the job needs it, and cutting it costs most.

    costs: (layer, head), the dearer of a head's two cuts; scores: (layer, head), of its pattern; NaN where there is no head.
    Of the heads whose score goes a quarter of the way from `chance` (uniform attention) to 1, the one with the highest cost;
    None if there is no such head, or if that is less than a tenth of the highest cost of all, or than 0.01 nats per token.
    (The QK cut alone would miss a head that looks by position only when it is resampled: its pattern is the same elsewhere.)
    """
    right = scores >= chance + SCORE_SHARE * (1 - chance)
    if not right.any():
        return None
    row, head = np.unravel_index(np.argmax(np.where(right, costs, -np.inf)), costs.shape)
    return (int(row), int(head)) if costs[row, head] >= least_cost(costs) else None


def least_cost(costs: np.ndarray) -> float:
    """What cutting a head must cost for it to be named, in the units of costs (layer, head)."""
    return max(LEAST_COST_NATS, COST_SHARE * float(np.nanmax(costs)))


def _loss(model: nn.Module, copies: Copies, inputs: Mapping[str, Tensor]) -> float:
    """Mean loss in nats per token, where the first copy determines the next token."""
    ids = inputs["input_ids"]
    scored = copies.scored.to(ids.device)
    logits = model(**inputs, use_cache=False).logits[scored]
    return float(nn.functional.cross_entropy(logits.float(), ids.roll(-1, dims=1)[scored]))


def _scores(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    attentions: Sequence[Attention],
    pairs: Mapping[str, Pairs],
    shape: tuple[int, int],
) -> np.ndarray:
    """(job, layer, head): the mean attention from each query to its key; of a shared module, over its layers."""
    targets = [Target(name, inputs["input_ids"].shape[1], *own) for name, own in pairs.items()]
    found = looks(model, inputs, {a.address: targets for a in attentions}, attentions, chance=False)
    scores = np.full((len(targets), *shape), np.nan)
    for row, attention in enumerate(attentions):
        scores[:, row, : attention.heads] = found.scores[attention.address]
    return scores


def _patterns(model: nn.Module, copies: Copies, attention: Attention, heads: Any) -> list[Tensor]:
    """The patterns (batch, head, query, key) of one attention, one tensor for each layer that runs it."""
    device = next(model.parameters()).device
    with capture(model, ["pattern"], layers=attention.addresses, heads=heads, detach=True) as run:
        model(**copies.inputs(device), use_cache=False)
    return [pattern.float().cpu() for pattern in run.steps(attention.address, "pattern")]
