"""Everything that is proved of one model type: `check(model_type) -> Outcome`."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgery import Edit, Freeze
from surgery.anatomy import Anatomy, Attention
from surgery.derive import NO_ATTENTION
from surgery.errors import NoMatchError
from surgery.sites import SITES
from zoo.build import UNBUILDABLE, supports_sdpa
from zoo.case import Case, seed, silenced
from zoo.circuits import CLOSE, check_references
from zoo.compare import apart, flatten, unequal
from zoo.derived import check_weights
from zoo.outcome import Kind, NotApplicable, Outcome
from zoo.points import check_capture, check_live
from zoo.types import ENTRIES

Check = Callable[[Case, Anatomy, Outcome], None]


# Families whose own eager and sdpa are not the same function.
_EAGER_IS_ANOTHER = dict.fromkeys(
    ("nemotron_asr_streaming", "nemotron_asr_streaming_encoder", "nemotron3_5_asr"), "its eager adds a mask that is inverted"
)

_CACHE_IS_ANOTHER = {"prophetnet": "with a cache the model takes other relative positions than without"}


def check_no_cuts(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """Without cuts the forward is equal to the unpatched model's, bit for bit."""
    with case.patched():
        if text := unequal(case.run(), case.before):
            outcome.fail("no cuts", f"{case.implementation}: {text}")


