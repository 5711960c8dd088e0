"""Every cut at every point of the core, forward and backward, against the loops of `oracle`.

Tolerance: loops, batched products and fused kernels add up in different orders through two layers; 2e-5 of the largest
number (or of ten: gradients that cancel to nothing keep the roundings of their terms) is some hundred roundings of
float32, and a wrong cut is off by more than 1e-2. T5, BART and Whisper run in float64:
T5 does not scale its scores, so that its patterns are nearly one-hot and roundings grow. (The others cannot: families that
cast scores to float32 for the softmax give NaN for padding in float64.)
Where a kernel is fused, queries that are padding are not compared: what a fully masked row gives is the kernel's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached import CACHE
from families import BATCH, FAMILIES, HEADS, KV_HEADS, LENGTH, PADDING
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from torch import Tensor, nn
from transformers import DynamicCache

from surgery.captures import capture
from surgery.errors import SpecError
from surgery.patch import patch_model, patched, unpatch_model
from surgery.reference import ANY, Entry, Reference
from surgery.spec import Edit, Freeze, Spec

INLINE = ("gptj", "codegen", "gpt_neo", "falcon_multi_query", "falcon_grouped", "falcon_alibi", "bloom", "mpt")
INTERFACE = [name for name in FAMILIES if name not in INLINE]
GROUPED = [name for name in INTERFACE if FAMILIES[name].options.get("num_key_value_heads", HEADS) < HEADS]

# (implementation that the model is loaded with, kernel of patch_model)
RUNS = {
    f"{implementation}-{kernel}": (implementation, kernel)
    for kernel in ("auto", "eager")
    for implementation in ("eager", "sdpa")
}


def runs_of(names: Any, runs: Any = ("eager-auto", "sdpa-auto", "eager-eager")) -> Any:
    cases = [(name, run) for name in names for run in runs if FAMILIES[name].sdpa or not run.startswith("sdpa")]
    return pytest.mark.parametrize(("name", "run"), cases)


def dtype_of(name: str) -> torch.dtype:
    return torch.float64 if name in ("t5", "bart", "whisper") else torch.float32


@functools.cache
def model_of(name: str, implementation: str) -> nn.Module:
    return FAMILIES[name].build(implementation, dtype_of(name))


@functools.cache
def oracle_of(name: str) -> Oracle:
    return Oracle(FAMILIES[name], dtype_of(name))


def inputs_of(name: str, padding: int = PADDING) -> dict[str, Tensor]:
    inputs = FAMILIES[name].inputs(padding=padding)
    return {n: x.to(dtype_of(name)) if x.is_floating_point() else x for n, x in inputs.items()}


def outcome(model: Any, name: str, padding: int, only_real: bool) -> dict[str, Tensor]:
    """Logits and the gradients of all parameters and of the embedded input."""
    inputs = inputs_of(name, padding)
    real = torch.ones_like(inputs["attention_mask"]) if "attention_mask" in inputs else None
    if FAMILIES[name].kind in ("decoder", "encoder"):
        if only_real:
            real = inputs["attention_mask"]
        embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        inputs["inputs_embeds"] = embeds
    else:
        embeds, real = None, None
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits if FAMILIES[name].kind != "encoder" else model(**inputs).logits
    if real is not None:
        logits = torch.where(real.bool()[..., None], logits, 0)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"logits": logits.detach(), **found, **({} if embeds is None else {"embeds": embeds.grad})}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # A cut may leave a parameter without gradient in one and with zeros in the other.
    for name in dict.fromkeys([*expected, *found]):
        like = expected.get(name, found.get(name))
        one, other = (d.get(name, torch.zeros_like(like)) for d in (found, expected))
        bound = 2e-5 * max(10.0, float(other.abs().max()))
        difference = float((one - other).abs().max())
        assert difference <= bound, f"{name}: differs by {difference:.3g}, more than {bound:.3g}"


_EXPECTED: dict[Any, dict[str, Tensor]] = {}


def check(name: str, run: str, spec: Spec, padding: int = PADDING, key: Any = None) -> None:
    """Compares a patched model with the oracle under a spec. key: under which the oracle's answer may be kept."""
    implementation, kernel = RUNS[run]
    only_real = run == "sdpa-auto"
    key = None if key is None else (name, padding, only_real, key)
    expected = _EXPECTED.get(key)
    if expected is None:
        oracle = oracle_of(name)
        oracle.set_cuts(spec, HEADS, KV_HEADS if name in GROUPED else HEADS)
        expected = outcome(oracle.model, name, padding, only_real)
        if key is not None:
            _EXPECTED[key] = expected
    model = patch_model(model_of(name, implementation), spec, kernel=kernel)
    assert_close(outcome(model, name, padding, only_real), expected)


