"""How much of a matrix a low rank keeps, and how ranks are shared out over matrices.

The output of W on inputs of second moment S has the second moment W S W^T. Projecting the output
on its k leading directions U_k, W' = U_k U_k^T W, is the map of rank k with the least mean squared
output error, for every S: the tail sum of squared singular values of W S^(1/2) (Eckart and Young
1936; weighted for language models in ASVD, arXiv 2312.05821, and SVD-LLM, arXiv 2403.07378, which
go by a Cholesky factor and its inverse; the projection needs neither).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTINGS = ("full", "diagonal", "none")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """directions U `(out, k)`, orthonormal, the leading ones first; energy `(k,)`: squared
    singular values, which are mean squared outputs along them."""

    directions: Tensor
    energy: Tensor

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """up `(out, rank)` and down `(rank, in)` of W `(out, in)` in float64: up down = W'."""
        up = self.directions[:, :rank]
        return up, up.T @ weight.double()

    def error(self, rank: int) -> float:
        """Share of the output's mean square that a rank loses (by the weighting's measure)."""
        total = float(self.energy.sum())
        return float(self.energy[rank:].sum()) / total if total else 0.0


def spectrum(weight: Tensor, second: Tensor | None, weighting: str = "full") -> Spectrum:
    """Of a weight `(out, in)` under inputs of second moment `(in, in)`.

    weighting: "full", the output error itself; "diagonal", inputs taken as uncorrelated (LoRAP,
    arXiv 2404.09695; ASVD); "none", the error of the weight.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: expected one of {', '.join(WEIGHTINGS)}")
    wide = weight.detach().double()
    if weighting == "none":
        seen = wide
    else:
        if second is None:
            raise ValueError(f"weighting={weighting!r} needs the second moment of the inputs")
        if weighting == "diagonal":
            seen = wide * second.diagonal().clamp_min(0).sqrt()
        else:
            values, vectors = torch.linalg.eigh(second)
            seen = wide @ vectors * values.clamp_min(0).sqrt()
    directions, values, _ = torch.linalg.svd(seen, full_matrices=False)
    return Spectrum(directions, values.square())


def largest_rank(out: int, wide: int) -> int:
    """The largest rank at which two factors hold fewer numbers than one matrix; 0: none."""
    return (out * wide - 1) // (out + wide)


def share_out(
    energies: Mapping[str, Sequence[float]],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
) -> dict[str, int | None]:
    """Name -> rank, None where a matrix stays whole, with at most `budget` numbers in all and as
    much energy kept as possible.

    energies: of each matrix, falling. A rank costs out + in and keeps the next energy; from the
    largest rank that pays, a whole matrix costs little more and keeps the rest. So of each matrix
    only the upper hull of (numbers, kept) matters, and the steepest pieces of all hulls are taken
    first, which is the optimum of the relaxed knapsack, and of the true one where pieces fit.

    Raises ValueError where the budget is below a rank of one for every matrix, with the least.
    """
    least = sum(sum(shape) for shape in shapes.values())
    if budget < least:
        raise ValueError(
            f"a budget of {budget} numbers is below rank 1 for all {len(shapes)} matrices: "
            f"at least {least}"
        )
    pieces: list[tuple[float, str, int, int | None]] = []
    for name, values in energies.items():
        pieces += [(slope, name, a, b) for slope, a, b in _hull(values, shapes[name])]
    ranks: dict[str, int | None] = dict.fromkeys(energies, 1)
    spare = budget - least
    closed: set[str] = set()
    for _, name, start, stop in sorted(pieces, key=lambda piece: -piece[0]):
        if name in closed:
            continue
        out, wide = shapes[name]
        price = (out * wide if stop is None else stop * (out + wide)) - start * (out + wide)
        if price <= spare:
            ranks[name], spare = stop, spare - price
            continue
        closed.add(name)  # what is left buys a part of this piece
        more = min(spare // (out + wide), max(0, largest_rank(out, wide) - start))
        ranks[name], spare = start + more, spare - more * (out + wide)
    return ranks


def _hull(values: Sequence[float], shape: tuple[int, int]) -> list[tuple[float, int, int | None]]:
    """Pieces (kept per number, from rank, to rank or None for whole) of the upper hull from rank 1
    on, steepest first."""
    out, wide = shape
    each, last = out + wide, max(1, largest_rank(out, wide))
    kept = [0.0]
    for value in values:
        kept.append(kept[-1] + value)
    points: list[tuple[int, float, int | None]] = [
        (rank * each, kept[min(rank, len(values))], rank) for rank in range(1, last + 1)
    ]
    points.append((max(out * wide, last * each + 1), kept[-1], None))
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    pairs = itertools.pairwise(hull)
    return [(_slope(a, b), a[2] if a[2] is not None else last, b[2]) for a, b in pairs]


def _slope(a: tuple[int, float, int | None], b: tuple[int, float, int | None]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
