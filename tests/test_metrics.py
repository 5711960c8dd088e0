"""Metrics against transformers' own losses and plain formulas; batches; several metrics off one forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor
from torch.nn import functional as F

from surgery import SpecError
from surgery.analysis import metrics
from surgery.analysis.batches import batches
from surgery.analysis.importance import head_importance
from surgery.analysis.logit_attribution import direct_logit_attribution
from surgery.analysis.metrics import Measured, Metric, as_metric
from surgery.analysis.reading import Reading
from surgery.demo import load_model


def seen(model: Any, inputs: dict[str, Any], clean: Tensor | None = None) -> Measured:
    with torch.no_grad():
        output = model(**inputs)
    return Measured(model, inputs, output, output.logits, clean)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert"])
def test_loss_is_that_of_transformers(name: str) -> None:
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs(batch=3, padding=0)
    with torch.no_grad():
        shape = model(**inputs).logits.shape
    labels = torch.randint(
        5, shape[-1], shape[:2] if len(shape) == 3 else shape[:1], generator=torch.Generator().manual_seed(1)
    )
    if labels.dim() == 2:
        labels[:, 2] = -100
    found = metrics.loss()(seen(model, {**inputs, "labels": labels}))
    rows = []
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in {**inputs, "labels": labels}.items()}
        with torch.no_grad():
            rows.append(model(**one).loss.item())
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, rows, rtol=1e-5)  # transformers adds up in float32


def test_the_next_token_is_the_label_if_there_is_none(ids: Tensor) -> None:
    model = load_model()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        logits = model(**inputs).logits.double()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, -1)
    expected = torch.stack([losses[0, 3:].mean(), losses[1].mean(), losses[2].mean()])
    torch.testing.assert_close(metrics.loss()(seen(model, inputs)), expected)
    torch.testing.assert_close(metrics.perplexity()(seen(model, inputs)), expected.exp())
    torch.testing.assert_close(metrics.loss([5, 7, -1])(seen(model, inputs)), losses[:, [4, 6, -1]].mean(1))
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:]).double()
    torch.testing.assert_close(metrics.accuracy([5, 7])(seen(model, inputs)), right[:, [4, 6]].mean(1))


def test_logit_difference(ids: Tensor) -> None:
    model = load_model()
    measured = seen(model, {"input_ids": ids})
    kept = Measured(model, measured.inputs, measured.output, measured.logits[:, [-1]], None)
    logits = measured.logits[:, -1].double()
    torch.testing.assert_close(metrics.logit_difference(5, 7)(kept), logits[:, 5] - logits[:, 7])
    each = metrics.logit_difference(torch.tensor([5, 6, 7]), torch.tensor([[1, 2], [3, 4], [5, 6]]))(kept)
    expected = [logits[row, 5 + row] - logits[row, [1 + 2 * row, 2 + 2 * row]].mean() for row in range(3)]
    torch.testing.assert_close(each, torch.stack(expected))
    with pytest.raises(SpecError, match="tokens for 2 examples"):
        metrics.logit_difference([5, 6], 7)(kept)


def test_kl_is_zero_for_itself_and_not_symmetric(ids: Tensor) -> None:
    model = load_model()
    with torch.no_grad():
        other = model(ids.flip(1)).logits
    measured = seen(model, {"input_ids": ids}, other)
    p, q = other.double().softmax(-1), measured.logits.double().softmax(-1)
    torch.testing.assert_close(metrics.kl()(measured), (p * (p / q).log()).sum(-1).mean(-1))
    assert torch.equal(metrics.kl()(seen(model, {"input_ids": ids}, measured.logits)), torch.zeros(3, dtype=torch.float64))


def test_a_callable_of_the_output(ids: Tensor) -> None:
    model = load_model()
    measured = seen(model, {"input_ids": ids})
    torch.testing.assert_close(as_metric(lambda o: o.logits[:, -1, 5])(measured), measured.logits[:, -1, 5].double())
    assert as_metric(lambda o: 2.0)(measured).tolist() == [2.0] * 3
    assert as_metric(lambda o: o.logits.mean())(measured).unique().numel() == 1
    with pytest.raises(SpecError, match=r"shape \(3, 12\); expected a number, or one for each of 3"):
        as_metric(lambda o: o.logits.mean(-1))(measured)
    for wrong in (3, "losss", Metric):
        with pytest.raises(SpecError, match="expected 'loss', 'perplexity'"):
            as_metric(wrong)


def test_what_has_no_logits_says_so() -> None:
    model, inputs = FAMILIES["bert"].build().bert, FAMILIES["bert"].inputs()
    with torch.no_grad():
        output = model(**inputs)
    with pytest.raises(SpecError, match="an output without logits"):
        metrics.loss()(Measured(model, inputs, output, None, None))


def test_several_metrics_read_their_own_positions(ids: Tensor) -> None:
    model = load_model()
    with torch.no_grad():
        output = model(ids)
    at = [metrics.logit_difference(5, 7, position=p) for p in (-1, 3)]
    reading = Reading(at)
    assert reading.positions == (-1, 3)
    kept = type(output)(logits=output.logits[:, [-1, 3]])
    expected = torch.stack([output.logits[:, p, 5] - output.logits[:, p, 7] for p in (-1, 3)])
    np.testing.assert_allclose(reading.read(model, {"input_ids": ids}, kept, kept), expected, rtol=1e-5)
    everything = Reading([*at, "loss"])
    assert everything.positions is None
    np.testing.assert_allclose(everything.read(model, {"input_ids": ids}, output, output)[:2], expected, rtol=1e-5)


def test_data_in_every_form(ids: Tensor) -> None:
    model = load_model()
    for data in (ids, {"input_ids": ids}, [ids], [{"input_ids": ids}], iter([ids])):
        [found] = batches(model, data)
        assert torch.equal(found["input_ids"], ids)
    for wrong, message in ((5, "a int"), ("text", "a str"), ([], "no batches"), ([5], "batch of type int")):
        with pytest.raises(SpecError, match=message):
            batches(model, wrong)


def test_labels_beside_a_metric_of_one_position(ids: Tensor) -> None:
    """The model's own loss needs all logits, and is computed where labels are given."""
    model, metric = load_model(), metrics.logit_difference(5, 7)
    given = {"input_ids": ids, "labels": ids}
    for measure in (
        lambda g: head_importance(model, g, metric=metric, method="atp", to="zero", verify_top=2),
        lambda g: direct_logit_attribution(model, g, metric=metric),
    ):
        labelled, plain = (measure(g).frame.select_dtypes("number").to_numpy() for g in (given, ids))
        np.testing.assert_allclose(labelled, plain, atol=1e-4)  # products of one position round otherwise
