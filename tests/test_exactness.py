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
from cached import CACHE
from families import BATCH, FAMILIES, HEADS, KV_HEADS, LENGTH, PADDING, TinyFamily
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from surgery.captures import capture
from surgery.patch import anatomy_of, patch_model, patched, unpatch_model
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


by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


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


# -- no cuts: nothing changes ----------------------------------------------------------------------------------------------


@by_dtype
@by_case()
def test_without_cuts_logits_gradients_and_generation_stay(name: str, implementation: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model, inputs = fresh(name, implementation, dtype), cast(family.inputs(), dtype)
    can_generate = family.kind != "encoder"
    before = logits(model, inputs), gradients(model, inputs), generate(model, family, inputs) if can_generate else None
    assert patch_model(model, Spec()) is model
    after = logits(model, inputs), gradients(model, inputs), generate(model, family, inputs) if can_generate else None
    assert_same(after, before)


@by_dtype
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
            out = model(**inputs, output_attentions=True, output_hidden_states=True)
        return {n: x for n, x in out.items() if "attentions" in n or "hidden_states" in n}

    model = fresh(name, implementation)
    before = states(model)
    assert any("hidden_states" in n for n in before)
    assert_same(states(patch_model(model)), before)
    # A model loaded as sdpa has no attentions of its own; with every module reconstructed it has those of the eager one.
    assert_same(states(patch_model(model, kernel="eager")), states(plain(name, "eager")))
    assert_same(states(unpatch_model(model)), before)


# -- the object: tensors, copies, pickles, undo ----------------------------------------------------------------------------

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


# -- grouped heads and their ungrouped twin --------------------------------------------------------------------------------

GROUPS = HEADS // KV_HEADS
UNGROUPED = {
    "falcon_multi_query": {"multi_query": False},
    "falcon_grouped": {"num_kv_heads": HEADS},
}
"""Options of the twin, where they are not num_key_value_heads=HEADS."""

GROUPED = [
    name
    for name, family in FAMILIES.items()
    if family.options.get("num_key_value_heads", HEADS) < HEADS or name in UNGROUPED
]  # fmt: skip


def ungrouped_twin(name: str, implementation: str) -> nn.Module:
    """The model with each kv head's weights written once for each of its query heads: the same function, without groups."""
    twin = FAMILIES[name].build(implementation, **UNGROUPED.get(name, {"num_key_value_heads": HEADS}))
    source = plain(name, implementation).state_dict()
    d = FAMILIES[name].options.get("head_dim", 8)

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, d))

    with torch.no_grad():
        for path, parameter in twin.named_parameters():
            if "k_layernorm.norms." in path:  # one norm for each kv head
                path = re.sub(r"norms\.(\d)", lambda found: f"norms.{int(found[1]) // GROUPS}", path)
            x = source[path]
            if "query_key_value" in path and name == "falcon_grouped":  # by group: its q heads, k, v
                x = by_head(x).unflatten(0, (KV_HEADS, GROUPS + 2))
                q, k, v = x[:, :-2].flatten(0, 1), x[:, -2].repeat_interleave(GROUPS, 0), x[:, -1].repeat_interleave(GROUPS, 0)
                x = torch.stack([q, k, v], dim=1).flatten(0, 2)
            elif "query_key_value" in path:  # all q heads, one k, one v; the twin has q, k, v by head
                q, k, v = by_head(x).split([HEADS, 1, 1])
                x = torch.stack([q, k.expand_as(q), v.expand_as(q)], dim=1).flatten(0, 2)
            elif "qkv_proj" in path:  # all q heads, all k heads, all v heads
                q, k, v = by_head(x).split([HEADS, KV_HEADS, KV_HEADS])
                x = torch.cat([q, k.repeat_interleave(GROUPS, 0), v.repeat_interleave(GROUPS, 0)]).flatten(0, 1)
            elif x.shape != parameter.shape:
                x = by_head(x).repeat_interleave(GROUPS, 0).flatten(0, 1)
            parameter.copy_(x)
    return twin


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def d_of(model: nn.Module) -> tuple[int, int]:
    first = anatomy_of(model).attentions[0]
    return first.d_head, first.d_value


