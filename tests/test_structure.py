"""Heads by where they look, by what their weights compose to, and by what they write: against loops and full matrices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, HEADS, LAYERS
from torch import Tensor, nn

import surgery
from surgery import Edit, Freeze, NoMatchError, SpecError, UnsupportedArchitectureError, patch_model, weights
from surgery.analysis import metrics
from surgery.analysis.detectors import detect_heads
from surgery.analysis.frozen import FrozenScales
from surgery.analysis.logit_attribution import LogitAttribution, direct_logit_attribution
from surgery.analysis.looking import JOBS
from surgery.analysis.repeats import random_copies
from surgery.analysis.structure import composition, copying_scores
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences

PACKAGE = Path(surgery.__file__).parent

# Where heads look.


@torch.no_grad()
def plain_scores(model: Any, ids: Tensor, mask: Tensor) -> dict[str, np.ndarray]:
    """(layer, head) of each job from transformers' own attentions, key by key."""
    patterns = torch.stack(model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions).double()
    found: dict[str, list[Tensor]] = {job: [] for job in JOBS}
    for row in range(len(ids)):
        real = [t for t in range(ids.shape[1]) if mask[row, t]]
        for t in real:
            before = [s for s in real if s < t]
            same = [s for s in before if ids[row, s] == ids[row, t]]
            behind = [s + 1 for s in same if s + 1 < t]
            looked_at = patterns[:, row, :, t]
            if before:
                found["sink"].append(looked_at[..., real[0]])
                found["previous token"].append(looked_at[..., t - 1])
            if same:
                found["duplicate token"].append(looked_at[..., same].sum(-1))
            if behind:
                found["induction"].append(looked_at[..., behind].sum(-1))
    return {job: torch.stack(values).mean(0).numpy() for job, values in found.items()}


def _text(rows: int = 3, length: int = 14, words: int = 5) -> dict[str, Tensor]:
    """Few words, so that they come again and again; padding on the left, on the right, and none."""
    ids = torch.randint(5, 5 + words, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert", "gpt_oss"])
def test_scores_are_those_of_output_attentions(name: str) -> None:
    model, inputs = FAMILIES[name].build("eager"), _text()
    found = detect_heads(model, inputs)
    for job, scores in plain_scores(model, ids=inputs["input_ids"], mask=inputs["attention_mask"]).items():
        np.testing.assert_allclose(found.matrix(job).to_numpy(), scores, atol=1e-6)  # float32 patterns, another order of sums
        assert found.matrix(job).shape == (LAYERS, HEADS) and found.frame.score.between(0, 1 + 1e-6).all()


def test_chance_is_uniform_attention_over_what_the_mask_allows() -> None:
    ids = torch.tensor([[9, 7, 8, 7, 8, 7]])
    for name, window in (("llama", 6), ("mistral", 5), ("bert", None)):
        found = detect_heads(FAMILIES[name].build("sdpa"), ids)
        allowed = [6] * 6 if window is None else [min(t + 1, window) for t in range(6)]
        expected = {
            "previous token": np.mean([1 / allowed[t] for t in range(1, 6)]),
            "duplicate token": np.mean([1 / allowed[3], 1 / allowed[4], 2 / allowed[5]]),
            "induction": np.mean([1 / allowed[3], 1 / allowed[4], 2 / allowed[5]]),  # from 3 to 2, 4 to 3, 5 to 2 and 4
            "sink": np.mean([1 / allowed[t] if t < allowed[t] else 0 for t in range(1, 6)]),
        }
        for job, chance in expected.items():
            np.testing.assert_allclose(found.matrix(job, "chance").to_numpy(), chance, rtol=1e-6)  # shares are float32


def test_heads_made_by_hand_have_score_one() -> None:
    model = FAMILIES["gpt2"].build()
    patch_model(model, [Edit("pattern", "previous", layers=[0], heads=[1]), Edit("pattern", "first", layers=[1], heads=[2])])
    found = detect_heads(model, random_copies(model, 2).inputs())
    assert found.top(1, "previous token").iloc[0][["address", "head", "score"]].tolist() == ["self.0", 1, 1.0]
    assert found.top(1, "sink").iloc[0][["address", "head", "score"]].tolist() == ["self.1", 2, 1.0]
    assert found.top(1, "sink").share.item() == 1.0
    assert found.matrix("previous token").to_numpy().max(initial=0, where=np.arange(8).reshape(2, 4) != 1) < 0.9


def test_several_batches_count_by_their_queries() -> None:
    model = FAMILIES["llama"].build()
    inputs = _text()
    parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 1), slice(1, 3))]
    whole, split = detect_heads(model, inputs).frame, detect_heads(model, parts).frame
    np.testing.assert_allclose(split.score, whole.score, atol=1e-6)  # kernels round by batch
    np.testing.assert_allclose(split.chance, whole.chance, rtol=1e-12)


