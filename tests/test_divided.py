"""Studies whose work is divided over processes: every one of these has what a single process finds."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from families import FAMILIES
from test_commands import invoke
from worded import write_worded

from surgery import SpecError, SurgeryError
from surgery.analysis.journal import Journal
from surgery.analysis.workers import ALONE, alone, workers_of

WORKER = Path(__file__).with_name("divided_worker.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu")
"""With --cpu accelerate starts several processes by MPI alone, and one without; --multi_gpu starts them on CPUs, too."""
CUTS, BATCHES = 2 * (24 + 1), 5
"""Metrics that one process reads in the study that goes on (two batches, each without cuts as well); batches collected."""


def launch(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(WORKER.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)


def run(folder: Path, count: int, kill: str = "", launcher: tuple[str, ...] = TORCHRUN) -> list[dict[str, Any]]:
    """By process, what it found; nothing if one was to be killed."""
    folder.mkdir(exist_ok=True)
    if count == 1:
        command = [sys.executable]
    else:
        command = [*launcher, f"--nproc-per-node={count}" if launcher == TORCHRUN else f"--num_processes={count}"]
    done = launch([*command, str(WORKER), str(folder), *([kill] if kill else [])])
    assert (done.returncode != 0) == bool(kill), done.stderr[-4000:]
    return [] if kill else [pickle.loads((folder / f"{count}.{n}.pkl").read_bytes()) for n in range(count)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    [found] = run(tmp_path_factory.mktemp("single") / "1", 1)
    return found


@pytest.fixture(scope="module", params=[(3, TORCHRUN), (2, ACCELERATE)], ids=["3 by torchrun", "2 by accelerate"])
def several(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    count, launcher = request.param
    return run(tmp_path_factory.mktemp("several"), count, launcher=launcher)


def same(found: Any, expected: Any) -> bool:
    """Bit for bit."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
        return True
    if isinstance(expected, np.ndarray):
        return bool(np.array_equal(found, expected, equal_nan=True))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else bool(found == expected)


def test_every_process_has_what_one_alone_has(single: dict[str, Any], several: list[dict[str, Any]]) -> None:
    """Bit for bit: the forwards are the very same, each in one of the processes."""
    assert len(single["work"]) == 20
    for found in several:
        for kind in ("work", "resumed"):
            names = [name for name in single[kind] if name not in ("called", "cuts", "batches")]
            assert [name for name in names if not same(found[kind][name], single[kind][name])] == []


def test_each_process_does_a_part(single: dict[str, Any], several: list[dict[str, Any]]) -> None:
    assert single["resumed"]["cuts"] == CUTS and single["resumed"]["batches"] == BATCHES
    counts = [found["resumed"] for found in several]
    baselines = 2 * len(several)  # which each process measures
    assert sum(count["cuts"] for count in counts) == CUTS - 2 + baselines
    assert max(count["cuts"] for count in counts) - min(count["cuts"] for count in counts) <= 2
    assert sorted(count["batches"] for count in counts) == ([2, 3] if len(several) == 2 else [1, 2, 2])
    called = [number for found in several for number in found["work"]["called"]]
    assert sorted(called) == single["work"]["called"] == list(range(8))
    assert all(found["work"]["called"] for found in several[:2])


NO_COMMON_WORK = {
    "data": "ablation_study, over {} processes: found process 0: {{'data': 'torch.int64",
    "batches": "collect, over {} processes: found process 0: {{'data': ",
    "model": "outputs without cuts, over {} processes: found process 0: ",
    "heads": "ablation_study, over {} processes: found process 0: {{'heads': [0]}}; process 1: {{'heads': [1]}}",
    "seeds": "ablation_study, over {} processes: found process 0: {{'seeds': [0]}}; process 1: {{'seeds': [1]}}",
    "metrics": "ablation_study, over {} processes: found process 0: {{'metrics': ['loss']}}; process 1: {{'metrics': ['kl']}}",
    "batches of a study": "the data, over {} processes: found process 0: '1 batches'; process 1: '2 batches'",
    "metric of the same name": "metrics without cuts, over {} processes: found process 0: ",
    "resume": "ablation_study, over {} processes: found process 0: {{'resume': 'study.jsonl'}}; process 1: {{'resume': None}}",
    "sites": "activation_patching, over {} processes: found process 0: {{'sites': ['z']}}; process 1: {{'sites': ['pattern']}}",
    "reference": "activation_patching: activations, over {} processes: found process 0: [[1.0, ",
    "corrupted of activation_patching": "activation_patching, over {} processes: found process 0: {{'corrupted': 'torch.int64",
    "corrupted of path_patching": "path_patching, over {} processes: found process 0: {{'corrupted': 'torch.int64",
    "corrupted of head_importance": "head_importance, over {} processes: found process 0: {{'corrupted': 'torch.int64",
    "specs": "a sweep, over {} processes: found process 0: {{'specs': ",
    "paths": "resume, over {} processes: found process 0: {{'path': '0.jsonl'}}; process 1: {{'path': '1.jsonl'}}",
    "order": "what is waited for, over {} processes: found process 0: '0'; process 1: '1'",
}
"""What processes did that is not one call of all, and how it is refused."""


