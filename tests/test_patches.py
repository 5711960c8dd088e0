"""The families that `patches/` describes: equal to transformers bit for bit, every point live, anatomy as stored."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, HEADS, KV_HEADS, LAYERS, LENGTH, PADDING, WINDOW
from torch import Tensor, nn
from transformers import DiffLlamaConfig, DiffLlamaModel
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoFlashAttention2
from transformers.models.pegasus_x.modeling_pegasus_x import PegasusXGlobalLocalAttention

from patches.gptj import GPTJ
from surgery import (
    Edit,
    SpecError,
    UnsupportedArchitectureError,
    capture,
    find_anatomy,
    inspect_model,
    patch_model,
    unpatch_model,
)
from surgery import family as families
from surgery.family import load_patches, register_patch
from surgery.sites import CORE_SITES, SITES

NAMES = (
    "gptj", "codegen", "gpt_neo", "falcon_multi_query", "falcon_grouped", "falcon_alibi", "bloom", "mpt", "gpt2_reordered",
)  # fmt: skip
CASES = [(name, i) for name in NAMES for i in ("eager", "sdpa") if i == "eager" or FAMILIES[name].sdpa]
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon multi-query with alibi": ("falcon_multi_query", {"alibi": True}),
    "falcon grouped with alibi": ("falcon_grouped", {"alibi": True}),
    "falcon not parallel": ("falcon_multi_query", {"parallel_attn": False}),
    "bloom in slices": ("bloom", {"pretraining_tp": 2, "slow_but_exact": True}),
    "mpt with a clip": ("mpt", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2}}),
    "mpt shorter than the sequence": ("mpt", {"n_heads": 8, "max_seq_len": LENGTH}),
    "gpt2 without scaling": ("gpt2_reordered", {"scale_attn_weights": False}),
}
DTYPES = (torch.float32, torch.bfloat16)
DROPOUT: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_dropout": 0.3, "resid_dropout": 0.2},
    "mpt": {"resid_pdrop": 0.2},  # its config takes no other attn_pdrop than 0: the test sets it on the modules
    **{name: {"attn_pdrop": 0.3, "resid_pdrop": 0.2} for name in ("gptj", "codegen", "gpt2_reordered")},
    **{name: {"attention_dropout": 0.3, "hidden_dropout": 0.2} for name in NAMES if "falcon" in name or name == "bloom"},
}

UNCHANGED = Edit("z", "scale", 1.0)
"""A cut that changes nothing but has the module's own kernel run behind the points, without the reconstruction."""

