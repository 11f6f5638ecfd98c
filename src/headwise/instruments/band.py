"""The weights near the diagonal, offset by offset: O(n) in time and memory.

Blocks of 64 queries meet the keys around them in one batched product; of that, the diagonals that
are wanted are read along a slanted view, and only they become weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.maps import AttentionMap
from headwise.maps.gather import pair_logits
from headwise.maps.scores import Scores
from headwise.maps.tiles import LOG2_E

__all__ = ["NEAR", "WITHIN", "Band", "band"]

NEAR = 8
"""Offsets kept one by one: |i - j| < NEAR."""

WITHIN = 64
"""Offsets kept as their sum: |i - j| < WITHIN."""

_ROWS = 64  # queries of a block
_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}  # products that are held at a time


@dataclass(frozen=True)
class Band:
    """Weights by offset from the query.

    offsets `(batch, heads, n_q, offsets)`: the weights at i - j = 7, 6, ..., down to -7, or to 0
    in a causal map; zero where there is no such key. within `(batch, heads, n_q)`: mass on
    |i - j| < 64.
    """

    offsets: Tensor
    within: Tensor

    def at(self, offset: int) -> Tensor:
        """Weight at i - j = offset `(batch, heads, n_q)`; zeros ahead of a causal map's query."""
        place = NEAR - 1 - offset
        if not 0 <= place < self.offsets.shape[-1]:
            return torch.zeros_like(self.within)
        return self.offsets[..., place]

    def profile_share(self, mean: Tensor) -> Tensor:
        """sum_d min(p_i,i-d , a_d) for a profile a `(batch, heads, offsets)`: the mass of each row
        that the profile explains, `(batch, heads, n_q)`."""
        return torch.minimum(self.offsets, mean[:, :, None]).sum(-1)


@torch.no_grad()
def band(of: AttentionMap, ahead: bool) -> Band:
    """The band of a map of a sequence with itself; ahead: whether queries may look ahead."""
    s, lse = of.scores, of.logsumexp()
    size = (s.batch, s.heads, s.n_q)
    offsets = torch.zeros((*size, 2 * NEAR - 1 if ahead else NEAR), device=s.device)
    within = torch.zeros(size, device=s.device)
    wide = 2 * WITHIN - 1 if ahead else WITHIN
    held = _AT_ONCE.get(s.device.type, 2**25)
    rows = max(1, held // (s.heads * _ROWS * (_ROWS + wide))) * _ROWS
    near = slice(WITHIN - NEAR, WITHIN - NEAR + offsets.shape[-1])
    for b in range(s.batch):
        for low in range(0, s.n_q, rows):
            at = slice(low, min(low + rows, s.n_q))
            weights = _diagonals(s, lse[b, :, at], b, at, wide)
            within[b, :, at] = weights.sum(-1)
            offsets[b, :, at] = weights[..., near]
    return Band(offsets, within)


def _diagonals(s: Scores, lse: Tensor, b: int, at: slice, wide: int) -> Tensor:
    """Weights `(heads, rows, wide)` of some rows at i - j = 63, 62, ..."""
    rows = at.stop - at.start
    blocks = -(-rows // _ROWS)
    short = blocks * _ROWS - rows  # rows that fill up the last block
    span = _ROWS + wide - 1  # keys that a block meets
    first = at.start + s.offset - WITHIN + 1
    last = first + blocks * _ROWS + wide - 1
    keys = s.k[b, :, max(first, 0) : min(last, s.n_k)].to(s.dtype)
    keys = torch.nn.functional.pad(keys, (0, 0, max(-first, 0), max(last - s.n_k, 0)))
    q = torch.nn.functional.pad(s.q[b, :, at].to(s.dtype) * s.scale, (0, 0, 0, short))
    q = q.view(s.kv_heads, s.group, blocks, _ROWS, -1).transpose(1, 2)
    products = q.reshape(s.kv_heads, blocks, s.group * _ROWS, -1) @ keys.unfold(1, span, _ROWS)
    # key c of the block's span stands at i - j = 63 + row - c: one step right with each row
    block = _ROWS * span
    slanted = products.as_strided(
        (s.kv_heads, s.group, blocks, _ROWS, wide),
        (blocks * s.group * block, block, s.group * block, span + 1, 1),
    )
    logits = slanted.reshape(s.heads, blocks * _ROWS, wide)[:, :rows]
    i = s.positions()[at, None]
    j = i - torch.arange(WITHIN - 1, WITHIN - 1 - wide, -1, device=s.device)
    logits = pair_logits(s, b, i.expand_as(j), j.clamp(0, s.n_k - 1), logits)
    if first < 0 or last > s.n_k:
        logits = logits.masked_fill((j < 0) | (j >= s.n_k), float("-inf"))
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    return (logits - lse[..., None]).mul_(LOG2_E).exp2_().float()
