"""The comparison with others: that ways agree is checked before anything is timed, and what is missing is said."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import growth, pictures, plan, results, table
from benchmarks.comparison import environments, ours, run, worker, works
from benchmarks.comparison.environments import NotInstalled
from benchmarks.comparison.grid import grid, markdown, notes, ways_of
from benchmarks.comparison.hooked import Hooked
from benchmarks.comparison.ours import Auto
from benchmarks.comparison.plain import Eager, Sdpa
from benchmarks.comparison.run import compare
from benchmarks.comparison.task import Settings, Task
from benchmarks.comparison.way import NotOffered, Way, frozen
from surgery.cli import app
from surgery.unfused import BLOCK_ENTRIES

pytestmark = pytest.mark.usefixtures("uncollected")

TOY = Settings(rounds=2, heavy=1, layers=2, heads=4, kv_heads=2, d_head=16, vocabulary=64, length=12, prompt=4, steps=6)
HOME = [Eager.name, Hooked.name, ours.Reconstructed.name]


def cells(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["work"], row["way"]): row for row in found["rows"]}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def found(request: Any) -> dict[str, Any]:
    return worker.measure(replace(TOY, family=request.param), HOME)


def test_every_way_that_can_agrees_and_is_measured(found: dict[str, Any]) -> None:
    family = "llama" if ("sweep", Sdpa.name) not in cells(found) else "gpt2"
    wanted = [work.name for work in works.chosen(replace(TOY, family=family))]
    assert len(wanted) == (15 if family == "gpt2" else 14)
    for work in wanted:
        for way in (Auto.name, Hooked.name):
            cell = cells(found)[work, way]
            assert cell["value"] > 0 and cell["low"] <= cell["value"] <= cell["high"], (work, way, cell)
            assert cell["difference"] <= 1e-4 * cell["largest"], (work, way)
            assert (cell["largest"] > 0) == (work != "install")
        assert not any("note" in row for row in found["rows"])
        assert ("memory" in cells(found)[work, Auto.name]) == next(w.memory for w in works.WORKS if w.name == work)
    uncut = cells(found)["forward", Sdpa.name]
    assert uncut["difference"] == 0, "no cuts: equal bit for bit"
    assert cells(found)["cut_z", Eager.name]["lacks"] == "nothing is cut"
    assert cells(found)["patterns", Eager.name]["value"] > 0 and "lacks" in cells(found)["patterns", Sdpa.name]


def test_works_that_cut_change_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {work.name for work in works.WORKS if work.cuts} == {
        "cut_z",
        "freeze_qk",
        "step_cut",
        "decode_cut",
        "sweep",
        "train_cut",
    }
    monkeypatch.setattr(Auto, "cut", lambda self, *args, **options: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="z of two heads cut, every layer: changes nothing that is compared"):
        worker.measure(TOY, [])


def test_a_disagreement_is_printed_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Hooked.cut

    def another_head(self: Hooked, site: str, layers: Any, heads: Any, ste: bool = False) -> Any:
        return right(self, site, layers, [(head + 1) % 4 for head in heads], ste)

    monkeypatch.setattr(Hooked, "cut", another_head)
    small = replace(TOY, layers=1, rounds=1)
    monkeypatch.setitem(works.BY_LENGTH, 128, ("forward", "cut_z"))
    found = worker.measure(small, [Hooked.name])
    cell = cells(found)["cut_z", Hooked.name]
    assert "value" not in cell and cell["note"].startswith("differs from ours by ")
    assert cells(found)["forward", Hooked.name]["value"] > 0
    report = {**found, "machine": {}, "settings": asdict(small)}
    assert grid(report)[1][-2:] == ["differs", grid(report)[1][-1]]
    assert any(note.startswith(f"{Hooked.name}: differs from ours by") for note in notes(report))


class Failing(Way):
    name, key, package = "failing", "failing", None

    def logits(self, ids: Tensor, past: Any = None) -> Tensor:
        raise KeyError("of its own")


class Wrong(Failing):
    """Gives another shape."""

    name, key = "wrong", "wrong"

    def logits(self, ids: Tensor, past: Any = None) -> Tensor:
        return self.model(ids).logits[:, :1]


class NotStarting(Way):
    name, key, package = "not starting", "not starting", None

    def __init__(self, task: Task) -> None:
        raise OSError("no library")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setitem(works.BY_LENGTH, 128, ("forward", "patterns", "step"))
    return TOY


def test_what_others_raise_is_noted_and_the_rest_is_measured(short: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {way.name: way for way in (Failing, Wrong, NotStarting)}
    monkeypatch.setattr(worker, "WAYS", {**worker.WAYS, **ways})
    found = cells(worker.measure(short, list(ways)))
    assert found["forward", "failing"]["note"] == "fails: KeyError: 'of its own'"
    assert found["forward", "not starting"]["note"] == "does not start: OSError: no library"
    assert "where ours are [(1, 12, 64)]" in found["forward", "wrong"]["note"]
    assert found["patterns", "failing"]["lacks"] and found["forward", Auto.name]["value"] > 0


def test_an_error_of_ours_is_not_hidden(short: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Auto, heads: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(Auto, "patterns", broken)
    with pytest.raises(ValueError, match="broken"):
        worker.measure(short, [])


def test_work_that_does_not_fit_into_memory_is_left_out(short: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 4 * TOY.length * TOY.heads * TOY.layers * TOY.length
    monkeypatch.setattr(worker, "available_bytes", lambda device: 5 * held - 1)
    found = cells(worker.measure(short, []))
    assert found["patterns", Auto.name]["note"].startswith("needs ") and "value" in found["forward", Auto.name]
    monkeypatch.setattr(worker, "available_bytes", lambda device: 5 * held)
    assert "value" in cells(worker.measure(short, []))["patterns", Auto.name]


def test_twins_share_weights_but_not_gradients() -> None:
    task = Task(TOY)
    one, other = task.twin("sdpa"), task.twin("eager")
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr() and a is not b
    one.requires_grad_(False)
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert one.config._attn_implementation == "sdpa" and other.config._attn_implementation == "eager"


def test_processes_are_put_together(tmp_path: Path) -> None:
    """Real processes: one of this environment, and of libraries that cannot be installed, or are not there."""
    said: list[str] = []

    def python_of(package: str) -> Path:
        if package == "nnsight":
            raise NotInstalled("no index")
        return Path(sys.executable)

    names = [Hooked.name, "nnsight", "pyvene"]
    small = replace(TOY, length=500, rounds=1, vocabulary=32, d_head=8, layers=1, family="llama")
    found = compare(small, names, python_of, said.append)
    by_place = cells(found)
    assert [row["work"] for row in found["rows"]] == sorted(
        (row["work"] for row in found["rows"]), key=[work.name for work in works.WORKS].index
    )
    assert len(by_place) == len(found["rows"]), "what runs in every process is there once"
    assert by_place["forward", "nnsight"]["note"] == "not installed: no index"
    if not environments.is_here("pyvene"):
        assert by_place["cut_z", "pyvene"]["note"].startswith("does not start: PackageNotFoundError")
    assert by_place["cut_z", Hooked.name]["value"] > 0 and "ours" not in by_place["cut_z", Hooked.name]
    assert any(line.endswith(f": forward: {Auto.name}") for line in said)
    found["machine"]["date"] = "today"
    text = "\n".join(markdown(found))
    assert ways_of(found)[:1] == [Sdpa.name] and f"| forward | {grid(found)[0][1]} |" in text
    assert "500 tokens: CPU time over unpatched sdpa" in text and "* nnsight: not installed: no index" in text
    path = tmp_path / "compare-llama-500-cpu.json"
    results.save(path, found)
    page = "<!-- benchmark:compare-llama-500 -->\n<!-- /benchmark:compare-llama-500 -->\n"
    assert text in table.fill(page, tmp_path)


def test_a_process_of_another_library_that_dies_loses_its_own_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one environment with ours, as --here has it."""
    shown = [{"work": "forward", "way": Auto.name, "value": 3.0, "cpu_value": 2.0}]

    def process(python: Path, settings: Settings, names: list[str], say: Any) -> dict[str, Any]:
        if names == ["pyvene"]:
            raise RuntimeError("killed")
        more = [
            {"work": "forward", "way": name, **dict.fromkeys(("value", "cpu_value", "low", "high", "cpu_low", "cpu_high"), 4.0)}
            for name in names
        ]
        return {"rows": shown + more, "versions": dict.fromkeys(names, "9"), "with": {"torch": "0.1", "transformers": "5"}}

    monkeypatch.setattr(run, "_process", process)
    monkeypatch.setattr(
        run.machine,
        "describe",
        lambda device: {
            **dict.fromkeys(("cpu", "threads", "cores", "python", "date"), "a"),
            "torch": "0.2",
            "transformers": "5",
        },
    )
    found = compare(TOY, ["nnsight", "pyvene"], lambda package: Path(sys.executable), print)
    assert cells(found)["forward", "pyvene"]["note"] == "its process fails: killed"
    assert cells(found)["forward", "nnsight"]["ours"] == 2.0
    on_a_gpu = compare(replace(TOY, device="cuda"), ["nnsight"], lambda package: Path(sys.executable), print)
    assert cells(on_a_gpu)["forward", "nnsight"]["ours"] == 3.0
    found["rows"] = [row for row in found["rows"] if row["way"] != Auto.name]
    text = "\n".join(markdown(found))
    assert "in the process of each of the others" in text and "nnsight |\n| --- | ---: |\n| forward | 2.00 |\n" in text
    assert "nnsight 9 (with torch 0.1)" in text


