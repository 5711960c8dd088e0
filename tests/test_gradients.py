"""Gradients of weights against those of a plain backward; promises of backward modes: kept everywhere, found when broken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, FAMILIES_ALL
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM, GPT2Config, GPT2LMHeadModel

import surgery.interventions
from surgery import Edit, Freeze, NotFiredWarning, Spec, SpecError, patch_model, patched, weights
from surgery.analysis.gradients import Gradients, check_gradients
from surgery.blocks import Blocks
from surgery.derive import find_anatomy
from surgery.interventions import Operation
from surgery.patch import session_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # an older name that PEFT uses

STORED = ("gpt2", "llama", "falcon_grouped", "phi3", "codegen", "bart")
"""Fused in one transposed matrix, separate, fused by groups, fused in blocks, fused in another order, two stacks."""


def _loss(output: Any) -> Tensor:
    """Any function of the output: of logits at every position, so that every attention has a gradient."""
    return output.logits.double().log_softmax(-1)[..., 3].mean()


def _by_backward(model: Any, spec: Any, inputs: dict[str, Any]) -> Any:
    """A model whose weights are the gradients of this model's."""
    own = copy.deepcopy(model)
    with patched(own, spec):
        extra = {} if own.config.is_encoder_decoder else {"use_cache": False}
        _loss(own(**inputs, **extra)).backward()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return own


# -- weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORED)
def test_gradients_of_every_block_are_those_of_backward(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    if name == "bart":
        inputs = {**inputs, "use_cache": False}
    spec = Spec([Freeze("qk", layers=["*0"], heads=[1]), Freeze("ov", layers=["*1"], heads=[2], backward="ste")])
    found = check_gradients(model, spec, inputs, _loss)
    assert found.held
    for end, cuts in (("", spec), ("_uncut", Spec())):
        gradients = _by_backward(
            model, cuts, {n: v for n, v in inputs.items() if n != "use_cache"} if name != "bart" else inputs
        )
        for row in found.weights.itertuples():
            block = getattr(weights.head_weights(gradients, row.address), row.weight)[row.head].detach()
            assert getattr(row, f"max{end}") == float(block.abs().max()), (row.address, row.weight, row.head)
            assert getattr(row, f"nonzero{end}") == float((block != 0).double().mean())
            sums = [float(block.double().norm()), float(block.double().abs().mean())]
            np.testing.assert_allclose([getattr(row, f"norm{end}"), getattr(row, f"mean{end}")], sums, rtol=1e-12)  # sums
    blocks = {(a.address, w) for a in find_anatomy(model) for w in ("W_Q", "W_K", "W_V", "W_O")}
    assert {(row.address, row.weight) for row in found.weights.itertuples()} == blocks


def test_nothing_of_a_model_changes() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build("sdpa"), family.inputs()
    own = Spec([Freeze("ov", layers=[0], heads=[0])])
    patch_model(model, own)
    model.train()
    model.lm_head.requires_grad_(False)
    kept = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number) if number % 2 and parameter.requires_grad else None
    grads = {name: parameter.grad for name, parameter in kept_parameters(model)}
    values = {name: parameter.clone() for name, parameter in kept_parameters(model)}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = check_gradients(model, Freeze("qk", layers=[1]), inputs)
    assert found.mode == "training" and model.training and torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter is kept[name][0] and parameter.requires_grad is kept[name][1]
        assert parameter.grad is grads[name] and torch.equal(parameter, values[name])
    session = session_of(model)
    assert session is not None and session.spec == own and torch.is_grad_enabled()


def kept_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return iter(list(model.named_parameters()))


