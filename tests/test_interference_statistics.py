"""Tests of interference between tasks: against slow loops, at their level under the null, and with planted heads."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import astuple
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from surgery import SpecError
from surgery.analysis.interference.checks import RESULTS, shared_samples
from surgery.analysis.interference.intervals import two_way_bootstrap
from surgery.analysis.interference.randomised import flips, labelings
from surgery.analysis.interference.signed import sign_flip_test
from surgery.analysis.interference.sizes import one_sample, two_sample
from surgery.analysis.interference.statistics import Scores, permutation_test
from surgery.analysis.interference.study import require_reach

BLOCKS = ["Q"] * 5 + ["V"] * 4
NAMES = ("rows_a", "rows_n", "columns_b", "columns_n")
P = ["p_row", "p_col", "p", "p_fdr", "p_maxt"]
EFFECTS = [f"{what}_{way}" for what in ("effect", "g", "delta") for way in ("row", "col")]


def _scores(seed: int = 0, sizes: Any = (6, 5, 5, 6), hypotheses: int = len(BLOCKS)) -> Scores:
    """Log-normal scores, each sample of its own scale, each head of its own spread."""
    rng = np.random.default_rng(seed)
    spread = np.geomspace(3, 0.3, hypotheses)
    return Scores(*(np.exp(spread * rng.normal(size=(n, hypotheses)) + 3 * rng.normal(size=(n, 1))) for n in sizes))


def _changed(scores: Scores, **changes: Any) -> Scores:
    return Scores(**{name: changes.get(name, getattr(scores, name)) for name in NAMES})


def _quietly(test: Any, *values: Any, **options: Any) -> Any:
    """Without the warning of too few permutations, which small examples have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return test(*values, **options)


def _logs(raw: np.ndarray, blocks: Any = BLOCKS) -> np.ndarray:
    """Logs minus the median of the same sample and block, in a loop; of positive scores."""
    logs = np.log(raw)
    out = np.empty_like(logs)
    for i, j in np.ndindex(*logs.shape):
        out[i, j] = logs[i, j] - np.median([logs[i, k] for k in range(len(blocks)) if blocks[k] == blocks[j]])
    return out


# -- the randomisation ---------------------------------------------------------------------------------------------------


def _labelled(way: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    """t with pooled variance of each hypothesis, for one choice of the task's samples."""
    rest = [i for i in range(len(values)) if i not in way]
    return stats.ttest_ind(values[list(way)], values[rest], axis=0).statistic


def test_all_labelings_are_those_of_a_loop() -> None:
    """Every labeling of 6 + 5 and of 5 + 6 samples, one at a time, with Student's t in place of the product."""
    scores = _scores()
    for name in ("rows_a", "columns_b"):
        getattr(scores, name)[:, [2, 6]] *= 8
    result = permutation_test(scores, BLOCKS)
    assert result.exact == ("p_row", "p_col") and result.permutations == {"p_row": 462, "p_col": 462}
    against_all = []
    for way, (task, control) in {"row": NAMES[:2], "col": NAMES[2:]}.items():
        task, control = _logs(getattr(scores, task)), _logs(getattr(scores, control))
        values = np.concatenate([task, control])
        observed = _labelled(tuple(range(len(task))), values)
        all_t = np.array([_labelled(way, values) for way in itertools.combinations(range(len(values)), len(task))])
        np.testing.assert_array_equal(result.frame[f"p_{way}"], (all_t >= observed - 1e-9).mean(axis=0))
        against_all.append((all_t.max(axis=1)[:, None] >= observed - 1e-9).mean(axis=0))
        means = [
            stats.permutation_test((t, c), _difference, alternative="greater").pvalue
            for t, c in zip(task.T, control.T, strict=True)
        ]
        np.testing.assert_allclose(result.frame[f"p_{way}"], means, rtol=1e-12)
    np.testing.assert_array_equal(result.frame.p, np.maximum(result.frame.p_row, result.frame.p_col))
    np.testing.assert_array_equal(result.frame.p_fdr, stats.false_discovery_control(result.frame.p))
    np.testing.assert_array_equal(result.frame.p_maxt, np.minimum(1, 2 * np.maximum(*against_all)))
    assert (result.frame.p_maxt >= 2 * result.frame.p.clip(upper=0.5)).all() and result.frame.p_maxt.min() < 0.1
    assert result.frame.p_maxt.nunique() > 2


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean(a) - np.mean(b))


def test_drawn_labelings_are_those_of_a_loop() -> None:
    """(1 + count) / (1 + draws) of the very draws, one at a time; and near the exact p of all labelings."""
    scores = _scores(1, sizes=(8, 9, 7, 8))
    result = _quietly(permutation_test, scores, BLOCKS, n_permutations=400, seed=7)
    assert result.exact == () and result.permutations == {"p_row": 400, "p_col": 400}
    task, control = _logs(scores.rows_a), _logs(scores.rows_n)
    values = np.concatenate([task, control])
    observed = _labelled(tuple(range(8)), values)
    (labels,) = labelings(8, 9, 400, 7).chunks(400)
    found = np.array([_labelled(tuple(np.flatnonzero(row > 0)), values) for row in labels])
    np.testing.assert_array_equal(result.frame.p_row, (1 + (found >= observed - 1e-9).sum(axis=0)) / 401)
    exact = permutation_test(scores, BLOCKS, n_permutations=30_000).frame  # of 24,310 and 6,435 labelings
    spread = np.sqrt(exact.p_row * (1 - exact.p_row) / 400)
    assert (np.abs(exact.p_row - result.frame.p_row) < 4 * spread + 1 / 400).all()


