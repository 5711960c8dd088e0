"""The command line and what it shows: texts, the picture, the table, exit codes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, HEADS, LAYERS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from surgery.cli import app
from surgery.demo.report import LONGEST_TABLE, table
from surgery.demo.study import Study, study
from surgery.demo.subject import load, read_text
from surgery.errors import SurgeryError
from surgery.plots import Named, heatmaps, save

SEGMENT = 20
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "dog", "ran", "over", "hill"]
WORDS += ["to", "find", "some", "more", "old", "red", "hats", "of", "$x_1$", "日本"]


@pytest.fixture(scope="module")
def found() -> Study:
    subject = load()
    return study(subject.model, subject.copies(16, SEGMENT, seed=3), progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 and a tokenizer of whole words, in a folder."""
    folder = tmp_path_factory.mktemp("gpt2")
    FAMILIES["gpt2"].build().save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


# The sequences of a model with a tokenizer.


def test_random_tokens_leave_special_ones_out(saved: Path) -> None:
    subject = load(str(saved))
    ids = subject.copies(8).ids
    assert (ids[:, 0] == 1).all() and ids[:, 1:].min() >= 4 and ids[:, 1:].max() < 4 + len(WORDS)


def test_a_text_is_said_twice(saved: Path, tmp_path: Path) -> None:
    subject = load(str(saved))
    file = tmp_path / "words.txt"
    file.write_text("the cat sat on a mat and then dog ran over", encoding="utf-8")
    ids = subject.copies(batch=16, segment=4, text=read_text(str(file))).ids
    assert [subject.label(i) for i in ids[0].tolist()] == ["BOS", *WORDS[:4], *WORDS[:4]]
    assert ids.shape == (2, 9)  # the last three words fill no segment
    assert subject.copies(16, text="the cat sat on a mat").ids.shape == (1, 13)
    with pytest.raises(SurgeryError, match="no file"):
        read_text(str(tmp_path / "missing.txt"))
    with pytest.raises(SurgeryError, match="at least 4"):
        subject.copies(16, text="the cat")


# The picture and the table.


@pytest.mark.parametrize(("shape", "suffix"), [((2, 4), ".png"), ((12, 12), ".pdf"), ((48, 64), ".png")])
def test_pictures_of_all_sizes(shape: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    qk, ov = generator.normal(size=(2, *shape))
    qk[0, 0] = np.nan
    pattern = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    named = [Named("Induction", shape[0] - 1, 1, pattern), Named("Previous-token", 0, 2)]
    figure = heatmaps(qk, ov, named=named, tokens=["BOS", "$x_1$", "日本", "b", "c", "d"], divider=3, title="t", subtitle="s")
    texts = [text.get_text() for axes in figure.findobj(lambda a: hasattr(a, "texts")) for text in axes.texts]
    assert (f"{ov[1, 1]:+.2f}".replace("-", "−") in texts) == (max(shape) <= 12)
    path = tmp_path / f"new/picture{suffix}"
    save(figure, path)
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="suffix"):
        save(figure, tmp_path / "picture.gif")


def test_a_large_table_shows_the_dearest_heads(found: Study) -> None:
    costs = np.arange(60.0).reshape(6, 10)
    job = dataclasses.replace(found.induction, scores=costs / 60, head=(5, 9))
    layers = tuple((i,) for i in range(6))
    large = dataclasses.replace(found, layers=layers, qk_nats=costs, ov_nats=-costs, induction=job, previous_token=job)
    shown = table(large)
    assert shown.row_count == LONGEST_TABLE and next(iter(shown.columns[0].cells)) == "L5 H9"


# The command line.


def test_demo_prints_the_table_and_names_the_heads(found: Study, tmp_path: Path) -> None:
    out = tmp_path / "demo.png"
    result = invoke("demo", "--out", out, "--segment", SEGMENT, "--seed", 3)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for job, place in (("Induction", found.induction_head), ("Previous-token", found.previous_token_head)):
        assert place is not None and f"{job} head: layer {place[0]} head {place[1]}." in text
        assert f"costs {found.qk_nats[place]:+.3f} nats per token" in text
    assert out.stat().st_size > 10_000 and out.read_bytes().startswith(b"\x89PNG")


def test_demo_writes_json_for_any_model_and_a_text(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.pdf"
    result = invoke("demo", "--model", saved, "--text", " ".join(WORDS), "--segment", 5, "--out", out, "--json", "--to", "mean")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert len(data["heads"]) == LAYERS * HEADS and data["sequences"] == 4 and data["to"] == "mean"
    assert data["induction_head"] is None and data["picture"] == str(out) and out.read_bytes().startswith(b"%PDF")
    assert {"layer", "head", "qk_nats", "ov_nats", "induction_score", "previous_token_score"} == set(data["heads"][0])


def test_the_eager_kernel_gives_the_same_table(tmp_path: Path) -> None:
    arguments = ("demo", "--json", "--batch", 4, "--segment", 8, "--device", "cpu", "--out", tmp_path / "p.png")
    auto, eager = (json.loads(invoke(*arguments, "--kernel", kernel).stdout) for kernel in ("auto", "eager"))
    assert auto["induction_head"] == eager["induction_head"] is not None
    for a, b in zip(auto["heads"], eager["heads"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)  # sdpa adds up in another order


def test_inspect_prints_a_table_and_json(saved: Path) -> None:
    result = invoke("inspect", saved)
    assert result.exit_code == 0 and "self.1" in result.stdout and "GPT2LMHeadModel" in result.stdout
    data = json.loads(invoke("inspect", saved, "--json").stdout)
    assert [row["address"] for row in data["attention"]] == ["self.0", "self.1"] and data["unsupported"] == []
    assert data["attention"][0]["fusion"] == "q+k+v" and data["attention"][0]["heads"] == HEADS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--model", "/no/such/folder"], "no such folder"),
        (["demo", "--model", "EMPTY"], "expected a causal language model"),
        (["demo", "--model", "BASE"], "no weights for"),
        (["demo", "--text", "some words to read"], "no tokenizer"),
        (["demo", "--segment", "40"], "expected 4 to 31"),
        (["demo", "--batch", "1", "--to", "resample"], "at least 2 rows"),
        (["inspect", "EMPTY"], "expected a transformers model"),
    ],
)
def test_what_is_wrong_with_model_or_data_exits_1(arguments: list[str], message: str, tmp_path: Path) -> None:
    if "BASE" in arguments:
        FAMILIES["llama"].build().model.save_pretrained(tmp_path)
    arguments = [str(tmp_path) if a in ("EMPTY", "BASE") else a for a in arguments]
    out = [] if arguments[0] == "inspect" else ["--out", str(tmp_path / "p.png")]
    result = invoke(*arguments, *out)
    assert result.exit_code == 1 and result.stdout == ""
    assert "error:" in result.stderr and message in " ".join(result.stderr.split())
    assert isinstance(invoke(*arguments, *out, "--debug").exception, SurgeryError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--to", "nothing"],
        ["demo", "--out", "p.gif"],
        ["demo", "--device", "abacus"],
        ["demo", "--batch", "0"],
        ["inspect"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Error" in result.stderr


def test_help_needs_no_torch() -> None:
    code = "import sys, surgery.cli; from surgery.errors import SurgeryError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert invoke("--help").exit_code == 0
