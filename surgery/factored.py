"""A product of two matrices that is never multiplied out: what a head's QK and OV circuits are.

A circuit is d_model wide but only d_head deep; norms, singular values and products of circuits need the narrow side only.
The same idea as TransformerLens' FactoredMatrix, whose method names are kept where the meaning is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SpecError, describe


@dataclass(frozen=True, eq=False)
class FactoredMatrix:
    """A @ B, kept as its factors. A: (..., m, r); B: (..., r, n); leading axes broadcast. Standing for (..., m, n).

    Numbers are those of `full()` up to rounding. Half-precision factors are computed with in float32, which the result has
    then. Everything is differentiable by the factors; where singular values coincide, or are zero, their gradients are
    not defined (torch.linalg.svd, qr).
    Raises SpecError where shapes do not fit.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
            raise SpecError(
                describe("FactoredMatrix", f"factors {a} and {b}", "(..., m, r) and (..., r, n)", "Check their order.")
            )
        try:
            leading = torch.broadcast_shapes(a[:-2], b[:-2])
        except RuntimeError:
            leading = None
        if leading is None:
            raise SpecError(
                describe(
                    "FactoredMatrix",
                    f"leading axes {a[:-2]} and {b[:-2]}",
                    "axes that broadcast",
                    "Add an axis with [:, None].",
                )
            )
        object.__setattr__(self, "A", self.A.expand(*leading, *a[-2:]))
        object.__setattr__(self, "B", self.B.expand(*leading, *b[-2:]))

    @property
    def shape(self) -> torch.Size:
        """(..., m, n), of the matrix that it stands for."""
        return torch.Size((*self.A.shape[:-1], self.B.shape[-1]))

    @property
    def rank(self) -> int:
        """r: no more of its singular values than this are not zero."""
        return self.A.shape[-1]

    @property
    def T(self) -> FactoredMatrix:
        """The transpose of the last two axes."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={tuple(self.shape)}, rank={self.rank})"

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """Chooses on the leading axes, for example one head: circuit[3]. Raises SpecError for more indices than these."""
        given = len(index) if isinstance(index, tuple) else 1
        leading = self.A.dim() - 2
        if given > leading:
            raise SpecError(
                describe(
                    f"{self!r}[...]", f"{given} indices", f"at most {leading}, of the leading axes", "Use .full() for entries."
                )
            )
        return FactoredMatrix(self.A[index], self.B[index])

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Any:
        """(..., m, p), factored, for a matrix (..., n, p) or another product; a Tensor (..., m) for a vector (n,)."""
        if isinstance(other, FactoredMatrix):
            middle = self.B @ other.A
            if self.rank <= other.rank:
                return FactoredMatrix(self.A, middle @ other.B)
            return FactoredMatrix(self.A @ middle, other.B)
        if not isinstance(other, Tensor):
            return NotImplemented
        return _apply(self.A, _apply(self.B, other)) if other.dim() == 1 else FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> Any:
        """(..., p, n), factored, for a matrix (..., p, m) on the left; a Tensor (..., n) for a vector (m,)."""
        if not isinstance(other, Tensor):
            return NotImplemented
        return _apply(self.B.mT, _apply(self.A.mT, other)) if other.dim() == 1 else FactoredMatrix(other @ self.A, self.B)

    def full(self) -> Tensor:
        """(..., m, n), multiplied out. For a circuit this is d_model x d_model per head: for small models and few heads."""
        return self.A @ self.B

    def norm(self) -> Tensor:
        """(...): the Frobenius norm, from the factors' r x r Gram matrices: trace(A^T A B B^T) is the sum of squares.

        In float64, for a trace of products of Gram matrices loses half the digits where the product nearly vanishes.
        """
        a, b = gram(self.A), gram(self.B.mT)
        return (a * b).sum(dim=(-2, -1)).clamp(min=0).sqrt().to(_wide(self.A).dtype)

    def trace(self) -> Tensor:
        """(...): the sum of the diagonal. Raises SpecError if it is not square."""
        self._square("trace")
        return (_wide(self.A) * _wide(self.B).mT).sum(dim=(-2, -1))

    def eigenvalues(self) -> Tensor:
        """(..., min(r, m)), complex, in no order: of B @ A, which has the eigenvalues of A @ B that are not zero.

        The other m - r are zero. Raises SpecError if it is not square.
        """
        self._square("eigenvalues")
        a, b = _wide(self.A), _wide(self.B)
        return torch.linalg.eigvals(b @ a if self.rank <= self.shape[-1] else a @ b)

    def singular_values(self) -> Tensor:
        """(..., min(m, r, n)), descending; all others are zero."""
        return torch.linalg.svdvals(self._core()[1])

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (..., m, s), S (..., s) descending, Vh (..., s, n) with s = min(m, r, n) and U @ diag(S) @ Vh the matrix.

        As torch.linalg.svd(full_matrices=False), which gives min(m, n) of them, the others zero.
        """
        left, core, right = self._core()
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        return left @ u, s, vh @ right

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal columns, a small square matrix and orthonormal rows whose product is the matrix."""
        left, a = torch.linalg.qr(_wide(self.A))
        right, b = torch.linalg.qr(_wide(self.B).mT)
        return left, a @ b.mT, right.mT

    def _square(self, what: str) -> None:
        m, n = self.shape[-2:]
        if m != n:
            raise SpecError(describe(f"FactoredMatrix.{what}", f"a {m} x {n} matrix", "a square one", "Use singular_values()."))


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix @ vector over the last axes, for leading axes of either."""
    return (matrix @ vector[..., None])[..., 0]


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: decompositions know no half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gram(tensor: Tensor) -> Tensor:
    """(..., r, r): T^T T over the long axis, in float64 where the device has it."""
    wide = _wide(tensor) if tensor.device.type == "mps" else tensor.to(torch.float64)
    return wide.mT @ wide
