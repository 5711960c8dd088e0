"""Bad input: each mistake is one clear message, all mistakes of a spec come together, and the model is left as it was."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from cached import CACHE
from families import FAMILIES, KV_HEADS
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from surgery import (
    CacheError,
    Edit,
    Freeze,
    NoMatchError,
    PatchError,
    Reference,
    Spec,
    SpecError,
    SurgeryError,
    UnsupportedArchitectureError,
    capture,
    collect_reference,
    freeze_ov_circuit,
    freeze_qk_circuit,
    inspect_model,
    patch_model,
    patched,
    self_test,
    unpatch_model,
    weights,
)
from surgery.errors import describe, listing
from surgery.reference import Entry


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def state(model: nn.Module) -> list[Any]:
    """Everything that patching could touch: classes, attributes by identity, tensors, hooks, modes."""
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        attributes = {name: id(value) for name, value in module.__dict__.items() if name != "_surgery"}
        parts = [{n: id(v) for n, v in getattr(module, kind).items()} for kind in ("_parameters", "_buffers", "_modules")]
        surgery = module.__dict__.get("_surgery")
        found.append((path, type(module), attributes, parts, None if surgery is None else id(surgery)))
    return found


@contextmanager
def untouched(model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Fails unless the model is afterwards what it was before, and computes the same."""
    before, expected = state(model), logits(model, inputs)
    yield
    assert state(model) == before
    assert torch.equal(logits(model, inputs), expected)


def has_four_parts(line: str) -> bool:
    """<what and where>: found <what>; expected <what>. <what to do>."""
    return re.fullmatch(r"(?s)(\s*\d+\. )?[^;]*\S+.*: found \S.*; expected \S.*\. \S.*[.!)\"]", line) is not None


def check_message(message: str) -> None:
    """All lines of a message have the four parts; a list of problems has as many lines as it says."""
    if (several := re.match(r"[^\n]*: (\d+) problems\n", message)) is None:
        assert has_four_parts(message), message
        return
    lines = [line for line in message.splitlines()[1:] if re.match(r"  \d+\. ", line)]
    assert len(lines) == int(several.group(1)), message
    for line in lines:
        assert has_four_parts(line), line


def test_the_checks_can_fail() -> None:
    assert has_four_parts(describe("patch_model", "this", "that", "Do it."))
    assert not has_four_parts("patch_model: no such layer")
    assert not has_four_parts(describe("patch_model", "this", "that", ""))
    assert not has_four_parts(describe("patch_model", "", "that", "Do it."))
    check_message(listing("a", [describe("b", "c", "d", "E."), describe("b", "c", "d", "E.")]))
    with pytest.raises(AssertionError):
        check_message(listing("a", [describe("b", "c", "d", "E."), "something"]))
    model, inputs = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].inputs()
    with pytest.raises(AssertionError), untouched(model, inputs):
        patch_model(model)
    unpatch_model(model)
    with pytest.raises(AssertionError), untouched(model, inputs):
        model.transformer.h[0].attn.left_behind = 3
    with pytest.raises(AssertionError), untouched(model, inputs), torch.no_grad():
        model.lm_head.weight.mul_(2)


# -- specs that do not fit the model ------------------------------------------------------------------------------------

HEAD_WIDTH = 16  # llama's d_head here; four heads over two kv heads


def of_llama(model: nn.Module, sites: Any = "z", **options: Any) -> Reference:
    return collect_reference(model, [FAMILIES["llama"].inputs()], sites, progress=False, **options)


def of_qwen(model: nn.Module) -> Reference:
    other = FAMILIES["qwen2"]
    return collect_reference(other.build(), [other.inputs()], "z", progress=False)


def run_of(model: nn.Module, sites: Any = "z", **options: Any) -> Any:
    with torch.no_grad(), capture(model, sites, **options) as run:
        model(**FAMILIES["llama"].inputs())
    return run


