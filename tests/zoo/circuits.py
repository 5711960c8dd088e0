"""Freezes of one head against the slow reference: hooks on the unpatched model, and loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery import Edit, Freeze
from surgery.anatomy import Anatomy, Attention
from zoo import reference
from zoo.case import Case
from zoo.compare import Named, apart, gap
from zoo.outcome import NotApplicable, Outcome
from zoo.points import look, tilt

# float32 has an epsilon of 1.2e-7; sums over at most a few hundred terms in another order, then a few layers behind it.
CLOSE = 2e-5
CORE = ("rot_q", "rot_k", "v", "scores", "pattern", "z")


def one_of_each(case: Case, anatomy: Anatomy) -> list[Attention]:
    """One running attention of each class and kind."""
    found: dict[Any, Attention] = {}
    for attention in case.running(anatomy):
        found.setdefault((attention.class_name, attention.kind, attention.heads, attention.kv_heads), attention)
    if not found:
        raise NotApplicable("no attention runs with these inputs")
    return list(found.values())


def check_references(case: Case, anatomy: Anatomy, outcome: Outcome) -> None:
    """A freeze of one head's QK or OV circuit is what hooks on the unpatched model give, and what loops give."""
    chosen = [(attention, min(1, attention.heads - 1)) for attention in one_of_each(case, anatomy)]
    hooked = [{circuit: _by_hooks(case, a, circuit, head) for circuit in ("ov", "qk")} for a, head in chosen]
    with case.patched():
        for (attention, head), expected in zip(chosen, hooked, strict=True):
            _check_loops(case, attention, head, f"{attention.address} ({attention.class_name})", outcome)
            _check_hooks(case, attention, head, expected, outcome)
            _check_heads(case, attention, head, outcome)