def test_a_process_that_prints_much_is_read_to_its_end(tmp_path: Path) -> None:
    chatty = tmp_path / "python"
    chatty.write_text(f"#!{sys.executable}\nprint('a' * 2**20, flush=True)\nprint('{{\"rows\": []}}')\n", encoding="utf-8")
    chatty.chmod(0o755)
    assert run._process(chatty, TOY, [], print) == {"rows": []}
    chatty.write_text(f"#!{sys.executable}\nprint('so it is')\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="no findings"):
        run._process(chatty, TOY, [], print)


def test_nothing_to_draw_is_no_picture(found: dict[str, Any], tmp_path: Path) -> None:
    rows = [row for row in found["rows"] if row["work"] == "cut_z"]
    for length in (12, 24):
        content = {**found, "machine": {}, "settings": asdict(replace(TOY, length=length)), "rows": rows}
        results.save(tmp_path / f"compare-gpt2-{length}-cpu.json", content)
    stems = ["compare-gpt2-12-cpu", "compare-gpt2-24-cpu", "memory-gpt2-cpu"]
    assert [path.stem for path in pictures.stale(tmp_path, tmp_path)] == stems, "wanted as soon as there are comparisons"
    drawn = pictures.memory([json.loads((tmp_path / "compare-gpt2-12-cpu.json").read_text(encoding="utf-8"))] * 2)
    assert [axes.get_title() for axes in drawn.axes] == ["z of two heads cut, every layer"]
    assert "models of 2 layers" in drawn.get_suptitle()
    peak = next(row["memory_mib"] for row in rows if row["way"] == Auto.name)
    [line] = [line for line in drawn.axes[0].lines if line.get_label() == Auto.name]
    assert line.get_ydata()[0] == peak
    for length in (12, 24):
        content = {**found, "settings": asdict(replace(TOY, length=length)), "rows": [{"work": "forward", "way": Sdpa.name}]}
        results.save(tmp_path / f"compare-gpt2-{length}-cpu.json", content)
    assert pictures.draw(tmp_path, tmp_path / "none") == []


def test_the_plan_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"overhead-cpu.json: run python -m benchmarks.overhead --json"):
        plan.Constants.of(tmp_path)
    results.save(tmp_path / "overhead-cpu.json", {"rows": []})
    with pytest.raises(ValueError, match="has 0 rows of scores of one head scaled, not one; run "):
        plan.Constants.of(tmp_path)


