"""FactoredMatrix against the matrix that it stands for, over random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.errors import SpecError
from surgery.factored import FactoredMatrix

# Factors are float64. A singular value of a product is found to about 1e-15 of the largest one, and so is a norm by its Gram
# matrices only to the square root of that, 3e-8 of the factors' norms, where the product vanishes.
CLOSE = {"rtol": 1e-9, "atol": 1e-7}

sizes = st.integers(1, 6)
leadings = st.sampled_from([((), ()), ((3,), (3,)), ((2, 3), (2, 3)), ((3,), ()), ((2, 1), (1, 3))])


@st.composite
def factored(draw: st.DrawFn, square: bool = False) -> FactoredMatrix:
    m, r = draw(sizes), draw(sizes)
    n = m if square else draw(sizes)
    left, right = draw(leadings)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    a = torch.randn(*left, m, r, generator=generator, dtype=torch.float64)
    b = torch.randn(*right, r, n, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        a[..., -1] = 0  # a rank below r
    return FactoredMatrix(a, b)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _sorted(values: Tensor) -> Tensor:
    """The largest magnitudes of complex numbers, descending: a value of their set that does not depend on their order."""
    return values.abs().sort(descending=True).values


@settings(deadline=None)
@given(factored())
def test_shape_transpose_and_full(f: FactoredMatrix) -> None:
    full = f.full()
    assert f.shape == full.shape
    assert f.T.shape == full.mT.shape
    torch.testing.assert_close(f.T.full(), full.mT)


@settings(deadline=None)
@given(factored())
def test_norm_and_singular_values(f: FactoredMatrix) -> None:
    full = f.full()
    torch.testing.assert_close(f.norm(), torch.linalg.matrix_norm(full), **CLOSE)
    found, expected = f.singular_values(), torch.linalg.svdvals(full)
    assert found.shape[-1] == min(*full.shape[-2:], f.rank)
    torch.testing.assert_close(found, expected[..., : found.shape[-1]], **CLOSE)
    torch.testing.assert_close(expected[..., found.shape[-1] :], torch.zeros_like(expected[..., found.shape[-1] :]), **CLOSE)


@settings(deadline=None)
@given(factored())
def test_svd(f: FactoredMatrix) -> None:
    u, s, vh = f.svd()
    torch.testing.assert_close(u * s[..., None, :] @ vh, f.full(), **CLOSE)
    eye = torch.eye(s.shape[-1], dtype=s.dtype).expand(*s.shape, s.shape[-1])
    torch.testing.assert_close(u.mT @ u, eye, **CLOSE)
    torch.testing.assert_close(vh @ vh.mT, eye, **CLOSE)
    assert bool((s.diff(dim=-1) <= 0).all())


@settings(deadline=None)
@given(factored(square=True))
def test_trace_and_eigenvalues(f: FactoredMatrix) -> None:
    full = f.full()
    torch.testing.assert_close(f.trace(), full.diagonal(dim1=-2, dim2=-1).sum(-1), **CLOSE)
    found, expected = _sorted(f.eigenvalues()), _sorted(torch.linalg.eigvals(full))
    k = found.shape[-1]
    assert k == min(f.rank, full.shape[-1])
    # Looser: an eigenvalue near zero of a matrix that is not normal moves by a root of the rounding error.
    torch.testing.assert_close(found, expected[..., :k], rtol=1e-6, atol=1e-4)


@settings(deadline=None)
@given(factored(), sizes)
def test_products(f: FactoredMatrix, width: int) -> None:
    full, (m, n) = f.full(), f.shape[-2:]
    right, left = _random(n, width), _random(width, m)
    torch.testing.assert_close((f @ right).full(), full @ right, **CLOSE)
    torch.testing.assert_close((left @ f).full(), left @ full, **CLOSE)
    torch.testing.assert_close(f @ right[:, 0], full @ right[:, 0], **CLOSE)
    torch.testing.assert_close(left[0] @ f, left[0] @ full, **CLOSE)
    for r in (1, 9):  # narrower and wider than f
        other = FactoredMatrix(_random(n, r), _random(r, width))
        product = f @ other
        torch.testing.assert_close(product.full(), full @ other.full(), **CLOSE)
        assert product.rank == min(r, f.rank)


def test_products_with_matrices_stay_factored() -> None:
    f = FactoredMatrix(_random(4, 50, 3), _random(4, 3, 50))
    assert isinstance(f @ _random(50, 70), FactoredMatrix)
    assert isinstance(_random(70, 50) @ f, FactoredMatrix)
    assert (_random(70, 50) @ f @ _random(50, 60)).rank == 3


def test_indexing_chooses_heads() -> None:
    f = FactoredMatrix(_random(4, 6, 3), _random(4, 3, 5))
    assert f[2].shape == (6, 5)
    torch.testing.assert_close(f[[0, 3]].full(), f.full()[[0, 3]])
    with pytest.raises(SpecError, match=r"2 indices; expected at most 1, of the leading axes"):
        f[0, 1]


def test_half_precision_is_computed_in_float32() -> None:
    f = FactoredMatrix(_random(8, 3).bfloat16(), _random(3, 8).bfloat16())
    assert f.norm().dtype is f.singular_values().dtype is f.trace().dtype is torch.float32
    torch.testing.assert_close(f.norm(), (f.A.float() @ f.B.float()).norm())


def test_norm_is_exact_where_the_product_nearly_vanishes() -> None:
    a = torch.eye(4)[:, :2] * 1e3
    b = torch.stack([torch.full((5,), 1e-4), torch.zeros(5)]) + torch.tensor([[0.0], [1e-6]])
    torch.testing.assert_close(FactoredMatrix(a, b).norm(), (a.double() @ b.double()).norm().float())


def test_gradients_are_those_of_the_full_matrix() -> None:
    a, b = _random(5, 3).requires_grad_(), _random(3, 4).requires_grad_()
    f, full = FactoredMatrix(a, b), a @ b
    singular = torch.linalg.svdvals(full)[: f.rank].sum()
    torch.testing.assert_close(
        torch.autograd.grad(f.norm(), (a, b)), torch.autograd.grad(full.norm(), (a, b), retain_graph=True)
    )
    torch.testing.assert_close(torch.autograd.grad(f.singular_values().sum(), (a, b)), torch.autograd.grad(singular, (a, b)))


@pytest.mark.parametrize(("a", "b"), [((3, 2), (3, 4)), ((2,), (2, 3)), ((2, 4, 3), (5, 3, 4))])
def test_shapes_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="FactoredMatrix: found"):
        FactoredMatrix(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("name", ["trace", "eigenvalues"])
def test_only_square_ones_have(name: str) -> None:
    with pytest.raises(SpecError, match=f"FactoredMatrix.{name}: found a 3 x 4 matrix; expected a square one"):
        getattr(FactoredMatrix(torch.zeros(3, 2), torch.zeros(2, 4)), name)()
