"""Attention rollout: how much of each input a position holds, if attention moved things about.

Abnar and Zuidema 2020 (arXiv 2005.00928): a layer keeps half of what a position held and takes
half from where it looks, A~ = 0.5 I + 0.5 mean_h A_h, and layers multiply, R = A~_L ... A~_1. The
one row of R that an answer is read from is r A~_L ... A~_1: products of a row and a map, from the
top layer down, so that no n x n matrix is made; queries and keys of all layers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.instruments.kept_maps import Kept, keep, stack_read, wanted_stack
from headwise.instruments.metrics import Metric
from headwise.maps import AttentionMap
from headwise.models import ModelView
from headwise.models.sites import Site, recording

__all__ = ["FUSE", "follow", "fused_row", "random_scores", "raw_attention", "rollout"]

FUSE = ("mean", "max", "min")
TILE = 2**22
"""Numbers of a map that are made at a time, where its heads have to be compared."""


def rollout(
    view: ModelView,
    inputs: dict[str, Any],
    metric: Metric,
    *,
    of: str | None = None,
    fuse: str = "mean",
    residual: float = 0.5,
    at: Tensor | int | None = None,
) -> Tensor:
    """Attention rollout of the positions that the answer is read from, `(batch, n)`, sums to 1.

    of: the stack whose inputs are scored where there are two (by default the encoder's; what lies
    on the two sums to 1 together). fuse: how heads become one map: "mean" as published, or "max"
    or "min" as is done for vision models, whose rows are then divided by their sums. residual: the
    share that stays where it is; with 0, cross-attention hands everything to the encoder. at: a
    position to follow instead. With learned sinks, what goes to a sink is lost.

    Memory O(layers n d), and a tile of 2**22 numbers for max and min. Raises ValueError for
    options that do not exist.
    """
    _check(fuse, residual)
    stack = wanted_stack(view, of)
    kept, row = keep(view, inputs, metric, at)
    return follow(kept, row, lambda one, r: fused_row(one, r, fuse), residual)[stack]


def follow(
    kept: Sequence[Kept],
    row: Tensor,
    step: Callable[[AttentionMap, Tensor], Tensor],
    residual: float = 0.5,
) -> dict[str, Tensor]:
    """A row of weights `(batch, n)` from the last layer down to the inputs of every stack.

    step: the product of a row with a map, `(map, (batch, n_q)) -> (batch, n_k)`.
    """
    read = kept[-1].attention.stack
    rows = {read: row}
    for one in reversed(kept):
        stack, cross = one.attention.stack, one.attention.kind == "cross"
        here = rows.get(stack)
        if here is None:
            continue
        moved = (1 - residual) * step(one.map, here)
        rows[stack] = residual * here
        target = stack if not cross else next(s for s in _stacks(kept) if s != stack)
        rows[target] = rows[target] + moved if target in rows else moved
    return rows


def fused_row(one: AttentionMap, row: Tensor, fuse: str = "mean") -> Tensor:
    """r A `(batch, n_k)` for weights r `(batch, n_q)` >= 0 and the fused map A of all heads."""
    heads, n_q, n_k = one.scores.heads, one.scores.n_q, one.scores.n_k
    if fuse == "mean":
        return one.transpose_apply(row[:, None].expand(-1, heads, -1)).mean(1)
    made = row.new_zeros(len(row), n_k)
    size = max(1, TILE // (len(row) * heads * n_k))
    for start in range(0, n_q, size):
        rows = torch.arange(start, min(start + size, n_q), device=row.device)
        rows = rows[(row[:, rows] != 0).any(0)]  # a row that nothing comes from is not made
        if len(rows):
            tile = one.rows(rows)
            both = tile.amax(1) if fuse == "max" else tile.amin(1)
            both = both / both.sum(-1, keepdim=True).clamp_min(1e-30)
            made += torch.einsum("bq,bqk->bk", row[:, rows], both)
    return made


def raw_attention(
    view: ModelView,
    inputs: dict[str, Any],
    metric: Metric,
    *,
    of: str | None = None,
    at: Tensor | int | None = None,
) -> Tensor:
    """Where the last attention looks from the positions that the answer is read from `(batch, n)`,
    mean over heads: the usual baseline. Of an encoder's inputs, the last cross-attention."""
    stack = wanted_stack(view, of)
    kept, row = keep(view, inputs, metric, at)
    kind = "self" if stack == stack_read(view) else "cross"
    last = [one for one in kept if one.attention.kind == kind][-1]
    return fused_row(last.map, row)


def random_scores(
    view: ModelView,
    inputs: dict[str, Any],
    metric: Metric,
    *,
    of: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Even random numbers `(batch, n)`, the same for the same seed: what every method must beat."""
    stack = wanted_stack(view, of)
    site = Site("residual", 0, stack)
    with torch.no_grad(), recording(view, [site]) as seen:
        view.model(**inputs)
    random = torch.Generator().manual_seed(seed)
    return torch.rand(seen[site].shape[:2], generator=random)


def _stacks(kept: Sequence[Kept]) -> list[str]:
    return list(dict.fromkeys(one.attention.stack for one in kept))


def _check(fuse: str, residual: float) -> None:
    if fuse not in FUSE:
        raise ValueError(f"fuse={fuse!r}: expected {', '.join(FUSE)}")
    if not 0 <= residual < 1:
        raise ValueError(f"residual={residual}: expected a share in [0, 1)")
