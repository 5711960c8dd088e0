"""Path patching: the same as by torch hooks alone, no path backwards, and the circuit that the packaged model has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, HEADS, KV_HEADS
from torch import Tensor, nn

from surgery import Edit, patched
from surgery.analysis import metrics
from surgery.analysis.held import Held
from surgery.analysis.paths import path_patching
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.errors import NoMatchError, SpecError, SurgeryError
from surgery.patch import anatomy_of
from surgery.plots import save
from surgery.reference import Entry, Reference

DEPTH = 3
"""Layers: a path goes past a whole layer in between."""
CLOSE = 1e-10
"""Of the largest entry, float64: a sweep runs copies of the batch, whose products round otherwise."""
QUIET = {"progress": False}


def last_logit(output: Any) -> Tensor:
    return output.logits[:, -1, 7]


def build(name: str) -> Any:
    """In float64, where the smallest effects are far from rounding."""
    return FAMILIES[name].build(dtype=torch.float64, **({"n_layer": DEPTH} if name == "gpt2" else {"num_hidden_layers": DEPTH}))


def pair(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    clean, corrupted = (FAMILIES[name].inputs(batch=3, padding=0, seed=seed) for seed in (0, 1))
    return clean, corrupted


# -- by hooks alone -----------------------------------------------------------------------------------------------------


class Hooked:
    """A model under torch hooks: z, q, k, v of each layer and head seen or replaced, MLPs held. Nothing of ours is used."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, build(name) if name == "gpt2" else ungrouped(build(name))
        self.layers = self.model.transformer.h if name == "gpt2" else self.model.model.layers

    def projections(self, layer: int) -> dict[str, tuple[nn.Module, slice]]:
        """Where each site is: the module that gives q, k, v (z: that takes it), and its channels of all heads."""
        if self.name == "gpt2":
            attention = self.layers[layer].attn
            width = attention.embed_dim
            return {
                **{site: (attention.c_attn, slice(n * width, (n + 1) * width)) for n, site in enumerate("qkv")},
                "z": (attention.c_proj, slice(0, width)),
            }
        attention = self.layers[layer].self_attn
        found = {site: (getattr(attention, f"{site}_proj"), slice(None)) for site in "qkv"}
        return {**found, "z": (attention.o_proj, slice(None))}

    def run(
        self,
        inputs: dict[str, Tensor],
        put: dict[tuple[int, str, int], Tensor] | None = None,
        mlps: dict[int, Tensor] | None = None,
    ) -> tuple[np.ndarray, dict[tuple[int, str, int], Tensor], dict[int, Tensor]]:
        """The metric, everything seen by (layer, site, head), and what the MLPs gave. put: to replace it; mlps: likewise."""
        seen: dict[tuple[int, str, int], Tensor] = {}
        gave: dict[int, Tensor] = {}

        def change(x: Tensor, layer: int, site: str, channels: slice) -> Tensor:
            by_head = x[..., channels].unflatten(-1, (HEADS, -1)).clone()
            for head in range(HEADS):
                if put is not None and (layer, site, head) in put:
                    by_head[:, :, head] = put[layer, site, head]
                seen[layer, site, head] = by_head[:, :, head].clone()
            x = x.clone()
            x[..., channels] = by_head.flatten(-2)
            return x

        def mlp(layer: int, output: Tensor) -> Tensor:
            gave[layer] = output
            return output if mlps is None else mlps[layer]

        with ExitStack() as stack:
            for layer in range(DEPTH):
                for site, (module, channels) in self.projections(layer).items():
                    if site == "z":
                        hook: Callable[..., Any] = lambda m, args, a=(layer, site, channels): (change(args[0], *a),)  # noqa: E731
                        stack.callback(module.register_forward_pre_hook(hook).remove)
                    else:
                        hook = lambda m, args, out, a=(layer, site, channels): change(out, *a)  # noqa: E731
                        stack.callback(module.register_forward_hook(hook).remove)
                hook = lambda m, args, out, layer=layer: mlp(layer, out)  # noqa: E731
                stack.callback(self.layers[layer].mlp.register_forward_hook(hook).remove)
            with torch.no_grad():
                value = last_logit(self.model(**inputs, use_cache=False))
        return value.double().numpy(), seen, gave

    def path(self, clean: dict[str, Tensor], corrupted: Any, sender: tuple[int, int], receivers: Any, hold: bool) -> np.ndarray:
        """The three runs. corrupted: inputs, or the sender's z; receivers: patched together, (layer, head, what) each."""
        _, base, mlps = self.run(clean)
        frozen = {key: value for key, value in base.items() if key[1] == "z"}
        key = sender[0], "z", sender[1]
        frozen[key] = corrupted if isinstance(corrupted, Tensor) else self.run(corrupted)[1][key]
        direct, told, _ = self.run(clean, frozen, mlps if hold else None)
        if receivers == "logits":
            return direct
        return self.run(clean, {(layer, what, head): told[layer, what, head] for layer, head, what in receivers})[0]


