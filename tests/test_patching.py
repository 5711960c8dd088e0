"""Activation patching: the same numbers as a plain loop, in both directions, at every site, and its pictures and frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, HEADS, LENGTH, VOCAB
from torch import Tensor
from torch.nn import functional as F

from surgery import Edit, Spec, capture, collect_reference, patch_model, patched, unpatch_model
from surgery.analysis import metrics
from surgery.analysis.labelled import Labelled
from surgery.analysis.patching import activation_patching
from surgery.analysis.sweep import Sweep
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.errors import NoMatchError, SpecError
from surgery.plots import save

QUIET = {"progress": False}
CLOSE = 1e-4
"""Of the largest entry: products of batches of other sizes round otherwise (see Sweep)."""


def inputs_of(name: str, seed: int, padding: int = 0) -> dict[str, Tensor]:
    return FAMILIES[name].inputs(batch=3, padding=padding, seed=seed)


def last_logit(output: Any) -> Tensor:
    """A metric that is anybody's own."""
    return output.logits[:, -1, 7]


def values(model: Any, inputs: dict[str, Tensor]) -> np.ndarray:
    with torch.no_grad():  # as in a sweep without a cache, with which k may lie in another layout, and round otherwise
        return last_logit(model(**inputs, use_cache=False)).double().numpy()


def loop(
    model: Any, base: dict[str, Tensor], source: dict[str, Tensor], site: str, heads: Any, positions: Any
) -> dict[tuple[str, Any, Any], np.ndarray]:
    """What the plain loop gives, place by place."""
    with capture(model, [site], detach=True) as run, torch.no_grad():
        model(**source, use_cache=False)
    found = {}
    for layer in ("self.0", "self.1"):
        for head in heads:
            for position in positions:
                edit = Edit(
                    site,
                    "activation",
                    reference=run,
                    layers=[layer],
                    heads="all" if head is None else [head],
                    positions=None if position is None else [position],
                )
                with patched(model, edit):
                    found[layer, head, position] = values(model, base)
    return found


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("site", ["z", "rot_k", "pattern"])
def test_patching_is_the_plain_loop(name: str, site: str, direction: str) -> None:
    model, clean, corrupted = FAMILIES[name].build(), inputs_of(name, 0, padding=2), inputs_of(name, 1, padding=2)
    base, source = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    expected = loop(model, base, source, site, [0, 3], [1, LENGTH - 1])
    options = {"sites": site, "direction": direction, "heads": [0, 3], "positions": [1, -1], **QUIET}
    plain = activation_patching(model, clean, corrupted, last_logit, fast=False, **options)
    fast = activation_patching(model, clean, corrupted, last_logit, **options)
    assert plain.examples[site].axes == {
        "layer": ("self.0", "self.1"),
        "head": (0, 3),
        "position": (1, LENGTH - 1),
        "example": (0, 1, 2),
    }
    largest = max(np.abs(value).max() for value in expected.values())
    for (layer, head, position), value in expected.items():
        where = {"layer": layer, "head": head, "position": position}
        assert np.array_equal(plain.examples[site].at(**where).values, value)
        assert np.abs(fast.examples[site].at(**where).values - value).max() <= CLOSE * largest
    assert np.array_equal(plain.clean, values(model, clean))
    assert plain.corrupted is not None and np.array_equal(plain.corrupted, values(model, corrupted))
    assert fast.notes == [], "the short cut was taken"


@pytest.mark.parametrize("name", ["gptj", "bloom", "deepseek_v3", "gpt_oss", "roberta", "whisper"])
def test_the_short_cut_holds_for_other_classes(name: str) -> None:
    family = FAMILIES[name]
    model, clean, corrupted = family.build(), family.inputs(seed=0), family.inputs(seed=1)
    fast, plain = (
        activation_patching(model, clean, corrupted, last_logit, ("z", "rot_q", "v"), ("layer", "head"), fast=fast, **QUIET)
        for fast in (True, False)
    )
    for site in plain.keys:
        np.testing.assert_allclose(fast.examples[site].values, plain.examples[site].values, atol=CLOSE, rtol=CLOSE)
        assert np.abs(plain.effect(site).values).max() > 1e-6
    assert fast.notes == []


