"""A patched model inside other tools: checkpointing, PEFT, accelerate, torch.compile, torch.export, Trainer, hooks, threads.

Equality is `torch.equal` unless a tool computes in another order; the reason stands beside the tolerance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from cached import CACHE
from families import FAMILIES, HEADS, LAYERS, LENGTH
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training import two_steps
from transformers import StaticCache, Trainer
from transformers.pytorch_utils import Conv1D

import surgery.patch
from surgery import (
    Edit,
    Freeze,
    NotFiredWarning,
    PatchError,
    Spec,
    SpecError,
    SurgeryError,
    UnsupportedArchitectureError,
    capture,
    collect_reference,
    find_anatomy,
    inspect_model,
    patch_model,
    patched,
    unpatch_model,
)
from surgery.classes import SurgicalAttention

NAMES = ("llama", "gpt2", "bert", "t5")
CUTS = {
    "none": Spec(),
    "z": Spec([Freeze("ov", heads=[1])]),
    "qk": Spec([Freeze("qk", layers=["*"], heads=[1])]),
    "pattern": Spec([Edit("pattern", "scale", 0.5, layers=["*"], heads=[1])]),
    "several": Spec([Edit("q", "scale", 0.5, layers=[0], heads=[0]), Edit("result", "scale", 0.5, layers=[1], heads=[2, 3])]),
    "ste": Spec([Freeze("both", heads=[0, 2], backward="ste")]),
}
by_family = pytest.mark.parametrize("name", NAMES)
by_cut = pytest.mark.parametrize("cut", CUTS)


def build(name: str, implementation: str = "sdpa", **options: Any) -> Any:
    return FAMILIES[name].build(implementation, **options)


def inputs(name: str, **options: Any) -> dict[str, Tensor]:
    return FAMILIES[name].inputs(**options)


@torch.no_grad()
def logits(model: Any, given: dict[str, Tensor], **more: Any) -> Tensor:
    return model(**given, **more).logits


def gradients(model: Any, given: dict[str, Tensor], run: Any = None) -> dict[str, Tensor]:
    """Gradients by parameter; zeros where there is none, for tools differ in which of the two they leave."""
    model.zero_grad()
    out = (model if run is None else run)(**given).logits
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert float((found[name] - expected[name]).abs().max()) <= atol * (float(expected[name].abs().max()) + 1.0), name


def first(model: Any) -> Any:
    """The first attention module."""
    return find_anatomy(model).attentions[0].module


# -- gradient checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["no_reentry", "reentrant"])
@by_cut
@by_family
def test_gradient_checkpointing(name: str, cut: str, reentrant: bool) -> None:
    model = patch_model(build(name), CUTS[cut]).train()
    given = inputs(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    expected = gradients(model, given)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    hook = first(model).register_forward_hook(lambda *_: runs.append(1))
    found = gradients(model, given)
    if name == "t5":
        # The decoder's layers recompute one by one, and so add up their gradients to the encoder's output in another order;
        # gradients as steep as a tiny random T5's magnify that.
        assert_close(found, expected, atol=1e-3)
    else:
        assert_equal(found, expected)
    assert len(runs) == 2, "the layer must run again in backward, or this test shows nothing"
    hook.remove()
    patch_model(model, CUTS["z"])
    again = gradients(model, given)
    model.gradient_checkpointing_disable()
    assert_close(again, gradients(model, given), atol=1e-3 if name == "t5" else 1e-5)


# -- PEFT ---------------------------------------------------------------------------------------------------------------------

TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "bert": ["query", "value", "attention.output.dense"],
    "t5": ["q", "v", "o"],
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": None, "t5": "SEQ_2_SEQ_LM"}


def lora(name: str, model: Any, **options: Any) -> Any:
    """The model with random adapters, always the same ones."""
    torch.manual_seed(5)
    config = LoraConfig(
        r=2,
        target_modules=TARGETS[name],
        init_lora_weights=False,
        task_type=TASKS[name],
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    return get_peft_model(model, config)


pytestmark = pytest.mark.filterwarnings(
    # Older names that PEFT uses, and that we use because transformers 5.17 has no other.
    "ignore:`(gradient_checkpointing|is_gradient_checkpointing):FutureWarning",
)


@by_cut
@by_family
def test_lora_before_and_after_patching(name: str, cut: str) -> None:
    given = inputs(name)
    before = patch_model(lora(name, build(name)), CUTS[cut])
    after = lora(name, patch_model(build(name), CUTS[cut]))
    assert isinstance(first(after), SurgicalAttention) and isinstance(first(before), SurgicalAttention)
    found = logits(after, given)
    assert torch.equal(found, logits(before, given))
    uncut, unadapted = logits(lora(name, build(name)), given), logits(patch_model(build(name), CUTS[cut]), given)
    assert torch.equal(found, uncut) == (cut == "none")
    assert not torch.allclose(found, unadapted, atol=1e-3)
    assert_equal(gradients(after, given), gradients(before, given))
    for model in (before, after):
        adapters = {n: g for n, g in gradients(model, given).items() if "lora" in n}
        assert adapters and all(bool(g.abs().sum() > 0) for g in adapters.values())
        # Patching anew works on the model as it is wrapped now.
        patch_model(model, CUTS["qk"])
        unpatch_model(model)
        assert torch.equal(logits(model, given), uncut)


@by_family
def test_projection_cuts_act_on_the_adapted_projections(name: str) -> None:
    given = inputs(name)
    model = lora(name, build(name))
    seen: dict[str, Tensor] = {}
    attention = find_anatomy(model).attentions[0]
    place, output = attention.projections["q"], attention.projections["o"]
    modules = dict(model.named_modules())
    hooks = [
        modules[place.path].register_forward_hook(lambda m, a, out: seen.update(q=out)),
        modules[output.path].register_forward_hook(lambda m, a, out: seen.update(o=out)),
    ]
    with torch.no_grad(), capture(model, ["q", "result"], layers=[attention.address]) as run:
        model(**given)
    q = run[attention.address, "q"]
    assert torch.equal(q.transpose(1, 2).flatten(2), seen["q"][..., place.channels.flatten()])
    with torch.no_grad():
        bias = modules[output.path].forward(torch.zeros(1, 1, attention.heads * attention.d_value))
    # A sum over heads in another order.
    assert torch.allclose(run[attention.address, "result"].sum(1) + bias, seen["o"], atol=1e-5)
    for hook in hooks:
        hook.remove()
    # Cutting every head's result leaves the adapted projection's bias alone.
    hook = first(model).register_forward_hook(lambda m, a, out: seen.update(attention=out[0]))
    with patched(model, Edit("result", lambda parts: 0 * parts, layers=[attention.address])):
        cut = logits(model, given)
    assert torch.allclose(cut, logits(patch_model(model, Freeze("ov", layers=[attention.address])), given), atol=1e-4)
    if output.owner == attention.path:
        assert torch.allclose(seen["attention"], bias.expand_as(seen["attention"]), atol=1e-5)
    hook.remove()


@by_family
def test_merging_adapters_under_cuts(name: str) -> None:
    given, cut = inputs(name), CUTS["several"]
    model = patch_model(lora(name, build(name)), cut)
    expected = logits(model, given)
    merged = model.merge_and_unload()
    assert isinstance(first(merged), SurgicalAttention)
    # W x + B A x against (W + B A) x.
    assert torch.allclose(logits(merged, given), expected, atol=1e-4, rtol=1e-4)
    again = logits(patch_model(merged, cut), given)
    assert torch.equal(again, logits(merged, given))
    plain = logits(unpatch_model(merged), given)
    assert torch.allclose(plain, logits(lora(name, build(name)), given), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, SurgicalAttention) for m in merged.modules())


def test_adapters_switched_off_under_cuts() -> None:
    given = inputs("llama")
    model = patch_model(lora("llama", build("llama")), CUTS["several"])
    with model.disable_adapter():
        assert torch.equal(logits(model, given), logits(patch_model(build("llama"), CUTS["several"]), given))


@by_family
def test_results_of_an_adapter_with_dropout_are_parts_of_one_draw(name: str) -> None:
    """Watching them draws nothing of its own: neither the output nor the random numbers that follow change."""
    model, given = lora(name, build(name), lora_dropout=0.5, lora_alpha=16).train(), inputs(name, padding=0)
    attentions, modules = list(find_anatomy(model)), dict(model.named_modules())
    outputs: dict[str, Tensor] = {}
    for a in attentions:
        place = modules[a.projections["o"].path]
        place.register_forward_hook(lambda m, args, out, address=a.address: outputs.update({address: out}))

    def run(seed: int = 3) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return logits(model, given), torch.rand(4)

    expected, following = run()
    with capture(model, "result", ["*"]) as parts:
        found, then = run()
    assert torch.equal(found, expected) and torch.equal(then, following)
    drawn = dict(outputs)
    other, _ = run(4)
    assert not torch.allclose(other, expected, atol=1e-2), "dropout must act, or this test shows nothing"
    for a in attentions:
        bias = modules[a.projections["o"].path].base_layer.bias
        total = parts[a.address, "result"].sum(1) + (0.0 if bias is None else bias)
        # Sums over heads in another order: some roundings of float32, as a part of the largest entry.
        bound = 1e-6 * float(drawn[a.address].abs().max())
        assert float((total - drawn[a.address]).abs().max()) <= bound
        assert float((total - outputs[a.address]).abs().max()) > 1e3 * bound, "another draw is told apart"
    for factor in (1.0, 0.5):
        patch_model(model, Edit("result", "scale", factor, ["*"], [1, 3]))
        found, then = run()
        assert torch.equal(then, following)
        assert torch.equal(found, expected) == (factor == 1.0)


# -- accelerate ---------------------------------------------------------------------------------------------------------------


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@by_cut
@by_family
def test_accelerate_hooks_before_and_after_patching(name: str, cut: str) -> None:
    given = inputs(name)
    expected, plain = logits(patch_model(build(name), CUTS[cut]), given), logits(build(name), given)
    for order in ("before", "after"):
        model, hook = build(name), Counting()
        module = first(model)
        own = type(module)
        if order == "before":
            add_hook_to_module(module, hook)
            old = module._old_forward
            patch_model(model, CUTS[cut])
        else:
            patch_model(model, CUTS[cut])
            add_hook_to_module(module, hook)
        assert torch.equal(logits(model, given), expected)
        assert hook.calls == 1
        patch_model(model, CUTS["z"])
        patch_model(model, CUTS[cut])
        assert torch.equal(logits(model, given), expected)
        unpatch_model(model)
        assert type(module) is own and module._old_forward.__func__ is own.forward
        if order == "before":
            assert module._old_forward == old
        assert torch.equal(logits(model, given), plain)
        assert hook.calls == 3
        remove_hook_from_module(module)
        assert "_old_forward" not in module.__dict__
        assert torch.equal(logits(model, given), plain)


@by_family
def test_hooks_may_leave_while_the_model_is_patched(name: str) -> None:
    given = inputs(name)
    model = build(name)
    add_hook_to_module(first(model), Counting())
    patch_model(model, CUTS["qk"])
    remove_hook_from_module(first(model))
    assert torch.equal(logits(model, given), logits(patch_model(build(name), CUTS["qk"]), given))
    unpatch_model(model)
    assert torch.equal(logits(model, given), logits(build(name), given))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("cut", ["none", "z", "pattern", "several"])
@by_family
def test_offloaded_models(name: str, cut: str, order: str) -> None:
    """Every parameter lives on the meta device except while its module runs."""
    given = inputs(name)
    expected, plain = logits(patch_model(build(name), CUTS[cut]), given), logits(build(name), given)
    model = build(name)
    if order == "after":
        patch_model(model, CUTS[cut])
    cpu_offload(model, execution_device=torch.device("cpu"))
    if order == "before":
        patch_model(model, CUTS[cut])
    assert all(p.is_meta for p in first(model).parameters())
    if cut == "several":
        # Where the weights are not at hand, an edit at result subtracts two outputs of the projection.
        assert torch.allclose(logits(model, given), expected, atol=1e-5)
    else:
        assert torch.equal(logits(model, given), expected)
    assert all(p.is_meta for p in first(model).parameters())
    unpatch_model(model)
    assert torch.equal(logits(model, given), plain)


@by_family
def test_dispatched_models(name: str) -> None:
    given = inputs(name)
    model = dispatch_model(build(name), device_map={"": "cpu"}, force_hooks=True)
    assert torch.equal(
        logits(patch_model(model, CUTS["pattern"]), given), logits(patch_model(build(name), CUTS["pattern"]), given)
    )
    unpatch_model(model)
    assert torch.equal(logits(model, given), logits(build(name), given))


# -- torch.compile and torch.export -------------------------------------------------------------------------------------------

COMPILED = [
    (name, implementation, cut)
    for name, implementation in (("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("bert", "sdpa"), ("t5", "eager"))
    for cut in CUTS
    if (name == "llama" and implementation == "sdpa") or cut == "several" or (name == "gpt2" and cut == "qk")
]


@pytest.mark.parametrize(("name", "implementation", "cut"), COMPILED)
def test_compiled_whole_without_breaks_and_once(dynamo: None, name: str, implementation: str, cut: str) -> None:
    model, given = patch_model(build(name, implementation), CUTS[cut]), inputs(name)
    expected = logits(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled, given), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(logits(compiled, given), expected)
        more = inputs(name, seed=1)
        assert torch.equal(logits(compiled, more), logits(model, more))
    assert counters["graph_break"] == {} and counters["stats"]["unique_graphs"] == 1
    assert surgery.patch.session_of(model) is surgery.patch.session_of(compiled)


# Every kind of replacement.
TRACED = {
    "positions": [
        Freeze("both", to="noise", heads=[1]),
        Freeze("ov", positions=[2, 3], heads=[0, 3]),
        Edit("pattern", "previous", heads=[2], layers=[1]),
        Edit("z", "add", torch.linspace(0, 1, 16), heads=[1]),
    ],
    "batch": [
        Freeze("both", to="mean", heads=[1], strength=0.5),
        Freeze("qk", to="resample", heads=[0]),
        Edit("scores", lambda scores: scores * 0.5, heads=[1, 3]),
    ],
    "ste": [Freeze("both", heads=[1], backward="ste"), Freeze("ov", heads=[0], to="identity", strength=0.5)],
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, while it first compiles
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, at our autograd function
@pytest.mark.parametrize("cuts", TRACED)
def test_compiled_forward_and_backward(dynamo: None, cuts: str) -> None:
    model, given = patch_model(build("llama"), TRACED[cuts]), inputs("llama")
    expected = gradients(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Sums in the order of the traced graph.
    assert_close(gradients(model, given, compiled), expected)


def test_compiled_decoding_on_a_static_cache(dynamo: None) -> None:
    """One graph for all steps, also where a cut depends on the position."""
    model, ids = patch_model(build("llama"), TRACED["positions"]), inputs("llama", padding=0)["input_ids"]
    expected = logits(model, {"input_ids": ids}, use_cache=False)
    cache = StaticCache(model.config, max_cache_len=12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = [logits(model, {"input_ids": ids[:, :4], "attention_mask": torch.ones(2, 4)}, **{CACHE: cache})]
    for step in range(4, LENGTH):
        given = {"input_ids": ids[:, step, None], "attention_mask": (torch.arange(12) <= step).expand(2, 12)}
        with torch._dynamo.config.patch(error_on_recompile=step > 5):
            found.append(logits(compiled, given, **{CACHE: cache}))
    # Shorter products, and a longer cache, round differently.
    assert torch.allclose(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_compiled_by_inductor(dynamo: None) -> None:
    model, given = build("llama"), inputs("llama")
    patch_model(model, Spec([Freeze("ov", layers=[0], heads=[1]), Edit("pattern", "scale", 0.5, layers=[1], heads=[2])]))
    compiled = torch.compile(model, fullgraph=True)
    # Fused kernels round differently.
    assert torch.allclose(logits(compiled, given), logits(model, given), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("site", ["scores", "pattern"])
def test_a_first_capture_may_be_a_compiled_one(dynamo: None, name: str, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to trace by then, though this process has captured before."""
    monkeypatch.setattr(surgery.rewrite, "_TRACES", {})
    model, given = build(name), inputs(name)
    expected = logits(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with capture(model, site, [1], [2]) as run:
        assert torch.equal(logits(compiled, given), expected)
    with capture(model, site, [1], [2]) as again:
        logits(model, given)
    assert torch.equal(run[1, site], again[1, site])


def test_a_compiled_model_follows_what_is_patched_later(dynamo: None) -> None:
    model, given = build("llama"), inputs("llama")
    plain = logits(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled, given), plain)
    for cut in ("several", "z"):
        patch_model(model, CUTS[cut])
        found = logits(compiled, given)
        assert torch.equal(found, logits(model, given)) and not torch.equal(found, plain)
    with capture(compiled, ["pattern", "z"], layers=[1], heads=[0]) as run:
        logits(compiled, given)
        logits(compiled, given)
    assert len(run.steps(1, "z")) == 2 and torch.equal(*run.steps(1, "pattern"))
    unpatch_model(compiled)
    assert torch.equal(logits(compiled, given), plain)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "cut", "strict"),
    [("llama", cut, False) for cut in CUTS]
    + [(name, "several", strict) for name in ("llama", "bert") for strict in (False, True)][1:]
    + [("gpt2", "pattern", False), ("gpt2", "pattern", True), ("t5", "several", False)],
)
def test_exported_models(dynamo: None, name: str, cut: str, strict: bool) -> None:
    model, given = patch_model(build(name), CUTS[cut]), inputs(name)
    more: dict[str, Any] = {} if name == "bert" else {"use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), {**given, **more}, strict=strict)
    other = inputs(name, seed=1)
    assert torch.equal(logits(program.module(), other, **more), logits(model, other, **more))
    # The cut lives in the graph: it stays when the model's own goes.
    expected = logits(model, given, **more)
    unpatch_model(model)
    assert torch.equal(logits(program.module(), given, **more), expected)
    assert torch.equal(logits(model, given, **more), expected) == (cut == "none")


# -- functional gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("circuit", ["both", "pattern"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_functional_gradients_are_those_of_autograd(name: str, circuit: str) -> None:
    """Straight-through gradients, of a batch and of each of its rows."""
    # Not sdpa: torch has no batching rule for its kernel on a CPU.
    model, ids = build(name, "eager"), inputs(name, batch=3, padding=0)["input_ids"]
    model.config.use_cache = False
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def cut(backward: str) -> Any:
        if circuit == "both":
            return Freeze("both", heads=[0, 2], backward=backward)
        return Edit("pattern", "uniform", heads=[1, 2], backward=backward)

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        out = torch.func.functional_call(model, parameters, args=(), kwargs={"input_ids": ids}).logits
        return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()

    patch_model(model, cut("ste"))
    expected = gradients(model, {"input_ids": ids})
    # Both add up in orders of their own.
    assert_close(torch.func.grad(loss)(parameters, ids), expected)
    by_row = torch.func.vmap(torch.func.grad(lambda p, row: loss(p, row[None])), in_dims=(None, 0))(parameters, ids)
    rows = [gradients(model, {"input_ids": row[None]}) for row in ids]
    assert_close(by_row, {n: torch.stack([row[n] for row in rows]) for n in parameters})
    patch_model(model, cut("stopgrad"))
    with pytest.raises(AssertionError):
        assert_close(torch.func.grad(loss)(parameters, ids), expected)


# -- what belongs to the user stays -------------------------------------------------------------------------------------------


@by_cut
@by_family
def test_user_hooks_fire_as_before(name: str, cut: str) -> None:
    model, given = build(name), inputs(name)
    calls: dict[str, int] = {}

    def count(key: str) -> Callable[..., None]:
        return lambda *args, **kwargs: calls.__setitem__(key, calls.get(key, 0) + 1)

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_hook(count(f"{path} after")))
        handles.append(module.register_forward_pre_hook(count(f"{path} before")))
        if isinstance(module, nn.Linear | nn.LayerNorm | Conv1D):
            handles.append(module.register_full_backward_hook(count(f"{path} backward")))

    def run() -> dict[str, int]:
        calls.clear()
        gradients(model, given)
        return dict(calls)

    before = run()
    calls.clear()
    patch_model(model, CUTS[cut])
    assert not calls, "patching runs no forward that a user's hook would see"
    found = run()
    if cut in ("none", "z", "several"):
        assert found == before
    assert {k: n for k, n in found.items() if "backward" not in k} == {k: n for k, n in before.items() if "backward" not in k}
    unpatch_model(model)
    assert run() == before
    for handle in handles:
        handle.remove()
    assert run() == {}


