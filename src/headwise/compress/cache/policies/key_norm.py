"""Keys of small norm are kept: they are the ones that queries look for."""

from __future__ import annotations

from torch import Tensor

from headwise.compress.cache.policy import Policy, Seen


class KeyNorm(Policy):
    """score_j = -||k_j||_2, from the keys alone: no query is asked, nothing is carried along.

    In most layers of trained decoders the keys of small norm receive most attention; not in the
    first two, where the paper keeps everything (a matter of the budget, not of the score).

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression", arXiv 2406.11430, section 4. Rotary embeddings turn keys and leave their norm.
    """

    def score(self, seen: Seen) -> Tensor:
        """`(R, n)` float32."""
        return -seen.keys.float().norm(dim=-1)
