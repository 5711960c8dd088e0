"""The benchmarks run and count right; nothing here is timed against a bound."""

from __future__ import annotations

import functools
import gc
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery.unfused
from benchmarks import (
    added,
    compiled,
    coverage,
    export,
    growth,
    importance,
    interference,
    machine,
    memory,
    models,
    overhead,
    patching,
    results,
    setting,
    steps,
    sweep,
    table,
    unfused,
)
from benchmarks.comparison import task
from benchmarks.resident import watched
from benchmarks.timing import Pairs, Spread, interleave
from surgery import Edit, Spec, patched
from surgery.analysis.statistics import Paired, paired
from surgery.classes import SurgicalAttention

pytestmark = pytest.mark.usefixtures("uncollected")
COLLECT = gc.collect

TOY = setting.Settings(
    rounds=2,
    layers=2,
    heads=4,
    kv_heads=2,
    d_head=4,
    batch=2,
    length=6,
    prompt=3,
    steps=3,
    memory_length=64,
    patch_layers=(1, 2),
)


def numbers(found: results.Row) -> tuple[float, float, float]:
    return found["value"], found["low"], found["high"]


@pytest.fixture(scope="module")
def rows() -> list[results.Row]:
    with torch.no_grad():
        return [row for part in ("forward", "eager", "grouped", "decoding") for row in overhead.PARTS[part](TOY)]


def test_every_part_gives_ratios(rows: list[results.Row]) -> None:
    assert len(rows) == len({(row["group"], row["what"]) for row in rows}) >= 24
    for row in rows:
        value, low, high = numbers(row)
        assert 0 < low <= value <= high and row["rounds"] == TOY.rounds
        assert (row["met"] is None) == (row["target"] is None)
    targets = {row["target"] for row in rows}
    assert targets == {None, 1.02, 1.03, 1.05, 1.10}


@torch.no_grad()
def test_steps_of_one_token_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(steps.one_token(TOY))
    assert len(rows) == len({(row["group"], row["what"]) for row in rows}) == 2 * 2 * 8
    assert all(row["rounds"] == steps.ROUNDS * TOY.rounds and row["value"] > 0 for row in rows)
    assert {(row["what"] == "patched, no cuts", row["target"]) for row in rows} == {(True, 1.05), (False, 1.10)}
    assert any("k of their groups" in row["what"] for row in rows) and any("cache of 48" in row["group"] for row in rows)
    plain, twin, ids = TOY.build()
    expected = steps.on_cache(plain, ids)()
    with patched(twin, Spec(Edit("z", "identity"))), pytest.raises(RuntimeError, match="idle: the cut changes nothing"):
        steps.check_step("idle", twin, ids, expected)
    with patched(twin, Edit("z", lambda z: z * z.shape[2])), pytest.raises(RuntimeError, match="a step differs from the whole"):
        steps.check_step("by step", twin, ids, expected)


@torch.no_grad()
def test_what_is_added_is_shared_out() -> None:
    rows = list(added.rows(replace(added.QUICK, rounds=2, heads=4, length=4)))
    times = [row for row in rows if row["group"].startswith("CPU time of one token")]
    shares = {(row["group"].partition(":")[0], row["what"]): row["value"] for row in rows[len(times) :]}
    assert len(times) == 8 and len(shares) == 8 * 5
    for what in (row["what"] for row in times):
        own = {part: value for (cut, part), value in shares.items() if cut == what}
        assert sum(own.values()) == pytest.approx(1) and min(own.values()) >= 0
        assert [part for part, value in own.items() if value == 0] == (
            ["the cuts' own arithmetic", "points: finding what is to be done", "reading and writing channels at projections"]
            if what == "patched, no cuts"
            else ([] if what.startswith(("q ", "k ")) else ["reading and writing channels at projections"])
        )