CASES: dict[str, tuple[Callable[[Any], Any], type[SurgeryError], list[str]]] = {
    "layer": (lambda m: Freeze("qk", layers=[7]), NoMatchError, [r"cut 0.*layers: found 7; expected self\.0 to self\.1\."]),
    "layers": (lambda m: Freeze("qk", layers=[0, 5, 9]), NoMatchError, [r"layers: found 5, 9; expected self\.0 to self\.1"]),
    "address": (lambda m: Freeze("qk", layers="self.7"), NoMatchError, [r"found 'self\.7'"]),
    "wildcard": (lambda m: Freeze("qk", layers="cross.*"), NoMatchError, [r"found 'cross\.\*'"]),
    "encoder": (
        lambda m: Freeze("qk", layers="encoder.self.0"),
        NoMatchError,
        [r"found 'encoder\.self\.0'; expected self\.0 to"],
    ),
    "head": (
        lambda m: Freeze("qk", layers=[1], heads=[1, 4, 6]),
        SpecError,
        [r"cut 0 at self\.1 \('model\.layers\.1\.self_attn'\): found heads \[4, 6\]; expected heads 0 to 3\. Heads"],
    ),
    "reference of too few heads": (
        lambda m: Freeze("ov", to="mean", layers=[0], reference=torch.zeros(3, HEAD_WIDTH)),
        SpecError,
        [r"self\.0.*found a reference of shape \(3, 16\); expected \(4, 16\) or \(4, position, 16\)\. Collect it on this"],
    ),
    "reference of another width": (
        lambda m: Freeze("ov", to="mean", layers=[0], reference=torch.zeros(4, 5, 15)),
        SpecError,
        [r"found a reference of shape \(4, 5, 15\); expected \(4, 16\) or \(4, position, 16\)"],
    ),
    "activation of too few heads": (
        lambda m: Freeze("ov", to=torch.zeros(1, 2, 3, HEAD_WIDTH), layers=[0]),
        SpecError,
        [r"found a reference of shape \(1, 2, 3, 16\); expected \(batch, 4, position, 16\)"],
    ),
    "reference of kv heads": (
        lambda m: Edit("k", "mean", layers=[0], reference=torch.zeros(4, HEAD_WIDTH)),
        SpecError,
        [r"found a reference of shape \(4, 16\); expected \(2, 16\) or \(2, position, 16\)"],
    ),
    "reference without the site": (
        lambda m: Freeze("qk", to="mean", layers=[0], reference=of_llama(m)),
        SpecError,
        [r"found a reference with self\.0 z; expected self\.0 rot_q\.", r"expected self\.0 rot_k\."],
    ),
    "reference without the layer": (
        lambda m: Freeze("ov", to="mean", reference=of_llama(m, layers=[0])),
        SpecError,
        [r"cut 0 at self\.1 .*found a reference.*expected self\.1 z\. Collect"],
    ),
    "reference without the heads": (
        lambda m: Freeze("ov", [0], [1, 2], to=run_of(m, heads=[0, 1])),
        SpecError,
        [r"found a reference of heads \[0, 1\]; expected also heads \[2\]\."],
    ),
    "reference of another model": (
        lambda m: Freeze("ov", to="mean", layers=[0], reference=of_qwen(m)),
        SpecError,
        [r"found a reference of 2 × self Qwen2Attention.*; expected 2 × self LlamaAttention.*Collect it on this model"],
    ),
    "reference without a spread": (
        lambda m: Freeze("ov", to="noise", layers=[0], reference=torch.zeros(4, HEAD_WIDTH)),
        SpecError,
        [r"found a reference without a spread; expected mean and spread"],
    ),
    "reference on meta": (
        lambda m: Freeze("ov", to="mean", layers=[0], reference=torch.zeros(4, HEAD_WIDTH, device="meta")),
        SpecError,
        [r"cut 0 .*found a tensor on the meta device; expected a tensor with data"],
    ),
    "value of another width": (
        lambda m: Edit("z", "add", torch.zeros(5), layers=[0]),
        SpecError,
        [r"found a value of shape \(5,\); expected \(16,\), \(4, 16\), .*\(batch, 4, position, 16\)\. Resh"],
    ),
    "value of other heads": (
        lambda m: Edit("z", "value", torch.zeros(3, HEAD_WIDTH), layers=[0], heads=[0, 1]),
        SpecError,
        [r"found a value of shape \(3, 16\); expected \(16,\), \(2, 16\)"],
    ),
    "value at result": (
        lambda m: Edit("result", "value", torch.zeros(HEAD_WIDTH), layers=[0]),
        SpecError,
        [r"found a value of shape \(16,\); expected \(32,\), \(4, 32\)"],
    ),
    "value with five axes": (
        lambda m: Edit("z", "value", torch.zeros(1, 1, 1, 1, 1), layers=[0]),
        SpecError,
        [r"a value of shape"],
    ),
    "value on meta": (
        lambda m: Edit("z", "value", torch.zeros(HEAD_WIDTH, device="meta")),
        SpecError,
        [r"found a tensor on the meta device"],
    ),
    "half a group at k": (
        lambda m: Edit("k", "zero", layers=[0], heads=[0, 2, 3]),
        SpecError,
        [r"heads \[0, 2, 3\] at k, which groups of 2 heads share; expected whole groups.*\"rot_k\".*gqa=\"shared\""],
    ),
}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request: Any) -> Any:
    return FAMILIES["llama"].build(request.param)


