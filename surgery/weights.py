"""The weights of attention heads, their QK and OV circuits, and how strongly circuits of two layers compose.

Everything follows from the derived anatomy (`surgery.anatomy`), so it holds for separate, fused, grouped and transposed
storage alike, for patched and unpatched models. Rows multiply from the left throughout: q[h] = x @ W_Q[h] + b_Q[h].
Source of the definitions: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits,
https://transformer-circuits.pub/2021/framework/index.html. There matrices act on columns, so that its W_Q, W_K, W_V, W_O
are the transposes of ours (TransformerLens has ours).

Weights are read from the model at each access, as they are now, and keep the gradient to its parameters; use
torch.no_grad() where that is not wanted. The anatomy of an unpatched model is derived at each call, that of a patched one
is known: patch the model (with no cuts, if none are wanted) before a loop over many layers.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from surgery.anatomy import Anatomy
from surgery.errors import SpecError, UnsupportedArchitectureError, describe
from surgery.factored import FactoredMatrix as FactoredMatrix
from surgery.factored import gram
from surgery.heads import SOURCE_STATES, STATES, heads_at
from surgery.heads import HeadWeights as HeadWeights
from surgery.heads import Piece as Piece
from surgery.heads import head_weights as head_weights
from surgery.heads import pieces as pieces
from surgery.patch import anatomy_of

Composition = Literal["q", "k", "v"]


def W_Q(model: nn.Module, layer: str | int) -> Tensor:
    """(head, d_in, d_head); see HeadWeights, as for the functions below."""
    return head_weights(model, layer).W_Q


def W_K(model: nn.Module, layer: str | int) -> Tensor:
    """(kv_head, d_in, d_head)."""
    return head_weights(model, layer).W_K


def W_V(model: nn.Module, layer: str | int) -> Tensor:
    """(kv_head, d_in, d_value)."""
    return head_weights(model, layer).W_V


def W_O(model: nn.Module, layer: str | int) -> Tensor:
    """(head, d_value, d_model)."""
    return head_weights(model, layer).W_O


def b_Q(model: nn.Module, layer: str | int) -> Tensor | None:
    """(head, d_head), or None."""
    return head_weights(model, layer).b_Q


def b_K(model: nn.Module, layer: str | int) -> Tensor | None:
    """(kv_head, d_head), or None."""
    return head_weights(model, layer).b_K


def b_V(model: nn.Module, layer: str | int) -> Tensor | None:
    """(kv_head, d_value), or None."""
    return head_weights(model, layer).b_V


def b_O(model: nn.Module, layer: str | int) -> Tensor | None:
    """(d_model,), or None."""
    return head_weights(model, layer).b_O


def qk_circuit(model: nn.Module, layer: str | int) -> FactoredMatrix:
    """(head, d_model, d_model): W_QK = W_Q W_K^T; see HeadWeights.qk_circuit for what it is and what it leaves out."""
    return head_weights(model, layer).qk_circuit()


def ov_circuit(model: nn.Module, layer: str | int) -> FactoredMatrix:
    """(head, d_in, d_model): W_OV = W_V W_O, acting on rows; see HeadWeights.ov_circuit."""
    return head_weights(model, layer).ov_circuit()


def composition_scores(model: nn.Module, sender_layer: str | int, receiver_layer: str | int, kind: Composition = "q") -> Tensor:
    """(sender_head, receiver_head): how much of what a sender writes is read by a receiver's q, k or v; range [0, 1].

    |W_OV C|_F / (|W_OV|_F |C|_F), with W_OV of the sender and, of the receiver, C = W_QK for "q", W_QK^T for "k", W_OV for
    "v". Rows multiply from the left; in the columns of Elhage et al. these are |W_QK^T W_OV|, |W_QK W_OV|, |W_OV W_OV|.
    Independent random circuits do not give 0 but about 1/sqrt(d_model). NaN, never 0, for a head whose circuit is zero.
    Norms and biases are left out, as in the circuits. No d_model x d_model matrix is formed, only d_head x d_head ones.

    Raises SpecError unless the sender writes into what the receiver reads: it has to be an earlier attention of the same
    stack, for k and v of cross-attention one of the stack that is attended to; UnsupportedArchitectureError where a circuit
    begins at a latent and not at the residual stream.
    """
    if kind not in get_args(Composition):
        allowed = ", ".join(map(repr, get_args(Composition)))
        raise SpecError(describe("composition_scores", f"kind={kind!r}", allowed, "Use one of these."))
    anatomy = anatomy_of(model, strict=False)
    sender, receiver = heads_at(model, anatomy, sender_layer), heads_at(model, anatomy, receiver_layer)
    _check_order(anatomy, sender, receiver, kind)
    wrote, read = sender.ov_circuit(), receiver.ov_circuit() if kind == "v" else receiver.qk_circuit()
    read = read.T if kind == "k" else read
    _check_streams(sender, receiver, kind, wrote.shape[-1], read.shape[-2])
    return composed(wrote, read)


def composed(wrote: FactoredMatrix, read: FactoredMatrix) -> Tensor:
    """(sender_head, receiver_head): |W C|_F / (|W|_F |C|_F) of circuits (head, ...), as `composition_scores` has it."""
    outer = gram(wrote.A)
    inner = gram(read.B.mT).to(outer)
    rows = []
    for head in range(wrote.shape[0]):
        middle = wrote.B[head].to(outer) @ read.A.to(outer)  # (receiver_head, d_value, d_head)
        squares = ((outer[head] @ middle) * (middle @ inner)).sum(dim=(-2, -1))  # trace(outer middle inner middle^T)
        rows.append(squares.clamp(min=0).sqrt())
    norm = wrote.norm()
    return torch.stack(rows).to(norm) / (norm[:, None] * read.norm().to(norm))


def sends_to(anatomy: Anatomy, sender: HeadWeights, receiver: HeadWeights, kind: Composition) -> bool:
    """Whether the receiver's q, k or v reads the stream that the sender has written to."""
    from_source = receiver.attention.kind == "cross" and kind != "q"
    stacks = [weights.address.rpartition(".")[0].rpartition(".")[0] for weights in (sender, receiver)]
    places = [
        (int(weights.address.rpartition(".")[2]), anatomy.attentions.index(weights.attention)) for weights in (sender, receiver)
    ]
    return (stacks[0] == stacks[1]) is not from_source and (from_source or places[0] < places[1])


