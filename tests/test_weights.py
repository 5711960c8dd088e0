"""Derived weights against what the projections compute and what the heads do, in the unpatched model, by torch's own hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from families import FAMILIES, FAMILIES_ALL, HEADS, TinyFamily
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from surgery.anatomy import Anatomy, Attention, Projection
from surgery.captures import capture
from surgery.errors import NoMatchError, SpecError, SurgeryError, UnsupportedArchitectureError
from surgery.patch import anatomy_of, patched
from surgery.weights import (
    W_K,
    W_O,
    W_Q,
    W_V,
    HeadWeights,
    b_K,
    b_O,
    b_Q,
    b_V,
    composition_scores,
    head_weights,
    ov_circuit,
    pieces,
    qk_circuit,
)

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Activations are of order 1 to 10 in float32 (machine epsilon 1.2e-7), summed over at most 64 channels; a product that is
# taken in another order than the model's differs in its last bits.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NO_PATTERN_OF_OWN = {"olmo2": "q and k are normed over all heads together, so that every head's pattern reads every head's q"}


class Watched:
    """One forward of an unpatched model: inputs and outputs of its projections by path, its patterns by address."""

    def __init__(self, family: TinyFamily, model: nn.Module, anatomy: Anatomy, **inputs: int) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        handles = []
        for path in {p.path for attention in anatomy for p in attention.projections.values()}:

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, path: str = path) -> None:
                self.inputs[path], self.outputs[path] = args[0], output

            handles.append(model.get_submodule(path).register_forward_hook(hook))
        out = model(**family.inputs(**inputs), output_attentions=True)
        for handle in handles:
            handle.remove()
        names = {"": "attentions", "encoder.": "encoder_attentions", "decoder.": "decoder_attentions"}
        self.patterns: dict[str, Tensor] = {}
        for attention in anatomy:
            stack = attention.address.removesuffix(f"{attention.kind}.{attention.layer}")
            name = "cross_attentions" if attention.kind == "cross" else names[stack]
            self.patterns[attention.address] = out[name][attention.layer]


@pytest.fixture(scope="module", params=FAMILIES_ALL)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, Anatomy, Watched]]:
    family = FAMILIES[request.param]
    model = family.build("eager")
    anatomy = anatomy_of(model)
    yield request.param, model, anatomy, Watched(family, model, anatomy)


def _by_head(tensor: Tensor, channels: Tensor) -> Tensor:
    """(batch, head, position, d) from (batch, position, channel), the axes before the last two taken as one."""
    tensor = tensor.reshape(-1, *tensor.shape[-2:])
    return tensor[..., channels].transpose(1, 2)


def _bias(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias[:, None]


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, head, position, d): x (batch, position, d_in) @ weight (head, d_in, d) + bias (head, d)."""
    return x.reshape(-1, 1, *x.shape[-2:]) @ weight + _bias(bias)


def _each(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[Attention, HeadWeights]]:
    for attention in anatomy:
        yield attention, head_weights(model, attention.address)


def test_q_k_v(case: tuple[str, nn.Module, Anatomy, Watched]) -> None:
    """x @ W + b is the projection's output, at the channels of each head."""
    _, model, anatomy, watched = case
    for attention, weights in _each(model, anatomy):
        for site, projection in attention.projections.items():
            if site == "o":
                continue
            matrix, bias = getattr(weights, f"W_{site.upper()}"), getattr(weights, f"b_{site.upper()}")
            heads = attention.heads if site == "q" else attention.kv_heads
            assert matrix.shape[0] == heads and matrix.shape[2] == (attention.d_value if site == "v" else attention.d_head)
            expected = _by_head(watched.outputs[projection.path], projection.channels)
            torch.testing.assert_close(_times(watched.inputs[projection.path], matrix, bias), expected, **CLOSE)


def test_z_and_output(case: tuple[str, nn.Module, Anatomy, Watched]) -> None:
    """pattern[h] @ v[h // group_size] is the z that W_O[h] reads, and the heads' z @ W_O add up to the output.

    The pattern is the model's own, in its own order of heads: so W_V, the head map and W_O belong to the heads that they
    claim to, whatever the anatomy says.
    """
    _, model, anatomy, watched = case
    for attention, weights in _each(model, anatomy):
        v, o = attention.projections["v"], attention.projections["o"]
        values = _times(watched.inputs[v.path], weights.W_V_by_head, None)
        if weights.b_V is not None:
            values = values + weights.b_V.repeat_interleave(attention.group_size, dim=0)[:, None]
        z = watched.patterns[attention.address] @ values
        torch.testing.assert_close(z, _by_head(watched.inputs[o.path], o.channels), **CLOSE)
        added = (z @ weights.W_O).sum(dim=1) + (0 if weights.b_O is None else weights.b_O)
        torch.testing.assert_close(added, watched.outputs[o.path].reshape(added.shape), **CLOSE)


