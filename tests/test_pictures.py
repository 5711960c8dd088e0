"""Pictures: what they say is what they are given, nothing is cut off, and the global state of matplotlib is left alone."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from surgery import Edit, Freeze, NoMatchError, SpecError, SurgeryError, patch_model
from surgery.analysis import metrics
from surgery.analysis.ablation import Study, ablation_study, cumulative_ablation
from surgery.analysis.detectors import detect_heads
from surgery.analysis.effects import verify_effect
from surgery.analysis.importance import head_importance
from surgery.analysis.labelled import Labelled
from surgery.analysis.logit_attribution import direct_logit_attribution
from surgery.analysis.patching import activation_patching
from surgery.analysis.paths import path_patching
from surgery.analysis.steering import discover_vector
from surgery.analysis.structure import composition, copying_scores
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.plots import (
    attention_view,
    effect_bars,
    effect_by_position,
    head_maps,
    heat_maps,
    importance_against_exact,
    lines,
    pair_map,
    pattern_pictures,
    save,
)
from surgery.plots.curves import rank_correlation

SHAPES = [(2, 4), (12, 12), (32, 32)]


def panels(figure: Figure) -> list[Axes]:
    """Visible axes, colour bars left out."""
    return [a for a in figure.findobj(Axes) if a.get_visible() and a.get_label() != "<colorbar>"]  # type: ignore[union-attr]


def tick_boxes(axis: Any) -> list[Any]:
    """Where the tick labels are drawn that are in view."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [label for tick in ticks for label in (tick.label1, tick.label2)]
    return [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]


def problems(figure: Figure) -> list[str]:
    """Texts that are not wholly on the figure, and tick labels that cover each other."""
    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.width, figure.bbox.height
    found = []
    for axes in (a for a in figure.findobj(Axes) if a.get_visible()):
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]  # type: ignore[union-attr]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_visible() and t.get_text()]
        for axis, along in ((axes.xaxis, "x"), (axes.yaxis, "y")):  # type: ignore[union-attr]
            ticks = tick_boxes(axis)
            boxes += [(f"{along} tick", box) for box in ticks]
            spans = sorted((getattr(box, f"{along}0"), getattr(box, f"{along}1")) for box in ticks)
            found += [f"{along} ticks" for one, two in itertools.pairwise(spans) if one[1] > two[0] + 1]
        found += [text for text, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]
    return found


def bar(figure: Figure) -> tuple[str, tuple[float, float]]:
    """The label of the only colour bar, and the part of the scale that it shows."""
    (axes,) = [a for a in figure.findobj(Axes) if a.get_label() == "<colorbar>"]
    return axes.get_ylabel().replace("\n", " "), axes.get_ylim()  # type: ignore[union-attr]


def names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def cells(axes: Axes) -> np.ndarray:
    """The numbers that a heat map has."""
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def drawn_lines(axes: Axes) -> dict[str, np.ndarray]:
    """The lines by the names that the legend says."""
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.lines}


def sayings(figure: Figure) -> str:
    """Titles and small print above the panels."""
    parts = [figure, *figure.subfigs]
    return " | ".join(part._suptitle.get_text() for part in parts if part._suptitle is not None)


def is_labelled(figure: Figure) -> bool:
    """Whether each panel has names on its axes, or shares them with the panels beside it."""
    own = panels(figure)
    return all(a.get_xlabel() for a in own) and any(a.get_ylabel() for a in own)


