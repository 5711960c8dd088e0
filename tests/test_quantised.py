"""Quantised models on a CPU: bitsandbytes' int8 and 4-bit, torchao's int8 and int4, loaded the way that users load them.

Equality is `torch.equal` with the unpatched quantised model. Cuts are compared with attention by loops (`oracle.py`) or with
hooks by hand, on the very same quantised projections; a tolerance stands beside its reason.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import CACHE
from families import FAMILIES, HEADS, LAYERS
from oracle import Oracle
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from surgery import (
    Edit,
    Freeze,
    Spec,
    SurgeryError,
    capture,
    collect_reference,
    find_anatomy,
    inspect_model,
    patch_model,
    patched,
    self_test,
    unpatch_model,
    weights,
)
from surgery.analysis.interference import collect, heatmap
from surgery.sites import SITES

pytestmark = [
    # Of torch, when the libraries are first imported.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # An older name that PEFT uses.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning"),
]


def bitsandbytes(**options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def torchao(module: str, name: str, **options: Any) -> TorchAoConfig:
    pytest.importorskip("torchao")
    found = pytest.importorskip(module)
    if "granularity" in options:
        options["granularity"] = importlib.import_module("torchao.quantization.granularity").PerGroup(options["granularity"])
    return TorchAoConfig(getattr(found, name)(**options))


four_bits = functools.partial(bitsandbytes, load_in_4bit=True)
KINDS: dict[str, Callable[[], Any]] = {
    "bnb_int8": functools.partial(bitsandbytes, load_in_8bit=True),
    "bnb_nf4": functools.partial(four_bits, bnb_4bit_quant_type="nf4"),
    "bnb_fp4": functools.partial(four_bits, bnb_4bit_quant_type="fp4"),
    "bnb_nf4_twice": functools.partial(
        four_bits, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "torchao_int8": functools.partial(torchao, "torchao.quantization", "Int8WeightOnlyConfig"),
    # int4 in groups, in the packing that torch's CPU kernel reads: its numbers cannot be asked for.
    "torchao_int4_packed": functools.partial(
        torchao, "torchao.prototype.quantization.int4", "PrototypeInt4WeightOnlyConfig", group_size=32
    ),
    # int4 in groups, in bytes.
    "torchao_int4": functools.partial(
        torchao, "torchao.quantization", "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=32
    ),
}
# 8 bits of activations, or bfloat16 inside the CPU's 4-bit kernel: what differs in the last bit before such a layer may fall
# on the other side of a rounding in it. torchao's layers compute in the type of their inputs.
LOOSE = {"bnb_int8": 0.03, "bnb_nf4": 0.03, "bnb_fp4": 0.03, "bnb_nf4_twice": 0.03}
TIGHT = 2e-5
BFLOAT16 = 2.0**-8
"""Half a step between neighbouring numbers of bfloat16, relative."""

# 4-bit layers of bitsandbytes come in blocks of 64 along a row, and in rows of 32.
SIZES: dict[str, dict[str, Any]] = {
    "llama": dict(hidden_size=64, intermediate_size=128),
    "phi3": dict(hidden_size=64, intermediate_size=128),
    "gpt2": dict(n_embd=64),
}

# torch's packed int4 kernel has no derivative on a CPU.
DIFFERENTIABLE = [kind for kind in KINDS if kind != "torchao_int4_packed"]

by_kind = pytest.mark.parametrize("kind", KINDS)
# torchao quantises torch's Linear alone: not transformers' Conv1D.
by_case = pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in SIZES for k in KINDS if n != "gpt2" or k.startswith("bnb")]
)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """load(name, kind, implementation, dtype): a quantised model from a checkpoint of floats."""
    saved: dict[tuple[str, torch.dtype], Path] = {}

    def load(name: str, kind: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        config = KINDS[kind]()
        if (name, dtype) not in saved:
            saved[name, dtype] = tmp_path_factory.mktemp(name)
            FAMILIES[name].build(dtype=dtype, **SIZES[name]).save_pretrained(saved[name, dtype])
        model = AutoModelForCausalLM.from_pretrained(
            saved[name, dtype], quantization_config=config, dtype=dtype, attn_implementation=implementation
        ).eval()
        if kind.startswith("bnb"):
            for projection in projections(model).values():
                assert type(projection).__name__ in ("Linear8bitLt", "Linear4bit")
        else:
            assert all(type(p.weight) not in (nn.Parameter, Tensor) for p in projections(model).values())
        return model

    return load


PATHS: dict[type, dict[str, str]] = {}
"""By the class of the model."""


def projections(model: Any) -> dict[str, Any]:
    """By the site that they make, or o; of the first layer."""
    if (own := type(model)) not in PATHS:
        attention = find_anatomy(model).attentions[0]
        PATHS[own] = {site: place.path for site, place in attention.projections.items()}
    return {site: model.get_submodule(path) for site, path in PATHS[own].items()}


def inputs(name: str) -> dict[str, Tensor]:
    return FAMILIES[name].inputs()


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    """Of all but padding."""
    given = inputs(name)
    return model(**given).logits[given["attention_mask"].bool()]


def gap(found: Tensor, expected: Tensor) -> float:
    """As a part of the largest entry."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max())


