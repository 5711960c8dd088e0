"""Exported programs: the patched model's numbers, with its cuts, under torch.export and onnxruntime, without this package."""

from __future__ import annotations

import copy
import json
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import CACHE
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import Dim
from transformers.cache_utils import DynamicCache

import surgery.export.onnx_file
import surgery.export.program
from surgery import (
    Edit,
    ExportError,
    Freeze,
    PatchError,
    capture,
    collect_reference,
    export_program,
    find_anatomy,
    patch_model,
    patched,
    unpatch_model,
)
from surgery.export.program import Program, require_no_pickle
from surgery.export.sizes import Sizes, other_inputs
from surgery.patch import session_of

TWO_STACKS = ("t5", "bart")
ROUNDING = 1e-5
"""Of the largest entry, under onnxruntime: its kernels add up in another order."""


def at(name: str) -> Any:
    return "decoder.self.1" if name in TWO_STACKS else 1


def captured(name: str, model: Any) -> Any:
    with capture(model, ["z"], layers=[at(name)]) as run, torch.no_grad():
        model(**FAMILIES[name].inputs(seed=7))
    return run


def means(name: str, model: Any, **options: Any) -> Any:
    return collect_reference(model, [FAMILIES[name].inputs(padding=0)], progress=False, **options)


def steering(name: str, model: Any) -> Tensor:
    return torch.randn(find_anatomy(model)[at(name)].d_value, generator=torch.Generator().manual_seed(5))


CUTS: dict[str, Callable[[str, Any], Any]] = {
    "QK to zero": lambda n, m: Freeze("qk", layers=[at(n)], heads=[1]),
    "OV to zero, half": lambda n, m: Freeze("ov", layers=[at(n)], heads=[1], strength=0.5),
    "mean of a reference": lambda n, m: Freeze("ov", layers=[at(n)], heads=[1], to="mean", reference=means(n, m)),
    "mean by position": lambda n, m: Freeze(
        "both", layers=[at(n)], heads=[1], to="mean", reference=means(n, m, per_position=True)
    ),
    "mean of now": lambda n, m: Freeze("ov", layers=[at(n)], heads=[1], to="mean"),
    "noise": lambda n, m: Freeze("both", layers=[at(n)], heads=[1], to="noise", seed=3),
    "positions": lambda n, m: Freeze("ov", layers=[at(n)], heads=[1, 2], positions=[2, 5]),
    "templates": lambda n, m: [
        Edit("pattern", action, layers=[at(n)], heads=[head])
        for head, action in enumerate(("uniform", "diagonal", "previous", "first"))
    ],
    "steering": lambda n, m: Edit("z", "add", steering(n, m), layers=[at(n)], heads=[0]),
    "resample": lambda n, m: Freeze("ov", layers=[at(n)], heads=[1], to="resample", seed=2),
    "another run": lambda n, m: Freeze("ov", layers=[at(n)], heads=[1], to=captured(n, m)),
    "straight through": lambda n, m: Freeze("both", layers=[at(n)], heads=[1], backward="ste"),
    "a whole group": lambda n, m: Edit("k", "scale", 0.5, layers=[at(n)], heads=[0, 1], gqa="shared"),
    "scores": lambda n, m: Edit("scores", "scale", 0.5, layers=[at(n)], heads=[0, 2]),
    "result": lambda n, m: Edit("result", "scale", 0.5, layers=[at(n)], heads=[0]),
    "a callable": lambda n, m: Edit("pattern", lambda pattern: pattern.flip(-1), layers=[at(n)], heads=[3]),
}
BOUND = ("mean by position", "another run")
"""Cuts that hold values for nine positions."""


def several(name: str, model: Any) -> list[Any]:
    return [CUTS[cut](name, model) for cut in ("QK to zero", "steering")] + [
        Edit("pattern", "previous", layers=[at(name)], heads=[2]),
        Freeze("ov", layers=[at(name)], heads=[3], to="noise", seed=3, strength=0.5),
    ]


def build(name: str, cuts: Any, implementation: str = "sdpa", kernel: Any = "auto") -> Any:
    model = FAMILIES[name].build(implementation)
    return patch_model(model, cuts(name, model), kernel=kernel)