def test_texts_that_are_cut_off_or_cover_each_other_are_found() -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    assert problems(figure) == []
    axes.set_xticks([0, 1], ["a" * 60, "b" * 60])
    assert problems(figure) and not is_labelled(figure)
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.subplots().set_title("x" * 120)
    assert problems(figure) == ["x" * 120]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_maps_of_any_number_of_circuits_have_one_scale(shape: tuple[int, int], count: int) -> None:
    generator = np.random.default_rng(0)
    maps = {f"map {i}": generator.normal(size=shape) * 10 * (i + 1) for i in range(count)}
    maps["map 0"][0, 1] = np.nan
    figure = head_maps(maps, title="What heads are worth", subtitle="a model", unit="loss change (nats)")
    own = panels(figure)
    assert [a.get_title() for a in own] == list(maps) and problems(figure) == [] and is_labelled(figure)
    limits = {image.get_clim() for a in own for image in a.images}
    largest = max(np.nanmax(np.abs(values)) for values in maps.values())
    assert limits == {(-largest, largest)}
    for axes, values in zip(own, maps.values(), strict=True):
        assert np.array_equal(axes.images[0].get_array().filled(np.nan), values, equal_nan=True)  # type: ignore[union-attr]
        written = [t.get_text() for t in axes.texts]
        assert len(written) in ((0,) if max(shape) > 12 else (np.isfinite(values).sum(),))
        if shape == (2, 4):
            assert f"{values[1, 2]:+.2f}".replace("-", "−") in written