def test_only_its_own_pattern_reads_a_heads_q_and_k(case: tuple[str, nn.Module, Anatomy, Watched]) -> None:
    """The gradient of head h's pattern by the q projection is zero but for W_Q[h]; by the k projection, but for its group's."""
    name, _, anatomy, watched = case
    if name in NO_PATTERN_OF_OWN:
        pytest.skip(NO_PATTERN_OF_OWN[name])
    for attention in anatomy:
        pattern = watched.patterns[attention.address]
        for site in {"q", "k"} & attention.projections.keys():
            projection = attention.projections[site]
            output = watched.outputs[projection.path]
            for head in range(attention.heads):
                target = (pattern[:, head] ** 2).sum()
                (gradient,) = torch.autograd.grad(target, output, retain_graph=True)
                size = _by_head(gradient, projection.channels).abs().amax(dim=(0, 2, 3))
                own = head if site == "q" else head // attention.group_size
                assert [bool(s > 0) for s in size] == [h == own for h in range(len(size))], (attention.address, site, head)


@torch.no_grad()
@pytest.mark.parametrize("name", list(NO_PATTERN_OF_OWN))
def test_without_its_q_a_head_attends_evenly(name: str) -> None:
    family = FAMILIES[name]
    model = family.build("eager")
    for attention in (anatomy := anatomy_of(model)):
        projection = attention.projections["q"]
        model.get_submodule(projection.path).weight[projection.channels[1]] = 0
    watched = Watched(family, model, anatomy, padding=0)
    for attention in anatomy:
        last = watched.patterns[attention.address][:, :, -1]
        even = torch.isclose(last, torch.tensor(1 / last.shape[-1])).all(dim=-1)
        assert even.tolist() == [[False, True, False, False]] * last.shape[0]


