"""Planted truth: what overlap and conflict tests find in real attentions whose gradients are known. See benchmarks/planted.py.

144 hypotheses (six layers of six heads, four blocks), 40 samples a task, B's loss three times A's. Larger ones:
`python -m benchmarks.interference --planted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import surgery.analysis.interference.collecting as collecting
from benchmarks import planted
from benchmarks.planted import Planter, Sizes
from surgery.analysis.interference import Gradients, heatmap, overlap_test, permutation_test

SIZES = Sizes()
STUDIES = 5


@pytest.fixture(scope="module")
def planter() -> Planter:
    return Planter(planted.model(SIZES), SIZES)


def shared_heads_are_found(planter: Planter) -> None:
    """Power at least 0.95 and FDR at most 0.05, of several studies with other heads each."""
    found = [planted.overlap(planter, seed) for seed in range(STUDIES)]
    assert np.mean([one.power for one in found]) >= 0.95, "power"
    assert np.mean([one.false for one in found]) <= 0.05, "FDR"


def test_shared_heads_are_found_and_decoys_are_not(planter: Planter) -> None:
    shared_heads_are_found(planter)
    study = planted.overlap(planter)
    frame = study.result.frame.set_index(["address", "head"])
    _, of_a, of_b = study.sets
    for places, is_found, is_not in ((of_a, "p_row", "p_col"), (of_b, "p_col", "p_row")):  # no decoys of straw
        assert frame.loc[places, is_found].median() < 0.001 and frame.loc[places, is_not].median() > 0.1


def test_what_is_planted_is_there(planter: Planter) -> None:
    """A strong head's gradients are as much larger as it is stronger, in every block; other heads' are as before."""
    (strong,) = planter.draw(4)
    plain, raised = planter.task("plain", 120), planter.task("raised", 120, strong)
    for address, block, head in plain.hypotheses:
        sizes = [
            torch.stack([g.gradient(i, address, block, head).square().sum().log() / 2 for i in range(120)])
            for g in (plain, raised)
        ]
        ratio = float((sizes[1].mean() - sizes[0].mean()).exp())
        error = float((sizes[0].var() + sizes[1].var()).div(120).sqrt())
        expected = SIZES.raised if (address, head) in strong else 1.0
        assert abs(np.log(ratio / expected)) < 4 * error and error < 0.15, (address, block, head)


def test_a_larger_loss_is_no_finding() -> None:
    """The same samples, with B's loss as it is and a thousand times larger: the same numbers but for rounding."""
    found = []
    for scale in (1.0, 1000.0):
        sizes = replace(SIZES, layers=2, scale=scale)
        found.append(planted.overlap(Planter(planted.model(sizes), sizes)).result.frame)
    columns = [f"{what}_{way}" for what in ("effect", "g") for way in ("row", "col")]
    pd.testing.assert_frame_equal(found[0][columns], found[1][columns], rtol=1e-3, atol=1e-5)


def test_heads_at_plain_row_offsets_are_found_out(planter: Planter, monkeypatch: pytest.MonkeyPatch) -> None:
    """This family keeps [q k v] of a head together. As if it were all of Q, all of K, all of V: the wrong heads are found."""
    derived = collecting.blocks_of

    def at_offsets(attentions: Sequence[Any]) -> Any:
        blocks, missing = derived(attentions)
        wrong = []
        for block in blocks:
            channels = block.projection.channels
            start = {"Q": 0, "K": 1, "V": 2, "O": 0}[block.name] * channels.numel()
            rows = torch.arange(start, start + channels.numel()).view_as(channels)
            wrong.append(replace(block, projection=replace(block.projection, channels=rows)))
        return wrong, missing

    for attention in planter.attentions:
        channels = attention.projections["q"].channels
        assert not torch.equal(channels, torch.arange(channels.numel()).view_as(channels)), "a family that interleaves"
    monkeypatch.setattr(collecting, "blocks_of", at_offsets)
    with pytest.raises(AssertionError, match="power"):
        shared_heads_are_found(planter)
    study = planted.overlap(planter)
    assert study.power < 0.6 and study.false > 0.2


def test_the_level_where_nothing_is_planted(planter: Planter) -> None:
    """p_row and p_col reject 4 to 6 % in 200 replicates; why these may share their gradients: benchmarks.planted.level."""
    pool = planter.task("pool", 120)
    shares = planted.level(pool, 200)
    for way in ("p_row", "p_col"):
        assert shares[way].std() / np.sqrt(200) < 0.0034, "4 to 6 % are three standard errors either way"
        assert 0.04 < shares[way].mean() < 0.06, way
    assert shares.p.mean() < 0.05
    tasks = [
        Gradients(name, list(pool.blocks.values()), [part], pool.about) for name, part in zip("abn", pool.parts, strict=True)
    ]
    maps = heatmap(pool, pool, is_unit=True)
    assert maps.maps is not None
    scores = planted.dealt(maps.maps.double().numpy(), *np.arange(120).reshape(3, 40))
    expected = permutation_test(scores, [block for _, block, _ in maps.hypotheses]).frame
    found = overlap_test(*tasks).frame  # its pool of three tasks is the pool
    for name in ("effect_row", "effect_col", "p_row", "p_col"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-3)  # sums in float32 in another order


def test_opposed_heads_are_found_and_cooperating_ones_are_not(planter: Planter) -> None:
    found = [planted.conflict(planter, seed) for seed in range(STUDIES)]
    assert np.mean([one.power for one in found]) >= 0.95
    assert np.mean([one.false for one in found]) <= 0.05
    for one in found:
        _, together = one.sets
        frame = one.result.frame.set_index(["address", "head"]).loc[together]
        assert (frame.p_fdr > 0.05).all() and (frame.p[frame.block.isin(["V", "O"])] > 0.99).all()