ISOLATED = {
    "qk to zero": Freeze("qk", heads=[1]),
    "qk to the mean": Freeze("qk", heads=[1, 2], to="mean"),
    "qk to noise": Freeze("qk", heads=[0, 3], to="noise", seed=5),
    "qk detached": Freeze("qk", heads=[1], to="identity"),
    "ov to zero": Freeze("ov", heads=[0]),
    "ov to the mean": Freeze("ov", heads=[3], to="mean", strength=0.5),
    "ov to noise": Freeze("ov", heads=[1, 2], to="noise"),
    "ov detached": Freeze("ov", heads=[2], to="identity"),
    "both resampled": Freeze("both", heads=[1], to="resample", layers=[1]),
    "both with straight-through": Freeze("both", heads=[2, 3], to="noise", backward="ste", positions=[4, 6]),
    "k and v scaled": Spec([Edit("rot_k", "scale", 0.5, heads=[0]), Edit("v", "scale", -1.0, heads=[3])]),
}


@by_case([(name, i) for name, i in CASES if name in GROUPED])
def test_isolated_cuts_of_grouped_heads_are_those_of_the_ungrouped_twin(name: str, implementation: str) -> None:
    model, twin, inputs = fresh(name, implementation), ungrouped_twin(name, implementation), FAMILIES[name].inputs(padding=0)

    def outcome(model: nn.Module) -> tuple[Tensor, Tensor]:
        found = gradients(model, inputs)
        return logits(model, inputs), found[next(iter(found))]

    for cut in (None, *ISOLATED.values()):
        for kernel in ("auto", "eager"):
            one, other = (outcome(patch_model(m, cut, kernel=kernel)) for m in (model, twin))
            for found, expected in zip(one, other, strict=True):
                # Products with another number of columns may add up in another order.
                bound = 2e-5 * max(1.0, float(expected.abs().max()))
                assert float((found - expected).abs().max()) <= bound, str(cut)


@by_family(GROUPED)
def test_isolated_cuts_leave_the_neighbours_in_the_group(name: str) -> None:
    model, inputs = fresh(name), FAMILIES[name].inputs()
    sites = ["rot_q", "rot_k", "v", "scores", "pattern", "z"]

    def others(spec: Any) -> list[Tensor]:
        with torch.no_grad(), capture(patch_model(model, spec), sites, layers=[0], heads=[0, 2, 3]) as run:
            model(**inputs)
        return [run[0, site] for site in sites]

    before = others(None)
    for spec in (Freeze("qk", heads=[1], layers=[0]), Freeze("both", heads=[1], to="noise"), Edit("v", "add", 1.0, heads=[1])):
        assert_same(others(spec), before)


# -- fused and separate projections ----------------------------------------------------------------------------------------


def test_fused_and_separate_projections_give_the_same() -> None:
    """The same network as Llama (q, k, v, gate, up separate) and as Phi-3 (fused)."""
    llama = fresh("llama", head_dim=8, rms_norm_eps=1e-5)
    phi3 = fresh("phi3", sliding_window=None, rms_norm_eps=1e-5)
    source = llama.state_dict()
    for path in phi3.state_dict():
        parts = [path]
        if "qkv_proj" in path:
            parts = [path.replace("qkv_proj", f"{x}_proj") for x in "qkv"]
        elif "gate_up_proj" in path:
            parts = [path.replace("gate_up_proj", f"{x}_proj") for x in ("gate", "up")]
        with torch.no_grad():
            phi3.state_dict()[path].copy_(torch.cat([source[part] for part in parts]))
    inputs = FAMILIES["llama"].inputs()
    cuts = [
        Edit("q", "scale", 0.5, heads=[1]),
        Edit("k", "zero", heads=[1], gqa="shared"),
        Edit("k", "add", vectors(8), heads=[0, 1]),
    ]
    for spec in (None, *ISOLATED.values(), *cuts):
        for kernel in ("auto", "eager"):
            one, other = (logits(patch_model(m, spec, kernel=kernel), inputs) for m in (llama, phi3))
            # One product of 64 columns against three may add up in another order.
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


# -- what a freeze leaves alone, and what removes a head -------------------------------------------------------------------


def address_of(name: str) -> str:
    return "decoder.cross.1" if FAMILIES[name].kind in ("encoder_decoder", "speech") else "self.1"


