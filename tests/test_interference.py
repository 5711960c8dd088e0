"""Interference between tasks: gradients of heads, Fisher references, kernels and maps, against slow obvious computations."""

from __future__ import annotations

import itertools
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import surgery.analysis.interference.collecting as collecting
from surgery import Freeze, SpecError, SurgeryError, UnsupportedArchitectureError, patched
from surgery.analysis import metrics
from surgery.analysis.interference.collecting import collect
from surgery.analysis.interference.fisher import Fisher
from surgery.analysis.interference.gradients import Gradients
from surgery.analysis.interference.kernels import KERNELS
from surgery.analysis.interference.maps import Interference, heatmap
from surgery.analysis.interference.scores import sample_scores
from surgery.analysis.interference.signed import sign_flip_test
from surgery.analysis.interference.statistics import Scores, permutation_test
from surgery.analysis.interference.study import conflict_test, overlap_test
from surgery.analysis.metrics import Measured, loss
from surgery.demo import load_model
from surgery.patch import anatomy_of

SAMPLES, LENGTH = 7, 9


def tokens(count: int = SAMPLES, seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 60, (count, length), generator=torch.Generator().manual_seed(seed))


def task(name: str, model: Any, ids: Tensor, **options: Any) -> Gradients:
    """Of an encoder, what it says of every token; of others, of the next."""
    inputs = {"input_ids": ids}
    if name in ("bert", "roberta"):
        inputs["labels"] = ids.flip(1)
    elif name in ("t5", "bart"):
        inputs |= {"decoder_input_ids": ids.flip(1)[:, :5], "labels": ids[:, :5].contiguous()}
    return collect(model, inputs, progress=False, **options)


def slow(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By weight, the gradient (sample, ...) of each sample's own loss: one backward for each."""
    found: dict[str, list[Tensor]] = {}
    for i in range(len(inputs["input_ids"])):
        one = {name: tensor[i : i + 1] for name, tensor in inputs.items()}
        model.zero_grad()
        output = model(**one)
        loss().function(Measured(model, one, output, output.logits, None)).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name, []).append(parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(parts) for name, parts in found.items()}


def heads_of(model: Any, by_weight: dict[str, Tensor]) -> dict[tuple[str, str, int], Tensor]:
    """(sample, d_in, channel) of Q, K, V, (sample, channel, d_model) of O."""
    found = {}
    for attention in anatomy_of(model):
        for block in "QKVO":
            projection = attention.projections[block.lower()]
            module = model.get_submodule(projection.path)
            gradient = by_weight[f"{projection.path}.weight"]
            gradient = gradient if isinstance(module, Conv1D) else gradient.mT
            for head, channels in enumerate(projection.channels):
                part = gradient[:, channels] if block == "O" else gradient[:, :, channels]
                found[attention.address, block, head] = part
    return found


# -- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "codegen", "llama", "falcon_grouped", "bloom", "bert", "phi3", "t5"])
def test_factors_give_the_gradients_of_one_backward_for_each_sample(name: str) -> None:
    model, ids = FAMILIES[name].build(), tokens(3)
    found = task(name, model, ids)
    inputs = {"input_ids": ids}
    if name == "bert":
        inputs["labels"] = ids.flip(1)
    if name == "t5":
        inputs |= {"decoder_input_ids": ids.flip(1)[:, :5], "labels": ids[:, :5].contiguous()}
    expected = heads_of(model, slow(model, inputs))
    assert found.hypotheses == list(expected)
    largest = max(float(part.abs().max()) for part in expected.values())
    for (address, block, head), gradients in expected.items():
        for sample in range(3):
            # Sums over positions in another order.
            torch.testing.assert_close(
                found.gradient(sample, address, block, head), gradients[sample], rtol=1e-4, atol=5e-5 * largest
            )
    norms = sum(part.double().square().sum((1, 2)) for part in expected.values())
    torch.testing.assert_close(found.norms(), norms.sqrt(), rtol=5e-5, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "codegen", "llama", "bert"])
