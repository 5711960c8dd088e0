"""Sweeps: many specs on one batch give what the plain loop gives, from the middle of the model and as blocks of one batch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery import Edit, Freeze, Spec, SpecError, capture, collect_reference, patch_model, patched
from surgery.analysis import ablation_study
from surgery.analysis.sweep import Sweep
from surgery.blocks import Blocks
from surgery.demo import load_model
from surgery.patch import anatomy_of

# Products of several copies of a batch add up in another order.
CLOSE = dict(rtol=1e-4, atol=1e-5)
CUTS = {
    "qk": lambda h: Freeze("qk", heads=[h]),
    "ov": lambda h: Freeze("ov", heads=[h]),
    "shared": lambda h: Freeze("both", heads=[h], gqa="shared"),
    "noise": lambda h: Freeze("both", heads=[h], to="noise", strength=0.5),
    "current mean": lambda h: Freeze("ov", heads=[h], to="mean"),
    "resample": lambda h: Freeze("both", heads=[h], to="resample"),
    "uniform": lambda h: Edit("pattern", "uniform", heads=[h]),
    "scores": lambda h: Edit("scores", "scale", 0.5, heads=[h]),
    "result": lambda h: Edit("result", "zero", heads=[h]),
    "positions": lambda h: Freeze("ov", heads=[h], positions=[1, 4]),
    "callable": lambda h: Edit("z", lambda z: z - z.mean(0, keepdim=True), heads=[h]),
}


def first(output: Any) -> Tensor:
    return output.logits if getattr(output, "logits", None) is not None else output[0]


def plain(model: Any, inputs: Any, spec: Spec) -> Tensor:
    with torch.no_grad(), patched(model, spec):
        return first(model(**inputs))


# -- blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_each_block_is_as_if_alone(name: str, kernel: Any, cut: str) -> None:
    model, inputs = FAMILIES[name].build("sdpa"), FAMILIES[name].inputs(batch=3)
    specs = [Spec(CUTS[cut](head)) for head in (0, 1, 3)] + [Spec()]
    joint = {key: value.repeat(4, 1) for key, value in inputs.items()}
    with torch.no_grad(), patched(model, Blocks(specs), kernel=kernel):
        found = first(model(**joint)).split(3)
    for spec, block in zip(specs, found, strict=True):
        with patched(model, spec, kernel=kernel), torch.no_grad():
            torch.testing.assert_close(block, first(model(**inputs)), **CLOSE)
    assert not torch.allclose(found[0], found[3], **CLOSE), "the cut acts"
    assert not torch.allclose(found[0], found[2], **CLOSE), "on its own block"


def test_blocks_are_a_value_that_cannot_be_saved() -> None:
    a, b = Spec(Freeze("qk", heads=[0])), Spec(Freeze("ov", heads=[1]))
    assert Blocks([a, b]) == Blocks([a, b]) != Blocks([b, a]) and Blocks([a, b]) != a + b
    assert len({Blocks([a, b]).fingerprint(), Blocks([b, a]).fingerprint(), (a + b).fingerprint()}) == 3
    assert Blocks([Spec(), Spec()]).fingerprint() == ""
    assert "block 1:\n0. freeze ov" in str(Blocks([a, b]))
    for wrong in (lambda: Blocks([a, b]).to_json(), lambda: Blocks([a]) + b, lambda: b + Blocks([a]), lambda: Blocks([])):
        with pytest.raises(SpecError, match="Blocks"):
            wrong()


def test_a_batch_that_is_no_multiple_is_refused() -> None:
    model = patch_model(load_model(), Blocks([Spec(Freeze("ov", heads=[0])), Spec()]))
    with pytest.raises(SpecError, match="3 rows; expected 2 blocks"):
        model(torch.ones(3, 5, dtype=torch.long))


# -- sweeps -------------------------------------------------------------------------------------------------------------


def single_cuts(model: Any, step: int = 1) -> list[Spec]:
    heads = [(a.address, head) for a in anatomy_of(model) for head in range(a.heads)]
    return [Spec(Freeze(c, [address], [head])) for address, head in heads[::step] for c in ("qk", "ov")]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_numbers_of_the_plain_loop(name: str) -> None:
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    specs, found = single_cuts(model, 3), {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep = Sweep(model, inputs)
        sweep.run(specs, lambda number, output: found.update({number: first(output)}))
    assert sorted(found) == list(range(len(specs))) and not sweep.notes
    for number, spec in enumerate(specs):
        torch.testing.assert_close(found[number], plain(model, inputs, spec), **CLOSE)


def test_layers_before_the_cut_do_not_run() -> None:
    model, ran = FAMILIES["llama"].build(), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(0))
    sweep = Sweep(model, FAMILIES["llama"].inputs(), (-1,))
    assert ran == [0]
    sweep.run([Spec(Freeze("ov", [1], [0]))] * 4, lambda *_: None)
    assert len(ran) == 2, "once more, in the plain run that the first cut is checked by"
    sweep.run([Spec(Freeze("ov", [1], [1]))] * 4, lambda *_: None)
    assert len(ran) == 2
    sweep.run([Spec([Freeze("ov", [1], [1]), Freeze("qk", [0], [1])])], lambda *_: None)
    assert len(ran) > 2


def test_an_encoder_is_not_run_for_cuts_in_the_decoder() -> None:
    model, ran = FAMILIES["bart"].build(), []
    model.model.encoder.layers[1].fc1.register_forward_hook(lambda *_: ran.append(0))
    sweep = Sweep(model, FAMILIES["bart"].inputs())
    sweep.run([Spec(Freeze("ov", ["decoder.cross.1"], [h])) for h in range(4)], lambda *_: None)
    assert len(ran) == 2


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_specs_in_any_order(data: st.DataObject) -> None:
    model, inputs = load_model(), {"input_ids": torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))}
    layers, heads = st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True), st.integers(0, 3)
    cut = st.tuples(st.sampled_from(list(CUTS)), layers, heads).map(
        lambda t: CUTS[t[0]](t[2]).model_copy(update={"layers": t[1]})
    )
    specs = [Spec(cuts) for cuts in data.draw(st.lists(st.lists(cut, max_size=3), min_size=1, max_size=6))]
    tokens, found = data.draw(st.integers(1, 400)), {}
    Sweep(model, inputs, tokens=tokens).run(specs, lambda number, output: found.update({number: output.logits}))
    for number, spec in enumerate(specs):
        torch.testing.assert_close(found[number], plain(model, inputs, spec), **CLOSE)


def test_logits_where_they_are_asked_for() -> None:
    found: list[Tensor] = []
    for name in ("llama", "t5"):  # one takes logits_to_keep, one does not
        model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
        spec = single_cuts(model)[1]
        Sweep(model, inputs, (-1, 2)).run([spec], lambda _, output: found.append(output.logits))
        torch.testing.assert_close(found[-1], plain(model, inputs, spec)[:, [-1, 2]], **CLOSE)


def test_behind_the_last_attention_only_read_positions_are_computed() -> None:
    """The last layer's MLP sees two positions of twelve; what reads more of it gets all."""
    model, inputs = load_model(), {"input_ids": torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))}
    seen: dict[int, list[int]] = {0: [], 1: []}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate_proj.register_forward_pre_hook(lambda module, args, n=number: seen[n].append(args[0].shape[1]))
    spec, found = Spec(Freeze("ov", [0], [0])), []
    Sweep(model, inputs, (-1, 2)).run([spec], lambda _, output: found.append(output.logits))
    torch.testing.assert_close(found[0], plain(model, inputs, spec)[:, [-1, 2]], **CLOSE)
    assert seen[1][-2] == 2 and set(seen[0]) == {12}, "the last forward but one is the sweep's"
    whole = {**inputs, "output_hidden_states": True}
    sweep = Sweep(model, whole, (-1,))
    sweep.run([spec], lambda _, output: found.append(output.hidden_states[-1]))
    assert not sweep.checked.is_narrow and not sweep.notes
    with torch.no_grad(), patched(model, spec):
        torch.testing.assert_close(found[1], model(**whole).hidden_states[-1], **CLOSE)


