"""`surgery interference`: two tasks that share a head, from the command line; files, what goes on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from families import FAMILIES
from test_commands import invoke
from test_finding_commands import data, is_picture
from worded import write_task, write_worded

from surgery import SpecError, SurgeryError
from surgery.analysis.interference.collecting import collect
from surgery.analysis.interference.maps import heatmap
from surgery.analysis.interference.study import conflict_test, overlap_test
from surgery.commands.lines import as_tokens, batches_of, read_lines, require_fitting
from surgery.demo import load_model

INDUCTION, PREVIOUS = ("self.1", 3), ("self.0", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and tasks a and b that repeat other words each, with a control n that repeats none."""
    folder = tmp_path_factory.mktemp("interference")
    write_worded(folder / "model")
    for name, first, is_repeated in (("a", 1, True), ("b", 32, True), ("n", 16, False)):
        write_task(folder / f"{name}.jsonl", 15, first, is_repeated)
    return folder


def asked(folder: Path, out: Path, *more: Any) -> tuple[Any, ...]:
    tasks = ("--task-a", folder / "a.jsonl", "--task-b", folder / "b.jsonl", "--control", folder / "n.jsonl")
    return ("interference", folder / "model", *tasks, "--out", out, *more)


def ids_of(path: Path) -> list[dict[str, Any]]:
    """The words' numbers, batched as the command does it."""
    lines = [[int(w[1:]) for w in json.loads(line)["text"].split()] for line in path.read_text(encoding="utf-8").splitlines()]
    copy = path.with_suffix(".ids")
    copy.write_text("\n".join(json.dumps({"input_ids": line}) for line in lines), encoding="utf-8")
    return batches_of(read_lines(copy, 2), 8)


def test_two_tasks_that_share_a_circuit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = data(*asked(folder, tmp_path, "--resume"))
    rows = pd.DataFrame(found["rows"])
    kept = rows[rows.p_fdr <= 0.05].sort_values("mean", ascending=False).head(4)
    assert {*zip(kept.address, kept["head"], strict=True)} == {INDUCTION, PREVIOUS}
    assert tuple(kept.iloc[0][["address", "block", "head"]]) == ("self.1", "O", 3)
    opposed = rows[rows.conflict_p_fdr <= 0.05].sort_values("conflict", ascending=False).head(3)
    assert {*zip(opposed.address, opposed["head"], strict=True)} == {INDUCTION, PREVIOUS} and set(opposed.block) == {"V", "O"}

    model = load_model()
    a, b, n = (collect(model, ids_of(folder / f"{name}.jsonl"), progress=False) for name in "abn")
    assert rows["mean"].tolist() == pytest.approx(heatmap(a, b, [a, b, n]).means.tolist(), rel=1e-5)
    assert rows.conflict.tolist() == pytest.approx(heatmap(a, b, kernel="signed").means.tolist(), rel=1e-4, abs=1e-9)

    tested = pd.read_csv(tmp_path / "tested.csv")
    assert pd.read_csv(tmp_path / "interference.csv").p_fdr.tolist() == pytest.approx(tested.p_fdr.tolist())
    assert pd.read_csv(tmp_path / "conflict.csv").p_both.between(0, 1).all()
    assert pd.read_csv(tmp_path / "top.csv")["mean"].is_monotonic_decreasing
    assert r"\begin{tabular}" in (tmp_path / "top.tex").read_text(encoding="utf-8")
    assert all(is_picture(tmp_path / f"{name}.png") for name in ("heads", "blocks", "conflict"))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "15 samples" in report and "## Overlap: found, the largest first" in report and "| self.1 | O | 3 |" in report

    # again: nothing is collected that was kept, and the numbers are the same
    (tmp_path / "gradients" / "B" / "00001.safetensors").unlink()
    read: list[int] = []
    import surgery.analysis.interference.collecting as gradients

    once = gradients._collected
    monkeypatch.setattr(gradients, "_collected", lambda *given, **options: read.append(1) or once(*given, **options))
    assert data(*asked(folder, tmp_path, "--resume"))["rows"] == found["rows"] and len(read) == 1


