"""The commands on exported models: what they write and say, exit codes, completion."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import FAMILIES
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification, ViTImageProcessor
from typer.testing import CliRunner
from worded import write_task, write_worded

from surgery import Edit, Freeze, Spec, SurgeryError, collect_reference, load_checkpoint, patch_model
from surgery.cli import app
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.schema import spec_schema

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CUTS = Spec([Freeze("qk", layers=[1], heads=[3]), Freeze("ov", layers=[0], heads=[1])])
NOISE = Spec([Freeze("ov", layers=[1], heads=[0]), Freeze("ov", layers=[0], to="noise")])
PROMPT = "w1 w5 w6 w7 w8 w5 w6"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: the demo model with a tokenizer of whole words; specs, means; cut/, baked/, both/: its exports."""
    folder = tmp_path_factory.mktemp("commands")
    model = load_model()
    write_worded(folder / "model")
    CUTS.save(folder / "cuts.yaml")
    NOISE.save(folder / "noise.json")
    Spec().save(folder / "none.yaml")
    collect_reference(model, [repeated_sequences(8, 20, 64, 1)], progress=False).save(folder / "means.safetensors")
    good("patch", folder / "model", "--spec", folder / "cuts.yaml", "--out", folder / "cut")
    good("patch", folder / "model", "--spec", folder / "cuts.yaml", "--out", folder / "baked", "--bake")
    return folder


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def good(*arguments: Any) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


def data(*arguments: Any) -> Any:
    result = invoke(*arguments, "--json")
    return json.loads(result.stdout)


# patch


