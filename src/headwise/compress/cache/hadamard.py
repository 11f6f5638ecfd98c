"""Rotation by a Walsh-Hadamard matrix: a few large channels are spread over all of them.

H is orthogonal, so queries and keys that are both rotated have the scores that they had, and
values that were rotated come back by rotating what was averaged from them. Few bits are lost less
where no channel stands out (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 3; for a
key-value cache of 2 bits AKVQ-VL, Su et al. 2025, arXiv 2501.15021).
"""

from __future__ import annotations

import torch
from torch import Tensor


def blocks_of(size: int) -> int:
    """The largest power of two that divides size: how many channels are mixed together."""
    if size < 1:
        raise ValueError(f"size={size}: expected 1 or more channels")
    return size & -size


def rotate(x: Tensor) -> Tensor:
    """`(..., d)` times H / sqrt(b), in blocks of b channels, b the largest power of two in d (all
    of them where d is one). Its own inverse; in the type of x, float32 at least inside."""
    size = x.shape[-1]
    block = blocks_of(size)
    wide = x if x.dtype == torch.float64 else x.float()
    done = wide.reshape(-1, block)
    half = 1
    while half < block:  # sums and differences of pairs, d log d of them
        pairs = done.view(-1, block // (2 * half), 2, half)
        done = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    return (done.reshape(x.shape) * block**-0.5).to(x.dtype)
