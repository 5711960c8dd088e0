"""Steering: vectors by hand, gradients by finite differences, effects by the plain loop, and specs that last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, HEADS, LENGTH
from torch import Tensor

from surgery import Edit, Spec, capture, export_checkpoint, load_checkpoint, patch_model, patched, unpatch_model
from surgery.analysis import metrics
from surgery.analysis.steering import discover_vector
from surgery.analysis.tokens import chosen_tokens
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.errors import NoMatchError, SpecError
from surgery.plots import save

QUIET = {"progress": False}


def examples(name: str, seed: int, batch: int = 3, padding: int = 0) -> dict[str, Tensor]:
    return FAMILIES[name].inputs(batch=batch, padding=padding, seed=seed)


def last_logit(output: Any) -> Tensor:
    return output.logits[:, -1, 7]


def seen(model: Any, inputs: dict[str, Tensor], site: str, layer: int) -> Tensor:
    with capture(model, [site], [layer], detach=True) as run, torch.no_grad():
        model(**inputs, use_cache=False)
    return run[layer, site]


# -- which tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_tokens_and_no_padding(side: str) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    mask = mask.flip(1) if side == "left" else mask
    given = {"attention_mask": mask}
    last = chosen_tokens("self.0", given, 2, 4, (-1,))
    assert last.tolist() == ([[0, 0, 0, 1]] * 2 if side == "left" else [[0, 0, 0, 1], [0, 1, 0, 0]])
    first_two = chosen_tokens("self.0", given, 2, 4, (0, 1))
    assert first_two.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5] if side == "left" else [0.5, 0.5, 0, 0]]
    assert torch.equal(chosen_tokens("self.0", given, 2, 4, None), mask / mask.sum(1, keepdim=True))
    assert torch.equal(chosen_tokens("decoder.self.0", given, 2, 3, (-3,)), torch.tensor([[1.0, 0, 0]] * 2)), "another mask"
    for positions in ((2,), (-3,)):
        with pytest.raises(SpecError, match="2 tokens in example 1"):
            chosen_tokens("self.0", given, 2, 4, positions)
    with pytest.raises(SpecError, match=r"\(2, 4\) with padding; expected \(2, 9\)"):
        chosen_tokens("vision.self.0", given, 2, 9, None)
    with pytest.raises(SpecError, match="no token in example 0"):
        chosen_tokens("self.0", {"attention_mask": torch.tensor([[0, 0], [0, 1]])}, 2, 2, None)


# -- mean differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["z", "result"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_mean_differences_are_those_by_hand(name: str, site: str) -> None:
    """Over batches of other sizes and lengths, with padding on the left: one example counts as much as any other."""
    model = FAMILIES[name].build()
    positives = [examples(name, 0, 3, padding=2), FAMILIES[name].inputs(batch=1, length=6, padding=0, seed=1)]
    negatives = examples(name, 2, 2, padding=4)
    for positions, chosen in ((-1, [-1]), ([-2, -1], [-2, -1]), (None, None)):
        found = discover_vector(model, positives, negatives, site=site, positions=positions)
        for layer in (0, 1):
            sides = []
            for side in (positives, [negatives]):
                rows = []
                for batch in side:
                    for row, activation in enumerate(seen(model, batch, site, layer).double()):
                        tokens = activation[:, batch["attention_mask"][row].bool()]
                        rows.append((tokens if chosen is None else tokens[:, chosen]).mean(1))
                sides.append(torch.stack(rows).mean(0))
            expected = sides[0] - sides[1]
            for head in range(HEADS):
                # Sums of float64 in another order, rounded to float32.
                torch.testing.assert_close(found[layer, head], expected[head].float(), rtol=1e-6, atol=1e-7)
    assert found.unit == f"units of {site}" and found.heads == {"self.0": (0, 1, 2, 3), "self.1": (0, 1, 2, 3)}


def test_padding_changes_nothing() -> None:
    """The same examples behind padding give the same vectors: what stands there does not count."""
    model = FAMILIES["llama"].build("sdpa")
    plain = [FAMILIES["llama"].inputs(batch=2, length=6, padding=0, seed=seed) for seed in (0, 1)]
    padded = []
    for batch in plain:
        ids, mask = (torch.cat([torch.zeros(2, 3, dtype=torch.long), batch[n]], 1) for n in ("input_ids", "attention_mask"))
        padded.append({"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(-3, 6).clamp(0).expand(2, -1)})
    vectors = [discover_vector(model, *given, positions=None) for given in (plain, padded)]
    for address in ("self.0", "self.1"):
        # Softmax over more keys, those of padding with no weight, adds in another order.
        torch.testing.assert_close(vectors[0].vectors[address], vectors[1].vectors[address], rtol=1e-4, atol=1e-5)


# -- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["z", "result"])
@pytest.mark.parametrize(("name", "step", "close"), [("gpt2", 1e-6, 1e-6), ("llama", 3e-3, 2e-3)])
def test_gradients_are_finite_differences(name: str, step: float, close: float, site: str) -> None:
    """Central differences err by step² in the third derivative, and by rounding / step; one has norms in float32."""
    model = FAMILIES[name].build(dtype=torch.float64)
    positives, negatives = examples(name, 0), examples(name, 1, batch=2)
    found = discover_vector(
        model, positives, negatives, [0], [1, 2], site, "gradient", metrics.logit_difference(7, 9), positions=[-2, -1]
    )
    assert found.heads == {"self.0": (1, 2)} and found.unit == f"logits per unit of {site}"
    width = found[0, 1].shape[-1]
    for channel in (0, width - 1):
        nudge, slopes = torch.zeros(1, width, dtype=torch.float64), []
        nudge[0, channel] = step
        for batch in (positives, negatives):
            per_token = []
            for position in (LENGTH - 2, LENGTH - 1):
                values = []
                for sign in (1, -1):
                    edit = Edit(site, "add", value=sign * nudge, layers=[0], heads=[2], positions=[position])
                    with patched(model, edit), torch.no_grad():
                        logits = model(**batch, use_cache=False).logits[:, -1]
                    values.append(logits[:, 7] - logits[:, 9])
                per_token.append((values[0] - values[1]) / (2 * step))
            slopes.append(torch.stack(per_token).mean(0))
        expected = torch.cat(slopes).mean()
        assert found[0, 2][channel].item() == pytest.approx(expected.item(), rel=close, abs=close / 10)


def test_gradients_leave_parameters_alone_and_take_any_metric() -> None:
    model, inputs = FAMILIES["llama"].build(), examples("llama", 0)
    model.requires_grad_(False)
    model.train()
    per_example = discover_vector(model, inputs, method="gradient", metric=last_logit)
    of_batch = discover_vector(model, inputs, method="gradient", metric=lambda output: last_logit(output).mean())
    for address in per_example.vectors:
        torch.testing.assert_close(per_example.vectors[address], of_batch.vectors[address], rtol=1e-5, atol=1e-7)
    assert model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert float(per_example["self.1", 0].norm()) > 1e-3
    with pytest.raises(SpecError, match="a number without a gradient"):
        discover_vector(model, inputs, method="gradient", metric="accuracy")


def test_a_gradient_raises_its_metric() -> None:
    """To first order by strength × norm² at the chosen token, when all heads of the layer are steered there together."""
    model, inputs = FAMILIES["gpt2"].build(dtype=torch.float64), examples("gpt2", 0, batch=1)
    found = discover_vector(model, inputs, None, [0], method="gradient", metric=last_logit)
    with pytest.warns(UserWarning, match="1 examples that the vectors were found on"):
        effect = found.effect(inputs, last_logit, [1e-3, 0.0, -1e-3], positions=[LENGTH - 1], **QUIET).to_frame()
    expected = 1e-3 * float(found.norms().values.__pow__(2).sum())
    assert effect.effect.tolist() == pytest.approx([expected, 0, -expected], rel=0.02, abs=1e-12)


# -- effects ------------------------------------------------------------------------------------------------------------


def test_effects_are_those_of_the_plain_loop() -> None:
    model = FAMILIES["llama"].build()
    found = discover_vector(model, examples("llama", 0), examples("llama", 1), heads=[0, 3])
    held_out = [examples("llama", 2), examples("llama", 3, batch=2)]
    strengths = (-2.0, 0.0, 0.5)
    together = found.effect(held_out, last_logit, strengths, fast=False, **QUIET)
    each = found.effect(held_out, last_logit, strengths, fast=False, each=True, **QUIET)
    assert each.examples.axes["head"] == ("self.0 head 0", "self.0 head 3", "self.1 head 0", "self.1 head 3")
    sets = {"all": found, "self.1 head 3": found.only([(1, 3)])}
    for label, vectors in sets.items():
        for strength in strengths:
            edits = [
                Edit("z", "add", value=strength * vectors[layer, head][None], layers=[layer], heads=[head])
                for layer in (0, 1)
                for head in (0, 3)
                if label == "all" or (layer, head) == (1, 3)
            ]
            values = []
            for batch in held_out:
                with patched(model, Spec(edits if strength else [])), torch.no_grad():
                    values.append(last_logit(model(**batch, use_cache=False)).double())
            of = together if label == "all" else each
            # One edit for all heads of a layer, or one for each: the same sums.
            assert np.array_equal(of.examples.at(head=label, strength=strength).values, torch.cat(values).numpy())
    assert np.array_equal(together.examples.at(head="all", strength=0.0).values, together.unsteered)
    fast = found.effect(held_out, last_logit, strengths, each=True, **QUIET)
    np.testing.assert_allclose(fast.examples.values, each.examples.values, atol=1e-5)
    frame = together.to_frame()
    assert list(frame.columns) == ["head", "strength", "value", "unsteered", "effect", "error"]
    change = together.examples.at(head="all", strength=0.5).values - together.unsteered
    assert frame.effect.iloc[2] == pytest.approx(change.mean(), rel=1e-12)
    assert frame.error.iloc[2] == pytest.approx(change.std(ddof=1) / 5**0.5, rel=1e-12)


def test_steering_away_from_and_back_to_copying() -> None:
    """On the packaged model: the induction head's difference between sequences that repeat and ones that do not."""
    model = load_model()

    def broken(seed: int) -> Tensor:
        ids = repeated_sequences(16, 10, 64, seed)
        ids[:, 1:11] = repeated_sequences(16, 10, 64, seed + 50)[:, 1:11]
        return ids

    repeats, others = (repeated_sequences(16, 10, 64, 0), broken(1))
    found = discover_vector(model, others, repeats, [1], [3], positions=None)
    effect = found.effect(repeated_sequences(16, 10, 64, 2), metrics.loss(range(12, 21)), (0.0, 1.0, 4.0, 16.0), **QUIET)
    losses = effect.value().at(head="all").values
    assert losses[0] == pytest.approx(effect.unsteered.mean()) and losses[3] > 10 * losses[0] and losses[3] > losses[1]