by_name = pytest.mark.parametrize("name", NAMES)
by_case = pytest.mark.parametrize(("name", "implementation"), CASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@functools.cache
def plain(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A model that no test may change."""
    return FAMILIES[name].build(implementation, dtype)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Any:
    return model(**inputs, **more)


def inputs_of(name: str) -> list[dict[str, Tensor]]:
    """Two rows, one padded on the left; one row; one token."""
    family = FAMILIES[name]
    return [family.inputs(), family.inputs(batch=1, padding=0), family.inputs(length=1, padding=0)]


# -- equal to transformers ----------------------------------------------------------------------------------------------------


@by_dtype
@by_case
def test_without_cuts_it_is_the_same_model(name: str, implementation: str, dtype: torch.dtype) -> None:
    model = FAMILIES[name].build(implementation, dtype)
    for spec in (None, UNCHANGED):
        patch_model(model, spec)
        for inputs in inputs_of(name):
            assert torch.equal(run(model, inputs).logits, run(plain(name, implementation, dtype), inputs).logits)


@by_dtype
@by_case
def test_kernel_eager_is_the_eager_model(name: str, implementation: str, dtype: torch.dtype) -> None:
    model = patch_model(FAMILIES[name].build(implementation, dtype), kernel="eager")
    for inputs in inputs_of(name):
        assert torch.equal(run(model, inputs).logits, run(plain(name, "eager", dtype), inputs).logits)


@pytest.mark.parametrize("case", MORE)
def test_kernel_eager_is_the_eager_model_in_less_common_configurations(case: str) -> None:
    name, options = MORE[case]
    family = FAMILIES[name]
    for implementation in ("eager", "sdpa") if family.sdpa else ("eager",):
        model = patch_model(family.build(implementation, **options), kernel="eager")
        for inputs in inputs_of(name):
            assert torch.equal(run(model, inputs).logits, run(family.build(**options), inputs).logits)


@by_name
def test_kernel_eager_is_the_eager_model_under_autocast(name: str) -> None:
    model, inputs = patch_model(FAMILIES[name].build(), kernel="eager"), FAMILIES[name].inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (run(m, inputs, output_attentions=True) for m in (model, plain(name)))
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.attentions, expected.attentions, strict=True))


@by_case
def test_gradients(name: str, implementation: str) -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    inputs = FAMILIES[name].inputs()
    model = FAMILIES[name].build(implementation)
    for kernel, own in (("auto", implementation), ("eager", "eager")):
        found, expected = gradients(patch_model(model, kernel=kernel)), gradients(plain(name, own))
        assert list(found) == list(expected)
        assert [n for n in found if not torch.equal(found[n], expected[n])] == []


@by_case
def test_training_with_dropout_under_a_seed(name: str, implementation: str) -> None:
    def logits(model: nn.Module) -> Tensor:
        for module in model.modules():
            if hasattr(module, "attn_dropout_p"):
                module.attn_dropout_p = 0.3
        torch.manual_seed(5)
        return run(model.train(), inputs).logits

    family, inputs = FAMILIES[name], FAMILIES[name].inputs()
    own, eager, model = (family.build(i, **DROPOUT[name]) for i in (implementation, "eager", implementation))
    assert not torch.equal(logits(own), run(own.eval(), inputs).logits), "dropout must act, or this test shows nothing"
    assert torch.equal(logits(patch_model(model)), logits(own))
    assert torch.equal(logits(patch_model(model, UNCHANGED)), logits(own))
    assert torch.equal(logits(patch_model(model, kernel="eager")), logits(eager))


@by_case
def test_generation_with_a_cache(name: str, implementation: str) -> None:
    def tokens(model: Any) -> Tensor:
        return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)

    inputs = FAMILIES[name].inputs()
    model = FAMILIES[name].build(implementation)
    assert torch.equal(tokens(patch_model(model)), tokens(plain(name, implementation)))
    assert torch.equal(tokens(patch_model(model, UNCHANGED)), tokens(plain(name, implementation)))
    assert torch.equal(tokens(patch_model(model, kernel="eager")), tokens(plain(name)))


@by_case
def test_attention_weights(name: str, implementation: str) -> None:
    inputs = FAMILIES[name].inputs()
    model = FAMILIES[name].build(implementation)
    fused = 0 if find_anatomy(model)[0].family.interface is not None else LAYERS  # transformers' own kernel gives none
    for spec, kernel, own in ((None, "auto", implementation), (None, "eager", "eager"), (UNCHANGED, "auto", implementation)):
        found = run(patch_model(model, spec, kernel=kernel), inputs, output_attentions=True)
        expected = run(plain(name, own), inputs, output_attentions=True)
        assert len(found.attentions) == len(expected.attentions) == (fused if own == "sdpa" else LAYERS)
        for one, other in zip(found.attentions, expected.attentions, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(found.logits, expected.logits)


# -- cuts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@by_case
def test_every_point_is_live(name: str, implementation: str, kernel: Any) -> None:
    model, inputs = FAMILIES[name].build(implementation), FAMILIES[name].inputs(padding=0)
    before = run(patch_model(model, kernel=kernel), inputs).logits
    for site in SITES:
        cut = Edit(site, "scale", 0.5, layers=[1], heads=[2], gqa="shared" if site == "k" else "isolated")
        assert (run(patch_model(model, cut, kernel=kernel), inputs).logits - before).abs().max() > 1e-4, site


@by_case
def test_points_have_the_documented_shapes(name: str, implementation: str) -> None:
    model, inputs = FAMILIES[name].build(implementation), FAMILIES[name].inputs(padding=0)
    with capture(model, list(SITES), layers=[0]) as seen:
        run(model, inputs)
    attention = find_anatomy(model)[0]
    batch, d_model, groups = 2, FAMILIES[name].build().config.hidden_size, attention.group_size
    head, kv_head = (batch, HEADS, LENGTH, attention.d_head), (batch, HEADS // groups, LENGTH, attention.d_head)
    shapes = {
        **dict.fromkeys(("q", "rot_q", "rot_k", "z"), head),
        **dict.fromkeys(("k", "v"), kv_head),
        **dict.fromkeys(("scores", "pattern"), (batch, HEADS, LENGTH, LENGTH)),
        "result": (batch, HEADS, LENGTH, d_model),
    }
    assert {site: tuple(seen[0, site].shape) for site in SITES} == shapes
    pattern, v = seen[0, "pattern"], seen[0, "v"].repeat_interleave(groups, 1)
    assert torch.allclose(pattern.sum(-1), torch.ones(batch, HEADS, LENGTH), atol=1e-5)
    assert torch.allclose(pattern @ v, seen[0, "z"], atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if FAMILIES[n].sdpa])
def test_a_matrix_cut_in_a_fused_kernel_is_that_kernels_function(name: str) -> None:
    """Cutting nothing from scores and pattern gives sdpa's own result: of falcon with alibi, the bias once and not twice."""
    model, inputs = FAMILIES[name].build("sdpa"), FAMILIES[name].inputs(padding=0)
    for site in ("scores", "pattern"):
        found = run(patch_model(model, Edit(site, "scale", 1.0, heads=[1, 2])), inputs).logits
        # The fused kernel sums in another order.
        assert torch.allclose(found, run(plain(name, "sdpa"), inputs).logits, atol=1e-4)
    gap = run(plain("falcon_alibi", "sdpa"), inputs).logits - run(plain("falcon_alibi"), inputs).logits
    assert gap.abs().max() > 0.01, "transformers' falcon adds alibi once in eager too; this test no longer shows anything"


@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
def test_templates_keep_to_a_mask_of_the_family(name: str) -> None:
    model, inputs = patch_model(FAMILIES[name].build(), Edit("pattern", "uniform")), FAMILIES[name].inputs()
    with capture(model, ["pattern"], layers=[1]) as seen:
        run(model, inputs)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    allowed = (distance >= 0) & (distance < (WINDOW if name == "gpt_neo" else LENGTH))
    allowed = allowed[None, None] & inputs["attention_mask"][:, None, None].bool()
    expected = (allowed / allowed.sum(-1, keepdim=True)).expand(-1, HEADS, -1, -1)
    live = torch.ones(2, LENGTH, dtype=torch.bool)
    live[0, :PADDING] = False
    assert torch.allclose(seen[1, "pattern"].transpose(1, 2)[live], expected.transpose(1, 2)[live])


# -- the object ---------------------------------------------------------------------------------------------------------------


@by_case
def test_copies_pickles_and_undo(name: str, implementation: str) -> None:
    model, inputs = FAMILIES[name].build(implementation), FAMILIES[name].inputs()
    classes = [type(module) for module in model.modules()]
    for kernel in ("auto", "eager"):
        patch_model(model, Edit("pattern", "scale", 0.5, heads=[1]), kernel=kernel)
        expected = run(model, inputs).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin, inputs).logits, expected)
    unpatch_model(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model, inputs).logits, run(plain(name, implementation), inputs).logits)