def test_frozen_parameters_show_what_they_would_get() -> None:
    family = FAMILIES["gpt2"]
    model, inputs = family.build(), family.inputs()
    expected = check_gradients(model, Freeze("qk", layers=[0], heads=[1]), inputs)
    model.requires_grad_(False)
    with torch.no_grad():
        found = check_gradients(model, Freeze("qk", layers=[0], heads=[1]), inputs)
    assert found.weights.frozen.all() and not expected.weights.frozen.any() and "frozen" in str(found)
    columns = ["norm", "mean", "max", "nonzero", "norm_uncut"]
    assert found.weights[columns].equals(expected.weights[columns]) and found.held
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_without_a_gradient_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # where sentences are not broken
    family = FAMILIES["deepseek_v3"]
    found = check_gradients(family.build(), Freeze("ov", layers=[0], heads=[1]), family.inputs())
    row = found.weights[(found.weights.address == "self.0") & (found.weights.weight == "W_K")]
    assert len(row) == 1 and "joined from the projections" in row.why.item() and np.isnan(row.norm.item())
    assert found.held and "joined from" in str(found)


class Packed(torch.Tensor):
    """A weight whose numbers are stored in a way of their own."""

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


def test_quantised_weights_are_left_out() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    projection = model.model.layers[0].self_attn.q_proj
    projection._parameters["weight"] = nn.Parameter(projection.weight.detach().as_subclass(Packed), requires_grad=False)
    found = check_gradients(model, Freeze("qk", layers=[0]), inputs)
    why = found.weights.groupby(["address", "weight"]).why.unique()
    assert "quantised" in why["self.0", "W_Q"][0] and list(why["self.1", "W_Q"]) == [""]
    assert found.held and "W_Q" not in set(found.promises["at"]), "a weight that is not seen is promised nothing"


def test_an_adapters_weight_is_that_of_its_sum() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    expected = check_gradients(model, Freeze("qk", layers=[0], heads=[1]), inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], r=2, init_lora_weights=True)).eval()
    found = check_gradients(adapted, Freeze("qk", layers=[0], heads=[1]), inputs)
    assert found.held and found.weights.frozen.all()
    np.testing.assert_allclose(found.weights.norm, expected.weights.norm, rtol=1e-6)  # it adds zeros, which round otherwise


# -- promises that are kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES_ALL)
def test_every_mode_keeps_its_promise_in_every_family(name: str) -> None:
    family = FAMILIES[name]
    model = family.build("sdpa" if family.sdpa else "eager")
    anatomy = find_anatomy(model)
    cuts: list[Any] = [
        Freeze("qk", layers=["*0"], heads=[0, 1]),
        Freeze("ov", layers=["*1"], heads=[2, 3]),
        Edit("scores", "zero", layers=["*1"], heads=[1], backward="ste"),
        Edit("pattern", "first", layers=["*0"], heads=[3], strength=0.5, backward="stopgrad"),
        Edit("rot_k", "noise", layers=["*1"], heads=[0], backward="stopgrad", positions=[2, 3, 5]),
        Edit("v", "scale", value=0.3, layers=["*0"], heads=[2, 3], backward="stopgrad"),
        Edit("z", "add", value=0.1, layers=["*1"]),
    ]
    has = {site for site in "qko" if all(site in attention.projections for attention in anatomy)}
    cuts += [Edit("q", "identity", layers=["*1"], heads=[0], backward="stopgrad")] if "q" in has else []
    cuts += [Edit("result", "mean", layers=["*0"], heads=[2], strength=0.3)] if "o" in has else []
    cuts += [Edit("k", "value", value=0.1, layers=["*0"], heads=[3], gqa="shared", backward="ste")] if "k" in has else []
    found = check_gradients(model, Spec(cuts), family.inputs(padding=0), _loss)
    assert found.held, found.broken().to_string()
    edits = found.promises[found.promises.backward != ""]
    assert len(edits) == len(anatomy) // 2 * len(cuts), "each of them is one edit in one of two layers"
    for row in edits.itertuples():
        is_cut_off = row.behind == 0  # by another cut, behind it
        assert row.held is (None if row.cuts == (6,) or is_cut_off else True), row
    assert (edits.behind > 0).sum() >= 0.8 * len(edits)
    rows = found.promises[found.promises.backward == ""]
    assert {"W_Q"} <= set(rows["at"])
    if name == "olmo2":  # one norm over all heads: others read what a head's W_Q makes, unless q itself is cut
        by_cut = rows[rows["at"] == "W_Q"].groupby(lambda i: rows.cuts[i] == (7,)).held.unique()
        assert list(by_cut[False]) == [None] and list(by_cut[True]) == [True]
        assert rows[rows.held.isna()].note.str.contains("reads it").all()
    else:
        assert rows.held.eq(True).all()
    for row in rows[rows.held.eq(True)].itertuples():
        own = found.weights[(found.weights.address == row.address) & (found.weights.weight == row.at)]
        own = own[own["head"].isin(row.heads)]
        assert len(own) == len(row.heads) and (own.norm == 0).all() and (own.nonzero == 0).all()
        assert (own.norm_uncut > 0).all(), "zero because of the cut"


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("site", ["q", "k", "rot_q", "rot_k", "v", "scores", "pattern", "z", "result"])
def test_strength_is_what_passes(site: str, strength: float) -> None:
    family = FAMILIES["gpt_neox"]
    edits = [Edit(site, "zero", layers=[0], heads=[1, 2], strength=strength, backward=mode) for mode in ("stopgrad", "natural")]
    for edit in [*edits, Edit(site, "identity", layers=[0], heads=[3], strength=strength, positions=[4, 7])]:
        found = check_gradients(family.build("sdpa"), edit, family.inputs(), _loss)
        row = found.promises.iloc[0]
        assert found.held and row.held is True and row["at"] == site and row.behind > 0
        assert (
            row.promise
            == ("exactly zero into what was replaced", f"exactly {1 - strength:g} of the gradient behind it")[strength < 1]
        )


