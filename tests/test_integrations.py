"""A patched model inside other tools: checkpointing, PEFT, accelerate, torch.compile, torch.export, Trainer, hooks, threads.

Equality is `torch.equal` unless a tool computes in another order; the reason stands beside the tolerance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from surgery import (
    Edit,
    Freeze,
    Spec,
    capture,
    find_anatomy,
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
    out = (run or model)(**given).logits
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


def lora(name: str, model: Any) -> Any:
    """The model with random adapters, always the same ones."""
    torch.manual_seed(5)
    config = LoraConfig(
        r=2, target_modules=TARGETS[name], init_lora_weights=False, task_type=TASKS[name], fan_in_fan_out=name == "gpt2"
    )
    return get_peft_model(model, config)


pytestmark = pytest.mark.filterwarnings(
    # Older names that PEFT uses, and that we use because transformers 5.17 has no other.
    "ignore:`(gradient_checkpointing_|is_gradient_checkpointing):FutureWarning",
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
