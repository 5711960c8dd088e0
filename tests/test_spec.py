"""Spec, Freeze and Edit as values: built, checked, compared, printed, written down and read again."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from random_specs import edits, freezes, specs
from torch import Tensor

from surgery import Edit, Freeze, Reference, Spec, SpecError, capture, patched
from surgery.cuts import GROUPED
from surgery.reference import Entry
from surgery.sites import SITES

FEW = settings(max_examples=40, deadline=None)


def double(x: Tensor) -> Tensor:
    return 2 * x


@FEW
@given(specs)
def test_json_and_yaml_give_the_same_spec_again(spec: Spec) -> None:
    for again in (
        Spec.from_json(spec.to_json(), spec.tensors()),
        Spec.from_yaml(spec.to_yaml(), spec.tensors()),
        pickle.loads(pickle.dumps(spec)),
        copy.deepcopy(spec),
        Spec(spec.cuts),
    ):
        assert again == spec
        assert hash(again) == hash(spec)
        assert again.fingerprint() == spec.fingerprint()
        assert str(again) == str(spec) and repr(again) == repr(spec)
        assert [type(cut) for cut in again] == [type(cut) for cut in spec]
    assert json.loads(spec.to_json())["version"] == 1


@settings(max_examples=15, deadline=None)
@given(specs, st.sampled_from([".json", ".yaml", ".yml"]))
def test_save_and_load(tmp_path_factory: Any, spec: Spec, suffix: str) -> None:
    folder = tmp_path_factory.mktemp("spec")
    spec.save(folder / f"cuts{suffix}")
    assert Spec.load(folder / f"cuts{suffix}") == spec
    assert Spec.load(str(folder / f"cuts{suffix}")) == spec
    assert (folder / f"cuts{suffix}.safetensors").exists() == bool(spec.tensors())


@FEW
@given(specs, specs)
def test_addition_concatenates_and_is_associative(one: Spec, two: Spec) -> None:
    assert list(one + two) == [*one, *two]
    assert one + Spec() == one == Spec() + one
    assert (one + two) + one == one + (two + one)
    assert len(one + two) == len(one) + len(two)


@FEW
@given(specs, specs)
def test_equal_specs_and_only_they_share_a_fingerprint(one: Spec, two: Spec) -> None:
    assert (one == two) == (one.fingerprint() == two.fingerprint())
    assert one != two or hash(one) == hash(two)


@FEW
@given(st.one_of(edits(), freezes()))
def test_a_cut_is_what_its_edits_say(cut: Edit | Freeze) -> None:
    for edit in cut.edits():
        assert edit.edits() == (edit,)
        same = ("layers", "heads", "strength", "positions", "reference", "seed", "backward")
        assert edit.gqa == (cut.gqa if edit.site in GROUPED else "isolated")
        assert all(getattr(edit, name) == getattr(cut, name) for name in same)


# -- construction -------------------------------------------------------------------------------------------------------


def test_positional_and_keyword_construction_agree() -> None:
    by_place = Edit("v", "scale", 2.0, [1], [0, 3], "ste", 0.5, [4], "shared", None, 7)
    by_name = Edit(
        site="v", action="scale", value=2.0, layers=[1], heads=[0, 3], backward="ste", strength=0.5, positions=[4],
        gqa="shared", reference=None, seed=7,
    )  # fmt: skip
    assert by_place == by_name
    run = torch.zeros(1, 2, 3, 4)
    by_place_too = Freeze("ov", [1], [0], "activation", "ste", 0.5, [4], "shared", run, 7)
    by_name_too = Freeze(
        circuit="ov", layers=[1], heads=[0], to="activation", backward="ste", strength=0.5, positions=[4], gqa="shared",
        reference=run, seed=7,
    )  # fmt: skip
    assert by_place_too == by_name_too


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Freeze("qk", 3), Freeze("qk", [3])),
        (Freeze("qk", "self.3"), Freeze("qk", ["self.3"])),
        (Freeze("qk", range(2)), Freeze("qk", (0, 1))),
        (Freeze("qk", heads=2), Freeze("qk", heads=[2])),
        (Freeze("qk", heads=[3, 1]), Freeze("qk", heads=(1, 3))),
        (Freeze("qk", heads={1, 3}), Freeze("qk", heads=torch.tensor([3, 1]))),
        (Freeze("qk", torch.arange(2)), Freeze("qk", [0, 1])),
        (Freeze("qk", heads=list(torch.arange(2))), Freeze("qk", heads=[0, 1])),
        (Freeze("qk", strength=torch.tensor(0.5)), Freeze("qk", strength=0.5)),
        (Freeze("qk", positions=(2, 0)), Freeze("qk", positions=[0, 2])),
        (Freeze("qk", strength=1), Freeze("qk", strength=1.0)),
        (Freeze("qk", seed=np.int64(3)), Freeze("qk", seed=3)),
        (Edit("z", "noise", seed=torch.tensor(3)), Edit("z", "noise", seed=3)),
        (Edit("z", "scale", 2), Edit("z", "scale", 2.0)),
        (Edit("z", "noise", [0, 1]), Edit("z", "noise", (0.0, 1.0))),
        (Freeze("ov", to=torch.ones(1, 2, 3, 4)), Freeze("ov", to="activation", reference=torch.ones(1, 2, 3, 4))),
        (
            Freeze("ov", to="mean", reference=torch.ones(2, 4)),
            Freeze("ov", to="mean", reference={("*", "*"): torch.ones(2, 4)}),
        ),
        (Spec(Freeze("qk")), Spec([Freeze("qk")])),
    ],
    ids=str,
)
def test_different_ways_to_write_the_same(one: Any, other: Any) -> None:
    assert one == other
    assert hash(one) == hash(other)
    assert Spec(one).fingerprint() == Spec(other).fingerprint()


def test_a_captured_run_may_stand_for_itself() -> None:
    model, inputs = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].inputs()
    with torch.no_grad(), capture(model, "z") as run:
        model(**inputs)
    short, long = Freeze("ov", to=run), Freeze("ov", to="activation", reference=run)
    assert short == long == Freeze("ov", to=run.reference())
    assert torch.equal(short.reference.find("self.1", "z").value, run["self.1", "z"])


def test_cuts_cannot_be_changed() -> None:
    for cut in (Edit("z", "zero"), Freeze("qk")):
        with pytest.raises(SpecError, match=r"\.strength: found an assignment; expected a cut that stays as it was made"):
            cut.strength = 0.5
        assert cut.strength == 1.0
    spec = Spec(Freeze("qk"))
    with pytest.raises(AttributeError):
        spec.cuts = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.cuts[0] = Freeze("ov")  # type: ignore[index]
    assert spec == Spec(Freeze("qk"))


def test_defaults_are_those_of_the_documentation() -> None:
    freeze, edit = Freeze("qk"), Edit("z", "zero")
    assert (freeze.layers, freeze.heads, freeze.to, freeze.backward, freeze.strength) == ("all", "all", "zero", "stopgrad", 1.0)
    assert (freeze.positions, freeze.gqa, freeze.reference, freeze.seed) == (None, "isolated", None, 0)
    assert (edit.value, edit.layers, edit.heads, edit.backward, edit.strength) == (None, "all", "all", "natural", 1.0)
    assert (edit.positions, edit.gqa, edit.reference, edit.seed) == (None, "isolated", None, 0)


@pytest.mark.parametrize(
    ("freeze", "sites"),
    [
        (Freeze("qk"), ["rot_q"]),
        (Freeze("qk", to="mean"), ["rot_q", "rot_k"]),
        (Freeze("qk", to="identity"), ["rot_q", "rot_k"]),
        (Freeze("qk", gqa="shared"), ["rot_k"]),
        (Freeze("ov"), ["z"]),
        (Freeze("ov", to="noise"), ["z"]),
        (Freeze("ov", to="identity"), ["v"]),
        (Freeze("ov", gqa="shared"), ["v"]),
        (Freeze("both"), ["rot_q", "z"]),
        (Freeze("both", to="resample"), ["rot_q", "rot_k", "z"]),
    ],
    ids=str,
)
def test_the_sites_of_a_freeze(freeze: Freeze, sites: list[str]) -> None:
    assert [edit.site for edit in freeze.edits()] == sites
    assert {edit.action for edit in freeze.edits()} == {freeze.to}


# -- equality -----------------------------------------------------------------------------------------------------------

T = torch.arange(6.0).view(2, 3)
BASE: dict[str, Any] = {
    "site": "v", "action": "value", "value": T, "layers": [0], "heads": [1], "backward": "stopgrad", "strength": 0.5,
    "positions": [2], "gqa": "isolated", "seed": 1,
}  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {"site": "rot_k"},
    {"action": "add"},
    {"value": T + 1},
    {"value": T.view(3, 2)},
    {"value": T.double()},
    {"value": T.flatten()},
    {"value": 1.0},
    {"layers": "all"},
    {"layers": [0, 1]},
    {"layers": ["self.0"]},
    {"heads": "all"},
    {"heads": [2]},
    {"backward": "natural"},
    {"backward": "ste"},
    {"strength": 0.75},
    {"positions": None},
    {"positions": [2, 3]},
    {"gqa": "shared"},
    {"seed": 2},
    {"action": double, "value": None},
    {"action": "mean", "value": None, "reference": T},
    {"action": "mean", "value": None, "reference": T + 1},
    {"action": "mean", "value": None, "reference": {"self.0": T}},
    {"action": "mean", "value": None, "reference": Reference("mean", {("*", "*"): Entry(T)}, "another model")},
    {"action": "mean", "value": None, "reference": Reference("mean", {("*", "*"): Entry(T, T)})},
    {"action": "mean", "value": None, "reference": Reference("mean", {("*", "*"): Entry(T, None, (0, 1))})},
]


def test_everything_in_a_spec_counts_for_equality_and_fingerprint() -> None:
    cuts = [Edit(**BASE), *(Edit(**{**BASE, **change}) for change in CHANGES)]
    cuts += [Freeze("ov"), Freeze("qk"), Freeze("both"), Freeze("ov", to="mean")]
    fingerprints = [Spec(cut).fingerprint() for cut in cuts]
    assert len(set(fingerprints)) == len(cuts)
    for i, one in enumerate(cuts):
        for j, other in enumerate(cuts):
            assert (one == other) == (i == j)
            assert (Spec(one) == Spec(other)) == (i == j)
    assert Spec().fingerprint() == "", "a cache that no spec has marked"
    one, other = Freeze("ov"), Freeze("qk")
    assert Spec([one, other]) != Spec([other, one]), "order counts"
    assert Spec([one, other]).fingerprint() != Spec([other, one]).fingerprint()
    assert Spec([one, one]) != Spec([one])


def test_tensors_and_references_compare_by_content() -> None:
    for one, other in (
        (Edit("z", "value", T), Edit("z", "value", T.clone())),
        (Freeze("ov", to="mean", reference=T), Freeze("ov", to="mean", reference=T.clone())),
    ):
        assert one == other and hash(one) == hash(other) and len({one, other}) == 1
        assert Spec(one) == Spec(other) and hash(Spec(one)) == hash(Spec(other)) and len({Spec(one), Spec(other)}) == 1
    assert Edit("z", "zero") != Freeze("ov")
    assert (Edit("z", "zero") == 3) is False
    assert (Spec() == 3) is False
    assert Spec(Freeze("ov")) != Freeze("ov")


def test_callables_are_equal_to_themselves_only() -> None:
    assert Edit("z", double) == Edit("z", double)
    assert Edit("z", double) != Edit("z", lambda x: 2 * x)
    assert Edit("z", torch.relu) == Edit("z", torch.relu) != Edit("z", torch.sigmoid)
    assert Edit("z", Doubler().call) != Edit("z", Doubler().call)
    one = Doubler()
    assert Edit("z", one.call) == Edit("z", one.call)
    assert Edit("z", Unhashable()) != Edit("z", Unhashable())


class Doubler:
    def call(self, x: Tensor) -> Tensor:
        return 2 * x


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        return x


def test_a_callable_that_is_gone_lends_its_identity_to_no_other() -> None:
    """Python gives the address of a collected function to the next one; a cache's mark must not be taken over with it."""
    seen = {Spec(Edit("z", lambda x: x)).fingerprint() for _ in range(20)}
    assert len(seen) == 20


