"""Models whose code lies beside their checkpoint, loaded with trust_remote_code: nobody described these classes to the engine.

The reference of the cuts runs the same model with attention by loops over heads, on the outputs of the model's own projections.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from oracle import Cuts, cut_by_hand, edits_by_hand, oracle_attention, selected
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, dynamic_module_utils

from surgery import (
    CacheError,
    Edit,
    Freeze,
    Spec,
    UnsupportedArchitectureError,
    capture,
    collect_reference,
    export_checkpoint,
    find_anatomy,
    inspect_model,
    load_checkpoint,
    patch_model,
    patched,
    self_test,
    unpatch_model,
    weights,
)
from surgery import family as families
from surgery.classes import SurgicalAttention
from surgery.family import Family, register_example, register_patch
from surgery.sites import SITES

CODE = Path(__file__).parent / "remote"
CLASSES = {
    "qwenish": ("QwenishConfig", "QwenishLMHeadModel", "attn_dropout_prob"),
    "internlmish": ("InternLMishConfig", "InternLMishForCausalLM", "attention_dropout"),
}
HEADS, D_HEAD, D_MODEL, BATCH, LENGTH, PADDING, VOCAB = 4, 8, 32, 2, 7, 2, 67
KV_HEADS = {"qwenish": 4, "internlmish": 2}

by_name = pytest.mark.parametrize("name", CLASSES)
# The loops take sums in another order than the batched products.
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Both models as they would be downloaded: config.json, the code, and the weights."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as change:
        change.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        change.setattr(sys, "path", [*sys.path])
        change.setenv("HF_HUB_OFFLINE", "1")
        FOLDERS.update({name: publish(name, folder / name) for name in CLASSES})
        yield FOLDERS
    FOLDERS.clear()


FOLDERS: dict[str, Path] = {}


def publish(name: str, folder: Path) -> Path:
    config, model_class, _ = CLASSES[name]
    folder.mkdir()
    shutil.copy(CODE / f"modeling_{name}.py", folder)
    names = {"AutoConfig": f"modeling_{name}.{config}", "AutoModelForCausalLM": f"modeling_{name}.{model_class}"}
    data = {"model_type": name, "architectures": [model_class], "auto_map": names}
    (folder / "config.json").write_text(json.dumps({**data, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for patterns that are clearly not uniform.
            new = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * new if parameter.dim() > 1 else parameter + 0.1 * new)
    model.save_pretrained(folder)
    return folder


@functools.cache
def loaded(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDERS[name], trust_remote_code=True).eval()


def load(name: str) -> Any:
    """A model as it was loaded."""
    return copy.deepcopy(loaded(name))


def attention_modules(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "c_attn") or hasattr(m, "wqkv")]


def inputs(seed: int = 0, length: int = LENGTH, padding: int = PADDING) -> dict[str, Tensor]:
    """Two rows of random tokens, the first padded on the left."""
    ids = torch.randint(5, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    return model(**inputs(**options)).logits


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    given = inputs()
    out = model(**given).logits[given["attention_mask"].bool()]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def generate(model: Any, **options: Any) -> Any:
    return model.generate(
        **inputs(),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.sequences, b.sequences) and all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


# -- the reference -------------------------------------------------------------------------------------------------------------


def turned(x: Tensor, position_ids: Tensor) -> Tensor:
    """Rotary positions by complex numbers. x: (batch, position, d)."""
    numbers = torch.complex(x[..., : D_HEAD // 2], x[..., D_HEAD // 2 :])
    speeds = 10000.0 ** (-torch.arange(D_HEAD // 2) * 2 / D_HEAD)
    numbers = numbers * torch.polar(torch.ones(1), position_ids[..., None] * speeds)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def slow_forward(module: Any, hidden_states: Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
    """An attention head by head, with the cuts that the test set on the module."""
    length, lowest = hidden_states.shape[1], torch.finfo(torch.float32).min
    queries, keys, values = [], [], []
    if hasattr(module, "c_attn"):
        channels, offset = module.c_attn(hidden_states), HEADS * D_HEAD
        for head in range(HEADS):
            start = head * D_HEAD
            for number, part in enumerate((queries, keys, values)):
                part.append(channels[..., number * offset + start : number * offset + start + D_HEAD])
        mask = torch.full((length, length), lowest).triu(1)[None, None]
        mask = torch.where(attention_mask, mask, lowest)
    else:
        channels, start = module.wqkv(hidden_states), 0
        for _ in range(KV_HEADS["internlmish"]):
            for part, count in ((queries, HEADS // KV_HEADS["internlmish"]), (keys, 1), (values, 1)):
                for _ in range(count):
                    part.append(channels[..., start : start + D_HEAD])
                    start += D_HEAD
        mask = attention_mask
    for part in (queries, keys):
        part[:] = [turned(x, position_ids) for x in part]
    q, k, v = (torch.stack(part, dim=1) for part in (queries, keys, values))
    z, pattern = oracle_attention(q, k, v, mask, D_HEAD**-0.5, module.__dict__.get("cuts_by_hand", {}))
    output = module.c_proj if hasattr(module, "c_proj") else module.wo
    return output(z.flatten(2)), pattern


def reference(name: str, spec: Any) -> Any:
    """The model in loops, with the cuts by hand."""
    model = load(name)
    for layer, module in enumerate(attention_modules(model)):
        cuts: Cuts = {}
        for edit in (edit for cut in spec for edit in edits_by_hand(cut)):
            if edit["layers"] == "all" or layer in edit["layers"]:
                for rank, head in enumerate(selected(edit, HEADS, KV_HEADS[name])):
                    cuts.setdefault((edit["site"], head), []).append(cut_by_hand(edit, f"self.{layer}", rank, head))
        module.__dict__.update(cuts_by_hand=cuts, forward=functools.partial(slow_forward, module))
    return model


@functools.cache
def means(name: str) -> Any:
    return collect_reference(load(name), [inputs(seed, padding=0) for seed in (1, 2)], progress=False)


CUTS: dict[str, Callable[[str], Any]] = {
    "qk to zero": lambda name: Freeze("qk", layers=[0], heads=[1]),
    "qk to zero everywhere": lambda name: Freeze("qk", heads=[0, 3]),
    "ov to zero": lambda name: Freeze("ov", layers=[1], heads=[2]),
    "both to zero": lambda name: Freeze("both", layers=[0, 1], heads=[3]),
    "qk to a mean": lambda name: Freeze("qk", layers=[0], heads=[2], to="mean", reference=means(name)),
    "ov to a mean": lambda name: Freeze("ov", layers=[1], heads=[0, 1], to="mean", reference=means(name)),
    "qk in part": lambda name: Freeze("qk", layers=[1], heads=[1], strength=0.4),
    "ov in part": lambda name: Freeze("ov", layers=[0], heads=[1], strength=0.7),
    "qk straight through": lambda name: Freeze("qk", layers=[0], heads=[1, 2], backward="ste"),
    "ov straight through": lambda name: Freeze("ov", layers=[0], heads=[0], backward="ste"),
    "ov detached": lambda name: Freeze("ov", layers=[0], heads=[0], to="identity"),
    "qk of a kv head": lambda name: Freeze("qk", layers=[0], heads=[0], gqa="shared"),
    "ov of a kv head": lambda name: Freeze("ov", layers=[1], heads=[3], gqa="shared"),
    "ov at positions": lambda name: Freeze("ov", layers=[0], heads=[2], positions=[3, 5]),
    "pattern uniform": lambda name: Edit("pattern", "uniform", layers=[0], heads=[1]),
    "pattern previous": lambda name: Edit("pattern", "previous", layers=[1], heads=[2]),
    "scores scaled": lambda name: Edit("scores", "scale", 0.5, layers=[1], heads=[0, 2]),
    "a vector added": lambda name: Edit("z", "add", value=torch.linspace(-1, 1, D_HEAD), layers=[0], heads=[1]),
}
by_cut = pytest.mark.parametrize("cut", CUTS)


# -- without cuts --------------------------------------------------------------------------------------------------------------


@by_name
def test_the_models_are_loaded_as_code_beside_a_checkpoint(name: str) -> None:
    model = load(name)
    assert type(model).__module__.startswith("transformers_modules.")
    assert {path.name for path in FOLDERS[name].iterdir()} >= {"config.json", "model.safetensors", f"modeling_{name}.py"}
    torch.testing.assert_close(logits(reference(name, [])), logits(model), **CLOSE)
    assert same(generate(model), generate(load(name)))


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@by_name
def test_without_cuts_it_is_the_same_model(name: str, kernel: Any) -> None:
    plain, model = load(name), patch_model(load(name), kernel=kernel)
    assert all(isinstance(m, SurgicalAttention) for m in attention_modules(model))
    for options in ({}, {"padding": 0}, {"length": 1, "padding": 0}):
        assert torch.equal(logits(model, **options), logits(plain, **options))
    ids = inputs()["input_ids"]
    assert torch.equal(model(ids).logits, plain(ids).logits), "without a mask"
    found, expected = gradients(model), gradients(plain)
    assert list(found) == list(expected) and all(torch.equal(found[n], expected[n]) for n in expected)
    assert same(generate(model), generate(plain))


@by_name
def test_points_that_change_nothing_change_nothing(name: str) -> None:
    plain, model = load(name), load(name)
    for site in ("rot_q", "rot_k", "v", "scores", "pattern", "z"):
        patch_model(model, Edit(site, "scale", 1.0))
        assert torch.equal(logits(model), logits(plain))
    found, expected = gradients(model), gradients(plain)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@by_name
def test_inspection(name: str) -> None:
    kv_heads, fused = KV_HEADS[name], {"qwenish": "c_attn, c_proj", "internlmish": "wqkv, wo"}[name]
    for row in inspect_model(load(name)):
        assert (row.heads, row.kv_heads, row.d_head, row.fusion) == (HEADS, kv_heads, D_HEAD, "q+k+v")
        assert row.projections == fused
    assert [row.address for row in inspect_model(load(name))] == ["self.0", "self.1"]
    assert "z zero (heads 1)" in inspect_model(patch_model(load(name), Freeze("ov", heads=[1])))["self.1"].cuts


@by_name
def test_the_code_shows_the_points(name: str) -> None:
    model = patch_model(load(name))
    for module in attention_modules(model):
        code = module.reconstruction.code
        compile(code, "code", "exec")
        for site in ("rot_q", "rot_k", "scores", "pattern", "v", "z"):
            assert code.count(f"self._surgery.spot('{site}', ") == 1
        assert "self.0" in repr(module) or "self.1" in repr(module)
    unpatch_model(model)
    assert not any(hasattr(module, "reconstruction") for module in attention_modules(model))


@by_name
def test_unpatching_gives_the_classes_back(name: str) -> None:
    model = load(name)
    before, own = logits(model), [type(m) for m in model.modules()]
    parameters = {n: id(p) for n, p in model.named_parameters()}
    patch_model(model, Freeze("both", heads=[0]))
    assert not torch.equal(logits(model), before)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    unpatch_model(model)
    assert [type(m) for m in model.modules()] == own and "_surgery" not in attention_modules(model)[0].__dict__
    assert torch.equal(logits(model), before)


# -- cuts ----------------------------------------------------------------------------------------------------------------------


@by_cut
@by_name
def test_cuts_are_those_of_loops_over_heads(name: str, cut: str) -> None:
    spec = Spec(CUTS[cut](name))
    model, slow = patch_model(load(name), spec), reference(name, spec)
    seen = inputs()["attention_mask"].bool()
    found, expected = logits(model)[seen], logits(slow)[seen]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.allclose(expected, logits(load(name))[seen], atol=1e-3) == (cut == "ov detached"), "the cut must act"
    ours, theirs = gradients(model), gradients(slow)
    assert ours.keys() == theirs.keys()
    for parameter in theirs:
        torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-3, atol=1e-3)
    assert any(not torch.allclose(theirs[n], g, atol=1e-2) for n, g in gradients(load(name)).items())
    with patched(model, spec, kernel="eager"):
        torch.testing.assert_close(logits(model)[seen], expected, **CLOSE)


def groups(name: str) -> list[list[int]]:
    """The query heads of each kv head."""
    size = HEADS // KV_HEADS[name]
    return [list(range(first, first + size)) for first in range(0, HEADS, size)]


@by_name
def test_every_site_is_live(name: str) -> None:
    model = patch_model(load(name))
    plain = logits(model)
    for layer in (0, 1):
        for site in SITES:
            for heads in groups(name) if site == "k" else [[head] for head in range(HEADS)]:
                with patched(model, Edit(site, "scale", 0.5, layers=[layer], heads=heads)):
                    assert not torch.allclose(logits(model), plain, atol=1e-4), (layer, site, heads)
    assert torch.equal(logits(model), plain)
    assert len(self_test(patch_model(model, Freeze("qk", heads=[0])), inputs())) == 2


@by_name
def test_before_and_after_positions(name: str) -> None:
    """Positions rotate, so that scaling commutes with them; a key is read by its whole group."""
    model = load(name)
    for head in range(HEADS):
        before = logits(patch_model(model, Edit("q", "scale", 0.5, layers=[0], heads=[head])))
        after = logits(patch_model(model, Edit("rot_q", "scale", 0.5, layers=[0], heads=[head])))
        torch.testing.assert_close(before, after, **CLOSE)
    for readers in groups(name):
        before = logits(patch_model(model, Edit("k", "scale", 0.5, layers=[0], heads=readers)))
        after = logits(patch_model(model, Edit("rot_k", "scale", 0.5, layers=[0], heads=readers)))
        torch.testing.assert_close(before, after, **CLOSE)


def test_grouped_heads_are_cut_alone_or_together() -> None:
    model = load("internlmish")

    def patterns(*cuts: Any) -> Tensor:
        with torch.no_grad(), patched(model, cuts), capture(model, ["pattern"], layers=[0]) as run:
            model(**inputs())
        return run["self.0", "pattern"]

    plain = patterns()
    for gqa, changed in (("isolated", {2}), ("shared", {2, 3})):
        found = patterns(Freeze("qk", layers=[0], heads=[2], gqa=gqa))
        assert {h for h in range(HEADS) if not torch.equal(found[:, h], plain[:, h])} == changed
    for site in ("rot_k", "v"):
        alone = logits(patch_model(model, Edit(site, "scale", 0.5, layers=[0], heads=[2])))
        together = logits(patch_model(model, Edit(site, "scale", 0.5, layers=[0], heads=[2], gqa="shared")))
        both = logits(patch_model(model, Edit(site, "scale", 0.5, layers=[0], heads=[2, 3])))
        assert torch.equal(together, both) and not torch.allclose(alone, both, atol=1e-3)
    unpatch_model(model)


# -- captures and weights ------------------------------------------------------------------------------------------------------


@by_name
def test_captures(name: str) -> None:
    model, n = load(name), KV_HEADS[name]
    plain = logits(model)
    with torch.no_grad(), capture(model, list(SITES)) as run:
        out = model(**inputs(), output_attentions=True)
    assert torch.equal(out.logits, plain)
    matrix, channels = (BATCH, HEADS, LENGTH, LENGTH), (BATCH, HEADS, LENGTH, D_HEAD)
    shapes = dict.fromkeys(("q", "rot_q", "rot_k", "z"), channels) | {"scores": matrix, "pattern": matrix}
    shapes |= {"k": (BATCH, n, LENGTH, D_HEAD), "v": (BATCH, n, LENGTH, D_HEAD), "result": (BATCH, HEADS, LENGTH, D_MODEL)}
    for layer in (0, 1):
        seen = {site: run[f"self.{layer}", site] for site in SITES}
        assert {site: tuple(tensor.shape) for site, tensor in seen.items()} == shapes
        pattern, group = seen["pattern"], HEADS // n
        assert torch.equal(pattern, out.attentions[layer])
        torch.testing.assert_close(pattern.sum(-1), torch.ones(BATCH, HEADS, LENGTH))
        torch.testing.assert_close(seen["scores"].softmax(-1), pattern)
        own = seen["rot_q"] @ seen["rot_k"].mT / D_HEAD**0.5
        may = inputs()["attention_mask"].bool()[:, None, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        torch.testing.assert_close(torch.where(may, own, 0), torch.where(may, seen["scores"], 0), **CLOSE)
        torch.testing.assert_close(pattern @ seen["v"].repeat_interleave(group, 1), seen["z"], **CLOSE)
        own = turned(seen["q"].flatten(0, 1), torch.arange(LENGTH)[None]).view(channels)
        torch.testing.assert_close(own, seen["rot_q"], **CLOSE)
    with torch.no_grad(), capture(model, ["pattern", "v"], layers=[1], heads=[3, 0]) as run:
        model(**inputs())
    assert torch.equal(run["self.1", "pattern"], pattern[:, [3, 0]])


@by_name
def test_weights_are_those_that_the_heads_compute_with(name: str) -> None:
    model, n = load(name), KV_HEADS[name]
    states: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    for layer, module in enumerate(attention_modules(model)):
        projection, last = (module.c_attn, module.c_proj) if name == "qwenish" else (module.wqkv, module.wo)
        projection.register_forward_hook(lambda m, args, out, layer=layer: states.__setitem__(layer, args[0]))
        last.register_forward_hook(lambda m, args, out, layer=layer: outputs.__setitem__(layer, out))
    with torch.no_grad(), capture(model, ["q", "k", "v", "z", "result"]) as run:
        model(**inputs())
    for layer in (0, 1):
        w, x = weights.head_weights(model, layer), states[layer][:, None]
        assert w.W_Q.shape == (HEADS, D_MODEL, D_HEAD) and w.W_O.shape == (HEADS, D_HEAD, D_MODEL)
        assert w.W_K.shape == w.W_V.shape == (n, D_MODEL, D_HEAD)
        biases = [b(model, layer) for b in (weights.b_Q, weights.b_K, weights.b_V)]
        assert [b is None for b in biases] == [name == "internlmish"] * 3
        for site, weight, bias in zip("qkv", (w.W_Q, w.W_K, w.W_V), biases, strict=True):
            own = x @ weight + (0 if bias is None else bias[:, None])
            torch.testing.assert_close(own, run[f"self.{layer}", site], **CLOSE)
        result = run[f"self.{layer}", "result"]
        torch.testing.assert_close(run[f"self.{layer}", "z"] @ w.W_O, result, **CLOSE)
        torch.testing.assert_close(result.sum(1), outputs[layer], **CLOSE)


# -- generation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", ["qk to zero", "ov to a mean", "qk of a kv head", "ov at positions", "pattern previous", "scores scaled"]
)
@by_name
def test_a_cache_changes_nothing(name: str, cut: str) -> None:
    model = patch_model(load(name), CUTS[cut](name))
    cached, whole = generate(model), generate(model, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    plain = generate(load(name)).logits
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(cached.logits, plain, strict=True))


@by_name
def test_a_cache_of_other_cuts_is_refused(name: str) -> None:
    model, ids = load(name), inputs(padding=0)["input_ids"]
    with torch.no_grad():
        filled = [model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values]
        patch_model(model, Freeze("ov", layers=[0], heads=[1]))
        filled.append(model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values)
        model(ids[:, -1:], past_key_values=copy.deepcopy(filled[1]), use_cache=True)
        patch_model(model, Freeze("qk", layers=[1], heads=[1]))
        for cache, how in zip(filled, ("no cuts", "another spec"), strict=True):
            with pytest.raises(CacheError, match=f"filled under {how}"):
                model(ids[:, -1:], past_key_values=cache, use_cache=True)


# -- what people do with models ------------------------------------------------------------------------------------------------


@by_name
def test_copies_and_pickles(name: str) -> None:
    model = patch_model(load(name), Freeze("qk", layers=[0], heads=[1]))
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert same(generate(other), generate(model))
        assert torch.equal(logits(unpatch_model(other)), logits(load(name)))
    assert torch.equal(logits(model), expected)


@by_name
def test_saved_it_is_the_checkpoint_that_was_loaded(name: str, tmp_path: Path) -> None:
    model = patch_model(load(name), Freeze("both", heads=[1]))
    keys = list(load(name).state_dict())
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / name)
    saved, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, FOLDERS[name]))
    assert saved.keys() == first.keys() and all(torch.equal(saved[key], first[key]) for key in first)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
    assert torch.equal(logits(again), logits(load(name)))
    assert torch.equal(logits(patch_model(again, Freeze("both", heads=[1]))), logits(model))


@by_name
def test_exported_and_baked(name: str, tmp_path: Path) -> None:
    model = patch_model(load(name), Freeze("ov", layers=[0], heads=[1]))
    expected = logits(model)
    export_checkpoint(model, tmp_path / "cut")
    assert torch.equal(logits(load_checkpoint(tmp_path / "cut", trust_remote_code=True)), expected)
    # Compared in a process of its own, by the auto class that the model's code registers.
    done = export_checkpoint(model, tmp_path / "baked", bake=True)
    assert done.comparison is not None and done.comparison.changed == 0
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", trust_remote_code=True)
    torch.testing.assert_close(logits(baked), expected, **CLOSE)


@pytest.mark.parametrize("cut", ["none", "pattern previous"])
@by_name
def test_compiled(name: str, cut: str) -> None:
    torch._dynamo.reset()
    if cut == "none":
        plain = torch.compile(load(name), backend="eager", fullgraph=True)
        assert torch.equal(logits(plain), logits(load(name)))
    model = patch_model(load(name), () if cut == "none" else CUTS[cut](name))
    assert torch.equal(logits(torch.compile(model, backend="eager", fullgraph=True)), logits(model))
    torch._dynamo.reset()


@by_name
def test_hooks_of_users(name: str) -> None:
    plain, model = load(name), patch_model(load(name))
    seen: dict[int, list[Tensor]] = {}
    for number, one in enumerate((plain, model)):
        found = seen.setdefault(number, [])
        for module in attention_modules(one):
            projection = module.c_attn if name == "qwenish" else module.wqkv
            module.register_forward_hook(lambda m, args, out, found=found: found.append(out[0]))
            module.register_forward_pre_hook(lambda m, args, kw: (args, {**kw}), with_kwargs=True)
            projection.register_forward_hook(lambda m, args, out: out * 1.5)
    before = logits(plain)
    assert torch.equal(logits(model), before) and not torch.equal(before, logits(load(name)))
    patch_model(model, Edit("z", "scale", 1.0))
    assert torch.equal(logits(model), before)
    assert len(seen[0]) == 2 and len(seen[1]) == 4
    for number in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1][number : number + 2], strict=True))


@by_name
def test_dropout_in_training(name: str) -> None:
    options = {CLASSES[name][2]: 0.4, "trust_remote_code": True}
    plain, model = (AutoModelForCausalLM.from_pretrained(FOLDERS[name], **options).train() for _ in range(2))

    def drawn(one: Any) -> Tensor:
        torch.manual_seed(3)
        return logits(one)

    expected = drawn(plain)
    assert not torch.equal(expected, logits(load(name)))
    for spec in ((), Edit("pattern", "scale", 1.0), Edit("z", "scale", 1.0)):
        assert torch.equal(drawn(patch_model(model, spec)), expected)
    # The pattern is seen before dropout.
    with capture(model, ["pattern"]) as run:
        drawn(model)
    torch.testing.assert_close(run["self.1", "pattern"].sum(-1), torch.ones(BATCH, HEADS, LENGTH))


# -- other people's patches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    families.load_patches()
    for name in ("_PATCHES", "_EXAMPLES"):
        monkeypatch.setattr(families, name, dict(getattr(families, name)))


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of a class that the engine refuses."""
    monkeypatch.syspath_prepend(CODE)
    torch.manual_seed(0)
    yield nn.ModuleDict({"layer": importlib.import_module("looped_attention").LoopedAttention()})
    for name in ("looped_attention", "looped_patches"):
        sys.modules.pop(name, None)


