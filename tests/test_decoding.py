"""Decoding step by step: cuts at the projections, callables that work in place, generation, one compiled graph for all steps.

That cuts of the core give step by step what they give at once is held to in `test_exactness`, whose comparison is used here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cached import CACHE
from families import D_MODEL, FAMILIES, HEADS, LENGTH
from test_exactness import NO_STATIC_CACHE, by_chunks, cache_error, fresh, generate, new_cache, vectors
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, T5Gemma2ForConditionalGeneration
from zoo.build import make_config

import surgery.core
from surgery import Edit, Freeze, Spec, SpecError, capture, find_anatomy, patch_model, unpatch_model
from surgery.errors import CacheError
from surgery.interventions import Operation
from surgery.patch import KERNELS

TWO_STACKS = ("bart", "t5", "whisper")


def by_case(*names: str) -> Any:
    """Families, eager and, where they have it, sdpa."""
    cases = [(name, i) for name in names for i in ("eager", "sdpa") if i == "eager" or FAMILIES[name].sdpa]
    return pytest.mark.parametrize(("name", "implementation"), cases)


# -- cuts at the projections: step by step equals the whole sequence at once -----------------------------------------------


def projection_cuts(model: Any) -> Iterator[tuple[str, Spec]]:
    """Cuts of the decoder at q, k and result, all of which depend on the position, in self- and in cross-attention."""
    anatomy = find_anatomy(model)
    for kind in ("self", "cross"):
        found = [a for a in anatomy if a.kind == kind and not a.address.startswith("encoder.")]
        if not found:
            continue
        layers, first, some = [a.address for a in found], found[0], [1, 4, 6]
        source = 12 if model.config.model_type == "whisper" else LENGTH
        keys = (first.kv_heads, source if kind == "cross" else LENGTH, first.d_head)
        cuts: dict[str, Edit] = {
            "q at some positions": Edit("q", "scale", -0.5, layers, [1, 2], positions=some),
            "q by position": Edit("q", "add", vectors(HEADS, LENGTH, first.d_head), layers),
            "q to noise": Edit("q", "noise", layers=layers, heads=[0, 3]),
            "k at some positions": Edit("k", "scale", -0.5, layers, positions=some),
            "k by position": Edit("k", "add", vectors(*keys), layers),
            "k to noise": Edit("k", "noise", (0.0, 1.0), layers, strength=0.5),
            "result at some positions": Edit("result", "scale", -1.0, layers, [0, 2], positions=some),
            "result by position": Edit("result", "add", vectors(HEADS, LENGTH, D_MODEL), layers),
            "result to noise": Edit("result", "noise", layers=layers, heads=[3]),
        }
        yield from ((f"{kind}-attention, {what}", Spec(cut)) for what, cut in cuts.items())
        yield f"{kind}-attention, all by position", Spec([cut for what, cut in cuts.items() if "by position" in what])


@by_case("llama", "gpt2", "mistral", "phi3", "bloom", *TWO_STACKS)
def test_cuts_at_projections_give_with_a_cache_what_they_give_without(name: str, implementation: str) -> None:
    model = fresh(name, implementation)
    _, uncut = by_chunks(model, name, (LENGTH - 2,), False)
    for number, (what, spec) in enumerate(projection_cuts(model)):
        patch_model(model, spec, kernel=KERNELS[number % 2])
        _, cut = by_chunks(model, name, (LENGTH - 2,), False)
        assert not torch.allclose(cut, uncut, rtol=0, atol=1e-2 * float(uncut.abs().max())), f"{what} must act"
        for static in (False, True)[: 1 if name in NO_STATIC_CACHE else 2]:
            # Other shapes of products add up in other orders: some hundred roundings of float32.
            assert cache_error(model, name, static) < 2e-5, what


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_counting_positions_from_the_start_of_each_call_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(name)
    monkeypatch.setattr(surgery.core, "offsets", lambda *args: (0, 0, None))
    for what, spec in projection_cuts(model):
        error = cache_error(patch_model(model, spec), name, static=False)
        if "cross-attention, k" in what:
            # These keys are of the source: projected once, all of them, in the first call.
            assert error < 2e-5, what
        else:
            assert error > 1e-2, what


class Stepwise(nn.Module):
    """Goes through a model's layers token by token, within one call that is not the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        inner, cache, found = self.model.model, DynamicCache(config=self.model.config), []
        for position, token in enumerate(ids.unbind(1)):
            x, place = inner.embed_tokens(token[:, None]), torch.tensor([[position]])
            for layer in inner.layers:
                x = layer(x, position_ids=place, position_embeddings=inner.rotary_emb(x, place), **{CACHE: cache})
            found.append(self.model.lm_head(inner.norm(x)))
        return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("cut", [Edit("z", "zero", heads=[1], positions=[3, 5]), Edit("rot_k", "noise", heads=[1])])
