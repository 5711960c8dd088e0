"""Importance without a sweep: gradients against finite differences, closed forms against loops, estimates against cuts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from torch import Tensor, nn

from benchmarks import importance
from surgery import Edit, Freeze, NoMatchError, Spec, SpecError, capture, collect_reference, patch_model, patched, unpatch_model
from surgery.analysis import metrics
from surgery.analysis.atpstar import one_key_changed
from surgery.analysis.attribution import Gate, Points
from surgery.analysis.baselines import CIRCUIT_SITES
from surgery.analysis.importance import Importance, head_importance
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.patch import session_of

METRIC = metrics.logit_difference(5, 7)
ALL = tuple(CIRCUIT_SITES)
NAMES = ["gpt2", "llama", "qwen3", "gemma2", "gpt_oss"]
"""Plain, grouped heads, QK norm, soft-capped scores between norms, sinks."""
Inputs = dict[str, Tensor]


def prompts(rows: int = 3, length: int = 9, seed: int = 3) -> tuple[Inputs, Inputs]:
    """Clean tokens and corrupted ones, which differ in some places."""
    generator = torch.Generator().manual_seed(seed)
    clean, other = (torch.randint(3, 60, (rows, length), generator=generator) for _ in range(2))
    corrupted = torch.where(torch.arange(length) % 3 == 1, other, clean)
    return {"input_ids": clean}, {"input_ids": corrupted}


def model_of(name: str, implementation: str = "eager") -> Any:
    """In float64, as far as the family computes in it."""
    model = FAMILIES[name].build(implementation, torch.float64)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # its grouped product knows no float64
    return model


def measure(model: Any, spec: Any, inputs: Inputs) -> float:
    """The metric under cuts, in a forward of its own."""
    with patched(model, spec), torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, -1].double()
    return float((logits[:, 5] - logits[:, 7]).mean())


def corrupted_run(model: Any, inputs: Inputs) -> Any:
    with capture(model, ["rot_q", "rot_k", "v", "z"], detach=True) as run, torch.no_grad():
        model(**inputs, use_cache=False)
    return run


def cuts(circuit: str, address: str, heads: list[int], run: Any, strength: float = 1.0) -> Spec:
    sites = CIRCUIT_SITES[circuit]
    return Spec([Edit(s, "activation", layers=[address], heads=heads, reference=run, strength=strength) for s in sites])


def deep_model(scale: float = 0.1, layers: int = 6, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=67,
        n_embd=48,
        n_layer=layers,
        n_head=6,
        n_positions=64,
        initializer_range=scale,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def rows_of(found: Importance) -> Iterator[tuple[str, int, str, Any]]:
    for row in found.frame.itertuples():
        yield row.address, row.head, row.circuit, row


# -- attribution patching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "gptj"])
def test_attribution_is_the_slope_of_the_cut(name: str) -> None:
    model, (clean, corrupted) = model_of(name), prompts()
    found = head_importance(model, clean, corrupted, METRIC, "atp", circuits=ALL)
    assert len(found.frame) == 2 * 4 * len(ALL)
    patch_model(model)
    run, start = corrupted_run(model, corrupted), measure(model, None, clean)
    assert found.baseline == pytest.approx(start, abs=1e-9)
    largest = found.frame.score.abs().max()
    for address, head, circuit, row in rows_of(found):
        coarse, fine = (
            (measure(model, cuts(circuit, address, [head], run, step), clean) - start) / step for step in (2e-3, 1e-3)
        )
        # Families norm and rotate in float32: 1e-7 of rounding over a step of 1e-3.
        assert row.score == pytest.approx(2 * fine - coarse, abs=2e-3 * largest, rel=1e-3), (address, head, circuit)


def test_attribution_costs_one_forward_and_one_backward() -> None:
    model, (clean, corrupted) = deep_model(layers=4), prompts()
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        for options, forwards, backwards in (
            ({"method": "atp", "to": "zero"}, 1, 1),
            ({"method": "atp", "to": "mean", "circuits": ALL}, 1, 1),
            ({"method": "atp", "circuits": ALL}, 2, 1),  # one of the corrupted inputs
            ({"method": "atp*", "drop_layers": False}, 3, 1),  # one for the patterns of QK
            ({"method": "atp*", "circuits": ALL}, 5, 1 + 4),  # of QK, q, k; a backward for each layer
            ({"method": "ig", "to": "zero", "steps": 3, "path": "all"}, 1 + 2 * 3, 2 * 3),
            ({"method": "ig", "to": "zero", "steps": 3}, 1 + 2 * 4 * 3, 2 * 4 * 3),
        ):
            calls.clear()
            found = head_importance(model, clean, corrupted, METRIC, **options)
            assert (len(calls), found.forwards, found.backwards) == (forwards, forwards, backwards), options
    finally:
        handle.remove()


def test_positions_add_up_to_scores() -> None:
    model, (clean, corrupted) = FAMILIES["llama"].build("sdpa"), prompts()
    for method in ("atp", "atp*", "ig"):
        found = head_importance(model, clean, corrupted, METRIC, method, circuits=ALL, steps=2)
        assert {circuit for _, circuit in found.positions} == {"q", "k", "ov", "v"}
        for (address, circuit), shares in found.positions.items():
            assert shares.shape == (4, 9)
            assert shares.sum(1) == pytest.approx(found.matrix(circuit).loc[address].to_numpy(), abs=1e-6)


def test_attribution_ranks_heads_as_patching_does() -> None:
    model, (clean, corrupted) = deep_model(), prompts(4, 12)
    exact = head_importance(model, clean, corrupted, METRIC, "ablation", circuits=ALL)
    rank = {}
    for method in ("atp", "atp*", "ig"):
        found = head_importance(model, clean, corrupted, METRIC, method, circuits=ALL, drop_layers=False)
        assert found.frame[["address", "head", "circuit"]].equals(exact.frame[["address", "head", "circuit"]])
        found.frame["exact"] = exact.frame.exact
        for circuit in ALL:
            rows = found.frame[found.frame.circuit == circuit]
            rank[method, circuit] = rows.magnitude.corr(rows.exact.abs(), method="spearman")
            assert rank[method, circuit] > {"atp": 0.5, "atp*": 0.9, "ig": 0.95}[method], (method, circuit)
    assert rank["atp*", "qk"] > rank["atp", "qk"], "the softmax is where plain attribution errs most"


# -- AtP* ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_one_key_changed_equals_the_softmax_again(sink: bool, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, keys = 40, 6
    scores, changed, gradient = (torch.randn(rows, keys, generator=generator, dtype=torch.float64) for _ in range(3))
    scores, changed = scores * spread, changed * spread
    forbidden = torch.rand(rows, keys, generator=generator) < 0.3
    forbidden[0], forbidden[1] = True, torch.tensor([False, *[True] * (keys - 1)])
    scores, changed = (t.masked_fill(forbidden, -float("inf")) for t in (scores, changed))
    extra = torch.full((rows, 1), 0.5 * spread if sink else -float("inf"), dtype=torch.float64)

    def weights(s: Tensor) -> Tensor:
        return torch.cat([s, extra], 1).softmax(1)[:, :-1].nan_to_num()

    before = weights(scores)
    expected = torch.zeros_like(scores)
    for key in range(keys):
        one = scores.clone()
        one[:, key] = changed[:, key]
        expected[:, key] = ((weights(one) - before) * gradient).sum(1)
    found = one_key_changed(scores, extra[:, 0], gradient, changed)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert spread == 1.0 or float(before.max()) == pytest.approx(1.0, abs=1e-9), "saturated rows among them"
    assert not found[0].any(), "a row that may attend to nothing"
    assert sink or not found[1].any(), "the only key keeps all the weight"


def pattern_and_slope(model: Any, inputs: Inputs, address: str) -> tuple[Tensor, Tensor]:
    """The pattern, and the metric's gradient there."""
    seen: list[Tensor] = []

    def watch(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with patched(model, Edit("pattern", watch, layers=[address])):
        logits = model(**inputs, use_cache=False).logits[:, -1].double()
    (slope,) = torch.autograd.grad((logits[:, 5] - logits[:, 7]).mean(), seen)
    return seen[0].detach(), slope


@pytest.mark.parametrize("name", [*NAMES, "bloom"])
def test_query_and_key_scores_equal_patterns_computed_again(name: str) -> None:
    """One key, or the queries, of one attention replaced, its pattern seen in the module itself, in a forward for each."""
    model, (clean, corrupted) = model_of(name), prompts()
    found = head_importance(model, clean, corrupted, METRIC, "atp*", circuits=["q", "k", "qk"])
    patch_model(model)
    run = corrupted_run(model, corrupted)
    for address in ("self.0", "self.1"):
        before, slope = pattern_and_slope(model, clean, address)

        def change(*edits: Edit, address: str = address, before: Tensor = before, slope: Tensor = slope) -> Tensor:
            with (
                patched(model, edits),
                capture(model, ["pattern"], [address], detach=True) as seen,
                torch.no_grad(),
            ):
                model(**clean, use_cache=False)
            return ((seen[address, "pattern"] - before) * slope).sum(dim=(0, 3))  # (head, query)

        def replaced(site: str, positions: Any = None, address: str = address) -> Edit:
            return Edit(site, "activation", layers=[address], reference=run, positions=positions)

        largest = float(found.frame.score.abs().max())
        queries = torch.from_numpy(found.positions[address, "q"])
        assert torch.allclose(queries, change(replaced("rot_q")).double(), atol=1e-6 * largest)
        both = torch.tensor(found.matrix("qk").loc[address].to_numpy())
        assert torch.allclose(both, change(replaced("rot_q"), replaced("rot_k")).double().sum(1), atol=1e-6 * largest)
        keys = torch.stack([change(replaced("rot_k", [key])).double().sum(1) for key in range(9)], 1)
        # Patterns are softmaxes in float32, the closed form is in float64.
        assert torch.allclose(torch.from_numpy(found.positions[address, "k"]), keys, atol=3e-5 * largest)


def test_saturated_attention_has_no_gradient_and_the_softmax_again_sees_it() -> None:
    """Scores so large that a query attends to one key with all its weight: a change of q moves it to another key."""
    model, (clean, corrupted) = deep_model(0.1, 2), prompts(4, 12)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, :48] *= 300
        model.transformer.h[1].attn.c_proj.weight *= 0.01  # what follows the pattern is all but linear then
    with capture(model, ["pattern"], [1]) as run, torch.no_grad():
        model(**clean)
    assert run[1, "pattern"].amax(-1).median() > 0.999
    options: dict[str, Any] = {"layers": [1], "circuits": ["q", "qk"]}
    exact = head_importance(model, clean, corrupted, METRIC, "ablation", **options).frame
    plain, star = (head_importance(model, clean, corrupted, METRIC, method, **options).frame for method in ("atp", "atp*"))
    dead = plain.score.abs() < 0.01 * exact.score.abs()
    assert dead.sum() >= 3, "plain attribution gives a hundredth of the effect, or less"
    error = (star.score - exact.score).abs()
    assert (error < 0.02 * exact.score.abs().max()).all()
    assert plain.score.abs().max() < 0.1 * exact.score.abs().max()


