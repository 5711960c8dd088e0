"""The FX pass: what the rewritten code shows, that every point in it is live, what it refuses, and what it shares."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached import CACHE
from families import FAMILIES, HEADS, KV_HEADS
from torch import Tensor, nn

import surgery.rewrite
from surgery import ParityError, UnsupportedArchitectureError, find_anatomy, patch_model
from surgery.anatomy import Attention
from surgery.family import Family
from surgery.reconstruction import Reconstruction
from surgery.rewrite import Rewriter
from surgery.samples import sample_arguments
from surgery.sites import CORE_SITES
from surgery.verify import verify

POINT = re.compile(r"point\(at, '(\w+)', \w+\)")


@functools.cache
def attentions(name: str) -> list[Attention]:
    return list(find_anatomy(FAMILIES[name].build("eager")))


def distinct() -> dict[str, str]:
    """A family for each distinct eager function (and head map) among the families, by a readable name."""
    found: dict[Any, tuple[str, str]] = {}
    for name in FAMILIES:
        for attention in attentions(name):
            eager = attention.family.eager
            key = (eager, attention.core_groups > 1)
            found.setdefault(key, (f"{name}-{attention.address}", name))
    return dict(found.values())


DISTINCT = distinct()
by_function = pytest.mark.parametrize("case", DISTINCT)


def case_attention(case: str) -> Attention:
    name = DISTINCT[case]
    return next(a for a in attentions(name) if case == f"{name}-{a.address}")


def trace(attention: Attention, masked: bool) -> tuple[Rewriter, dict[str, Any], Reconstruction]:
    rewriter = Rewriter(attention.family.eager, attention.module)
    arguments = sample_arguments(rewriter, attention.recording.shapes, attention.recording.core["kwargs"], masked)
    return rewriter, arguments, rewriter.graph(arguments, attention.core_groups)


# -- what it shows ------------------------------------------------------------------------------------------------------------


@by_function
def test_the_code_shows_every_point_in_order(case: str) -> None:
    for masked in (False, True):
        _, _, graph = trace(case_attention(case), masked)
        assert graph.code.lstrip().startswith("def forward(self, at, ")
        points = POINT.findall(graph.code)
        assert sorted(points) == sorted(CORE_SITES)
        assert points[:3] == ["rot_q", "rot_k", "v"]
        assert points[3:] == ["scores", "pattern", "z"]
        # Between its points the code is the family's own: one softmax, two products.
        assert graph.code.count("softmax(") == 1
        assert "softmax" in graph.code[graph.code.index("'scores'") : graph.code.index("'pattern'")]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_multi_query", "bert", "gptj"])
def test_a_patched_module_shows_its_code(name: str) -> None:
    model = patch_model(FAMILIES[name].build("sdpa" if FAMILIES[name].sdpa else "eager"))
    module: Any = find_anatomy(model).attentions[0].module
    assert POINT.findall(module.reconstruction.code)[-1] == "z"


@by_function
def test_the_head_map_is_baked_in_where_heads_are_grouped(case: str) -> None:
    attention = case_attention(case)
    _, arguments, graph = trace(attention, True)
    groups = attention.core_groups
    repeats = re.findall(r"repeat_heads\(\w+, (\d+)\)", graph.code)
    assert repeats == ([str(groups)] * 2 if groups > 1 else [])
    assert "expand(" not in graph.code.split("'scores'")[0], "the family's own repetition of kv heads is gone"
    seen: dict[str, Tensor] = {}
    graph(lambda site, tensor: seen.setdefault(site, tensor), attention.module, arguments)
    key = arguments[next(n for n in arguments if arguments[n] is not None and n.startswith("key"))]
    for head in range(attention.heads):
        assert torch.equal(seen["rot_k"][:, head], key[:, head // groups])


def test_grouped_and_ungrouped_families_are_both_covered() -> None:
    groups = {a.core_groups for name in FAMILIES for a in attentions(name)}
    assert groups >= {1, HEADS // KV_HEADS}
    assert len(DISTINCT) >= 15


# -- every point is live ------------------------------------------------------------------------------------------------------


@by_function
@torch.no_grad()
def test_identity_equals_the_original_bit_for_bit(case: str) -> None:
    attention = case_attention(case)
    for masked in (False, True):
        rewriter, arguments, graph = trace(attention, masked)
        expected = rewriter.eager(attention.module, **arguments)
        found = graph(lambda site, tensor: tensor, attention.module, arguments)
        assert torch.equal(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if expected[1] is not None:
            assert torch.equal(found[1], expected[1])


@by_function
@torch.no_grad()
def test_gradients_equal_the_originals(case: str) -> None:
    attention = case_attention(case)
    rewriter, arguments, graph = trace(attention, True)
    found = []
    for run in (functools.partial(rewriter.eager, attention.module), None):
        inputs = {n: x.clone().requires_grad_() if isinstance(x, Tensor) else x for n, x in arguments.items()}
        with torch.enable_grad():
            output = run(**inputs)[0] if run else graph(lambda site, tensor: tensor, attention.module, inputs)[0]
            output.sin().sum().backward()
        found.append([x.grad for x in inputs.values() if isinstance(x, Tensor)][:3])
    # The order in which the heads of a group are summed differs from the family's own repetition.
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(*found, strict=True))


@by_function
@torch.no_grad()
def test_halving_any_point_changes_the_output(case: str) -> None:
    attention = case_attention(case)
    for masked in (False, True):
        _, arguments, graph = trace(attention, masked)
        before = graph(lambda site, tensor: tensor, attention.module, arguments)[0]
        for site in CORE_SITES:
            reached = []

            def at(name: str, tensor: Tensor, site: str = site, reached: list[str] = reached) -> Tensor:
                reached.append(name)
                return tensor / 2 if name == site else tensor

            after = graph(at, attention.module, arguments)[0]
            assert reached.count(site) == 1
            assert not torch.allclose(after, before, atol=1e-4), site
            if site in ("v", "z"):
                assert torch.allclose(after, before / 2, atol=1e-6)


@by_function
@torch.no_grad()
def test_what_stands_at_the_points_is_what_their_names_say(case: str) -> None:
    attention = case_attention(case)
    _, arguments, graph = trace(attention, False)
    seen: dict[str, Tensor] = {}
    output, _ = graph(lambda site, tensor: seen.setdefault(site, tensor), attention.module, arguments)
    batch, heads, queries = seen["rot_q"].shape[:3]
    keys = seen["rot_k"].shape[2]
    assert seen["scores"].shape == seen["pattern"].shape == (batch, heads, queries, keys)
    rows = seen["pattern"].sum(-1)
    assert bool((seen["pattern"] >= 0).all()) and bool((rows <= 1 + 1e-5).all())
    if not hasattr(attention.module, "sinks"):
        assert torch.allclose(seen["pattern"], seen["scores"].softmax(-1), atol=1e-6)
    assert torch.allclose(seen["z"], seen["pattern"] @ seen["v"], atol=1e-5)
    assert torch.equal(output, seen["z"].transpose(1, 2).reshape(output.shape))


# -- what it refuses ----------------------------------------------------------------------------------------------------------


def good(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float = 0.5, **kw: Any) -> Any:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = torch.softmax(weights, dim=-1)
    return torch.matmul(weights, value).transpose(1, 2), weights


def no_softmax(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    weights = torch.matmul(query, key.transpose(2, 3)).sigmoid()
    return torch.matmul(weights, value).transpose(1, 2), weights


def two_softmaxes(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    weights = torch.matmul(query, key.transpose(2, 3)).softmax(-1).softmax(-1)
    return torch.matmul(weights, value).transpose(1, 2), weights


def over_queries(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    weights = torch.matmul(query, key.transpose(2, 3)).softmax(dim=-2)
    return torch.matmul(weights, value).transpose(1, 2), weights


def over_heads(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    weights = torch.nn.functional.softmax(torch.matmul(query, key.transpose(2, 3)), 1)
    return torch.matmul(weights, value).transpose(1, 2), weights


def three_products(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    weights = torch.matmul(query, key.transpose(2, 3)).softmax(-1)
    return torch.matmul(torch.matmul(weights, weights), value).transpose(1, 2), weights


def no_second_product(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    weights = torch.matmul(query, key.transpose(2, 3)).softmax(-1)
    return (weights[..., None] * value[:, :, None]).sum(3).transpose(1, 2), weights


def softmax_elsewhere(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    weights = torch.matmul(query.softmax(-1), key.transpose(2, 3))
    return torch.matmul(weights, value).transpose(1, 2), weights


def branch_on_values(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    if query.sum() > 0:
        query = -query
    return good(module, query, key, value, attention_mask)


def loop_over_heads(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    return torch.stack([good(module, *rows, attention_mask)[0] for rows in zip(query, key, value, strict=True)]), None


def one_output(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    return torch.matmul(torch.matmul(query, key.transpose(2, 3)).softmax(-1), value)


def value_unread(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    weights = torch.matmul(query, key.transpose(2, 3)).softmax(-1)
    return torch.matmul(weights, key).transpose(1, 2), weights


def graph_of(function: Callable[..., Any], module: Any = None, masked: bool = True, **kwargs: Any) -> Reconstruction:
    rewriter = Rewriter(function, module or nn.Module())
    return rewriter.graph(sample_arguments(rewriter, SHAPES, kwargs, masked), 1)


SHAPES = {"q": (1, 2, 3, 4), "k": (1, 2, 5, 4), "v": (1, 2, 5, 6)}


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (no_softmax, "0 softmax and 2 matrix products"),
        (two_softmaxes, "2 softmax and 2 matrix products"),
        (over_queries, "a softmax over axis -2, not over the keys"),
        (over_heads, "a softmax over axis 1, not over the keys"),
        (three_products, "1 softmax and 3 matrix products"),
        (no_second_product, "1 softmax and 1 matrix products"),
        (softmax_elsewhere, "a softmax that does not lie between the two matrix products"),
        (branch_on_values, "a body that torch.fx cannot trace (TraceError: "),
        (loop_over_heads, "a body that torch.fx cannot trace (TraceError: "),
        (one_output, "a result that is not a pair of output and attention weights"),
        (value_unread, "no live place for the points ['v']"),
    ],
)
def test_another_computation_is_refused(function: Callable[..., Any], found: str) -> None:
    with pytest.raises(UnsupportedArchitectureError) as error:
        graph_of(function)
    assert f"test_rewrite.{function.__name__}: found {found}" in str(error.value)
    assert "patches/" in str(error.value)


def test_the_good_function_is_accepted() -> None:
    assert len(POINT.findall(graph_of(good).code)) == 6
    assert len(POINT.findall(graph_of(good, masked=False).code)) == 6


def good_by_default(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    return good(module, query, key, value, attention_mask)


def transposed(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    """softmax(q k^T) v, with the second product written the other way round: at z stands (batch, head, d_head, query)."""
    weights = torch.matmul(query, key.transpose(2, 3)).softmax(-1)
    return torch.matmul(value.transpose(2, 3), weights.transpose(2, 3)).permute(0, 3, 1, 2), weights


def test_points_of_another_shape_are_refused() -> None:
    attention = attentions("gpt2")[0]
    verify(dataclasses.replace(attention, family=Family(good_by_default)))
    for _ in range(2):
        with pytest.raises(ParityError, match=r"GPT2Attention at .* found z of shape \(1, 4, 8, 3\); expected \(1, 4, 3, 8\)"):
            verify(dataclasses.replace(attention, family=Family(transposed)))


# -- what it shares -----------------------------------------------------------------------------------------------------------


def test_layers_share_a_trace() -> None:
    for name in ("llama", "gpt_oss", "gpt2", "bart"):
        first, second = (trace(a, True)[2] for a in attentions(name)[:2])
        assert first is second
    model = patch_model(FAMILIES["llama"].build("eager"), kernel="eager")
    one, other = (layer.self_attn for layer in model.model.layers)
    assert one.reconstruction is other.reconstruction


def test_presence_of_a_mask_is_another_trace() -> None:
    for name in ("llama", "t5", "bloom"):
        attention = attentions(name)[0]
        masked, unmasked = trace(attention, True)[2], trace(attention, False)[2]
        assert masked is not unmasked
    assert "attention_mask" in graph_of(good).inputs
    assert "attention_mask" not in graph_of(good, masked=False).inputs


def test_constants_of_a_call_and_numbers() -> None:
    assert graph_of(good, scaling=0.5) is graph_of(good, scaling=0.25), "floats are inputs"
    assert "scaling" in graph_of(good, scaling=0.25).inputs
    assert graph_of(good, scaling=1) is graph_of(good, scaling=0.25), "so is a whole number in a float's place"
    rewriter = Rewriter(good, nn.Module())
    assert rewriter.names[:5] == ("module", "query", "key", "value", "attention_mask") and not rewriter.takes_any
    bound = rewriter.bind(*(torch.zeros(1, 1, 1, 1),) * 3, None, {"scaling": 2.0, "position_ids": torch.zeros(1)})
    assert "position_ids" not in bound, "a keyword that the function ignores must not make another trace"


def reads_constant(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any) -> Any:
    scores = torch.matmul(query, key.transpose(2, 3)) / module.divisor
    if module.bias is not None:
        scores = scores + module.bias
    weights = torch.nn.functional.dropout(scores.softmax(-1), p=0.5, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class Constants(nn.Module):
    def __init__(self, divisor: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.divisor, self.bias = divisor, bias


@torch.no_grad()
def test_modules_share_a_trace_only_where_their_constants_agree() -> None:
    two, also_two, three = Constants(2), Constants(2), Constants(3)
    one_bias, other_bias = Constants(2, torch.ones(5)), Constants(2, torch.zeros(5))
    graphs = [graph_of(reads_constant, m) for m in (two, also_two, three, one_bias, other_bias)]
    assert graphs[0] is graphs[1] and graphs[3] is graphs[4]
    assert len({id(g) for g in graphs}) == 3
    for module, graph in zip((two, also_two, three, one_bias, other_bias), graphs, strict=True):
        module.eval()
        rewriter = Rewriter(reads_constant, module)
        arguments = sample_arguments(rewriter, SHAPES, {}, True)
        expected = reads_constant(module, **arguments)[0]
        assert torch.equal(graph(lambda site, tensor: tensor, module, arguments)[0], expected)
        # Training is read at every call, not traced.
        module.train()
        torch.manual_seed(0)
        dropped = reads_constant(module, **arguments)[0]
        torch.manual_seed(0)
        assert torch.equal(graph(lambda site, tensor: tensor, module, arguments)[0], dropped)
        assert not torch.equal(dropped, expected)


@torch.no_grad()
def test_the_pattern_is_seen_before_dropout() -> None:
    module = Constants(2).train()
    arguments = sample_arguments(Rewriter(reads_constant, module), SHAPES, {}, True)
    seen: dict[str, Tensor] = {}
    output, weights = graph_of(reads_constant, module)(seen.setdefault, module, arguments)
    assert torch.allclose(seen["pattern"].sum(-1), torch.ones(1, 2, 3)) and not torch.equal(weights, seen["pattern"])
    assert torch.equal(output, (weights @ seen["v"]).transpose(1, 2))


def test_a_module_whose_constant_changes_is_traced_anew() -> None:
    """As its own forward would read the new value."""
    module = Constants(2)
    before = graph_of(reads_constant, module)
    module.divisor = 4
    after = graph_of(reads_constant, module)
    assert after is not before and "/ 4" in after.code


def test_traces_do_not_pile_up() -> None:
    def count() -> int:
        return sum(len(traces) for traces in surgery.rewrite._TRACES.values())

    patch_model(FAMILIES["llama"].build("sdpa"))
    before = count()
    for seed in range(3):
        patch_model(FAMILIES["llama"].build("sdpa", seed=seed), kernel="eager")
    assert count() == before


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_trace_is_made_while_patching(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in a forward, which torch.compile may be tracing."""
    family = FAMILIES[name]
    model = patch_model(family.build("eager"), kernel="eager")

    def refuse(*args: Any) -> Any:
        raise AssertionError("traced in a forward")

    monkeypatch.setattr(surgery.rewrite, "trace", refuse)
    for training, padding in ((False, 0), (False, 3), (True, 0), (True, 3)):
        given = family.inputs(padding=padding)
        model.train(training)
        model(**given)
        model(**given, output_attentions=True)
        if family.kind == "decoder":
            model(given["input_ids"], use_cache=False)
            cache = model(given["input_ids"], use_cache=True)[CACHE]
            model(given["input_ids"][:, :2], **{CACHE: cache})
