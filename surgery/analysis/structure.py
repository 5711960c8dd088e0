"""What the weights alone say of heads: which read what which others write, and which copy the tokens that they attend to.

Source of both: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits,
https://transformer-circuits.pub/2021/framework/index.html. Weights are those of `surgery.weights`, by query head where kv heads
are shared; attentions whose weights are not derived (latents, norms on v) are left out and named in notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery.analysis.batches import Batch, batches
from surgery.analysis.frozen import FrozenScales
from surgery.analysis.repeats import usable_tokens
from surgery.analysis.tables import as_html, as_text
from surgery.errors import SpecError, UnsupportedArchitectureError, describe
from surgery.evaluation import evaluating, uncached
from surgery.export.offload import copied
from surgery.factored import FactoredMatrix
from surgery.heads import HeadWeights, heads_at
from surgery.linear import linear_of
from surgery.patch import anatomy_of
from surgery.plots import head_maps, pair_map
from surgery.plots.style import short
from surgery.taps import runs_on
from surgery.weights import Composition, composed, latents, sends_to

RANDOM_HEADS = 8
"""Senders, and receivers, of the random circuits that a baseline is the mean of."""

Head = tuple[str, int]


class Compositions:
    """What `composition` found. scores: (sender, receiver), NaN where the receiver does not read what the sender writes.

    heads: (address, head) of the senders, and of the receivers. baseline, spread: mean and standard deviation of the scores of
    random circuits of the same shapes, (sender, receiver). notes: what was left out, and why.
    """

    def __init__(
        self,
        kind: str,
        heads: Sequence[Head],
        scores: np.ndarray,
        baseline: np.ndarray,
        spread: np.ndarray,
        notes: Sequence[str],
    ) -> None:
        self.kind, self.heads, self.notes = kind, list(heads), list(notes)
        self.scores, self.baseline, self.spread = scores, baseline, spread

    @property
    def excess(self) -> np.ndarray:
        """(sender, receiver): scores less the baseline, as in the figures of the source."""
        return self.scores - self.baseline

    def frame(self) -> pd.DataFrame:
        """A row for each pair: sender, sender_head, receiver, receiver_head, score, baseline, excess, deviations.

        deviations: the excess, in standard deviations of random circuits' scores.
        """
        senders, receivers = np.nonzero(np.isfinite(self.baseline))
        columns = {
            "sender": [self.heads[i][0] for i in senders],
            "sender_head": [self.heads[i][1] for i in senders],
            "receiver": [self.heads[i][0] for i in receivers],
            "receiver_head": [self.heads[i][1] for i in receivers],
            "score": self.scores[senders, receivers],
            "baseline": self.baseline[senders, receivers],
            "excess": self.excess[senders, receivers],
            "deviations": self.excess[senders, receivers] / self.spread[senders, receivers],
        }
        return pd.DataFrame(columns)

    def top(self, count: int = 10) -> pd.DataFrame:
        """The pairs whose scores are furthest above the baseline."""
        return self.frame().sort_values("excess", ascending=False, kind="stable").head(count)

    def __repr__(self) -> str:
        shown = as_text(self.top()[["sender", "sender_head", "receiver", "receiver_head", "score", "baseline"]])
        return "\n".join([f"{self.kind}-composition, furthest above random:\n{shown}", *(f"left out: {n}" for n in self.notes)])

    def _repr_html_(self) -> str:
        return as_html(self.top())

    def picture(self) -> Figure:
        """A heat map, senders down and receivers across, of scores above the baseline; lines part the layers."""
        names = [f"{short(address)}.{head}" for address, head in self.heads]
        edges = [i for i in range(1, len(self.heads)) if self.heads[i][0] != self.heads[i - 1][0]]
        return pair_map(
            self.excess,
            names,
            edges,
            rows="sender (layer.head)",
            columns="receiver (layer.head)",
            unit=f"{self.kind}-composition score above that of random matrices",
            title=f"{self.kind.upper()}-composition",
            subtitle="grey: the receiver does not read the sender",
        )


@torch.no_grad()
def composition(model: nn.Module, kind: Composition = "q", layers: Any = "all", seed: int = 0) -> Compositions:
    """How much of what each head writes each later head reads by its q, k or v, beside what random matrices would give.

    The scores are those of `surgery.weights.composition_scores`, |W_OV C|_F / (|W_OV|_F |C|_F); independent random circuits
    do not give 0 but about 1/sqrt(d_model), so that only what is above that means anything. baseline: the mean over circuits
    whose factors are Gaussian, of the same shapes (of seed). layers: of senders and receivers. Cross-attention reads, by its k
    and v, what the other stack wrote. Norms and biases are left out.
    Raises SpecError for another kind, NoMatchError for layers that do not exist.
    """
    if kind not in get_args(Composition):
        allowed = ", ".join(map(repr, get_args(Composition)))
        raise SpecError(describe("composition", f"kind={kind!r}", allowed, "Use one of these."))
    anatomy = anatomy_of(model, strict=False)
    chosen = [heads_at(model, anatomy, a.address) for a in anatomy.select(layers, "composition")]
    notes: list[str] = []
    wrote = {w.address: _circuit(w, "v", notes) for w in chosen}
    read = {w.address: _circuit(w, "v" if kind == "v" else "qk", notes) for w in chosen}
    heads = [(w.address, head) for w in chosen for head in range(w.attention.heads)]
    places = {w.address: [i for i, (address, _) in enumerate(heads) if address == w.address] for w in chosen}
    scores, baseline, spread = (np.full((len(heads), len(heads)), np.nan) for _ in range(3))
    random = _Random(seed)
    for sender in chosen:
        for receiver in chosen:
            left, right = wrote[sender.address], read[receiver.address]
            if left is None or right is None or not sends_to(anatomy, sender, receiver, kind):
                continue
            right = right.T if kind == "k" else right
            if left.shape[-1] != right.shape[-2]:
                found = f"{left.shape[-1]} channels written, {right.shape[-2]} read"
                notes.append(f"{sender.address} to {receiver.address}: {found}, so that something lies between")
                continue
            block = np.ix_(places[sender.address], places[receiver.address])
            scores[block] = composed(left, right).cpu().double().numpy()
            baseline[block], spread[block] = random.of(left, right)
    return Compositions(kind, heads, scores, baseline, spread, list(dict.fromkeys(notes)))


class _Random:
    """Scores of random circuits, once for each kind of shapes."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.known: dict[Any, tuple[float, float]] = {}

    def of(self, left: FactoredMatrix, right: FactoredMatrix) -> tuple[float, float]:
        shapes = tuple(tuple(t.shape[-2:]) for t in (left.A, left.B, right.A, right.B))
        if shapes not in self.known:
            a, b, c, d = (torch.randn(RANDOM_HEADS, *shape, generator=self.generator) for shape in shapes)
            found = composed(FactoredMatrix(a, b), FactoredMatrix(c, d))
            self.known[shapes] = float(found.mean()), float(found.std())
        return self.known[shapes]