def varying(name: str, longest: int = 40) -> dict[str, Any]:
    """Batch and lengths by name."""
    batch, length, decoded = Dim("batch", min=1, max=8), Dim("length", min=2, max=longest), Dim("decoded", min=2, max=longest)
    return {n: {0: batch, 1: decoded if "decoder" in n else length} for n in FAMILIES[name].inputs()}


def lengths(name: str, longest: int) -> dict[str, Any]:
    """The length alone: some cuts hold values for two rows."""
    length = Dim("length", min=2, max=longest)
    return {n: {1: length} for n in FAMILIES[name].inputs()}


def only_tensors(output: Any) -> dict[str, Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a cache, as programs are: keys that come out of one lie in memory otherwise, and a kernel may round otherwise."""
    return only_tensors(model(**inputs, **({} if model.config.model_type == "bert" else {"use_cache": False})))


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def loaded(path: Path) -> Any:
    """A program from a file, without gradients, with which some kernels round differently."""
    return torch.no_grad()(torch.export.load(path).module())


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {"logits"} <= expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name


# -- .pt2: the same numbers, bit for bit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "kernel"), [(cut, "auto") for cut in CUTS] + [(cut, "eager") for cut in ("QK to zero", "noise", "templates")]
)
def test_every_cut_is_in_the_program(cut: str, kernel: str, tmp_path: Path) -> None:
    model = build("llama", CUTS[cut], kernel=kernel)
    shapes = lengths("llama", 9 if cut in BOUND else 40)
    written = export_program(model, tmp_path / "cut.pt2", FAMILIES["llama"].inputs(), dynamic_shapes=shapes)
    comparisons = [written.comparison, *written.others.values()]
    # The same operations in the same order.
    assert [c.difference for c in comparisons] == [0] * (2 if cut in BOUND else 3)
    program = loaded(tmp_path / "cut.pt2")
    for length in (9, 4):
        given_ = FAMILIES["llama"].inputs(seed=1, length=length)
        expected = outputs(model, given_)
        require_equal(program(**given_), expected)
        with patched(model, []):
            assert not torch.equal(outputs(model, given_)["logits"], expected["logits"])
    unpatch_model(model)
    require_equal(program(**given_), expected)  # the cut is the program's own


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("gpt2", "sdpa"), ("bert", "sdpa"), ("t5", "eager"), ("bart", "sdpa"), ("mistral", "sdpa"), ("gptj", "eager")],
)
def test_families_at_any_size(name: str, implementation: str, tmp_path: Path) -> None:
    model = build(name, several, implementation)
    written = export_program(model, tmp_path / "it.pt2", FAMILIES[name].inputs(), dynamic_shapes=varying(name))
    assert len(written.others) == 2
    program = loaded(tmp_path / "it.pt2")
    for batch, length in ((1, 7), (3, 14)):
        given_ = FAMILIES[name].inputs(batch=batch, length=length, seed=2)
        expected, found = outputs(model, given_), program(**given_)["logits"]
        # Without padding a forward of sdpa does without the mask that the program has, in another kernel.
        assert torch.allclose(found, expected["logits"], atol=1e-5, rtol=1e-5)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    site=st.sampled_from(["q", "rot_q", "k", "rot_k", "v", "scores", "pattern", "z", "result"]),
    factor=st.floats(-2, 2, width=16),
    heads=st.sets(st.integers(0, 3), min_size=1),
    layers=st.sets(st.integers(0, 1), min_size=1),
    positions=st.none() | st.sets(st.integers(0, 8), min_size=1),
    batch=st.integers(2, 3),
)
def test_any_cut_in_any_place(
    tmp_path: Path, site: str, factor: float, heads: set[int], layers: set[int], positions: set[int] | None, batch: int
) -> None:
    if site in ("k", "v"):  # whole groups of two
        heads = {head ^ other for head in heads for other in (0, 1)}
    gqa: Any = "shared" if site in ("k", "v") else "isolated"
    where = {"layers": sorted(layers), "heads": sorted(heads), "positions": positions and sorted(positions)}
    edit = Edit(site, "scale", factor, gqa=gqa, **where)
    model, given_ = build("llama", lambda n, m: edit), FAMILIES["llama"].inputs(batch=batch)
    export_program(model, tmp_path / "cut.pt2", given_)
    require_equal(loaded(tmp_path / "cut.pt2")(**given_), outputs(model, given_))


def test_half_precision_and_a_mask_of_all_pairs(tmp_path: Path) -> None:
    model = build("llama", several).to(torch.bfloat16)
    ids = FAMILIES["llama"].inputs()["input_ids"]
    mask = torch.full((9, 9), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1).expand(2, 1, 9, 9)
    given_ = {"input_ids": ids, "attention_mask": mask}
    assert export_program(model, tmp_path / "it.pt2", given_).comparison.difference == 0
    require_equal(loaded(tmp_path / "it.pt2")(**given_), outputs(model, given_))


def test_plain_values_are_fixed_and_lists_have_numbers(tmp_path: Path) -> None:
    model = build("gpt2", several)
    given_ = {**FAMILIES["gpt2"].inputs(), "output_hidden_states": True}
    export_program(model, tmp_path / "it.pt2", given_)
    found = loaded(tmp_path / "it.pt2")(**FAMILIES["gpt2"].inputs())
    with torch.no_grad():
        expected = model(**given_, use_cache=False)
    assert set(found) == {"logits", "hidden_states.0", "hidden_states.1", "hidden_states.2"}
    assert all(torch.equal(found[f"hidden_states.{i}"], tensor) for i, tensor in enumerate(expected.hidden_states))


def test_random_tokens_by_default_and_what_is_printed(tmp_path: Path) -> None:
    written = export_program(build("llama", several), tmp_path / "new" / "it.pt2")
    assert isinstance(written, Program) and written.sizes.symbols == []
    assert str(written) == repr(written) == "\n".join(
        [
            f"exported to {tmp_path / 'new' / 'it.pt2'}",
            "  takes input_ids (2, 16)",
            "  loaded by torch.export: largest difference 0 (0.0e+00 of the largest); 0 of 32 predicted tokens differ",
        ]
    )  # fmt: skip


def test_sizes_are_said_and_all_may_vary(tmp_path: Path) -> None:
    written = export_program(build("gpt2", several), tmp_path / "it.pt2", FAMILIES["gpt2"].inputs(), dynamic_shapes=True)
    batch, length = written.sizes.symbols
    assert f"takes input_ids ({batch}, {length}), attention_mask ({batch}, {length})" in str(written)
    assert "  at input_ids (5, 12), attention_mask (5, 12): loaded by torch.export: largest difference 0 " in str(written)


# -- what a .pt2 needs, and what is in it -------------------------------------------------------------------------------------

FRESH = """
import sys
import torch
from safetensors.torch import load_file, save_file
program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    found = program(**load_file(sys.argv[2]))
save_file(dict(found), sys.argv[3])
assert not {"surgery", "patches", "transformers"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_runs_in_a_process_with_torch_alone(name: str, tmp_path: Path) -> None:
    cuts = lambda n, m: [*several(n, m), Freeze("ov", layers=[at(n)], heads=[1], to=captured(n, m))]  # noqa: E731
    model, given_ = build(name, cuts), FAMILIES[name].inputs(seed=1)
    export_program(model, tmp_path / "it.pt2", FAMILIES[name].inputs())
    save_file(given_, tmp_path / "in.safetensors")
    files = [str(tmp_path / file) for file in ("it.pt2", "in.safetensors", "out.safetensors")]
    subprocess.run([sys.executable, "-I", "-c", FRESH, *files], check=True, cwd=tmp_path)
    require_equal(load_file(tmp_path / "out.safetensors"), {"logits": outputs(model, given_)["logits"]})


def pickles(path: Path) -> list[str]:
    """Entries that can be read as a pickle, or as a zip with one in it."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            data = archive.read(entry)
            try:
                is_pickle = bool([*pickletools.genops(data)])
            except Exception:
                is_pickle = False
            if (is_pickle and len(data) > 2) or data[:2] == b"PK":
                found.append(entry.filename)
    return found


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(torch, "load", fail)
    model = build("llama", lambda n, m: [*several(n, m), CUTS["another run"](n, m)])
    export_program(model, tmp_path / "it.pt2", FAMILIES["llama"].inputs(), dynamic_shapes=lengths("llama", 9))
    assert pickles(tmp_path / "it.pt2") == []
    with zipfile.ZipFile(tmp_path / "it.pt2") as archive:
        graph = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("models/model.json"))
    assert str(Path(surgery.__file__).parent) not in graph and ".py" not in graph  # nor paths of this machine
    json.loads(graph)


def test_a_pickle_is_found(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    program = torch.export.export(Two(), (torch.ones(2),))
    torch.export.save(program, tmp_path / "example.pt2")
    assert pickles(tmp_path / "example.pt2") != []
    with pytest.raises(ExportError, match="sample_inputs"):
        require_no_pickle(tmp_path / "example.pt2")
    with zipfile.ZipFile(tmp_path / "weights.pt2", "w") as archive:
        archive.writestr(
            "it/data/weights/model_weights_config.json", json.dumps({"config": {"q.weight": {"use_pickle": True}}})
        )
    with pytest.raises(ExportError, match=r"found pickles, of q\.weight; expected tensors"):
        require_no_pickle(tmp_path / "weights.pt2")


# -- ONNX ---------------------------------------------------------------------------------------------------------------------


def onnx_outputs(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    found = session.run(names, {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def is_close(found: Tensor, expected: Tensor, rows: Tensor) -> bool:
    gap = (found - expected)[rows].abs().max()
    return bool(gap <= ROUNDING * expected[rows].abs().max())


@pytest.mark.parametrize(
    "cut", ["QK to zero", "mean of a reference", "noise", "positions", "templates", "steering", "resample", "another run"]
)
def test_cuts_are_in_the_onnx_file(cut: str, tmp_path: Path) -> None:
    model = build("llama", CUTS[cut])
    written = export_program(model, tmp_path / "cut.onnx", FAMILIES["llama"].inputs())
    assert written.comparison.by == "onnxruntime" and written.comparison.changed == 0
    assert [file.name for file in tmp_path.iterdir()] == ["cut.onnx"]
    given_ = FAMILIES["llama"].inputs(seed=1)
    rows, expected = given_["attention_mask"].bool(), outputs(model, given_)["logits"]
    found = onnx_outputs(tmp_path / "cut.onnx", given_)["logits"]
    assert is_close(found, expected, rows)
    with patched(model, []):
        assert not is_close(found, outputs(model, given_)["logits"], rows)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_families_in_onnx_at_any_size(name: str, tmp_path: Path) -> None:
    model = build(name, several)
    written = export_program(model, tmp_path / "it.onnx", FAMILIES[name].inputs(), dynamic_shapes=varying(name))
    assert len(written.others) == 2
    for batch, length in ((1, 7), (3, 14)):
        given_ = FAMILIES[name].inputs(batch=batch, length=length, padding=0, seed=2)
        expected = outputs(model, given_)["logits"]
        assert is_close(onnx_outputs(tmp_path / "it.onnx", given_)["logits"], expected, torch.ones(expected.shape[:2]).bool())


def test_onnx_needs_its_packages_and_a_file_that_is_small_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2", several)
    with (
        monkeypatch.context() as change,
        pytest.raises(ExportError, match=r"found [\d,]+ bytes of weights; expected at"),
    ):
        change.setattr(surgery.export.onnx_file, "LARGEST", 1000)
        export_program(model, tmp_path / "it.onnx")
    for package in ("onnxscript", "onnxruntime", "transformers.exporters"):
        with monkeypatch.context() as change, pytest.raises(ExportError, match=r"pip install .*\[onnx\]"):
            change.setitem(sys.modules, package, None)
            export_program(model, tmp_path / "it.onnx")
    assert not list(tmp_path.iterdir())


# -- a program that is not the model is refused -------------------------------------------------------------------------------


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Exporters that see the model without its cuts."""
    export = torch.export.export

    def change(model: Any) -> None:
        def uncut(*args: Any, **kwargs: Any) -> Any:
            with patched(model, []):
                return export(*args, **kwargs)

        monkeypatch.setattr(torch.export, "export", uncut)

    yield change


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_an_export_that_lost_a_cut_is_refused(suffix: str, losing: Callable[[Any], None], tmp_path: Path) -> None:
    model = build("llama", CUTS["QK to zero"])
    (tmp_path / f"it.{suffix}").write_text("earlier")
    losing(model)
    with pytest.raises(ExportError, match=r"logits of the written program: found loaded by .*; expected at most 0\.0001 of"):
        export_program(model, tmp_path / f"it.{suffix}", FAMILIES["llama"].inputs())
    assert [file.read_text() for file in tmp_path.iterdir()] == ["earlier"]


def test_a_size_taken_from_the_example_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = surgery.export.program._write_pt2

    def baked(*args: Any) -> Any:
        sizes, run = write(*args)
        return sizes, lambda inputs: {"logits": run(inputs)["logits"] * 9 / inputs["input_ids"].shape[1]}

    monkeypatch.setattr(surgery.export.program, "_write_pt2", baked)
    model, given_ = build("gpt2", several), FAMILIES["gpt2"].inputs()
    export_program(model, tmp_path / "it.pt2", given_)  # at this size alone they agree
    with pytest.raises(ExportError, match=r"logits of the written program at input_ids \(1, 8\), .*: found loaded by"):
        export_program(model, tmp_path / "it.pt2", given_, dynamic_shapes=varying("gpt2"))


@pytest.mark.parametrize("change", ["shape", "missing", "raises", "nan"])
def test_a_program_that_does_something_else_is_refused(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = surgery.export.program._write_pt2

    def broken(*args: Any) -> Any:
        sizes, run = write(*args)

        def other(inputs: Any) -> dict[str, Tensor]:
            logits = run(inputs)["logits"]
            if change == "raises":
                raise RuntimeError("no such kernel")
            return {"missing": {}, "shape": {"logits": logits[:1]}, "nan": {"logits": logits * torch.nan}}[change]

        return sizes, other

    monkeypatch.setattr(surgery.export.program, "_write_pt2", broken)
    with pytest.raises(ExportError, match=r"(logits of|^)( ?)the written program: found"):
        export_program(build("gpt2", several), tmp_path / "it.pt2")
    assert not list(tmp_path.iterdir())


# -- the model stays as it was, and so does the file --------------------------------------------------------------------------


def state(model: Any) -> Any:
    """What an exporter might change: classes, attributes, the config, flags, random numbers."""
    parts = [(name, type(part), part.training, sorted(part.__dict__)) for name, part in model.named_modules()]
    return parts, copy.deepcopy(model.config.to_dict()), model.config._attn_implementation, torch.get_rng_state().tolist()


@pytest.mark.parametrize(("name", "suffix"), [("llama", "pt2"), ("llama", "onnx"), ("t5", "pt2")])
def test_the_model_is_as_it_was(name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given_ = build(name, several), FAMILIES[name].inputs()
    expected = outputs(model, given_)
    model.train()
    model.get_input_embeddings().training = False  # set by hand
    before, session = state(model), session_of(model)
    export_program(model, tmp_path / f"it.{suffix}", given_)
    written = (tmp_path / f"it.{suffix}").read_bytes()
    assert state(model) == before and session_of(model) is session

    saving = "torch.export.save" if suffix == "pt2" else "onnx_ir.save"
    for place in (saving, "torch.export.export", "surgery.export.program.measured"):
        with monkeypatch.context() as change, pytest.raises((ExportError, OSError), match="No space left on device"):
            change.setattr(place, fail)
            export_program(model, tmp_path / f"it.{suffix}", given_)
        assert state(model) == before and session_of(model) is session
        assert [file.name for file in tmp_path.iterdir()] == [f"it.{suffix}"]
        assert (tmp_path / f"it.{suffix}").read_bytes() == written
    require_equal(outputs(model.eval(), given_), expected)
    copy.deepcopy(model)


# -- errors -------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    model, given_ = build("gpt2", several), FAMILIES["gpt2"].inputs()
    with torch.no_grad():
        cache = model(**given_, **{CACHE: DynamicCache()})[CACHE]
    (tmp_path / "folder.pt2").mkdir()
    for file, inputs, shapes, message in (
        ("it.bin", given_, None, r"found format=None for 'it.bin'; expected a .pt2 or .onnx file"),
        ("folder.pt2", given_, None, "found a folder; expected no file or an earlier one"),
        ("it.pt2", {**given_, CACHE: cache}, None, rf"{CACHE} \(a DynamicCache\); expected tensors"),
        ("it.pt2", {}, None, "expected tensors by name"),
        ("it.pt2", given_, {"input_id": {1: Dim.AUTO}}, "found 'input_id'; expected names of .* Did you mean 'input_ids'"),
        ("it.pt2", given_, [None], "found a list; expected a dictionary"),
        ("it.pt2", given_, {"input_ids": {1: Dim.STATIC}}, "found that all sizes are fixed: input_ids"),
    ):
        with pytest.raises(ExportError, match=message):
            export_program(model, tmp_path / file, inputs, dynamic_shapes=shapes)
    with pytest.raises(PatchError, match="it not patched"):
        export_program(unpatch_model(model), tmp_path / "it.pt2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.pt2"]


def test_sizes_that_the_cut_or_the_model_does_not_take(tmp_path: Path) -> None:
    given_ = FAMILIES["llama"].inputs()
    by_position = build("llama", CUTS["mean by position"])
    with pytest.raises(ExportError, match=r"\(5, 12\), where the model itself raises SpecError: .* values for 9 positions"):
        export_program(by_position, tmp_path / "it.pt2", given_, dynamic_shapes=varying("llama"))
    one_row = build("llama", CUTS["resample"])
    with pytest.raises(ExportError, match=r"\(1, 8\), where the model itself raises SpecError: .* at least 2 rows"):
        export_program(one_row, tmp_path / "it.pt2", given_, dynamic_shapes=varying("llama"))
    depends = build("llama", lambda n, m: Edit("z", lambda z: z * 2 if z.sum() > 0 else z, layers=[1], heads=[0]))
    with pytest.raises(ExportError, match=r"export_program: found .*; expected a model that can be exported\. See"):
        export_program(depends, tmp_path / "it.pt2", given_)
    fixed = build("llama", CUTS["another run"])
    with pytest.raises(ExportError, match=r"You marked batch as dynamic but your code specialized it"):
        export_program(fixed, tmp_path / "it.pt2", given_, dynamic_shapes=varying("llama"))
    assert not list(tmp_path.iterdir())


# -- inputs of other sizes ----------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 9),
    low=st.integers(0, 3),
    more=st.integers(0, 20),
)
def test_other_sizes_are_in_range_and_agree(batch: int, length: int, low: int, more: int) -> None:
    tensors = {
        "ids": torch.arange(batch * length).view(batch, length),
        "mask": torch.ones(batch, 1, length, 2 * length),
        "fixed": torch.zeros(3),
    }
    high = max(low, length) + more
    shapes: dict[str, tuple[int | str, ...]] = {"ids": ("s1", "s2"), "mask": ("s1", 1, "s2", "2*s2"), "fixed": (3,)}
    sizes = Sizes(shapes, {"s2": (min(low, length), high), "s1": (0, 1 << 30)})
    found = list(other_inputs(tensors, sizes))
    assert len({tuple(entry["ids"].shape) for entry in found} | {(batch, length)}) == len(found) + 1
    assert any(entry["ids"].shape[1] > length for entry in found) == (high > length)
    for entry in found:
        rows, columns = entry["ids"].shape
        assert entry["mask"].shape == (rows, 1, columns, 2 * columns) and entry["fixed"].shape == (3,)
        assert max(low if low <= length else length, 1) <= columns <= high
        assert set(entry["ids"].unique().tolist()) <= set(range(batch * length))
        assert entry["ids"][-1, -1] == tensors["ids"][-1, -1]


def test_without_sizes_that_vary_there_are_no_others() -> None:
    assert list(other_inputs({"ids": torch.ones(2, 3)}, Sizes({"ids": (2, 3)}, {}))) == []