def test_a_patch_for_a_class_that_the_engine_refuses(registry: None, looped: Any) -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match=r"LoopedAttention\): found a second softmax over scores, at looped_attention"
    ):
        find_anatomy(looped)
    importlib.import_module("looped_patches")
    [attention] = find_anatomy(looped)
    assert (attention.heads, attention.d_head, attention.fusion) == (2, 4, "q | k | v")
    x, layer = torch.randn(2, 5, 8), looped["layer"]
    with torch.no_grad():
        expected = layer(x)
        patch_model(looped)
        assert torch.equal(layer(x), expected)
        patch_model(looped, Freeze("ov", heads=[0]))
        z = layer.v(x) * 0
        z[..., 4:] = ((layer.q(x)[..., 4:] @ layer.k(x)[..., 4:].mT) / 2).softmax(-1) @ layer.v(x)[..., 4:]
        torch.testing.assert_close(layer(x), layer.o(z), **CLOSE)


def test_a_class_is_registered_once(registry: None) -> None:
    def describe(module: nn.Module, family: Family | None) -> Family | None:
        return family

    def example(module: Any, states: Tensor) -> dict[str, Any]:
        return {}

    for register, own, other in (
        (register_patch, describe, lambda module, family: family),
        (register_example, example, lambda module, states: {}),
    ):
        assert register("somewhere.Class", "somewhere.Other")(own) is own
        register("somewhere.Class")(own)  # a module that is imported again
        with pytest.raises(ValueError, match=r"somewhere\.Other"):
            register("somewhere.New", "somewhere.Other")(other)
    with pytest.raises(ValueError, match=r"GPTJAttention is already described by patches\.gptj"):
        register_patch("transformers.models.gptj.modeling_gptj.GPTJAttention")(describe)


