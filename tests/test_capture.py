"""Capturing: the tensors are those that the model computes with, and watching changes nothing."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import pytest
import torch
from cached import CACHE
from families import D_MODEL, DECODERS, FAMILIES, HEADS, KV_HEADS, LAYERS, LENGTH
from remote.styles import Operators
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel, StaticCache

from surgery import (
    Edit,
    Freeze,
    NoMatchError,
    NotFiredWarning,
    SpecError,
    SurgeryError,
    capture,
    find_anatomy,
    inspect_model,
    patch_model,
    patched,
    unpatch_model,
)
from surgery.sites import SITES

ALL_SITES = list(SITES)


def by_case(names: list[str]) -> Any:
    """Families, eager and, where they have it, sdpa."""
    cases = [(name, i) for name in names for i in ("eager", "sdpa") if i == "eager" or FAMILIES[name].sdpa]
    return pytest.mark.parametrize(("name", "implementation"), cases)


@functools.cache
def built(name: str, implementation: str = "eager") -> Any:
    return FAMILIES[name].build(implementation)


def logits(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


def seen(model: nn.Module, inputs: dict[str, Any], sites: Any, layers: Any = "all", heads: Any = "all", **options: Any) -> Any:
    with torch.no_grad(), capture(model, sites, layers, heads, **options) as run:
        model(**inputs)
    return run


# -- shapes -------------------------------------------------------------------------------------------------------------

D = 16  # llama's d_head here
SHAPES = {
    "q": (2, HEADS, LENGTH, D),
    "k": (2, KV_HEADS, LENGTH, D),
    "rot_q": (2, HEADS, LENGTH, D),
    "rot_k": (2, HEADS, LENGTH, D),
    "v": (2, KV_HEADS, LENGTH, D),
    "scores": (2, HEADS, LENGTH, LENGTH),
    "pattern": (2, HEADS, LENGTH, LENGTH),
    "z": (2, HEADS, LENGTH, D),
    "result": (2, HEADS, LENGTH, D_MODEL),
}


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_shapes(implementation: str, kernel: Any) -> None:
    model, inputs = built("llama", implementation), FAMILIES["llama"].inputs()
    run = seen(model, inputs, ALL_SITES, kernel=kernel)
    assert {site: tuple(run[0, site].shape) for site in ALL_SITES} == SHAPES
    assert set(run) == {(f"self.{layer}", site) for layer in range(LAYERS) for site in ALL_SITES}
    assert len(run) == LAYERS * len(ALL_SITES)
    for (address, site), tensor in run.items():
        assert tensor is run[address, site] and tensor is run[int(address[-1]), site]
    some = seen(model, inputs, ALL_SITES, [1], [3, 1], kernel=kernel)  # rows in this order
    assert list(some) == [("self.1", site) for site in ALL_SITES]
    for site in ALL_SITES:
        everything = run[1, site]
        if site in ("k", "v"):  # with heads given: what each of these query heads reads
            everything = everything.repeat_interleave(HEADS // KV_HEADS, 1)
        # Kernels and matrix products may round differently for a part of the heads.
        torch.testing.assert_close(some[1, site], everything[:, [3, 1]], rtol=1e-5, atol=1e-5)


@by_case(["t5", "bart", "whisper"])
def test_shapes_of_two_stacks(name: str, implementation: str) -> None:
    model, inputs = FAMILIES[name].build(implementation), FAMILIES[name].inputs()
    source = 12 if name == "whisper" else LENGTH
    target = inputs["decoder_input_ids"].shape[1]
    run = seen(model, inputs, ["rot_q", "rot_k", "v", "pattern", "z", "result"])
    lengths = {"encoder.self": (source, source), "decoder.self": (target, target), "decoder.cross": (target, source)}
    for (kind, (queries, keys)), layer in itertools.product(lengths.items(), range(LAYERS)):
        address = f"{kind}.{layer}"
        assert run[address, "pattern"].shape == (2, HEADS, queries, keys)
        assert run[address, "rot_k"].shape[2] == run[address, "v"].shape[2] == keys
        assert run[address, "rot_q"].shape[2] == run[address, "z"].shape[2] == run[address, "result"].shape[2] == queries
    assert torch.equal(run[1, "z"], run["decoder.self.1", "z"]), "a number is the decoder's self-attention"


# -- values, for every family -------------------------------------------------------------------------------------------


def outputs_of(model: nn.Module, inputs: dict[str, Any], paths: list[str]) -> dict[str, Tensor]:
    """What modules return in a forward, by plain hooks."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sites_fit_together(name: str) -> None:
    """pattern = softmax(scores), z = pattern @ v, and what the heads add, with the bias, is the projection's output."""
    model, inputs = built(name), FAMILIES[name].inputs()
    anatomy = find_anatomy(model)
    run = seen(model, inputs, ["scores", "pattern", "v", "z", "result"])
    projections = {a.address: a.projections["o"].path for a in anatomy}
    outputs = outputs_of(model, inputs, list(projections.values()))
    for attention in anatomy:
        scores, pattern, v, z, result = (run[attention.address, s] for s in ("scores", "pattern", "v", "z", "result"))
        sinks = getattr(attention.module, "sinks", None)
        if sinks is None:
            expected = scores.float().softmax(-1)
        else:  # a sink takes its share of every row
            sinks = sinks.detach().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            expected = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
            assert pattern.sum(-1).min() < 0.9
        torch.testing.assert_close(pattern, expected, rtol=1e-5, atol=1e-6)
        v = v.repeat_interleave(attention.heads // v.shape[1], 1)
        assert v.shape[1] == pattern.shape[1] == attention.heads
        # Sums in another order: 1e-5 for numbers around 1.
        torch.testing.assert_close(z, pattern @ v, rtol=1e-5, atol=1e-5)
        projection = model.get_submodule(projections[attention.address])
        bias = getattr(projection, "bias", None)
        total = result.sum(dim=1) + (0 if bias is None else bias.detach())
        output = outputs[projections[attention.address]]
        torch.testing.assert_close(total.view_as(output), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_patterns_are_those_that_the_model_gives_out(name: str) -> None:
    model, inputs = built(name), FAMILIES[name].inputs()
    run = seen(model, inputs, "pattern")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    expected = {}
    for kind, key in (
        ("encoder.self", "encoder_attentions"),
        ("decoder.self", "decoder_attentions"),
        ("decoder.cross", "cross_attentions"),
        ("self", "attentions"),
    ):
        expected.update({f"{kind}.{layer}": tensor for layer, tensor in enumerate(out.get(key) or ())})
    assert set(expected) == {address for address, _ in run} and len(expected) in (LAYERS, 3 * LAYERS)
    for address, tensor in expected.items():
        assert torch.equal(run[address, "pattern"], tensor), address


def test_values_of_a_grouped_attention_by_hand() -> None:
    model, inputs = built("llama"), FAMILIES["llama"].inputs(padding=0)
    layer = model.model.layers[0]
    states = outputs_of(model, inputs, ["model.layers.0.input_layernorm"])["model.layers.0.input_layernorm"]
    run = seen(model, inputs, ALL_SITES, [0])

    def heads(projection: nn.Module) -> Tensor:
        return projection(states).detach().view(2, LENGTH, -1, D).transpose(1, 2)

    attention = layer.self_attn
    assert torch.equal(run[0, "q"], heads(attention.q_proj))
    assert torch.equal(run[0, "k"], heads(attention.k_proj))
    assert torch.equal(run[0, "v"], heads(attention.v_proj))
    cos, sin = model.model.rotary_emb(states, torch.arange(LENGTH)[None])

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    assert torch.equal(run[0, "rot_q"], turned(run[0, "q"]))
    assert torch.equal(run[0, "rot_k"], turned(run[0, "k"]).repeat_interleave(HEADS // KV_HEADS, 1))
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    scores = (run[0, "rot_q"] @ run[0, "rot_k"].transpose(2, 3)) * D**-0.5
    torch.testing.assert_close(run[0, "scores"][..., ~future], scores[..., ~future], rtol=1e-5, atol=1e-5)
    assert (run[0, "scores"][..., future] < -1e30).all() and (run[0, "pattern"][..., future] == 0).all()
    weight = attention.o_proj.weight.view(D_MODEL, HEADS, D)
    result = torch.einsum("bhqd,mhd->bhqm", run[0, "z"], weight)
    torch.testing.assert_close(run[0, "result"], result, rtol=1e-5, atol=1e-5)


def test_values_of_a_fused_projection_by_hand() -> None:
    model, inputs = built("gpt2"), FAMILIES["gpt2"].inputs()
    fused = outputs_of(model, inputs, ["transformer.h.1.attn.c_attn"])["transformer.h.1.attn.c_attn"]
    run = seen(model, inputs, ["q", "k", "v"], [1])
    for site, part in zip(("q", "k", "v"), fused.split(D_MODEL, dim=-1), strict=True):
        assert torch.equal(run[1, site], part.view(2, LENGTH, HEADS, -1).transpose(1, 2))


# -- watching changes nothing -------------------------------------------------------------------------------------------


@by_case(list(FAMILIES))
def test_capturing_changes_nothing(name: str, implementation: str) -> None:
    model, inputs = built(name, implementation), FAMILIES[name].inputs()
    classes, plain = [type(m) for m in model.modules()], logits(model, inputs)
    sites = [site for site in ALL_SITES if all(site not in ("q", "k") or site in a.projections for a in find_anatomy(model))]
    for heads in ("all", [2]):
        with capture(model, sites, heads=heads) as run:
            found = logits(model, inputs)
        assert torch.equal(found, plain)
        assert len(run) == len(sites) * len(find_anatomy(model))
    assert [type(m) for m in model.modules()] == classes
    assert not any("_surgery" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "mistral", "bart", "bert", "phi"])
def test_a_fused_kernel_shows_the_matrix_that_eager_computes(name: str) -> None:
    inputs = FAMILIES[name].inputs()
    fused, eager = (seen(built(name, i), inputs, ["scores", "pattern", "z"]) for i in ("sdpa", "eager"))
    allowed = inputs.get("attention_mask", torch.ones(2, LENGTH)).bool()
    for address, site in eager:
        one, other = fused[address, site], eager[address, site]
        if site == "scores":
            one, other = one.clamp(min=-1e4), other.clamp(min=-1e4)
        if one.shape[2] == LENGTH:  # what a query that is padding does is the kernel's own
            rows = allowed[:, None, :, None].expand(one.shape)
            one, other = one[rows], other[rows]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_capturing_under_cuts_shows_what_is_left_after_them() -> None:
    model, inputs = built("llama", "sdpa"), FAMILIES["llama"].inputs()
    cuts = [
        Freeze("ov", [0], [1]),
        Edit("pattern", "uniform", layers=[1], heads=[2]),
        Edit("q", "scale", 0.0, layers=[1], heads=[0]),
    ]
    with patched(model, cuts):
        plain = logits(model, inputs)
        run = seen(model, inputs, ["q", "pattern", "z"])
        assert torch.equal(logits(model, inputs), plain), "and afterwards the cuts are as before"
        before = inspect_model(model)["self.1"].cuts
        with capture(model, "z"):
            assert "capture z" in inspect_model(model)["self.1"].cuts
        assert inspect_model(model)["self.1"].cuts == before
    z, q, pattern = run[0, "z"][1], run[1, "q"][1], run[1, "pattern"][1]  # the second row of the batch has no padding
    assert not z[1].any() and z[[0, 2, 3]].all()
    assert not q[0].any() and q[1:].all()
    assert torch.allclose(pattern[2, 4], torch.tensor([0.2] * 5 + [0.0] * 4))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_captures_nest(implementation: str) -> None:
    model, inputs = built("llama", implementation), FAMILIES["llama"].inputs()
    plain = logits(model, inputs)
    with capture(model, ["z", "pattern"], [0]) as outer:
        first = logits(model, inputs)
        with capture(model, ["z", "scores"], heads=[1]) as inner:
            second = logits(model, inputs)
        third = logits(model, inputs)
    assert torch.equal(first, plain) and torch.equal(second, plain) and torch.equal(third, plain)
    assert len(outer.steps(0, "z")) == 3 and len(inner.steps(0, "z")) == 1
    for step in outer.steps(0, "z"):
        assert torch.equal(step, outer[0, "z"])
    assert torch.equal(inner[0, "z"], outer[0, "z"][:, [1]])
    assert set(inner) == {("self.0", "z"), ("self.0", "scores"), ("self.1", "z"), ("self.1", "scores")}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_capture_goes_on_while_the_cuts_change(implementation: str) -> None:
    model, inputs = FAMILIES["llama"].build(implementation), FAMILIES["llama"].inputs()
    plain = logits(model, inputs)
    with capture(model, ["z", "pattern"]) as outer:
        logits(model, inputs)
        with patched(model, Freeze("ov")), capture(model, "z") as inner:
            logits(model, inputs)
        logits(model, inputs)
        patch_model(model, Freeze("ov", [1]))
        logits(model, inputs)
    cut = [[not z.any() for z in outer.steps(layer, "z")] for layer in (0, 1)]
    assert cut == [[False, True, False, False], [False, True, False, True]]
    assert len(outer.steps(1, "pattern")) == 4 and len(inner.steps(1, "z")) == 1 and not inner[1, "z"].any()
    assert torch.equal(logits(model, inputs), plain) and not any("_surgery" in m.__dict__ for m in model.modules())


# -- several forwards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "falcon_alibi"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_steps_of_a_generation(name: str, implementation: str) -> None:
    model, inputs = built(name, implementation), FAMILIES[name].inputs()
    plain = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with capture(model, ["z", "pattern", "rot_k"], [1]) as run:
        tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, plain)
    z, pattern, keys = (run.steps(1, site) for site in ("z", "pattern", "rot_k"))
    assert [x.shape[2] for x in z] == [LENGTH, 1, 1, 1] and z[-1] is run[1, "z"]
    assert [x.shape[2] for x in pattern] == [LENGTH, 1, 1, 1]
    assert all(p.shape[3] == k.shape[2] for p, k in zip(pattern, keys, strict=True))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    whole = seen(model, {"input_ids": tokens[:, :-1], "attention_mask": mask}, "z", [1])[1, "z"]
    # Step by step and at once: other sums, the same numbers. The first row's padding is the kernel's own.
    torch.testing.assert_close(torch.cat(z, dim=2)[1], whole[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_was_seen_is_not_written_over(implementation: str) -> None:
    """A static cache hands out its own memory: what was captured of one step must outlive the next."""
    model, inputs = built("llama", implementation), FAMILIES["llama"].inputs(padding=0)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with capture(model, ["rot_k", "v"], [1]) as dynamic:
        tokens = model.generate(**inputs, **options)
    with capture(model, ["rot_k", "v"], [1]) as static:
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
        assert torch.equal(model.generate(**inputs, **{CACHE: cache}, **options), tokens)
    for site in ("rot_k", "v"):
        for one, other in zip(static.steps(1, site), dynamic.steps(1, site), strict=True):
            filled = other.shape[2]
            # Attention over a longer row of keys sums in another order.
            torch.testing.assert_close(one[:, :, :filled], other, rtol=1e-4, atol=1e-5)
            assert not one[:, :, filled:].any(), "the rest was empty then"


def test_a_step_with_a_cache_is_no_reference() -> None:
    model, inputs = built("llama"), FAMILIES["llama"].inputs()
    with capture(model, "z") as run:
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    pattern = (
        r"Run\.reference: found self\.0 z captured from position 9 on, in a step with a KV cache; expected .*use_cache=False"
    )
    with pytest.raises(SpecError, match=pattern):
        run.reference()
    with pytest.raises(SpecError, match=pattern):
        Freeze("ov", to=run)
    with capture(model, "z") as run:
        logits(model, inputs)
    assert len(run.reference()) == LAYERS


def test_a_site_named_twice_is_seen_once() -> None:
    model, inputs = built("gpt2"), FAMILIES["gpt2"].inputs()
    run = seen(model, inputs, ["z", "pattern", "z"])
    assert len(run.steps(0, "z")) == 1 and len(run) == 2 * LAYERS


def test_the_last_forward_counts() -> None:
    model, family = built("gpt2"), FAMILIES["gpt2"]
    one, two = family.inputs(), family.inputs(length=5, seed=1)
    with capture(model, "z", [0]) as run:
        logits(model, one)
        logits(model, two)
    assert torch.equal(run[0, "z"], seen(model, two, "z")[0, "z"])
    assert torch.equal(run.steps(0, "z")[0], seen(model, one, "z")[0, "z"])
    assert repr(run).splitlines() == ["Run of GPT2LMHeadModel, 1 captured", "  self.0 z: (2, 4, 5, 8)"]


# -- gradients ----------------------------------------------------------------------------------------------------------


def weighted(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """A loss that sees every logit."""
    out = model(**inputs).logits
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


@by_case(["gpt2", "llama", "bloom", "t5"])
def test_gradients_with_respect_to_what_was_captured(name: str, implementation: str) -> None:
    """Against what a small change at the site does to the loss."""
    model, inputs = FAMILIES[name].build(implementation).double(), FAMILIES[name].inputs(padding=0)
    address = "decoder.self.0" if name == "t5" else "self.0"
    sites = ["rot_q", "rot_k", "scores", "pattern", "z"]
    with capture(model, sites, kernel="eager") as run:
        gradients = torch.autograd.grad(weighted(model, inputs), [run[address, site] for site in sites])
    # gpt2 computes in float64 throughout, the others round their pattern to float32.
    step, tolerance = (1e-5, 1e-6) if name == "gpt2" else (1e-3, 2e-2)
    for site, gradient in zip(sites, gradients, strict=True):
        assert gradient.abs().sum() > 0
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=gradient.dtype)
        if site in ("scores", "pattern"):  # what is masked stays masked
            direction = direction * (run[address, "pattern"] != 0)
        losses = []
        for sign in (1, -1):
            with torch.no_grad(), patched(model, Edit(site, "add", sign * step * direction, layers=[address]), kernel="eager"):
                losses.append(weighted(model, inputs))
        torch.testing.assert_close((gradient * direction).sum(), (losses[0] - losses[1]) / (2 * step), rtol=tolerance, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_capturing_leaves_the_gradients_of_the_model(implementation: str) -> None:
    inputs = FAMILIES["llama"].inputs()

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = FAMILIES["llama"].build(implementation)
    plain = gradients(model)
    with capture(model, ALL_SITES):
        found = gradients(model)
    assert list(plain) == list(found)
    assert all(torch.equal(found[n], plain[n]) for n in plain)


def test_detached_or_not() -> None:
    model, inputs = built("llama"), FAMILIES["llama"].inputs()
    with capture(model, ["z", "pattern"]) as run:
        model(**inputs)
    assert all(tensor.requires_grad for _, tensor in run.items())
    assert not any(e.value.requires_grad for e in run.reference().entries.values())
    with capture(model, ["z", "pattern"], detach=True) as run:
        out = model(**inputs).logits
    assert out.requires_grad and not any(tensor.requires_grad for _, tensor in run.items())


# -- what was captured, put into another run ----------------------------------------------------------------------------


@by_case(["gpt2", "llama", "gemma2", "falcon_grouped", "bart"])
def test_patching_activations_reproduces_the_run(name: str, implementation: str) -> None:
    """z of a cut layer, put into the uncut model, gives the cut model's logits: nothing else of that layer matters."""
    model, inputs = built(name, implementation), FAMILIES[name].inputs()
    layer = "decoder.self.0" if name == "bart" else "self.0"
    cut = [Edit("rot_q", "scale", 0.3, layers=[layer]), Edit("v", "add", 0.5, layers=[layer], heads=[1])]
    with patched(model, cut):
        expected, run = logits(model, inputs), seen(model, inputs, ["rot_q", "rot_k", "v", "z", "pattern"])
    plain = logits(model, inputs)
    assert not torch.equal(expected, plain)
    for freeze in (
        Freeze("ov", [layer], to=run),
        Freeze("both", [layer], to=run),
        Freeze("ov", to="activation", reference=run),
    ):
        with patched(model, freeze):
            assert torch.equal(logits(model, inputs), expected)
    # One head alone, and everything from the uncut run: half of the way, and none of it.
    with patched(model, Freeze("ov", [layer], [1], to=run)):
        assert not torch.equal(logits(model, inputs), plain) and not torch.equal(logits(model, inputs), expected)
    own = seen(model, inputs, ["rot_q", "rot_k", "z"])
    with patched(model, Freeze("both", to=own)):
        assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("heads", ["all", [0, 1], [2, 3]], ids=str)
@pytest.mark.parametrize("site", ALL_SITES)
def test_every_site_can_be_taken_from_a_run(site: str, heads: Any) -> None:
    """Two different inputs: after patching, the site holds what it held in the other run."""
    family = FAMILIES["llama"]
    model, other, inputs = built("llama"), family.inputs(padding=0, seed=1), family.inputs(padding=0)
    run = seen(model, other, site, [0], heads)
    with patched(model, Edit(site, "activation", layers=[0], heads=heads, reference=run)):
        assert not torch.equal(logits(model, inputs), logits(built("llama"), other))
        found = seen(model, inputs, site, [0], heads)
    held, expected = found[0, site], run[0, site]
    if held.shape[1] > expected.shape[1]:  # after a cut at v, the heads of a group are shown apart
        expected = expected.repeat_interleave(HEADS // KV_HEADS, 1)
    # result is changed by adding the difference, which rounds.
    torch.testing.assert_close(held, expected, rtol=0, atol=1e-6 if site == "result" else 0)
    with patched(model, Edit(site, "activation", layers=[0], heads=heads, reference=seen(model, inputs, site, [0], heads))):
        torch.testing.assert_close(logits(model, inputs), logits(built("llama"), inputs), rtol=1e-4, atol=1e-4)


def test_a_run_of_some_kv_heads_is_found_by_their_numbers() -> None:
    family = FAMILIES["llama"]
    model, other, inputs = built("llama"), family.inputs(padding=0, seed=1), family.inputs(padding=0)
    run = seen(model, other, "k", [0], [2, 3])
    assert run[0, "k"].shape[1] == 2 and run.reference().find("self.0", "k").heads == (1,)  # type: ignore[union-attr]
    with pytest.raises(SpecError, match=r"a reference of heads \[1\]; expected also heads \[0\]"):
        patch_model(model, Edit("k", "activation", layers=[0], heads=[0, 1], reference=run))
    with patched(model, Edit("k", "activation", layers=[0], heads=[2, 3], reference=run)):
        found = seen(model, inputs, "k", [0])[0, "k"]
    assert torch.equal(found[:, 1], run[0, "k"][:, 0])


def test_a_run_of_one_row_serves_a_batch() -> None:
    model, inputs = built("gpt2"), FAMILIES["gpt2"].inputs(padding=0)
    one = {n: x[1:] for n, x in inputs.items()}
    run = seen(model, one, "z", [0])
    with patched(model, Freeze("ov", [0], to=run)):
        found = seen(model, inputs, "z", [0])
    assert torch.equal(found[0, "z"], run[0, "z"].expand(2, -1, -1, -1))


# -- restored, and refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [None, Freeze("qk", [0])], ids=["plain", "cut"])
def test_the_model_is_restored_after_an_exception(cuts: Any) -> None:
    model, inputs = FAMILIES["llama"].build("sdpa"), FAMILIES["llama"].inputs()
    if cuts is not None:
        patch_model(model, cuts)
    classes, plain = [type(m) for m in model.modules()], logits(model, inputs)
    for stage in ("before", "between", "inside"):
        with pytest.raises(KeyError, match=stage), capture(model, ALL_SITES) as run:
            if stage == "before":
                raise KeyError(stage)
            logits(model, inputs)
            if stage == "between":
                raise KeyError(stage)

            def stop(module: nn.Module, args: Any, stage: str = stage) -> None:
                raise KeyError(stage)

            handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
            try:
                logits(model, inputs)
            finally:
                handle.remove()
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(logits(model, inputs), plain)
        assert len(run) == (0 if stage == "before" else LAYERS * len(ALL_SITES)), "what was seen stays"


@pytest.mark.parametrize(
    ("options", "kind", "pattern"),
    [
        ({"sites": "zz"}, SpecError, r"capture: found sites \['zz'\]; expected sites of q, k.*Did you mean 'z'"),
        ({"sites": ["z", "y"]}, SpecError, r"found sites \['y'\]"),
        ({"sites": []}, SpecError, r"capture: found no sites; expected at least one\. Choose from q, k"),
        (
            {"sites": "z", "heads": [1, 4]},
            SpecError,
            r"self\.0 \('model.layers.0.self_attn'\), self\.1 \(.*\): found heads \[4\]; expected heads 0",
        ),
        ({"sites": "z", "heads": []}, SpecError, r"heads: found \[\]"),
        ({"sites": "z", "layers": []}, SpecError, r"layers: found \[\]"),
        ({"sites": "z", "layers": [2]}, NoMatchError, r"capture: layers: found 2; expected self\.0 to self\.1"),
        ({"sites": "z", "layers": "encoder.*"}, NoMatchError, r"found 'encoder\.\*'"),
    ],
    ids=str,
)
def test_selections_that_do_not_exist(options: Any, kind: Any, pattern: str) -> None:
    model = built("llama")
    with pytest.raises(kind, match=pattern) as caught, capture(model, **options):
        raise AssertionError("never reached")
    assert isinstance(caught.value, SurgeryError)
    assert not any("_surgery" in m.__dict__ for m in model.modules())


def test_problems_of_all_layers_and_sites_are_listed() -> None:
    pattern = r"capture: self\.0 \(.*\), self\.1 \(.*\): found heads \[9\]"
    with pytest.raises(SpecError, match=pattern), capture(built("llama"), "z", heads=[9]):
        raise AssertionError("never reached")
    with (
        pytest.raises(SpecError, match=r"(?s)2 problems.*heads \[9\].*site 'k'"),
        capture(built("deepseek_v3"), "k", heads=[9]),
    ):
        raise AssertionError("never reached")


def test_many_layers_with_one_problem_are_one_line() -> None:
    model = FAMILIES["llama"].build(num_hidden_layers=5)
    with pytest.raises(SpecError) as caught:
        patch_model(model, Freeze("ov", heads=[9]))
    assert str(caught.value).count("self.") == 2 and "and 3 more: found heads [9]; expected heads 0 to 3" in str(caught.value)


def test_keeping_the_last_forward_alone() -> None:
    model, inputs = built("gpt2"), FAMILIES["gpt2"].inputs()
    with capture(model, "z", [0]) as every, capture(model, "z", [0], keep="last") as last:
        for seed in range(3):
            logits(model, FAMILIES["gpt2"].inputs(seed=seed))
    assert len(every.steps(0, "z")) == 3 and len(last.steps(0, "z")) == 1
    assert torch.equal(last[0, "z"], every[0, "z"])
    with (
        pytest.raises(SpecError, match=r"capture: found keep='first'; expected 'all' or 'last'"),
        capture(model, "z", keep="first"),
    ):  # type: ignore[arg-type]
        logits(model, inputs)


def test_what_was_not_captured() -> None:
    model, inputs = built("llama"), FAMILIES["llama"].inputs()
    with capture(model, "z", [0]) as run:
        pattern = r"run\[0, 'z'\]: found it was asked for, but no forward came there; captured: nothing; expected"
        with pytest.raises(NoMatchError, match=pattern):
            run[0, "z"]
        logits(model, inputs)
    with pytest.raises(NoMatchError, match=r"run\['self\.0', 'pattern'\]: found it was not asked for; captured: self\.0 z"):
        run["self.0", "pattern"]
    with pytest.raises(NoMatchError, match=r"run\[1, 'z'\]: found it was not asked for"):
        run[1, "z"]
    with pytest.raises(NoMatchError, match=r"layers: found 7"):
        run[7, "z"]
    with pytest.raises(NoMatchError, match=r"'self\.\*' selects 2; expected exactly one"):
        run["self.*", "z"]
    for key in ("self.0", 0, ("self.0",), ("self.0", "z", 1)):
        with pytest.raises(
            NoMatchError, match=rf"run\[{re.escape(repr(key))}\]: found one key; expected an address and a site"
        ):
            run[key]


# -- captures and cuts that never run -----------------------------------------------------------------------------------


def without_encoder(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        states = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return {
        "encoder_outputs": states,
        "attention_mask": inputs["attention_mask"],
        "decoder_input_ids": inputs["decoder_input_ids"],
    }


def test_a_capture_that_never_ran_is_reported() -> None:
    model, inputs = FAMILIES["bart"].build(), FAMILIES["bart"].inputs()
    inputs = without_encoder(model, inputs)
    pattern = r"never ran the attention at encoder\.self\.0, encoder\.self\.1; expected every cut and capture executed\. The"
    with pytest.warns(NotFiredWarning, match=pattern), capture(model, "z") as run:
        logits(model, inputs)
    assert ("decoder.self.0", "z") in set(run) and ("encoder.self.0", "z") not in set(run)
    with capture(model, "z", "decoder.*"):
        logits(model, inputs)
    with capture(model, "z"):
        pass  # nothing ran at all: nothing to say


def test_a_cut_that_never_ran_is_reported() -> None:
    model, inputs = FAMILIES["bart"].build(), FAMILIES["bart"].inputs()
    inputs = without_encoder(model, inputs)
    with pytest.warns(NotFiredWarning, match=r"encoder\.self\.1"), patched(model, Freeze("ov", "encoder.self.1")):
        logits(model, inputs)
    patch_model(model, Freeze("ov", "encoder.self.1"))
    logits(model, inputs)
    with pytest.warns(NotFiredWarning, match=r"encoder\.self\.1"):  # the second forward shows that the first was a whole one
        logits(model, inputs)
    logits(model, inputs)  # said once
    patch_model(model, Freeze("ov", "encoder.self.1"))
    logits(model, inputs)
    with pytest.warns(NotFiredWarning, match=r"encoder\.self\.1"):
        unpatch_model(model)
    with patched(model, Freeze("ov", "decoder.*")):
        logits(model, inputs)
    with pytest.raises(KeyError), patched(model, Freeze("ov", "encoder.self.1")):
        logits(model, inputs)
        raise KeyError("an error is enough")


class Cycles(nn.Module):
    """Goes through its first layers several times before it comes to the last one, if it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Operators() for _ in range(3))

    def forward(self, x: Tensor, is_whole: bool = True) -> Tensor:
        for _ in range(3):
            x = self.layers[1](self.layers[0](x))
        return self.layers[2](x) if is_whole else x


@pytest.mark.filterwarnings("error")
def test_layers_that_run_several_times_in_a_forward_report_nothing_of_the_others() -> None:
    model, x = patch_model(Cycles(), Freeze("ov")), torch.randn(1, 4, 12)
    model(x)
    model(x)
    unpatch_model(model)


def test_layers_that_run_several_times_report_what_the_forward_left_out() -> None:
    model, x = patch_model(Cycles(), Freeze("ov")), torch.randn(1, 4, 12)
    model(x, is_whole=False)
    with pytest.warns(NotFiredWarning, match=r"never ran the attention at self\.2;"):
        model(x, is_whole=False)


@pytest.mark.parametrize("name", DECODERS)
def test_nothing_is_reported_of_models_that_run_everything(name: str) -> None:
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    patch_model(model, Freeze("both"))
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for row in inspect_model(model):
        assert row.runs == 3
    unpatch_model(model)


def test_modules_that_several_layers_call_are_not_taken_for_a_second_forward() -> None:
    """Four layers, two modules: the first runs twice before the second has run at all."""
    config = AlbertConfig(
        vocab_size=67, embedding_size=8, hidden_size=D_MODEL, num_hidden_layers=4, num_hidden_groups=2,
        num_attention_heads=HEADS, intermediate_size=40, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AlbertModel(config).eval()
    patch_model(model, Freeze("both"))
    for _ in range(3):
        model(torch.arange(12).view(2, 6))
    assert [row.runs for row in inspect_model(model)] == [6, 6]
    unpatch_model(model)


def test_addresses_of_the_run_are_those_of_the_model() -> None:
    run = seen(built("bart"), FAMILIES["bart"].inputs(), "z")
    assert list(run) == [(a.address, "z") for a in find_anatomy(built("bart"))]
    assert re.match(r"Run of BartForConditionalGeneration, 6 captured\n  encoder\.self\.0 z", repr(run))