@pytest.mark.parametrize("site", ["q", "k", "v", "o"])
def test_the_checks_can_fail(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the channels of two heads exchanged in one projection."""
    family = FAMILIES["llama"]
    model = family.build("eager")
    anatomy = anatomy_of(model)
    projection = anatomy[1].projections[site]
    anatomy[1].projections[site] = Projection(projection.owner, projection.name, projection.channels.flip(0))
    monkeypatch.setattr("surgery.heads.anatomy_of", lambda model, strict: anatomy)
    if site == "v":
        with pytest.raises(UnsupportedArchitectureError, match="more than a scale and a shift"):
            head_weights(model, 1).W_V  # noqa: B018 (which looks itself)
        monkeypatch.setattr("surgery.heads.scale_and_shift", lambda attention: (None, None))
    broken = ("llama", model, anatomy, Watched(family, model, anatomy))
    with pytest.raises(AssertionError):
        (test_only_its_own_pattern_reads_a_heads_q_and_k if site in "qk" else test_z_and_output)(broken)


def test_the_same_from_a_patched_model(case: tuple[str, nn.Module, Anatomy, Watched]) -> None:
    _, model, anatomy, _ = case
    before = {(a.address, s): getattr(w, f"W_{s.upper()}") for a, w in _each(model, anatomy) for s in a.projections}
    with patched(model):
        for (address, site), weight in before.items():
            assert torch.equal(getattr(head_weights(model, address), f"W_{site.upper()}"), weight)


def test_short_functions() -> None:
    model = FAMILIES["qwen2"].build()
    weights = head_weights(model, 1)
    for function in (W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, b_O):
        found, expected = function(model, "self.1"), getattr(weights, function.__name__)
        assert (found is expected is None) or torch.equal(found, expected)
    assert weights.b_O is None and weights.b_K is not None and weights.b_K.shape == (2, 8)
    assert repr(weights) == "HeadWeights(self.1, Qwen2Attention at 'model.layers.1.self_attn', 4/2 heads, q | k | v)"


def test_grouped_heads_read_the_kv_head_of_their_group() -> None:
    weights = head_weights(FAMILIES["llama"].build(), 0)
    assert weights.W_K_by_head.shape == weights.W_Q.shape
    for head in range(HEADS):
        assert torch.equal(weights.W_K_by_head[head], weights.W_K[head // 2])
        assert torch.equal(weights.W_V_by_head[head], weights.W_V[head // 2])


@torch.no_grad()
def test_fused_and_separate_storage_give_the_same() -> None:
    """The same network stored as q | k | v and as q+k+v: grouped (all q, all k, all v), and interleaved by head."""
    separate = FAMILIES["llama"].build(head_dim=8)
    fused = FAMILIES["phi3"].build()
    for one, other in zip(separate.model.layers, fused.model.layers, strict=True):
        source = one.self_attn
        joined = [source.q_proj.weight, source.k_proj.weight, source.v_proj.weight]
        other.self_attn.qkv_proj.weight.copy_(torch.cat(joined))
        other.self_attn.o_proj.weight.copy_(source.o_proj.weight)
    for function in (W_Q, W_K, W_V, W_O):
        assert torch.equal(function(separate, 1), function(fused, 1))

    separate = FAMILIES["llama"].build(head_dim=8, num_key_value_heads=HEADS)
    fused, transposed = FAMILIES["gpt_neox"].build(), FAMILIES["gpt2"].build()
    source = separate.model.layers[0].self_attn
    joined = [projection.weight.unflatten(0, (HEADS, 8)) for projection in (source.q_proj, source.k_proj, source.v_proj)]
    fused.gpt_neox.layers[0].attention.query_key_value.weight.copy_(torch.cat(joined, dim=1).flatten(0, 1))
    transposed.transformer.h[0].attn.c_attn.weight.copy_(torch.cat([part.flatten(0, 1) for part in joined]).T)
    for function in (W_Q, W_K, W_V):
        assert torch.equal(function(separate, 0), function(fused, 0))
        assert torch.equal(function(separate, 0), function(transposed, 0))


def test_gradients_reach_the_parameters_and_values_follow_them() -> None:
    model = FAMILIES["phi3"].build()
    weights = head_weights(model, 0)
    parameter = model.model.layers[0].self_attn.qkv_proj.weight
    weights.W_K[1].sum().backward()
    rows = parameter.grad.abs().sum(dim=1).nonzero()[:, 0].tolist()
    assert rows == list(range(40, 48))  # 32 channels of q, 8 of the first kv head's k
    with torch.no_grad():
        parameter.zero_()
    assert not weights.W_K.any()


def test_wrapped_models_and_parts_of_models() -> None:
    """The anatomy is known from patching; the model given has other paths."""
    model = FAMILIES["llama"].build()
    expected = W_Q(model, 1)
    with patched(model):
        assert torch.equal(W_Q(nn.ModuleDict({"inner": model}), 1), expected)
        assert torch.equal(W_Q(model.model, 1), expected)


# Latent attention: q, k and v through projections of lower rank, a part of k shared by all heads.


@pytest.fixture
def latent(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Watched, dict[str, Any]]:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    seen: dict[str, Any] = {}
    eager = modeling.eager_attention_forward

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.update(q=query, k=key, v=value)
        return eager(module, query, key, value, *args, **kwargs)

    model = FAMILIES["deepseek_v3"].build("eager")
    anatomy = anatomy_of(model)
    for projection in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"):
        for attention in anatomy:
            attention.projections[projection] = Projection(attention.path, projection, torch.empty(0))
    monkeypatch.setattr(modeling, "eager_attention_forward", spy)
    return model, Watched(FAMILIES["deepseek_v3"], model, anatomy, padding=0), seen


def test_latent_attention_says_what_its_weights_multiply() -> None:
    weights = head_weights(FAMILIES["deepseek_v3"].build(), 0)
    assert weights.W_Q.shape == (HEADS, 16, 12) and weights.W_V.shape == (HEADS, 12, 12)
    assert weights.input_of == {"q": "q_a_proj (split or normalised)", "v": "kv_a_proj_with_mqa (split or normalised)"}
    assert head_weights(FAMILIES["llama"].build(), 0).input_of == dict.fromkeys("qkv", "hidden states")
    crossing = head_weights(FAMILIES["bart"].build(), "decoder.cross.0").input_of
    assert crossing == {"q": "hidden states", "k": "cross-attended states", "v": "cross-attended states"}


@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_pieces_of_latent_attention_make_up_what_enters_the_core(site: Any, latent: Any) -> None:
    """At position 0, where rotary positions are the identity; so the channels are those of the dot product."""
    model, watched, seen = latent
    found = pieces(model, 1, site)
    prefix = "model.layers.1.self_attn"
    assert [p.projection.removeprefix(f"{prefix}.") for p in found] == {
        "q": ["q_b_proj"],
        "k": ["kv_b_proj", "kv_a_proj_with_mqa"],
        "v": ["kv_b_proj"],
    }[site]
    expected = seen[site][:, :, :1]
    built = torch.full_like(expected, torch.nan)
    for piece in found:
        built[..., piece.channels] = _times(watched.inputs[piece.projection], piece.matrix, piece.bias)[:, :, :1]
    torch.testing.assert_close(built, expected, **CLOSE)
    inputs = {"q_b_proj": "q_a_proj", "kv_b_proj": "kv_a_proj_with_mqa", "kv_a_proj_with_mqa": None}
    for piece in found:
        source = inputs[piece.projection.removeprefix(f"{prefix}.")]
        assert piece.input == (source and f"{prefix}.{source}")


@pytest.mark.parametrize("name", ["phi3", "gpt2", "bart"])
def test_other_families_have_one_piece(name: str) -> None:
    model = FAMILIES[name].build()
    address = "decoder.self.0" if name == "bart" else 0
    weights = head_weights(model, address)
    for site in ("q", "k", "v"):
        (piece,) = pieces(model, address, site)
        assert piece.input is None and sorted(piece.channels.tolist()) == list(range(weights.attention.d_head))
        assert torch.equal(piece.matrix, getattr(weights, f"W_{site.upper()}"))


# Circuits


def _without_biases(model: nn.Module, anatomy: Anatomy) -> None:
    for path in {projection.path for attention in anatomy for projection in attention.projections.values()}:
        bias: Any = model.get_submodule(path).bias
        if bias is not None:
            bias.zero_()


@torch.no_grad()
def test_qk_circuit_gives_the_scores() -> None:
    """Where there are no positions, biases or norms in the attention: its pattern is softmax(x W_QK x^T * scale)."""
    family = FAMILIES["bert"]
    model = family.build("eager")
    anatomy = anatomy_of(model)
    _without_biases(model, anatomy)
    watched = Watched(family, model, anatomy, padding=0)
    for attention in anatomy:
        x = watched.inputs[attention.projections["q"].path][:, None]
        circuit = qk_circuit(model, attention.address)
        assert circuit.shape == (HEADS, 32, 32) and circuit.rank == 8
        scores = x @ circuit.full() @ x.mT / attention.d_head**0.5
        torch.testing.assert_close(scores.softmax(-1), watched.patterns[attention.address], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2"])
def test_ov_circuit_gives_the_output(name: str) -> None:
    family = FAMILIES[name]
    model = family.build("eager")
    anatomy = anatomy_of(model)
    _without_biases(model, anatomy)
    watched = Watched(family, model, anatomy)
    for attention in anatomy:
        x = watched.inputs[attention.projections["v"].path][:, None]
        added = (watched.patterns[attention.address] @ x @ ov_circuit(model, attention.layer).full()).sum(dim=1)
        torch.testing.assert_close(added, watched.outputs[attention.projections["o"].path], **CLOSE)


MORE_THAN_A_PRODUCT = {
    **dict.fromkeys(("qwen3", "qwen3_moe", "gemma3", "olmo2", "stablelm", "phi"), "q and k are normed"),
    **dict.fromkeys(("bloom", "mpt", "falcon_alibi", "t5"), "a position bias is added"),
    "gemma2": "scores are capped",
    "deepseek_v3": "k is joined from two projections",
}


_llama = FAMILIES["llama"].options
FORMS_OF_POSITIONS = [
    TinyFamily("interleaved", "CohereForCausalLM", "CohereConfig", {**_llama, "head_dim": 8}),
    TinyFamily("interleaved half", "Ernie4_5ForCausalLM", "Ernie4_5Config", _llama),
    TinyFamily(
        "complex",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_llama, "use_qk_norm": False, "intermediate_size_mlp": 40, "num_local_experts": 2},
    ),
]


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    [family for name, family in FAMILIES.items() if name not in MORE_THAN_A_PRODUCT] + FORMS_OF_POSITIONS,
    ids=lambda family: family.name,
)
def test_qk_circuit_pairs_the_channels_that_positions_turn(family: TinyFamily) -> None:
    """A position's score with itself: both are rotated alike, which the product does not see if channels are paired right."""
    model = family.build("eager")
    anatomy = anatomy_of(model)
    _without_biases(model, anatomy)
    watched = Watched(family, model, anatomy, padding=0)
    with capture(model, sites=["scores"]) as run:
        model(**family.inputs(padding=0))
    for attention in anatomy:
        if attention.kind == "self":
            x = watched.inputs[attention.projections["q"].path]
            circuit = qk_circuit(model, attention.address)
            product = ((x[:, None] @ circuit.A) * (x[:, None] @ circuit.B.mT)).sum(dim=-1)
            scores = run[attention.address, "scores"].diagonal(dim1=-2, dim2=-1)
            scale = (scores * product).sum() / (product**2).sum()
            assert scale > 0.1  # 1/sqrt(d_head), divided by the layer's number or 1 in some families
            torch.testing.assert_close(scores, product * scale, rtol=1e-5, atol=1e-4)  # scores reach 100


class MirroredAttention(modeling_llama.LlamaAttention):
    """Turns the channels of k round before the dot product: q's channel i meets k's channel d_head - 1 - i. No positions."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2).flip(-1)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        attend = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        out, pattern = attend(self, q, k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(out.reshape(*shape[:2], -1)), pattern


@torch.no_grad()
def test_qk_circuit_pairs_channels_as_the_dot_product_does() -> None:
    model = FAMILIES["llama"].build("eager")
    attention = MirroredAttention(model.config, 0)
    model.model.layers[0].self_attn = attention
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    _, pattern = attention(x)
    scores = x[:, None] @ qk_circuit(model, 0).full() @ x[:, None].mT * attention.scaling
    torch.testing.assert_close(scores.softmax(-1), pattern, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_composition_scores_against_full_matrices(name: str) -> None:
    model = FAMILIES[name].build()
    ov, qk = [ov_circuit(model, layer).full() for layer in (0, 1)], qk_circuit(model, 1).full()
    read = {"q": qk, "k": qk.mT, "v": ov[1]}
    columns = {"q": qk.mT, "k": qk, "v": ov[1].mT}  # as Elhage et al. write it: C W_OV, on columns
    for kind in ("q", "k", "v"):
        found = composition_scores(model, 0, 1, kind)  # type: ignore[arg-type]
        assert found.shape == (HEADS, HEADS)
        for sender in range(HEADS):
            for receiver in range(HEADS):
                norms = ov[0][sender].norm() * read[kind][receiver].norm()
                torch.testing.assert_close(found[sender, receiver], (ov[0][sender] @ read[kind][receiver]).norm() / norms)
                paper = (columns[kind][receiver] @ ov[0][sender].mT).norm() / norms
                torch.testing.assert_close(found[sender, receiver], paper)


@torch.no_grad()
def test_composition_scores_have_their_range() -> None:
    model = FAMILIES["gpt2"].build(n_embd=256, n_head=4)
    found = composition_scores(model, 0, 1, "k")
    torch.testing.assert_close(found.mean(), torch.tensor(1 / 16), rtol=0.1, atol=0)  # random: 1/sqrt(d_model)
    # One head that writes into the very direction that another one reads scores 1; into one at a right angle, 0.
    for head, direction in ((0, 0), (1, 1)):
        parameter = model.transformer.h[0].attn.c_proj.weight
        parameter[64 * head : 64 * (head + 1)] = 0
        parameter[64 * head : 64 * (head + 1), direction] = 1
    reading = model.transformer.h[1].attn.c_attn.weight
    reading[:, 2 * 64 : 3 * 64] = 0
    reading[0, 2 * 64 : 3 * 64] = 1
    found = composition_scores(model, 0, 1, "q")
    torch.testing.assert_close(found[:2, 2], torch.tensor([1.0, 0.0]), rtol=1e-6, atol=1e-6)
    model.transformer.h[0].attn.c_proj.weight[192:] = 0
    found = composition_scores(model, 0, 1, "q")
    assert bool(found[3].isnan().all()) and not bool(found[:3].isnan().any())


def test_composition_follows_the_streams() -> None:
    """Cross-attention reads its q from the decoder's stream, its k and v from the encoder's."""
    model = FAMILIES["bart"].build()
    assert composition_scores(model, "decoder.self.1", "decoder.cross.1", "q").shape == (HEADS, HEADS)
    assert composition_scores(model, "encoder.self.1", "decoder.cross.0", "v").shape == (HEADS, HEADS)
    wrong = [
        ("decoder.self.0", "decoder.cross.1", "k"),
        ("encoder.self.0", "decoder.cross.1", "q"),
        ("encoder.self.0", "decoder.self.1", "k"),
        ("decoder.cross.1", "decoder.self.1", "q"),
        ("encoder.self.1", "encoder.self.0", "q"),
        ("encoder.self.1", "encoder.self.1", "q"),
    ]
    for sender, receiver, kind in wrong:
        with pytest.raises(SpecError, match=rf"found sender {sender}, receiver {receiver}; expected a sender whose output"):
            composition_scores(model, sender, receiver, kind)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"kind='z'; expected 'q', 'k', 'v'"):
        composition_scores(model, "encoder.self.0", "encoder.self.1", "z")  # type: ignore[arg-type]


# Adapters and quantised weights: how a projection stores its matrix


def _adapted(name: str, config: Any, seed: int = 5) -> Any:
    """A PEFT model with adapters that do something: their weights random."""
    model = peft.get_peft_model(FAMILIES[name].build(), config)
    _stir(model, seed)
    return model.eval()


@torch.no_grad()
def _stir(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in ("lora_", "ia3_", "oft_", "vera_")):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


TARGETS = {"llama": ["q_proj", "v_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["q_proj", "v_proj"]}


def _config(cls: Any, name: str, **options: Any) -> Any:
    transposed = {"fan_in_fan_out": True} if name == "gpt2" else {}
    return cls(target_modules=TARGETS[name], **options, **transposed)


ADAPTERS = {
    "lora": lambda name: _config(peft.LoraConfig, name, r=4, lora_alpha=12, lora_dropout=0.5),
    "dora": lambda name: _config(peft.LoraConfig, name, r=4, use_dora=True),
    "ia3": lambda name: _config(peft.IA3Config, name, feedforward_modules=[]),
    "oft": lambda name: _config(peft.OFTConfig, name, oft_block_size=8),
}


def _check_outputs(model: nn.Module, attention: Attention) -> None:
    weights = head_weights(model, attention.address)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for site in ("q", "v"):
        projection = attention.projections[site]
        expected = _by_head(model.get_submodule(projection.path)(x), projection.channels)
        bias = getattr(weights, f"b_{site.upper()}")
        torch.testing.assert_close(_times(x, getattr(weights, f"W_{site.upper()}"), bias), expected, **CLOSE)
    z = torch.randn(2, 3, attention.heads * attention.d_value, generator=torch.Generator().manual_seed(1))
    projection = attention.projections["o"]
    added = (_by_head(z, projection.channels) @ weights.W_O).sum(dim=1) + (0 if weights.b_O is None else weights.b_O)
    torch.testing.assert_close(added, model.get_submodule(projection.path)(z), **CLOSE)


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate:UserWarning")
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in ADAPTERS for n in ("llama", "gpt2") if (k, n) != ("oft", "gpt2")])
def test_adapted_projections_give_their_effective_weight(kind: str, name: str) -> None:
    plain = FAMILIES[name].build()
    model = _adapted(name, ADAPTERS[kind](name))
    attention = anatomy_of(model)[1]
    assert not torch.allclose(W_Q(model, 1), W_Q(plain, 1), atol=1e-2)
    _check_outputs(model, attention)
    with torch.no_grad():
        model.merge_adapter()
    _check_outputs(model, attention)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(W_Q(model, 1), W_Q(plain, 1), **CLOSE)


def test_adapters_in_training_give_the_weight_without_dropout() -> None:
    model = _adapted("llama", ADAPTERS["lora"]("llama"))
    expected = W_Q(model, 0)
    model.train()
    assert torch.equal(W_Q(model, 0), expected)
    assert all(module.training for module in model.modules())
    W_Q(model, 0).sum().backward()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert bool(layer.lora_A["default"].weight.grad.any())


def test_several_adapters_and_their_biases() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["qwen2"], lora_bias=True)
    model = _adapted("qwen2", config)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS["qwen2"], lora_bias=True))
    _stir(model, 6)
    attention = anatomy_of(model)[0]
    only_first = W_Q(model, 0)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.allclose(W_Q(model, 0), only_first, atol=1e-2)
    _check_outputs(model, attention)


def _replace(model: Any, make: Any) -> Any:
    layer = model.model.layers[0].self_attn
    layer.q_proj = make(layer.q_proj)
    return layer.q_proj


class Int8(nn.Module):
    """A quantised projection that shows no weight of numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("qweight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scale).T


class Coded(Tensor):
    """Stands for a tensor subclass whose entries are not its numbers."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor) / 2

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.dequantize(), bias)
        return super().__torch_function__(func, types, args, kwargs or {})


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Float8(nn.Linear):
    """Its weight has float8 entries, their scale lies beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


@torch.no_grad()
def test_quantised_projections_are_dequantised() -> None:
    model = FAMILIES["llama"].build()
    exact = W_Q(model, 0)
    quantised = _replace(model, Int8)
    torch.testing.assert_close(W_Q(model, 0), exact, rtol=0, atol=float(quantised.scale.max()))  # one step of the scale
    expected = (quantised.qweight * quantised.scale).T
    torch.testing.assert_close(W_Q(model, 0).permute(1, 0, 2).flatten(1), expected, rtol=1e-6, atol=1e-6)

    model = FAMILIES["llama"].build()
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Coded), requires_grad=False)
    torch.testing.assert_close(W_Q(model, 0), exact / 2)

    model = FAMILIES["llama"].build()
    float8 = _replace(model, lambda linear: _like(Float8, linear))
    float8.weight = nn.Parameter(float8.weight.to(torch.float8_e4m3fn), requires_grad=False)
    float8.scale = 3.0
    torch.testing.assert_close(W_Q(model, 0), exact * 3, rtol=0.1, atol=0.1)  # 3 bits of mantissa