@by_dtype
@by_case()
def test_freezing_one_circuit_leaves_the_other(name: str, implementation: str, dtype: torch.dtype) -> None:
    model, address = fresh(name, implementation, dtype), address_of(name)
    inputs = cast(FAMILIES[name].inputs(padding=0), dtype)

    def run(spec: Any, kernel: Any) -> dict[str, Tensor]:
        patch_model(model, spec, kernel=kernel)
        with torch.no_grad(), capture(model, ["v", "pattern", "z"], layers=[address]) as seen:
            model(**inputs)
        return {site: seen[address, site] for site in ("v", "pattern", "z")}

    for kernel in ("auto", "eager"):
        before = run(None, kernel)
        for to in ("zero", "noise", "mean", "resample"):
            qk, ov = (run(Freeze(circuit, to=to, layers=[address]), kernel) for circuit in ("qk", "ov"))
            assert_same(qk["v"], before["v"])
            assert_same(ov["pattern"], before["pattern"])
            assert not torch.equal(qk["pattern"], before["pattern"])
            assert not torch.equal(qk["z"], before["z"])
            assert not torch.equal(ov["z"], before["z"])


OUTPUT = {
    "gpt2": "transformer.h.1.attn.c_proj",
    "gpt2_reordered": "transformer.h.1.attn.c_proj",
    "gptj": "transformer.h.1.attn.out_proj",
    "gpt_neox": "gpt_neox.layers.1.attention.dense",
    "codegen": "transformer.h.1.attn.out_proj",
    "falcon_multi_query": "transformer.h.1.self_attention.dense",
    "falcon_grouped": "transformer.h.1.self_attention.dense",
    "falcon_alibi": "transformer.h.1.self_attention.dense",
    "bloom": "transformer.h.1.self_attention.dense",
    "opt": "model.decoder.layers.1.self_attn.out_proj",
    "gpt_neo": "transformer.h.1.attn.attention.out_proj",
    "mpt": "transformer.blocks.1.attn.out_proj",
    "phi": "model.layers.1.self_attn.dense",
    "bert": "bert.encoder.layer.1.attention.output.dense",
    "roberta": "roberta.encoder.layer.1.attention.output.dense",
    "t5": "decoder.block.1.layer.1.EncDecAttention.o",
    "bart": "model.decoder.layers.1.encoder_attn.out_proj",
    "whisper": "model.decoder.layers.1.encoder_attn.out_proj",
}
"""The output projection of the attention at `address_of`, where it is not model.layers.1.self_attn.o_proj."""


@by_dtype
@by_case()
def test_freezing_both_to_zero_removes_the_head(name: str, implementation: str, dtype: torch.dtype) -> None:
    """Equal to the model whose W_O has zeros for these heads, bit for bit: both add zeros in the same order."""
    model, removed = (fresh(name, implementation, dtype) for _ in range(2))
    inputs = cast(FAMILIES[name].inputs(), dtype)
    before = logits(model, inputs)
    projection = removed.get_submodule(OUTPUT.get(name, "model.layers.1.self_attn.o_proj"))
    with torch.no_grad():
        # GPT-2's Conv1D holds the transpose.
        weight = projection.weight.T if hasattr(projection, "nf") else projection.weight
        weight.unflatten(1, (HEADS, -1))[:, [1, 2]] = 0
    expected = logits(removed, inputs)
    assert not torch.equal(expected, before)
    for kernel in ("auto", "eager") if implementation == "eager" else ("auto",):
        for circuit in ("both", "ov"):
            cut = Freeze(circuit, layers=[address_of(name)], heads=[1, 2])
            assert_same(logits(patch_model(model, cut, kernel=kernel), inputs), expected)


# -- the KV cache: step by step equals the whole sequence at once ----------------------------------------------------------

ROOM = 12
"""Positions of a static cache: more than the sequence has."""


