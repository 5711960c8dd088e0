"""The same network stored in two ways gives the same numbers under the same cuts; circuits are cut one without the other."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from families import FAMILIES, HEADS, KV_HEADS
from torch import Tensor

from surgery import Edit, Freeze, Reference, Spec, capture, collect_reference, patch_model, patched
from surgery.weights import head_weights

GROUP = HEADS // KV_HEADS
GROUPED = [name for name, family in FAMILIES.items() if family.options.get("num_key_value_heads") == KV_HEADS]


def ungrouped_twin(name: str, implementation: str) -> tuple[Any, Any]:
    """A grouped model, and the model that computes the same with one kv head per query head: weights duplicated."""
    grouped = FAMILIES[name].build(implementation)
    twin = FAMILIES[name].build(implementation, num_key_value_heads=HEADS)
    state, targets = grouped.state_dict(), twin.state_dict()
    for key, target in targets.items():
        # One norm for each kv head, where a family has them by head.
        own = re.sub(r"(k_layernorm\.norms\.)(\d+)", lambda found: f"{found[1]}{int(found[2]) // GROUP}", key)
        value = state[own]
        if value.shape != target.shape:
            value = spread(value, target.shape[0], fused=".qkv_proj." in key)
        assert value.shape == target.shape, key
        targets[key] = value
    twin.load_state_dict(targets)
    return grouped, twin


def spread(value: Tensor, rows: int, fused: bool) -> Tensor:
    """Rows of k or v (of q, k, v where they are fused), each kv head's written once per query head of its group."""
    d_head = rows // (3 * HEADS if fused else HEADS)
    if not fused:
        return value.unflatten(0, (KV_HEADS, d_head)).repeat_interleave(GROUP, 0).flatten(0, 1)
    q, k, v = value.split([HEADS * d_head, KV_HEADS * d_head, KV_HEADS * d_head])
    return torch.cat([q, *(spread(part, HEADS * d_head, False) for part in (k, v))])