# -- no cuts ------------------------------------------------------------------------------------------------------------------


@by_dtype
@by_case
def test_without_cuts_nothing_changes(load: Load, name: str, kind: str, dtype: torch.dtype) -> None:
    model, given = load(name, kind, dtype=dtype), inputs(name)
    before = logits(model, name)
    assert bool(before.isfinite().all())
    tokens = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    tensors = {n: id(p) for n, p in model.named_parameters()}
    patch_model(model, Spec())
    assert torch.equal(logits(model, name), before)
    assert torch.equal(model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False), tokens)
    sites = ["q", "k", "rot_q", "rot_k", "v", "scores", "pattern", "z", "result"]
    with torch.no_grad(), capture(model, sites) as run:
        watched = model(**given).logits[given["attention_mask"].bool()]
    assert torch.equal(watched, before), "watching changes nothing"
    assert all(bool(run["self.1", site].isfinite().all()) for site in sites if site != "scores")
    unpatch_model(model)
    assert torch.equal(logits(model, name), before)
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    # bitsandbytes may repack 4-bit weights in a forward, and back, not to the last bit, for a state dict.
    twin = load(name, kind, dtype=dtype)
    logits(twin, name)
    found, expected = model.state_dict(), twin.state_dict()
    assert list(found) == list(expected) and all(torch.equal(_plain(found[n]), _plain(expected[n])) for n in expected)


def _plain(tensor: Tensor) -> Tensor:
    """The stored numbers of a tensor, also of a subclass that packs them."""
    while hasattr(tensor, "qdata"):
        tensor = tensor.qdata
    return tensor


@by_dtype
@by_case
def test_eager_is_the_model_loaded_as_eager(load: Load, name: str, kind: str, dtype: torch.dtype) -> None:
    expected = logits(load(name, kind, "eager", dtype), name)
    for implementation in ("sdpa", "eager"):
        model = patch_model(load(name, kind, implementation, dtype), kernel="eager")
        assert torch.equal(logits(model, name), expected), implementation