def _like(cls: type[nn.Linear], linear: nn.Linear) -> nn.Linear:
    new = cls(linear.in_features, linear.out_features, bias=False)
    new.weight = linear.weight
    return new


@torch.no_grad()
def test_a_forward_of_its_own_is_not_believed() -> None:
    model = FAMILIES["llama"].build()
    exact = W_Q(model, 0)
    _replace(model, lambda linear: _like(Halved, linear))
    torch.testing.assert_close(W_Q(model, 0), exact / 2)
    model = FAMILIES["llama"].build()
    _replace(model, lambda linear: _like(Clipped, linear))
    message = r"the weight of 'model.layers.0.self_attn.q_proj': found a Clipped that does not compute x @ W \+ b"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        W_Q(model, 0)
    W_K(model, 0)  # the others are as they were


def test_bfloat16_weights_are_the_parameters() -> None:
    model = FAMILIES["phi3"].build(dtype=torch.bfloat16)
    assert W_V(model, 0).dtype is torch.bfloat16
    assert composition_scores(model, 0, 1, "v").dtype is torch.float32


# Errors


def test_addresses_that_do_not_exist() -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(NoMatchError, match=r"layers: found 2; expected self.0 to self.1. Layers and heads count from 0"):
        head_weights(model, 2)
    with pytest.raises(NoMatchError, match=r"layers: found 'decoder.cross.0'"):
        qk_circuit(model, "decoder.cross.0")
    with pytest.raises(NoMatchError, match="selects 2; expected exactly one"):
        head_weights(model, "self.*")


