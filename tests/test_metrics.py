"""Metrics against transformers' own losses and plain formulas; batches; several metrics off one forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    CanineConfig,
    CanineModel,
    GitConfig,
    GitForCausalLM,
    T5ForTokenClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

from surgery import Freeze, SpecError, patched
from surgery.analysis import ablation_study, check_gradients, discover_vector, metrics, verify_effect
from surgery.analysis.batches import batches
from surgery.analysis.importance import head_importance
from surgery.analysis.logit_attribution import direct_logit_attribution
from surgery.analysis.metrics import Measured, Metric, as_metric
from surgery.analysis.reading import Reading
from surgery.analysis.targets import is_encoder_decoder
from surgery.demo import load_model
from surgery.vocabulary import vocabulary_of


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
    expected = torch.stack([losses[0, 4:].mean(), losses[1].mean(), losses[2].mean()])
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


def test_raw_numbers_have_their_gradient_and_one_shape(ids: Tensor) -> None:
    """The one check of what a metric gives, wherever it is read off."""
    model, inputs = load_model(), {"input_ids": ids}
    output = model(**inputs)
    measured = Measured(model, inputs, output, output.logits, None)
    by_row = as_metric(lambda o: o.logits.mean((1, 2))).raw(measured)
    assert by_row.shape == (3,) and by_row.requires_grad and by_row.dtype == torch.float32
    assert torch.equal(by_row, output.logits.mean((1, 2)))
    whole = as_metric(lambda o: o.logits.mean()).raw(measured)
    assert whole.shape == (1,) and whole.requires_grad
    assert torch.equal(as_metric(lambda o: 2.5).raw(measured), torch.tensor([2.5]))
    for wrong, shape in ((lambda o: o.logits.mean(2), r"\(3, 12\)"), (lambda o: o.logits[0, :2, 0], r"\(2,\)")):
        message = rf"a tensor of shape {shape}; expected a number, or one for each of 3 examples\. Reduce it"
        for run in (
            as_metric(wrong).raw,
            as_metric(wrong),
            lambda _: head_importance(model, ids, metric=wrong, to="zero", method="atp"),  # noqa: B023
        ):
            with pytest.raises(SpecError, match=message):
                run(measured)


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


def test_every_function_asks_for_the_positions_that_a_metric_reads(ids: Tensor) -> None:
    """Of a model that can, no other logits are computed; of one that cannot, they are picked."""
    difference = metrics.logit_difference(5, 7, position=3)

    def of_all(output: Any) -> Tensor:
        return output.logits[:, 3, 5] - output.logits[:, 3, 7]

    runs = (
        lambda model, inputs, metric: check_gradients(model, Freeze("qk"), inputs, metric).weights,
        lambda model, inputs, metric: discover_vector(model, inputs, method="gradient", metric=metric).norms().to_frame(),
    )
    for name in ("llama", "t5"):
        model, inputs = FAMILIES[name].build(dtype=torch.float64), FAMILIES[name].inputs(batch=3, padding=0)
        lengths = []
        head = model.get_output_embeddings()
        handle = head.register_forward_hook(lambda part, args, output: lengths.append(output.shape[1]))  # noqa: B023
        for run in runs:
            lengths.clear()
            found = run(model, inputs, difference).select_dtypes("float")
            assert lengths and ({1} == set(lengths)) is (name == "llama")
            expected = run(model, inputs, of_all).select_dtypes("float")
            # Products of one position are added up in another order; norms are in float32.
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
            with pytest.raises(SpecError, match=r"metric: found positions \[99\]; expected -\d+ to \d+, for"):
                run(model, inputs, metrics.logit_difference(5, 7, position=99))
        handle.remove()
    output = load_model()(ids)
    with pytest.raises(SpecError, match=r"positions \[12\]; expected -12 to 11, for 12 tokens"):
        Reading([metrics.logit_difference(5, 7, position=12), "loss"]).read(None, {"input_ids": ids}, output, output)


def test_data_in_every_form(ids: Tensor) -> None:
    model = load_model()
    loaders = [DataLoader(kind(ids), batch_size=3) for kind in (TensorDataset, lambda rows: [{"input_ids": r} for r in rows])]
    for data in (ids, {"input_ids": ids}, [ids], [{"input_ids": ids}], iter([ids]), [[ids]], [({"input_ids": ids},)], *loaders):
        [found] = batches(model, data)
        assert torch.equal(found["input_ids"], ids)
    pairs = DataLoader(TensorDataset(ids, ids), batch_size=3)
    for wrong, message in (
        (5, "a int"),
        ("text", "a str"),
        ([], "no batches"),
        ([5], "batch of type int"),
        ([[]], r"batch of type list with 0 parts \(empty\)"),
        ([list(range(99))], r"batch of type list with 99 parts \(int\)"),
        (pairs, r"batch of type list with 2 parts \(Tensor\); expected a tensor .*\. Pass \{'input_ids': ids\}: names"),
    ):
        with pytest.raises(SpecError, match=message):
            batches(model, wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(0, 5, dtype=torch.long), r"a batch of 0 rows \(input_ids \(0, 5\)\); expected at least one example"),
        (torch.zeros(2, 0, dtype=torch.long), r"input_ids of shape \(2, 0\) and torch.int64; expected whole numbers"),
        (torch.tensor([1, 2, 3]), r"input_ids of shape \(3,\) .*of one sequence, ids\[None\]"),
        (torch.zeros(2, 5), r"input_ids of shape \(2, 5\) and torch.float32"),
        (torch.tensor([[1, 64]]), r"token 64; expected numbers below the model's 64 tokens"),
        (torch.tensor([[-1, 6]]), r"token -1; expected numbers below the model's 64 tokens, from 0 on"),
    ],
)
def test_what_can_be_no_tokens_is_refused(given: Tensor, message: str) -> None:
    """Before anything runs, in every function that reads data."""
    model = load_model()
    for run in (
        lambda: batches(model, given),
        lambda: batches(model, [{"input_ids": torch.ones(1, 2, dtype=torch.long)}, {"input_ids": given}]),
        lambda: ablation_study(model, given, progress=False),
        lambda: verify_effect(model, Freeze("qk"), given),
        lambda: check_gradients(model, Freeze("qk"), given),
    ):
        with pytest.raises(SpecError, match=f"(data|input_ids): found {message}"):
            run()


def test_only_the_tokens_of_a_text_are_held_against_the_vocabulary(ids: Tensor) -> None:
    """Placeholders of pictures and sounds may stand beyond it; what has no table of tokens reads any number."""
    model = load_model()
    beside = {"input_ids": ids + 64, "pixel_values": torch.zeros(3, 2)}
    assert torch.equal(batches(model, beside)[0]["input_ids"], beside["input_ids"])
    translator = FAMILIES["bart"].build()
    given = {"input_ids": ids, "decoder_input_ids": ids + translator.config.vocab_size}
    with pytest.raises(SpecError, match=r"decoder_input_ids: found token \d+; expected numbers below the model's \d+ tokens"):
        batches(translator, given)
    characters = CanineModel(
        CanineConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_hash_buckets=16)
    )
    assert vocabulary_of(characters) is None
    assert torch.equal(batches(characters, ids + 100_000)[0]["input_ids"], ids + 100_000)


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


# -- which tokens are predicted, and which of them count ------------------------------------------------------------------


def test_padding_of_an_encoder_is_none_of_its_decoder(ids: Tensor) -> None:
    """With labels of the same length as what the encoder reads, and no mask of the decoder's own."""
    model = FAMILIES["t5"].build()
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    labels = ids.flip(0)
    labels[:, 3] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    measured = seen(model, inputs)
    np.testing.assert_allclose(metrics.loss()(measured).mean(), measured.output.loss.item(), rtol=1e-5)
    with torch.no_grad():
        other = model(**{**inputs, "labels": ids}).logits
    everywhere = metrics.kl()(Measured(model, {"labels": labels}, None, measured.logits, other))
    torch.testing.assert_close(metrics.kl()(Measured(model, inputs, None, measured.logits, other)), everywhere)