@pytest.mark.parametrize("make", [lambda most: labelings(4, 3, most, 5), lambda most: flips(7, most, 5)])
def test_draws_do_not_depend_on_chunks(make: Any) -> None:
    for most in (20, 1000):  # drawn, all there are
        draws = make(most)
        whole = np.concatenate(list(draws.chunks(10**6)))
        assert whole.shape == (draws.count, 7) and draws.exact == (most == 1000)
        for rows in (1, 3, 20):
            np.testing.assert_array_equal(np.concatenate(list(draws.chunks(rows))), whole)
    assert len(np.unique(whole, axis=0)) == len(whole) in (35, 128), "all ways, each once"


def test_labels_are_fair() -> None:
    """Each sample is the task's equally often, so is each pair: 4 of 7."""
    (labels,) = labelings(4, 30, 20_000, 0).chunks(20_000)
    np.testing.assert_allclose(labels.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(labels, axis=1), 1, rtol=1e-12)
    is_task = (labels > 0).astype(float)
    assert (is_task.sum(axis=1) == 4).all()
    assert np.abs(is_task.mean(axis=0) - 4 / 34).max() < 4.5 * np.sqrt(4 / 34 * 30 / 34 / 20_000)
    pairs = (is_task.T @ is_task / 20_000)[~np.eye(34, dtype=bool)]
    share = 4 * 3 / (34 * 33)
    assert np.abs(pairs - share).max() < 5 * np.sqrt(share / 20_000)  # 561 pairs: 5 standard errors
    (signs,) = flips(40, 20_000, 0).chunks(20_000)
    assert set(np.unique(signs)) == {-1.0, 1.0} and np.abs(signs.mean(axis=0)).max() < 4.5 / np.sqrt(20_000)


def test_the_same_seed_gives_the_same_numbers_in_any_memory() -> None:
    scores = _scores(2, sizes=(15, 14, 13, 12))
    rows, columns = _margins(2)
    for test, values in ((permutation_test, (scores, BLOCKS)), (sign_flip_test, (rows, columns))):
        first = _quietly(test, *values, n_permutations=500, seed=3)
        pd.testing.assert_frame_equal(
            first.frame, _quietly(test, *values, n_permutations=500, seed=3, memory_mib=0.01, progress=True).frame
        )
        other = _quietly(test, *values, n_permutations=500, seed=4).frame
        assert (first.frame.p != other.p).any() and np.abs(first.frame.p - other.p).max() < 0.15
    maps = np.random.default_rng(0).normal(size=(5, 8, 9))
    for a, b in zip(
        astuple(two_way_bootstrap(maps)), astuple(two_way_bootstrap(maps, memory_mib=0.1, progress=True)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)  # matrix products of other sizes round differently


# -- properties ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_what_does_not_matter_changes_nothing(seed: int, data: st.DataObject) -> None:
    """The order of samples within a task, a factor on a sample, a factor on a hypothesis."""
    scores = _scores(seed, sizes=(4, 4, 4, 3))
    before = _quietly(permutation_test, scores, BLOCKS).frame
    name = data.draw(st.sampled_from(NAMES))
    raw = getattr(scores, name)
    order = data.draw(st.permutations(range(len(raw))))
    scales = data.draw(arrays(float, len(raw), elements=st.floats(1e-6, 1e6)))
    for changed in (raw[order], raw * scales[:, None]):
        after = _quietly(permutation_test, _changed(scores, **{name: changed}), BLOCKS).frame
        pd.testing.assert_frame_equal(after, before, rtol=1e-9, atol=1e-9)  # logs and sums round differently
    everything = data.draw(st.floats(1e-3, 1e3))
    after = _quietly(permutation_test, Scores(*(getattr(scores, name) * everything for name in NAMES)), BLOCKS).frame
    pd.testing.assert_frame_equal(after, before, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), head=st.integers(0, len(BLOCKS) - 1), nats=st.floats(0.01, 5))
def test_higher_scores_are_found_more(seed: int, head: int, nats: float) -> None:
    """Raising one head in the task's samples cannot make it less sure; other blocks do not see it."""
    scores = _scores(seed, sizes=(4, 4, 4, 3))
    before = _quietly(permutation_test, scores, BLOCKS).frame
    raised = scores.columns_b.copy()
    raised[:, head] *= np.exp(nats)
    after = _quietly(permutation_test, _changed(scores, columns_b=raised), BLOCKS).frame
    assert after.p_col[head] <= before.p_col[head] and after.effect_col[head] >= before.effect_col[head] - 1e-12
    others = [i for i, block in enumerate(BLOCKS) if block != BLOCKS[head]]
    pd.testing.assert_frame_equal(after.loc[others, EFFECTS + P[:3]], before.loc[others, EFFECTS + P[:3]])
    pd.testing.assert_series_equal(after.p_row, before.p_row)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), ties=st.booleans(), sizes=st.tuples(*[st.integers(3, 7)] * 4))