# -- anatomy ------------------------------------------------------------------------------------------------------------------

Layout = Callable[[int, int, int], tuple[int, int, int]]
"""(head, kv head, d) -> first channel of q, k and v; d is the width of a head."""

LAYOUTS: dict[str, Layout] = {
    "gptj": lambda h, g, d: (h * d, g * d, g * d),
    "gpt_neo": lambda h, g, d: (h * d, g * d, g * d),
    "codegen": lambda h, g, d: (3 * h * d, (3 * g + 2) * d, (3 * g + 1) * d),  # as many blocks [q | v | k] as heads here
    "falcon_multi_query": lambda h, g, d: (h * d, HEADS * d, (HEADS + 1) * d),
    "falcon_grouped": lambda h, g, d: ((h // 2 * 4 + h % 2) * d, (4 * g + 2) * d, (4 * g + 3) * d),
    "falcon_alibi": lambda h, g, d: (3 * h * d, (3 * g + 1) * d, (3 * g + 2) * d),
    "bloom": lambda h, g, d: (3 * h * d, (3 * g + 1) * d, (3 * g + 2) * d),
    "mpt": lambda h, g, d: (h * d, (HEADS + g) * d, (2 * HEADS + g) * d),
    "gpt2_reordered": lambda h, g, d: (h * d, (HEADS + g) * d, (2 * HEADS + g) * d),
}


@by_name
def test_projections_are_derived(name: str) -> None:
    anatomy = find_anatomy(plain(name))
    assert [a.address for a in anatomy] == ["self.0", "self.1"]
    for attention in anatomy:
        kv_heads = {"falcon_multi_query": 1, "falcon_grouped": KV_HEADS}.get(name, HEADS)
        assert (attention.heads, attention.kv_heads, attention.why) == (HEADS, kv_heads, {})
        d = attention.d_head
        for head in range(HEADS):
            group = head // attention.group_size
            starts = LAYOUTS[name](head, group, d)
            for site, row, start in zip("qkvo", (head, group, group, head), (*starts, head * d), strict=True):
                assert attention.projections[site].channels[row].tolist() == list(range(start, start + d)), (site, head)


# -- quirks -------------------------------------------------------------------------------------------------------------------


def test_gpt2_reordered_in_cross_attention() -> None:
    options = {"add_cross_attention": True, "scale_attn_by_inverse_layer_idx": False}
    inputs = {**FAMILIES["gpt2_reordered"].inputs(), "encoder_hidden_states": torch.randn(2, 4, 32)}
    model: GPT2LMHeadModel = FAMILIES["gpt2_reordered"].build("sdpa", torch.bfloat16, **options)
    eager = FAMILIES["gpt2_reordered"].build("eager", torch.bfloat16, **options)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(torch.bfloat16)
    found = run(patch_model(model, kernel="eager"), inputs).logits
    assert torch.equal(found, run(eager, inputs).logits)


def test_bloom_in_slices_has_no_output_projection_to_cut() -> None:
    attention = find_anatomy(FAMILIES["bloom"].build(pretraining_tp=2, slow_but_exact=True))[0]
    assert list(attention.why) == ["o"]


class InAMethod(nn.Module):
    """Two heads, computed as the classes that `patches/gptj.py` describes do it: in a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = (query @ key.transpose(-1, -2) / 2).softmax(-1)
        return weights @ value, weights

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(self._attn(query, key, value, None)[0].transpose(1, 2).flatten(2))


@torch.no_grad()
def test_a_subclass_with_its_own_core_gets_its_own_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(InAMethod):
        def _attn(self, query: Tensor, *others: Any) -> Any:
            return InAMethod._attn(self, 2 * query, *others)

    load_patches()
    monkeypatch.setattr(families, "_PATCHES", dict(families._PATCHES))
    register_patch(f"{InAMethod.__module__}.InAMethod")(lambda module, family: GPTJ)
    model, x = nn.ModuleDict({"layer": InAMethod()}).eval(), torch.randn(2, LENGTH, 8)
    usual = model["layer"](x)
    assert torch.equal(patch_model(model, kernel="eager")["layer"](x), usual)  # leaves a trace of the usual core
    model = unpatch_model(model)
    model["layer"].__class__ = Doubled
    expected = model["layer"](x)
    assert not torch.equal(expected, usual)
    assert torch.equal(patch_model(model, kernel="eager")["layer"](x), expected)


def test_recording_leaves_buffers_where_they_are() -> None:
    model = FAMILIES["gptj"].build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    find_anatomy(model)
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}


def test_the_classes_that_run_flash_attention_inline_are_refused() -> None:
    model = FAMILIES["gpt_neo"].build()
    model.transformer.h[0].attn.attention.__class__ = GPTNeoFlashAttention2
    model.transformer.h[0].attn.attention._flash_attn_uses_top_left_mask = False
    with pytest.raises(UnsupportedArchitectureError, match=r"transformer\.h\.0\.attn\.attention.*GPTNeoFlashAttention2"):
        patch_model(model)
    assert [a.address for a in find_anatomy(model, strict=False)] == ["self.1"]


# -- points that are written by hand ---------------------------------------------------------------------------------------

BLOCK, BLOCKS, GLOBALS, WIDTH = 4, 3, 2, 32


def block_local() -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """One attention over blocks and global tokens, and what it reads: tokens, global tokens, an additive mask."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": PegasusXGlobalLocalAttention(WIDTH, HEADS, BLOCK)}).eval()
    mask = torch.zeros(2, BLOCK * BLOCKS)
    mask[0, -3:] = torch.finfo(torch.float32).min
    return model, (torch.randn(2, BLOCK * BLOCKS, WIDTH), torch.randn(2, GLOBALS, WIDTH), mask)


