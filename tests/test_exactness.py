"""The statements that the engine is held to, for every family: what must not change, and what must be equal to what.

Equality is `torch.equal` wherever the order of operations is the same; a tolerance stands beside its reason.
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
from typing import Any

import pytest
import torch
from families import DECODERS, FAMILIES, HEADS, KV_HEADS, LAYERS, LENGTH, PADDING, TinyFamily
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from surgery.patch import patch_model, patched, unpatch_model
from surgery.spec import Edit, Freeze, Spec

IMPLEMENTATIONS = ("eager", "sdpa")
CASES = [(name, i) for name, family in FAMILIES.items() for i in IMPLEMENTATIONS if i == "eager" or family.sdpa]

DROPOUT = {
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1},
    "gpt2_reordered": {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1},
    "gptj": {"attn_pdrop": 0.3, "resid_pdrop": 0.2},
    "codegen": {"attn_pdrop": 0.3, "resid_pdrop": 0.2},
    "gpt_neo": {"attention_dropout": 0.3, "resid_dropout": 0.2},
    "falcon_multi_query": {"hidden_dropout": 0.2},  # without alibi this family drops no attention
    "falcon_grouped": {"hidden_dropout": 0.2},
    "mpt": {},  # its config refuses a number; set on the modules below
    "bert": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2},
    "roberta": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2},
    "t5": {"dropout_rate": 0.3},
}
"""Names of the dropout options, where they are not `attention_dropout`."""


def by_family(names: Any = tuple(FAMILIES)) -> Any:
    return pytest.mark.parametrize("name", list(names))


def by_case(cases: Any = tuple(CASES)) -> Any:
    return pytest.mark.parametrize(("name", "implementation"), list(cases))


@functools.cache
def plain(name: str, implementation: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model that no test may change."""
    return FAMILIES[name].build(implementation, dtype)


