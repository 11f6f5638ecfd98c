"""Attention inside a window as one kernel call over blocks.

Away from the ends, every block of queries sees its keys through the same mask. The blocks are a
strided view of the keys, so that nothing is copied, and stand where the kernel expects heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.maps import kernels

NEGATIVE_INFINITY = float("-inf")


def block_rows(span: int) -> int:
    """Queries in a block for windows of `span` keys: few, since a block computes span + rows."""
    return min(256, max(32, 1 << (span // 32).bit_length()))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, offset: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) over keys with -right <= i - j < left, the query of row r at i = r + offset.

    Shapes as in `kernels.flash`. CPU only, since the kernel must take a mask.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    rows = block_rows(left + right)
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full(q.shape[:3], NEGATIVE_INFINITY, dtype=wide, device=q.device)
    # the rows whose block sees `width` keys, none of them beyond the ends
    width = rows + left - 1 + right
    first = min(max(left - 1 - offset, 0), n_q)
    blocks = max(0, (min(n_q, n_k - right - offset) - first) // rows)
    stop = first + blocks * rows
    if blocks:
        where = slice(first, stop), first + offset - (left - 1), blocks, rows, width
        mask = _mask(rows, width, left - 1, left, right, q)
        for b in range(q.shape[0]):
            _inside(q[b], k[b], v[b], scale, mask, where, out[b], lse[b])
    edges = [*range(0, first, rows), *range(stop, n_q, rows)]
    for start in edges:
        end = min(start + rows, first if start < first else n_q)
        low, high = max(start + offset - left + 1, 0), min(end + offset + right, n_k)
        if low >= high:
            continue
        mask = _mask(end - start, high - low, start + offset - low, left, right, q)
        some = q[:, :, start:end], k[:, :, low:high], v[:, :, low:high]
        out[:, :, start:end], part = kernels.flash(*some, scale, False, mask)
        empty = (mask == NEGATIVE_INFINITY).all(-1)  # the kernel says 0 where nothing is seen
        lse[:, :, start:end] = part.masked_fill(empty, NEGATIVE_INFINITY)
    return out, lse


def _mask(rows: int, keys: int, shift: int, left: int, right: int, like: Tensor) -> Tensor:
    """Additive mask of a block whose first query stands `shift` keys behind the first key."""
    i = torch.arange(rows, device=like.device)[:, None] + shift
    distance = i - torch.arange(keys, device=like.device)
    hidden = (distance >= left) | (distance < -right)
    return like.new_zeros(()).masked_fill(hidden, NEGATIVE_INFINITY)


def _inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor,
    where: tuple[slice, int, int, int, int],
    out: Tensor,
    lse: Tensor,
) -> None:
    """The blocks of one sequence, q `(heads, n_q, d)`: blocks take the place of heads."""
    at, key, blocks, rows, width = where
    kv, group = k.shape[0], q.shape[0] // k.shape[0]

    def windows(x: Tensor) -> Tensor:
        x = x[:, key:]
        size = (kv, blocks, width, x.shape[-1])
        step = (x.stride(0), rows * x.stride(1), x.stride(1), x.stride(2))
        return x.as_strided(size, step, x.storage_offset())

    keys, values = windows(k), windows(v)
    for g in range(group):
        heads = slice(g, None, group)
        queries = q[heads, at].unflatten(1, (blocks, rows))
        mixed, sums = kernels.flash(queries, keys, values, scale, False, mask)
        out[heads, at] = mixed.flatten(1, 2)
        lse[heads, at] = sums.flatten(1, 2)