def test_the_demo_model_has_its_two_heads() -> None:
    found = detect_heads(load_model())
    assert found.top(1, "previous token")[["address", "head"]].values.tolist() == [["self.0", 0]]
    assert found.top(1, "induction")[["address", "head"]].values.tolist() == [["self.1", 3]]
    assert found.top(1, "induction").score.item() > 0.95 > 0.6 > found.top(2, "induction").score.iloc[1]
    assert "self.1" in repr(found) and not found.notes


def test_a_choice_of_layers_and_heads() -> None:
    model = FAMILIES["llama"].build()
    every, some = (detect_heads(model, _text(), *choice) for choice in ((), ([1], [3, 0])))
    assert some.frame[["address", "head"]].drop_duplicates().values.tolist() == [["self.1", 0], ["self.1", 3]]
    np.testing.assert_allclose(some.matrix("sink")[3], every.matrix("sink").loc["self.1", [3]], atol=1e-6)
    with pytest.raises(SpecError, match=r"detect_heads: self.1 .*heads \[4\]; expected heads 0 to 3"):
        detect_heads(model, layers=[1], heads=[4])
    with pytest.raises(NoMatchError, match="layers: found 2"):
        detect_heads(model, layers=[2])
    with pytest.raises(SpecError, match="Did you mean 'induction'"):
        detect_heads(model, jobs=["inductoin"])
    with pytest.raises(SpecError, match="Did you mean 'sink'"):
        some.matrix("sinks")


def test_two_stacks_and_what_is_left_out() -> None:
    found = detect_heads(FAMILIES["bart"].build())
    assert set(found.frame.address) == {f"{stack}.self.{layer}" for stack in ("encoder", "decoder") for layer in range(LAYERS)}
    found = detect_heads(FAMILIES["t5"].build(), layers="all")
    assert [note for note in found.notes if "cross" not in note] == [] and len(found.notes) == LAYERS
    whisper = FAMILIES["whisper"]
    with pytest.raises(SpecError, match="which reads input_features, and no data"):
        detect_heads(whisper.build())
    found = detect_heads(whisper.build(), whisper.inputs())
    assert set(found.frame.address) == {"decoder.self.0", "decoder.self.1"}
    assert found.notes == [f"encoder.self.{layer}: the data have no input_ids" for layer in range(LAYERS)]
    model, ids = FAMILIES["t5"].build(), _text()["input_ids"]
    found = detect_heads(model, {"input_ids": ids, "labels": ids})
    assert set(found.frame.address) == {f"encoder.self.{layer}" for layer in range(LAYERS)}, "a decoder reads other tokens"
    assert found.notes == [f"decoder.self.{layer}: the data have no decoder_input_ids" for layer in range(LAYERS)]
    with pytest.raises(SpecError, match="jobs: found none; expected of 'previous token'"):
        detect_heads(model, jobs=())


def test_detecting_leaves_the_model_and_its_cuts() -> None:
    model, ids = FAMILIES["gpt2"].build(), _text()["input_ids"]
    cut = Freeze("qk", layers=[0], heads=[2])
    patch_model(model, cut)
    with torch.no_grad():
        before = model(ids).logits
        found = detect_heads(model, ids)
        assert torch.equal(model(ids).logits, before)
    row = found.matrix("previous token").loc["self.0"]
    assert row[2] == pytest.approx(found.matrix("previous token", "chance").loc["self.0", 2], abs=1e-6)  # cut to uniform


