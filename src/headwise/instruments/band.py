"""The weights near the diagonal, from small tiles along it: O(n) in time and memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.maps import AttentionMap

__all__ = ["NEAR", "WITHIN", "Band", "band"]

NEAR = 8
"""Offsets kept one by one: |i - j| < NEAR."""

WITHIN = 64
"""Offsets kept as their sum: |i - j| < WITHIN."""


@dataclass(frozen=True)
class Band:
    """Weights by offset from the query.

    offsets `(batch, heads, n_q, offsets)`: the weight at i - j = first, first + 1, ...; zero
    where there is no such key. within `(batch, heads, n_q)`: mass on |i - j| < WITHIN.
    """

    offsets: Tensor
    first: int
    within: Tensor

    def at(self, offset: int) -> Tensor:
        """Weight at i - j = offset `(batch, heads, n_q)`; zeros ahead of a causal map's query."""
        if offset < self.first:
            return torch.zeros_like(self.within)
        return self.offsets[..., offset - self.first]

    def profile_share(self, mean: Tensor) -> Tensor:
        """sum_d min(p_i,i-d , a_d) for a profile a `(batch, heads, offsets)`: the mass of each row
        that the profile explains, `(batch, heads, n_q)`."""
        return torch.minimum(self.offsets, mean[:, :, None]).sum(-1)


def band(of: AttentionMap, ahead: bool) -> Band:
    """The band of a map of a sequence with itself; ahead: whether queries may look ahead."""
    s = of.scores
    first = 1 - NEAR if ahead else 0
    offset = torch.arange(first, NEAR, device=s.device)
    size = (s.batch, s.heads, s.n_q)
    offsets = torch.zeros((*size, len(offset)), device=s.device)
    within = torch.zeros(size, device=s.device)
    rows = 128 if s.device.type == "cpu" else 1024
    for low in range(0, s.n_q, rows):
        high = min(low + rows, s.n_q)
        start = max(0, low + s.offset - WITHIN + 1)
        stop = min(s.n_k, high + s.offset + (WITHIN - 1 if ahead else 0))
        if stop <= start:
            continue
        tile = of.tile(slice(low, high), slice(start, stop))
        i = s.positions()[low:high, None]
        j = torch.arange(start, stop, device=s.device)
        within[..., low:high] = (tile * ((i - j).abs() < WITHIN)).sum(-1)
        place = i - offset - start
        there = (place >= 0) & (place < stop - start)
        place = place.clamp(0, stop - start - 1).expand(*tile.shape[:2], -1, -1)
        offsets[:, :, low:high] = tile.gather(-1, place) * there
    return Band(offsets, first, within)