def test_steps_within_a_call_of_another_module_are_counted(cut: Edit) -> None:
    model = fresh("llama")
    ids = FAMILIES["llama"].inputs(padding=0)["input_ids"]
    uncut = model(ids).logits
    patch_model(model, cut)
    expected = model(ids).logits
    assert (expected - uncut).abs().max() > 1e-2, "it acts"
    # Other shapes of products add up in other orders.
    assert (Stepwise(model)(ids) - expected).abs().max() < 2e-5 * uncut.abs().max()


# -- callables that work in place ------------------------------------------------------------------------------------------


def contents(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """A copy of the keys and values, layer by layer: those of self-attention, then those of cross-attention."""
    if isinstance(cache, EncoderDecoderCache):
        return contents(cache.self_attention_cache) + contents(cache.cross_attention_cache)
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@torch.no_grad()
def decode(model: Any, name: str, static: bool) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Logits of a prompt and of steps after it, and what the cache holds at the end."""
    inputs, two_stacks = FAMILIES[name].inputs(padding=0), name in TWO_STACKS
    ids_name = "decoder_input_ids" if two_stacks else "input_ids"
    ids, mask = inputs.pop(ids_name), inputs.pop("attention_mask", None)
    cache, found = new_cache(model, static, two_stacks), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        reach = mask if mask is None or two_stacks else mask[:, : part.stop]
        more = {} if reach is None else {"attention_mask": reach}
        found.append(model(**inputs, **more, **{ids_name: ids[:, part], CACHE: cache}).logits)
    return found, contents(cache)


def is_same(one: Any, other: Any) -> bool:
    """Equality bit for bit of tensors in nested sequences."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(map(is_same, one, other))


PAIRS: tuple[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
    (lambda x: x.mul_(0), lambda x: x * 0),
    (lambda x: x.mul_(0.5).add_(0.25), lambda x: x * 0.5 + 0.25),
)
"""The same function in place, and not."""


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@by_case("llama", "gpt2", "mistral", "bart")
def test_a_callable_may_work_in_place_beside_a_cache(name: str, implementation: str, static: bool) -> None:
    model = fresh(name, implementation)
    layers = ["decoder.self.0", "decoder.cross.0"] if name in TWO_STACKS else ["self.0"]

    def cut(action: Any) -> Any:
        return decode(patch_model(model, Edit(site, action, None, layers, heads), kernel=kernel), name, static)

    for kernel in KERNELS:
        plain, held = decode(patch_model(model, kernel=kernel), name, static)
        sites = ("rot_q", "rot_k", "v", "z", "scores", "pattern")
        for site, (number, (in_place, new)) in itertools.product(sites, enumerate(PAIRS)):
            heads: Any = ("all", [1])[number]
            found, cache = cut(in_place)
            assert is_same((found, cache), cut(new)), site
            # Nothing before the first layer's keys and values is cut: they are those of the model without cuts.
            assert is_same(cache[0], held[0]), site
            assert name not in TWO_STACKS or is_same(cache[2], held[2]), site
            assert not torch.allclose(found[-1], plain[-1], atol=1e-3), f"{site} must act"


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("site", ["rot_k", "v"])
def test_a_callable_that_writes_into_the_cache_is_noticed(site: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the copy that a callable is given."""
    monkeypatch.setattr(Operation, "_call", lambda self, original: self.edit.action(original))
    model = fresh("gpt2")
    _, held = decode(model, "gpt2", static)
    in_place, new = PAIRS[1]
    _, cache = decode(patch_model(model, Edit(site, in_place, layers=[0])), "gpt2", static)
    assert not is_same(cache[0], held[0])
    _, cache = decode(patch_model(model, Edit(site, new, layers=[0])), "gpt2", static)
    assert is_same(cache[0], held[0])


# -- generation ------------------------------------------------------------------------------------------------------------

DETAILS: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}


@by_case(*TWO_STACKS)
def test_keys_of_cross_attention_are_seen_once_in_a_generation(name: str, implementation: str) -> None:
    """Cross-attention projects its keys in the first step and reads them from the cache from then on."""
    family, model = FAMILIES[name], fresh(name, implementation)
    inputs = family.inputs()
    plain = generate(model, family, inputs, **DETAILS)
    with torch.no_grad(), capture(model, "k", ["decoder.cross.*"]) as whole:
        model(**inputs)
    with capture(model, ["k", "q"], ["decoder.cross.*"]) as run:
        found = generate(model, family, inputs, **DETAILS)
    assert torch.equal(found.sequences, plain.sequences) and is_same(found.logits, plain.logits)
    for layer in ("decoder.cross.0", "decoder.cross.1"):
        assert len(run.steps(layer, "k")) == 1 and len(run.steps(layer, "q")) == 6
        assert torch.equal(run[layer, "k"], whole[layer, "k"])
    cut = Edit("k", "add", 1.0, ["decoder.cross.*"], positions=[3, 4])
    with capture(patch_model(model, cut), "k", ["decoder.cross.*"]) as run:
        generate(model, family, inputs)
    expected = whole["decoder.cross.0", "k"].clone()
    expected[:, :, 3:5] += 1.0
    assert len(run.steps("decoder.cross.0", "k")) == 1 and torch.equal(run["decoder.cross.0", "k"], expected)


@pytest.mark.parametrize("beams", [1, 2])
@by_case(*TWO_STACKS)
def test_generation_under_cuts_of_the_keys_of_cross_attention(name: str, implementation: str, beams: int) -> None:
    family, model = FAMILIES[name], fresh(name, implementation)
    inputs = family.inputs()
    uncut = generate(model, family, inputs, num_beams=beams, **DETAILS)
    for cut in (
        Edit("k", "scale", -1.0, ["decoder.cross.*"], [1]),
        Edit("k", "add", 1.0, ["decoder.cross.*"], positions=[3, 4]),
        Edit("k", "noise", layers=["decoder.cross.1"], heads=[0, 2]),
    ):
        patch_model(model, cut)
        cached, whole = (generate(model, family, inputs, num_beams=beams, use_cache=c, **DETAILS) for c in (True, False))
        assert torch.equal(cached.sequences, whole.sequences)
        for with_cache, without in zip(cached.logits, whole.logits, strict=True):
            # Products of one query and of many round differently.
            torch.testing.assert_close(with_cache, without, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(cached.logits[0], uncut.logits[0], atol=1e-2), "the cut must act"


@pytest.mark.parametrize("name", ["llama", "gpt2", *TWO_STACKS])
def test_the_generation_config_stays(name: str) -> None:
    """The very object, with what the user set in it."""
    model, inputs = fresh(name, "sdpa"), FAMILIES[name].inputs()
    prompt = {n: x for n, x in inputs.items() if n != "decoder_input_ids"}
    config = model.generation_config
    config.max_new_tokens, config.num_beams, config.repetition_penalty = 3, 2, 1.5

    def state() -> tuple[Any, ...]:
        return id(model.generation_config), {n: id(x) for n, x in vars(config).items()}, config.to_dict()

    before, tokens = state(), model.generate(**prompt)
    assert state() == before
    patch_model(model)
    assert state() == before
    assert torch.equal(model.generate(**prompt), tokens) and state() == before
    patch_model(model, Freeze("both", to="noise", heads=[1]), kernel="eager")
    assert state() == before
    with capture(model, ["pattern", "z"], ["decoder.*" if name in TWO_STACKS else "*"]):
        model.generate(**prompt)
        assert state() == before
    unpatch_model(model)
    assert torch.equal(model.generate(**prompt), tokens) and state() == before
    config.num_beams = 1
    assert state() != before, "the comparison sees a change"


# -- compiled --------------------------------------------------------------------------------------------------------------


def test_a_reference_that_ends_is_an_error_and_in_a_compiled_step_nan() -> None:
    """One graph serves all steps, so that it cannot raise at the first that the reference has no value for."""
    ids, room = FAMILIES["llama"].inputs(padding=0)["input_ids"], 12
    means = vectors(HEADS, 6, 16)

    @torch.no_grad()
    def steps(model: Any, run: Any) -> Iterator[Tensor]:
        cache = StaticCache(model.config, max_cache_len=room)
        model(ids[:, :4], attention_mask=torch.ones(2, 4), **{CACHE: cache})
        for step in range(4, 8):
            mask = (torch.arange(room) <= step).expand(2, room)
            yield run(ids[:, step, None], attention_mask=mask, **{CACHE: cache}).logits

    torch._dynamo.reset()
    for positions in (None, range(6)):
        model = patch_model(fresh("llama", "sdpa"), Edit("z", "mean", reference=means, positions=positions))
        found = list(steps(model, torch.compile(model, fullgraph=True, backend="eager")))
        uncompiled = steps(model, model)
        expected = [next(uncompiled), next(uncompiled)]
        if positions is None:
            assert all(bool(logits.isnan().all()) for logits in found[2:])
            with pytest.raises(SpecError, match=r"self\.0 z: found values for 6 positions, used at position 6; expected"):
                next(uncompiled)
        else:
            expected += uncompiled
        assert not any(bool(logits.isnan().any()) for logits in found[: len(expected)])
        for one, other in zip(found, expected, strict=False):
            # Traced code may round differently.
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


# -- keys joined from two sequences ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged() -> Any:
    """A decoder whose attention reads its own keys and the encoder's behind them."""
    config = make_config("t5gemma2", "eager")
    torch.manual_seed(0)
    return _scaled(T5Gemma2ForConditionalGeneration(config).eval())


def _scaled(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def merged_logits(model: Any, use_cache: bool) -> Tensor:
    more: Any = {"use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True, "decoder_start_token_id": 2}
    ids = torch.arange(5, 19).view(2, 7)
    return torch.stack(model.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, **more).logits)


MERGED = "decoder.self.*"


@pytest.mark.parametrize(
    "cut",
    [
        Freeze("both", layers=[MERGED], heads=[1]),
        Edit("rot_k", "scale", 0.5, layers=[MERGED], heads=[1]),
        Edit("k", "noise", layers=[MERGED], heads=[0], gqa="shared"),
        Edit("z", "noise", layers=[MERGED], heads=[2]),
        Edit("pattern", "uniform", layers=[MERGED], heads=[3]),
    ],
    ids=str,
)
def test_joined_keys_with_a_cache(merged: Any, cut: Any) -> None:
    plain = merged_logits(merged, True)
    patch_model(merged, cut)
    cached, recomputed = (merged_logits(merged, use_cache) for use_cache in (True, False))
    unpatch_model(merged)
    assert not torch.allclose(cached, plain, rtol=0, atol=1e-3), "the cut must act"
    # Products of other shapes add up in other orders: some hundred roundings of float32.
    torch.testing.assert_close(cached, recomputed, rtol=0, atol=2e-5)


@pytest.mark.parametrize("site", ["rot_k", "v", "scores", "pattern"])
def test_joined_keys_have_no_position_beside_a_cache(merged: Any, site: str) -> None:
    """Those of the encoder move on with each token that is decoded."""
    patch_model(merged, Edit(site, "noise", layers=[MERGED], heads=[1]))  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=f"cuts at {site} that depend on the position"):
        merged_logits(merged, True)
    assert merged_logits(merged, False).isfinite().all()
    unpatch_model(merged)


def test_a_part_of_a_cache_of_other_cuts_is_refused() -> None:
    """Keys of a cross-attention that were filled under other cuts, beside an empty cache of the decoder's own."""
    model, given = FAMILIES["bart"].build(), FAMILIES["bart"].inputs()
    patch_model(model, Edit("k", "scale", 3.0, layers=["decoder.cross.*"]))
    with torch.no_grad():
        filled = model(**given, use_cache=True)[CACHE]
        model(**given, **{CACHE: EncoderDecoderCache(DynamicCache(), filled.cross_attention_cache)})
        patch_model(model, Edit("v", "scale", 0.5, layers=["decoder.cross.*"]))
        with pytest.raises(CacheError, match="filled under another spec"):
            model(**given, **{CACHE: EncoderDecoderCache(DynamicCache(), filled.cross_attention_cache)})