def test_weights_that_cannot_be_derived() -> None:
    model = FAMILIES["deepseek_v3"].build()
    message = (
        r"W_K of self.1 \(DeepseekV3Attention at 'model.layers.1.self_attn'\): found that k is joined from the projections "
        r"kv_a_proj_with_mqa, kv_b_proj; expected .* pieces\(model, \"self.1\", \"k\"\)"
    )
    weights = head_weights(model, 1)
    for read in (lambda: weights.W_K, lambda: weights.b_K, lambda: W_K(model, 1), lambda: qk_circuit(model, 1)):
        with pytest.raises(UnsupportedArchitectureError, match=message):
            read()
    with pytest.raises(UnsupportedArchitectureError, match=r"W_V of self.0: found that it reads kv_a_proj_with_mqa"):
        composition_scores(model, 0, 1, "v")
    with pytest.raises(SpecError, match="site 'o'; expected 'q', 'k' or 'v'"):
        pieces(model, 0, "o")  # type: ignore[arg-type]


def test_weights_on_meta_have_no_data() -> None:
    family = FAMILIES["llama"]
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(getattr(transformers, family.config)(**family.options))
    with pytest.raises(SurgeryError, match=r"the weight of 'model.layers.0.self_attn.q_proj': found it on the meta device"):
        W_Q(model, 0)
