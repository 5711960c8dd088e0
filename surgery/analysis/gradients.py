"""Gradients under a spec: what reaches each head's weights, and whether every edit lets through what it promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor, nn

from surgery.analysis.batches import Batch, batches, rows_of
from surgery.analysis.forwards import repeatable
from surgery.analysis.kept import Kept
from surgery.analysis.metrics import Measured, Metric, as_metric
from surgery.analysis.metrics import loss as mean_loss
from surgery.analysis.promises import Point, between_zeros, detached, points_of, sealed, watching
from surgery.analysis.tables import as_html
from surgery.analysis.weight_gradients import Block, blocks_of, is_zero, measured, modules_of, standing_in, summed
from surgery.errors import SpecError, describe
from surgery.evaluation import keeping_state, uncached
from surgery.patch import anatomy_of, as_spec, cuts_of, patched, probed
from surgery.shares import require_whole
from surgery.spec import Spec
from surgery.terminal import printed, table_of

SHOWN = 40
"""Rows of weights in a printed table, at most; the frame has all."""
UNSEEN = ("it never ran", "no gradient arrives behind it")
"""Notes on edits whose promise could not be seen to hold or not."""


class Gradients:
    """What `check_gradients` found. `print` shows tables; the data:

    weights: a row for each attention (address), weight (W_Q, W_K, W_V, W_O) and head (of W_K and W_V: kv head). norm, mean,
      max, nonzero: L2 norm, mean and largest absolute entry, and share of entries that are not exactly zero, of the gradient of
      the loss with the cuts, and, as norm_uncut and so on, without them; NaN with the reason in `why`. frozen: the parameter
      does not require a gradient (what is shown is what it would get).
    promises: a row for each edit and attention, and for each weight that edits cut off. cuts: numbers in the spec; promise: in
      words; held: True, False, or None where nothing is promised, or it could not be seen (note says why: the edit never ran,
      or no gradient arrives behind it); by: how far it was broken; behind: norm of the gradient behind the edit. A weight
      that something beside the edited points reads is promised nothing.
    loss, loss_uncut: means over batches. mode: "training" or "evaluation", in which the model was found and has been run.
    """

    def __init__(
        self, spec: Spec, weights: pd.DataFrame, promises: pd.DataFrame, loss: float, loss_uncut: float, mode: str, name: str
    ) -> None:
        self.spec, self.weights, self.promises = spec, weights, promises
        self.loss, self.loss_uncut, self.mode, self.loss_name = loss, loss_uncut, mode, name

    @property
    def held(self) -> bool:
        """Whether no promise was broken."""
        return not bool((self.promises["held"] == False).any())  # noqa: E712 (None is neither)

    def broken(self) -> pd.DataFrame:
        """The promises that were broken."""
        return self.promises[self.promises["held"] == False]  # noqa: E712

    def __str__(self) -> str:
        kept, unseen = int((self.promises["held"] == True).sum()), int(self.promises.note.isin(UNSEEN).sum())  # noqa: E712
        verdict = f"{len(self.broken())} promises BROKEN, " if not self.held else ""
        verdict += f"{kept} promise{'s' * (kept != 1)} held" + (f", {unseen} could not be seen" if unseen else "")
        losses = f"{self.loss_name} {self.loss:.6g} with the cuts, {self.loss_uncut:.6g} without"
        head = f"{verdict if len(self.promises) else 'no cuts'}; {losses}; {self.mode} mode"
        hidden = len(self.weights) - min(SHOWN, len(self._concerned()))
        more = [f"{hidden} more rows in .weights"] if hidden else []
        promises = (self.promise_table(), "") if len(self.promises) else ()
        return printed(head, *promises, self.weight_table(), *more)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self.promises) + as_html(self._concerned(), max_rows=SHOWN)

    def promise_table(self) -> Table:
        """What edits promise and whether they kept it, as a rich table."""
        names, rows = ("cut", "address", "at", "heads", "backward", "promise", "held", "note"), []
        for row in self.promises.itertuples():
            held = {True: "yes", False: f"NO, by {row.by:.2g}"}.get(row.held, "-")
            heads = ", ".join(map(str, row.heads))
            rows.append((", ".join(map(str, row.cuts)), row.address, row.at, heads, row.backward, row.promise, held, row.note))
        return table_of(names, rows)

    def weight_table(self) -> Table:
        """The gradients of the weights where the spec cuts (of all, if it cuts nothing), as a rich table."""
        numbers = ("norm", "mean", "max", "≠ 0", "norm\nuncut", "≠ 0\nuncut")
        rows = []
        for row in self._concerned().head(SHOWN).itertuples():
            note = row.why or ("frozen" if row.frozen else "")
            pairs = (row.norm, row.mean, row.max, row.nonzero, row.norm_uncut, row.nonzero_uncut)
            cells = ["-" if row.why else f"{value:.3g}" for value in pairs]
            rows.append((row.address, row.weight, "-" if row.why else str(row.head), *cells, note))
        return table_of(("address", "weight", "head", *numbers, "note"), rows, numbers=numbers, whole=("address", "weight"))

    def _concerned(self) -> pd.DataFrame:
        concerned = self.weights[self.weights.address.isin(self.promises.address.unique())]
        return concerned if len(concerned) else self.weights


def check_gradients(model: Any, spec: Any, inputs: Any, loss: Any = None) -> Gradients:
    """Measures a loss's gradient at every head's weights and on both sides of every edit, with the spec's cuts and no others.

    model: patched or not, in the mode (training or evaluation) and kernel that it has; nothing of it changes, parameters'
      `.grad` and `requires_grad` neither. spec: a Spec, one or several cuts. inputs: see `surgery.analysis.batches.batches`.
    loss: a callable of the output, a Metric or its name; the mean of `surgery.analysis.metrics.loss` by default.
    The gradient of a weight is that through its projection alone, also where another module has the same weight.
    It takes four forward and backward passes for each batch, and the memory of three gradients of the attention's weights.

    Promises: "stopgrad" lets exactly (1 - strength) of the gradient behind it through to what it replaced, none at all at
    strength 1; so does an edit that replaces without a backward mode of its own. "ste" hands it on bit for bit.
    Where edits of strength 1 at all positions stand in every way from a head's weight to the output (W_Q of a head whose
    rot_q is replaced; W_Q of one whose z is, and W_K and W_V if its whole kv group is), that weight's gradient must be
    exactly zero, unless something beside the edited point reads the same channels: that shows as a gradient when the points
    are merely detached, is said, and nothing is promised then.

    Raises what `patch_model` raises, and SpecError for a loss that is not a finite number with a gradient.
    """
    spec, metric = as_spec(spec), mean_loss() if loss is None else as_metric(loss)
    if spec.block_of(0) is not None:
        do = "Check the specs one by one."
        raise SpecError(describe("check_gradients", "cuts of blocks of a batch", "one spec", do))
    given = batches(model, inputs)
    with keeping_state(model), torch.inference_mode(False), torch.enable_grad(), _patched(model, Spec()):
        anatomy = anatomy_of(model, strict=False)
        require_whole(model, anatomy, "check_gradients", "Load it without tensor parallelism for this.")
        blocks = blocks_of(model, anatomy)
        total = _Total(blocks, sum(map(rows_of, given)))
        for batch in given:
            total.add(model, batch, spec, metric)
    mode = "training" if model.training else "evaluation"
    before, after = total.losses["uncut"], total.losses["cut"]
    return Gradients(spec, total.weights(), total.promises(), after, before, mode, metric.name)


class _Total:
    """Gradients of several batches, each counted by its rows, and the promises that each of them keeps or breaks."""

    def __init__(self, blocks: list[Block], rows: int) -> None:
        self.blocks, self.rows = blocks, rows
        self.gradients: dict[str, list[Tensor]] = {}
        self.losses = {"cut": 0.0, "uncut": 0.0, "detached": 0.0}
        self.points: list[list[Point]] = []
        self.found: list[dict[int, tuple[float, float]]] = []

    def add(self, model: nn.Module, batch: Batch, spec: Spec, metric: Metric) -> None:
        """The four backward passes of a batch: without cuts, with them, between zeros, and with detached points."""
        anatomy = anatomy_of(model, strict=False)
        self._add("uncut", model, batch, Spec(), metric)
        self._add("cut", model, batch, spec, metric)
        if not len(spec):
            return
        by_key = points_of(spec, anatomy)
        points = list(by_key.values())
        with _patched(model, between_zeros(spec, anatomy, by_key)), probed(model, watching(points), strict=False):
            value = _loss(model, batch, metric)
            # Now: a checkpointed forward runs again in backward, and adds others.
            sides = [(list(point.before), list(point.after)) for point in points]
            for point in points:
                point.wheres = list(point.wheres)
            zeros = [zero for pair in sides for side in pair for zero in side]
            grads = iter(summed(_gradients(value, zeros), zeros))
        found: dict[int, tuple[float, float]] = {}
        for number, (point, (before, after)) in enumerate(zip(points, sides, strict=True)):
            front, behind = [next(grads) for _ in before], [next(grads) for _ in after]
            size = float(sum(float(g.double().square().sum()) for g in behind)) ** 0.5
            found[number] = (0.0 if point.share is None else point.broken_by(front, behind), size)
        self.points.append(points)
        self.found.append(found)
        self._add("detached", model, batch, detached([point for point in points if point.seals]), metric)

    def _add(self, name: str, model: nn.Module, batch: Batch, spec: Spec, metric: Metric) -> None:
        share = rows_of(batch) / self.rows
        with _patched(model, spec), standing_in(self.blocks) as stands:
            value = _loss(model, batch, metric)
            if name == "uncut" and stands and not value.requires_grad:
                raise _unfit(metric, "a number without one")
            grads = summed(_gradients(value, stands), stands)
        self.losses[name] += share * float(value.detach())
        known = self.gradients.get(name, [torch.zeros(())] * len(grads))
        self.gradients[name] = [before + share * grad for before, grad in zip(known, grads, strict=True)]

    def weights(self) -> pd.DataFrame:
        """The table of weights."""
        rows: list[dict[str, Any]] = []
        for block in self.blocks:
            where = {"address": ", ".join(block.attention.addresses), "weight": block.name}
            if block.module is None:
                rows.append({**where, "frozen": False, "why": block.why})
                continue
            both = [measured(block, self._of(block, name)) for name in ("cut", "uncut")]
            for head in range(block.heads):
                cut, uncut = ({name: values[head] for name, values in one.items()} for one in both)
                own = {f"{name}_uncut": value for name, value in uncut.items()}
                rows.append({**where, "head": head, **cut, **own, "frozen": block.is_frozen, "why": ""})
        names = ("norm", "mean", "max", "nonzero")
        columns = ["address", "weight", "head", *names, *(f"{name}_uncut" for name in names), "frozen", "why"]
        return pd.DataFrame(rows, columns=columns).astype({"head": "Int64"})

    def promises(self) -> pd.DataFrame:
        """The table of promises: edit by edit, then weight by weight."""
        rows = [*self._of_edits(), *self._of_weights()]
        columns = ["cuts", "address", "at", "heads", "backward", "promise", "held", "by", "behind", "note"]
        frame = pd.DataFrame(rows, columns=columns)
        return frame.astype({"held": object})

    def _of_edits(self) -> Iterator[dict[str, Any]]:
        for number, point in enumerate(self.points[0] if self.points else []):
            by = max(found[number][0] for found in self.found)
            behind = max(found[number][1] for found in self.found)
            is_silent = not any(points[number].wheres for points in self.points)
            note = UNSEEN[0] if is_silent else UNSEEN[1] if behind == by == 0.0 else ""
            held = None if point.share is None or note else by == 0.0
            where = {"cuts": (point.number,), "address": ", ".join(point.attention.addresses), "at": point.edit.site}
            yield {
                **where, "heads": point.operation.heads, "backward": point.edit.backward, "promise": point.promise,
                "held": held, "by": by, "behind": behind, "note": note,
            }  # fmt: skip

    def _of_weights(self) -> Iterator[dict[str, Any]]:
        """Of heads that every batch seals: a batch may have queries that attend to nothing."""
        for block in self.blocks:
            if block.module is None or not self.points:
                continue
            each = [dict(sealed(points, block.attention, block.site)) for points in self.points]
            groups: dict[tuple[tuple[int, ...], bool], list[int]] = {}
            elsewhere = ~is_zero(block, self._of(block, "detached"))
            for head in sorted(set.intersection(*map(set, each))):
                cuts = tuple(sorted({point.number for one in each for point in one[head]}))
                groups.setdefault((cuts, bool(elsewhere[head])), []).append(head)
            largest = block.by_head(self._of(block, "cut")).flatten(1).abs().amax(1)
            for (cuts, is_read), heads in groups.items():
                by = max(float(largest[head]) for head in heads)
                yield {
                    "cuts": cuts, "address": ", ".join(block.attention.addresses), "at": block.name, "heads": tuple(heads),
                    "backward": "", "by": by, "behind": float("nan"),
                    "promise": "nothing" if is_read else "exactly zero", "held": None if is_read else by == 0.0,
                    "note": "something beside the edited points reads it" if is_read else "",
                }  # fmt: skip

    def _of(self, block: Block, name: str) -> Tensor:
        number = next(i for i, module in enumerate(modules_of(self.blocks)) if module is block.module)
        return self.gradients[name][number]


@contextmanager
def _patched(model: nn.Module, spec: Spec) -> Iterator[None]:
    with patched(model, spec, kernel=cuts_of(model)[1], strict=False):
        yield


def _loss(model: nn.Module, batch: Batch, metric: Metric) -> Tensor:
    """The mean of a metric over a batch, with its gradient."""
    kept = Kept(model, batch, metric.positions)
    with repeatable(model):
        output = model(**uncached(model, batch), **kept.more)
    found = metric.function(Measured(model, batch, output, kept.logits(output), None))
    if not isinstance(found, Tensor) or not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        is_short = isinstance(found, Tensor) and found.numel() < 9
        raise _unfit(metric, f"{found.tolist()}" if is_short else f"a {type(found).__name__}")
    return found.mean()


def _unfit(metric: Metric, found: str) -> SpecError:
    expected, do = "finite numbers with a gradient", "Return a tensor that is made of the output; check the labels."
    return SpecError(describe(f"loss {metric.name!r}", found, expected, do))


def _gradients(value: Tensor, sources: list[Tensor]) -> list[Any]:
    """None for a source that the value does not depend on."""
    if not value.requires_grad or not sources:
        return [None] * len(sources)
    return list(torch.autograd.grad(value, sources, allow_unused=True))