def test_an_example_of_what_a_forward_needs(registry: None) -> None:
    model = nn.ModuleDict({"layer": NeedyAttention()})
    with pytest.raises(UnsupportedArchitectureError, match=r"NeedyAttention.*cannot be recorded \(TypeError"):
        find_anatomy(model)
    register_example(f"{NeedyAttention.__module__}.NeedyAttention")(lambda module, states: {"table": {"width": 4}})
    [attention] = find_anatomy(model)
    assert (attention.heads, attention.d_head) == (2, 4)


class NeedyAttention(nn.Module):
    """Its forward takes something that nobody could guess."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden_states: Tensor, table: Any) -> Tensor:
        shape = (*hidden_states.shape[:2], -1, table["width"])
        q, k, v = (m(hidden_states).view(shape).transpose(1, 2) for m in (self.q, self.k, self.v))
        z = (q @ k.mT / 2).softmax(-1) @ v
        return self.o(z.transpose(1, 2).flatten(2))


def test_an_installed_package_registers_by_its_entry_point(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "looped_patches-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: looped-patches\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[surgery.patches]\nlooped = looped_patches\n")
    for name in ("looped_attention.py", "looped_patches.py"):
        shutil.copy(CODE / name, site)
    script = """
        import sys
        from torch import nn
        from looped_attention import LoopedAttention
        assert "looped_patches" not in sys.modules
        from surgery import find_anatomy
        from surgery.family import load_patches
        [attention] = find_anatomy(nn.ModuleDict({"layer": LoopedAttention()}))
        assert sys.modules["looped_patches"].LOOPED is attention.family
        assert attention.heads == 2 and set(load_patches()) >= {"patches", "looped_patches"}
    """
    paths = [str(site), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