@pytest.mark.parametrize("case", CASES)
def test_a_spec_that_does_not_fit(llama: Any, case: str) -> None:
    make, kind, patterns = CASES[case]
    inputs = FAMILIES["llama"].inputs()
    spec = make(llama)
    with untouched(llama, inputs):
        for call in (lambda: patch_model(llama, spec), lambda: patched(llama, spec).__enter__()):
            with pytest.raises(kind) as caught:
                call()
            message = str(caught.value)
            assert "LlamaForCausalLM" in message
            check_message(message.removeprefix("the spec does not fit LlamaForCausalLM: "))
            for pattern in patterns:
                assert re.search(rf"(?s){pattern}", message), message


@pytest.mark.parametrize("case", CASES)
def test_a_patched_model_keeps_its_cuts(llama: Any, case: str) -> None:
    make, kind, _ = CASES[case]
    spec, inputs = make(llama), FAMILIES["llama"].inputs()
    cuts = Spec([Freeze("qk", [0], [1]), Edit("q", "scale", 0.5, layers=[1])])
    with patched(llama, cuts), untouched(llama, inputs):
        with pytest.raises(kind):
            patch_model(llama, spec)
        with pytest.raises(kind), patched(llama, spec):
            raise AssertionError("never reached")
        assert "q scale" in inspect_model(llama)["self.1"].cuts


def test_all_problems_of_a_spec_are_listed_together(llama: Any) -> None:
    spec = Spec(
        [
            Freeze("qk", heads=[7]),
            Freeze("ov", layers=[0]),
            Freeze("ov", layers=["encoder.self.0", 5]),
            Edit("z", "value", torch.zeros(5), layers=[0]),
            Freeze("ov", to="mean", layers=[1], reference=torch.zeros(3, HEAD_WIDTH)),
        ]
    )
    with untouched(llama, FAMILIES["llama"].inputs()), pytest.raises(SpecError) as caught:
        patch_model(llama, spec)
    message = str(caught.value)
    check_message(message)
    assert message.startswith("the spec does not fit LlamaForCausalLM: 4 problems\n")
    assert [int(n) for n in re.findall(r"cut (\d)", message)] == [2, 0, 3, 4]


def test_no_match_is_a_spec_mistake_only_where_something_else_is_wrong(llama: Any) -> None:
    with pytest.raises(NoMatchError):
        patch_model(llama, Freeze("qk", layers=[5]))
    with pytest.raises(SpecError):
        patch_model(llama, [Freeze("qk", layers=[5]), Freeze("qk", heads=[5])])
    for kind in (NoMatchError, SpecError):
        assert issubclass(kind, ValueError) and issubclass(kind, SurgeryError)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_ranges_of_two_stacks_are_named(name: str) -> None:
    model = FAMILIES[name].build()
    pattern = (
        r"encoder\.self\.0 to encoder\.self\.1, decoder\.self\.0 to decoder\.self\.1, decoder\.cross\.0 to decoder\.cross\.1"
    )
    with untouched(model, FAMILIES[name].inputs()), pytest.raises(NoMatchError, match=pattern):
        patch_model(model, Freeze("qk", layers="self.0"))


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ({"cuts": []}, r"spec: found a dict; expected a Spec\. Read it with Spec\.load"),
        ("qk", r"spec: found a str; expected a Spec"),
        ([3], r"found entries of type int; expected Freeze or Edit"),
        (3, r"found entries of type int; expected Freeze or Edit"),
    ],
)
def test_what_is_no_spec(llama: Any, spec: Any, pattern: str) -> None:
    with untouched(llama, FAMILIES["llama"].inputs()), pytest.raises(SpecError, match=pattern):
        patch_model(llama, spec)


def test_what_is_no_kernel(llama: Any) -> None:
    with (
        untouched(llama, FAMILIES["llama"].inputs()),
        pytest.raises(SpecError, match=r"kernel='flash'; expected 'auto', 'eager'"),
    ):
        patch_model(llama, kernel="flash")  # type: ignore[arg-type]


