"""Mass on chosen keys: one key of each query, or all keys that share the query's id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.maps import kernels
from headwise.maps.scores import Scores

ROWS = 32  # sorted queries of a block
SPAN = 96  # keys up to which the runs of blocks are handled together
WIDE = 128  # sorted queries of a block with a longer run
TOGETHER = 2**20  # logits held at a time: they should stay in cache


def ids_of(ids: Tensor, batch: int, n: int, name: str) -> Tensor:
    """Integer ids as `(batch, n)`, checked."""
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.shape not in ((n,), (batch, n)):
        raise ValueError(
            f"{name} must be integers ({n},) or ({batch}, {n}), not {ids.dtype} {tuple(ids.shape)}"
        )
    return ids.expand(batch, n)


def pair_logits(
    scores: Scores, b: int, i: Tensor, j: Tensor, s: Tensor, among: Tensor | None = None
) -> Tensor:
    """Soft-cap, bias and pattern on scaled products s `(heads, ...)` of positions i, j `(...)`;
    `among` `(...)`: pairs that count at all."""
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    if isinstance(scores.bias, Tensor):
        table = scores.bias[b if scores.bias.shape[0] > 1 else 0]
        row = i - scores.offset if table.shape[1] > 1 else torch.zeros_like(i)
        s = s + table[:, row, j if table.shape[2] > 1 else torch.zeros_like(j)].to(s.dtype)
    elif scores.bias is not None:
        flat_i, flat_j = (x.reshape(-1) for x in torch.broadcast_tensors(i, j))
        parts = [
            scores.bias.tile(flat_i[at], flat_j[at]).diagonal(dim1=-2, dim2=-1)
            for at in torch.arange(len(flat_i), device=s.device).split(256)
        ]
        bias = torch.cat(parts, -1) if parts else s.new_zeros((1, 0))
        s = s + bias.to(s.dtype).reshape(-1, *s.shape[1:])
    head = torch.arange(scores.heads, device=s.device).view(-1, *(1,) * (s.dim() - 1))
    batch = torch.full((1,) * s.dim(), b, device=s.device)
    allowed = scores.pattern.allowed(i[None], j[None], batch, head)
    if among is not None:
        allowed = allowed & among
    return s.masked_fill(~allowed, float("-inf"))


def mass_at(scores: Scores, lse: Tensor, index: Tensor) -> Tensor:
    """exp(scale * q_i . k_index(i) - lse_i), zero where index is -1. `(batch, heads, n_q)`."""
    s = scores
    index = ids_of(index.to(s.device), s.batch, s.n_q, "index")
    if s.n_q and bool((index >= s.n_k).any()):
        raise ValueError(f"index names key {int(index.max())}, there are {s.n_k}")
    out = torch.zeros(s.q.shape[:3], dtype=s.dtype, device=s.device)
    i = s.positions()
    for b in range(s.batch):
        at = (index[b] >= 0).nonzero()[:, 0]
        if not len(at):
            continue
        j = index[b, at]
        # one key-value head at a time: the gathered keys are as large as the keys
        q = s.q[b, :, at].to(s.dtype).view(s.kv_heads, s.group, len(at), -1)
        k = s.k[b][:, None, j].to(s.dtype)
        logits = (q * k).sum(-1).view(s.heads, -1) * s.scale
        logits = pair_logits(s, b, i[at], j, logits)
        row = lse[b][:, at].to(s.dtype)
        out[b, :, at] = (logits - row.masked_fill(row == float("-inf"), 0.0)).exp()
    return out.clamp_max(1.0)


def mass_matching(scores: Scores, lse: Tensor, query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Mass on keys with the query's id. Sorting by id makes equal ids neighbours, so that a block
    of sorted queries needs only the short run of sorted keys that carries their ids.

    Most ids are rare: their blocks have runs of a few dozen keys and go together, many at a time.
    Frequent ids have long runs and go block by block.
    """
    s = scores
    query_ids = ids_of(query_ids.to(s.device), s.batch, s.n_q, "query_ids")
    key_ids = ids_of(key_ids.to(s.device), s.batch, s.n_k, "key_ids")
    out = torch.zeros(s.q.shape[:3], dtype=s.dtype, device=s.device)
    reduce = _fused if _fuses(s) else _blocks
    for b in range(s.batch):
        q_order, k_order = query_ids[b].argsort(stable=True), key_ids[b].argsort(stable=True)
        ids_k = key_ids[b, k_order].contiguous()
        ids_q = query_ids[b, q_order].contiguous()
        low = torch.searchsorted(ids_k, ids_q)
        high = torch.searchsorted(ids_k, ids_q, right=True)
        some = ((high > low) & (ids_q >= 0)).nonzero()[:, 0]
        if not len(some):
            continue
        run = _Run(q_order[some], k_order, low[some], high[some])
        # gathered once: blocks are then slices, or windows, of vectors that lie in order
        vectors = _taken(s.q[b], run.queries, s.dtype), _taken(s.k[b], run.keys, s.dtype)
        lse_of = torch.empty((s.heads, len(some)), dtype=s.dtype, device=s.device)
        starts = torch.arange(0, len(some), ROWS, device=s.device)
        ends = (starts + ROWS).clamp_max(len(some))
        narrow = run.high[ends - 1] - run.low[starts] <= SPAN
        together = max(1, TOGETHER // (s.heads * ROWS * SPAN))
        for part in starts[narrow].split(together) if bool(narrow.any()) else ():
            rows = (part[:, None] + torch.arange(ROWS, device=s.device)).clamp_max(len(some) - 1)
            at = run.low[rows[:, :1]] + torch.arange(SPAN, device=s.device)
            # rows beyond the last repeat it, with the same value
            lse_of[:, rows.reshape(-1)] = reduce(s, b, run, vectors, rows, at)
        for first, last in _joined(starts[~narrow].tolist(), len(some)):
            rows = torch.arange(first, last, device=s.device)[None]
            low_key, high_key = _visible(s, run, first, last)
            at = torch.arange(low_key, high_key, device=s.device)[None]
            if low_key >= high_key:
                lse_of[:, first:last] = float("-inf")
            else:
                lse_of[:, first:last] = reduce(s, b, run, vectors, rows, at)
        row = lse[b][:, run.queries].to(s.dtype)
        row = row.masked_fill(row == float("-inf"), 0.0)
        out[b, :, run.queries] = (lse_of - row).exp()
    return out.clamp_max(1.0)


@dataclass(frozen=True)
class _Run:
    """Queries and keys sorted by id: query t of the list matches keys[low[t] : high[t]]."""

    queries: Tensor
    keys: Tensor
    low: Tensor
    high: Tensor

    def pairs(self, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """For blocks of rows `(blocks, rows)` and places in the list of keys `(blocks, width)`:
        the keys `(blocks, width)`, and which each row matches `(blocks, rows, width)`."""
        low, high = self.low[rows][..., None], self.high[rows][..., None]
        matches = (at[:, None] >= low) & (at[:, None] < high)
        return self.keys[at.clamp_max(len(self.keys) - 1)], matches


def _visible(s: Scores, run: _Run, first: int, last: int) -> tuple[int, int]:
    """Places in the list of keys that rows [first, last) match and that the pattern may let them
    see: with one id, keys stand in the order of their positions, and a causal map halves them."""
    low, high = int(run.low[first]), int(run.high[last - 1])
    if int(run.high[first]) != high:
        return low, high
    queries = run.queries[first:last]
    start, stop = int(queries.min()) + s.offset, int(queries.max()) + 1 + s.offset
    seen = s.pattern.ranges(start, stop, s.n_k).possible
    if not seen:
        return low, low
    positions = run.keys[low:high].contiguous()
    ends = torch.tensor([seen[0][0], seen[-1][1]], device=positions.device)
    a, b = torch.searchsorted(positions, ends).tolist()
    return low + a, low + b


def _joined(starts: list[int], n: int) -> Iterator[tuple[int, int]]:
    """Blocks of ROWS rows that follow each other, joined up to WIDE rows."""
    at = 0
    while at < len(starts):
        first = starts[at]
        last = first + ROWS
        at += 1
        while at < len(starts) and starts[at] == last and last - first < WIDE:
            last += ROWS
            at += 1
        yield first, min(last, n)


Vectors = tuple[Tensor, Tensor]


def _chosen(vectors: Vectors, rows: Tensor, at: Tensor) -> Vectors:
    """q `(heads, blocks, rows, d)` and k `(kv_heads, blocks, width, d)` of blocks of the lists."""
    q, k = vectors
    last = k.shape[1] - 1
    r0, r1, k0, k1 = int(rows[0, 0]), int(rows[0, -1]), int(at[0, 0]), int(at[0, -1])
    if len(rows) == 1 and r1 - r0 + 1 == rows.shape[1] and k1 <= last:
        return q[:, None, r0 : r1 + 1], k[:, None, k0 : k1 + 1]  # one long block is a slice
    return _taken(q, rows, q.dtype), _taken(k, at.clamp_max(last), k.dtype)


def _blocks(s: Scores, b: int, run: _Run, vectors: Vectors, rows: Tensor, at: Tensor) -> Tensor:
    """lse `(heads, blocks * rows)` over the keys that match, for blocks of rows of the list."""
    (blocks, r), width = rows.shape, at.shape[1]
    keys, matches = run.pairs(rows, at)
    q, k = _chosen(vectors, rows, at)
    q = (q * s.scale).reshape(s.kv_heads, s.group, blocks, r, -1)
    products = q.transpose(1, 2).reshape(s.kv_heads, blocks, s.group * r, -1) @ k.mT
    logits = products.view(s.kv_heads, blocks, s.group, r, width).transpose(1, 2)
    logits = logits.reshape(s.heads, blocks, r, width)
    i, j = s.positions()[run.queries[rows]][..., None], keys[:, None]
    logits = pair_logits(s, b, i.expand(-1, -1, width), j.expand(-1, r, -1), logits, matches)
    return logits.logsumexp(-1).flatten(1)


def _taken(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """x[:, index] of `(heads, n, d)`, row by row: quicker than indexing with a table."""
    return x.index_select(1, index.reshape(-1)).to(dtype).unflatten(1, index.shape)


def _fuses(s: Scores) -> bool:
    return (
        s.softcap is None
        and s.bias is None
        and s.device.type == "cpu"
        and not s.pattern.by_head
        and kernels.why_not(s.device, s.dtype, s.q.shape[-1]) is None
    )


def _fused(s: Scores, b: int, run: _Run, vectors: Vectors, rows: Tensor, at: Tensor) -> Tensor:
    """The same from the kernel: blocks stand where it expects heads, and what is forbidden is an
    additive mask."""
    keys, matches = run.pairs(rows, at)
    batch = torch.full((1, 1, 1), b, device=s.device)
    i = s.positions()[run.queries[rows]][..., None]
    allowed = matches & s.pattern.allowed(i, keys[:, None], batch)
    hidden = torch.zeros((), dtype=s.dtype, device=s.device).masked_fill(~allowed, float("-inf"))
    q, k = _chosen(vectors, rows, at)
    mask = hidden.expand(s.kv_heads, -1, -1, -1)
    lse = torch.empty(q.shape[:-1], dtype=s.dtype, device=s.device)
    for g in range(s.group):
        heads = slice(g, None, s.group)
        lse[heads] = kernels.flash(q[heads], k, k, s.scale, False, mask)[1]
    # where nothing is allowed the kernel says 0
    return lse.masked_fill(~allowed.any(-1), float("-inf")).flatten(1)
