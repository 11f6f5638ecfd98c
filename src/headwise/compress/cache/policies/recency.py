"""The newest entries are kept."""

from __future__ import annotations

from torch import Tensor

from headwise.compress.cache.policy import Policy, Seen


class SinksAndWindow(Policy):
    """score_j = position of j: the cache keeps its sinks, and the rest of the budget is a window.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv
    2309.17453, section 3.2. Unlike there, entries keep the positions at which they were read:
    nothing is turned again as the window moves.
    """

    def score(self, seen: Seen) -> Tensor:
        """`(R, n)` float32, exact up to 2^24 tokens."""
        return seen.positions.float()