@pytest.mark.parametrize("freeze", [freeze_qk_circuit, freeze_ov_circuit])
def test_the_short_forms_check_as_well(llama: Any, freeze: Any) -> None:
    with untouched(llama, FAMILIES["llama"].inputs()):
        nan = torch.full((4, HEAD_WIDTH), torch.nan)
        for options in (
            {"layers": [9]},
            {"heads": [9]},
            {"heads": []},
            {"to": "nothing"},
            {"strength": 2},
            {"to": "mean", "reference": nan},
            {"to": "activation"},
        ):
            with pytest.raises(ValueError, match="found") as caught:
                freeze(llama, **options)
            assert isinstance(caught.value, SurgeryError)


# -- sites that a family does not have ----------------------------------------------------------------------------------


def test_a_site_that_cannot_be_derived() -> None:
    family = FAMILIES["deepseek_v3"]
    model = family.build()
    with untouched(model, family.inputs()):
        pattern = r"site 'k': k is joined from the projections .*; expected a site that exists\. Use site 'rot_k'"
        with pytest.raises(SpecError, match=pattern):
            patch_model(model, Edit("k", "zero"))
        with pytest.raises(SpecError, match=pattern), capture(model, ["z", "k"]):
            raise AssertionError("never reached")


# -- shared modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gqa", ["isolated", "shared"])
@pytest.mark.parametrize("layers", [[0], [1], ["self.0"], "self.1"], ids=str)
def test_one_layer_of_a_shared_module(gqa: str, layers: Any) -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    inputs["use_cache"] = False
    with untouched(model, inputs):
        with pytest.raises(SpecError) as caught:
            patch_model(model, Freeze("ov", layers, gqa=gqa))
        missing = "self.1" if "0" in str(layers) else "self.0"
        pattern = (
            rf"'model\.layers\.0\.self_attn' that the layers self\.0, self\.1 share; expected all.*; {missing} is not selected"
        )
        assert re.search(pattern, str(caught.value))
        assert "Cut all layers that share it" in str(caught.value)
    before = logits(model, inputs)
    for layers in ("all", [0, 1], "self.*"):
        with patched(model, Freeze("ov", layers, gqa=gqa)):
            assert not torch.equal(logits(model, inputs), before)
    assert inspect_model(model).rows[0].address == "self.0, self.1"


# -- models without data ------------------------------------------------------------------------------------------------


def on_meta(name: str = "llama") -> Any:
    with torch.device("meta"):
        config = getattr(transformers, FAMILIES[name].config)(**FAMILIES[name].options)
        return getattr(transformers, FAMILIES[name].architecture)(config)


def test_values_for_a_model_without_data() -> None:
    model = on_meta()
    before = state(model)
    for cut in (
        Edit("z", "value", torch.zeros(HEAD_WIDTH)),
        Edit("z", "add", torch.zeros(HEAD_WIDTH)),
        Freeze("ov", to="mean", reference=torch.zeros(4, HEAD_WIDTH)),
        Freeze("ov", to=torch.zeros(1, 4, 3, HEAD_WIDTH)),
    ):
        with pytest.raises(SpecError, match=r"found a model on the meta device; expected a model with data\. Load") as caught:
            patch_model(model, cut)
        assert "cut 0" in str(caught.value)
        assert state(model) == before


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "bert", "deepseek_v3"])
@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_cuts_without_values_patch_a_model_without_data(name: str, kernel: Any) -> None:
    model = on_meta(name)
    before = [type(module) for module in model.modules()]
    cuts = [
        Freeze("qk"),
        Freeze("ov", to="noise"),
        Freeze("ov", to="identity"),
        Edit("pattern", "uniform"),
        Edit("z", "scale", 2),
    ]
    assert patch_model(model, cuts, kernel=kernel) is model
    assert all("pattern uniform" in row.cuts for row in inspect_model(model))
    if name in ("llama", "bert"):  # other models look into their inputs
        inputs = {n: x.to("meta") for n, x in FAMILIES[name].inputs(padding=0).items() if n != "attention_mask"}
        assert model(**inputs).logits.is_meta
    unpatch_model(model)
    assert [type(module) for module in model.modules()] == before


# -- caches -------------------------------------------------------------------------------------------------------------

NO_CUTS, A, B = Spec(), Spec(Freeze("qk", [1], [0])), Spec(Freeze("qk", [0], [0]))


def new_cache(model: Any, kind: str = "dynamic") -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=12)
    return DynamicCache(config=model.config)


