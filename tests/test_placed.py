"""Models whose weights accelerate keeps elsewhere: on the CPU, on disk, some here and some there, before and after patching.

Such a model gives what the same model gives with its weights in memory, bit for bit: cuts, captures, weights and after undoing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from families import FAMILIES, LAYERS, VOCAB
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from surgery import (
    Edit,
    Freeze,
    Spec,
    SurgeryError,
    capture,
    collect_reference,
    find_anatomy,
    patch_model,
    self_test,
    unpatch_model,
    weights,
)
from surgery.classes import SurgicalAttention

pytestmark = pytest.mark.filterwarnings(
    # An older name that PEFT uses.
    "ignore:`is_gradient_checkpointing:FutureWarning",
)

NAMES = ("llama", "gpt2", "phi3", "gptj", "t5")
"""Separate, fused and transposed projections, a forward of our own, and two stacks."""

SITES = ("q", "rot_q", "rot_k", "v", "scores", "pattern", "z", "result")
CUTS: dict[str, Any] = {
    "none": Spec(),
    **{site: Edit(site, "scale", 0.5, layers=["*"], heads=[1]) for site in SITES if site != "k"},
    "k": Edit("k", "scale", 0.5, layers=["*"]),
    "qk": Freeze("qk", layers=["*"], heads=[1]),
    "ov": Freeze("ov", layers=["*"], heads=[1, 2]),
    "mean": Freeze("both", layers=["*"], heads=[0], to="mean"),
}

Place = Callable[[Any, Path], Any]


def on_cpu(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def on_both(model: Any, folder: Path) -> Any:
    """The first layers stay in memory, the others go to disk."""
    return dispatch_model(model, device_map=device_map(model), main_device="cpu", offload_dir=str(folder), force_hooks=True)


def device_map(model: nn.Module) -> dict[str, str]:
    """Every module that holds weights by itself, and every layer: every other layer on disk."""
    places: dict[str, str] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{known}.") for known in places):
            continue
        if path.rpartition(".")[2].isdigit():
            places[path] = "disk" if int(path.rpartition(".")[2]) % 2 else "cpu"
        elif not list(module.children()) and (module._parameters or module._buffers):
            places[path] = "cpu"
    return places


PLACES: dict[str, Place] = {"cpu": on_cpu, "disk": on_disk, "both": on_both}
by_place = pytest.mark.parametrize("place", PLACES)
by_name = pytest.mark.parametrize("name", NAMES)
by_cut = pytest.mark.parametrize("cut", CUTS)
# Patching first and placing later, for one cut of each way to cut.
IN_ORDER = [(cut, "before") for cut in CUTS] + [(cut, "after") for cut in ("none", "q", "pattern", "z", "result")]
by_order = pytest.mark.parametrize("order", ["before", "after"])


def build(name: str) -> Any:
    return FAMILIES[name].build("sdpa" if FAMILIES[name].sdpa else "eager")


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return model(**FAMILIES[name].inputs()).logits


LAST: dict[tuple[type, str], str] = {}
"""The path of the last attention in models of a class and a name."""


def last(model: Any, name: str) -> Any:
    """An attention whose weights are away, wherever they are."""
    if (own := (type(model), name)) not in LAST:
        LAST[own] = find_anatomy(model).attentions[-1].path
    return model.get_submodule(LAST[own])


def is_away(module: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize(("cut", "order"), IN_ORDER)
@by_place
@by_name
def test_cuts_are_exact(name: str, place: str, cut: str, order: str, tmp_path: Path) -> None:
    plain, expected = logits(build(name), name), logits(patch_model(build(name), CUTS[cut]), name)
    assert torch.equal(plain, expected) == (cut == "none")
    model = build(name)
    own = type(last(model, name))
    if order == "after":
        patch_model(model, CUTS[cut])
    PLACES[place](model, tmp_path)
    if order == "before":
        patch_model(model, CUTS[cut])
    assert is_away(last(model, name))
    for _ in range(2):
        assert torch.equal(logits(model, name), expected)
        assert is_away(last(model, name)), "weights go back to where they came from"
    patch_model(model, kernel="eager")
    assert torch.equal(logits(model, name), logits(patch_model(build(name), kernel="eager"), name))
    unpatch_model(model)
    assert type(last(model, name)) is own
    assert torch.equal(logits(model, name), plain)
    assert is_away(last(model, name))


@by_order
@by_place
@by_name
def test_captures_are_exact(name: str, place: str, order: str, tmp_path: Path) -> None:
    given, model = FAMILIES[name].inputs(), build(name)
    with torch.no_grad(), capture(model, ["k", *SITES], ["*"]) as expected:
        model(**given)
    if order == "after":
        patch_model(model)
    PLACES[place](model, tmp_path)
    before = logits(model, name)
    with torch.no_grad(), capture(model, ["k", *SITES], ["*"]) as run:
        out = model(**given).logits
    assert torch.equal(out, before)
    for attention in find_anatomy(model):
        for site in ("k", *SITES):
            assert torch.equal(run[attention.address, site], expected[attention.address, site]), (attention.address, site)
    assert is_away(last(model, name))


@by_place
@by_name
def test_weights_are_loaded_to_be_read_and_go_back(name: str, place: str, tmp_path: Path) -> None:
    plain, model = build(name), PLACES[place](build(name), tmp_path)
    for state in ("unpatched", "patched"):
        for attention in find_anatomy(plain):
            for read in (weights.W_Q, weights.W_K, weights.W_V, weights.W_O, weights.b_Q, weights.b_O):
                found, expected = read(model, attention.address), read(plain, attention.address)
                assert (found is None) == (expected is None)
                assert found is None or (not found.is_meta and torch.equal(found, expected)), (state, attention.address)
            found, expected = weights.ov_circuit(model, attention.address), weights.ov_circuit(plain, attention.address)
            assert torch.equal(found.A, expected.A) and torch.equal(found.B, expected.B)
        assert is_away(last(model, name))
        patch_model(model, CUTS["ov"])
    assert torch.equal(logits(model, name), logits(patch_model(plain, CUTS["ov"]), name))


# transformers 5.17 takes an offloaded model's device for that of its weights.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@by_order
@by_place
def test_generation(place: str, order: str, tmp_path: Path) -> None:
    cuts = [Freeze("qk", layers=[0], heads=[1]), Edit("result", "scale", 0.5, layers=[1], heads=[2])]
    given = FAMILIES["llama"].inputs()
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True)
    plain = build("llama")
    expected = patch_model(plain, cuts).generate(**given, **options)
    model = build("llama")
    if order == "after":
        patch_model(model, cuts)
    PLACES[place](model, tmp_path)
    if order == "before":
        patch_model(model, cuts)
    found = model.generate(**given, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))
    assert len(self_test(model, given)) == 2


@by_place
@by_name
def test_a_model_may_be_placed_and_brought_home_while_it_is_patched(name: str, place: str, tmp_path: Path) -> None:
    model = patch_model(build(name), CUTS["result"])
    expected = logits(model, name)
    PLACES[place](model, tmp_path)
    assert torch.equal(logits(model, name), expected)
    remove_hook_from_submodules(model)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model, name), expected)
    unpatch_model(model)
    assert not any(isinstance(m, SurgicalAttention) for m in model.modules())
    assert torch.equal(logits(model, name), logits(build(name), name))


@by_cut
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_models_loaded_with_a_device_map(name: str, cut: str, tmp_path: Path) -> None:
    """The way that users take: `from_pretrained` puts a part of a model on disk while it loads it."""
    plain = build(name)
    plain.save_pretrained(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map(plain), offload_folder=str(tmp_path / "away"), attn_implementation="sdpa"
    ).eval()
    assert is_away(last(model, name)) and not any(p.is_meta for p in find_anatomy(model).attentions[0].module.parameters())
    before = logits(plain, name)
    assert torch.equal(logits(model, name), before)
    patch_model(model, CUTS[cut])
    assert torch.equal(logits(model, name), logits(patch_model(plain, CUTS[cut]), name))
    unpatch_model(model)
    assert torch.equal(logits(model, name), before)


@by_place
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_adapted_and_placed(name: str, place: str, tmp_path: Path) -> None:
    targets = {"llama": ["q_proj", "o_proj"], "gpt2": ["c_attn", "attn.c_proj"], "phi3": ["qkv_proj", "o_proj"]}

    def adapted() -> Any:
        torch.manual_seed(5)
        options = dict(target_modules=targets[name], init_lora_weights=False, fan_in_fan_out=name == "gpt2")
        return get_peft_model(build(name), LoraConfig(r=2, **options)).eval()

    plain, model = adapted(), PLACES[place](adapted(), tmp_path) if place != "both" else on_cpu(adapted(), tmp_path)
    for site in ("q", "pattern", "result"):
        assert torch.equal(logits(patch_model(model, CUTS[site]), name), logits(patch_model(plain, CUTS[site]), name))
    for read in (weights.W_Q, weights.W_O):
        assert torch.equal(read(model, 0), read(plain, 0))
    assert is_away(last(model, name))


def test_weights_on_meta_that_nothing_loads_are_refused() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(SurgeryError, match="found it on the meta device, without data"):
        weights.W_Q(model, 0)
    assert weights.W_Q(model, 1).shape == (4, 32, 16)


class Halving(ModelHook):
    """A hook that does more than to place: it changes what comes out."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output / 2