# -- text ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (Freeze("qk", [5, 6], [0, 1]), ["freeze qk to zero", "layers 5, 6", "heads 0, 1"]),
        (Freeze("ov", to="mean", strength=0.25), ["freeze ov to mean", "layers all", "heads all", "strength 0.25"]),
        (Freeze("ov", to="noise", seed=3, backward="ste"), ["noise", "seed 3", "backward ste"]),
        (Freeze("ov", to="mean", reference=T), ["of Reference(mean of"]),
        (Freeze("qk", gqa="shared", positions=[1, 2]), ["gqa shared", "positions 1, 2"]),
        (Edit("z", "scale", 2), ["z scale 2"]),
        (Edit("z", "noise", (0, 1)), ["z noise (0.0, 1.0)"]),
        (Edit("z", "add", T), ["z add tensor of shape (2, 3)"]),
        (Edit("z", double), ["z double"]),
        (Edit("pattern", "previous", layers="encoder.self.0"), ["pattern previous", "layers encoder.self.0"]),
    ],
    ids=str,
)
def test_str_says_what_is_cut(cut: Any, words: list[str]) -> None:
    for text in (str(cut), str(Spec(cut)), repr(Spec(cut))):
        assert all(word in text for word in words), text
        assert "\n" not in text


def test_str_leaves_defaults_out_and_repr_is_python() -> None:
    assert str(Freeze("qk")) == "freeze qk to zero (layers all, heads all)"
    assert repr(Freeze("qk", [1])) == "Freeze(circuit='qk', layers=(1,))"
    cut = Edit("z", "scale", 2, heads=[1], strength=0.5)
    assert eval(repr(cut)) == cut
    assert str(Spec()) == "(no cuts)" and repr(Spec()) == "Spec([])"
    assert str(Spec([Freeze("qk"), Freeze("ov")])).splitlines() == [
        "0. freeze qk to zero (layers all, heads all)",
        "1. freeze ov to zero (layers all, heads all)",
    ]