def step(model: Any, cache: Any, tokens: slice) -> Tensor:
    ids = FAMILIES["llama"].inputs(padding=0)["input_ids"]
    with torch.no_grad():
        return model(ids[:, tokens], **{CACHE: cache}, use_cache=True).logits


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (None, A, "under no cuts"),
        (NO_CUTS, A, "under no cuts"),
        (A, B, "under another spec"),
        (A, NO_CUTS, "under another spec"),
        (A, A + B, "under another spec"),
        (A + B, B + A, "under another spec"),
    ],
    ids=["uncut to A", "empty to A", "A to B", "A to empty", "A to A and B", "another order"],
)
def test_a_cache_of_another_spec(llama: Any, first: Any, second: Spec, words: str, kind: str) -> None:
    cache = new_cache(llama, kind)
    if first is None:
        step(llama, cache, slice(0, 5))
    else:
        with patched(llama, first):
            step(llama, cache, slice(0, 5))
    with untouched(llama, FAMILIES["llama"].inputs()), patched(llama, second):
        pattern = rf"'model\.layers\.0\.self_attn': found a KV cache of 5 positions filled {words}; expected a cache.*Start"
        with pytest.raises(CacheError, match=pattern) as caught:
            step(llama, cache, slice(5, 9))
        check_message(str(caught.value))
        assert int(cache.get_seq_length()) == 5, "the cache is as it was"
        step(llama, new_cache(llama, kind), slice(0, 9))  # the model goes on with another one


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(None, NO_CUTS), (NO_CUTS, None), (A, A), (A, Spec(list(A))), (A, Spec.from_json(A.to_json()))],
    ids=["uncut to empty", "empty to uncut", "the same", "an equal one", "one that was read"],
)
def test_a_cache_of_the_same_cuts_goes_on(llama: Any, first: Any, second: Any, kind: str) -> None:
    cache = new_cache(llama, kind)
    for spec, tokens in ((first, slice(0, 5)), (second, slice(5, 9))):
        if spec is None:
            step(llama, cache, tokens)
        else:
            with patched(llama, spec):
                step(llama, cache, tokens)
    assert int(cache.get_seq_length()) == 9


def test_an_emptied_cache_is_like_a_new_one(llama: Any) -> None:
    cache = new_cache(llama, "static")
    with patched(llama, A):
        step(llama, cache, slice(0, 5))
    cache.reset()
    with patched(llama, B):
        again, fresh = step(llama, cache, slice(0, 5)), step(llama, new_cache(llama, "static"), slice(0, 5))
    assert torch.equal(again, fresh)


def test_the_two_caches_of_an_encoder_decoder() -> None:
    family = FAMILIES["bart"]
    model, inputs = family.build(), family.inputs()
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    with torch.no_grad():
        first = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, :3]}
        model(**first, **{CACHE: cache}, use_cache=True)
        with patched(model, Freeze("ov", "decoder.cross.1")), pytest.raises(CacheError, match="under no cuts"):
            model(**{**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, 3:], CACHE: cache})


# -- what goes wrong while the model runs -------------------------------------------------------------------------------