def _circuit(weights: HeadWeights, sites: str, notes: list[str]) -> FactoredMatrix | None:
    """The OV ("v") or QK ("qk") circuit; None, and why, if it does not exist or begins at a latent."""
    try:
        found = weights.ov_circuit() if sites == "v" else weights.qk_circuit()
    except UnsupportedArchitectureError as error:
        notes.append(f"{weights.address}: {error}")
        return None
    if read := latents(weights, sites):
        notes.extend(
            f"{weights.address}: W_{site.upper()} reads {source}, not the residual stream" for site, source in read.items()
        )
        return None
    return found


class Copying:
    """What `copying_scores` found.

    frame: address, head, score, trace (the sum of the eigenvalues). notes: what was left out, and why.
    """

    def __init__(self, frame: pd.DataFrame, notes: Sequence[str]) -> None:
        self.frame, self.notes = frame, list(notes)

    def top(self, count: int = 10) -> pd.DataFrame:
        """The heads that copy most."""
        return self.frame.sort_values("score", ascending=False, kind="stable").head(count)

    def matrix(self) -> pd.DataFrame:
        """Layers (addresses) × heads."""
        return self.frame.pivot_table(index="address", columns="head", values="score", sort=False, dropna=False)

    def __repr__(self) -> str:
        return "\n".join([as_text(self.top()), *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return as_html(self.top())

    def picture(self) -> Figure:
        """A heat map over layer × head, from -1 to 1."""
        table = self.matrix()
        names = list(map(short, table.index))
        maps = {"copying (1) or its opposite (−1)": table.to_numpy()}
        return head_maps(maps, layers=names, title="Which heads copy", unit="Σλ / Σ|λ| of the OV circuit", limits=(-1.0, 1.0))


@torch.no_grad()
def copying_scores(model: nn.Module, layers: Any = None, inputs: Any = None) -> Copying:
    """Whether attending to a token raises its own logit: Σλ / Σ|λ| over the eigenvalues of each head's full OV circuit.

    The circuit is W_E G W_V W_O G' W_U, vocabulary × vocabulary, which is never formed: its eigenvalues but zeros are those of
    the d_head × d_head matrix W_O G' W_U W_E G W_V. 1: all eigenvalues positive, every direction of token space is copied;
    -1: suppressed; about 0 for random matrices; NaN for a head whose circuit is 0.
    Norms are folded in as far as they are linear: G is the gain (and centring) of the norm before the attention, G' of the one
    before the unembedding, found as the modules whose output these read; their scales, positive numbers for each position,
    are left out, as are biases, position embeddings, the layers between, and norms that a family has behind W_O or MLPs.
    notes say where there was no such norm. layers: of self-attention, None for that of the text. inputs: of a small forward, by
    which norms are found; needed only for models that read more than tokens.
    Raises SpecError for a model without an unembedding, or whose embeddings have another width than its stream.
    """
    embedding, unembedding = _embeddings(model)
    if embedding is None or unembedding is None:
        found = f"a {type(model).__name__} without {'input' if embedding is None else 'output'} embeddings"
        raise SpecError(describe("copying_scores", found, "a language model", "Load it with its head."))
    anatomy = anatomy_of(model, strict=False)
    every = {address for a in anatomy for address in a.addresses}
    own = "self.*" if any(address.startswith("self.") for address in every) else "decoder.self.*"
    chosen = [a for a in anatomy.select((own,) if layers is None else layers, "copying_scores") if a.kind == "self"]
    names = {part: name for name, part in model.named_modules()}
    w_u, _ = linear_of(unembedding, names[unembedding])
    readers = {a.address: model.get_submodule(a.projections["v"].path) for a in chosen if "v" in a.projections}
    norms = _norms_before(model, [*readers.values(), unembedding], _given(model, inputs))
    notes: list[str] = []
    gain = _gain(norms.get(unembedding), w_u.shape[0], "the unembedding", notes)
    w_e = embedding.weight.full_tensor() if hasattr(embedding.weight, "full_tensor") else embedding.weight  # torch's DTensor
    if w_u.shape[0] != w_e.shape[1]:
        found = f"embeddings of {w_e.shape[1]} channels, an unembedding of {w_u.shape[0]}"
        raise SpecError(describe("copying_scores", found, "one width", "Multiply what lies between by hand."))
    product = _product(w_u, w_e)
    back = gain.to(product) @ product  # d_model × d_model: G' W_U W_E
    rows = []
    for attention in chosen:
        circuit = _circuit(heads_at(model, anatomy, attention.address), "v", notes)
        if circuit is None:
            continue
        if tuple(circuit.shape[-2:]) != tuple(back.shape):
            notes.append(
                f"{attention.address}: reads {circuit.shape[-2]} channels and writes {circuit.shape[-1]}, not {len(back)}"
            )
            continue
        before = _gain(norms.get(readers[attention.address]), back.shape[1], attention.address, notes).to(back)
        core = circuit.B.to(back) @ back @ before @ circuit.A.to(back)  # (head, d_head, d_head)
        values = torch.linalg.eigvals(core)
        trace, size = values.real.sum(-1), values.abs().sum(-1)
        for head, (total, all_sizes) in enumerate(zip(trace.tolist(), size.tolist(), strict=True)):
            score = total / all_sizes if all_sizes > 0 else np.nan
            rows.append({"address": attention.address, "head": head, "score": score, "trace": total})
    return Copying(pd.DataFrame(rows, columns=["address", "head", "score", "trace"]), list(dict.fromkeys(notes)))


def _embeddings(model: Any) -> tuple[Any, Any]:
    """What transformers says is the embedding of tokens, and the unembedding; None where there is none."""
    try:
        return model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None, None


def _product(w_u: Tensor, w_e: Tensor, block: int = 16384) -> Tensor:
    """(d_model, d_model) in float64: W_U W_E, summed over blocks of the vocabulary. Their sizes may differ by padding."""
    size = min(w_u.shape[1], len(w_e))
    total = torch.zeros(w_u.shape[0], w_e.shape[1], dtype=torch.float64, device=w_u.device)
    for first in range(0, size, block):
        last = min(first + block, size)
        total += w_u[:, first:last].double() @ w_e[first:last].to(w_u.device).double()
    return total


def _gain(norm: nn.Module | None, width: int, where: str, notes: list[str]) -> Tensor:
    """(d_model, d_model) in float64: what a norm does beside its scale, acting on rows; the identity where there is none."""
    if norm is None:
        notes.append(f"{where}: no norm before it was found, none is folded in")
        return torch.eye(width, dtype=torch.float64)
    wide = copied(norm).double()
    device = next((parameter.device for parameter in wide.parameters()), torch.device("cpu"))
    eye = torch.eye(width, dtype=torch.float64, device=device)[None]
    with FrozenScales(unit=True):
        return wide(eye)[0].double() - wide(torch.zeros_like(eye[:, :1]))[0].double()


def _given(model: Any, inputs: Any) -> Batch:
    """One batch of inputs; four tokens, if there are none."""
    if inputs is not None:
        return batches(model, inputs)[0]
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        found = f"a {type(model).__name__}, which reads {model.main_input_name}, and no inputs"
        raise SpecError(describe("copying_scores", found, "a model of text, or inputs", "Pass inputs of a small forward."))
    ids = usable_tokens(model)[:4][None].to(runs_on(model))
    is_double = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if is_double else {})}