def _weights_promised(found: Gradients) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = found.promises[found.promises.promise == "exactly zero"]
    return {f"{row.address} {row.at}": (row.heads, row.cuts) for row in rows.itertuples()}


def test_which_weights_follow_from_which_cuts() -> None:
    """Two kv heads of two query heads each."""
    family = FAMILIES["llama"]
    model, inputs = family.build("sdpa"), family.inputs(padding=0)

    def promised(*cuts: Any) -> dict[str, Any]:
        found = check_gradients(model, Spec(cuts), inputs)
        assert found.held, str(found)
        return _weights_promised(found)

    one = {"layers": [1], "heads": [0]}
    assert promised(Freeze("qk", **one)) == {"self.1 W_Q": ((0,), (0,))}
    assert promised(Freeze("ov", **one)) == {"self.1 W_Q": ((0,), (0,))}, "its neighbour still reads the keys and values"
    both = {"layers": [1], "heads": [2, 3]}
    every = {"self.1 W_Q": ((2, 3), (0,)), "self.1 W_K": ((1,), (0,)), "self.1 W_V": ((1,), (0,))}
    assert promised(Freeze("ov", **both)) == every
    assert promised(Edit("result", "zero", **both)) == {**every, "self.1 W_O": ((2, 3), (0,))}
    assert promised(Edit("pattern", "uniform", **both)) == {n: h for n, h in every.items() if n != "self.1 W_V"}
    assert promised(Edit("k", "zero", **both)) == {"self.1 W_K": ((1,), (0,))}
    assert promised(Freeze("both", gqa="shared", layers=[1], heads=[2])) == {
        "self.1 W_K": ((1,), (0,)),
        "self.1 W_V": ((1,), (0,)),
    }
    # One reader of a kv head by its scores, the other by its z: together they are all.
    mixed = promised(Edit("scores", "zero", layers=[1], heads=[2]), Freeze("ov", layers=[1], heads=[3]))
    assert mixed["self.1 W_K"] == ((1,), (0, 1)) and "self.1 W_V" not in mixed
    for weaker in ({"strength": 0.9}, {"backward": "ste"}, {"positions": [1, 2]}):
        assert promised(Freeze("ov", **both, **weaker)) == {}


def test_a_query_that_attends_to_nothing_promises_no_weights() -> None:
    """Kernels make a pattern of masked scores there, which an edit leaves as it is."""
    family = FAMILIES["llama"]
    edit = Edit("pattern", "uniform", layers=[0], heads=[1])
    assert set(_weights_promised(check_gradients(family.build(), edit, family.inputs(padding=0)))) == {"self.0 W_Q"}
    found = check_gradients(family.build(), edit, family.inputs(padding=3))
    assert _weights_promised(found) == {} and found.held