def by_hand(model: Any, inputs: Inputs, dropped: nn.Module, z: dict[str, Tensor]) -> Tensor:
    """The metric's mean in a forward in which one layer's contribution is detached, with leaves added to z."""
    own = type(dropped).forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = own(dropped, x, *args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        passed = x + (first - x).detach()
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    dropped.forward = forward
    try:
        with patched(model, [Edit("z", "add", value=leaf, layers=[address]) for address, leaf in z.items()]):
            logits = model(**inputs, use_cache=False).logits[:, -1].double()
    finally:
        del dropped.__dict__["forward"]
    return (logits[:, 5] - logits[:, 7]).mean()


def test_dropped_layers_are_held_fixed() -> None:
    model, (clean, corrupted) = deep_model(0.2, 4), prompts()
    found = head_importance(model, clean, corrupted, METRIC, "atp*", circuits=["ov"])
    patch_model(model)
    before, after = corrupted_run(model, clean), corrupted_run(model, corrupted)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for layer in model.transformer.h:
        leaves = {f"self.{n}": torch.zeros(3, 6, 9, 8, requires_grad=True) for n in range(4)}
        slopes = torch.autograd.grad(by_hand(model, clean, layer, leaves), list(leaves.values()), allow_unused=True)
        for number, (address, slope) in enumerate(zip(leaves, slopes, strict=True)):
            if slope is not None:
                change = after[address, "z"] - before[address, "z"]
                expected[number] += (slope * change).sum(dim=(0, 2, 3)).double().abs() / 3
    dropped = torch.tensor(found.matrix("ov", "dropped").to_numpy())
    assert torch.allclose(dropped, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    assert (found.frame.magnitude >= found.frame.score.abs()).all()
    assert found.frame.magnitude.gt(found.frame.score.abs()).any(), "ways that cancel"


def test_a_head_whose_ways_cancel_is_found_by_dropping_layers() -> None:
    """An MLP of such a strength that it undoes, to first order, what one head of the first layer does on all other ways."""
    model, (clean, corrupted) = deep_model(0.1, 4), prompts()
    weight = patch_model(model).transformer.h[2].mlp.c_proj.weight
    before = weight.detach().clone()
    options: dict[str, Any] = {"circuits": ["ov"], "layers": [0]}

    def score(strength: float) -> float:
        with torch.no_grad():
            weight.copy_(strength * before)
        return float(head_importance(model, clean, corrupted, METRIC, "atp", **options).frame.score[head])

    head = 2
    grid = torch.linspace(-12, 12, 25).tolist()
    values = [score(strength) for strength in grid]
    low, high = next((a, b) for a, b, x, y in zip(grid, grid[1:], values, values[1:], strict=False) if x * y < 0)
    is_rising = score(high) > 0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if (score(middle) > 0) == is_rising else (middle, high)
    score(low)
    row = head_importance(model, clean, corrupted, METRIC, "atp*", **options).frame.loc[head]
    assert row.dropped > 50 * abs(row.score)
    assert row.magnitude == row.dropped


# -- integrated gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["layer", "all"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_integrated_scores_add_up_to_the_joint_change(name: str, path: str) -> None:
    model, (clean, corrupted) = model_of(name, "sdpa"), prompts()
    circuits = ["qk", "ov", "v"]
    found = head_importance(model, clean, corrupted, METRIC, "ig", circuits=circuits, steps=48, path=path)
    patch_model(model)
    run, start = corrupted_run(model, corrupted), measure(model, None, clean)
    for circuit in circuits:
        table = found.matrix(circuit)
        layers = [cuts(circuit, address, [0, 1, 2, 3], run) for address in table.index]
        joint = [sum(layers, Spec())] if path == "all" else layers
        totals = [float(table.to_numpy().sum())] if path == "all" else table.sum(axis=1).tolist()
        for total, spec in zip(totals, joint, strict=True):
            # What 48 points leave of the integral of a function as bent as random models are.
            assert total == pytest.approx(measure(model, spec, clean) - start, rel=5e-3, abs=2e-3)


def test_more_steps_come_closer() -> None:
    model, (clean, corrupted) = FAMILIES["gpt2"].build("sdpa", torch.float64), prompts()
    patch_model(model)
    exact = measure(model, cuts("ov", "self.0", [0, 1, 2, 3], corrupted_run(model, corrupted)), clean)
    errors = []
    for steps in (1, 4, 16):
        found = head_importance(model, clean, corrupted, METRIC, "ig", circuits=["ov"], layers=[0], steps=steps)
        errors.append(abs(float(found.frame.score.sum()) - (exact - found.baseline)))
    assert errors[0] > 5 * errors[1] > 5 * errors[2]


# -- edges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert"])
def test_edges_are_slopes_of_what_a_receiver_reads(name: str) -> None:
    """A sender's z moved a little, all other z held: what changes at the receiver's q, k, v, times the gradient there."""
    model, (clean, corrupted) = model_of(name), prompts()
    found = head_importance(model, clean, corrupted, METRIC, "atp", circuits=["ov"], edges=True).edges
    assert found is not None
    assert set(found.address) == {"self.0"} and set(found.to_address) == {"self.1"}, "later attentions alone"
    assert len(found) == 4 * 4 * 3
    patch_model(model)
    after = corrupted_run(model, corrupted)
    slopes = {}
    for site in ("rot_q", "rot_k", "v"):
        seen: list[Tensor] = []

        def watch(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x

        with patched(model, Edit(site, watch, layers=[1])):
            logits = model(**clean).logits[:, -1].double()
        (slopes[site],) = torch.autograd.grad((logits[:, 5] - logits[:, 7]).mean(), seen)

    def read_by_receiver(head: int, step: float) -> Any:
        moved = Edit("z", "activation", layers=[0], heads=[head], reference=after, strength=step)
        with (
            patched(model, moved),
            capture(model, ["rot_q", "rot_k", "v"], [1], [0, 1, 2, 3], detach=True) as run,
            torch.no_grad(),
        ):
            model(**clean)
        return run

    step = 1e-3
    start = read_by_receiver(0, 0.0)
    largest = found.score.abs().max()
    for head in range(4):
        one, two = read_by_receiver(head, step), read_by_receiver(head, 2 * step)
        for name_, site in (("q", "rot_q"), ("k", "rot_k"), ("v", "v")):
            change = 2 * (one[1, site] - start[1, site]) / step - (two[1, site] - start[1, site]) / (2 * step)
            expected = (change * slopes[site]).sum(dim=(0, 2, 3))
            rows = found[(found["head"] == head) & (found.input == name_)].sort_values("to_head")
            # As above: norms round in float32, over a step of 1e-3.
            assert rows.score.tolist() == pytest.approx(expected.tolist(), abs=3e-3 * largest), (head, name_)


def test_edges_to_some_heads_are_those_of_all() -> None:
    model, (clean, corrupted) = deep_model(0.1, 3), prompts()
    every = head_importance(model, clean, corrupted, METRIC, "atp", edges=True)
    some = head_importance(model, clean, corrupted, METRIC, "atp", edges=[(2, 4), ("self.1", 0), (2, 1)])
    assert every.edges is not None and some.edges is not None
    assert some.backwards == 2 + 3 * 3 < every.backwards, "one for all scores, one for all slopes, one for each input"
    both = some.edges.merge(every.edges, on=["address", "head", "to_address", "to_head", "input"], suffixes=("", "_every"))
    assert len(both) == len(some.edges) == (2 * 12 + 6) * 3
    assert both.score.to_numpy() == pytest.approx(both.score_every.to_numpy(), rel=1e-6, abs=1e-12)
    with pytest.raises(SpecError, match="heads 0 to 5"):
        head_importance(model, clean, corrupted, METRIC, "atp", edges=[(2, 6)])


def test_edges_pass_no_other_attention() -> None:
    """Of three layers, an edge from the first to the last is the same, whatever the attention between them would make of it."""
    model, (clean, corrupted) = deep_model(0.1, 3), prompts()
    found = head_importance(model, clean, corrupted, METRIC, "atp", circuits=["ov"], edges=True).edges
    assert found is not None and len(found) == 3 * 6 * 6 * 3
    assert {(a, b) for a, b in zip(found.address, found.to_address, strict=True)} == {
        ("self.0", "self.1"),
        ("self.0", "self.2"),
        ("self.1", "self.2"),
    }
    patch_model(model)
    before, after = corrupted_run(model, clean), corrupted_run(model, corrupted)
    held = Edit("z", "activation", layers=[1], reference=before)
    step = 0.05

    def at_receiver(strength: float) -> Tensor:
        moved = Edit("z", "activation", layers=[0], heads=[2], reference=after, strength=strength)
        with patched(model, [moved, held]), capture(model, ["rot_q"], [2], detach=True) as run, torch.no_grad():
            model(**clean)
        return run[2, "rot_q"].double()

    slope: list[Tensor] = []
    with patched(model, Edit("rot_q", lambda x: slope.append(x) or x, layers=[2])):
        logits = model(**clean).logits[:, -1].double()
    (gradient,) = torch.autograd.grad((logits[:, 5] - logits[:, 7]).mean(), slope)
    zero, one, two = (at_receiver(s) for s in (0.0, step, 2 * step))
    expected = ((2 * (one - zero) / step - (two - zero) / (2 * step)) * gradient).sum(dim=(0, 2, 3))
    rows = found[(found.address == "self.0") & (found["head"] == 2) & (found.to_address == "self.2") & (found.input == "q")]
    largest = float(expected.abs().max())
    assert rows.sort_values("to_head").score.tolist() == pytest.approx(expected.tolist(), abs=0.02 * largest)


# -- exact, verified, given ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["corrupted", "zero", "mean", "reference", "run"])
def test_ablation_is_what_patching_gives(to: str) -> None:
    model, (clean, corrupted) = FAMILIES["llama"].build("sdpa"), prompts()
    patch_model(model)
    run = corrupted_run(model, corrupted)
    means = collect_reference(model, [clean, corrupted], sites=["rot_q", "rot_k", "v", "z"], progress=False)
    given = {"reference": means, "run": run}.get(to, to)
    action = {"corrupted": "activation", "run": "activation", "reference": "mean"}.get(to, to)
    reference = {"corrupted": run, "run": run, "reference": means}.get(to)
    found = head_importance(model, clean, corrupted, METRIC, "ablation", to=given, circuits=ALL)
    start = measure(model, None, clean)
    for address, head, circuit, row in rows_of(found):
        if circuit in ("qk", "ov"):
            spec: Any = Freeze(circuit, [address], [head], to=action, reference=reference)
        else:
            spec = Edit(CIRCUIT_SITES[circuit][0], action, layers=[address], heads=[head], reference=reference)
        assert row.exact == pytest.approx(measure(model, spec, clean) - start, abs=1e-4), (address, head, circuit)
    again = head_importance(model, clean, corrupted, METRIC, "atp", to=given, circuits=ALL)
    assert again.frame.score.notna().all() and again.frame.score.abs().max() > 0


def test_the_best_are_verified_and_a_sample_bounds_the_rest() -> None:
    model, (clean, corrupted) = deep_model(), prompts()
    exact = head_importance(model, clean, corrupted, METRIC, "ablation").frame
    found = head_importance(model, clean, corrupted, METRIC, "atp", verify_top=10, sample=20)
    known = found.frame.dropna(subset=["exact"])
    assert len(known) == 30 and set(found.top(10).index) <= set(known.index)
    assert len(found.sampled) == 20 and not set(found.sampled) & set(found.top(10).index)
    assert known.exact.to_numpy() == pytest.approx(exact.exact[known.index].to_numpy(), abs=1e-5)
    assert found.missed == pytest.approx(exact.exact[found.sampled].abs().max(), abs=1e-5)
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 20))
    assert found.correlation > 0.8
    beyond = (exact.exact.drop(found.top(10).index).abs() > found.missed).mean()
    assert beyond <= found.bound, "true of this sample, as of 95 % of samples"
    shown = repr(found)
    assert "none changes more than" in shown and "backwards" in shown and "<table" in found._repr_html_()
    panels = found.against_exact().axes
    assert [panel.get_title().split("\n")[0] for panel in panels] == ["QK", "OV"], "each of its own heads"
    assert sum(int(panel.get_title().split(", ")[-1].split()[0]) for panel in panels) == 30
    assert panels[0].get_xlabel() == "exact change of logit difference (logits)"
    other = head_importance(model, clean, corrupted, METRIC, "atp", verify_top=10, sample=20, seed=1)
    assert other.sampled != found.sampled


def test_a_backup_head_shows_once_the_head_that_it_stands_in_for_is_cut() -> None:
    """Two heads that write the same, and a norm behind them that saturates: either alone is hardly missed."""
    model, (clean, _) = deep_model(0.1, 2), prompts()
    attention = model.transformer.h[1].attn
    with torch.no_grad():
        for part in range(3):
            first, second = (slice(48 * part + 8 * head, 48 * part + 8 * (head + 1)) for head in (0, 1))
            attention.c_attn.weight[:, second] = attention.c_attn.weight[:, first]
        attention.c_proj.weight[8:16] = attention.c_proj.weight[:8]
        attention.c_proj.weight[:16] *= 300

    def scores(method: str, given: Any = None) -> Any:
        return head_importance(
            model, clean, None, METRIC, method, to="zero", layers=[1], circuits=["ov"], given=given
        ).frame.score.abs()

    cut = Freeze("ov", layers=[1], heads=[0])
    alone, without = scores("ablation"), scores("ablation", cut)
    assert without[1] > 5 * alone[1], "the backup matters once the other is gone"
    assert scores("atp", cut)[0] == 0.0 and without[0] < 1e-6, "what is cut already has nothing to lose"
    assert scores("atp", cut)[1] != pytest.approx(float(scores("atp")[1]), rel=0.1)
    with patched(model, cut):
        own = head_importance(model, clean, None, METRIC, "atp", to="zero", layers=[1], circuits=["ov"])
    assert own.frame.score.abs().tolist() == scores("atp", cut).tolist(), "as of a model that has the cut itself"
    start, both = measure(model, cut, clean), measure(model, Freeze("ov", layers=[1], heads=[0, 1]), clean)
    assert without[1] == pytest.approx(abs(both - start), abs=1e-5)


# -- known answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ablation", "atp*", "ig"])
def test_the_circuit_of_the_demo_model(method: str) -> None:
    """Layer 0 head 0 writes the token before, layer 1 head 3 looks for it by its keys: what the demo finds by ablation."""
    model, clean = load_model(), repeated_sequences(8, 20, 64, 0)
    corrupted = torch.cat([repeated_sequences(8, 20, 64, 1)[:, :21], clean[:, 21:]], 1)  # of another first copy
    metric = metrics.logit_difference(clean[:, 31], corrupted[:, 11], position=30)
    found = head_importance(model, clean, corrupted, metric, method, circuits=["qk", "q", "k", "ov"], verify_top=2)
    for circuit, (address, head) in {"ov": ("self.1", 3), "k": ("self.1", 3), "qk": ("self.1", 3)}.items():
        best = found.top(1, circuit).iloc[0]
        assert (best.address, best["head"]) == (address, head), circuit
    first = found.matrix("ov", "magnitude").loc["self.0"]
    assert first.idxmax() == 0, "the previous-token head"
    assert found.frame.magnitude[found.top(1, "q").index[0]] < 0.01 * found.top(1, "k").magnitude.iloc[0]
    assert method == "ablation" or found.top(1).exact.notna().all()


def test_where_a_norm_saturates_the_integral_sees_what_slopes_do_not() -> None:
    """What the demo model's heads write is most of what its last norm sees: a little less of it changes next to nothing."""
    model, clean = load_model(), repeated_sequences(8, 20, 64, 0)
    corrupted = torch.cat([repeated_sequences(8, 20, 64, 1)[:, :21], clean[:, 21:]], 1)
    metric = metrics.logit_difference(clean[:, 31], corrupted[:, 11], position=30)
    exact, plain, integral = (
        head_importance(model, clean, corrupted, metric, method, circuits=["k", "ov"]).frame.set_index(
            ["address", "head", "circuit"]
        )
        for method in ("ablation", "atp", "ig")
    )
    for node in (("self.1", 3, "k"), ("self.1", 3, "ov"), ("self.0", 0, "ov")):
        assert exact.score[node] < -15, "the whole logit difference"
        assert abs(plain.score[node]) < 0.1 * abs(exact.score[node])
        assert integral.score[node] == pytest.approx(exact.score[node], rel=0.2)


def test_pictures_of_what_there_is_not_are_refused() -> None:
    model, (clean, corrupted) = deep_model(layers=2), prompts()
    exact = head_importance(model, clean, corrupted, METRIC, "ablation", heads=[0])
    with pytest.raises(SpecError, match="found scores that are exact themselves"):
        exact.against_exact()
    for wrong in (lambda: exact.matrix("ov", column="nope"), lambda: exact.matrix("z"), lambda: exact.top(3, "z")):
        with pytest.raises(SpecError, match=r"(matrix|top).*: found '(nope|z)'; expected"):
            wrong()
    with pytest.raises(SpecError, match="found no exact changes"):
        head_importance(model, clean, corrupted, METRIC, "atp", heads=[0]).against_exact()
    with pytest.raises(SpecError, match="found no edges"):
        exact.edge_picture()
    every = head_importance(model, clean, corrupted, METRIC, "atp", verify_top=1, sample=100)
    assert every.bound == 0 and every.frame.exact.notna().all(), "no others are left"


def test_the_strongest_edge_of_the_demo_model_is_into_the_induction_heads_key() -> None:
    model, clean = load_model(), repeated_sequences(8, 20, 64, 0)
    corrupted = torch.cat([repeated_sequences(8, 20, 64, 1)[:, :21], clean[:, 21:]], 1)
    metric = metrics.logit_difference(clean[:, 31], corrupted[:, 11], position=30)
    found = head_importance(model, clean, corrupted, metric, "atp", edges=True)
    edges, table = found.edges, found.edge_matrix("k")
    assert edges is not None and table.shape == (8, 4), "from all heads to those of the later layer"
    assert table.notna().sum().sum() == 16 and table.loc[("self.0", 0), ("self.1", 3)] == table.abs().max().max()
    with pytest.raises(SpecError, match="found 'z'; expected edges into q, k or v"):
        found.edge_matrix("z")
    figure = found.edge_picture()
    assert [axes.get_title() for axes in figure.axes[:3]] == ["into q", "into k", "into v"]
    labels = (figure.axes[0].get_yticklabels(), figure.axes[0].get_xticklabels())
    assert [[text.get_text() for text in some] for some in labels] == [[f"{n}.{i}" for i in range(4)] for n in range(2)]
    assert [axes.get_title() for axes in found.picture().axes[:2]] == ["QK: where it looks", "OV: what it moves"]
    best = edges.loc[edges.score.abs().idxmax()]
    assert (best.address, best["head"], best.to_address, best.to_head, best.input) == ("self.0", 0, "self.1", 3, "k")


def test_ranks_and_costs_on_the_demo_model() -> None:
    """Its attention is saturated: plain attribution ranks its QK circuits worst of all, and the softmax again finds them.

    In float64, as most heads change the loss by 1e-7 nats. OV has no softmax to see through, and ranks alike.
    """
    model, text, metric = load_model().double(), repeated_sequences(8, 20, 64, 0), metrics.loss(range(22, 41))
    with capture(model, ["pattern"], [0], [0]) as run, torch.no_grad():
        model(text)
    assert run[0, "pattern"].amax(-1).median() > 0.99

    def ranks(method: str, **options: Any) -> tuple[dict[str, float], tuple[float, float], Any]:
        found = head_importance(model, text, None, metric, method, circuits=["qk", "ov"], to="zero", **options)
        frame = found.frame.assign(exact=exact.frame.exact.abs())
        parts = {c: rows.magnitude.corr(rows.exact, method="spearman") for c, rows in frame.groupby("circuit")}
        return parts, (found.forwards, found.backwards), found

    exact = head_importance(model, text, None, metric, "ablation", circuits=["qk", "ov"], to="zero")
    (plain, cost, slopes), (star, star_cost, found) = ranks("atp"), ranks("atp*", drop_layers=False)
    assert plain["ov"] > 0.95 and star["ov"] > 0.95
    assert plain["qk"] < 0.5 and star["qk"] > 0.95
    # The head of the first layer, of whose pattern the loss hangs as of few others: 4 nats.
    assert exact.matrix("qk").loc["self.0"].idxmax() == 0 and exact.matrix("qk").loc["self.0", 0] > 4
    assert found.matrix("qk", "magnitude").loc["self.0", 0] > 20 * slopes.matrix("qk", "magnitude").loc["self.0", 0]
    assert (cost, star_cost) == ((1, 1), (2, 1)), "AtP* has a forward more, for the patterns"
    assert exact.forwards > 10 > sum(star_cost), "16 cuts, and half of them begin at the last layer"


def test_the_benchmark_counts_right() -> None:
    rows = list(importance.measure(importance.Settings(rounds=2, layers=2, heads=4, d_head=4, batch=2, length=8)))
    assert len({(row["group"], row["what"]) for row in rows}) == len(rows) == len(importance.METHODS) + 2 * (1 + 4 * 2)
    costs = rows[: len(importance.METHODS)]
    assert [(row["forwards"], row["backwards"]) for row in costs] == [(1, 1), (2, 1), (3, 1), (3, 3), (10, 8)]
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in costs)
    ranks = {(row["group"], row["what"]): row["value"] for row in rows if row["group"].startswith("rank")}
    assert len(ranks) == 2 * 4 * 2 and all(-1 <= value <= 1 for value in ranks.values())
    demo = {what: value for (group, what), value in ranks.items() if "demo" in group}
    assert demo["AtP*: qk"] > 0.95 > 0.5 > demo["attribution patching, to zero: qk"]
    works = [row["value"] for row in rows if row["group"].startswith("exact")]
    assert len(works) == 2 and all(10 < work < 40 for work in works), "at least half a forward for each of 16 cuts"