def isolated_cuts(model: Any, family: Any) -> list[Spec]:
    means = collect_reference(model, [family.inputs(seed=4)], progress=False)
    means = Reference("mean", means.entries)  # without the model's mark: the twin has other kv heads
    return [
        Spec(Freeze("qk", heads=[1])),
        Spec(Freeze("qk", heads=[0, 3], to="identity", backward="stopgrad")),
        Spec(Freeze("both", layers=[0], heads=[2], to="mean", reference=means)),
        Spec(Freeze("both", heads=[1, 2], to="noise", seed=1)),
        Spec(Freeze("both", heads=[3], to="resample", strength=0.7)),
        Spec([Edit("rot_k", "scale", 0.3, heads=[1]), Edit("v", "zero", heads=[2], positions=[4, 5])]),
        Spec([Edit("v", "scale", 0.5, heads=[0]), Edit("scores", "zero", heads=[3]), Edit("pattern", "uniform", heads=[1])]),
        Spec(Edit("result", "scale", -1.0, heads=[2])),
    ]


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a loss on them with respect to the input embeddings."""
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), embedded)[0]


@pytest.mark.parametrize("name", GROUPED)
def test_an_isolated_cut_is_the_cut_of_that_head_in_the_ungrouped_twin(name: str) -> None:
    family = FAMILIES[name]
    inputs = family.inputs()
    real = inputs["attention_mask"].bool()
    for implementation in ("eager", "sdpa") if family.sdpa else ("eager",):
        grouped, twin = ungrouped_twin(name, implementation)
        plain = run(grouped, inputs)[0]
        for spec in isolated_cuts(grouped, family):
            for kernel in ("eager", "auto"):
                found, expected = (run(patch_model(m, spec, kernel=kernel), inputs) for m in (grouped, twin))  # type: ignore[arg-type]
                # The duplicated projection is a wider product: its sums may be ordered differently. Gradients also add a
                # group's parts in another order.
                torch.testing.assert_close(found[0][real], expected[0][real], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(found[1][real], expected[1][real], atol=1e-3, rtol=1e-3)
                if any(getattr(cut, "to", "") != "identity" for cut in spec):
                    assert not torch.allclose(found[0][real], plain[real], atol=1e-4), "the cut must act"


def test_a_shared_cut_is_that_of_the_whole_group() -> None:
    family = FAMILIES["llama"]
    inputs = family.inputs()
    model = family.build()
    for site, action, value in (("v", "scale", 0.5), ("rot_k", "zero", None), ("rot_k", "scale", 2.0)):
        shared = Edit(site, action, value, heads=[1], gqa="shared")
        group = Edit(site, action, value, heads=[0, 1])
        alone = Edit(site, action, value, heads=[1])
        found = [run(patch_model(model, cut), inputs)[0] for cut in (shared, group, alone)]
        assert torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], found[2], atol=1e-4)


def test_fused_and_separate_projections_agree() -> None:
    separate = FAMILIES["llama"].build(head_dim=8, rms_norm_eps=1e-5)
    fused = FAMILIES["phi3"].build(sliding_window=None)
    state = separate.state_dict()
    target = fused.state_dict()
    for key in target:
        if ".qkv_proj." in key:
            target[key] = torch.cat([state[key.replace("qkv_proj", f"{part}_proj")] for part in "qkv"])
        elif ".gate_up_proj." in key:
            target[key] = torch.cat([state[key.replace("gate_up_proj", f"{part}_proj")] for part in ("gate", "up")])
        else:
            target[key] = state[key]
    fused.load_state_dict(target)
    inputs = FAMILIES["llama"].inputs()
    # One wide product and three narrow ones may order their sums differently.
    close = dict(atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fused(**inputs).logits, separate(**inputs).logits, **close)
    more = [
        Spec(Edit("q", "scale", 0.5, heads=[1])),
        Spec(Edit("k", "add", 0.2, heads=[0, 1])),
        Spec(Edit("k", "zero", heads=[2], gqa="shared")),
    ]
    for spec in (*isolated_cuts(separate, FAMILIES["llama"]), *more):
        found = [patch_model(m, spec)(**inputs).logits for m in (fused, separate)]
        torch.testing.assert_close(*found, **close)
    for letter in "QKVO":
        one, other = (getattr(head_weights(m, 1), f"W_{letter}") for m in (fused, separate))
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [n for n in FAMILIES if FAMILIES[n].kind != "speech"])
def test_each_circuit_is_cut_alone(name: str) -> None:
    """QK frozen: v of that layer stays. OV frozen: the pattern of that layer stays. In other layers both may change."""
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    address = "decoder.self.0" if FAMILIES[name].kind == "encoder_decoder" else "self.0"

    def seen(cut: Any) -> dict[str, Tensor]:
        with patched(model, cut), capture(model, ["v", "pattern", "z"], layers=[address], detach=True) as watched:
            model(**inputs)
        return {site: watched[address, site] for site in ("v", "pattern", "z")}

    intact = seen(None)
    qk = seen(Freeze("qk", layers=[address], heads=[1], to="noise"))
    ov = seen(Freeze("ov", layers=[address], heads=[1], to="noise"))
    assert torch.equal(qk["v"], intact["v"]) and not torch.equal(qk["pattern"], intact["pattern"])
    assert torch.equal(ov["pattern"], intact["pattern"]) and not torch.equal(ov["z"], intact["z"])
    others = [0, 2, 3]
    for cut in (qk, ov):
        assert torch.equal(cut["z"][:, others], intact["z"][:, others]), "heads that are not cut stay, bit for bit"


@pytest.mark.parametrize("name", [n for n in FAMILIES if FAMILIES[n].kind == "decoder"])
def test_both_circuits_to_zero_remove_the_head(name: str) -> None:
    """Equal to zeroing the head's rows of W_O by hand."""
    family = FAMILIES[name]
    inputs = family.inputs()
    real = inputs["attention_mask"].bool()
    model, by_hand = family.build(), family.build()
    with torch.no_grad():
        for layer in (0, 1):
            attention = head_weights(by_hand, layer).attention
            projection = attention.projections["o"]
            weight = by_hand.get_submodule(projection.path).weight
            is_transposed = type(by_hand.get_submodule(projection.path)).__name__ == "Conv1D"
            (weight if is_transposed else weight.T)[projection.channels[2]] = 0.0
    found = patch_model(model, Freeze("both", heads=[2]))(**inputs).logits
    # x * 0 summed in a product is 0 wherever it stands: the sums are equal to the last bit, but for the sign of zeros.
    torch.testing.assert_close(found[real], by_hand(**inputs).logits[real], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, family.build()(**inputs).logits, atol=1e-4)
