"""What is derived of a model: addresses, heads, projections; and the table that shows it."""

from __future__ import annotations

import functools
import json
import re
import sys
import types
from typing import Any

import pytest
import torch
import transformers
from families import D_MODEL, FAMILIES, HEADS, KV_HEADS, LAYERS
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery import (
    Edit,
    Freeze,
    NoMatchError,
    UnsupportedArchitectureError,
    capture,
    find_anatomy,
    inspect_model,
    patch_model,
    patched,
    unpatch_model,
)
from surgery.family import computes_attention, is_projection


@functools.cache
def built(name: str) -> Any:
    return FAMILIES[name].build()


# -- heads and projections of every family ------------------------------------------------------------------------------

SEPARATE, FUSED = "q | k | v", "q+k+v"
DERIVED: dict[str, tuple[int, int, str]] = {  # kv heads, d_head, how q, k and v are stored
    "gpt2": (4, 8, FUSED),
    "gpt2_reordered": (4, 8, FUSED),
    "gptj": (4, 8, SEPARATE),
    "gpt_neox": (4, 8, FUSED),
    "codegen": (4, 8, FUSED),
    "llama": (2, 16, SEPARATE),
    "mistral": (2, 16, SEPARATE),
    "mixtral": (2, 16, SEPARATE),
    "qwen2": (2, 8, SEPARATE),
    "qwen3": (2, 16, SEPARATE),
    "qwen3_moe": (2, 16, SEPARATE),
    "falcon_multi_query": (1, 8, FUSED),
    "falcon_grouped": (2, 8, FUSED),
    "falcon_alibi": (4, 8, FUSED),
    "bloom": (4, 8, FUSED),
    "opt": (4, 8, SEPARATE),
    "gpt_neo": (4, 8, SEPARATE),
    "mpt": (4, 8, FUSED),
    "phi": (2, 8, SEPARATE),
    "phi3": (2, 8, FUSED),
    "gemma2": (2, 16, SEPARATE),
    "gemma3": (2, 16, SEPARATE),
    "gpt_oss": (2, 16, SEPARATE),
    "olmo2": (2, 8, SEPARATE),
    "stablelm": (2, 8, SEPARATE),
    "deepseek_v3": (4, 12, "q | (k) | v"),
    "bert": (4, 8, SEPARATE),
    "roberta": (4, 8, SEPARATE),
    "t5": (4, 12, SEPARATE),
    "bart": (4, 8, SEPARATE),
    "whisper": (4, 8, SEPARATE),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_fusion(name: str) -> None:
    anatomy = find_anatomy(built(name))
    kv_heads, d_head, fusion = DERIVED[name]
    for attention in anatomy:
        assert (attention.heads, attention.kv_heads, attention.d_head, attention.fusion) == (HEADS, kv_heads, d_head, fusion)
        assert attention.d_value == 12 if name == "deepseek_v3" else attention.d_value == d_head
        assert attention.group_size == HEADS // kv_heads
        assert set(attention.projections) | set(attention.why) == {"q", "k", "v", "o"}
        assert set(attention.why) == ({"k"} if name == "deepseek_v3" else set())
        for site, projection in attention.projections.items():
            width = attention.d_value if site in ("v", "o") else d_head
            assert projection.channels.shape == (kv_heads if site in ("k", "v") else HEADS, width)
            assert projection.channels.unique().numel() == projection.channels.numel(), "each channel belongs to one head"
            assert is_projection(built(name).get_submodule(projection.path))
    two_stacks = name in ("t5", "bart", "whisper")
    expected = [f"self.{i}" for i in range(LAYERS)]
    if two_stacks:
        expected = [f"encoder.self.{i}" for i in range(LAYERS)]
        expected += [f"decoder.{kind}.{i}" for i in range(LAYERS) for kind in ("self", "cross")]
    assert [a.address for a in anatomy] == expected
    assert {(a.address, a.kind, a.layer) for a in anatomy} == {(e, e.split(".")[-2], int(e.split(".")[-1])) for e in expected}
    assert anatomy.model_class == FAMILIES[name].architecture and anatomy.unsupported == ()
    assert len(anatomy) == len(anatomy.attentions) == len(expected)


def test_the_table_has_every_family() -> None:
    assert set(DERIVED) == set(FAMILIES)


def rows(*starts: int, width: int = 8) -> list[list[int]]:
    return [list(range(start, start + width)) for start in starts]


LAYOUTS: dict[str, tuple[list[list[int]], list[list[int]], list[list[int]]]] = {  # output channels of q, k, v by head
    "gpt2": (rows(0, 8, 16, 24), rows(32, 40, 48, 56), rows(64, 72, 80, 88)),
    "mpt": (rows(0, 8, 16, 24), rows(32, 40, 48, 56), rows(64, 72, 80, 88)),
    "gptj": (rows(0, 8, 16, 24), rows(0, 8, 16, 24), rows(0, 8, 16, 24)),
    "gpt_neox": (rows(0, 24, 48, 72), rows(8, 32, 56, 80), rows(16, 40, 64, 88)),  # q, k, v of one head together
    "bloom": (rows(0, 24, 48, 72), rows(8, 32, 56, 80), rows(16, 40, 64, 88)),
    "falcon_alibi": (rows(0, 24, 48, 72), rows(8, 32, 56, 80), rows(16, 40, 64, 88)),
    "codegen": (rows(0, 24, 48, 72), rows(16, 40, 64, 88), rows(8, 32, 56, 80)),  # four blocks of q, v, k
    "falcon_multi_query": (rows(0, 8, 16, 24), rows(32), rows(40)),
    "falcon_grouped": (rows(0, 8, 32, 40), rows(16, 48), rows(24, 56)),  # q of two heads, k, v of each group
    "llama": (rows(0, 16, 32, 48, width=16), rows(0, 16, width=16), rows(0, 16, width=16)),
    "phi3": (rows(0, 8, 16, 24), rows(32, 40), rows(48, 56)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_which_channels_belong_to_which_head(name: str) -> None:
    for attention in find_anatomy(built(name)):
        for site, expected in zip(("q", "k", "v"), LAYOUTS[name], strict=True):
            assert attention.projections[site].channels.tolist() == expected, site
        heads = torch.arange(HEADS * attention.d_value).view(HEADS, -1)
        assert torch.equal(attention.projections["o"].channels, heads)


@pytest.mark.parametrize("name", FAMILIES)
def test_deriving_runs_nothing_and_changes_nothing(name: str) -> None:
    model = FAMILIES[name].build()
    before = [(m, type(m), dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    state = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    fired: list[str] = []
    handles = [m.register_forward_hook(lambda *_: fired.append("hook")) for m in model.modules()]
    random = torch.get_rng_state()
    one, two = find_anatomy(model), find_anatomy(model)
    for handle in handles:
        handle.remove()
    assert fired == [] and torch.equal(torch.get_rng_state(), random)
    assert all(type(m) is cls and set(m.__dict__) == set(attributes) for m, cls, attributes, _ in before)
    assert all(m._buffers[n] is tensor for m, _, _, buffers in before for n, tensor in buffers.items())
    assert all(t.data_ptr() == state[n][0] and torch.equal(t, state[n][1]) for n, t in model.state_dict().items())
    assert one.fingerprint == two.fingerprint and [repr(a) for a in one] == [repr(a) for a in two]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "falcon_grouped", "deepseek_v3", "bert"])
def test_patched_models_have_the_same_anatomy(name: str) -> None:
    model = FAMILIES[name].build()
    plain = find_anatomy(model)
    for kernel in ("auto", "eager"):
        patch_model(model, Freeze("both"), kernel=kernel)  # type: ignore[arg-type]
        again = find_anatomy(model)
        assert again.fingerprint == plain.fingerprint and [repr(a) for a in again] == [repr(a) for a in plain]
        assert [a.class_name for a in again] == [a.class_name for a in plain]
        for one, other in zip(plain, again, strict=True):
            assert all(torch.equal(one.projections[s].channels, other.projections[s].channels) for s in one.projections)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_model_without_data_has_an_anatomy(name: str) -> None:
    with torch.device("meta"):
        config = getattr(transformers, FAMILIES[name].config)(**FAMILIES[name].options)
        model = getattr(transformers, FAMILIES[name].architecture)(config)
    assert find_anatomy(model).fingerprint == find_anatomy(built(name)).fingerprint


def test_fingerprints_tell_models_of_other_shapes_apart() -> None:
    names = [find_anatomy(FAMILIES["llama"].build(**options)).fingerprint for options in (
        {}, {"head_dim": 8}, {"num_key_value_heads": 4}, {"num_hidden_layers": 3}, {"num_attention_heads": 2},
    )]  # fmt: skip
    assert len(set(names)) == 5
    assert find_anatomy(FAMILIES["llama"].build(seed=5)).fingerprint == names[0]
    assert names[0] == "self.0: LlamaAttention 4/2 × 16, 16; self.1: LlamaAttention 4/2 × 16, 16"


# -- addresses ----------------------------------------------------------------------------------------------------------

OPTIONS = {name: family.options for name, family in FAMILIES.items()}
TEXT = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TEXT, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def build(model: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(config).eval()


def with_cross_attention() -> Any:
    return build("GPT2LMHeadModel", transformers.GPT2Config(**OPTIONS["gpt2"], add_cross_attention=True))


def decoder_with_cross_attention() -> Any:
    return build("BertLMHeadModel", transformers.BertConfig(**OPTIONS["bert"], is_decoder=True, add_cross_attention=True))


def composed() -> Any:
    configs = transformers.BertConfig(**OPTIONS["bert"]), transformers.GPT2Config(**OPTIONS["gpt2"])
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*configs)
    return transformers.EncoderDecoderModel(config=config).eval()


def two_towers() -> Any:
    return build("CLIPModel", transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def vision_and_language() -> Any:
    text, vision = transformers.LlamaConfig(**OPTIONS["llama"]), transformers.CLIPVisionConfig(**VISION)
    return build("LlavaForConditionalGeneration", transformers.LlavaConfig(text_config=text, vision_config=vision))


def hybrid() -> Any:
    options = {**OPTIONS["qwen2"], "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    return build("Lfm2ForCausalLM", transformers.Lfm2Config(**options))


def two_models() -> Any:
    return nn.ModuleDict({"language": built("llama"), "decoder": built("gpt2")})


MODELS: dict[str, tuple[Any, list[str]]] = {
    "cross-attention in a decoder": (with_cross_attention, ["self.0", "cross.0", "self.1", "cross.1"]),
    "an encoder made a decoder": (decoder_with_cross_attention, ["self.0", "cross.0", "self.1", "cross.1"]),
    "an encoder and a decoder": (
        composed,
        ["encoder.self.0", "encoder.self.1", "decoder.self.0", "decoder.cross.0", "decoder.self.1", "decoder.cross.1"],
    ),
    "two towers": (two_towers, ["encoder.self.0", "encoder.self.1", "vision.self.0", "vision.self.1", "vision.self.2"]),
    "vision and language": (vision_and_language, ["vision.self.0", "vision.self.1", "vision.self.2", "self.0", "self.1"]),
    "attention in some layers": (hybrid, ["self.1", "self.3"]),
    "two models": (two_models, ["self.0", "self.1", "decoder.self.0", "decoder.self.1"]),
    "a bare stack": (lambda: built("llama").model, ["self.0", "self.1"]),
    "one layer": (lambda: built("llama").model.layers[1], ["self.0"]),
    "one attention": (lambda: built("llama").model.layers[1].self_attn, ["self.0"]),
    "a list of layers": (lambda: built("llama").model.layers, ["self.0", "self.1"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_addresses(name: str) -> None:
    make, addresses = MODELS[name]
    anatomy = find_anatomy(make())
    assert [a.address for a in anatomy] == addresses
    assert [a.addresses for a in anatomy] == [(address,) for address in addresses]
    for attention in anatomy:
        assert anatomy[attention.address] is attention
        assert attention.kind == attention.address.split(".")[-2] and attention.layer == int(attention.address.split(".")[-1])
        assert attention.path.endswith(str(attention.layer)) or f"{attention.layer}." in attention.path or len(addresses) == 1


def test_cross_attention_reads_the_other_sequence() -> None:
    source = torch.randn(2, 5, D_MODEL)
    ids = FAMILIES["gpt2"].inputs(padding=0)["input_ids"]
    for model in (with_cross_attention(), decoder_with_cross_attention()):
        with torch.no_grad(), capture(model, ["pattern", "rot_k"]) as run:
            plain = model(ids, encoder_hidden_states=source).logits
        assert run["cross.1", "pattern"].shape == (2, HEADS, 9, 5) and run["self.1", "pattern"].shape == (2, HEADS, 9, 9)
        assert run["cross.0", "rot_k"].shape[2] == 5 and torch.equal(run[1, "pattern"], run["self.1", "pattern"])
        with torch.no_grad(), patched(model, Freeze("ov", "cross.*")):
            cut = model(ids, encoder_hidden_states=source).logits
            assert torch.equal(cut, model(ids, encoder_hidden_states=torch.randn(2, 7, D_MODEL)).logits), (
                "nothing comes from there"
            )
        assert not torch.equal(cut, plain)


def test_a_layer_or_an_attention_alone_can_be_patched() -> None:
    model = FAMILIES["gpt2"].build()
    x = torch.randn(1, 4, D_MODEL)
    for part in (model.transformer.h[0], model.transformer.h[0].attn):
        plain = part(x)[0] if part is not model.transformer.h[0] else part(x)
        assert patch_model(part, Freeze("ov", [0], [1])) is part
        cut = part(x)[0] if part is not model.transformer.h[0] else part(x)
        assert not torch.equal(cut, plain)
        unpatch_model(part)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", "encoder.self.0 encoder.self.1 decoder.self.0 decoder.cross.0 decoder.self.1 decoder.cross.1"),
        (0, "decoder.self.0"),
        ([1, 0], "decoder.self.0 decoder.self.1"),
        ("encoder.self.*", "encoder.self.0 encoder.self.1"),
        ("decoder.*", "decoder.self.0 decoder.cross.0 decoder.self.1 decoder.cross.1"),
        ("*.cross.*", "decoder.cross.0 decoder.cross.1"),
        ("*.1", "encoder.self.1 decoder.self.1 decoder.cross.1"),
        ("*.self.[01]", "encoder.self.0 encoder.self.1 decoder.self.0 decoder.self.1"),
        (["encoder.self.1", 0, "decoder.cross.*"], "encoder.self.1 decoder.self.0 decoder.cross.0 decoder.cross.1"),
        (["encoder.self.1", "encoder.*"], "encoder.self.0 encoder.self.1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_patterns_select_addresses_in_the_order_of_the_model(name: str, layers: Any, expected: str) -> None:
    model = built(name)
    chosen = Freeze("ov", layers).layers
    assert [a.address for a in find_anatomy(model).select(chosen)] == expected.split()
    with patched(model, Freeze("ov", layers)):
        assert [row.address for row in inspect_model(model) if row.cuts != "none"] == expected.split()


def test_what_selects_nothing() -> None:
    anatomy = find_anatomy(built("bart"))
    for wrong in (2, "self.0", "Encoder.self.0", "encoder.self", "encoder.self.00", ""):
        with pytest.raises(
            NoMatchError, match=rf"found {re.escape(repr(wrong))}; expected encoder\.self\.0 to encoder\.self\.1, dec"
        ):
            anatomy.select((wrong,))
    with pytest.raises(NoMatchError, match="found 2, 'x'"):
        anatomy.select((0, 2, "x"))
    with pytest.raises(NoMatchError, match=r"selects 6; expected exactly one"):
        anatomy["*"]


# -- what is attention, and what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_else_is_taken_for_attention(name: str) -> None:
    """Routers of mixtures of experts, gated networks, embeddings, norms, heads: none of them computes attention."""
    model = built(name)
    anatomy = find_anatomy(model, strict=False)
    assert anatomy.unsupported == ()
    attentions = {a.module for a in anatomy}
    # The softmax of a model is that of its loss or of its sampling.
    others = [m for m in model.modules() if computes_attention(m) and m not in attentions]
    assert [type(m).__name__ for m in others if not isinstance(m, PreTrainedModel)] == []


class Inline(nn.Module):
    """Attention that no interface knows."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=-1) @ self.value(x)


class InMethods(Inline):
    """The same, in a method that is inherited and calls functions by name."""

    def scores(self, x: Tensor) -> Tensor:
        return torch.bmm(self.query(x), self.key(x).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softmax(self.scores(x), dim=-1)


class Fused(nn.Module):
    """A library's kernel called directly."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1)))


class WithModule(nn.Module):
    """The softmax as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v, self.normalise = nn.Linear(8, 16), nn.Linear(8, 8), nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, dim=-1)
        return torch.einsum("bqk,bkd->bqd", self.normalise(torch.einsum("bqd,bkd->bqk", q, k)), self.v(x))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.transpose(1, 2), dim=-1) @ value


class WithHelper(Inline):
    """The softmax in a function beside the class."""

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self.query(x), self.key(x), self.value(x))


class WithInner(Inline):
    """The softmax in a function inside the method."""

    def forward(self, x: Tensor) -> Tensor:
        def pattern(query: Tensor, key: Tensor) -> Tensor:
            return torch.softmax(torch.matmul(query, key.transpose(1, 2)), dim=-1)

        return pattern(self.query(x), self.key(x)) * self.value(x)


class FusedAlone(nn.Module):
    """q, k and v in one projection, the output projection somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return _attend(*self.qkv(x).chunk(3, dim=-1))


class InList(nn.Module):
    """The projections in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return _attend(*(map_(x) for map_ in self.maps))


class Clipped(nn.Module):
    """A projection in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).clamp(-1, 1)


class Wrapped(Inline):
    """The projections wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (Clipped() for _ in range(3))


class Torchs(nn.Module):
    """torch's own function, with everything handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.multi_head_attention_forward(x, x, x, 8, 2)[0]  # type: ignore[call-arg]


class Raw(nn.Module):
    """The projections as matrices of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(8, 2, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhe->bhte", x, w) for w in (self.q, self.k, self.v))
        return torch.softmax(q @ k.transpose(2, 3), dim=-1) @ v


class Router(nn.Module):
    """One projection and a softmax: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1) @ torch.ones(4, 1)


class Gated(nn.Module):
    """Projections and products, no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.gate(x).sigmoid()) @ torch.eye(8)


class Classifier(nn.Module):
    """Projections and a softmax, no product."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x)).softmax(-1)


class Experts(nn.Module):
    """Weights of experts in a list, chosen by a softmax that another module computes: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Router()
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x.expand(4, -1, -1), self.up), self.down) * self.gate(x)


REWRITTEN = [
    Inline,
    Fused,
    WithModule,
    WithHelper,
    FusedAlone,
    InList,
    Raw,
    Wrapped,
    functools.partial(nn.MultiheadAttention, 8, 2),
]
REFUSED = [WithInner, Torchs, functools.partial(nn.MultiheadAttention, 8, 2, add_zero_attn=True)]
LEFT_ALONE = [InMethods]


def _id(make: Any) -> str:
    return getattr(make, "__name__", "MultiheadAttention")


@pytest.mark.parametrize("make", REWRITTEN, ids=_id)
def test_an_attention_without_interface_is_found_and_patched(make: Any) -> None:
    """Each point of its core is live, and without cuts it is what it was."""
    torch.manual_seed(0)
    model = nn.ModuleList([make()])
    module: Any = model[0]
    x = torch.randn(2, 5, 8)
    given = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)

    def run() -> Tensor:
        output = module(*given)
        return output[0] if isinstance(output, tuple) else output

    plain = run()
    assert computes_attention(module) and [a.address for a in find_anatomy(model)] == ["self.0"]
    assert torch.equal(run(), plain)
    for site in ("rot_q", "rot_k", "scores", "pattern", "v", "z"):
        with patched(model, Edit(site, "scale", 0.5)):
            assert not torch.allclose(run(), plain), site
    with capture(model, ["pattern", "v", "z"]) as seen:
        assert torch.allclose(run(), plain, atol=1e-6)  # torch's fused kernels for inference may differ in the last bits
    pattern, v, z = (seen["self.0", site] for site in ("pattern", "v", "z"))
    assert torch.allclose(pattern.sum(-1), torch.ones_like(pattern.sum(-1)), atol=1e-6)
    assert torch.allclose(pattern @ v, z, atol=1e-6)
    unpatch_model(model)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("make", LEFT_ALONE, ids=_id)
def test_what_only_looks_like_attention_is_left_alone_and_named(make: Any) -> None:
    """A softmax over q k^T that weights nothing: maps of attention, pointers."""
    model = nn.ModuleDict({"known": built("llama"), "deep": nn.ModuleList([make()])})
    anatomy = find_anatomy(model)
    assert [a.address for a in anatomy] == ["self.0", "self.1"] and anatomy.unsupported == ()
    assert len(anatomy.others) == 1 and "InMethods.forward, line" in anatomy.others[0]
    assert "no softmax attention: 'deep.0' (InMethods)" in str(inspect_model(model))
    with pytest.raises(NoMatchError, match="that no product with values follows"):
        find_anatomy(nn.ModuleList([make()]))


@pytest.mark.parametrize("make", REFUSED, ids=_id)
def test_an_unknown_attention_is_found(make: Any) -> None:
    module = make()
    assert computes_attention(module)
    model = nn.ModuleDict({"known": built("llama"), "deep": nn.ModuleList([make()])})
    with pytest.raises(
        UnsupportedArchitectureError, match=rf"(?s)'deep\.0' \({type(module).__name__}\).*patches/.*strict=False"
    ):
        find_anatomy(model)
    anatomy = find_anatomy(model, strict=False)
    assert [a.address for a in anatomy] == ["self.0", "self.1"] and len(anatomy.unsupported) == 1
    with pytest.raises(UnsupportedArchitectureError):
        inspect_model(model, strict=True)
    assert "left as it is: 'deep.0'" in str(inspect_model(model))


@pytest.mark.parametrize("make", [Router, Experts, Gated, Classifier, functools.partial(nn.Linear, 3, 3)], ids=str)
def test_what_is_no_attention(make: Any) -> None:
    assert not computes_attention(make())
    model = nn.ModuleDict({"known": built("llama"), "other": make()})
    assert find_anatomy(model).unsupported == ()


# -- the table ----------------------------------------------------------------------------------------------------------


def test_the_table_of_a_plain_model() -> None:
    table = inspect_model(built("llama"))
    assert len(table) == LAYERS and [row.address for row in table] == ["self.0", "self.1"]
    row = table["self.1"]
    assert row is table[1] and table.rows[1] is row
    assert (row.path, row.attention, row.heads, row.kv_heads, row.d_head) == (
        "model.layers.1.self_attn",
        "LlamaAttention",
        4,
        2,
        16,
    )
    assert (row.projections, row.fusion) == ("q_proj, k_proj, v_proj, o_proj", "q | k | v")
    assert (row.kernel, row.cuts, row.runs) == ("eager", "", None)
    with pytest.raises(NoMatchError, match=r"one of self\.0, self\.1"):
        table["self.7"]
    assert table.model_class == "LlamaForCausalLM" and table.unsupported == ()


def test_the_table_says_what_is_cut_and_by_which_kernel() -> None:
    model, inputs = FAMILIES["llama"].build("sdpa"), FAMILIES["llama"].inputs()
    assert [row.kernel for row in inspect_model(model)] == ["sdpa", "sdpa"]
    patch_model(
        model,
        [Edit("pattern", "uniform", layers=[0], heads=[1]), Freeze("ov", [1]), Edit("q", "scale", 2, layers=[1], heads=[0, 3])],
    )
    table = inspect_model(model)
    assert [row.kernel for row in table] == ["sdpa + 1 of 4 heads reconstructed", "sdpa"]
    assert [row.cuts for row in table] == ["pattern uniform (heads 1)", "q scale (heads 0, 3); z zero (all heads)"]
    assert [row.runs for row in table] == [0, 0] and [row.attention for row in table] == ["LlamaAttention"] * 2
    with torch.no_grad():
        model(**inputs)
        model(**inputs)
    assert [row.runs for row in inspect_model(model)] == [2, 2]
    with capture(model, ["z", "scores"], [0]):
        assert inspect_model(model)["self.0"].cuts.endswith("; capture scores; capture z")
    patch_model(model, kernel="eager")
    assert [(row.kernel, row.cuts) for row in inspect_model(model)] == [("reconstructed eager", "none")] * 2
    unpatch_model(model)
    assert [(row.kernel, row.cuts) for row in inspect_model(model)] == [("sdpa", "")] * 2


def test_callables_are_named() -> None:
    def halve(x: Tensor) -> Tensor:
        return x / 2

    model = FAMILIES["llama"].build()
    with patched(model, [Edit("z", halve), Edit("k", "zero", heads=[2, 3]), Edit("v", "zero", heads=[0], gqa="shared")]):
        assert inspect_model(model)["self.0"].cuts == "k zero (heads 1); v zero (heads 0, 1); z halve (all heads)"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_as_text_and_as_data(name: str) -> None:
    table = inspect_model(built(name))
    text = str(table)
    assert repr(table) == text and FAMILIES[name].architecture in text.splitlines()[0]
    for row in table:
        assert row.address in text and row.attention[:8] in text and f"{row.heads} / {row.kv_heads}" in text
        assert all(part in text for part in row.fusion.split())
    data = table.as_dicts()
    assert json.loads(json.dumps(data)) == data
    assert [set(d) for d in data] == [
        {"address", "path", "attention", "heads", "kv_heads", "d_head", "projections", "fusion", "kernel", "cuts", "runs"}
    ] * len(table)
    page = table._repr_html_()
    assert page.count("<tr>") == len(table) + 1 and FAMILIES[name].architecture in page
    assert max(len(line) for line in text.splitlines()) <= 140


def test_the_table_as_a_frame(monkeypatch: Any) -> None:
    """pandas is not needed to test how it is called."""
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=calls.append))
    table = inspect_model(built("gpt2"))
    table.to_frame()
    assert calls == [table.as_dicts()]


def test_html_is_escaped() -> None:
    model = FAMILIES["gpt2"].build()

    def odd(x: Tensor) -> Tensor:
        return x

    odd.__name__ = "<b>&"
    with patched(model, Edit("z", odd)):
        page = inspect_model(model)._repr_html_()
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page


def test_inspecting_changes_nothing() -> None:
    model, inputs = FAMILIES["llama"].build("sdpa"), FAMILIES["llama"].inputs()
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        plain = model(**inputs).logits
        inspect_model(model)
        assert [type(m) for m in model.modules()] == classes and torch.equal(model(**inputs).logits, plain)
        with patched(model, Freeze("qk")):
            cut = model(**inputs).logits
            inspect_model(model)
            assert torch.equal(model(**inputs).logits, cut)


def test_print_shows_the_cuts() -> None:
    model = FAMILIES["llama"].build("sdpa")
    plain = str(model)
    patch_model(model, Freeze("ov", [1], [2]))
    text = str(model)
    assert text != plain and "SurgicalLlamaAttention" in text
    assert "surgery at self.1: cuts z zero (heads 2); kernel sdpa" in text
    assert "surgery at self.0: cuts none; kernel sdpa" in text
    unpatch_model(model)
    assert str(model) == plain


def test_the_reconstruction_can_be_read() -> None:
    model = patch_model(FAMILIES["llama"].build())
    code = model.model.layers[0].self_attn.reconstruction.code
    points = re.findall(r"point\(at, '(\w+)'", code)
    assert points == ["rot_q", "rot_k", "v", "scores", "pattern", "z"]
    assert f"repeat_heads(key, {HEADS // KV_HEADS})" in code, "the head map is in the code"
    with pytest.raises(AttributeError):
        _ = unpatch_model(model).model.layers[0].self_attn.reconstruction


def test_layers_may_be_named_by_the_paths_of_their_modules() -> None:
    anatomy = find_anatomy(built("bart"))
    attention = anatomy["decoder.cross.1"]
    assert anatomy.matches([attention.path]) == {"decoder.cross.1"}
    assert anatomy.matches([attention.path, "encoder.self.0"]) == {"decoder.cross.1", "encoder.self.0"}
    with pytest.raises(NoMatchError, match=r"layers: found 'model.decoder.layers.7'"):
        anatomy.matches(["model.decoder.layers.7"])
