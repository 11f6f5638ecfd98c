"""Entries that were attended to so far are kept."""

from __future__ import annotations

from torch import Tensor

from headwise.compress.cache.policies.mass import received
from headwise.compress.cache.policy import Policy, Seen


class AccumulatedMass(Policy):
    """score_j = sum_i mean_h a_hij over all queries i so far and the heads h that share the row.

    The sum goes on over chunks and decoded tokens; what is gone no longer collects, and its share
    goes to what is left. No dense map is made (`AttentionMap.transpose_apply`). Early entries
    have had more queries to collect from; `by_chances=True` divides by the number of queries
    that could have seen the entry, t - position + 1 at newest token t.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models", arXiv 2306.14048, algorithm 1 (heads that share keys: their mean). The
    division is what kvpress' ObservedAttentionPress does.
    """

    needs_queries = None

    def __init__(self, by_chances: bool = False) -> None:
        self.by_chances = by_chances

    def observe(self, seen: Seen) -> Tensor:
        """`(R, n)` float32: the mass received so far."""
        new = received(seen)
        return new if seen.state is None else seen.state + new

    def score(self, seen: Seen) -> Tensor:
        """`(R, n)` float32."""
        if seen.state is None:
            raise ValueError("AccumulatedMass scores what `observe` has collected: call it before")
        if not self.by_chances:
            return seen.state
        newest = seen.positions.amax(-1, keepdim=True)
        return seen.state / (newest - seen.positions + 1)