def test_a_module_of_several_layers_is_one_point() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=67, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40
    )
    model = AlbertForMaskedLM(config).eval()
    inputs = FAMILIES["bert"].inputs(padding=0)
    spec = Spec([Freeze("qk", heads=[1]), Edit("v", "scale", value=0.5, heads=[2], backward="ste")])
    found = check_gradients(model, spec, inputs, _loss)
    assert found.promises.held.tolist() == [True, True, True] and found.promises.address.unique().tolist() == ["self.0"]
    assert _weights_promised(found) == {"self.0 W_Q": ((1,), (0,))}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_training_with_dropout(checkpointing: bool) -> None:
    torch.manual_seed(0)
    options = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64, **options)).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    inputs = FAMILIES["gpt2"].inputs(padding=0)
    spec = Spec([Freeze("both", layers=[0], heads=[1]), Edit("scores", "zero", layers=[1], heads=[2], backward="ste")])
    found = check_gradients(model, spec, inputs)
    assert found.mode == "training" and found.held and "training mode" in str(found)
    assert set(_weights_promised(found)) == {"self.0 W_Q", "self.0 W_K", "self.0 W_V"}
    same = check_gradients(model, Spec(), inputs)
    assert (same.weights.norm == same.weights.norm_uncut).all(), "both drew the same numbers"
    model.eval()
    assert check_gradients(model, Spec(), inputs).weights.norm.ne(same.weights.norm).any()


# -- promises that are broken --------------------------------------------------------------------------------------------------


def _leaking(original: Callable[..., Tensor], amount: float) -> Callable[..., Tensor]:
    """An edit through which a gradient passes that should not, with the very same values."""

    def edit(self: Operation, x: Tensor, where: Any) -> Tensor:
        new = original(self, x, where)
        return new if _is_zeros(self) else new + amount * (x - x.detach())

    return edit


def _is_zeros(operation: Operation) -> bool:
    """Whether it is what the gradient is measured by."""
    return callable(operation.edit.action)


def test_a_stopgrad_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    monkeypatch.setattr(Operation, "_edit", _leaking(Operation._edit, 1e-3))
    found = check_gradients(model, Freeze("qk", layers=[0], heads=[1]), inputs)
    assert not found.held and found.promises.held.tolist() == [False, False]
    assert found.broken()["at"].tolist() == ["rot_q", "W_Q"] and (found.broken().by > 0).all()
    assert "2 promises BROKEN" in str(found) and "NO, by" in str(found)


def test_a_leak_at_one_entry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    original = Operation._edit

    def edit(self: Operation, x: Tensor, where: Any) -> Tensor:
        here = torch.zeros_like(x)
        here[1, 0, 5, 3] = 1e-6
        return original(self, x, where) + (0 if _is_zeros(self) else here * (x - x.detach()))

    model, inputs = family.build(), family.inputs()
    assert check_gradients(model, Edit("v", "zero", layers=[0], heads=[1], positions=[5, 6]), inputs).held
    monkeypatch.setattr(Operation, "_edit", edit)
    found = check_gradients(model, Edit("v", "zero", layers=[0], heads=[1], positions=[5, 6]), inputs)
    assert found.broken()["at"].tolist() == ["v"] and 0 < found.broken().by.item() < 1e-5