def by_blocks(layer: Any, given: tuple[Tensor, Tensor, Tensor], site: str = "") -> dict[str, Tensor]:
    """The sites of the tokens' attention, (batch * block, head, ..), and the module's output, block by block; head 1 halved
    at a site."""
    tokens, others, mask = given
    d = WIDTH // HEADS
    seen: dict[str, list[Tensor]] = {}

    def at(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if name == site:
            tensor[1] *= 0.5
        seen.setdefault(name, []).append(tensor)
        return tensor

    outputs = []
    for row in range(len(tokens)):
        for number in range(BLOCKS):
            block = slice(number * BLOCK, (number + 1) * BLOCK)
            keys = torch.cat([others[row], tokens[row, block]])
            q, k, v = (
                projection(states).view(len(states), HEADS, d).transpose(0, 1)
                for projection, states in ((layer.q_proj, tokens[row, block]), (layer.k_proj, keys), (layer.v_proj, keys))
            )
            q, k, v = at("rot_q", q * d**-0.5), at("rot_k", k), at("v", v)
            added = torch.cat([torch.zeros(GLOBALS), mask[row, block]])
            pattern = at("pattern", at("scores", q @ k.mT + added).softmax(-1))
            outputs.append(at("z", pattern @ v).transpose(0, 1).flatten(1))
    found = {name: torch.stack(parts) for name, parts in seen.items()}
    return {**found, "output": layer.out_proj(torch.stack(outputs).view(len(tokens), -1, WIDTH))}


@torch.no_grad()
def test_joined_keys_of_blocks_are_the_formula() -> None:
    model, given = block_local()
    layer = model["layer"]
    tokens, others, weights = layer(*given)
    patch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(layer(*given)[:2], (tokens, others), strict=True))
    with capture(model, CORE_SITES) as run:
        found = layer(*given)
    assert torch.equal(found[0], tokens) and torch.equal(found[1], others)
    assert all(torch.equal(found[2][name], weights[name]) for name in weights)
    expected = by_blocks(layer, given)
    # The formula multiplies block by block, and sums values of both kinds of keys at once.
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    for site in CORE_SITES:
        torch.testing.assert_close(run["self.0", site], expected[site], **close)
        patch_model(model, Edit(site, "scale", 0.5, heads=[1]))  # type: ignore[arg-type]
        cut = layer(*given)
        torch.testing.assert_close(cut[0], by_blocks(layer, given, site)["output"], **close)
        assert not torch.allclose(cut[0], tokens, atol=1e-4), site
        assert torch.equal(cut[1], others), "the global tokens' attention stays as it is"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other["layer"](*given)[0], cut[0])
    unpatch_model(model)
    assert type(layer) is PegasusXGlobalLocalAttention and torch.equal(layer(*given)[0], tokens)