def test_axes_left_out_are_patched_together() -> None:
    model, clean, corrupted = FAMILIES["llama"].build(), inputs_of("llama", 0), inputs_of("llama", 1)
    by_head = loop(model, clean, corrupted, "v", [1], [None])
    found = activation_patching(model, clean, corrupted, last_logit, "v", ("layer",), heads=[1], fast=False, **QUIET)
    assert tuple(found.value().axes) == ("layer",)
    for (layer, _, _), value in by_head.items():
        assert np.array_equal(found.examples["v"].at(layer=layer).values, value)

    with capture(model, ["v"], detach=True) as run, torch.no_grad():
        model(**corrupted, use_cache=False)
    found = activation_patching(model, clean, corrupted, last_logit, "v", ("position",), fast=False, **QUIET)
    assert found.value().axes == {"position": tuple(range(LENGTH))}
    for position in range(LENGTH):
        with patched(model, Edit("v", "activation", reference=run, positions=[position])):
            assert np.array_equal(found.examples["v"].at(position=position).values, values(model, clean))

    everything = activation_patching(model, clean, corrupted, last_logit, "v", (), fast=False, **QUIET)
    with patched(model, Edit("v", "activation", reference=run)):
        assert np.array_equal(everything.examples["v"].values, values(model, clean))
    assert everything.value().shape == ()


def test_everything_patched_everywhere_is_the_other_run() -> None:
    model, clean, corrupted = FAMILIES["gpt2"].build(), inputs_of("gpt2", 0), inputs_of("gpt2", 1)
    corrupted["input_ids"] = torch.cat([corrupted["input_ids"][:, :-1], clean["input_ids"][:, -1:]], dim=1)
    # The last token is the same, so all that the last position can know of the others comes through attention.
    for direction, other in (("noising", "corrupted"), ("denoising", "clean")):
        found = activation_patching(model, clean, corrupted, last_logit, "z", (), direction=direction, **QUIET)
        np.testing.assert_allclose(found.examples["z"].values, getattr(found, other), rtol=1e-4)
        assert found.recovery().item() == pytest.approx(0.0 if direction == "noising" else 1.0, abs=1e-4)
        assert abs(found.effect().item()) == pytest.approx(abs(found.gap), rel=1e-4)


@pytest.mark.parametrize("to", ["zero", "mean", "resample"])
def test_other_replacements_are_those_of_edits(to: str) -> None:
    model, clean = FAMILIES["llama"].build(), inputs_of("llama", 0)
    found = activation_patching(
        model, clean, None, last_logit, "z", ("layer", "head"), to=to, positions=[-2], fast=False, **QUIET
    )
    assert found.corrupted is None
    for layer in (0, 1):
        for head in range(HEADS):
            with patched(model, Edit("z", to, layers=[layer], heads=[head], positions=[LENGTH - 2])):
                assert np.array_equal(found.examples["z"].at(layer=f"self.{layer}", head=head).values, values(model, clean))


def test_a_reference_is_patched_in() -> None:
    model, clean = FAMILIES["llama"].build(), inputs_of("llama", 0)
    means = collect_reference(model, [inputs_of("llama", 5)["input_ids"]], progress=False)
    for site in ("z", "v"):
        found = activation_patching(
            model, clean, None, last_logit, site, ("layer", "head"), to=means, heads=[2, 1], fast=False, **QUIET
        )
        assert found.value().axes["head"] == (1, 2)
        with patched(model, Edit(site, "mean", reference=means, layers=[0], heads=[2])):
            assert np.array_equal(found.examples[site].at(layer="self.0", head=2).values, values(model, clean))


def test_several_batches_and_cuts_that_the_model_has() -> None:
    """Examples go on from batch to batch; other cuts are part of both runs, and are there afterwards."""
    model = FAMILIES["gpt2"].build()
    cut = Spec([Edit("z", "zero", layers=[0], heads=[1])])
    pairs = [(inputs_of("gpt2", 0), inputs_of("gpt2", 1)), (inputs_of("gpt2", 2), inputs_of("gpt2", 3))]
    patch_model(model, cut)
    found = activation_patching(model, *zip(*pairs, strict=True), last_logit, "z", ("layer",), fast=False, **QUIET)
    for number, (clean, corrupted) in enumerate(pairs):
        with capture(model, ["z"], detach=True) as run, torch.no_grad():
            model(**corrupted, use_cache=False)
        with patched(model, cut + Edit("z", "activation", reference=run, layers=[1])):
            expected = values(model, clean)
        assert np.array_equal(found.examples["z"].at(layer="self.1").values[3 * number : 3 * number + 3], expected)
    assert "head" not in found.value().axes
    with torch.no_grad():
        before = model(**pairs[0][0]).logits
    unpatch_model(model)
    with patched(model, cut), torch.no_grad():
        assert torch.equal(model(**pairs[0][0]).logits, before)


def test_what_a_sweep_found_out_is_not_asked_again_in_the_next_batch() -> None:
    model = FAMILIES["gpt2"].build()
    pairs = [(inputs_of("gpt2", 0), inputs_of("gpt2", 1)), (inputs_of("gpt2", 2), inputs_of("gpt2", 3))]
    both = activation_patching(model, *zip(*pairs, strict=True), last_logit, **QUIET)
    each = [activation_patching(model, *inputs, last_logit, **QUIET) for inputs in pairs]
    assert each[0].forwards == each[1].forwards and both.forwards < 2 * each[0].forwards - 0.5, "less the checks of a batch"
    assert np.array_equal(both.examples["z"].values, np.concatenate([one.examples["z"].values for one in each], -1))


