"""Exported folders: the same model again, the weights that plain transformers reads, and files that are never misread."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from surgery import Edit, Freeze, Spec, SpecError, capture, collect_reference, find_anatomy, patch_model, patched, unpatch_model
from surgery.errors import ExportError, PatchError
from surgery.export import document
from surgery.export.load import load_checkpoint, load_spec
from surgery.export.save import export_checkpoint, export_spec

TWO_STACKS = ("t5", "bart", "whisper")


def layer(name: str, number: int) -> Any:
    return f"decoder.self.{number}" if name in TWO_STACKS else number


def cuts(name: str, model: nn.Module) -> Spec:
    """Cuts of both circuits, with tensors in them."""
    d_value = find_anatomy(model)[layer(name, 0)].d_value
    steering = torch.randn(4, d_value, generator=torch.Generator().manual_seed(5))
    return Spec(
        [
            Freeze("qk", layers=[layer(name, 0)], heads=[1]),
            Edit("z", "add", value=steering, layers=[layer(name, 1)]),
            Edit("pattern", "previous", layers=[layer(name, 1)], heads=[2]),
            Freeze("ov", layers=[layer(name, 0)], heads=[3], to="noise", seed=3, strength=0.5),
        ]
    )


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return model.eval()(**FAMILIES[name].inputs()).logits


def plain_class(name: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[name].architecture)


CASES = [(name, i) for name in FAMILIES for i in ("eager", "sdpa") if i == "eager" or FAMILIES[name].sdpa]


# -- a checkpoint with its surgery -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_a_checkpoint_is_the_same_model_again(name: str, implementation: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build(implementation)
    uncut = logits(model, name)
    patch_model(model, cuts(name, model))
    expected = logits(model, name)
    assert not torch.equal(expected, uncut)
    export_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert torch.equal(logits(loaded, name), expected)
    assert loaded.config._attn_implementation == implementation
    plain = plain_class(name).from_pretrained(tmp_path / "out", attn_implementation=implementation)
    assert torch.equal(logits(plain, name), uncut)
    assert torch.equal(logits(unpatch_model(loaded), name), uncut)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_options_of_from_pretrained(dtype: torch.dtype, tmp_path: Path) -> None:
    model = FAMILIES["llama"].build("sdpa")
    patch_model(model, cuts("llama", model))
    export_checkpoint(model, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    loaded = load_checkpoint(tmp_path / "out", dtype=dtype, attn_implementation="eager")
    plain = plain_class("llama").from_pretrained(tmp_path / "out", dtype=dtype, attn_implementation="eager")
    expected = patch_model(plain, cuts("llama", model))
    assert loaded.dtype == dtype and torch.equal(logits(loaded, "llama"), logits(expected, "llama"))
    eager = load_checkpoint(tmp_path / "out", device_map="cpu")
    assert torch.equal(logits(eager, "llama"), logits(model, "llama"))


def test_references_and_runs_travel_along(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].build()
    given_ = FAMILIES["gpt2"].inputs()
    means = collect_reference(model, [given_], progress=False)
    with capture(model, ["z"]) as run:
        logits(model, "gpt2")
    spec = Spec([Freeze("ov", layers=[0], to="mean", reference=means), Freeze("ov", layers=[1], heads=[0, 2], to=run)])
    patch_model(model, spec)
    export_checkpoint(model, tmp_path / "out")
    assert load_spec(tmp_path / "out") == spec
    assert torch.equal(logits(load_checkpoint(tmp_path / "out"), "gpt2"), logits(model, "gpt2"))
    with safe_open(tmp_path / "out" / "surgery.safetensors", framework="pt") as file:  # safetensors' own reader
        assert len(list(file.keys())) == len(spec.tensors())


def test_kernel_and_tokenizer_travel_along(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    model = patch_model(FAMILIES["llama"].build("sdpa"), kernel="eager")
    export_checkpoint(model, tmp_path / "out", tokenizer=Tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "generation_config.json").exists()
    assert torch.equal(logits(load_checkpoint(tmp_path / "out"), "llama"), logits(model, "llama"))
    assert document.read(tmp_path / "out")[0].kernel == "eager"


# -- the surgery alone -------------------------------------------------------------------------------------------------------


def test_the_surgery_alone_fits_only_its_model(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    patch_model(model, cuts("llama", model))
    export_spec(model, tmp_path / "alone")
    assert sum(file.stat().st_size for file in (tmp_path / "alone").iterdir()) < 10_000
    twin = FAMILIES["llama"].build()
    patch_model(twin, load_spec(tmp_path / "alone", twin))
    assert torch.equal(logits(twin, "llama"), logits(model, "llama"))
    for other, found in (
        (FAMILIES["mistral"].build(), "found a 'mistral' model; expected 'llama'"),
        (FAMILIES["llama"].build(num_key_value_heads=4), "found LlamaAttention with 4 heads over 4 kv heads"),
        (FAMILIES["llama"].build(num_hidden_layers=3), "at self.2: found LlamaAttention"),
        (FAMILIES["llama"].build(hidden_size=64), "d_model 64; expected"),
    ):
        with pytest.raises(SpecError, match="the surgery does not fit the model") as caught:
            load_spec(tmp_path / "alone", other)
        assert found in str(caught.value)


def test_what_cannot_be_exported_is_said_before_anything_is_written(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].build()
    with pytest.raises(PatchError, match="it not patched"):
        export_checkpoint(model, tmp_path / "out")
    with pytest.raises(ExportError, match="found bake='yes'"):
        export_checkpoint(patch_model(model), tmp_path / "out", bake="yes")  # type: ignore[arg-type]
    patch_model(model, Edit("z", lambda z: z * 2))
    for write in (export_checkpoint, export_spec):
        with pytest.raises(SpecError, match="callable"):
            write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- the folder is there whole, or not at all --------------------------------------------------------------------------------


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(FAMILIES["gpt2"].build(), Freeze("qk", layers=[0]))
    export_checkpoint(model, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("surgery.export.document.write", "surgery.export.save.card", "surgery.export.document.save_file"):
        with monkeypatch.context() as change, pytest.raises(OSError, match="No space"):
            change.setattr(place, full)
            export_checkpoint(patch_model(model, Edit("z", "add", torch.ones(8))), tmp_path / "out")
        assert [file.name for file in tmp_path.iterdir()] == ["out"]
        assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    export_checkpoint(patch_model(model), tmp_path / "out")  # an earlier export is replaced whole
    assert not (tmp_path / "out" / "surgery.safetensors").exists() and len(load_spec(tmp_path / "out")) == 0


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    model = patch_model(FAMILIES["gpt2"].build())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, found in (("mine", "a folder of other files"), ("file", "a file")):
        with pytest.raises(ExportError, match=f"found {found}"):
            export_checkpoint(model, tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x" and len(list(tmp_path.iterdir())) == 2


# -- baked weights -----------------------------------------------------------------------------------------------------------

FOLDS = {
    "OV to zero": lambda d, at: Freeze("ov", layers=[at], heads=[0, 2]),
    "QK to zero": lambda d, at: Freeze("qk", layers=[at], heads=[1]),
    "both, half": lambda d, at: Freeze("both", layers=[at], heads=[3], strength=0.5),
    "z scaled by channel": lambda d, at: Edit("z", "scale", torch.rand(1, d), layers=[at], heads=[1]),
    "q and k scaled": lambda d, at: [
        Edit("q", "scale", 0.3, layers=[at], heads=[0]),
        Edit("rot_k", "scale", 1.5, layers=[at], heads=[1]),
    ],
    "v of a group to zero": lambda d, at: Edit("v", "zero", layers=[at], heads=[0, 1], gqa="shared"),
    "pattern halved": lambda d, at: Edit("pattern", "scale", 0.5, layers=[at], heads=[2]),
    "a head that is scaled twice": lambda d, at: [
        Edit("z", "scale", 2.0, layers=[at]),
        Edit("result", "scale", 0.25, layers=[at]),
    ],
}
"""Cuts that GPT-2 can say in its weights, by d_value and layer."""

CONSTANTS = {
    "q moved": lambda d, at: Edit("q", "add", 0.2, layers=[at], heads=[0]),
    "mean": lambda d, at: Edit("z", "value", torch.randn(2, d), layers=[at], heads=[1, 3]),
    "steering at z": lambda d, at: Edit("z", "add", torch.randn(d), layers=[at], heads=[0]),
    "steering of the result": lambda d, at: Edit("result", "add", 0.3, layers=[at], heads=[2]),
    "a value, then a scale": lambda d, at: [
        Edit("z", "value", 1.0, layers=[at], heads=[0]),
        Edit("result", "scale", 0.5, layers=[at]),
    ],
}
"""Cuts that need a bias."""


def run_plain(folder: Path, name: str, tmp_path: Path) -> Tensor:
    """The logits that a process without this package computes."""
    from safetensors.torch import load_file, save_file

    save_file(FAMILIES[name].inputs(), tmp_path / "in.safetensors")
    script = (
        "import sys, torch, transformers\nfrom safetensors.torch import load_file, save_file\n"
        f"model = transformers.{FAMILIES[name].architecture}.from_pretrained({str(folder)!r}).eval()\n"
        f"with torch.no_grad(): out = model(**load_file({str(tmp_path / 'in.safetensors')!r})).logits\n"
        f"save_file({{'out': out}}, {str(tmp_path / 'out.safetensors')!r})\nassert 'surgery' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return load_file(tmp_path / "out.safetensors")["out"]


def check_baked(model: Any, name: str, folder: Path, **options: Any) -> Any:
    """Exports baked, and compares what plain transformers loads with the patched model."""
    kept = FAMILIES[name].inputs()["attention_mask"].bool()
    done = export_checkpoint(model, folder, bake=True, example_inputs=FAMILIES[name].inputs(), verify=False, **options)
    plain = plain_class(name).from_pretrained(folder, attn_implementation=model.config._attn_implementation)
    found, expected = logits(plain, name)[kept], logits(model, name)[kept]
    # Folded weights are rounded once more, and sums are taken in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    return done


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "falcon_grouped", "deepseek_v3", "bert"])
@pytest.mark.parametrize("cut", FOLDS)
def test_plain_transformers_computes_baked_cuts(name: str, cut: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build("sdpa")
    uncut = logits(model, name)
    torch.manual_seed(0)
    patch_model(model, Spec(FOLDS[cut](find_anatomy(model)[1].d_value, 1)))
    done = check_baked(model, name, tmp_path / "out")
    assert done.folded and not done.kept
    assert not torch.allclose(logits(model, name), uncut, rtol=1e-3, atol=1e-4), "the cut must act, or this shows nothing"
    assert len(load_spec(tmp_path / "out")) == 0


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bert"])
@pytest.mark.parametrize("cut", CONSTANTS)
def test_constants_become_biases(name: str, cut: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build("sdpa")
    torch.manual_seed(0)
    patch_model(model, Spec(CONSTANTS[cut](find_anatomy(model)[1].d_value, 1)))
    check_baked(model, name, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("attention_bias", None) is (True if name == "llama" else None) or name != "llama"
    assert "o_proj.bias" not in "".join(model.state_dict()) or name != "llama", "the model itself stays as it was"


def test_a_mean_through_the_bias_of_v(tmp_path: Path) -> None:
    """Qwen 2 has biases at q, k and v but not at o: a constant z of a whole group comes from v, whose weights sum to one."""
    model = FAMILIES["qwen2"].build("sdpa")
    patch_model(model, Edit("z", "value", torch.full((1,), 0.7), layers=[0], heads=[0, 1]))
    done = check_baked(model, "qwen2", tmp_path / "out")
    assert done.folded
    patch_model(model, Edit("z", "value", torch.randn(2, 8), layers=[0], heads=[0, 1]))
    with pytest.raises(ExportError, match=r"o_proj.bias does not exist.*|query heads of a group"):
        check_baked(model, "qwen2", tmp_path / "no")
    assert not (tmp_path / "no").exists()


REFUSALS: dict[str, tuple[str, Any, str]] = {
    "positions": ("gpt2", Edit("z", "zero", positions=[1, 2]), "some positions only"),
    "noise": ("gpt2", Freeze("ov", to="noise"), "gives every token something else"),
    "resample": ("gpt2", Freeze("ov", to="resample"), "gives every token something else"),
    "the current mean": ("gpt2", Freeze("ov", to="mean"), "give a reference"),
    "a template": ("gpt2", Edit("pattern", "previous"), "depend on the position"),
    "values by position": ("gpt2", Edit("z", "value", torch.randn(4, 9, 8)), "depend on the position"),
    "a callable": ("gpt2", Edit("z", lambda z: z * 2), "a callable has no weights"),
    "a shift of one head of a group": ("qwen2", Edit("v", "add", 0.5, layers=[0], heads=[0]), "kv head has one weight"),
    "a shift behind positions": ("llama", Edit("rot_q", "add", 0.5, heads=[0]), "behind positions or norms"),
    "scores under a bias": ("bloom", Edit("scores", "scale", 0.5, heads=[0]), "change its output by"),
    "scores under a cap": ("gemma2", Edit("scores", "scale", 0.5, heads=[0]), "change its output by"),
    "q under a norm with a bias": ("phi", Freeze("qk", heads=[1]), "change its output by"),
    "one head under a norm of all": ("olmo2", Freeze("qk", heads=[1]), "change its output by"),
    "no bias to hold a constant": ("mistral", Edit("z", "add", torch.randn(16), heads=[1]), "does not exist, and no switch"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_change_of_weights_is_refused(case: str, tmp_path: Path) -> None:
    name, cut, reason = REFUSALS[case]
    model = patch_model(FAMILIES[name].build(), [cut, Freeze("ov", layers=[0], heads=[2])])
    before, expected = model.state_dict(), logits(model, name)
    with pytest.raises(ExportError, match=r"cannot be folded into weights|bake: found") as caught:
        export_checkpoint(model, tmp_path / "out", bake=True, example_inputs=FAMILIES[name].inputs())
    assert reason in str(caught.value) and "cut 0 (" in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model, name), expected)
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before)


def test_where_possible_keeps_the_rest(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build("sdpa")
    spec = [
        Freeze("both", layers="all", heads=[1]),
        Edit("pattern", "previous", layers=[0], heads=[2]),
        Edit("z", "scale", 0.5, heads=[1]),
    ]
    patch_model(model, spec)
    done = export_checkpoint(model, tmp_path / "out", bake="where_possible", example_inputs=FAMILIES["llama"].inputs())
    assert done.comparison is not None and done.comparison.by == "this package"
    assert [text.split(":")[0] for text in done.kept] == ["cut 1 (pattern previous (layers 0, heads 2)) at self.0 pattern"]
    assert load_spec(tmp_path / "out") == Spec(spec[1])
    loaded, kept = load_checkpoint(tmp_path / "out"), FAMILIES["llama"].inputs()["attention_mask"].bool()
    torch.testing.assert_close(logits(loaded, "llama")[kept], logits(model, "llama")[kept], rtol=1e-4, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "folded into the weights" in card and "not folded: cut 1" in card and "loaded by" in card


def test_the_written_folder_is_compared_in_a_process_without_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch_model(FAMILIES["gpt2"].build("sdpa"), Freeze("ov", layers=[0], heads=[1]))
    done = export_checkpoint(model, tmp_path / "out", bake=True, example_inputs=FAMILIES["gpt2"].inputs())
    assert done.comparison is not None and done.comparison.by == "plain transformers"
    assert done.comparison.changed == 0 and done.comparison.relative < 1e-5
    assert f"{done.comparison.difference:.3g}" in (tmp_path / "out" / "README.md").read_text()
    kept = FAMILIES["gpt2"].inputs()["attention_mask"].bool()
    found, expected = run_plain(tmp_path / "out", "gpt2", tmp_path), logits(model, "gpt2")
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)
    # A folder that computes something else is an error, and is not left behind.
    saved = type(model).save_pretrained
    with monkeypatch.context() as change:
        change.setattr(type(model), "save_pretrained", lambda self, folder, **options: saved(self, folder))
        with pytest.raises(ExportError, match="the written folder: found loaded by plain transformers: largest difference"):
            export_checkpoint(model, tmp_path / "no", bake=True, example_inputs=FAMILIES["gpt2"].inputs())
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss", "qwen3"])
def test_heads_without_effect_are_removed(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build("eager")
    patch_model(model, [Freeze("ov", layers=[0], heads=[2, 3]), Freeze("ov", layers=[1], heads=[0, 1])])
    check_baked(model, name, tmp_path / "out", shrink=True)
    loaded = load_checkpoint(tmp_path / "out")
    assert {(a.heads, a.kv_heads) for a in find_anatomy(loaded)} == {(2, 1)}
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "cut", "reason"),
    [
        ("gpt2", Freeze("ov", heads=[1]), "a config that cannot say 3 heads of width 8"),
        ("llama", Freeze("ov", layers=[0], heads=[0, 1]), "no group of heads without effect at self.1"),
        ("llama", Freeze("ov", heads=[0]), "no group of heads without effect at self.0, self.1"),
        ("olmo2", Freeze("ov", heads=[0, 1]), "q_norm.weight"),
    ],
)
def test_heads_that_cannot_be_removed(name: str, cut: Freeze, reason: str, tmp_path: Path) -> None:
    model = patch_model(FAMILIES[name].build(), cut)
    with pytest.raises(ExportError) as caught:
        export_checkpoint(model, tmp_path / "out", bake=True, shrink=True, example_inputs=FAMILIES[name].inputs())
    assert reason in str(caught.value) and not list(tmp_path.iterdir())


# -- files that are damaged, or were made to do harm ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spec]:
    folder = tmp_path_factory.mktemp("exported") / "out"
    model = FAMILIES["gpt2"].build()
    patch_model(model, cuts("gpt2", model))
    export_spec(model, folder)
    return folder, load_spec(folder)


def copied(folder: Path, text: bytes | None = None, tensors: bytes | None = None) -> Path:
    other = folder.parent / "mutated"
    other.mkdir(exist_ok=True)
    (other / "surgery.json").write_bytes((folder / "surgery.json").read_bytes() if text is None else text)
    (other / "surgery.safetensors").write_bytes((folder / "surgery.safetensors").read_bytes() if tensors is None else tensors)
    return other


def mutated(data: bytes, draw: Any) -> bytes:
    """Cut short, with bits flipped, bytes put in, parts exchanged or repeated."""
    start, stop = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
    way = draw(st.sampled_from(["truncate", "flip", "insert", "exchange", "repeat", "replace"]))
    if way == "truncate":
        return data[:start]
    if way == "flip":
        spot = min(start, len(data) - 1)
        return data[:spot] + bytes([data[spot] ^ (1 << draw(st.integers(0, 7)))]) + data[spot + 1 :]
    if way == "insert":
        return data[:start] + draw(st.binary(min_size=1, max_size=8)) + data[start:]
    if way == "exchange":
        middle = (start + stop) // 2
        return data[:start] + data[middle:stop] + data[start:middle] + data[stop:]
    if way == "repeat":
        return data[:stop] + data[start:]
    words = [b"null", b"1e999", b"-1", b"{}", b"[]", b'"../x"', b"true", b"NaN", b"9" * 5000, b"[" * 3000]
    return data[:start] + draw(st.sampled_from(words)) + data[stop:]


FUZZ = settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(("file", "argument"), [("surgery.json", "text"), ("surgery.safetensors", "tensors")])
@FUZZ
@given(data=st.data())
def test_mutated_files_are_the_same_spec_or_an_error(
    file: str, argument: str, exported: tuple[Path, Spec], data: st.DataObject
) -> None:
    folder, spec = exported
    other = copied(folder, **{argument: mutated((folder / file).read_bytes(), data.draw)})
    try:
        assert load_spec(other) == spec
    except ExportError as error:
        assert "expected" in str(error)


@FUZZ
@given(st.data())
def test_json_edited_by_someone_who_mends_the_hash(exported: tuple[Path, Spec], data: st.DataObject) -> None:
    """A value of the document is replaced and the hash made to fit: another spec may come of it, or our error; nothing else."""
    folder, _ = exported
    content = json.loads((folder / "surgery.json").read_text())
    content.pop("sha256")
    node, path = content, []
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        path.append(data.draw(st.sampled_from(keys)))
        if data.draw(st.integers(0, 3)) == 0:
            break
        node = node[path[-1]]
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    junk = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
        st.just([]),
        st.just({}),
    )
    parent[path[-1]] = data.draw(
        st.one_of(junk, st.sampled_from(["../../etc/passwd", "zero", "z", {"tensor": "../x"}, {"reference": {}}]))
    )
    content["sha256"] = document._digest(document._canonical(content))
    try:
        load_spec(copied(folder, text=json.dumps(content).encode()))
    except ExportError as error:
        assert "expected" in str(error) or "problems" in str(error)


def test_missing_files_are_named(exported: tuple[Path, Spec], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no such file; expected the surgery.json of an export"):
        load_spec(tmp_path)
    (tmp_path / "surgery.json").write_bytes((exported[0] / "surgery.json").read_bytes())
    with pytest.raises(ExportError, match=r"surgery.safetensors.*FileNotFoundError"):
        load_spec(tmp_path)


def test_no_code_of_the_folder_runs(tmp_path: Path) -> None:
    """A folder that names a class of its own is not loaded unless that is allowed; nor are pickled weights."""
    model = patch_model(FAMILIES["gpt2"].build(), Freeze("qk", layers=[0]))
    export_checkpoint(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    witness = tmp_path / "it-ran"
    (tmp_path / "out" / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    evil = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    for change in ({"auto_map": evil}, {"auto_map": evil, "model_type": "evil", "architectures": ["Model"]}):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**config, **change}))
        try:
            load_checkpoint(tmp_path / "out")
        except ExportError as error:
            assert "expected" in str(error)
        assert not witness.exists()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (tmp_path / "out" / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(ExportError, match="safetensors"):
        load_checkpoint(tmp_path / "out")


def test_what_is_written_holds_no_pickle(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    patch_model(model, cuts("llama", model))
    export_checkpoint(model, tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "surgery.json",
        "surgery.safetensors",
    ]
    with patched(model, Spec()):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
