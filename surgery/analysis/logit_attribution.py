"""Which head, layer or embedding a logit comes from directly, past all layers behind it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.frozen import FrozenScales
from surgery.analysis.kept import Kept
from surgery.analysis.metrics import Measured, Metric, as_metric
from surgery.analysis.replay import Layers, Recorded, recording, starting_at
from surgery.analysis.tables import as_html, as_text
from surgery.anatomy import Anatomy, Attention, grouped
from surgery.errors import SpecError, UnsupportedArchitectureError, describe, listing
from surgery.evaluation import evaluating, uncached
from surgery.heads import heads_at
from surgery.patch import anatomy_of, cuts_of, patched, probed
from surgery.plan import Probe
from surgery.plots import head_maps
from surgery.plots.style import short
from surgery.where import Where

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Largest rounding in sums, as a part of what is added: layers add in their own order, heads are multiplied one by one.

Families norm in float32 whatever the model is in.
"""
ROUGH = 2e-2
"""The same in half precision."""


class LogitAttribution:
    """What `direct_logit_attribution` found; it adds up: heads + others + constant = value, for each example, but for `gap`.

    heads: (example, layer, head), NaN where a layer has fewer heads; addresses: of the layers. others: name to (example,): the
    embedding, of each layer the bias of W_O and what its other module (MLP) adds, and what layers without attention add.
    constant: what the final norm's shift and the unembedding's bias add. value: (example,) of the metric. gap: the largest
    difference, of rounding.
    frame: a row for each component: component, kind (head, bias, MLP, layer, embedding, constant), address, head, value (the
    mean over examples).
    """

    def __init__(
        self,
        addresses: list[str],
        heads: np.ndarray,
        others: dict[str, np.ndarray],
        constant: np.ndarray,
        value: np.ndarray,
        metric: Metric,
    ) -> None:
        self.addresses, self.heads, self.others, self.constant = addresses, heads, others, constant
        self.value, self.metric = value, metric
        total = np.nansum(heads, axis=(1, 2)) + sum(others.values()) + constant
        self.gap = float(np.abs(total - value).max())
        means = np.where(np.isfinite(heads), heads, 0).mean(0)
        rows = [
            {"component": f"{address}.{head}", "kind": "head", "address": address, "head": head, "value": means[layer, head]}
            for layer, address in enumerate(addresses)
            for head in range(heads.shape[2])
            if np.isfinite(heads[:, layer, head]).any()
        ]
        for name, values in {**others, "constant": constant}.items():
            kind, _, address = name.partition(" ")
            rows.append({"component": name, "kind": kind, "address": address or None, "head": None, "value": values.mean()})
        self.frame = pd.DataFrame(rows)

    def __repr__(self) -> str:
        shown = as_text(self.top(10)[["component", "value"]])
        where = f"{self.metric.name} {self.value.mean():.4g} {self.metric.unit}, mean of {len(self.value)} examples"
        return f"{where}, comes from\n(largest parts; all add up to within {self.gap:.1g}):\n{shown}"

    def _repr_html_(self) -> str:
        return as_html(self.top(10))

    def top(self, count: int = 10, kind: str | None = None) -> pd.DataFrame:
        """The largest components, either way, of one kind or all."""
        rows = self.frame if kind is None else self.frame[self.frame.kind == kind]
        return rows.loc[rows["value"].abs().sort_values(ascending=False, kind="stable").index].head(count)

    def matrix(self) -> pd.DataFrame:
        """Layers (addresses) × heads: the mean over examples."""
        return pd.DataFrame(self.heads.mean(0), index=pd.Index(self.addresses, name="address"))

    def picture(self) -> Figure:
        """A heat map of the heads' contributions."""
        return head_maps(
            {"direct effect of each head": self.matrix().to_numpy()},
            layers=list(map(short, self.addresses)),
            title="Direct logit attribution",
            subtitle=f"{self.metric.name}: {self.value.mean():.3g}, mean of {len(self.value)} examples",
            unit=f"contribution ({self.metric.unit or self.metric.name})",
        )