@pytest.mark.parametrize("kind", DIFFERENTIABLE)
def test_gradients_of_heads_are_those_of_the_numbers_that_weights_stand_for(load: Load, kind: str) -> None:
    """Without a gradient of any stored number: as of a model of floats whose layers compute what the quantised ones do."""
    model = load("llama", kind)
    twin = FAMILIES["llama"].build(**SIZES["llama"])
    ids = [inputs("llama")["input_ids"].roll(shift, 1) for shift in (0, 1)]
    a, b = (collect(model, some, task=str(number), progress=False) for number, some in enumerate(ids))
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                twin.get_submodule(path).weight.copy_(layer(torch.eye(layer.in_features)).mT)
    expected = collect(twin, ids[0], progress=False)
    assert all(p.grad is None for p in model.parameters())
    for hypothesis in a.hypotheses:
        for sample in range(len(a)):
            found, wanted = (one.gradient(sample, *hypothesis).flatten() for one in (a, expected))
            # Activations of 8 bits move a pattern, and with it the small gradients of Q and K; those of other heads are no
            # neighbours at all.
            is_close = torch.cosine_similarity(found, wanted, 0) > 0.9 if kind in LOOSE else gap(found, wanted) < 1e-3
            assert is_close, (hypothesis, sample)
    maps = heatmap(a, b).maps  # one model, whatever its layers pack anew
    assert maps is not None and bool((maps.sum((1, 2)) > 0).all())


@pytest.mark.parametrize("cuts", [None, Freeze("both", heads=[1], backward="ste")], ids=["none", "ste"])
@pytest.mark.parametrize("kind", DIFFERENTIABLE)
def test_gradients_pass_through_quantised_layers(load: Load, kind: str, cuts: Any) -> None:
    """Of the embeddings, below all of them. Taken before any forward without gradients: bitsandbytes may repack its weights
    in one, for a kernel that has no backward."""

    def gradient(model: Any) -> Tensor:
        table = model.get_input_embeddings().weight.requires_grad_()
        out = model(**inputs("llama")).logits
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found = table.grad
        assert found is not None and bool(found.abs().sum() > 0)
        return found

    expected, model = gradient(load("llama", kind)), load("llama", kind)
    found = gradient(patch_model(model, cuts))
    assert torch.equal(found, expected) == (cuts is None)


@by_kind
def test_copies_and_moves_keep_their_cuts(load: Load, kind: str) -> None:
    model = load("llama", kind)
    plain = logits(model, "llama")
    patch_model(model, Freeze("both", heads=[1]))
    expected = logits(model, "llama")
    assert not torch.equal(expected, plain)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, "llama"), expected)
    assert torch.equal(logits(unpatch_model(twin), "llama"), plain)
    assert torch.equal(logits(model, "llama"), expected)
    assert [row.attention for row in inspect_model(model)] == ["LlamaAttention"] * LAYERS
    assert len(self_test(model, inputs("llama"))) == 2


# -- cuts ---------------------------------------------------------------------------------------------------------------------


class Quantised(Oracle):
    """A quantised model whose attention is `oracle_attention`: its projections are its own."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.attentions = {a.address: a.module for a in find_anatomy(model)}


def run(model: Any, name: str) -> dict[str, Tensor]:
    """What enters the first layer's output projection, what leaves its attention, and the logits."""
    seen: dict[str, Tensor] = {}
    hooks = [
        projections(model)["o"].register_forward_hook(lambda m, args, out: seen.update(z=args[0])),
        find_anatomy(model).attentions[0].module.register_forward_hook(lambda m, args, out: seen.update(out=out[0])),
    ]
    seen["logits"] = logits(model, name)
    for hook in hooks:
        hook.remove()
    chosen = inputs(name)["attention_mask"].bool()
    return {"z": seen["z"][chosen], "out": seen["out"][chosen], "logits": seen["logits"]}


CORE = {
    "rot_q": Edit("rot_q", "scale", 0.3, layers=[0], heads=[1, 2]),
    "rot_k": Edit("rot_k", "scale", 0.3, layers=[0], heads=[1]),
    "v": Edit("v", "scale", 0.3, layers=[0], heads=[1]),
    "v_shared": Edit("v", "scale", 0.3, layers=[0], heads=[1], gqa="shared"),
    "scores": Edit("scores", "scale", 0.3, layers=[0], heads=[1]),
    "pattern": Edit("pattern", "uniform", layers=[0], heads=[1, 3]),
    "z": Edit("z", "scale", 0.3, layers=[0], heads=[1]),
    "freeze_qk": Freeze("qk", layers=[0], heads=[1, 2]),
    "freeze_ov": Freeze("ov", layers=[0], heads=[1, 2]),
    "freeze_both": Freeze("both", layers=[0, 1], heads=[0], backward="stopgrad"),
    "freeze_all": Freeze("ov", layers=[0]),
    "freeze_mean": Freeze("qk", layers=[0], heads=[3], to="mean"),
}