# What heads write into a logit.

PLAIN = ["gpt2", "gptj", "gpt_neox", "llama", "mixtral", "qwen3_moe", "falcon_alibi", "bloom", "opt", "gpt_neo", "mpt", "phi3"]


def adds_up(found: LogitAttribution) -> None:
    total = np.nansum(found.heads, axis=(1, 2)) + sum(found.others.values()) + found.constant
    np.testing.assert_allclose(total, found.value, atol=3e-6)  # float32 results, logits of up to 10
    assert found.frame["value"].sum() == pytest.approx(found.value.mean(), abs=3e-6)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("position", [-1, 5])
def test_contributions_add_up_to_the_logit(name: str, position: int) -> None:
    family = FAMILIES[name]
    model, inputs = family.build("sdpa" if family.sdpa else "eager"), family.inputs()
    found = direct_logit_attribution(model, inputs, tokens=[7, 11], position=position)
    with torch.no_grad():
        logits = model(**inputs).logits[:, position]
    np.testing.assert_allclose(found.value, [logits[0, 7], logits[1, 11]], atol=3e-6)  # norms are computed in steps
    adds_up(found)
    assert found.gap < 3e-6 and found.heads.shape == (2, LAYERS, HEADS) and np.isfinite(found.heads).all()
    kinds = found.frame.kind.value_counts()
    assert (kinds["head"], kinds["MLP"], kinds["embedding"], kinds["constant"]) == (LAYERS * HEADS, LAYERS, 1, 1)
    assert found.frame[found.frame.kind == "MLP"].value.abs().min() > 1e-4


@torch.no_grad()
def test_contributions_are_those_of_a_calculation_by_hand() -> None:
    """RMS norm and grouped kv heads; then a layer norm with its mean, gain and shift."""
    for name, norm, unembed in (("llama", "model.norm", "lm_head"), ("gpt2", "transformer.ln_f", "lm_head")):
        family = FAMILIES[name]
        model, inputs = family.build("eager").double(), family.inputs(padding=0)
        seen: dict[str, Any] = {}
        final = model.get_submodule(norm)
        handle = final.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.update(stream=seen.get("stream", args[0][:, -1]))
        )
        found = direct_logit_attribution(model, inputs, tokens=7)
        handle.remove()
        stream, row = seen["stream"], model.get_submodule(unembed).weight[7] * final.weight
        if name == "gpt2":
            row = row - row.mean()  # centring
            scale = (stream.var(-1, unbiased=False) + final.eps).rsqrt()
        else:
            scale = (stream.square().mean(-1) + final.variance_epsilon).rsqrt()
        patch_model(model)
        for layer in range(LAYERS):
            with_heads = model.model.layers[layer].self_attn if name == "llama" else model.transformer.h[layer].attn
            project = with_heads.o_proj if name == "llama" else with_heads.c_proj
            z: list[Tensor] = []
            handle = project.register_forward_pre_hook(lambda _, args, z=z: z.append(args[0][:, -1]))
            model(**inputs)
            handle.remove()
            result = torch.einsum("bhd,hdm->bhm", z[0].unflatten(-1, (HEADS, -1)), weights.W_O(model, layer))
            expected = result @ row * scale[:, None]
            np.testing.assert_allclose(found.heads[:, layer], expected.numpy(), rtol=1e-6, atol=1e-7)  # norms are in float32