def test_a_step_starts_from_the_same_cache_each_time() -> None:
    with torch.no_grad():
        plain, _, ids = TOY.build()
        for make in (steps.on_cache, compiled.on_static_cache):
            step = make(plain, ids)
            first, second = step(), step()
            assert torch.equal(first, second) and torch.allclose(first, setting.states(plain, ids)[:, -1:], atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, while it first compiles
@torch.no_grad()
def test_compiled_models_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("benchmarks.timing.gc.collect", COLLECT)  # one code object has room for a few live models
    rows = list(compiled.rows(replace(TOY, layers=1, rounds=1)))
    assert len(rows) == 2 * 7 and {row["target"] for row in rows} == {None, 1.0, 1.02, 1.05, 1.1}
    graphs = [row for row in rows if row["group"].startswith("graphs")]
    # Unpatched, the twin runs the same graph.
    assert [row["value"] for row in graphs] == [1, 1] and all(row["graphs"] == [(1, 0), *[(1, 1)] * 5] for row in graphs)
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="cut: compiled, it differs by 1"):
        compiled.check("cut", x, x + 1, x + 2, changes=True)
    with pytest.raises(RuntimeError, match="cut: the cut changes nothing"):
        compiled.check("cut", x, x, x, changes=True)
    with pytest.raises(RuntimeError, match="no cuts: the cut changes something"):
        compiled.check("no cuts", x, x, x + 1, changes=False)


@torch.no_grad()
def test_one_unfused_head_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(module: str, case: str, *arguments: str) -> dict[str, int]:
        assert module == "memory" and arguments[0] == f"--length={TOY.unfused_length}" and "--whole-model" not in arguments
        return {"peak": {"fused": 100, "no-op": 100, "capture-one": 200}.get(case, 110), "resident": 0, "matrix": 100}

    monkeypatch.setattr(memory, "child", measured)
    rows = list(unfused.rows(TOY))
    assert [row["target"] for row in rows] == [1.3] * 6 + [None] + [1.05] * 3 and all(row["value"] > 0 for row in rows[:6])
    assert [row["value"] for row in rows[6:]] == [0, 1, 0.1, 0.1]


def test_spread_and_ratios_are_of_pairs() -> None:
    found = Pairs(((1.0, 2.0), (2.0, 2.0), (4.0, 2.0)), ((1.0, 3.0),) * 3).to_dict()
    assert numbers(found) == (1.0, 0.75, 1.5)
    assert found["ratio_of_medians"] == 1.0 and found["cpu_value"] == 3.0 and found["seconds"] == [2.0, 2.0]
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


def test_interleave_runs_both_once_a_round_in_a_drawn_order() -> None:
    calls: list[str] = []
    found = interleave(lambda: calls.append("a"), lambda: calls.append("b"), rounds=20, seed=1, warmup=1)
    rounds = ["".join(calls[i : i + 2]) for i in range(2, len(calls), 2)]
    assert len(found.wall) == len(found.cpu) == len(rounds) == 20 and set(rounds) == {"ab", "ba"}


def test_twins_share_weights_and_nothing_else() -> None:
    plain = models.gpt2(2, 2, 8, vocabulary=11)
    twin = models.twin(plain)
    ids = models.tokens(1, 4, vocabulary=11)
    assert [p.data_ptr() for p in plain.parameters()] == [p.data_ptr() for p in twin.parameters()]
    before = plain(ids).last_hidden_state
    with patched(twin, Edit("z", "zero")):
        assert not any(isinstance(module, SurgicalAttention) for module in plain.modules())
        assert torch.equal(plain(ids).last_hidden_state, before)


def test_what_computes_something_else_is_not_timed() -> None:
    plain, twin, ids = TOY.build()
    expected = setting.states(plain, ids)
    setting.agree("no cuts", setting.states(twin, ids), expected)
    with pytest.raises(RuntimeError, match=r"no cuts: differs from the unpatched model by \d"):
        setting.agree("no cuts", setting.states(twin, ids) + 1, expected)
    idle = Spec(Edit("z", "identity"))
    with patched(twin, idle), pytest.raises(RuntimeError, match="idle: the cut changes nothing"):
        setting.check_cut("idle", twin, idle, ids, expected)
    spec, other = (Spec(Edit("z", "scale", value=value)) for value in (0.5, 2.0))
    with patched(twin, spec):
        setting.check_cut("half", twin, spec, ids, expected)
        with pytest.raises(RuntimeError, match=r"half: the kernels differ by \d"):
            setting.check_cut("half", twin, other, ids, expected)


