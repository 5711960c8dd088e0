"""Collecting means and spreads: against one plain computation over all data at once, in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, HEADS, KV_HEADS, LAYERS
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, GPT2Config, GPT2LMHeadModel

from surgery import (
    Edit,
    Freeze,
    NoMatchError,
    Reference,
    Spec,
    SpecError,
    capture,
    collect_reference,
    find_anatomy,
    patch_model,
    patched,
    unpatch_model,
)
from surgery.reference import Entry

SITES = ["q", "k", "rot_q", "rot_k", "v", "z", "result"]


@functools.cache
def built(name: str, implementation: str = "eager") -> Any:
    return FAMILIES[name].build(implementation)


def batches(name: str = "llama", lengths: tuple[int, ...] = (9, 6, 7), padding: int = 2) -> list[dict[str, Tensor]]:
    """Batches of several sizes and lengths, the first row of each padded on the left."""
    return [FAMILIES[name].inputs(2 + i, length, padding, seed=i) for i, length in enumerate(lengths)]


def collected(model: nn.Module, data: Any, *args: Any, **options: Any) -> Reference:
    return collect_reference(model, data, *args, progress=False, **options)


def everything(model: nn.Module, data: Any, address: str, site: str) -> list[tuple[Tensor, Tensor]]:
    """For every batch: activations (batch, position, head, d) in float64, and which positions are tokens."""
    found = []
    for inputs in data:
        with torch.no_grad(), capture(model, site, [address], range(HEADS) if site == "v" else "all") as run:
            model(**inputs)
        tensor = run[address, site].double().transpose(1, 2)
        found.append((tensor, inputs.get("attention_mask", torch.ones(tensor.shape[:2])).bool()))
    return found


def seen(model: nn.Module, inputs: dict[str, Tensor], sites: Any) -> Any:
    with torch.no_grad(), capture(model, sites) as run:
        model(**inputs)
    return run


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population spread over rows (n, head, d)."""
    return values.mean(dim=0), values.std(dim=0, correction=0)


