"""AtP*: attribution patching that sees through a saturated softmax, and through effects that cancel (Kramár et al. 2024).

A head that attends to one key with all its weight has no gradient by its scores, however much another pattern would change.
Here the softmax is computed again, by the model itself, and only what follows the pattern is linear:

* q: (A(q', k) - A(q, k)) · ∂L/∂A, each query by itself; "qk" likewise, with q' and k' together.
* k: replacing one key changes one score of each query, by Δ. With p its weight, g = ∂L/∂A and ḡ the mean of g under the
  pattern, the linear function of the pattern changes by p (e^Δ - 1) (g_k - ḡ) / (1 + p (e^Δ - 1)), for all keys in T².
* GradDrop: the gradient once more for each layer, with that layer's own contribution to the residual held fixed. The mean of
  the absolute estimates over the L - 1 layers that are not the head's own finds heads whose effects on different ways cancel
  to first order. (With few layers it is blind to the ways that the estimate sees: of two layers it leaves direct effects
  alone. So it stands beside the estimate.) The absolute value is that of the batch's score, not of each example's: it is
  compared with a mean effect.

A(q', k) and the changed scores come from forwards in which z is put back to what it was, so that each layer sees its clean
input: one forward for each of q, k, qk, whatever a family does to its scores. The matrices of all selected layers are kept
meanwhile: of long sequences, score some layers at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from surgery.analysis.attribution import Points, Scores, by_circuit, gates, gradients, sites_of, taps
from surgery.analysis.baselines import Baseline, Selection
from surgery.analysis.objective import Objective
from surgery.analysis.replay import Layers
from surgery.errors import SpecError, describe
from surgery.patch import anatomy_of
from surgery.shares import require_whole
from surgery.spec import Spec

CLOSE = 1e-5
"""How far a pattern may be from the softmax of its scores: families compute it in float32. In half precision ROUGH."""
ROUGH = 2e-2


def attribution_star(
    objective: Objective, selection: Selection, circuits: Sequence[str], baseline: Baseline, drop: bool = True
) -> tuple[Scores, Scores]:
    """Scores, and with drop those of GradDrop, (1, head, 1), for a backward more for each layer; {} without.

    Raises SpecError where a pattern is not the softmax of its scores, if "k" is asked for, and with drop
    UnsupportedArchitectureError where heads are split over processes: their layers run no backward without a gradient.
    """
    by_pattern = [circuit for circuit in circuits if circuit in ("qk", "q", "k")]
    by_gate = [circuit for circuit in circuits if circuit not in by_pattern]
    anatomy = anatomy_of(objective.model)
    layers = Layers(objective.model, anatomy).modules if drop else []
    if drop:
        require_whole(objective.model, anatomy, "method 'atp*', GradDrop", "Pass drop_layers=False.")
    gated = gates(selection, sites_of(by_gate, baseline), baseline)
    seen = taps(selection, ["scores", "z"] if by_pattern else [])
    patterns = taps(selection, ["pattern"] if by_pattern else [])
    with droppable(layers) as drops:
        value = objective.value(gated.spec + seen.spec + patterns.spec)
    changes = _Changes(objective, selection, by_pattern, baseline, patterns, seen)

    def estimates(keep: bool) -> Scores:
        found = gradients(objective, value, [gated, patterns], keep)
        return by_circuit(found, selection, by_gate, baseline) | changes.times(found)

    scores = estimates(keep=bool(drops.ran))
    dropped: Scores = {}
    for number, layer in enumerate(drops.ran):
        drops.dropped = layer
        for key, score in estimates(keep=number < len(drops.ran) - 1).items():
            part = score.sum((0, 2), keepdim=True).abs() / max(1, len(drops.ran) - 1)  # none for heads of the dropped layer
            dropped[key] = dropped.get(key, 0) + part
    return scores, dropped


class _Changes:
    """What the patterns of circuits become, each attention by itself on its clean inputs."""

    def __init__(
        self,
        objective: Objective,
        selection: Selection,
        circuits: Sequence[str],
        baseline: Baseline,
        patterns: Points,
        seen: Points,
    ) -> None:
        self.selection = [(address, heads) for address, heads in selection if circuits and patterns.at[address, "pattern"].seen]
        self.patterns, self.seen = patterns, seen
        self.changed: dict[str, Points] = {}
        for circuit in circuits:
            changed = taps(self.selection, ["scores", "pattern"] if circuit == "k" else ["pattern"])
            edits = [edit for address, heads in self.selection for edit in baseline.edits(address, heads, circuit)]
            back = Points(self.selection, ["z"], lambda address, heads, site: _Back(seen.last((address, site))))
            with torch.no_grad():
                objective.forward(Spec(edits) + changed.spec + back.spec)
            self.changed[circuit] = changed

    def times(self, by_site: Scores) -> Scores:
        """Each change times the gradient at the pattern."""
        found: Scores = {}
        for address, _ in self.selection:
            before, gradient = self.patterns.last((address, "pattern")).detach().double(), by_site[address, "pattern"].double()
            for circuit, changed in self.changed.items():
                after = changed.last((address, "pattern")).double()
                if circuit == "k":
                    scores, new = (points.last((address, "scores")).detach() for points in (self.seen, changed))
                    # The same queries' in both, and exact where the pattern leaves it more.
                    sinks = sink_scores(new, after, address), sink_scores(scores, before, address)
                    sink = torch.where(after.sum(-1) < before.sum(-1), *sinks)
                    found[address, "k"] = one_key_changed(scores.double(), sink, gradient, new.double()).sum(-2)
                    continue
                change = ((after - before) * gradient).sum(-1)
                found[address, circuit] = change if circuit == "q" else change.sum(-1, keepdim=True)
        return found


class _Back:
    """An edit that puts back what was there."""

    def __init__(self, z: Tensor) -> None:
        self.z = z.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return self.z


def one_key_changed(scores: Tensor, sink: Tensor, gradient: Tensor, changed: Tensor) -> Tensor:
    """(.., query, key): how Σ_j A_j g_j changes when this key's score alone becomes what it is in `changed`.

    scores, changed: (.., query, key) after the mask. sink: (.., query), a score of the row's own that takes weight and moves
    nothing; -inf where there is none. gradient: g, (.., query, key).
    The closed form of the module's docstring, as (p' - p) (g_k - m_k) with m_k the mean of g over what else is attended to; of
    the largest weight, where 1 - p may round to zero, with sums that leave it out.
    """
    live = torch.isfinite(scores)
    empty = ~live.any(-1, keepdim=True)  # a row that may attend to nothing
    zero, low = torch.zeros((), dtype=scores.dtype, device=scores.device), -float("inf")
    s = torch.cat([torch.where(live, scores, low).masked_fill(empty, 0.0), sink[..., None]], -1)
    g = torch.cat([gradient, torch.zeros_like(gradient[..., :1])], -1)
    log_p = s.log_softmax(-1)
    p = log_p.exp()
    largest = torch.zeros_like(s, dtype=torch.bool).scatter_(-1, s.argmax(-1, keepdim=True), True)
    others = s.masked_fill(largest, low)
    log_others = others.logsumexp(-1, keepdim=True)
    is_alone = torch.isneginf(log_others)
    mean = (torch.where(is_alone, zero, (others - log_others.masked_fill(is_alone, 0.0)).exp()) * g).sum(-1, keepdim=True)
    rest = torch.where(largest, 1.0, 1 - p)  # at least 1/2 but for the largest
    mean = torch.where(largest, mean, ((p * g).sum(-1, keepdim=True) - p * g) / rest)
    log_rest = torch.where(largest, log_others - s.logsumexp(-1, keepdim=True), torch.log1p(-p.masked_fill(largest, 0.0)))
    mean, log_rest, log_p, p, g = (t[..., :-1] for t in (mean, log_rest, log_p, p, g))
    delta = torch.where(live, changed - scores, zero)
    new = torch.where(live, torch.sigmoid(log_p + delta - log_rest), zero)
    return torch.where(live & ~empty, (new - p) * (g - mean), zero)


def sink_scores(scores: Tensor, pattern: Tensor, address: str) -> Tensor:
    """(batch, head, query): the score of what takes a share of each row beside its keys; -inf where the row adds up to 1.

    Raises SpecError if the pattern is not what such a sink leaves of the softmax of the scores.
    """
    close, scores = CLOSE if scores.dtype.itemsize > 2 else ROUGH, scores.double()
    mass = pattern.sum(-1)
    mass = torch.where((mass - 1).abs() <= close, 1.0, mass)
    gap = float((scores.softmax(-1) * mass[..., None] - pattern).abs().nan_to_num().max())
    if gap > close or float(mass.max()) > 1:
        expected = "the softmax of the scores, less what a sink takes"
        do = "Use circuit 'qk' or 'q', or method='atp'."
        raise SpecError(describe(f"key scores at {address}", f"a pattern that differs by {gap:.2g}", expected, do))
    sink = scores.logsumexp(-1) + torch.log(1 / mass.clamp(min=torch.finfo(torch.float32).tiny) - 1)
    return torch.where(torch.isfinite(scores).any(-1), sink, -float("inf"))


# -- GradDrop -----------------------------------------------------------------------------------------------------------


class Drops:
    """Which layers ran on the graph, and the one whose contribution has no gradient in the backward passes that follow."""

    def __init__(self) -> None:
        self.ran: list[nn.Module] = []
        self.dropped: nn.Module | None = None


class _Layer(torch.autograd.Function):
    """Forward: what a layer gives. Backward: through the layer, or past it, as if it gave x + (layer(x) - x).detach()."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, drops: Drops, layer: nn.Module) -> Tensor:
        ctx.drops, ctx.layer = drops, layer
        return output.clone()  # a view of a function's could not be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        is_dropped = ctx.drops.dropped is ctx.layer
        return (None, grads[0], None, None) if is_dropped else (grads[0], None, None, None)


@contextmanager
def droppable(layers: Sequence[nn.Module]) -> Iterator[Drops]:
    """Within the block forwards are such that a later backward may leave out one of these layers' contributions.

    Raises SpecError for a layer whose output has not the shape of its first input: there is no residual to go past it.
    """
    drops = Drops()

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        leaves, tree = tree_flatten(output)
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        place = next((number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        shapes = None if x is None else tuple(x.shape), None if place is None else tuple(leaves[place].shape)
        if x is None or place is None or x.shape != leaves[place].shape:
            found = f"a layer from {shapes[0]} to {shapes[1]}"
            what = f"GradDrop at a {type(layer).__name__}"
            raise SpecError(describe(what, found, "one shape, that of the residual", "Use drop_layers=False."))
        leaves[place] = _Layer.apply(leaves[place], x, drops, layer)
        if not any(layer is other for other in drops.ran):
            drops.ran.append(layer)
        return tree_unflatten(leaves, tree)

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield drops
    finally:
        for handle in handles:
            handle.remove()
