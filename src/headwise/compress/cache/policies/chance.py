"""Entries are kept by chance: what every other policy has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.compress.cache.policy import Policy, Seen

_STEP = 0x9E3779B97F4A7C15 - 2**64
_TIMES = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class Random(Policy):
    """score_j uniform in [0, 1), drawn once for each (seed, layer, row, position).

    The draw is a hash, so that an entry keeps its luck from chunk to chunk: with fresh draws at
    every eviction old entries would be lost more often than new ones. The mixing of bits is that
    of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, seen: Seen) -> Tensor:
        """`(R, n)` float32."""
        at = seen.positions.long()
        bits = _mix(torch.full_like(at[:, :1], self.seed)) + seen.layer
        bits = _mix(bits) + seen.rows[:, None].to(at)
        bits = _mix(_mix(bits) + at)
        return _shifted(bits, 40).float() / 2**24


def _mix(bits: Tensor) -> Tensor:
    """One step of SplitMix64; products of int64 wrap around as they do there."""
    bits = bits + _STEP
    bits = (bits ^ _shifted(bits, 30)) * _TIMES[0]
    bits = (bits ^ _shifted(bits, 27)) * _TIMES[1]
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in."""
    return (bits >> by) & (2 ** (64 - by) - 1)