def check_kernel_eager(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """The sdpa model with kernel="eager" is the eager model, bit for bit."""
    sdpa = Case(case.model_type, "sdpa")
    others = {a.class_name for a in sdpa.anatomy()} ^ {a.class_name for a in anatomy}
    with sdpa.patched():
        if text := unequal(sdpa.run(), sdpa.before):
            outcome.fail("no cuts", f"sdpa: {text}")
    with sdpa.patched(kernel="eager"):
        found = sdpa.run()
        text = unequal(found, case.before)
        if text and (fused := case.fused()):
            # Such a class has no eager of its own to be equal to: what it computes by torch's kernel is written out here, and a
            # kernel takes its sums in another order.
            outcome.note(f"kernel eager to rounding: {', '.join(fused)} runs a fused kernel whatever the implementation")
            text = apart(found, case.before, CLOSE)
        if text:
            if reason := _EAGER_IS_ANOTHER.get(case.model_type):
                raise NotApplicable(reason)
            if others:
                raise NotApplicable(f"sdpa has classes of its own: {', '.join(sorted(others))}")
            if anatomy.unsupported:
                raise NotApplicable("attention that is left as it is has sdpa of its own")
            outcome.fail("kernel eager", text)
    check_capture(sdpa, anatomy, outcome)


def check_unpatch(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """Unpatching gives back the very same classes, state and numbers."""
    keys = list(case.model.state_dict())
    case.patch(Freeze("both", layers=_addresses(case, anatomy)))
    case.run()
    case.unpatch()
    classes = {name: type(module) for name, module in case.model.named_modules()}
    if classes != case.classes:
        outcome.fail("unpatch", "modules of other classes than before")
    if list(case.model.state_dict()) != keys:
        outcome.fail("unpatch", "a state dict of other keys than before")
    if text := unequal(case.run(), case.before):
        outcome.fail("unpatch", text)


def check_parameters(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """Patching copies nothing: the same parameters and buffers under the same names."""

    def state() -> dict[str, int]:
        both = [*case.model.named_parameters(remove_duplicate=False), *case.model.named_buffers(remove_duplicate=False)]
        return {name: id(tensor) for name, tensor in both}

    # A forward may set buffers anew (position ids, rotary tables), so that none runs in between.
    before, keys = state(), list(case.model.state_dict())
    with case.patched(Freeze("both")):
        if state() != before:
            outcome.fail("parameters", "other parameters or buffers than before")
        if list(case.model.state_dict()) != keys:
            outcome.fail("parameters", "a patched state dict of other keys")


def check_training(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """In training, with dropout and a seed, outputs and gradients are the unpatched model's."""
    _set_dropout(case.model)
    case.model.train()
    try:
        try:
            before = _train(case)
        except Exception as error:
            raise NotApplicable(f"the model itself does not run in training ({type(error).__name__})") from error
        if unequal(_train(case), before):
            raise NotApplicable("the model itself differs from run to run in training")
        with case.patched():
            if text := unequal(_train(case), before):
                outcome.fail("training", text)
    finally:
        case.model.eval()


def _set_dropout(model: nn.Module) -> None:
    """Dropout where the tiny config has none, so that the order of random numbers counts."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p == 0:
            module.p = 0.1
        elif getattr(module, "attention_dropout", None) == 0 and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.1


def _train(case: Case) -> dict[str, Any]:
    outputs = [t for t in _tensors(case.forward()) if t.requires_grad and t.is_floating_point()]
    found = {f"output {n}": t.detach().clone() for n, t in enumerate(outputs)}
    case.model.zero_grad()
    if outputs:
        # Weighted by position, for the plain sum of a normed output has no gradient.
        torch.stack(
            [(t * torch.linspace(-1, 1, t.numel()).view_as(t)).nan_to_num(0, 0, 0).sum() for t in outputs]
        ).sum().backward()
    found |= {f"gradient of {n}": p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for part in parts for t in _tensors(part)]


def check_copies(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """A deep copy of a patched model gives the same under the same cuts, and leaves the original as it is."""
    try:
        copy.deepcopy(case.model)
    except Exception as error:
        raise NotApplicable(f"the model itself cannot be copied ({type(error).__name__})") from error
    with case.patched(Freeze("ov", layers=_addresses(case, anatomy), heads=[0])):
        before = case.run()
        other = copy.deepcopy(case.model)
        with torch.no_grad():
            seed()
            found = flatten(other(**copy.deepcopy(case.inputs)))
        if text := unequal(found, before):
            outcome.fail("deepcopy", f"the copy: {text}")
        if text := unequal(case.run(), before):
            outcome.fail("deepcopy", f"the original afterwards: {text}")


def check_generation(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """Greedy decoding with a KV cache gives the tokens of decoding without one, under cuts too."""
    if ENTRIES[case.model_type].kind not in ("causal_lm", "seq2seq") or not case.model.can_generate():
        raise NotApplicable("no language model that generates")
    if reason := _CACHE_IS_ANOTHER.get(case.model_type):
        raise NotApplicable(reason)
    try:
        plain = [_generate(case, use_cache) for use_cache in (True, False)]
    except Exception as error:
        raise NotApplicable(f"the model itself does not generate from these inputs ({type(error).__name__})") from error
    if not torch.equal(*plain):
        raise NotApplicable("the model itself differs with and without a cache")
    cuts: list[Any] = [Freeze("ov", layers=_addresses(case, anatomy), heads=[0])]
    several = [address for a in case.running(anatomy) if a.heads > 1 for address in a.addresses]
    cuts += [Edit("pattern", "scale", value=0.5, layers=several, heads=[1])] if several else []
    with case.patched():
        if not torch.equal(_generate(case, True), plain[0]):
            outcome.fail("generation", "without cuts, other tokens than the unpatched model's")
    with case.patched(cuts):
        cached, recomputed = (_generate(case, use_cache) for use_cache in (True, False))
        if not torch.equal(cached, recomputed):
            outcome.fail("generation", f"cached {cached.tolist()} and recomputed {recomputed.tolist()}")
        outcome.counts["generation under cuts"] += 1


def _generate(case: Case, use_cache: bool) -> torch.Tensor:
    prompt = {n: x for n, x in copy.deepcopy(case.inputs).items() if n != "decoder_input_ids"}
    start = case.model.generation_config.decoder_start_token_id
    if start is None and case.model.config.is_encoder_decoder:
        prompt["decoder_start_token_id"] = 5
    seed()
    out = case.model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, use_cache=use_cache)
    return out if isinstance(out, torch.Tensor) else out.sequences


def _addresses(case: Case, anatomy: Anatomy) -> list[str]:
    """The addresses of attentions that run with these inputs."""
    return [address for attention in case.running(anatomy) for address in attention.addresses]


CHECKS: dict[str, Check] = {
    "no cuts": check_no_cuts,
    "capture": check_capture,
    "live": check_live,
    "reference": check_references,
    "weights": check_weights,
    "parameters": check_parameters,
    "unpatch": check_unpatch,
    "deepcopy": check_copies,
    "generation": check_generation,
    "kernel eager": check_kernel_eager,
    "training": check_training,  # last, for it sets dropout
}


def check(model_type: str) -> Outcome:
    """Builds the tiny model of a type, and proves on it whatever applies. A failure of one check does not stop the others."""
    started = time.perf_counter()
    outcome = Outcome(model_type, ENTRIES[model_type].kind)
    ours: list[str] = []
    if model_type in UNBUILDABLE:
        outcome.status, outcome.reason = "unbuildable", UNBUILDABLE[model_type]
        return outcome
    try:
        with silenced(ours):
            case = Case(model_type)
            if unequal(case.run(), case.before):
                outcome.fail("build", "a forward that differs from run to run under one seed")
    except Exception as error:  # whatever a family raises for a config or inputs that it does not take
        outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {error}"[:300]
        outcome.fail("build", outcome.reason)
        return outcome
    outcome.architecture = type(case.model).__name__
    try:
        anatomy = case.anatomy()
        _describe(anatomy, outcome)
        _prove(case, anatomy, outcome)
    except NoMatchError as error:
        refused, _, others = str(error).partition(NO_ATTENTION)
        outcome.refused, outcome.others = refusals(refused.split("\n")), refusals(others.split("\n"))
        outcome.status = "refused" if outcome.refused else "no attention"
    except Exception as error:  # a crash of the engine is a failure of the type, not of the survey
        outcome.status = "failed"
        outcome.fail("anatomy", f"{type(error).__name__}: {error}")
    outcome.seconds = round(time.perf_counter() - started, 1)
    return outcome


def _prove(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    ours: list[str] = []
    with silenced(ours):
        outcome.idle = len(anatomy) - len(case.running(anatomy))
    for name, prove in CHECKS.items():
        with silenced([]):
            is_skipped = name == "kernel eager" and not supports_sdpa(case.model_type)
        if is_skipped:
            outcome.skipped[name] = "the family has no sdpa"
            continue
        before = len(outcome.failures.get(name, ()))
        try:
            with silenced(ours):
                prove(case, anatomy, outcome)
        except NotApplicable as reason:
            outcome.skipped[name] = str(reason)
            continue
        except Exception as error:
            outcome.fail(name, f"{type(error).__name__}: {error}")
        finally:
            case.unpatch()
        if len(outcome.failures.get(name, ())) == before:
            outcome.passed.append(name)
    for text in dict.fromkeys(ours):
        if not (text.startswith("patch_model leaves as they are") and anatomy.unsupported):
            outcome.fail("warnings", text)


def _describe(anatomy: Anatomy, outcome: Outcome) -> None:
    kinds: dict[tuple[Any, ...], Kind] = {}
    for a in anatomy:
        missing = {site: a.why[p] for site in SITES if (p := SITES[site].projection) and p not in a.projections}
        key = (a.class_name, a.heads, a.kv_heads, how(a), tuple(missing.items()))
        kinds.setdefault(key, Kind(a.class_name, a.heads, a.kv_heads, how(a), missing)).count += 1
    outcome.attentions = list(kinds.values())
    outcome.refused, outcome.others = refusals(anatomy.unsupported), refusals(anatomy.others)


def how(attention: Attention) -> str:
    """Where the reconstruction of an attention comes from, in words."""
    family = attention.family
    if family.inline is not None and not family.eager.__module__.startswith("patches"):
        return "its own code"
    if family.eager.__module__.startswith("transformers"):
        return "its eager function"
    return f"`patches/{family.eager.__module__.rpartition('.')[2]}.py`"


def refusals(messages: Any) -> dict[str, str]:
    """Class to reason, from messages that begin with "'path' (Class): "."""
    found: dict[str, str] = {}
    for text in messages:
        match = re.search(r"'[\w.]*' \((\w+)\): (.*)", text, re.DOTALL)
        if match is not None:
            found.setdefault(match[1], " ".join(match[2].split())[:300])
    return found