def test_a_metric_of_two_logits_and_cuts_that_stay() -> None:
    model, inputs = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].inputs()
    first, second = (direct_logit_attribution(model, inputs, tokens=token) for token in (3, 8))
    both = direct_logit_attribution(model, inputs, metric=metrics.logit_difference(3, 8))
    np.testing.assert_allclose(both.heads, first.heads - second.heads, atol=1e-6)
    adds_up(both)
    patch_model(model, Freeze("ov", layers=[1], heads=[2]))
    cut = direct_logit_attribution(model, inputs, tokens=3)
    adds_up(cut)
    assert np.array_equal(cut.heads[:, 1, 2], np.zeros(2)) and np.abs(first.heads[:, 1, 2]).min() > 1e-4
    assert cut.matrix().shape == (LAYERS, HEADS) and "comes from" in repr(cut)
    assert cut.top(3, "MLP").kind.eq("MLP").all()


def test_the_induction_head_writes_the_token_that_follows() -> None:
    """In the second copy, where the first determines the next token; in the first copy it writes nothing of the kind."""
    ids = repeated_sequences(8, 12, 64, 0)
    second = direct_logit_attribution(load_model(), ids, tokens=ids[:, 19], position=18)
    first = direct_logit_attribution(load_model(), ids, tokens=ids[:, 8], position=7)
    assert second.top(1, "head")[["address", "head"]].values.tolist() == [["self.1", 3]]
    assert second.matrix().loc["self.1", 3] > 4 > 10 * abs(first.matrix().loc["self.1", 3])
    assert second.top(2).component.tolist() == ["MLP self.1", "self.1.3"]  # the MLP behind it sharpens what it wrote


class Beside(nn.Module):
    """A layer without attention: a state space, for example."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states + self.mix(hidden_states).cumsum(1)


def test_layers_without_attention_are_components_of_their_own() -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    torch.manual_seed(0)
    model.model.layers.insert(0, Beside(32))
    model.config.num_hidden_layers += 1
    model.config.layer_types = None
    found = direct_logit_attribution(model, inputs, tokens=7)
    adds_up(found)
    assert found.frame.kind.value_counts()["layer"] == 1 and found.top(20, "layer").component.item() == "layer model.layers.0"
    embedded = direct_logit_attribution(FAMILIES["llama"].build(), inputs, tokens=7).others["embedding"]
    assert found.others["embedding"].shape == embedded.shape and np.abs(found.others["layer model.layers.0"]).min() > 1e-3
    model.model.layers.append(Beside(32))
    model.config.num_hidden_layers += 1
    with pytest.raises(UnsupportedArchitectureError, match=r"model.layers.3: found that it comes behind the last layer with"):
        direct_logit_attribution(model, inputs, tokens=7)


class Capped(nn.Module):
    """Logits that a tanh bounds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


def test_what_is_no_plain_stream_is_refused() -> None:
    for name, place in (("gemma2", "model.layers.0"), ("olmo2", "model.layers.0"), ("t5", "decoder.block.0")):
        family = FAMILIES[name]
        with pytest.raises(UnsupportedArchitectureError, match=f"direct_logit_attribution: {place}: found that"):
            direct_logit_attribution(family.build(), family.inputs(), tokens=7)
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    with pytest.raises(SpecError, match="metric 'loss', which reads all positions"):
        direct_logit_attribution(model, inputs, metric="loss")
    squared = metrics.Metric("square", "", lambda m: m.logits[:, 0, 3] ** 2, (-1,))
    with pytest.raises(UnsupportedArchitectureError, match="the metric is not affine"):
        direct_logit_attribution(model, inputs, metric=squared)
    with pytest.raises(SpecError, match="neither tokens nor a metric"):
        direct_logit_attribution(model, inputs)
    with pytest.raises(SpecError, match="3 tokens; expected one, or 2"):
        direct_logit_attribution(model, inputs, tokens=[1, 2, 3])
    model.lm_head = Capped(model.lm_head)
    with pytest.raises(UnsupportedArchitectureError, match="what is behind the last layer: found that with its norms frozen"):
        direct_logit_attribution(model, inputs, tokens=7)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False)])