def test_factors_are_those_of_torch_func(name: str) -> None:
    model, ids = FAMILIES[name].build(), tokens(3)
    model.set_attn_implementation("eager")
    weights = {n: w.detach() for n, w in model.named_parameters()}
    is_encoder = name == "bert"

    def of(weights: Any, row: Tensor) -> Tensor:
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()  # made of values, where vmap has none
        given = {} if is_encoder else {"use_cache": False}
        mask = torch.ones_like(mask) if is_encoder else mask
        inputs = {"input_ids": row[None], "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, -1e9), **given}
        logits = torch.func.functional_call(model, weights, (), inputs).logits[0]
        return torch.nn.functional.cross_entropy(*((logits, row.flip(0)) if is_encoder else (logits[:-1], row[1:])))

    by_weight = torch.func.vmap(torch.func.grad(of), (None, 0))(weights, ids)
    found = task(name, model, ids)
    largest = max(float(part.abs().max()) for part in heads_of(model, by_weight).values())
    for (address, block, head), gradients in heads_of(model, by_weight).items():
        for sample in range(3):
            # Sums over positions in another order.
            torch.testing.assert_close(
                found.gradient(sample, address, block, head), gradients[sample], rtol=1e-4, atol=5e-5 * largest
            )


def test_fused_and_separate_storage_give_the_same() -> None:
    """Phi-3 keeps Q, K and V in one matrix; the same numbers in Llama's three."""
    fused = FAMILIES["phi3"].build(sliding_window=None)
    c = fused.config
    apart = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            tie_word_embeddings=False,
        )
    ).eval()
    state = {}
    q = c.num_attention_heads * (c.hidden_size // c.num_attention_heads)
    kv = c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    for name, tensor in fused.state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split([q, kv, kv]), strict=True):
                state[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                state[name.replace("gate_up_proj", f"{part}_proj")] = rows
        else:
            state[name] = tensor
    apart.load_state_dict(state)
    ids = tokens()
    torch.testing.assert_close(fused(ids).logits, apart(ids).logits, rtol=1e-4, atol=1e-5)
    maps = [heatmap(task("", m, ids[:3]), task("", m, ids[3:])) for m in (fused, apart)]
    assert maps[0].hypotheses == maps[1].hypotheses
    torch.testing.assert_close(maps[0].maps, maps[1].maps, rtol=2e-3, atol=1e-5)  # quotients of small numbers


def ungrouped(model: Any) -> Any:
    """The same Llama with a copy of k and v for every query head: W_K's gradient of a copy is what came through its head."""
    c = LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": model.config.num_attention_heads})
    state, group = model.state_dict(), model.config.num_attention_heads // model.config.num_key_value_heads
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = weight.unflatten(0, (-1, c.head_dim)).repeat_interleave(group, 0).flatten(0, 1)
    found = LlamaForCausalLM(c).eval()
    found.load_state_dict(state)
    return found


def test_query_heads_are_those_of_a_model_without_groups() -> None:
    model, ids = FAMILIES["llama"].build(), tokens()
    a, b = task("", model, ids[:3]), collect(model, [ids[3:5], ids[5:]], query_heads=True, progress=False)
    twin = task("", ungrouped(model), ids[3:])
    plain, found = heatmap(a, b), heatmap(a, b, query_heads=True)
    assert [h for h in found.hypotheses if h[1] in "QO"] == [h for h in plain.hypotheses if h[1] in "QO"]
    assert len([h for h in found.hypotheses if h[1] == "K"]) == 2 * len([h for h in plain.hypotheses if h[1] == "K"])
    for block in b.blocks.values():
        if block.name in "QO":
            assert block.group == 1
            for head in range(block.heads):
                assert torch.equal(found.map(block.address, block.name, head), plain.map(block.address, block.name, head))
            continue
        gi = torch.stack([stack(a, block.address, block.name, h) for h in range(block.heads)])
        gj = torch.stack([stack(b, block.address, block.name, h) for h in range(block.heads)])
        reference = torch.cat([gi, gj], 1).square().mean(1)
        reference = reference + 1e-3 * reference.mean()
        for head in range(2 * block.heads):
            through = stack(twin, block.address, block.name, head)
            kv = head // 2
            expected = torch.einsum("ip,jp->ij", gi[kv].square() / reference[kv], gj[kv].sign() * through)
            scale = float(plain.map(block.address, block.name, kv).max())
            torch.testing.assert_close(
                found.map(block.address, block.name, head).double(), expected, rtol=1e-3, atol=1e-5 * scale
            )
    assert found.maps is not None and (found.maps < 0).any(), "a part may point against the whole"


def stack(g: Gradients, *hypothesis: Any) -> Tensor:
    """(sample, parameter) float64."""
    return torch.stack([g.gradient(i, *hypothesis).double().flatten() for i in range(len(g))])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["falcon_grouped", "phi3", "qwen3"])
def test_query_heads_add_up_to_their_kv_head(name: str, kernel: str) -> None:
    model, ids = FAMILIES[name].build(), tokens()
    a, b = task("", model, ids[:3], biases=True), task("", model, ids[3:], biases=True, query_heads=True)
    whole, parts = heatmap(a, b, kernel=kernel), heatmap(a, b, kernel=kernel, query_heads=True)
    assert whole.maps is not None and parts.maps is not None
    for (address, block, head), table in zip(whole.hypotheses, whole.maps, strict=True):
        group = b.blocks[f"{address}.{block}"].group
        some = [parts.map(address, block, head * group + member) for member in range(group)]
        assert group == 1 or all(part.any() for part in some)
        # Sums in another order, of parts that may cancel.
        torch.testing.assert_close(sum(some), table, rtol=1e-4, atol=1e-5 * float(table.abs().max()))


def test_a_query_head_whose_z_is_cut_has_no_share() -> None:
    model, ids = FAMILIES["llama"].build(), tokens()
    with patched(model, Freeze("ov", [1], [2])):
        a, b = task("", model, ids[:3]), task("", model, ids[3:], query_heads=True)
        whole, parts = heatmap(a, b), heatmap(a, b, query_heads=True)
    for block in "KV":
        assert not parts.map("self.1", block, 2).any()
        torch.testing.assert_close(parts.map("self.1", block, 3), whole.map("self.1", block, 1), rtol=1e-6, atol=0)


def test_query_heads_that_were_not_kept_apart_are_refused(tmp_path: Path) -> None:
    model, ids = FAMILIES["llama"].build(), tokens()
    a, b = task("", model, ids[:3]), task("", model, ids[3:], query_heads=True)
    with pytest.raises(SpecError, match=r"by kv head alone \(self.0.K, .*Collect them with query_heads=True"):
        heatmap(b, a, query_heads=True)
    b.save(tmp_path / "b")
    again = Gradients.load(tmp_path / "b", model)
    assert torch.equal(heatmap(a, again, query_heads=True).maps, heatmap(a, b, query_heads=True).maps)
    with pytest.raises(SpecError, match="query_heads: True; expected query_heads: False"):
        collect(model, ids[3:], resume=tmp_path / "b", progress=False)
    single = load_model()
    assert all(block.group == 1 for block in task("", FAMILIES["gpt2"].build(), ids).blocks.values())
    c, d = (task("", single, some, query_heads=True) for some in (ids[:3], ids[3:]))
    assert [h for h in heatmap(c, d, query_heads=True).hypotheses if h[1] == "K"] == [
        (address, "K", head) for address in ("self.0", "self.1") for head in range(4)
    ]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "qwen2", "bert"])