def test_options_reach_the_functions(folder: Path, tmp_path: Path) -> None:
    options = ("--kernel", "whitened", "--layers", 1, "--rho", 0.1, "--alpha", 0.2, "--permutations", 99, "--length", 15)
    found = data(*asked(folder, tmp_path, *options))
    rows = pd.DataFrame(found["rows"])
    assert set(rows.address) == {"self.1"} and found["kernel"] == "whitened" and "at FDR 0.2" in found["overlap"]
    assert len(rows) == 16 and "99 p_row (drawn)" in found["overlap"] and not (tmp_path / "gradients").exists()
    short = [[{"input_ids": b["input_ids"][:, :15]} for b in ids_of(folder / f"{name}.jsonl")] for name in "abn"]
    a, b, n = (collect(load_model(), batches, layers=[1], progress=False) for batches in short)
    assert rows["mean"].tolist() == pytest.approx(heatmap(a, b, [a, b, n], "whitened", rho=0.1).means.tolist(), rel=1e-4)
    assert any("99 labelings" in note for note in found["notes"]), "too few are said, not hidden"


def test_too_few_permutations_are_said_where_they_are_seen(folder: Path, tmp_path: Path) -> None:
    """In the terminal, in the title, and in the report before its tables. Nothing of an earlier run stays beside that."""
    for suffix in ("csv", "png", "pdf", "txt"):
        (tmp_path / f"query-heads.{suffix}").write_text("of an earlier run", encoding="utf-8")
    result = invoke(*asked(folder, tmp_path, "--permutations", 99))
    assert result.exit_code == 0 and "warning: permutation_test: found a smallest p of 0.01" in result.stderr
    assert "warning: sign_flip_test" in result.stderr and "warning:" not in result.stdout
    assert "at FDR 0.05 (too few permutations: p_fdr of a single finding is at least 0.32), " in result.stdout
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert 0 < report.index("* warning: permutation_test: found") < report.index("## Overlap")
    for word in (
        "p_fdr: ",
        "p_maxt: ",
        "conflict_p_fdr: ",
        "g_row, g_col: ",
        "kv head",
        "not counted",
        "tested.csv",
        "top.tex",
    ):
        assert word in report[report.index("## Columns") :], word
    assert "query-heads" not in report and [path.suffix for path in tmp_path.glob("query-heads*")] == [".txt"], "not ours"


