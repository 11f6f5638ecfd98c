"""How many keys each query may see, and how many queries see each key, without the n x n mask.

Bands (full, causal, windows) and masks of keys are counted with running sums, O(n). What is
neither is counted from the mask itself, a block of rows at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from headwise.maps import AttentionMap, Full, KeyMask, Padding, Pattern, Window
from headwise.maps.pattern import And, Or

__all__ = ["Visible", "looks_ahead", "visible"]

_ROWS = 128  # rows of a mask that are held at a time


class Visible(NamedTuple):
    """keys: keys that a query may see, `(batch or 1, heads or 1, n_q)`.
    queries: real queries that may see a key, `(batch or 1, heads or 1, n_k)`. Both float32."""

    keys: Tensor
    queries: Tensor


def visible(of: AttentionMap, rows: Tensor | None) -> Visible:
    """Counts for a map; rows `(batch, n_q)` says which queries are real (None: all)."""
    s = of.scores
    band = _band(s.pattern)
    if band is None:
        return _count(of, rows)
    left, right, masks = band
    seen = torch.ones((1, s.n_k), dtype=torch.bool, device=s.device)
    j = torch.arange(s.n_k, device=s.device)
    batch = torch.arange(s.batch, device=s.device)
    for mask in masks:
        here = batch if mask.by_batch else batch[:1]
        seen = seen & mask.allowed(j[None, :], j[None, :], here[:, None])
    i = s.positions()
    low = torch.zeros_like(i) if left is None else (i - left + 1).clamp(0, s.n_k)
    high = torch.full_like(i, s.n_k) if right is None else (i + right + 1).clamp(0, s.n_k)
    keys = (_before(seen)[:, high] - _before(seen)[:, low]).clamp_min(0)
    real = torch.ones((1, s.n_q), dtype=torch.bool, device=s.device) if rows is None else rows
    row = j - s.offset  # the query that stands where the key does
    low = torch.zeros_like(j) if right is None else (row - right).clamp(0, s.n_q)
    high = torch.full_like(j, s.n_q) if left is None else (row + left).clamp(0, s.n_q)
    queries = (_before(real)[:, high] - _before(real)[:, low]).clamp_min(0) * seen
    return Visible(keys[:, None].float(), queries[:, None].float())


def looks_ahead(pattern: Pattern) -> bool:
    """Whether a query may see keys behind its own position, as far as the pattern tells."""
    if isinstance(pattern, Window):
        return pattern.right is None or pattern.right > 0
    if isinstance(pattern, And):
        return looks_ahead(pattern.a) and looks_ahead(pattern.b)
    if isinstance(pattern, Or):
        return looks_ahead(pattern.a) or looks_ahead(pattern.b)
    return True


def _band(pattern: Pattern) -> tuple[int | None, int | None, list[Pattern]] | None:
    """(left, right, masks of keys) of a pattern that is a band and masks of keys, else None."""
    if isinstance(pattern, Full):
        return None, None, []
    if isinstance(pattern, Window):
        return pattern.left, pattern.right, []
    if isinstance(pattern, KeyMask | Padding):
        return None, None, [pattern]
    if isinstance(pattern, And):
        a, b = _band(pattern.a), _band(pattern.b)
        if a is not None and b is not None:
            left, right = (
                min((x for x in pair if x is not None), default=None)
                for pair in zip(a[:2], b[:2], strict=True)
            )
            return left, right, a[2] + b[2]
    return None


def _before(mask: Tensor) -> Tensor:
    """How many are True before each place, `(batch, n + 1)`."""
    return torch.nn.functional.pad(mask.long().cumsum(1), (1, 0))


def _count(of: AttentionMap, rows: Tensor | None) -> Visible:
    s = of.scores
    j = torch.arange(s.n_k, device=s.device)
    batch = torch.arange(s.batch, device=s.device)
    heads = torch.arange(s.heads, device=s.device)
    keys, queries = [], torch.zeros((1, 1, s.n_k), device=s.device)
    for low in range(0, s.n_q, _ROWS):
        block = slice(low, min(low + _ROWS, s.n_q))
        tile = s.pattern.tile(s.positions()[block], j, batch, heads)
        tile = tile.expand(*tile.shape[:2], block.stop - block.start, s.n_k)
        keys.append(tile.sum(-1))
        if rows is not None:
            tile = tile & rows[:, None, block, None]
        queries = queries + tile.sum(-2)
    return Visible(torch.cat(keys, -1).float(), queries)