def mixes_positions(spec: Spec) -> bool:
    """Whether what padding queries compute reaches real ones: then fused kernels are compared without padding."""
    return any(
        getattr(cut, "action", getattr(cut, "to", None)) in ("mean", "resample") and cut.reference is None for cut in spec
    )


# -- the grid: every action at every site ----------------------------------------------------------------------------------

SITES = ("rot_q", "rot_k", "v", "scores", "pattern", "z")
TEMPLATES = ("uniform", "diagonal", "previous", "first")


def half(x: Tensor) -> Tensor:
    return 0.5 * x


def width(name: str, site: str) -> int:
    if site in ("scores", "pattern"):
        return LENGTH
    return oracle_of(name).d_value if site in ("v", "z") else oracle_of(name).d_head


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


Arguments = Callable[[str, int, int], dict[str, Any]]
"""(site, number of selected heads, width) -> what else an Edit takes."""

ACTIONS: dict[str, tuple[Any, Arguments]] = {
    "zero": ("zero", lambda site, heads, d: {}),
    "value": ("value", lambda site, heads, d: {"value": 0.3}),
    "value by channel": ("value", lambda site, heads, d: {"value": numbers(d)}),
    "value by two axes": ("value", lambda site, heads, d: {"value": numbers(LENGTH if d == LENGTH else heads, d)}),
    "value by position": ("value", lambda site, heads, d: {"value": numbers(heads, LENGTH, d)}),
    "value by row": ("value", lambda site, heads, d: {"value": numbers(BATCH, heads, LENGTH, d)}),
    "scale": ("scale", lambda site, heads, d: {"value": 0.7}),
    "scale by channel": ("scale", lambda site, heads, d: {"value": numbers(d)}),
    "add": ("add", lambda site, heads, d: {"value": 0.2}),
    "add by channel": ("add", lambda site, heads, d: {"value": numbers(d)}),
    "mean": ("mean", lambda site, heads, d: {}),
    "mean of a reference": ("mean", lambda site, heads, d: {"reference": numbers(HEADS, d)}),
    "mean by position": ("mean", lambda site, heads, d: {"reference": numbers(HEADS, LENGTH, d)}),
    "identity": ("identity", lambda site, heads, d: {}),
    "activation": ("activation", lambda site, heads, d: {"reference": numbers(BATCH, HEADS, LENGTH, d)}),
    "activation of one row": ("activation", lambda site, heads, d: {"reference": numbers(1, HEADS, LENGTH, d)}),
    "resample": ("resample", lambda site, heads, d: {}),
    "callable": (half, lambda site, heads, d: {}),
    **{template: (template, lambda site, heads, d: {}) for template in TEMPLATES},
}  # fmt: skip

VARIANTS: tuple[dict[str, Any], ...] = (
    {"layers": [0], "heads": [1, 3]},
    {"heads": [0, 1, 2], "strength": 0.4, "backward": "stopgrad"},
    {"layers": [1], "heads": [2], "positions": [0, 4, 5, 8], "backward": "ste"},
    {"strength": 0.7, "positions": [3, 6], "backward": "ste"},
    {"heads": [0, 3], "positions": [2, 5, 7]},
)

GRID = [(site, action) for site in SITES for action in ACTIONS if action not in TEMPLATES or site == "pattern"]