@pytest.mark.parametrize(("cut", "kernel"), [(cut, "auto") for cut in CORE] + [("v", "eager"), ("pattern", "eager")])
@by_case
def test_cuts_in_the_core_are_those_of_attention_by_loops(load: Load, name: str, kind: str, cut: str, kernel: Any) -> None:
    spec = Spec([CORE[cut]])
    oracle = Quantised(load(name, kind, "oracle"))
    attention = find_anatomy(oracle.model).attentions[0]
    oracle.set_cuts([], attention.heads, attention.kv_heads)
    uncut = run(oracle.model, name)
    oracle.set_cuts(spec, attention.heads, attention.kv_heads)
    expected = run(oracle.model, name)
    found = run(patch_model(load(name, kind), spec, kernel=kernel), name)
    # The projections below the cut are the same layers on the same inputs; the core sums in another order.
    assert float((found["z"] - expected["z"]).abs().max()) <= TIGHT * float(uncut["z"].abs().max())
    assert gap(expected["z"], uncut["z"]) > 100 * TIGHT, "the cut must act"
    tolerance = LOOSE.get(kind, 1e-3)
    assert gap(found["logits"], expected["logits"]) <= tolerance
    assert torch.equal(found["logits"], logits(load(name, kind), name)) is False


@pytest.mark.parametrize("site", ["q", "k"])
@by_case
def test_cuts_at_quantised_projections_are_those_of_hooks(load: Load, name: str, kind: str, site: str) -> None:
    model = load(name, kind)
    attention = find_anatomy(model).attentions[0]
    place = attention.projections[site]
    factor = torch.ones(projections(model)[site].out_features)
    heads = [1] if site == "q" else list(range(attention.group_size))
    factor[place.channels[heads if site == "q" else [0]].flatten()] = 0.3
    uncut = run(model, name)
    hook = projections(model)[site].register_forward_hook(lambda m, args, out: out * factor)
    expected = run(model, name)
    hook.remove()
    found = run(patch_model(model, Edit(site, "scale", 0.3, layers=[0], heads=heads)), name)
    for key in expected:
        assert torch.equal(found[key], expected[key])
        assert not torch.equal(expected[key], uncut[key])


@by_case
def test_cuts_at_result_are_those_of_the_dequantised_output_weight(load: Load, name: str, kind: str) -> None:
    model = load(name, kind)
    attention = find_anatomy(model).attentions[0]
    o = projections(model)["o"]
    uncut = run(model, name)
    matrix = asked(o)[0]
    channels = attention.projections["o"].channels
    parts = torch.stack([uncut["z"][:, channels[head]] @ matrix[channels[head]] for head in range(HEADS)])
    expected = uncut["out"] - 0.7 * parts[1]
    # Each part is rounded by itself, to 8 bits for int8 and to bfloat16 in a 4-bit kernel.
    tolerance = LOOSE.get(kind, TIGHT)
    with torch.no_grad(), capture(model, ["result"], layers=[0]) as seen:
        model(**inputs(name))
    result = seen["self.0", "result"].permute(1, 0, 2, 3)[:, inputs(name)["attention_mask"].bool()]
    assert gap(result, parts) <= tolerance
    found = run(patch_model(model, Edit("result", "scale", 0.3, layers=[0], heads=[1])), name)
    assert torch.equal(found["z"], uncut["z"])
    assert gap(found["out"], expected) <= tolerance < gap(uncut["out"], expected) / 3
    # To zero is what z to zero is, bit for bit: the layer itself computes the other heads.
    zero = run(patch_model(model, Edit("result", "zero", layers=[0], heads=[1])), name)
    none = run(patch_model(model, Freeze("ov", layers=[0], heads=[1])), name)
    assert torch.equal(zero["out"], none["out"]) and torch.equal(zero["logits"], none["logits"])
    assert torch.equal(run(patch_model(model, Edit("result", "scale", 1.0, layers=[0])), name)["logits"], uncut["logits"])


