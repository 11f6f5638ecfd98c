"""The attention that entries receive from the queries at hand."""

from __future__ import annotations

from torch import Tensor

from headwise.compress.cache.policy import Seen


def received(seen: Seen) -> Tensor:
    """`(R, n)` float32: sum over the queries, mean over the heads that share the row. Queries of
    padding count for nothing, wherever it stands."""
    real = (seen.query_positions >= 0)[:, None].float()
    return seen.map().transpose_apply(real).mean(1)