def _check_heads(case: Case, attention: Attention, head: int, outcome: Outcome) -> None:
    """The channels of a projection belong to the heads that they are said to: of the core, which knows nothing of channels."""
    name = f"{attention.address} ({attention.class_name})"
    where: dict[str, Any] = {"layers": list(attention.addresses), "heads": [head]}
    before = look(case, [attention], ("pattern",))[0][attention.address]["pattern"]
    own = range(head // attention.group_size * attention.group_size, attention.heads)[: attention.group_size]
    for site, expected in (("q", {head}), ("k", set(own))):
        if site not in attention.projections or before.shape[-1] == 1:
            continue
        if reference.spans_heads(case.module(attention)):
            outcome.note(f"{attention.class_name}: a norm spans all heads, whose patterns read every head's q and k")
            continue
        with case.patched(Edit(site, tilt, gqa="shared" if site == "k" else "isolated", **where)):
            pattern = look(case, [attention], ("pattern",))[0][attention.address]["pattern"]
        least = CLOSE if reference.rounds_with_others(case.module(attention)) else 0
        found = {h for h in range(attention.heads) if gap(pattern[:, h], before[:, h]) > least}
        if not found <= expected:
            outcome.fail("reference", f"{site} of head {head} at {name}: the patterns of heads {sorted(found)} change")
    if reference.norm_of_z(case.module(attention)) is not None:
        outcome.note(f"{attention.class_name}: a norm of z over all heads: without a head's z the others' results change, too")
    elif "o" in attention.projections:
        outputs = []
        for cut in (Freeze("ov", **where), Edit("result", "zero", **where)):
            with case.patched(cut):
                outputs.append(case.run())
        if text := apart(outputs[1], outputs[0], CLOSE):
            outcome.fail("reference", f"z and result of head {head} at {name} to zero: {text}")


@dataclass
class _Hooked:
    """What the unpatched model gives without a head's q or z, and what its output projection reads of the head."""

    output: Named
    z: Tensor | None = None


def _by_hooks(case: Case, attention: Attention, circuit: str, head: int) -> _Hooked | str:
    """Or why hooks do not apply."""
    try:
        if circuit == "qk":
            with reference.without_q(reference.find_q(case.model, attention.path, head)) as calls:
                output = case.run()
            return _Hooked(output) if calls else "its q projection is not called"
        found = reference.find_z(case.model, attention.path, head)
    except reference.NoReference as reason:
        return str(reason)
    with reference.without_z(found, lambda x: x) as read:
        case.run()
    if not read:
        return "its output projection is not called"
    with reference.without_z(found):
        return _Hooked(case.run(), read[0][..., found.channels])


def _check_hooks(case: Case, attention: Attention, head: int, hooked: dict[str, _Hooked | str], outcome: Outcome) -> None:
    name = f"{attention.address} ({attention.class_name})"
    where: dict[str, Any] = {"layers": list(attention.addresses), "heads": [head]}
    ov, qk = hooked["ov"], hooked["qk"]
    seen = look(case, [attention], CORE)[0][attention.address]
    if not isinstance(ov, str):
        assert ov.z is not None
        # Up to order: windows may be put back in between.
        z = look(case, [attention], ("z",), joined=True)[0][attention.address]["z"]
        rows = [t.flatten().sort().values for t in (ov.z, z[:, head])]
        if rows[0].shape != rows[1].shape or gap(*rows) > CLOSE:
            ov = "a norm, a gate or another term lies between z and the output projection"
    if isinstance(ov, str):
        outcome.note(f"{attention.class_name}: ov by loops alone: {ov}")
    else:
        with case.patched(Freeze("ov", **where)):
            if text := apart(case.run(), ov.output, CLOSE):
                outcome.fail("reference", f"ov of head {head} at {name} and by hooks: {text}")
        outcome.counts["ov by hooks"] += 1
    with case.patched(Freeze("qk", **where)):
        cut, output = look(case, [attention], CORE)
    text = qk if isinstance(qk, str) else apart(output, qk.output, CLOSE)
    if not text:
        outcome.counts["qk by hooks"] += 1
        return
    # The other way: what the head's z is by loops when q k^T is taken out of its scores, put into the unpatched model.
    replacement = _z_without_q(seen, cut[attention.address], attention, head)
    is_whole = not isinstance(ov, str) and ov.z is not None and gap(ov.z.reshape(-1), seen["z"][:, head].reshape(-1)) <= CLOSE
    if replacement is None or not is_whole:
        if not isinstance(qk, str):
            outcome.fail("reference", f"qk of head {head} at {name} and by hooks: {text}")
        else:
            outcome.note(f"{attention.class_name}: qk by the captured tensors alone: {qk}")
        return
    case.unpatch()
    with reference.without_z(reference.find_z(case.model, attention.path, head), lambda x: replacement.to(x).view_as(x)):
        expected = case.run()
    case.patch()
    if other := apart(output, expected, CLOSE):
        outcome.fail("reference", f"qk of head {head} at {name}: by hooks {text}; by loops {other}")
    elif not isinstance(qk, str):
        outcome.note(f"{attention.class_name}: q makes more than q k^T, which a QK freeze leaves")
    outcome.counts["qk by loops"] += 1


def _z_without_q(seen: dict[str, Tensor], cut: dict[str, Tensor], attention: Attention, head: int) -> Tensor | None:
    """(batch, query, d) of one head whose q is zero; None where q k^T does not enter the scores as a term."""
    found = seen["z"][:, head].clone()
    v = seen["v"].repeat_interleave(attention.heads // seen["v"].shape[1], 1)[:, head]
    for row, (scores, scores_cut, q, k) in enumerate(zip(*(t[:, head] for t in _parts(seen, cut)), strict=True)):
        taken, product, factor = reference.product(scores, scores_cut, q, k)
        if taken.numel() and gap(taken, product) > 1e-4:
            return None
        share = seen["pattern"][row, head].double().sum(dim=-1, keepdim=True)
        if bool((share - 1).abs().max() > 1e-5):
            return None  # a sink
        scores = scores.double() - factor * (q.double() @ k.double().mT)
        allowed = (scores > reference.MASKED).any(dim=-1)
        found[row, allowed] = reference.weighted_sums(reference.softmax_by_rows(scores[allowed]), v[row]).to(found)
    return found


def _check_loops(case: Case, attention: Attention, head: int, name: str, outcome: Outcome) -> None:
    """The captured tensors fit together without cuts and under each cut, and other heads keep theirs."""
    where: dict[str, Any] = {"layers": list(attention.addresses), "heads": [head]}
    with case.patched():
        before = look(case, [attention], CORE)[0][attention.address]
    with case.patched(Freeze("qk", **where)):
        without_qk = look(case, [attention], CORE)[0][attention.address]
    with case.patched(Freeze("ov", **where)):
        without_ov = look(case, [attention], CORE)[0][attention.address]
    for title, seen in (("uncut", before), ("without qk", without_qk)):
        if text := _misfit(attention, seen, head):
            outcome.fail("reference", f"{title}, {name}: {text}")
    others = [h for h in range(attention.heads) if h != head]
    for title, seen in (("without qk", without_qk), ("without ov", without_ov)):
        for site in ("pattern", "z", "v"):
            rows = others if site != "v" else list(range(before["v"].shape[1]))
            if (size := gap(seen[site][:, rows], before[site][:, rows])) > CLOSE:
                outcome.fail("reference", f"{title}, {name}: {site} of other heads changed by {size:.3g}")
    if bool(without_ov["z"][:, head].any()):
        outcome.fail("reference", f"without ov, {name}: z is not zero")
    if (size := gap(without_ov["pattern"], before["pattern"])) > 0:
        outcome.fail("reference", f"without ov, {name}: the pattern changed by {size:.3g}")
    taken, product, _ = reference.product(*(t[0, head] for t in _parts(before, without_qk)))
    if taken.numel() and gap(taken, product) > 1e-4:  # a difference of scores, which cancels leading digits
        outcome.note(f"{attention.class_name}: what q adds to the scores is not q k^T alone (capped, or more terms)")
    outcome.counts["by loops"] += 1


def _parts(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return before["scores"], after["scores"], before["rot_q"], before["rot_k"]


def _misfit(attention: Attention, seen: dict[str, Tensor], head: int) -> str:
    """pattern = softmax(scores) up to the share of a sink, z = pattern @ v; "" where that holds."""
    group = attention.heads // seen["v"].shape[1]
    for row in {0, seen["z"].shape[0] - 1}:
        scores, pattern = seen["scores"][row, head], seen["pattern"][row, head]
        allowed = (scores > reference.MASKED).any(dim=-1)  # kernels differ where a query may attend to nothing
        expected = reference.softmax_by_rows(scores[allowed])
        share = pattern[allowed].double().sum(dim=-1, keepdim=True)
        if bool((share > 1 + 1e-5).any()):
            return f"a pattern that sums to {float(share.max()):.6g}"
        if (size := gap(pattern[allowed].double(), expected * share)) > CLOSE:
            return f"pattern and softmax of scores differ by {size:.3g}"
        z = reference.weighted_sums(pattern, seen["v"][row, head // group])
        if (size := gap(seen["z"][row, head].double(), z)) > CLOSE:
            return f"z and pattern @ v differ by {size:.3g}"
    return ""
