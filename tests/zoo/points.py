"""The points of every attention: seen without a change of the output, and each of them live."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from surgery import Edit, capture
from surgery.anatomy import Anatomy, Attention
from surgery.sites import SITES
from zoo import reference
from zoo.case import Case
from zoo.compare import Named, flatten, unequal
from zoo.outcome import NotApplicable, Outcome

Seen = dict[str, dict[str, Tensor]]


def sites_of(attention: Attention) -> tuple[str, ...]:
    """The sites that exist at an attention."""
    return tuple(name for name, site in SITES.items() if site.projection in (None, *attention.projections))


def look(
    case: Case, attentions: list[Attention], sites: tuple[str, ...] | None = None, joined: bool = False, **more: Any
) -> tuple[Seen, Named]:
    """Every site of these attentions by address, in one forward with whatever cuts the model has; and its output.

    Of the first call of a module: later ones, for other layers, read what the first one changed. Where one call computes its
    core for several sequences in turn, the first of them, or all joined.
    """
    calls: dict[str, int] = {}
    with ExitStack() as stack:
        runs = {}
        for attention in attentions:
            wanted = [s for s in sites_of(attention) if sites is None or s in sites]
            runs[attention.address] = stack.enter_context(
                capture(case.model, wanted, layers=list(attention.addresses), detach=True, strict=False)
            )

            def count(module: Any, args: Any, output: Any, name: str = attention.address) -> None:
                calls[name] = calls.get(name, 0) + 1

            stack.callback(case.module(attention).register_forward_hook(count).remove)
        output = case.run(**more)
        seen: Seen = {}
        for name, run in runs.items():
            steps = {key[1]: run.steps(*key) for key in run}
            first = {site: len(found) // calls[name] if joined else 1 for site, found in steps.items()}
            seen[name] = {site: torch.cat(found[: first[site]], dim=2).clone() for site, found in steps.items()}
        return seen, output


def check_capture(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """Seeing every site changes no output, and every tensor has the shape of its site."""
    attentions = case.running(anatomy)
    if not attentions:
        raise NotApplicable("no attention runs with these inputs")
    with case.patched():
        seen, output = look(case, attentions)
        if text := unequal(output, case.before):
            outcome.fail("capture", f"{case.implementation}: {text}")
        for attention in attentions:
            _check_shapes(attention, seen[attention.address], outcome)
    if case.implementation == "eager":
        _check_returned(case, attentions, outcome)


def _check_shapes(attention: Attention, seen: dict[str, Tensor], outcome: Outcome) -> None:
    name = f"{attention.address} ({attention.class_name})"
    if missing := [site for site in sites_of(attention) if site not in seen]:
        outcome.fail("capture", f"{name}: {', '.join(missing)} not seen")
        return
    batch, heads, queries, keys = seen["pattern"].shape
    of_axis = {
        "batch": batch, "head": heads, "kv_head": attention.kv_heads, "query": queries, "key": keys,
        "d_head": seen["rot_q"].shape[-1], "d_model": None,
    }  # fmt: skip
    if heads != attention.heads:
        outcome.fail("capture", f"{name}: a pattern of {heads} heads, not {attention.heads}")
    for site, tensor in seen.items():
        axes = dict(zip(SITES[site].axes, tensor.shape, strict=True))
        free = {"d_head"} if site in ("v", "z", "q", "k") else set()
        if site == "k":
            free |= {"key"}  # with a cache or a prefix there are more keys than the projection gives
        if site in ("q", "k", "result"):
            free |= {"batch", "query", "key"}  # before windows are cut out
        if axes["batch"] == 1:
            free |= {"batch"}  # queries or positions that all rows share
        wrong = [f"{axis} {n}" for axis, n in axes.items() if axis not in free and of_axis[axis] not in (None, n)]
        if wrong:
            outcome.fail("capture", f"{name}: {site} of shape {tuple(tensor.shape)}: {', '.join(wrong)}")


def _check_returned(case: Case, attentions: list[Attention], outcome: Outcome) -> None:
    """What the model returns of attentions and hidden states stays in number, shape and value."""
    names = inspect.signature(type(case.model).forward).parameters
    if "output_attentions" not in names and not any(p.kind is p.VAR_KEYWORD for p in names.values()):
        outcome.note("takes no output_attentions")
        return
    more = {"output_attentions": True, "output_hidden_states": True}
    try:
        before = case.run(**more)
    except Exception as error:
        outcome.note(f"does not run with output_attentions ({type(error).__name__})")
        return
    with case.patched():
        for text, found in (("patched", case.run(**more)), ("captured", look(case, attentions, ("pattern",), **more)[1])):
            if text := unequal(found, before) and f"{text}, output_attentions: {unequal(found, before)}":
                outcome.fail("capture", text)
    if len(before) > len(case.before):
        outcome.counts["models that return attentions"] += 1


def check_live(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """An edit of any site of any attention changes the model's output, or what lies behind it where that is not used."""
    with case.patched():
        for attention in case.running(anatomy):
            _check_live(case, attention, outcome)


def _check_live(case: Case, attention: Attention, outcome: Outcome) -> None:
    near = _near(case, attention)
    is_even = _is_even(case, attention)
    for site in sites_of(attention):
        result = _what_changes(case, attention, site, near)
        if result in ("the model", "the model, not by scaling", "the attention"):
            outcome.counts[f"live {site}"] += 1
            if result == "the attention":
                outcome.note(f"{attention.class_name}: its output does not reach the model's with these inputs")
        elif is_even and SITES[site].circuit == "qk" and site != "pattern":
            outcome.note(f"{attention.class_name}: one key for each query, or keys all alike: q and k make no difference")
        else:
            outcome.fail("live", f"{site} at {attention.address} ({attention.class_name}): {result}")


def _is_even(case: Case, attention: Attention) -> bool:
    """Whether the pattern cannot depend on q and k: every query sees one key, or the keys are all alike."""
    seen = look(case, [attention], ("rot_k", "scores"))[0][attention.address]
    k, allowed = seen["rot_k"], seen["scores"] > reference.MASKED
    return bool((k - k[:, :, :1]).abs().max() <= 1e-6 * k.abs().max()) or bool((allowed.sum(dim=-1) <= 1).all())


def _what_changes(case: Case, attention: Attention, site: str, near: Named) -> str:
    """What an edit changes."""
    where: dict[str, Any] = {"layers": list(attention.addresses)}
    # A norm behind a projection takes a scaling out again. A softmax over scores that lie far apart, as in models without norms
    # whose states grow, keeps to its largest one until their order is turned round.
    for number, action in enumerate(({"value": 0.5}, {}, {"value": -1.0})):
        with case.patched(Edit(site, "scale" if action else tilt, **action, **where)):
            if unequal(case.run(), case.before):
                return "the model" if number == 0 else "the model, not by scaling"
            if unequal(_near(case, attention), near):
                return "the attention"
    return "an edit that changes nothing"


def tilt(tensor: Tensor) -> Tensor:
    """A change that a norm does not take out again."""
    return tensor + torch.linspace(-1, 1, tensor.shape[-1], dtype=tensor.dtype)


def _near(case: Case, attention: Attention) -> Named:
    """What the attention gives: its module's output, z and result."""
    outputs: list[Any] = []
    handle = case.module(attention).register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        seen, _ = look(case, [attention], ("z", "result"))
    finally:
        handle.remove()
    return {**flatten(outputs, "module"), **flatten(seen, "seen")}