def test_effects_are_those_of_loops(seed: int, ties: bool, sizes: tuple[int, ...]) -> None:
    scores = _scores(seed, sizes)
    if ties:
        scores = Scores(*(2.0 ** np.round(np.log2(getattr(scores, name))) for name in NAMES))
    frame = _quietly(permutation_test, scores, BLOCKS, n_permutations=30, alpha=0.2).frame
    for way, (task, control) in {"row": NAMES[:2], "col": NAMES[2:]}.items():
        task, control = _logs(getattr(scores, task)), _logs(getattr(scores, control))
        for head, (a, b) in enumerate(zip(task.T, control.T, strict=True)):
            freedom = len(a) + len(b) - 2
            if np.ptp([*a, *b]) < 1e-9:
                assert frame.loc[head, EFFECTS].filter(like=way).isna().all() and frame[f"p_{way}"][head] == 1
                continue
            np.testing.assert_allclose(frame[f"effect_{way}"][head], a.mean() - b.mean(), atol=1e-11)  # rounded to 12 digits
            delta = np.mean([np.sign(round(x - y, 9)) for x in a for y in b])
            np.testing.assert_allclose(frame[f"delta_{way}"][head], delta, atol=1e-12)
            pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / freedom)
            if pooled > 1e-9:
                factor = 1 - 3 / (4 * freedom - 1)  # Hedges' approximation of the exact factor: within 1 % of it from 4 on
                np.testing.assert_allclose(
                    frame[f"g_{way}"][head], factor * (a.mean() - b.mean()) / pooled, rtol=1e-2, atol=1e-9
                )


def test_hedges_factor_makes_the_size_unbiased() -> None:
    """Of a true size of 1 and three samples each, the plain size is 1.25 on average."""
    rng = np.random.default_rng(0)
    constant = two_sample(np.full((3, 2), [0.1, 0.3]), np.full((3, 2), [0.3, 0.1]))
    assert list(constant["g"]) == [-np.inf, np.inf] and list(constant["delta"]) == [-1, 1]
    found = two_sample(rng.normal(1.0, 1.0, size=(3, 100_000)), rng.normal(size=(3, 100_000)))["g"]
    assert abs(found.mean() - 1) < 4 * found.std() / np.sqrt(len(found))
    found = one_sample(rng.normal(1.0, 1.0, size=(6, 100_000)))["g"]
    assert abs(found.mean() - 1) < 4 * found.std() / np.sqrt(len(found))


# -- signed scores -------------------------------------------------------------------------------------------------------