def test_biases_are_the_weights_of_an_input_that_is_one(name: str) -> None:
    model, ids = FAMILIES[name].build(), tokens(3)
    found, without = task(name, model, ids, biases=True), task(name, model, ids)
    inputs = {"input_ids": ids} | ({"labels": ids.flip(1)} if name == "bert" else {})
    by_weight = slow(model, inputs)
    scale = max(float(gradient.abs().max()) for weight, gradient in by_weight.items() if "bias" in weight)
    for attention in anatomy_of(model):
        for block in "QKVO":
            projection = attention.projections[block.lower()]
            for head, channels in enumerate(projection.channels):
                hypothesis = (attention.address, block, head)
                for sample in range(3):
                    plain = without.gradient(sample, *hypothesis)
                    if block == "O":
                        assert torch.equal(found.gradient(sample, *hypothesis), plain)
                        continue
                    whole = found.gradient(sample, *hypothesis)
                    bias = by_weight[f"{projection.path}.bias"][sample, channels]
                    assert torch.equal(whole[:-1], plain)
                    torch.testing.assert_close(whole[-1], bias, rtol=1e-4, atol=1e-6 * scale)
    with pytest.raises(SpecError, match="gradients with biases: False"):
        heatmap(found, without)


def test_nothing_is_left_behind() -> None:
    model, ids = load_model(), tokens()
    model.model.layers[0].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    found = task("", model, ids)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    other = task("", load_model(), ids)
    for address, block, head in found.hypotheses:  # frozen or not
        assert torch.equal(found.gradient(1, address, block, head), other.gradient(1, address, block, head))
    with torch.no_grad():
        assert torch.equal(task("", model, ids).norms(), found.norms())


def test_half_precision_sums_in_float32() -> None:
    model, ids = load_model().bfloat16(), tokens(3)
    found = task("", model, ids)
    assert found.parts[0].factor("self.0.Q")[0].dtype is torch.bfloat16
    assert found.gradient(0, "self.0", "Q", 0).dtype is torch.float32
    maps = heatmap(found, found).maps
    assert maps is not None and maps.dtype is torch.float32 and maps.isfinite().all()


def test_padding_and_batches_change_nothing() -> None:
    model, ids = FAMILIES["llama"].build(), tokens(4)
    padded = torch.cat([ids, torch.ones(4, 3, dtype=torch.long)], 1)
    inputs = {"input_ids": padded, "attention_mask": (torch.arange(LENGTH + 3) < LENGTH).long().repeat(4, 1)}
    whole = task("", model, ids)
    parts = collect(
        model, [{name: tensor[rows] for name, tensor in inputs.items()} for rows in ([0], [1, 2, 3])], progress=False
    )
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-5, atol=0)
    for sample, (address, block, head) in itertools.product(range(4), whole.hypotheses):
        torch.testing.assert_close(
            parts.gradient(sample, address, block, head), whole.gradient(sample, address, block, head), rtol=1e-3, atol=1e-6
        )


# -- kernels and maps ---------------------------------------------------------------------------------------------------


def by_hand(a: Gradients, b: Gradients, kernel: str, is_unit: bool = False, rho: float = 1e-3) -> Tensor:
    """(hypothesis, i, j) in float64, pair by pair from the formulas."""
    lengths = [g.norms() if is_unit or kernel == "signed" else torch.ones(len(g)) for g in (a, b)]
    found: dict[tuple[str, str, int], Tensor] = {}
    for block in a.blocks.values():
        parts = [
            torch.stack(
                [
                    torch.stack([g.gradient(i, block.address, block.name, h).double() / n[i] for h in range(block.heads)])
                    for i in range(len(g))
                ]
            )
            for g, n in zip((a, b), lengths, strict=True)
        ]
        reference = torch.cat(parts).square().mean(0)
        reference = reference + rho * reference.mean()
        for h in range(block.heads):
            table = torch.zeros(len(a), len(b), dtype=torch.float64)
            for i, j in itertools.product(range(len(a)), range(len(b))):
                gi, gj, f = parts[0][i, h], parts[1][j, h], reference[h]
                table[i, j] = {
                    "qkov": (gi.square() / f * gj.abs()).sum(),
                    "whitened": (gi.square() / f * gj.abs() / f.sqrt()).sum(),
                    "signed": -(gi * gj).sum(),
                    "ewc": (gi.square() * gj.square()).sum(),
                }[kernel]
            found[block.address, block.name, h] = table
    return torch.stack([found[hypothesis] for hypothesis in a.hypotheses])