def test_what_is_an_encoder_decoder() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    models = {name: FAMILIES[name].build() for name in ("t5", "bart", "whisper", "llama", "bert")}
    for name, model in models.items():
        assert is_encoder_decoder(model) == is_encoder_decoder(Wrapped(model)) == (name in ("t5", "bart", "whisper"))
    assert not is_encoder_decoder(T5ForTokenClassification(models["t5"].config)), "an encoder alone, its configuration the same"


def test_without_labels_an_encoder_decoder_predicts_its_decoders_tokens(ids: Tensor) -> None:
    model, own = FAMILIES["t5"].build(), ids.flip(0)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    inputs = {"input_ids": ids, "decoder_input_ids": own, "decoder_attention_mask": mask}
    measured = seen(model, inputs)
    logits = measured.logits[:, :-1].double()
    losses = F.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten(), reduction="none").view(3, -1)
    expected = torch.stack([losses[0, :8].mean(), losses[1].mean(), losses[2].mean()])
    torch.testing.assert_close(metrics.loss()(measured), expected)
    effect = verify_effect(model, Freeze("ov", layers=[1]), inputs)
    np.testing.assert_allclose(np.nanmean(effect.arrays["loss_before"], 1), expected, rtol=1e-5)


@pytest.mark.parametrize(("name", "why"), [("bert", "labels, for it does not predict the next"), ("bart", "decoder_input_ids")])
def test_without_labels_some_models_have_no_loss(name: str, why: str) -> None:
    model, inputs = FAMILIES[name].build(), {"input_ids": FAMILIES[name].inputs()["input_ids"]}
    for metric in (metrics.loss(), metrics.accuracy()):
        with pytest.raises(SpecError, match=f"found no labels among the inputs of a {type(model).__name__}.*{why}"):
            metric(seen(model, inputs))
    assert why in str(verify_effect(model, Freeze("ov", layers=[0]), inputs))


