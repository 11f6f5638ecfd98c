"""Attention of a few queries to the entries of a block: no key is copied, no mask is made that
is not needed.

A row is a sequence of its own; its queries are those of the g heads that share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.compress.cache.block import Block
from headwise.compress.cache.store import Exact, Piece, Plain
from headwise.maps import Causal, KeyMask, attend

MANY = 32
"""From so many queries on a fused kernel is quicker than two products (it skips what causality
rules out, and writes no scores)."""

SCORES = 2**24
"""Scores that are held at one time (64 MiB of float32)."""


@dataclass(frozen=True)
class Query:
    """Queries `(rows, g, m, d)` of all rows of a layer, their positions `(rows, m)` (-1: padding),
    the newest of which is the newest entry of every row, and what shapes the map. `window`: a
    query sees that many places, its own included. `sinks`: `(rows, g)`, learned logits that take
    part in the normalisation only."""

    queries: Tensor
    positions: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None

    @property
    def count(self) -> int:
        """m."""
        return self.queries.shape[2]

    def of(self, block: Block) -> Query:
        """Those of the rows of a block."""
        if block.whole:
            return self
        sinks = None if self.sinks is None else self.sinks[block.rows]
        return Query(
            self.queries[block.rows],
            self.positions[block.rows],
            self.scale,
            self.softcap,
            sinks,
            self.window,
        )

    def part(self, start: int, stop: int) -> Query:
        """The queries from `start` to `stop`."""
        queries, positions = self.queries[:, :, start:stop], self.positions[:, start:stop]
        return Query(queries, positions, self.scale, self.softcap, self.sinks, self.window)


def attend_block(query: Query, block: Block) -> Tensor:
    """`(R, g, m, d_v)` for the queries of the block's rows; zero where nothing is seen. The
    newest m entries of the block are those of the queries themselves."""
    _, g, m, _ = query.queries.shape
    rows = len(block.rows)
    if m >= MANY and query.window is None and isinstance(block.store, Plain):
        return _fused(query, block, *block.store.whole())
    at_once = max(1, SCORES // max(1, rows * g * block.length))
    if m <= at_once:
        return _small(query, block, m == 1)
    parts = (query.part(at, min(at + at_once, m)) for at in range(0, m, at_once))
    outs = [_small(part, block, False) for part in parts]
    return torch.cat(outs, 2)


def _fused(query: Query, block: Block, keys: Tensor, values: Tensor) -> Tensor:
    real = block.positions >= 0 if block.gaps else None
    pattern = Causal() if real is None else Causal() & KeyMask(real)
    out, lse = attend(
        query.queries,
        keys[:, None],
        values[:, None],
        pattern,
        query.scale,
        softcap=query.softcap,
        need_lse=query.sinks is not None,
    )
    return out if query.sinks is None else _with_sinks(out, lse, query.sinks)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The share that learned logits leave of what was normalised without them."""
    left = torch.sigmoid(lse - sinks[:, :, None].to(lse.dtype))
    return out * left[..., None].to(out.dtype)


def _small(query: Query, block: Block, newest: bool) -> Tensor:
    """Of few queries. `newest`: it is one, and no entry came after it."""
    allowed = _allowed(query, block, newest)
    if isinstance(block.store, Plain) and query.softcap is None and query.sinks is None:
        keys, values = block.store.whole()
        if query.queries.dtype in (torch.float32, torch.float64):
            return _products(query, Exact(keys, values), allowed)
        mask = None if allowed is None else allowed[:, None]
        shape = (-1, query.queries.shape[1], -1, -1)
        return F.scaled_dot_product_attention(
            query.queries,
            keys[:, None].expand(shape),
            values[:, None].expand(shape),
            mask,
            scale=query.scale,
        )
    turned = replace(query, queries=block.store.turned(query.queries))
    pieces = block.store.pieces(query.count * query.queries.shape[1])
    return block.store.turned_back(_by_pieces(turned, pieces, allowed))


def _allowed(query: Query, block: Block, newest: bool) -> Tensor | None:
    """`(R, m, n)`, True where a query sees an entry; None where all do."""
    m, n = query.count, block.length
    if newest and not block.gaps and query.window is None:
        return None
    keys, places = block.positions[:, None], query.positions[:, :, None]
    allowed = keys >= 0
    if not newest:
        allowed = allowed & (keys <= places)
    if query.window is not None:
        allowed = allowed & (keys > places - query.window)
    return allowed.expand(-1, m, n)


def _shaped(scores: Tensor, query: Query, allowed: Tensor | None) -> Tensor:
    """Soft-capped where that is wanted; minus infinity where a query does not look."""
    if query.softcap is not None:
        scores = query.softcap * torch.tanh(scores / query.softcap)
    if allowed is not None:
        g = query.queries.shape[1]
        hidden = ~allowed if g == 1 else ~allowed.repeat(1, g, 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def _products(query: Query, piece: Piece, allowed: Tensor | None) -> Tensor:
    rows, g, m, d = query.queries.shape
    scores = piece.scores(query.queries.reshape(rows, g * m, d) * query.scale)
    weights = _shaped(scores, query, allowed).softmax(-1)
    if allowed is not None:
        weights = weights.nan_to_num_(0.0)  # a query that sees nothing: padding
    return piece.summed(weights).view(rows, g, m, -1)


def _by_pieces(query: Query, pieces: Iterator[Piece], allowed: Tensor | None) -> Tensor:
    """Softmax over all pieces, from what each gives alone: the log-sum-exps say how to weigh."""
    rows, g, m, d = query.queries.shape
    kind = query.queries.dtype
    wide = kind if kind in (torch.float32, torch.float64) else torch.float32
    asked = query.queries.to(wide).reshape(rows, g * m, d) * query.scale
    peak = torch.full((rows, g * m, 1), -math.inf, dtype=wide, device=asked.device)
    if query.sinks is not None:
        peak = query.sinks.to(wide).repeat_interleave(m, 1)[..., None]
    total = torch.ones_like(peak) if query.sinks is not None else torch.zeros_like(peak)
    out: Tensor | None = None
    start = 0
    for piece in pieces:
        stop = start + len(piece)
        here = None if allowed is None else allowed[:, :, start:stop]
        scores = _shaped(piece.scores(asked), query, here)
        higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
        floor = torch.where(higher == -math.inf, 0.0, higher)  # nothing seen so far
        weights, before = (scores - floor).exp_(), (peak - floor).exp()
        total = total * before + weights.sum(-1, keepdim=True)
        summed = piece.summed(weights)
        out = summed if out is None else out * before + summed
        peak, start = higher, stop
    assert out is not None, "a store of no pieces"
    out = out / torch.where(total == 0, 1.0, total)
    return out.view(rows, g, m, -1).to(kind)