# -- any model, any state -----------------------------------------------------------------------------------------------


def test_an_encoder_and_decoder_with_cross_attention() -> None:
    model, (clean, corrupted) = FAMILIES["t5"].build("sdpa"), prompts()
    inputs, others = ({**given, "decoder_input_ids": given["input_ids"].flip(0)[:, :7]} for given in (clean, corrupted))
    found = head_importance(model, inputs, others, METRIC, "atp*", circuits=ALL, edges=True, verify_top=1)
    assert set(found.frame.address) >= {"encoder.self.0", "decoder.self.0", "decoder.cross.1"}
    assert found.positions["decoder.cross.0", "k"].shape == (4, 9) and found.positions["decoder.cross.0", "q"].shape == (4, 7)
    assert found.edges is not None
    ways = set(zip(found.edges.address, found.edges.to_address, found.edges.input, strict=True))
    assert ("encoder.self.1", "decoder.cross.0", "k") in ways and ("encoder.self.1", "decoder.cross.0", "q") not in ways


def test_a_layer_that_runs_several_times_has_one_score() -> None:
    """One module for all layers: the slope of cutting it in all of them, which is what a cut of it does."""
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=67,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        intermediate_size=40,
        initializer_range=0.1,
        classifier_dropout_prob=0.0,
    )
    model, (clean, _) = transformers.AlbertForMaskedLM(config).eval().double(), prompts()
    found = head_importance(model, clean, None, METRIC, "atp", to="zero", circuits=["ov"])
    assert len(found.frame) == 4
    patch_model(model)
    start = measure(model, None, clean)
    for head, score in enumerate(found.frame.score):
        coarse, fine = (
            (measure(model, Edit("z", "zero", heads=[head], strength=step), clean) - start) / step for step in (2e-4, 1e-4)
        )
        assert score == pytest.approx(2 * fine - coarse, rel=1e-4)
    with pytest.raises(SpecError, match="3 calls in one forward; expected one"):
        head_importance(model, clean, None, METRIC, "atp*", to="zero")
    with pytest.raises(SpecError, match="several tensors of one forward"):
        head_importance(model, clean, clean, METRIC, "atp")


