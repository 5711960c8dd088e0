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
from surgery.analysis.ablation import ablation_study
from surgery.analysis.detectors import detect_heads
from surgery.analysis.logit_attribution import direct_logit_attribution
from surgery.analysis.structure import composition, copying_scores
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.plots import (
    attention_view,
    effect_bars,
    effect_by_position,
    head_maps,
    importance_against_exact,
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
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
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


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_pictures_are_saved_and_leave_matplotlib_alone(suffix: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save(head_maps({"a": np.eye(3)}), tmp_path / f"new/a{suffix}")
    assert (tmp_path / f"new/a{suffix}").stat().st_size > 5_000
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
    names = [t.get_text() for t in axes.get_yticklabels()]
    best = study.frame.assign(size=study.frame.effect.abs()).sort_values("size", ascending=False)
    assert names[0] == f"{best.address.iloc[0][5:]}.{best['head'].iloc[0]:.0f}" and len(names) == 3
    drawn = sorted(float(patch.get_width()) for patch in axes.patches)
    expected = study.frame[
        (study.frame.address + "." + study.frame["head"].astype(int).astype(str)).isin([f"self.{n}" for n in names])
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
    assert [t.get_text() for t in axes.get_yticklabels()] == ["self.0.1 + self.1.2"]
    with pytest.raises(ValueError, match="no rows of metric 'kl'"):
        effect_bars(groups, metric="kl")


@pytest.mark.parametrize("shape", [(2, 4), (12, 12)])
def test_maps_of_pairs(shape: tuple[int, int]) -> None:
    names = [f"{layer}.{head}" for layer, head in np.ndindex(shape)]
    values = np.random.default_rng(0).normal(size=(len(names),) * 2)
    values[np.tril_indices(len(names))] = np.nan
    figure = pair_map(values, names, range(shape[1], len(names), shape[1]), rows="sender", columns="receiver", unit="score")
    assert problems(figure) == [] and is_labelled(figure)


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