@pytest.mark.parametrize("is_unit", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_maps_are_those_of_the_slow_loop_over_pairs(kernel: str, is_unit: bool) -> None:
    model, ids = FAMILIES["llama"].build(), tokens()
    a, b = collect(model, [ids[:2], ids[2:3]], progress=False), task("", model, ids[3:])
    expected = by_hand(a, b, kernel, is_unit)
    for memory_mib in (64, 1e-3):  # whole heads; one row of a head's parameters at a time
        found = heatmap(a, b, kernel=kernel, is_unit=is_unit, memory_mib=memory_mib)
        assert found.maps is not None
        # Sums of as many products in float32; those of the signed kernel cancel.
        scale = expected.abs().amax((1, 2), keepdim=True)
        assert ((found.maps - expected).abs() <= 2e-6 * scale + 1e-12).all()
        means = heatmap(a, b, kernel=kernel, is_unit=is_unit, memory_mib=memory_mib, keep_maps=False)
        torch.testing.assert_close(means.rows, expected.mean(2), rtol=1e-4, atol=1e-5 * float(scale.max()))
        torch.testing.assert_close(means.columns, expected.mean(1), rtol=1e-4, atol=1e-5 * float(scale.max()))


def test_heads_sum_to_the_whole_block() -> None:
    """Additivity: with the block's own reference, the sum over heads (kv heads) is the sum over the weight's entries."""
    model, ids = FAMILIES["llama"].build(), tokens()
    a, b = task("", model, ids[:3]), task("", model, ids[3:])
    found = heatmap(a, b)
    by_weight = slow(model, {"input_ids": ids})
    for attention in anatomy_of(model):
        for block in "QKVO":
            g = by_weight[f"{attention.projections[block.lower()].path}.weight"].double().flatten(1)
            reference = g.square().mean(0)
            expected = (g[:3].square() / (reference + 1e-3 * reference.mean())) @ g[3:].abs().mT
            heads = [found.map(*h) for h in found.hypotheses if h[:2] == (attention.address, block)]
            torch.testing.assert_close(sum(heads).double(), expected, rtol=1e-4, atol=0)


def test_scaling_the_loss_scales_the_map() -> None:
    model, ids = load_model(), tokens()
    scaled = metrics.Metric("loss", "nats per token", lambda m: 4 * loss().function(m))
    one = heatmap(task("", model, ids[:3]), task("", model, ids[3:]))
    four = heatmap(task("", model, ids[:3], loss=scaled), task("", model, ids[3:], loss=scaled))
    assert torch.equal(four.maps, 4 * one.maps), "powers of two round alike"
    whitened = [
        heatmap(task("", model, ids[:3], loss=f), task("", model, ids[3:], loss=f), kernel="whitened").maps
        for f in (loss(), scaled)
    ]
    assert torch.equal(*whitened)


def test_moving_scale_from_queries_to_keys() -> None:
    model, ids = FAMILIES["llama"].build(), tokens()
    before = heatmap(task("", model, ids[:3]), task("", model, ids[3:]))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(4)
            layer.self_attn.k_proj.weight.div_(4)
    after = heatmap(task("", model, ids[:3]), task("", model, ids[3:]))
    factors = {"Q": 0.25, "K": 4.0, "V": 1.0, "O": 1.0}
    for number, (_, block, _) in enumerate(before.hypotheses):
        assert torch.equal(after.maps[number], before.maps[number] * factors[block])


ZEROS = {"q": "K", "k": "Q", "v": "QKO", "o": "QKV"}


@pytest.mark.parametrize("zero", [*ZEROS, "cut"])
def test_a_zero_weight_or_cut_silences_what_hangs_on_it(zero: str) -> None:
    model, ids = FAMILIES["gpt2"].build(), tokens()
    attention = anatomy_of(model)["self.1"]
    if zero == "cut":
        with patched(model, Freeze("ov", [1], [2])):
            found = heatmap(task("", model, ids[:3]), task("", model, ids[3:]))
        silent = {("self.1", block, 2) for block in "QKVO"}
    else:
        projection = attention.projections[zero]
        module, channels = model.get_submodule(projection.path), projection.channels[2]
        with torch.no_grad():
            if zero == "o":
                module.weight[channels] = 0
            else:
                module.weight[:, channels] = 0
                module.bias[channels] = 0
        found = heatmap(task("", model, ids[:3]), task("", model, ids[3:]))
        silent = {("self.1", block, 2) for block in ZEROS[zero]}
    assert found.maps is not None
    assert {h for h, m in zip(found.hypotheses, found.maps, strict=True) if not m.any()} == silent


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16), st.floats(1e-4, 1.0))
def test_any_gradients(n_a: int, n_b: int, seed: int, rho: float) -> None:
    """Signs do not matter to the unsigned kernels; the signed one is symmetric; all follow the formulas."""
    model = MODEL
    a, b = task("", model, tokens(n_a, seed)), task("", model, tokens(n_b, seed + 1))
    flipped = task("", model, tokens(n_a, seed), loss=metrics.Metric("loss", "", lambda m: -loss().function(m)))
    with pytest.raises(SpecError, match="gradients with loss: "):
        heatmap(flipped, b)
    flipped.about = b.about  # two losses do not belong together; here they may
    for kernel in KERNELS:
        found, there = heatmap(a, b, kernel=kernel, rho=rho), heatmap(flipped, b, kernel=kernel, rho=rho)
        sign = -1 if kernel == "signed" else 1
        assert torch.equal(there.maps, sign * found.maps)
        torch.testing.assert_close(found.maps.double(), by_hand(a, b, kernel, rho=rho), rtol=1e-3, atol=1e-6)
    signed = heatmap(a, b, kernel="signed").maps
    torch.testing.assert_close(heatmap(b, a, kernel="signed").maps.mT, signed, rtol=1e-4, atol=1e-6)
    total = sum(
        torch.stack([a.gradient(0, *h).double().flatten() @ b.gradient(0, *h).double().flatten() for h in a.hypotheses])
    )
    assert float(signed[:, 0, 0].double().sum()) == pytest.approx(-float(total / a.norms()[0] / b.norms()[0]), abs=1e-5)


MODEL = load_model()


# -- the Fisher reference -----------------------------------------------------------------------------------------------


def test_a_moving_average_does_not_depend_on_batches() -> None:
    model, ids, beta = load_model(), tokens(), 0.8
    whole = Fisher(beta).update(task("", model, ids))
    parts = Fisher(beta)
    for rows in ([0], [1, 2, 3], [4, 5], [6]):
        parts.update(task("", model, ids[rows]))
    gradients = task("", model, ids)
    weights = torch.tensor([(1 - beta) * beta ** (SAMPLES - 1 - k) / (1 - beta**SAMPLES) for k in range(SAMPLES)])
    assert float(weights.sum()) == pytest.approx(1)
    for key, block in gradients.blocks.items():
        for head in range(block.heads):
            g = torch.stack([gradients.gradient(i, block.address, block.name, head) for i in range(SAMPLES)])
            g = g.mT if block.name == "O" else g
            expected = torch.einsum("n,npc->pc", weights.double(), g.double().square()).float()
            for fisher in (whole, parts):
                found = fisher.part(key, head, 0, len(expected))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_a_kept_mean_is_the_pool_of_its_samples(tmp_path: Path) -> None:
    model, ids = load_model(), tokens()
    a, b = task("", model, ids[:3]), task("", model, ids[3:])
    kept = Fisher().update(a).update(b)
    assert kept.count == SAMPLES and "7 samples" in repr(kept)
    pooled = heatmap(a, b)
    for fisher in (kept, [a, b], task("", model, ids)):
        torch.testing.assert_close(heatmap(a, b, fisher).maps, pooled.maps, rtol=1e-4, atol=0)
    assert not torch.allclose(heatmap(a, b, a).maps, pooled.maps, rtol=1e-2)
    kept.save(tmp_path / "fisher.safetensors")
    again = Fisher.load(tmp_path / "fisher.safetensors")
    assert torch.equal(heatmap(a, b, again).maps, heatmap(a, b, kept).maps)
    with pytest.raises(SpecError, match="expected a Fisher reference"):
        Fisher.load(tmp_path / "nothing.safetensors")
    with pytest.raises(SpecError, match="no samples yet"):
        heatmap(a, b, Fisher())


