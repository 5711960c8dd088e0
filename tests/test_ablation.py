"""Ablation studies: the numbers of a plain loop, statistics that mean what they say, work that goes on where it stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from surgery import Freeze, NoMatchError, SpecError, collect_reference, patch_model, patched
from surgery.analysis import metrics
from surgery.analysis.ablation import Study, ablation_study, cumulative_ablation
from surgery.analysis.journal import Journal, digest
from surgery.analysis.reading import Reading
from surgery.analysis.statistics import corrected, paired
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences

IDS = repeated_sequences(8, 20, 64, 3)
SCORED = range(22, 41)


@pytest.fixture(scope="module")
def study() -> Study:
    return ablation_study(load_model(), IDS, metrics=[metrics.loss(SCORED), "kl"], progress=False)


def test_every_number_is_that_of_a_plain_loop(study: Study) -> None:
    model, loss = load_model(), metrics.loss(SCORED)
    before = None
    for row in study.frame[study.frame.metric == "loss"].itertuples():
        with torch.no_grad():
            before = model(IDS) if before is None else before
            with patched(model, Freeze(row.circuit, layers=[row.address], heads=[int(row.head)])):
                after = model(IDS)
        values = [loss(metrics.Measured(model, {"input_ids": IDS}, o, o.logits, None)) for o in (after, before)]
        # float32 sums over other batch sizes; losses of 1e-4 nats and up
        assert row.value == pytest.approx(values[0].mean().item(), rel=1e-4, abs=1e-7)
        assert row.baseline == pytest.approx(values[1].mean().item(), rel=1e-4, abs=1e-7)
        assert row.effect == pytest.approx((values[0] - values[1]).mean().item(), rel=1e-4, abs=1e-6)
    assert len(study.frame) == 3 * 8 * 2 and study.examples.shape == (24, 2, 8) and study.baseline.shape == (2, 8)


def test_the_heads_that_matter_are_found(study: Study) -> None:
    top = study.top(4)
    assert {(row.address, row.head) for row in top.itertuples()} == {("self.0", 0), ("self.1", 3)}
    assert (top.p < 0.01).all() and (top.low > 1).all() and (top["size"] > 3).all()
    sides = study.side_by_side()
    assert list(sides.columns) == ["qk", "ov", "both"] and sides.loc[("self.1", 3), "qk"] > 3
    assert study.matrix("qk").shape == (2, 4) and study.matrix("ov", "KL").loc["self.1", 3] > 1
    assert "self.1" in str(study) and "<table" in study._repr_html_() and r"\toprule" in study.to_latex()
    with pytest.raises(SpecError, match="expected a circuit that was studied"):
        study.matrix("z")
    for ask in (study.top, lambda metric: study.matrix("both", metric), study.picture, study.bars, study.side_by_side):
        with pytest.raises(SpecError, match=r"metric: found 'los'; expected 'loss', 'KL'\. Did you mean 'loss'"):
            ask(metric="los")
    with pytest.raises(SpecError, match="metric: found 'typo'"):
        study.baseline_of("typo")
    with pytest.raises(SpecError, match=r"column: found 'efect'.*Did you mean 'effect'"):
        study.side_by_side(column="efect")


def test_groups_and_growing_sets() -> None:
    model, order = load_model(), [(1, 3), ("self.0", 1), (0, 0)]
    found = cumulative_ablation(model, IDS, order, metrics=metrics.loss(SCORED), progress=False)
    assert found.frame.heads.tolist() == [1, 2, 3] and found.frame["head"].isna().tolist() == [False, True, True]
    assert found.frame.address.tolist()[1:] == ["self.1.3 + self.0.1", "self.1.3 + self.0.1 + self.0.0"]
    one = ablation_study(model, IDS, "both", groups=[order], metrics=metrics.loss(SCORED), progress=False)
    np.testing.assert_allclose(one.examples[0], found.examples[2], rtol=1e-4)
    for wrong in ([], [[]], [order, []]):
        with pytest.raises(SpecError, match="groups"):
            ablation_study(model, IDS, groups=wrong, progress=False)


def test_seeds_of_noise_are_rows_of_their_own() -> None:
    model = load_model()
    found = ablation_study(model, IDS, "ov", layers=[1], heads=[3], to="noise", seeds=(0, 1, 2), progress=False)
    assert found.frame.seed.tolist() == [0, 1, 2] and found.frame.value.nunique() == 3
    assert found.matrix("ov").loc["self.1", 3] == pytest.approx(found.frame.effect.mean())


def test_means_and_several_batches_and_kinds_of_models() -> None:
    model = load_model()
    means = collect_reference(model, [IDS], progress=False)
    parts = ablation_study(model, [IDS[:3], IDS[3:]], ["ov"], to="mean", reference=means, progress=False)
    whole = ablation_study(model, IDS, ["ov"], to="mean", reference=means, progress=False)
    np.testing.assert_allclose(parts.examples, whole.examples, rtol=1e-4, atol=1e-6)
    for name in ("bert", "t5", "whisper"):
        family = FAMILIES[name]
        found = ablation_study(
            family.build(),
            family.inputs(),
            "ov",
            metrics=lambda o: (o.logits if "logits" in o else o[0]).flatten(1).std(1),
            progress=False,
        )
        assert (found.frame.effect.abs() > 0).all()


def test_one_number_for_a_whole_batch_is_one_unit() -> None:
    """However many examples it is of: repeated for each, they would agree perfectly and be p = 2^(1 - n)."""

    def mean_logit(output: Any) -> Tensor:
        return output.logits[..., 3].mean()

    options: dict[str, Any] = dict(circuits="ov", layers=[1], metrics=[mean_logit, "loss"], progress=False)
    one = ablation_study(load_model(), IDS, **options)
    of = one.frame[one.frame.metric == "mean_logit"]
    assert of[["p", "low", "high", "size", "p_fdr"]].isna().all(axis=None) and (of.effect != 0).all()
    assert one.frame[one.frame.metric == "loss"].p.notna().all() and "note: mean_logit is one number" in str(one)
    parts = [IDS[:3], IDS[3:6], IDS[6:]]
    several = ablation_study(load_model(), parts, **options)
    for row, values in zip(several.frame[::2].itertuples(), several.examples[:, 0], strict=True):
        differences = (values - several.baseline[0])[[0, 3, 6]]
        assert row.effect == differences.mean() and row.p == paired(differences).p >= 0.25
        assert row.value - row.baseline == pytest.approx(row.effect)
    assert several.notes == [
        "mean_logit is one number for a whole batch, not one for each example: intervals and p are over 3 batches"
    ]


def test_an_example_without_a_number_is_named() -> None:
    def root(m: metrics.Measured) -> Tensor:  # of a negative number, in one example
        return (m.logits[:, -1].mean(1) + torch.tensor([1e3, 1e3, -1e3, 1e3])).sqrt()

    given: list[Any] = [metrics.Metric("root", "", root), "kl"]
    found = ablation_study(load_model(), IDS[:4], "ov", layers=[1], heads=[0, 1], metrics=given, progress=False)
    assert found.frame[found.frame.metric == "root"].effect.isna().all()
    assert found.frame[found.frame.metric == "KL"].effect.notna().all()
    [note] = found.notes
    assert "root is not a finite number in example 2 (from 0), without cuts: 2 of 2 cuts" in note and note in str(found)


def test_metrics_of_one_name_are_kept_apart() -> None:
    pairs = [metrics.logit_difference(1, 2), metrics.logit_difference(3, 4)]
    options: dict[str, Any] = dict(circuits="ov", layers=[1], progress=False)
    both = ablation_study(load_model(), IDS, metrics=[*pairs, "loss"], **options)
    assert both.frame.metric.unique().tolist() == ["logit difference", "logit difference 2", "loss"]
    for name, one in zip(["logit difference", "logit difference 2"], pairs, strict=True):
        alone = ablation_study(load_model(), IDS, metrics=one, **options)
        np.testing.assert_allclose(both.matrix("ov", name), alone.matrix("ov"), rtol=1e-4, atol=1e-6)
        mine = both.frame[both.frame.metric == name]
        np.testing.assert_allclose(mine.p_fdr, corrected(mine.p.to_numpy()))
    taken = [metrics.Metric(name, "", lambda m: m.logits) for name in ("a", "a 2", "a", "a")]
    assert [metric.name for metric in Reading(taken).metrics] == ["a", "a 2", "a 3", "a 4"]


def test_what_does_not_fit_is_said_before_anything_runs(tmp_path: Path) -> None:
    model, ran = load_model(), []
    model.register_forward_hook(lambda *_: ran.append(0))
    for options, error in (
        ({"circuits": "qv"}, SpecError),
        ({"layers": [7]}, NoMatchError),
        ({"heads": [9]}, SpecError),
        ({"to": "nothing"}, SpecError),
        ({"metrics": "losss"}, SpecError),
        ({"groups": [[(0, 9)]]}, SpecError),
        ({"to": "activation"}, SpecError),
        ({"circuits": []}, SpecError),
        ({"seeds": ()}, SpecError),
        ({"metrics": []}, SpecError),
        ({"groups": [(0, 1)]}, SpecError),
        ({"groups": 5}, SpecError),
        ({"confidence": "95%"}, SpecError),
        ({"groups": [[(0, 1.5)]]}, SpecError),
        ({"confidence": 95}, SpecError),
        ({"data": {}}, SpecError),
    ):
        with pytest.raises(error):
            ablation_study(model, **{"data": IDS, "progress": False, "resume": tmp_path / "j", **options})  # type: ignore[arg-type]
    assert not ran and not (tmp_path / "j").exists()


# -- going on -----------------------------------------------------------------------------------------------------------


def test_a_killed_study_goes_on_where_it_stopped(tmp_path: Path, study: Study) -> None:
    path, model = tmp_path / "study.jsonl", load_model()
    seen: list[int] = []

    def metric(output: Any) -> Any:
        seen.append(len(seen))
        if len(seen) == 30:
            raise KeyboardInterrupt
        return output.logits.float().std((1, 2))

    options: dict[str, Any] = dict(metrics=metric, resume=path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        ablation_study(model, [IDS[:4], IDS[4:]], **options)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "1/qk self.0.')  # cut off by the kill
    done = len(path.read_text(encoding="utf-8").splitlines()) - 2
    again = ablation_study(model, [IDS[:4], IDS[4:]], **options)
    assert done == 29 and len(seen) == 30 + (2 * 25 - 29) + 2, "what is without cuts is measured again, batch by batch"
    fresh = ablation_study(model, [IDS[:4], IDS[4:]], **{**options, "resume": None})
    np.testing.assert_allclose(again.examples, fresh.examples, rtol=1e-4)
    third = ablation_study(model, [IDS[:4], IDS[4:]], **options)
    assert np.array_equal(third.examples, again.examples) and pd.DataFrame.equals(third.frame, again.frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"data": IDS[:4]}, "data"), ({"circuits": "ov"}, "cuts"), ({"metrics": "kl"}, "metrics"), ({"to": "noise"}, "cuts")],
)
def test_results_of_another_study_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"data": IDS, "circuits": "qk", "resume": tmp_path / "a", "layers": [1], "progress": False}
    ablation_study(load_model(), **options)
    with pytest.raises(SpecError, match=f"another study.*{message}"):
        ablation_study(load_model(), **{**options, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"model": patch_model(load_model(), Freeze("ov", layers=[0], heads=[2]))}, "cuts of the model"),
        (lambda: {"model": _nudged(load_model())}, "weights"),
        (lambda: {"metrics": metrics.logit_difference(3, 5)}, "results without cuts"),
        (lambda: {"metrics": metrics.logit_difference(3, 4, position=2)}, "metrics"),
    ],
)
def test_results_that_only_look_alike_are_refused(tmp_path: Path, change: Callable[[], dict[str, Any]], message: str) -> None:
    path, metric = tmp_path / "a", metrics.logit_difference(3, 4)
    options = {"data": IDS, "circuits": "qk", "resume": path, "layers": [1], "metrics": metric, "progress": False}
    first = ablation_study(load_model(), **options)
    kept = path.read_bytes()
    with pytest.raises(SpecError, match=f"another study.*{message}"):
        ablation_study(**{"model": load_model(), **options, **change()})
    assert path.read_bytes() == kept
    assert ablation_study(load_model(), **options).frame.equals(first.frame), "the same study in another process"


def test_a_digest_tells_every_bit_kind_and_shape() -> None:
    x = torch.arange(6.0)
    alike = [x, x.flip(0), x.view(2, 3), x.double(), x.bfloat16(), x + torch.tensor([0, 0, 1e-6, 0, 0, 0]), x[0], x.to("meta")]
    assert len({digest([("w", one)]) for one in [*alike, "x", 1, None]}) == len(alike) + 3
    assert digest([("w", x.view(2, 3).T)]) == digest([("w", x.view(2, 3).T.contiguous())]) != digest([("v", x)])


def _nudged(model: Any) -> Any:
    """One weight of the last layer, which the shape of nothing tells, and hardly a number of the output."""
    with torch.no_grad():
        weight = [weight for weight in model.parameters() if weight.dim() == 2][-1]
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    return model


def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    for text in ("my notes\n", '{"a": 1}\n', "[]\n", '{"about": {}}\n{"b": 2}\n'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SpecError, match="lines of something else"):
            Journal(path, {})
        assert path.read_text(encoding="utf-8") == text
    with pytest.raises(SpecError, match="another study"):
        Journal(_written(tmp_path, {"model": "a"}), {"model": "b"})


def test_what_is_measured_again_may_round_otherwise_and_no_more(tmp_path: Path) -> None:
    first = np.array([[2.0, 1e-3, np.nan], [1e-6, -np.inf, 0.0]])
    Journal(tmp_path / "j", {}).confirm("0/", first)
    near, kept = first * (1 + 1e-4), (tmp_path / "j").read_bytes()
    near[0, 1] = 2e-3  # a small number among large ones
    for again in (first, near):
        Journal(tmp_path / "j", {}).confirm("0/", again)
    far = [first * 1.01, np.nan_to_num(first), first[:1], first[:, ::-1], first + np.array([[0], [1e-8]])]
    for other in far:
        with pytest.raises(SpecError, match=r"another study \(results without cuts: 2, 0.001, nan, 1e-06, ...\); expected"):
            Journal(tmp_path / "j", {}).confirm("0/", other)
    assert (tmp_path / "j").read_bytes() == kept


def _written(folder: Path, about: dict[str, Any]) -> Path:
    Journal(folder / "j", about).add("k", [1])
    assert [json.loads(line) for line in (folder / "j").read_text().splitlines()] == [
        {"about": about},
        {"key": "k", "result": [1]},
    ]
    return folder / "j"


# -- statistics ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.randoms())
@example([0.0, 7.6e-284], Random(0))
def test_paired_numbers_hold_together(values: list[float], random: Any) -> None:
    """Of at most 12 examples, whose signs are flipped in all ways: 2^12 are fewer than the resamples."""
    found = paired(np.array(values))
    assert 0 < found.p <= 1
    assert found.effect == pytest.approx(np.mean(values))
    assert found.low <= found.effect <= found.high
    if np.ptp(values) > 1e-6:
        assert found.size_low <= found.size_high
        assert found.size == pytest.approx(np.mean(values) / np.std(values, ddof=1))
    flipped = paired(-np.array(values))
    assert (flipped.effect, flipped.size, flipped.p) == (-found.effect, -found.size, found.p)
    assert [flipped.low, flipped.high] == pytest.approx([-found.high, -found.low], rel=1e-9, abs=1e-9)
    larger = paired(4 * np.array(values))  # a power of two: no digit changes
    assert vars(larger) == pytest.approx({**vars(found), **{k: 4 * getattr(found, k) for k in ("effect", "low", "high")}})
    other = paired(np.array(random.sample(values, len(values))))
    assert [other.effect, other.size] == pytest.approx([found.effect, found.size], rel=1e-9, abs=1e-9)
    assert other.p == pytest.approx(found.p), "in whatever order examples come"


def test_the_sign_flip_test_is_exact_for_few_examples() -> None:
    assert paired(np.array([1.0, 2.0, 3.0, 4.0, 5.0])).p == pytest.approx(2 / 32)
    assert paired(np.array([1.0, -1.0])).p == 1.0
    assert paired(np.zeros(5)).p == 1.0 and paired(np.zeros(5)).size == 0
    assert np.isnan(paired(np.array([3.0])).p) and paired(np.array([3.0])).effect == 3.0


def test_the_size_of_few_examples_is_not_sure() -> None:
    """Half of the resamples of two are one difference alone, of infinite size; to drop them would leave a single number."""
    two = paired(np.array([1.0, 2.0]))
    assert two.size_low == two.size == pytest.approx(1.5 / np.sqrt(0.5)) and two.size_high == np.inf
    assert paired(np.array([-1.0, -2.0])).size_low == -np.inf
    third = paired(np.array([0.0, 0.0, 1.0]))
    assert (third.size_low, third.size_high) == (0, np.inf), "8 of 27 resamples are nothing but zeros, 1 of 27 nothing but ones"


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [3.0, 3.5, 2.5, 3.25, 2.0]])
def test_the_interval_of_the_size_is_that_of_all_resamples(values: list[float]) -> None:
    """Of n differences there are n^n resamples, each as likely: their quantiles, with those of infinite size."""
    picks = np.array(list(itertools.product(values, repeat=len(values))))
    spread = picks.std(1, ddof=1)
    sizes = np.where(spread < 1e-9, np.inf, picks.mean(1) / np.where(spread < 1e-9, 1, spread))
    found = paired(np.array(values), resamples=99999)
    for tail, bound in ((0.025, found.size_low), (0.975, found.size_high)):
        less, at_most = ((sizes < bound * (1 - 1e-9)).mean(), (sizes <= bound * (1 + 1e-9)).mean())  # sums round by their order
        assert less - 2e-3 <= tail <= at_most + 2e-3, "four standard deviations of a share of 99,999"


@pytest.mark.parametrize("rounding", [0.0, 2e-16, 1e-15])
def test_differences_that_are_one_number_but_for_rounding_have_an_interval_of_a_point(rounding: float) -> None:
    """As of a model whose examples are alike: there is nothing to resample, and the jackknife would divide 0 by 0."""
    found = paired(-7.0 * (1 + rounding * np.arange(6)))
    assert (found.low, found.high, found.p) == (found.effect, found.effect, 2 / 2**6) and found.size == -np.inf


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = paired(rng.normal(0.3, 1, size=40), resamples=999)
        inside += found.low <= 0.3 <= found.high
    # Binomial with 0.95 (BCa of 40 normals comes near it): 99.9 % of runs have 180 to 198 of 200.
    assert 180 <= inside <= 198


def test_corrected_p_values_are_those_of_benjamini_and_hochberg() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.5])
    expected = [0.04, 0.16 / 3, np.nan, 0.16 / 3, 0.5]
    np.testing.assert_allclose(corrected(p), expected)
    assert np.isnan(corrected(np.array([np.nan]))).all()


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=20), st.randoms())
def test_correction_keeps_the_order_and_depends_on_no_other(p: list[float], random: Any) -> None:
    found = corrected(np.array(p))
    assert (found >= p).all() and (found <= 1).all()
    assert (np.diff(found[np.argsort(p)]) >= 0).all(), "who was smaller stays so, or they are alike"
    by_definition = [min(len(p) * q / sum(r <= q for r in p) for q in p if q >= own) for own in p]
    np.testing.assert_allclose(found, np.minimum(by_definition, 1))
    order = random.sample(range(len(p)), len(p))
    np.testing.assert_allclose(corrected(np.array(p)[order]), found[order])
    smaller = np.array(p) * [0.5, *[1] * (len(p) - 1)]
    assert (corrected(smaller) <= found + 1e-15).all(), "evidence for one takes nothing from the others"


def p_values(models: int, choose: Callable[[Any, Tensor, torch.Generator], tuple[Tensor, Tensor]]) -> np.ndarray:
    """A study of each head's QK and OV in random models on random tokens, and for each cut a metric of its own.

    choose: of the model and its tokens, for each example the token whose logit is taken, and the one that is subtracted.
    """
    found = []
    for seed in range(models):
        model, generator = patch_model(FAMILIES["gpt2"].build(seed=seed)), torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 60, (12, 8), generator=generator)
        for layer, head, circuit in itertools.product((0, 1), range(4), ("qk", "ov")):
            metric = metrics.logit_difference(*choose(model, ids, generator))
            study = ablation_study(model, ids, circuit, [layer], [head], metrics=metric, progress=False)
            found += study.frame.p.tolist()
    return np.array(found)


def by_lot(model: Any, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    right, wrong = torch.rand(len(ids), 55, generator=generator).argsort(1)[:, :2].T + 5
    return right, wrong


def test_nothing_planted_gives_five_per_cent_of_small_p_values() -> None:
    """Which of two random tokens is the right one is drawn by lot, so that no cut can have an effect on it.

    The null hypothesis holds by construction: right and wrong could be exchanged in each example, so that each difference is as
    likely as its opposite, whatever a cut does to logits. Lots are drawn for each cut anew: so are the tests independent, and
    small p-values are binomial.
    """
    found = p_values(13, by_lot)
    low, high = stats.binom.interval(0.999, len(found), 0.05)
    assert len(found) == 208 and low >= 2 and high <= 22
    assert low <= (found < 0.05).sum() <= high, (found < 0.05).sum()
    assert stats.kstest(found, "uniform").pvalue > 1e-3, "nor are they of any other shape"
    assert corrected(found).min() > 0.05, "nothing is left when that many are tested"


def test_something_planted_gives_more() -> None:
    """The same with the model's own answer as the right token, which a cut of a head takes something from."""

    def own(model: Any, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return model(ids).logits[:, -1].argmax(-1), by_lot(model, ids, generator)[1]

    found = p_values(2, own)
    assert (found < 0.05).sum() > stats.binom.interval(0.999, len(found), 0.05)[1]
    assert (corrected(found) < 0.05).any()