def test_json_is_short_and_names_tensors() -> None:
    assert json.loads(Spec(Freeze("qk")).to_json()) == {"version": 1, "cuts": [{"kind": "freeze", "circuit": "qk"}]}
    spec = Spec([Freeze("qk"), Edit("z", "value", T)])
    assert json.loads(spec.to_json())["cuts"][1] == {
        "kind": "edit", "site": "z", "action": "value", "value": {"tensor": "1.value"},
    }  # fmt: skip
    assert list(spec.tensors()) == ["1.value"]


# -- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(SpecError, match=rf"(?s)version {version!r}.*expected version 1.*Spec.save"):
        Spec.from_json(json.dumps({"version": version, "cuts": []}))


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"version": 1}', '{"version": 1, "cuts": 5}'])
def test_other_data_is_refused(text: str) -> None:
    for read in (Spec.from_json, Spec.from_yaml):
        with pytest.raises(SpecError, match="expected version 1 and a list of cuts"):
            read(text)


def test_text_that_is_no_json_or_yaml() -> None:
    with pytest.raises(SpecError, match=r"(?s)from_json.*not JSON.*expected JSON"):
        Spec.from_json("{")
    with pytest.raises(SpecError, match=r"(?s)from_yaml.*not YAML.*expected YAML"):
        Spec.from_yaml("{: [")


