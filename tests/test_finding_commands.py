"""`surgery importance` and `surgery patching`: the demo model's circuit from the command line, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from test_commands import invoke
from transformers import ViTConfig, ViTForImageClassification
from worded import write_worded

from surgery import Freeze, Spec
from surgery.analysis import activation_patching, head_importance, metrics, path_patching
from surgery.analysis.repeats import random_copies
from surgery.demo import load_model

CLEAN, CORRUPTED = "w1 w5 w6 w7 w8 w5 w6", "w1 w5 w6 w9 w8 w5 w6"
TEXTS = ("--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", "w7", "--wrong", "9")
INDUCTION, PREVIOUS = ("self.1", 3), ("self.0", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_worded(tmp_path_factory.mktemp("model"))


def data(*arguments: Any) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def ids_of(*texts: str) -> torch.Tensor:
    return torch.tensor([[int(word[1:]) for word in text.split()] for text in texts])


def is_picture(path: Path) -> bool:
    """Whether there is one, as PNG and as PDF."""
    is_pdf = path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    return is_pdf and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


# -- importance ---------------------------------------------------------------------------------------------------------


def test_importance_finds_the_circuit_on_random_tokens(model: Path, tmp_path: Path) -> None:
    found = data("importance", model, "--out", tmp_path, "--rows", 8, "--edges", "--sample", 2, "--verify-top", 4)
    rows = pd.DataFrame(found["rows"])
    assert list(zip(rows.address, rows["head"], rows.circuit, strict=True))[-1] == (*INDUCTION, "ov") and len(rows) == 16
    best = rows.sort_values("magnitude", ascending=False).head(3)
    assert {*zip(best.address, best["head"], best.circuit, strict=True)} == {
        (*INDUCTION, "qk"),
        (*INDUCTION, "ov"),
        (*PREVIOUS, "ov"),
    }
    assert (best.exact < -8).all() and found["baseline"] > 8 and found["missed"] < 1e-3 and rows.exact.notna().sum() == 6
    assert found["forwards"] < 3 + 1 + 6 + 5 and found["metric"] == "logit difference", "no sweep of 16"
    edges = pd.DataFrame(found["edges"])
    top = edges.loc[edges.score.abs().idxmax()]
    assert (top.address, top["head"], top.to_address, top.to_head) == (*PREVIOUS, *INDUCTION)
    frame = pd.read_csv(tmp_path / "importance.csv")
    assert frame.score.tolist() == pytest.approx(rows.score.tolist()) and len(pd.read_csv(tmp_path / "edges.csv")) == len(edges)
    assert all(is_picture(tmp_path / f"{name}.png") for name in ("heads", "exact", "edges"))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "* clean: 8 sequences of 24 random tokens, said twice",
        f"* cost: {found['forwards']:.3g} forwards and {found['backwards']:.3g} backwards",
        f"6 were confirmed by doing it. Rank correlation (Spearman) of magnitudes with the sizes of exact changes: "
        f"{found['correlation']:.3f}.",
        "| self.1 | 3 | ov |",
        "--senders self.0.0 --receivers self.1.3.q,self.1.3.k,self.1.3.v",
    ):
        assert line in report


def test_importance_of_texts_is_that_of_the_function(model: Path, tmp_path: Path) -> None:
    metric = metrics.logit_difference(7, 9)
    for method in ("ablation", "ig"):
        expected = head_importance(load_model(), ids_of(CLEAN), ids_of(CORRUPTED), metric, method, circuits="v", layers=[1])
        options = ("--method", method, "--circuits", "v", "--layers", 1, "--verify-top", 0, "--sample", 0)
        found = data("importance", model, "--out", tmp_path / method, *TEXTS, *options)
        assert [row["score"] for row in found["rows"]] == pytest.approx(expected.frame.score.tolist())
        assert (
            not (tmp_path / method / "exact.png").exists() and "confirmed" not in (tmp_path / method / "report.md").read_text()
        )
        assert ("| score | magnitude |" in (tmp_path / method / "report.md").read_text()) == (method == "ig")
        assert max(found["rows"], key=lambda row: row["magnitude"])["head"] == INDUCTION[1]


def test_importance_given_cuts_and_to_zero(model: Path, tmp_path: Path) -> None:
    Spec(Freeze("ov", layers=[0], heads=[0])).save(tmp_path / "cuts.yaml")
    options = ("--method", "ablation", "--to", "zero", "--clean", CLEAN, "--given", tmp_path / "cuts.yaml")
    found = data("importance", model, "--out", tmp_path / "out", *options)
    cut = Freeze("ov", layers=[0], heads=[0])
    expected = head_importance(load_model(), ids_of(CLEAN), metric="loss", method="ablation", to="zero", given=cut)
    assert found["baseline"] == pytest.approx(expected.baseline) and found["metric"] == "loss"
    assert [row["score"] for row in found["rows"]] == pytest.approx(expected.frame.score.tolist(), abs=1e-6)
    assert next(row["score"] for row in found["rows"] if row["circuit"] == "ov") == 0, "it is cut already"
    assert "cuts.yaml" in (tmp_path / "out/report.md").read_text(encoding="utf-8")


# -- patching -----------------------------------------------------------------------------------------------------------


def test_patching_finds_the_heads_on_random_tokens(model: Path, tmp_path: Path) -> None:
    found = data("patching", model, "--out", tmp_path, "--rows", 8, "--batch", 5)
    copies = random_copies(load_model(), 8)
    turned = copies.reversed()
    assert torch.equal(turned[:, 1:25], copies.ids[:, 1:25].flip(1)) and torch.equal(turned[:, 25:], copies.ids[:, 25:])
    assert torch.equal(turned[:, :1], copies.ids[:, :1])
    metric = metrics.logit_difference(copies.ids[:, -1], copies.ids[:, -3], -2)
    expected = activation_patching(load_model(), copies.ids, turned, metric, over=("layer", "head"), progress=False)
    assert [row["effect"] for row in found["rows"]] == pytest.approx(expected.to_frame().effect.tolist(), abs=1e-4)
    assert found["clean"] > 8 and found["corrupted"] < -8
    effects = {(row["layer"], row["head"]): row["effect"] for row in found["rows"]}
    assert sorted(effects, key=lambda head: effects[head])[:2] == [INDUCTION, PREVIOUS]
    assert pd.read_csv(tmp_path / "patching.csv").recovery.notna().all() and is_picture(tmp_path / "patching.png")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| z | self.1 | 3 |" in report and "patching.png" in report and "corrupted run" not in report


def test_patching_by_position_and_in_the_other_direction(model: Path, tmp_path: Path) -> None:
    options = ("--over", "layer,head,position", "--sites", "z,v", "--layers", "1", "--positions", "3,-1")
    found = data("patching", model, "--out", tmp_path, *TEXTS, *options, "--direction", "denoising")
    rows = pd.DataFrame(found["rows"]).set_index(["site", "head", "position"])
    assert len(rows) == 2 * 4 * 2 and found["base"] == "corrupted"
    assert rows.recovery["z", 3, 6] > 0.99 and rows.recovery["v", 3, 3] > 0.99, "the token is read, and written at the end"
    assert rows.recovery.drop([("z", 3, 6), ("v", 3, 3)]).abs().max() < 0.01


def test_paths_from_head_to_head(model: Path, tmp_path: Path) -> None:
    options = ("--senders", "0.0,self.0.2", "--receivers", "1.3.k,1.3.q+1.3.v,logits")
    found = data("patching", model, "--out", tmp_path, "--rows", 4, *options)
    copies = random_copies(load_model(), 4)
    metric = metrics.logit_difference(copies.ids[:, -1], copies.ids[:, -3], -2)
    receivers = [(1, 3, "k"), [(1, 3, "q"), (1, 3, "v")], "logits"]
    arguments = (load_model(), copies.ids, copies.reversed(), metric, [(0, 0), (0, 2)], receivers)
    expected = path_patching(*arguments, progress=False).to_frame()
    rows = pd.DataFrame(found["rows"])
    assert rows.receiver.tolist() == expected.receiver.tolist() and rows["head"].tolist() == expected["head"].tolist()
    assert rows.effect.tolist() == pytest.approx(expected.effect.tolist(), abs=1e-4)
    best = rows.loc[rows.effect.idxmin()]
    assert (best.layer, best["head"], best.receiver) == (*PREVIOUS, "self.1 head 3 k") and best.effect < -8
    assert "What passes from head to head" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_files_of_texts_and_of_inputs(model: Path, tmp_path: Path) -> None:
    """Several texts with an answer each, and the same as tensors: the same numbers."""
    texts = {"clean": [CLEAN, "w1 w3 w4 w8 w2 w3 w4"], "corrupted": [CORRUPTED, "w1 w3 w4 w5 w2 w3 w4"]}
    words = {"answer": ["w7", "w8"], "wrong": ["9", "w5"]}
    for name, lines in {**texts, **words}.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    options = [part for name in (*texts, *words) for part in (f"--{name}", tmp_path / f"{name}.txt")]
    found = data("patching", model, "--out", tmp_path / "a", *options)
    metric = metrics.logit_difference([7, 8], [9, 5])
    pair = [ids_of(*lines) for lines in texts.values()]
    expected = activation_patching(load_model(), *pair, metric, over=("layer", "head"), progress=False)
    assert [row["effect"] for row in found["rows"]] == pytest.approx(expected.to_frame().effect.tolist(), abs=1e-5)
    assert "(and 1 more)" in (tmp_path / "a/report.md").read_text(encoding="utf-8")
    for name, ids in zip(texts, pair, strict=True):
        save_file({"input_ids": ids}, tmp_path / f"{name}.safetensors")
    files = ("--inputs", tmp_path / "clean.safetensors", "--corrupted-inputs", tmp_path / "corrupted.safetensors")
    again = data("patching", model, "--out", tmp_path / "b", *files, "--answer", tmp_path / "answer.txt", *options[-2:])
    assert again["rows"] == found["rows"]
    for name in ("loss", "kl"):
        found = data("patching", model, "--out", tmp_path / name, *files, "--metric", name)
        expected = activation_patching(load_model(), *pair, name, over=("layer", "head"), progress=False)
        assert [row["value"] for row in found["rows"]] == pytest.approx(expected.to_frame().value.tolist(), abs=1e-5)


# -- what is wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "code", "message"),
    [
        ("patching", ["--clean", "w1 w2", "--corrupted", "w1 w2 w3"], 1, "--corrupted: found 3 tokens (w1 w2 w3); expected"),
        ("importance", ["--clean", "w1 w2", "--corrupted", "w1 w2"], 1, "the same tokens"),
        ("patching", ["--clean", "no/such.txt", "--corrupted", "a"], 1, "no file"),
        ("patching", [*TEXTS[:4], "--answer", "w7 w8", "--wrong", "w9"], 1, "which is 2 tokens (w7 w8); expected one token"),
        ("patching", [*TEXTS[:4], "--answer", "w99", "--wrong", "w9"], 1, "which is unknown"),
        ("importance", [*TEXTS[:4], "--answer", "64", "--wrong", "w9"], 1, "expected numbers below 64"),
        ("importance", [*TEXTS, "--circuits", "both"], 1, "circuits"),
        ("importance", [*TEXTS, "--given", "no.yaml"], 1, "no.yaml"),
        ("importance", [*TEXTS[:4], "--metric", "accuracy"], 1, "no gradient"),
        ("patching", ["--sites", "w"], 1, "expected 'q'"),
        ("patching", ["--over", "heads"], 1, "Did you mean 'head'"),
        ("patching", ["--receivers", "1.9.k"], 1, "head 9 of self.1"),
        ("patching", ["--senders", "7.0"], 1, "7"),
        ("patching", ["--direction", "denoising", "--to", "zero"], 1, "Leave `to` out"),
        ("importance", ["--clean", "w1", "--inputs", "a"], 2, "Give one of the two"),
        ("importance", ["--clean", "w1"], 2, "Give the other run"),
        ("importance", ["--corrupted", "w1"], 2, "It goes with --clean"),
        ("importance", ["--answer", "w1", "--wrong", "w2"], 2, "It goes with --clean or --inputs"),
        ("importance", [*TEXTS[:6]], 2, "Give both"),
        ("importance", [*TEXTS, "--metric", "loss"], 2, "Give one of the two"),
        ("importance", ["--metric", "kl"], 2, "no slope"),
        ("importance", ["--method", "atp+"], 2, "atp*"),
        ("patching", ["--senders", "3"], 2, "is not a head"),
        ("patching", ["--receivers", "1.3"], 2, "no head's input"),
        ("patching", ["--receivers", "logits", "--sites", "z"], 2, "does not go with --senders"),
        ("patching", ["--positions", "a"], 2, "no list of whole numbers"),
        ("patching", ["--freeze-mlps"], 2, "It goes with --senders"),
    ],
)
def test_what_is_wrong_is_said(
    model: Path, tmp_path: Path, command: str, arguments: list[str], code: int, message: str
) -> None:
    result = invoke(command, model, "--out", tmp_path / "out", *arguments)
    told = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == code and message in told and result.stdout == "", told
    assert "Traceback" not in told and not (tmp_path / "out").exists()


def test_models_that_do_not_go_on_with_random_tokens(tmp_path: Path) -> None:
    FAMILIES["bert"].build().save_pretrained(tmp_path / "bert")
    result = invoke("patching", tmp_path / "bert", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "expected a model that predicts the next token" in result.stderr
    assert len(data("patching", tmp_path / "bert", "--out", tmp_path / "out", "--metric", "kl", "--rows", 2)["rows"]) == 8
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    result = invoke("importance", tmp_path / "vit", "--out", tmp_path / "none", "--metric", "loss")
    assert result.exit_code == 1 and "found no vocabulary; expected a model that reads tokens" in result.stderr
    images = {name: torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    for name, image in images.items():
        save_file({"pixel_values": image, "labels": torch.tensor([0, 1, 0])}, tmp_path / f"{name}.safetensors")
    files = ("--inputs", tmp_path / "a.safetensors", "--corrupted-inputs", tmp_path / "b.safetensors")
    assert len(data("importance", tmp_path / "vit", "--out", tmp_path / "images", *files)["rows"]) == 8


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    FAMILIES["gpt2"].build().save_pretrained(tmp_path / "model")
    result = invoke("patching", tmp_path / "model", "--out", tmp_path / "out", *TEXTS)
    assert result.exit_code == 1 and "no tokenizer" in result.stderr
    found = data("importance", tmp_path / "model", "--out", tmp_path / "out", "--metric", "kl", "--method", "ig", "--rows", 2)
    assert found["metric"] == "KL" and len(found["rows"]) == 16