def test_a_token_that_padding_predicts_does_not_count() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    alone = {"input_ids": inputs["input_ids"][:1, 3:]}
    # Rotary angles of other positions: float32 rounds otherwise.
    for metric in (metrics.loss(), metrics.accuracy()):
        torch.testing.assert_close(metric(seen(model, inputs))[:1], metric(seen(model, alone)), rtol=1e-4, atol=1e-6)


def test_labels_alone_say_what_counts() -> None:
    """Of padding, too, as in transformers' own loss."""
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    measured = seen(model, {**inputs, "labels": inputs["input_ids"]})
    np.testing.assert_allclose(metrics.loss()(measured).mean(), measured.output.loss.item(), rtol=1e-5)
    effect = verify_effect(model, Freeze("ov", layers=[0]), measured.inputs)
    np.testing.assert_allclose(np.nanmean(effect.arrays["loss_before"]), measured.output.loss.item(), rtol=1e-5)


def in_place(name: str) -> Any:
    """Models with a causal name whose own loss compares logits and labels of the same position."""
    torch.manual_seed(0)
    if name == "bart":
        sizes = dict(d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=64)
        model: Any = BartForCausalLM(BartConfig(**sizes, max_position_embeddings=32))
    else:
        model = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", ["bart", "xlnet"])
def test_the_shift_of_labels_is_that_of_the_models_own_loss(name: str, ids: Tensor) -> None:
    model, labels = in_place(name), ids.clone()
    labels[:, 4] = -100
    inputs = {"input_ids": ids.flip(0), "labels": labels}
    measured = seen(model, inputs)
    np.testing.assert_allclose(metrics.loss()(measured).mean(), measured.output.loss.item(), rtol=1e-5)
    other = model(**{**inputs, "labels": labels.roll(1, 0)})
    # Beside the loss of another forward, as blocks of a sweep have it: what has been seen once holds.
    mixed = metrics.loss()(Measured(model, inputs, other, measured.logits, None))
    torch.testing.assert_close(mixed, metrics.loss()(measured))
    study = ablation_study(model, inputs, "ov", [0], fast=name == "bart", progress=False)  # XLNet's batch is its second axis
    assert study.frame.baseline[0] == pytest.approx(measured.output.loss.item(), rel=1e-5)
    cut = study.frame.value[0]
    with patched(model, Freeze("ov", layers=[0], heads=[0])), torch.no_grad():
        assert cut == pytest.approx(model(**inputs).loss.item(), rel=1e-5)