def bad(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def my_cut(x: Tensor) -> Any:
        return change(x)

    return my_cut


RUN_TIME: dict[str, tuple[Any, type[Exception], str]] = {
    "wrong shape": (
        Edit("z", bad(lambda x: x[:1]), layers=[1]),
        SpecError,
        r"cut 0: callable my_cut at self\.1 z: found shape \(1, 4, 9, 16\), torch\.float32, cpu; expected shape \(2, 4",
    ),
    "wrong dtype": (
        Edit("z", bad(lambda x: x.double())),
        SpecError,
        r"found shape .* torch\.float64, cpu; expected .* torch\.float32, cpu\. Return a tensor like",
    ),
    "wrong device": (
        Edit("z", bad(lambda x: x.to("meta"))),
        SpecError,
        r"torch\.float32, meta; expected .* torch\.float32, cpu",
    ),
    "no tensor": (
        Edit("pattern", bad(lambda x: None)),
        SpecError,
        r"callable my_cut at self\.0 pattern: found a NoneType; expected",
    ),
    "a list": (
        Edit("q", bad(lambda x: [x])),
        SpecError,
        r"callable my_cut at self\.0 q: found a list; expected shape \(2, 4, 9, 16\)",
    ),
    "at result": (Edit("result", bad(lambda x: x[..., :1])), SpecError, r"self\.0 result: found shape \(2, 4, 9, 1\)"),
    "at k": (
        Edit("k", bad(lambda x: x[:, :1])),
        SpecError,
        rf"self\.0 k: found shape \(2, 1, 9, 16\).*\(2, {KV_HEADS}, 9, 16\)",
    ),
    "an error of its own": (Edit("z", bad(lambda x: 1 / 0)), ZeroDivisionError, "division"),
    "an error in the last layer": (Edit("z", bad(lambda x: 1 / 0), layers=[1]), ZeroDivisionError, "division"),
    "another batch": (
        Edit("z", "activation", reference=torch.zeros(3, 4, 9, HEAD_WIDTH)),
        SpecError,
        r"shape \(3, 4, 9, 16\); expected batch 2 \(or 1\) and width 16\. Give values",
    ),
    "another length": (
        Edit("z", "activation", reference=torch.zeros(2, 4, 6, HEAD_WIDTH)),
        SpecError,
        r"cut 0 at self\.0 z: found values for 6 positions, used at position 8; expected a value for every position",
    ),
    "values of another batch": (
        Edit("z", "add", torch.zeros(3, 4, 1, HEAD_WIDTH)),
        SpecError,
        r"shape \(3, 4, 1, 16\); expected batch 2 \(or 1\) and width 16\. Give values",
    ),
    "another length of means": (
        Freeze("ov", to="mean", reference=torch.zeros(4, 6, HEAD_WIDTH)),
        SpecError,
        r"found values for 6 positions, used at position 8",
    ),
    "another length of a pattern": (Edit("scores", "add", torch.zeros(9, 6)), SpecError, r"self\.0 scores: found values for 6"),
}


@pytest.mark.parametrize("case", RUN_TIME)
def test_an_error_while_running_leaves_the_model_usable(llama: Any, case: str) -> None:
    cut, kind, pattern = RUN_TIME[case]
    inputs = FAMILIES["llama"].inputs()
    with untouched(llama, inputs):
        patch_model(llama, cut)
        before = state(llama)
        for _ in range(2):
            with pytest.raises(kind, match=rf"(?s){pattern}") as caught:
                logits(llama, inputs)
        if kind is SpecError:
            check_message(str(caught.value))
        assert state(llama) == before, "the cut is still there"
        patch_model(llama, Freeze("ov"))
        cut_logits = logits(llama, inputs)
        unpatch_model(llama)
        with patched(llama, Freeze("ov")):
            assert torch.equal(logits(llama, inputs), cut_logits)


def test_resampling_one_row(llama: Any) -> None:
    inputs = {n: x[:1] for n, x in FAMILIES["llama"].inputs().items()}
    with untouched(llama, inputs), patched(llama, Freeze("ov", to="resample")):
        with pytest.raises(
            SpecError, match=r"self\.0 z: found a batch of 1 row; expected at least 2 rows.*larger batch"
        ) as caught:
            logits(llama, inputs)
        check_message(str(caught.value))
        assert logits(llama, FAMILIES["llama"].inputs()).isfinite().all()


def test_the_current_mean_while_decoding(llama: Any) -> None:
    ids = FAMILIES["llama"].inputs(padding=0)["input_ids"]
    with untouched(llama, FAMILIES["llama"].inputs()), patched(llama, Freeze("ov", to="mean")):
        with pytest.raises(CacheError, match=r"mean of the current activations: found a KV cache of 9 positions") as caught:
            llama.generate(ids, max_new_tokens=3, do_sample=False)
        check_message(str(caught.value))
        llama.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)


def test_an_error_while_running_is_not_taken_for_a_cut_that_never_runs(llama: Any) -> None:
    """Warnings are errors in these tests: the later layers of an interrupted forward must not be reported as skipped."""
    inputs = FAMILIES["llama"].inputs()
    fail = {"now": True}

    def sometimes(x: Tensor) -> Tensor:
        if fail["now"]:
            raise KeyError("now")
        return x

    patch_model(llama, [Edit("z", sometimes, layers=[0]), Freeze("ov", [1])])
    for now in (True, True, False, True, False, False):
        fail["now"] = now
        if now:
            with pytest.raises(KeyError):
                logits(llama, inputs)
        else:
            logits(llama, inputs)
    patch_model(llama, [Edit("z", sometimes, layers=[0]), Freeze("ov", [1])])
    fail["now"] = True
    with pytest.raises(KeyError):
        logits(llama, inputs)
    unpatch_model(llama)


# -- modules that something else has patched ----------------------------------------------------------------------------


def foreign_forward(module: nn.Module) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    module.forward = types.MethodType(forward, module)


def test_a_forward_that_something_else_set() -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    for layer in (0, 1):
        foreign_forward(model.model.layers[layer].self_attn)
    with untouched(model, inputs):
        with pytest.raises(PatchError) as caught:
            patch_model(model, Freeze("ov"))
        check_message(str(caught.value))
        for layer in (0, 1):
            pattern = (
                rf"'model\.layers\.{layer}\.self_attn' \(LlamaAttention\): found a forward that something else set.*foreign_for"
            )
            assert re.search(pattern, str(caught.value)), "both are listed"
    for layer in (0, 1):
        del model.model.layers[layer].self_attn.forward
    with patched(model, Freeze("ov")):
        foreign_forward(model.model.layers[0].self_attn)
        with untouched(model, inputs), pytest.raises(PatchError, match="something else set"):
            patch_model(model, Freeze("qk"))
        del model.model.layers[0].self_attn.forward