def test_with_its_own_mean_as_reference_the_map_says_nothing_of_a() -> None:
    """The degeneracy that the documentation warns of: the mean over A is the L1 norm of g_j."""
    model, ids = load_model(), tokens()
    a, b = task("", model, ids[:3]), task("", model, ids[3:])
    found = heatmap(a, b, fisher=a, rho=1e-25)
    for number, hypothesis in enumerate(found.hypotheses):
        for j in range(len(b)):
            norm = float(b.gradient(j, *hypothesis).abs().sum())
            assert float(found.columns[number, j]) == pytest.approx(norm, rel=1e-3)


# -- keeping, resuming, refusing ----------------------------------------------------------------------------------------


def test_maps_and_gradients_are_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = load_model(), tokens()
    a, b = collect(model, [ids[:2], ids[2:3]], task="sums", progress=False), task("", model, ids[3:])
    found = heatmap(a, b)
    found.save(tmp_path / "map.safetensors")
    again = Interference.load(tmp_path / "map.safetensors")
    assert torch.equal(again.maps, found.maps) and again.hypotheses == found.hypotheses and again.about == found.about
    assert again.to_frame().equals(found.to_frame()) and str(again) == str(found)
    a.save(tmp_path / "a")
    loaded = Gradients.load(tmp_path / "a", model)
    assert loaded.task == "sums" and len(loaded) == 3 and "on disk" in repr(loaded)
    assert torch.equal(heatmap(loaded, b).maps, found.maps)
    with pytest.raises(SpecError, match=r"expected .*self\.0: GPT2Attention"):
        Gradients.load(tmp_path / "a", FAMILIES["gpt2"].build())
    with pytest.raises(SpecError, match="expected an interference map"):
        Interference.load(tmp_path / "a" / "00000.safetensors")