def test_reading_lists_every_cut_that_is_wrong() -> None:
    cuts = [
        {"kind": "freeze", "circuit": "qk"},
        {"kind": "freeze", "circuit": "vo"},
        {"kind": "melt"},
        {"circuit": "qk"},
        3,
        {"kind": "edit", "site": "z", "action": "value", "value": {"tensor": "5.value"}},
        {"kind": "freeze", "circuit": "ov", "to": "mean", "reference": {"reference": {"kind": "mean"}}},
        {"kind": "freeze", "circuit": "ov", "colour": "red"},
        {"kind": "edit", "site": "z", "action": {"callable": "os.system@1"}},
    ]
    with pytest.raises(SpecError) as caught:
        Spec.from_json(json.dumps({"version": 1, "cuts": cuts}))
    lines = str(caught.value).splitlines()
    assert lines[0] == "Spec: 8 problems"
    for line, number in zip(lines[1:], range(1, 9), strict=True):
        assert f"cut {number}" in line
    assert "'vo'" in lines[1] and "'edit', 'freeze'" in lines[2] and "'edit', 'freeze'" in lines[3]
    assert ".safetensors" in lines[5] and "Reference" in lines[6] and "colour" in lines[7] and "callable" in lines[8]


def test_a_spec_without_its_tensors_is_refused(tmp_path: Path) -> None:
    Spec([Edit("z", "value", T), Freeze("ov", to="mean", reference=T)]).save(tmp_path / "cuts.json")
    (tmp_path / "cuts.json.safetensors").unlink()
    with pytest.raises(SpecError, match=r"(?s)2 problems.*cut 0.*'0.value'.*cut 1.*beside its .safetensors"):
        Spec.load(tmp_path / "cuts.json")


