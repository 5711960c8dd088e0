"""Every model type of transformers, as a tiny random model: `pytest tests/test_zoo.py --zoo all`; by default some of each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from zoo.build import TYPES
from zoo.checks import check
from zoo.outcome import Outcome
from zoo.page import page
from zoo.refused import REFUSED
from zoo.report import PAGE, RESULTS, shard

from surgery import patch
from surgery.interventions import Operation
from surgery.plan import Session

# Types that between them show every way of storing projections, masking, caching and computing attention that we know.
QUICK = (
    "gpt2", "llama", "gemma3_text", "gpt_oss", "phi3", "falcon", "bloom", "mpt", "codegen", "deepseek_v3", "qwen3_next",
    "dbrx", "bert", "albert", "deberta-v2", "mpnet", "funnel", "roformer", "esm", "squeezebert", "lilt", "t5", "bart",
    "whisper", "moonshine", "vit", "swin", "beit", "pvt", "segformer", "detr", "deformable_detr",
    "mask2former", "sam", "clip", "blip", "aria", "qwen2_vl", "flava", "wav2vec2", "wavlm", "clap", "vits", "mamba",
    "fnet",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        which = metafunc.config.getoption("--zoo")
        if which == "quick":
            types = [name for name in QUICK if name in TYPES]
        else:
            types = shard(TYPES, which) if which == "all" or "/" in which else which.split(",")
        metafunc.parametrize("model_type", types)


def test_of_type(model_type: str) -> None:
    outcome = check(model_type)
    if outcome.status == "unbuildable":
        pytest.skip(outcome.reason)
    problems = [outcome.message()] if outcome.failures else []
    expected = REFUSED.get(model_type, {})
    for name in sorted(expected.keys() | outcome.refused.keys()):
        found, fragment = outcome.refused.get(name), expected.get(name)
        if found is None or fragment is None or fragment not in found:
            problems.append(f"{name}: refused because {found}; zoo/refused.py has {fragment}")
    assert not problems, "\n".join(problems)


def test_the_table_of_refusals_names_types_that_exist() -> None:
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert REFUSED.keys() == {row["model_type"] for row in known["types"] if row["refused"]}


def test_the_page_is_what_the_results_give() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(results), "python -m zoo.report --write"


# The checks can fail


def _drop_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operation, "apply", lambda self, x, where, held=None: x)


def _cut_the_next_head(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Operation.__post_init__

    def shifted(self: Operation) -> None:
        if len(self.heads) == 1:
            object.__setattr__(self, "heads", (self.heads[0] + 1,))
        own(self)

    monkeypatch.setattr(Operation, "__post_init__", shifted)


def _swap_with(change: Callable[[Any], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        own = patch.swap

        def swap(model: Any, attention: Any, plan: Any, session: Session, share: Any) -> None:
            own(model, attention, plan, session, share)
            change(attention.module)

        monkeypatch.setattr(patch, "swap", swap)

    return mutate


def _copy_a_projection(module: Any) -> None:
    module.q_proj = copy.deepcopy(module.q_proj)


def _scale_a_little(module: Any) -> None:
    module.scaling = module.scaling * (1 + 1e-6)


def _never_unpatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.case.unpatch_model", lambda model: model)


def _exchange_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    own = patch.find_anatomy

    def find(model: Any, strict: bool = True) -> Any:
        anatomy = own(model, strict)
        for attention in anatomy:
            for site in ("q", "o"):
                projection = attention.projections[site]
                object.__setattr__(projection, "channels", projection.channels.flip(0))
        return anatomy

    monkeypatch.setattr(patch, "find_anatomy", find)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "an edit that is dropped": (_drop_edits, {"live", "reference"}),
    "the cut of another head": (_cut_the_next_head, {"reference"}),
    "a projection that is copied": (_swap_with(_copy_a_projection), {"parameters"}),
    "numbers that are almost the same": (_swap_with(_scale_a_little), {"no cuts", "training"}),
    "heads whose channels are exchanged": (_exchange_heads, {"reference"}),
    "a model that stays patched": (_never_unpatch, {"unpatch"}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, expected = MUTANTS[name]
    mutate(monkeypatch)
    outcome = check("llama")
    assert expected <= outcome.failures.keys(), outcome.message()


def test_a_failure_says_everything() -> None:
    outcome = Outcome("some_type", "causal_lm", "SomeModel")
    outcome.fail("live", "q at self.0")
    outcome.fail("weights", "W_O at self.1")
    assert outcome.message() == "some_type (SomeModel): 2 failures\n  live: q at self.0\n  weights: W_O at self.1"