class Shifted(nn.Module):
    """An MLP that looks at the position before."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mlp(hidden_states + hidden_states.roll(1, 1))


def test_an_mlp_that_mixes_positions_is_run_on_all() -> None:
    model, found = load_model(), {}
    model.model.layers[1].mlp = Shifted(model.model.layers[1].mlp)
    inputs, specs = {"input_ids": torch.arange(1, 21)[None]}, single_cuts(model)
    sweep = Sweep(model, inputs, (-1,))
    sweep.run(specs, lambda number, output: found.update({number: output.logits}))
    assert sweep.behind and not sweep.checked.is_narrow and not sweep.notes
    for number, spec in enumerate(specs):
        torch.testing.assert_close(found[number], plain(model, inputs, spec)[:, -1:], **CLOSE)


def test_cuts_that_the_model_has_stay() -> None:
    model, inputs, found = load_model(), {"input_ids": torch.arange(1, 21)[None]}, []
    base, cut = Freeze("qk", [0], [1]), Freeze("ov", [1], [3])
    patch_model(model, base)
    sweep = Sweep(model, inputs)
    sweep.run([Spec(cut)], lambda _, output: found.append(output.logits))
    torch.testing.assert_close(found[0], plain(model, inputs, Spec([base, cut])), **CLOSE)
    torch.testing.assert_close(sweep.clean.logits, plain(model, inputs, Spec(base)), **CLOSE)


def test_the_model_is_left_as_it_was() -> None:
    model = load_model().train()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    inputs = {"input_ids": torch.arange(1, 21)[None]}

    def broken(*_: Any) -> None:
        raise KeyError("reader")

    Sweep(model, inputs).run([Spec(Freeze("ov", [1], [3]))], lambda *_: None)
    with pytest.raises(KeyError):
        Sweep(model, inputs).run([Spec(Freeze("ov", [1], [3]))], broken)
    assert torch.is_grad_enabled() and model.training
    assert [type(module) for module in model.modules()] == classes
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_references_of_a_batch_are_those_of_each_block() -> None:
    model, ids = load_model(), torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    means = collect_reference(model, [ids], progress=False)
    with capture(model, ["z"]) as run, torch.no_grad():
        model(ids.flip(0))
    specs = [Spec(Freeze("ov", [layer], [head], to=to)) for layer in (0, 1) for head in (0, 3) for to in (run,)]
    specs += [Spec(Freeze("ov", [1], [2], to="mean", reference=means))]
    found = {}
    Sweep(model, {"input_ids": ids}).run(specs, lambda number, output: found.update({number: output.logits}))
    for number, spec in enumerate(specs):
        torch.testing.assert_close(found[number], plain(model, {"input_ids": ids}, spec), **CLOSE)


# -- models for which the short cut is wrong ----------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of the demo model that also changes something which later layers read."""

    def __init__(self, layer: nn.Module, notes: dict[str, Any], number: int) -> None:
        super().__init__()
        self.layer, self.notes, self.number = layer, notes, number

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        output = self.layer(hidden_states, **kwargs)
        if self.number == 0:
            self.notes["seen"] = output.std() + len(output) * self.notes["by_rows"]
        return output * (1 + self.notes["seen"])