@pytest.fixture(scope="module")
def peaks() -> dict[str, dict[str, int]]:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"cpu": 512 * 16})  # as many blocks as a long sequence has
        return {case: memory.measure(case, 512) for case in memory.CASES}


def test_peak_memory_counts_matrices(peaks: dict[str, dict[str, int]]) -> None:
    matrix = peaks["fused"]["matrix"]
    grown = {case: (found["peak"] - peaks["fused"]["peak"]) / matrix for case, found in peaks.items()}
    assert matrix == 512 * 512 * 4
    assert grown["no-op"] == 0
    # What is captured stays; what is computed on the way goes, block by block.
    assert 1 <= grown["capture-one"] < 1.3
    assert all(0 <= grown[case] < 0.5 for case in ("scores-one", "pattern-one"))
    assert grown["scores-all"] < 3, "their z is one and a half matrices"
    assert grown["eager"] > memory.HEADS


def test_peak_of_a_known_computation() -> None:
    def forward() -> None:
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        torch.exp(second)

    assert memory.peak_cpu(forward) == pytest.approx(2 * 4_000_000, rel=0.01)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize(("place", "case"), [("memory", "bake"), ("shards", "export"), ("disk", "save"), ("disk", "bake")])
def test_exports_are_measured(place: str, case: str, tmp_path: Path) -> None:
    found = export.measure(place, case, export.Settings(layers=2, heads=4, d_head=8, shards=3), tmp_path)
    assert found["size"] > 100_000 and found["wall"] > 0 and found["growth"] >= 0
    files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert (files > 1) == (place != "memory")


def test_an_export_of_something_else_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "export_checkpoint", lambda model, folder, **options: folder.mkdir())
    with pytest.raises(RuntimeError, match="memory, export: 0 bytes were written of a model of"):
        export.measure("memory", "export", export.Settings(layers=1, heads=4, d_head=8), tmp_path)