# -- against everything at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_grouped"])
def test_means_and_spreads(name: str, site: str, implementation: str) -> None:
    model, data = built(name, implementation), batches(name)
    reference = collected(model, data, site)
    assert reference.kind == "mean" and reference.model == find_anatomy(model).fingerprint
    assert set(reference) == {(f"self.{layer}", site) for layer in range(LAYERS)}
    for layer in range(LAYERS):
        rows = torch.cat([x[tokens] for x, tokens in everything(model, data, f"self.{layer}", site)])
        mean, spread = moments(rows)
        entry = reference.find(f"self.{layer}", site)
        assert entry is not None and entry.spread is not None and entry.heads is None
        assert entry.value.shape[0] == (KV_HEADS if site == "k" and name == "llama" else rows.shape[1])
        # One rounding to the model's float32.
        torch.testing.assert_close(entry.value, mean.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entry.spread, spread.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("site", ["rot_q", "v", "z"])
def test_positions_kept_apart(site: str) -> None:
    """Batches of different lengths: a position counts where a batch has it, and has a token there."""
    model, data = built("llama"), batches(lengths=(5, 9, 7))
    reference = collected(model, data, site, [0], per_position=True)
    entry = reference.find("self.0", site)
    assert entry is not None and entry.spread is not None
    assert entry.value.shape == entry.spread.shape == (HEADS, 9, 16)
    everywhere = everything(model, data, "self.0", site)
    for position in range(9):
        rows = torch.cat([x[:, position][tokens[:, position]] for x, tokens in everywhere if x.shape[1] > position])
        mean, spread = moments(rows)
        torch.testing.assert_close(entry.value[:, position], mean.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entry.spread[:, position], spread.float(), rtol=1e-6, atol=1e-6)


def test_padding_does_not_count() -> None:
    """What the padding holds is of no importance, and a row without padding alone gives the same."""
    model, family = built("llama"), FAMILIES["llama"]
    padded = family.inputs(2, 9, padding=4)
    other = {**padded, "input_ids": torch.where(padded["attention_mask"].bool(), padded["input_ids"], 33)}
    assert not torch.equal(padded["input_ids"], other["input_ids"])
    # v does not look at other positions.
    one, two = (collected(model, [inputs], "v").find("self.0", "v") for inputs in (padded, other))
    assert torch.equal(one.value, two.value) and torch.equal(one.spread, two.spread)  # type: ignore[union-attr]
    blind = collected(model, [{"input_ids": other["input_ids"]}], "v").find("self.0", "v")
    assert not torch.allclose(one.value, blind.value)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_padding_of_two_stacks(name: str) -> None:
    """Encoder positions follow attention_mask, decoder queries decoder_attention_mask, cross keys the encoder's."""
    model, inputs = built(name), dict(FAMILIES[name].inputs(padding=3))
    length = inputs["decoder_input_ids"].shape[1]
    inputs["decoder_attention_mask"] = torch.ones(2, length, dtype=torch.long)
    inputs["decoder_attention_mask"][1, -2:] = 0
    reference = collected(model, [inputs], ["rot_q", "rot_k", "v", "z"])
    assert {address for address, _ in reference} == {a.address for a in find_anatomy(model)}
    run = seen(model, inputs, ["rot_q", "rot_k", "v", "z"])
    source, target = inputs["attention_mask"].bool(), inputs["decoder_attention_mask"].bool()
    for (address, site), tensor in run.items():
        of_source = address.startswith("encoder") or ("cross" in address and site in ("rot_k", "v"))
        mean, spread = moments(tensor.double().transpose(1, 2)[source if of_source else target])
        entry = reference.find(address, site)
        torch.testing.assert_close(entry.value, mean.float(), rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]
        torch.testing.assert_close(entry.spread, spread.float(), rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]


def test_many_batches_lose_no_digits() -> None:
    """A mean far from zero, one token at a time: sums of squares would cancel."""
    model = FAMILIES["gpt2"].build()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias.add_(1000.0)
    data = [{"input_ids": torch.tensor([[token]])} for token in range(5, 60)]
    entry = collected(model, data, "v", [0]).find("self.0", "v")
    rows = torch.cat([x.flatten(0, 1) for x, _ in everything(model, data, "self.0", "v")])
    mean, spread = moments(rows)
    assert mean.min() > 900 and spread.max() < 10
    torch.testing.assert_close(entry.value, mean.float(), rtol=1e-6, atol=0)  # type: ignore[union-attr]
    torch.testing.assert_close(entry.spread, spread.float(), rtol=1e-6, atol=0)  # type: ignore[union-attr]


def test_the_order_of_batches_does_not_matter() -> None:
    model, data = built("llama"), batches()
    for per_position in (False, True):
        one, two = (collected(model, d, "z", per_position=per_position) for d in (data, data[::-1]))
        for key in one:
            torch.testing.assert_close(one.entries[key].value, two.entries[key].value, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(one.entries[key].spread, two.entries[key].spread, rtol=1e-6, atol=1e-6)


# -- what it takes, and what it leaves ----------------------------------------------------------------------------------


def test_any_iterable_is_read_once_and_one_batch_at_a_time() -> None:
    model, data = built("llama"), batches()
    expected = collected(model, data, "z")
    log: list[str] = []

    def stream() -> Iterator[dict[str, Tensor]]:
        for number, inputs in enumerate(data):
            log.append(f"read {number}")
            yield inputs

    def count(module: nn.Module, args: Any) -> None:
        log.append("forward")

    handle = model.model.layers[0].register_forward_pre_hook(count)
    found = collected(model, stream(), "z")
    handle.remove()
    assert log == ["read 0", "forward", "read 1", "forward", "read 2", "forward"]
    assert found == expected
    assert collected(model, iter(data), "z") == expected
    assert collected(model, tuple(data), "z") == expected


def test_batches_may_be_tensors_of_tokens() -> None:
    model = built("gpt2")
    ids = [inputs["input_ids"] for inputs in batches("gpt2", padding=0)]
    assert collected(model, ids, "z") == collected(model, [{"input_ids": x} for x in ids], "z")
    loader = torch.utils.data.DataLoader(torch.randint(5, 60, (6, 4)), batch_size=2)
    assert collected(model, loader, "z").find("self.0", "z").value.shape == (HEADS, 8)  # type: ignore[union-attr]


def test_the_default_serves_both_circuits() -> None:
    model = built("llama")
    reference = collected(model, batches())
    inputs, wanted = FAMILIES["llama"].inputs(), set()
    for circuit, to, gqa in itertools.product(("qk", "ov", "both"), ("mean", "noise"), ("isolated", "shared")):
        freeze = Freeze(circuit, to=to, gqa=gqa, reference=reference)
        wanted |= {edit.site for edit in freeze.edits()}
        with torch.no_grad(), patched(model, freeze):
            assert model(**inputs).logits.isfinite().all()
    assert {site for _, site in reference} == wanted


def test_selections() -> None:
    model = built("bart")
    reference = collected(model, [FAMILIES["bart"].inputs()], "z", "decoder.*")
    assert [address for address, _ in reference] == [f"decoder.{kind}.{i}" for i in range(LAYERS) for kind in ("self", "cross")]
    assert [address for address, _ in collected(built("llama"), batches(), "z", [1])] == ["self.1"]


def test_means_are_of_the_model_with_its_cuts() -> None:
    model, data = FAMILIES["llama"].build(), batches()
    plain = collected(model, data, "z")
    patch_model(model, Edit("z", "value", 3.0, layers=[0]))
    cut = collected(model, data, "z")
    assert (cut.find("self.0", "z").value == 3).all() and (cut.find("self.0", "z").spread == 0).all()  # type: ignore[union-attr]
    assert not torch.equal(cut.find("self.1", "z").value, plain.find("self.1", "z").value)  # type: ignore[union-attr]
    unpatch_model(model)
    assert collected(model, data, "z") == plain


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = FAMILIES["llama"].build("sdpa").train(training)
    classes = [type(m) for m in model.modules()]
    collected(model, batches())
    assert [type(m) for m in model.modules()] == classes
    assert all(m.training is training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="no such batch"):
        collected(model, failing())
    assert [type(m) for m in model.modules()] == classes and torch.is_grad_enabled()


def failing() -> Iterator[dict[str, Tensor]]:
    yield from batches()
    raise ValueError("no such batch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_results_have_the_type_of_the_model(dtype: torch.dtype) -> None:
    model, data = FAMILIES["llama"].build(dtype=dtype), batches(padding=0)
    entry = collected(model, data, "z").find("self.1", "z")
    assert entry is not None and entry.spread is not None and entry.value.dtype == entry.spread.dtype == dtype
    mean, _ = moments(torch.cat([x.flatten(0, 1) for x, _ in everything(model, data, "self.1", "z")]))
    assert torch.equal(entry.value, mean.to(dtype)) if dtype is torch.bfloat16 else torch.allclose(entry.value, mean)


def test_the_progress_bar_can_be_shut_off(capsys: Any) -> None:
    collect_reference(built("gpt2"), batches("gpt2"), "z", progress=False)
    assert capsys.readouterr() == ("", "")
    collect_reference(built("gpt2"), batches("gpt2"), "z")
    out, err = capsys.readouterr()
    assert out == "" and "reference" in err and "3/3" in err


# -- the values of a cut ------------------------------------------------------------------------------------------------


def test_freezing_to_the_mean_puts_the_mean_there() -> None:
    model, inputs = built("llama"), FAMILIES["llama"].inputs(padding=0)
    reference = collected(model, batches(), per_position=True)
    plain = seen(model, inputs, ["rot_q", "rot_k", "z"])
    with patched(model, Freeze("both", [0], [1, 3], to="mean", reference=reference)):
        run = seen(model, inputs, ["rot_q", "rot_k", "z"])
    for site in ("rot_q", "rot_k", "z"):
        value = reference.find("self.0", site).value[[1, 3]]  # type: ignore[union-attr]
        assert torch.equal(run[0, site][:, [1, 3]], value.expand(2, -1, -1, -1))
        if site != "z":
            assert torch.equal(run[0, site][:, [0, 2]], plain[0, site][:, [0, 2]])


def test_freezing_to_noise_has_the_moments_of_the_reference() -> None:
    model = built("llama")
    reference = collected(model, batches())
    entry = reference.find("self.0", "z")
    inputs = FAMILIES["llama"].inputs(1, 60, padding=0)
    drawn = []
    for seed in range(30):
        with patched(model, Freeze("ov", [0], to="noise", reference=reference, seed=seed)):
            drawn.append(seen(model, inputs, "z")[0, "z"])
    z = (torch.cat(drawn, dim=2)[0] - entry.value[:, None]) / entry.spread[:, None]  # type: ignore[union-attr,index]
    # 1800 draws for each of 64 channels; five standard errors.
    assert (z.mean(dim=1).abs() < 5 / 1800**0.5).all() and ((z.std(dim=1) - 1).abs() < 5 / 3600**0.5).all()


def test_a_reference_that_is_shorter_than_the_sequence() -> None:
    model = built("llama")
    reference = collected(model, batches(lengths=(5, 6)), "z", per_position=True)
    with torch.no_grad(), patched(model, Freeze("ov", to="mean", reference=reference)):
        model(**FAMILIES["llama"].inputs(length=6))
        with pytest.raises(SpecError, match=r"values for 6 positions, used at position 6"):
            model(**FAMILIES["llama"].inputs(length=7))


# -- as a value ---------------------------------------------------------------------------------------------------------


def test_saving_and_loading(tmp_path: Path) -> None:
    model = built("llama")
    for number, reference in enumerate((collected(model, batches()), collected(model, batches(), "v", per_position=True))):
        path = tmp_path / f"{number}.safetensors"
        reference.save(path)
        again = Reference.load(path)
        assert again == reference and again.model == reference.model and list(again) == list(reference)
        assert Reference.load(str(path)) == reference
        spec = Spec(Edit("v" if number else "z", "mean", reference=again))
        spec.save(tmp_path / f"spec{number}.yaml")
        assert Spec.load(tmp_path / f"spec{number}.yaml") == spec


def test_equality() -> None:
    value = torch.randn(2, 3)
    base = Reference("mean", {("self.0", "z"): Entry(value)}, "model")
    assert base == Reference("mean", {("self.0", "z"): Entry(value.clone())}, "model")
    for other in (
        Reference("activation", {("self.0", "z"): Entry(value)}, "model"),
        Reference("mean", {("self.0", "z"): Entry(value)}, "other"),
        Reference("mean", {("self.0", "z"): Entry(value)}),
        Reference("mean", {("self.1", "z"): Entry(value)}, "model"),
        Reference("mean", {("self.0", "v"): Entry(value)}, "model"),
        Reference("mean", {("self.0", "z"): Entry(value + 1)}, "model"),
        Reference("mean", {("self.0", "z"): Entry(value.double())}, "model"),
        Reference("mean", {("self.0", "z"): Entry(value, value)}, "model"),
        Reference("mean", {("self.0", "z"): Entry(value, None, (0, 1))}, "model"),
        Reference("mean", {}, "model"),
    ):
        assert base != other
    assert (base == 3) is False
    with pytest.raises(TypeError, match="unhashable"):
        hash(base)


def test_what_was_given_for_one_place_comes_first() -> None:
    values = {
        key: Entry(torch.full((1, 1), float(n))) for n, key in enumerate([("a", "z"), ("a", "*"), ("*", "z"), ("*", "*")])
    }
    found = [
        Reference("mean", dict(list(values.items())[n:])).find("a", "z").value.item()  # type: ignore[union-attr]
        for n in range(4)
    ]
    assert found == [0, 1, 2, 3]
    assert Reference("mean", {("b", "z"): Entry(torch.zeros(1, 1))}).find("a", "z") is None


def test_repr_is_short() -> None:
    reference = collected(built("bart"), [FAMILIES["bart"].inputs()], ["z", "v"])
    assert repr(reference) == "Reference(mean of v, z at encoder.self.0, encoder.self.1, decoder.self.0, .. (6 in all))"
    assert len(reference) == 12


# -- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[], iter(()), ()], ids=["list", "iterator", "tuple"])
def test_no_data(data: Any) -> None:
    with pytest.raises(SpecError, match=r"collect_reference: found no data; expected at least one batch\. Pass a non-empty"):
        collected(built("llama"), data)


def test_data_that_is_padding() -> None:
    """A mean over nothing is no mean, of all positions or of one of them."""
    model, inputs = built("llama"), FAMILIES["llama"].inputs(padding=0)
    masks = [torch.ones_like(inputs["attention_mask"]) for _ in range(2)]
    masks[0][:], masks[1][:, :2] = 0, 0
    nothing, late = ({**inputs, "attention_mask": mask} for mask in masks)
    with pytest.raises(SpecError, match=r"self\.0 z: found no token at any position; expected at least one\. Check the data's"):
        collected(model, [nothing], "z")
    for data in ([nothing], [late], [late, late]):
        with pytest.raises(SpecError, match=r"self\.0 z: found no token at positions 0, 1.*expected at least one\. Check"):
            collected(model, data, "z", per_position=True)
    assert len(collected(model, [nothing, late], "z")) == LAYERS
    # Another batch has tokens there.
    assert len(collected(model, [late, inputs], "z", per_position=True)) == LAYERS


@pytest.mark.parametrize("data", [torch.zeros(1, 3), {"input_ids": torch.zeros(1, 3)}, 3], ids=["tensor", "mapping", "number"])
def test_one_batch_is_no_data_set(data: Any) -> None:
    with pytest.raises(SpecError, match=r"found data of type (Tensor|dict|int); expected an iterable of batches\. Pass a list"):
        collected(built("llama"), data)


@pytest.mark.parametrize("sites", ["pattern", ["z", "scores"], ["scores", "pattern"]], ids=str)
def test_matrices_have_no_mean(sites: Any) -> None:
    with pytest.raises(
        SpecError, match=r"found sites .*(pattern|scores).*; expected sites of vectors: q, k, .*result\. Capture"
    ):
        collected(built("llama"), batches(), sites)


@pytest.mark.parametrize("batch", [["text"], "text", 3, None], ids=str)
def test_batches_of_another_kind(batch: Any) -> None:
    with pytest.raises(SpecError, match=r"found a batch of type .*; expected a mapping of model inputs or a tensor.*Tokenise"):
        collected(built("llama"), [batch])


def test_selections_that_do_not_exist() -> None:
    with pytest.raises(SpecError, match=r"found sites \['zz'\]"):
        collected(built("llama"), batches(), "zz")
    with pytest.raises(NoMatchError, match=r"layers: found 5"):
        collected(built("llama"), batches(), "z", [5])
    with pytest.raises(SpecError, match=r"site 'k'"):
        collected(FAMILIES["deepseek_v3"].build(), batches("deepseek_v3"), "k")


def test_files_of_another_kind(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SpecError, match=r"other\.safetensors'\): found a safetensors file without a reference"):
        Reference.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors in here", encoding="utf-8")
    (tmp_path / "empty.safetensors").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "broken.safetensors", {"reference": '{"kind": '})
    for name in ("text", "empty", "broken"):
        with pytest.raises(SpecError, match=rf"{name}\.safetensors'\): found a file that cannot be read .*Pass that file"):
            Reference.load(tmp_path / f"{name}.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "list.safetensors", {"reference": "[1]"})
    with pytest.raises(SpecError, match=r"found a description that cannot be read \(TypeError"):
        Reference.load(tmp_path / "list.safetensors")
    with pytest.raises(SpecError, match=r"Reference\.from_description: found a description that cannot be read"):
        Reference.from_description({"kind": "mean"}, {})
    description, _ = Reference("mean", {("a", "z"): Entry(torch.zeros(1, 1))}).describe("")
    with pytest.raises(SpecError, match=r"KeyError: '0'"):
        Reference.from_description(description, {})


def test_cross_attended_keys_have_the_mask_of_their_own_sequence() -> None:
    config = GPT2Config(n_layer=1, n_head=4, n_embd=32, vocab_size=67, n_positions=32, add_cross_attention=True, eos_token_id=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    own, source = torch.ones(2, 6), torch.ones(2, 6)
    own[0, :4], source[1, 2:] = 0, 0
    states = torch.randn(2, 6, 32)
    inputs = {
        "input_ids": torch.arange(12).view(2, 6) + 5, "attention_mask": own, "encoder_hidden_states": states,
        "encoder_attention_mask": source,
    }  # fmt: skip
    mean = collect_reference(model, [inputs], "v", ["cross.0"], progress=False)["cross.0", "v"]
    with torch.no_grad(), capture(model, "v", ["cross.0"]) as run:
        model(**inputs, use_cache=False)
    weight = source[:, None, :, None].double()
    expected = (run["cross.0", "v"].double() * weight).sum((0, 2)) / weight.sum()
    # Sums in another order.
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)


def test_every_call_of_a_module_that_layers_share_counts() -> None:
    config = AlbertConfig(
        vocab_size=67, embedding_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = AlbertModel(config).eval(), torch.arange(12).view(2, 6)
    mean = collect_reference(model, [ids], "z", progress=False)[0, "z"]
    with torch.no_grad(), capture(model, "z") as run:
        model(ids)
    steps = run.steps(0, "z")
    assert len(steps) == 3 and not torch.allclose(steps[0], steps[2], atol=1e-2)
    # Sums in another order.
    torch.testing.assert_close(mean, torch.stack(steps).mean((0, 1, 3)), rtol=1e-5, atol=1e-6)