@pytest.mark.parametrize("by_rows", [0, 1])
def test_a_model_whose_layers_talk_past_the_residual_stream_falls_back(by_rows: int) -> None:
    model, notes = load_model(), {"by_rows": by_rows}
    model.model.layers = nn.ModuleList(Layer(layer, notes, n) for n, layer in enumerate(model.model.layers))
    inputs, found = {"input_ids": torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))}, {}
    specs = single_cuts(model)
    sweep = Sweep(model, inputs)
    with pytest.warns(UserWarning, match="It is slower, and gives the same numbers"):
        sweep.run(specs, lambda number, output: found.update({number: output.logits}))
    assert sweep.notes and "difference of" in sweep.notes[0]
    for number, spec in enumerate(specs):
        torch.testing.assert_close(found[number], plain(model, inputs, spec), **CLOSE)


@pytest.mark.parametrize("tokens", [24, 400])
def test_a_mean_over_the_batch_is_that_of_each_cut(tokens: int) -> None:
    """A model's own loss, of inputs with labels, is one number of all rows: no two cuts may share a forward."""
    model, found = load_model(), {}
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs, specs = {"input_ids": ids, "labels": ids}, single_cuts(model)
    sweep = Sweep(model, inputs, (-1,), tokens=tokens)
    sweep.run(specs, lambda number, output: found.update({number: (output.loss, output.logits)}))
    assert not sweep.notes and sweep.checked.starts == {(0, True): 0, (1, True): 1}, "still from the middle"
    for number, spec in enumerate(specs):
        with torch.no_grad(), patched(model, spec):
            output = model(**inputs)
        torch.testing.assert_close(found[number][0], output.loss, **CLOSE)
        torch.testing.assert_close(found[number][1], output.logits[:, -1:], **CLOSE)
    assert len({round(float(loss), 6) for loss, _ in found.values()}) > len(specs) // 2, "each its own"


