"""Effects of cuts on outputs, against loops that a student would write."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from surgery import Edit, Freeze, Spec, SpecError, patch_model, patched, unpatch_model
from surgery.analysis import metrics
from surgery.analysis.effects import MEASURES, Effect, verify_effect
from surgery.patch import session_of

CUT = Freeze("qk", layers=[0], heads=[1, 2])


def _plain(model: nn.Module, spec: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits without the cuts and with them, in float64."""
    with torch.no_grad():
        before = model(**inputs).logits.double()
        with patched(model, spec):
            return before, model(**inputs).logits.double()


# -- verify_effect --------------------------------------------------------------------------------------------------------


def test_every_measure_is_that_of_a_plain_loop() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build("sdpa"), family.inputs()
    before, after = _plain(model, CUT, inputs)
    effect = verify_effect(model, CUT, inputs)
    assert effect.output == "logits" and effect.positions and session_of(model) is None
    rows: list[dict[str, list[float]]] = []
    for row, mask in enumerate(inputs["attention_mask"]):
        rows.append({name: [] for name in MEASURES})
        for position in range(len(mask)):
            p, q = (logits[row, position].log_softmax(-1) for logits in (before, after))
            change = (before - after)[row, position].abs()
            losses = [float("nan")] * 2
            if position + 1 < len(mask) and mask[position] and mask[position + 1]:
                target = inputs["input_ids"][row, position + 1]
                losses = [float(-p[target]), float(-q[target])]
            same = float(p.argmax() == q.argmax())
            found = [float(change.max()), float(change.mean()), float((p.exp() * (p - q)).sum()), same, losses[1] - losses[0]]
            for name, value in zip(MEASURES, found, strict=True):
                rows[row][name].append(value if mask[position] else float("nan"))
    for name in MEASURES:
        expected = np.array([row[name] for row in rows])
        np.testing.assert_allclose(effect.arrays[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)  # float64 of other order
    assert effect.largest == np.nanmax(effect.arrays["largest"]) > 0.01
    means = [np.mean([np.nanmean(row[name]) for row in rows]) for name in ("mean", "kl", "agreement", "loss")]
    np.testing.assert_allclose([effect.mean, effect.kl, effect.agreement, effect.loss_change], means, rtol=1e-9)
    assert list(effect.totals()) == list(MEASURES)


def test_totals_are_those_of_the_metrics() -> None:
    family = FAMILIES["gpt2"]
    model, inputs = family.build(), {**family.inputs(), "use_cache": False}  # keys in a cache round otherwise
    effect = verify_effect(model, CUT, inputs)
    before, after = _plain(model, CUT, inputs)
    output = SimpleNamespace(logits=after)
    seen = [metrics.Measured(model, inputs, output, logits, before) for logits in (before, after)]
    losses = [metrics.loss()(one).numpy() for one in seen]
    np.testing.assert_allclose(effect.by_example().loss, losses[1] - losses[0], rtol=1e-9)
    np.testing.assert_allclose(effect.by_example().kl, metrics.kl()(seen[1]).numpy(), rtol=1e-9)


def test_without_cuts_nothing_changes() -> None:
    family = FAMILIES["bart"]
    effect = verify_effect(family.build("sdpa"), Spec(), family.inputs())
    assert (effect.largest, effect.mean, effect.kl, effect.agreement) == (0.0, 0.0, 0.0, 1.0)
    assert effect.loss_change == 0.0, "of the decoder's next tokens"
    effect = verify_effect(FAMILIES["bert"].build("sdpa"), Spec(), FAMILIES["bert"].inputs())
    assert np.isnan(effect.loss_change) and "no labels" in str(effect)


def test_batches_of_other_lengths_stand_below_each_other() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    parts = [family.inputs(length=9), family.inputs(batch=3, length=6, padding=0, seed=1)]
    both = verify_effect(model, CUT, iter(parts))
    for part, rows in zip(parts, (slice(0, 2), slice(2, 5)), strict=True):
        alone = verify_effect(model, CUT, part)
        for name, values in alone.arrays.items():
            np.testing.assert_array_equal(both.arrays[name][rows, : values.shape[1]], values)
            assert np.isnan(both.arrays[name][rows, values.shape[1] :]).all()
    frame = both.by_position()
    assert frame.examples.tolist() == [4, 4, 4, 5, 5, 5, 2, 2, 2], "three of the first row are padding"
    assert len(both.to_frame()) == frame.examples.sum() and both.to_frame().largest.max() == both.largest


def test_labels_of_masked_tokens_and_of_classes() -> None:
    family = FAMILIES["bert"]
    model, inputs = family.build(), family.inputs(padding=0)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 4] = 7
    effect = verify_effect(model, CUT, {**inputs, "labels": labels})
    assert effect.output == "logits"
    found = effect.arrays["loss"]
    before, after = _plain(model, CUT, inputs)
    expected = (before.log_softmax(-1) - after.log_softmax(-1))[:, 4, 7]
    np.testing.assert_allclose(found[:, 4], expected, rtol=1e-9)
    assert np.isnan(np.delete(found, 4, axis=1)).all()

    torch.manual_seed(0)
    config = BertConfig(vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    classifier = BertForSequenceClassification(config).eval()
    effect = verify_effect(classifier, CUT, {**inputs, "labels": torch.tensor([0, 1])})
    assert not effect.positions and effect.arrays["kl"].shape == (2, 1) and effect.kl > 0
    before, after = (logits.log_softmax(-1)[torch.arange(2), [0, 1]] for logits in _plain(classifier, CUT, inputs))
    np.testing.assert_allclose(effect.arrays["loss"][:, 0], before - after, rtol=1e-6, atol=1e-12)
    with pytest.raises(SpecError, match="without positions"):
        effect.figure()


def test_a_model_without_logits_says_what_is_compared() -> None:
    family = FAMILIES["llama"]
    model = family.build().model
    effect = verify_effect(model, CUT, family.inputs())
    assert effect.output == "last_hidden_state" and set(effect.arrays) == {"largest", "mean"}
    assert "Not logits, but last_hidden_state" in str(effect) and np.isnan(effect.kl) and effect.largest > 0.01
    assert np.isnan(effect.arrays["largest"][0, :3]).all(), "padding"
    pooled = BertModel(BertConfig(vocab_size=67, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)).eval()
    assert verify_effect(pooled, CUT, family.inputs()).output == "last_hidden_state"
    effect = verify_effect(pooled, CUT, family.inputs(), "pooler_output")
    assert effect.output == "pooler_output" and not effect.positions and effect.arrays["mean"].shape == (2, 1)
    assert effect.mean > 0
    with pytest.raises(SpecError, match="Did you mean 'pooler_output'"):
        verify_effect(pooled, CUT, family.inputs(), "pooled_output")


def test_what_a_cut_makes_of_numbers_is_not_taken_for_padding() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    broken = Edit("z", lambda z: torch.where(torch.arange(z.shape[2])[:, None] == 5, torch.nan, z), layers=[1], heads=[0])
    effect = verify_effect(model, broken, family.inputs(padding=0))
    assert np.isinf(effect.arrays["largest"][:, 5]).all() and np.isfinite(effect.arrays["largest"][:, 4]).all()
    assert np.isinf([effect.largest, effect.kl, effect.loss_change]).all()


def test_a_model_is_left_as_it_was_and_its_own_cuts_do_not_count() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build("sdpa"), family.inputs()
    expected = verify_effect(model, CUT, inputs)
    model.train()
    own = Spec([Freeze("both", layers=[1])])
    patch_model(model, own)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    effect = verify_effect(model, CUT, inputs)
    session = session_of(model)
    assert session is not None and session.spec == own and model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, values in effect.arrays.items():
        np.testing.assert_array_equal(values, expected.arrays[name])
    unpatch_model(model)


def test_the_kernel_that_was_chosen_is_kept() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build("sdpa"), family.inputs(padding=0)
    with patched(model, kernel="eager"):
        effect = verify_effect(model, CUT, inputs)
    eager = family.build("eager")
    before, after = _plain(eager, CUT, inputs)
    np.testing.assert_array_equal(effect.arrays["largest"], (after - before).abs().amax(-1))
    before, after = _plain(model, CUT, inputs)
    assert not np.array_equal(effect.arrays["largest"], (after - before).abs().amax(-1)), "sdpa rounds otherwise"


def test_an_effect_is_shown() -> None:
    family = FAMILIES["llama"]
    effect = verify_effect(family.build(), CUT, family.inputs())
    text = str(effect)
    assert "freeze qk to zero" in text and "KL(uncut || cut)" in text and f"{effect.kl:.4g}" in text and "nats" in text
    assert repr(effect) == text and "<table" in effect._repr_html_()
    figure = effect.figure()
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["logits", "logits", "nats", "share", "nats"]
    line = figure.axes[2].lines[0]
    np.testing.assert_allclose(line.get_ydata(), effect.by_position().kl)
    figure.savefig(io.BytesIO(), format="png")


def test_outputs_that_cannot_be_compared() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            self.inner(input_ids)
            return (input_ids,)

    with pytest.raises(SpecError, match="found an output"):
        verify_effect(Nothing(), CUT, inputs)
    with pytest.raises(SpecError, match="no batches"):
        verify_effect(model, CUT, [])
    assert isinstance(verify_effect(model, CUT, inputs["input_ids"]), Effect)