def test_a_process_of_ours_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="'nobody'"):
        compare(replace(TOY, family="nobody"), [Hooked.name], environments.here, print)


def test_environments_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    result = subprocess.CompletedProcess([], 0, "", "")

    def pip(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return result

    monkeypatch.setattr(environments.subprocess, "run", pip)
    monkeypatch.setattr(environments.venv, "create", lambda place, **options: Path(place).mkdir())
    said: list[str] = []
    python = environments.python_of("nnsight", tmp_path, said.append)
    assert python == tmp_path / "nnsight" / "bin" / "python"
    assert commands[0][:4] == [str(python), "-m", "pip", "install"] and "nnsight>=0.8,<1" in commands[0]
    assert f"torch=={torch.__version__.partition('+')[0]}" in commands[0] and len(said) == 1
    assert environments.python_of("nnsight", tmp_path, said.append) == python and len(commands) == len(said) == 1
    assert environments.python_of("transformer-lens", tmp_path, said.append) and "transformers<5.24" in commands[-1]
    result = subprocess.CompletedProcess([], 1, "", "looking\nERROR: no matching distribution\n")
    with pytest.raises(NotInstalled, match="ERROR: no matching distribution"):
        environments.python_of("pyvene", tmp_path, said.append)
    assert set(environments.REQUIREMENTS) == {way.package for way in worker.WAYS.values()} - {None}
    with pytest.raises(NotInstalled, match="not in this environment"):
        environments.here("no-such-package")


@pytest.fixture(scope="module")
def grown() -> list[dict[str, Any]]:
    return list(growth.measure(SMALL))


def test_pictures_say_what_they_were_drawn_from(
    found: dict[str, Any], grown: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in (12, 24):
        settings = asdict(replace(TOY, length=length))
        content = {**found, "machine": {"gpu": "a"} if length == 24 else {}, "settings": settings}
        results.save(tmp_path / f"compare-gpt2-{length}-cpu.json", content)
    results.save(tmp_path / "growth-cpu.json", {"rows": grown})
    written = pictures.draw(tmp_path, tmp_path / "pictures")
    names = ["compare-gpt2-12-cpu", "compare-gpt2-24-cpu", "memory-gpt2-cpu", "growth-cpu"]
    assert [path.stem for path in written] == names and not pictures.stale(tmp_path, tmp_path / "pictures")
    bars = written[0].read_text(encoding="utf-8")
    assert "z of two heads cut, every layer" in bars and "attention-surgery" in bars and "CPU time over unpatched sdpa" in bars
    again = [path.read_bytes() for path in written]
    pictures.draw(tmp_path, tmp_path / "pictures")
    assert again == [path.read_bytes() for path in written], "the same numbers, the same picture"
    changed = json.loads((tmp_path / "compare-gpt2-12-cpu.json").read_text(encoding="utf-8"))
    changed["rows"][0]["value"] = 2.0
    results.save(tmp_path / "compare-gpt2-12-cpu.json", changed)
    assert [path.stem for path in pictures.stale(tmp_path, tmp_path / "pictures")] == ["compare-gpt2-12-cpu", "memory-gpt2-cpu"]
    monkeypatch.setattr("sys.argv", ["pictures", f"--results={tmp_path}", f"--out={tmp_path / 'pictures'}", "--check"])
    assert pictures.main() == 1
    monkeypatch.setattr("sys.argv", ["pictures", f"--results={tmp_path}", f"--out={tmp_path / 'pictures'}"])
    assert pictures.main() == 0 and not pictures.stale(tmp_path, tmp_path / "pictures")


SMALL = replace(growth.QUICK, rounds=1, d_head=4, short=8, length=16)


def test_growth_is_measured_in_layers_and_heads() -> None:
    rows = list(growth.measure(SMALL))
    assert {(row["series"], row["at"]) for row in rows} == {
        *(
            (what, layers)
            for what in ("patch and unpatch", "forward, no cuts", "forward, z of two heads cut")
            for layers in (1, 2)
        ),
        *((what, heads) for what in ("scores scaled", "pattern captured") for heads in (0, 1, 4)),
        *(('kernel="eager", no cuts', heads) for heads in (0, 4)),
    }
    assert all(row["value"] > 0 and row["what"].startswith("CPU ") for row in rows)


def test_pages_and_pictures_are_those_of_the_committed_results() -> None:
    for page in table.PAGES:
        text = page.read_text(encoding="utf-8")
        if "<!-- benchmark:" in text:
            assert table.fill(text) == text, f"{page.name}: run python -m benchmarks.table"
    # With no comparison among the results nothing can be stale: test_nothing_to_draw_is_no_picture has its own.
    compared = list(results.FOLDER.glob("compare-*.json"))
    assert bool(compared) <= bool(list(pictures._wanted(results.FOLDER, results.FOLDER / "pictures")))
    assert not pictures.stale(results.FOLDER, results.FOLDER / "pictures"), "run python -m benchmarks.pictures"


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.commands.bench.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["bench", "--help"])
    assert done.exit_code == 1 and "found no pandas and no matplotlib; expected" in done.stderr
    assert 'pip install -e ".[analysis]"' in done.stderr


def test_the_command_runs_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [
        sys.executable,
        "-m",
        "surgery.cli",
        "bench",
        "--quick",
        "--rounds=1",
        "--families=llama",
        "--ways=hooks",
        f"--out={tmp_path}",
    ]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "plain torch hooks" in done.stdout and "TransformerLens" not in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {f"compare-llama-32-cpu.{kind}" for kind in ("json", "md", "svg")}
    seen: list[Any] = []

    def run(command: list[str], **options: Any) -> Any:
        seen.append(command[1:])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert CliRunner().invoke(app, ["bench", "--help", "--ways", "hooks"]).exit_code == 3
    assert seen == [["-m", "benchmarks", "--help", "--ways", "hooks"]]
    import surgery.commands.bench as command

    monkeypatch.setattr(command, "__file__", str(tmp_path / "a" / "b" / "bench.py"))
    away = CliRunner().invoke(app, ["bench"])
    assert away.exit_code == 1 and "found no benchmarks in" in away.output and "Clone the repository" in away.output


def test_tokens_agree_or_do_not_and_cuts_have_to_be_seen() -> None:
    ids = torch.tensor([[1, 2, 1000]])
    assert worker.disagreement([ids], [ids.clone()], 7.0, 1e-3) is None
    assert worker.disagreement([ids + torch.tensor([0, 1, 0])], [ids], None, 1e-3) == "differs from ours in 1 of 3 tokens"
    assert worker.disagreement([ids.float()], [ids], None, 1e-3) is not None
    ones, half = torch.ones(4), worker.CLOSE[torch.bfloat16]
    assert worker.disagreement([1.01 * ones], [ones], None, half) is None
    said = worker.disagreement([1.01 * ones], [ones], 0.01, half)
    assert said is not None and said.startswith("differs from ours by 0.01, where the cut changes 0.01 (half precision")
    assert worker.disagreement([1.0001 * ones], [ones], 0.01, half) is None
    not_a_number = [ones, ones * torch.nan]
    assert worker.disagreement(not_a_number, [ones, ones], None, half) is not None


def test_short_heavy_work_is_called_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    right = worker.take_turns

    def take_turns(functions: Any, warmup: int, **options: Any) -> Any:
        seen.append(warmup)
        return right(functions, warmup=warmup, **options)

    monkeypatch.setattr(worker, "take_turns", take_turns)
    monkeypatch.setitem(works.BY_LENGTH, 128, ("decode",))
    worker.measure(TOY, [])
    monkeypatch.setattr(worker, "SHORT", 0.0)
    worker.measure(TOY, [])
    assert seen == [1, 0]


def test_ours_out_of_memory_is_a_note(short: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Auto, heads: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Auto, "patterns", full)
    found = cells(worker.measure(short, [Hooked.name]))
    for way in (Auto.name, Hooked.name):
        assert "runs out of memory" in found["patterns", way]["note"] and "value" in found["forward", way]


def test_memory_is_measured_in_models_of_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(works.BY_LENGTH, 128, ("forward", "patterns"))
    one, three = (cells(worker.measure(replace(TOY, layers=layers, rounds=1), [Hooked.name])) for layers in (1, 3))
    for place, cell in one.items():
        if "memory_mib" in cell:
            assert cell["memory_mib"] == pytest.approx(three[place]["memory_mib"], rel=0.05), place
            assert cell["memory_layers"] == worker.MEMORY_LAYERS
    assert "memory_mib" in one["patterns", Hooked.name]


def test_eager_ways_hold_the_patterns_of_all_heads() -> None:
    work = next(work for work in works.WORKS if work.name == "two_patterns")
    task = Task(TOY)
    s = replace(TOY, layers=3, heads=8)
    numbers = {way: worker.held(work, way(task), s) / s.length for way in (Auto, Hooked, Eager)}
    assert numbers == {Auto: 2 * 3, Hooked: 2 * 3 + 8, Eager: 8 * 3}


def test_attribution_is_charged_for_no_gradient_of_weights() -> None:
    model = Task(TOY).twin("sdpa")
    fixed = next(model.parameters())
    fixed.requires_grad_(False)
    with frozen(model):
        logits = model(Task(TOY).ids).logits
        assert logits.requires_grad, "gradients come to activations"
        logits.sum().backward()
        with torch.no_grad():
            assert not model(Task(TOY).ids).logits.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [fixed]
    with torch.enable_grad():
        assert not model.get_input_embeddings()._forward_hooks


def test_unpatched_ways_offer_no_surgery() -> None:
    way = Sdpa(Task(TOY))
    for call in (lambda: way.cut("z", [0], [0]), lambda: way.patterns(None), way.everything, way.importance):
        with pytest.raises(NotOffered):
            call()


def test_the_plan_is_made_of_measured_constants(tmp_path: Path) -> None:
    group = "growth of peak memory of the attention module alone over unpatched sdpa"
    memory = [
        {"group": group, "what": "scores of one head scaled", "value": 0.25, "matrix_bytes": 2 * 4 * BLOCK_ENTRIES["cpu"]},
        {"group": group, "what": "pattern of one head captured", "value": 1.5},
    ]
    shorter = [{**row, "part": "unfused", "value": 9.0} for row in memory]  # at another length, under the same names
    results.save(tmp_path / "overhead-cpu.json", {"rows": [*({"part": "memory", **row} for row in memory), *shorter]})
    swept = [{"what": "CPU time over that of the plain loop, logits of one position", "value": 0.75}]
    results.save(tmp_path / "sweep-cpu.json", {"rows": swept, "settings": {"layers": 2}})
    scored = [{"work": "importance", "way": Auto.name, "cpu_value": 2.5}, {"work": "importance", "way": Hooked.name}]
    results.save(tmp_path / "compare-gpt2-128-cpu.json", {"rows": scored})
    assert plan.Constants.of(tmp_path) == plan.Constants(blocks=0.5, captured=1.5, sweep=1.0, attribution=2.5)
    small = plan.Shape("toy", 2, 4, 2, 8, 32, 64, 100, 2**20)
    attention = 2 * (32 * 4 * 8 + 32 * 2 * 8)
    assert small.parameters == 2 * (attention + 3 * 32 * 64) + 2 * 100 * 32
    lines = list(plan.lines(tmp_path, small))
    assert f"| pattern of a head captured, one layer | 1.50 matrices of tokens² | {1.5 * 2**40 * 2 / 2**40:.1f} TiB |" in lines
    assert any(
        line.startswith("| sweep over all 8 heads | 1.00 × (2 + 1) / (2 × 2) of a forward each: 6 forwards |") for line in lines
    )
    assert any("| 0.5 blocks of 16,777,216 entries, float32 | 32 MiB |" in line for line in lines)
    page = "<!-- plan -->\nold\n<!-- /plan -->\n<!-- benchmark:compare-gpt2-128 -->\n<!-- /benchmark:compare-gpt2-128 -->\n"
    with pytest.raises(KeyError):
        table.fill(page, tmp_path)  # these results have no machine
    # By a count of Llama 3 70B's parameters that is published: 70.6 billion.
    assert round(plan.LARGE.parameters / 1e9, 1) == 70.6