def fresh(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return FAMILIES[name].build(implementation, dtype, **options)


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    return model(**inputs, **more).logits


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of all parameters, of a loss that sees every logit."""
    model.zero_grad()
    out = model(**inputs).logits
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: Any, expected: Any) -> None:
    """Equality bit for bit of tensors, or of dictionaries and sequences of them. NaN equals NaN: kernels define empty rows."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        same = torch.equal(torch.nan_to_num(found, nan=1e4), torch.nan_to_num(expected, nan=1e4))
        assert same, f"differ by {(found.float() - expected.float()).abs().max():.3g}"
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def generate(model: Any, family: TinyFamily, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """Greedy tokens; the padded encoder or prompt is the input, decoders of two-stack models start afresh."""
    prompt = {n: x for n, x in inputs.items() if n != "decoder_input_ids"}
    return model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, **more)


# -- no cuts: nothing changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@by_case()
def test_without_cuts_logits_gradients_and_generation_stay(name: str, implementation: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model, inputs = fresh(name, implementation, dtype), cast(family.inputs(), dtype)
    can_generate = family.kind != "encoder"
    before = logits(model, inputs), gradients(model, inputs), generate(model, family, inputs) if can_generate else None
    assert patch_model(model, Spec()) is model
    after = logits(model, inputs), gradients(model, inputs), generate(model, family, inputs) if can_generate else None
    assert_same(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@by_case()
def test_kernel_eager_equals_the_eager_model(name: str, implementation: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model, eager = patch_model(fresh(name, implementation, dtype), kernel="eager"), plain(name, "eager", dtype)
    for padding in (PADDING, 0):
        inputs = cast(family.inputs(padding=padding), dtype)
        assert_same(logits(model, inputs), logits(eager, inputs))
        assert_same(gradients(model, inputs), gradients(eager, inputs))
    if family.kind != "encoder":
        assert_same(generate(model, family, inputs), generate(eager, family, inputs))


@by_case()
def test_training_with_dropout_under_a_seed_stays(name: str, implementation: str) -> None:
    options = DROPOUT.get(name, {"attention_dropout": 0.3})

    def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(11)
        one = logits(model, inputs)
        torch.manual_seed(12)
        return one, gradients(model, inputs)

    def build(implementation: str) -> Any:
        model = fresh(name, implementation, **options).train()
        for module in model.modules():
            if hasattr(module, "attn_dropout_p"):
                module.attn_dropout_p = 0.3
        return model

    model, inputs = build(implementation), FAMILIES[name].inputs()
    before = run(model)
    assert not torch.equal(before[0], logits(model, inputs)), "dropout must act, or this test shows nothing"
    assert_same(run(patch_model(model)), before)
    assert_same(run(patch_model(model, kernel="eager")), run(build("eager")))


@by_case()
def test_attentions_and_hidden_states_stay(name: str, implementation: str) -> None:
    family = FAMILIES[name]
    inputs = family.inputs()

    def states(model: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            out = model(**inputs, output_attentions=implementation == "eager", output_hidden_states=True)
        return {n: x for n, x in out.items() if "attentions" in n or "hidden_states" in n}

    model = fresh(name, implementation)
    before = states(model)
    assert any("hidden_states" in n for n in before)
    assert_same(states(patch_model(model)), before)
    again = states(patch_model(model, kernel="eager"))
    assert_same(again, {n: x for n, x in states(plain(name, "eager")).items() if n in again})
    assert_same(states(unpatch_model(model)), before)


# -- the object: tensors, copies, pickles, undo ---------------------------------------------------------------------------------

CUTS = Spec(
    [Freeze("qk", layers=[0], heads=[1]), Freeze("ov", layers=[1], heads=[0, 2]), Edit("pattern", "scale", 0.5, layers=[0])]
)


@by_family()
def test_state_dict_keeps_keys_order_and_tensors(name: str) -> None:
    model = fresh(name)
    before = model.state_dict()
    for kernel in ("auto", "eager"):
        patch_model(model, CUTS, kernel=kernel)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(after[n].data_ptr() == before[n].data_ptr() and torch.equal(after[n], before[n]) for n in before)
    unpatch_model(model)
    assert list(model.state_dict()) == list(before)


@by_case()
def test_a_copy_is_independent(name: str, implementation: str) -> None:
    inputs = FAMILIES[name].inputs()
    model = patch_model(fresh(name, implementation), CUTS)
    cut, uncut = logits(model, inputs), logits(plain(name, implementation), inputs)
    assert not torch.equal(cut, uncut)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(logits(twin, inputs), cut)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
        patch_model(twin, Spec())
        assert_same(logits(twin, inputs), uncut)
        assert_same(logits(model, inputs), cut)
        patch_model(twin, CUTS)
        unpatch_model(twin)
        assert_same(logits(twin, inputs), uncut)
        assert_same(logits(model, inputs), cut)
        assert [type(m) for m in twin.modules()] == [type(m) for m in plain(name, implementation).modules()]


@by_case()
def test_unpatching_leaves_no_trace(name: str, implementation: str) -> None:
    model, inputs = fresh(name, implementation), FAMILIES[name].inputs()
    before = [(m, type(m), set(m.__dict__)) for m in model.modules()]
    modules = [dict(m._modules) for m, _, _ in before]
    expected = logits(model, inputs)
    for kernel in ("auto", "eager"):
        patch_model(model, CUTS, kernel=kernel)
        assert not torch.equal(logits(model, inputs), expected)
        assert unpatch_model(model) is model
        assert all(m is n and type(n) is cls for (m, cls, _), n in zip(before, model.modules(), strict=True))
        assert [set(m.__dict__) for m in model.modules()] == [names for _, _, names in before]
        assert [dict(m._modules) for m in model.modules()] == modules
        assert_same(logits(model, inputs), expected)


@by_family()
def test_the_context_restores_after_an_exception(name: str) -> None:
    model, inputs = fresh(name), FAMILIES[name].inputs()
    classes, expected = [type(m) for m in model.modules()], logits(model, inputs)
    with pytest.raises(KeyError, match="halfway"), patched(model, CUTS):
        assert not torch.equal(logits(model, inputs), expected)
        raise KeyError("halfway")
    assert [type(m) for m in model.modules()] == classes
    assert_same(logits(model, inputs), expected)
