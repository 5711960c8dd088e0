"""Heads by where they look, by what their weights compose to, and by what they write: against loops and full matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, HEADS, LAYERS
from torch import Tensor

from surgery import Edit, Freeze, NoMatchError, SpecError, patch_model
from surgery.analysis.detectors import detect_heads
from surgery.analysis.looking import JOBS
from surgery.analysis.repeats import random_copies
from surgery.demo import load_model

# Where heads look.


@torch.no_grad()
def plain_scores(model: Any, ids: Tensor, mask: Tensor) -> dict[str, np.ndarray]:
    """(layer, head) of each job from transformers' own attentions, key by key."""
    patterns = torch.stack(model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions).double()
    found: dict[str, list[Tensor]] = {job: [] for job in JOBS}
    for row in range(len(ids)):
        real = [t for t in range(ids.shape[1]) if mask[row, t]]
        for t in real:
            before = [s for s in real if s < t]
            same = [s for s in before if ids[row, s] == ids[row, t]]
            behind = [s + 1 for s in same if s + 1 < t]
            looked_at = patterns[:, row, :, t]
            if before:
                found["sink"].append(looked_at[..., real[0]])
                found["previous token"].append(looked_at[..., t - 1])
            if same:
                found["duplicate token"].append(looked_at[..., same].sum(-1))
            if behind:
                found["induction"].append(looked_at[..., behind].sum(-1))
    return {job: torch.stack(values).mean(0).numpy() for job, values in found.items()}


def _text(rows: int = 3, length: int = 14, words: int = 5) -> dict[str, Tensor]:
    """Few words, so that they come again and again; padding on the left, on the right, and none."""
    ids = torch.randint(5, 5 + words, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert", "gpt_oss"])
def test_scores_are_those_of_output_attentions(name: str) -> None:
    model, inputs = FAMILIES[name].build("eager"), _text()
    found = detect_heads(model, inputs)
    for job, scores in plain_scores(model, ids=inputs["input_ids"], mask=inputs["attention_mask"]).items():
        np.testing.assert_allclose(found.matrix(job).to_numpy(), scores, atol=1e-6)  # float32 patterns, another order of sums
        assert found.matrix(job).shape == (LAYERS, HEADS) and found.frame.score.between(0, 1 + 1e-6).all()


def test_chance_is_uniform_attention_over_what_the_mask_allows() -> None:
    ids = torch.tensor([[9, 7, 8, 7, 8, 7]])
    for name, window in (("llama", 6), ("mistral", 5), ("bert", None)):
        found = detect_heads(FAMILIES[name].build("sdpa"), ids)
        allowed = [6] * 6 if window is None else [min(t + 1, window) for t in range(6)]
        expected = {
            "previous token": np.mean([1 / allowed[t] for t in range(1, 6)]),
            "duplicate token": np.mean([1 / allowed[3], 1 / allowed[4], 2 / allowed[5]]),
            "induction": np.mean([1 / allowed[3], 1 / allowed[4], 2 / allowed[5]]),  # from 3 to 2, 4 to 3, 5 to 2 and 4
            "sink": np.mean([1 / allowed[t] if t < allowed[t] else 0 for t in range(1, 6)]),
        }
        for job, chance in expected.items():
            np.testing.assert_allclose(found.matrix(job, "chance").to_numpy(), chance, rtol=1e-6)  # shares are float32


def test_heads_made_by_hand_have_score_one() -> None:
    model = FAMILIES["gpt2"].build()
    patch_model(model, [Edit("pattern", "previous", layers=[0], heads=[1]), Edit("pattern", "first", layers=[1], heads=[2])])
    found = detect_heads(model, random_copies(model, 2).inputs())
    assert found.top(1, "previous token").iloc[0][["address", "head", "score"]].tolist() == ["self.0", 1, 1.0]
    assert found.top(1, "sink").iloc[0][["address", "head", "score"]].tolist() == ["self.1", 2, 1.0]
    assert found.top(1, "sink").share.item() == 1.0
    assert found.matrix("previous token").to_numpy().max(initial=0, where=np.arange(8).reshape(2, 4) != 1) < 0.9


def test_several_batches_count_by_their_queries() -> None:
    model = FAMILIES["llama"].build()
    inputs = _text()
    parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 1), slice(1, 3))]
    whole, split = detect_heads(model, inputs).frame, detect_heads(model, parts).frame
    np.testing.assert_allclose(split.score, whole.score, atol=1e-6)  # kernels round by batch
    np.testing.assert_allclose(split.chance, whole.chance, rtol=1e-12)


def test_the_demo_model_has_its_two_heads() -> None:
    found = detect_heads(load_model())
    assert found.top(1, "previous token")[["address", "head"]].values.tolist() == [["self.0", 0]]
    assert found.top(1, "induction")[["address", "head"]].values.tolist() == [["self.1", 3]]
    assert found.top(1, "induction").score.item() > 0.95 > 0.6 > found.top(2, "induction").score.iloc[1]
    assert "self.1" in repr(found) and not found.notes


def test_a_choice_of_layers_and_heads() -> None:
    model = FAMILIES["llama"].build()
    every, some = (detect_heads(model, _text(), *choice) for choice in ((), ([1], [3, 0])))
    assert some.frame[["address", "head"]].drop_duplicates().values.tolist() == [["self.1", 0], ["self.1", 3]]
    np.testing.assert_allclose(some.matrix("sink")[3], every.matrix("sink").loc["self.1", [3]], atol=1e-6)
    with pytest.raises(SpecError, match=r"detect_heads: self.1 .*heads \[4\]; expected heads 0 to 3"):
        detect_heads(model, layers=[1], heads=[4])
    with pytest.raises(NoMatchError, match="layers: found 2"):
        detect_heads(model, layers=[2])
    with pytest.raises(SpecError, match="Did you mean 'induction'"):
        detect_heads(model, jobs=["inductoin"])
    with pytest.raises(SpecError, match="Did you mean 'sink'"):
        some.matrix("sinks")


def test_two_stacks_and_what_is_left_out() -> None:
    found = detect_heads(FAMILIES["bart"].build())
    assert set(found.frame.address) == {f"{stack}.self.{layer}" for stack in ("encoder", "decoder") for layer in range(LAYERS)}
    found = detect_heads(FAMILIES["t5"].build(), layers="all")
    assert [note for note in found.notes if "cross" not in note] == [] and len(found.notes) == LAYERS
    whisper = FAMILIES["whisper"]
    with pytest.raises(SpecError, match="which reads input_features, and no data"):
        detect_heads(whisper.build())
    found = detect_heads(whisper.build(), whisper.inputs())
    assert set(found.frame.address) == {"decoder.self.0", "decoder.self.1"}
    assert found.notes == [f"encoder.self.{layer}: the data have no token ids for it" for layer in range(LAYERS)]


def test_detecting_leaves_the_model_and_its_cuts() -> None:
    model, ids = FAMILIES["gpt2"].build(), _text()["input_ids"]
    cut = Freeze("qk", layers=[0], heads=[2])
    patch_model(model, cut)
    with torch.no_grad():
        before = model(ids).logits
        found = detect_heads(model, ids)
        assert torch.equal(model(ids).logits, before)
    row = found.matrix("previous token").loc["self.0"]
    assert row[2] == pytest.approx(found.matrix("previous token", "chance").loc["self.0", 2], abs=1e-6)  # cut to uniform
