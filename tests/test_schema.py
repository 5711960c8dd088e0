"""The JSON Schema of spec.yaml: it accepts all that is written, and rejects what an editor should mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from jsonschema import Draft202012Validator
from random_specs import specs

from surgery import Edit, Freeze, Reference, Spec, SpecError
from surgery.reference import Entry
from surgery.schema import spec_schema

SCHEMA = Draft202012Validator(spec_schema())


def file(**cut: Any) -> dict[str, Any]:
    return {"version": 1, "cuts": [cut]}


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(spec_schema())


@settings(max_examples=60, deadline=None)
@given(specs)
def test_every_spec_that_is_written_fits(spec: Spec) -> None:
    SCHEMA.validate(json.loads(spec.to_json()))
    SCHEMA.validate(yaml.safe_load(spec.to_yaml()))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"version": 2, "cuts": []},
        {"version": 1, "cuts": {}},
        {"version": 1, "cuts": [], "more": 1},
        file(circuit="qk"),
        file(kind="freeze"),
        file(kind="freeze", circuit="q"),
        file(kind="freeze", circuit="qk", layer=1),
        file(kind="freeze", circuit="qk", to="nothing"),
        file(kind="freeze", circuit="qk", site="z"),
        file(kind="freeze", circuit="qk", heads=[]),
        file(kind="freeze", circuit="qk", heads=[1, 1]),
        file(kind="freeze", circuit="qk", heads=[-1]),
        file(kind="freeze", circuit="qk", heads="some"),
        file(kind="freeze", circuit="qk", strength=1.5),
        file(kind="freeze", circuit="qk", positions="all"),
        file(kind="freeze", circuit="qk", reference="means.safetensors"),
        file(kind="freeze", circuit="qk", backward="natural"),
        file(kind="edit", site="z"),
        file(kind="edit", site="w", action="zero"),
        file(kind="edit", site="z", action="cut"),
        file(kind="edit", site="z", action="value", value="1"),
        file(kind="edit", site="z", action="zero", seed=1.5),
        file(kind="edit", site="z", action="add"),
        file(kind="edit", site="z", action="scale", value=None),
        file(kind="edit", site="z", action="activation"),
    ],
)
def test_what_an_editor_marks_is_an_error_too(data: Any) -> None:
    assert not SCHEMA.is_valid(data)
    with pytest.raises(SpecError):
        Spec.from_json(json.dumps(data))


def test_every_field_is_explained() -> None:
    for kind in spec_schema()["$defs"].values():
        for name, field in kind["properties"].items():
            assert len(field["description"]) > 10, name
    edit = spec_schema()["$defs"]["edit"]["properties"]
    assert "pattern templates" in edit["action"]["description"]
    assert edit["heads"]["description"] == spec_schema()["$defs"]["freeze"]["properties"]["heads"]["description"]


# Files by hand.


def test_a_file_by_hand_names_its_references(tmp_path: Path) -> None:
    means = Reference("mean", {("self.0", "z"): Entry(torch.randn(4, 16))})
    means.save(tmp_path / "means.safetensors")
    text = """
        version: 1
        cuts:
          - {kind: freeze, circuit: ov, layers: 0, to: mean, reference: {file: means.safetensors}}
          - {kind: edit, site: z, action: add, heads: [1], value: [1, 0.5, 0]}
          - {kind: edit, site: scores, action: scale, value: 2}
    """
    SCHEMA.validate(yaml.safe_load(text))
    (tmp_path / "cuts.yaml").write_text(text, encoding="utf-8")
    expected = [Freeze("ov", layers=[0], to="mean", reference=means), Edit("z", "add", torch.tensor([1, 0.5, 0]), heads=[1])]
    assert Spec.load(tmp_path / "cuts.yaml") == Spec([*expected, Edit("scores", "scale", 2.0)])
    # A text has no place where files are; what comes from elsewhere must not choose one.
    with pytest.raises(SpecError, match=r"the file 'means\.safetensors'.*without a place"):
        Spec.from_yaml(text)


def test_nested_lists_are_values_of_heads_in_their_order() -> None:
    rows = [[1.0, 2.0], [3.0, 4.0]]
    assert Edit("z", "value", rows, heads=[2, 0]) == Edit("z", "value", torch.tensor(rows), heads=[2, 0])
    assert Edit("z", "value", rows, heads=[2, 0]).value.tolist() == rows[::-1]
    for wrong in ([[1.0], [1.0, 2.0]], ["a"], [None], {"a": 1}):
        with pytest.raises(SpecError, match="expected a number or a tensor"):
            Edit("z", "value", wrong)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.yaml", None, "FileNotFoundError"),
        ("a.yaml", "version: 1\ncuts: [", "not YAML"),
        ("a.json", "{", "not JSON"),
        ("a.yaml", "", "found nothing; expected version 1"),
        ("a.yaml", "- kind: freeze", "found a list; expected version 1"),
        ("a.yaml", "version: 1\ncuts: [{kind: freze, circuit: qk}]", "Did you mean 'freeze'"),
        ("a.yaml", "version: 1\ncuts: [{kind: freeze, circuit: ov, to: mean, reference: a.st}]", r"in a file \{file: name\}"),
        ("a.yaml", "version: 1\ncuts: [{kind: freeze, circuit: ov, to: mean, reference: {fil: a}}]", r"expected \{file: means"),
        ("a.yaml", "cuts: []", "found version None; expected version 1"),
        ("a.yaml", "version: 1", "found no list of cuts"),
        ("a.yaml", "version: 1\ncuts: [{kind: freeze, circuit: qk, head: 1}]", "Did you mean 'heads'"),
        ("a.yaml", "version: 1\ncuts: [{kind: freeze, circuit: ov, to: mean, reference: {file: no.st}}]", "no.st"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        Spec.load(tmp_path / name)


def test_damaged_tensors_beside_a_spec_are_an_error(tmp_path: Path) -> None:
    Spec(Edit("z", "value", torch.ones(4))).save(tmp_path / "a.yaml")
    (tmp_path / "a.yaml.safetensors").write_bytes(b"abc")
    with pytest.raises(SpecError, match="Safetensor"):
        Spec.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="UnicodeDecodeError"):
        Spec.load(tmp_path / "b.yaml")
