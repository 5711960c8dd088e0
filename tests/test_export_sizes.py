"""Exports of models that are tied, sharded, of several number types, or larger than memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from families import FAMILIES
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, LlamaForCausalLM

from surgery import Edit, Freeze, Spec, patch_model
from surgery.errors import ExportError
from surgery.export import offload
from surgery.export.load import load_checkpoint
from surgery.export.save import export_checkpoint

# Of transformers' save_pretrained, for every model that from_pretrained gave a device map.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")

CUTS = Spec([Freeze("qk", layers=[0], heads=[1]), Freeze("ov", layers=[1], heads=[2])])
"""Each a change of weights."""
MORE = Spec([*CUTS, Edit("pattern", "previous", layers=[1], heads=[0])])
"""One of them is none."""


@torch.no_grad()
def logits(model: Any, name: str, **more: Any) -> Tensor:
    return model.eval()(**FAMILIES[name].inputs(), **more).logits


def kept(name: str) -> Tensor:
    return FAMILIES[name].inputs()["attention_mask"].bool()


def weight_files(folder: Path) -> dict[str, list[str]]:
    """The names in every file of weights, by safetensors' own reader."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = sorted(file.keys())
            assert all(torch.isfinite(file.get_tensor(name)).all() for name in found[path.name])
    return found


def check_files(folder: Path, model: Any) -> dict[str, list[str]]:
    """Every name of the model once, but for the second ones of tied weights; the index, if there is one, says where."""
    files = weight_files(folder)
    names = [name for of in files.values() for name in of]
    assert len(set(names)) == len(names)
    assert set(names) == set(model.state_dict()) - set(model.all_tied_weights_keys)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == {name: file for file, of in files.items() for name in of}
        total = sum(model.state_dict()[name].nbytes for name in names)
        assert content["metadata"]["total_size"] == total
    return files


# -- tied, sharded ------------------------------------------------------------------------------------------------------------

TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, tied": ("gpt2", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "bert, tied": ("bert", {}),
}


@pytest.mark.parametrize("bake", [False, True], ids=["kept", "baked"])
@pytest.mark.parametrize("size", ["20KB", "50GB"])
@pytest.mark.parametrize("case", TIED)
def test_tied_and_sharded(case: str, size: str, bake: bool, tmp_path: Path) -> None:
    name, options = TIED[case]
    model = FAMILIES[name].build("sdpa", **options)
    assert bool(model.all_tied_weights_keys) == ("tied" in case)
    uncut = logits(model, name)
    patch_model(model, CUTS if bake else MORE)
    expected = logits(model, name)
    given = FAMILIES[name].inputs()
    export_checkpoint(model, tmp_path / "out", bake=bake, example_inputs=given, verify=False, max_shard_size=size)
    files = check_files(tmp_path / "out", model)
    assert (len(files) > 1) == (size == "20KB")
    loaded = load_checkpoint(tmp_path / "out")
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == ("tied" in case)
    plain = type(FAMILIES[name].build(**options)).from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    if bake:
        for found in (loaded, plain):
            torch.testing.assert_close(logits(found, name)[kept(name)], expected[kept(name)], rtol=1e-4, atol=1e-5)
        original = FAMILIES[name].build(**options).state_dict()
        changed = {n for n, tensor in plain.state_dict().items() if not torch.equal(tensor, original[n])}
        assert 2 <= len(changed) <= 4 and all("att" in n for n in changed), "only the weights that are cut"
    else:
        assert torch.equal(logits(loaded, name), expected)
        assert torch.equal(logits(plain, name), uncut)


class TiedOutput(LlamaForCausalLM):
    """Two layers with one W_O, in two modules."""

    _tied_weights_keys: ClassVar = {"model.layers.1.self_attn.o_proj.weight": "model.layers.0.self_attn.o_proj.weight"}


class OneAttention(LlamaForCausalLM):
    """One module as the attention of two layers."""

    _tied_weights_keys: ClassVar = {
        f"model.layers.1.self_attn.{x}_proj.weight": f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].self_attn = self.model.layers[0].self_attn