def _map(
    seed: int, sizes: tuple[int, int] = (6, 5), hypotheses: int = 9, shared: float = 0.5, cosine: float = 0.0
) -> np.ndarray:
    """(hypothesis, A, B): minus the products of unit-length gradients of 20 entries, whose means have a cosine."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, hypotheses, 1, 20))
    b -= (b * a).sum(-1, keepdims=True) / (a**2).sum(-1, keepdims=True) * a
    a, b = (mean / np.linalg.norm(mean, axis=-1, keepdims=True) for mean in (a, b))
    b = cosine * a + np.sqrt(1 - cosine**2) * b
    gradients = [
        shared * np.sqrt(20) * mean + rng.normal(size=(hypotheses, n, 20)) for mean, n in zip((a, b), sizes, strict=True)
    ]
    a, b = (g / np.linalg.norm(g, axis=-1, keepdims=True) for g in gradients)
    return -a @ b.transpose(0, 2, 1)


def _margins(seed: int, *sizes: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    conflicts = _map(seed, *sizes, **options)
    return conflicts.mean(axis=2).T, conflicts.mean(axis=1).T


def _both_ways(rows: np.ndarray, columns: np.ndarray) -> float:
    """t of the mean, with errors from rows and columns, of one hypothesis."""
    error = rows.var(ddof=1) / len(rows) + columns.var(ddof=1) / len(columns)
    return (rows.mean() + columns.mean()) / np.sqrt(error)


def test_all_flips_are_those_of_a_loop() -> None:
    maps = _map(0)
    maps[:2] = _map(1, hypotheses=2, shared=4.0, cosine=-1.0)
    rows, columns = maps.mean(axis=2).T, maps.mean(axis=1).T
    result = _quietly(sign_flip_test, rows, columns, n_permutations=3000)
    assert result.exact == ("p_row", "p_col", "p_both") and result.permutations == {"p_row": 64, "p_col": 32, "p_both": 2048}
    for way, values in {"row": rows, "col": columns}.items():
        signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
        for head, one in enumerate(values.T):
            t = stats.ttest_1samp(signs * one, 0, axis=1).statistic
            assert result.frame[f"p_{way}"][head] == np.mean(t >= stats.ttest_1samp(one, 0).statistic - 1e-9)
            reference = stats.permutation_test((one,), np.mean, permutation_type="samples", alternative="greater")
            np.testing.assert_allclose(result.frame[f"p_{way}"][head], reference.pvalue)
            np.testing.assert_allclose(result.frame[f"delta_{way}"][head], np.mean(one > 0) - np.mean(one < 0))
            factor = 1 - 3 / (4 * (len(one) - 1) - 1)  # Hedges' approximation: within 2 % from 4 on
            np.testing.assert_allclose(result.frame[f"g_{way}"][head], factor * one.mean() / one.std(ddof=1), rtol=2e-2)
    chance = np.array(
        [
            [_both_ways(s * (r - r.mean()), u * (c - c.mean())) for r, c in zip(rows.T, columns.T, strict=True)]
            for s, u in ((np.array(way[:6]), np.array(way[6:])) for way in itertools.product((1, -1), repeat=11))
        ]
    )
    observed = np.array(
        [_both_ways(r, np.full_like(c, r.mean()) + c - c.mean()) / 2 for r, c in zip(rows.T, columns.T, strict=True)]
    )
    # flips of deviations: the observed statistic, which is not centred, is not one of them, and counts as one more
    np.testing.assert_array_equal(result.frame.p_both, (1 + (chance >= observed - 1e-9).sum(axis=0)) / (1 + len(chance)))
    np.testing.assert_array_equal(result.frame.p, result.frame[["p_row", "p_col", "p_both"]].max(axis=1))
    largest = (1 + (chance.max(axis=1)[:, None] >= observed - 1e-9).sum(axis=0)) / (1 + len(chance))
    np.testing.assert_array_equal(result.frame.p_maxt, np.maximum(largest, result.frame.p))
    assert (largest < result.frame.p).any() and (result.frame.p < largest).any(), "either may be larger"
    np.testing.assert_array_equal(result.frame.p_fdr, stats.false_discovery_control(result.frame.p))


def test_no_p_is_zero_of_few_samples_that_oppose_each_other() -> None:
    """5 + 5 samples have 1,024 flips, none of which reaches the observed statistic."""
    result = _quietly(sign_flip_test, *_margins(0, (5, 5), shared=20.0, cosine=-1.0))
    assert result.permutations["p_both"] == 1024 and result.exact == ("p_row", "p_col", "p_both")
    assert (result.frame.p_both == 1 / 1025).all() and (result.frame.p_row == 1 / 32).all()
    assert (result.frame.p_maxt == 1 / 32).all()


def test_opposed_heads_are_found_and_cooperating_ones_are_not() -> None:
    """Of 40 heads: 4 opposed, 4 co-operating, the others with mean gradients at right angles."""
    for seed in range(5):
        maps = _map(seed, (30, 30), 40)
        maps[:4], maps[4:8] = (_map(seed + 100, (30, 30), 4, cosine=c) for c in (-0.9, 0.9))
        rows, columns = maps.mean(axis=2).T, maps.mean(axis=1).T
        hypotheses = pd.DataFrame({"address": "self.0", "head": range(40), "block": ["V", "O"] * 20})
        result = sign_flip_test(rows, columns, hypotheses=hypotheses)
        assert {0, 1, 2, 3} <= set(result.significant()["head"]) and not set(result.significant()["head"]) & {4, 5, 6, 7}
        assert set(result.significant(by="p_maxt")["head"]) == {0, 1, 2, 3}
        assert (result.frame.p[4:8] > 0.99).all()
        other = sign_flip_test(-rows, -columns, hypotheses=hypotheses)
        assert {4, 5, 6, 7} <= set(other.significant()["head"]) and not set(other.significant()["head"]) & {0, 1, 2, 3}


def test_the_level_of_the_signed_test_with_shared_mean_gradients() -> None:
    """Mean gradients at right angles, 2,000 heads each: what the docstring of sign_flip_test says of p_row, p_col and p_both.

    Standard error of a share of 2,000 independent heads: 0.5 % at 5 %, 0.7 % at 12 %.
    """

    def rejected(n: int, *means: float) -> dict[str, float]:
        rng = np.random.default_rng(n)
        a, b = rng.normal(size=(2000, n, 20)), rng.normal(size=(2000, n, 20))
        a[..., 0] += means[0] * np.sqrt(20)
        b[..., 1] += means[1] * np.sqrt(20)
        a, b = (g / np.linalg.norm(g, axis=-1, keepdims=True) for g in (a, b))
        conflict = -a @ b.transpose(0, 2, 1)
        frame = _quietly(sign_flip_test, conflict.mean(axis=2).T, conflict.mean(axis=1).T, n_permutations=999).frame
        frame["larger"] = frame[["p_row", "p_col"]].max(axis=1)
        return {name: float((frame[name] <= 0.05).mean()) for name in ("p_row", "p_col", "larger", "p")}

    none, one, both = rejected(20, 0, 0), rejected(40, 0.5, 0), rejected(40, 1.5, 1.5)
    assert 0.04 < none["p_row"] < 0.065 and 0.04 < none["p_col"] < 0.065 and none["p"] < 0.02
    assert one["p_row"] > 0.28 and 0.035 < one["p_col"] < 0.065 and 0.03 < one["p"] < 0.06
    assert 0.09 < both["larger"] < 0.14, "twice the variance that each sees"
    assert 0.035 < both["p"] < 0.065 and rejected(10, 1.5, 1.5)["p"] < 0.07


# -- the level -----------------------------------------------------------------------------------------------------------


def _study(
    rng: np.random.Generator, n: int, blocks: Any, shared: Any = (), of_a: Any = (), of_b: Any = (), nats: float = 0.0
) -> Scores:
    """Scores of tasks A, B and N, alike but for heads which A's samples (shared, of_a) or B's (shared, of_b) raise.

    log M_ij is an effect of i, one of j, and one of the pair. Effects of samples move heads together (three topics), with heavy
    tails (t with 3 degrees of freedom); each sample has its own scale.
    """
    heads = len(blocks)
    topics = rng.normal(size=(3, heads))

    def samples(raised: Any) -> np.ndarray:
        effects = rng.standard_t(3, size=(n, 3)) @ topics + rng.standard_t(3, size=(n, heads))
        effects[:, list(raised)] += nats
        return effects + 10 * rng.normal(size=(n, 1))

    a, b, control = samples([*shared, *of_a]), samples([*shared, *of_b]), samples([])

    def scored(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.exp((rows[:, None] + columns + rng.standard_t(3, size=(n, n, heads))) / 4)

    a_b = scored(a, b)
    return Scores(a_b.mean(axis=1), scored(control, b).mean(axis=1), a_b.mean(axis=0), scored(a, control).mean(axis=0))


def test_the_level_under_the_null() -> None:
    """p_row and p_col reject 4 to 6 % of true nulls at 5 % in 240 studies of 60 heads, p fewer.

    Of one head in 240 studies, 2.2 to 7.8 % would be chance (95 %). 60 heads, of which samples move groups together, count for
    20 independent ones or more: a standard error of 0.3 %, so that 4 to 6 % are three of them either way.
    """
    rng = np.random.default_rng(1)
    blocks = np.repeat(["Q", "K", "V", "O"], 15)
    found = [
        _quietly(permutation_test, _study(rng, 12, blocks), blocks, n_permutations=399, seed=study).frame
        for study in range(240)
    ]
    for way in ("p_row", "p_col"):
        shares = np.array([(frame[way] <= 0.05).mean() for frame in found])
        assert shares.std() / np.sqrt(len(found)) < 0.0034, "the standard error above"
        assert 0.04 < shares.mean() < 0.06, way
    assert np.mean([(frame.p <= 0.05).mean() for frame in found]) < 0.05
    for p in ("p_fdr", "p_maxt"):  # any finding at all is false: 5 %, and three standard errors of 240 studies
        assert np.mean([(frame[p] <= 0.05).any() for frame in found]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 240)


def test_planted_heads_are_found_and_decoys_are_not() -> None:
    """Of 144 heads and 40 samples a task: four that A and B share, four that A alone raises, four that B alone does."""
    rng = np.random.default_rng(2)
    blocks = np.tile(["Q", "K", "V", "O"], 36)
    power, false, familywise = [], [], []
    for study in range(25):
        shared, of_a, of_b = np.split(rng.choice(144, 12, replace=False), 3)
        scores = _study(rng, 40, blocks, shared, of_a, of_b, nats=6.0)
        result = permutation_test(scores, blocks, hypotheses=pd.DataFrame({"hypothesis": range(144)}), seed=study)
        found = set(result.significant().hypothesis)
        power.append(len(found & set(shared)) / 4)
        false.append(len(found - set(shared)) / max(1, len(found)))
        familywise.append(bool(set(result.significant(by="p_maxt").hypothesis) - set(shared)))
        decoys = result.frame.loc[[*of_a, *of_b]]
        assert decoys[["p_row", "p_col"]].min(axis=1).median() < 0.01, "each is found by one of the two tests"
    assert np.mean(power) >= 0.95 and np.mean(false) <= 0.05 and np.mean(familywise) <= 0.1


# -- what is not offered -------------------------------------------------------------------------------------------------


def test_pairs_as_independent_samples_are_rejected_too_often() -> None:
    """The numbers of the module's docstring, of 4,000 true nulls each (standard error 0.6 %), and the same data by samples."""
    rng = np.random.default_rng(2)
    rejected = {}
    for spread in (0.25, 0.5, 1.0):
        of_b, of_n = (spread * rng.normal(size=(4000, 1, 40)) + rng.normal(size=(4000, 40, 40)) for _ in range(2))
        pairs = stats.ttest_ind(of_b.reshape(4000, -1), of_n.reshape(4000, -1), axis=1, alternative="greater").pvalue
        valid = stats.ttest_ind(of_b.mean(axis=1), of_n.mean(axis=1), axis=1, alternative="greater").pvalue
        rejected[spread] = float((pairs <= 0.05).mean())
        assert 0.04 < (valid <= 0.05).mean() < 0.06
    assert [round(share, 2) for share in rejected.values()] == pytest.approx([0.19, 0.29, 0.35], abs=0.015), rejected