@torch.no_grad()
def direct_logit_attribution(
    model: nn.Module, inputs: Any, tokens: Any = None, metric: Any = None, position: int = -1
) -> LogitAttribution:
    """How much of a logit each head, MLP and embedding adds to it by itself: its direct effect, through the final norm alone.

    Everything behind the last layer is made affine by freezing the scales of its norms at this forward (see
    `surgery.analysis.frozen`); a component's contribution is what the gradient of that says of what it writes into the
    residual stream at this position. What later layers make of it (indirect effects) counts as theirs.

    inputs: one batch. tokens: whose logits, one for all examples or one for each, at `position`. metric: in place of tokens, a
    metric that is linear in the logits of one position, for example `metrics.logit_difference`. Cuts that the model has stay.
    Proved on the forward itself: each layer adds nothing but what its heads, the bias of W_O and one module of it give, and
    what is behind is affine. Raises UnsupportedArchitectureError, naming the layer, for what is no such plain residual decoder
    (norms behind attention or MLP, scaled residuals, soft-capped logits, an encoder beside), SpecError for other metrics.
    """
    given = batches(model, inputs)
    if len(given) > 1:
        raise SpecError(describe("direct_logit_attribution", f"{len(given)} batches", "one", "Call it for each of them."))
    batch = given[0]
    reading = _metric(tokens, metric, position)
    base, kernel = cuts_of(model)
    with patched(model, base, kernel=kernel, strict=False), evaluating(model):
        anatomy = anatomy_of(model, strict=False)
        forward = _Forward(model, batch, reading)
        stream = _Stream(model, anatomy, Layers(model, anatomy), forward)
        stream.run()
        gradient, value, constant = _behind(stream, forward)
    return _added_up(stream, gradient, value, constant, reading)


class _Forward:
    """Forwards of one batch that give the logits at one position."""

    def __init__(self, model: Any, batch: Batch, metric: Metric) -> None:
        self.model, self.batch, self.metric = model, uncached(model, batch), metric
        self.rows = rows_of(batch)
        self.kept = Kept(model, batch, metric.positions or (-1,))
        if self.kept.length is None:
            raise _unsupported("the inputs", "that they are no tokens, nor embeddings of them")
        (position,) = metric.positions or (-1,)
        self.position = position % self.kept.length

    def __call__(self) -> Tensor:
        """(example,): the metric."""
        output = self.model(**self.batch, **self.kept.more)
        logits = self.kept.logits(output)
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            found = f"a {type(self.model).__name__} without logits (batch, position, vocabulary)"
            raise SpecError(describe("direct_logit_attribution", found, "a language model", "Load it with its head."))
        return self.metric.raw(Measured(self.model, self.batch, output, logits, None)).expand(self.rows)


class _Call:
    """One run of a layer, at the position: what came in, what its heads wrote, and what its modules gave."""

    def __init__(self, name: str, incoming: Tensor) -> None:
        self.name, self.incoming = name, incoming
        self.results: list[tuple[str, Tensor, Tensor | None]] = []
        self.outputs: list[Tensor] = []
        self.rest: Tensor | None = None