def _norms_before(model: nn.Module, readers: Sequence[nn.Module], inputs: Batch) -> dict[nn.Module, nn.Module]:
    """The norm whose output each of these modules reads in a small forward; missing where it reads something else."""
    made: dict[int, tuple[nn.Module, Any]] = {}
    found: dict[nn.Module, nn.Module] = {}

    def note(part: nn.Module, args: Any, output: Any) -> None:
        given = {_storage(t) for t in tree_leaves(args) if isinstance(t, Tensor)}
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and t.is_floating_point() and _storage(t) not in given:
                made.setdefault(_storage(t), (part, t))  # the tensor is kept, so that its memory is not given to another

    def look(part: nn.Module, args: Any) -> None:
        maker = made.get(_storage(args[0])) if args and isinstance(args[0], Tensor) else None
        if maker is not None and _is_norm(maker[0], maker[1].shape[-1]):
            found[part] = maker[0]

    handles = [part.register_forward_hook(note) for part in model.modules()]
    handles += [part.register_forward_pre_hook(look) for part in dict.fromkeys(readers)]
    try:
        with evaluating(model):
            model(**uncached(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_norm(part: nn.Module, width: int) -> bool:
    """Whether a module divides by a scale of its own, and is affine but for that."""
    if any(parameter.dim() > 1 for parameter in part.parameters()):
        return False
    x = torch.randn(3, 1, width, generator=torch.Generator().manual_seed(0)).double().to(runs_on(part))
    try:
        wide = copied(part).double()
        with FrozenScales(unit=True) as frozen:
            zero, one, two, both = (wide(t)[0].double() for t in (0 * x[:1], x[:1], x[1:2], x[:1] + x[1:2]))
    except Exception:  # of whatever kind a foreign forward raises: no norm takes anything but states
        return False
    # Families norm in float32 whatever comes in.
    return bool(frozen.count) and torch.allclose(both + zero, one + two, rtol=1e-5, atol=1e-5 * float(both.abs().max()))


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