def test_an_image_classifier() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, image_size=16, patch_size=4
    )
    model = transformers.ViTForImageClassification(config).eval()
    clean, corrupted = ({"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2))

    def margin(output: Any) -> Tensor:
        return output.logits[:, 0] - output.logits[:, 1]

    exact = head_importance(model, clean, corrupted, margin, "ablation", circuits=ALL).frame.score
    found = head_importance(model, clean, corrupted, margin, "atp*", circuits=ALL, drop_layers=False)
    assert found.metric == "margin" and found.frame.score.corr(exact) > 0.99


def test_layers_that_change_the_shape_have_no_residual_to_go_past_them() -> None:
    torch.manual_seed(0)
    config = transformers.SwinConfig(image_size=16, patch_size=2, window_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4])
    model = transformers.SwinForImageClassification(config).eval()
    clean, corrupted = ({"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2))
    options: dict[str, Any] = {"metric": lambda output: output.logits[:, 0]}
    with pytest.raises(SpecError, match=r"GradDrop at a SwinStage: found a layer from .* Use drop_layers=False"):
        head_importance(model, clean, corrupted, method="atp*", **options)
    found = head_importance(model, clean, corrupted, method="atp*", drop_layers=False, **options)
    exact = head_importance(model, clean, corrupted, method="ablation", **options)
    assert len(found.frame) == (2 * 2 + 4) * 2 and found.frame.score.corr(exact.frame.score) > 0.99


def test_labels_stay_and_other_inputs_must_be_given() -> None:
    model, (clean, corrupted) = FAMILIES["gpt2"].build("sdpa"), prompts()
    given = {**clean, "labels": clean["input_ids"], "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    with pytest.raises(SpecError, match=r"corrupted\['attention_mask'\]: found nothing"):
        head_importance(model, given, corrupted)
    found = head_importance(model, given, {**corrupted, "attention_mask": given["attention_mask"]})
    expected = head_importance(model, clean, corrupted)
    assert found.frame.score.to_numpy() == pytest.approx(expected.frame.score.to_numpy(), abs=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["atp", "atp*"])
def test_padding_counts_for_nothing(method: str, implementation: str) -> None:
    model, (clean, corrupted) = FAMILIES["llama"].build(implementation), prompts()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    padded, others = ({"input_ids": given["input_ids"] * mask, "attention_mask": mask} for given in (clean, corrupted))
    found = head_importance(model, padded, others, METRIC, method, circuits=ALL, drop_layers=False)
    rows = [({"input_ids": given["input_ids"][1:]}, {"input_ids": given["input_ids"][:1, 4:]}) for given in (padded, others)]
    alone = [
        head_importance(model, a, b, METRIC, method, circuits=ALL, drop_layers=False).frame.score
        for a, b in zip(*rows, strict=True)
    ]
    expected = (2 * alone[0] + alone[1]) / 3  # means over two examples, and of one
    assert found.frame.score.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-3, abs=1e-4)


def test_the_kernel_makes_no_difference() -> None:
    model, (clean, corrupted) = FAMILIES["gemma3"].build("sdpa"), prompts()
    expected = head_importance(model, clean, corrupted, METRIC, "atp*", circuits=ALL).frame
    with patched(model, kernel="eager"):
        found = head_importance(model, clean, corrupted, METRIC, "atp*", circuits=ALL).frame
    for column in ("score", "dropped"):
        largest = expected[column].abs().max()
        assert found[column].to_numpy() == pytest.approx(expected[column].to_numpy(), abs=1e-4 * largest)


def test_layers_and_heads_are_selected() -> None:
    model, (clean, corrupted) = FAMILIES["llama"].build("sdpa"), prompts()
    every = head_importance(model, clean, corrupted, METRIC, "atp*", circuits=ALL).frame
    some = head_importance(model, clean, corrupted, METRIC, "atp*", circuits=ALL, layers=[1], heads=[3, 1]).frame
    assert list(dict.fromkeys(zip(some.address, some["head"], strict=True))) == [("self.1", 1), ("self.1", 3)]
    expected = every[(every.address == "self.1") & every["head"].isin([1, 3])]
    assert some.score.to_numpy() == pytest.approx(expected.score.to_numpy(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("method", ["atp", "atp*", "ig", "ablation"])
def test_the_model_is_left_as_it_was(method: str) -> None:
    model, (clean, corrupted) = FAMILIES["gpt2"].build("sdpa"), prompts()
    before = model(**clean).logits
    model.train()
    head_importance(model, clean, corrupted, METRIC, method, edges=True, steps=2)
    assert session_of(model) is None and model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())
    model.eval()
    assert torch.equal(model(**clean).logits, before)
    patch_model(model, Freeze("ov", layers=[0], heads=[1]))
    after = model(**clean).logits
    with torch.no_grad():
        head_importance(model, clean, corrupted, METRIC, method, steps=2)
    assert torch.equal(model(**clean).logits, after)
    unpatch_model(model)


def test_frozen_parameters_and_half_precision() -> None:
    model, (clean, corrupted) = FAMILIES["llama"].build("sdpa"), prompts()
    expected = head_importance(model, clean, corrupted, METRIC, "atp*", edges=True)
    model.requires_grad_(False)
    found = head_importance(model, clean, corrupted, METRIC, "atp*", edges=True)
    assert found.frame.equals(expected.frame)
    assert found.edges is not None and expected.edges is not None and found.edges.equals(expected.edges)
    half = head_importance(model.bfloat16(), clean, corrupted, METRIC, "atp", circuits=["ov"]).frame.score
    full = expected.frame[expected.frame.circuit == "ov"].score
    assert half.to_numpy() == pytest.approx(full.to_numpy(), abs=0.2 * full.abs().max())  # random models are bent


def test_gates_leave_the_output_as_it_is() -> None:
    model, (clean, _) = FAMILIES["gemma2"].build("eager"), prompts()
    before = model(**clean).logits
    points = Points([("self.0", (0, 2)), ("self.1", (1,))], ["rot_q", "v", "z"], lambda *_: Gate(torch.zeros_like, 0.0))
    with patched(model, points.spec):
        assert torch.equal(model(**clean).logits, before)


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "accuracy"}, SpecError, "has no gradient.*method='ablation'"),
        ({"metric": lambda output: output.logits.sum().item()}, SpecError, "has no gradient"),
        ({"metric": lambda output: output.logits}, SpecError, "expected a number, or one for each of 3 examples"),
        ({"method": "apt"}, SpecError, "Did you mean 'atp'"),
        ({"circuits": ["qk", "both"]}, SpecError, "circuits: found .'both'.; expected of 'qk', 'q', 'k', 'ov', 'v'"),
        ({"corrupted": None}, SpecError, "Pass them, or to='zero'"),
        ({"corrupted": torch.zeros(3, 8, dtype=torch.long)}, SpecError, r"shape \(3, 8\); expected \(3, 9\)"),
        ({"to": "corupted"}, SpecError, "expected 'corrupted', 'zero', 'mean'"),
        ({"to": torch.zeros(2, 4, 9, 8)}, SpecError, r"values of shape \(2, 4, 9, 8\); expected \(3, 4, 9, 8\)"),
        ({"heads": [4]}, SpecError, "heads 0 to 3"),
        ({"layers": [7]}, NoMatchError, "self.0 to self.1"),
        ({"clean": [torch.ones(3, 9, dtype=torch.long)] * 2}, SpecError, "2 batches; expected one"),
        ({"method": "ig", "steps": 0}, SpecError, "at least 1 step"),
        ({"method": "ig", "path": "head"}, SpecError, "path: found .'head'.; expected of 'layer', 'all'"),
        ({"path": "nope"}, SpecError, "path: found .'nope'.; expected of 'layer', 'all'"),
        ({"circuits": []}, SpecError, "circuits"),
        ({"verify_top": -1}, SpecError, "verify_top: found -1; expected a whole number from 0 on"),
        ({"sample": -1}, SpecError, "sample: found -1"),
        ({"clean": {}}, SpecError, "data: found a batch without tensors .empty.; expected at least one tensor"),
        ({"edges": (1, 2)}, SpecError, r"edges: found \(1, 2\); expected True, or \(layer or address, head\) pairs"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, (clean, corrupted) = FAMILIES["gpt2"].build("sdpa"), prompts()
    arguments: dict[str, Any] = {"clean": clean, "corrupted": corrupted, "metric": METRIC, **options}
    with pytest.raises(error, match=message):
        head_importance(model, **arguments)
    assert session_of(model) is None, "left as it was"


def test_values_of_other_sites_are_refused() -> None:
    model, (clean, _) = FAMILIES["gpt2"].build("sdpa"), prompts()
    with capture(model, ["z"]) as run, torch.no_grad():
        model(**clean)
    with pytest.raises(SpecError, match=r"values of heads \[0, 1, 2, 3\] at self.0 rot_q"):
        head_importance(model, clean, None, METRIC, to=run)
    assert len(head_importance(model, clean, None, METRIC, to=run, circuits="ov").frame) == 8


def test_a_pattern_that_is_no_softmax_of_its_scores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (clean, corrupted) = FAMILIES["gpt2"].build("eager"), prompts()
    patch_model(model, Edit("pattern", "uniform", layers=[1], heads=[2]))  # below what the key scores look at
    with pytest.raises(SpecError, match=r"key scores at self.1: found a pattern that differs by .* Use circuit 'qk'"):
        head_importance(model, clean, corrupted, METRIC, "atp*", circuits=["k"])
    found = head_importance(model, clean, corrupted, METRIC, "atp*", circuits=["qk"])
    assert found.matrix("qk").loc["self.1", 2] == 0.0, "nothing moves a pattern that is fixed"


def test_a_metric_at_its_smallest_has_no_first_order() -> None:
    model, (clean, corrupted) = FAMILIES["gpt2"].build("sdpa"), prompts()
    exact = head_importance(model, clean, corrupted, "kl", "ablation").frame.score
    plain = head_importance(model, clean, corrupted, "kl", "atp").frame.score
    integral = head_importance(model, clean, corrupted, "kl", "ig").frame.score
    assert plain.abs().max() < 1e-6 * exact.max() < integral.max()


def test_estimates_that_have_failed_say_so() -> None:
    model, clean = load_model(), repeated_sequences(4, 20, 64, 0)
    corrupted = torch.cat([repeated_sequences(4, 20, 64, 1)[:, :21], clean[:, 21:]], 1)
    flat = head_importance(model, clean, corrupted, "kl", "atp")
    assert "KL has no slope at the clean inputs" in flat.notes[0] and flat.notes[0] in str(flat)
    saturated = head_importance(model, clean, corrupted, "loss", "atp", verify_top=3, edges=[(1, 3)])
    [note] = saturated.notes
    assert "estimates are far from exact changes here" in note and "edges are to first order" in str(saturated)
    good = head_importance(*deep(), "atp*", verify_top=3)
    assert good.notes == [] and "note" not in str(good)


def deep() -> Any:
    return deep_model(layers=2), *prompts(), METRIC
