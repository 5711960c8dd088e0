"""Findings on a model whose circuit is known (tests/planted.py): each number is algebra on the weights, none is the library's.

On a prompt BOS a1 .. a6 a1 .. a5 the answer is a6. At the last position, t = 11, the induction head gives HIT / (HIT + 11),
9/20, of its weight to the one match, a6 at 6, so that a6 has 9 logits more than a token that is not there; uniform attention
would give it 20 / 12. MARK has MOVED · 22/33 = 4 logits by the mover alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from planted import (
    BOS,
    COPIED,
    HEADS,
    HIT,
    INDUCTION,
    LAYERS,
    LOOKER,
    MARK,
    MOVED,
    MOVER,
    PREVIOUS_TOKEN,
    SINK,
    TWIN,
    VOCAB,
    planted,
    prompts,
    unused,
)
from torch import Tensor

from surgery import Edit, Freeze
from surgery.analysis import (
    ablation_study,
    activation_patching,
    composition,
    copying_scores,
    cumulative_ablation,
    detect_heads,
    direct_logit_attribution,
    discover_vector,
    head_importance,
    metrics,
    path_patching,
    verify_effect,
)
from surgery.analysis.repeats import random_copies

EXACT = 1e-11
"""float64, numbers up to 20: rounding of sums of some dozen terms."""
IDS = prompts()
ANSWER, OTHER = IDS[:, 6], unused(IDS)
T = IDS.shape[1] - 1
CIRCUITS = ("qk", "q", "k", "ov", "v")
ALL_HEADS = [(f"self.{layer}", head) for layer in range(LAYERS) for head in range(HEADS)]
Head = tuple[str, int]

COPY = metrics.logit_difference(ANSWER, OTHER)
MARKED = metrics.logit_difference(MARK, OTHER)

# What each cut changes, of COPY and MARKED, by the weights.
ON_MATCH = HIT / (HIT + T)
INTACT, UNIFORM = COPIED * ON_MATCH, COPIED / (T + 1)
ON_BOS = SINK / (SINK + T)
SLOPE = -COPIED * ON_MATCH * (1 - ON_MATCH) * math.log(HIT)
"""Of COPY by a factor of the match's score, from 1 towards 0: all that a first order sees of QK of the induction head."""


def smeared() -> tuple[list[float], float]:
    """How much of the token at T is in PREVIOUS at each key when the previous-token head attends uniformly, and COPY then."""
    share = [sum(j in (5, T) for j in range(s + 1)) / (s + 1) for s in range(T + 1)]  # the token at 11 is that at 5
    weights = [HIT**x for x in share]
    return share, COPIED * weights[6] / sum(weights)


SMEARED, UNDER_SMEARED = smeared()
assert (INTACT, UNIFORM, ON_BOS) == (9.0, 5 / 3, 2 / 3) and 1.9 < UNDER_SMEARED < 1.92, "the numbers of this page"


def scores_of(frame: Any, column: str = "score") -> dict[tuple[str, int, str], float]:
    """(address, head, circuit) to a column."""
    return {(row.address, row.head, row.circuit): getattr(row, column) for row in frame.itertuples()}


def assert_numbers(found: dict[Any, float], expected: dict[Any, float], tolerance: float = EXACT) -> None:
    """These, and 0 everywhere else. What is expected must have been measured."""
    assert set(expected) <= set(found)
    for key, value in found.items():
        assert value == pytest.approx(expected.get(key, 0.0), abs=tolerance), key


def logits_by_hand(ids: Tensor) -> np.ndarray:
    """(example, position, token), by loops over the docstring of tests/planted.py."""
    found = np.zeros((*ids.shape, VOCAB))
    for row, tokens in enumerate(ids.tolist()):
        for t, token in enumerate(tokens):
            weights = [HIT if tokens[max(s - 1, 0)] == token else 1.0 for s in range(t + 1)]
            for s, weight in enumerate(weights):
                found[row, t, tokens[s]] += COPIED * weight / sum(weights)
            found[row, t, MARK] += MOVED * SINK / (SINK + t)
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_is_what_its_page_says(implementation: str) -> None:
    with torch.no_grad():
        logits = planted(implementation=implementation)(IDS).logits
    np.testing.assert_allclose(logits.numpy(), logits_by_hand(IDS), atol=EXACT)