def test_patch_writes_what_the_spec_says(folder: Path) -> None:
    tokens = repeated_sequences(2, 20, 64, 5)
    with torch.no_grad():
        expected = patch_model(load_model(), CUTS)(tokens).logits
        again = load_checkpoint(folder / "cut")
        assert torch.equal(again(tokens).logits, expected)
        baked = AutoModelForCausalLM.from_pretrained(folder / "baked")
        # A folded weight is rounded once more, and sums run in another order.
        torch.testing.assert_close(baked(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert (folder / "cut/tokenizer.json").is_file() and (folder / "baked/tokenizer.json").is_file()


def test_patch_reports_what_is_folded_and_what_stays(folder: Path, tmp_path: Path) -> None:
    out = ("--spec", folder / "noise.json", "--out", tmp_path / "both")
    result = invoke("patch", folder / "model", *out, "--bake")
    assert result.exit_code == 1 and "'noise' gives every token something else" in result.stderr
    assert not (tmp_path / "both").exists()
    found = data("patch", folder / "model", *out, "--bake", "--where-possible")
    assert len(found["folded"]) == 1 and len(found["kept"]) == 1 and found["comparison"]["changed"] == 0
    assert "'noise' gives every token something else" in found["kept"][0]
    assert load_checkpoint(tmp_path / "both").config.architectures == ["LlamaForCausalLM"]
    text = good("patch", folder / "model", *out, "--no-verify")
    assert "exported to" in text and data("inspect", tmp_path / "both")["cuts"][1].startswith("freeze ov to noise")


def test_patch_takes_inputs_from_a_file(folder: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.safetensors"
    save_file({"input_ids": repeated_sequences(3, 20, 64, 5)}, inputs)
    arguments = ("--spec", folder / "cuts.yaml", "--out", tmp_path / "out", "--bake", "--inputs", inputs)
    assert data("patch", folder / "model", *arguments)["comparison"]["positions"] == 3 * 41
    inputs.write_bytes(b"no")
    result = invoke("patch", folder / "model", *arguments)
    assert result.exit_code == 1 and "expected a .safetensors file" in result.stderr


# inspect, verify


def test_inspect_shows_the_surgery_of_a_folder(folder: Path) -> None:
    assert "cut by load_checkpoint: freeze qk to zero (layers 1, heads 3)" in good("inspect", folder / "cut")
    assert "in the weights: cut 0 (freeze qk to zero (layers 1, heads 3)) at self.1 rot_q" in good("inspect", folder / "baked")
    assert data("inspect", folder / "model")["cuts"] == data("inspect", folder / "baked")["cuts"] == []


def test_verify_measures_the_cuts_against_the_original(folder: Path) -> None:
    found = data("verify", folder / "cut", "--original", folder / "model")
    rows = {row["compared"]: row for row in found["rows"]}
    assert [row["must_equal"] for row in rows.values()] == [True, False, True, False] and found["problems"] == []
    assert rows["patched without cuts, beside plain transformers"]["difference"] == 0
    assert rows["without the cuts, beside the original"]["difference"] == 0 and found["changed_weights"] == []
    model, ids = load_model(), torch.randint(5, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = model(ids).logits, patch_model(model, CUTS)(ids).logits
    effect = rows["with the cuts, beside without them"]
    assert effect["difference"] == pytest.approx((before - after).abs().max().item(), rel=1e-6)
    assert effect["changed"] == (before.argmax(-1) != after.argmax(-1)).sum() > 0
    assert rows["with all cuts, beside the original"]["difference"] == effect["difference"]
    assert "0 (equal)" in good("verify", folder / "cut")


def test_verify_of_baked_weights_names_them(folder: Path) -> None:
    found = data("verify", folder / "baked", "--original", folder / "model")
    expected = {"model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"}
    assert set(found["changed_weights"]) == expected and len(found["baked"]) == 2 and found["cuts"] == []
    assert found["rows"][-1]["changed"] > 0 and len(found["rows"]) == 2
    assert "weights that are not the original's: 2 " in good("verify", folder / "baked", "--original", folder / "model")


def test_verify_finds_another_original(folder: Path, tmp_path: Path) -> None:
    other = load_model()
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path)
    result = invoke("verify", folder / "cut", "--original", tmp_path)
    assert result.exit_code == 1 and "they must be equal, and differ by" in result.stderr
    assert "1 weights are not the original's" in " ".join(result.stderr.split())
    FAMILIES["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    assert len(data("verify", folder / "cut", "--original", tmp_path / "gpt2")["problems"]) == 3


def test_verify_says_when_cuts_do_nothing(folder: Path, tmp_path: Path) -> None:
    Spec(Edit("z", "zero", positions=[50])).save(tmp_path / "late.yaml")
    good("patch", folder / "model", "--spec", tmp_path / "late.yaml", "--out", tmp_path / "late")
    assert "change nothing on these inputs" in good("verify", tmp_path / "late")
    save_file({"input_ids": repeated_sequences(1, 29, 64, 5)}, tmp_path / "long.safetensors")
    assert "nothing" not in good("verify", tmp_path / "late", "--inputs", tmp_path / "long.safetensors")


def test_a_folder_with_cuts_is_not_cut_again_without_a_word(folder: Path, tmp_path: Path) -> None:
    for arguments in (
        ("patch", folder / "cut", "--spec", folder / "cuts.yaml", "--out", tmp_path / "out"),
        ("verify", folder / "cut", "--original", folder / "cut"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1 and "an export with 2 cuts of its own" in " ".join(result.stderr.split())
    good("patch", folder / "baked", "--spec", folder / "noise.json", "--out", tmp_path / "out")


def test_verify_rejects_a_file_that_was_changed(folder: Path, tmp_path: Path) -> None:
    good("patch", folder / "model", "--spec", folder / "cuts.yaml", "--out", tmp_path / "cut")
    path = tmp_path / "cut/surgery.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"qk"', '"ov"'), encoding="utf-8")
    result = invoke("verify", tmp_path / "cut")
    assert result.exit_code == 1 and "damaged, or edited by hand" in result.stderr and result.stdout == ""


# generate


def test_generate_goes_on_with_and_without_the_cuts(folder: Path) -> None:
    found = data("generate", folder / "cut", "--prompt", PROMPT, "--new-tokens", 6)
    ids = torch.tensor([[1, 5, 6, 7, 8, 5, 6]])
    assert found["prompt"] == ids[0].tolist()
    with torch.no_grad():
        model = load_model()
        without = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 7:].tolist()
        cut = patch_model(model, CUTS).generate(ids, max_new_tokens=6, do_sample=False)[0, 7:].tolist()
    assert found["with the cuts"] == {"tokens": cut, "text": " ".join(f"w{i}" for i in cut)}
    assert found["without them"]["tokens"] == without != cut
    text = good("generate", folder / "cut", "--tokens", "1,5 6 7 8 5 6", "--new-tokens", 6)
    assert text == f"with the cuts: {found['with the cuts']['text']} without them: {found['without them']['text']}"
    assert list(data("generate", folder / "cut", "--tokens", "1 5", "--no-compare")) == ["prompt", "with the cuts"]


def test_generate_draws_by_a_seed(folder: Path) -> None:
    drawn = [data("generate", folder / "cut", "--tokens", "1 5 6", "--temperature", 3.0, "--seed", s) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_of_two_stacks(tmp_path: Path) -> None:
    FAMILIES["t5"].build().save_pretrained(tmp_path / "t5")
    Spec(Freeze("ov", layers=["decoder.cross.0"])).save(tmp_path / "a.yaml")
    good("patch", tmp_path / "t5", "--spec", tmp_path / "a.yaml", "--out", tmp_path / "cut")
    found = data("generate", tmp_path / "cut", "--tokens", "5 6 7", "--new-tokens", 4)
    model = FAMILIES["t5"].build()
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0].tolist()
    assert found["without them"]["tokens"] == expected


def test_what_cannot_generate_is_refused(folder: Path, tmp_path: Path) -> None:
    FAMILIES["bert"].build().save_pretrained(tmp_path / "bert")
    good("patch", tmp_path / "bert", "--spec", folder / "none.yaml", "--out", tmp_path / "cut")
    for arguments, message in (
        ((tmp_path / "cut", "--tokens", "1"), "expected a model that generates"),
        ((folder / "cut", "--tokens", "64"), "numbers below 64"),
    ):
        result = invoke("generate", *arguments)
        assert result.exit_code == 1 and message in " ".join(result.stderr.split())


# families, schema


def test_families_lists_what_the_tests_found() -> None:
    everything = data("families")["types"]
    assert len(everything) > 600 and sum(row["status"] == "patched" for row in everything) > 570
    assert [row["model_type"] for row in data("families", "gpt2")["types"]] == ["gpt2"]
    assert "LlamaAttention" in good("families", "LLAMA")
    assert "logsumexp" in good("families", "reformer")
    result = invoke("families", "lama")
    assert result.exit_code == 0
    result = invoke("families", "lamma")
    assert result.exit_code == 1 and "Did you mean 'llama'" in result.stderr


def test_schema_is_written(tmp_path: Path) -> None:
    assert json.loads(invoke("schema").stdout) == spec_schema()
    assert data("schema", "--out", tmp_path / "s.json") == {"out": str(tmp_path / "s.json")}
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == spec_schema()


# exit codes, messages, completion


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patch", "MODEL", "--spec", "no.yaml", "--out", "OUT"], "expected a .json or .yaml file of cuts"),
        (["patch", "no/", "--spec", "CUTS", "--out", "OUT"], "no such folder"),
        (["patch", "MODEL", "--spec", "WRONG", "--out", "OUT"], "found heads [9]"),
        (["patch", "MODEL", "--spec", "CUTS", "--out", "MODEL"], "a folder of other files"),
        (["patch", "MODEL", "--spec", "CUTS", "--out", "OUT", "--bake", "--shrink"], "heads cannot be removed"),
        (["verify", "MODEL"], "no such file"),
        (["verify", "CUT", "--inputs", "no.safetensors"], "expected a .safetensors file"),
        (["verify", "CUT", "--original", "no/"], "no such folder"),
        (["generate", "MODEL", "--tokens", "1"], "no such file"),
        (["inspect", "no/"], "no such folder"),
        (["schema", "--out", "no/folder/s.json"], "No such file"),
    ],
)
def test_wrong_models_and_files_exit_1(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    Spec(Freeze("qk", heads=[9])).save(folder / "wrong.yaml")
    paths = {"MODEL": folder / "model", "CUT": folder / "cut", "CUTS": folder / "cuts.yaml", "WRONG": folder / "wrong.yaml"}
    given = [paths.get(a, tmp_path / "out" if a == "OUT" else a) for a in arguments]
    result = invoke(*given)
    assert result.exit_code == 1 and result.stdout == "" and not (tmp_path / "out").exists()
    assert "error:" in result.stderr and message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert isinstance(invoke(*given, "--debug").exception, SurgeryError | OSError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["patch"],
        ["patch", "m", "--spec", "s"],
        ["patch", "m", "--spec", "s", "--out", "o", "--where-possible"],
        ["patch", "m", "--spec", "s", "--out", "o", "--shrink"],
        ["verify"],
        ["verify", "CUT", "--device", "abacus"],
        ["generate", "CUT"],
        ["generate", "CUT", "--prompt", "a", "--tokens", "1"],
        ["generate", "CUT", "--tokens", "a"],
        ["generate", "CUT", "--tokens", " "],
        ["generate", "CUT", "--tokens", "²"],
        ["generate", "CUT", "--prompt", ""],
        ["generate", "CUT", "--tokens", "1", "--new-tokens", "0"],
        ["nothing"],
    ],
)
def test_wrong_usage_exits_2(folder: Path, arguments: list[str]) -> None:
    result = invoke(*(folder / "cut" if a == "CUT" else a for a in arguments))
    assert result.exit_code == 2 and result.stdout == "" and result.stderr


def test_a_processor_travels_along(folder: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    Spec(Freeze("ov", layers=["*"], heads=[0])).save(tmp_path / "a.yaml")
    good("patch", tmp_path / "vit", "--spec", tmp_path / "a.yaml", "--out", tmp_path / "cut")
    assert (tmp_path / "cut/preprocessor_config.json").is_file()


def test_an_error_of_others_is_a_message_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("surgery.export.load.load_checkpoint", broken)
    result = invoke("generate", folder / "cut", "--tokens", "1")
    assert result.exit_code == 1 and "error: RuntimeError: out of memory (--debug shows where)" in result.stderr
    assert isinstance(invoke("generate", folder / "cut", "--tokens", "1", "--debug").exception, RuntimeError)


def completions(words: str, shell: str = "bash") -> list[str]:
    """What the shell's completion script gets from the installed program."""
    asked = {"_SURGERY_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    zsh = {"_TYPER_COMPLETE_ARGS": words}
    program = [sys.executable, "-c", "from surgery.cli import main; import sys; sys.argv[0] = 'surgery'; main()"]
    run = subprocess.run(program, env={**os.environ, **asked, **zsh}, capture_output=True, text=True, check=False)
    return run.stdout.split()


def test_the_shell_completes_commands_options_and_names() -> None:
    assert completions("surgery patc") == ["patch", "patching"]
    assert completions("surgery importance --method at") == ["atp", "atp*"]
    assert completions("surgery patching --over layer,") == ["layer,head", "layer,position"]
    assert {"--spec", "--out", "--bake"} <= set(completions("surgery patch --"))
    assert completions("surgery demo --to re") == ["resample"]
    assert completions("surgery families gpt_n") == ["gpt_neo", "gpt_neox", "gpt_neox_japanese"]
    assert '"patch"' in "".join(completions("surgery pa", "zsh"))


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"attention-surgery \d+\.\d+\.\d+", good("--version"))


# README


def test_the_commands_of_the_readme_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section, findings = (README.partition(f"## {title}")[2].partition("\n## ")[0] for title in ("Command line", "Findings"))
    [spec] = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    assert len(yaml.safe_load(spec)["cuts"]) >= 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(spec, encoding="utf-8")
    (tmp_path / "means.safetensors").write_bytes((folder / "means.safetensors").read_bytes())
    for name, first, is_repeated in (("a", 1, True), ("b", 32, True), ("n", 1, False)):
        write_task(tmp_path / f"{name}.jsonl", 12, first, is_repeated)
    (tmp_path / "my-model").symlink_to(folder / "model")
    blocks = re.findall(r"```sh\n(.*?)```", section + findings, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    known = {"inspect", "patch", "verify", "generate", "families", "schema", "ablate", "importance", "patching", "interference"}
    assert len(blocks) == 2 and {words[1] for words in commands} >= known
    for program, *words in commands:
        assert program == "surgery"
        good(*words)
