"""Models with PEFT adapters, LoRA and DoRA, beside their weights or merged into them, on fused and separate projections.

The reference of a cut is the plain model into whose weights the adapters were added by hand: the same network, so that only
the order of sums differs. `test_integrations.py` has LoRA before and after patching; here are DoRA, fused projections and
merging.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, HEADS
from peft import LoraConfig, get_peft_model
from torch import Tensor

from surgery import Edit, Freeze, Spec, capture, find_anatomy, patch_model, patched, unpatch_model, weights
from surgery.classes import SurgicalAttention

pytestmark = [
    # An older name that PEFT uses.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning"),
    # PEFT's, of every unmerging.
    pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate:UserWarning"),
]

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi3": ["qkv_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense"],
}
"""Separate; fused; fused and transposed; fused and interleaved by head."""

WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}

CUTS: dict[str, Any] = {
    "none": Spec(),
    "q": Edit("q", "scale", 0.5, layers=[0], heads=[1]),
    "k": Edit("k", "scale", 0.5, layers=[0]),
    "rot_q": Edit("rot_q", "scale", 0.5, layers=[0], heads=[1]),
    "rot_k": Edit("rot_k", "scale", 0.5, layers=[0], heads=[1]),
    "v": Edit("v", "scale", 0.5, layers=[0], heads=[1]),
    "scores": Edit("scores", "scale", 0.5, layers=[0], heads=[1]),
    "pattern": Edit("pattern", "uniform", layers=[0], heads=[1]),
    "z": Edit("z", "scale", 0.5, layers=[0], heads=[1]),
    "result": Edit("result", "scale", 0.5, layers=[0], heads=[1]),
    "freeze_qk": Freeze("qk", heads=[0, 2]),
    "freeze_ov": Freeze("ov", heads=[0, 2], backward="ste"),
}

by_name = pytest.mark.parametrize("name", TARGETS)
by_way = pytest.mark.parametrize("way", WAYS)
by_cut = pytest.mark.parametrize("cut", CUTS)

# W x + B A x against (W + B A) x, and DoRA's norms: roundings of float32 in another order, through two layers.
CLOSE = dict(atol=2e-4, rtol=2e-4)


def adapted(name: str, way: str, model: Any = None, seed: int = 5, adapter: str = "default") -> Any:
    """The model with random adapters, always the same ones; DoRA's magnitudes moved away from where they begin."""
    model = FAMILIES[name].build("sdpa") if model is None else model
    torch.manual_seed(seed)
    options = dict(target_modules=TARGETS[name], init_lora_weights=False, fan_in_fan_out=name == "gpt2", **WAYS[way])
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **options), adapter_name=adapter)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "magnitude" in path:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return model.eval()


def by_hand(name: str, way: str) -> Any:
    """The plain model with what the adapters do written into its weights, from their definitions."""
    model, source = FAMILIES[name].build("sdpa"), dict(adapted(name, way).named_modules())
    count = 0
    with torch.no_grad():
        for path, module in model.named_modules():
            layer = source.get(f"base_model.model.{path}")
            if layer is None or not hasattr(layer, "lora_A"):
                continue
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = 3 / (2**0.5 if way == "rslora" else 2) * up @ down
            weight: Tensor = module.weight.T if name == "gpt2" else module.weight
            weight = weight + delta
            if way == "dora":
                magnitude = layer.lora_magnitude_vector["default"].weight
                weight = weight * (magnitude.flatten() / weight.norm(dim=1))[:, None]
            module.weight.copy_(weight.T if name == "gpt2" else weight)
            count += 1
    assert count == len(TARGETS[name]) * len(find_anatomy(model).attentions)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    return FAMILIES[name].inputs()


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    given = inputs(name)
    return model(**given).logits[given["attention_mask"].bool()]


def gradients(model: Any, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**inputs(name)).logits
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@by_cut
@by_way
@by_name
def test_cuts_are_those_of_the_network_written_out(name: str, way: str, cut: str) -> None:
    bare = adapted(name, way)
    uncut = logits(bare, name)
    reference = by_hand(name, way)
    torch.testing.assert_close(uncut, logits(reference, name), **CLOSE)
    expected = logits(patch_model(reference, CUTS[cut]), name)
    model = patch_model(bare, CUTS[cut])
    found = logits(model, name)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(found, uncut) == (cut == "none")
    if cut != "none":
        assert not torch.allclose(expected, logits(by_hand(name, way), name), atol=1e-3), "the cut must act"
    # Patched first, adapted later: the very same.
    later = adapted(name, way, patch_model(FAMILIES[name].build("sdpa"), CUTS[cut]))
    assert torch.equal(logits(later, name), found)
    for either in (model, later):
        assert torch.equal(logits(unpatch_model(either), name), uncut)


@by_way
@by_name
def test_gradients_of_adapters_without_cuts_are_equal(name: str, way: str) -> None:
    expected = gradients(adapted(name, way), name)
    assert expected and all(bool(g.abs().sum() > 0) for g in expected.values())
    assert any("magnitude" in n for n in expected) == (way == "dora")
    for model in (patch_model(adapted(name, way)), adapted(name, way, patch_model(FAMILIES[name].build("sdpa")))):
        found = gradients(model, name)
        assert list(found) == list(expected) and all(torch.equal(found[n], expected[n]) for n in expected)
    frozen = gradients(patch_model(adapted(name, way), Freeze("both", layers=[1], to="identity")), name)
    cut = [n for n in expected if ("layers.1." in n or ".h.1." in n) and f".{TARGETS[name][-1]}." not in n]
    assert cut, "the output projection's adapter still learns; q's, k's and v's are detached"
    assert all(n not in frozen or not bool(frozen[n].any()) for n in cut)