def test_maps_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found maps of shapes \[\(2, 4\), \(4, 2\)\]"):
        head_maps({"a": np.zeros((2, 4)), "b": np.zeros((4, 2))})
    assert problems(head_maps({"nothing": np.full((2, 4), np.nan)})) == []


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (48, 64), (144, 12)])
def test_maps_of_other_axes_name_what_fits(rows: int, columns: int) -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, size=(rows, columns))
    texts, tokens = [f"{n // 12}.{n % 12}" for n in range(rows)], [f"$long token {n}$" for n in range(columns)]
    figure = heat_maps(
        {"a": values, "b": values + 1}, texts, tokens, axes=("layer.head", "position"), unit="loss (nats)", middle=3.0,
        edges=range(12, rows, 12), title="A title", subtitle="in small print",
    )  # fmt: skip
    first, second = panels(figure)
    assert problems(figure) == [] and is_labelled(figure) and sayings(figure) == "A title | in small print"
    assert first.get_ylabel() == "layer.head" and first.get_xlabel() == "position" and second.get_ylabel() == ""
    assert np.array_equal(cells(first), values) and np.array_equal(cells(second), values + 1)
    low, high = first.images[0].get_clim()
    reach = max(values.max() + 1 - 3, 3 - values.min())
    assert (low, high) == pytest.approx((3 - reach, 3 + reach)) and first.images[0].norm(3.0) == pytest.approx(0.5)
    label, shown = bar(figure)
    assert label == "loss (nats)" and shown == pytest.approx((values.min(), values.max() + 1))
    step = -(-rows // len(names(first.yaxis)))
    assert names(first.yaxis) == texts[::step] and names(first.xaxis)[0] == tokens[0]
    assert len([line for line in first.lines if len(set(line.get_ydata())) == 1]) == (rows - 1) // 12
    with pytest.raises(ValueError, match="1 names of rows"):
        heat_maps({"a": values}, ["one"], tokens)


def test_a_scale_of_one_sign_begins_at_white() -> None:
    for values, sign in ((np.array([[0.5, 2.0]]), 1), (np.array([[0.5, -2.0]]), 2)):
        (axes,) = panels(head_maps({"a": values}))
        color = axes.images[0].cmap(axes.images[0].norm(0.0))
        assert np.allclose(color[:3], 1.0, atol=0.01) and axes.images[0].get_clim() == (
            (-2.0, 2.0) if sign == 2 else (0.0, 2.0)
        )
        assert [text.get_text() for text in axes.texts] == (["+0.50", "−2.00"] if sign == 2 else ["0.50", "2.00"])


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ""])
def test_pictures_are_saved_and_leave_matplotlib_alone(suffix: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    written = save(head_maps({"a": np.eye(3)}), tmp_path / f"new/a{suffix}")
    assert written == tuple(tmp_path / f"new/a{end}" for end in ((suffix,) if suffix else (".png", ".pdf")))
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    beginnings = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for path in written:
        assert path.stat().st_size > 5_000 and path.read_bytes().startswith(beginnings[path.suffix])
    assert dict(matplotlib.rcParams) == before and "matplotlib.pyplot" not in _imported()


def _imported() -> set[str]:
    """What our own plotting imports, told by its sources: other tests may load pyplot."""
    folder = Path(sys.modules["surgery.plots"].__file__ or "").parent
    return {name for path in folder.glob("*.py") for name in re.findall(r"(?:from|import) (\S+)", path.read_text("utf-8"))}


# Patterns.


def test_patterns_before_and_after_cuts() -> None:
    model, ids = load_model(), repeated_sequences(2, 6, 64, 0)
    labels = [f"$w_{i}$" for i in range(13)]
    cut = [Edit("pattern", "previous", layers=[1], heads=[3])]
    figure = pattern_pictures(model, ids, cut, [(1, 3), ("self.0", 0)], labels, example=1, divider=7, title="t")
    own = panels(figure)
    assert [a.get_title() for a in own[:3]] == ["layer 1 head 3: " + what for what in ("before", "after", "after − before")]
    images = [np.asarray(a.images[0].get_array()) for a in own]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        plain = torch.stack(model(ids, output_attentions=True).attentions)[:, 1].numpy()
    np.testing.assert_allclose(images[0], plain[1, 3], atol=1e-6)
    np.testing.assert_allclose(images[3], plain[0, 0], atol=1e-6)
    assert np.array_equal(images[1], np.eye(13, k=-1) + np.eye(13)[:1].T @ np.eye(13)[:1])  # the first has only itself
    assert np.array_equal(images[2], images[1] - images[0]) and not images[5].any()  # layer 0 comes before the cut
    assert problems(figure) == [] and is_labelled(figure)
    assert not any(type(m).__name__.startswith("Surgical") for m in model.modules())


@pytest.mark.parametrize("length", [8, 120])
def test_patterns_alone(length: int) -> None:
    model = FAMILIES["llama"].build("sdpa", max_position_embeddings=256)
    ids = torch.randint(5, 60, (1, length))
    figure = pattern_pictures(model, {"input_ids": ids}, None, [(layer, head) for layer in (0, 1) for head in range(3)])
    assert len(panels(figure)) == 6 and problems(figure) == [] and is_labelled(figure)
    with pytest.raises(SpecError, match="no heads"):
        pattern_pictures(model, ids)
    with pytest.raises(SpecError, match="example 1; expected 0 to 0"):
        pattern_pictures(model, ids, None, [(0, 0)], example=1)
    with pytest.raises(NoMatchError, match="found 7"):
        pattern_pictures(model, ids, None, [(7, 0)])


def test_patterns_of_cross_attention_have_both_sequences() -> None:
    family = FAMILIES["bart"]
    (axes,) = panels(
        pattern_pictures(family.build(), family.inputs(), None, [("decoder.cross.1", 2)], sources=list("abcdefghi"))
    )
    assert [t.get_text() for t in axes.get_xticklabels()] == list("abcdefghi") and len(axes.get_yticklabels()) == 7
    assert axes.get_title() == "decoder.cross.1 head 2"


# Curves, bars, points.


def test_effects_by_position() -> None:
    generator = np.random.default_rng(0)
    table = generator.normal(size=(5, 9))
    table[0, 3], table[:, 4] = np.nan, np.nan
    figure = effect_by_position({"qk": table, "ov": table + 1}, divider=4, title="t", unit="nats")
    (axes,) = panels(figure)
    line = np.asarray(axes.lines[1].get_ydata(), dtype=float)
    np.testing.assert_allclose(line[[0, 3]], [table[:, 0].mean(), table[1:, 3].mean()])
    assert np.isnan(line[4]) and len(axes.collections) == 2 and problems(figure) == [] and is_labelled(figure)
    upper = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    known = np.delete(table, [3, 4], axis=1)
    assert upper >= (known.mean(0) + 1.96 * stats.sem(known, axis=0)).max() - 1e-9
    (axes,) = panels(effect_by_position({"one": table[1]}, tokens=[f"$t{i}$" for i in range(9)]))
    assert not axes.collections and axes.get_title() == "one"
    with pytest.raises(ValueError, match=r"at \[3, 4\] positions"):
        effect_by_position({"a": np.zeros(3), "b": np.zeros(4)})


@pytest.mark.parametrize("shape", SHAPES)
def test_estimates_against_exact_effects(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    exact = generator.exponential(size=shape)
    rough = exact + generator.normal(size=shape)
    rough[0, 0] = np.nan
    figure = importance_against_exact({"AtP": rough, "AtP*": exact}, exact, title="t")
    first, second = panels(figure)
    rank = stats.spearmanr(rough.ravel(), exact.ravel(), nan_policy="omit").statistic
    assert first.get_title().startswith(f"AtP\nρ = {rank:.3f}, r = ") and f"{exact.size - 1} heads" in first.get_title()
    assert second.get_title() == f"AtP*\nρ = 1.000, r = 1.000, {exact.size} heads"
    layer, head = np.unravel_index(exact.argmax(), shape)
    assert f"{layer}.{head}" in [t.get_text() for t in second.texts] and 1 <= len(second.texts) <= 5
    assert problems(figure) == [] and is_labelled(figure)
    with pytest.raises(ValueError, match="found 3 estimates"):
        importance_against_exact(np.zeros(3), exact)


def test_rank_correlation_is_spearmans() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, size=(2, 40))
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


def test_bars_of_a_study() -> None:
    model, ids = load_model(), repeated_sequences(6, 8, 64, 0)
    study = ablation_study(model, ids, circuits=("qk", "ov"), progress=False)
    figure = effect_bars(study.frame, count=3, title="t")
    (axes,) = panels(figure)
    shown = names(axes.yaxis)
    best = study.frame.assign(size=study.frame.effect.abs()).sort_values("size", ascending=False)
    assert shown[0] == f"{best.address.iloc[0][5:]}.{best['head'].iloc[0]:.0f}" and len(shown) == 3
    drawn = sorted(float(patch.get_width()) for patch in axes.patches)
    expected = study.frame[
        (study.frame.address + "." + study.frame["head"].astype(int).astype(str)).isin([f"self.{n}" for n in shown])
    ]
    np.testing.assert_allclose(drawn, sorted(expected.effect))
    assert axes.get_xlabel() == "change of loss (nats per token), with its confidence interval"
    assert problems(figure) == [] and is_labelled(figure)
    groups = pd.DataFrame(
        [
            dict(
                circuit="both",
                address="self.0.1 + self.1.2",
                head=None,
                metric="KL",
                unit="",
                effect=1.0,
                low=np.nan,
                high=np.nan,
            )
        ]
    )
    (axes,) = panels(effect_bars(groups))
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.1 + 1.2"]
    with pytest.raises(ValueError, match="no rows of metric 'kl'"):
        effect_bars(groups, metric="kl")


def test_lines_of_numbers_and_of_texts() -> None:
    values = np.array([1.0, 2.0, 4.0])
    bands = {"a": (values - 1, values + 1)}
    figure = lines(
        {"a": values, "b": -values}, [-1.0, 0.0, 2.0], axis="strength", unit="nats", bands=bands, middle=0.5, note="none"
    )
    (axes,) = panels(figure)
    assert problems(figure) == [] and (axes.get_xlabel(), axes.get_ylabel()) == ("strength", "nats")
    shown = drawn_lines(axes)
    assert set(shown) == {"a", "b", "none"} and np.array_equal(shown["a"], values) and np.array_equal(shown["b"], -values)
    assert set(shown["none"]) == {0.5} and np.array_equal(axes.lines[1].get_xdata(), [-1.0, 0.0, 2.0])
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert len(axes.collections) == 1 and (edge.min(), edge.max()) == (0.0, 5.0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "a", "b"]
    many = lines({"one": np.zeros(90)}, [f"a long token {n}" for n in range(90)], axis="position (token)", unit="nats")
    (axes,) = panels(many)
    assert problems(many) == [] and axes.get_title() == "one" and not many.legends and 30 < len(names(axes.xaxis)) <= 90


@pytest.mark.parametrize("shape", [(2, 4), (12, 12)])
def test_maps_of_pairs(shape: tuple[int, int]) -> None:
    heads = [f"{layer}.{head}" for layer, head in np.ndindex(shape)]
    values = np.random.default_rng(0).normal(size=(len(heads),) * 2)
    values[np.tril_indices(len(heads))] = np.nan
    edges = range(shape[1], len(heads), shape[1])
    figure = pair_map(values, heads, edges, rows="sender", columns="receiver", unit="score", title="t", subtitle="s")
    assert problems(figure) == [] and is_labelled(figure) and sayings(figure) == "t | s"
    (axes,) = panels(figure)
    assert np.array_equal(cells(axes), values, equal_nan=True) and bar(figure)[0] == "score"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("sender", "receiver") and len(axes.lines) == 2 * len(edges)


# What analyses draw of themselves.


@pytest.fixture(scope="module")
def subject() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model, sequences that say everything twice, and others of the same shape."""
    ids = repeated_sequences(4, 6, 64, 0)
    return load_model(), ids, ids.roll(1, 0).roll(3, 1)


SECOND = metrics.loss(positions=range(6, 12))
UNIT = "(nats per token)"


def test_a_study_draws_its_circuits_side_by_side(subject: Any) -> None:
    model, ids, _ = subject
    study = ablation_study(model, ids, metrics=SECOND, to="mean", progress=False)
    figure = study.picture()
    assert problems(figure) == [] and is_labelled(figure)
    assert [a.get_title() for a in panels(figure)] == ["QK frozen", "OV frozen", "both frozen"]
    for axes, circuit in zip(panels(figure), ("qk", "ov", "both"), strict=True):
        assert np.array_equal(cells(axes), study.matrix(circuit).to_numpy())
    assert len({axes.images[0].get_clim() for axes in panels(figure)}) == 1
    assert names(panels(figure)[0].yaxis) == ["0", "1"] and bar(figure)[0] == f"change of loss {UNIT}"
    assert "to mean" in sayings(figure) and "4 examples; loss without cuts" in sayings(figure)


def test_a_study_of_growing_groups_draws_lines(subject: Any) -> None:
    model, ids, _ = subject
    order: list[tuple[str | int, int]] = [(1, 3), (0, 0), (1, 1)]
    study: Study = cumulative_ablation(model, ids, order, metrics=SECOND, progress=False)
    figure = study.picture()
    (axes,) = panels(figure)
    assert problems(figure) == [] and names(axes.xaxis) == ["1.3", "+ 0.0", "+ 1.1"]
    assert np.array_equal(drawn_lines(axes)["both frozen"], study.frame.effect)
    edge = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.min() == study.frame.low.min() and edge.max() == study.frame.high.max()
    assert axes.get_ylabel() == f"change of loss {UNIT}" and "one more head to zero" in sayings(figure)
    groups = ablation_study(model, ids, "ov", groups=[[(0, 0), (1, 1)], [(1, 2), (1, 3)]], metrics=SECOND, progress=False)
    with pytest.raises(SpecError, match="no single head"):
        groups.picture()


def test_importance_draws_its_scores_and_edges_and_how_right_they_were(subject: Any) -> None:
    model, ids, others = subject
    found = head_importance(model, ids, others, SECOND, "atp", verify_top=4, sample=3, edges=[(1, 2), (1, 3)])
    figure = found.picture()
    assert problems(figure) == [] and is_labelled(figure) and [a.get_title()[:3] for a in panels(figure)] == ["QK:", "OV:"]
    for axes, circuit in zip(panels(figure), ("qk", "ov"), strict=True):
        assert np.array_equal(cells(axes), found.matrix(circuit).to_numpy())
    assert bar(figure)[0] == f"AtP estimate of the change of loss {UNIT}" and "replaced by corrupted" in sayings(figure)
    against = found.against_exact()
    rows = found.frame.dropna(subset=["exact"])
    best = rows.loc[rows.exact.abs().idxmax()]
    assert problems(against) == [] and len(rows) == 7 and {*rows.circuit} == {"qk", "ov"}
    for axes, circuit in zip(panels(against), rows.circuit.unique(), strict=True):
        mine = rows[rows.circuit == circuit]
        drawn = np.ma.filled(axes.collections[0].get_offsets(), np.nan)
        assert np.array_equal(drawn[np.isfinite(drawn).all(1)], mine[["exact", "score"]].to_numpy())
        assert axes.get_xlabel() == f"exact change of loss {UNIT}"
        if circuit == best.circuit:
            assert f"{best.address[5:]}.{best['head']}" in [text.get_text() for text in axes.texts]
    assert panels(against)[0].get_ylabel() == f"estimated change of loss {UNIT}"
    edges = found.edge_picture()
    assert problems(edges) == [] and [axes.get_title() for axes in panels(edges)] == ["into q", "into k", "into v"]
    for axes, name in zip(panels(edges), ("q", "k", "v"), strict=True):
        assert cells(axes).shape == (4, 2) and names(axes.xaxis) == ["1.2", "1.3"]
        assert np.array_equal(cells(axes), found.edge_matrix(name).dropna().to_numpy()) and np.isfinite(cells(axes)).all()
    with pytest.raises(SpecError, match="no exact changes"):
        head_importance(model, ids, others, SECOND, "atp").against_exact()


OVERS = [("layer",), ("position",), ("layer", "head"), ("head", "position"), ("layer", "head", "position")]


@pytest.mark.parametrize("over", OVERS, ids=".".join)
def test_patching_draws_what_it_was_done_over(subject: Any, over: tuple[str, ...]) -> None:
    model, ids, others = subject
    found = activation_patching(model, ids[:2], others[:2], SECOND, ("z", "q"), over, positions=[0, 5, 9], progress=False)
    figure = found.picture()
    assert problems(figure) == [] and is_labelled(figure)
    assert "patched into the clean run" in sayings(figure) and "loss: clean" in sayings(figure)
    label = {"position": "position (token)"}
    if len(over) == 1:
        (axes,) = panels(figure)
        assert np.array_equal(drawn_lines(axes)["at q"], found.effect("q").values)
        assert axes.get_ylabel() == f"change of loss {UNIT}" and axes.get_xlabel() == label.get(over[0], over[0])
        return
    for axes, site in zip(panels(figure), ("z", "q"), strict=True):
        assert axes.get_title() == f"at {site}" and axes.get_xlabel() == label.get(over[-1], over[-1])
        assert np.array_equal(cells(axes).ravel(), found.effect(site).values.ravel())
    assert bar(figure)[0] == f"change of loss {UNIT}" and panels(figure)[0].get_ylabel() == ".".join(over[:-1])
    if over[-1] == "position":
        texts = [f"Ġword{n}" for n in range(12)]
        named = found.picture(tokens=texts)
        assert names(panels(named)[0].xaxis) == [f"{n} {texts[n]}" for n in (0, 5, 9)] and problems(named) == []
        with pytest.raises(SpecError, match="9 texts of tokens; expected at least 10"):
            found.picture(tokens=texts[:9])


@pytest.mark.parametrize(("view", "white"), [("value", None), ("recovery", 1.0)])
def test_patching_is_white_where_nothing_changes(subject: Any, view: str, white: float | None) -> None:
    model, ids, others = subject
    found = activation_patching(model, ids[:2], others[:2], SECOND, "z", ("layer", "head"), progress=False)
    figure = found.picture(view)
    (axes,) = panels(figure)
    image = axes.images[0]
    assert np.array_equal(cells(axes), getattr(found, view)().values)
    assert np.allclose(image.cmap(image.norm(found.clean.mean() if white is None else white))[:3], 1.0, atol=0.01)


def test_paths_and_steering_draw_themselves(subject: Any) -> None:
    model, ids, others = subject
    paths = path_patching(model, ids[:2], others[:2], SECOND, "all", ["logits", (1, 3, "k")], progress=False)
    figure = paths.picture()
    assert [a.get_title() for a in panels(figure)] == ["into logits", "into self.1 head 3 k"] and problems(figure) == []
    assert np.array_equal(cells(panels(figure)[1]), paths.effect("self.1 head 3 k").values, equal_nan=True)
    vectors = discover_vector(model, ids[:2], others[:2])
    norms = vectors.picture()
    assert np.array_equal(cells(panels(norms)[0]), vectors.norms().values) and bar(norms)[0] == "norm at z (units of z)"
    held = repeated_sequences(3, 6, 64, 5)
    steered = vectors.only([(0, 0), (1, 3)]).effect(held, SECOND, (-1.0, 0.0, 2.0), each=True, progress=False)
    figure = steered.picture()
    (axes,) = panels(figure)
    frame, shown = steered.to_frame(), drawn_lines(axes)
    assert problems(figure) == [] and axes.get_xlabel() == "strength" and axes.get_ylabel() == f"loss {UNIT}"
    assert set(shown) == {"unsteered", "layer 0 head 0", "layer 1 head 3"}
    own = frame[frame["head"] == "self.1 head 3"]
    assert np.array_equal(shown["layer 1 head 3"], own.value) and set(shown["unsteered"]) == {float(steered.unsteered.mean())}
    place = [str(line.get_label()) for line in axes.lines].index("layer 1 head 3") - 1
    edge = axes.collections[place].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([edge.min(), edge.max()], [(own.value - own.error).min(), (own.value + own.error).max()])


def test_an_effect_draws_its_measures_by_position(subject: Any) -> None:
    model, ids, _ = subject
    effect = verify_effect(model, [Freeze("qk", layers=[1], heads=[3]), Freeze("ov", layers=[0], heads=[0])], ids)
    figure = effect.picture()
    assert problems(figure) == [] and sayings(figure).splitlines() == [str(cut) for cut in effect.spec]
    top = [a.get_title(loc="left") for a in panels(figure)]
    assert top[2:4] == ["KL(uncut || cut)", "top-1 agreement"] and panels(figure)[3].get_ylim() == (-0.05, 1.05)
    np.testing.assert_allclose(panels(figure)[2].lines[0].get_ydata(), effect.by_position().kl)
    edge = panels(figure)[2].collections[0].get_paths()[0].vertices[:, 1]
    assert edge.max() == np.nanmax(effect.arrays["kl"]) and not panels(figure)[3].collections
    assert panels(figure)[-1].get_xlabel() == "position (tokens, from 0)"


def test_an_array_of_too_many_axes_is_not_drawn() -> None:
    array = Labelled(np.zeros((1, 2, 3, 4)), {"a": "a", "b": "ab", "c": "abc", "d": "abcd"}, "loss", "nats")
    with pytest.raises(SpecError, match="an array of 4 axes"):
        array.picture()
    figure = array.at(a="a").picture("t")
    assert names(panels(figure)[0].yaxis) == ["a.a", "a.b", "a.c", "b.a", "b.b", "b.c"] and bar(figure)[0] == "loss (nats)"


def test_findings_draw_themselves() -> None:
    model, ids = load_model(), repeated_sequences(2, 8, 64, 0)
    figures = [
        detect_heads(model, ids).picture(),
        composition(model, "k").picture(),
        copying_scores(model).picture(),
        direct_logit_attribution(model, ids, tokens=3).picture(),
    ]
    assert [problems(figure) for figure in figures] == [[]] * 4 and all(map(is_labelled, figures))
    scores = detect_heads(model, ids).matrix("induction").to_numpy()
    drawn = {a.get_title(): np.asarray(a.images[0].get_array()) for a in panels(figures[0])}
    assert np.array_equal(drawn["Induction"], scores) and len(drawn) == 4
    assert [bar(figure)[0] for figure in figures] == [
        "mean attention",
        "k-composition score above that of random matrices",
        "Σλ / Σ|λ| of the OV circuit",
        "contribution (logits)",
    ]
    assert {axes.images[0].get_clim() for axes in panels(figures[0])} == {(0.0, 1.0)}
    assert [axes.images[0].get_clim() for axes in panels(figures[2])] == [(-1.0, 1.0)]
    assert np.array_equal(cells(panels(figures[1])[0]), composition(model, "k").excess, equal_nan=True)
    assert np.array_equal(cells(panels(figures[2])[0]), copying_scores(model).matrix().to_numpy())


# In a notebook.


def _drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What circuitsvis is asked to draw, by a module in its place."""
    asked: dict[str, Any] = {}

    def attention_heads(**arguments: Any) -> Any:
        asked.update(arguments)
        return SimpleNamespace(local_src="<div>here</div>", cdn_src="<script src='elsewhere'>")

    module = ModuleType("circuitsvis.attention")
    module.attention_heads = attention_heads  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "circuitsvis", ModuleType("circuitsvis"))
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", module)
    return asked


