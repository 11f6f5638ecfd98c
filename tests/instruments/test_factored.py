"""Everything of a factored matrix against the matrix itself, multiplied out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.instruments.factored import Factored


def thin(m: int, r: int, n: int, batch: tuple[int, ...] = (), seed: int = 0) -> Factored:
    make = torch.Generator().manual_seed(seed)
    left = torch.randn(*batch, m, r, generator=make, dtype=torch.float64)
    return Factored(left, torch.randn(*batch, r, n, generator=make, dtype=torch.float64))


def size(values: np.ndarray) -> np.ndarray:
    return np.sort(np.abs(values))[::-1]


@given(
    m=st.integers(1, 9), r=st.integers(1, 9), n=st.integers(1, 9), batch=st.sampled_from([(), (3,)])
)
def test_norm_svd_and_components(m: int, r: int, n: int, batch: tuple[int, ...]) -> None:
    matrix = thin(m, r, n, batch)
    whole = (matrix.left.unsqueeze(-1) * matrix.right.unsqueeze(-3)).sum(-2)
    assert matrix.shape == (*batch, m, n) == tuple(whole.shape)
    torch.testing.assert_close(matrix.dense(), whole)
    torch.testing.assert_close(matrix.norm(), whole.pow(2).sum((-2, -1)).sqrt())
    u, s, vh = matrix.svd()
    assert s.shape == (*batch, min(m, r, n))
    torch.testing.assert_close((u * s[..., None, :]) @ vh, whole)
    expected = torch.from_numpy(np.linalg.svd(whole.numpy(), compute_uv=False))
    torch.testing.assert_close(s, expected[..., : matrix.rank])
    torch.testing.assert_close(matrix.singular_values(), s)
    eye = torch.eye(matrix.rank, dtype=torch.float64).expand(*batch, -1, -1)
    torch.testing.assert_close(u.mT @ u, eye)
    torch.testing.assert_close(vh @ vh.mT, eye)
    parts = [matrix.component(i).dense() for i in range(matrix.rank)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)
    torch.testing.assert_close(matrix.without(0).dense(), whole - parts[0])


@given(n=st.integers(1, 8), r=st.integers(1, 10))
def test_eigenvalues_and_trace(n: int, r: int) -> None:
    matrix = thin(n, r, n)
    expected = np.linalg.eigvals(matrix.dense().numpy())
    found = matrix.eigenvalues().numpy()
    k = min(n, r)
    np.testing.assert_allclose(size(found)[:k], size(expected)[:k], atol=1e-8)
    np.testing.assert_allclose(found.sum(), expected.sum(), atol=1e-8)
    np.testing.assert_allclose(float(matrix.trace()), expected.sum().real, atol=1e-8)


@pytest.mark.parametrize(("r", "t"), [(2, 5), (5, 2), (3, 3)])
def test_products(r: int, t: int) -> None:
    a, b = thin(6, r, 7), thin(7, t, 4, seed=1)
    product = a @ b
    assert product.left.shape[-1] == min(r, t)
    torch.testing.assert_close(product.dense(), a.dense() @ b.dense())
    x: Tensor = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close((a @ x.mT).dense(), a.dense() @ x.mT)
    torch.testing.assert_close(
        (torch.ones(2, 6).double() @ a).dense(), a.dense().sum(0).expand(2, -1)
    )
    torch.testing.assert_close(a.apply(x), (a.dense() @ x.mT).mT)
    torch.testing.assert_close(a.transpose().dense(), a.dense().mT)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) @ \(2, 3\)"):
        Factored(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="not square"):
        thin(3, 2, 4).eigenvalues()
    for index in (2, -1):
        with pytest.raises(IndexError, match="rank 2"):
            thin(3, 2, 4).component(index)
        with pytest.raises(IndexError, match="rank 2"):
            thin(3, 2, 4).without(index)


def test_never_multiplied_out() -> None:
    """A matrix of 10^12 numbers is no matter."""
    million = 10**6
    matrix = Factored(torch.ones(million, 2), torch.ones(2, million))
    assert float(matrix.norm()) == pytest.approx(2 * million, rel=1e-4)
    assert float(matrix.eigenvalues().abs().max()) == pytest.approx(2 * million, rel=1e-4)