def test_permuting_within_a_task_says_nothing() -> None:
    """However much A and B interfere, the mean of a permuted map is the mean of the map: p = 1."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(10, 12)) + 100
    chance = [values[rng.permutation(10)][:, rng.permutation(12)].mean() for _ in range(200)]
    assert np.mean(np.array(chance) >= values.mean() - 1e-9) == 1


# -- intervals -----------------------------------------------------------------------------------------------------------


def test_the_bootstrap_is_that_of_a_loop() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    found = two_way_bootstrap(maps, resamples=300, seed=4, confidence=0.9)
    rng = np.random.default_rng(4)
    rows = rng.multinomial(5, np.full(5, 1 / 5), size=300)
    columns = rng.multinomial(7, np.full(7, 1 / 7), size=300)
    for number, one in enumerate(maps.astype(float)):
        means = [one[np.repeat(range(5), r)][:, np.repeat(range(7), c)].mean() for r, c in zip(rows, columns, strict=True)]
        np.testing.assert_allclose([found.low[number], found.high[number]], np.quantile(means, [0.05, 0.95]), atol=1e-12)
    np.testing.assert_allclose(found.mean, maps.mean(axis=(1, 2), dtype=float), rtol=1e-12)
    single = two_way_bootstrap(maps[1], resamples=300, seed=4, confidence=0.9)
    assert single.mean.shape == () and single.low == found.low[1] and single.high == found.high[1]


def test_the_bootstrap_covers_the_mean_of_the_tasks() -> None:
    """Of 1,000 maps of 25 × 25 with true mean 0; resampling pairs covers it far less. Standard error at 95 %: 0.7 %."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(1000, 25, 1)) + rng.normal(size=(1000, 1, 25)) + rng.normal(size=(1000, 25, 25))
    found = two_way_bootstrap(maps, resamples=500)
    assert 0.92 < np.mean((found.low <= 0) & (found.high >= 0)) < 0.97  # percentiles of 25 samples are a little short
    error = maps.std(axis=(1, 2)) / 25
    assert np.mean(np.abs(maps.mean(axis=(1, 2))) < 1.96 * error) < 0.6, "pairs"