def test_a_collection_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = load_model(), tokens(6)
    given = [ids[:2], ids[2:4], ids[4:]]
    expected = collect(model, given, progress=False)
    ran: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: ran.append(1))
    count = 0
    collected = collecting._collected

    def stopping(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return collected(*args, **options)

    monkeypatch.setattr(collecting, "_collected", stopping)
    with pytest.raises(KeyboardInterrupt):
        collect(model, given, task="x", resume=tmp_path / "x", progress=False)
    assert len(ran) == 2
    with pytest.raises(SpecError, match="found 2 of 3 batches"):
        Gradients.load(tmp_path / "x", model)
    (tmp_path / "x" / ".00002.safetensors.123").write_bytes(b"half a file")
    found = collect(model, given, task="x", resume=tmp_path / "x", progress=False)
    handle.remove()
    assert len(ran) == 3 and len(found) == 6 and torch.equal(found.norms(), expected.norms())
    with pytest.raises(SpecError, match="task: 'x'; expected task: 'y'"):
        collect(model, given, task="y", resume=tmp_path / "x", progress=False)
    with pytest.raises(SpecError, match="found other data in batch 1, or batches of another size"):
        collect(model, [given[0], given[2], given[1]], task="x", resume=tmp_path / "x", progress=False)
    (tmp_path / "x" / "00001.safetensors").unlink()
    with pytest.raises(SpecError, match="found 2 of 3 batches"):
        Gradients.load(tmp_path / "x", model)


def test_projections_that_are_not_derived_are_refused() -> None:
    """DeepSeek's keys come from two projections."""
    model = FAMILIES["deepseek_v3"].build()
    message = r"(?s)2 problems.*self\.0\.K: found k is joined from .*; expected one projection .*by layers="
    with pytest.raises(UnsupportedArchitectureError, match=message):
        collect(model, tokens(3), progress=False)


def test_weights_are_a_part_of_a_model(tmp_path: Path) -> None:
    model, ids = load_model(), tokens(4)
    before = collect(model, ids[:2], resume=tmp_path / "x", progress=False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    after = task("", model, ids[2:])
    with pytest.raises(SpecError, match=r"gradients with weights: .*Collect all tasks on one model"):
        heatmap(before, after)
    with pytest.raises(SpecError, match="weights: "):
        collect(model, ids[:2], resume=tmp_path / "x", progress=False)
    with pytest.raises(SpecError, match="weights: "):
        Gradients.load(tmp_path / "x", model)
    with patched(model, Freeze("ov", [1], [2])), pytest.raises(SpecError, match="gradients with cuts: "):
        heatmap(after, task("", model, ids[:2]))


def test_samples_that_are_not_by_themselves_are_refused() -> None:
    """DeBERTa's positions go through the projections, too, for all samples at once; a loss that looks at other samples."""
    config = DebertaV2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=64,
    )
    model, ids = DebertaV2ForMaskedLM(config).eval(), tokens(4)
    inputs = {"input_ids": ids, "labels": ids.flip(1)}
    with pytest.raises(SurgeryError, match=r"reads or gives \(1, 128, 32\); expected \(batch, …, d\) of 4 samples"):
        collect(model, inputs, progress=False)
    single = [{name: tensor[n : n + 1] for name, tensor in inputs.items()} for n in range(4)]
    found, expected = collect(model, single, progress=False), heads_of(model, slow(model, inputs))
    largest = max(float(part.abs().max()) for part in expected.values())
    for hypothesis, gradients in expected.items():
        torch.testing.assert_close(found.gradient(3, *hypothesis), gradients[3], rtol=1e-4, atol=5e-5 * largest)

    def mixed(output: Any) -> Tensor:
        return (output.logits + output.logits.roll(1, 0)).mean((1, 2))

    with pytest.raises(SurgeryError, match="a gradient of the first sample's loss at others' places in "):
        collect(load_model(), ids, loss=mixed, progress=False)


def test_a_loss_at_some_positions() -> None:
    model, ids = load_model(), tokens(3)
    with torch.no_grad():
        logits = model(ids).logits
    for position in (-1, 2):
        found = collect(model, ids, loss=metrics.logit_difference(5, 7, position), progress=False)
        expected = logits[:, position, 5] - logits[:, position, 7]
        torch.testing.assert_close(found.losses, expected.double(), rtol=1e-4, atol=1e-6)


def test_losses_of_one_name_are_told_apart(tmp_path: Path) -> None:
    model, ids = load_model(), tokens(4)

    def scaled(by: float) -> Any:
        return lambda output: by * output.logits[:, -1, 3]

    ways = {
        "positions": (loss([3]), loss([-1])),
        "answers": (metrics.logit_difference(5, 7), metrics.logit_difference(5, 8)),
        "closures": (scaled(1.0), scaled(2.0)),
        "tensors": (
            metrics.logit_difference(torch.tensor([1, 2]), torch.tensor([3, 4])),
            metrics.logit_difference(torch.tensor([1, 2]), torch.tensor([3, 5])),
        ),
    }
    for name, (first, second) in ways.items():
        before = collect(model, ids[:2], loss=first, resume=tmp_path / name, progress=False)
        collect(model, ids[:2], loss=first, resume=tmp_path / name, progress=False)
        with pytest.raises(SpecError, match=r"loss: .*; expected loss: "):
            collect(model, ids[:2], loss=second, resume=tmp_path / name, progress=False)
        with pytest.raises(SpecError, match="gradients with loss: "):
            heatmap(before, collect(model, ids[2:], loss=second, progress=False))
    assert heatmap(*(collect(model, some, loss=scaled(2.0), progress=False) for some in (ids[:2], ids[2:]))).maps is not None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # an older name that PEFT uses
def test_the_active_adapter_is_a_part_of_a_model() -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model, ids = get_peft_model(load_model(), config).eval(), tokens(4)
    model.add_adapter("other", config)
    model.eval()
    first = collect(model, ids[:2], progress=False)
    model.set_adapter("other")
    model.eval()
    second = collect(model, ids[2:], progress=False)
    with pytest.raises(SpecError, match="gradients with weights: "):
        heatmap(first, second)
    model.set_adapter("default")
    assert heatmap(first, collect(model, ids[2:], progress=False)).maps is not None


def test_a_folder_of_other_samples_stays_as_it_is(tmp_path: Path) -> None:
    model, ids = load_model(), tokens(6)
    whole = collect(model, [ids[:2], ids[2:4]], resume=tmp_path / "x", progress=False)
    for other in ([ids[4:]], [ids[:2], ids[4:], ids[2:4]], ids[:4]):
        with pytest.raises(SpecError, match="other data in batch . or batches of another size".replace(" or", ", or")):
            collect(model, other, resume=tmp_path / "x", progress=False)
    assert torch.equal(Gradients.load(tmp_path / "x", model).norms(), whole.norms()) and len(whole) == 4
    assert len(collect(model, [ids[:2]], resume=tmp_path / "x", progress=False)) == 2
    assert len(Gradients.load(tmp_path / "x", model)) == 4, "what follows stays"
    longer = collect(model, [ids[:2], ids[2:4], ids[4:]], resume=tmp_path / "x", progress=False)
    assert len(longer) == len(Gradients.load(tmp_path / "x", model)) == 6
    with pytest.raises(SpecError, match="other data in batch 0"):
        collect(model, ids[4:], progress=False).save(tmp_path / "x")
    kept = collect(model, ids[:2], progress=False)
    expected = heatmap(kept, kept).maps
    kept.save(tmp_path / "y")
    shutil.rmtree(tmp_path / "y")
    assert torch.equal(heatmap(kept, kept).maps, expected) and "in memory" in repr(kept)


def test_a_model_is_left_as_it_was_though_its_positions_grow() -> None:
    c = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = FAMILIES["llama"].build(max_position_embeddings=8, rope_parameters=c)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    collect(model, tokens(2, length=20), progress=False)
    after = dict(model.named_buffers())
    assert before and all(torch.equal(after[name], buffer) for name, buffer in before.items())
    with torch.no_grad():
        model(tokens(2, length=20))
    assert not all(torch.equal(dict(model.named_buffers())[name], buffer) for name, buffer in before.items())


def test_inputs_that_change_in_place_are_refused() -> None:
    """Autograd does not notice of a frozen weight: what it read was double by then."""
    model = load_model().requires_grad_(False)

    def double(module: Any, args: Any, output: Any) -> None:
        args[0].mul_(2)

    model.model.layers[0].self_attn.v_proj.register_forward_hook(double)
    with pytest.raises(SurgeryError, match=r"a change in place of what model\.layers\.0\.self_attn\."):
        collect(model, tokens(2), progress=False)


def test_query_heads_that_are_normed_together_are_refused() -> None:
    """OLMo 2 norms k over all heads: what comes through a query head is in the gradients of all."""
    model, ids = FAMILIES["olmo2"].build(), tokens(3)
    with pytest.raises(SurgeryError, match=r"the first group's query heads at other heads of .*k_proj"):
        collect(model, ids, query_heads=True, progress=False)
    assert len(collect(model, ids, progress=False)) == 3


def test_query_heads_of_a_layer_that_is_cut() -> None:
    model, ids = FAMILIES["llama"].build(), tokens(4)
    for is_frozen in (False, True):
        model.requires_grad_(not is_frozen)
        with patched(model, Freeze("ov", [0])):
            a, b = (collect(model, some, query_heads=True, progress=False) for some in (ids[:2], ids[2:]))
        found = heatmap(a, b, query_heads=True)
        assert found.maps is not None
        assert [bool(m.any()) for m in found.maps] == [address == "self.1" for address, _, _ in found.hypotheses]


def test_small_gradients_have_squares() -> None:
    """Squares of 1e-26 are none in float32; as in float64, all the same."""
    model, ids = load_model(), tokens(4)

    def of(factor: float) -> list[Gradients]:
        metric = metrics.Metric("loss", "", lambda m: factor * loss().function(m))
        return [collect(model, some, loss=metric, progress=False) for some in (ids[:2], ids[2:])]

    one, small = of(1.0), of(2.0**-80)
    for kernel, degree in {"qkov": 1, "whitened": 0, "signed": 0}.items():  # "ewc" of them is none in float32
        maps = [heatmap(*pair, kernel=kernel).maps for pair in (one, small)]
        assert maps[0] is not None and maps[1] is not None
        assert torch.equal(maps[1] * 2.0 ** (80 * degree), maps[0]), kernel
    scores = [sample_scores(*pair, None, kernel="whitened")[1]["rows_a"] for pair in (one, small)]
    np.testing.assert_array_equal(*scores)


def test_references_of_other_layers_or_lengths_are_refused(tmp_path: Path) -> None:
    model, ids = load_model(), tokens()
    a, b = task("", model, ids[:3]), task("", model, ids[3:])
    one = Fisher().update(collect(model, ids, layers=[0], progress=False))
    with pytest.raises(SpecError, match=r"gradients of self\.1\.Q.*; expected those of self\.0\.Q"):
        one.update(collect(model, ids, layers=[1], progress=False))
    with pytest.raises(SpecError, match=r"no samples of self\.1\.Q"):
        heatmap(a, b, one)
    with pytest.raises(SpecError, match="Fisher: found a str; expected gradients"):
        Fisher().update("gradients")  # type: ignore[arg-type]
    raw, unit = Fisher().update(a).update(b), Fisher(is_unit=True).update(a).update(b)
    unit.save(tmp_path / "unit.safetensors")
    unit = Fisher.load(tmp_path / "unit.safetensors")
    pooled = heatmap(a, b, is_unit=True)
    torch.testing.assert_close(heatmap(a, b, unit, is_unit=True).maps, pooled.maps, rtol=1e-4, atol=0)
    with pytest.raises(SpecError, match=r"a reference of gradients as they are; .*Make it with Fisher\(is_unit=True\)"):
        heatmap(a, b, raw, is_unit=True)
    with pytest.raises(SpecError, match=r"Make it with Fisher\(is_unit=False\)"):
        heatmap(a, b, unit)


def test_what_cannot_be_collected_is_refused() -> None:
    model, ids = load_model(), tokens(3)
    with pytest.raises(SpecError, match="training mode"):
        collect(load_model().train(), ids, progress=False)
    checkpointing = load_model()
    checkpointing.model.layers[1].gradient_checkpointing = True
    with pytest.raises(SpecError, match="gradient checkpointing"):
        collect(checkpointing, ids, progress=False)
    labels = ids.clone()
    labels[1] = -100
    with pytest.raises(SpecError, match="found no position that counts in example 1"):
        collect(model, {"input_ids": ids, "labels": labels}, progress=False)
    with pytest.raises(SpecError, match=r"found one number for all; expected one with a gradient for each of 3 samples"):
        collect(model, ids, loss=lambda output: output.logits.sum(), progress=False)
    with pytest.raises(SpecError, match=r"a tensor of shape \(3, 9\); expected a number, or one for each of 3 examples"):
        collect(model, ids, loss=lambda output: output.logits.sum(2), progress=False)
    with pytest.raises(SpecError, match="numbers without a gradient"):
        collect(model, ids, loss="accuracy", progress=False)
    with torch.inference_mode(), pytest.raises(SpecError, match=r"found torch\.inference_mode; expected a mode"):
        collect(model, ids, progress=False)
    with pytest.raises(SpecError, match="samples 0, 1, 2 of a batch of 3: found numbers that are not finite"):
        collect(model, ids, loss=lambda output: output.logits.sum((1, 2)) * float("nan"), progress=False)
    with pytest.raises(SpecError, match="samples 0, 1, 2 of a batch of 3: found no gradient"):
        collect(model, ids, loss=lambda output: 0 * output.logits.sum((1, 2)), progress=False)
    a, b = task("", model, ids), task("", FAMILIES["gpt2"].build(), ids)
    with pytest.raises(SpecError, match="Collect all tasks on one model"):
        heatmap(a, b)
    other = task("", model, ids, loss=metrics.Metric("other", "", loss().function))
    with pytest.raises(SpecError, match="loss: "):
        heatmap(a, other)
    with pytest.raises(SpecError, match="the same blocks of all"):
        heatmap(a, task("", model, ids, layers=[0]))
    with pytest.raises(SpecError, match="Did you mean 'signed'"):
        heatmap(a, a, kernel="sigend")
    with pytest.raises(SpecError, match="expected a Fisher, Gradients"):
        heatmap(a, a, fisher=3)
    for options, message in (
        ({"rho": 0}, "rho=0; expected a finite number above 0"),
        ({"memory_mib": float("inf")}, "memory_mib=inf; expected a finite number above 0"),
        ({"device": "nowhere"}, "device: found 'nowhere'"),
    ):
        with pytest.raises(SpecError, match=message):
            heatmap(a, a, **options)
    with pytest.raises(SpecError, match="b: found a NoneType; expected gradients"):
        heatmap(a, None)
    for place, message in (
        ((3, 0, "Q", 0), "sample 3; expected 0 to 2"),
        ((-1, 0, "Q", 0), "sample -1"),
        ((0, 0, "Q", 9), "head 9"),
    ):
        with pytest.raises(SpecError, match=message):
            a.gradient(*place)
    with pytest.raises(SpecError, match=r"j=3; expected 0 to 2"):
        heatmap(a, a).sample_pair(0, 3, 0, 0)
    with pytest.raises(SpecError, match="found means alone"):
        heatmap(a, a, keep_maps=False).map("self.0", "Q", 0)
    found = heatmap(a, a)
    with pytest.raises(SpecError, match=r"found self\.7 Q head 0"):
        found.map(7, "Q", 0)
    assert found.sample_pair(0, 1, 0, 1) == found.sample_pair(0, 1, "self.0", 1)
    assert found.sample_pair(0, 1, "self.0", 1) == {b: float(found.map("self.0", b, 1)[0, 1]) for b in "QKVO"}
    assert found.by_head()["Q"].shape == (2, 4) and found.by_head()["K"].shape[0] == 2
    assert found.top(3)["mean"].is_monotonic_decreasing and "<table" in found._repr_html_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heatmap(a, a)


def test_scores_of_samples_are_means_of_maps() -> None:
    model = load_model()
    a, b, n = (task("", model, tokens(count, seed)) for count, seed in ((3, 0), (4, 1), (5, 2)))
    for kernel in KERNELS:
        hypotheses, found = sample_scores(a, b, n, kernel=kernel)
        options: dict[str, Any] = {"kernel": kernel, "is_unit": True, "fisher": [a, b, n]}
        if kernel in ("qkov", "whitened"):  # their pool, of samples of length one
            pooled = heatmap(a, b, **options)
            assert hypotheses == pooled.hypotheses
        expected = {
            "rows_a": heatmap(a, b, **options).rows,
            "columns_b": heatmap(a, b, **options).columns,
            "rows_n": heatmap(n, b, **options).rows,
            "columns_n": heatmap(a, n, **options).columns,
        }
        assert sorted(found) == sorted(expected)
        for name, scores in found.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(torch.tensor(scores).mT, expected[name], rtol=1e-4, atol=1e-5 * scale)
    assert sorted(sample_scores(a, b, None, kernel="signed")[1]) == ["columns_b", "rows_a"]


# -- studies ------------------------------------------------------------------------------------------------------------


def test_studies_are_their_parts() -> None:
    """Scores of samples of length one by the pool of all three tasks, and the tests of them, by name."""
    model = load_model()
    a, b, n = (task("", model, tokens(count, seed)) for count, seed in ((12, 0), (13, 1), (14, 2)))
    found = overlap_test(a, b, n, kernel="whitened", n_permutations=1280, seed=3)
    hypotheses, scores = sample_scores(a, b, n, kernel="whitened")
    blocks = [block for _, block, _ in hypotheses]
    expected = permutation_test(Scores(**scores), blocks, n_permutations=1280, seed=3)
    names = ["address", "block", "head"]
    assert list(found.frame.columns[:3]) == names and [tuple(row) for row in found.frame[names].to_numpy()] == hypotheses
    pd.testing.assert_frame_equal(found.frame.drop(columns=["address", "head"]), expected.frame)
    assert found.sizes == {"rows_a": 12, "rows_n": 14, "columns_b": 13, "columns_n": 14}
    other = overlap_test(a, b, n, kernel="whitened", n_permutations=1280, seed=3, fisher=a, rho=1.0)
    assert not np.allclose(other.frame.effect_row, found.frame.effect_row)
    signed = conflict_test(a, b, n_permutations=1280)
    scores = sample_scores(a, b, None, kernel="signed")[1]
    expected = sign_flip_test(scores["rows_a"], scores["columns_b"], blocks, n_permutations=1280)
    pd.testing.assert_frame_equal(signed.frame.drop(columns=["address", "head"]), expected.frame)


def test_studies_are_refused_before_any_gradient_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = load_model(), FAMILIES["gpt2"].build()
    a, b, n = (task("", model, tokens(count, seed)) for count, seed in ((8, 0), (9, 1), (10, 2)))
    monkeypatch.setattr("surgery.analysis.interference.walk.Walk.__iter__", lambda self: pytest.fail("work was done"))
    one, two = task("", model, tokens(1)), task("", model, tokens(2))
    renamed = task("", model, tokens(9, 1), loss=metrics.Metric("other", "", loss().function))
    given: list[tuple[Any, str]] = [
        (lambda: overlap_test(a, b, None), "control: found no control; expected gradients of a control task"),
        (lambda: overlap_test(a, tokens(), n), "b: found a Tensor; expected gradients"),
        (lambda: overlap_test(one, b, n), "a: found 1 samples; expected at least 2"),
        (lambda: overlap_test(a, b, a), "a and control: found the same 8 samples; expected samples of two tasks"),
        (lambda: overlap_test(a, task("again", model, tokens(8, 0)), n), "a and b: found the same 8 samples"),
        (lambda: overlap_test(a, b, n, kernel="signed"), "kernel: found 'signed', whose numbers have signs"),
        (lambda: overlap_test(a, b, n, kernel="sigend"), "Did you mean 'signed'"),
        (lambda: overlap_test(a, b, n, alpha=2, memory_mib=0), "2 problems"),
        (lambda: overlap_test(two, b, task("", model, tokens(2, 5))), "attainable p of 0.167, as p_row has 6 labelings"),
        (lambda: overlap_test(a, b, n, n_permutations=9), r"p of 0.1, as p_row has 9 labelings \(n_permutations\)"),
        (lambda: overlap_test(a, b, task("", other, tokens(5))), "Collect all tasks on one model"),
        (lambda: overlap_test(a, renamed, n), r"gradients with loss: 'other \("),
        (lambda: overlap_test(a, task("", model, tokens(9, 1), layers=[0]), n), "the same blocks of all"),
        (lambda: overlap_test(a, b, n, fisher=3), "expected a Fisher, Gradients"),
        (lambda: overlap_test(a, b, n, rho=0), "rho=0; expected a finite number above 0"),
        (lambda: conflict_test(a, a), "a and b: found the same 8 samples"),
        (lambda: conflict_test(task("", model, tokens(4)), b), "p of 0.0625, as p_row has 16 flips of signs"),
        (lambda: conflict_test(a, renamed), r"gradients with loss: 'other \("),
        (lambda: conflict_test(a, None), "b: found a NoneType"),
    ]
    for call, message in given:
        with pytest.raises(SpecError, match=message):
            call()
    with pytest.raises(TypeError, match="control"):
        overlap_test(a, b)  # type: ignore[call-arg]