def test_an_encoder_and_a_decoder_have_positions_of_their_own() -> None:
    family = FAMILIES["bart"]
    model, clean, corrupted = family.build(), family.inputs(seed=0), family.inputs(seed=1)
    found = activation_patching(model, clean, corrupted, last_logit, "z", ("layer", "position"), **QUIET)
    frame = found.to_frame()
    counts = frame.groupby("layer").position.count()
    assert counts["encoder.self.0"] == LENGTH and counts["decoder.self.1"] == counts["decoder.cross.0"] == LENGTH - 2
    assert np.isnan(found.value().at(layer="decoder.self.1", position=LENGTH - 1).values)
    assert not frame.effect.isna().any()


def test_metrics_look_at_the_clean_inputs_in_every_run() -> None:
    model, clean, corrupted = FAMILIES["llama"].build(), inputs_of("llama", 0), inputs_of("llama", 1)

    def loss_of(inputs: dict[str, Tensor]) -> np.ndarray:
        with torch.no_grad():
            logits = model(**inputs).logits[:, :-1].double()
        targets = clean["input_ids"][:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1).numpy()

    found = activation_patching(model, clean, corrupted, metrics.loss(), "z", (), direction="denoising", **QUIET)
    np.testing.assert_allclose(found.clean, loss_of(clean), rtol=1e-6)
    np.testing.assert_allclose(found.corrupted, loss_of(corrupted), rtol=1e-6)
    divergence = activation_patching(model, clean, corrupted, metrics.kl(), "z", (), direction="denoising", **QUIET)
    assert np.allclose(divergence.clean, 0) and divergence.corrupted is not None and (divergence.corrupted > 0.1).all()


def test_places_share_what_they_are_patched_with() -> None:
    """Thousands of places, each with a copy of its head's activations, would be many times the run that these are of."""
    held: dict[int, Any] = {}

    def run(sweep: Sweep, specs: list[Spec], read: Any) -> list[np.ndarray]:
        for spec in specs:
            for cut in spec:
                storage = cut.reference["self.0" if cut.layers == ("self.0",) else "self.1", "z"].untyped_storage()
                held[storage.data_ptr()] = storage
        return [np.zeros(sweep.rows)] * len(specs)

    model, clean, corrupted = FAMILIES["llama"].build(), inputs_of("llama", 0), inputs_of("llama", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "run", run)
        activation_patching(model, clean, corrupted, last_logit, **QUIET)
    assert sum(storage.nbytes() for storage in held.values()) == 2 * 3 * HEADS * LENGTH * 16 * 4, "z of both layers, once"


# -- findings -----------------------------------------------------------------------------------------------------------


def demo_pair() -> tuple[Any, Tensor, Tensor]:
    """Sequences that say everything twice, and the same with another first time."""
    clean = repeated_sequences(4, 10, 64, seed=0)
    corrupted = clean.clone()
    corrupted[:, 1:11] = repeated_sequences(4, 10, 64, seed=1)[:, 1:11]
    return load_model(), clean, corrupted


def test_the_induction_head_is_found_where_it_works() -> None:
    model, clean, corrupted = demo_pair()
    metric = metrics.loss(range(12, 21))
    found = activation_patching(model, clean, corrupted, metric, ("z", "pattern"), ("layer", "head"), "corrupted", **QUIET)
    effects = found.effect("z")
    assert set(map(tuple, effects.top(2)[["layer", "head"]].to_numpy())) == {("self.0", 0), ("self.1", 3)}
    assert effects.at(layer="self.1", head=3).item() > 1
    by_position = activation_patching(model, clean, corrupted, metric, "z", ("position",), layers=[1], heads=[3], **QUIET)
    of = by_position.effect().values
    # Tokens 12 to 20 are predicted one position before them.
    assert of[11:20].min() > 10 * max(np.abs(of[:11]).max(), abs(of[20]), 1e-6)


# -- frames, pictures, refusals -----------------------------------------------------------------------------------------