def test_cuts_that_the_model_has_are_in_both_sides() -> None:
    """A head that is cut does not differ, one before it does as ever; and effects are measured under the same cuts."""
    model, (a, b, c) = FAMILIES["gpt2"].build(), (examples("gpt2", seed) for seed in range(3))
    plain, cut = discover_vector(model, a, b), Edit("z", "zero", layers=[1], heads=[2])
    patch_model(model, cut)
    found = discover_vector(model, a, b)
    effect = found.effect(c, last_logit, [0.0, 2.0], fast=False, **QUIET)
    assert float(found[1, 2].norm()) == 0 < float(plain[1, 2].norm()) and torch.equal(found[0, 2], plain[0, 2])
    slope = discover_vector(model, a, metric=last_logit, method="gradient")
    unpatch_model(model)
    assert not torch.equal(slope[0, 1], discover_vector(model, a, metric=last_logit, method="gradient")[0, 1])
    for strength, value in zip((0.0, 2.0), effect.examples.at(head="all").values, strict=True):
        with patched(model, Spec([cut]) + found.spec(strength)), torch.no_grad():
            assert np.array_equal(last_logit(model(**c, use_cache=False)).double().numpy(), value)


# -- specs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["z", "result"])
def test_specs_are_saved_and_exported(tmp_path: Path, site: str) -> None:
    model, inputs = FAMILIES["llama"].build(), examples("llama", 4)
    found = discover_vector(model, examples("llama", 0), examples("llama", 1), site=site, heads=[3, 1])
    spec = found.spec(2.0, positions=[3, 4])
    spec.save(tmp_path / "steer.yaml")
    assert Spec.load(tmp_path / "steer.yaml") == spec and len(spec) == 2
    assert found.spec(0) == Spec() and found.spec(1.0) != found.spec(2.0)
    patch_model(model, found.spec(2.0))
    with torch.no_grad():
        expected = model(**inputs).logits
    export_checkpoint(model, tmp_path / "steered", verify=False)
    again = load_checkpoint(tmp_path / "steered")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_vectors_at_z_bake_into_biases(tmp_path: Path, name: str) -> None:
    model, inputs = FAMILIES[name].build(), examples(name, 4)
    found = discover_vector(model, examples(name, 0), examples(name, 1)).scaled(3.0)
    with torch.no_grad():
        plain = model(**inputs).logits
        patch_model(model, found.spec(1.0))
        expected = model(**inputs).logits
    export_checkpoint(model, tmp_path / "baked", bake=True, verify=False)
    baked = getattr(transformers, FAMILIES[name].architecture).from_pretrained(tmp_path / "baked").eval()
    with torch.no_grad():
        logits = baked(**inputs).logits
    assert float((expected - plain).abs().max()) > 0.05
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # one sum in place of two