@pytest.mark.parametrize(("site", "action"), GRID)
@runs_of(("llama", "gpt2", "gemma2", "gpt_oss"))
def test_every_action_at_every_site(name: str, run: str, site: str, action: str) -> None:
    number = GRID.index((site, action))
    word, arguments = ACTIONS[action]
    # All variants on llama; the other families share them out.
    for i, variant in enumerate(VARIANTS):
        if name != "llama" and i != number % len(VARIANTS):
            continue
        heads = HEADS if "heads" not in variant else len(variant["heads"])
        edit = Edit(site, word, **arguments(site, heads, width(name, site)), **variant)
        padding = 0 if run == "sdpa-auto" and action in ("mean", "resample") else PADDING
        check(name, run, Spec(edit), padding, key=(number, i))


# -- freezes of circuits ---------------------------------------------------------------------------------------------------

FREEZES = ("zero", "mean", "mean of a reference", "identity", "activation", "resample")


def freeze(name: str, circuit: str, to: str, **more: Any) -> Freeze:
    reference = None
    if to in ("mean of a reference", "activation"):
        shape = (BATCH, HEADS, LENGTH) if to == "activation" else (HEADS,)
        every = [(f"self.{layer}", site) for layer in (0, 1) for site in SITES]
        reference = {(address, site): numbers(*shape, width(name, site)) for address, site in every}
    return Freeze(circuit, to=to.split()[0], reference=reference, **more)


@pytest.mark.parametrize("to", FREEZES)
@pytest.mark.parametrize("circuit", ["qk", "ov", "both"])
@runs_of(("llama", "gpt2", "deepseek_v3", "gpt_oss"))
def test_freezing_circuits(name: str, run: str, circuit: str, to: str) -> None:
    padding = 0 if run == "sdpa-auto" and to in ("mean", "resample") else PADDING
    for more in (
        {"heads": [0, 3]},
        {"heads": [1], "layers": [1], "backward": "ste"},
        {"heads": [1, 2], "strength": 0.3, "positions": range(2, 7)},
    ):
        check(name, run, Spec(freeze(name, circuit, to, **more)), padding, key=(circuit, to, str(more)))


# -- grouped heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gqa", ["isolated", "shared"])
@runs_of(("llama", "mistral", "gpt_oss"))
def test_grouped_heads_isolated_or_shared(name: str, run: str, gqa: str) -> None:
    padding = 0 if run == "sdpa-auto" else PADDING
    specs = [Spec(freeze(name, c, to, heads=[1], gqa=gqa)) for c in ("qk", "ov", "both") for to in FREEZES]
    specs += [Spec(Edit(site, half, heads=[0, 2], gqa=gqa, layers=[1])) for site in ("rot_k", "v")]
    specs += [Spec(Edit(site, "add", numbers(width(name, site)), heads=[3], gqa=gqa)) for site in ("rot_k", "v")]
    for number, spec in enumerate(specs):
        check(name, run, spec, padding, key=("gqa", gqa, number))


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_shared_at_k_is_a_hook_on_the_projection(kernel: str) -> None:
    """What people do today, for the head group that the hook hits: the very numbers of the hook."""
    inputs, d = FAMILIES["llama"].inputs(), 16

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(output[..., :d]), output[..., d:]], dim=-1)

    hooked = FAMILIES["llama"].build()
    for site, projection in (("k", "k_proj"), ("v", "v_proj")):
        handle = getattr(hooked.model.layers[1].self_attn, projection).register_forward_hook(hook)
        expected = hooked(**inputs).logits
        handle.remove()
        with patched(hooked, Edit(site, "zero", layers=[1], heads=[1], gqa="shared"), kernel=kernel):
            assert torch.equal(hooked(**inputs).logits, expected)


# -- every family ----------------------------------------------------------------------------------------------------------

CORE: dict[str, Callable[[Any], Any]] = {
    "qk to zero": lambda d: Freeze("qk", heads=[1]),
    "ov to zero": lambda d: Freeze("ov", heads=[0, 3]),
    "both by half": lambda d: Freeze("both", heads=[2], strength=0.5, backward="ste"),
    "ov detached": lambda d: Freeze("ov", to="identity", heads=[1, 2]),
    "v steered": lambda d: Edit("v", "add", numbers(d), heads=[1]),
    "k scaled": lambda d: Edit("rot_k", "scale", 0.5, heads=[3]),
    "scores scaled": lambda d: Edit("scores", "scale", 0.3, heads=[0, 2], backward="stopgrad"),
    "pattern uniform": lambda d: Edit("pattern", "uniform", heads=[1, 2], strength=0.6),
    "pattern first": lambda d: Edit("pattern", "first", heads=[0, 1, 2, 3], positions=[4, 6]),
    "pattern to a value": lambda d: Edit("pattern", "value", 0.1, heads=[3], layers="all"),
}