def cached_specs(name: str, d_head: int, d_value: int) -> dict[str, Spec]:
    stack = "decoder." if FAMILIES[name].kind in ("encoder_decoder", "speech") else ""
    layers = [f"{stack}self.*"]
    run = torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))

    def edit(site: str, action: Any, value: Any = None, **more: Any) -> Edit:
        return Edit(site, action, value, layers, **more)

    every: dict[str, list[Any]] = {
        "qk to zero": [Freeze("qk", layers, [1])],
        "ov to a mean": [Freeze("ov", layers, [0, 2], "mean", reference=vectors(HEADS, d_value))],
        "both to noise": [Freeze("both", layers, [0, 3], "noise", seed=3)],
        "noise on queries": [edit("rot_q", "noise", (0.0, 1.0), heads=[1, 2]), edit("z", "noise", heads=[3], strength=0.5)],
        "noise on keys": [edit("rot_k", "noise", heads=[1, 2]), edit("v", "noise", heads=[3], positions=range(2, 7))],
        "positions": [edit("z", "zero", positions=[2, 5, 6]), edit("rot_k", "scale", 0.5, positions=[1, 4, 7], heads=[0])],
        "values by position": [
            edit("v", "value", vectors(HEADS, LENGTH, d_value), strength=0.5),
            edit("rot_q", "add", vectors(2, LENGTH, d_head), heads=[0, 2]),
        ],
        "templates": [edit("pattern", word, heads=[i]) for i, word in enumerate(("previous", "first", "uniform"))],
        "diagonal and scores": [edit("pattern", "diagonal", heads=[2]), edit("scores", "value", 0.3, heads=[0, 1])],
        "noise on scores": [edit("scores", "noise", (0.0, 1.0), heads=[1])],
        "noise on the pattern": [edit("pattern", "noise", (0.0, 0.1), heads=[2])],
        "another run's pattern": [edit("pattern", "activation", reference=run, heads=[1, 3])],
        "scores by query and key": [edit("scores", "add", vectors(LENGTH, LENGTH), heads=[0, 2])],
    }  # fmt: skip
    return {name: Spec(cuts) for name, cuts in every.items()}


def cross_specs(d_value: int) -> dict[str, Spec]:
    return {
        "cross and encoder": Spec(
            [
                Freeze("qk", ["decoder.cross.*"], [1]),
                Edit("v", "noise", layers=["decoder.cross.1"], heads=[0], seed=2),
                Edit("rot_k", "add", 0.5, layers=["decoder.cross.0"], heads=[2], positions=[3, 4, 6]),
                Edit("z", "add", vectors(d_value), layers=["decoder.cross.*"], heads=[3], positions=[0, 3, 5]),
                Edit("pattern", "previous", layers=["decoder.cross.1"], heads=[2]),
                Freeze("ov", ["encoder.self.0"], [1], "noise"),
            ]
        )
    }


def new_cache(model: Any, static: bool, two_stacks: bool) -> Any:
    config = model.config.get_text_config(decoder=True)
    one = StaticCache(config=config, max_cache_len=ROOM) if static else DynamicCache(config=config)
    return EncoderDecoderCache(one, DynamicCache(config=config)) if two_stacks else one


@torch.no_grad()
def by_chunks(model: Any, name: str, chunks: tuple[int, ...], static: bool) -> tuple[Tensor, Tensor]:
    """Logits of a decoder's sequence in chunks with a cache, and of the whole without one; NaN where the query is padding."""
    inputs = cast(FAMILIES[name].inputs(), model.dtype)
    two_stacks = FAMILIES[name].kind != "decoder"
    ids = inputs.pop("decoder_input_ids") if two_stacks else inputs.pop("input_ids")
    mask = inputs.pop("attention_mask", None)
    if two_stacks:
        ids_name, fixed = "decoder_input_ids", {} if mask is None else {"attention_mask": mask}
        source = {n: x for n, x in inputs.items() if n in ("input_ids", "input_features")}
        fixed["encoder_outputs"] = model.get_encoder()(**source, **fixed)
        whole = model(**fixed, decoder_input_ids=ids, use_cache=False).logits
    else:
        ids_name, fixed = "input_ids", {}
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        whole = whole.masked_fill(~mask.bool()[..., None], 0)
    cache, found, start = new_cache(model, static, two_stacks), [], 0
    for size in chunks:
        part = slice(start, start + size)
        more = {} if two_stacks else {"attention_mask": mask[:, : part.stop]}
        out = model(**fixed, **more, **{ids_name: ids[:, part], CACHE: cache}, use_cache=True).logits
        found.append(out if two_stacks else out.masked_fill(~mask.bool()[:, part, None], 0))
        start += size
    return torch.cat(found, dim=1), whole[:, :start]


# Static caches that unpatched families cannot use: alibi as long as the mask, a local mask that counts queries from the end.
NO_STATIC_CACHE = ("falcon_alibi", "bloom", "gpt_neo")

