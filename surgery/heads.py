"""The weights of one attention's heads, read from its projections through the derived channels; public in `surgery.weights`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from surgery.anatomy import Anatomy, Attention, Projection
from surgery.behind import scale_and_shift
from surgery.errors import SpecError, UnsupportedArchitectureError, describe
from surgery.factored import FactoredMatrix
from surgery.labels import BASE
from surgery.linear import LinearMap, linear_of
from surgery.patch import anatomy_of

STATES, SOURCE_STATES = "hidden states", "cross-attended states"


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The weights of one attention. A weight whose channels do not come from one projection raises when it is read.

    As the sites: q is what the q projection gives, before norms, scaling and positions, k likewise, and v is what enters the
    weighted sum. A scale and a shift of each channel of v behind its projection (a bias of its own, a batch norm in
    evaluation mode) are in W_V and b_V; W_V of a v that is changed otherwise (normed, gated, rotated) does not exist.
    Channels of a head are in the order in which the projection stores them, for W_Q and W_K as for the sites q and k.
    Each weight raises UnsupportedArchitectureError if it cannot be derived, and SurgeryError if it has no data (meta).
    """

    model: nn.Module
    attention: Attention
    address: str

    @property
    def W_Q(self) -> Tensor:
        """(head, d_in, d_head); d_in is d_model, except where `input_of` says otherwise."""
        return self._input("q")[0]

    @property
    def W_K(self) -> Tensor:
        """(kv_head, d_in, d_head); query head h reads kv head h // group_size."""
        return self._input("k")[0]

    @property
    def W_V(self) -> Tensor:
        """(kv_head, d_in, d_value)."""
        return self._input("v")[0]

    @property
    def W_O(self) -> Tensor:
        """(head, d_value, d_model): the rows of the output projection that read the head's z, or what became of z.

        Where a gate or a norm lies between z and the projection, W_O acts on what enters the projection.
        """
        projection = self._projection("o")
        matrix, _ = self._linear(projection.path)
        return matrix[projection.channels.to(matrix.device)]

    @property
    def b_Q(self) -> Tensor | None:
        """(head, d_head), or None for a projection without bias."""
        return self._input("q")[1]

    @property
    def b_K(self) -> Tensor | None:
        """(kv_head, d_head), or None."""
        return self._input("k")[1]

    @property
    def b_V(self) -> Tensor | None:
        """(kv_head, d_value), or None."""
        return self._input("v")[1]

    @property
    def b_O(self) -> Tensor | None:
        """(d_model,), or None: added once, not per head."""
        return self._linear(self._projection("o").path)[1]

    @property
    def W_K_by_head(self) -> Tensor:
        """(head, d_in, d_head): W_K of the kv head that each query head reads."""
        return self.W_K.repeat_interleave(self.attention.group_size, dim=0)

    @property
    def W_V_by_head(self) -> Tensor:
        """(head, d_in, d_value): W_V of the kv head that each query head reads."""
        return self.W_V.repeat_interleave(self.attention.group_size, dim=0)

    @property
    def input_of(self) -> dict[str, str]:
        """What W_Q, W_K and W_V multiply, by site: "hidden states" (of the other sequence for k and v of cross-attention:
        "cross-attended states"), or the projection whose output, split or normalised, they read."""
        found: dict[str, str] = {}
        for site in ("q", "k", "v"):
            if site in self.attention.projections:
                source = self._source(self.attention.projections[site].path)
                states = SOURCE_STATES if self.attention.kind == "cross" and site != "q" else STATES
                found[site] = f"{source} (split or normalised)" if source else states
        return found

    def qk_circuit(self) -> FactoredMatrix:
        """(head, d_model, d_model): W_QK = W_Q W_K^T, the bilinear form x_query W_QK x_key^T of a head's scores.

        Rows are what the query reads, columns what the key reads, as W_QK in Elhage et al. (W_Q^T W_K of their transposed
        factors: the same matrix) and `QK` of TransformerLens. Biases, norms of q and k, positions, soft caps and the scale
        (1/sqrt(d_head), in most families) are not in it, nor is the norm before the attention. Cross-attention: (head,
        d_model of the queries, d_model of the source).
        """
        return FactoredMatrix(self._paired("q", self.W_Q), self._paired("k", self.W_K).mT)

    def ov_circuit(self) -> FactoredMatrix:
        """(head, d_in, d_model): W_OV = W_V W_O, what a head adds to the output for each unit of what it attends to.

        Acts on rows, x_key @ W_OV, as `OV` of TransformerLens; Elhage et al. write W_O W_V, acting on columns, its transpose.
        d_in is d_model, except where W_V reads a latent (`input_of`). A gate or norm between z and W_O is not in it.
        """
        return FactoredMatrix(self.W_V_by_head, self.W_O)

    def pieces(self, site: Literal["q", "k", "v"]) -> list[Piece]:
        """The parts of q, k or v by the projections that they come from; see `pieces`."""
        attention, labels = self.attention, self.attention.recording.labels.get(site)
        if site not in ("q", "k", "v"):
            raise SpecError(describe("pieces", f"site {site!r}", "'q', 'k' or 'v'", "W_O has one piece."))
        if labels is None or labels.dim() != 2 or bool((labels < 0).any()) or site in attention.recording.several:
            raise self._underived(site, "")
        labels = labels if site == "q" else labels[:: labels.shape[0] // attention.kv_heads]
        owners = labels.div(BASE, rounding_mode="floor")
        if bool((owners != owners[:1]).any()):
            raise self._underived(site, "")
        found = []
        for owner in dict.fromkeys(owners[0].tolist()):
            channels = (owners[0] == owner).nonzero()[:, 0]
            path = ".".join(part for part in (attention.path, attention.recording.projections[owner]) if part)
            matrix, bias = self._rows(path, labels[:, channels].remainder(BASE))
            source = self._source(path)
            found.append(Piece(path, source and f"{attention.path}.{source}", channels, matrix, bias))
        return found

    def __repr__(self) -> str:
        a = self.attention
        return f"HeadWeights({self.address}, {a.class_name} at {a.path!r}, {a.heads}/{a.kv_heads} heads, {a.fusion})"

    def _input(self, site: str) -> LinearMap:
        projection = self._projection(site)
        matrix, bias = self._rows(projection.path, projection.channels)
        if site != "v":
            return matrix, bias
        try:
            behind = scale_and_shift(self.attention)
        except Exception as error:  # of whatever kind a foreign forward raises for numbers that it does not take
            failed = f"a forward that cannot be run on random numbers ({type(error).__name__}: {error})"
            raise self._nonlinear(projection, failed) from error
        if behind is None:
            what = f"that v is more than a scale and a shift of what {projection.name} gives (a norm, a gate, positions)"
            raise self._nonlinear(projection, what)
        scale, shift = (t if t is None else t.to(matrix) for t in behind)
        if scale is not None:
            matrix, bias = matrix * scale[:, None], None if bias is None else bias * scale
        return matrix, bias if shift is None else shift if bias is None else bias + shift

    def _rows(self, path: str, channels: Tensor) -> LinearMap:
        """(head, d_in, d) and (head, d): the output channels (head, d) of a projection."""
        matrix, bias = self._linear(path)
        channels = channels.to(matrix.device)
        return matrix[:, channels].permute(1, 0, 2), None if bias is None else bias[channels]

    def _projection(self, site: str) -> Projection:
        if site not in self.attention.projections:
            raise self._underived(site, f' Its parts: pieces(model, "{self.address}", "{site}").' if site != "o" else "")
        return self.attention.projections[site]

    def _paired(self, site: str, matrix: Tensor) -> Tensor:
        """(head, d_in, d_head): W_Q or W_K by query head, its channels in the order in which the dot product pairs them."""
        labels = self.attention.recording.labels[site]
        ranks = labels.argsort(dim=-1).argsort(dim=-1)[:: labels.shape[0] // matrix.shape[0]].to(matrix.device)
        paired = matrix.gather(-1, ranks[:, None].expand_as(matrix))
        return paired.repeat_interleave(self.attention.heads // matrix.shape[0], dim=0)

    def _underived(self, site: str, do: str) -> UnsupportedArchitectureError:
        a = self.attention
        why = a.why.get(site, f"{site} comes from different projections in different heads")
        return UnsupportedArchitectureError(
            describe(
                f"W_{site.upper()} of {self.address} ({a.class_name} at {a.path!r})",
                f"that {why}",
                "one projection with channels of its own for every head",
                f"Activations can be edited all the same (sites rot_q, rot_k, v, z).{do}",
            )
        )

    def _nonlinear(self, projection: Projection, found: str) -> UnsupportedArchitectureError:
        a = self.attention
        return UnsupportedArchitectureError(
            describe(
                f"W_V of {self.address} ({a.class_name} at {a.path!r})",
                found,
                "v = x @ W_V + b_V",
                f'The matrix of {projection.name} itself: pieces(model, "{self.address}", "v").',
            )
        )

    def _source(self, path: str) -> str | None:
        """The projection whose output a projection reads, by its name in the attention; None: states from outside."""
        return self.attention.recording.inputs.get(path.removeprefix(f"{self.attention.path}."))

    def _linear(self, path: str) -> LinearMap:
        """A projection's matrix, also if the model was wrapped (or its part is given) since the anatomy was derived."""
        known = self.attention.path
        here = next((name for name, module in self.model.named_modules() if module is self.attention.module), known)
        wrapped = len(here) > len(known)
        path = here.removesuffix(known) + path if wrapped else path.removeprefix(known.removesuffix(here)).lstrip(".")
        return linear_of(self.model.get_submodule(path), path)


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a head's q, k or v: part[h] = input @ matrix[h] + bias[h] fills `channels` of it.

    projection: its module path; input: the path of the projection whose output, split or normalised, it reads, None for
    hidden states. channels: (d_part,) of d_head, in the order in which the dot product pairs q and k. matrix:
    (head, d_in, d_part), of kv heads for k and v, the same for all where they share the part; bias: (head, d_part) or None.
    """

    projection: str
    input: str | None
    channels: Tensor
    matrix: Tensor
    bias: Tensor | None


def head_weights(model: nn.Module, address: str | int) -> HeadWeights:
    """The weights of the attention at an address or layer number. Raises NoMatchError."""
    return heads_at(model, anatomy_of(model, strict=False), address)


def heads_at(model: nn.Module, anatomy: Anatomy, address: str | int) -> HeadWeights:
    """As head_weights, in an anatomy that is known."""
    attention = anatomy[address]
    own = [a for a in attention.addresses if a in anatomy.matches((address,))]
    return HeadWeights(model, attention, own[0])


def pieces(model: nn.Module, address: str | int, site: Literal["q", "k", "v"]) -> list[Piece]:
    """The parts of q, k or v by the projections that they come from, before norms and positions.

    For a site that is joined from several (in latent attention, a part of k by head from the latent and a part that all
    heads share); one piece for any other. Raises NoMatchError, and UnsupportedArchitectureError if channels come from
    no projection.
    """
    return head_weights(model, address).pieces(site)