def test_what_is_no_common_work_is_refused(several: list[dict[str, Any]]) -> None:
    for number, found in enumerate(process["refused"] for process in several):
        for what, words in NO_COMMON_WORK.items():
            assert found[what].startswith("SurgeryError: " + words.format(len(several))), found[what]
            assert "expected the same in all. Make the same call everywhere, or" in found[what]
        mine = "ValueError: no more"
        other = f"SurgeryError: process 1 of {len(several)}: found {mine}; expected its part of the work."
        for what in ("failure", "failure without cuts"):
            assert found[what].startswith(mine if number == 1 else other)
        assert found["failure before"].startswith("SpecError: metrics: found none"), "each raises its own"
        assert "nothing" not in found, "after all that was caught the processes are in step"
        assert found["alone"] == ("8" if number else "not called"), "one process need not wait for another there"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two processes of which the second died twice: when it had collected a batch, and when it had cut heads."""
    folder = tmp_path_factory.mktemp("killed")
    run(folder, 2, "1:99:1")
    assert 1 <= len(list((folder / "gradients").glob("*.safetensors"))) < BATCHES
    assert not (folder / "study.jsonl").exists()
    run(folder, 2, "1:7:99")
    parts = sorted(path.name for path in folder.glob("study.jsonl.part*"))
    assert "study.jsonl.part1" in parts and not list(folder.glob("*.pkl"))
    part = folder / "study.jsonl.part1"
    # What it is, and six cuts: the seventh that was measured is the batch without.
    assert len(part.read_text(encoding="utf-8").splitlines()) == 1 + 6
    with part.open("a", encoding="utf-8") as file:
        file.write('{"key": "0/cut off')
    (folder / "study.jsonl.part7").write_text('{"about": {"mod', encoding="utf-8")
    return folder


@pytest.mark.parametrize("count", [3, 1])
def test_what_a_killed_process_left_is_redone(single: dict[str, Any], killed: Path, tmp_path: Path, count: int) -> None:
    shutil.copytree(killed, tmp_path / "again")
    for found in run(tmp_path / "again", count):
        for name in ("study", "frame", "gradients"):
            assert same(found["resumed"][name], single["resumed"][name])
    processes = [pickle.loads((tmp_path / "again" / f"{count}.{n}.pkl").read_bytes()) for n in range(count)]
    assert sum(found["resumed"]["batches"] for found in processes) == 0, "the second run had collected them all"
    assert 0 < sum(found["resumed"]["cuts"] for found in processes) <= CUTS - 2 - 6 + 2 * count
    lines = (tmp_path / "again" / "study.jsonl").read_text(encoding="utf-8").splitlines()
    keys = [json.loads(line)["key"] for line in lines[1:]]
    assert len(keys) == len(set(keys)) == CUTS and not list((tmp_path / "again").glob("study.jsonl.part*"))


def test_a_part_of_another_study_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "study.jsonl.part1"
    part.write_text('{"about": {"model": "another"}}\n', encoding="utf-8")
    with pytest.raises(SpecError, match=r"found beside it '.*part1' of another study \(model: 'ano.*remove '.*part1'"):
        Journal(tmp_path / "study.jsonl", {"model": "this"})
    assert part.exists()


def test_launched_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is said, in place of all work in each process."""
    monkeypatch.setitem(sys.modules, "accelerate", None)
    model = torch.nn.Linear(1, 1)
    assert workers_of(model) is ALONE and ALONE.each([1, 2], str) == ["1", "2"], "nothing is needed in a single process"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SurgeryError, match="found 2 processes and no accelerate; expected accelerate, which divides") as error:
        workers_of(model)
    assert "pip install 'attention-surgery[distributed]'" in str(error.value) and "workers.alone()" in str(error.value)
    with alone():
        assert workers_of(model) is ALONE
    monkeypatch.delenv("RANK")
    assert workers_of(model) is ALONE, "a number of processes alone is said by other programs, too"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerate sees processes on accelerators")
def test_a_state_that_does_not_see_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs accelerate sees processes only with cpu=True; a state that was made without holds for good."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    PartialState()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SurgeryError, match="found 2 processes, of which accelerate's PartialState sees 1; expected as many"):
        workers_of(torch.nn.Linear(1, 1))


def command(count: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return launch([*TORCHRUN, f"--nproc-per-node={count}", "-m", "surgery", *map(str, arguments)], TERM="dumb")


def test_a_command_of_two_processes(tmp_path: Path) -> None:
    """One of them writes and speaks."""
    given = (write_worded(tmp_path / "model"), "--rows", 6, "--batch", 4, "--json")
    found = command(2, "ablate", *given, "--out", tmp_path / "two")
    assert found.returncode == 0, found.stderr
    assert invoke("ablate", *given, "--out", tmp_path / "one").exit_code == 0
    assert len(json.loads(found.stdout)["rows"]) == 24
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 7
    assert len({(tmp_path / folder / "study.csv").read_text(encoding="utf-8") for folder in ("one", "two")}) == 1


def test_a_command_that_divides_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("schema")
    assert result.exit_code == 2 and "found 2 processes of a launcher" in " ".join(result.output.replace("│", "").split())


def test_families_are_what_these_tests_take_them_for() -> None:
    config = FAMILIES["llama"].build().config
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 4)