def test_frames_pictures_and_text(tmp_path: Any) -> None:
    model, clean, corrupted = FAMILIES["gpt2"].build(), inputs_of("gpt2", 0), inputs_of("gpt2", 1)
    found = activation_patching(model, clean, corrupted, last_logit, ("z", "v"), ("layer", "head"), **QUIET)
    frame = found.to_frame()
    assert list(frame.columns) == ["site", "layer", "head", "value", "effect", "recovery"] and len(frame) == 2 * 2 * HEADS
    row = frame[(frame.site == "v") & (frame.layer == "self.1") & (frame["head"] == 2)].iloc[0]
    assert row.value == found.examples["v"].at(layer="self.1", head=2).values.mean()
    assert row.effect == row.value - found.clean.mean() and found.corrupted is not None
    share = (row.value - found.corrupted.mean()) / (found.clean.mean() - found.corrupted.mean())
    assert row.recovery == pytest.approx(share, rel=1e-12)
    assert "last_logit: clean" in str(found) and "self.1" in str(found.value())
    for view in ("value", "effect", "recovery"):
        figure = found.picture(view)
        assert [axes.get_xlabel() for axes in figure.axes[:2]] == ["head", "head"]
        save(figure, tmp_path / f"{view}.png")
    save(found.picture(), tmp_path / "effect.pdf")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".pdf"}


def test_positions_bear_their_tokens() -> None:
    model, clean, corrupted = FAMILIES["gpt2"].build(), inputs_of("gpt2", 0), inputs_of("gpt2", 1)
    found = activation_patching(model, clean, corrupted, last_logit, positions=[0, 2, -1], **QUIET)
    for word, rotation in (("$c$", 0.0), ("a long word of many", 90.0)):
        tokens = ["a", "b", word, *[""] * (LENGTH - 3)]
        axes = found.picture(tokens=tokens).axes[0]
        labels = axes.get_xticklabels()
        assert [label.get_text() for label in labels] == ["0 a", f"2 {word}", str(LENGTH - 1)]
        assert {label.get_rotation() for label in labels} == {rotation} and not labels[1].get_parse_math()
    with pytest.raises(SpecError, match=f"found 3 texts of tokens; expected at least {LENGTH}"):
        found.picture(tokens=["a", "b", "c"])


def test_what_does_not_fit_is_refused() -> None:
    model, clean, corrupted = FAMILIES["llama"].build(), inputs_of("llama", 0), inputs_of("llama", 1)
    short = {name: tensor[:, :-1] for name, tensor in corrupted.items()}
    for arguments, message in (
        ({"corrupted": short}, r"corrupted, batch 0.*\(3, 8\).*\(3, 9\)"),
        ({"corrupted": None}, "corrupted: found None"),
        ({"sites": ()}, "sites: found none"),
        ({"sites": "zz"}, "sites: found 'zz'.*Did you mean 'z'"),
        ({"over": ("layer", "heads")}, "Did you mean 'head'"),
        ({"direction": "denoise"}, "Did you mean 'denoising'"),
        ({"to": "zeros"}, "Did you mean 'zero'"),
        ({"to": 3}, "found a int"),
        ({"to": "zero", "direction": "denoising"}, "Leave `to` out"),
        ({"positions": [LENGTH]}, "positions: found 9; expected -9 to 8"),
        ({"positions": "last"}, "whole numbers"),
        ({"sites": "k", "over": ("head",), "heads": [0]}, "rot_k"),
    ):
        with pytest.raises(SpecError, match=message):
            activation_patching(model, clean, **{"corrupted": corrupted, "metric": last_logit, **QUIET, **arguments})
    with pytest.raises((SpecError, NoMatchError), match="heads"):
        activation_patching(model, clean, corrupted, last_logit, heads=[HEADS], **QUIET)
    same = activation_patching(model, clean, clean, last_logit, over=(), **QUIET)
    with pytest.raises(SpecError, match="the same last_logit of both runs"):
        same.recovery()
    assert same.to_frame().recovery.isna().all()
    with pytest.raises(SpecError, match="Did you mean 'effect'"):
        same.picture("effects")
    with pytest.raises(NoMatchError, match="site: found 'v'; expected 'z'"):
        same.value("v")


def test_labelled_arrays() -> None:
    array = Labelled(
        [[1.0, -3.0], [2.0, 9.0]], {"layer": ("a", "b"), "head": (0, 4)}, "x", "nats", [[True, True], [True, False]]
    )
    assert np.isnan(array.values[1, 1]) and array.at(layer="a").values.tolist() == [1.0, -3.0]
    assert array.at(layer="a", head=4).item() == -3.0
    assert array.mean("head").values.tolist() == [-1.0, 2.0], "what does not exist does not count"
    assert array.to_frame().x.tolist() == [1.0, -3.0, 2.0] and array.top(1).iloc[0].tolist() == ["a", 4, -3.0]
    assert Labelled([[np.nan]], {"a": (1,), "b": (2,)}).to_frame().value.isna().tolist() == [True], "a metric may be NaN"
    assert "x (nats): 2 layers × 2 heads" in str(array)
    for wrong in (
        lambda: array.at(layers="a"),
        lambda: array.at(layer="c"),
        lambda: array.mean("nope"),
        lambda: Labelled([1.0], {"a": (1, 2)}),
    ):
        with pytest.raises(NoMatchError):
            wrong()


assert VOCAB > 7, "last_logit"
