"""`surgery ablate`: a study in a folder, which goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from test_commands import invoke
from worded import write_worded

from surgery.demo import load_model
from surgery.demo.data import repeated_sequences


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_worded(tmp_path_factory.mktemp("model"))


def data(*arguments: Any) -> Any:
    result = invoke("ablate", *arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def test_a_study_is_written_and_goes_on(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    found = data(model, "--out", out, "--rows", 6, "--batch", 4)
    assert len(found["rows"]) == 24 and found["notes"] == []
    frame = pd.read_csv(out / "study.csv")
    best = frame.loc[frame[frame.circuit == "qk"].effect.idxmax()]
    assert (best.address, best["head"]) == ("self.1", 3) and best.effect > 3 and best.baseline < 0.1
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "* read: 6 sequences, 24 random tokens (seed 0), said twice" in report
    assert "* 24 cuts" in report and "| ov | self.0 | 0 | loss |" in report
    for name in ("heads", "effects"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG") and (out / f"{name}.png").stat().st_size > 10_000
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF") and f"({name}.png)" in report
    lines = (out / "study.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "study.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    again = data(model, "--out", out, "--rows", 6, "--batch", 4)["rows"]
    assert [row["effect"] for row in again] == pytest.approx([row["effect"] for row in found["rows"]], rel=1e-4, abs=1e-7)


def test_texts_files_and_selections(model: Path, tmp_path: Path) -> None:
    text = " ".join(f"w{i % 60 + 1}" for i in range(50))
    chosen = ("--circuits", "ov", "--layers", "1", "--metric", "loss,kl")
    found = data(model, "--out", tmp_path / "a", "--text", text, "--length", 12, *chosen)
    assert {row["address"] for row in found["rows"]} == {"self.1"} and len(found["rows"]) == 4 * 2
    save_file({"input_ids": repeated_sequences(3, 20, 64, 1)}, tmp_path / "i.safetensors")
    assert len(data(model, "--out", tmp_path / "b", "--inputs", tmp_path / "i.safetensors", "--to", "mean")["rows"]) == 24


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--text", "w1 w2"], 1, "expected at least --length 128"),
        (["--metric", "losss"], 1, "expected 'loss', 'perplexity'"),
        (["--circuits", "q"], 1, "circuits"),
        (["--layers", "7"], 1, "7"),
        (["--text", "a", "--inputs", "b"], 2, "Give one of the two"),
    ],
)
def test_what_is_wrong_is_said(model: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    result = invoke("ablate", model, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == code and message in " ".join(result.stderr.split()) and result.stdout == ""


def test_another_model_is_not_given_the_table_of_the_first(model: Path, tmp_path: Path) -> None:
    chosen = ("--out", tmp_path / "out", "--rows", 2, "--circuits", "ov", "--layers", "1")
    data(model, *chosen)
    other = load_model()
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(0.5)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(model / "tokenizer.json", tmp_path / "other")
    result = invoke("ablate", tmp_path / "other", *chosen)
    assert result.exit_code == 1 and "another study (weights" in " ".join(result.stderr.split()) and result.stdout == ""