@pytest.mark.parametrize("site", ["q", "k", "rot_q", "v", "pattern", "z", "result"])
@pytest.mark.parametrize("head", [0, 3])
def test_heads_that_became_fewer_after_patching_are_refused(site: str, head: int) -> None:
    """As where projections are split over processes later: head 0 would be another one there, and head 3 nothing."""
    cut = Edit(site, "scale", 0.5, heads=[head], gqa="shared" if site == "k" else "isolated")
    model, inputs = patch_model(FAMILIES["llama"].build(), cut), FAMILIES["llama"].inputs()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            whole = getattr(layer.self_attn, name)
            part = whole.weight.chunk(2, dim=1 if name == "o_proj" else 0)[0]
            half = nn.Linear(*reversed(part.shape), bias=False)
            half.weight.data = part.data
            setattr(layer.self_attn, name, half)
    with pytest.raises(SurgeryError, match="as when the model was patched") as caught:
        logits(model, inputs)
    check_message(str(caught.value))
    uncut = logits(unpatch_model(model), inputs)
    assert not torch.equal(logits(patch_model(model, Freeze("both", heads=[1])), inputs), uncut), "as the message says"


@pytest.mark.parametrize("layer", [0, 1])
def test_a_class_that_something_else_set(layer: int) -> None:
    """All or nothing: whichever module it is, none of the others is undone."""
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    plain = logits(model, inputs)
    patch_model(model, Freeze("ov"))
    attention = model.model.layers[layer].self_attn
    ours = type(attention)
    attention.__class__ = type("Foreign", (ours,), {})
    with untouched(model, inputs):
        for call in (lambda: patch_model(model, Freeze("qk")), lambda: unpatch_model(model)):
            pattern = (
                rf"'model\.layers\.{layer}\.self_attn' \(LlamaAttention\): found the class Foreign, which something else gave"
            )
            with pytest.raises(PatchError, match=pattern) as caught:
                call()
            check_message(str(caught.value))
    attention.__class__ = ours
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), plain)