def test_saving_shared_transposed_and_tracked_tensors(tmp_path: Path) -> None:
    base = torch.randn(3, 4, requires_grad=True)
    spec = Spec([Edit("z", "add", base), Edit("z", "add", base.t()), Edit("z", "add", base[1])])
    spec.save(tmp_path / "cuts.yaml")
    again = Spec.load(tmp_path / "cuts.yaml")
    assert again == spec and again.fingerprint() == spec.fingerprint()


@pytest.mark.parametrize("name", ["cuts", "cuts.txt", "cuts.safetensors"])
def test_files_are_json_or_yaml(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        SpecError, match=rf"Spec\.save: found '{name}'; expected a name ending in \.json, \.yaml or \.yml\. Rename"
    ):
        Spec(Freeze("qk")).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_callables_stay_in_the_process(tmp_path: Path) -> None:
    spec = Spec([Freeze("qk"), Edit("z", double)])
    for write in (spec.to_json, spec.to_yaml, lambda: spec.save(tmp_path / "cuts.json")):
        with pytest.raises(SpecError, match=r"callable double.*expected cuts that are data.*this process only"):
            write()
    assert not list(tmp_path.iterdir())
    assert spec.fingerprint() and spec == Spec([Freeze("qk"), Edit("z", double)])


# -- problems -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, str]] = [
    (lambda: Edit("zz", "zero"), r"site: found 'zz'; expected 'q', 'k', 'rot_q'.*'result'\. Did you mean 'z'\? Choose"),
    (lambda: Edit("z", "cut"), r"action: found 'cut'; expected 'zero', .* or a callable\. Choose"),
    (lambda: Edit("z", T), r"action: found tensor"),
    (lambda: Edit(["z"], "zero"), r"site: found \['z'\]; expected 'q'"),
    (lambda: Freeze("vo"), r"circuit: found 'vo'; expected 'qk', 'ov', 'both'\. Choose"),
    (lambda: Freeze("qk", to="one"), r"to: found 'one'; expected 'zero', 'mean', .*'resample'\. Choose"),
    (lambda: Freeze("qk", to=double), r"to: found <function double"),
    (lambda: Freeze("qk", to=None), r"to: found None"),
    (lambda: Freeze("qk", backward="natural"), r"backward: found 'natural'; expected 'stopgrad', 'ste'"),
    (lambda: Edit("z", "zero", backward="none"), r"backward: found 'none'; expected 'natural', 'stopgrad', 'ste'"),
    (lambda: Freeze("qk", gqa="joint"), r"gqa: found 'joint'; expected 'isolated', 'shared'"),
    (lambda: Freeze("qk", layers=[]), r"layers: found \[\]; expected 'all', or at least one layer number.*For example layers="),
    (lambda: Freeze("qk", layers=[-1]), r"layers: found \[-1\]"),
    (lambda: Freeze("qk", layers=[True]), r"layers: found \[True\]"),
    (lambda: Freeze("qk", layers=1.5), r"layers: found 1\.5"),
    (lambda: Freeze("qk", layers=None), r"layers: found None"),
    (lambda: Freeze("qk", heads=[]), r"heads: found \[\]; expected 'all', or at least one number from 0, each once\. For"),
    (lambda: Freeze("qk", heads=[0, 0]), r"heads: found \[0, 0\]"),
    (lambda: Freeze("qk", heads=[-1]), r"heads: found \[-1\]"),
    (lambda: Freeze("qk", heads="first"), r"heads: found 'first'"),
    (lambda: Freeze("qk", heads=[0.5]), r"heads: found \[0\.5\]"),
    (lambda: Freeze("qk", positions=[]), r"positions: found \[\]; expected None, or at least one number"),
    (lambda: Freeze("qk", positions=[-2]), r"positions: found \[-2\]"),
    (lambda: Freeze("qk", strength=1.5), r"strength: found 1\.5; expected a number from 0 to 1"),
    (lambda: Freeze("qk", strength=-0.1), r"strength: found -0\.1"),
    (lambda: Freeze("qk", strength=float("nan")), r"strength: found nan"),
    (lambda: Freeze("qk", strength="1"), r"strength: found '1'"),
    (lambda: Freeze("qk", strength=True), r"strength: found True"),
    (lambda: Freeze("qk", seed="x"), r"seed: found 'x'; expected a whole number"),
    (lambda: Freeze("qk", seed="3"), r"seed: found '3'; expected a whole number"),
    (lambda: Freeze("qk", seed=True), r"seed: found True; expected a whole number"),
    (lambda: Freeze("qk", seed=1.5), r"seed: found 1\.5; expected a whole number"),
    (lambda: Freeze("qk", colour="red"), r"colour: found 'red'; expected one of circuit, layers.*Remove it"),
    (lambda: Freeze(), r"circuit: found nothing; expected a value\. Pass circuit="),
    (lambda: Edit("z"), r"action: found nothing; expected a value\. Pass action="),
    (lambda: Edit("z", "zero", 1.0), r"value: found 1\.0; expected None with action 'zero'\. Remove it"),
    (lambda: Edit("z", double, 1.0), r"value: found 1\.0; expected None"),
    (lambda: Edit("z", "scale"), r"value: found None; expected a number or a tensor .*with action 'scale'\. Pass value"),
    (lambda: Edit("z", "add", [[1.0], 2]), r"value: found \[\[1\.0\], 2\]; expected a number or a tensor"),
    (lambda: Edit("z", "value", True), r"value: found True; expected a number or a tensor"),
    (lambda: Edit("z", "value", float("nan")), r"value: found nan; expected a finite number"),
    (lambda: Edit("z", "value", float("inf")), r"value: found inf; expected a finite number"),
    (lambda: Edit("z", "value", T / T), r"value: found NaN or infinite entries in the tensor; expected finite"),
    (lambda: Edit("z", "noise", 1.0), r"value: found 1\.0; expected None or \(mean, spread\) with spread >= 0"),
    (lambda: Edit("z", "noise", (0, -1)), r"value: found \(0, -1\); expected None or \(mean, spread\)"),
    (lambda: Edit("z", "noise", ("a", "b")), r"value: found \('a', 'b'\); expected None or \(mean, spread\)"),
    (lambda: Edit("z", "noise", (T, T)), r"value: found \(tensor"),
    (lambda: Edit("z", "previous"), r"action: found 'previous' at z; expected a template at pattern.*site=\"pattern\""),
    (lambda: Edit("z", "activation"), r"reference: found None; expected the run.*Pass reference=run"),
    (lambda: Freeze("ov", to="activation"), r"reference: found None; expected the run.*Pass reference=run"),
    (lambda: Edit("z", "zero", reference=T), r"reference: found a Tensor; expected None with action 'zero'"),
    (lambda: Freeze("qk", to="zero", reference=T), r"reference: found a Tensor; expected None with to='zero'"),
    (lambda: Freeze("ov", to="mean", reference=5), r"reference: found a int; expected a Reference, a captured run.*Collect"),
    (lambda: Freeze("ov", to="mean", reference={"self.0": [1.0]}), r"reference: found a dict; expected a Reference"),
    (lambda: Freeze("ov", to="mean", reference={0: T}), r"reference: found a dict; expected a Reference"),
    (lambda: Freeze("ov", to="mean", reference=T / T), r"reference\['\*', '\*'\]: found 1 values.*NaN.*finite"),
    (lambda: Freeze("ov", to="mean", reference=1 / T), r"reference.*found 1 values that are NaN or infinite"),
    (lambda: Freeze("ov", to="noise", reference=Reference("mean", {("*", "z"): Entry(T, T / T)})), r"'z'\]: found 1.*NaN"),
    (lambda: Freeze("ov", to="mean", reference=T[0]), r"shape \(3,\); expected \(head, d\) or \(head, position, d\)"),
    (lambda: Freeze("ov", to=T), r"shape \(2, 3\); expected \(batch, head, position, d\)"),
    (lambda: Freeze("ov", to=Reference("mean")), r"values of kind 'mean'; expected kind 'activation'"),
    (lambda: Freeze("ov", to="mean", reference=Reference("activation")), r"values of kind 'activation'; expected kind 'mean'"),
    (lambda: Freeze("ov", to=T[None, None], reference=T), r"a second one beside to="),
    (lambda: Spec([Freeze("qk"), 3, "x"]), r"Spec: found entries of type int, str; expected Freeze or Edit\. For example"),
    (lambda: Spec(3), r"Spec: found entries of type int; expected Freeze or Edit"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_each_problem_says_what_was_found_and_expected(number: int) -> None:
    make, pattern = WRONG[number]
    with pytest.raises(SpecError, match=rf"(?s){pattern}") as caught:
        make()
    assert "problems" not in str(caught.value), "one mistake, one problem"
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, ValueError)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        Edit("zz", "add", layers=[], heads=[0, 0], backward="x", strength=2, positions=[-1], gqa="x", reference=T, seed="a")  # type: ignore[arg-type]
    lines = str(caught.value).splitlines()
    assert lines[0] == "Edit: 10 problems"
    for name in ("site", "layers", "heads", "backward", "strength", "positions", "gqa", "seed", "value", "reference"):
        assert sum(line.lstrip(" 0123456789.").startswith(f"{name}: found") for line in lines) == 1, name
    with pytest.raises(SpecError) as caught:
        Freeze("x", heads=[], to="value", colour=1)
    assert str(caught.value).splitlines()[0] == "Freeze: 4 problems"