def test_a_view_shows_heads_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _drawn(monkeypatch)
    model, ids = load_model(), repeated_sequences(1, 5, 64, 0)
    view = attention_view(model, ids, [(0, 0), (1, 3)], spec=Freeze("qk", layers=[0], heads=[0]))
    assert view._repr_html_() == "<div>here</div>"
    assert asked["attention_head_names"] == [
        f"layer {name}: {when}" for when in ("before", "after") for name in ("0 head 0", "1 head 3")
    ]
    assert asked["attention"].shape == (4, 11, 11) and asked["mask_upper_tri"] and asked["tokens"][:2] == ["0", "1"]
    np.testing.assert_allclose(asked["attention"][2], np.tril(np.ones((11, 11))) / np.arange(1, 12)[:, None], rtol=1e-6)
    with pytest.raises(SurgeryError, match="2 labels; expected 11"):
        attention_view(model, ids, [(0, 0)], ["a", "b"])
    bart = FAMILIES["bart"]
    with pytest.raises(SurgeryError, match="patterns of 7 queries over 9 keys"):
        attention_view(bart.build(), bart.inputs(), [("decoder.cross.0", 0)])
    bert = FAMILIES["bert"]
    attention_view(bert.build(), bert.inputs(padding=0), [(0, 0)])
    assert not asked["mask_upper_tri"]


def test_a_view_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", None)
    with pytest.raises(SurgeryError, match=r'no package circuitsvis .*pip install "attention-surgery\[notebook\]"'):
        attention_view(load_model(), repeated_sequences(1, 5, 64, 0), [(0, 0)])


def test_a_view_by_the_package_itself_loads_nothing() -> None:
    pytest.importorskip("circuitsvis", reason="an extra")
    model, ids = FAMILIES["gpt2"].build(), torch.tensor([[5, 6, 7, 8]])
    patch_model(model, Edit("pattern", "previous", layers=[1], heads=[2]))
    html = attention_view(model, ids, [(1, 2)], ["a", "b", "c", "d"]).html
    assert "unpkg.com/circuitsvis" not in html and "import {" not in html[:200]
    props = json.loads(re.findall(r"CircuitsVis\.AttentionHeads,\s*(\{.*?\})\s*\)\s*</script>", html, re.S)[0])
    assert props["attention"] == [[[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]
    assert props["tokens"] == ["a", "b", "c", "d"] and props["attentionHeadNames"] == ["layer 1 head 2"]