@pytest.mark.parametrize("factor", [0.0, 0.5, 1 + 2.0**-20])
def test_a_straight_through_gradient_that_is_not_the_same_is_found(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    own = surgery.interventions.with_gradient
    spec = Freeze("ov", layers=[0], heads=[1], backward="ste")
    assert check_gradients(model, spec, inputs).held
    monkeypatch.setattr(surgery.interventions, "with_gradient", lambda x, value, share: own(x, value, share * factor))
    found = check_gradients(model, spec, inputs)
    assert found.promises.held.tolist() == [False] and found.promises.backward.tolist() == ["ste"]


def test_a_strength_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    original = Operation._edit

    def edit(self: Operation, x: Tensor, where: Any) -> Tensor:
        return original(self, x if _is_zeros(self) else x.detach(), where)

    monkeypatch.setattr(Operation, "_edit", edit)
    found = check_gradients(family.build(), Freeze("ov", layers=[0], heads=[1], strength=0.25), family.inputs())
    assert found.promises.held.tolist() == [False]
    natural = check_gradients(family.build(), Edit("z", "scale", value=2.0, layers=[0]), family.inputs())
    assert natural.promises.held.tolist() == [None] and natural.held, "nothing was promised"


def test_what_cannot_be_seen_is_not_said_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    original = Operation._edit
    monkeypatch.setattr(Operation, "_edit", lambda self, x, where: original(self, x, where).detach())  # the zeros, too
    found = check_gradients(family.build(), Freeze("ov", layers=[0], heads=[1], backward="ste"), family.inputs())
    assert found.promises.held.tolist() == [None] and "no gradient arrives" in found.promises.note.item()
    assert "0 promises held, 1 could not be seen" in str(found)


def test_edits_of_one_site_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    original = Operation._edit

    def edit(self: Operation, x: Tensor, where: Any) -> Tensor:
        return _leaking(original, 1.0 if self.edit.seed == 7 else 0.0)(self, x, where)

    monkeypatch.setattr(Operation, "_edit", edit)
    cuts = [Edit("z", "noise", layers=[0], heads=[1], seed=seed, strength=0.5, backward="stopgrad") for seed in (6, 7, 8)]
    found = check_gradients(family.build(), Spec(cuts), family.inputs())
    assert found.promises.held.tolist() == [True, False, True] and found.broken().cuts.tolist() == [(1,)]


# -- losses, inputs -------------------------------------------------------------------------------------------------------


def test_the_default_loss_and_several_batches() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    whole = family.inputs(batch=6, padding=0)
    parts = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 4), slice(4, 6))]
    together, apart = (check_gradients(model, Freeze("qk", layers=[0]), given) for given in (whole, parts))
    with torch.no_grad():
        expected = model(**whole, labels=whole["input_ids"]).loss.item()  # without padding every row has as many tokens
    assert together.loss_uncut == pytest.approx(expected, rel=1e-6)
    assert apart.loss == pytest.approx(together.loss, rel=1e-6)
    np.testing.assert_allclose(apart.weights.norm, together.weights.norm, rtol=1e-4, atol=1e-7)  # sums of other batches
    assert apart.held and len(apart.promises) == len(together.promises)


def test_losses_that_cannot_be_differentiated() -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    for loss in (lambda output: 1.0, lambda output: output.logits.mean() * torch.nan, lambda output: output.logits.argmax(-1)):
        with pytest.raises(SpecError, match="finite numbers with a gradient"):
            check_gradients(model, Freeze("qk"), inputs, loss)
    with pytest.raises(SpecError, match="finite numbers with a gradient"):
        check_gradients(model, Freeze("qk"), inputs, lambda output: output.logits.detach().mean())
    with pytest.raises(SpecError, match="one spec"):
        check_gradients(model, Blocks([Spec(), Spec(Freeze("qk"))]), inputs)
    with pytest.raises(SpecError, match="without logits"):
        check_gradients(model.model, Freeze("qk"), inputs)
    assert session_of(model) is None


def test_cuts_that_never_run_are_said() -> None:
    family = FAMILIES["bart"]
    model, inputs = family.build(), family.inputs()
    states = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
    given = {**{n: v for n, v in inputs.items() if n != "input_ids"}, "encoder_outputs": states}
    with pytest.warns(NotFiredWarning):
        found = check_gradients(model, Freeze("qk", layers=["encoder.self.0"], heads=[1]), given, _loss)
    assert found.promises.note.iloc[0] == "it never ran" and found.promises.held.iloc[0] is None


def test_gradients_are_shown() -> None:
    family = FAMILIES["llama"]
    found = check_gradients(family.build(), Freeze("qk", layers=[1], heads=[2], backward="ste"), family.inputs())
    text = str(found)
    assert "1 promise held;" in text and "bit for bit" in text and "rows in .weights" in text and repr(found) == text
    assert "<table" in found._repr_html_()
    assert "no cuts" in str(check_gradients(family.build(), None, family.inputs()))