class Inline(nn.Module):
    """An attention that nobody has described, and whose weighted sum is no product of matrices."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        pattern = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=-1)
        return (pattern[..., None] * self.value(x)[:, None]).sum(dim=2)


def test_an_unknown_attention_is_never_skipped_in_silence() -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    model.model.strange = nn.ModuleList([Inline(), Inline()])
    with untouched(model, inputs):
        with pytest.raises(UnsupportedArchitectureError) as caught:
            patch_model(model, Freeze("ov"))
        message = str(caught.value)
        assert "2 problems" in message and "strict=False" in message and "patches/" in message
        assert "'model.strange.0' (Inline)" in message and "'model.strange.1' (Inline)" in message
        assert isinstance(caught.value, NotImplementedError)
    plain = logits(model, inputs)
    with pytest.warns(UserWarning, match=r"leaves as they are: 2 problems"):
        patch_model(model, Freeze("ov"), strict=False)
    assert not torch.equal(logits(model, inputs), plain)
    assert type(model.model.strange[0]) is Inline
    patch_model(model, strict=False)
    assert torch.equal(logits(model, inputs), plain)
    unpatch_model(model)
    assert inspect_model(model).unsupported and "left as it is" in str(inspect_model(model))


def test_a_model_without_attention() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    for call in (patch_model, inspect_model):
        with pytest.raises(
            NoMatchError, match=r"Sequential: found no attention module; expected at least one\. Pass"
        ) as caught:
            call(model)
        check_message(str(caught.value))
    assert unpatch_model(model) is model


@pytest.mark.parametrize("thing", ["gpt2", None, {"model": 1}], ids=str)
def test_what_is_no_model(thing: Any) -> None:
    for call in (patch_model, unpatch_model, inspect_model, self_test, lambda x: patched(x).__enter__()):
        with pytest.raises(
            PatchError, match=r"model: found a (str|NoneType|dict); expected a torch\.nn\.Module\. Load it"
        ) as caught:
            call(thing)
        check_message(str(caught.value))


def test_unpatching_what_is_not_patched_does_nothing(llama: Any) -> None:
    with untouched(llama, FAMILIES["llama"].inputs()):
        assert unpatch_model(llama) is llama
        with pytest.raises(PatchError, match=r"self_test: found a model that is not patched; expected a patched model\. Call"):
            self_test(llama)


def test_references_of_an_equal_model_fit(llama: Any) -> None:
    reference = of_llama(FAMILIES["llama"].build(seed=3))
    with patched(llama, Freeze("ov", to="mean", reference=reference)):
        logits(llama, FAMILIES["llama"].inputs())
    with pytest.raises(SpecError, match="a reference of 1 × Another"):
        other = Reference("mean", {("self.0", "z"): Entry(torch.zeros(4, HEAD_WIDTH))}, "Another(self.0)")
        patch_model(llama, Freeze("ov", [0], to="mean", reference=other))


def test_an_error_of_a_callable_says_where_it_was_called(llama: Any) -> None:
    with patched(llama, Edit("z", lambda z, hook: z, layers=[1])), pytest.raises(TypeError, match="hook") as caught:
        logits(llama, FAMILIES["llama"].inputs())
    assert caught.value.__notes__ == ["in cut 0: callable <lambda> at self.1 z, given (2, 4, 9, 16)"]


@pytest.mark.parametrize(("name", "site", "layer"), [("llama", "z", 0), ("llama", "q", 1), ("bert", "result", 1)])
def test_a_callable_that_runs_its_own_model_is_refused(name: str, site: str, layer: int) -> None:
    """What is cut by position after it would otherwise count the positions of the inner forward."""
    model, given = FAMILIES[name].build(), FAMILIES[name].inputs()
    expected = logits(model, given)
    copied = copy.deepcopy(model)

    def runs(which: Any) -> Any:
        def edit(tensor: Tensor) -> Tensor:
            which(**given)
            return tensor

        return edit

    with patched(model, Edit(site, runs(model), layers=[layer])), pytest.raises(SurgeryError, match="runs the model") as caught:
        logits(model, given)
    check_message(str(caught.value))
    with patched(model, Edit(site, runs(copied), layers=[layer])), patched(copied, Edit(site, "scale", 0.5)):
        assert torch.equal(logits(model, given), expected)
    assert torch.equal(logits(model, given), expected)


def test_a_callable_that_changes_the_cuts_is_refused(llama: Any) -> None:
    def edit(tensor: Tensor) -> Tensor:
        patch_model(llama, Freeze("qk"))
        return tensor

    with (
        patched(llama, Edit("z", edit)),
        pytest.raises(PatchError, match=r"within cut 0 at self\.0 z") as caught,
    ):
        logits(llama, FAMILIES["llama"].inputs())
    check_message(str(caught.value))


def test_a_long_value_is_not_printed_whole() -> None:
    with pytest.raises(SpecError, match=r"found \[1.0, 1.0.*\.\.\. \(20,485 characters\); expected a number") as caught:
        Edit("z", "add", value=[1.0] * 4096 + ["a"])
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("make", "meant"),
    [
        (lambda: Freeze("qk", head=3), "heads"),  # type: ignore[call-arg]
        (lambda: Freeze("qk", to="zeros"), "zero"),
        (lambda: Edit("patern", "zero"), "pattern"),
        (lambda: Edit("z", "scal", 2.0), "scale"),
    ],
)
def test_a_slip_is_met_with_what_was_meant(make: Any, meant: str) -> None:
    with pytest.raises(SpecError, match=rf"Did you mean '{meant}'\?"):
        make()


def test_a_model_that_was_patched_as_far_as_possible_stays_so(llama: Any) -> None:
    """strict=False is said once."""
    model = nn.ModuleDict({"known": FAMILIES["llama"].build(), "other": Inline()})
    with pytest.warns(UserWarning, match="leaves as they are"):
        patch_model(model, strict=False)
    freeze_ov_circuit(model, heads=[1])
    with capture(model, "z"), patched(model, Freeze("qk")):
        pass
    assert weights.W_Q(model, 0).shape[0] == 4
    unpatch_model(model)
    with pytest.raises(UnsupportedArchitectureError):
        patch_model(model)
    with pytest.raises(NoMatchError, match=r"no attention module but .*Inline"):
        patch_model(nn.ModuleDict({"other": Inline()}), strict=False)


def test_a_wrapper_that_hands_on_attributes_is_no_foreign_class(llama: Any) -> None:
    layer = llama.model.layers[0]
    layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    with patched(llama, Freeze("ov")):
        pass
    unpatch_model(patch_model(llama, Freeze("ov")))
    layer.self_attn = layer.self_attn._orig_mod