def test_what_serves_two_attentions_is_said() -> None:
    model, given = block_local()
    attention = find_anatomy(model).attentions[0]
    assert attention.why["o"] == "out_proj, which reads z, reads something else in the same forward, too"
    with pytest.raises(SpecError, match="out_proj, which reads z, reads something else"):
        patch_model(model, Edit("result", "zero"))
    assert (
        "not patched beside the attention: 'layer' (PegasusXGlobalLocalAttention): the attention of its global tokens"
        in str(" ".join(str(inspect_model(model)).split()))
    )
    before = model["layer"](*given)
    patch_model(model, Edit("q", "scale", 0.5, heads=[1]))
    after = model["layer"](*given)
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


# -- classes without a model of their own here ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("wants", [{"need_weights": False}, {"need_weights": True}])
def test_torchs_attention_has_the_same_numbers_behind_its_points(
    wants: dict[str, bool], is_padded: bool, is_masked: bool, is_cross: bool
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.MultiheadAttention(64, 2)}).eval()
    x, y = torch.randn(7, 2, 64), torch.randn(5, 2, 64)
    source = y if is_cross else x
    keys = len(source)
    options: dict[str, Any] = {
        **wants,
        "attn_mask": torch.ones(7, keys, dtype=torch.bool).triu(1) if is_masked else None,
        "key_padding_mask": torch.arange(keys) >= torch.tensor([keys, keys - 1])[:, None] if is_padded else None,
    }
    expected = model["layer"](x, source, source, **options)
    for sites in (["z"], ["rot_q", "rot_k", "v"], ["scores", "pattern", "result"]):
        with capture(model, sites) as run:
            found = model["layer"](x, source, source, **options)
        assert torch.equal(found[0], expected[0])
        if options["need_weights"]:
            assert torch.equal(found[1], expected[1])
        elif "pattern" in sites:
            torch.testing.assert_close(run[0, "pattern"].sum(-1), torch.ones(2, 2, 7))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_diffllama_has_the_same_numbers_behind_its_points(implementation: str) -> None:
    torch.manual_seed(0)
    config = DiffLlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = implementation
    model, tokens = DiffLlamaModel(config).eval(), torch.arange(22).view(2, 11)
    expected = model(tokens).last_hidden_state
    for site in (site for site in SITES if site != "result"):
        with capture(model, [site]):
            assert torch.equal(model(tokens).last_hidden_state, expected), site


@torch.no_grad()
def test_keys_of_diffllama_where_all_heads_share_one_pair_of_values() -> None:
    """Two kv heads: their values are joined into one, their keys are not."""
    config = DiffLlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    model, ids = DiffLlamaModel(config).eval(), torch.arange(5, 14)[None]
    for parameter in model.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape))
    [attention] = find_anatomy(model)
    assert (attention.heads, attention.kv_heads) == (4, 2)
    handle = model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, output: output * 0)
    expected = model(ids).last_hidden_state
    handle.remove()
    patch_model(model, Edit("k", "zero"))
    assert torch.equal(model(ids).last_hidden_state, expected)
    with capture(patch_model(model), ["k", "rot_k", "v"]) as run:
        model(ids)
    assert [run["self.0", site].shape[1] for site in ("k", "rot_k", "v")] == [2, 4, 2]