def ungrouped(model: Any) -> Any:
    """The same function with each kv head's weights written once for each query head that reads it."""
    options = {"num_key_value_heads": HEADS, "num_hidden_layers": DEPTH}
    twin, source = FAMILIES["llama"].build(dtype=torch.float64, **options), model.state_dict()
    with torch.no_grad():
        for path, parameter in twin.named_parameters():
            x = source[path]
            if x.shape != parameter.shape:
                x = x.unflatten(0, (KV_HEADS, -1)).repeat_interleave(HEADS // KV_HEADS, 0).flatten(0, 1)
            parameter.copy_(x)
    return twin


@pytest.mark.parametrize("hold", [False, True], ids=["mlps live", "mlps held"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_paths_are_those_of_hooks(name: str, hold: bool) -> None:
    model, hooked, (clean, corrupted) = build(name), Hooked(name), pair(name)
    receivers: list[Any] = ["logits", *((2, 1, what) for what in "qkv"), (1, 3, "k"), [(2, 0, "q"), (2, 3, "q"), (1, 0, "v")]]
    options = {"receivers": receivers, "freeze_mlps": hold, **QUIET}
    fast = path_patching(model, clean, corrupted, last_logit, **options)
    plain = path_patching(model, clean, corrupted, last_logit, senders=[(0, 2), (2, 1)], fast=False, **options)
    assert fast.notes == [] and len(fast.keys) == len(receivers)
    assert fast.value().axes == {"layer": ("self.0", "self.1", "self.2"), "head": (0, 1, 2, 3)}
    effects = []
    for key, given in zip(fast.keys, receivers, strict=True):
        for layer in range(DEPTH):
            for head in range(HEADS):
                where = {"layer": f"self.{layer}", "head": head}
                inputs = given if given == "logits" or isinstance(given, list) else [given]
                expected = hooked.path(clean, corrupted, (layer, head), inputs, hold)
                close = {"atol": CLOSE * np.abs(expected).max(), "rtol": 0}
                np.testing.assert_allclose(fast.examples[key].at(**where).values, expected, **close)
                if (layer, head) in ((0, 2), (2, 1)):
                    np.testing.assert_allclose(plain.examples[key].at(**where).values, expected, **close)
                effects.append(np.abs(expected - fast.clean).max())
    assert np.mean(np.array(effects) > 1e-7) > 0.5, "the paths of this model do something, or nothing would be compared"


def test_held_mlps_are_another_path() -> None:
    """Were they held in both cases, or in none, the tests above would see it; here by how much."""
    (clean, corrupted), found = pair("llama"), []
    for hold in (False, True):
        found.append(path_patching(build("llama"), clean, corrupted, last_logit, senders=[(0, 0)], freeze_mlps=hold, **QUIET))
    assert np.abs(found[0].value().values - found[1].value().values).max() > 1e-2


def test_a_neighbour_in_the_group_reads_the_clean_keys() -> None:
    """Heads 0 and 1 share a kv head; each of them is a receiver of its own, and both together are the kv head's."""
    model, (clean, corrupted) = build("llama"), pair("llama")
    receivers: list[Any] = [(1, 0, "k"), (1, 1, "k"), [(1, 0, "k"), (1, 1, "k")]]
    found = path_patching(model, clean, corrupted, last_logit, senders=[(0, 3)], receivers=receivers, **QUIET)
    alone = [found.effect(key).values.item() for key in found.keys]
    assert len({round(effect, 8) for effect in alone}) == 3 and all(abs(effect) > 1e-7 for effect in alone)


@pytest.mark.parametrize("to", ["zero", "mean", "resample"])
def test_other_replacements_are_those_of_hooks(to: str) -> None:
    """The sender's z becomes zero, its mean over batch and positions, or that of another row; no corrupted inputs needed."""
    model, hooked, (clean, _) = build("gpt2"), Hooked("gpt2"), pair("gpt2")
    found = path_patching(model, clean, None, last_logit, [(0, 1)], [(2, 3, "v"), "logits"], to, **QUIET)
    assert found.corrupted is None and found.to_frame().recovery.isna().all()
    z = hooked.run(clean)[1][0, "z", 1]
    new = {"zero": torch.zeros_like(z), "mean": z.mean((0, 1)).expand_as(z), "resample": z.roll(1, 0)}[to]
    for key, receivers in zip(found.keys, ([(2, 3, "v")], "logits"), strict=True):
        expected = hooked.path(clean, new, (0, 1), receivers, False)
        np.testing.assert_allclose(found.examples[key].values[0, 0], expected, rtol=0, atol=CLOSE)
        assert np.abs(expected - found.clean).max() > 1e-7
    reference = Reference("activation", {("self.0", "z"): Entry(new[:, :, None].transpose(1, 2), None, (1,))})
    given = path_patching(model, clean, None, last_logit, [(0, 1)], [(2, 3, "v"), "logits"], reference, **QUIET)
    for key in found.keys:
        np.testing.assert_allclose(given.examples[key].values, found.examples[key].values, rtol=0, atol=CLOSE)


def test_attentions_that_do_not_run_send_nothing() -> None:
    """The decoder alone, given what the encoder said: encoder heads are no senders, and asking for one is an error."""
    family = FAMILIES["bart"]
    model, clean, corrupted = family.build(), family.inputs(seed=0, padding=0), family.inputs(seed=1, padding=0)
    given = []
    for inputs in (clean, corrupted):
        with torch.no_grad():
            states = model.get_encoder()(input_ids=inputs["input_ids"])
        given.append({"encoder_outputs": states, "decoder_input_ids": inputs["decoder_input_ids"]})
    found = path_patching(model, *given, last_logit, receivers=[("decoder.cross.1", 0, "q")], **QUIET)
    whole = path_patching(model, clean, corrupted, last_logit, receivers=[("decoder.cross.1", 0, "q")], **QUIET)
    assert found.value().axes["layer"] == tuple(a for a in whole.value().axes["layer"] if a.startswith("decoder."))
    for layer in found.value().axes["layer"]:
        np.testing.assert_allclose(found.value().at(layer=layer).values, whole.value().at(layer=layer).values, rtol=1e-5)
    with pytest.raises(NoMatchError, match=r"senders: found encoder\.self\.0 head 1; expected heads of decoder"):
        path_patching(model, *given, last_logit, [("encoder.self.0", 1)], **QUIET)


def test_memory_is_bounded_by_tokens() -> None:
    """Few tokens at a time are one sender at a time: the same numbers, from forwards of one copy of the batch."""
    model, (clean, corrupted) = build("llama"), pair("llama")
    sizes: list[int] = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    options = {"receivers": ["logits", (2, 1, "k")], **QUIET}
    many = path_patching(model, clean, corrupted, last_logit, **options)
    most = max(sizes)
    sizes.clear()
    few = path_patching(model, clean, corrupted, last_logit, tokens=54, **options)
    handle.remove()
    assert most == 3 * HEADS and max(sizes) == 6, "54 tokens are two copies of three rows of nine"
    for key in many.keys:
        np.testing.assert_allclose(few.examples[key].values, many.examples[key].values, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_what_a_sweep_found_out_is_not_asked_again_in_the_next_batch(freeze_mlps: bool) -> None:
    model, pairs = build("gpt2"), [pair("gpt2"), pair("gpt2")[::-1]]
    options = {"senders": [(0, 1), (1, 2)], "receivers": ["logits", (2, 1, "k")], "freeze_mlps": freeze_mlps, **QUIET}
    both = path_patching(model, *zip(*pairs, strict=True), last_logit, **options)
    each = [path_patching(model, *inputs, last_logit, **options) for inputs in pairs]
    assert each[0].forwards == each[1].forwards and both.forwards < 2 * each[0].forwards - 0.5, "less the checks of a batch"
    for key in both.keys:
        expected = np.concatenate([one.examples[key].values for one in each], -1)
        np.testing.assert_array_equal(both.examples[key].values, expected)  # NaN where no head was asked for


def test_nothing_goes_backwards() -> None:
    """A sender of the receiver's attention or of a later one has no path: the clean value to the last bit, without a run."""
    model, (clean, corrupted) = build("gpt2"), pair("gpt2")
    found = path_patching(model, clean, corrupted, last_logit, receivers=[(1, 2, "q"), (0, 0, "v")], **QUIET)
    for key, layers in {"self.1 head 2 q": ("self.1", "self.2"), "self.0 head 0 v": ("self.0", "self.1", "self.2")}.items():
        for layer in layers:
            for head in range(HEADS):
                assert np.array_equal(found.examples[key].at(layer=layer, head=head).values, found.clean)
    assert np.abs(found.effect("self.1 head 2 q").at(layer="self.0").values).max() > 1e-7
    nowhere = path_patching(model, clean, corrupted, last_logit, [(2, 0), (1, 1)], [(1, 2, "q")], **QUIET)
    assert nowhere.forwards == 2, "the two runs alone"


def test_the_model_keeps_its_cuts_and_its_hooks() -> None:
    model, (clean, corrupted) = build("llama"), pair("llama")
    with torch.no_grad():
        before = model(**clean).logits
    path_patching(model, clean, corrupted, last_logit, receivers=[(1, 0, "q")], freeze_mlps=True, **QUIET)
    with torch.no_grad():
        assert torch.equal(model(**clean).logits, before)
    assert not any(module._forward_hooks for module in model.modules())
    cut = Edit("z", "zero", layers=[1], heads=[2])
    with patched(model, cut):
        found = path_patching(model, clean, corrupted, last_logit, receivers="logits", **QUIET)
        with torch.no_grad():
            assert np.array_equal(found.clean, last_logit(model(**clean, use_cache=False)).double().numpy())
    assert abs(found.effect().at(layer="self.1", head=2).item()) < CLOSE * np.abs(found.clean).max()
    assert abs(found.effect().at(layer="self.1", head=1).item()) > 1e-3


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_speaks_to_the_decoder(name: str) -> None:
    """Encoder heads reach cross-attention's k and v, and not its q; in one layer, the decoder's self reaches cross's q."""
    family = FAMILIES[name]
    model, clean, corrupted = family.build(), family.inputs(seed=0, padding=0), family.inputs(seed=1, padding=0)
    receivers = [("decoder.cross.0", 1, what) for what in "qkv"]
    found = path_patching(model, clean, corrupted, last_logit, receivers=receivers, **QUIET)
    q, k, v = (found.effect(key) for key in found.keys)
    for sender, reaches in {
        "encoder.self.1": {"k": True, "v": True, "q": False},
        "decoder.self.0": {"k": False, "v": False, "q": True},
        "decoder.cross.0": {"k": False, "v": False, "q": False},
        "decoder.self.1": {"k": False, "v": False, "q": False},
    }.items():
        for what, effect in zip("qkv", (q, k, v), strict=True):
            size = np.abs(effect.at(layer=sender).values).max()
            assert (size > 1e-4) if reaches[what] else (size < 1e-5), (sender, what, size)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe", "gptj", "bert", "falcon_grouped"])
def test_other_classes(name: str) -> None:
    """Norms behind attention, experts, code of a class's own, encoders: as fast as plain, with and without held MLPs."""
    family = FAMILIES[name]
    model, clean, corrupted = family.build(), family.inputs(seed=0), family.inputs(seed=1)
    for hold in (False, True):
        options = {"receivers": ["logits", (1, 2, "k")], "freeze_mlps": hold, **QUIET}
        fast = path_patching(model, clean, corrupted, last_logit, **options)
        plain = path_patching(model, clean, corrupted, last_logit, fast=False, **options)
        for key in fast.keys:
            largest = np.abs(plain.examples[key].values).max()
            np.testing.assert_allclose(fast.examples[key].values, plain.examples[key].values, atol=1e-4 * largest, rtol=0)
        assert np.abs(fast.effect("self.1 head 2 k").at(layer="self.0").values).max() > 1e-6


# -- findings -----------------------------------------------------------------------------------------------------------


def test_the_previous_token_head_speaks_to_the_induction_heads_keys() -> None:
    model = load_model()
    clean = repeated_sequences(4, 10, 64, seed=0)
    corrupted = clean.clone()
    corrupted[:, 1:11] = repeated_sequences(4, 10, 64, seed=1)[:, 1:11]  # the first copy says something else
    receivers = [*((1, 3, what) for what in "qkv"), "logits"]
    found = path_patching(model, clean, corrupted, metrics.loss(range(12, 21)), receivers=receivers, **QUIET)
    q, k, v, direct = (found.effect(key) for key in found.keys)
    assert k.at(layer="self.0", head=0).item() > 1, "nats per token"
    others = [abs(effect.at(layer="self.0", head=head).item()) for effect in (q, v) for head in range(4)]
    others += [abs(k.at(layer="self.0", head=head).item()) for head in (1, 2, 3)]
    assert max(others) < 0.01 * k.at(layer="self.0", head=0).item()
    assert found.top(2)[["receiver", "layer", "head"]].to_numpy().tolist() == [
        ["logits", "self.1", 3],
        ["self.1 head 3 k", "self.0", 0],
    ]
    assert abs(direct.at(layer="self.0", head=0).item()) < 0.01, "it says nothing to the logits itself"


# -- held maps, refusals, pictures --------------------------------------------------------------------------------------


class Silent(nn.Module):
    """A linear map that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3)


def test_maps_that_cannot_be_held_are_refused() -> None:
    model, (clean, corrupted) = build("gpt2"), pair("gpt2")
    model.transformer.h[1].more = Silent()
    with pytest.raises(SpecError, match=r"h\.1\.more\.map, which the forward does not call"):
        path_patching(model, clean, corrupted, last_logit, freeze_mlps=True, **QUIET)
    model = build("gpt2")
    model.transformer.h[1].mlp.c_proj = model.transformer.h[0].mlp.c_proj
    with pytest.raises(SpecError, match="which one forward calls several times"):
        path_patching(model, clean, corrupted, last_logit, freeze_mlps=True, **QUIET)
    model = build("gpt2")
    model.transformer.h[0].matrix = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(SpecError, match=r"h\.0 owns beside attention"):
        path_patching(model, clean, corrupted, last_logit, freeze_mlps=True, **QUIET)
    refused = pytest.raises(SurgeryError, match=r"shape \(3, 8, 128\); expected copies of \(3, 9, 128\)")
    with recorded(build("gpt2"), clean) as (model, held), held.holding(), torch.no_grad(), refused:
        model(input_ids=clean["input_ids"][:, :-1])


@contextmanager
def recorded(model: Any, inputs: dict[str, Tensor]) -> Iterator[tuple[Any, Held]]:
    held = Held(model, anatomy_of(model))
    assert set(held.modules) == {f"transformer.h.{n}.mlp.{part}" for n in range(DEPTH) for part in ("c_fc", "c_proj")}
    with held.recording(), torch.no_grad():
        model(**inputs)
    yield model, held


def test_what_does_not_fit_is_refused() -> None:
    model, (clean, corrupted) = build("llama"), pair("llama")
    for arguments, message in (
        ({"receivers": (1, 3, "w")}, "receivers: found"),
        ({"receivers": []}, "receivers: found"),
        ({"receivers": "logit"}, "receivers: found 'logit'"),
        ({"receivers": [["logits", (1, 0, "q")]]}, "receivers: found"),
        ({"receivers": [(1, HEADS, "q")]}, r"receivers: found head 4 of self\.1; expected 0 to 3"),
        ({"senders": [(0, -1)]}, r"senders: found head -1"),
        ({"senders": [0, 1]}, "senders: found"),
        ({"senders": "every"}, "senders: found 'every'"),
        ({"senders": [(9, 0)]}, "9"),
        ({"corrupted": None}, "corrupted: found None"),
        ({"corrupted": {"input_ids": clean["input_ids"][:1]}}, "corrupted, batch 0"),
    ):
        with pytest.raises((SpecError, NoMatchError), match=message):
            path_patching(model, clean, **{"corrupted": corrupted, "metric": last_logit, **QUIET, **arguments})


def test_attention_that_layers_share_is_refused() -> None:
    config = transformers.AlbertConfig(
        vocab_size=67, hidden_size=32, embedding_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    model, (clean, corrupted) = transformers.AlbertForMaskedLM(config).eval(), pair("bert")
    with pytest.raises(SpecError, match="which one forward runs several times"):
        path_patching(model, clean, corrupted, last_logit, **QUIET)


def test_pictures_and_frames(tmp_path: Any) -> None:
    model, (clean, corrupted) = build("gpt2"), pair("gpt2")
    found = path_patching(model, clean, corrupted, last_logit, [(0, 1), ("self.1", 3)], [(2, 0, "q"), "logits"], **QUIET)
    frame = found.to_frame()
    assert list(frame.columns) == ["receiver", "layer", "head", "value", "effect", "recovery"]
    assert len(frame) == 4 and set(map(tuple, frame[["layer", "head"]].to_numpy())) == {("self.0", 1), ("self.1", 3)}
    save(found.picture(), tmp_path / "paths.png")
    assert [axes.get_title() for axes in found.picture().axes[:2]] == ["into self.2 head 0 q", "into logits"]
