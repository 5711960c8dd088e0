"""Patched models over several processes: parts of a batch, shards of weights, and parts of the heads (tensor parallel)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

WORKER = Path(__file__).with_name("parallel_worker.py")
NAMES = ("llama", "qwen3", "phi3", "gemma2")
"""Phi-3's fused projection is split, but each process has all heads: transformers gathers what it gives."""


@pytest.fixture(scope="module", params=[2])
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By process, what it found."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in NAMES:
        FAMILIES[name].build().save_pretrained(folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={request.param}", "--standalone"]
    paths = os.pathsep.join([str(WORKER.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(WORKER), str(folder)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMES)
def test_every_process_has_what_one_alone_has(found: list[dict[str, Any]], name: str) -> None:
    """Outputs, generation, captures and gradients, under cuts of heads in one process or in several."""
    for cases in (process[name] for process in found):
        gaps = {what: case for what, case in cases.items() if isinstance(case, list)}
        assert len(gaps) > 70 and cases["undone"]
        # Sums over heads in another order; a whole model's own outputs differ as much.
        assert not {what: gap for what, gap in gaps.items() if not gap[0] <= 1e-5 * max(gap[1], 1e-2)}
        assert sum(gap[1] > 0 for gap in gaps.values()) > 60, "numbers that could differ"


def test_training_on_parts_of_a_batch(found: list[dict[str, Any]]) -> None:
    """DistributedDataParallel, and FSDP2 of a model that was patched before or after."""
    for gaps in (process["training"] for process in found):
        assert len({what.split(":")[0] for what in gaps}) == 3 and len(gaps) > 60
        # Means of means in another order.
        assert not {what: gap for what, gap in gaps.items() if not gap[0] <= 1e-5 * max(gap[1], 1e-2)}


@pytest.mark.parametrize("name", NAMES)
def test_what_processes_would_have_to_add_up_is_refused(found: list[dict[str, Any]], name: str) -> None:
    for rank, cases in enumerate(process[name] for process in found):
        if name == "phi3":
            assert "result" not in cases and "in this process" not in cases["print"]
            continue
        assert "found a cut or capture of 'result', which is added up over processes" in cases["result"]
        assert "2 problems" in cases["result"]
        assert "self.0, self.1, whose heads are split over processes" in cases["interference"]
        own = f"(of heads {2 * rank} to {2 * rank + 1} in this process)"
        assert ("z zero (heads 2)" in cases["print"]) == (rank == 1) and own in cases["print"]