@by_kind
def test_every_site_can_be_cut_in_bfloat16(load: Load, kind: str) -> None:
    model = load("llama", kind, dtype=torch.bfloat16)
    before = logits(model, "llama")
    means = collect_reference(model, [inputs("llama")], progress=False)
    cuts = [Edit(site, "scale", 0.5, layers=[0], heads=[0, 1]) for site in SITES]
    cuts += [Freeze(circuit, heads=[2], to="mean", reference=means) for circuit in ("qk", "ov", "both")]
    for cut in cuts:
        with patched(model, cut):
            after = logits(model, "llama")
        assert bool(after.isfinite().all()) and not torch.equal(after, before), cut
    assert torch.equal(logits(model, "llama"), before)


@by_kind
def test_decoding_with_a_cache_under_cuts(load: Load, kind: str) -> None:
    """Step by step as at once, as far as the layers do: each token's row is quantised by itself, outliers are not."""
    model = patch_model(load("llama", kind), [Freeze("qk", heads=[1]), Edit("pattern", "scale", 0.5, heads=[2])])
    ids = FAMILIES["llama"].inputs(padding=0)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        past = model(ids[:, :5], use_cache=True)
        found = [past.logits]
        for position in range(5, ids.shape[1]):
            past = model(ids[:, position : position + 1], **{CACHE: past[CACHE]}, use_cache=True)
            found.append(past.logits)
    assert gap(torch.cat(found, dim=1), whole) <= (0.06 if kind in LOOSE else 1e-4)


# -- weights ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def asked(layer: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The matrix and bias by which a layer multiplies, from what it makes of the unit vectors."""
    layer = copy.deepcopy(layer)
    bias = layer(torch.zeros(1, 1, layer.in_features, dtype=dtype))[0, 0]
    return layer(torch.eye(layer.in_features, dtype=dtype)[None])[0] - bias, bias


def documented(layer: Any) -> Tensor | None:
    """(d_in, d_out): as the libraries dequantise it, where they have a function for that."""
    if type(layer).__name__ == "Linear4bit":
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
    if type(layer).__name__ == "Linear8bitLt":
        functional = importlib.import_module("bitsandbytes.functional")
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return functional.int8_vectorwise_dequant(layer.weight.data, scale).float().T
    try:
        return layer.weight.dequantize().float().T
    except NotImplementedError:
        return None


@by_dtype
@by_case
def test_weights_are_what_the_layer_multiplies_with(load: Load, name: str, kind: str, dtype: torch.dtype) -> None:
    model = load(name, kind, dtype=dtype)
    attention = find_anatomy(model).attentions[0]
    generator = torch.Generator().manual_seed(0)
    for site, layer in projections(model).items():
        library, (matrix, bias) = documented(layer), asked(layer, dtype)
        x = torch.randn(2, 3, layer.in_features, generator=generator, dtype=torch.float32).to(dtype)
        with torch.no_grad():
            out = copy.deepcopy(layer)(x).float()
        W = getattr(weights, f"W_{site.upper()}")(model, 0).float()
        b = getattr(weights, f"b_{site.upper()}")(model, 0)
        channels = attention.projections[site].channels
        chosen = matrix[channels] if site == "o" else matrix[:, channels].permute(1, 0, 2)
        # The layer rounds what it answers: to the type that the model computes in.
        rounding = 1e-6 if dtype == torch.float32 else BFLOAT16
        assert gap(W, chosen) <= rounding
        if site == "o":
            found = (x.float()[..., channels].permute(2, 0, 1, 3) @ W[:, None]).sum(0) + (0 if b is None else b.float())
        else:
            out = out[..., channels].permute(2, 0, 1, 3)
            found = x.float() @ W[:, None] + (0 if b is None else b.float()[:, None, None])
        assert gap(found, out) <= (LOOSE.get(kind, TIGHT) if dtype == torch.float32 else 0.03)
        if b is not None:
            expected = bias if site == "o" else bias[channels]
            assert gap(b, expected) <= BFLOAT16
        if library is not None:
            same = library[channels] if site == "o" else library[:, channels].permute(1, 0, 2)
            # A 4-bit kernel of the CPU rounds the scale of each block, and the product with it, to bfloat16.
            assert gap(W, same) <= (2 * BFLOAT16 if kind.startswith("bnb") else rounding)
    piece = weights.pieces(model, 0, "v")
    assert len(piece) == 1 and torch.equal(piece[0].matrix, weights.W_V(model, 0))