def shared(cls: Any) -> Any:
    torch.manual_seed(0)
    model = cls(FAMILIES["llama"].build("sdpa", tie_word_embeddings=True).config).eval()
    first, second = (layer.self_attn.o_proj for layer in model.model.layers)
    assert first.weight is second.weight
    return model


def test_a_weight_of_two_attentions_is_not_changed_for_one(tmp_path: Path) -> None:
    model = patch_model(shared(TiedOutput), Freeze("ov", layers=[0], heads=[1]))
    with pytest.raises(ExportError, match=r"layers.0.self_attn.o_proj.weight is the weight of another module or attention too"):
        export_checkpoint(model, tmp_path / "out", bake=True, verify=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ExportError, match=r"layers.0.self_attn.o_proj.weight is the weight of another module or attention too"):
        export_checkpoint(model, tmp_path / "out", bake=True, verify=False)
    assert not list(tmp_path.iterdir())


def test_a_module_at_two_places_is_changed_at_both(tmp_path: Path) -> None:
    model = patch_model(shared(OneAttention), Freeze("ov", heads=[1]))
    expected = logits(model, "llama", use_cache=False)
    given = {**FAMILIES["llama"].inputs(), "use_cache": False}  # a cache has a place for each layer
    export_checkpoint(model, tmp_path / "out", bake=True, verify=False, example_inputs=given)
    assert sum("o_proj" in name for of in weight_files(tmp_path / "out").values() for name in of) == 1
    plain = OneAttention.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    found = logits(plain, "llama", use_cache=False)
    torch.testing.assert_close(found[kept("llama")], expected[kept("llama")], rtol=1e-4, atol=1e-5)


# -- number types -------------------------------------------------------------------------------------------------------------