def test_user_hooks_may_change_what_flows() -> None:
    given = inputs("llama")
    results = []
    for patch_first in (True, False):
        model = build("llama")
        if patch_first:
            patch_model(model, CUTS["z"])
        first(model).q_proj.register_forward_hook(lambda module, args, output: output * 0.5)
        first(model).register_forward_hook(lambda module, args, output: (output[0] + 1.0, *output[1:]))
        first(model).register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}), with_kwargs=True
        )
        results.append(logits(patch_model(model, CUTS["z"]), given))
    assert torch.equal(*results)
    assert not torch.equal(results[0], logits(patch_model(build("llama"), CUTS["z"]), given))


def drops_by_a_module(name: str) -> bool:
    """GPT-J and CodeGen do so before transformers 5.24."""
    return any(child in DROPOUTS for part in build(name, "eager").modules() for child, _ in part.named_children())


DROPOUTS = ("attn_dropout", "attention_dropout")
DROPPING = ("gptj", "codegen", "bloom", "gpt_neo", "gpt2_reordered", "falcon_alibi")


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("name", [name for name in DROPPING if drops_by_a_module(name)])
def test_user_hooks_on_the_dropout_of_a_pattern_fire_as_before(name: str, kernel: Any) -> None:
    """And what they give back is what goes on: these families drop out by a module of their own, inside the core."""
    model, given = build(name, "eager"), inputs(name)
    unhooked = logits(model, given)
    calls: list[str] = []

    def halve(address: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            calls.append(address)
            return output * 0.5

        return hook

    for a in find_anatomy(model):
        [dropout] = [m for n, m in a.module.named_children() if n in DROPOUTS]
        dropout.register_forward_hook(halve(a.address))
    hooked = logits(model, given)
    assert calls == ["self.0", "self.1"] and not torch.allclose(hooked, unhooked, atol=1e-2)
    # The last of these changes nothing, and yet takes every module through our reconstruction.
    for cut in (Edit("pattern", "scale", 0.5, heads=[1]), Freeze("ov", heads=[1]), None, Edit("pattern", "identity")):
        calls.clear()
        patch_model(model, cut, kernel=kernel)
        with capture(model, ["pattern", "z"]):
            assert calls == []
            found = logits(model, given)
        assert calls == ["self.0", "self.1"], str(cut)
    assert torch.equal(found, hooked)


def test_hooks_on_an_adapted_output_projection_fire_once_beside_a_result_cut() -> None:
    model, given = lora("llama", build("llama")), inputs("llama")
    calls: list[int] = []
    first(model).o_proj.register_forward_hook(lambda *_: calls.append(1))
    patch_model(model, Edit("result", "scale", 0.5, heads=[0, 2, 3]))
    logits(model, given)
    assert len(calls) == 1


@by_cut
@by_family
def test_the_rest_of_the_model_stays(name: str, cut: str) -> None:
    model = build(name).train()
    model.config.use_cache = False
    some = list(model.parameters())[3]
    some.requires_grad_(False)
    list(model.modules())[5].eval()

    def state() -> Any:
        return (
            [(n, id(p), p.requires_grad, p.data_ptr()) for n, p in model.named_parameters(remove_duplicate=False)],
            [(n, id(b)) for n, b in model.named_buffers()],
            [(n, m.training) for n, m in model.named_modules()],
            model.get_input_embeddings().weight is model.get_output_embeddings().weight,
            model.config.to_json_string(use_diff=False),
            model.config._attn_implementation,
            model.generation_config.to_json_string() if model.can_generate() else "",
            model.dtype,
            torch.get_rng_state().tolist(),
        )

    before = state()
    patch_model(model, CUTS[cut])
    assert state() == before
    patch_model(model, CUTS["several"], kernel="eager")
    assert state() == before
    with capture(model, "z", strict=False):
        assert state() == before
    unpatch_model(model)
    assert state() == before


@by_family
def test_the_live_config_decides(name: str) -> None:
    """A user who changes the model's implementation after patching gets that one."""
    given = inputs(name)
    for cut in ("none", "z", "pattern"):
        model, switched = patch_model(build(name, "sdpa"), CUTS[cut]), build(name, "sdpa")
        for one in (model, switched):
            one.set_attn_implementation("eager")
        assert torch.equal(logits(model, given), logits(patch_model(switched, CUTS[cut]), given))
        # transformers 5.17 gives T5's stacks configs of their own, which stay as they were.
        if all(m.config._attn_implementation == "eager" for m in model.modules() if hasattr(m, "config")):
            eager = patch_model(build(name, "eager"), CUTS[cut])
            assert torch.equal(logits(model, given), logits(eager, given))
            with torch.no_grad():
                output = model(**given, output_attentions=True)
            assert next(x for name, x in output.items() if "attentions" in name)[0].shape[1] == HEADS
        model.set_attn_implementation("sdpa")
        assert torch.equal(logits(model, given), logits(patch_model(build(name, "sdpa"), CUTS[cut]), given))
        assert "sdpa" in str(inspect_model(model)) and "attention_surgery" not in str(inspect_model(model))


@by_family
def test_moving_a_model_moves_its_cuts(name: str) -> None:
    given = inputs(name)
    means = collect_reference(build(name), [given], progress=False)
    cut = Spec([Freeze("ov", heads=[1, 2], to="mean", reference=means), Edit("rot_q", "add", torch.full((1,), 0.5), heads=[0])])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        late = patch_model(build(name), cut).to(dtype)
        early = patch_model(build(name).to(dtype), cut)
        found = logits(late, given)
        assert found.dtype == dtype and torch.equal(found, logits(early, given))
        assert not torch.equal(found, logits(unpatch_model(late), given))
    assert logits(patch_model(build(name), cut).half().float(), given).dtype == torch.float32


@by_cut
@by_family
def test_saving_a_patched_model_saves_the_plain_one(name: str, cut: str, tmp_path: Path) -> None:
    model, given = build(name), inputs(name)
    plain = logits(model, given)
    patch_model(model, CUTS[cut]).save_pretrained(tmp_path / "patched")
    patched_logits = logits(model, given)
    unpatch_model(model).save_pretrained(tmp_path / "plain")
    for one in (tmp_path / "plain").iterdir():
        other = tmp_path / "patched" / one.name
        assert other.read_bytes() == one.read_bytes(), one.name
        assert b"attention_surgery" not in one.read_bytes()
    assert len(list((tmp_path / "plain").iterdir())) == len(list((tmp_path / "patched").iterdir()))
    loaded = type(model).from_pretrained(tmp_path / "patched", attn_implementation="sdpa")
    assert torch.equal(logits(loaded, given), plain)
    assert torch.equal(logits(patch_model(loaded, CUTS[cut]), given), patched_logits)


# -- training -----------------------------------------------------------------------------------------------------------------


def train(model: Any, folder: Path, **options: Any) -> Any:
    """Two steps of transformers' Trainer."""
    trainer = Trainer(model, **two_steps(folder, **options))
    trainer.train()
    return trainer


def rows_of_head(model: Any, head: int) -> dict[str, Tensor]:
    attention = first(model)
    rows = slice(16 * head, 16 * head + 16)
    return {"q": attention.q_proj.weight[rows].detach().clone(), "o": attention.o_proj.weight[:, rows].detach().clone()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trainer_without_cuts_trains_the_same_model(name: str, checkpointing: bool, tmp_path: Path) -> None:
    own, patched_model = build(name), patch_model(build(name))
    for model in (own, patched_model):
        train(model, tmp_path, gradient_checkpointing=checkpointing)
    assert_equal(patched_model.state_dict(), own.state_dict())
    assert not torch.equal(own.state_dict()["lm_head.weight"], build(name).state_dict()["lm_head.weight"])


def test_trainer_with_cuts(tmp_path: Path) -> None:
    start = rows_of_head(build("llama"), 1)
    stopped = patch_model(build("llama"), Freeze("both", layers=[0], heads=[1]))
    straight = patch_model(build("llama"), Freeze("both", layers=[0], heads=[1], backward="ste"))
    for model in (stopped, straight):
        train(model, tmp_path)
    # Nothing flows to a frozen head, except straight through; z = 0 leaves its columns of W_O alone in both.
    assert_equal(rows_of_head(stopped, 1), start)
    assert not torch.equal(rows_of_head(straight, 1)["q"], start["q"])
    assert torch.equal(rows_of_head(straight, 1)["o"], start["o"])
    assert not torch.equal(rows_of_head(stopped, 0)["q"], rows_of_head(build("llama"), 0)["q"])
    trainer = train(stopped, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(stopped).from_pretrained(tmp_path / "saved")
    assert_equal(loaded.state_dict(), stopped.state_dict())


@by_family
def test_autocast(name: str) -> None:
    given = inputs(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = build(name)
        before, gradient = logits(model, given), gradients(model, given)
        patch_model(model)
        assert torch.equal(logits(model, given), before)
        assert_equal(gradients(model, given), gradient)
        patch_model(model, kernel="eager")
        assert torch.equal(logits(model, given), logits(build(name, "eager"), given))
        for cut in CUTS.values():
            found = logits(patch_model(model, cut), given)
            reference = logits(patch_model(build(name), cut, kernel="eager"), given)
            assert found.dtype == before.dtype
            # bfloat16 has 8 bits, and the two kernels round them at other places; row 0 holds padding, of which each has its
            # own; T5's scores, which nothing scales, magnify both.
            assert name == "t5" or torch.allclose(found[1].float(), reference[1].float(), atol=0.1 * float(before.abs().max()))


# -- several models -----------------------------------------------------------------------------------------------------------


def test_two_models_of_one_class_are_cut_apart() -> None:
    given = inputs("llama")
    one, two, three = build("llama"), build("llama"), build("llama", "eager")
    expected = {c: logits(patch_model(build("llama"), CUTS[c]), given) for c in ("z", "several")}
    plain, plain_eager = logits(one, given), logits(three, given)
    patch_model(one, CUTS["z"])
    patch_model(two, CUTS["several"])
    assert type(first(one)) is type(first(two)) is not type(first(three))
    assert torch.equal(logits(one, given), expected["z"])
    assert torch.equal(logits(two, given), expected["several"])
    assert torch.equal(logits(three, given), plain_eager)
    unpatch_model(one)
    assert torch.equal(logits(one, given), plain)
    assert torch.equal(logits(two, given), expected["several"])


# -- every edit fires ---------------------------------------------------------------------------------------------------------


def test_a_forward_around_the_core_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = patch_model(build("llama"), CUTS["z"]), inputs("llama")
    own = type(first(model))._surgery_base
    monkeypatch.setattr(own, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(SurgeryError, match=r"'model.layers.0.self_attn': found a forward that never came to z; expected every"):
        logits(model, given)
    patch_model(model, CUTS["none"])
    logits(model, given)


def test_an_output_block_around_its_projection_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build("bert"), inputs("bert")
    block = model.bert.encoder.layer[0].attention.output
    own = type(block)
    patch_model(model, Edit("result", "scale", 0.5, layers=[0]))
    monkeypatch.setattr(own, "forward", lambda self, hidden_states, input_tensor: input_tensor)
    with pytest.raises(SurgeryError, match=r"never came to result; expected every"):
        logits(model, given)


@by_cut
def test_cross_attention_without_a_source_is_reported(cut: str) -> None:
    config = transformers.GPT2Config(**FAMILIES["gpt2"].options, add_cross_attention=True)
    model = transformers.GPT2LMHeadModel(config).eval()
    given = inputs("gpt2")
    addresses = {a.address for a in find_anatomy(model)}
    assert addresses == {"self.0", "self.1", "cross.0", "cross.1"}
    spec = Spec([Freeze("ov", layers=["cross.1"]), Freeze("qk", layers=[0])])
    with pytest.warns(NotFiredWarning, match=r"never ran the attention at cross.1") as caught, patched(model, spec):
        logits(model, given)
    assert len(caught) == 1
    patch_model(model, spec)
    logits(model, given)
    with pytest.warns(NotFiredWarning, match=r"never ran the attention at cross.1"):
        logits(model, given)
    logits(model, given)  # told once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, spec)
        for _ in range(3):
            logits(model, given, encoder_hidden_states=torch.ones(2, 4, 32))
        unpatch_model(model)


# -- shared modules -----------------------------------------------------------------------------------------------------------


def shared_model() -> Any:
    model = build("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    return model


def test_a_shared_module_is_cut_for_all_its_layers_or_not_at_all() -> None:
    model, given = shared_model(), inputs("llama")
    # Layers that share a module share its place in the KV cache as well.
    plain = logits(model, given, use_cache=False)
    for layers in ([0], [1], ["self.1"]):
        with pytest.raises(SpecError, match=r"a module 'model.layers.0.self_attn' that the layers self.0, self.1 share"):
            patch_model(model, Freeze("ov", layers=layers, heads=[1]))
        assert not any(isinstance(m, SurgicalAttention) for m in model.modules())
    twin = build("llama")
    twin.model.layers[1].self_attn.load_state_dict(twin.model.layers[0].self_attn.state_dict())
    assert torch.equal(logits(twin, given, use_cache=False), plain)
    for cut in (Freeze("ov", heads=[1]), Freeze("both", layers=[0, 1], heads=[2]), Edit("pattern", "scale", 0.5, layers=["*"])):
        found = logits(patch_model(model, cut), given, use_cache=False)
        assert torch.equal(found, logits(patch_model(twin, cut), given, use_cache=False))
        assert not torch.equal(found, plain)
    with capture(model, "z", layers=["self.0"]) as run:
        logits(model, given, use_cache=False)
    assert len(run.steps("self.0", "z")) == LAYERS
    unpatch_model(model)
    assert torch.equal(logits(model, given, use_cache=False), plain)


# -- refusals and failures ----------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    return [(type(m), list(m.__dict__), m.__dict__.get("forward"), m.__dict__.get("_old_forward")) for m in model.modules()]


@by_family
def test_a_replaced_forward_is_refused(name: str) -> None:
    model, given = build(name), inputs(name)
    attention = find_anatomy(model).attentions[0]
    module: Any = attention.module
    own = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before, plain = snapshot(model), logits(model, given)
    with pytest.raises(PatchError, match=rf"'{attention.path}' .*a forward that something else set on the module .*lambda"):
        patch_model(model, CUTS["z"])
    assert snapshot(model) == before and torch.equal(logits(model, given), plain)
    # Also beneath accelerate's hook, and on the block that holds the output projection.
    add_hook_to_module(module, Counting())
    with pytest.raises(PatchError, match="something else set"):
        patch_model(model, CUTS["z"])
    remove_hook_from_module(module)
    del module.forward
    owner = model.get_submodule(attention.projections["o"].owner)
    if owner is not module:
        own_output = owner.forward
        owner.forward = lambda *args: own_output(*args)
        patch_model(model, CUTS["z"])
        with pytest.raises(PatchError, match="something else set"):
            patch_model(model, Edit("result", "scale", 0.5, layers=[attention.address]))
        del owner.forward
    patch_model(model, CUTS["z"])


class Inline(nn.Module):
    """An attention that nothing describes, and whose weighted sum is no product of matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        scores = self.q(hidden_states) @ self.k(hidden_states).transpose(-1, -2)
        return (torch.softmax(scores, dim=-1)[..., None] * self.v(hidden_states)[:, None]).sum(dim=2), None


def test_an_unknown_attention_is_listed_and_never_skipped_in_silence() -> None:
    model, given = build("llama"), inputs("llama")
    torch.manual_seed(0)
    model.model.layers[0].self_attn = Inline(32)
    model.encoder = nn.MultiheadAttention(8, 2, add_zero_attn=True)
    before, plain = snapshot(model), logits(model, given)
    with pytest.raises(UnsupportedArchitectureError) as error:
        patch_model(model, CUTS["none"])
    for part in ("2 problems", "'model.layers.0.self_attn' (Inline)", "'encoder' (MultiheadAttention)", "strict=False"):
        assert part in str(error.value)
    assert snapshot(model) == before
    with pytest.warns(UserWarning, match=r"leaves as they are: 2 problems(.|\n)*Inline"):
        patch_model(model, Freeze("ov", heads=[1]), strict=False)
    assert type(model.model.layers[0].self_attn) is Inline and isinstance(model.model.layers[1].self_attn, SurgicalAttention)
    assert not torch.equal(logits(model, given), plain)
    unpatch_model(model)
    assert snapshot(model) == before and torch.equal(logits(model, given), plain)


@pytest.mark.parametrize("error", [RuntimeError("halfway"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["swap.attach", "swap.set_class", "swap.owner_class", "patch.verify", "patch.lower"])
def test_a_failure_halfway_leaves_the_model_as_it_was(
    place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = build("bert"), inputs("bert")
    add_hook_to_module(first(model), Counting())
    plain = logits(model, given)
    file, _, name = place.partition(".")
    owner = getattr(surgery, file)
    own = getattr(owner, name)
    spec = Spec([Edit("result", "scale", 0.5), Freeze("ov", heads=[1])])

    def fail_at(call: int, *expected: Any) -> None:
        left = [call]

        def failing(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise error
            return own(*args, **kwargs)

        before, spec_before = snapshot(model), surgery.patch.session_of(model)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(type(error)):
                patch_model(model, spec)
        assert left[0] <= 0, "the failure must come"
        assert snapshot(model) == before
        assert surgery.patch.session_of(model) is spec_before
        assert torch.equal(logits(model, given), expected[0])

    for call in (1,) if name == "lower" else (1, 2):
        fail_at(call, plain)
    if name == "verify":
        return
    # The same on a model that was patched already: it keeps its cuts.
    patch_model(model, CUTS["qk"])
    cut = logits(model, given)
    for call in (1,) if name in ("lower", "owner_class", "set_class") else (1, 2):
        fail_at(call, cut)
    unpatch_model(model)
    assert torch.equal(logits(model, given), plain)
