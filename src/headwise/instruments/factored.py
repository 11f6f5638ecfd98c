"""A matrix of low rank as the product of two thin ones, never multiplied out.

A head's circuits are width by width, or vocabulary by vocabulary, but have the rank of a head. With
M = A B, A = Q_A R_A and B^T = Q_B R_B (thin QR), norms and singular values of M are those of the
small R_A R_B^T, and the eigenvalues of M other than zero are those of the small B A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factored"]


@dataclass(frozen=True, eq=False)
class Factored:
    """left @ right, of left `(..., m, r)` and right `(..., r, n)`, both of one type and device.

    Leading axes (heads, say) broadcast. Raises ValueError where the shapes do not fit.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if (
            self.left.dim() < 2
            or self.right.dim() < 2
            or self.left.shape[-1] != self.right.shape[-2]
        ):
            raise ValueError(
                f"{tuple(self.left.shape)} @ {tuple(self.right.shape)}: expected (..., m, r) and "
                "(..., r, n)"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product, `(..., m, n)`."""
        batch = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return (*batch, self.left.shape[-2], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """r, the most that the rank can be."""
        return min(self.left.shape[-1], *self.shape[-2:])

    def transpose(self) -> Factored:
        """Of each matrix."""
        return Factored(self.right.mT, self.left.mT)

    def __matmul__(self, other: Factored | Tensor) -> Factored:
        """The product with what stands to the right, factored through the smaller rank."""
        if isinstance(other, Tensor):
            return Factored(self.left, self.right @ other)
        middle = self.right @ other.left
        if middle.shape[-1] < middle.shape[-2]:
            return Factored(self.left @ middle, other.right)
        return Factored(self.left, middle @ other.right)

    def __rmatmul__(self, other: Tensor) -> Factored:
        return Factored(other @ self.left, self.right)

    def apply(self, x: Tensor) -> Tensor:
        """M x for the vectors of x `(..., n)`: `(..., m)`."""
        return x @ self.right.mT @ self.left.mT

    def dense(self) -> Tensor:
        """The whole matrix `(..., m, n)`, for who wants it and has the room."""
        return self.left @ self.right

    def norm(self) -> Tensor:
        """Frobenius norm `(...)`."""
        return torch.linalg.matrix_norm(self._core()[1])

    def singular_values(self) -> Tensor:
        """`(..., rank)`, the largest first."""
        found: Tensor = torch.linalg.svdvals(self._core()[1])
        return found[..., : self.rank]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U `(..., m, rank)`, S `(..., rank)`, V^T `(..., rank, n)` with M = U diag(S) V^T."""
        outer, core, inner = self._core()
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        return outer @ u, s, vh @ inner.mT

    def component(self, index: int) -> Factored:
        """The rank-one part s_i u_i v_i^T, the largest is 0. Raises IndexError past the rank."""
        if not 0 <= index < self.rank:
            raise IndexError(f"component {index} of a matrix of rank {self.rank}")
        u, s, vh = self.svd()
        one = slice(index, index + 1)
        return Factored(u[..., one] * s[..., None, one], vh[..., one, :])

    def without(self, *components: int) -> Factored:
        """The matrix less these singular components. Raises IndexError past the rank."""
        bad = [i for i in components if not 0 <= i < self.rank]
        if bad:
            raise IndexError(f"components {bad} of a matrix of rank {self.rank}")
        u, s, vh = self.svd()
        kept = [i for i in range(self.rank) if i not in components]
        return Factored(u[..., kept] * s[..., None, kept], vh[..., kept, :])

    def eigenvalues(self) -> Tensor:
        """Complex `(..., r)`, in no order; all others of a square matrix are zero.

        Raises ValueError for a matrix that is not square.
        """
        if self.shape[-1] != self.shape[-2]:
            raise ValueError(f"a matrix of {self.shape[-2:]} has no eigenvalues: it is not square")
        found: Tensor = torch.linalg.eigvals(self.right @ self.left)
        return found

    def trace(self) -> Tensor:
        """`(...)`, of square matrices."""
        return (self.right * self.left.mT).sum((-2, -1))

    def _core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q_A, R_A R_B^T, Q_B: M = Q_A core Q_B^T."""
        outer, a = torch.linalg.qr(self.left)
        inner, b = torch.linalg.qr(self.right.mT)
        return outer, a @ b.mT, inner