@by_way
@by_name
def test_captures_are_of_the_adapted_projections(name: str, way: str) -> None:
    given, reference, model = inputs(name), by_hand(name, way), adapted(name, way)
    sites = ["q", "k", "rot_q", "rot_k", "v", "scores", "pattern", "z", "result"]
    before = logits(model, name)
    with torch.no_grad(), capture(model, sites) as run:
        model(**given)
    with torch.no_grad(), capture(reference, sites) as expected:
        reference(**given)
    for address in ("self.0", "self.1"):
        for site in sites:
            found, wanted = run[address, site], expected[address, site]
            masked = wanted < -1e30 if site == "scores" else torch.zeros_like(wanted, dtype=torch.bool)
            torch.testing.assert_close(found.masked_fill(masked, 0), wanted.masked_fill(masked, 0), **CLOSE)
    assert torch.equal(logits(model, name), before)


@by_way
@by_name
def test_weights_of_heads_are_the_effective_ones(name: str, way: str) -> None:
    reference, model = by_hand(name, way), adapted(name, way)
    plain = FAMILIES[name].build("sdpa")

    def check() -> None:
        for layer in (0, 1):
            for read in (weights.W_Q, weights.W_K, weights.W_V, weights.W_O, weights.b_Q, weights.b_O):
                found, expected = read(model, layer), read(reference, layer)
                assert (found is None) == (expected is None)
                if found is not None:
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            for circuit in (weights.qk_circuit, weights.ov_circuit):
                ours, theirs = circuit(model, layer), circuit(reference, layer)
                torch.testing.assert_close(ours.A @ ours.B, theirs.A @ theirs.B, atol=1e-4, rtol=1e-4)
        for site in ("q", "k", "v"):
            [piece] = weights.pieces(model, 0, site)  # type: ignore[arg-type]
            assert piece.matrix.shape[0] in (HEADS, HEADS // 2)

    assert not torch.allclose(weights.W_Q(reference, 0), weights.W_Q(plain, 0), atol=1e-2)
    check()
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()
    with model.disable_adapter():
        torch.testing.assert_close(weights.W_Q(model, 0), weights.W_Q(plain, 0), atol=1e-5, rtol=1e-5)
    # DoRA divides by a norm that PEFT keeps out of the gradient, so its weight is compared by value alone.
    weights.W_Q(model, 0).square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("merge", ["beside", "away"])
@pytest.mark.parametrize("cut", ["none", "q", "pattern", "result", "freeze_qk"])
@by_way
@by_name
def test_merging_under_cuts_and_undoing_it(name: str, way: str, cut: str, merge: str) -> None:
    """beside: into the base weights, the adapters still there; away: the adapters' modules are replaced by plain ones."""
    model = patch_model(adapted(name, way), CUTS[cut])
    expected = logits(model, name)
    if merge == "beside":
        model.merge_adapter()
        torch.testing.assert_close(logits(model, name), expected, **CLOSE)
        merged = logits(model, name)
        assert torch.equal(logits(patch_model(model, CUTS[cut]), name), merged)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, name), expected, **CLOSE)
    else:
        model = model.merge_and_unload()
        assert not any(hasattr(module, "lora_A") for module in model.modules())
        merged = logits(model, name)
        torch.testing.assert_close(merged, expected, **CLOSE)
        assert torch.equal(logits(patch_model(model, CUTS[cut]), name), merged)
        assert torch.equal(logits(patch_model(model, kernel="eager"), name), _as_eager(model, name))
    assert any(isinstance(m, SurgicalAttention) for m in model.modules())
    unpatch_model(model)
    assert not any(isinstance(m, SurgicalAttention) for m in model.modules())
    torch.testing.assert_close(logits(model, name), logits(adapted(name, way), name), **CLOSE)


def _as_eager(model: Any, name: str) -> Tensor:
    """What the same weights give in the model that is loaded as eager."""
    plain = FAMILIES[name].build("eager")
    plain.load_state_dict(model.state_dict())
    return logits(plain, name)


@by_way
@by_name
def test_eager_is_the_adapted_model_loaded_as_eager(name: str, way: str) -> None:
    expected = logits(adapted(name, way, FAMILIES[name].build("eager")), name)
    assert torch.equal(logits(patch_model(adapted(name, way), kernel="eager"), name), expected)


@pytest.mark.parametrize("change", ["set_adapter", "disable", "delete"])
@by_name
def test_adapters_may_change_while_the_model_is_patched(name: str, change: str) -> None:
    """Which adapters are active is looked up in each forward; a cut stays where it is."""
    cut = CUTS["q"]
    model = adapted(name, "lora")
    torch.manual_seed(6)
    options: dict[str, Any] = dict(target_modules=TARGETS[name], init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    model.add_adapter("second", LoraConfig(r=2, use_dora=True, **options))
    model.eval()
    switch: Callable[[], Any] = {
        "set_adapter": lambda: model.set_adapter("second"),
        "disable": lambda: model.base_model.disable_adapter_layers(),
        "delete": lambda: (model.set_adapter("second"), model.delete_adapter("default")),
    }[change]
    patch_model(model, cut)
    before, weight = logits(model, name), weights.W_Q(model, 0)
    switch()
    after = logits(model, name)
    assert not torch.allclose(after, before, atol=1e-3)
    assert not torch.allclose(weights.W_Q(model, 0), weight, atol=1e-3)
    unpatch_model(model)
    bare = logits(model, name)
    with patched(model, cut):
        assert torch.equal(logits(model, name), after)
    assert torch.equal(logits(model, name), bare) and not torch.equal(bare, after)
    if change == "disable":
        assert torch.equal(bare, logits(FAMILIES[name].build("sdpa"), name))
