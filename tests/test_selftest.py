"""The self-test passes on every good model, and fails when it is shown a bad one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from families import DECODERS, FAMILIES, HEADS
from torch import Tensor, nn

from surgery import (
    Edit,
    Freeze,
    ParityError,
    PatchError,
    Spec,
    SurgeryError,
    collect_reference,
    find_anatomy,
    inspect_model,
    patch_model,
    self_test,
    unpatch_model,
)
from surgery.interventions import Operation
from surgery.own_code import Surgery
from surgery.patch import session_of
from surgery.reconstruction import Reconstruction
from surgery.selftest import dummy_inputs
from surgery.verify import verify

CUTS = [
    Freeze("qk", [0], [1]),
    Freeze("ov", to="noise", heads=[0]),
    Freeze("both", to="identity", heads=[2]),
    Edit("pattern", "previous", heads=[3]),
    Edit("rot_k", "scale", 0.5, heads=[0]),
    Edit("result", "add", 0.1, heads=[1]),
]


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bert", "t5", "bart", "gemma3", "phi"])
def test_good_models_pass(name: str, implementation: str, kernel: Any) -> None:
    model = patch_model(FAMILIES[name].build(implementation), CUTS, kernel=kernel)
    spec, random = session_of(model).spec, torch.get_rng_state()  # type: ignore[union-attr]
    classes = [type(m) for m in model.modules()]
    said = self_test(model)
    assert len(said) == 2 and all(isinstance(sentence, str) and sentence for sentence in said)
    assert "equal bit for bit" in said[0] and "ran and acted" in said[1]
    assert session_of(model).spec == spec and session_of(model).kernel == kernel  # type: ignore[union-attr]
    assert session_of(model).watch is None  # type: ignore[union-attr]
    assert [type(m) for m in model.modules()] == classes and torch.equal(torch.get_rng_state(), random)
    assert self_test(model) == said


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_on_its_own_inputs(name: str) -> None:
    """A cut for each head of each layer, so that none can hide behind another."""
    model = patch_model(FAMILIES[name].build(), [Edit("z", "scale", 0.5, heads=[head]) for head in range(HEADS)])
    said = self_test(model, FAMILIES[name].inputs())
    attentions = len(inspect_model(model))
    assert said[1] == f"with cuts: {attentions * HEADS} edits ran and acted"


def test_an_empty_spec_has_nothing_to_act() -> None:
    assert self_test(patch_model(FAMILIES["gpt2"].build()))[1] == "with cuts: 0 edits ran and acted"


def test_measured_values_pass() -> None:
    model = FAMILIES["llama"].build()
    reference = collect_reference(model, [FAMILIES["llama"].inputs()], progress=False)
    self_test(
        patch_model(model, [Freeze("both", [0], to="mean", reference=reference), Freeze("ov", [1], to="resample", seed=3)])
    )


@pytest.mark.parametrize("name", [*DECODERS[:3], "bert", "t5", "bart"])
def test_dummy_inputs_are_valid(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = dummy_inputs(model)
    assert inputs["input_ids"].shape == (2, 7) and int(inputs["input_ids"].max()) < 67
    assert ("decoder_input_ids" in inputs) == (name in ("t5", "bart"))
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


# -- what it must reject ------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_patched() -> None:
    with pytest.raises(
        PatchError, match=r"self_test: found a model that is not patched; expected a patched model\. Call patch_mo"
    ):
        self_test(FAMILIES["gpt2"].build())


def test_a_model_that_takes_no_text() -> None:
    model = patch_model(FAMILIES["whisper"].build())
    with pytest.raises(
        ParityError, match=r"found a model that takes input_features; expected inputs to test on\. Pass inputs="
    ):
        self_test(model)
    self_test(model, FAMILIES["whisper"].inputs())


@pytest.mark.parametrize("site", ["q", "rot_k", "v", "scores", "z", "result"])
def test_an_edit_that_changes_nothing(site: str) -> None:
    """A factor of 1 is no cut."""
    model = patch_model(
        FAMILIES["llama"].build("sdpa"), [Freeze("qk", [0], [0]), Edit(site, "scale", 1.0, layers=[1], heads=[1])]
    )
    pattern = rf"self_test: cut 1 at self\.1 {site}: found a tensor that it did not change; expected a change\. Pass inputs"
    with pytest.raises(ParityError, match=pattern):
        self_test(model)
    assert session_of(model).watch is None  # type: ignore[union-attr]
    assert "scale" in inspect_model(model)["self.1"].cuts, "the cuts are still there"


def test_an_edit_to_what_is_there_already() -> None:
    family = FAMILIES["gpt2"]
    model = patch_model(family.build(), [Freeze("ov", [0]), Edit("z", "zero", layers=[0])])
    with pytest.raises(ParityError, match=r"cut 1 at self\.0 z: found a tensor that it did not change"):
        self_test(model)


def test_positions_that_the_inputs_do_not_reach() -> None:
    model = patch_model(FAMILIES["gpt2"].build(), Edit("z", "zero", positions=[40]))
    with pytest.raises(ParityError, match=r"2 problems(?s:.*)self\.0 z(?s:.*)self\.1 z"):
        self_test(model)
    self_test(model, {"input_ids": torch.arange(50)[None] + 5})


def test_identity_and_strength_zero_must_leave_their_site() -> None:
    self_test(patch_model(FAMILIES["gpt2"].build(), [Freeze("ov", to="identity"), Freeze("qk", strength=0.0)]))


def test_an_edit_that_never_runs() -> None:
    family = FAMILIES["bart"]
    model, inputs = family.build(), family.inputs()
    with torch.no_grad():
        states = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    inputs = {**inputs, "encoder_outputs": states}
    del inputs["input_ids"]
    patch_model(model, Freeze("ov", ["encoder.self.1", "decoder.cross.0"]))
    with pytest.raises(
        ParityError, match=r"self_test: cut 0 at encoder\.self\.1 z: found an edit that never ran; expected a change"
    ):
        self_test(model, inputs)


def test_every_problem_is_listed() -> None:
    model = patch_model(FAMILIES["llama"].build(), [Edit("z", "scale", 1.0), Freeze("qk"), Edit("rot_q", "add", 0.0)])
    with pytest.raises(ParityError) as caught:
        self_test(model)
    lines = str(caught.value).splitlines()
    assert lines[0] == "self_test: 4 problems"
    assert sorted(line.split("at ")[1].split(":")[0] for line in lines[1:]) == [
        "self.0 rot_q",
        "self.0 z",
        "self.1 rot_q",
        "self.1 z",
    ]


# -- broken machinery ---------------------------------------------------------------------------------------------------


def test_a_patched_forward_that_computes_something_else(monkeypatch: Any) -> None:
    """Without cuts the outputs must be the unpatched model's to the last bit."""
    model = patch_model(FAMILIES["llama"].build("sdpa"), Freeze("ov", [0]))
    whole = Surgery.enter

    def meddle(self: Surgery, args: Any, kwargs: Mapping[str, Any]) -> None:
        whole(self, args, kwargs)
        kwargs["hidden_states"][:, -1, 0] += 1e-3

    monkeypatch.setattr(Surgery, "enter", meddle)
    with pytest.raises(
        ParityError, match=r"self_test: without cuts: found output logits that differs by .*; expected equality"
    ):
        self_test(model)