def latents(weights: HeadWeights, sites: str) -> dict[str, str]:
    """What the circuits of these sites read in place of the residual stream, by site; empty if they read that."""
    found = {site: weights.input_of[site] for site in sites}
    return {site: source for site, source in found.items() if source not in (STATES, SOURCE_STATES)}


def _check_order(anatomy: Anatomy, sender: HeadWeights, receiver: HeadWeights, kind: Composition) -> None:
    """Raises SpecError unless `sends_to`."""
    if not sends_to(anatomy, sender, receiver, kind):
        raise SpecError(
            describe(
                "composition_scores",
                f"sender {sender.address}, receiver {receiver.address}",
                f"a sender whose output {receiver.address} reads for its {kind}",
                "Send from earlier attentions of the same stack; for k and v of cross-attention, from the stack it reads.",
            )
        )


def _check_streams(sender: HeadWeights, receiver: HeadWeights, kind: Composition, written: int, read: int) -> None:
    """Raises unless both circuits begin and end in the residual stream."""
    for weights, sites in ((sender, "v"), (receiver, "v" if kind == "v" else "qk")):
        for site, source in latents(weights, sites).items():
            raise UnsupportedArchitectureError(
                describe(
                    f"composition_scores: W_{site.upper()} of {weights.address}",
                    f"that it reads {source}",
                    "the residual stream",
                    "Compose the circuits with what lies between by hand: a @ between @ b.",
                )
            )
    if written != read:
        raise SpecError(
            describe(
                "composition_scores",
                f"{sender.address} writing {written} channels, {receiver.address} reading {read}",
                "one stream",
                "Compose the circuits with what lies between by hand: a @ between @ b.",
            )
        )