@pytest.mark.parametrize("cut", list(CORE))
@runs_of(INTERFACE, RUNS)
def test_core_cuts_in_every_family(name: str, run: str, cut: str) -> None:
    check(name, run, Spec(CORE[cut](oracle_of(name).d_value)), key=cut)


@pytest.mark.parametrize("address", ["encoder.self.1", "decoder.self.0", "decoder.cross.1", "decoder.cross.0"])
@runs_of(("t5", "bart", "whisper"), RUNS)
def test_cuts_of_one_attention_in_two_stacks(name: str, run: str, address: str) -> None:
    d = oracle_of(name).d_value
    for number, cut in enumerate(
        [
            Freeze("qk", layers=[address], heads=[1]),
            Edit("v", "value", numbers(d), layers=[address], heads=[0, 2]),
            Edit("rot_k", "add", 0.5, layers=[address], heads=[3], positions=[1, 4]),
            Edit("scores", "add", 0.5, layers=[address], heads=[1, 3], positions=[0, 2]),
            Edit("pattern", "diagonal", layers=[address], heads=[2]),
            Edit("pattern", "previous", layers=[address], strength=0.5),
            Edit("pattern", "mean", layers=[address], heads=[2]),
        ]
    ):
        check(name, run, Spec(cut), key=(address, number))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_sites_fit_together(name: str) -> None:
    """pattern = softmax(scores) (less a sink's share), z = pattern @ v, and q . k goes into scores: also for inline classes."""
    model = model_of(name, "eager")
    patch_model(model)
    with capture(model, ["rot_q", "rot_k", "v", "scores", "pattern", "z"]) as run, torch.no_grad():
        model(**inputs_of(name))
    for address in dict.fromkeys(address for address, _ in run):
        q, k, v, scores, pattern, z = (run[address, site] for site in ("rot_q", "rot_k", "v", "scores", "pattern", "z"))
        v = v.repeat_interleave(HEADS // v.shape[1], 1)
        torch.testing.assert_close(pattern @ v, z, atol=1e-5, rtol=1e-5)
        rows = pattern.sum(dim=-1)
        if name == "gpt_oss":
            assert (rows[(scores > -1e4).any(dim=-1)] < 1).any(), "a sink takes its share"
        else:
            torch.testing.assert_close(scores.softmax(dim=-1), pattern, atol=1e-6, rtol=1e-5)
        product = q @ k.transpose(-1, -2)
        assert product.shape == scores.shape
        if name not in ("t5", "bloom", "mpt", "falcon_alibi", "gemma2"):  # biases and soft caps stand between
            seen = scores > -1e4
            factor = (scores[seen] / product[seen]).median()
            torch.testing.assert_close(product[seen] * factor, scores[seen], atol=1e-4, rtol=1e-4)


# -- random specs ----------------------------------------------------------------------------------------------------------

_SMALL = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def edits(draw: Any, name: str, actions: Any = None, sites: Any = SITES) -> Edit:
    site = draw(st.sampled_from(sites))
    action = draw(st.sampled_from([a for a in actions or ACTIONS if a not in TEMPLATES or site == "pattern"]))
    heads = draw(st.one_of(st.just("all"), st.lists(st.integers(0, HEADS - 1), min_size=1, max_size=HEADS, unique=True)))
    word, arguments = ACTIONS.get(action, (action, lambda site, heads, d: {}))
    gqa = draw(st.sampled_from(["isolated", "shared"])) if site in ("k", "rot_k", "v") else "isolated"
    count = HEADS if heads == "all" else len(heads)
    if gqa == "shared" and site in ("k", "rot_k", "v") and heads != "all":
        size = HEADS // (KV_HEADS if name in GROUPED else HEADS)
        count = size * len({head // size for head in heads})
    return Edit(
        site,
        word,
        **arguments(site, count, width(name, site)),
        layers=draw(st.sampled_from(["all", [0], [1], [0, 1], ["self.1"]])),
        heads=heads,
        backward=draw(st.sampled_from(["natural", "stopgrad", "ste"])),
        strength=draw(st.sampled_from([1.0, 0.0, 0.25, 0.8])),
        positions=draw(st.one_of(st.none(), st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=LENGTH, unique=True))),
        gqa=gqa,
        seed=draw(st.integers(0, 5)),
    )


@st.composite
def freezes(draw: Any, name: str, to: Any = FREEZES) -> Freeze:
    return freeze(
        name,
        draw(st.sampled_from(["qk", "ov", "both"])),
        draw(st.sampled_from(to)),
        heads=draw(st.lists(st.integers(0, HEADS - 1), min_size=1, max_size=HEADS, unique=True)),
        layers=draw(st.sampled_from(["all", [0], [1]])),
        backward=draw(st.sampled_from(["stopgrad", "ste"])),
        strength=draw(st.floats(0, 1)),
        gqa=draw(st.sampled_from(["isolated", "shared"])),
        seed=draw(st.integers(0, 5)),
    )


def specs(name: str, **more: Any) -> Any:
    one = st.one_of(edits(name, **more), freezes(name))
    return st.lists(one, min_size=1, max_size=3).map(Spec)


@runs_of(("llama", "gpt2"))
def test_random_specs_equal_the_oracle(name: str, run: str) -> None:
    @_SMALL
    @given(specs(name), st.sampled_from([0, PADDING]))
    def compare(spec: Spec, padding: int) -> None:
        check(name, run, spec, 0 if run == "sdpa-auto" and mixes_positions(spec) else padding)

    compare()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox"])
def test_random_specs_give_the_same_in_both_kernels(name: str) -> None:
    """Also what the oracle leaves out: noise, and points at projections."""
    actions = ("zero", "noise", "add", "scale", "identity", "callable", "value", "uniform", "previous")

    @_SMALL
    @given(specs(name, actions=actions, sites=(*SITES, "q", "result")))
    def compare(spec: Spec) -> None:
        padding = 0 if mixes_positions(spec) else PADDING
        fused, eager = model_of(name, "sdpa"), model_of(name, "eager")
        expected = outcome(patch_model(eager, spec, kernel="eager"), name, padding, True)
        assert_close(outcome(patch_model(fused, spec), name, padding, True), expected)

    compare()


def test_the_comparison_rejects_a_wrong_cut() -> None:
    oracle_of("llama").set_cuts(Spec(Edit("pattern", "uniform", heads=[1], strength=0.5)), HEADS, KV_HEADS)
    expected = outcome(oracle_of("llama").model, "llama", 0, False)
    for wrong in (
        Edit("pattern", "uniform", heads=[1], strength=0.51),
        Edit("pattern", "uniform", heads=[2], strength=0.5),
        Edit("pattern", "uniform", heads=[1], strength=0.5, backward="ste"),
        Edit("pattern", "uniform", heads=[1], strength=0.5, positions=range(LENGTH - 1)),
    ):
        found = outcome(patch_model(model_of("llama", "eager"), wrong), "llama", 0, False)
        with pytest.raises(AssertionError, match="differs by"):
            assert_close(found, expected)


# -- what a projection gives, what a head adds -----------------------------------------------------------------------------

# Family: (path of the q projection in layer 1, rows of head 2 in its output).
Q_ROWS = {
    "llama": ("model.layers.1.self_attn.q_proj", range(32, 48)),
    "gpt2": ("transformer.h.1.attn.c_attn", range(16, 24)),
    "gpt_neox": ("gpt_neox.layers.1.attention.query_key_value", range(48, 56)),
    "phi3": ("model.layers.1.self_attn.qkv_proj", range(16, 24)),
    "codegen": ("transformer.h.1.attn.qkv_proj", range(48, 56)),
    "bert": ("bert.encoder.layer.1.attention.self.query", range(16, 24)),
}


@pytest.mark.parametrize("name", list(Q_ROWS))
def test_q_is_cut_where_a_hook_would_cut_it(name: str) -> None:
    model, (path, rows) = FAMILIES[name].build(), Q_ROWS[name]
    shift = numbers(8 if name != "llama" else 16)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_add(-1, torch.tensor(rows), shift.expand(*output.shape[:-1], -1))

    handle = model.get_submodule(path).register_forward_hook(hook)
    expected = model(**inputs_of(name)).logits
    handle.remove()
    with patched(model, Edit("q", "add", shift, layers=[1], heads=[2])):
        assert torch.equal(model(**inputs_of(name)).logits, expected)
    assert not torch.equal(model(**inputs_of(name)).logits, expected)


@pytest.mark.parametrize("name", list(Q_ROWS))
def test_heads_alone_are_what_they_are_among_all(name: str) -> None:
    """Only the channels of the heads that a cut concerns are read and written, unless others are cut or watched there, too."""
    model, values = FAMILIES[name].build(), numbers(2, 8 if name != "llama" else 16)
    together = Edit("q", "add", values, heads=[3, 1])
    one_by_one = [Edit("q", "add", value, heads=[head]) for head, value in zip((3, 1), values, strict=True)]
    uncut, found = model(**inputs_of(name)).logits, []
    for spec in (together, one_by_one, [together, Edit("q", "identity", heads=[0])]):
        with patched(model, spec):
            found.append(model(**inputs_of(name)).logits)
    with patched(model, together), capture(model, "q"):
        found.append(model(**inputs_of(name)).logits)
    assert all(torch.equal(other, found[0]) for other in found[1:]) and not torch.equal(found[0], uncut)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "bert", "t5", "opt"])