def test_a_hook_that_changes_the_output_is_not_taken_for_one_that_moves_weights() -> None:
    model = build("llama")
    expected = weights.W_O(model, 0) / 2
    add_hook_to_module(model.model.layers[0].self_attn.o_proj, Halving())
    assert torch.allclose(weights.W_O(model, 0), expected, rtol=1e-5)
    with torch.no_grad(), capture(model, ["result", "z"], layers=[0]) as run:
        model(**FAMILIES["llama"].inputs())
    parts = (run["self.0", "z"] @ expected).detach()
    assert torch.allclose(run["self.0", "result"], parts, atol=1e-5)


def test_the_tiny_models_are_what_these_tests_take_them_for() -> None:
    assert LAYERS == 2 and VOCAB == 67
    places = device_map(build("llama"))
    assert places["model.layers.0"] == "cpu" and places["model.layers.1"] == "disk" and places["lm_head"] == "cpu"


@by_order
@by_place
@by_name
def test_cuts_that_hold_tensors_need_weights_somewhere_not_here(name: str, place: str, order: str, tmp_path: Path) -> None:
    given, plain = FAMILIES[name].inputs(), build(name)
    means = collect_reference(plain, [given], progress=False)
    width = find_anatomy(plain).attentions[0].d_value
    cuts = [Freeze("both", layers=[0], to="mean", reference=means), Edit("z", "add", value=torch.ones(width), layers=[1])]
    expected = logits(patch_model(plain, cuts), name)
    model = build(name)
    if order == "after":
        patch_model(model, cuts)
    PLACES[place](model, tmp_path)
    assert torch.equal(logits(patch_model(model, cuts), name), expected)
    unpatch_model(model)
    assert collect_reference(model, [given], progress=False) == means
    if name != "t5":
        patch_model(model)
        assert len(self_test(model)) == 2