# -- ablation -----------------------------------------------------------------------------------------------------------

COPY_CUTS = {
    (*INDUCTION, "qk"): UNIFORM - INTACT,
    (*INDUCTION, "ov"): -INTACT,
    (*INDUCTION, "both"): -INTACT,
    (*PREVIOUS_TOKEN, "qk"): UNDER_SMEARED - INTACT,
    (*PREVIOUS_TOKEN, "ov"): UNIFORM - INTACT,  # nothing in PREVIOUS, so no match
    (*PREVIOUS_TOKEN, "both"): UNIFORM - INTACT,
}
MARK_CUTS = {
    (*MOVER, "qk"): MOVED * (1 / (T + 1) - ON_BOS),  # -3.5
    (*MOVER, "ov"): -MOVED * ON_BOS,  # -4
    (*MOVER, "both"): -MOVED * ON_BOS,
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_ablation_study_has_these_effects_and_no_others(implementation: str) -> None:
    study = ablation_study(planted(implementation=implementation), IDS, metrics=[COPY, _named("mark", MARKED)], progress=False)
    frame = study.frame
    assert len(frame) == 8 * 3 * 2 and not study.notes
    assert_numbers(scores_of(frame[frame.metric == "logit difference"], "effect"), COPY_CUTS)
    assert_numbers(scores_of(frame[frame.metric == "mark"], "effect"), MARK_CUTS)
    assert study.baseline_of("logit difference") == pytest.approx(INTACT, abs=EXACT)
    looked = frame[(frame.address == LOOKER[0]) & (frame["head"] == LOOKER[1])]
    assert (looked.effect == 0).all() and (looked.p == 1).all(), "it looks sharply, and moves nothing: not a bit changes"
    hit = frame[frame.effect.abs() > 1]
    assert len(hit) == 9 and (hit.p == 2 / 2**6).all(), "six examples that all move one way: the least that sign flips give"
    assert (hit.low <= hit.effect).all() and (hit.effect <= hit.high).all()
    # 24 tests of each metric, of which 6 (or 3) have the least p-value: Benjamini and Hochberg's 24 / 6 (24 / 3) of it.
    assert hit[hit.metric == "mark"].p_fdr.tolist() == pytest.approx([2 / 2**6 * 8] * 3)
    assert hit[hit.metric != "mark"].p_fdr.tolist() == pytest.approx([2 / 2**6 * 4] * 6)


def _named(name: str, metric: metrics.Metric) -> metrics.Metric:
    return metrics.Metric(name, metric.unit, metric.function, metric.positions)


def test_cuts_of_groups_and_means() -> None:
    """The mover and the induction head write to different logits, so that their cuts add up; those of a circuit do not."""
    between = metrics.logit_difference(ANSWER, MARK)
    order = [MOVER, INDUCTION, PREVIOUS_TOKEN]
    found = cumulative_ablation(planted(), IDS, order, "ov", metrics=between, progress=False).frame
    assert found.effect.tolist() == pytest.approx([4.0, 4.0 - 9.0, 4.0 - 9.0], abs=EXACT)
    mean = ablation_study(planted(), IDS, "ov", [0], [1], to="mean", metrics=MARKED, progress=False).frame
    average = np.mean([SINK / (SINK + t) for t in range(T + 1)])  # of z over positions, BOS among them
    assert mean.effect.item() == pytest.approx(MOVED * (average - ON_BOS), abs=EXACT)


# -- importance ---------------------------------------------------------------------------------------------------------


def _both(ov: float, qk: float, head: Head) -> dict[Any, float]:
    """Numbers of all five circuits, for a head with one token in each score: q or k alone does what both do, v what z does."""
    return {**{(*head, name): qk for name in ("qk", "q", "k")}, **{(*head, name): ov for name in ("ov", "v")}}


STAR_PREVIOUS = (
    COPIED
    * math.log(HIT)
    * sum((ON_MATCH if s == 6 else 1 / (HIT + T)) * ((s == 6) - ON_MATCH) * (SMEARED[s] - (s == 6)) for s in range(T + 1))
)
"""The softmax of the previous-token head again, and that of the induction head to first order."""

TO_ZERO = {
    "ablation": {
        **_both(-INTACT, UNIFORM - INTACT, INDUCTION),
        **_both(UNIFORM - INTACT, UNDER_SMEARED - INTACT, PREVIOUS_TOKEN),
    },
    # Saturated attention has no slope: the previous-token head's QK, of which the whole behaviour hangs, scores 0.
    "atp": {**_both(-INTACT, SLOPE, INDUCTION), **_both(SLOPE, 0.0, PREVIOUS_TOKEN)},
    "atp*": {**_both(-INTACT, UNIFORM - INTACT, INDUCTION), **_both(SLOPE, STAR_PREVIOUS, PREVIOUS_TOKEN)},
}


@pytest.mark.parametrize("method", TO_ZERO)
def test_importance_of_a_cut_to_zero(method: str) -> None:
    found = head_importance(planted(), IDS, None, COPY, method, circuits=CIRCUITS, to="zero")
    assert_numbers(scores_of(found.frame), TO_ZERO[method])
    assert found.baseline == pytest.approx(INTACT, abs=EXACT) and len(found.frame) == 8 * 5


def test_integrated_gradients_are_exact_where_the_path_is_smooth_and_need_steps_where_it_is_steep() -> None:
    """Each layer has one head that the metric depends on, so that a path is that of its cut alone."""
    model, expected = planted(), TO_ZERO["ablation"]
    steep = [(*PREVIOUS_TOKEN, name) for name in ("qk", "q", "k")]
    found = scores_of(head_importance(model, IDS, None, COPY, "ig", circuits=CIRCUITS, to="zero").frame)
    smooth = {key: value for key, value in found.items() if key not in steep}
    # Eight points of Gauss and Legendre leave 1e-6 of the integral of a logistic curve of ln 9.
    assert_numbers(smooth, {key: value for key, value in expected.items() if key in smooth}, 1e-5)
    # Scores from 60 to 0: the pattern is a step near α = 0.96, of which eight points see too little.
    assert all(abs(found[key] - expected[key]) > 1 for key in steep)
    many = head_importance(model, IDS, None, COPY, "ig", circuits="qk", to="zero", layers=[0], steps=64)
    assert_numbers(scores_of(many.frame), {steep[0]: expected[steep[0]]}, 1e-3)


@pytest.mark.parametrize("method", ["ablation", "atp", "atp*", "ig"])
def test_importance_of_the_mover(method: str) -> None:
    """OV is linear to the logits, so that all methods agree; QK is a softmax, of which plain attribution has the slope."""
    found = head_importance(planted(), IDS, None, MARKED, method, circuits=CIRCUITS, to="zero")
    slope = -MOVED * ON_BOS * (1 - ON_BOS) * math.log(SINK)
    expected = _both(-4.0, slope if method == "atp" else -3.5, MOVER)
    assert_numbers(scores_of(found.frame), expected, 1e-5 if method == "ig" else EXACT)
    if method == "atp*":  # without the other layer the effect, which is direct, is the same; without its own there is none
        assert_numbers(scores_of(found.frame, "dropped"), {key: abs(value) for key, value in expected.items()})
    mean = head_importance(planted(), IDS, None, MARKED, method, circuits="ov", to="mean", layers=[0])
    average = np.mean([SINK / (SINK + t) for t in range(T + 1)])
    assert_numbers(scores_of(mean.frame), {(*MOVER, "ov"): MOVED * (average - ON_BOS)})


def test_plain_attribution_is_blind_to_a_saturated_head_and_the_softmax_again_is_exact() -> None:
    """A match of e^40: the pattern is one-hot, the slope e^-40, and all the behaviour hangs on it."""
    model, exact = planted(match=40.0), COPIED * (1 / (T + 1) - 1)
    found = {
        method: scores_of(
            head_importance(model, IDS, None, COPY, method, circuits=("qk", "q", "k"), layers=[1], to="zero").frame
        )
        for method in ("ablation", "atp", "atp*")
    }
    for name in ("qk", "q", "k"):
        key = (*INDUCTION, name)
        assert found["ablation"][key] == pytest.approx(exact, abs=EXACT) and exact < -18
        assert abs(found["atp"][key]) < 1e-11, "a hundred billionth of the effect"
        assert found["atp*"][key] == pytest.approx(exact, abs=EXACT)
    corrupted, other = _without_the_match()
    metric = metrics.logit_difference(ANSWER, other)
    keys = {
        method: scores_of(head_importance(model, IDS, corrupted, metric, method, circuits=("k", "ov")).frame)
        for method in ("ablation", "atp", "atp*")
    }
    assert keys["ablation"][*INDUCTION, "k"] == pytest.approx(exact, abs=EXACT)
    assert abs(keys["atp"][*INDUCTION, "k"]) < 1e-11
    assert keys["atp*"][*INDUCTION, "k"] == pytest.approx(exact, abs=EXACT)
    assert abs(keys["atp*"][*PREVIOUS_TOKEN, "ov"]) < 1e-11 < -keys["ablation"][*PREVIOUS_TOKEN, "ov"], (
        "AtP* repairs the softmax of a head for that head alone: what earlier heads send through it still has no slope"
    )


def test_edges_and_heads_that_are_cut_already() -> None:
    found = head_importance(planted(), IDS, None, COPY, "atp", circuits="ov", to="zero", edges=True).edges
    assert found is not None
    edges = {((r.address, r.head), (r.to_address, r.to_head), r.input): r.score for r in found.itertuples()}
    assert_numbers(edges, {(PREVIOUS_TOKEN, INDUCTION, "k"): SLOPE})
    cut = Freeze("ov", layers=[0], heads=[0])
    given = head_importance(planted(), IDS, None, COPY, "ablation", to="zero", given=cut)
    assert given.baseline == pytest.approx(UNIFORM, abs=EXACT)
    assert_numbers(scores_of(given.frame), {(*INDUCTION, "ov"): -UNIFORM})  # there is no match that its QK could find


# -- patching -----------------------------------------------------------------------------------------------------------


def _without_the_match() -> tuple[Tensor, Tensor]:
    """Prompts whose token at 5 is another, so that a5 at the end has no match; and tokens that neither prompt has."""
    corrupted = IDS.clone()
    corrupted[:, 5] = OTHER
    return corrupted, unused(torch.cat([IDS, OTHER[:, None]], 1))


def patched_at(found: Any, key: str, view: str = "effect") -> dict[tuple[str, int, int], float]:
    """(address, head, position) to a number."""
    array = getattr(found, view)(key)
    return {(r.layer, r.head, r.position): r[-1] for r in array.to_frame().itertuples(index=False)}


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_activation_patching_finds_the_way_of_the_match(direction: str) -> None:
    """From the token at 5 by v and z of the previous-token head into the key at 6, and so the pattern and z at the end."""
    corrupted, other = _without_the_match()
    change = UNIFORM - INTACT if direction == "noising" else INTACT - UNIFORM
    sites = ("rot_q", "rot_k", "v", "pattern", "z", "result")
    metric = metrics.logit_difference(ANSWER, other)
    found = activation_patching(planted(), IDS, corrupted, metric, sites, direction=direction, progress=False)
    assert (found.clean.mean(), found.corrupted.mean()) == pytest.approx((INTACT, UNIFORM), abs=EXACT)
    ends = {(*PREVIOUS_TOKEN, 6), (*INDUCTION, T)}
    carriers = {
        "rot_q": set(),
        "rot_k": {(*INDUCTION, 6)},
        "v": {(*PREVIOUS_TOKEN, 5)},  # v at 5 of the induction head is another token, too, which is not the answer
        "pattern": {(*INDUCTION, T)},
        "z": ends,
        "result": ends,
    }
    for site, places in carriers.items():
        assert_numbers(patched_at(found, site), dict.fromkeys(places, change))
        start, end = (1.0, 0.0) if direction == "noising" else (0.0, 1.0)
        for place, share in patched_at(found, site, "recovery").items():
            assert share == pytest.approx(end if place in places else start, abs=EXACT)


def test_activation_patching_tells_what_is_moved_from_where_it_is_looked_for() -> None:
    """Another token at 6, behind the match: the pattern is the same, and v at 6 is the answer."""
    corrupted = IDS.clone()
    corrupted[:, 6] = OTHER
    found = activation_patching(planted(), IDS, corrupted, COPY, ("rot_k", "v", "pattern", "z"), progress=False)
    assert (found.clean.mean(), found.corrupted.mean()) == pytest.approx((INTACT, -INTACT), abs=EXACT)
    for site, places in {"rot_k": [], "pattern": [], "v": [(*INDUCTION, 6)], "z": [(*INDUCTION, T)]}.items():
        assert_numbers(patched_at(found, site), dict.fromkeys(places, -2 * INTACT))


def test_path_patching_finds_the_one_path() -> None:
    corrupted, other = _without_the_match()
    receivers = ["logits", *((layer, head, part) for layer, head in ALL_HEADS if layer == "self.1" for part in "qkv")]
    metric = metrics.logit_difference(ANSWER, other)
    found = path_patching(planted(), IDS, corrupted, metric, receivers=receivers, progress=False).to_frame()
    effects = {(row.layer, row.head, row.receiver): row.effect for row in found.itertuples()}
    change, (address, head) = UNIFORM - INTACT, INDUCTION
    paths = {(*PREVIOUS_TOKEN, f"{address} head {head} k"): change, (*INDUCTION, "logits"): change}
    assert len(effects) == 8 * 13
    assert_numbers(effects, paths)
    direct = path_patching(planted(), IDS, None, MARKED, to="zero", progress=False).to_frame()
    assert_numbers({(r.layer, r.head): r.effect for r in direct.itertuples()}, {MOVER: -4.0})


# -- what heads are -----------------------------------------------------------------------------------------------------


def test_detectors_have_the_shares_of_the_patterns() -> None:
    """On BOS and six tokens said twice: queries 1 .. 12, of which 7 .. 12 have been there before."""
    model = planted()
    ids = random_copies(model, 8).ids
    assert ids.shape == (8, 13) and (ids[:, 0] == BOS).all() and torch.equal(ids[:, 1:7], ids[:, 7:])
    found = detect_heads(model)
    first, second = range(1, 13), range(7, 13)
    uniform = float(np.mean([1 / (t + 1) for t in first])), float(np.mean([1 / (t + 1) for t in second]))
    looker = [(2 if t > 6 else 1, t) for t in first]  # keys that are the query's token, itself among them
    behind = float(np.mean([1 / (2 * TWIN + t - 1) for t in second]))
    expected: dict[str, dict[Head, float]] = {
        "previous token": {
            PREVIOUS_TOKEN: 1.0,
            MOVER: float(np.mean([SINK / (SINK + 1), *(1 / (SINK + t) for t in first[1:])])),  # at t = 1 that is BOS
            LOOKER: float(np.mean([1 / (n * TWIN + t + 1 - n) for n, t in looker])),
            INDUCTION: float(np.mean([1 / (t + 1) if t < 7 else 1 / (HIT + t) for t in first])),
        },
        "duplicate token": {
            PREVIOUS_TOKEN: 0.0,
            MOVER: float(np.mean([1 / (SINK + t) for t in second])),
            LOOKER: float(np.mean([TWIN / (2 * TWIN + t - 1) for t in second])),
            INDUCTION: float(np.mean([1 / (HIT + t) for t in second])),
        },
        "induction": {
            PREVIOUS_TOKEN: 0.0,
            MOVER: float(np.mean([1 / (SINK + t) for t in second])),
            LOOKER: behind,
            INDUCTION: float(np.mean([HIT / (HIT + t) for t in second])),
        },
        "sink": {
            PREVIOUS_TOKEN: 1 / 12,  # at t = 1 the token before is the first
            MOVER: float(np.mean([SINK / (SINK + t) for t in first])),
            LOOKER: float(np.mean([1 / (n * TWIN + t + 1 - n) for n, t in looker])),
            INDUCTION: float(np.mean([1 / (t + 1) if t < 7 else 1 / (HIT + t) for t in first])),
        },
    }
    for job, heads in expected.items():
        chance = uniform[job in ("duplicate token", "induction")]
        for address, head in ALL_HEADS:
            score = found.matrix(job).loc[address, head]
            assert score == pytest.approx(heads.get((address, head), chance), abs=1e-6), (job, address, head)
            assert found.matrix(job, "chance").loc[address, head] == pytest.approx(chance, abs=1e-6)
    jobs = {"previous token": PREVIOUS_TOKEN, "duplicate token": LOOKER, "induction": INDUCTION, "sink": MOVER}
    for job, head in jobs.items():
        best = found.top(1, job).iloc[0]
        assert (best.address, best["head"]) == head


def test_weights_compose_and_copy_as_they_were_set() -> None:
    """K-composition of the two identities: |W_OV C| / (|W_OV| |C|) = √12 / (√24 √12), as W_OV writes to BALANCE, too."""
    for kind in ("q", "k", "v"):
        found = composition(planted(), kind)
        table = {(found.heads[i], found.heads[j]): found.scores[i, j] for i, j in np.argwhere(np.isfinite(found.scores))}
        assert set(table) == {(PREVIOUS_TOKEN, INDUCTION), (MOVER, INDUCTION)}, "circuits of 0 have no direction"
        expected = {(PREVIOUS_TOKEN, INDUCTION): 1 / math.sqrt(2 * VOCAB)} if kind == "k" else {}
        assert_numbers(table, expected, 1e-7)  # scores are kept in float32

    model = planted()
    copies = copying_scores(model)
    scores = {(row.address, row.head): row.score for row in copies.frame.itertuples()}
    assert scores[INDUCTION] == pytest.approx(1.0, abs=EXACT)
    assert all(math.isnan(score) for head, score in scores.items() if head != INDUCTION), "no other copies tokens to logits"
    # Norms count without their scales, 2^-40 of each of two here, so that their gains remain.
    traces = {(row.address, row.head): row.trace / 2.0**80 for row in copies.frame.itertuples()}
    assert traces[INDUCTION] == pytest.approx(VOCAB * COPIED, abs=EXACT)
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight.neg_()
    assert copying_scores(model).matrix().loc[INDUCTION] == pytest.approx(-1.0, abs=EXACT)


def test_logits_come_from_the_two_heads_that_write_them() -> None:
    for metric, head, value in ((COPY, INDUCTION, INTACT), (MARKED, MOVER, 4.0)):
        found = direct_logit_attribution(planted(), IDS, metric=metric)
        parts = {
            (row.address, row.head) if row.kind == "head" else row.component: row.value for row in found.frame.itertuples()
        }
        assert set(ALL_HEADS) < set(parts) and {"embedding", "constant"} < set(parts)
        assert_numbers(parts, {head: value})
        assert found.gap < EXACT and found.value == pytest.approx([value] * len(IDS), abs=EXACT)
    answer = direct_logit_attribution(planted(), IDS, tokens=ANSWER, position=-2)
    # At 10 the match is at 5, and the answer of position 11, at 6, is one of the other keys.
    assert answer.matrix().loc[INDUCTION] == pytest.approx(COPIED / (HIT + T - 1), abs=EXACT)


# -- effects and steering -----------------------------------------------------------------------------------------------


def test_the_effect_of_a_cut_is_that_of_its_logits() -> None:
    """Without the mover MARK loses MOVED · SINK / (SINK + t) at t; all else is a softmax with one logit less."""
    found = verify_effect(planted(), Freeze("ov", layers=[0], heads=[1]), IDS)
    before = logits_by_hand(IDS)
    less = np.array([MOVED * SINK / (SINK + t) for t in range(T + 1)])
    np.testing.assert_allclose(found.arrays["largest"], np.tile(less, (len(IDS), 1)), atol=EXACT)
    np.testing.assert_allclose(found.arrays["mean"], np.tile(less / VOCAB, (len(IDS), 1)), atol=EXACT)
    assert found.largest == pytest.approx(MOVED, abs=EXACT), "at BOS, where there is nothing else to look at"
    weights = np.exp(before)
    p = weights[..., MARK] / weights.sum(-1)
    np.testing.assert_allclose(found.arrays["kl"], p * less + np.log(1 - p + p * np.exp(-less)), atol=EXACT)
    # In the first copy all tokens that were there are alike: the first place is known where MARK has it, or a match.
    first, second = np.sort(before, axis=-1)[..., -1], np.sort(before, axis=-1)[..., -2]
    leads = before.argmax(-1) == MARK
    known = first - second > 1e-9
    np.testing.assert_array_equal(found.arrays["agreement"][known], np.where(leads, 0.0, 1.0)[known])
    assert leads[:, 3:7].all() and known[:, 3:].all() and not leads[:, 7:].any(), "behind the first copy there is a match"
    # No token of a prompt is MARK, so that each loss falls by the log of what the other tokens gain.
    gained = np.log(1 - p + p * np.exp(-less))[:, :-1]
    np.testing.assert_allclose(found.arrays["loss"][:, :T], gained, atol=EXACT)
    nothing = verify_effect(planted(), Freeze("both", layers=[0], heads=[2]), IDS)
    assert nothing.largest == 0 and nothing.kl == 0 and nothing.agreement == 1, "the looker"


def test_vectors_that_steer_are_those_of_the_weights() -> None:
    corrupted = IDS.clone()
    corrupted[:, 6] = OTHER
    one, other = int(ANSWER[0]), int(OTHER[0])
    found = discover_vector(planted(), IDS[:1], corrupted[:1])
    difference = torch.zeros(16, dtype=torch.float64)
    difference[one], difference[other] = ON_MATCH, -ON_MATCH  # the pattern is the same, the token behind the match is not
    torch.testing.assert_close(found[INDUCTION], difference, rtol=0, atol=EXACT)
    twins = 2 * TWIN + T - 1  # of the last position the looker's weight on any other key is 1 / 70
    torch.testing.assert_close(found[LOOKER], difference / ON_MATCH / twins, rtol=0, atol=EXACT)
    assert all(float(found[head].norm()) < EXACT for head in ALL_HEADS if head not in (INDUCTION, LOOKER))
    held = prompts(4, seed=1)
    metric = metrics.logit_difference(one, other)
    effect = found.only([INDUCTION]).effect(held, metric, strengths=(-2.0, 0.0, 0.5, 3.0), progress=False).to_frame()
    expected = [strength * 2 * COPIED * ON_MATCH for strength in (-2.0, 0.0, 0.5, 3.0)]
    assert effect.effect.tolist() == pytest.approx(expected, abs=EXACT), "on any prompt: 18 logits for each unit of strength"

    slope = discover_vector(planted(), held, method="gradient", metric=metrics.logit_difference(one, MARK))
    expected_slopes = {head: torch.zeros(16, dtype=torch.float64) for head in ALL_HEADS}
    expected_slopes[INDUCTION][one], expected_slopes[INDUCTION][MARK], expected_slopes[MOVER][0] = COPIED, -COPIED, -MOVED
    for tokens in held.tolist():  # more of the last token in PREVIOUS there, and the query looks at its own position more
        weights = [(HIT if s == 6 else 1) / (HIT + T) for s in range(T + 1)]
        moved = [COPIED * (token == one) for token in tokens]
        away = moved[T] - sum(weight * value for weight, value in zip(weights, moved, strict=True))
        expected_slopes[PREVIOUS_TOKEN][tokens[T]] += math.log(HIT) * weights[T] * away / len(held)
    for where, expected_slope in expected_slopes.items():
        torch.testing.assert_close(slope[where], expected_slope, rtol=0, atol=EXACT)


def test_uniform_attention_by_a_template_is_qk_to_zero() -> None:
    """What is left of the induction head is a mean of all tokens, and its QK, and those that feed it, have no say any more."""
    for edit in (Edit("pattern", "uniform", layers=[1], heads=[2]), Freeze("qk", layers=[1], heads=[2])):
        found = head_importance(planted(), IDS, None, COPY, "ablation", to="zero", given=edit)
        assert found.baseline == pytest.approx(UNIFORM, abs=EXACT)
        assert_numbers(scores_of(found.frame), {(*INDUCTION, "ov"): -UNIFORM})
