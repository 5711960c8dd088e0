"""Patched models over several processes: parts of a batch, shards of weights, and parts of the heads (tensor parallel)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).with_name("parallel_worker.py")
NAMES = ("llama", "qwen3", "phi3", "gemma2")
"""Phi-3's fused projection is split, but each process has all heads: transformers gathers what it gives."""


SIZES = {"whole": (4, 4), "three": (6, 3)}
"""Heads and kv heads of models that differ in these: as many of both, and what three processes divide."""


def launched(folder: Path, count: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """By process, what it found."""
    for name in names:
        if name in SIZES:
            heads, kv_heads = SIZES[name]
            torch.manual_seed(0)
            sizes = {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 66, "num_hidden_layers": 2, "head_dim": 16}
            config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=0.2, **sizes)
            LlamaForCausalLM(config).save_pretrained(folder / name)
        else:
            FAMILIES[name].build().save_pretrained(folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    paths = os.pathsep.join([str(WORKER.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(WORKER), str(folder)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two processes."""
    return launched(tmp_path_factory.mktemp("parallel"), 2, (*NAMES, "whole"))


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launched(tmp_path_factory.mktemp("three"), 3, ("three", "whole"))


@pytest.mark.parametrize("name", [*NAMES, *SIZES])
def test_every_process_has_what_one_alone_has(name: str, request: pytest.FixtureRequest) -> None:
    """Outputs, generation, captures and gradients, under cuts of heads in one process or in several."""
    for cases in (process[name] for process in request.getfixturevalue("of_three" if name == "three" else "found")):
        gaps = {what: case for what, case in cases.items() if isinstance(case, list)}
        assert len(gaps) > 75 and cases["undone"]
        # Sums over heads in another order; a whole model's own outputs differ as much.
        assert not {what: gap for what, gap in gaps.items() if not gap[0] <= 1e-5 * max(gap[1], 1e-2)}
        assert sum(gap[1] > 0 for gap in gaps.values()) > 60, "numbers that could differ"


def test_heads_that_processes_do_not_divide_are_refused(of_three: list[dict[str, Any]]) -> None:
    for cases in (process["whole"] for process in of_three):
        assert (
            "found 4 heads and 4 kv heads; expected multiples of 3. Use as many processes as divide both." in cases["refused"]
        )


REFUSED = {
    "importance atp*": "GradDrop: found self.0, self.1, whose heads are split over processes; expected heads that are all in",
    "gradients": "check_gradients: found self.0, self.1, whose heads are split over processes; expected heads that are all",
    "logit attribution": "found a cut or capture of 'result', which is added up over processes; expected another site",
}


@pytest.mark.parametrize(("fixture", "name"), [("found", "llama"), ("of_three", "three")])
def test_analyses_of_heads_in_several_processes(fixture: str, name: str, request: pytest.FixtureRequest) -> None:
    """Each finds what it finds of the whole model, for every head, or says why not."""
    for studies in (process[name]["studies"] for process in request.getfixturevalue(fixture)):
        assert studies["kept"]
        refused = {what: text for what, text in studies.items() if isinstance(text, str)}
        assert refused.keys() == REFUSED.keys() and all(REFUSED[what] in text for what, text in refused.items())
        gaps = {what: case for what, case in studies.items() if isinstance(case, list)}
        assert len(gaps) > 20 and all(gap[1] > 0 for gap in gaps.values()), "numbers that could differ"
        # Sums over heads in another order, and differences of losses that are larger than they.
        assert not {what: gap for what, gap in gaps.items() if not gap[0] <= 2e-5 * max(gap[1], 0.1)}


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
        assert "split over processes: found process 0: Spec([freeze ov to zero (layers 1, heads 0)])" in cases["other cuts"]
        assert "captures {'self.0': [('z', None)]" in cases["other captures"] and "('q', None)" in cases["other captures"]
        assert "self.0, self.1, whose heads are split over processes" in cases["interference"]
        own = f"(of heads {2 * rank} to {2 * rank + 1} in this process)"
        assert ("z zero (heads 2)" in cases["print"]) == (rank == 1) and own in cases["print"]