def test_positions_are_those_of_the_tokens_that_have_logits() -> None:
    """Of the decoder, whatever comes first among the inputs and however long it is."""
    config = transformers.T5GemmaModuleConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = transformers.T5GemmaConfig(encoder=config, decoder=config, vocab_size=60)
    model = transformers.T5GemmaForConditionalGeneration(whole).eval()
    for lengths in ((6, 9), (9, 6)):
        encoder, decoder = (torch.randint(2, 60, (2, n), generator=torch.Generator().manual_seed(n)) for n in lengths)
        inputs, spec, found = (
            {"input_ids": encoder, "decoder_input_ids": decoder},
            Spec(Freeze("ov", ["decoder.self.0"], [1])),
            [],
        )
        Sweep(model, inputs, (-1, 2)).run([spec], lambda _, output: found.append(output.logits))  # noqa: B023
        torch.testing.assert_close(found[0], plain(model, inputs, spec)[:, [-1, 2]], **CLOSE)
    for name, some in (("t5gemma", inputs), ("demo", {"input_ids": decoder}), ("t5", FAMILIES["t5"].inputs())):
        other = {"t5gemma": lambda: model, "demo": load_model, "t5": FAMILIES["t5"].build}[name]()
        with pytest.raises(SpecError, match=r"found positions \[9\]; expected -\d to \d, for \d tokens"):
            Sweep(other, some, (0, 9))


def test_experts_of_limited_capacity_are_run_on_all_positions() -> None:
    """What such an expert leaves out depends on the tokens before, though one example may not show it."""
    config = transformers.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0,
        num_experts=2, expert_capacity=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=2, router_jitter_noise=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    ids = {"input_ids": torch.randint(2, 50, (3, 6)), "decoder_input_ids": torch.randint(2, 50, (3, 6))}
    assert Sweep(model, ids, (-1,)).behind == ()
    config.expert_capacity = 64
    torch.manual_seed(0)
    assert Sweep(transformers.SwitchTransformersForConditionalGeneration(config).eval(), ids, (-1,)).behind


@pytest.mark.parametrize("tokens", [0, -1])
def test_no_tokens_in_a_forward_are_refused(tokens: int) -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    message = rf"sweep: found tokens={tokens}; expected 1 or more\. Leave it out"
    with pytest.raises(SpecError, match=message):
        Sweep(model, inputs, tokens=tokens)
    with pytest.raises(SpecError, match=message):
        ablation_study(model, inputs, tokens=tokens, progress=False)


def test_the_plain_loop_can_be_asked_for() -> None:
    model, inputs, found = load_model(), {"input_ids": torch.arange(1, 21)[None]}, []
    spec = Spec(Freeze("ov", [1], [3]))
    sweep = Sweep(model, inputs, fast=False)
    sweep.run([spec], lambda _, output: found.append(output.logits))
    assert torch.equal(found[0], plain(model, inputs, spec)) and sweep.forwards == 1
