"""Pictures of interference: what they show is what they are given, what a test found is marked, nothing is cut off."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from test_pictures import bar, cells, is_labelled, names, panels, problems, sayings

import surgery.analysis.interference.tested as table
from surgery import SpecError
from surgery.analysis.interference.collecting import collect
from surgery.analysis.interference.intervals import two_way_bootstrap
from surgery.analysis.interference.maps import Interference, heatmap
from surgery.analysis.interference.scores import sample_scores
from surgery.analysis.interference.signed import sign_flip_test
from surgery.plots import block_bars, block_maps


def frame_of(layers: int, heads: int, kv_heads: int, seed: int = 0) -> pd.DataFrame:
    """Of a model of so many heads: address, block, head, value, found."""
    counts = {"Q": heads, "K": kv_heads, "V": kv_heads, "O": heads}
    rows = [(f"self.{layer}", block, head) for layer in range(layers) for block in counts for head in range(counts[block])]
    generator = np.random.default_rng(seed)
    frame = pd.DataFrame(rows, columns=["address", "block", "head"])
    return frame.assign(value=generator.normal(size=len(frame)), found=generator.random(len(frame)) < 0.1)


def marks(axes: Any) -> set[tuple[int, int]]:
    """(layer, head) of marked cells."""
    return {(round(row), round(head)) for c in axes.collections if c.get_gid() == "found" for head, row in c.get_offsets()}


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(2, 4, 1), (12, 12, 12), (32, 32, 8)])
def test_blocks_stand_side_by_side_on_one_scale(layers: int, heads: int, kv_heads: int) -> None:
    frame = frame_of(layers, heads, kv_heads)
    figure = block_maps({"interference": frame}, title="Which heads", subtitle="marked: found")
    own = panels(figure)
    assert [axes.get_title() for axes in own] == list("QKVO") and problems(figure) == [] and is_labelled(figure)
    assert sayings(figure) == "Which heads | marked: found" and bar(figure)[0] == "interference"
    assert [axes.get_xlabel() for axes in own] == ["head", *["head" if kv_heads == heads else "kv head"] * 2, "head"]
    largest = frame.value.abs().max()
    assert {axes.images[0].get_clim() for axes in own} == {(-largest, largest)}
    for axes, (_, rows) in zip(own, frame.groupby("block", sort=False), strict=True):
        assert (cells(axes) == rows.value.to_numpy().reshape(layers, -1)).all()
        assert marks(axes) == {(int(row.address[5:]), row.head) for row in rows[rows.found].itertuples()}
    unmarked = block_maps({"interference": frame.assign(found=False)}, title="Which heads", subtitle="marked: found")
    assert sayings(unmarked) == "Which heads" and not any(map(marks, panels(unmarked))), "nothing is said of no marks"
    plain = block_maps({"interference": frame.drop(columns="found")}, subtitle="of 8 samples")
    assert sayings(plain) == "of 8 samples" and not any(map(marks, panels(plain)))


def test_a_head_that_a_layer_lacks_is_grey_and_others_stay_where_they_are() -> None:
    frame = frame_of(3, 4, 2)
    kept = frame[~((frame.address == "self.1") & (frame["head"] >= 1))]
    found = cells(panels(block_maps({"interference": kept}))[0])
    assert np.isnan(found[1, 1:]).all() and np.isfinite(found[[0, 2]]).all() and np.isfinite(found[1, 0])


def test_two_measures_are_rows_with_scales_of_their_own_and_others_are_refused() -> None:
    first, second = frame_of(2, 4, 2), frame_of(2, 4, 2, seed=1)
    figure = block_maps({"overlap": first.assign(value=first.value.abs()), "conflict": second})
    own = panels(figure)
    assert [axes.get_title() for axes in own] == list("QKVO") * 2 and problems(figure) == []
    limits = [axes.images[0].get_clim() for axes in own]
    assert len(set(limits[:4])) == len(set(limits[4:])) == 1 and limits[0][0] == 0 and limits[4][0] == -limits[4][1]
    assert sayings(figure) == "overlap | conflict", "each row has its measure above it"
    with pytest.raises(ValueError, match="frames of other heads"):
        block_maps({"overlap": first, "conflict": frame_of(2, 4, 4)})
    with pytest.raises(ValueError, match="no rows"):
        block_maps({"overlap": first[:0]})


@pytest.mark.parametrize("layers", [1, 12, 48])
def test_bars_are_the_means_and_reach_as_far_as_intervals(layers: int) -> None:
    rows = [(where, block) for where in [*(f"self.{n}" for n in range(layers)), "all"] for block in "QKVO"]
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(rows, columns=["address", "block"]).assign(mean=generator.random(len(rows)) + 1)
    frame = frame.assign(low=frame["mean"] - 0.5, high=frame["mean"] + 2.0)
    figure = block_bars(frame, unit="sum over heads", title="Which blocks")
    whole, single = panels(figure)
    assert problems(figure) == [] and names(whole.xaxis) == list("QKVO") and whole.get_ylabel() == "sum over heads"
    expected = frame[frame.address == "all"]
    assert [patch.get_height() for patch in whole.patches] == expected["mean"].tolist()
    reached = [collection.get_segments()[0][:, 1].tolist() for collection in whole.collections]
    assert reached == [pytest.approx([row.low, row.high]) for row in expected.itertuples()]
    shown = np.stack([container.lines[0].get_ydata() for container in single.containers], axis=1)
    assert (shown == frame[frame.address != "all"]["mean"].to_numpy().reshape(layers, 4)).all()


@pytest.fixture(scope="module")
def found() -> tuple[Interference, Interference, table.Tested]:
    """Overlap and conflict of two tasks on a model of four heads on two, and what was tested of the latter."""
    model = FAMILIES["llama"].build()
    ids = [torch.randint(1, 60, (9, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    a, b = (collect(model, {"input_ids": some}, progress=False) for some in ids)
    hypotheses, scores = sample_scores(a, b, None, kernel="signed")
    names = pd.DataFrame(hypotheses, columns=["address", "block", "head"])
    tested = sign_flip_test(scores["rows_a"], scores["columns_b"], hypotheses=names, alpha=0.2)
    return heatmap(a, b), heatmap(a, b, kernel="signed"), tested


def test_what_was_found_draws_itself(found: tuple[Interference, Interference, table.Tested]) -> None:
    overlap, conflict, tested = found
    p = np.ones(len(tested.frame))
    p[[1, 7]] = 0.2  # at the level itself
    tested = dataclasses.replace(tested, frame=tested.frame.assign(p_fdr=p))
    figure = overlap.beside(conflict, None, tested, title="Overlap and conflict")
    assert sayings(figure) == "Overlap and conflict | marked: found at a false discovery rate of 0.2" and problems(figure) == []
    own = panels(figure)
    for one, axes in ((overlap, own[:4]), (conflict, own[4:])):
        for block, part in zip("QKVO", axes, strict=True):
            assert (cells(part) == one.by_head()[block].to_numpy()).all()
    assert not any(marks(axes) for axes in own[:4])
    expected = {(block, int(address[5:]), head) for address, block, head in (conflict.hypotheses[n] for n in (1, 7))}
    assert {(axes.get_title(), *at) for axes in own[4:] for at in marks(axes)} == expected
    assert len(panels(overlap.picture())) == 4 and "marked" in sayings(conflict.picture(tested))
    with pytest.raises(SpecError, match=r"'qkov' twice.*two kernels"):
        overlap.beside(overlap)
    with pytest.raises(SpecError, match="other heads and blocks"):
        overlap.picture(dataclasses.replace(tested, frame=tested.frame[:-1]))


def test_blocks_are_sums_over_heads_with_intervals_of_samples(found: tuple[Interference, Interference, table.Tested]) -> None:
    overlap, _, _ = found
    frame = overlap.blocks()
    expected = overlap.to_frame().groupby(["address", "block"], sort=False)["mean"].sum()
    single = frame[frame.address != "all"].set_index(["address", "block"])["mean"]
    assert list(single.index) == list(expected.index) and single.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-5)
    whole = frame[frame.address == "all"].set_index("block")
    assert list(whole.index) == list("QKVO")
    assert overlap.maps is not None
    keys = [number for number, (_, block, _) in enumerate(overlap.hypotheses) if block == "K"]
    intervals = two_way_bootstrap(overlap.maps[keys].sum(0).numpy())
    assert (whole.loc["K", "low"], whole.loc["K", "high"]) == pytest.approx((float(intervals.low), float(intervals.high)))
    assert (frame.low < frame["mean"]).all() and (frame["mean"] < frame.high).all()
    figure = overlap.blocks_picture()
    assert problems(figure) == [] and "95% intervals" in sayings(figure)
    with pytest.raises(SpecError, match="keep_maps=True"):
        Interference(overlap.about, overlap.hypotheses, overlap.rows, overlap.columns, None).blocks()