def test_result_is_what_a_head_adds(name: str) -> None:
    """result to zero is z to zero, and a vector added to one head's result is added to the module's output."""
    layer = "decoder.cross.1" if name == "t5" else 1
    model, shift = model_of(name, "eager"), numbers(32)
    [zero_result] = [outcome(patch_model(model, Edit("result", "zero", layers=[layer], heads=[1, 2])), name, PADDING, False)]
    assert_close(
        zero_result, outcome(patch_model(model, Edit("z", "zero", layers=[layer], heads=[1, 2])), name, PADDING, False)
    )
    one = outcome(patch_model(model, Edit("result", "add", shift, layers=[layer], heads=[3])), name, PADDING, False)
    other = outcome(patch_model(model, Edit("result", "add", shift / 2, layers=[layer], heads=[0, 1])), name, PADDING, False)
    assert_close(one, other)
    half_zero = Edit("result", half, layers=[layer], heads=[1])
    assert_close(
        outcome(patch_model(model, half_zero), name, PADDING, False),
        outcome(patch_model(model, Edit("z", "scale", 0.5, layers=[layer], heads=[1])), name, PADDING, False),
    )


# -- noise, and another row of the batch: by their properties --------------------------------------------------------------


def seen(name: str, spec: Any, site: str, layer: int = 0, **inputs: Any) -> Tensor:
    """The tensor at a site after the cuts there."""
    model = patch_model(model_of(name, "eager"), spec)
    with capture(model, site, layers=[layer], heads=range(HEADS)) as run, torch.no_grad():
        model(**(inputs or FAMILIES[name].inputs(padding=0, length=40)))
    return run[layer, site]