# -- the table -----------------------------------------------------------------------------------------------------------


def test_the_table_in_all_its_forms() -> None:
    rng = np.random.default_rng(0)
    blocks = np.tile(["Q", "V"], 10)
    scores = _study(rng, 30, blocks, shared=[3, 8], nats=9.0)
    hypotheses = pd.DataFrame({"address": "self.0", "head": np.arange(20) // 2}, index=range(100, 120))
    result = permutation_test(scores, blocks, hypotheses=hypotheses)
    assert list(result.frame.columns[:3]) == ["address", "head", "block"] and list(result.frame.index) == list(range(20))
    assert set(result.frame.columns[3:]) == RESULTS - {"p_both"} and list(result.frame.columns[-5:]) == P
    signed = _quietly(sign_flip_test, *_margins(0), n_permutations=100)
    assert set(signed.frame.columns) == RESULTS and _quietly(permutation_test, scores, blocks).frame.columns[0] == "block"
    assert (
        sorted(result.significant().index) == [3, 8] and len(result.significant(1.0)) == 20 and len(result.significant(0)) == 0
    )
    tied = _quietly(permutation_test, _study(rng, 4, blocks), blocks).top(20)
    weaker = tied[["g_row", "g_col"]].min(axis=1)
    assert tied.p.is_monotonic_increasing and not tied.p.is_unique
    assert all(weaker[tied.p == p].is_monotonic_decreasing for p in tied.p)
    assert sorted(result.top(2).index) == [3, 8] and result.significant(1.0).p.is_monotonic_increasing
    assert result.sizes == dict.fromkeys(NAMES, 30) and result.alpha == 0.05
    assert str(result).startswith("2 of 20 hypotheses at FDR 0.05, 2 at familywise 0.05; samples: rows_a 30")
    assert "self.0" in result._repr_html_() and "2 of 20" in result._repr_html_() and repr(result) == str(result)
    lines = result.to_markdown(result.significant(), ["address", "head", "block", "p_fdr"]).splitlines()
    assert lines[:2] == ["| address | head | block | p_fdr |", "| --- | --- | --- | --- |"] and len(lines) == 4
    assert lines[2].startswith("| self.0 | 1 | V | 0.00") or lines[2].startswith("| self.0 | 4 | Q | 0.00")
    assert "a\\|b" in permutation_test(scores, ["a|b"] * 20).to_markdown()
    assert r"p\_fdr" in result.to_latex() and "self.0 & 1 & V" in result.to_latex(result.significant())
    with pytest.raises(SpecError, match=r"significant: found by='p_fdrr'; expected of 'p_row'.* Did you mean 'p_fdr'"):
        result.significant(by="p_fdrr")


# -- zeros ---------------------------------------------------------------------------------------------------------------


def test_heads_without_a_score_spoil_nothing() -> None:
    """Three dead heads of five: medians are of the others, the dead have p = 1 and no effects, and a note names them."""
    scores = _scores(0)
    dead = [0, 1, 2]
    silent = Scores(*(np.where(np.isin(range(9), dead), 0, getattr(scores, name)) for name in NAMES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = (result := permutation_test(silent, BLOCKS)).frame
    assert (frame.loc[dead, P] == 1).all(axis=None) and frame.loc[dead, EFFECTS].isna().all(axis=None)
    assert frame.drop(dead).notna().all(axis=None) and result.notes[0].endswith("have no spread: 0, 1, 2")
    rest = [head for head in range(9) if head not in dead]
    alone = permutation_test(Scores(*(getattr(scores, name)[:, rest] for name in NAMES)), [BLOCKS[head] for head in rest]).frame
    pd.testing.assert_frame_equal(alone[EFFECTS + P[:3]], frame.loc[rest, EFFECTS + P[:3]].reset_index(drop=True))
    lonely = permutation_test(scores, ["only", *BLOCKS[1:]])
    assert lonely.frame.p[0] == 1 and np.isnan(lonely.frame.g_row[0]) and len(lonely.notes) == 2
    named = pd.DataFrame({"address": "self.0", "block": BLOCKS, "head": [*range(5), *range(4)]})
    assert (
        permutation_test(silent, BLOCKS, hypotheses=named)
        .notes[0]
        .endswith("have no spread: self.0 Q 0, self.0 Q 1, self.0 Q 2")
    )
    nothing = permutation_test(Scores(*(np.zeros_like(getattr(scores, name)) for name in NAMES)), BLOCKS)
    assert (nothing.frame[P] == 1).all(axis=None) and "no spread: 0, 1, 2, 3, 4, 5, 6, 7, ... (9 in all)" in nothing.notes[0]
    rows, columns = _margins(0)
    rows[:, 4], columns[:, 4] = 0, 0
    signed = _quietly(sign_flip_test, rows, columns, n_permutations=200)
    assert (
        (signed.frame.loc[4, P] == 1).all()
        and signed.frame.p.drop(4).min() < 1
        and signed.notes == ["p is 1 where all scores are 0: 4"]
    )
    signed = _quietly(sign_flip_test, rows, columns, hypotheses=named, n_permutations=200)
    assert signed.notes == ["p is 1 where all scores are 0: self.0 Q 4"]


def test_a_zero_is_the_smallest_score_of_its_head() -> None:
    """The sample's median is of its other scores, and the zero ties with the lowest that any sample has at this head."""
    scores = _scores(3)
    rows = scores.rows_a.copy()
    rows[2, 1] = 0
    effect = permutation_test(_changed(scores, rows_a=rows), BLOCKS).frame.effect_row
    logs, control = np.log(rows, where=rows > 0, out=np.full(rows.shape, np.nan)), _logs(scores.rows_n)
    for block in (slice(0, 5), slice(5, 9)):
        logs[:, block] -= np.nanmedian(logs[:, block], axis=1, keepdims=True)
    logs[2, 1] = min(np.nanmin(logs[:, 1]), control[:, 1].min())
    np.testing.assert_allclose(effect, logs.mean(axis=0) - control.mean(axis=0), atol=1e-12)


# -- bad input -----------------------------------------------------------------------------------------------------------


def _message(call: Any, *values: Any, **options: Any) -> str:
    with pytest.raises(SpecError) as raised:
        call(*values, **options)
    assert all(
        ": found " in line and "; expected " in line for line in str(raised.value).splitlines() if "problems" not in line
    )
    return str(raised.value)


def test_problems_are_listed_together() -> None:
    scores = _scores()
    nan, negative = scores.rows_a.copy(), scores.columns_b.copy()
    nan[1, 2], negative[0, 0] = np.nan, -1
    bad = Scores(nan, scores.rows_n[:1], negative, None)
    message = _message(permutation_test, bad, BLOCKS, alpha=2, n_permutations=0, hypotheses=pd.DataFrame({"head": [1]}))
    assert message.startswith("permutation_test: 7 problems")
    for part in (
        "rows_a: found 1 of 54 scores NaN or infinite, the first of sample 1, hypothesis 2; expected numbers.",
        "rows_n: found 1 samples; expected at least 2.",
        "columns_b: found 1 negative scores; expected scores that are positive or 0. Use sign_flip_test",
        "columns_n: found no control samples; expected scores of a control task.",
        "alpha: found 2; ",
        "n_permutations: found 0; expected at least 1. Leave it out",
        "hypotheses: found 1 rows; expected 9, one for each column",
    ):
        assert part in message, part
    message = _message(permutation_test, scores, BLOCKS[:4], memory_mib=0, seed=-1)
    assert message.count("expected (sample, 4), as blocks say") == 4 and "memory_mib" in message and "seed" in message
    assert "no hypotheses" in _message(permutation_test, scores, [])
    frame = pd.DataFrame({"block": [*BLOCKS[:8], "K"], "p_fdr": 0})
    message = _message(permutation_test, scores, BLOCKS, hypotheses=frame)
    assert "other blocks than `blocks` has: 8" in message and "columns p_fdr" in message


def test_a_sample_without_scores_in_a_block_is_named() -> None:
    scores = _scores()
    rows = scores.rows_n.copy()
    rows[3, 5:] = 0
    message = _message(permutation_test, _changed(scores, rows_n=rows), BLOCKS)
    assert "rows_n: found 1 samples without any score above 0 in block V: 3" in message and "one token" in message


def test_too_few_samples_or_permutations() -> None:
    few = _scores(0, (2, 2, 9, 9))
    message = _message(permutation_test, few, BLOCKS)
    assert (
        "a smallest attainable p of 0.167, as p_row has 6 labelings (all there are); expected one of at most alpha=0.05"
        in message
    )
    assert "Collect more samples" in message and message.startswith("permutation_test: samples: found")
    with pytest.warns(UserWarning, match=r"p_fdr is at least 1 for a single finding, .* only if 2 have that p"):
        permutation_test(few, BLOCKS, alpha=0.9)
    many = _scores(0, (20, 20, 20, 20))
    assert "as p_row has 10 labelings (n_permutations)" in _message(permutation_test, many, BLOCKS, n_permutations=10)
    with pytest.warns(UserWarning, match="least 0.0891 for a single .* only if 2 have .* at least 360 .* n_permutations=360"):
        title = permutation_test(many, BLOCKS, n_permutations=100).title
    assert "at FDR 0.05 (too few permutations: p_fdr of a single finding is at least 0.0891), " in title
    with pytest.warns(UserWarning, match=r"p_fdr is at least 0.0299 for a single finding, just below alpha=0.05"):
        permutation_test(many, BLOCKS, n_permutations=300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned = permutation_test(many, BLOCKS, n_permutations=360)
        assert planned.permutations["p_col"] == 360 and "at FDR 0.05, " in planned.title
        assert permutation_test(many, BLOCKS).permutations["p_col"] == 9999
        assert permutation_test(many, BLOCKS, alpha=0.001).permutations["p_col"] == 18_000
    wide = _scores(0, (20, 20, 20, 20), 4096)
    with pytest.warns(UserWarning, match=r"1,000 labelings|only if 82 have that p.*n_permutations=163,840"):
        permutation_test(wide, np.repeat(["Q", "K", "V", "O"], 1024), n_permutations=1000)
    with pytest.warns(UserWarning, match=r"p_row has 32 flips of signs \(all there are\)"):
        sign_flip_test(*_margins(0, (5, 30)))
    assert "0.0625, as p_row has 16 flips" in _message(sign_flip_test, *_margins(0, (4, 30)))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((2, 9, 2), {}, r"^overlap_test: samples: .* of 0.167, as p_row has 6 labelings .*\nconflict_test: samples: .* 0.25"),
        ((9, 4, 9), {}, r"^conflict_test: samples: found a smallest attainable p of 0.0625, as p_col has 16 flips of signs"),
        ((9, 9, 9), {"n_permutations": 18}, r"^overlap_test: n_permutations: .* 18 labelings \(n_permutations\).*\nconflict"),
        ((9, 9, 9), {"alpha": 0.001}, r"^conflict_test: samples: .* 512 flips"),
    ],
)
def test_what_cannot_be_found_is_known_from_numbers_of_samples(sizes: Any, options: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        require_reach(sizes, **options)
    require_reach((5, 5, 5))
    require_reach((9, 9, 9), n_permutations=19)
    require_reach((20, 20, 20), alpha=1e-5)


def test_samples_in_common_are_counted_in_any_order() -> None:
    tasks = {"a": list("abcd"), "b": list("dcba"), "n": list("xyzdc"), "m": ["m"]}
    assert [problem.split("; ")[0] for problem in shared_samples(tasks)] == [
        "a and b: found the same 4 samples",
        "a and n: found the same 2 samples among 4 and 5",
        "b and n: found the same 2 samples among 4 and 5",
    ]


def test_signed_scores_and_maps_that_do_not_fit() -> None:
    rows, columns = _margins(0)
    message = _message(sign_flip_test, rows, columns + 0.1)
    assert "rows and columns: found other means of 0, 1, 2, 3, 4, 5, 6, 7, ... (9 in all); expected the same mean" in message
    assert "columns: found shape (5, 8); expected (sample, 9)" in _message(sign_flip_test, rows, columns[:, :8])
    assert "rows: found shape (0, 0)" in _message(sign_flip_test, None, columns, BLOCKS)
    message = _message(two_way_bootstrap, np.full((1, 3), np.nan), confidence=1, resamples=0)
    assert "1 and 3 samples (shape (1, 3)); expected at least 2 of each task. Collect more" in message
    assert "confidence: found 1" in message and "resamples=0" in message
    assert "1 and 1 samples" in _message(two_way_bootstrap, np.ones((4, 1, 1)))
    assert "shape (7,)" in (message := _message(two_way_bootstrap, np.ones(7))) and "not its means" in message
    assert "2 of 6 entries that are not finite" in _message(two_way_bootstrap, np.array([[1, np.nan, 2], [np.inf, 0, 0]]))
