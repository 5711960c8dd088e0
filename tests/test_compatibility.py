"""What `compatibility` says of a model, against what then works and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, FAMILIES_ALL
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BigBirdConfig, BigBirdModel
from typer.testing import CliRunner

import surgery
import surgery.analysis.compatible as file
from surgery import (
    Edit,
    Freeze,
    NoMatchError,
    PatchError,
    Spec,
    SpecError,
    SurgeryError,
    collect_reference,
    patch_model,
    patched,
    unpatch_model,
    weights,
)
from surgery.analysis.compatible import Compatibility, compatibility
from surgery.analysis.foldable import CUTS
from surgery.classes import SurgicalAttention
from surgery.cli import app
from surgery.errors import ParityError
from surgery.export.bake import bake
from surgery.interventions import Operation
from surgery.patch import anatomy_of, session_of
from surgery.sites import SITES

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # an older name that PEFT uses

MODEL = Path(surgery.__file__).parent / "demo" / "model"
TRIAL = "the weights that come nearest"
"""How an export says that only its trial refused a fold."""


def _build(name: str) -> tuple[Any, dict[str, Tensor]]:
    family = FAMILIES[name]
    return family.build("sdpa" if family.sdpa else "eager"), family.inputs(padding=0)


# -- said, and so -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES_ALL)
def test_sites_that_are_said_to_exist_can_be_cut_and_others_cannot(name: str) -> None:
    model, inputs = _build(name)
    found = compatibility(model)
    assert not found.unsupported and len(found) == len(anatomy_of(model))
    for site in SITES:
        there = [row.address for row in found if not row.sites[site]]
        assert all(row.cuts.keys() == {s for s, why in row.sites.items() if not why} for row in found)
        seen: set[str] = set()

        def watch(operation: Operation, before: Tensor, after: Tensor, seen: set[str] = seen) -> None:
            if not torch.equal(before, after):
                seen.add(operation.address)

        with patched(model, Spec([Edit(site, "scale", value=0.5, layers=there)]) if there else None), torch.no_grad():
            session: Any = session_of(model)
            session.watch = watch
            model(**inputs)
            states = [m._surgery for m in model.modules() if isinstance(m, SurgicalAttention)]
            kernels = {state.address: state.kernel_in_use for state in states}
        assert seen == set(there), site
        for row in found:
            if row.sites[site]:
                with pytest.raises(SpecError, match="a site that exists"):
                    patch_model(model, Edit(site, "scale", value=0.5, layers=[row.address]))
                continue
            in_use, said = kernels[row.address], row.cuts[site]
            if said.startswith("its own code"):
                assert in_use == row.kernel == "its own code"
            elif said == "all heads by the reconstruction":
                assert in_use == "reconstructed eager"
            else:
                assert in_use.partition(" + ")[0] == row.kernel and ("beside" in said) is ("reconstructed" in in_use)


@pytest.mark.parametrize("name", FAMILIES_ALL)
def test_weights_that_are_said_to_be_there_can_be_read_and_others_cannot(name: str) -> None:
    model, _ = _build(name)
    for row in compatibility(model):
        own = weights.head_weights(model, row.address)
        for weight, why in row.weights.items():
            if why:
                with pytest.raises(SurgeryError) as error:
                    getattr(own, weight)
                assert why in str(error.value)
            else:
                assert getattr(own, weight).dim() == 3


@pytest.mark.parametrize("name", FAMILIES_ALL)
def test_what_is_said_not_to_fold_is_refused_and_all_else_is_tried(name: str) -> None:
    model, inputs = _build(name)
    found = compatibility(model)
    folded = 0
    for cut, make in CUTS.items():
        there = [row.address for row in found if not row.sites[make().site]]
        assert all(row.baking[cut] for row in found if row.address not in there), "no site, no fold"
        if not there:
            continue
        with patched(model, Spec([make(layers=there, heads=[0])])):
            result = bake(model, inputs)
        folded += len(result.folded)
        for row in (found[address] for address in there):
            refused = [text for text in result.refused if f" at {row.address} " in text]
            if row.baking[cut]:
                assert len(refused) == 1 and TRIAL not in refused[0], f"{cut}: said {row.baking[cut]}; found {refused}"
            else:
                assert all(TRIAL in text for text in refused), f"{cut}: {refused}"
    assert folded >= 2 * len(found), "OV to zero and QK to zero, at least"


def test_freezes_are_the_edits_that_they_are_said_to_be() -> None:
    model, inputs = _build("gpt_neox")
    means = collect_reference(model, [inputs], progress=False)
    row = compatibility(model)["self.1"]
    for cut, freeze in {
        "QK to zero": Freeze("qk", layers=[1], heads=[0]),
        "QK to a mean": Freeze("qk", layers=[1], heads=[0], to="mean", reference=means),
        "OV to zero": Freeze("ov", layers=[1], heads=[0]),
        "OV to a mean": Freeze("ov", layers=[1], heads=[0], to="mean", reference=means),
    }.items():
        with patched(model, freeze):
            result = bake(model, inputs)
        assert bool(result.refused) is bool(row.baking[cut]), cut
        assert all(row.baking[cut] in text for text in result.refused)


# -- states of a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "falcon_grouped", "bart", "gptj", "t5"])
def test_a_skeleton_without_weights_allows_the_same(name: str) -> None:
    model, _ = _build(name)
    with torch.device("meta"):
        bones = type(model)(copy.deepcopy(model.config))
    expected, found = compatibility(model), compatibility(bones)
    assert found.as_dicts() == expected.as_dicts() and str(found) == str(expected)
    assert all(parameter.is_meta for parameter in bones.parameters())


def test_a_model_is_not_changed() -> None:
    model, _ = _build("llama")
    model.train()
    classes = [type(module) for module in model.modules()]
    numbers = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    config, state = model.config.to_dict(), torch.get_rng_state()
    before = compatibility(model)
    assert [type(module) for module in model.modules()] == classes and session_of(model) is None and model.training
    assert not any("_surgery" in module.__dict__ for module in model.modules())
    assert all(tensor is model.state_dict(keep_vars=True)[name] for name, (tensor, _) in numbers.items())
    assert all(torch.equal(*pair) for pair in numbers.values())
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)
    patch_model(model, Freeze("qk", layers=[0]))
    session = session_of(model)
    assert compatibility(model).as_dicts() == before.as_dicts() and session_of(model) is session
    unpatch_model(model)
    model.set_attn_implementation("eager")
    row = compatibility(model)[0]
    assert row.kernel == "eager" and row.cuts["pattern"] == "all heads by the reconstruction"


def test_an_unknown_kernel_has_no_point_at_the_matrix() -> None:
    model, _ = _build("llama")
    model.config._attn_implementation_internal = "mine"
    row = compatibility(model)[0]
    assert row.kernel == "mine" and "masks of attn_implementation='mine'" in row.sites["scores"] == row.sites["pattern"]
    assert not row.sites["z"]


def test_an_adapter_is_in_the_weights_and_in_the_way_of_baking() -> None:
    model, _ = _build("llama")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    row = compatibility(adapted)[0]
    assert row.weights["W_Q"] == "" and "stores more than a weight" in row.baking["QK to zero"] and not row.baking["OV to zero"]


def test_quantised_and_tied_weights_are_not_baked() -> None:
    model, inputs = _build("gpt2")
    first, second = (block.attn.c_attn for block in model.transformer.h)
    second.weight = first.weight
    row = compatibility(model)["self.0"]
    assert "of another module" in row.baking["QK to zero"] and not row.baking["OV to zero"]
    with patched(model, Freeze("qk", layers=[0], heads=[0])):
        assert "of another module" in bake(model, inputs).refused[0]
    model.hf_quantizer = object()
    assert all("quantised" in why for why in compatibility(model)["self.0"].baking.values())


def test_what_stands_in_the_way_is_said() -> None:
    model, _ = _build("llama")
    module = model.model.layers[1].self_attn
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)
    found = compatibility(model)
    assert not found["self.0"].obstacles and "a forward that something else set" in found["self.1"].obstacles[0]
    assert "cannot be patched now" in str(found) and len(found.table().rows) == 2
    with pytest.raises(PatchError):
        patch_model(model)

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 40, batch_first=True), 2).eval()
    row = compatibility(encoder)[0]
    assert "fast path" in row.obstacles[0]
    with pytest.raises(PatchError, match="fast path"):
        patch_model(encoder, Edit("z", "zero"))


def test_attention_that_cannot_be_patched_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BigBirdConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, block_size=4
    )
    with pytest.raises(NoMatchError, match="cannot be patched"):
        compatibility(BigBirdModel(config))
    model, _ = _build("llama")
    real = file.verify

    def verify(attention: Any) -> None:
        if attention.address == "self.1":
            raise ParityError("self.1 is not what it should be")
        real(attention)

    monkeypatch.setattr(file, "verify", verify)
    found = compatibility(model)
    assert [row.address for row in found] == ["self.0"] and found.unsupported == ("self.1 is not what it should be",)
    assert "left as it is: self.1" in str(found)


# -- shown ------------------------------------------------------------------------------------------------------------------


def test_tables_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # where sentences are not broken
    found: Compatibility = compatibility(_build("deepseek_v3")[0])
    text = str(found)
    assert "self.0 to self.1" in text and "all but k" in text and "k is joined from the projections" in text
    assert text.count("no k, W_K") == 1 and "sdpa, and the heads" in text and repr(found) == text
    assert "all but W_K" in found._repr_html_() and "<li>self.0 to self.1: no k, W_K" in found._repr_html_()
    frame = found.to_frame()
    missing = frame[~frame.possible & (frame.kind != "baking")]
    assert missing.name.tolist() == ["k", "W_K"] * 2 and set(frame.kind) == {"sites", "weights", "baking", "cuts"}
    assert found["self.1"] is found[1] and json.loads(json.dumps(found.as_dicts()))[0]["address"] == "self.0"
    with pytest.raises(NoMatchError, match=r"self\.0, self\.1"):
        found["self.7"]
    bart = compatibility(_build("bart")[0])
    assert "decoder.self.0 to decoder.self.1, decoder.cross.0 to decoder.cross.1" in str(bart)
    assert "first step" in bart["decoder.cross.0"].cache and bart["encoder.self.0"].cache


def test_the_command_prints_it() -> None:
    runner = CliRunner()
    plain, full = (runner.invoke(app, ["inspect", str(MODEL), *more]) for more in ([], ["--full"]))
    assert plain.exit_code == full.exit_code == 0, full.output
    assert "baking" not in plain.output and "no baking QK to a mean" in full.output and "KV cache" in full.output
    data = json.loads(runner.invoke(app, ["inspect", str(MODEL), "--full", "--json"]).stdout)
    assert [row["address"] for row in data["allowed"]] == ["self.0", "self.1"] and data["allowed"][0]["sites"]["q"] == ""
    assert "allowed" not in json.loads(runner.invoke(app, ["inspect", str(MODEL), "--json"]).stdout)
