"""Exports that would go wrong without a word: each is noticed, or comes out right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import CACHE
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModel, AutoModelForCausalLM, CLIPConfig, CLIPModel, LlamaForCausalLM

from surgery import (
    Edit,
    ExportError,
    Freeze,
    Spec,
    export_checkpoint,
    export_spec,
    load_checkpoint,
    load_spec,
    patch_model,
    patched,
)
from surgery.export import fresh, save
from surgery.export.audit import audit
from surgery.export.fresh import Comparison

CLOSE = dict(rtol=1e-4, atol=1e-5)
OV = Freeze("ov", layers=[0], heads=[1])


def built(name: str = "llama", cuts: Any = OV, **options: Any) -> Any:
    return patch_model(FAMILIES[name].build(**options), cuts)


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output[0]


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return FAMILIES["llama"].inputs()


# Weights that are not there.


def test_weights_that_are_missing_are_an_error(tmp_path: Path) -> None:
    export_checkpoint(built(), tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ExportError, match=r"no weights for model\.layers\.0\.mlp\.up_proj\.weight"):
        load_checkpoint(tmp_path / "cut")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"the weights in .*Export the model again"):
        load_checkpoint(tmp_path / "cut")
    file.unlink()
    with pytest.raises(ExportError, match="the weights in"):
        load_checkpoint(tmp_path / "cut")


def test_what_would_not_load_again_is_not_written(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()

    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Twice())
    with pytest.raises(ExportError, match=r"no model\.layers\.0\.mlp\.up_proj\.weight among what was written"):
        export_checkpoint(patch_model(model, OV), tmp_path / "cut")
    assert not (tmp_path / "cut").exists() and not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="the option is_main_process"):
        export_checkpoint(built(), tmp_path / "cut", is_main_process=False)


@pytest.mark.parametrize("damage", [{"architectures": 5}, {"model_type": 3}, "text", None])
def test_a_damaged_config_is_our_error(tmp_path: Path, damage: Any) -> None:
    export_checkpoint(built(), tmp_path / "cut")
    file = tmp_path / "cut/config.json"
    if isinstance(damage, dict):
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **damage}), encoding="utf-8")
    elif damage is not None:
        file.write_text(damage, encoding="utf-8")
    else:
        file.unlink()
    with pytest.raises(ExportError, match="the config of"):
        load_checkpoint(tmp_path / "cut")


def test_loading_notes_are_given_to_whoever_asks(tmp_path: Path) -> None:
    export_checkpoint(built(), tmp_path / "cut")
    model, notes = load_checkpoint(tmp_path / "cut", output_loading_info=True, use_safetensors=True)
    assert isinstance(model, LlamaForCausalLM) and not notes["missing_keys"]


# Folders.


def test_the_surgery_alone_does_not_replace_a_checkpoint(tmp_path: Path) -> None:
    model = built()
    export_checkpoint(model, tmp_path / "cut")
    with pytest.raises(ExportError, match=r"an export with more in it: README\.md, config\.json"):
        export_spec(model, tmp_path / "cut")
    assert (tmp_path / "cut/model.safetensors").is_file()
    export_spec(model, tmp_path / "spec")
    export_spec(patch_model(model, Freeze("qk")), tmp_path / "spec")
    assert load_spec(tmp_path / "spec") == Spec(Freeze("qk"))


def test_links_are_followed(tmp_path: Path) -> None:
    export_checkpoint(built(), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for name in ("link", "dangling"):
        export_checkpoint(built(cuts=Freeze("qk")), tmp_path / name)
        assert (tmp_path / name).is_symlink()
    assert load_spec(tmp_path / "real") == load_spec(tmp_path / "new") == Spec(Freeze("qk"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "new", "real"]


def test_a_taken_path_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    monkeypatch.setattr(save, "bake_cuts", lambda *_: pytest.fail("it folded"))
    with pytest.raises(ExportError, match="a folder of other files"):
        export_checkpoint(built(), tmp_path / "mine", bake=True)


def test_the_process_that_compares_imports_nothing_from_the_folder_it_stands_in(tmp_path: Path) -> None:
    (tmp_path / "safetensors.py").write_text("open('it-ran', 'w')\n", encoding="utf-8")
    root, tests = Path(__file__).parents[1], Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(tests)!r}]; from test_export_faults import *; "
    code += "export_checkpoint(built(), 'out', bake=True)"
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "it-ran").exists() and (tmp_path / "out/model.safetensors").is_file()


def test_a_kernel_of_the_hub_is_not_fetched(tmp_path: Path) -> None:
    export_checkpoint(built(), tmp_path / "cut")
    from surgery.export import document

    path = tmp_path / "cut/surgery.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["sha256"]
    data["implementation"] = {"": "kernels-community/flash-attn"}
    data["sha256"] = document._digest(document._canonical(data))
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ExportError, match=r"code on the hub \(kernels-community/flash-attn\)"):
        load_checkpoint(tmp_path / "cut")
    assert isinstance(load_checkpoint(tmp_path / "cut", attn_implementation="eager"), LlamaForCausalLM)


# Folds that are right for these inputs, or for one attention, alone.


def test_a_map_that_two_attentions_call_is_not_folded(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    layers = model.model.layers
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    patch_model(model, [Freeze("qk", layers=[0], heads=[1]), Freeze("ov", layers=[0], heads=[2])])
    with pytest.raises(ExportError, match=r"q_proj\.weight is the weight of another module or attention too"):
        export_checkpoint(model, tmp_path / "baked", bake=True)


def test_scores_behind_a_cap_are_tried_where_the_cap_acts(tmp_path: Path) -> None:
    model = FAMILIES["gemma2"].build()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.01)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.01)
    patch_model(model, Edit("scores", "scale", 0.5, layers=[0], heads=[0]))
    with pytest.raises(ExportError, match="the weights that come nearest change its output"):
        export_checkpoint(model, tmp_path / "baked", bake=True)


def test_a_bias_that_was_set_can_be_cut_again(tmp_path: Path, inputs: Any) -> None:
    cuts = [Edit("q", "add", torch.ones(16), heads=[1], layers=[0]), Edit("rot_q", "zero", heads=[1], layers=[0])]
    model = FAMILIES["llama"].build()
    done = export_checkpoint(patch_model(model, cuts), tmp_path / "baked", bake=True)
    assert len(done.folded) == 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", attn_implementation="eager")
    torch.testing.assert_close(logits(plain, inputs), logits(model, inputs), **CLOSE)


def test_heads_are_removed_also_where_biases_are_new(tmp_path: Path, inputs: Any) -> None:
    model = FAMILIES["llama"].build()
    width = model.config.hidden_size
    cuts = [Freeze("ov", heads=[0, 1]), Edit("result", "add", torch.linspace(-1, 1, width), heads=[2], layers=[0])]
    export_checkpoint(patch_model(model, cuts), tmp_path / "small", bake=True, shrink=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", attn_implementation="eager")
    assert plain.config.num_attention_heads == 2 and plain.config.attention_bias
    torch.testing.assert_close(logits(plain, inputs), logits(model, inputs), **CLOSE)


# The comparison of what was written.


def test_a_folder_that_lost_its_cuts_is_rejected_in_half_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _saved(FAMILIES["llama"].build(), tmp_path / "first")
    model = patch_model(LlamaForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.bfloat16).eval(), OV)
    export_checkpoint(model, tmp_path / "good", bake=True)
    whole = fresh.subprocess.run

    def uncut(command: list[str], **options: Any) -> Any:
        with patched(model):
            model.save_pretrained(command[4])
        return whole(command, **options)

    monkeypatch.setattr(fresh, "ROUGH", 10.0)  # so that the effect alone decides
    monkeypatch.setattr(fresh.subprocess, "run", uncut)
    with pytest.raises(ExportError, match="the model without its cuts differs by"):
        export_checkpoint(model, tmp_path / "bad", bake=True)
    assert not (tmp_path / "bad").exists()


def test_types_that_plain_transformers_does_not_give_are_rejected(tmp_path: Path) -> None:
    model = patch_model(FAMILIES["llama"].build().to(torch.bfloat16), OV)  # its angles are cast as well
    with pytest.raises(ExportError, match=r"rotary_emb.*loaded as torch\.float32.*Load the model with dtype="):
        export_checkpoint(model, tmp_path / "baked", bake=True)
    export_checkpoint(model, tmp_path / "cut")
    assert audit(tmp_path / "cut", str(_saved(FAMILIES["llama"].build(), tmp_path / "first"))).problems == ()


def _saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def test_parts_in_kernels_of_their_own_equal_the_original(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 16},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "first")
    model = AutoModel.from_pretrained(tmp_path / "first", attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
    patch_model(model, Freeze("ov", layers=["vision.*"], heads=[0]))
    export_checkpoint(model, tmp_path / "cut")
    given = {"input_ids": torch.arange(3, 9)[None], "pixel_values": torch.randn(1, 3, 8, 8)}
    assert audit(tmp_path / "cut", str(tmp_path / "first"), given).problems == ()


class Mine(LlamaForCausalLM):
    """A user's own class; it computes what its base does."""