def named(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_cast_model_is_the_same_again(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Cast after it was built, with whatever it computes positions from, which no checkpoint stores."""
    model = patch_model(FAMILIES[name].build("eager", dtype=dtype), Freeze("ov", heads=[1]))
    export_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    for one, other in zip(named(loaded), named(model), strict=True):
        assert one[0] == other[0] and one[1].dtype == other[1].dtype and torch.equal(one[1], other[1]), one[0]
    if dtype == torch.float64:
        return  # its products depend, in the last bit, on where in memory a matrix begins
    found, expected = logits(loaded, name), logits(model, name)  # rows of padding may be NaN
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_model_is_baked_in_its_own_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = patch_model(FAMILIES["gpt2"].build("sdpa", dtype=dtype), CUTS)
    given, is_compared = FAMILIES["gpt2"].inputs(), dtype == torch.bfloat16
    done = export_checkpoint(model, tmp_path / "out", bake=True, example_inputs=given, verify=is_compared)
    assert not is_compared or (done.comparison is not None and done.comparison.changed == 0)
    found, expected = (logits(one, "gpt2")[kept("gpt2")] for one in (load_checkpoint(tmp_path / "out"), model))
    # As a part of the largest: folded weights are rounded once more, sums are taken in another order.
    assert (found - expected).abs().max() <= (0.02 if is_compared else 1e-12) * expected.abs().max()
    plain = AutoConfig.from_pretrained(tmp_path / "out").dtype
    assert plain == dtype and {p.dtype for p in load_checkpoint(tmp_path / "out").parameters()} == {dtype}


def head_in_float32(model: Any) -> Any:
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return model


@pytest.mark.parametrize("bake", [False, True], ids=["kept", "baked"])
@pytest.mark.parametrize("size", ["20KB", "50GB"])
def test_a_model_of_several_types(size: str, bake: bool, tmp_path: Path) -> None:
    """A head in float32 on a model in bfloat16: from_pretrained makes it bfloat16, and its last bits are in the file alone."""
    model = FAMILIES["llama"].build("sdpa", dtype=torch.bfloat16)
    head_in_float32(model).lm_head.weight.data.mul_(1.001)
    patch_model(model, CUTS if bake else MORE)
    given = FAMILIES["llama"].inputs()
    done = export_checkpoint(
        model, tmp_path / "out", bake=bake, verify=False, example_inputs=given, max_shard_size=size, variant="mixed"
    )
    loaded = load_checkpoint(tmp_path / "out", variant="mixed")
    assert loaded.lm_head.weight.dtype == torch.float32 and loaded.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    loaded.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    if bake:
        assert done.folded and not done.kept
        assert not torch.equal(loaded.model.layers[1].self_attn.o_proj.weight, model.model.layers[1].self_attn.o_proj.weight)
        # bfloat16 has 8 bits, and the sum without a head is rounded elsewhere.
        gap = (logits(loaded, "llama") - logits(model, "llama"))[kept("llama")].abs().max()
        assert gap <= 0.02 * logits(model, "llama").abs().max()
    else:
        assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    # A type that is asked for is the type of everything, as from_pretrained has it.
    assert {p.dtype for p in load_checkpoint(tmp_path / "out", variant="mixed", dtype=torch.float16).parameters()} == {
        torch.float16
    }


def test_the_first_type_is_not_taken_for_all(tmp_path: Path) -> None:
    """A model's config names the type of its first parameter, in which from_pretrained would round all others."""
    model = FAMILIES["llama"].build("sdpa")
    model.model.embed_tokens.bfloat16()
    model.model.layers[0].mlp.half()
    export_checkpoint(patch_model(model), tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    for one, other in zip(named(load_checkpoint(tmp_path / "out")), named(model), strict=True):
        assert one[0] == other[0] and one[1].dtype == other[1].dtype and torch.equal(one[1], other[1]), one[0]


# -- larger than memory -------------------------------------------------------------------------------------------------------


def places(module: Any, path: str = "") -> dict[str, str]:
    """A device map with the layers on the disk and what surrounds them in memory."""
    found: dict[str, str] = {}
    for name, part in module.named_children():
        at = f"{path}{name}"
        if isinstance(module, nn.ModuleList):
            found[at] = "disk"
        elif any(isinstance(inner, nn.ModuleList) for inner in part.modules()):
            found |= places(part, f"{at}.")
        else:
            found[at] = "cpu"
    return found


def by_map(name: str, tmp_path: Path) -> Any:
    model = FAMILIES[name].build("sdpa")
    model.save_pretrained(tmp_path / "source")
    return type(model).from_pretrained(
        tmp_path / "source", device_map=places(model), offload_folder=tmp_path / "disk", attn_implementation="sdpa"
    )


def by_cpu_offload(name: str, tmp_path: Path) -> Any:
    return cpu_offload(FAMILIES[name].build("sdpa"), execution_device=torch.device("cpu"))


def by_disk_offload(name: str, tmp_path: Path) -> Any:
    return disk_offload(FAMILIES[name].build("sdpa"), str(tmp_path / "disk"), execution_device=torch.device("cpu"))


WAYS: dict[str, Callable[[str, Path], Any]] = {
    "device map": by_map,
    "cpu_offload": by_cpu_offload,
    "disk_offload": by_disk_offload,
}


@pytest.mark.parametrize("bake", [False, True], ids=["kept", "baked"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_offloaded_models(name: str, way: str, bake: bool, tmp_path: Path) -> None:
    """The folder is, to the byte, that of the same model in memory; and the model goes on as it was."""
    given, cuts = FAMILIES[name].inputs(), CUTS if bake else MORE
    whole, model = patch_model(FAMILIES[name].build("sdpa"), cuts), WAYS[way](name, tmp_path)
    away = {n for n, p in model.named_parameters() if p.is_meta}
    assert len(away) > 10
    patch_model(model, cuts)
    expected, had_map = logits(whole, name), "hf_device_map" in vars(model)
    assert torch.equal(logits(model, name), expected)
    for folder, one in (("whole", whole), ("out", model)):
        export_checkpoint(one, tmp_path / folder, bake=bake, example_inputs=given, verify=False, max_shard_size="20KB")
    both = {file.name for folder in ("whole", "out") for file in (tmp_path / folder).glob("*")}
    if way == "disk_offload" and name == "gpt2":  # accelerate writes a tied weight to its disk twice
        assert torch.equal(logits(load_checkpoint(tmp_path / "out"), name), logits(load_checkpoint(tmp_path / "whole"), name))
    else:
        index = [json.loads((tmp_path / folder / "model.safetensors.index.json").read_text()) for folder in ("whole", "out")]
        assert index[0]["weight_map"] == index[1]["weight_map"]  # offloaded, transformers counts tied parameters twice
        for file in both - {"README.md", "model.safetensors.index.json", "surgery.json"}:
            assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
        found = [json.loads((tmp_path / folder / "surgery.json").read_text()) for folder in ("whole", "out")]
        for one in found:  # the hash of the index, and so that of the whole
            del one["sha256"], one["files"]["model.safetensors.index.json"]
        assert found[0] == found[1]
    assert {n for n, p in model.named_parameters() if p.is_meta} == away and ("hf_device_map" in vars(model)) == had_map
    assert torch.equal(logits(model, name), expected)


def test_the_folder_of_an_offloaded_model_is_compared_from_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.export import fresh

    model = patch_model(by_map("llama", tmp_path), MORE)
    seen: list[Any] = []
    run = fresh.subprocess.run
    monkeypatch.setattr(
        fresh.subprocess, "run", lambda command, **more: seen.append(json.loads(command[-1])) or run(command, **more)
    )
    done = export_checkpoint(model, tmp_path / "out", bake="where_possible", example_inputs=FAMILIES["llama"].inputs())
    assert done.comparison is not None and done.comparison.changed == 0 and done.comparison.relative < 1e-5
    assert seen[0]["load"]["device_map"] == model.hf_device_map and len(done.kept) == 1


def test_heads_of_an_offloaded_model_are_removed(tmp_path: Path) -> None:
    model = by_map("llama", tmp_path)
    patch_model(model, [Freeze("ov", layers=[0], heads=[2, 3]), Freeze("ov", layers=[1], heads=[0, 1])])
    expected = logits(model, "llama")
    export_checkpoint(model, tmp_path / "out", bake=True, shrink=True, verify=False)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config.num_attention_heads == 2
    torch.testing.assert_close(logits(loaded, "llama")[kept("llama")], expected[kept("llama")], rtol=1e-4, atol=1e-5)


def test_an_offloaded_model_is_written_in_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file is in memory at a time: transformers' own limit is 50 GB."""
    monkeypatch.setattr("surgery.export.saving.SHARD", "30KB")
    assert offload.SHARD == "2GB"
    model = patch_model(by_map("llama", tmp_path), MORE)
    export_checkpoint(model, tmp_path / "out")
    files = check_files(tmp_path / "out", model)
    assert len(files) >= 3 and max((tmp_path / "out" / file).stat().st_size for file in files) < 40_000


def test_weights_that_are_nowhere_are_said_before_anything_is_written(tmp_path: Path) -> None:
    model = patch_model(FAMILIES["llama"].build(), MORE).to("meta")
    with pytest.raises(ExportError, match=r"found 21 weights on the meta device, without data \('model.embed_tokens.weight'\)"):
        export_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_types_are_not_restored_to_weights_on_a_disk(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build("sdpa", dtype=torch.bfloat16)
    model.model.layers[0].mlp.float()
    export_checkpoint(patch_model(model), tmp_path / "out")
    options = dict(device_map=places(model), offload_folder=tmp_path / "disk")
    with pytest.raises(
        ExportError, match=r"mlp.*found it loaded as torch.bfloat16; expected torch.float32.*Load it with dtype="
    ):
        load_checkpoint(tmp_path / "out", **options)
    assert load_checkpoint(tmp_path / "out", dtype=torch.float32, **options).dtype == torch.float32