def test_a_frozen_norm_is_affine_and_equal_where_it_was_frozen(norm: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    norm = norm.double()
    with FrozenScales() as frozen:
        torch.testing.assert_close(norm(x), torch.nn.Module.__call__(norm, x))
    expected = norm(x)

    def again(states: Tensor) -> Tensor:
        with FrozenScales(frozen.kept):
            return norm(states)

    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(again(x + 2 * other) - again(x), 2 * (again(other) - again(torch.zeros_like(x))))
    assert not torch.allclose(again(3 * x), norm(3 * x))


# What the weights say.


@torch.no_grad()
@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_compositions_are_those_of_each_pair_of_layers(kind: Any) -> None:
    model = FAMILIES["llama"].build(num_hidden_layers=3)
    found = composition(model, kind)
    scores = found.scores.reshape(3, HEADS, 3, HEADS)
    for sender in range(3):
        for receiver in range(3):
            block = scores[sender, :, receiver]
            if sender < receiver:
                assert np.array_equal(block, weights.composition_scores(model, sender, receiver, kind).numpy())
            else:
                assert np.isnan(block).all()
    frame = found.frame()
    assert len(frame) == 3 * HEADS**2 and not frame.isna().any().any()
    row = frame[
        (frame.sender == "self.0") & (frame.sender_head == 1) & (frame.receiver == "self.2") & (frame.receiver_head == 3)
    ]
    assert row.score.item() == scores[0, 1, 2, 3]
    assert row.excess.item() == row.score.item() - row.baseline.item()
    assert row.deviations.item() == row.excess.item() / found.spread[1, -1]
    assert np.nanmean(found.baseline) == pytest.approx(32**-0.5, rel=0.05)  # 1/sqrt(d_model)
    assert len(composition(model, kind, layers=[0, 2]).frame()) == HEADS**2


def test_a_model_at_random_composes_as_random_matrices_do() -> None:
    """With its own shapes and other numbers: the mean over pairs is within the error of a mean of correlated pairs."""
    for kind in ("q", "k", "v"):
        found = composition(FAMILIES["gpt2"].build(n_embd=128), kind)  # type: ignore[arg-type]
        assert np.nanmean(found.excess) == pytest.approx(0, abs=2e-3)  # scores are about 0.09
        assert found.frame().deviations.abs().max() < 5


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_compositions_of_a_model_in_float64_are_in_float64(kind: Any) -> None:
    model = FAMILIES["llama"].build(dtype=torch.float64)
    found = composition(model, kind)
    places = [number for number, (address, _) in enumerate(found.heads) if address in ("self.0", "self.1")]
    with torch.no_grad():  # as the analysis has it: torch orders some products otherwise where gradients are asked for
        scores = weights.composition_scores(model, "self.0", "self.1", kind)
    block = found.scores[np.ix_(places[:HEADS], places[HEADS:])]
    assert scores.dtype == torch.float64 and np.array_equal(block, scores.numpy())
    assert not np.array_equal(block, block.astype(np.float32)), "rounded on the way"


def test_composition_in_the_demo_model() -> None:
    """The previous-token head writes what the induction head's k reads; both are named by other means in test_demo."""
    best = composition(load_model(), "k").top(1)
    assert best[["sender", "sender_head", "receiver"]].values.tolist() == [["self.0", 0, "self.1"]]
    assert best.deviations.item() > 20


def test_compositions_across_stacks_and_what_is_left_out() -> None:
    found = composition(FAMILIES["bart"].build(), "v").frame()
    pairs = set(zip(found.sender, found.receiver, strict=True))
    assert ("encoder.self.1", "decoder.cross.0") in pairs and ("decoder.self.0", "decoder.self.1") in pairs
    assert ("encoder.self.0", "decoder.self.1") not in pairs and ("decoder.self.0", "decoder.cross.1") not in pairs
    latent = composition(FAMILIES["deepseek_v3"].build(), "q")
    assert latent.frame().empty and any("W_V reads kv_a_proj_with_mqa" in note for note in latent.notes)
    with pytest.raises(SpecError, match="kind='z'; expected 'q', 'k', 'v'"):
        composition(FAMILIES["llama"].build(), "z")  # type: ignore[arg-type]


@torch.no_grad()
def test_copying_scores_are_those_of_the_full_matrix() -> None:
    """W_E G W_OV G' W_U, vocabulary × vocabulary, with all of its eigenvalues."""
    for name, before, final in (
        ("llama", "model.layers.1.input_layernorm", "model.norm"),
        ("gpt2", "transformer.h.1.ln_1", "transformer.ln_f"),
    ):
        model = FAMILIES[name].build().double()
        d = model.config.hidden_size
        centring = torch.eye(d, dtype=torch.float64) - (1 / d if name == "gpt2" else 0)
        gains = [centring * model.get_submodule(path).weight for path in (before, final)]
        embedding, unembedding = model.get_input_embeddings().weight, model.lm_head.weight.T
        found = copying_scores(model)
        assert not found.notes
        for head in range(HEADS):
            w = weights.head_weights(model, 1)
            full = embedding @ gains[0] @ w.W_V_by_head[head] @ w.W_O[head] @ gains[1] @ unembedding
            values = torch.linalg.eigvals(full)
            expected = float(values.real.sum() / values.abs().sum())
            assert found.matrix().loc["self.1", head] == pytest.approx(expected, abs=1e-5)  # gains pass float32 in one family


@torch.no_grad()
def test_heads_that_copy_suppress_and_do_nothing() -> None:
    model = FAMILIES["gpt2"].build()
    attention, width = model.transformer.h[0].attn, 8
    effective = weights.W_V(model, 0)
    for head, sign in ((0, 1.0), (1, -1.0), (2, 0.0)):
        attention.c_proj.weight[head * width : (head + 1) * width] = sign * effective[head].T
    for norm in (model.transformer.h[0].ln_1, model.transformer.ln_f):
        norm.weight.fill_(1)  # W_V W_V^T between W_E and its transpose (tied): all eigenvalues are of one sign
    scores = copying_scores(model).matrix().loc["self.0"]
    assert scores[0] == pytest.approx(1, abs=1e-6) and scores[1] == pytest.approx(-1, abs=1e-6) and np.isnan(scores[2])
    assert abs(scores[3]) < 0.9


def test_copying_in_the_demo_model_and_what_is_left_out() -> None:
    best = copying_scores(load_model()).top(1)
    assert best[["address", "head"]].values.tolist() == [["self.1", 3]] and best.score.item() > 0.98
    found = copying_scores(FAMILIES["olmo2"].build())
    assert len(found.frame) == LAYERS * HEADS and found.notes[0].startswith("self.0: no norm before it")
    latent = copying_scores(FAMILIES["deepseek_v3"].build())
    assert latent.frame.empty and len(latent.notes) == LAYERS
    whisper = FAMILIES["whisper"]
    with pytest.raises(SpecError, match="which reads input_features, and no inputs"):
        copying_scores(whisper.build())
    found = copying_scores(whisper.build(), inputs=whisper.inputs())
    assert set(found.frame.address) == {"decoder.self.0", "decoder.self.1"} and not found.notes
    half = [copying_scores(FAMILIES["gpt2"].build(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert not half[1].notes
    np.testing.assert_allclose(half[1].frame.score, half[0].frame.score, atol=0.02)  # bfloat16 has 8 bits
    with pytest.raises(SpecError, match="without output embeddings"):
        copying_scores(FAMILIES["llama"].build().model)


def test_the_demo_needs_no_extra() -> None:
    """What it shares with the findings, and the pictures, do without pandas and scipy, which come with an extra."""
    names = ["analysis/looking.py", "analysis/repeats.py", "analysis/__init__.py"]
    shared = [PACKAGE / name for name in names] + [*(PACKAGE / "plots").glob("*.py"), *(PACKAGE / "demo").glob("*.py")]
    for path in shared:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pandas|scipy)", text, re.M), path
        ours = re.findall(r"^from (surgery\.analysis\.\w+) import", text, re.M)
        assert set(ours) <= {"surgery.analysis.looking", "surgery.analysis.repeats"}, path
    assert re.search(r"^import pandas", (PACKAGE / "analysis/detectors.py").read_text(encoding="utf-8"), re.M)
