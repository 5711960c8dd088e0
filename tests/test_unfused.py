"""Heads beside a fused kernel over blocks of queries: the same numbers, less memory, only where rows are independent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached import CACHE
from families import FAMILIES, HEADS, LENGTH
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

import surgery.unfused
from benchmarks.memory import measure
from surgery import Edit, Freeze, Spec, capture, patch_model, patched
from surgery.masks import to_additive
from surgery.rewrite import Rewriter
from surgery.samples import sample_arguments
from surgery.unfused import Call

SDPA = [name for name, family in FAMILIES.items() if family.sdpa]
FEW = 40
"""Entries in a block: two rows of one head, for a batch of two sequences of nine tokens."""


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Small blocks; the list gets the rows of every block that is computed."""
    seen: list[tuple[int, int]] = []
    own = surgery.unfused._blocks

    def spy(*args: Any) -> Any:
        for rows in own(*args):
            seen.append(rows)
            yield rows

    monkeypatch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"cpu": FEW, "other": FEW})
    monkeypatch.setattr(surgery.unfused, "_blocks", spy)
    return seen


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    # Products of another number of rows may differ in their last bits.
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


CUTS: dict[str, Spec] = {
    "scores scaled": Spec(Edit("scores", "scale", 0.5, heads=[1])),
    "pattern to zero": Spec([Edit("pattern", "zero", heads=[1]), Edit("z", "scale", 0.5, heads=[1])]),
    "uniform": Spec(Edit("pattern", "uniform", heads=[1])),
    "previous": Spec(Edit("pattern", "previous", heads=[2])),
    "diagonal": Spec(Edit("pattern", "diagonal", heads=[2], strength=0.5)),
    "first": Spec(Edit("pattern", "first", heads=[3])),
    "noise": Spec(Edit("scores", "noise", heads=[0], seed=3)),
    "resample": Spec(Edit("pattern", "resample", heads=[1])),
    "positions": Spec(Edit("scores", "scale", 0.0, heads=[1], positions=[3, 4])),
    "matrix": Spec(Edit("scores", "add", torch.linspace(-1, 1, 16 * 16).view(16, 16), heads=[1])),
    "with rot_q and z": Spec(
        [Edit("rot_q", "scale", 0.5, heads=[1]), Edit("scores", "scale", 2.0, heads=[1]), Freeze("ov", to="noise")]
    ),
    "two heads": Spec([Edit("scores", "scale", 0.5, heads=[0]), Edit("pattern", "previous", heads=[3])]),
}


@pytest.mark.parametrize("cut", list(CUTS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral", "falcon_alibi", "bert", "t5", "bart"])
def test_blocks_give_what_all_rows_give(name: str, cut: str, blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model, inputs = family.build("sdpa"), family.inputs()
    patch_model(model, CUTS[cut])
    found = logits(model, inputs)
    assert len(blocks) > len(set(blocks)) > 1 and blocks[0] == (0, 1 if cut == "two heads" else 2)
    blocks.clear()
    with monkeypatch.context() as patch:
        patch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"cpu": 1 << 30})
        assert_close(found, logits(model, inputs))
    assert all(start == 0 for start, _ in blocks), "the comparison is with all rows at once"


@pytest.mark.parametrize("name", SDPA)
def test_captures_in_blocks_are_whole(name: str, blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model, inputs = family.build("sdpa"), family.inputs()
    plain = logits(model, inputs)
    with capture(model, ["scores", "pattern"], heads=[1, 3]) as run:
        assert torch.equal(logits(model, inputs), plain)
    assert len(set(blocks)) > 1
    monkeypatch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"cpu": 1 << 30})
    with capture(model, ["scores", "pattern"], heads=[1, 3]) as expected:
        logits(model, inputs)
    for (key, found), (_, other) in zip(run.items(), expected.items(), strict=True):
        assert found.shape == other.shape, key
        assert_close(found, other)


def test_gradients_through_blocks(blocks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    inputs = family.inputs()

    def gradients() -> dict[str, Tensor]:
        model = patch_model(family.build("sdpa"), Edit("scores", "scale", 0.5, heads=[1], backward="ste"))
        with capture(model, "pattern", heads=[1]) as run:
            loss = model(**inputs).logits.logsumexp(-1).sum()
            (loss + run[0, "pattern"].square().sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    assert len(set(blocks)) > 1
    monkeypatch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"cpu": 1 << 30})
    for name, expected in gradients().items():
        assert torch.allclose(found[name], expected, atol=1e-3, rtol=1e-4), name