STEPS = ((4, 1, 1, 1, 1, 1), (4, 3, 1, 1), (6, 3))
"""Lengths of the calls: token by token after a prompt, and prompts in two chunks; two-stack decoders have 7 positions."""


def cache_error(model: nn.Module, name: str, static: bool) -> float:
    """The largest difference between logits with a cache and without, as a part of the largest logit."""
    worst = 0.0
    for chunks in STEPS:
        if FAMILIES[name].kind != "decoder":
            chunks = tuple(size for i, size in enumerate(chunks) if sum(chunks[: i + 1]) <= LENGTH - 2)
        found, whole = by_chunks(model, name, chunks, static)
        worst = max(worst, float((found - whole).abs().max() / whole.abs().max()))
    return worst


DECODING = [(name, i) for name, i in CASES if FAMILIES[name].kind != "encoder"]
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def check_cache(name: str, implementation: str, static: bool, dtype: torch.dtype, bound: float) -> None:
    model = fresh(name, implementation, dtype)
    d_head, d_value = d_of(model)
    specs = {"no cuts": Spec(), **cached_specs(name, d_head, d_value)}
    if FAMILIES[name].kind != "decoder":
        specs |= cross_specs(d_value)
    for number, (what, spec) in enumerate(specs.items()):
        patch_model(model, spec, kernel=("auto", "auto", "eager")[number % 3])
        assert cache_error(model, name, static) < bound, what


@by_case(DECODING)
def test_a_cache_gives_what_the_whole_sequence_gives(name: str, implementation: str) -> None:
    # Other shapes of products add up in other orders: some hundred roundings of float32.
    check_cache(name, implementation, False, torch.float32, 2e-5)


@by_case([(name, i) for name, i in DECODING if name not in NO_STATIC_CACHE])
def test_a_static_cache_gives_what_the_whole_sequence_gives(name: str, implementation: str) -> None:
    check_cache(name, implementation, True, torch.float32, 2e-5)


@by_case([(name, i) for name, i in DECODING if name not in MIXTURES])
def test_a_cache_in_bfloat16_gives_what_the_whole_sequence_gives(name: str, implementation: str) -> None:
    # Five roundings of bfloat16, of 0.4 % each. Left out are mixtures of experts, where one rounding may choose another expert.
    check_cache(name, implementation, False, torch.bfloat16, 2e-2)


@by_case([(name, i) for name, i in CASES if name in NO_STATIC_CACHE])
def test_the_static_caches_that_are_left_out_do_not_work_unpatched(name: str, implementation: str) -> None:
    try:
        assert cache_error(plain(name, implementation), name, static=True) > 1e-2
    except RuntimeError as error:
        assert "size" in str(error)


@by_case(DECODING)
def test_generation_with_a_cache_is_generation_without(name: str, implementation: str) -> None:
    family = FAMILIES[name]
    model, inputs = fresh(name, implementation), family.inputs()
    layers = ["decoder.*"] if family.kind != "decoder" else "all"
    spec = Spec(
        [
            Freeze("qk", layers, [0]),
            Freeze("both", layers, [1], "noise", seed=4),
            Edit("pattern", "previous", layers=layers, heads=[2]),
            Edit("v", "scale", -2.0, layers=layers, heads=[3], positions=range(3, 8)),
        ]
    )
    details = {"return_dict_in_generate": True, "output_logits": True}
    uncut = generate(model, family, inputs, **details)
    patch_model(model, spec)
    cached, whole = (generate(model, family, inputs, use_cache=use_cache, **details) for use_cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for with_cache, without, other in zip(cached.logits, whole.logits, uncut.logits, strict=True):
        torch.testing.assert_close(with_cache, without, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(with_cache, other, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@by_family()
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Patching proves the reconstruction on tensors of one type, whatever the module's own is."""
    inputs = cast(FAMILIES[name].inputs(), dtype)
    model = fresh(name, "eager", dtype)
    expected = logits(model, inputs)
    patch_model(model)
    assert torch.equal(logits(model, inputs).nan_to_num(), expected.nan_to_num())
    patch_model(model, Freeze("both", heads=[1]))
    assert not torch.equal(logits(model, inputs).nan_to_num(), expected.nan_to_num())
