"""Mass on chosen keys: one key of each query, or all keys that share the query's id."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.maps import kernels
from headwise.maps.scores import Scores

ROWS = 128  # sorted queries handled together


def ids_of(ids: Tensor, batch: int, n: int, name: str) -> Tensor:
    """Integer ids as `(batch, n)`, checked."""
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.shape not in ((n,), (batch, n)):
        raise ValueError(
            f"{name} must be integers ({n},) or ({batch}, {n}), not {ids.dtype} {tuple(ids.shape)}"
        )
    return ids.expand(batch, n)


def pair_logits(scores: Scores, b: int, i: Tensor, j: Tensor, s: Tensor) -> Tensor:
    """Soft-cap, bias and pattern on scaled products s `(heads, ...)` of positions i, j `(...)`."""
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
    of sorted queries needs only the short run of sorted keys that carries their ids."""
    s = scores
    query_ids = ids_of(query_ids.to(s.device), s.batch, s.n_q, "query_ids")
    key_ids = ids_of(key_ids.to(s.device), s.batch, s.n_k, "key_ids")
    out = torch.zeros(s.q.shape[:3], dtype=s.dtype, device=s.device)
    fused = (
        s.softcap is None
        and s.bias is None
        and s.device.type == "cpu"
        and kernels.why_not(s.device, s.dtype, s.q.shape[-1]) is None
    )
    for b in range(s.batch):
        q_order = query_ids[b].argsort(stable=True)
        q_order = q_order[query_ids[b, q_order] >= 0]
        k_order = key_ids[b].argsort(stable=True)
        ids_q, ids_k = query_ids[b, q_order].contiguous(), key_ids[b, k_order].contiguous()
        low = torch.searchsorted(ids_k, ids_q)
        high = torch.searchsorted(ids_k, ids_q, right=True)
        some = (high > low).nonzero()[:, 0]
        if not len(some):
            continue
        q_order, ids_q, low, high = q_order[some], ids_q[some], low[some], high[some]
        q, k = s.q[b, :, q_order].to(s.dtype), s.k[b, :, k_order].to(s.dtype)
        row = lse[b][:, q_order].to(s.dtype)
        row = row.masked_fill(row == float("-inf"), 0.0)
        for start in range(0, len(some), ROWS):
            block = slice(start, min(start + ROWS, len(some)))
            first, last = int(low[block.start]), int(high[block.stop - 1])
            rows, keys = q_order[block], k_order[first:last]
            same = ids_q[block][:, None] == ids_k[first:last][None, :]
            part = _fused if fused else _by_hand
            mass = part(s, b, (q[:, block], rows), (k[:, first:last], keys), same)
            out[b, :, rows] = (mass - row[:, block]).exp()
    return out.clamp_max(1.0)


def _by_hand(
    s: Scores, b: int, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], same: Tensor
) -> Tensor:
    """lse `(heads, rows)` over the keys that are the same, of gathered (vectors, positions)."""
    (q, row), (k, j) = queries, keys
    grouped = (q * s.scale).reshape(s.kv_heads, s.group * len(row), -1)
    logits = (grouped @ k.transpose(1, 2)).view(s.heads, len(row), -1)
    logits = pair_logits(s, b, s.positions()[row][:, None], j[None, :], logits)
    return logits.masked_fill(~same, float("-inf")).logsumexp(-1)


def _fused(
    s: Scores, b: int, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], same: Tensor
) -> Tensor:
    """The same from the kernel, which takes what is forbidden as an additive mask."""
    (q, row), (k, j) = queries, keys
    batch = torch.full((1,), b, device=s.device)
    head = torch.arange(s.heads, device=s.device)
    allowed = s.pattern.tile(s.positions()[row], j, batch, head) & same
    hidden = torch.zeros((), dtype=s.dtype, device=s.device).masked_fill(~allowed, float("-inf"))
    lse = kernels.flash(q[None], k[None], k[None], s.scale, False, hidden)[1]
    # where nothing is allowed the kernel says 0
    return lse.masked_fill(~allowed.any(-1), float("-inf"))[0]
