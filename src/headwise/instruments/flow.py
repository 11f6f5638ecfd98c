"""Attention flow: how much can flow from each input to an answer through all layers' maps.

Abnar and Zuidema 2020 (arXiv 2005.00928), section 4: a directed graph with a node for every
position of every layer, and edges from a position to those that its layer looks at, with capacity
A~ = 0.5 I + 0.5 mean_h A_h. The score of an input is the maximum flow from the position that the
answer is read from to it.

A maximum flow is no product of vectors: it needs the capacities of all layers at once, layers x n^2
numbers, and one problem for every input. So the length is bounded, where rollout's is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.instruments.kept_maps import Kept, keep, wanted_stack
from headwise.instruments.metrics import Metric
from headwise.models import ModelView

__all__ = ["LIMIT", "flow", "max_flows"]

LIMIT = 256
"""Most positions of a stack: at 12 layers 800,000 edges, and as many problems as positions."""
UNIT = 2**30
"""Capacities are whole numbers of this part of one; a flow errs by 2**-31 an edge of its cut."""

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


def flow(
    view: ModelView,
    inputs: dict[str, Any],
    metric: Metric,
    *,
    of: str | None = None,
    residual: float = 0.5,
    at: Tensor | int | None = None,
) -> Tensor:
    """Maximum flow `(batch, n)` from where the answer is read to each input, in [0, 1].

    of: the stack whose inputs are scored where there are two; residual: the capacity of staying
    (in cross-attention too, where the rest flows to the encoder); at: a position to flow from
    instead. Raises ValueError above 256 positions, ImportError without scipy.
    """
    if not 0 <= residual < 1:
        raise ValueError(f"residual={residual}: expected a share in [0, 1)")
    stack = wanted_stack(view, of)
    kept, row = keep(view, inputs, metric, at)
    longest = max(max(one.map.scores.n_q, one.map.scores.n_k) for one in kept)
    if longest > LIMIT:
        raise ValueError(
            f"flow through {longest:,} positions: it needs all n x n capacities and solves n "
            f"problems, and takes {LIMIT} positions at most; method='rollout' takes any number"
        )
    return torch.stack([_one(kept, row[b], b, stack, residual) for b in range(len(row))])


def max_flows(edges: Edges, nodes: int, source: int, sinks: Sequence[int]) -> np.ndarray:
    """The maximum flow from a source to each sink alone `(len(sinks),)`.

    edges: from, to (integers) and capacity (at most 1), no edge twice nor in both directions.
    Dinic's algorithm as scipy has it, on capacities rounded to 2**-30. Raises ImportError where
    scipy is not installed.
    """
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise ImportError("attention flow needs scipy: pip install scipy") from error
    start, end, capacity = edges
    whole = np.rint(capacity * UNIT).astype(np.int32)
    some = whole > 0
    graph = csr_array(
        (whole[some], (start[some].astype(np.int32), end[some].astype(np.int32))), (nodes, nodes)
    )
    found = [maximum_flow(graph, source, sink).flow_value for sink in sinks]
    return np.asarray(found, dtype=np.float64) / UNIT


def _one(kept: Sequence[Kept], row: Tensor, example: int, stack: str, residual: float) -> Tensor:
    """One example: nodes are numbered from the inputs of every stack up."""
    level: dict[str, np.ndarray] = {}
    first: dict[str, np.ndarray] = {}
    count = 0
    made: list[Edges] = []

    def nodes(size: int) -> np.ndarray:
        nonlocal count
        count += size
        return np.arange(count - size, count)

    for one in kept:
        mine, cross = one.attention.stack, one.attention.kind == "cross"
        if mine not in level:
            level[mine] = first[mine] = nodes(one.map.scores.n_q)
        above = nodes(one.map.scores.n_q)
        weights = _mean_map(one, example) * (1 - residual)
        own = level[mine]
        if cross:
            other = next(s for s in level if s != mine)
            made.append((above, own, np.full(len(own), residual)))
            made.append(_pairs(above, level[other], weights))
        else:
            made.append(_pairs(above, own, weights + residual * np.eye(len(own))))
        level[mine] = above
    source = int(nodes(1)[0])
    read = level[kept[-1].attention.stack]
    made.append((np.full(len(read), source), read, row.double().cpu().numpy()))
    edges = tuple(np.concatenate(part) for part in zip(*made, strict=True))
    found = max_flows(edges, count, source, first[stack].tolist())  # type: ignore[arg-type]
    return torch.from_numpy(found).float()


def _mean_map(one: Kept, example: int) -> np.ndarray:
    """`(n_q, n_k)` in float64, row after row of tiles."""
    s = one.map.scores
    size = max(1, 2**22 // (s.batch * s.heads * s.n_k))
    tiles = [
        one.map.rows(rows)[example].double().mean(0) for rows in torch.arange(s.n_q).split(size)
    ]
    return np.asarray(torch.cat(tiles).cpu())


def _pairs(above: np.ndarray, below: np.ndarray, weights: np.ndarray) -> Edges:
    return np.repeat(above, len(below)), np.tile(below, len(above)), weights.reshape(-1)