def test_a_class_of_ones_own_is_compared_as_its_base(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    mine = Mine(model.config).eval()
    mine.load_state_dict(model.state_dict())
    assert export_checkpoint(patch_model(mine, OV), tmp_path / "baked", bake=True).comparison is not None


def test_inputs_that_share_memory_are_inputs(tmp_path: Path) -> None:
    ids = FAMILIES["llama"].inputs()["input_ids"]
    done = export_checkpoint(built(), tmp_path / "a", bake=True, example_inputs={"input_ids": ids, "labels": ids})
    assert isinstance(done.comparison, Comparison)
    with pytest.raises(ExportError, match=r"example_inputs.*a tuple"):
        export_checkpoint(built(), tmp_path / "b", bake=True, example_inputs={"input_ids": ids, CACHE: (1,)})


def test_the_card_does_not_say_where_things_lie(tmp_path: Path) -> None:
    _saved(FAMILIES["llama"].build(), tmp_path / "secret/name")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "secret/name")
    export_checkpoint(patch_model(model, OV), tmp_path / "cut")
    card = (tmp_path / "cut/README.md").read_text(encoding="utf-8")
    assert "# name, with surgery" in card and "secret" not in card and os.sep + "tmp" not in card


# Files of others.


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    model = built()
    for _ in range(2):
        export_checkpoint(model, tmp_path / "cut")
    for name in ("notes.txt", "checkpoint-1/model.safetensors"):
        file = tmp_path / "cut" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        with pytest.raises(ExportError, match=f"an export with more in it: {name.partition('/')[0]}"):
            export_checkpoint(model, tmp_path / "cut")
        assert file.exists()
        file.unlink()
    (tmp_path / "cut/checkpoint-1").rmdir()
    export_checkpoint(model, tmp_path / "cut", bake=True)