def test_biases_and_query_heads(tmp_path: Path) -> None:
    """Of a model whose query heads share heads of k and v."""
    model = FAMILIES["qwen2"].build()
    model.save_pretrained(tmp_path / "model")
    for seed, name in enumerate("abn"):
        ids = torch.randint(1, 60, (7, 9), generator=torch.Generator().manual_seed(seed))
        lines = [json.dumps({"input_ids": row}) for row in ids.tolist()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out"
    found = data(*asked(tmp_path, out, "--biases", "--query-heads"))
    a, b, n = (
        collect(model, batches_of(read_lines(tmp_path / f"{name}.jsonl", 2), 8), progress=False, **options)
        for name, options in (("a", {"biases": True}), ("b", {"biases": True, "query_heads": True}), ("n", {"biases": True}))
    )
    assert pd.DataFrame(found["rows"])["mean"].tolist() == pytest.approx(heatmap(a, b, [a, b, n]).means.tolist(), rel=1e-4)
    parts = pd.read_csv(out / "query-heads.csv")
    expected = heatmap(a, b, [a, b, n], query_heads=True)
    assert [tuple(row) for row in parts[["address", "block", "head"]].to_numpy()] == expected.hypotheses
    assert parts["mean"].tolist() == pytest.approx(expected.means.tolist(), rel=1e-4)
    report = (out / "report.md").read_text("utf-8")
    assert is_picture(out / "query-heads.png") and "![query-heads](query-heads.png)" in report
    assert "Biases of Q, K and V are counted" in report and "* query-heads.csv: " in report


def test_samples_are_batched_by_length_and_kind(tmp_path: Path) -> None:
    lines = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}, {"input_ids": [6, 7, 8], "labels": [-100, -100, 8]}]
    lines.append({"input_ids": [6, 7, 8], "labels": [9]})
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, [*lines, *lines[:1] * 2])), encoding="utf-8")
    found = batches_of(read_lines(tmp_path / "x.jsonl", 2), size=2)
    assert [{name: value.tolist() for name, value in batch.items()} for batch in found] == [
        {"input_ids": [[1, 2, 3], [1, 2, 3]]},
        {"input_ids": [[1, 2, 3]]},
        {"input_ids": [[4, 5]]},
        {"input_ids": [[6, 7, 8]], "labels": [[-100, -100, 8]]},
        {"input_ids": [[6, 7, 8]], "labels": [[9]]},
    ]


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """JSON may have other characters that Python splits lines at in its strings as they are."""
    texts = ["a\u2028b", "c\u0085d", "e\u2029f"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n"
    (tmp_path / "x.jsonl").write_bytes(lines.encode())
    found = read_lines(tmp_path / "x.jsonl", 2)
    assert [(sample.text, sample.where[-6:]) for sample in found] == list(
        zip(texts, ("line 1", "line 2", "line 3"), strict=True)
    )


@pytest.mark.parametrize(
    ("family", "line", "message"),
    [
        ("llama", {"input_ids": [1, 67]}, "line 2: found token 67; expected numbers below the model's 67 tokens"),
        ("llama", {"input_ids": [1, 10**30]}, "line 2: found token 1000"),
        ("llama", {"input_ids": [1, 2], "labels": [-100, 67]}, "line 2: found label 67; expected numbers below the model's 67"),
        ("llama", {"input_ids": [1, 2], "labels": [2]}, "line 2: found 1 labels of 2 tokens; expected a label for each token"),
        ("llama", {"input_ids": [1, 2, 3], "labels": [5, -100, -100]}, "line 2: found the first label alone"),
        ("llama", {"input_ids": [1, 2, 3], "labels": [-100, -100, 66]}, None),
        ("bert", {"input_ids": [1, 2, 3], "labels": [5, -100, -100]}, None),
        ("t5", {"input_ids": [1, 2, 3], "labels": [5]}, None),
        ("t5", {"input_ids": [1, 2, 3], "labels": [5, 1, 67]}, "line 2: found label 67"),
    ],
)
def test_what_a_model_cannot_learn_is_refused_by_its_line(tmp_path: Path, family: str, line: Any, message: str | None) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"input_ids": [1, 2]}}\n{json.dumps(line)}', encoding="utf-8")
    samples, model = as_tokens(read_lines(tmp_path / "x.jsonl", 2), None, ""), FAMILIES[family].build()
    if message is not None:
        with pytest.raises(SurgeryError, match=message):
            require_fitting(samples, model)
        return
    require_fitting(samples, model)
    assert len(collect(model, batches_of(samples[1:], 8), progress=False)) == 1, "and it is one that can be collected"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: found no JSON"),
        (['{"text": "w1 w2"}', "[1, 2]"], "line 2: found a list"),
        (['{"text": "w1", "input_ids": [1]}'], "line 1: found the keys 'text', 'input_ids'"),
        (['{"input_ids": [1, 2], "labels": [1, -99]}'], "line 1: found labels that are no list of tokens' numbers and -100"),
        (['{"input_ids": [1, 2], "labels": [1, -100.0]}'], "line 1: found labels that are no list"),
        (['{"input_ids": [1, 2], "labels": 1}'], "line 1: found labels that are no list"),
        (['{"input_ids": [1, -2]}'], "line 1: found input_ids that are no list of whole numbers"),
        (['{"input_ids": [1, true]}'], "no list of whole numbers"),
        (['{"text": "w1 w2 w3"}'], "found 1 samples; expected at least 2"),
        (['{"text": "w1"}', '{"text": "w1 w2"}'] * 3, "line 1: found 1 tokens"),
        (['{"input_ids": [1, 2], "labels": [-100, -100]}'] * 5, "labels of -100 alone"),
        (['{"input_ids": [1, 2], "labels": []}'] * 5, "labels of -100 alone, or none"),
    ],
)
def test_samples_that_are_none_are_refused_by_their_line(
    folder: Path, tmp_path: Path, lines: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr("surgery.pretrained.load_any", lambda *_, **__: pytest.fail("before any model is read"))
    given = [tmp_path / "bad.jsonl" if word == folder / "b.jsonl" else word for word in asked(folder, tmp_path / "out")]
    result = invoke(*given)
    assert result.exit_code == 1 and message in result.stderr and "bad.jsonl" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_text_needs_a_tokenizer_and_a_test_its_control(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "model" / name, tmp_path / "model" / name)
    result = invoke("interference", tmp_path / "model", *asked(folder, tmp_path / "out")[2:])
    assert result.exit_code == 1 and "line 1: found a text and no tokenizer (no files of a tokenizer)" in result.stderr
    words = asked(folder, tmp_path / "out")
    result = invoke(*words[:6], *words[8:])
    assert result.exit_code == 2 and "--control" in result.stderr
    far = [json.dumps({"input_ids": [number, 64]}) for number in range(1, 7)]
    (tmp_path / "far.jsonl").write_text("\n".join(far), encoding="utf-8")
    result = invoke(*(tmp_path / "far.jsonl" if word == folder / "a.jsonl" else word for word in words))
    assert result.exit_code == 1 and "far.jsonl, line 1: found token 64; expected numbers below the model's 64" in result.stderr
    with pytest.raises(SurgeryError, match="at least 7"):
        read_lines(tmp_path / "far.jsonl", 7)


def test_what_needs_no_model_is_refused_before_one_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.pretrained.load_any", lambda *_, **__: pytest.fail("before any model is read"))
    words = asked(folder, tmp_path / "out")
    result = invoke(*words, "--permutations", 18)
    assert result.exit_code == 1 and "overlap_test: n_permutations: found a smallest attainable p of 0.0526" in result.stderr

    few = "\n".join(json.dumps({"input_ids": [number, 5]}) for number in range(4))
    (tmp_path / "few.jsonl").write_text(few, encoding="utf-8")
    result = invoke(*(tmp_path / "few.jsonl" if word == folder / "b.jsonl" else word for word in words))
    assert result.exit_code == 1 and "conflict_test: samples: found a smallest attainable p of 0.0625" in result.stderr

    of_a, of_b = ((folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in "ab")
    (tmp_path / "mixed.jsonl").write_text("\n".join([*of_b, *of_a[4:1:-1]]), encoding="utf-8")
    result = invoke(*(tmp_path / "mixed.jsonl" if word == folder / "b.jsonl" else word for word in words))
    assert result.exit_code == 1 and result.stderr.count("interference: ") == 1
    assert (
        f"A ({folder / 'a.jsonl'}) and B ({tmp_path / 'mixed.jsonl'}): found the same 3 samples among 15 and 18"
        in result.stderr
    )
    (tmp_path / "again.jsonl").write_text("\n".join(reversed(of_a)), encoding="utf-8")
    for name in (folder / "a.jsonl", tmp_path / "again.jsonl"):
        result = invoke(*(name if word == folder / "n.jsonl" else word for word in words))
        assert (
            result.exit_code == 1 and f"control ({name}): found the same 15 samples; expected samples of two" in result.stderr
        )

    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "in it"):
        result = invoke(*asked(folder, out))
        assert result.exit_code == 1 and f"--out {out}: found a file at {tmp_path / 'file'}; expected a folder" in result.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine" and not (tmp_path / "out").exists()


def test_a_study_of_tasks_that_share_samples_is_refused(folder: Path) -> None:
    model = load_model()
    a, b, n = (collect(model, ids_of(folder / f"{name}.jsonl"), progress=False) for name in "abn")
    for name, task in (("a", a), ("b", b), ("n", n)):
        for number, part in enumerate(task.parts):
            part.about["rows"] = [f"{name} {number} {row}" for row in range(len(part.about["losses"]))]
    conflict_test(a, b, n_permutations=100, alpha=0.9)
    a.parts[0].about["rows"][2], b.parts[1].about["rows"][0] = n.parts[2].about["rows"][1], n.parts[0].about["rows"][3]
    with pytest.raises(SpecError) as raised:
        overlap_test(a, b, n)
    assert str(raised.value).splitlines()[0] == "overlap_test: 2 problems"
    assert "a and control: found the same 1 samples among 15 and 15; expected samples of two tasks" in str(raised.value)
    few = [collect(model, {"input_ids": batch["input_ids"][:2]}, progress=False) for batch in ids_of(folder / "a.jsonl")]
    with pytest.raises(SpecError, match=r"^overlap_test: samples: found a smallest attainable p of 0.167"):
        overlap_test(*few)
    with pytest.raises(SpecError, match=r"^conflict_test: n_permutations: found a smallest attainable p of 0.25"):
        conflict_test(a, b, n_permutations=3)


@pytest.mark.parametrize(("option", "value"), [("--rho", 0), ("--rho", "nan"), ("--alpha", 1), ("--alpha", 0), ("--batch", 0)])
def test_options_out_of_range_are_wrong_usage(folder: Path, tmp_path: Path, option: str, value: Any) -> None:
    result = invoke(*asked(folder, tmp_path / "out", option, value))
    assert result.exit_code == 2 and option in result.stderr and not (tmp_path / "out").exists()