class _Stream:
    """The residual stream of one forward at one position, taken apart."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, layers: Layers, forward: _Forward) -> None:
        self.model, self.anatomy, self.layers, self.forward = model, anatomy, layers, forward
        self.names = {module: name for name, module in model.named_modules()}
        lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
        own = set(layers.modules)
        # Layers of the same list without attention (state spaces) write into the stream as well.
        self.others = [part for of in lists if own & set(of) for part in of if part not in own]
        self.calls: list[_Call] = []
        self.shape: tuple[int, ...] = ()
        self.last: Tensor | None = None
        self.recorded = Recorded()
        self.is_inside = False
        self.runs: dict[str, int] = {}

    def run(self) -> None:
        """One forward, in which all is noted and proved."""
        if problems := grouped((a, text) for a in self.anatomy for text in a.underived("result")):
            raise UnsupportedArchitectureError(listing("direct_logit_attribution", problems))
        probes = {
            a.address: [Probe("result", None, functools.partial(self._result, a))] for a in self.anatomy if a.kind == "self"
        }
        with probed(self.model, probes, strict=False), self._watched(), recording(self.layers) as recorded:
            self.forward()
        self.recorded = recorded
        if not recorded.calls:
            raise _unsupported("the model", "no layers with attention in a module list")
        if self.calls[-1].name in map(self.names.get, self.others):
            raise _unsupported(self.calls[-1].name, "that it comes behind the last layer with attention, and has none")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        handles = []
        for layer in self.layers.modules:
            handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles += [part.register_forward_hook(self._part) for part in layer.modules() if part is not layer]
            handles.append(layer.register_forward_hook(self._leave))
        for layer in self.others:
            handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._leave_other))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        states = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
        name = self.names[layer]
        if states is None or states.dim() != 3 or len(states) != self.forward.rows:
            raise _unsupported(name, "that it does not read states (batch, position, d_model)")
        if self.last is not None and not (states.shape == self.last.shape and torch.equal(states, self.last)):
            raise _unsupported(name, "that it does not read what the layer before it gave")
        self.shape, self.is_inside = tuple(states.shape), True
        self.calls.append(_Call(name, self._at(states)))

    def _part(self, part: nn.Module, args: Any, output: Any) -> None:
        if self.is_inside:
            found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.shape[-1:] == self.shape[-1:]]
            wide = [t for t in found if t.numel() == math.prod(self.shape)]  # some give (batch * position, d_model)
            self.calls[-1].outputs += [self._at(t.reshape(self.shape)) for t in wide]

    def _result(self, attention: Attention, result: Tensor, where: Where) -> None:
        if not self.is_inside:
            return
        run = self.runs.get(attention.address, 0)
        self.runs[attention.address] = run + 1
        address = attention.addresses[run % len(attention.addresses)]
        bias = heads_at(self.model, self.anatomy, attention.address).b_O
        self.calls[-1].results.append((address, result[:, :, self.forward.position].double(), bias))

    def _leave_other(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.calls[-1].rest = self._added(layer, output)

    def _added(self, layer: nn.Module, output: Any) -> Tensor:
        """(batch, d_model): what a layer has added to the stream."""
        leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and tuple(t.shape) == self.shape]
        if not leaves:
            raise _unsupported(self.names[layer], "an output of another shape than its input")
        self.is_inside, self.last = False, leaves[0]
        return self._at(leaves[0]) - self.calls[-1].incoming

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        added, call = self._added(layer, output), self.calls[-1]
        assert self.last is not None
        rest = added.clone()
        for _, result, bias in call.results:
            rest -= result.sum(1) + (0 if bias is None else bias.double())
        # Each entry of a sum is rounded as the stream is there; results, as the largest of them.
        close = CLOSE.get(self.last.dtype, ROUGH) * (self._at(self.last).abs() + added.abs().max())
        if bool((rest.abs() > close).any()):
            call.rest = next((given for given in call.outputs if bool(((rest - given).abs() <= close).all())), None)
            if call.rest is None:
                found = (
                    "that what it adds is not the sum of its heads' results, the bias of W_O, and what one of its modules gives"
                )
                raise _unsupported(self.names[layer], found)
        call.outputs.clear()

    def _at(self, states: Tensor) -> Tensor:
        """(batch, d_model) in float64, at the position."""
        return states[:, self.forward.position].detach().double()


def _behind(stream: _Stream, forward: _Forward) -> tuple[Tensor, Tensor, Tensor]:
    """The metric's gradient (example, d_model) by the last layer's output with norms frozen, its value, and the constant."""
    layers, recorded, last = stream.layers, stream.recorded, stream.last
    assert last is not None

    def run(states: Tensor) -> Tensor:
        again = Recorded()
        again.calls = recorded.calls
        replaced = tree_map(lambda leaf: states if leaf is last else leaf, recorded.outputs[-1])
        again.outputs = [*recorded.outputs[:-1], replaced]
        with starting_at(layers, again, len(again.calls), lambda recorded: recorded):
            return forward()

    with torch.enable_grad():
        states = last.detach().requires_grad_()
        with FrozenScales() as frozen:
            value = run(states)
        if not value.requires_grad:
            raise _unsupported("what is behind the last layer", "that the metric has no gradient by its output")
        (gradient,) = torch.autograd.grad(value.sum(), states)
    with FrozenScales(frozen.kept):
        constant = run(torch.zeros_like(last)).detach().double()
    value, here = value.detach().double(), gradient[:, forward.position].double()
    linear = (last[:, forward.position].double() * here).sum(-1)
    parts = (last[:, forward.position].double() * here).abs().sum(-1) + value.abs()
    close = CLOSE.get(last.dtype, ROUGH) * float(parts.max())
    elsewhere = gradient.clone()
    elsewhere[:, forward.position] = 0
    if float(elsewhere.abs().max()) > 0:
        raise _unsupported("what is behind the last layer", "that it mixes positions")
    gap = float((linear + constant - value).abs().max())
    if not gap <= close:
        found = f"that with its norms frozen the metric is not affine (off by {gap:.2g})"
        raise _unsupported("what is behind the last layer", found)
    return here, value, constant


def _added_up(stream: _Stream, gradient: Tensor, value: Tensor, constant: Tensor, metric: Metric) -> LogitAttribution:
    def read(states: Tensor) -> np.ndarray:
        return (states * (gradient[:, None] if states.dim() == 3 else gradient)).sum(-1).cpu().numpy()

    results = [found for call in stream.calls for found in call.results]
    heads = np.full((len(value), len(results), max((r.shape[1] for _, r, _ in results), default=0)), np.nan)
    others = {"embedding": read(stream.calls[0].incoming)}
    row = 0
    for call in stream.calls:
        for address, result, bias in call.results:
            heads[:, row, : result.shape[1]] = read(result)
            row += 1
            if bias is not None:
                others[f"bias {address}"] = read(bias.double().expand(len(value), -1))
        if call.rest is not None:
            others[f"MLP {call.results[0][0]}" if call.results else f"layer {call.name}"] = read(call.rest)
    addresses = [address for address, _, _ in results]
    return LogitAttribution(addresses, heads, others, constant.cpu().numpy(), value.cpu().numpy(), metric)


def _metric(tokens: Any, metric: Any, position: int) -> Metric:
    if (tokens is None) == (metric is None):
        found = "neither tokens nor a metric" if tokens is None else "both tokens and a metric"
        raise SpecError(describe("direct_logit_attribution", found, "one of them", "Pass tokens=, whose logits to explain."))
    if metric is not None:
        reading = as_metric(metric)
        if reading.positions is None or len(reading.positions) != 1:
            count = "all" if reading.positions is None else len(reading.positions)
            found = f"metric {reading.name!r}, which reads {count} positions"
            do = "For example metrics.logit_difference(5, 7, position=-1)."
            raise SpecError(describe("direct_logit_attribution", found, "a metric of one position", do))
        return reading
    chosen = torch.as_tensor(tokens)

    def of(m: Measured) -> Tensor:
        assert m.logits is not None
        index = chosen.to(m.logits.device).reshape(-1)
        if len(index) not in (1, len(m.logits)):
            expected = f"one, or {len(m.logits)}"
            raise SpecError(
                describe("direct_logit_attribution", f"{len(index)} tokens", expected, "Pass one for each example.")
            )
        return m.logits[:, 0].double().gather(1, index.expand(len(m.logits))[:, None])[:, 0]

    return Metric("logit", "logits", of, (position,))


def _unsupported(where: str, found: str) -> UnsupportedArchitectureError:
    expected = "a residual stream into which heads and MLPs write, and then norms and an unembedding"
    do = "Use activation patching or ablations, which need no such stream."
    return UnsupportedArchitectureError(describe(f"direct_logit_attribution: {where}", found, expected, do))
