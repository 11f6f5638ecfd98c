"""Codes that are moved from the nearest so that what is computed with them changes least.

The error of a rounded matrix D = W' - W is counted as tr(N D M D^T): M `(in, in)` is the second
moment of what comes in, N `(out, out)` says how output features count together (None: each by
itself). Whether a number is rounded up or down is chosen by coordinate descent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.compress.bits.rounding import Rounded

__all__ = ["descend", "quadratic_error"]


def quadratic_error(delta: Tensor, inner: Tensor, outer: Tensor | None = None) -> Tensor:
    """tr(outer delta inner delta^T) for delta `(out, in)`: a number."""
    moved = delta @ inner
    return ((moved if outer is None else outer @ moved) * delta).sum()


def descend(
    rounded: Rounded,
    weight: Tensor,
    inner: Tensor,
    outer: Tensor | None = None,
    steps: int | None = None,
) -> Rounded:
    """Move one code at a time by one, always the one that lowers the error most (in each row by
    itself where there is no `outer`), until none does. weight `(out, in)`: what was rounded.

    One scale a row. `steps`: at most so many moves (of a row), 4 a number by default. Raises
    ValueError for groups within rows.
    """
    if rounded.scale.shape[1] != 1:
        raise ValueError("descend takes one scale a row: round with group=None")
    top = 127 if rounded.bits == 8 else 2**rounded.bits - 1
    least = -127 if rounded.bits == 8 else 0
    scale = rounded.scale.double()
    codes = rounded.codes.double()
    inner = inner.double()
    delta = rounded.weight(torch.float64) - weight.detach().double()
    outer = None if outer is None else outer.double()
    gradient = 2 * (delta @ inner if outer is None else outer @ delta @ inner)
    weighs = torch.ones_like(scale) if outer is None else outer.diagonal()[:, None]
    curve = scale.square() * weighs * inner.diagonal()
    for _ in range(4 * codes.shape[1] if steps is None else steps):
        up = torch.where(codes < top, scale * gradient + curve, torch.inf)
        down = torch.where(codes > least, -scale * gradient + curve, torch.inf)
        gain, direction = torch.minimum(up, down), torch.where(up <= down, 1.0, -1.0)
        if outer is None:
            best, column = gain.min(1)
            rows = (best < -1e-12).nonzero().flatten()
            columns = column[rows]
        else:
            place = int(gain.argmin())
            rows = torch.tensor([place // gain.shape[1]], device=gain.device)
            columns = torch.tensor([place % gain.shape[1]], device=gain.device)
            rows = rows[gain[rows, columns] < -1e-12]
            columns = columns[: len(rows)]
        if not len(rows):
            break
        moved = direction[rows, columns]
        codes[rows, columns] += moved
        change = (2 * moved * scale[rows, 0])[:, None] * inner[columns]  # rows of D M
        if outer is None:
            gradient[rows] += change
        else:
            gradient += outer[:, rows] @ change
    return Rounded(codes.to(rounded.codes.dtype), rounded.scale, rounded.zero, rounded.bits)