# -- the rest -----------------------------------------------------------------------------------------------------------


def test_norms_scales_and_choices(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    found = discover_vector(model, examples("llama", 0), examples("llama", 1))
    assert found.norms().at(layer="self.1", head=2).item() == pytest.approx(float(found[1, 2].norm()), rel=1e-6)
    assert np.allclose(found.scaled(2.5).norms().values, 2.5)
    few = found.only([(1, 2), ("self.0", 3), (1, 0)])
    assert few.heads == {"self.0": (3,), "self.1": (0, 2)} and torch.equal(few[1, 2], found[1, 2])
    assert few.norms().to_frame().shape == (3, 3)
    for wrong in (lambda: few[0, 0], lambda: found.only([(0, HEADS)]), lambda: found[5, 0]):
        with pytest.raises(NoMatchError):
            wrong()
    steered = found.effect(examples("llama", 2), last_logit, each=True, **QUIET)
    for name, figure in {"norms": found.picture(), "each": steered.picture()}.items():
        save(figure, tmp_path / f"{name}.png")
    axes = steered.picture(3).axes[0]
    assert axes.get_xlabel() == "strength" and axes.get_ylabel() == "last_logit" and len(axes.get_lines()) == 4
    assert "under steering at z, 3 examples" in str(steered)


def test_what_does_not_fit_is_refused() -> None:
    model, a, b = FAMILIES["llama"].build(), examples("llama", 0), examples("llama", 1)
    for arguments, message in (
        ({"site": "v"}, "site: found 'v'"),
        ({"method": "mean"}, "method: found 'mean'"),
        ({"method": "gradient"}, "metric: found None"),
        ({"metric": "loss"}, "expected None with method='mean_difference'"),
        ({"negatives": None}, "negatives: found None"),
        ({"positions": LENGTH}, "one at position 9"),
        ({"layers": [7]}, "7"),
        ({"heads": [HEADS]}, "heads"),
    ):
        with pytest.raises((SpecError, NoMatchError), match=message):
            discover_vector(model, a, **{"negatives": b, **arguments})


def test_examples_are_known_again_by_what_the_model_reads() -> None:
    """Whatever comes with them: labels, a mask of ones, padding on either side."""
    model, ids = FAMILIES["llama"].build(), examples("llama", 0)["input_ids"]
    found = discover_vector(model, {"input_ids": ids}, {"input_ids": ids.flip(1)})
    ones, pads = torch.ones_like(ids), torch.zeros_like(ids[:, :2])
    forms = [
        {"labels": ids},
        {"attention_mask": ones},
        {"input_ids": torch.cat([pads, ids], 1), "attention_mask": torch.cat([pads, ones], 1)},
        {"input_ids": torch.cat([ids, pads], 1), "attention_mask": torch.cat([ones, pads], 1)},
    ]
    for form in forms:
        with pytest.warns(UserWarning, match=f"{len(ids)} examples that the vectors were found on"):
            found.effect({"input_ids": ids, **form}, last_logit, [0.0], **QUIET)
    found.effect({"input_ids": ids.roll(1, 1), "labels": ids}, last_logit, [0.0], **QUIET)  # others: no warning
