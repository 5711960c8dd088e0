"""Faults that libraries of this kind have had without anyone seeing them, each shown impossible.

A check is a function of a model or of what it gave; the fault is made by hand and must not pass the same check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, PADDING
from torch import Tensor, nn

from surgery import Edit, Freeze, Spec, capture, inspect_model, patch_model, unpatch_model

CUT = Spec([Freeze("qk", layers=[0], heads=[1]), Freeze("ov", layers=[1], heads=[2])])
FUSED = ("gpt2", "gpt_neox", "phi3", "falcon_grouped", "bloom")
IMPLEMENTATIONS = ("eager", "sdpa")


def by_case(names: list[str]) -> Any:
    cases = [(name, i) for name in names for i in IMPLEMENTATIONS if i == "eager" or FAMILIES[name].sdpa]
    return pytest.mark.parametrize(("name", "implementation"), cases)


@torch.no_grad()
def logits(model: nn.Module, name: str, **more: Any) -> Tensor:
    return model(**FAMILIES[name].inputs(), **more).logits


# -- a fused projection that is copied into parts is trained twice, or not at all --------------------------------------------


def train(model: nn.Module, name: str, steps: int = 3) -> dict[str, Tensor]:
    """The parameters after a few steps of AdamW, whose state would tell two tensors from one."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        model(**FAMILIES[name].inputs()).logits.square().mean().backward()
        optimiser.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def is_trained_as(model: nn.Module, expected: dict[str, Tensor], name: str) -> bool:
    found = train(model, name)
    return list(found) == list(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


class SplitLinear(nn.Module):
    """The fault: what a fused projection computes, from copies of its parts."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = fused.weight, fused.bias
        self.parts = nn.ParameterList(part.detach().clone() for part in fused.weight.chunk(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.cat(list(self.parts)), self.bias)


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_trained_once(name: str) -> None:
    expected = train(FAMILIES[name].build(), name)
    model = FAMILIES[name].build()
    owned = [id(p) for p in model.parameters()]
    patch_model(model, Edit("z", "scale", 1.0))
    assert [id(p) for p in model.parameters()] == owned
    assert is_trained_as(model, expected, name)
    # An optimiser that was made before patching trains what the patched model computes with.
    model = FAMILIES[name].build()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    patch_model(model)
    before = logits(model, name)
    model(**FAMILIES[name].inputs()).logits.square().mean().backward()
    optimiser.step()
    assert not torch.equal(logits(model, name), before)
    assert torch.equal(logits(unpatch_model(model), name), logits(patch_model(model), name))


def test_the_check_of_training_sees_a_copied_projection() -> None:
    expected = train(FAMILIES["gpt_neox"].build(), "gpt_neox")
    model: Any = FAMILIES["gpt_neox"].build()
    attention = model.gpt_neox.layers[0].attention
    attention.query_key_value = SplitLinear(attention.query_key_value)
    assert torch.equal(logits(model, "gpt_neox"), logits(FAMILIES["gpt_neox"].build(), "gpt_neox"))
    assert not is_trained_as(model, expected, "gpt_neox")


# -- dropout of the residual, inside the attention module, that is lost in training ------------------------------------------

RESIDUAL = {
    "gpt2": {"resid_pdrop": 0.2, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neo": {"resid_dropout": 0.2, "attention_dropout": 0.0, "embed_dropout": 0.0},
    "gptj": {"resid_pdrop": 0.2, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "bloom": {"hidden_dropout": 0.2, "attention_dropout": 0.0},
}


def trained_logits(model: nn.Module, name: str) -> Tensor:
    torch.manual_seed(3)
    return logits(model.train(), name)


@pytest.mark.parametrize("name", RESIDUAL)
def test_dropout_of_the_residual_stays(name: str) -> None:
    model = FAMILIES[name].build(**RESIDUAL[name])
    expected = trained_logits(model, name)
    lossless = FAMILIES[name].build(**dict.fromkeys(RESIDUAL[name], 0.0))
    assert not torch.equal(trained_logits(lossless, name), expected), "the fault: without dropout"
    for kernel in ("auto", "eager"):
        for spec in (Spec(), Edit("pattern", "scale", 1.0), Edit("result", "scale", 1.0)):
            assert torch.equal(trained_logits(patch_model(model, spec, kernel=kernel), name), expected)


# -- flags of the attention that are ignored ---------------------------------------------------------------------------------

FLAGS = {
    "no scale": {"scale_attn_weights": False},
    "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
    "both": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_the_scale_are_kept(flags: str, implementation: str) -> None:
    model = FAMILIES["gpt2"].build(implementation, **FLAGS[flags])
    expected, usual = logits(model, "gpt2"), logits(FAMILIES["gpt2"].build(implementation), "gpt2")
    assert not torch.equal(expected, usual), "the fault: the flag ignored"
    assert torch.equal(logits(patch_model(model), "gpt2"), expected)
    with capture(model, ["rot_q", "rot_k", "scores"]) as seen:
        logits(model, "gpt2")
    for layer in range(2):
        scale = 1.0 if "scale_attn_weights" in FLAGS[flags] else 8**-0.5
        scale = scale / (layer + 1) if "scale_attn_by_inverse_layer_idx" in FLAGS[flags] else scale
        q, k, scores = (seen[f"self.{layer}", site] for site in ("rot_q", "rot_k", "scores"))
        allowed = scores > -1e4
        # Families multiply by the scale before or after the product.
        torch.testing.assert_close(scores[allowed], (q @ k.mT * scale)[allowed], rtol=1e-5, atol=1e-5)


# -- heads of latent attention that are cut at the width of q, though v has another ------------------------------------------


def without_channels(model: nn.Module, channels: slice) -> Tensor:
    """The logits with these channels of W_O's input set to zero in the first layer, by a hook."""
    modules = dict(model.named_modules())

    def zero(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., channels] = 0
        return (z,)

    handle = modules["model.layers.0.self_attn.o_proj"].register_forward_pre_hook(zero)
    try:
        return logits(model, "deepseek_v3")
    finally:
        handle.remove()


@pytest.mark.parametrize("head", range(4))
def test_latent_attention_is_cut_at_the_width_of_v(head: int) -> None:
    # q and k: 8 channels without position and 4 with, of which v has 10.
    options = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
    model = FAMILIES["deepseek_v3"].build(**options)
    right, wrong = (without_channels(model, slice(head * width, (head + 1) * width)) for width in (10, 12))
    patch_model(model, Edit("z", "zero", layers=[0], heads=[head]))
    assert torch.equal(logits(model, "deepseek_v3"), right)
    assert not torch.equal(right, wrong), "the fault: the width of q"
    with capture(model, ["rot_q", "v", "z"]) as seen:
        logits(model, "deepseek_v3")
    assert [seen["self.0", site].shape[-1] for site in ("rot_q", "v", "z")] == [12, 10, 10]


# -- edits of the pattern that are taken and do nothing ----------------------------------------------------------------------


def by_softmax_and_product(seen: Any, layer: int, head: int, factor: float) -> Tensor:
    """z of a head whose pattern is scaled: (batch, query, d_head)."""
    pattern, v = seen[f"self.{layer}", "pattern"][:, head], seen[f"self.{layer}", "v"]
    return (pattern * factor) @ v[:, head * v.shape[1] // seen[f"self.{layer}", "pattern"].shape[1]]


@by_case(["gpt2", "llama", "deepseek_v3", "falcon_grouped", "gptj"])
def test_edits_of_the_pattern_act(name: str, implementation: str) -> None:
    model = patch_model(FAMILIES[name].build(implementation))
    with capture(model, ["pattern", "v", "z"]) as plain:
        before = logits(model, name)
    patch_model(model, Edit("pattern", "scale", 0.25, layers=[0], heads=[1]))
    with capture(model, ["z"]) as cut:
        after = logits(model, name)
    assert not torch.equal(after, before), "the fault: an edit without effect"
    # The one product runs over all heads or over one: sums in another order.
    close: Any = dict(rtol=1e-5, atol=1e-6)
    expected, full = by_softmax_and_product(plain, 0, 1, 0.25), slice(PADDING, None)  # queries that are padding are not cut
    torch.testing.assert_close(cut["self.0", "z"][:, 1, full], expected[:, full], **close)
    assert not torch.allclose(plain["self.0", "z"][:, 1, full], expected[:, full], **close)
    others = [0, 2, 3]
    torch.testing.assert_close(cut["self.0", "z"][:, others], plain["self.0", "z"][:, others], **close)


# -- attentions and hidden states that change in number, order or kind --------------------------------------------------------


def shapes(model: nn.Module, name: str) -> dict[str, list[tuple[int, ...]]]:
    with torch.no_grad():
        out = model(**FAMILIES[name].inputs(), output_attentions=True, output_hidden_states=True, use_cache=True)
    found = {n: out[n] for n in out if "attentions" in n or "hidden_states" in n}
    kinds: dict[str, Any] = {n: [None if t is None else tuple(t.shape) for t in x] for n, x in found.items()}
    return {**kinds, "all": list(out)}


@by_case(["gpt2", "llama", "bert", "t5", "bloom", "falcon_grouped"])
def test_outputs_keep_their_number(name: str, implementation: str) -> None:
    model = FAMILIES[name].build(implementation)
    before = shapes(model, name)
    for spec in (Spec(), CUT, Edit("pattern", "scale", 0.5)):
        patch_model(model, spec)
        found = shapes(model, name)
        # With a reconstruction there are weights to give, where a fused kernel had none.
        filled = {n: [f if b is None else b for b, f in zip(before[n], found[n], strict=False)] for n in before}
        assert found == filled and {n: len(x) for n, x in found.items()} == {n: len(x) for n, x in before.items()}
        with capture(model, ["pattern", "result"]):
            assert shapes(model, name) == found
    assert shapes(unpatch_model(model), name) == before
    assert len(before["hidden_states" if "hidden_states" in before else "decoder_hidden_states"]) == 3


# -- a copy that is wired to the original ------------------------------------------------------------------------------------


def is_independent(twin: nn.Module, model: nn.Module, name: str, change: Callable[[nn.Module], Any]) -> bool:
    """Whether a change of the copy leaves what the original gives."""
    before = logits(model, name)
    change(twin)
    return torch.equal(logits(model, name), before) and not torch.equal(logits(twin, name), before)


@torch.no_grad()
def double_values(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.5)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "other cuts": lambda model: patch_model(model, Edit("z", "zero", heads=[0, 3])),
    "undone": unpatch_model,
    "other weights": double_values,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "t5"])
def test_a_deep_copy_is_not_wired_to_the_original(name: str, change: str) -> None:
    model = patch_model(FAMILIES[name].build(), CUT)
    assert is_independent(copy.deepcopy(model), model, name, CHANGES[change])
    assert len(inspect_model(model)) == len(inspect_model(copy.deepcopy(model)))


def test_the_check_of_copies_sees_one_that_is_wired() -> None:
    model: Any = patch_model(FAMILIES["llama"].build(), CUT)
    twin: Any = copy.deepcopy(model)
    twin.model.layers[0].self_attn = model.model.layers[0].self_attn
    assert not is_independent(twin, model, "llama", double_values)