def test_an_edit_whose_arithmetic_is_lost(monkeypatch: Any) -> None:
    model = patch_model(FAMILIES["llama"].build("sdpa"), Freeze("ov", [0]))
    monkeypatch.setattr(Operation, "apply", lambda self, x, where, held=None: x)
    with pytest.raises(ParityError, match=r"cut 0 at self\.0 z: found a tensor that it did not change"):
        self_test(model)


def test_a_kernel_that_skips_the_points(monkeypatch: Any) -> None:
    """A point that is planned but never reached is an error of the forward itself."""
    model = patch_model(FAMILIES["llama"].build("sdpa"), Edit("pattern", "uniform", layers=[1]))
    monkeypatch.setattr("surgery.core.with_matrix", lambda surgery, output, call: output)
    with pytest.raises(SurgeryError, match=r"'model\.layers\.1\.self_attn': found a forward that never came to pattern"):
        self_test(model)
    assert session_of(model).watch is None  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bloom", "gpt_oss"])
def test_a_reconstruction_that_is_wrong_is_refused_when_patching(name: str, monkeypatch: Any) -> None:
    family = FAMILIES[name]
    model = family.build()
    attention = next(iter(find_anatomy(model)))
    whole = Reconstruction.__call__

    def wrong(self: Reconstruction, at: Any, module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        output, weights = whole(self, at, module, arguments)
        return output * (1 + 2**-20), weights

    monkeypatch.setattr("surgery.verify._VERIFIED", set())
    with monkeypatch.context() as patch:
        patch.setattr(Reconstruction, "__call__", wrong)
        for _ in range(2):
            with pytest.raises(
                ParityError, match=rf"reconstruction of {attention.class_name} at .* expected equality bit for bit"
            ):
                verify(attention)
            with pytest.raises(ParityError):
                patch_model(model)
        assert session_of(model) is None
    verify(attention)
    unpatch_model(patch_model(model))


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart", "whisper", "bloom"])
def test_double_precision_can_be_patched(name: str) -> None:
    """The comparison with eager attention runs in the precision that the module computes in."""
    family = FAMILIES[name]
    model = patch_model(family.build(dtype=torch.float64), Freeze("ov"))
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in family.inputs().items()}
    assert self_test(model, inputs)


def test_a_model_that_gives_a_plain_tensor() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = FAMILIES["gpt2"].build()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits

    model = patch_model(Bare(), Freeze("ov"))
    assert self_test(model, {"ids": torch.arange(5)[None]})[0] == "without cuts: 1 outputs equal bit for bit"


def test_the_self_test_warns_of_nothing_on_good_models() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        self_test(patch_model(FAMILIES["llama"].build("sdpa"), Spec([Freeze("ov", [1])])))