def test_too_many_or_repeated_arguments() -> None:
    with pytest.raises(TypeError, match=r"Edit\(\) takes site, action, .*given twice"):
        Edit("z", "zero", site="v")  # type: ignore[misc]
    with pytest.raises(TypeError, match="too many"):
        Freeze("qk", 1, 2, "zero", "ste", 1.0, None, "isolated", None, 0, 99)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Spec() + 3  # type: ignore[operator]


def test_a_cut_can_be_added_to_a_spec() -> None:
    assert Spec(Freeze("qk")) + Freeze("ov") == Spec([Freeze("qk"), Freeze("ov")])


# -- order --------------------------------------------------------------------------------------------------------------


def test_edits_at_one_site_act_in_the_order_of_the_spec() -> None:
    one, twice, three = Edit("z", "value", 1), Edit("z", "scale", 2), Edit("z", "add", 3)
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()

    def value_of_z(*cuts: Edit) -> float:
        with torch.no_grad(), patched(model, cuts), capture(model, "z", layers=[0]) as run:
            model(**inputs)
        [value] = run[0, "z"].unique().tolist()
        return value

    assert value_of_z(one, twice, three) == 5  # (1 * 2) + 3
    assert value_of_z(one, three, twice) == 8  # (1 + 3) * 2
    assert value_of_z(twice, three, one) == 1  # what replaces forgets what was before


