"""Entries that the newest queries look at are kept, with their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.compress.cache.policies.mass import received
from headwise.compress.cache.policy import Policy, Seen

POOLS = ("average", "max")


class ObservationWindow(Policy):
    """score_j = pool over |j' - j| <= kernel // 2 of mean_i,h a_hij', i of the newest `window`.

    The window's own entries get the row's largest score + 1, and their mass is not pooled into
    others. Pooling goes by position: after an eviction what stands beside an entry is not its
    neighbour, and what is missing counts as zero ("average" divides by `kernel` everywhere).

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv
    2404.14469, section 4 and listing 1; the mean over the heads of a group and the defaults are
    those of kvpress (the paper's: max, kernel 7, window 16 to 32).
    """

    def __init__(self, window: int = 64, kernel: int = 5, pool: str = "average") -> None:
        if window < 1 or kernel < 1 or kernel % 2 == 0 or pool not in POOLS:
            raise ValueError(
                "ObservationWindow needs window >= 1, an odd kernel >= 1 and pool one of "
                f"{', '.join(POOLS)}, not window={window}, kernel={kernel}, pool={pool!r}"
            )
        self.needs_queries = window
        self.kernel, self.pool = kernel, pool

    def score(self, seen: Seen) -> Tensor:
        """`(R, n)` float32."""
        at, real = seen.query_positions, seen.query_positions >= 0
        if at.shape[1] == 0:
            raise ValueError("ObservationWindow scores by the newest queries, and was given none")
        first = torch.where(real, at, at.amax(-1, keepdim=True)).amin(-1, keepdim=True)
        own = seen.valid & (seen.positions >= first)
        mass = received(seen) / real.sum(-1, keepdim=True).clamp_min(1)
        score = self._pooled(mass.masked_fill(own | ~seen.valid, 0.0), seen.positions)
        best = score.masked_fill(own | ~seen.valid, 0.0).amax(-1, keepdim=True)
        return torch.where(own, best + 1.0, score)

    def _pooled(self, mass: Tensor, at: Tensor) -> Tensor:
        """Positions grow along a row, so neighbours stand no further apart than they are."""
        n = mass.shape[-1]
        total = mass.clone()
        for step in range(1, min(self.kernel // 2, n - 1) + 1):
            left, right = slice(None, n - step), slice(step, None)
            apart = at[:, right] - at[:, left]
            near = (apart <= self.kernel // 2) & (apart > 0) & (at[:, left] >= 0)
            for here, there in ((left, right), (right, left)):
                given = mass[:, there].masked_fill(~near, 0.0)
                if self.pool == "max":
                    total[:, here] = torch.maximum(total[:, here], given)
                else:
                    total[:, here] += given
        return total if self.pool == "max" else total / self.kernel