def test_highest_memory_of_a_known_computation() -> None:
    """Of this process, of one that it starts, and not of a mapped file."""
    with watched() as found:
        torch.ones(50_000_000 // 4).sum()
        script = "x = bytearray(b'x') * 90_000_000; import time; time.sleep(0.3)"
        subprocess.run([sys.executable, "-S", "-c", script], check=True)
    assert 90_000_000 < found["highest"] - found["before"] < 130_000_000


def test_exports_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def run(*arguments: str) -> dict[str, float]:
        calls.append(arguments)
        return {"growth": 100.0 * (1 + (len(calls) - 1) // 12), "size": 200.0, "wall": 1.0}

    monkeypatch.setattr(export, "child", run)
    rows = list(export.rows(export.Settings(rounds=3)))
    assert len(rows) == 12 and {numbers(row) for row in rows} == {(1.0, 0.75, 1.25)}
    orders = [[call[1:3] for call in calls[i : i + 12]] for i in (0, 12, 24)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert json.loads(calls[0][-1])["rounds"] == 3
    assert {row["met"] for row in rows if row["target"] is not None} == {False}


def test_patching_is_measured_and_summed_up() -> None:
    found = patching.measure(1, heads=2, d_head=4)
    assert set(found) == {*patching.STEPS, "forward"} and all(seconds > 0 for seconds in found.values())

    def run(layers: int, seconds: float) -> dict[str, float]:
        return {**dict.fromkeys(patching.STEPS, 0.1 + seconds * layers), "forward": 0.5}

    rows = {(row["group"], row["what"]): row for row in patching.summary({n: [run(n, 0.05)] * 2 for n in (6, 12, 24)})}
    first, growth = (row for row in rows.values() if row["what"].startswith("first patch"))
    assert first["value"] == pytest.approx(1.4) and first["met"] is True
    assert growth["value"] == pytest.approx(1.3 / 0.7) and growth["target"] == 2 and growth["met"] is True
    assert growth["seconds_per_layer"] == pytest.approx(0.05) and growth["seconds_constant"] == pytest.approx(0.1)
    slow = next(iter(patching.summary({12: [run(12, 0.2)]})))
    assert slow["met"] is False


def test_a_measurement_in_a_process_of_its_own() -> None:
    found = results.child("patching", "--layers=1")
    assert found["forward"] > 0
    with pytest.raises(RuntimeError, match=r"-m benchmarks.nothing failed:\n.*No module named benchmarks.nothing"):
        results.child("nothing")


def result(tmp_path: Path, **more: Any) -> Path:
    """A folder with the results of two rows."""
    where = {**machine.describe("cpu"), **more}
    seconds = {"seconds": [0.25, 0.5]}
    rows = [
        results.row("forward", "no cuts", {"value": 1.01, "low": 1.0, "high": 1.02, **seconds}, 1.02),
        results.row("forward", "cut", {"value": 1.25, "low": 1.2, "high": 1.3, **seconds}, 1.05),
        results.row("memory", "one head", {"value": 4.06, "low": 4.06, "high": 4.06}),
    ]
    content = {"benchmark": "toy", "machine": where, "settings": asdict(TOY), "rows": rows}
    results.save(tmp_path / "results" / "toy-cpu.json", content)
    return tmp_path / "results"


PAGE = "# Title\n\n<!-- benchmark:toy -->\nold\n<!-- /benchmark:toy -->\nrest\n"


def test_table_is_written_between_its_markers(tmp_path: Path) -> None:
    filled = table.fill(PAGE, result(tmp_path))
    assert filled.startswith("# Title\n\n<!-- benchmark:toy -->\n") and filled.endswith("<!-- /benchmark:toy -->\nrest\n")
    assert "| no cuts | 1.010 | 1.000 – 1.020 | ≤ 1.02 | yes |" in filled
    assert "| cut | 1.250 | 1.200 – 1.300 | ≤ 1.05 | no |" in filled
    assert "| one head | 4.06 |  |  |  |" in filled and "old" not in filled
    assert f"torch {torch.__version__}" in filled and "2 interleaved rounds" in filled
    assert " ms" not in filled
    assert table.fill(filled, tmp_path / "results") == filled


def test_absolute_times_only_of_a_gpu(tmp_path: Path) -> None:
    filled = table.fill(PAGE, result(tmp_path, gpu="NVIDIA H100", cuda="13.0"))
    assert "| no cuts | 1.010 | 1.000 – 1.020 | ≤ 1.02 | yes | 500.0 ms |" in filled
    assert filled.count("NVIDIA H100 (CUDA 13.0); torch") == 1


def test_a_row_for_each_group_that_has_targets(tmp_path: Path) -> None:
    filled = table.fill(PAGE.replace("benchmark:", "closest:"), result(tmp_path))
    assert "| Forward | cut | 1.250 | 1.200 – 1.300 | ≤ 1.05 | 1 of 2 |\n" in filled
    assert "no cuts" not in filled and "emory" not in filled and "2 interleaved rounds" in filled


SETTINGS: dict[str, Any] = {
    "added": added.Settings,
    "compare": task.Settings,
    "coverage": coverage.Settings,
    "export": export.Settings,
    "growth": growth.Settings,
    "importance_demo": importance.DemoSettings,
    "interference": interference.Settings,
    "interference_planted": interference.PlantedSettings,
    "overhead": setting.Settings,
    "sweep": sweep.Settings,
}
"""By the beginning of the name of committed results."""


def test_committed_results_are_of_the_settings_that_there_are() -> None:
    """A script that was rewritten since gives other numbers than its results."""
    found = sorted(results.FOLDER.glob("*.json"))
    assert {path.name.partition("-")[0] for path in found} == SETTINGS.keys()
    for path in found:
        names = {field.name for field in fields(SETTINGS[path.name.partition("-")[0]])}
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        assert settings.keys() == names, f"{path.name}: {results.made_by(path.name.partition('-')[0])}"


def test_check_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, page = result(tmp_path), tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")

    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["table", f"--file={page}", f"--results={folder}", *arguments])
        return table.main()

    assert call("--check") == 1 and page.read_text(encoding="utf-8") == PAGE
    assert call() == 0 and call("--check") == 0
    page.write_text(re.sub("1.010", "1.000", page.read_text(encoding="utf-8")), encoding="utf-8")
    assert call("--check") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no places", "0 of 0 places"),
        ("<!-- benchmark:toy -->\nnever closed", "0 of 1 places"),
        ("<!-- benchmark:toy -->\n<!-- /closest:toy -->", "0 of 1 places"),
        (PAGE.replace("toy", "other"), r"no other-\*\.json in .*; run python -m benchmarks\.other --json"),
    ],
)
def test_a_page_that_cannot_be_filled(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table.fill(text, result(tmp_path))


def test_committed_results_have_the_stated_sizes() -> None:
    """README's numbers are of the sizes that the targets are stated for, and of enough rounds."""
    files = sorted(results.FOLDER.glob("overhead-*.json"))
    assert files
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        settings = replace(setting.Settings(), device=found["settings"]["device"], threads=found["settings"]["threads"])
        sizes = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}
        assert found["settings"]["rounds"] >= 20
        assert {**found["settings"], "rounds": 20} == sizes
        assert {row["part"] for row in found["rows"]} <= set(overhead.PARTS)

    for file in sorted(results.FOLDER.glob("export-*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["settings"] == asdict(export.Settings()) and len(found["rows"]) == len(export.PLACES) * len(export.CASES)


def test_parts_are_measured_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, values = tmp_path / "overhead-cpu.json", iter(range(1, 100))

    def part(s: setting.Settings) -> Iterator[results.Row]:
        yield results.row("group", "what", {"value": float(next(values)), "low": 0.0, "high": 9.0})

    monkeypatch.setattr(overhead, "PARTS", {"one": part, "two": part})

    def after(*parts: str, settings: setting.Settings = TOY) -> list[tuple[str, float]]:
        overhead.run(settings, list(parts), path)
        found = json.loads(path.read_text(encoding="utf-8"))
        assert set(found["load"]) == {row["part"] for row in found["rows"]}
        return [(row["part"], row["value"]) for row in found["rows"]]

    assert after("two") == [("two", 1.0)]
    assert after("one") == [("one", 2.0), ("two", 1.0)]
    assert after("two") == [("one", 2.0), ("two", 3.0)]
    assert after("one", settings=replace(TOY, rounds=3)) == [("one", 4.0)]


def test_results_on_the_terminal(rows: list[results.Row], capsys: pytest.CaptureFixture[str]) -> None:
    results.show(rows)
    shown = capsys.readouterr().out
    assert all(row["what"] in shown for row in rows) and "CPU time" in shown


def test_the_sweep_gives_the_numbers_of_the_plain_loop() -> None:
    plain, kept = list(sweep.measure(replace(sweep.QUICK, d_head=8)))[:2]
    assert (plain["target"], kept["target"]) == (sweep.TARGETS["cpu"], None) and plain["value"] > 0 < kept["value"]
    assert kept["difference"] < 1e-5 < plain["effect"]
    assert plain["what"] == "CPU time over that of the plain loop" and plain["value"] == plain["cpu_value"]
    wall = {"value": 2.0, "low": 1.0, "high": 3.0, "cpu_value": 0.5, "cpu_low": 0.4, "cpu_high": 0.6, "seconds": [1.0, 2.0]}
    assert results.by_cpu("time", wall, "cuda") == ("time", wall)
    by_cpu = results.by_cpu("time", wall, "cpu")[1]
    assert numbers(by_cpu) == (0.5, 0.4, 0.6)
    assert by_cpu["wall_value"] == 2.0 and by_cpu["wall_seconds"] == [1.0, 2.0] and "seconds" not in by_cpu


def test_a_way_that_gives_other_numbers_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:

    class Uncut(sweep.Loop):
        package = "torch"

        def cut(self, *arguments: Any, **options: Any) -> Any:
            return nullcontext()

    monkeypatch.setattr(sweep, "WAYS", {"nobody": Uncut})
    with pytest.raises(RuntimeError, match=r"torch \S+: differs from the plain loop by \d"):
        list(sweep.measure(replace(sweep.QUICK, d_head=8)))


def committed(name: str) -> dict[str, Any]:
    return json.loads((results.FOLDER / f"{name}-cpu.json").read_text(encoding="utf-8"))


def in_one_line(text: str | None) -> str:
    assert text is not None
    return " ".join(text.split())


def test_intervals_that_hold_the_mean_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = coverage.Settings(rounds=5, examples=(3, 6), seed=4)
    seen: list[bool] = []

    def watched_pair(differences: Any, *arguments: Any, **options: Any) -> Paired:
        found = paired(differences, *arguments, resamples=99, **options)
        assert len(differences) == (3 if len(seen) < 5 else 6)
        seen.append(found.low <= coverage.MEAN <= found.high)
        return found

    monkeypatch.setattr(coverage, "paired", watched_pair)
    rows = list(coverage.measure(sizes))
    assert [row["value"] for row in rows] == [sum(seen[:5]) / 5, sum(seen[5:]) / 5] and 0 < sum(seen) < 10
    assert [row["what"] for row in rows] == ["3 examples", "6 examples"]


def test_stated_coverage_is_that_of_the_results() -> None:
    found = committed("coverage")
    assert found["settings"] == json.loads(json.dumps(asdict(coverage.Settings())))
    four, eight, sixteen = (f"{100 * row['value']:.0f} %" for row in found["rows"])
    stated = f"95 % intervals hold the mean in {four} of samples of 4, {eight} of 8, {sixteen} of 16"
    assert stated in in_one_line((results.ROOT / "README.md").read_text(encoding="utf-8"))
    assert stated in in_one_line(Paired.__doc__)


def test_stated_ranks_on_the_demo_model_are_measured() -> None:
    """Ranks are no timings: they are measured here anew, and compared with those that are committed and stated."""
    rows, known = list(importance.measure_demo(importance.DemoSettings())), committed("importance_demo")["rows"]
    assert [(row["group"], row["what"]) for row in rows] == [(row["group"], row["what"]) for row in known]
    # The same ranks: what is left is the rounding of their correlation.
    assert [row["value"] for row in rows] == pytest.approx([row["value"] for row in known], abs=1e-9)
    by_name = {row["what"]: row for row in rows}
    ways = ("attribution patching, to zero", "AtP* without GradDrop", "AtP*")
    plain, without, star = (by_name[f"{what}: qk"] for what in ways)
    text = in_one_line((results.ROOT / "README.md").read_text(encoding="utf-8"))
    assert f"the 8 QK circuits with a Spearman correlation of {plain['value']:.2f} to exact cuts" in text
    assert f"AtP* with {without['value']:.2f}, for one more forward" in text and without["value"] == star["value"]
    assert (without["forwards"], without["backwards"]) == (plain["forwards"] + 1, plain["backwards"])
    assert star["backwards"] == without["backwards"] + 2, "of two layers"


def test_the_costs_of_scores_are_measured() -> None:
    rows = list(importance.measure(replace(importance.QUICK, rounds=1, layers=2, heads=2, d_head=8)))
    assert [row["what"] for row in rows] == [what for what, *_ in importance.METHODS] and all(row["value"] > 0 for row in rows)


def test_maps_of_interference_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = interference.Settings(rounds=1, heads=2, widths=(4,), samples=8, length=16, stacked=2, permutations=640)
    rows = list(interference.measure(sizes))
    assert len(rows) == len({(row["group"], row["what"]) for row in rows}) == 7 and all(row["value"] > 0 for row in rows)
    assert rows[0]["target"] == 1 / 50 and rows[1]["target"] == 1 / 3
    whole, means = rows[-3]["value"], rows[-2]["value"]
    assert whole > means + 0.9, "the map itself is counted"
    right = interference.heatmap
    monkeypatch.setattr(interference, "heatmap", lambda a, b, **options: right(b, a, **options))
    with pytest.raises(RuntimeError, match="ours: differs from the loop over pairs by"):
        list(interference.measure(sizes))


def test_planted_studies_are_measured() -> None:
    sizes = interference.PlantedSettings(rounds=1, layers=6, heads=6, length=32, replicates=4)
    rows = list(interference.measure_planted(sizes))
    assert [row["value"] for row in rows[:4]] == [0, rows[1]["value"], 0, rows[3]["value"]], "all that is planted is found"
    assert [row["target"] for row in rows] == [0.05] * 4 + [0.06] * 2
    assert all(row["met"] == (0.04 <= row["value"] <= 0.06) for row in rows[4:])