def test_targets_are_those_of_the_last_positions(ids: Tensor) -> None:
    """GIT puts an image before the text."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vision = dict(**sizes, image_size=8, patch_size=4, projection_dim=16)
    model = GitForCausalLM(GitConfig(**sizes, vocab_size=64, vision_config=vision)).eval()
    inputs = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 8, 8), "labels": ids}
    measured = seen(model, inputs)
    assert measured.logits is not None and measured.logits.shape[1] > ids.shape[1]
    np.testing.assert_allclose(metrics.loss()(measured).mean(), measured.output.loss.item(), rtol=1e-5)
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    torch.testing.assert_close(metrics.loss()(seen(model, unlabelled)), metrics.loss()(measured))
    effect = verify_effect(model, Freeze("ov", layers=["encoder.self.0"]), inputs)
    np.testing.assert_allclose(np.nanmean(effect.arrays["loss_before"]), measured.output.loss.item(), rtol=1e-5)
    assert np.isnan(effect.arrays["loss"][:, : measured.logits.shape[1] - ids.shape[1]]).all()


def test_labels_that_stand_nowhere_are_refused(ids: Tensor) -> None:
    model = load_model()
    measured = seen(model, {"input_ids": ids})
    for labels, found in ((ids[:, :7], r"shape \(3, 7\)"), (ids.double(), "in float64"), (ids[:2], r"shape \(2, 12\)")):
        with pytest.raises(SpecError, match=found):
            metrics.loss()(Measured(model, {**measured.inputs, "labels": labels}, None, measured.logits, None))


def test_kl_at_positions_leaves_padding_out(ids: Tensor) -> None:
    model = load_model()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    with torch.no_grad():
        one, other = (model(x, attention_mask=mask).logits for x in (ids, ids.flip(1)))
    each = metrics.divergence(other, one)
    expected = torch.stack([each[0, 7], each[1, [7, 10, 11]].mean(), each[2, [7, 10, 11]].mean()])
    kept = [7, 10, -1]
    forms = {"2-D": mask, "boolean": mask.bool()[:, None, None].expand(-1, 1, 12, -1)}
    forms["additive"] = torch.where(forms["boolean"].tril(), 0.0, torch.finfo(torch.float32).min)
    for form in forms.values():
        inputs = {"input_ids": ids, "attention_mask": form}
        found = metrics.kl(kept)(Measured(model, inputs, None, one[:, kept], other[:, kept]))
        torch.testing.assert_close(found, expected)
        everywhere = metrics.kl()(Measured(model, inputs, None, one, other))
        torch.testing.assert_close(everywhere, torch.stack([each[0, :9].mean(), each[1].mean(), each[2].mean()]))


def test_kl_of_tokens_that_are_ruled_out() -> None:
    """Logits of -inf in both, as models with a mask over their vocabulary give them."""
    before, after = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    before[..., 5:], after[..., 5:] = -torch.inf, -torch.inf
    expected = metrics.divergence(before[..., :5], after[..., :5])
    torch.testing.assert_close(metrics.divergence(before, after), expected)
    after[0, 0, 1] = torch.nan
    assert torch.equal(metrics.divergence(before, after).isinf(), torch.tensor([[True, False, False], [False] * 3]))


def test_an_example_where_nothing_counts_is_refused(ids: Tensor) -> None:
    model, labels = load_model(), ids.clone()
    labels[1], labels[2, 1:] = -100, -100
    inputs = {"input_ids": ids, "labels": labels}
    for metric in (metrics.loss(), metrics.perplexity(), metrics.accuracy()):
        with pytest.raises(SpecError, match="no position that counts in examples 1, 2"):
            metric(seen(model, inputs))
    with pytest.raises(SpecError, match="in examples 1, 2"):
        ablation_study(model, inputs, progress=False)
    assert np.isnan(verify_effect(model, Freeze("ov", layers=[0]), inputs).arrays["loss"][1:]).all(), "a table has gaps"
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5 + [0] * 7]).expand(3, -1)}
    measured = seen(model, padded)
    with pytest.raises(SpecError, match=r"'KL'.*in examples 0, 1, 2"):
        at = [8, 9]
        metrics.kl(at)(Measured(model, padded, None, measured.logits[:, at], measured.logits[:, at]))


@pytest.mark.parametrize("position", [0, 12, -12, -13])
def test_positions_that_nothing_predicts_are_refused(position: int, ids: Tensor) -> None:
    model = load_model()
    expected = rf"\[{position}\] of 12; expected 1 to 11, or -11 to -1 from the end"
    with pytest.raises(SpecError, match=expected):
        metrics.loss([3, position])(seen(model, {"input_ids": ids}))
    assert metrics.accuracy([1, -1])(seen(model, {"input_ids": ids})).shape == (3,)
    bert = FAMILIES["bert"].build()  # predicts labels in place, the first, too
    if position == 0:
        assert metrics.loss([0])(seen(bert, {"input_ids": ids, "labels": ids})).isfinite().all()


def test_labels_are_no_matter_of_gradients(ids: Tensor) -> None:
    """Whether they are shifted is read off a loss that has gradients, too, without a warning."""
    model = load_model()
    output = model(ids, labels=ids)
    found = metrics.loss().function(Measured(model, {"input_ids": ids, "labels": ids}, output, output.logits, None))
    torch.testing.assert_close(found.mean().float(), output.loss)
    assert found.requires_grad


def test_what_a_metric_cannot_be_read_off_is_refused(ids: Tensor) -> None:
    model = load_model()
    for pair, found in (((99, 1), r"tokens \[99\]"), ((1, [[2], [64], [-1]]), r"tokens \[64, -1\]")):
        with pytest.raises(SpecError, match=rf"logit_difference: found {found}; expected 0 to 63"):
            ablation_study(model, ids, metrics=metrics.logit_difference(*pair), progress=False)
    for run in (
        lambda: ablation_study(model, ids, metrics=lambda output: None, progress=False),
        lambda: head_importance(model, ids, metric=lambda output: None, to="zero", method="atp"),
        lambda: as_metric(Metric("nothing", "", lambda m: "text"))(seen(model, {"input_ids": ids})),  # type: ignore[arg-type, return-value]
    ):
        with pytest.raises(SpecError, match="expected a number, or one for each example"):
            run()
    classifier = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).eval()
    for metric in (metrics.logit_difference(1, 0), metrics.kl([-1])):
        with pytest.raises(SpecError, match=r"found logits of shape \(3, [12]\); expected \(batch, position, vocabulary\)"):
            ablation_study(classifier, ids, metrics=metric, progress=False)
    with pytest.raises(SpecError, match=r"\[3\] of 1"):
        metrics.loss([3])(seen(classifier, {"input_ids": ids, "labels": torch.tensor([0, 1, 0])}))


def test_a_position_that_is_padding_is_refused() -> None:
    """Of texts that are padded on the right the last position is none."""
    model, ids = load_model(), torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(SpecError, match=r"found padding at position -1 of examples \[1\]"):
        ablation_study(model, inputs, "ov", layers=[1], heads=[0], metrics=metrics.logit_difference(3, 4), progress=False)
    with pytest.raises(SpecError, match="padding at position 7"):
        head_importance(model, inputs, None, metrics.logit_difference(3, 4, position=7), "atp", to="zero")
    ablation_study(model, inputs, "ov", layers=[1], heads=[0], metrics=metrics.logit_difference(3, 4, 5), progress=False)