@pytest.mark.parametrize("site", ["rot_q", "rot_k", "v", "z"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_noise_has_the_mean_and_spread_that_it_should(name: str, site: str) -> None:
    original = seen(name, None, site)
    d = original.shape[-1]
    plain = seen(name, Edit(site, "noise", value=(0.0, 1.0), seed=3), site)
    assert torch.equal(plain[0], plain[1]), "noise belongs to a position, not to a row of the batch"
    n = plain[0].numel()
    # Five standard errors.
    assert abs(plain[0].mean()) < 5 / n**0.5
    assert abs(plain[0].std() - 1) < 5 / (2 * n) ** 0.5
    assert 0.6 < (plain[0].abs() < 1).double().mean() < 0.76  # 0.683 for a normal distribution

    def expect(edit: Edit, mean: Any, spread: Any) -> None:
        torch.testing.assert_close(seen(name, edit, site), mean + spread * plain, atol=1e-5, rtol=1e-5)

    expect(Edit(site, "noise", value=(2.0, 0.5), seed=3), 2.0, 0.5)
    # Per vector: that of the activation which it replaces, here of other rows with other vectors.
    expect(Edit(site, "noise", seed=3), original.mean(-1, keepdim=True), original.std(-1, keepdim=True, correction=0))
    mean, spread = numbers(HEADS, d), numbers(HEADS, d).abs()
    entry = Reference("mean", {(ANY, site): Entry(mean, spread)})
    expect(Edit(site, "noise", reference=entry, seed=3), mean[:, None], spread[:, None])
    by_position = Reference("mean", {(ANY, site): Entry(numbers(HEADS, 40, d), numbers(HEADS, 40, d).abs())})
    expect(Edit(site, "noise", reference=by_position, seed=3), numbers(HEADS, 40, d), numbers(HEADS, 40, d).abs())


@pytest.mark.parametrize("site", ["scores", "pattern"])
def test_noise_on_the_matrix_stays_within_the_mask(site: str) -> None:
    inputs = FAMILIES["llama"].inputs()
    original, noisy = (seen("llama", spec, site, **inputs) for spec in (None, Edit(site, "noise", seed=1)))
    allowed = torch.tril(torch.ones(LENGTH, LENGTH)).bool() & inputs["attention_mask"].bool()[:, None, None, :]
    allowed = allowed.expand_as(original)
    assert torch.equal(original[~allowed], noisy[~allowed])
    several = allowed & (allowed.sum(dim=-1, keepdim=True) > 1)
    assert (original[several] != noisy[several]).all()
    # The spread is that of each row's allowed entries, and not of the mask's huge numbers.
    assert noisy[allowed].abs().max() < 20 * original[allowed].abs().max()
    # The last row sees the same noise whatever came in the first row of the batch.
    plain = seen("llama", Edit(site, "noise", value=(0.0, 1.0)), site, **inputs)
    assert torch.equal(plain[0, :, -1, PADDING:], plain[1, :, -1, PADDING:])


def test_noise_depends_on_seed_layer_head_site_and_position_alone() -> None:
    def noise(site: str = "z", layer: int = 0, length: int = 40, batch: int = 2, **more: Any) -> Tensor:
        inputs = FAMILIES["llama"].inputs(batch, length, padding=0, seed=more.pop("inputs", 0))
        return seen("llama", Edit(site, "noise", value=(0.0, 1.0), **more), site, layer, **inputs)[0]

    one = noise()
    assert torch.equal(one, noise())
    assert torch.equal(one, noise(inputs=1))
    assert torch.equal(one, noise(batch=5))
    assert torch.equal(one[:, :7], noise(length=7))
    assert torch.equal(one[1], noise(heads=[1])[1]), "a head's noise does not depend on which others are cut"
    different = [one, noise(seed=1), noise(layer=1), noise(site="v"), one.roll(1, 0), one.roll(1, 1), one.roll(1, 2)]
    rows = torch.stack([x.flatten() for x in different])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / rows.shape[1] ** 0.5


def test_noise_of_shared_heads_is_that_of_the_kv_head() -> None:
    for site in ("rot_k", "v"):
        isolated, shared = (
            seen("llama", Edit(site, "noise", value=(0, 1), gqa=gqa), site)[0] for gqa in ("isolated", "shared")
        )
        assert torch.equal(shared[0], shared[1])
        assert torch.equal(shared[2], shared[3])
        assert not torch.equal(shared[1], shared[2])
        assert not torch.equal(isolated[0], isolated[1])


@pytest.mark.parametrize("run", ["eager-auto", "sdpa-auto", "eager-eager"])
@pytest.mark.parametrize("site", ["rot_q", "rot_k", "v", "z", "scores", "pattern"])
def test_noise_is_the_same_at_every_decoding_step(site: str, run: str) -> None:
    implementation, kernel = RUNS[run]
    edit = Edit(site, "noise", value=(0.5, 0.1), heads=[0, 3], seed=7)
    model, inputs = patch_model(model_of("llama", implementation), edit, kernel=kernel), FAMILIES["llama"].inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with capture(model, site, layers=[0], heads=[0, 3]) as whole, torch.no_grad():
        model(**inputs)
    cache = DynamicCache(config=model.config)
    with capture(model, site, layers=[0], heads=[0, 3]) as stepwise, torch.no_grad():
        for step in range(LENGTH):
            model(ids[:, step : step + 1], attention_mask=mask[:, : step + 1], **{CACHE: cache})
    full = whole[0, site]
    for step, tensor in enumerate(stepwise.steps(0, site)):
        if site in ("rot_k", "v"):
            expected = full[:, :, : step + 1]
        elif site in ("rot_q", "z"):
            expected = full[:, :, step : step + 1]
        else:
            expected, tensor = full[1:, :, step : step + 1, : step + 1], tensor[1:]  # padding rows differ, in any kernel
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("site", ["rot_q", "rot_k", "v", "z", "scores", "pattern"])
def test_resampling_gives_every_row_another_row(site: str) -> None:
    inputs = FAMILIES["llama"].inputs(batch=5, padding=0)
    original = seen("llama", None, site, **inputs)
    orders = set()
    for seed in range(8):
        new = seen("llama", Edit(site, "resample", seed=seed), site, **inputs)
        assert torch.equal(new, seen("llama", Edit(site, "resample", seed=seed), site, **inputs))
        order = tuple(next(j for j in range(5) if torch.equal(new[i], original[j])) for i in range(5))
        assert sorted(order) == list(range(5)), "every row is used once"
        assert all(i != j for i, j in enumerate(order)), "no row stays"
        orders.add(order)
    assert len(orders) > 1, "the seed matters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "llama", "phi3"])
def test_no_results_are_no_output_also_before_a_norm(name: str, dtype: torch.dtype) -> None:
    """A norm behind the output projection would blow up what rounding leaves of terms that cancel."""
    model, inputs = FAMILIES[name].build("eager", dtype), FAMILIES[name].inputs()
    found = []
    for site in ("z", "result"):
        with patched(model, Edit(site, "zero")), torch.no_grad():
            found.append(model(**inputs).logits)
    assert torch.equal(*found)


def test_values_need_not_reach_beyond_what_is_cut() -> None:
    """The pattern of nine tokens put into the first nine rows of twelve, whole and token by token."""
    model, ids = FAMILIES["llama"].build(), FAMILIES["llama"].inputs(length=12, padding=0)["input_ids"]
    with torch.no_grad(), capture(model, "pattern") as run:
        plain = model(ids[:, :9]).logits
    cut = Edit("pattern", "activation", reference=run, positions=range(9))
    with torch.no_grad():
        before = model(ids).logits
        with patched(model, cut):
            # Products over more keys, whose entries are 0.
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model(ids).logits[:, :9], plain, rtol=1e-4, atol=1e-4)
            assert model.generate(ids[:, :9], max_new_tokens=3, do_sample=False).shape == (2, 12)
        with (
            patched(model, Edit("pattern", "activation", reference=run)),
            pytest.raises(SpecError, match="used at position 11"),
        ):
            model(ids)
    matrix = torch.full((5, 5), 0.5, requires_grad=True)
    with patched(model, Edit("scores", "scale", matrix, positions=range(5))):
        model(ids).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("site", ["v", "pattern"])
def test_watching_another_site_does_not_move_a_cut(site: str) -> None:
    model, inputs = FAMILIES["llama"].build("sdpa"), FAMILIES["llama"].inputs()
    patch_model(model, Edit(site, "zero", heads=[1]))
    with torch.no_grad():
        expected = model(**inputs).logits
        with capture(model, ["rot_q", "z"]):
            assert torch.equal(model(**inputs).logits, expected)
        with capture(model, site) as run:
            model(**inputs)
    assert bool((run[0, site][:, 1] == 0).all()), "where it is watched, it is seen"


def test_a_number_of_the_module_that_changes_later_counts() -> None:
    """MPT reads its scale when it computes; the reconstruction, too."""
    model, inputs = FAMILIES["mpt"].build(), FAMILIES["mpt"].inputs()
    patch_model(model, Edit("scores", "scale", 1.0))
    for module in model.modules():
        if hasattr(module, "softmax_scale"):
            module.softmax_scale *= 2
    with torch.no_grad():
        found = model(**inputs).logits
        unpatch_model(model)
        assert torch.equal(found, model(**inputs).logits)