@pytest.mark.parametrize("chunks", [(5, 4), (9,), (8, 1)])
def test_blocks_with_a_cache(chunks: tuple[int, ...], blocks: list[Any]) -> None:
    family = FAMILIES["mistral"]
    model, inputs = patch_model(family.build("sdpa"), Edit("pattern", "previous", heads=[1])), family.inputs(padding=0)
    whole = logits(model, {**inputs, "use_cache": False})
    cache, parts, start = None, [], 0
    for length in chunks:
        with torch.no_grad():
            output = model(inputs["input_ids"][:, start : start + length], **{CACHE: cache}, use_cache=True)
        cache, start = output[CACHE], start + length
        parts.append(output.logits)
    assert len(set(blocks)) > 1
    assert_close(torch.cat(parts, 1), whole)


# -- where rows are not independent ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "is_training"),
    [
        (Edit("pattern", lambda x: x * 0.5, heads=[1]), False),  # a callable may look at all rows
        (Edit("pattern", "mean", heads=[1]), False),  # so does the mean of what is there
        (Edit("scores", "scale", 0.5, heads=[1]), True),  # dropout draws in the order of all rows
    ],
    ids=["callable", "mean", "training"],
)
def test_all_rows_at_once(spec: Any, is_training: bool, blocks: list[Any]) -> None:
    family = FAMILIES["llama"]
    model = patch_model(family.build("sdpa"), spec)
    model.train(is_training)
    logits(model, family.inputs())
    assert set(blocks) == {(0, LENGTH)}


def by_row(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float = 1.0) -> Any:
    scores = query @ key.transpose(2, 3) * scaling
    pattern = nn.functional.softmax(scores, dim=-1)
    return (pattern @ value).transpose(1, 2), pattern


def triangle_of_its_own(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float = 1.0
) -> Any:
    rows = torch.arange(query.shape[2])[:, None] + (key.shape[2] - query.shape[2])
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(rows < torch.arange(key.shape[2]), -10.0)
    pattern = nn.functional.softmax(scores, dim=-1)
    return (pattern @ value).transpose(1, 2), pattern


def over_queries(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float = 1.0) -> Any:
    scores = query @ key.transpose(2, 3) * scaling
    pattern = nn.functional.softmax(scores - scores.mean(dim=2, keepdim=True), dim=-1)
    return (pattern @ value).transpose(1, 2), pattern


@pytest.mark.parametrize(("eager", "is_independent"), [(by_row, True), (triangle_of_its_own, False), (over_queries, False)])
@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "watched"])
def test_a_function_whose_rows_know_each_other_is_not_split(eager: Any, is_independent: bool, is_cut: bool) -> None:
    model = patch_model(FAMILIES["gpt2"].build("sdpa"))
    state: Any = model.transformer.h[0].attn._surgery
    rewriter = Rewriter(eager, nn.Identity())
    shapes = dict.fromkeys("qkv", (1, HEADS, 7, 8))
    arguments = sample_arguments(rewriter, shapes, {}, masked=False)
    graph = rewriter.graph(arguments, 1)
    state.rewriter = rewriter
    call = Call("sdpa", arguments["query"], arguments["key"], arguments["value"], None, {}, 1)
    graph = graph if is_cut else graph.until("pattern")
    assert surgery.unfused._acts_by_row(state, call, graph, arguments) == is_independent


# -- what is not computed ---------------------------------------------------------------------------------------------------


def test_watching_stops_at_what_is_watched() -> None:
    model = patch_model(FAMILIES["llama"].build("sdpa"))
    code = {site: model.model.layers[0].self_attn.reconstruction.until(site).code for site in ("scores", "pattern")}
    for site, text in code.items():
        assert text.count("torch.matmul(") == 1 and "dropout" not in text
        assert ("softmax" in text) == (site == "pattern")