def test_edits_at_different_sites_act_in_the_order_of_computation() -> None:
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    early, late = Edit("v", "value", 1), Edit("z", "scale", 2)
    for cuts in ((early, late), (late, early)):
        with torch.no_grad(), patched(model, cuts), capture(model, "z", layers=[0]) as run:
            model(**inputs)
        # Rows of the pattern sum to 1, so that v = 1 everywhere gives z = 1; rounding of that sum.
        assert torch.allclose(run[0, "z"], torch.tensor(2.0), atol=1e-5)


def test_help_shows_the_fields_as_arguments() -> None:
    shown = "(circuit, layers='all', heads='all', to='zero', backward='stopgrad', strength=1.0, positions=None, "
    assert str(inspect.signature(Freeze)) == shown + "gqa='isolated', reference=None, seed=0)"
    assert str(inspect.signature(Edit)).startswith("(site, action, value=None, layers='all'")


def test_two_specs_of_one_stem_do_not_share_a_file(tmp_path: Path) -> None:
    ones, zeros = (Spec(Edit("z", "add", make(3))) for make in (torch.ones, torch.zeros))
    reference = Reference("mean", {("self.0", "z"): Entry(torch.ones(2, 3))})
    reference.save(tmp_path / "a.safetensors")
    ones.save(tmp_path / "a.json")
    zeros.save(tmp_path / "a.yaml")
    assert Spec.load(tmp_path / "a.json") == ones and Spec.load(tmp_path / "a.yaml") == zeros
    assert Reference.load(tmp_path / "a.safetensors") == reference


@given(st.permutations(range(4)))
def test_rows_of_a_value_belong_to_the_heads_as_they_are_named(heads: list[int]) -> None:
    rows = torch.arange(12.0).view(4, 3)
    assert Edit("z", "add", rows[heads], heads=heads) == Edit("z", "add", rows, heads=[0, 1, 2, 3])
    matrix = torch.arange(16.0).view(4, 4)  # (query, key): no rows of heads
    assert torch.equal(Edit("scores", "add", matrix, heads=heads).value, matrix)


def test_gqa_is_of_sites_that_a_group_shares() -> None:
    for site in SITES:
        if site in GROUPED:
            assert Edit(site, "zero", gqa="shared").gqa == "shared"
        else:
            with pytest.raises(SpecError, match=rf"gqa: found 'shared'; expected 'isolated' at {site}"):
                Edit(site, "zero", gqa="shared")
