"""Rows of a cache as a policy sees them, with gaps and padding, and their maps in plain loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headwise.compress.cache.policy import Seen


def rows_seen(
    seed: int,
    rows: int = 3,
    n: int = 11,
    group: int = 2,
    queries: int = 3,
    padded: int = 0,
    gaps: bool = True,
    width: int = 4,
    right: bool = False,
    state: bool = False,
) -> Seen:
    """Row r has up to `padded` entries of padding, in front or behind; the rest lies at growing
    positions, with holes where something was evicted. The newest entries are the queries'."""
    random = torch.Generator().manual_seed(seed)
    positions = torch.full((rows, n), -1)
    for row in range(rows):
        none = row % (padded + 1)
        steps = torch.randint(1, 4 if gaps else 2, (n - none,), generator=random)
        steps[max(0, n - none - queries) :] = 1  # queries came one after the other
        at = steps.cumsum(0) + none
        positions[row, : n - none] = at
        if not right:
            positions[row] = positions[row].roll(none)
    return Seen(
        layer=1,
        rows=torch.arange(rows),
        keys=2 * torch.randn(rows, n, width, generator=random),
        values=torch.randn(rows, n, width + 1, generator=random),
        positions=positions,
        queries=torch.randn(rows, group, queries, width, generator=random),
        query_positions=positions[:, n - queries :] if queries else positions[:, :0],
        scale=0.7,
        state=torch.rand(rows, n, generator=random) if state else None,
        kv_heads=rows,
    )


def weights(seen: Seen) -> Tensor:
    """`(R, g, m, n)` float64, one number at a time; rows of padding are zero."""
    rows, group, queries, _ = seen.queries.shape
    n = seen.positions.shape[1]
    found = torch.zeros(rows, group, queries, n, dtype=torch.float64)
    for row in range(rows):
        for head in range(group):
            for query in range(queries):
                place = int(seen.query_positions[row, query])
                exponents = {}
                for key in range(n):
                    at = int(seen.positions[row, key])
                    if 0 <= at <= place:
                        product = sum(
                            float(a) * float(b)
                            for a, b in zip(
                                seen.queries[row, head, query], seen.keys[row, key], strict=True
                            )
                        )
                        exponents[key] = math.exp(seen.scale * product)
                for key, one in exponents.items():
                    found[row, head, query, key] = one / sum(exponents.values())
    return found