@pytest.mark.parametrize(("case", "most"), [("scores-one", 0.5), ("pattern-one", 0.5), ("capture-one", 1.2)])
def test_memory_grows_by_what_is_captured(case: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocations counted, in matrices of one head, over those of the fused kernel."""
    length = 1024
    monkeypatch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"cpu": length * 32})
    fused, found = measure("fused", length), measure(case, length)
    assert (found["peak"] - fused["peak"]) / found["matrix"] < most
    monkeypatch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"cpu": length * length})
    all_rows = measure(case, length)
    assert (all_rows["peak"] - fused["peak"]) / found["matrix"] > most, "blocks must be what saves the memory"


# -- masks by rows ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mask_of_some_rows_is_those_rows_of_the_mask(data: Any) -> None:
    queries = data.draw(st.integers(2, 6))
    keys = data.draw(st.integers(queries, 8))
    start = data.draw(st.integers(0, queries - 1))
    rows = (start, data.draw(st.integers(start + 1, queries)))
    query, key = torch.zeros(2, HEADS, queries, 4), torch.zeros(2, HEADS, keys, 4)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    boolean = torch.rand(2, 1, queries, keys, generator=generator) > 0.4
    padding = torch.rand(2, keys, generator=generator) > 0.3
    implementation, mask, kwargs = data.draw(
        st.sampled_from(
            [
                ("sdpa", None, {}),
                ("sdpa", boolean, {}),
                ("sdpa", boolean[:, :, :1], {}),
                ("eager", torch.where(boolean, 0.0, torch.finfo(torch.float32).min), {}),
                ("flash_attention_2", None, {}),
                ("flash_attention_2", padding, {}),
                ("flash_attention_2", padding, {"sliding_window": 3}),
                ("flash_attention_2", None, {"sliding_window": 2, "is_causal": False}),
                ("flex_attention", create_block_mask(lambda b, h, q, k: q >= k - b, 2, None, queries, keys, device="cpu"), {}),
            ]
        )
    )
    whole = to_additive(implementation, mask, query, key, nn.Identity(), kwargs)
    part = to_additive(implementation, mask, query, key, nn.Identity(), kwargs, rows)
    for found, all_of_them in ((part.additive, whole.additive), (part.allowed, whole.allowed)):
        assert found is not None and all_of_them is not None
        expected = all_of_them if all_of_them.shape[2] == 1 else all_of_them[:, :, slice(*rows)]
        assert torch.equal(found, expected)
    assert (part.empty_rows is None) == (whole.empty_rows is None)
    if whole.empty_rows is not None and part.empty_rows is not None:
        assert torch.equal(part.empty_rows, whole.empty_rows[:, slice(*rows)])


def test_packed_sequences_by_rows() -> None:
    query, positions = torch.zeros(1, HEADS, 6, 4), torch.tensor([[0, 1, 2, 0, 1, 0]])
    whole = to_additive("flash_attention_2", None, query, query, nn.Identity(), {"position_ids": positions})
    part = to_additive("flash_attention_2", None, query, query, nn.Identity(), {"position_ids": positions}, (2, 5))
    assert whole.allowed is not None and part.allowed is not None
    assert torch.equal(part.allowed, whole.allowed[:, :, 2:5])
    assert not bool(part.allowed[0, 0, 1, 2]), "the second sequence does not see the first"


def test_a_patched_block_leaves_no_trace(blocks: list[Any]) -> None:
    """Where a call was is the same after blocks as before: z is cut at the positions of the sequence."""
    family = FAMILIES["llama"]
    model, inputs = family.build("sdpa"), family.inputs(padding=0)
    spec = Spec([Edit("scores", "scale", 1.0, heads=[1]), Edit("z", "zero", heads=[1], positions=[3])])
    with patched(model, Edit("z", "zero", heads=[1], positions=[3])):
        expected = logits(model, inputs)
    with patched(model, spec):
        assert_close(logits(model, inputs), expected)
    assert len(set(blocks)) > 1


def test_a_model_without_data_runs_at_once(blocks: list[Any]) -> None:
    model = patch_model(FAMILIES["gpt2"].build("sdpa").to("meta"), Edit("scores", "scale", 0.5, heads=[1]))
    assert model.transformer.h[0].attn(torch.zeros(2, LENGTH, 32, device="meta"))[0].is_meta
    assert set(blocks) == {(0, LENGTH)}