@by_kind
@torch.no_grad()
def test_circuits_of_quantised_heads_are_those_of_their_dequantised_weights(load: Load, kind: str) -> None:
    model = load("llama", kind)
    plain = FAMILIES["llama"].build(**SIZES["llama"])
    for layer, own in zip(plain.model.layers, model.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            with torch.no_grad():
                getattr(layer.self_attn, name).weight.copy_(asked(getattr(own.self_attn, name))[0].T)
    for circuit in (weights.qk_circuit, weights.ov_circuit):
        found, expected = circuit(model, 0), circuit(plain, 0)
        assert gap(found.A @ found.B, expected.A @ expected.B) <= TIGHT
    for way in ("q", "k", "v"):
        found, expected = (weights.composition_scores(m, 0, 1, way) for m in (model, plain))  # type: ignore[arg-type]
        assert gap(found, expected) <= TIGHT


@by_dtype
@by_kind
def test_reading_weights_leaves_the_model_as_it_was(load: Load, kind: str, dtype: torch.dtype) -> None:
    """Also a model that never ran: its first forward, with or without gradients, is the one it would have been."""

    def both(model: Any) -> list[Tensor]:
        table = model.get_input_embeddings().weight.requires_grad_()
        if kind in DIFFERENTIABLE:
            model(**inputs("llama")).logits.float().square().sum().backward()
        return [table.detach() if table.grad is None else table.grad, logits(model, "llama")]

    expected, model = both(load("llama", kind, dtype=dtype)), load("llama", kind, dtype=dtype)
    layers = [layer for site, layer in projections(model).items()]
    before = [(id(layer.weight), _plain(layer.weight).data_ptr(), set(vars(layer.weight))) for layer in layers]
    for read in (weights.W_Q, weights.W_K, weights.W_V, weights.W_O, weights.b_Q):
        read(model, 0)
        read(model, 1)
    assert before == [(id(layer.weight), _plain(layer.weight).data_ptr(), set(vars(layer.weight))) for layer in layers]
    for found, wanted in zip(both(model), expected, strict=True):
        assert torch.equal(found, wanted)


def test_reading_weights_settles_no_type() -> None:
    """A 4-bit layer by hand computes in the type of its first input, and that is not ours."""
    library = pytest.importorskip("bitsandbytes")
    model = FAMILIES["llama"].build(dtype=torch.bfloat16, **SIZES["llama"])
    attention = model.model.layers[0].self_attn
    layer = library.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.weight = library.nn.Params4bit(attention.q_proj.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    attention.q_proj = layer.to("cpu").eval()
    assert not layer.compute_type_is_set
    exact = weights.W_Q(FAMILIES["llama"].build(dtype=torch.bfloat16, **SIZES["llama"]), 0)
    assert gap(weights.W_Q(model, 0), exact) < 0.15, "rounded to 4 bits"
    assert not layer.compute_type_is_set and layer.compute_dtype is None


def test_a_weight_that_says_less_than_it_does_is_asked(load: Load) -> None:
    """SmoothQuant's way: inputs are scaled before the product, and the tensor's own dequantised form leaves that out."""
    model = load("llama", "torchao_int8")
    layer = projections(model)["q"]
    exact = weights.W_Q(model, 0)
    layer.weight.act_pre_scale = torch.linspace(0.5, 2, 64)
    if gap(asked(layer)[0], layer.weight.dequantize().T) < 0.1:
        pytest.skip("this release of torchao has no scale of inputs in the weight")
    found = weights.W_Q(model, 0)
    assert gap(found, exact * torch.linspace(0.5, 2, 64)[:, None]) <= TIGHT


def test_quantised_projections_without_a_matrix_are_refused(load: Load) -> None:
    model = load("llama", "bnb_nf4")
    layer = projections(model)["q"]
    own = type(layer)
    layer.__class__ = type("Clipped4bit", (own,), {"forward": lambda self, x: own.forward(self, x).clamp(-1, 1)})
    with pytest.raises(SurgeryError, match=r"found a Clipped4bit that does not compute x @ W \+ b"):
        weights.W_Q(model, 0)
    assert weights.W_K(model, 0).shape == (2, 64, 16)


# -- adapters over quantised layers -------------------------------------------------------------------------------------------

TARGETS = {"llama": ["q_proj", "v_proj", "o_proj"], "phi3": ["qkv_proj", "o_proj"]}


def adapted(name: str, model: Any, **options: Any) -> Any:
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # DoRA takes the norm of the weight as it is stored, and does not know that bitsandbytes may repack it for the CPU.
            layer.support_avx512bf16_for_cpu = False
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=TARGETS[name], init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config).eval()


# PEFT has no DoRA over torchao's weights, and over bitsandbytes' int8 on a CPU it fails in its second forward.
ADAPTED = [("bnb_int8", "lora"), ("bnb_nf4", "lora"), ("bnb_nf4", "dora"), ("torchao_int8", "lora")]


@pytest.mark.parametrize(("kind", "way"), ADAPTED)
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_over_quantised_layers(load: Load, name: str, kind: str, way: str) -> None:
    is_dora = way == "dora"
    model = adapted(name, load(name, kind), use_dora=is_dora)
    before = logits(model, name)
    with model.disable_adapter():
        assert not torch.allclose(before, logits(model, name), atol=1e-2)
    patch_model(model)
    assert torch.equal(logits(model, name), before)
    cut = [Edit("q", "scale", 0.5, layers=[0], heads=[1]), Freeze("qk", layers=[1], heads=[2])]
    expected = logits(patch_model(model, cut), name)
    later = adapted(name, patch_model(load(name, kind), cut), use_dora=is_dora)
    assert torch.equal(logits(later, name), expected)
    assert not torch.equal(expected, before)
    unpatch_model(model)
    attention = find_anatomy(model).attentions[0]
    place = attention.projections["q"]
    layer = model.get_submodule(place.path)
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    W = weights.W_Q(model, 0)
    with torch.no_grad():
        assert gap(x @ W, layer(x)[0][:, place.channels].permute(1, 0, 2)) <= LOOSE.get(kind, TIGHT)
        with model.disable_adapter():
            base = weights.W_Q(model, 0)
        assert gap(W, base) > 0.05
        if is_dora:
            # Hardly more than LoRA: W is the sum, scaled.
            layer.lora_magnitude_vector["default"].weight.mul_(1.003)
            scaled = weights.W_Q(model, 0)
            assert gap(scaled, asked(layer)[0][:, place.channels].permute(1, 0, 2)) <= 1e-6
            assert gap(scaled, W) > 1e-3
    if not is_dora:
        delta = layer.get_delta_weight("default").T[:, place.channels].permute(1, 0, 2)
        assert gap(W - base, delta) <= 1e-4
        W.square().sum().backward()
        assert bool(layer.lora_A["default"].weight.grad.any()), "the adapter's weights keep their gradient"