def test_an_audit_sees_what_was_changed(tmp_path: Path) -> None:
    export_checkpoint(built(), tmp_path / "cut")
    assert audit(tmp_path / "cut").problems == ()
    weights, config = tmp_path / "cut/model.safetensors", tmp_path / "cut/config.json"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert audit(tmp_path / "cut").problems == ("since the export, model.safetensors was changed",)
    config.write_text(config.read_text(encoding="utf-8").replace("1e-06", "0.1"), encoding="utf-8")
    (tmp_path / "cut/generation_config.json").unlink()
    assert len(audit(tmp_path / "cut").problems) == 3


def test_options_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the option 'shrik'.*Did you mean 'shrink'"):
        export_checkpoint(built(), tmp_path / "cut", shrik=True)


@pytest.mark.parametrize("site", ["z", "scores"])
def test_random_tokens_fit_values_by_position(tmp_path: Path, site: str) -> None:
    shape = (3, 4, 9, 16) if site == "z" else (9, 9)
    model = built(cuts=Edit(site, "value" if site == "z" else "add", torch.ones(shape), layers=[1]))
    export_checkpoint(model, tmp_path / "cut")
    found = audit(tmp_path / "cut")
    assert found.problems == () and found.rows[1].positions == (3 if site == "z" else 2) * 9


@pytest.mark.parametrize(("name", "implementation"), [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager")])
def test_a_uniform_pattern_is_folded_under_any_mask(name: str, implementation: str, tmp_path: Path) -> None:
    """An eager model's mask holds the lowest number of its type, which a trial in a wider type must not take for a score."""
    model = patch_model(FAMILIES[name].build(implementation), Edit("pattern", "uniform", layers=[0], heads=[0]))
    export_checkpoint(model, tmp_path / "baked", bake=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", attn_implementation=implementation)
    inputs = FAMILIES[name].inputs()
    torch.testing.assert_close(logits(plain, inputs)[1], logits(model, inputs)[1], **CLOSE)  # the other row has padding


def test_the_comparison_is_printed_unless_it_is_not_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_checkpoint(built(), tmp_path / "a", bake=True)
    assert "a loaded by plain transformers: largest difference" in capsys.readouterr().err
    export_checkpoint(built(), tmp_path / "b", bake=True, progress=False)
    assert "largest difference" not in capsys.readouterr().err
